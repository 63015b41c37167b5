#!/usr/bin/env python3
"""Teaches a student oriented boxes from YOLO-OBB, DOTA or COCO, whose polygons and masks become rectangles of least
area; and where a teacher of dense features is named, as DINOv3, from its patch map too. Then exports it as a bundle.

OUTPUT is as that of train-student: labels/, the run of `tools/op.sh distill`, distillation_config.yaml, and a bundle of
the folder's own name. The same command with --resume goes on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from openpilot.tools.fair.images.store import Said, fill
from openpilot.tools.fair.images.learning import NEWEST, Learning, begun, check_learning, learn_by, say_next
from openpilot.tools.fair.images.tiles import OVERLAP, check_tiles, tiled
from openpilot.tools.fair.images.train_student import accepted_by, export_bundle, learn
from openpilot.tools.fair.options import parse_options
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.fair.students.sizes import SIZES
from openpilot.tools.learn.processes import is_first, made_by_the_first, one_run
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.options import option as flag, parse

ANYHOW = 180.0  # degrees: pictures from above have no up


@dataclass(frozen=True, kw_only=True)
class Options(Learning):
  verb: ClassVar[str] = "images train-obb"
  data: Path = flag(help="a YOLO-OBB folder or its data.yaml, a DOTA folder, or a COCO JSON with polygons or masks")
  val: Path | None = flag(None, help="other data to judge by; else the data's own val, or some pictures are held out")
  teacher: str = flag("", path=True, help="a DINOv3 or DINOv2 folder, or a registered teacher of dense features")
  feature_weight: float = flag(1.0, help="of the distance from the teacher's patch map; boxes have 1")
  feature_mask: str = flag("all", choices=("all", "objects"), help="where that counts: all of a picture, or on objects")
  unlabeled: Path | None = flag(
    None, aliases=("--unlabelled",), help="a folder of pictures that the teacher alone teaches"
  )
  size: str = flag("small", choices=tuple(SIZES), help="of the student")
  picture_size: int = flag(640, help="side of the square that pictures are letterboxed into, pixels")
  tile: int = flag(0, metavar="PIXELS", help="cut large pictures into tiles of this side, as DOTA_devkit does")
  overlap: int = flag(OVERLAP, metavar="PIXELS", help="of tiles")
  turn: float | None = flag(
    None,
    help="degrees by which pictures are turned at random; default: 180. Beside a teacher's patch map they are neither "
    "turned nor mirrored without it",
  )
  lr: float = flag(NEWEST, help="learning rate")
  pretrained: str | bool = flag(
    False, bare=True, metavar="FILE", path=True, help="start the backbone from the hub's weights, or from FILE"
  )


def check_options(args: Options) -> InputSpec:
  """Raises UserError, before anything is read or written. -> the picture that the student sees."""
  check_learning(args)
  if args.unlabeled is not None and not args.teacher:
    raise UserError("--unlabeled: pictures without labels teach by a teacher alone; add --teacher")
  if not 0 <= args.feature_weight < 1e6:
    raise UserError(f"--feature-weight {args.feature_weight:g}: a weight is a number of at least 0")
  if args.turn is not None and not 0 <= args.turn <= ANYHOW:
    raise UserError(f"--turn {args.turn:g}: degrees from 0 to {ANYHOW:g}")
  if args.picture_size < 64 or args.picture_size % 32:
    raise UserError(f"--picture-size {args.picture_size}: a multiple of 32, of at least 64")
  check_tiles(args.tile, args.overlap)
  return InputSpec("rgb", args.picture_size, args.picture_size)


def load_features(args: Options) -> Any:
  """The teacher of dense features. Raises UserError."""
  from openpilot.tools.fair.registry import TEACHERS, load_teacher

  path = Path(args.teacher)
  if args.teacher in TEACHERS or not path.is_dir():
    told = parse_options(list(args.option), [args.teacher])[args.teacher]
    more = {"device": args.device} if args.device is not None else {}
    return load_teacher(args.teacher, None, args.accept_license, args.download, **more, **told)
  from openpilot.tools.fair.dinov3.config import MODEL_TYPES
  from openpilot.tools.fair.hf import read_json

  kind = str(read_json(path / "config.json", f"--teacher {path}").get("model_type"))
  like = "dinov3-vits16" if kind in MODEL_TYPES else "dinov2-small"  # of which the size is the folder's own
  said = [item.partition("=") for item in args.option]
  told = parse_options([f"{like}.{k.rpartition('.')[2]}{e}{v}" for k, e, v in said], [like])[
    like
  ]  # a folder has no name
  teacher = load_teacher(like, path, args.accept_license, device=args.device, **told)
  teacher.name, teacher.model_id = kind.split("_")[0], path.resolve().name
  return teacher


def config_of(args: Options, said: Said) -> tuple[Any, dict[str, float]]:
  """-> distillation's Config, and the weights of the loss as they are told."""
  from openpilot.tools.fair.distillation.config import Config

  taught = said.features and args.feature_weight > 0
  weights = {"boxes": 1.0, **({f"features ({args.feature_mask})": args.feature_weight} if taught else {})}
  print("loss         " + ", ".join(f"{k} {v:g}" for k, v in weights.items()))
  moved = not taught or args.turn is not None  # else nobody asked for it, and a map of a turned picture is another map
  parts = {f"patches/{k}": args.feature_weight * (k == args.feature_mask) for k in ("all", "objects")}
  config = Config(
    student=f"oriented-{args.size}",
    tasks=["oriented", "patches"] if taught else ["oriented"],
    pretrained=args.pretrained,
    lr=args.lr,
    parts=parts if taught else {},
    mirror=moved,
    turn=args.turn if args.turn is not None else ANYHOW * moved,
    **learn_by(args, said),
  )
  return config, weights


def check_features(teacher: Any, spec: InputSpec) -> None:
  """Raises UserError where it says no features. It is prepared as for the label store."""
  from openpilot.tools.fair.labels.worker import check_teacher

  check_teacher(teacher, [], [], None, spec)
  if not any(x.name == "features" and x.kind == "dense" for x in teacher.labels):
    says = ", ".join(x.name for x in teacher.labels) or "nothing"
    raise UserError(
      f"--teacher {teacher.name} says {says}, and no dense features; `tools/op.sh teachers` lists who does"
    )


def prepared(args: Options) -> tuple[Options, Said, Any, dict[str, float]]:
  """As of train_student."""
  from openpilot.tools.fair.images.oriented import orient

  spec = check_options(args)
  teachers = [load_features(args)] if args.teacher else []
  for t in teachers:
    check_features(t, spec)
  said = fill(args, spec, teachers, lambda parts: tiled(orient(parts), args.tile, args.overlap))
  args = begun(args, f"oriented-{args.size}")
  return args, said, *config_of(args, said)


def run(args: Options) -> Path:
  """-> the bundle's folder, or the run's where none is written."""
  args, said, config, weights = made_by_the_first(lambda: prepared(args))
  accepted = accepted_by(args, said)
  learn(args, said, config, accepted, weights)
  return export_bundle(args.output, said.train, accepted) if args.export and is_first() else args.output


def main() -> None:
  args = parse(Options, __doc__, "images train-obb")
  with one_run():
    say_next(args, run(args))


if __name__ == "__main__":
  raise SystemExit(cli(main)())

"""What every student of labeled pictures is asked: the options that its commands share."""

import contextlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openpilot.selfdrive.modeld.fair.bundle import DEFAULT, MODELS_DIR, BundleError, load_bundle
from openpilot.tools.fair.images.augment import read_recipe
from openpilot.tools.fair.images.store import FREE, LABELED, Said
from openpilot.tools.fair.labels.sources.pictures import plain_name
from openpilot.tools.fair.students.families import FAMILIES
from openpilot.tools.fair.students.student import BACKBONES
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.options import option as flag
from openpilot.tools.lib.said import command

NOTHING = "none"  # as --init
NEWEST = 1e-3  # learning rate of a student that starts anew


@dataclass(frozen=True, kw_only=True)
class Learning:
  output: Path = flag(aliases=("--out",), help="the student's folder")
  images: Path | None = flag(None, help="the pictures' folder, where it is not beside")
  val_images: Path | None = flag(None, help="the folder of --val's pictures; default: as --images")
  unlabeled_share: float = flag(
    0.5, aliases=("--unlabelled-share",), help="of what is seen: theirs at most; 1: they alone"
  )
  epochs: int = flag(100, help="how often each picture is seen")
  steps: int | None = flag(None, help="of the optimizer, in place of --epochs")
  batch_size: int = flag(16, aliases=("--batch",), help="pictures a step")
  backbone: str | None = flag(None, help=f"of timm: {', '.join(BACKBONES)}")
  init: tuple[str, ...] = flag(
    (),
    metavar="RUN",
    path=True,
    help=f"start from another run's student or a bundle; default: of size small from the one that ships, {DEFAULT}, "
    f"where neither --backbone nor --pretrained is given; {NOTHING}: from random weights",
  )
  augment: str = flag("auto", path=True, help="auto: by what the pictures look like; plain; none; or a recipe's file")
  license: str = flag("", aliases=("--licence",), help="of the pictures, where the data names none")
  option: tuple[str, ...] = flag((), metavar="TEACHER.KEY=VALUE", help="`tools/op.sh teachers TEACHER` lists them")
  download: bool = flag(False, help="let teachers' weights be downloaded from the hub")
  accept_license: tuple[str, ...] = flag(
    (),
    aliases=("--accept-licence",),
    metavar="LICENSE",
    help="of teachers whose license restricts what learns from them",
  )
  device: str | None = flag(None, help="of the teachers: cuda, mps or cpu; default: the best there is")
  precision: str | None = flag(None, choices=("no", "bf16", "fp16"), help="mixed precision of the student")
  seed: int = flag(0, help="of all that is random")
  workers: int = flag(1, help="processes that read and augment")
  resume: bool = flag(False, help="go on from the last checkpoint of the student's folder")
  export: bool = flag(True, help="leave the bundle out")


def check_learning(args: Any) -> None:
  """Of what every student of pictures is asked. Raises UserError."""
  if args.augment not in ("auto", "plain", "none"):
    read_recipe(Path(args.augment))
  for name, least in (("epochs", 1), ("batch_size", 1), ("workers", 0), ("seed", 0)):
    if getattr(args, name) < least:
      raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: it is at least {least}")
  if args.steps is not None and args.steps < 1:
    raise UserError(f"--steps {args.steps}: it is at least 1")
  if args.lr is not None and not 0 < args.lr < math.inf:
    raise UserError(f"--lr {args.lr:g}: the learning rate is above 0, as {NEWEST}")
  if not 0 < args.unlabeled_share <= 1:
    raise UserError(f"--unlabeled-share {args.unlabeled_share:g}: a share is above 0, and 1 at most")
  if args.unlabeled_share == 1 and args.unlabeled is None:
    raise UserError("--unlabeled-share 1: pictures without labels alone teach then; name their folder by --unlabeled")


def begun(args: Any, student: str) -> Any:
  """args: with the options of Learning and --pretrained -> the same; where nobody says what it starts from, a student
  of the size of the bundle that ships starts from that: a few dozen pictures teach one that has seen others more than
  one that has seen none. Says so."""
  nothing = args.init == (NOTHING,)
  if args.resume or (args.output / "last.pt").exists():  # it goes on from the student that is there
    try:
      was = json.loads((args.output / "config.json").read_text()).get("backbone")
    except (OSError, ValueError, AttributeError):
      was = None
    return replace(args, backbone=args.backbone or was, init=() if nothing else args.init)
  if args.pretrained or (args.init and not nothing) or student in FAMILIES:
    return replace(args, init=()) if nothing else args
  if not nothing and args.backbone is None and student.endswith("-small"):
    with contextlib.suppress(BundleError):
      backbone = load_bundle(MODELS_DIR / DEFAULT).manifest.get("backbone")
      print(f"start        {DEFAULT}, which has seen streets; --init {NOTHING}: from random weights")
      return replace(args, init=(str(MODELS_DIR / DEFAULT),), backbone=backbone)
  print("start        random weights; --pretrained: those of the hub for its backbone")
  return replace(args, init=())


def picture_weights(said: Said, share: float) -> tuple[float, float]:
  """How often a labeled picture is drawn, and one without labels, so that the latter are at most `share` of what is
  seen: a crowd of them would leave the labels little to say. Of 1 they are all that is seen: labels then only judge."""
  if share == 1:
    return 0.0, 1.0
  return 1.0, min(1.0, share / (1 - share) * said.labeled / max(1, said.unlabeled))


def learn_by(args: Any, said: Said) -> dict[str, Any]:
  """What distillation's Config has alike for every student of pictures. args: with the options of Learning."""
  from openpilot.tools.learn.device import mixed_precision

  labeled, free = picture_weights(said, args.unlabeled_share)
  per_epoch = max(1, math.ceil((labeled * said.labeled + free * said.unlabeled) / args.batch_size))
  steps = args.steps if args.steps is not None else args.epochs * per_epoch
  return {
    "backbone": args.backbone,
    "steps": steps,
    "batch": args.batch_size,
    "warmup": min(200, steps // 10),
    "seed": args.seed,
    "sample": [f"{name}*={w:.6g}" for name, w in ((LABELED, labeled), (FREE, free)) if said.unlabeled and w < 1],
    "augment": args.augment != "none",
    "eval_every": min(500, max(per_epoch, steps // 10)),
    "eval_clips": 200,
    "precision": args.precision or mixed_precision(),
    "input": said.spec,
    "classes": said.classes,
    "ignore_classes": True,  # of teachers: the data's own are all there
    "zoom": said.zoom,
    "pixels": said.pixels,
  }


def bundle_of(output: Path) -> Path:
  """Its folder has the student's name, as far as a bundle may have it: a bundle is called as its folder is."""
  return output / (plain_name(output.resolve().name).lower().lstrip("_-.")[:64] or "student")


def say_next(args: Any, where: Path) -> None:
  """The command to type after this one. where: the bundle, or the run where none was written."""
  images = (args.val_images or args.images) if args.val is not None else args.images
  at = ("--images", images) if images is not None else ()
  more = command("images", "evaluate", where, "--data", args.val or args.data, *at)
  if not args.export:
    more = command("export", where, "--output", bundle_of(args.output))
  print(f"next\n  tools/op.sh {more}")

#!/usr/bin/env python3
"""Teaches a student that needs no prompt from labeled pictures, from what teachers say of them, or from both; then
exports it as a bundle. Which student, which classes and which losses: the data says it.

OUTPUT keeps labels/ (pictures and all that was said of them, teachers' answers too), the run of `tools/op.sh distill`
(best.pt, last.pt, log.jsonl, samples/), distillation_config.yaml and a bundle of the folder's own name. The same
command with --resume goes on."""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from openpilot.tools.fair.images.families import check_family, select_student_model
from openpilot.tools.fair.images.learning import NEWEST, Learning, begun, bundle_of, check_learning, learn_by, say_next
from openpilot.tools.fair.images.loss import PARTS, balance, parts_of, read_weights, say_balance
from openpilot.tools.fair.images.store import Said, fill
from openpilot.tools.fair.labels.label_options import parse_weights
from openpilot.tools.fair.options import parse_options
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.fair.students.families import FAMILIES, OF_TRANSFORMERS, check_processes
from openpilot.tools.fair.students.sizes import SIZES
from openpilot.tools.fair.students.student import student_names
from openpilot.tools.learn.processes import is_first, made_by_the_first, one_run, said_once, world_size
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.files import atomic_path
from openpilot.tools.lib.options import option as flag, parse
from openpilot.tools.lib.said import public

KINDS = ("rgb", "model-frame")
OF_ULTRALYTICS = tuple(n for n in FAMILIES if n not in OF_TRANSFORMERS)
OURS = tuple(n for n in student_names() if n.startswith(("objects-", "detector-")))
FAMILY = 2e-4  # learning rate of another project's student
SIDE = 640  # of pictures, of ours


@dataclass(frozen=True, kw_only=True)
class Options(Learning):
  verb: ClassVar[str] = "images train-student"
  data: Path = flag(help="a COCO JSON, a YOLO folder, or its data.yaml")
  val: Path | None = flag(None, help="another COCO JSON or YOLO folder to judge by; else some pictures are held out")
  teacher_dir: Path | None = flag(None, metavar="EXP", help="what `images train-teacher` wrote")
  teachers: str = flag("", help="or teachers as they are, comma-separated; `tools/op.sh teachers` lists them")
  untuned: bool = flag(False, help="teachers that were not tuned on this data may teach; the card says it")
  unlabeled: Path | None = flag(None, aliases=("--unlabelled",), help="a folder of pictures that teachers alone teach")
  alias: tuple[str, ...] = flag((), metavar="NAME=CLASS", help="a teacher's name of one of the data's classes")
  teacher_score: float = flag(0.4, help="from which on what a teacher says is an object; what is below teaches softly")
  student: str = flag(
    "",
    help=f"one of {', '.join(OURS)}; of transformers: {', '.join(OF_TRANSFORMERS)}; of ultralytics, where it is "
    f"installed and its AGPL-3.0 accepted: {', '.join(OF_ULTRALYTICS)}; default: of ours, by the data",
  )
  size: str = flag("small", choices=tuple(SIZES), help="of the student that the data chooses")
  picture_size: int | None = flag(
    None, help=f"side of the square that pictures are letterboxed into, pixels; default: {SIDE}, or the family's own"
  )
  input: str = flag("rgb", choices=KINDS, help="model-frame: openpilot's view; the bundle then runs in fairmodeld")
  focal: float | None = flag(None, help="of the pictures' camera, pixels: for model-frame; without, scale is varied")
  detection: bool = flag(True, help="leave this loss out: boxes and classes")
  segmentation: bool = flag(True, help="leave this loss out: masks")
  logit: bool = flag(True, help="leave this loss out: the teacher's scores of all classes")
  feature: bool = flag(True, help="leave this loss out: the teacher's feature map")
  weight: tuple[str, ...] = flag((), metavar="PART=W", help=f"of {', '.join(PARTS)}; they are made to sum to 1")
  lr: float | None = flag(None, help=f"learning rate; default: {NEWEST:g}, of a student of transformers {FAMILY:g}")
  pretrained: str | bool = flag(
    False,
    bare=True,
    metavar="FILE",
    path=True,
    help="start the backbone from the hub's weights, or from FILE; a student of transformers as a whole from its "
    "published ones, or from a folder or hub id",
  )
  weights: tuple[str, ...] = flag((), metavar="TEACHER=PATH", help="a teacher's checkpoint")


def check_options(args: Options) -> InputSpec:
  """Raises UserError, before anything is read or written. -> the picture that the student sees."""
  if args.student:
    check_family(args.student, args.accept_license)
    check_processes(args.student, world_size())
    if args.student not in (*OURS, *FAMILIES):
      what = "finds no objects" if args.student in student_names() else "is none"
      raise UserError(f"--student {args.student} {what}; there are {', '.join((*OURS, *FAMILIES))}")
  read_weights(args.weight)
  check_learning(args)
  if not any(getattr(args, part) for part in PARTS):
    raise UserError("no part of the loss is left: --no-" + ", --no-".join(PARTS))
  if args.teacher_dir is not None and args.teachers:
    raise UserError("--teacher-dir and --teachers: give one of them")
  if args.teachers and not args.untuned:
    raise UserError(
      f"--teachers {args.teachers}: these were not tuned on this data, and a student inherits what they get wrong; "
      "tune them with `tools/op.sh images train-teacher`, or add --untuned"
    )
  if args.unlabeled is not None and args.teacher_dir is None and not args.teachers:
    raise UserError("--unlabeled: pictures without labels teach by a teacher alone; add --teacher-dir or --teachers")
  if not 0 < args.teacher_score < 1:
    raise UserError(f"--teacher-score {args.teacher_score:g}: a score is between 0 and 1")
  family = FAMILIES.get(args.student)
  if family is not None and (args.input == "model-frame" or args.backbone is not None):
    what = (
      "sees RGB pictures alone: leave out --input" if args.backbone is None else "has its own: leave out --backbone"
    )
    raise UserError(f"--student {args.student} {what}")
  if args.input == "model-frame":
    if args.focal is not None and not 0 < args.focal < math.inf:
      raise UserError(f"--focal {args.focal:g}: a focal length is above 0, in pixels")
    return InputSpec()
  if args.focal is not None:
    raise UserError("--focal is of --input model-frame; an rgb student sees whole pictures of any camera")
  side, step = args.picture_size, 32 if family is None else family.step
  if side is None:
    side = SIDE if family is None else family.side
  if side < 64 or side % step:
    raise UserError(f"--picture-size {side}: a multiple of {step}, of at least 64")
  return InputSpec("rgb", side, side)


def teacher_names(args: Options) -> list[str]:
  return list(dict.fromkeys(n for n in args.teachers.replace(" ", "").split(",") if n))


def teachers_of(args: Options) -> list[Any]:
  """Raises UserError."""
  from openpilot.tools.fair.images.soft import load_experiment, load_soft

  if args.teacher_dir is not None:
    return [load_experiment(args.teacher_dir, args.teacher_score, args.accept_license, args.device, args.option)]
  names = teacher_names(args)
  weights, told = parse_weights(args.weights, names), parse_options(list(args.option), names)
  return [
    load_soft(
      n, weights.get(n), args.teacher_score, args.accept_license, download=args.download, device=args.device, **told[n]
    )
    for n in names
  ]


def config_of(args: Options, said: Said, student: str) -> Any:
  """-> distillation's Config. said: what is learned from."""
  from openpilot.tools.fair.distillation.config import Config
  from openpilot.tools.fair.tasks import TASKS

  weights, off = balance(args, said, student)
  print("\n".join(say_balance(weights, off)))
  family = FAMILIES.get(student)
  head = student.rpartition("-")[0] if family is None else "detector"
  start, network = args.pretrained, ""
  if family is not None:
    start, network = of_family(args, student, len(said.classes.boxes), said.spec.width)
  tasks = [head] if weights.keys() & {"detection", "segmentation"} else []
  tasks += [t for t, part in (("logits", "logit"), ("features", "feature")) if part in weights]
  parts = {f"{head}/embed": 0.0} if head == "objects" else {}
  for part, names in parts_of(student).items():
    parts |= {k: weights.get(part, 0.0) for k in names}
  return Config(
    student=student,
    tasks=tasks,
    pretrained=start,
    lr=args.lr or (NEWEST if family is None else FAMILY),
    parts=parts,
    mirror=all(TASKS[t].mirror for t in tasks),
    network=network,
    **learn_by(args, said),
  )


def of_family(args: Options, student: str, classes: int, side: int) -> tuple[str | bool, str]:
  """-> the folder of the weights that it starts from, False: none; and its configuration. Raises UserError."""
  from openpilot.tools.fair.students.family import describe_network
  from openpilot.tools.fair.teacher import find_weights

  if not args.pretrained:
    return False, describe_network(student, classes, side) if student in OF_TRANSFORMERS else ""
  if FAMILIES[student].package == "ultralytics":
    if args.pretrained is True:
      raise UserError(f"--pretrained: {student} has no weights on the hub; name a file of them, .safetensors")
    return str(find_weights("", args.pretrained)), ""
  said = FAMILIES[student].hub if args.pretrained is True else str(args.pretrained)
  is_hub_id = said.count("/") == 1 and not said.startswith(("/", ".", "~"))
  folder = find_weights(said, None if is_hub_id and not Path(said).exists() else said, args.download)
  return str(folder), describe_network(student, classes, side, folder)


def write_config(args: Any, said: Said, config: Any, weights: dict[str, float]) -> None:
  """distillation_config.yaml, as the note has it: what the data decided."""
  import yaml

  told = {
    "student": config.student,
    "class_mapping": dict(enumerate(said.classes.boxes)),
    "picture": said.spec.to_dict(),
    "teachers": said.teachers,
    "distillation": {"loss_weights": {k: round(v, 4) for k, v in weights.items()}},
    "steps": config.steps,
    "batch_size": config.batch,
    "data": {"pictures": said.labeled, "unlabeled": said.unlabeled, "val": said.held_out, "license": said.license},
  }
  with atomic_path(args.output / "distillation_config.yaml") as tmp:
    tmp.write_text(yaml.safe_dump(told, sort_keys=False, allow_unicode=True))


def learn(args: Any, said: Said, config: Any, accepted: tuple[str, ...], weights: dict[str, float]) -> dict[str, float]:
  """The run of distill. args: of this command, or of train_obb. weights: of the loss, as they are told. -> held-out
  losses."""
  from openpilot.tools.fair.distillation import distill
  from openpilot.tools.fair.distillation.options import Options as Distill

  told = Distill(
    labels=said.train,
    val=said.val,
    output=args.output,
    student=config.student,
    prefer=",".join(said.prefer),
    accept_license=accepted,
    augment=args.augment != "none",
    seed=args.seed,
    workers=args.workers,
    resume=args.resume,
    init=args.init,
  )
  with contextlib.ExitStack() as held:
    with said_once():
      run, _ = distill.start(told, held, config, args)
    if args.resume and run.step >= run.config.steps:
      if is_first():
        print(f"{args.output}: the run is complete at step {run.step}")
      return {}
    if is_first():
      write_config(args, said, config, weights)
    return run.fit()


def prepared(args: Options) -> tuple[Options, Said, Any, dict[str, float]]:
  """-> the options, with what it starts from; what there is to learn from, which teachers have labeled; distillation's
  Config; the weights of the loss. Raises UserError."""
  spec = check_options(args)
  teachers = teachers_of(args) if args.teachers or args.teacher_dir is not None else []
  said = fill(args, spec, teachers)
  student = args.student or select_student_model(said.info, args.size)
  args = begun(args, student)
  return args, said, config_of(args, said, student), balance(args, said, student)[0]


def run(args: Options) -> Path:
  """-> the bundle's folder, or the run's where none is written."""
  args, said, config, weights = made_by_the_first(lambda: prepared(args))
  accepted = accepted_by(args, said)
  learn(args, said, config, accepted, weights)
  if not args.export or not is_first():
    return args.output
  return export_bundle(args.output, said.train, accepted, "\n\n".join(notes_of(args, said, config.student)))


def accepted_by(args: Any, said: Said) -> tuple[str, ...]:
  """Licenses: who brings the pictures may use them."""
  return tuple(dict.fromkeys((*args.accept_license, said.license)))


def export_bundle(output: Path, store: Path, accepted: tuple[str, ...], told: str = "") -> Path:
  """store: whose pictures ONNX Runtime and torch are compared on. told: for the card. -> the bundle's folder."""
  from openpilot.tools.fair.bundle import export

  bundle = bundle_of(output)
  more = export.Options(
    run=output, output=bundle, labels=store, accept_license=accepted, weights="auto", tinygrad=False
  )
  export.run(more, told)
  return bundle


def notes_of(args: Options, said: Said, student: str) -> list[str]:
  """For the card."""
  notes = []
  if args.untuned and said.teachers:
    notes.append(f"Teachers were not tuned on this data: {', '.join(said.teachers)}.")
  if family := FAMILIES.get(student):
    begun = "random weights"
    if args.pretrained:
      name = family.hub if args.pretrained is True else public(str(args.pretrained))
      begun = f"the weights of {name}, whose own card says under which license they are"
    notes.append(
      f"Its network is {family.package}' {family.kind}, whose code is under {family.license}. It began from {begun}, "
      f"and learned by {family.package}' own loss."
    )
  return notes


def main() -> None:
  args = parse(Options, __doc__, "images train-student")
  with one_run():
    say_next(args, run(args))


if __name__ == "__main__":
  raise SystemExit(cli(main)())

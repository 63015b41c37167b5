"""The options of `tools/op.sh distill`, and the configuration that they make. What is wrong with them is said before
anything is read or written."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openpilot.tools.fair.distillation.config import Config, Stage
from openpilot.tools.fair.distillation.light import MOST
from openpilot.tools.fair.distillation.look import Look
from openpilot.tools.fair.distillation.sampling import parse_sample
from openpilot.tools.fair.spec import Class, ClassSet, InputSpec, StudentSpec, plain, read_classes, road_classes
from openpilot.tools.learn.device import mixed_precision
from openpilot.tools.learn.processes import TRACKERS, is_first
from openpilot.tools.fair.students.families import FAMILIES
from openpilot.tools.fair.students.student import BACKBONES, heads_of, spec_of, student_names
from openpilot.tools.fair.tasks import TASKS, task_name, task_of, tasks_of
from openpilot.tools.fair.teacher import Label
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.lib.errors import UserError, warn
from openpilot.tools.lib.files import read_json, read_yaml
from openpilot.tools.lib.options import option


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
  """What is learned from, and by whom: of all that learns from a label store."""

  labels: Path = option(help="the label store: `tools/op.sh label`")
  output: Path = option(aliases=("--out",), metavar="RUN", help="the run's folder")
  val: Path | None = option(None, help="another label store to evaluate on; else a tenth of the routes is held out")
  prefer: str = option("", help="teachers, comma-separated: which come first where several label the same")
  stale_labels: bool = option(False, help="use labels made by outdated rules, which are refused by default")
  accept_license: tuple[str, ...] = option(
    (),
    aliases=("--accept-licence",),
    metavar="LICENSE",
    help="of teachers whose license restricts what learns from them",
  )
  augment: bool = option(True, help="do not vary light, contrast, noise and place of the pictures")
  seed: int = option(0, help="of all that is random")
  workers: int = option(1, help="processes that read and augment")
  resume: bool = option(False, help="go on from the last checkpoint of the run's folder")


OWN, OFF = "init", "off"  # of --self-taught
D = Config("", [])  # whose defaults the options have


@dataclass(frozen=True, kw_only=True)
class Options(StoreOptions):
  student: str = option(help=f"one of {', '.join(student_names())}")
  classes: str | None = option(
    None,
    metavar="FILE.yaml|A,B,C",
    path=True,
    help="the classes to learn: a class set's file (default: tools/fair/road.yaml), or names as the labels have them",
  )
  ignore_classes: bool = option(
    False, help="leave out labels of classes that --classes does not know; by default they are an error"
  )
  tasks: str | None = option(
    None, help=f"comma-separated, of {', '.join(TASKS)}; default: all that the student can learn"
  )
  live_teacher: str | None = option(
    None,
    metavar="NAME[=WEIGHTS]",
    path=True,
    help="a teacher that labels while training, in place of stored labels of its tasks",
  )
  backbone: str | None = option(
    None, help=f"of timm: {', '.join(BACKBONES)}; default: that of the first --init, else by the student's size"
  )
  pretrained: str | bool = option(
    False,
    bare=True,
    metavar="FILE",
    path=True,
    help="start the backbone from the hub's ImageNet weights, or from timm's state dict in FILE",
  )
  init: tuple[str, ...] = option(
    (),
    metavar="RUN[:PART]",
    path=True,
    help="start from another run's best student or a bundle, as models/fair_unified_small, where it fits or this one "
    "is wider. Given again, a later one replaces what it has too, or only PART: `--init RUN --init OTHER:lanes`",
  )
  per_height: bool = option(
    D.per_height, help="learn depth in meters; by default in heights of the camera, by which the device multiplies"
  )
  steps: int = option(D.steps, help="of the optimizer")
  batch_size: int = option(D.batch, aliases=("--batch",), help="frames a step")
  clip: int | None = option(
    None,
    help="frames of a clip; default: 8 where points are tracked, 4 where objects are told apart, 1 else and of stills",
  )
  lr: float = option(D.lr, help="learning rate")
  warmup: int = option(D.warmup, help="steps in which the learning rate rises; few with --init")
  weight: tuple[str, ...] = option((), metavar="TASK=W", help="of a task's loss; default: 1")
  learned_weights: bool = option(False, help="weigh tasks by learned uncertainty")
  hard: float = option(D.hard, help="share of an epoch for the clips of the highest loss")
  sample: tuple[str, ...] = option(
    (),
    metavar="SEGMENTS=W",
    help="how often clips of segments whose names fit are drawn, as 'night*=6'; 1 where nothing fits, the last that "
    "fits counts",
  )
  light: float = option(
    D.light,
    help="strength of the changes of light, contrast and sharpness, from 1 to 4; above 1 also gradients, flares, low "
    "resolution and compression",
  )
  night: float = option(
    D.night,
    help="share of the clips by day that are made clips by night: dark, with what lights there are by night where "
    "labels say that vehicles, sky and road are",
  )
  stages: Path | None = option(None, help="a YAML list of {steps, tasks, freeze, lr}")
  qat: str | bool = option(
    False,
    bare=True,
    metavar="TARGET",
    help="learn in 8 bits, which `optimize --int8 --qat RUN` then makes: those of x86-vnni, aarch64 and tinygrad, or "
    "of another TARGET of that command; needs --init",
  )
  self_taught: str | None = option(
    None,
    bare=OWN,
    metavar="RUN|off",
    path=True,
    help="taught by the float student that --init names, as it is, or by a RUN or bundle of its form, as the one that "
    "it was pruned from; on with --qat, unless 'off'",
  )
  label_weight: float | None = option(
    None, help="with --self-taught: weight of the labels' losses beside it; by default 0: any frames teach"
  )
  eval_every: int = option(D.eval_every, help="steps; a checkpoint is written as often")
  precision: str | None = option(
    None, choices=("no", "bf16", "fp16"), help="mixed precision; default: bf16 on GPUs that have it"
  )
  trackers: str = option("", help=f"comma-separated: {', '.join(TRACKERS)}; `pip install -e .[track]`")
  overfit: int = option(
    0, metavar="N", help="train on N clips without augmentation: a student that cannot learn these has a bug"
  )


def label_names(labels: list[Label]) -> dict[str, list[str]]:
  """Names of the classes that labels use, by kind: 'maps', 'boxes'."""
  out: dict[str, dict[str, None]] = {"maps": {}, "boxes": {}}
  for x in labels:
    if x.kind == "boxes":
      out["boxes"].update(dict.fromkeys(x.classes))
    elif x.kind == "dense" and x.unit in ("class", "probability"):
      out["maps"].update(dict.fromkeys(x.classes if x.unit == "class" else (x.name,)))
  return {k: list(v) for k, v in out.items()}


def find_classes(said: str | None, labels: list[Label]) -> ClassSet:
  """--classes. Of a plain list each class has maps and boxes as `labels` have them, and the role that the road's class
  of the same name has. Raises UserError."""
  if said is None:
    return road_classes()
  if said.endswith((".yaml", ".yml")) or Path(said).is_file():
    return read_classes(said)
  there = label_names(labels)
  known = {kind: {plain(n) for n in names} for kind, names in there.items()}
  found = []
  for name in filter(None, map(str.strip, said.split(","))):
    maps, boxes = (plain(name) in known[kind] for kind in ("maps", "boxes"))
    if not maps and not boxes:
      names = list(dict.fromkeys([*there["maps"], *there["boxes"]]))
      raise UserError(f"--classes: no label is called '{name}'; labels are called {', '.join(names) or 'nothing'}")
    like = road_classes().find(name)
    found.append(Class(name, like.role if like is not None else None, maps=maps, boxes=boxes))
  return ClassSet(said, tuple(found))


def can_learn(spec: StudentSpec) -> list[str]:
  """Tasks that the student has heads and classes for."""
  tasks = [t for head in heads_of(spec) for t in tasks_of(head)]
  return [t for t in tasks if not TASKS[t].kind or getattr(spec.classes, TASKS[t].kind)]


def find_tasks(spec: StudentSpec, labels: list[Label]) -> list[str]:
  """All that the student can learn, less what is optional and not labeled."""
  there = {t for x in labels for t in task_of(x, spec.classes)}
  return [t for t in can_learn(spec) if t in there or not TASKS[t].optional]


def parse_pairs(items: Sequence[str]) -> dict[str, float]:
  try:
    pairs = {task_name(k): float(v) for k, v in (i.split("=", 1) for i in items)}
  except ValueError:
    raise UserError(f"--weight {' '.join(items)}: write TASK=NUMBER, as depth=2") from None
  wrong = [k for k in pairs if k not in TASKS]
  if wrong:
    raise UserError(f"--weight {wrong[0]}: no such task; there are {', '.join(TASKS)}")
  if low := [k for k, v in pairs.items() if not 0 <= v < math.inf]:
    raise UserError(f"--weight {low[0]}={pairs[low[0]]:g}: a weight is a number of at least 0")
  return pairs


def read_stages(path: Path | None, tasks: list[str]) -> list[Stage]:
  """tasks: that the run learns. Raises UserError where a stage is of none of them, or is no stage; what `freeze` names
  is compared with the student in Run."""
  if path is None:
    return []
  form = "write a list of {steps: N, tasks: [depth], freeze: [backbone], lr: 0.5}"
  try:
    said = read_yaml(path)
    if not isinstance(said, list) or not said:
      raise TypeError("no stages are in it")
    stages = [Stage(**s) for s in said]
    for s in stages:
      if type(s.steps) is not int or s.steps < 1:
        raise TypeError(f"steps: {s.steps} is no number of at least 1")
      if isinstance(s.lr, bool) or not isinstance(s.lr, (int, float)) or not 0 < s.lr < math.inf:
        raise TypeError(f"lr: {s.lr} is no factor above 0")
      if bad := [
        k
        for k in ("tasks", "freeze")
        if not isinstance(getattr(s, k), list) or not all(isinstance(x, str) for x in getattr(s, k))
      ]:
        raise TypeError(f"{bad[0]}: {getattr(s, bad[0])} is no list of names")
  except (OSError, TypeError, ValueError) as e:
    raise UserError(f"--stages {path}: {' '.join(str(e).split())[:120]}; {form}") from None
  stages = [Stage(s.steps, [task_name(t) for t in s.tasks], s.freeze, s.lr) for s in stages]
  if unknown := [t for s in stages for t in s.tasks if t not in tasks]:
    raise UserError(f"--stages {path}: '{unknown[0]}' is no task of this run; it learns {', '.join(tasks)}")
  return stages


def check_numbers(args: Options) -> None:
  """Raises UserError."""
  least = {"batch_size": 1, "warmup": 0, "eval_every": 1, "workers": 0, "overfit": 0, "seed": 0}
  for name, low in {**least, **({} if args.clip is None else {"clip": 1})}.items():
    if getattr(args, name) < low:
      raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: it is at least {low}")
  if not 0 < args.lr < math.inf:
    raise UserError(f"--lr {args.lr:g}: the learning rate is above 0, as 0.0015")
  if not 0 <= args.hard < 1:
    raise UserError(f"--hard {args.hard:g}: it is a share, from 0 to below 1")
  parse_sample(args.sample)
  if args.sample and args.overfit:
    raise UserError("--sample and --overfit: what is learned by heart is drawn in turn; leave one of them out")
  if not 1 <= args.light <= MOST:
    raise UserError(f"--light {args.light:g}: it is a strength from 1 to {MOST:g}; --no-augment changes nothing at all")
  if not 0 <= args.night <= 1:
    raise UserError(f"--night {args.night:g}: it is a share, from 0 to 1")
  if args.night and not args.augment:
    raise UserError("--night and --no-augment: the one changes pictures, the other changes none; leave one of them out")
  if args.steps < (0 if args.init else 1):
    raise UserError(f"--steps {args.steps}: it is at least 1, or 0 to put together what --init names")


def clip_length(tasks: list[str], look: Look) -> int:
  """What the tasks want; of single pictures 1, but where something is followed from frame to frame."""
  wanted = max(TASKS[t].clip for t in tasks)
  return wanted if any(TASKS[t].per_clip for t in tasks) else max(1, min(wanted, look.longest))


def live_teacher(args: Options, picture: InputSpec) -> Any:
  """The teacher that labels while training, or None. Raises UserError."""
  if not args.live_teacher:
    return None
  name, _, path = args.live_teacher.partition("=")
  live = load_teacher(name, path or None, args.accept_license)
  live.prepare(picture.height, picture.width)
  if getattr(live, "sees", "view") == "picture" and picture.kind == "model_frame" and is_first():
    warn(
      f"the live teacher '{name}' sees the view alone, since a store has no whole pictures; `tools/op.sh label` shows "
      "it those of the routes"
    )
  return live


def target_of(args: Options) -> str:
  """--qat -> the target's name, "" where none is said. Raises UserError."""
  if not args.qat:
    return ""
  from openpilot.tools.fair.optimize.quantize import ROUNDED, TARGETS

  name = ROUNDED if args.qat is True else str(args.qat)
  if name not in TARGETS:
    raise UserError(f"--qat {name}: no such target; there are {', '.join(TARGETS)}")
  if args.student in FAMILIES:
    package = FAMILIES[args.student].package
    raise UserError(f"--qat: {args.student} is of {package}, and only our own students learn in 8 bits")
  if not args.init and not args.resume:
    raise UserError("--qat: it goes on from a student that has learned in float; name it with --init")
  if args.precision not in (None, "no"):
    raise UserError(f"--qat and --precision {args.precision}: 8 bits are rounded finer than that; leave it out")
  return name


def float_teacher(args: Options) -> tuple[str, float]:
  """--self-taught -> as Config has it: who teaches, "" where labels alone do; and their weight. Raises UserError."""
  said = args.self_taught or (OWN if args.qat else OFF)
  weight = args.label_weight
  if said == OFF:
    if weight is not None:
      raise UserError("--label-weight weighs labels beside --self-taught; --weight TASK=W is for tasks")
    return "", 1.0
  if args.student in FAMILIES:
    raise UserError(f"--self-taught: {args.student} is of {FAMILIES[args.student].package}; only our own students are")
  if not args.init and not args.resume:
    raise UserError("--self-taught: it goes on from a student that has learned; name it with --init")
  weight = 0.0 if weight is None else weight
  if not 0 <= weight < math.inf:
    raise UserError(f"--label-weight {weight:g}: a weight is a number of at least 0")
  if args.live_teacher and not weight:
    raise UserError("--live-teacher labels for nobody where the student is self-taught; give --label-weight, too")
  return (said if said == OWN else Path(said).resolve().name), weight


def trunk_of(args: Options) -> str | None:
  """The backbone that is learned: what --backbone says, else that of what --init starts from. None: by the size.
  What goes on has its own: the run that it started from may be gone."""
  whole = [Path(x) for x in args.init if Path(x).exists()]  # RUN:PART is a part alone
  if args.backbone is not None or not (whole or args.resume):
    return args.backbone
  start = args.output if args.resume else whole[0]
  folder = start if start.is_dir() else start.parent
  for name in ("manifest.json", "config.json"):
    with contextlib.suppress(OSError, ValueError, AttributeError):  # what is wrong with it is said where it is taken
      said = read_json(folder / name).get("backbone")
      if said and is_first():
        print(f"backbone {said}, as {start} has it")
      return said or None
  return None


def configuration(args: Options, look: Look) -> tuple[Config, Any]:
  """-> the configuration, and the live teacher or None. look: at the labels. Raises UserError."""
  spec_of(args.student)
  check_numbers(args)
  weights = parse_pairs(args.weight)
  picture = look.picture()
  live = live_teacher(args, picture)
  labels = [*look.labels, *(live.labels if live is not None else ())]
  classes = find_classes(args.classes, labels)
  backbone = trunk_of(args)
  spec = spec_of(args.student, backbone=backbone, input=picture, classes=classes)
  tasks = find_tasks(spec, labels)
  if args.tasks:
    tasks = [task_name(t) for t in args.tasks.replace(" ", "").split(",")]
  if args.night and picture.kind != "model_frame":
    raise UserError(
      f"--night {args.night:g}: it knows where the road is in the view of openpilot's driving model, not in pictures "
      "of any camera; leave it out"
    )
  for t in tasks:
    if t not in (able := can_learn(spec)):
      raise UserError(f"--tasks {t}: {args.student} cannot learn it; it learns {', '.join(able)}")
  taught, label_weight = float_teacher(args)
  config = Config(
    student=args.student,
    tasks=tasks,
    backbone=backbone,
    pretrained=args.pretrained,
    steps=args.steps,
    batch=args.batch_size,
    clip=args.clip or (clip_length(tasks, look) if label_weight else 1),
    lr=args.lr,
    warmup=args.warmup,
    seed=args.seed,
    weights=weights,
    learned_weights=args.learned_weights,
    hard=args.hard,
    sample=list(args.sample),
    mirror=all(TASKS[t].mirror for t in tasks),
    augment=args.augment,
    light=args.light,
    night=args.night,
    overfit=args.overfit,
    eval_every=args.eval_every,
    precision=args.precision or ("no" if args.qat else mixed_precision()),
    stages=read_stages(args.stages, tasks),
    input=picture,
    classes=classes,
    ignore_classes=args.ignore_classes,
    per_height=args.per_height,
    qat=target_of(args),
    self_taught=taught,
    label_weight=label_weight,
  )
  if config.batch < config.clip:
    raise UserError(
      f"--batch-size {config.batch}: it is at least the clip's {config.clip} frames; raise it, or lower --clip"
    )
  return config, live

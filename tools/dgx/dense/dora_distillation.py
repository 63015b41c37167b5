#!/usr/bin/env python3
"""Adapts a network with DoRA so that it sees what FAIR teachers see: dense features (DINOv2, DINOv3) and depth, from a
label store.

  python tools/dgx/dense/dora_distillation.py --labels LABELS --base driving_supercombo.onnx --output RUN [--data DATA]
       # openpilot's driving network
  python tools/dgx/dense/dora_distillation.py --labels LABELS --student DISTILLED_RUN --output RUN
       # a student of `op distill`

The loss is 0.9 cosine + 0.1 smooth-L1 of standardised features through a projector, depth's, and `keep`: how far all
other outputs move from the base's. With --data the driving network learns the driven path at the same time. RUN gets
best_model.pt for tools/dgx/training/export.py and adapter/ in PEFT's format, or of a student best.pt for `tools/op.sh
export`; projector and depth of a driving network serve while training only. `--config RUN --output OTHER` starts the
same again, `--config RUN --resume` goes on."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the modules beside it must not be found under their bare names
  sys.path[: not sys.flags.safe_path] = [str(Path(__file__).resolve().parents[3])]

from openpilot.tools.dgx.dense.dora_model import TAUGHT, WEIGHTS, Settings
from openpilot.tools.dgx.dense.dora_model import DoRADistillation as DoRADistillation
from openpilot.tools.dgx.dense.dora_run import BEST, RESUME, Run
from openpilot.tools.dgx.dense.driving_features import frames_back
from openpilot.tools.dgx.training.config import AdapterOptions
from openpilot.tools.fair.bundle.export import load_student
from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.distillation.distill import digest, environment, split
from openpilot.tools.fair.distillation.options import StoreOptions
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.tasks import task_of
from openpilot.tools.fair.teacher import check_license
from openpilot.tools.learn.adapters.apply import clipped
from openpilot.tools.learn.checkpoint import load_checkpoint
from openpilot.tools.learn.processes import is_first, one_run, said_once
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.files import atomic_path
from openpilot.tools.lib.options import option, parse, save
from openpilot.tools.lib.said import command


def tasks_of(root: Path, only: str | None) -> list[str]:
  """What of TAUGHT the store teaches, or of it what `only` names. Raises UserError where that is nothing."""
  there = {t for g in LabelStore(root).groups() if g.teacher != "frames" for x in g.labels for t in task_of(x)}
  wanted = only.replace(" ", "").split(",") if only else [t for t in TAUGHT if t in there]
  wrong = [t for t in wanted if t not in TAUGHT]
  if wrong or not wanted:
    why = (
      f"--tasks {wrong[0]}: there are {', '.join(TAUGHT)}"
      if wrong
      else f"{root} holds neither dense features nor depth"
    )
    raise UserError(
      f"{why}; label with `tools/op.sh label ROUTE --teachers dinov2-base,depth-anything-v2-metric-outdoor-small "
      f"{command('--output', root)}`"
    )
  return wanted


def table(run: Run) -> str:
  model, learned = run.unwrapped, sum(p.numel() for p in run.learned.values())
  size = sum(p.numel() for p in model.base.parameters())
  own = sum(p.numel() for p in model.network.parameters() if p.requires_grad)
  cut = clipped(model.network, run.settings.dora_rank)
  student: Any = model.distiller.student
  rows = [
    ("base", f"{run.source}, {size / 1e6:.2f}M parameters, {run.hash[:12]}"),
    (
      "adapter",
      (
        f"{own:,} parameters ({own / size * 100:.2f}% of the base): DoRA rank {run.settings.dora_rank} on "
        f"{len(model.adapted)} layers"
      ),
    ),
    *([("", cut)] if cut else []),
    ("besides", f"{learned - own:,} parameters that serve while training only"),
    (
      "map",
      f"{student.tap}, {student.features} channels"
      if model.driving
      else f"the student's own features, {student.size.features} channels",
    ),
    ("teachers", ", ".join(f"{t['model']} ({t['licence']})" for t in run.clips.provenance())),
    (
      "labels",
      (
        f"{', '.join(run.clips.tasks)} of {len(run.clips)} clips of {run.clips.length} frames, "
        f"{0 if run.val is None else len(run.val)} held out"
      ),
    ),
    (
      "driven path",
      f"{len(run.driven)} clips of {run.settings.clip} steps" if run.path is not None else "none: --data",
    ),
    ("steps", f"{run.settings.steps} of {run.settings.batch_size} clips, lr {run.settings.lr:g}, on {run.device}"),
  ]
  return "\n".join(f"{k:<12} {v}" for k, v in rows)


def parse_weights(items: Sequence[str], path: bool) -> dict[str, float]:
  try:
    given = {k: float(v) for k, v in (i.split("=", 1) for i in items)}
  except ValueError:
    raise UserError(f"--weight {' '.join(items)}: write PART=NUMBER, as depth=2") from None
  if wrong := [k for k, v in given.items() if k not in WEIGHTS or not 0 <= v < math.inf]:
    raise UserError(f"--weight {wrong[0]}: the parts are {', '.join(WEIGHTS)}, and weigh 0 or more")
  return {**WEIGHTS, **given, **({} if path else {"path": 0.0})}


D = Settings()  # whose defaults the options have


@dataclass(frozen=True, kw_only=True)
class Options(StoreOptions, AdapterOptions):
  base: Path | None = option(
    None, metavar="MODEL.onnx", help="openpilot's driving model, or its vision network; this or --student"
  )
  student: Path | None = option(None, metavar="RUN", help="a finished run of `tools/op.sh distill`; this or --base")
  data: Path | None = option(None, help="a folder of tools/dgx/training/dataloader.py: learn the driven path too")
  tasks: str | None = option(None, help=f"comma-separated, of {', '.join(TAUGHT)}; default: all that the store teaches")
  steps: int = option(D.steps, help="of the optimizer")
  batch_size: int = option(
    D.batch_size, aliases=("--batch",), help="clips a step; a driving network sees one pair of frames of each"
  )
  targets: tuple[str, ...] | None = option(
    None, nargs="+", help="patterns of layers' names to adapt; default: those that make the map, and with --data all"
  )
  tap: str | None = option(
    None,
    metavar="LAYER",
    help="the driving network's map that learns features; default: the last of 8x16 cells or more",
  )
  lr: float = option(D.lr, help="learning rate")
  weight: tuple[str, ...] = option((), metavar="PART=W", help=f"of the loss's parts {', '.join(WEIGHTS)}; default: 1")
  clip: int = option(D.clip, help="steps at 5 Hz of a clip of --data")
  eval_every: int = option(D.eval_every, help="steps; a checkpoint is written as often")


def settings_of(args: Options) -> tuple[Path, Settings]:
  """-> the base or the student's run, and how it learns. Raises UserError."""
  source = args.base or args.student
  if source is None or (args.base is not None and args.student is not None):
    raise UserError("give --base, a driving model, or --student, a run: one of them")
  same = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings) if f.name not in ("weights", "targets")}
  targets = None if args.targets is None else list(args.targets)
  settings = Settings(**same, targets=targets, weights=parse_weights(args.weight, args.data is not None))
  if min(settings.steps, settings.batch_size, settings.clip, settings.eval_every) < 1 or settings.lr <= 0:
    raise UserError("--steps, --batch-size, --clip and --eval-every are at least 1, --lr above 0")
  return source, settings


def start(args: Options) -> Run:
  """The run, ready to fit. Raises UserError."""
  source, settings = settings_of(args)
  tasks = tasks_of(args.labels, args.tasks)
  length = 1
  if args.base is not None:
    if not args.base.is_file():
      raise UserError(f"there is no {args.base}; give the driving model's ONNX file")
    every = {int(g.meta["every"]) for g in LabelStore(args.labels).groups() if g.teacher == "frames"} or {1}
    length = 1 + frames_back(max(every))
  prefer = [t for t in args.prefer.replace(" ", "").split(",") if t]
  per_height = args.student is not None and load_student(args.student)[1].per_height  # a driving network learns meters
  config = Config("", tasks, clip=length, per_height=per_height)
  train, val = split(args.labels, args.val, config, prefer, None, args.stale_labels)
  for teacher in train.provenance():
    check_license(teacher["model"], teacher["licence"], args.accept_license)
  state = load_checkpoint(args.output / RESUME, "leave --resume out to start") if args.resume else None
  if state is None and (args.output / RESUME).exists():
    raise UserError(f"{args.output} holds a run; add --resume to go on, or choose another --output")
  labels = digest(args.labels)
  run = Run(settings, source, train, val, args.output, labels, args.data, args.workers)
  if state is not None:
    run.load(state)
  elif is_first():
    args.output.mkdir(parents=True, exist_ok=True)
    save(args, args.output)
    with atomic_path(args.output / "environment.json") as tmp:
      tmp.write_text(json.dumps(environment(args, config, train, labels), indent=1))
  print(table(run))
  return run


def main() -> None:
  args = parse(Options, __doc__, "dora_distillation")
  with one_run():
    with said_once():
      run = start(args)
    run.fit()
  if not is_first():
    return
  if args.base is not None:
    print(
      f"{args.output / BEST}: next, `tools/op.sh dgx export {command('--checkpoint', args.output / BEST)} "
      "--output custom_driving.onnx`"
    )
  else:
    print(f"{args.output}: next, `tools/op.sh export {command(args.output)} --output models/NAME`")


if __name__ == "__main__":
  raise SystemExit(cli(main)())

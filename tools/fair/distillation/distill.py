#!/usr/bin/env python3
"""Teaches a student from a label store. With nothing but --labels, --student and --output it learns all that the
student's heads can and the store teaches.

RUN keeps options.yaml (`--config RUN --output OTHER` starts the same again, `--config RUN --resume` goes on),
config.json, environment.json, log.jsonl (losses, evaluations, the share of time spent waiting for data), samples/,
last.pt and best.pt.
On several GPUs: `torchrun --nproc-per-node N -m openpilot.tools.fair.distillation.distill ...`, or `accelerate launch
-m ...`."""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from openpilot.selfdrive.modeld.fair.bundle import BundleError
from openpilot.tools.learn.checkpoint import load_checkpoint, same_run
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.distillation.initial import in_classes, in_unit, initial, pruned_as
from openpilot.tools.fair.distillation.look import Look, look_at
from openpilot.tools.fair.distillation.options import OWN, Options, configuration
from openpilot.tools.fair.distillation.plan import held_out as held_out
from openpilot.tools.fair.distillation.plan import make_plan
from openpilot.tools.fair.distillation.plan import split as split
from openpilot.tools.fair.distillation.sampling import in_words, shares
from openpilot.tools.fair.distillation.self_taught import Teacher, check_alike, check_known, open_teacher
from openpilot.tools.fair.distillation.trained import load_student_checkpoint, trained_on, union
from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.distillation.trainer import RESUMED, Run
from openpilot.tools.learn.processes import is_first, parse_trackers, said_once
from openpilot.tools.fair.teacher import check_license
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.lock import only_one
from openpilot.tools.lib.files import atomic_path
from openpilot.tools.lib.options import command_line, parse, save

ROOT = Path(__file__).resolve().parents[3]


def digest(root: str | Path | Look) -> str:
  """Of all that a store says: another teacher, view, calibration or frame changes it."""
  return look_at(root).digest


def environment(args: Any, config: Config, train: Clips, labels: str) -> dict[str, Any]:
  versions = {}
  for name in ("torch", "timm", "accelerate", "numpy", "transformers"):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = ""
  commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
  device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
  return {
    "verb": getattr(args, "verb", "distill"),
    "command": command_line(args),
    "commit": commit,
    "python": platform.python_version(),
    "versions": versions,
    "device": device,
    "threads": torch.get_num_threads(),
    "labels": labels,
    "teachers": train.provenance(),
    "clips": len(train),
    "segments": [s.name for s in train.segments],
  }


def earlier(args: Options, run: Run) -> dict[str, Any] | None:
  """The student that RUN holds from other labels, moved aside, to start from; None where there is none. With
  --resume `run` goes on from there. Raises UserError where the options do not fit what is there."""
  last, best = args.output / "last.pt", args.output / "best.pt"
  state = load_checkpoint(last, keys=RESUMED) if last.exists() else None
  before = None
  if state is not None and state["labels"] == run.labels:
    if not args.resume:
      raise UserError(
        f"{args.output} holds a run at step {state['step']} of {state['config']['steps']}; add --resume to go on, or "
        "choose another --output"
      )
    same_run(last, dataclasses.asdict(Config.from_dict(state["config"])), dataclasses.asdict(run.config))
    run.load({**state, "trained": trained_on(state, args.output)})
  elif state is not None:
    if args.resume:
      what = f"the labels of {args.labels} have changed since {last} was written, so that it cannot go on"
      raise UserError(f"{what}; without --resume a new run starts from the student there, or choose another --output")
    before = load_student_checkpoint(best) if best.exists() else state
    before = in_classes(before, run.config.classes, str(args.output))
    before = in_unit(before, run.config.per_height, str(args.output))
    before = {**before, "trained": trained_on(before, args.output)}
    for teacher in before["provenance"]:
      check_license(teacher["model"], teacher["licence"], args.accept_license)
  run.accelerator.wait_for_everyone()  # all have read it
  if before is not None and is_first():
    last.replace(args.output / "before.pt")
    print(
      f"the labels have changed: a new run starts from the student that {args.output} holds, which stays there as "
      "before.pt"
    )
  return before


def float_teacher(args: Options, run: Run, initials: dict[str, Any]) -> None:
  """--self-taught: `run`, which has begun from `initials`, is taught by that student as it is now, or by RUN. Raises
  UserError where it cannot be."""
  config = run.config
  own = run.ema.student
  if config.self_taught == OWN:
    teacher = Teacher(own, config.tasks, config.untaught)
    check_known(teacher, {k.removeprefix("student."): v for k, v in initials["ema"].items()})
  else:
    student, teachers, trained = open_teacher(Path(str(args.self_taught)), config)
    for t in teachers:
      check_license(t["model"], t["licence"], args.accept_license)
    run.inherited = run.inherited + teachers
    run.trained = union(run.trained, trained)
    teacher = Teacher(student, config.tasks, config.untaught)
  check_alike(teacher, own)
  run.be_taught(teacher)


def start(
  args: Options, held: contextlib.ExitStack, made: Config | None = None, typed: Any = None
) -> tuple[Run, dict[str, float]]:
  """The run, ready to fit, and the held-out losses of the student that it starts from, {} where there is none. held:
  keeps RUN to this run. made: the configuration, where another command has made it; typed: that command's options,
  which RUN keeps."""
  look = Look(args.labels)
  config, live = configuration(args, look) if made is None else (made, None)
  config = pruned_as(args, config)
  prefer = [t for t in args.prefer.replace(" ", "").split(",") if t]
  plan = make_plan(look, args.val, config, prefer, live, args.stale_labels)
  train, val, labels = plan.train, plan.val, plan.labels
  trackers = parse_trackers(args.trackers)
  initials = initial(args.init, train, config.backbone_name) if not args.resume else None  # what goes on has it already
  for teacher in plan.teachers + (initials["provenance"] if initials is not None else []):
    check_license(teacher["model"], teacher["licence"], args.accept_license)
  run = Run(config, train, val, args.output, labels, args.workers, trackers)
  if args.resume and not (args.output / "last.pt").exists():
    raise UserError(f"{args.output} holds no checkpoint to go on from; leave --resume out to start")
  if is_first():
    args.output.mkdir(parents=True, exist_ok=True)
    held.enter_context(
      only_one(args.output, f"another run is writing {args.output}; wait for it, or choose another --output")
    )
  run.accelerator.wait_for_everyone()
  before = earlier(args, run) or initials
  missing = run.warm_start(before) if before is not None else []
  if config.self_taught and not args.resume:
    if before is None or before is not initials:
      raise UserError(
        f"--self-taught: {args.output} holds a student of other labels, which would be gone on from; choose another "
        "--output"
      )
    float_teacher(args, run, before)
  if config.qat and not args.resume:
    run.observe()
  if not is_first():
    return run, {}
  if not args.resume:
    save(typed or args, args.output)
    with atomic_path(args.output / "config.json") as tmp:
      tmp.write_text(json.dumps(dataclasses.asdict(config), indent=1))
    with atomic_path(args.output / "environment.json") as tmp:
      tmp.write_text(
        json.dumps({**environment(typed or args, config, train, labels), "trained": run.trained}, indent=1)
      )
  held_out = f", {len(val)} held out" if val is not None else ", none held out"
  count = sum(q.numel() for q in run.distiller.student.parameters())
  taught = f", {config.taught_by}" if config.taught_by else ""
  print(
    f"{args.student}{', pruned' if config.widths else ''}: {count / 1e6:.2f}M parameters, "
    f"learns {', '.join(config.tasks)}{taught}; {len(train)} clips of {config.clip} frames{held_out}"
  )
  if config.sample:
    said = shares([s.name for s in train.segments], train.per_segment(), config.sample)
    print("\n".join(in_words(said)))
    if not args.resume:
      run.write({"step": 0, "sample": said})
  if before is None:
    return run, {}
  print(f"warm start from step {before['step']}" + (f"; {len(missing)} tensors start anew" if missing else ""))
  was = run.evaluate()
  if config.self_taught and was:
    run.best = was["total"]  # one that is further from its teacher than that is no use
    run.save(run.BEST)
  with open(args.output / "log.jsonl", "a") as f:
    f.write(json.dumps({"step": 0, "before": was}) + "\n")
  return run, was


def main() -> None:
  args = parse(Options, __doc__, "distill")
  with contextlib.ExitStack() as held:
    with said_once():
      run, was = start(args, held)
    if args.resume and run.step >= run.config.steps:
      if is_first():
        print(
          f"{args.output}: the run is complete at step {run.step}; evaluate it with `tools/op.sh evaluate`, or export "
          "it with `tools/op.sh export`"
        )
      return
    metrics = run.fit()
    if is_first():
      print(
        f"{args.output}: step {run.step}, held-out losses"
        + (" (before, with the old labels' student -> now)" if was else "")
      )
      for k in metrics:
        print(f"  {k:<28} " + (f"{was[k]:8.4f} -> " if k in was else "") + f"{metrics[k]:8.4f}")


if __name__ == "__main__":
  raise SystemExit(cli(main, (BundleError,))())

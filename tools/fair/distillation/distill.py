#!/usr/bin/env python3
"""Teaches a student from a label store. With nothing but --labels, --student and --out it learns all that the student's heads can and the store teaches.

OUT keeps config.json, environment.json, log.jsonl (losses, evaluations, the share of time spent waiting for data), samples/, last.pt and best.pt.
On several GPUs: `torchrun --nproc-per-node N -m openpilot.tools.fair.distillation.distill ...`, or `accelerate launch -m ...`.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from openpilot.selfdrive.modeld.fair.bundle import BundleError
from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W
from openpilot.tools.fair.checkpoint import load_checkpoint
from openpilot.tools.fair.distillation.data import TASKS, Clips, task_of
from openpilot.tools.fair.distillation.distiller import LEARNS
from openpilot.tools.fair.distillation.trainer import Config, Run, Stage
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.students.onnx_import import bundle_state
from openpilot.tools.fair.students.student import BACKBONES, STUDENTS
from openpilot.tools.fair.teacher import check_licence, load_teacher
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.logwriter import atomic_path

ROOT = Path(__file__).resolve().parents[3]
OPTIONAL = ("features",)  # learned where there are labels, not missed where there are none
HELD_OUT = 0.1


def digest(root: Path) -> str:
  """Of all that a store says: another teacher, view, calibration or frame changes it."""
  h = hashlib.sha256()
  for g in LabelStore(root).groups():
    h.update(f"{g.segment} {g.path.name} {sorted(g.done())}\n".encode())
  return h.hexdigest()[:16]


def held_out(root: Path) -> set[str]:
  """Segments kept for evaluation: of each kind of labels a tenth of the routes, at least one where there are two; else the last segment of a route."""
  kinds: dict[tuple[str, ...], list[str]] = {}
  for name, groups in LabelStore(root).by_segment(set()).items():
    kinds.setdefault(tuple(sorted(groups)), []).append(name)
  out: set[str] = set()
  for names in kinds.values():
    routes = sorted({n.rpartition("--")[0] or n for n in names})
    if len(routes) > 1:
      r = np.random.default_rng(0)
      chosen = {routes[i] for i in r.permutation(len(routes))[: max(1, round(HELD_OUT * len(routes)))]}
      out |= {n for n in names if (n.rpartition("--")[0] or n) in chosen}
    elif len(names) > 1:
      out.add(sorted(names)[-1])
  return out


def find_tasks(student: str, root: Path, live: Any) -> list[str]:
  """All that the student can learn, less what is optional and not labelled."""
  task = STUDENTS[student][0]
  can = [t for head in (LEARNS if task == "unified" else (task,)) for t in LEARNS[head]]
  there = {t for g in LabelStore(root).groups() if g.teacher != "frames" for x in g.labels for t in task_of(x)}
  there |= {t for x in (live.labels if live is not None else ()) for t in task_of(x)}
  return [t for t in can if t in there or t not in OPTIONAL]


def split(root: Path, val: Path | None, config: Config, prefer: list[str], live: Any) -> tuple[Clips, Clips | None]:
  def clips(where: Path, segments: list[str]) -> Clips:
    return Clips(where, config.tasks, config.clip, prefer, live, segments)

  if val is not None:
    return clips(root, []), clips(val, [])
  names = set(LabelStore(root).by_segment(set()))
  out = held_out(root)
  if out and names - out:
    return clips(root, sorted(names - out)), clips(root, sorted(out))
  whole, end = clips(root, []), clips(root, [])
  n = len(whole)
  keep = max(1, n // 8)
  if n < 8:
    return whole, None
  print("warning: one segment only; the last eighth of it is held out, which is too alike to judge by", file=sys.stderr)
  end.starts = whole.starts[n - keep :]
  whole.starts = whole.starts[: n - keep - 2]
  return whole, end


def environment(args: argparse.Namespace, config: Config, train: Clips, labels: str) -> dict[str, Any]:
  versions = {}
  for name in ("torch", "timm", "accelerate", "numpy", "transformers"):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = ""
  commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
  device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
  return {
    "command": " ".join(sys.argv[1:]),
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


def parse_pairs(items: list[str]) -> dict[str, float]:
  try:
    pairs = {k: float(v) for k, v in (i.split("=", 1) for i in items)}
  except ValueError:
    raise UserError(f"--weight {' '.join(items)}: write TASK=NUMBER, as depth=2") from None
  wrong = [k for k in pairs if k not in TASKS]
  if wrong:
    raise UserError(f"--weight {wrong[0]}: no such task; there are {', '.join(TASKS)}")
  return pairs


def read_stages(path: Path | None) -> list[Stage]:
  if path is None:
    return []
  try:
    return [Stage(**s) for s in yaml.safe_load(path.read_text())]
  except (OSError, TypeError, yaml.YAMLError) as e:
    why = " ".join(str(e).split())[:120]
    raise UserError(f"--stages {path}: {why}; write a list of {{steps: N, tasks: [depth], freeze: [backbone], lr: 0.5}}") from None


def same_config(state: dict[str, Any], config: Config, path: Path) -> None:
  old, new = state["config"], dataclasses.asdict(config)
  differ = [k for k in new if old.get(k) != new[k]]
  if differ:
    what = ", ".join(f"{k} {old.get(k)} then, {new[k]} now" for k in differ)
    raise UserError(f"{path} is of a run with another configuration: {what}; give the same options, or choose another --out")


def initial(runs: list[str], train: Clips) -> dict[str, Any] | None:
  """The checkpoint of the first of `runs` (runs or bundles), with what the later ones have of the averaged student in its place; None of none. Raises UserError
  where one is missing or has no such part."""
  before: dict[str, Any] | None = None
  for run in runs:
    path, part = (run, "") if Path(run).exists() else (run.rpartition(":")[0] or run, run.rpartition(":")[2])
    if (Path(path) / "manifest.json").exists():
      some = np.linspace(0, len(train) - 1, min(32, len(train))).astype(int)
      state = bundle_state(path, torch.from_numpy(np.stack([train.read(int(i)).frames[0] for i in some])))
    else:
      state = load_checkpoint(Path(path) / "best.pt" if Path(path).is_dir() else Path(path))
    prefix = f"student.{part}." if part else "student."
    taken = {k: v for k, v in state["ema"].items() if k.startswith(prefix)}
    if not taken:
      parts = sorted({k.split(".")[1] for k in state["ema"] if k.startswith("student.")})
      raise UserError(f"--init {run}: the student there has no part '{part}'; it has {', '.join(parts)}")
    if before is None:
      before = {**state, "ema": taken}
    else:
      before["ema"] = {**before["ema"], **taken}
      before["provenance"] = before["provenance"] + state["provenance"]
  return before


def main() -> None:
  p = argparse.ArgumentParser(prog="distill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  d = Config("", [])
  p.add_argument("--labels", type=Path, required=True, help="the label store: `tools/op.sh label`")
  p.add_argument("--student", required=True, help=f"one of {', '.join(STUDENTS)}")
  p.add_argument("--out", type=Path, required=True, help="the run's folder")
  p.add_argument("--val", type=Path, help="another label store to evaluate on; else a tenth of the routes is held out")
  p.add_argument("--tasks", help=f"comma-separated, of {', '.join(TASKS)}; all that the student can learn by itself")
  p.add_argument("--prefer", default="", help="teachers, comma-separated: who is asked first where several label the same")
  p.add_argument("--live-teacher", metavar="NAME[=WEIGHTS]", help="a teacher that labels while training, in place of stored labels of its tasks")
  p.add_argument("--accept-licence", action="append", default=[], metavar="LICENCE", help="of teachers whose licence restricts what learns from them")
  p.add_argument("--backbone", help=f"of timm: {', '.join(BACKBONES)}")
  p.add_argument("--pretrained", action="store_true", help="start from the hub's ImageNet weights")
  text = "start from another run's best student or from a bundle, as models/fair_unified_small, where shapes agree; several times: from a later one"
  p.add_argument("--init", action="append", default=[], metavar="RUN[:PART]", help=f"{text} what it has too, or PART alone: `--init RUN --init OTHER:lanes`")
  p.add_argument("--steps", type=int, default=d.steps)
  p.add_argument("--batch", type=int, default=d.batch, help="frames a step")
  p.add_argument("--clip", type=int, help="consecutive frames of a clip: 8 where points are tracked, 4 where objects are told apart, else 1")
  p.add_argument("--lr", type=float, default=d.lr)
  p.add_argument("--warmup", type=int, default=d.warmup, help="steps in which the learning rate rises; few where --init starts from a student")
  p.add_argument("--weight", action="append", default=[], metavar="TASK=W", help="of a task's loss; 1 by itself")
  p.add_argument("--learned-weights", action="store_true", help="weigh tasks by learned uncertainty")
  p.add_argument("--hard", type=float, default=d.hard, help="share of an epoch given to the clips of the highest loss")
  p.add_argument("--no-augment", action="store_true")
  p.add_argument("--stages", type=Path, help="a YAML list of {steps, tasks, freeze, lr}")
  p.add_argument("--eval-every", type=int, default=d.eval_every, help="steps; a checkpoint is written as often")
  p.add_argument("--seed", type=int, default=0)
  p.add_argument("--precision", choices=("no", "bf16", "fp16"), help="mixed precision: bf16 on GPUs that have it")
  p.add_argument("--workers", type=int, default=1, help="processes that read and augment")
  p.add_argument("--trackers", default="", help="comma-separated: tensorboard, trackio (to be installed)")
  p.add_argument("--overfit", type=int, default=0, metavar="N", help="train on N clips without augmentation: a student that cannot learn these has a bug")
  p.add_argument("--resume", action="store_true", help="go on from OUT/last.pt")
  args = p.parse_args()
  if args.student not in STUDENTS:
    raise UserError(f"no student '{args.student}'; there are {', '.join(STUDENTS)}")
  live = None
  if args.live_teacher:
    name, _, weights = args.live_teacher.partition("=")
    live = load_teacher(name, weights or None, args.accept_licence)
    live.prepare(VIEW_H, VIEW_W)
  tasks = args.tasks.replace(" ", "").split(",") if args.tasks else find_tasks(args.student, args.labels, live)
  able = find_tasks(args.student, args.labels, None) + list(OPTIONAL)
  for t in tasks:
    if t not in able:
      raise UserError(f"--tasks {t}: {args.student} cannot learn it; it learns {', '.join(able)}")
  precision = args.precision or ("bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no")
  config = Config(
    student=args.student,
    tasks=tasks,
    backbone=args.backbone,
    pretrained=args.pretrained,
    steps=args.steps,
    batch=args.batch,
    clip=args.clip or (8 if "points" in tasks else 4 if "objects" in tasks else 1),
    lr=args.lr,
    warmup=args.warmup,
    seed=args.seed,
    weights=parse_pairs(args.weight),
    learned_weights=args.learned_weights,
    hard=args.hard,
    mirror="features" not in tasks,
    augment=not args.no_augment,
    eval_every=args.eval_every,
    precision=precision,
    stages=read_stages(args.stages),
  )
  if config.steps < (0 if args.init else 1) or config.batch < config.clip or not 0 <= config.hard < 1:
    steps = "--steps is at least 1, or 0 to put together what --init names"
    raise UserError(f"{steps}; --batch at least the clip's {config.clip} frames, --hard from 0 to below 1")
  prefer = [t for t in args.prefer.replace(" ", "").split(",") if t]
  train, val = split(args.labels, args.val, config, prefer, live)
  labels = digest(args.labels)
  trackers = tuple(t for t in args.trackers.replace(" ", "").split(",") if t)
  initials = initial(args.init, train)
  for teacher in train.provenance() + (initials["provenance"] if initials is not None else []):
    check_licence(teacher["model"], teacher["licence"], args.accept_licence)
  run = Run(config, train, val, args.out, labels, args.workers, args.overfit, trackers)
  last = args.out / "last.pt"
  before: dict[str, Any] | None = None
  if last.exists():
    state = load_checkpoint(last)
    if state["labels"] == labels:
      if not args.resume:
        raise UserError(f"{args.out} holds a run at step {state['step']} of {state['config']['steps']}; add --resume to go on, or choose another --out")
      same_config(state, config, last)
      run.load(state)
      if run.step >= config.steps:
        print(f"{args.out}: the run is complete at step {run.step}; evaluate it with `tools/op.sh evaluate`, or export it with `tools/op.sh export`")
        return
    else:  # the labels changed: start from the student that there is, and keep it to compare with
      before = load_checkpoint(args.out / "best.pt") if (args.out / "best.pt").exists() else state
      for teacher in before["provenance"]:
        check_licence(teacher["model"], teacher["licence"], args.accept_licence)
      last.replace(args.out / "before.pt")
      print(f"the labels have changed: a new run starts from the student that {args.out} holds, which stays there as before.pt")
  elif args.resume:
    raise UserError(f"{args.out} holds no checkpoint to go on from; leave --resume out to start")
  before = before or initials
  args.out.mkdir(parents=True, exist_ok=True)
  if run.step == 0:
    with atomic_path(args.out / "config.json") as tmp:
      tmp.write_text(json.dumps(dataclasses.asdict(config), indent=1))
    with atomic_path(args.out / "environment.json") as tmp:
      tmp.write_text(json.dumps(environment(args, config, train, labels), indent=1))
  held = f", {len(val)} held out" if val is not None else ", none held out"
  count = sum(q.numel() for q in run.distiller.student.parameters())
  print(f"{args.student}: {count / 1e6:.2f}M parameters, learns {', '.join(tasks)}; {len(train)} clips of {config.clip} frames{held}")
  was: dict[str, float] = {}
  if before is not None:
    missing = run.warm_start(before)
    print(f"warm start from step {before['step']}" + (f"; {len(missing)} tensors start anew" if missing else ""))
    was = run.evaluate()
    with open(args.out / "log.jsonl", "a") as f:
      f.write(json.dumps({"step": 0, "before": was}) + "\n")
  metrics = run.fit()
  if run.accelerator.is_main_process:
    names = list(metrics)
    print(f"{args.out}: step {run.step}, held-out losses" + (" (before, with the old labels' student -> now)" if was else ""))
    for k in names:
      print(f"  {k:<28} " + (f"{was[k]:8.4f} -> " if k in was else "") + f"{metrics[k]:8.4f}")


if __name__ == "__main__":
  raise SystemExit(cli(main, (BundleError,))())

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
import math
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openpilot.selfdrive.modeld.fair.bundle import BundleError, load_bundle
from openpilot.tools.learn.checkpoint import load_checkpoint, same_run
from openpilot.tools.fair.distillation import history
from openpilot.tools.fair.distillation.data import Clips
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
from openpilot.tools.fair.labels.fetching import run_folder
from openpilot.tools.fair.spec import ClassSet, InputSpec
from openpilot.tools.fair.students.backbone import other_stem
from openpilot.tools.fair.students.onnx_import import bundle_state
from openpilot.tools.fair.teacher import check_license
from openpilot.tools.lib.errors import UserError, cli, warn
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


CLASS_LAYERS = {
  "maps": ("student.objects.segmentation.",),
  "boxes": ("student.objects.heat.", "student.detector.logits.", "student.oriented.heat."),
}  # a channel for each class
DEPTH_BIAS = "student.depth.depth.1.bias"  # added to the logarithm of depth
LEARNED_HEIGHT = 1.275  # m: the mean of the simulator's cameras, from which students learned depth in meters


def without_other_classes(state: dict[str, Any], now: ClassSet, where: str) -> dict[str, Any]:
  """The checkpoint, or what bundle_state() gives, without the layers whose channels stand for other classes than those
  that are learned now; new classes behind the old ones are none."""
  ema = dict(state["ema"])
  before: dict[str, list[str]] | None = state.get("classes")
  if before is None:
    learned = Config.from_dict(state["config"]).classes
    before = {"maps": list(learned.maps), "boxes": list(learned.boxes)}
  for kind, layers in CLASS_LAYERS.items():
    mine = list(getattr(now, kind))
    if before[kind] != mine[: len(before[kind])] and (gone := [k for k in ema if k.startswith(layers)]):
      ema = {k: v for k, v in ema.items() if k not in gone}
      if is_first():
        warn(
          f"{where}: it tells the {kind} {', '.join(before[kind])} apart, and {', '.join(mine) or 'none'} are "
          "learned now: that layer starts anew"
        )
  return {**state, "ema": ema}


def in_unit(state: dict[str, Any], per_height: bool, where: str) -> dict[str, Any]:
  """The checkpoint, or what bundle_state() gives, with depth in heights of the camera or in meters: its logarithms
  differ by a constant, as far as one height was learned."""
  said = state.get("per_height")
  before = Config.from_dict(state["config"]).per_height if said is None else bool(said)
  if before == per_height or DEPTH_BIAS not in state["ema"]:
    return state
  shift = math.log(LEARNED_HEIGHT) * (-1 if per_height else 1)
  if is_first():
    to = "heights of the camera" if per_height else "meters"
    warn(
      f"{where}: its depth is in {'meters' if per_height else 'heights of the camera'}, and {to} are learned now: "
      f"{LEARNED_HEIGHT} m is taken as the height that it knew"
    )
  return {**state, "ema": {**state["ema"], DEPTH_BIAS: state["ema"][DEPTH_BIAS] + shift}}


def of_trunk(state: dict[str, Any], backbone: str, where: str) -> dict[str, Any]:
  """The checkpoint, or what bundle_state() gives, without the trunk where that has another backbone: layers that are
  called alike are others."""
  before = state.get("backbone") or Config.from_dict(state["config"]).backbone_name
  trunk = ("student.backbone.", "student.neck.")
  if before == backbone or not any(k.startswith(trunk) for k in state["ema"]):
    return state
  if is_first():
    warn(f"{where}: its backbone is {before}, and {backbone} is learned now: backbone and neck start anew")
  return {**state, "ema": {k: v for k, v in state["ema"].items() if not k.startswith(trunk)}}


def of_input(state: dict[str, Any], now: InputSpec, where: str) -> dict[str, Any]:
  """What is taken of a checkpoint, or of what bundle_state() gives, with a trunk that sees what is seen now: packed
  frames or RGB. Says so: what joins maps of another size does not fit, and is left out when it is loaded."""
  before = InputSpec.from_dict(state.get("input")) if "input" in state else Config.from_dict(state["config"]).input
  if before.kind == now.kind:
    return state
  planes, trunk = before.shape[0], "student.backbone.net."
  stems = [k for k, v in state["ema"].items() if k.startswith(trunk) and v.dim() == 4 and v.shape[1] == planes][:1]
  if is_first():
    first = "its first layer is translated, and " if stems else ""
    warn(
      f"{where}: it sees {before.kind}, and {now.kind} is learned now: {first}what joins maps of another size starts "
      "anew"
    )
  return {**state, "ema": {**state["ema"], **{k: other_stem(state["ema"][k]) for k in stems}}}


def place(run: str) -> tuple[Path, str]:
  """--init -> the run, its best checkpoint or the bundle, and the part that is meant, '' where all is. Raises
  UserError."""
  if found := re.fullmatch(r"(\w+://?[^:]+)(?::(\w+))?", run):
    return run_folder(found[1]), found[2] or ""
  if Path(run).exists():
    return Path(run), ""
  path, _, part = run.rpartition(":")
  return Path(path or run), part


def pruned_as(args: Options, config: Config) -> Config:
  """The configuration, with the widths of the student that is gone on from: RUN's own, else the first of --init.
  Raises UserError where that is pruned, and another one."""
  last = args.output / "last.pt"
  if last.exists():
    where, said = str(args.output), load_checkpoint(last, keys=RESUMED)["config"]
  else:
    path, part = place(args.init[0]) if args.init else (Path(), "part")
    if part:
      return config
    where = f"--init {path}"
    if (path / "manifest.json").exists():
      manifest = load_bundle(path).manifest
      own = {k: manifest[k] for k in ("backbone", "widths") if k in manifest}
      said = {"student": manifest["graphs"][0]["name"], "tasks": [], **own}
    else:
      said = load_student_checkpoint(path / "best.pt" if path.is_dir() else path)["config"]
  if not said.get("widths"):
    return config
  before = Config.from_dict(said)
  if (before.student, before.backbone_name) != (config.student, config.backbone_name):
    raise UserError(
      f"{where}: it is pruned, and its widths are of {before.student} on {before.backbone_name}, not of "
      f"{config.student} on {config.backbone_name}; give --student and --backbone as it has them"
    )
  return dataclasses.replace(config, widths=before.widths)


def initial(runs: Sequence[str], train: Clips, backbone: str | None = None) -> dict[str, Any] | None:
  """The checkpoint of the first of `runs` (runs or bundles), with what the later ones have of the averaged student in
  its place; None of none. backbone: its name, of what is learned now; None: the same. Raises UserError where one is
  missing or has no such part."""
  before: dict[str, Any] | None = None
  for run in runs:
    path, part = place(run)
    if (path / "manifest.json").exists():
      some = np.linspace(0, len(train) - 1, min(32, len(train))).astype(int)
      state = bundle_state(path, torch.from_numpy(np.stack([train.read(int(i)).frames[0] for i in some])))
    else:
      state = load_student_checkpoint(path / "best.pt" if path.is_dir() else path)
    state = in_unit(without_other_classes(state, train.classes, f"--init {run}"), train.per_height, f"--init {run}")
    if not part and backbone is not None:
      state = of_trunk(state, backbone, f"--init {run}")
    learned = trained_on(state, path)
    prefix = f"student.{part}." if part else "student."
    taken = {k: v for k, v in state["ema"].items() if k.startswith(prefix)}
    if not taken:
      parts = sorted({k.split(".")[1] for k in state["ema"] if k.startswith("student.")})
      raise UserError(f"--init {run}: the student there has no part '{part}'; it has {', '.join(parts)}")
    state = of_input({**state, "ema": taken}, train.picture, f"--init {run}")
    if before is None:
      before = {**state, "trained": learned, "history": history.earlier(state)}
    else:
      before["ema"] = {**before["ema"], **state["ema"]}
      before["provenance"] = before["provenance"] + state["provenance"]
      before["trained"] = union(before["trained"], learned)
      before["history"] = history.joined(before["history"], history.earlier(state))
  return before


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
    before = without_other_classes(before, run.config.classes, str(args.output))
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

#!/usr/bin/env python3
"""What a GPU machine can do, in at most ten minutes: TensorRT in float16 and 8 bits of a student and a teacher, frames
that a teacher labels a second, and a training step of each trainer. One JSON, and a table.

Without a GPU it is a rehearsal: all that runs on a CPU does, small, and the rest says why it was left out. Each step is
a process of its own with a time limit; one that fails stops no other."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the modules beside it must not be found under their bare names
  sys.path[: not sys.flags.safe_path] = [str(Path(__file__).resolve().parents[2])]

from openpilot.selfdrive.modeld.fair.runners import tensorrt
from openpilot.tools.dgx import hardware
from openpilot.tools.lib import python
from openpilot.tools.lib.errors import UserError, above_zero, cli
from openpilot.tools.lib.files import read_json, write_json
from openpilot.tools.lib.options import option, parse

STEPS = "openpilot.tools.dgx.gpu_steps"
FAIR, DGX = "openpilot.tools.fair", "openpilot.tools.dgx"
Words = tuple[str, ...]


@dataclass(frozen=True)
class Options:
  output: Path = option(aliases=("--out",), help="a folder: gpu_check.json, and what the steps make")
  bundle: str = option("fair_unified_small", path=True, help="the student: a bundle's folder, or a name in models/")
  teacher: Path | None = option(
    None, metavar="MODEL.onnx", help="the teacher; default: a small network of its interface"
  )
  grounding_dino: Path | None = option(None, metavar="DIR", help="weights of Grounding DINO, to tune a step")
  seconds: float = option(600.0, parse=above_zero, help="for all steps together; what comes too late is left out")
  only: tuple[str, ...] = option((), nargs="+", metavar="STEP", help="only these")


@dataclass(frozen=True)
class Step:
  """words: of Python, in the output's folder. needs: what must be here. after: a step that must have been done. limit:
  seconds."""

  name: str
  words: Words
  limit: float
  needs: str = ""
  after: str = ""


@dataclass
class Done:
  """status: done, failed, too long, or left out."""

  name: str
  status: str
  seconds: float = 0.0
  why: str = ""
  numbers: dict[str, Any] = field(default_factory=dict)


def lacks(args: Options) -> dict[str, str]:
  """What is not here, and why not."""
  out = {}
  if (why := tensorrt.missing()) is not None:
    out["tensorrt"] = why
  if args.grounding_dino is None:
    out["grounding-dino"] = "no weights of Grounding DINO were named: --grounding-dino DIR"
  return out


def all_steps(args: Options, gpu: bool) -> list[Step]:
  """The same on both; on a CPU pictures and networks are tiny, and limits long."""
  slow = 1.0 if gpu else 30.0
  side, size, batch = ("640", "small", "16") if gpu else ("64", "nano", "2")
  # steps run in the output's folder
  bundle = str(Path(args.bundle).resolve()) if Path(args.bundle).exists() else args.bundle
  teacher, dino = (str(p.resolve()) if p is not None else "" for p in (args.teacher, args.grounding_dino))

  def own(name: str, limit: float, *words: str, needs: str = "", after: str = "") -> Step:
    return Step(name, ("-m", STEPS, name, *words), slow * limit, needs, after)

  def train(name: str, module: str, limit: float, *words: str, needs: str = "", after: str = "pictures") -> Step:
    return Step(f"train {name}", ("-m", module, *words), slow * limit, needs, after)

  pictures = ("--data", "pictures/labels.json")
  learning = ("--steps", "1", "--batch-size", batch, "--picture-size", side, "--size", size, "--workers", "0")
  detr = (
    "--epochs",
    "1",
    "--backbone",
    "mobilenetv4_conv_small",
    "--backbone-weights",
    "none",
    "--workers",
    "0",
    "--encoder-layers",
    "1",
  )
  small = () if gpu else ("--short", "64", "--long", "96", "--width", "32", "--queries", "10", "--decoder-layers", "2")
  return [
    own("student float16", 40, bundle),
    own("student int8", 60, bundle),
    own("student float16 engine", 90, bundle, needs="tensorrt", after="student float16"),
    own("student int8 engine", 90, bundle, needs="tensorrt", after="student int8"),
    own("teacher", 60, teacher),
    own("teacher float16 engine", 120, teacher, needs="tensorrt"),
    own("teacher int8 engine", 120, teacher, needs="tensorrt"),
    own("pictures", 20),
    own("drive", 60),
    train("student", f"{FAIR}.images.train_student", 60, *pictures, *learning, "--output", "student", "--no-export"),
    train("obb", f"{FAIR}.images.train_obb", 60, *pictures, *learning, "--output", "obb", "--no-export"),
    train("detr", f"{FAIR}.images.train_detr", 60, *pictures, *detr, *small, "--output", "detr"),
    train(
      "teacher",
      f"{FAIR}.images.train_teacher",
      60,
      *(*pictures, "--epochs", "1", "--output", "tuned", "--teachers", "grounding-dino"),
      *("--grounding-dino", dino),
      needs="grounding-dino",
    ),
    train(
      "distill",
      f"{FAIR}.distillation.distill",
      60,
      *("--labels", "labels", "--student", f"depth-{size}", "--steps", "1", "--batch-size", "2", "--output", "distill"),
      after="drive",
    ),
    train("dgx", f"{DGX}.training.train", 60, "--data", "driving", "--reference", "--epochs", "1", after="drive"),
  ]


def run_step(step: Step, folder: Path, limit: float) -> Done:
  """Its numbers are what it leaves in NAME.json."""
  said = folder / f"{step.name.replace(' ', '-')}.json"
  said.unlink(missing_ok=True)
  begun = time.monotonic()
  pipe, words = subprocess.PIPE, python.command(*step.words)
  with subprocess.Popen(
    words, cwd=folder, env=python.environment(), stdout=pipe, stderr=pipe, start_new_session=True
  ) as process:
    try:
      out, err = process.communicate(timeout=limit)
    except BaseException as e:  # Ctrl-C, too: with all that it started
      os.killpg(process.pid, signal.SIGKILL)
      process.communicate()
      if not isinstance(e, subprocess.TimeoutExpired):
        raise
      return Done(step.name, "too long", time.monotonic() - begun, f"not within {limit:.0f} s")
  took = time.monotonic() - begun
  if process.returncode:
    why = (
      f"exit code {process.returncode}: {python.last_line((err or out).decode(errors='replace')) or 'it said nothing'}"
    )
    return Done(step.name, "failed", took, why)
  return Done(step.name, "done", took, numbers=read_json(said) if said.is_file() else {})


def run_all(
  steps: Sequence[Step], folder: Path, seconds: float, lacking: dict[str, str], tell: Callable[[Done], None]
) -> list[Done]:
  """In order; tell: is told of each."""
  begun, out = time.monotonic(), list[Done]()
  done: dict[str, str] = {}
  for step in steps:
    left = seconds - (time.monotonic() - begun)
    if step.needs in lacking:
      found = Done(step.name, "left out", why=lacking[step.needs])
    elif step.after and done.get(step.after, "done") != "done":
      found = Done(step.name, "left out", why=f"'{step.after}' was not done")
    elif left <= 1:
      found = Done(step.name, "left out", why=f"the {seconds:.0f} s were over")
    else:
      found = run_step(step, folder, min(step.limit, left))
    done[step.name] = found.status
    out.append(found)
    tell(found)
  return out


def line(d: Done) -> str:
  numbers = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in d.numbers.items())
  return f"{d.name:<24} {d.status:<9} {d.seconds:>6.1f} s  {d.why or numbers}"


def chosen(steps: list[Step], names: tuple[str, ...]) -> list[Step]:
  """Raises UserError."""
  if odd := [n for n in names if n not in {s.name for s in steps}]:
    raise UserError(f"--only {odd[0]}: there are {', '.join(s.name for s in steps)}")
  return [s for s in steps if not names or s.name in names]


def run(args: Options) -> dict[str, Any]:
  """-> what is in the JSON. Raises UserError."""
  machine = hardware.describe()
  steps, lacking = chosen(all_steps(args, "gpu" in machine), args.only), lacks(args)
  args.output.mkdir(parents=True, exist_ok=True)
  device = machine.get("gpu", "no GPU: a rehearsal")
  print(f"{device}; {hardware.one_line()}", flush=True)
  seconds = args.seconds if "gpu" in machine else float("inf")
  found = run_all(steps, args.output.resolve(), seconds, lacking, lambda d: print(line(d), flush=True))
  results = {
    "device": device,
    "machine": machine,
    "tensorrt": lacking.get("tensorrt") or tensorrt.package_version("tensorrt"),
    "steps": [vars(d) for d in found],
  }
  write_json(args.output / "gpu_check.json", results)
  counts = {s: sum(d.status == s for d in found) for s in ("done", "left out", "failed", "too long")}
  print(f"wrote {args.output / 'gpu_check.json'}: {json.dumps(counts)}")
  if counts["failed"] or counts["too long"]:
    raise UserError(f"{counts['failed']} steps failed, {counts['too long']} took too long; the others were measured")
  return results


def main() -> None:
  run(parse(Options, __doc__, "dgx gpu-check"))


if __name__ == "__main__":
  raise SystemExit(cli(main)())

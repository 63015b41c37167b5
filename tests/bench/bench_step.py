#!/usr/bin/env python3
"""A step of distill, unified-small, 16 frames: where its CPU time goes, and what keeping freed memory saves, in turns.

python tests/bench/bench_step.py [--rounds 5] [--backbone mobilenetv2_100_same] [--tasks depth,segmentation,...]

It renders two drives of a second and labels them with their truth. "Bare" is a yardstick, no bound: three times the
averaged network's forward on the same frames, since a step multiplies once forward and twice backward."""

import argparse
import ctypes
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

import cv2
import numpy as np
import torch

from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.distillation.trainer import Run
from openpilot.tools.learn.memory import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, keep_freed
from tests.bench.turns import in_turns, ratio

TASKS = "depth,segmentation,objects,detector,lanes"


def give_back() -> None:
  """glibc's way, as it is after its first blocks of 32 MiB."""
  libc = ctypes.CDLL(None)
  libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)
  libc.mallopt(M_TRIM_THRESHOLD, 1 << 26)
  libc.malloc_trim(0)


def labels(root: Path) -> Path:
  def op(module: str, *args: str) -> None:
    subprocess.run([sys.executable, "-m", f"openpilot.tools.{module}", *args], check=True, capture_output=True)

  op("sim.write_route", str(root / "sim"), "--seeds", "31:33", "--seconds", "1", "--qcamera-only")
  drives = sorted(str(p) for p in (root / "sim").iterdir())
  op("fair.labels.label", *drives, "--teachers", "simulator", "--camera", "qcamera", "--output", str(root / "labels"))
  return root / "labels"


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--rounds", type=int, default=5)
  p.add_argument("--backbone")
  p.add_argument("--tasks", default=TASKS)
  p.add_argument("--precision", default="no", choices=["no", "bf16"])
  args = p.parse_args()
  torch.set_num_threads(1)
  cv2.setNumThreads(1)
  root = Path(tempfile.mkdtemp())
  try:
    tasks = args.tasks.split(",")
    config = Config(
      student="unified-small",
      tasks=tasks,
      steps=10**6,
      batch=16,
      clip=2,
      backbone=args.backbone,
      precision=args.precision,
    )
    run = Run(config, Clips(labels(root), tasks, 2), None, root, "x", workers=0)
    batches = iter(run.batches())
    batch = next(batches)

    def step() -> None:
      run.step_on(batch)
      run.step += 1
      run.update_ema()

    def forward() -> None:
      with torch.no_grad(), run.accelerator.autocast():
        run.ema.student(batch["frame"])

    def faults(memory: Callable[[], None]) -> int:
      """Of the second of two steps."""
      memory()
      step()
      before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
      step()
      return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    what = {
      "bare": forward,
      "kept": lambda: faults(keep_freed),
      "given back": lambda: faults(give_back),
      "a batch": lambda: next(batches),
    }
    in_turns(what, 1)
    times, found = in_turns(what, args.rounds)
  finally:
    shutil.rmtree(root)
  print(f"unified-small, {args.backbone or 'its own backbone'}, {args.tasks}, 16 frames a step, {args.rounds} rounds")
  each = {k: v * (3 if k == "bare" else 0.5 if k in ("kept", "given back") else 1) for k, v in times.items()}
  for k, says in (
    ("bare", "bare: three forwards"),
    ("kept", "a step, freed memory kept"),
    ("given back", "a step, given back"),
    ("a batch", "its batch, by a worker"),
  ):
    pages = f"   {found[k]} page faults" if k in ("kept", "given back") else ""
    print(f"{says:<28} CPU least {each[k].min():6.3f} s   median {np.median(each[k]):6.3f} s{pages}")
  print(f"kept over given back {ratio(each['kept'], each['given back']):.2f}")
  print(f"kept over bare {ratio(each['kept'], each['bare']):.2f}")


if __name__ == "__main__":
  main()

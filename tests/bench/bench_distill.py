#!/usr/bin/env python3
"""Training from the label store against the same loop with the live teacher, in turns, in the same run; and the share
of a step spent waiting for data.

python tests/bench/bench_distill.py [--teacher yolox-nano] [--steps 20]

It needs the shared data's weights and routes.

dinov2-small, -base: networks of those sizes with random weights, for which a frame takes as long as with the published
ones; nothing is learned from them."""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

import cv2
import numpy as np
import torch

from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.distillation.trainer import Run, to_device
from openpilot.tools.fair.labels.labeling import FrameTeacher, run_teacher
from openpilot.tools.fair.labels.sources.routes import find_views
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.registry import load_teacher

DATA = Path(__file__).resolve().parents[3] / "shared/data"
WEIGHTS = {
  "yolox-nano": "yolox_nano.onnx",
  "twinlitenet": "twinlitenet.onnx",
  "rtmdet-nano-person": "rtmdet_nano_person.onnx",
}

DINO = {"dinov2-small": (384, 12, 6), "dinov2-base": (768, 12, 12)}  # width, layers, heads


def main():
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--student", help="default: detector-small; of DINO's features, depth-small")
  p.add_argument("--tasks", help="default: detector; features")
  p.add_argument("--teacher", default="yolox-nano", choices=[*WEIGHTS, *DINO])
  p.add_argument("--steps", type=int, default=20)
  p.add_argument("--rounds", type=int, default=3)
  p.add_argument("--batch", type=int, default=8)
  p.add_argument("--threads", type=int, default=1)
  args = p.parse_args()
  args.student = args.student or ("depth-small" if args.teacher in DINO else "detector-small")
  args.tasks = args.tasks or ("features" if args.teacher in DINO else "detector")
  if not DATA.exists():
    print("skipped: the shared data is not here")
    return
  torch.set_num_threads(args.threads)
  cv2.setNumThreads(1)
  root = Path(tempfile.mkdtemp())
  try:
    if args.teacher in DINO:
      from tests.tools.fair.dino_models import save_dinov2

      weights = save_dinov2(root / "dino", *DINO[args.teacher], 518)
    else:
      weights = DATA / "weights" / WEIGHTS[args.teacher]
    teacher = load_teacher(args.teacher, weights)
    views = find_views([str(DATA / "realdata/0000002c--d68dde99ca--1")], None, "qcamera", 1, None)
    views[0].entries = views[0].entries[: args.batch * (args.steps + 1) * 2]
    store = LabelStore(root / "labels", create=True)
    for t in (FrameTeacher(), teacher):
      run_teacher(t, views, store, progress=False)
    teacher.prepare(VIEW_H, VIEW_W)
    tasks = args.tasks.split(",")
    config = Config(student=args.student, tasks=tasks, steps=10**6, batch=args.batch, clip=1)
    seconds, waits = {"stored": [], "live": []}, []
    runs = {}
    for kind, live in (("stored", None), ("live", teacher)):
      (root / kind).mkdir()
      runs[kind] = Run(config, Clips(root / "labels", tasks, 1, live=live), None, root / kind, "x", workers=1)
    for k in range(args.rounds + 1):  # the first warms up
      for kind, run in runs.items():
        run.next_epoch()
        batches = run.batches()
        begun, waited = time.perf_counter(), 0.0
        for n in range(args.steps + 1):
          t = time.perf_counter()
          batch = next(batches)
          if n == 0:  # the worker's start is not a step's
            begun = time.perf_counter()
            continue
          waited += time.perf_counter() - t
          loss = run.distiller.total(run.model(to_device(batch, run.accelerator.device)))
          run.optimizer.zero_grad(set_to_none=True)
          run.accelerator.backward(loss)
          run.optimizer.step()
          run.step += 1
          run.update_ema()
        if k:
          took = time.perf_counter() - begun
          seconds[kind].append(took / args.steps)
          if kind == "stored":
            waits.append(waited / took)
        del batches
    a, b = (np.array(seconds[k]) for k in ("stored", "live"))
    print(
      f"{args.student}, {args.teacher}, batch {args.batch}, {args.steps} steps a round, {args.threads} thread(s), 1 "
      "worker"
    )
    print(
      f"from the store    {1 / np.median(a):6.2f} steps/s   {np.median(waits) * 100:.1f}% of the time waiting for data"
    )
    print(f"live teacher      {1 / np.median(b):6.2f} steps/s")
    print(f"the store is {np.median(b / a):.2f} times as fast")
  finally:
    shutil.rmtree(root)


if __name__ == "__main__":
  main()

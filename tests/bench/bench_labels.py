#!/usr/bin/env python3
"""Labelling a real qcamera with YOLOX-nano, batch 8: the whole command's pace against the bare network on frames in memory, in the same run. Then reading
labels back for training against running the teacher.

python tests/bench/bench_labels.py [--frames 240] [--teacher yolox-nano]      (needs the shared data's weights and routes)
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from openpilot.tools.fair.labels.dataset import LabelDataset
from openpilot.tools.fair.labels.label import FrameTeacher, find_views, run_teacher
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.teacher import Clip, load_teacher

DATA = Path(__file__).resolve().parents[3] / "shared/data"


def main():
  p = argparse.ArgumentParser()
  p.add_argument("--frames", type=int, default=240)
  p.add_argument("--teacher", default="yolox-nano")
  p.add_argument("--rounds", type=int, default=5)
  args = p.parse_args()
  if not DATA.exists():
    print("skipped: the shared data is not here")
    return
  cv2.setNumThreads(1)
  names = {"yolox-nano": "yolox_nano.onnx", "twinlitenet": "twinlitenet.onnx"}
  teacher = load_teacher(args.teacher, DATA / "weights" / names[args.teacher])
  views = find_views([str(DATA / "realdata/0000002c--d68dde99ca--1")], None, "qcamera", 1, None)
  views[0].entries = views[0].entries[: args.frames]
  w, h = teacher.view_size()
  teacher.prepare(h, w)
  rgb = np.random.default_rng(0).integers(0, 256, (8, h, w, 3), dtype=np.uint8).transpose(0, 3, 1, 2)
  blob = teacher.prepare_batch(rgb).copy()
  bare, whole = [], []
  root = Path(tempfile.mkdtemp())
  try:
    for k in range(args.rounds):  # interleaved: the machine's speed changes
      t = time.perf_counter()
      for _ in range(args.frames // 8):
        teacher.forward(blob)
      bare.append((time.perf_counter() - t) / args.frames)
      store = LabelStore(root / str(k), create=True)
      t = time.perf_counter()
      run_teacher(teacher, views, store, progress=False)
      whole.append((time.perf_counter() - t) / args.frames)
    ratios = [w / b for w, b in zip(whole, bare, strict=True)]
    print(f"{args.teacher}, {args.frames} frames of a qcamera, batch 8, {args.rounds} rounds; ms a frame")
    print(f"bare network      median {np.median(bare) * 1e3:6.2f}   best {min(bare) * 1e3:6.2f}")
    print(f"labelling         median {np.median(whole) * 1e3:6.2f}   best {min(whole) * 1e3:6.2f}")
    over, best = (np.median(ratios) - 1) * 100, (min(whole) / min(bare) - 1) * 100
    print(f"overhead of labelling over the bare network, median of the rounds: {over:.0f}%   of the best: {best:.0f}%")
    run_teacher(FrameTeacher(), views, store, progress=False)
    for what in ([f"{teacher.name}/{x.name}" for x in teacher.labels], ["frames/frame", *[f"{teacher.name}/{x.name}" for x in teacher.labels]]):
      data = LabelDataset(store.root, what)
      order = data.shuffled(1)
      t = time.perf_counter()
      for i in range(0, len(order), 16):
        data.__getitems__(order[i : i + 16].tolist())
      read = (time.perf_counter() - t) / len(order)
      t = time.perf_counter()
      for _ in range(8):
        teacher.label(Clip(rgb))
      run = (time.perf_counter() - t) / 64
      how = f"reading {' + '.join(what)} shuffled, batches of 16: {read * 1e3:.3f} ms a frame"
      print(f"{how}; the teacher takes {run * 1e3:.2f}: {run / read:.0f} times as long")
  finally:
    shutil.rmtree(root)


if __name__ == "__main__":
  main()

#!/usr/bin/env python3
"""Labelling a real qcamera with YOLOX-nano, batch 8: the whole command's pace against the bare network on frames in memory, in the same run. Then reading
labels back for training against running the teacher.

The bare network is run in two ways: a batch at a time on all cores, and a batch on each core, as labelling runs it. The overhead is over the faster one of the
same round. Processor time is what to look at where other work runs on the machine.

python tests/bench/bench_labels.py [--frames 1200] [--teacher yolox-nano]      (needs the shared data's weights and routes)
"""

import argparse
import contextlib
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

import cv2
import numpy as np

from openpilot.tools.fair.labels.dataset import LabelDataset
from openpilot.tools.fair.labels.label import FrameTeacher, find_views, run_teacher
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.teacher import Clip, load_teacher

DATA = Path(__file__).resolve().parents[3] / "shared/data"


class Pace:
  """Of several rounds: milliseconds a frame by the clock, and of all threads' processor time."""

  def __init__(self, name: str):
    self.name, self.wall, self.cpu = name, [], []

  @contextlib.contextmanager
  def measure(self, frames: int):
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    self.wall.append((time.perf_counter() - wall) / frames * 1e3)
    self.cpu.append((time.process_time() - cpu) / frames * 1e3)


def main():
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--frames", type=int, default=1200)
  p.add_argument("--teacher", default="yolox-nano", choices=("yolox-nano", "twinlitenet"))
  p.add_argument("--rounds", type=int, default=3)
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
  batches = args.frames // 8
  alone, spread, whole = Pace("bare network, a batch at a time"), Pace("bare network, a batch on each core"), Pace("labelling")
  root = Path(tempfile.mkdtemp())
  try:
    together = load_teacher(args.teacher, DATA / "weights" / names[args.teacher])
    threads = teacher.at_once()
    for k in range(args.rounds):  # interleaved: the machine's speed changes
      with alone.measure(args.frames):
        for _ in range(batches):
          together.forward(blob)
      with spread.measure(args.frames), ThreadPoolExecutor(threads) as pool:
        list(pool.map(teacher.forward, [blob] * batches))
      store = LabelStore(root / str(k), create=True)
      with whole.measure(args.frames):
        run_teacher(teacher, views, store, progress=False)
    print(f"{args.teacher}, {args.frames} frames of a qcamera, batch 8, {threads} cores, {args.rounds} rounds; ms a frame")
    for pace in (alone, spread, whole):
      print(f"{pace.name:36} median {np.median(pace.wall):6.2f}   best {min(pace.wall):6.2f}   processor median {np.median(pace.cpu):6.2f}")
    over = [(w / min(a, s) - 1) * 100 for a, s, w in zip(alone.wall, spread.wall, whole.wall, strict=True)]
    cpu = [(w / s - 1) * 100 for s, w in zip(spread.cpu, whole.cpu, strict=True)]
    print(f"overhead of labelling over the faster bare network, median of the rounds: {np.median(over):.0f}%   of processor time: {np.median(cpu):.0f}%")
    run_teacher(FrameTeacher(), views, store, progress=False)
    for what in ([f"{teacher.name}/{x.name}" for x in teacher.labels], ["frames/frame", *[f"{teacher.name}/{x.name}" for x in teacher.labels]]):
      data = LabelDataset(store.root, what)
      order = data.shuffled(1)
      t = time.perf_counter()
      for i in range(0, len(order), 16):
        data.__getitems__(order[i : i + 16].tolist())
      read = (time.perf_counter() - t) / len(order)
      together.prepare(h, w)
      t = time.perf_counter()
      for _ in range(8):
        together.label(Clip(rgb))
      run = (time.perf_counter() - t) / 64
      how = f"reading {' + '.join(what)} shuffled, batches of 16: {read * 1e3:.3f} ms a frame"
      print(f"{how}; the teacher takes {run * 1e3:.2f}: {run / read:.0f} times as long")
  finally:
    shutil.rmtree(root)


if __name__ == "__main__":
  main()

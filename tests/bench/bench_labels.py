#!/usr/bin/env python3
"""Labeling a real qcamera with YOLOX-nano, batch 8: the whole command's pace against the bare network on frames in
memory, in the same run. Then reading labels back for training against running the teacher.

The bare network is the file's own, with its batch axis freed and all its classes, run in two ways: a batch at a time on
all cores, and a batch on each core, each from memory of its own, as labeling does. The overhead is over the way that is
faster in the median: the faster one of each round would be the luckier one. It is also given over the network that the
teacher runs, which leaves out YOLOX's classes of no road: all that is done around it. And over either with PyAV's bare
decoding of the same frames, by a thread. The order turns around every
other round. Processor time is what to look at where other work runs on the machine; less so where that work shares a
physical core.

python tests/bench/bench_labels.py [--frames 1200] [--teacher yolox-nano]

It needs the shared data's weights and routes.
"""

import argparse
import contextlib
import itertools
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

import av
import cv2
import numpy as np
import onnx

from openpilot.selfdrive.modeld.fair.ort import ort
from openpilot.tools.fair.labels.dataset import LabelDataset
from openpilot.tools.fair.labels.labeling import FrameTeacher, run_teacher
from openpilot.tools.fair.labels.sources.routes import find_views
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.lib.onnx_batch import free_batch
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Clip

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


def bare(path: Path, threads: int):
  """The network as its file has it, run as quickly as may be: a function of a batch."""
  options = ort.SessionOptions()
  options.intra_op_num_threads = threads
  session = ort.InferenceSession(
    free_batch(onnx.load(str(path))).SerializeToString(), options, providers=["CPUExecutionProvider"]
  )
  return lambda blob: session.run(None, {session.get_inputs()[0].name: blob})


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
  weights = DATA / "weights" / names[args.teacher]
  teacher = load_teacher(args.teacher, weights, device="cpu")
  views = find_views([str(DATA / "realdata/0000002c--d68dde99ca--1")], None, "qcamera", 1, None)
  views[0].entries = views[0].entries[: args.frames]
  w, h = teacher.view_size()
  teacher.prepare(h, w)
  rgb = np.random.default_rng(0).integers(0, 256, (8, h, w, 3), dtype=np.uint8).transpose(0, 3, 1, 2)
  blob = teacher.prepare_batch(rgb).copy()
  memory = threading.local()

  def own(forward):
    """Of the calling thread's own copy of the batch."""
    if not hasattr(memory, "blob"):
      memory.blob = blob.copy()
    return forward(memory.blob)

  batches = len(views[0].entries) // 8
  alone, spread, whole = (
    Pace("bare network, a batch at a time"),
    Pace("bare network, a batch on each core"),
    Pace("labeling"),
  )
  taught, decoded = Pace("teacher's network, a batch on each core"), Pace("bare decoding")
  root = Path(tempfile.mkdtemp())
  try:
    together = load_teacher(args.teacher, weights, device="cpu")
    threads = teacher.at_once()
    on_all, on_one = bare(weights, threads), bare(weights, 1)

    def one_after_another():
      with alone.measure(batches * 8):
        for _ in range(batches):
          on_all(blob)

    def each(pace, forward):
      with ThreadPoolExecutor(threads) as pool:
        list(pool.map(own, [forward] * threads))  # threads and their memory are there
        with pace.measure(batches * 8):
          list(pool.map(own, [forward] * batches))

    def decode():
      with decoded.measure(len(views[0].entries)), av.open(str(views[0].path)) as c:
        c.streams.video[0].thread_type = "NONE"
        for _ in itertools.islice(c.decode(video=0), len(views[0].entries)):
          pass

    def label(k):
      store = LabelStore(root / str(k), create=True)
      with whole.measure(len(views[0].entries)):
        run_teacher(teacher, views, store, progress=False)
      return store

    for k in range(args.rounds):  # interleaved: the machine's speed changes
      turns = [
        one_after_another,
        lambda: each(spread, on_one),
        lambda k=k: label(k),
        lambda: each(taught, teacher.forward),
        decode,
      ]
      for turn in turns if k % 2 == 0 else turns[::-1]:
        turn()
    store = LabelStore(root / "0")
    print(
      f"{args.teacher}, {args.frames} frames of a qcamera, batch 8, {threads} cores, {args.rounds} rounds; ms a frame"
    )
    for pace in (alone, spread, taught, decoded, whole):
      print(
        f"{pace.name:40} median {np.median(pace.wall):6.2f}   best {min(pace.wall):6.2f}   processor median "
        f"{np.median(pace.cpu):6.2f}"
      )
    for what, base in (
      ("the faster bare network", min(alone, spread, key=lambda p: np.median(p.wall))),
      ("the network as the teacher runs it", taught),
    ):
      wall, cpu = (np.median(np.divide(w, b) - 1) * 100 for w, b in ((whole.wall, base.wall), (whole.cpu, base.cpu)))
      print(
        f"overhead of labeling over {what}, median of the rounds: {wall:.1f}% by the clock, {cpu:.1f}% of "
        "processor time"
      )
      both = np.median(np.divide(whole.cpu, np.add(base.cpu, decoded.cpu)))
      print(f"  of {what} and bare decoding together, processor time: {both:.3f} (goal 1.05)")
    run_teacher(FrameTeacher(), views, store, progress=False)
    for what in (
      [f"{teacher.name}/{x.name}" for x in teacher.labels],
      ["frames/frame", *[f"{teacher.name}/{x.name}" for x in teacher.labels]],
    ):
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

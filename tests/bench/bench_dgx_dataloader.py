#!/usr/bin/env python3
"""Training data for the driving model from a real qcamera: model-frame pairs (both views) a second of the whole
command, and of what it is made of, in the same run; then of reading them back as clips.

python tests/bench/bench_dgx_dataloader.py [--rounds 3]      (needs the shared data's routes)
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

import numpy as np
import torch

from openpilot.tools.dgx import hardware
from openpilot.tools.dgx.training.dataloader import make_data
from openpilot.tools.dgx.training.shards import DrivingClips, epoch_batches, make_loader, read_dataset
from openpilot.tools.fair.labels.views import ViewWarp, read_frames, segment_view
from openpilot.tools.lib.route import Route

SEGMENT = (
  Path(os.environ.get("FAIR_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared/data"))
  / "realdata/0000002c--d68dde99ca--1"
)
OPTIONS = {
  "camera": "qcamera",
  "fps": 20,
  "min_speed": 0.0,
  "engaged": False,
  "gps_box": None,
  "traffic": "log",
  "focal": None,
}
TARGET = 200


def main():
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--rounds", type=int, default=3)
  p.add_argument("--workers", type=int, default=0, help="that read clips")
  args = p.parse_args()
  if not SEGMENT.exists():
    print("skipped: the shared data is not here")
    return
  torch.set_num_threads(1)
  root = Path(tempfile.mkdtemp())
  view = segment_view(Route(SEGMENT).segments[0], "qcamera")
  every = list(range(len(view.entries)))
  warps = [ViewWarp(view, name).model_frame for name in ("medmodel", "sbigmodel")]
  times: dict[str, list[float]] = {"decode": [], "decode and warp": [], "whole command": [], "read": []}
  pairs = clips = 0
  try:
    for k in range(args.rounds):  # interleaved: the machine's speed changes
      t = time.perf_counter()
      for _ in read_frames(view, every):
        pass
      times["decode"].append(time.perf_counter() - t)
      t = time.perf_counter()
      for _, frame in read_frames(view, every):
        for warp in warps:
          warp.warp(frame.reshape(-1))
      times["decode and warp"].append(time.perf_counter() - t)
      out = root / str(k)
      t = time.perf_counter()
      stats = make_data([str(SEGMENT)], out, OPTIONS, progress=False)
      times["whole command"].append(time.perf_counter() - t)
      pairs = stats["total"]["kept"]
      data = DrivingClips(read_dataset(out)[1], 8, 8)
      order = epoch_batches(len(data), 8, 0, k)
      t = time.perf_counter()
      clips = sum(len(b["frames"]) for b in make_loader(data, order, args.workers))
      times["read"].append(time.perf_counter() - t)
      shutil.rmtree(out)
    n = len(every)
    print(
      f"{hardware.one_line()}; {n} frames of {SEGMENT.name}/qcamera.ts, {pairs} pairs of two views kept, {args.rounds} "
      "rounds, medians"
    )
    decode, warp, whole, read = (
      float(np.median(times[k])) for k in ("decode", "decode and warp", "whole command", "read")
    )
    print(f"decoding alone         {n / decode:7.0f} frames/s")
    print(f"decoding and warping   {n / warp:7.0f} pairs/s")
    share = (
      f"{pairs / whole / TARGET:.1f} x the {TARGET} asked for; decoding is {decode / whole * 100:.0f}% of its time"
    )
    print(f"whole command          {pairs / whole:7.0f} pairs/s, {share}")
    print(
      f"reading shuffled clips {clips * 8 / read:7.0f} pairs/s, {args.workers} workers; the files are in the page cache"
    )
  finally:
    shutil.rmtree(root)


if __name__ == "__main__":
  main()

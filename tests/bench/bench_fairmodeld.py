#!/usr/bin/env python3
"""fairmodeld's own time per frame outside the network, at 1344x760 on one core: warp, decode and publish, against doing the same without precomputed
indices. Then memory.

python tests/bench/bench_fairmodeld.py [--frames 20000]
"""
import argparse
import os
import tempfile
import time

import numpy as np

from openpilot.cereal import messaging
from openpilot.cereal.visionipc import nv12_info
from openpilot.common.transformations.model import get_warp_matrix
from openpilot.selfdrive.modeld.fair.bundle import find_bundle
from openpilot.selfdrive.modeld.fair.fairmodeld import MODELS_DIR, memory_mb
from openpilot.selfdrive.modeld.fair.model import FairModel

W, H = 1344, 760


def naive_warp(buf, stride, uv, m):
  """The warp as one would write it down: coordinates for every frame, then fancy indexing."""
  def plane(m, w, h, src_w, src_h):
    u, v = np.meshgrid(np.arange(w), np.arange(h))
    p = m @ np.stack([u.ravel(), v.ravel(), np.ones(w * h)])
    x, y = np.round(p[:2] / p[2]).astype(int)
    return np.clip(x, 0, src_w - 1).reshape(h, w), np.clip(y, 0, src_h - 1).reshape(h, w)
  y_plane, uv_plane = buf[:stride * H].reshape(H, stride), buf[uv:uv + stride * (H // 2)].reshape(H // 2, stride)
  x, y = plane(m, 512, 256, W, H)
  luma = y_plane[y, x]
  x, y = plane(m * np.array([[1, 1, .5], [1, 1, .5], [2, 2, 1]]), 256, 128, W // 2, H // 2)
  return np.stack([luma[0::2, 0::2], luma[1::2, 0::2], luma[0::2, 1::2], luma[1::2, 1::2], uv_plane[y, 2 * x], uv_plane[y, 2 * x + 1]])


def main():
  p = argparse.ArgumentParser()
  p.add_argument("--frames", type=int, default=600)
  args = p.parse_args()
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  os.environ["OPENPILOT_PREFIX"] = f"bench-{os.getpid()}"
  os.environ["PARAMS_ROOT"] = tempfile.mkdtemp()
  stride, y_height, _, size = nv12_info(W, H)
  uv = stride * y_height
  r = np.random.default_rng(0)
  bufs = [r.integers(0, 256, size, dtype=np.uint8) for _ in range(8)]
  model = FairModel(find_bundle(None, MODELS_DIR), time.perf_counter)
  model.set_camera(W, H, stride, uv, "mici", "os04c10")
  rpy = np.array([.001, .02, -.01])
  model.set_calibration(rpy)
  pm = messaging.PubMaster(["fairDepth", "fairSegmentation"])
  m = get_warp_matrix(rpy, model.intrinsics)
  assert (naive_warp(bufs[0], stride, uv, m) == model.warp.warp(bufs[0])).all()
  own, network, publish, naive = [], [], [], []
  start = None
  for i in range(args.frames):
    stats = model.stats["scene"]
    before = (model.warp_time, model.decode_time, stats.total)
    messages = model.process(bufs[i % 8], i, 0, 1)
    t = time.perf_counter()
    for name, msg in messages:
      pm.send(name, msg)
    publish.append(time.perf_counter() - t)
    own.append(model.warp_time - before[0] + model.decode_time - before[1] + publish[-1])
    network.append(stats.total - before[2])
    if i < 200:
      t = time.perf_counter()
      naive_warp(bufs[i % 8], stride, uv, m)
      naive.append(time.perf_counter() - t - (model.warp_time - before[0]) + own[-1])
    if i == min(500, args.frames // 2):
      start = memory_mb()
  print(f"{W}x{H}, {args.frames} frames, one core, bundle {model.bundle.name}; ms")
  for name, times in (("outside the network", own), ("  of that publish", publish), ("the network", network), ("outside, naive warp", naive)):
    print(f"{name:<22} median {np.median(times) * 1e3:6.2f}   p99 {np.percentile(times, 99) * 1e3:6.2f}")
  print(f"ratio of medians {np.median(naive) / np.median(own):.1f}")
  print(f"resident memory: {start:.1f} MB after {min(500, args.frames // 2)} frames, {memory_mb():.1f} MB at the end")


if __name__ == "__main__":
  main()

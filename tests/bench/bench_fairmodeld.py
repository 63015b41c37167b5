#!/usr/bin/env python3
"""fairmodeld's whole work on a 1344x760 frame, on one core: warp, network, decoding, tracking, messages. Against the
bare network on the same frame in ONNX Runtime, and against a plain torch pipeline of the same student (grid_sample, the
module in eval mode; then our own decoding and tracking, for both alike).

python tests/bench/bench_fairmodeld.py [BUNDLE] [--frames 300]

Frames are a simulated drive's. Without torch its rows are left out.

The torch student has random weights, which is to its advantage: trained ones make subnormal numbers, which our runner
takes as zero. Then the warp alone against one without precomputed indices, and memory."""

import argparse
import gc
import itertools
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

import numpy as np

from openpilot.cereal import messaging
from openpilot.cereal.visionipc import nv12_info
from openpilot.common.transformations.model import get_warp_matrix
from openpilot.selfdrive.modeld.fair.bundle import DEFAULT, MODELS_DIR, BundleError, load_bundle
from openpilot.selfdrive.modeld.fair.machine import memory_mb
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.selfdrive.modeld.fair.publish import PUBLISH
from openpilot.tools.lib.errors import cli
from openpilot.tools.sim.render import render
from openpilot.tools.sim.world import CAMERAS, World

W, H = 1344, 760
SCENES = 40  # frames that are rendered, and then shown to and fro
WARM_UP = 10
TURN = 20  # frames


def drive_buffers(world, intrinsics, stride, uv, size):
  """NV12 buffers of a simulated drive, as camerad lays them out."""
  import av

  buffers = []
  for i in range(SCENES):
    shot = av.VideoFrame.from_ndarray(render(world, i / 20, intrinsics, W, H, world.rpy).rgb, "rgb24").to_ndarray(
      format="nv12"
    )
    buf = np.zeros(size, np.uint8)
    buf[: stride * H].reshape(H, stride)[:, :W] = shot[:H]
    buf[uv : uv + stride * (H // 2)].reshape(H // 2, stride)[:, :W] = shot[H:]
    buffers.append(buf)
  return buffers


def naive_warp(buf, stride, uv, m):
  """The warp as one would write it down: coordinates for every frame, then fancy indexing."""

  def plane(m, w, h, src_w, src_h):
    u, v = np.meshgrid(np.arange(w), np.arange(h))
    p = m @ np.stack([u.ravel(), v.ravel(), np.ones(w * h)])
    x, y = np.round(p[:2] / p[2]).astype(int)
    return np.clip(x, 0, src_w - 1).reshape(h, w), np.clip(y, 0, src_h - 1).reshape(h, w)

  y_plane, uv_plane = buf[: stride * H].reshape(H, stride), buf[uv : uv + stride * (H // 2)].reshape(H // 2, stride)
  x, y = plane(m, 512, 256, W, H)
  luma = y_plane[y, x]
  x, y = plane(m * np.array([[1, 1, 0.5], [1, 1, 0.5], [2, 2, 1]]), 256, 128, W // 2, H // 2)
  return np.stack(
    [luma[0::2, 0::2], luma[1::2, 0::2], luma[0::2, 1::2], luma[1::2, 1::2], uv_plane[y, 2 * x], uv_plane[y, 2 * x + 1]]
  )


class TorchPipeline:
  """NV12 buffer and the network's other inputs -> its outputs, all in torch; coordinates are computed once, as a
  careful user would."""

  def __init__(self, student, stride, uv, m):
    import torch
    from openpilot.tools.fair.students.student import build

    torch.set_num_threads(1)
    self.torch, self.stride, self.uv = torch, stride, uv
    self.net = build(student).eval()
    self.luma = self._grid(m, 512, 256, W, H)
    self.chroma = self._grid(m * np.array([[1, 1, 0.5], [1, 1, 0.5], [2, 2, 1]]), 256, 128, W // 2, H // 2)

  def _grid(self, m, w, h, src_w, src_h):
    u, v = np.meshgrid(np.arange(w), np.arange(h))
    p = m @ np.stack([u.ravel(), v.ravel(), np.ones(w * h)])
    xy = (p[:2] / p[2] + 0.5) / np.array([[src_w], [src_h]]) * 2 - 1
    return self.torch.from_numpy(xy.T.reshape(1, h, w, 2).astype(np.float32))

  def warp(self, buf):
    torch = self.torch
    y = torch.from_numpy(buf[: self.stride * H].reshape(1, 1, H, self.stride))[..., :W].float()
    uv = (
      torch.from_numpy(buf[self.uv : self.uv + self.stride * (H // 2)].reshape(1, H // 2, self.stride // 2, 2))[
        :, :, : W // 2
      ]
      .permute(0, 3, 1, 2)
      .float()
    )
    options = {"mode": "nearest", "padding_mode": "border", "align_corners": False}
    luma = torch.nn.functional.grid_sample(y, self.luma, **options)
    chroma = torch.nn.functional.grid_sample(uv, self.chroma, **options)
    parts = [luma[:, :, 0::2, 0::2], luma[:, :, 1::2, 0::2], luma[:, :, 0::2, 1::2], luma[:, :, 1::2, 1::2], chroma]
    return torch.cat(parts, dim=1).to(torch.uint8)

  def run(self, buf, inputs):
    with self.torch.inference_mode():
      rest = {k: self.torch.from_numpy(v) for k, v in inputs.items() if k != "frame"}
      return {k: v.numpy() for k, v in self.net(self.warp(buf), **rest).items()}


def row(name, times, base=None):
  t = np.array(times) * 1e3
  more = "" if base is None else f"   {np.median(t) - np.median(base) * 1e3:+7.2f} of the bare network's p50"
  print(f"{name:<46} p50 {np.median(t):7.2f}   p99 {np.percentile(t, 99):7.2f}{more}")


def main():
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("bundle", nargs="?", type=Path, default=MODELS_DIR / DEFAULT)
  p.add_argument("--frames", type=int, default=300)
  p.add_argument("--student", help="the torch module's name; default: from the bundle's, as unified-small")
  args = p.parse_args()
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  os.environ["OPENPILOT_PREFIX"] = f"bench-{os.getpid()}"
  os.environ["PARAMS_ROOT"] = tempfile.mkdtemp()
  stride, y_height, _, size = nv12_info(W, H)
  uv = stride * y_height
  world = World(5, "day", 60.0)
  model = FairModel(load_bundle(args.bundle), time.perf_counter)
  model.set_camera(W, H, stride, uv, "mici", CAMERAS["mici"][1])
  model.set_calibration(world.rpy)
  buffers = drive_buffers(world, model.intrinsics, stride, uv, size)
  maps = {f"fair{name.capitalize()}" for plan in model.plans for name in plan.heads if name in PUBLISH}
  pm = messaging.PubMaster(sorted(maps | {"fairObjects", "fairLanes"}))
  m = get_warp_matrix(world.rpy, model.intrinsics)
  assert (naive_warp(buffers[0], stride, uv, m) == model.warp.warp(buffers[0])).all()
  graph = model.bundle.graphs[0]["name"]
  inputs = model.plans[0].inputs
  peer = None
  try:
    peer = TorchPipeline(args.student or graph, stride, uv, m)
    same = (peer.warp(buffers[0]).numpy()[0] == model.warp.warp(buffers[0])).mean()
    print(f"torch's warp gives the same pixels but for {1 - same:.2%} (halves are rounded another way)")
  except ImportError as e:
    print(f"no torch pipeline: {e}")
  order = itertools.cycle([*range(SCENES), *range(SCENES - 2, 0, -1)])
  t, start, i = defaultdict(list), 0.0, 0
  gc.disable()  # as in the process, which collects between frames, once a second
  gc.freeze()
  while i < args.frames + WARM_UP:  # in turns, not frame by frame: each finds the caches as it left them
    turn = [(buffers[next(order)], i + k) for k in range(min(TURN, args.frames + WARM_UP - i))]
    i += len(turn)
    times = defaultdict(list)
    gc.collect()
    for buf, n in turn:
      before = model.warp_time, model.stats[graph].total
      begun = time.perf_counter()
      for name, msg in model.process(buf, n, 0, 1 + n * 50_000_000):
        pm.send(name, msg)
      times["whole"].append(time.perf_counter() - begun)
      times["warp"].append(model.warp_time - before[0])
      times["network"].append(model.stats[graph].total - before[1])
    for _ in turn:
      begun = time.perf_counter()
      model.runners[graph].run(inputs)
      times["bare"].append(time.perf_counter() - begun)
    for buf, _ in turn:
      begun = time.perf_counter()
      naive_warp(buf, stride, uv, m)
      times["naive"].append(time.perf_counter() - begun)
    times["own"] = [a - b for a, b in zip(times["whole"], times["network"], strict=True)]
    for (buf, _), own, warp in zip(
      turn if peer is not None else [], times["own"], times["warp"], strict=peer is not None
    ):
      begun = time.perf_counter()
      peer.run(buf, inputs)
      times["plain"].append(time.perf_counter() - begun + own - warp)
    for (_, n), k in zip(turn, range(len(turn)), strict=True):
      if n == WARM_UP:
        start = memory_mb()
      if n >= WARM_UP:
        for name, x in times.items():
          t[name].append(x[k])
  print(
    f"{W}x{H}, {args.frames} frames of a simulated drive, one core, bundle {model.bundle.name}, "
    f"{len(model.tracker.ids)} tracks at the end; ms"
  )
  row(f"the bare network, {model.runners[graph].what}", t["bare"])
  row("fairmodeld, whole", t["whole"], t["bare"])
  row("  of that outside the network", t["own"])
  row("  of that the warp", t["warp"])
  row("  the warp without precomputed indices", t["naive"])
  if peer is not None:
    row("the same with warp and network in torch", t["plain"])
    ratio = np.median(t["plain"]) / np.median(t["whole"])
    print(
      f"fairmodeld is {ratio:.2f} times as fast as the torch pipeline (quartiles "
      f"{_quartiles(np.array(t['plain']) / np.array(t['whole']))}); goal 2"
    )
  print(
    f"outside the network p50 {np.median(t['own']) * 1e3:.2f} ms; goal 5.   memory {start:.1f} MB after {WARM_UP} "
    f"frames, {memory_mb():.1f} MB at the end"
  )


def _quartiles(x):
  return f"{np.percentile(x, 25):.2f}-{np.percentile(x, 75):.2f}"


if __name__ == "__main__":
  raise SystemExit(cli(main, (BundleError,))())

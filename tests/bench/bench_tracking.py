#!/usr/bin/env python3
"""What a frame of 30 objects and 200 lane points costs beside the network, on one core: tracking both (the budget of 2
ms), and apart from it decoding and publishing. Beside it the same assignment by the Hungarian method over the whole
matrix, without the groups that do not touch.

Two clocks: the wall's, which other work on the machine slows, and the CPU's.

python tests/bench/bench_tracking.py [--frames 400] [--objects 30] [--points 200]"""

import argparse
import os
import time
from types import SimpleNamespace

if not __package__:  # run as a file
  import from_root  # noqa: F401

import numpy as np

from openpilot.selfdrive.modeld.fair.assignment import assign, hungarian
from openpilot.selfdrive.modeld.fair.heads import objects as objects_head
from openpilot.selfdrive.modeld.fair.heads.depth import Depth
from openpilot.selfdrive.modeld.fair.heads.ground import view_ground
from openpilot.selfdrive.modeld.fair.heads.lanes import LanePoints, model_lines
from openpilot.selfdrive.modeld.fair.heads.objects import Detections
from openpilot.selfdrive.modeld.fair.lanes import LaneTracker
from openpilot.selfdrive.modeld.fair.publish import Stamp, lanes_message, objects_message, serialize
from openpilot.selfdrive.modeld.fair.tracking import Tracker

VIEW = (256, 512)
CLASSES = ["vehicle", "pedestrian", "cyclist"]


def scene(r: np.random.Generator, n: int, frames: int) -> list[Detections]:
  """n boxes in a busy street: they cross, one in twenty is missed, order is shuffled."""
  at, speed = r.uniform([20, 80], [490, 200], (n, 2)), r.normal(0, 1.5, (n, 2)) * [1, 0.2]
  size = r.uniform(15, 60, (n, 2))
  looks = r.normal(0, 1, (n, 16)).astype(np.float32)
  cls = r.integers(0, 3, n)
  y, x = np.mgrid[0:64, 0:128] * 4 + 1.5
  out = []
  for _ in range(frames):
    at += speed
    speed[(at < [20, 80]) & (speed < 0) | (at > [490, 200]) & (speed > 0)] *= -1
    order = r.permutation(n)[: max(1, n - r.binomial(n, 0.05))]
    c, s = (at + r.normal(0, 0.5, at.shape))[order], size[order]
    boxes = np.clip(np.concatenate([c - s / 2, c + s / 2], axis=1), -0.5, [511.5, 255.5] * 2).astype(np.float32)
    e = looks[order] + r.normal(0, 0.3, (len(order), 16)).astype(np.float32)
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    masks = ((x - c[:, :1, None]) / s[:, :1, None]) ** 2 + ((y - c[:, 1:, None]) / s[:, 1:, None]) ** 2 < 0.25
    out.append(Detections(CLASSES, boxes, r.uniform(0.5, 1, len(order)).astype(np.float32), cls[order], masks, e))
  return out


def line(y: float) -> SimpleNamespace:
  x = np.linspace(0, 14, 33) ** 2
  return SimpleNamespace(x=x.tolist(), y=[y] * 33, z=[1.22] * 33)


class Clock:
  """Collects wall and CPU seconds of named stretches."""

  def __init__(self) -> None:
    self.times: dict[str, list[tuple[float, float]]] = {}

  def __call__(self, name: str, f, *args):
    wall, cpu = time.perf_counter(), time.process_time()
    out = f(*args)
    self.times.setdefault(name, []).append((time.perf_counter() - wall, time.process_time() - cpu))
    return out

  def line(self, what: str, *names: str, note: str = "") -> None:
    ms = np.sum([self.times[n][10:] for n in names], axis=0) * 1e3
    wall = f"p50 {np.percentile(ms[:, 0], 50):5.2f}  p99 {np.percentile(ms[:, 0], 99):5.2f}"
    print(f"{what:36s} wall {wall} ms   CPU mean {ms[:, 1].mean():5.2f} ms {note}")


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--frames", type=int, default=400)
  p.add_argument("--objects", type=int, default=30)
  p.add_argument("--points", type=int, default=200)
  args = p.parse_args()
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  r = np.random.default_rng(0)
  ground, depth, valid = (
    view_ground("medmodel"),
    Depth(r.uniform(3, 60, (64, 128)).astype(np.float32), True),
    np.ones(VIEW, bool),
  )
  frames = scene(r, args.objects, args.frames)
  model = SimpleNamespace(laneLines=[line(y) for y in (-5.4, -1.8, 1.8, 5.4)], laneLineProbs=[0.9] * 4)
  tracker, lanes = Tracker(CLASSES, VIEW), LaneTracker(args.points, VIEW)
  heat = np.full((1, 3, 32, 64), -8, np.float32)
  cells = r.choice(32 * 64, args.objects, replace=False)
  heat.reshape(3, -1)[r.integers(0, 3, len(cells)), cells] = r.uniform(1, 4, len(cells))
  raw = {
    "heat": heat,
    "box": r.uniform(4, 30, (1, 4, 32, 64)).astype(np.float32),
    "coef": r.normal(0, 1, (1, 16, 32, 64)).astype(np.float32),
    "proto": r.normal(0, 1, (1, 16, 64, 128)).astype(np.float32),
    "embed": r.normal(0, 1, (1, 16, 32, 64)).astype(np.float32),
  }
  clock = Clock()
  for i, d in enumerate(frames):
    tracked = clock("objects", tracker.update, i, d, ground, depth)
    clock("seeds", lambda: lanes.seed(model_lines(model, ground) if lanes.wants_seeds() else [], ground, valid))
    # what the graph would give: the road flows by at 20 m/s
    road = ground.road(lanes.points[0]) - [1.0, 0, 0]
    road[:, 1] += r.normal(0, 0.02, args.points)
    found = LanePoints(
      np.nan_to_num(ground.view(road), nan=1e4).astype(np.float32), r.uniform(0.3, 1, args.points).astype(np.float32)
    )
    lines = clock("lines", lanes.update, found, ground)
    stamp = Stamp(i, 0, "bench", 0, True)
    clock(
      "publish",
      lambda t, l, s: (serialize(*objects_message(t, s)), serialize(*lanes_message(l, s))),
      tracked,
      lines,
      stamp,
    )
    clock("decode", objects_head.decode, raw, {"heat": {"classes": CLASSES}}, valid)
    assert len(lines) == 4
  for _ in range(50):
    value = np.where(
      r.random((args.objects, args.objects)) < 1.5 / args.objects, r.random((args.objects, args.objects)), 0
    )
    rows, cols = clock("groups", assign, value)
    whole = clock("whole", hungarian, value.tolist())
    assert abs(value[rows, cols].sum() - sum(value[i, j] for i, j in whole)) < 1e-9
  print(
    f"{args.objects} objects and {args.points} lane points, {args.frames} frames, one core; {tracker.next_id - 1} ids "
    f"given, {lanes.next_id - 1} lines"
  )
  clock.line("tracking, both", "objects", "seeds", "lines", note="(budget 2 ms)")
  clock.line("  objects", "objects")
  clock.line("  lane points, seeds and lines", "seeds", "lines")
  clock.line(f"decode of {len(cells)} peaks with masks", "decode")
  clock.line("messages, masks as RLE", "publish")
  clock.line("assignment by groups", "groups")
  clock.line("assignment, the whole matrix", "whole")
  groups, whole_ms = (np.median([w for w, _ in clock.times[k]]) for k in ("groups", "whole"))
  print(f"the groups are {whole_ms / groups:.1f} times as fast")


if __name__ == "__main__":
  main()

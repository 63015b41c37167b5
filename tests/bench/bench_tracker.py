#!/usr/bin/env python3
"""Points on the simulator's static surfaces followed through 20 frames by all trackers that are here, behind one
interface (track_lane_points): chained RAFT flow, CoTracker 2 and 3 where their package and weights are there, and
chained pyramidal Lucas-Kanade (OpenCV) with RAFT's forward-backward check. Truth is
exact: the rendered depth, and the camera's motion. Judged as TAP-Vid does (tools/fair/evaluation/metrics.py, Tracks),
and in pixels of the view.

python tests/bench/bench_tracker.py [--seeds 3 5 8] [--time day] [--iters 8] [--scale 1] [--accept-license CC-BY-NC-4.0]
[--weights raft-small.pth]"""

import argparse
import time
from collections.abc import Callable

if not __package__:  # run as a file
  import from_root  # noqa: F401

import cv2
import numpy as np

from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.tools.fair.cotracker.cotracker import CoTracker
from openpilot.tools.fair.cotracker.lane_points import inside, road_grid
from openpilot.tools.fair.cotracker.tracker import LaneTracker
from openpilot.tools.fair.evaluation.metrics import Tracks
from openpilot.tools.fair.registry import TEACHERS
from openpilot.tools.fair.teacher import check_license
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.sim.points import FPS, STATIC, follow
from openpilot.tools.sim.render import render
from openpilot.tools.sim.world import World

W, H = 512, 256
SPANS = (1, 5, 10, 20)
FAR = 80.0  # meters
COTRACKERS = {"cotracker3-offline": "offline", "cotracker3-online": "online", "cotracker2": "v2"}  # teacher -> mode
Follow = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def lucas_kanade(video: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The named alternative, with OpenCV's defaults and LaneTracker's check."""
  gray = [cv2.cvtColor(np.ascontiguousarray(f.transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY) for f in video]
  tracks, visible = np.repeat(points[None].astype(np.float32), len(video), 0), np.zeros((len(video), len(points)), bool)
  visible[0] = True
  for t in range(1, len(video)):
    tracks[t] = tracks[t - 1]
    alive = np.flatnonzero(visible[t - 1])
    if len(alive):
      p = tracks[t - 1, alive]
      q, ok, _ = cv2.calcOpticalFlowPyrLK(gray[t - 1], gray[t], p[:, None], None)
      r, ok2, _ = cv2.calcOpticalFlowPyrLK(gray[t], gray[t - 1], q, None)
      missed, way = np.linalg.norm(r[:, 0] - p, axis=1), np.linalg.norm(q[:, 0] - p, axis=1)
      seen = (ok[:, 0] > 0) & (ok2[:, 0] > 0) & inside(q[:, 0], H, W) & (missed <= 1.0 + 0.02 * way)
      tracks[t, alive[seen]], visible[t, alive[seen]] = q[seen, 0], True
  return tracks, visible


def add(acc: Tracks, tracks: np.ndarray, visible: np.ndarray, true: np.ndarray, seen: np.ndarray) -> None:
  """One video: tracks, true (T, N, 2) pixels of the view, visible, seen (T, N) bool. All points are asked for in frame
  0, which does not count."""
  hidden = ~seen[0]
  for k in range(1, len(tracks)):
    acc.add(tracks[k], visible[k], true[k], seen[k], hidden)
    hidden = hidden | ~seen[k]


def trackers_here(args: argparse.Namespace) -> dict[str, Follow]:
  """Who can run, by name. Says of the others why not."""
  found: dict[str, Follow] = {}

  def try_it(name: str, license: str, make: Callable[[], Follow]) -> None:
    try:
      check_license(name, license, args.accept_license)
      found[name] = make()
    except UserError as e:
      print(f"{name}: left out, {e}")

  try_it(
    "raft-tracker",
    TEACHERS["raft-tracker"].license,
    lambda: LaneTracker(args.weights, iters=args.iters, scale=args.scale).track_lane_points,
  )
  for name, mode in COTRACKERS.items():
    try_it(name, TEACHERS[name].license, lambda mode=mode: CoTracker(mode).track_lane_points)
  return {**found, "Lucas-Kanade": lucas_kanade}


def start_points(frame) -> np.ndarray:
  """(N, 2) whole pixels on static surfaces: the lower part of the picture, whatever stands there, and more of the
  road."""
  points = np.concatenate([road_grid(H, W, None, 16), road_grid(H, W, medmodel_intrinsics, 16) - 8])
  ij = points.astype(int)
  near = (frame.depth[ij[:, 1], ij[:, 0]] < FAR) & np.isin(frame.semantic[ij[:, 1], ij[:, 0]], STATIC)
  return ij[near].astype(np.float64)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seeds", type=int, nargs="+", default=[3, 5, 8], help="worlds of the simulator")
  parser.add_argument("--time", default="day", choices=("day", "dusk", "night"))
  parser.add_argument("--iters", type=int, default=8, help="RAFT's refinements a pair")
  parser.add_argument("--scale", type=int, default=1, help="pictures are enlarged by this before RAFT")
  parser.add_argument("--weights", help="raft-small.pth; else, as CoTracker's, where all weights are looked for")
  parser.add_argument(
    "--accept-license", action="append", default=[], metavar="LICENSE", help="of CoTracker: CC-BY-NC-4.0"
  )
  args = parser.parse_args()
  trackers = trackers_here(args)
  judged = {name: Tracks() for name in trackers}
  sums: dict[str, dict[int, list[np.ndarray]]] = {name: {k: [] for k in SPANS} for name in trackers}
  spent = dict.fromkeys(trackers, 0.0)
  for seed in args.seeds:
    world, start = World(seed, args.time), 2.0
    frames = [render(world, start + k / FPS, medmodel_intrinsics, W, H) for k in range(max(SPANS) + 1)]
    video = np.stack([f.rgb for f in frames]).transpose(0, 3, 1, 2)
    points = start_points(frames[0])
    true, seen = follow(world, frames, start, points)
    for name, track in trackers.items():
      t0 = time.perf_counter()
      tracks, visible = track(video, points)
      spent[name] += time.perf_counter() - t0
      add(judged[name], tracks, visible, true, seen)
      for k in SPANS:
        error = np.linalg.norm(tracks[k] - np.nan_to_num(true[k], nan=1e6), axis=1)
        sums[name][k].append(np.stack([error, seen[k], visible[k]], 1))
  print(f"worlds {args.seeds}, {args.time}, medmodel view {W}x{H}, {FPS} frames/s, {max(SPANS)} frames")
  print(f"\nTAP-Vid at 256x256    {'average Jaccard':>16} {'delta_avg':>10} {'occlusion accuracy':>19} {'ms/frame':>9}")
  for name, acc in judged.items():
    r = acc.result()
    ms = 1e3 * spent[name] / (len(args.seeds) * max(SPANS))
    print(f"{name:21} {r['average_jaccard']:16.1%} {r['delta_avg']:10.1%} {r['occlusion_accuracy']:19.1%} {ms:9.1f}")
  print("\npixels of the view over points that are seen and said to be seen")
  print("tracker             frames  points  mean px  median  p90   kept of seen  right of kept (< 3 px)")
  for name, by_span in sums.items():
    for k, parts in by_span.items():
      rows = np.concatenate(parts)
      seen, said = rows[:, 1] > 0, rows[:, 2] > 0
      e = rows[seen & said, 0]
      if not len(e):
        print(f"{name:19} {k:6}       0")
        continue
      right = (seen & said & (rows[:, 0] < 3)).sum() / said.sum()
      print(
        f"{name:19} {k:6}  {len(e):6}  {e.mean():7.2f}  {np.median(e):6.2f}  {np.quantile(e, 0.9):5.2f} "
        f"{len(e) / seen.sum():10.1%} {right:16.1%}"
      )


if __name__ == "__main__":
  raise SystemExit(cli(main)())

#!/usr/bin/env python3
"""The points of road and lane lines that a student is evaluated on (`op evaluate`, "Tracks of points"), given to others
too: RAFT-small's flow, chained; Lucas and Kanade's (OpenCV), chained; points that stay where they were. Then where each
errs: on lines or bare asphalt, near or far, how far after so many frames.

python tests/bench/bench_points.py LABELS BUNDLE... [--frames 100] [--without raft]    LABELS: a store with frames and
    the simulator's labels"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
  import from_root  # noqa: F401

import cv2
import numpy as np
from tqdm import tqdm

from openpilot.selfdrive.modeld.fair.bundle import BundleError, load_bundle
from openpilot.tools.fair.cotracker.lane_points import inside
from openpilot.tools.fair.cotracker.tracker import LaneTracker
from openpilot.tools.fair.evaluation.columns import Hold
from openpilot.tools.fair.evaluation.compared import Compared
from openpilot.tools.fair.evaluation.labels import Labels
from openpilot.tools.fair.evaluation.metrics import Tracks
from openpilot.tools.fair.evaluation.scenes import Queries, QueryMaker, check_label, open_segments
from openpilot.tools.fair.evaluation.student import Student
from openpilot.tools.fair.labels.dataset import Reader
from openpilot.tools.fair.labels.placement import rgb_of
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.sim.points import ground_depth

TRUTH = "simulator"
CLASSES = ("road", "lane")  # of its points
NEAR = 15.0  # m
AGES = (1, 2, 5, 10, 20, 30)  # frames behind a point's first
# one frame's picture (H, W, 3) RGB and the next one's, points (N, 2) in the first -> where in the second, whether seen
Step = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
Followed = tuple[np.ndarray, np.ndarray]  # points (N, 2), visible (N,)


def lucas_kanade(a: np.ndarray, b: np.ndarray, points: np.ndarray) -> Followed:
  """21 x 21 pixels, four levels, both ways, with RAFT's check."""
  gray = [cv2.cvtColor(x, cv2.COLOR_RGB2GRAY) for x in (a, b)]
  p = points.astype(np.float32)[:, None]
  q, ok, _ = cv2.calcOpticalFlowPyrLK(*gray, p, None)
  r, back, _ = cv2.calcOpticalFlowPyrLK(*gray[::-1], q, None)
  missed, way = np.linalg.norm((r - p)[:, 0], axis=1), np.linalg.norm((q - p)[:, 0], axis=1)
  seen = (ok[:, 0] > 0) & (back[:, 0] > 0) & inside(q[:, 0], *gray[0].shape) & (missed <= 1.0 + 0.02 * way)
  return q[:, 0].astype(np.float64), seen


class Raft:
  """LaneTracker's step, each frame encoded once."""

  def __init__(self, weights: str | None, iters: int):
    self.tracker = LaneTracker(weights, iters=iters)
    self.last: tuple[np.ndarray, Any] | None = None

  def __call__(self, a: np.ndarray, b: np.ndarray, points: np.ndarray) -> Followed:
    before = self.last[1] if self.last is not None and self.last[0] is a else self.tracker.encode(a.transpose(2, 0, 1))
    now = self.tracker.encode(b.transpose(2, 0, 1))
    self.last = b, now
    return self.tracker.step(before, now, points)


class Chained:
  """Points that go from frame to frame by `step`. As TAP-Vid counts: one that is lost stays, unseen, where it was."""

  def __init__(self, step: Step):
    self.go, self.before = step, None
    self.xy, self.seen = np.zeros((0, 2)), np.zeros(0, bool)

  def step(self, rgb: np.ndarray, q: Queries) -> Followed:
    if self.before is None:
      self.xy, self.seen = q.xy.copy(), q.fresh.copy()
    alive = np.flatnonzero(self.seen & q.used & ~q.fresh)
    if self.before is not None and len(alive):
      there, seen = self.go(self.before, rgb, self.xy[alive])
      self.xy[alive[seen]], self.seen[alive] = there[seen], seen
    self.xy, self.seen = np.where(q.fresh[:, None], q.xy, self.xy), np.where(q.fresh, True, self.seen)
    self.before = rgb
    return self.xy.copy(), self.seen.copy()


class Judged:
  """What came of one tracker, by parts of the points."""

  def __init__(self) -> None:
    self.all, self.parts, self.errors = Tracks(), {}, {a: [] for a in AGES}  # type: ignore[var-annotated]
    self.times: list[float] = []

  def add(self, found: Followed, q: Queries, parts: dict[str, np.ndarray], age: np.ndarray) -> None:
    points, visible = found

    def put(to: Tracks, k: np.ndarray) -> None:
      to.add(points[k], visible[k], q.truth[k], q.visible[k], q.hidden_before[k])

    put(self.all, q.known)
    for name, which in parts.items():
      put(self.parts.setdefault(name, Tracks()), q.known & which)
    for a, errors in self.errors.items():
      k = q.known & q.visible & (age == a)
      errors += np.linalg.norm(points[k] - q.truth[k], axis=1).tolist()


def class_of(points: dict[str, np.ndarray] | None, q: Queries, before: np.ndarray) -> np.ndarray:
  """(N,) the slots' classes: of a fresh one that of the label's row where it is."""
  out = before.copy()
  if points is not None:
    for s in np.flatnonzero(q.fresh).tolist():
      row = np.flatnonzero((points["x"] == q.xy[s, 0]) & (points["y"] == q.xy[s, 1]))
      out[s] = points["cls"][row[0]]
  return out


def run(args: argparse.Namespace) -> dict[str, Judged]:
  compared = Compared(ignore=True)
  students = [Student(load_bundle(p), compared) for p in args.bundles]
  names = [str(p) for p in args.bundles]
  judged = {n: Judged() for n in names}
  segments = check_label(open_segments(args.labels, {TRUTH}, [], args.segment, args.frames), TRUTH, args.labels)
  with tqdm(total=sum(len(s.ids) for s in segments), unit="frame", desc="points", disable=None) as bar:
    for segment in segments:
      reader = Reader(window=1)
      labels = Labels(segment, TRUTH, reader, compared)
      reader.labels = 1 + len(labels.group.labels)
      tables = [labels.points(i) for i in segment.ids]
      maker = QueryMaker(tables)
      others: dict[str, Any] = {}
      if "raft" not in args.without:
        others["raft-small"] = Chained(Raft(args.weights, args.iters))
      if "lk" not in args.without:
        others["Lucas-Kanade"] = Chained(lucas_kanade)
      hold = Hold()
      for s in students:
        s.reset()
      age, cls = np.zeros(maker.slots, int), np.zeros(maker.slots, int)
      for t, (row, frame_id) in enumerate(zip(segment.rows, segment.ids, strict=True)):
        frame, q = reader.dense(segment.frames, "frame", [row])[0], maker.step(t)
        cls = class_of(tables[t], q, cls)
        age = np.where(q.fresh, 0, age + 1)
        depth = ground_depth(q.truth, 1.22)
        parts = {
          **{c: cls == k for k, c in enumerate(CLASSES)},
          f"< {NEAR:.0f} m": depth < NEAR,
          f"> {NEAR:.0f} m": depth >= NEAR,
          **{f"{c}": np.full(maker.slots, c in segment.conditions) for c in segment.conditions},
        }
        rgb = rgb_of(frame)
        for name, s in zip(names, students, strict=True):
          t0 = time.perf_counter()
          found = s.step(frame, frame_id, segment.valid_at(frame_id), q).followed
          judged[name].times.append(time.perf_counter() - t0)
          assert found is not None
          judged[name].add(found, q, parts, age)
        for name, other in others.items():
          t0 = time.perf_counter()
          found = other.step(rgb, q)
          of = judged.setdefault(name, Judged())
          of.times.append(time.perf_counter() - t0)
          of.add(found, q, parts, age)
        still = hold.step(q).followed
        assert still is not None
        judged.setdefault("hold still", Judged()).add(still, q, parts, age)
        bar.update()
  return judged


def tables(judged: dict[str, Judged]) -> str:
  width = max(len(n) for n in judged)
  parts = list(dict.fromkeys(p for j in judged.values() for p in j.parts))
  lines = [f"{'':{width}}  {'AJ':>5} {'delta':>5} {'occl.':>5}  {'ms':>6}  AJ of {', '.join(parts)}"]
  for name, j in judged.items():
    r = j.all.result()
    of = " ".join(f"{j.parts[p].result().get('average_jaccard', float('nan')):.3f}" for p in parts)
    ms = 1e3 * float(np.median(j.times)) if j.times else 0.0
    lines.append(
      f"{name:{width}}  {r['average_jaccard']:.3f} {r['delta_avg']:.3f} {r['occlusion_accuracy']:.3f}  {ms:6.1f}  {of}"
    )
  lines.append(f"\nview pixels off, median and 90th percentile, of visible points {AGES} frames behind their first")
  for name, j in judged.items():
    each = [f"{np.median(e):.1f} {np.quantile(e, 0.9):.1f}" if e else "-" for e in j.errors.values()]
    lines.append(f"{name:{width}}  {'   '.join(each)}")
  return "\n".join(lines)


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("labels", type=Path)
  p.add_argument("bundles", type=Path, nargs="*")
  p.add_argument("--frames", type=int, default=100, help="of each segment")
  p.add_argument("--segment")
  p.add_argument("--without", nargs="*", default=[], choices=("raft", "lk"))
  p.add_argument("--weights", help="raft-small.pth; else where all weights are looked for")
  p.add_argument("--iters", type=int, default=8, help="RAFT's refinements a pair")
  args = p.parse_args()
  for b in args.bundles:
    if not (b / "manifest.json").is_file():
      raise UserError(f"{b} is no bundle; give a folder with a manifest.json")
  print(tables(run(args)))


if __name__ == "__main__":
  raise SystemExit(cli(main, (BundleError,))())

#!/usr/bin/env python3
"""Identity through occlusion: a lorry drives across the simulator's picture and hides all behind it for 5, 15 or 40
frames at 20 Hz; a stand-in of a detector sees the exact visible boxes with noise, drop-outs and false alarms.
ObjectTracker, with and without colors, the camera's turn and flow, against one without memory (IoU with the last
frame).

python tests/bench/bench_object_tracker.py [--seeds 11 12 13] [--time day]

Seeds 1 to 10 and 21 to 26 were used to choose the constants: they flatter it.
"""

import argparse
import itertools
import time
from dataclasses import dataclass, field
from typing import Any

if not __package__:  # run as a file
  import from_root  # noqa: F401

import numpy as np
from scipy.optimize import linear_sum_assignment

from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.selfdrive.modeld.fair.heads.objects import box_iou
from openpilot.tools.fair.sam.motion import ObjectTracker, Tracks
from openpilot.tools.fair.sam.track import flow_of, looks_of
from openpilot.tools.fair.sam.turn import turned
from openpilot.tools.lib.errors import cli
from openpilot.tools.sim.render import render
from openpilot.tools.sim.layout import VEHICLE
from openpilot.tools.sim.world import World

FPS, W, H = 20, 512, 256
HIDDEN = (5, 15, 40)
LORRY, LENGTH, AT = 60000, 9.5, 9.0  # identity, meters long, meters ahead
LEAD_IN, AFTER = 30, 15  # frames before it comes and after it has gone
TURN_NOISE = 0.003  # rad/s; the real logs' rotStd is 0.001 to 0.004
MIN_PIXELS = 60  # a detector's smallest object


class Crossed(World):
  """A world where a lorry crosses the picture from left to right, so that it hides a direction for `hidden` frames."""

  def __init__(self, seed: int, hidden: int, time_of_day: str = "day"):
    super().__init__(seed, time_of_day)
    self.lorry_speed = LENGTH / (hidden / FPS)
    self.reach = AT * W / 2 / medmodel_intrinsics[0, 0] + LENGTH / 2 + 1.5
    self.frames = LEAD_IN + int(2 * self.reach / self.lorry_speed * FPS) + AFTER

  def objects(self, t: float) -> list[dict[str, Any]]:
    y = -self.reach + self.lorry_speed * (t - LEAD_IN / FPS)
    # nobody else between the camera and the lorry
    others = [o for o in super().objects(t) if o["x"] > AT + 4]
    lorry = {
      "id": LORRY,
      "cls": VEHICLE,
      "x": AT,
      "y": y,
      "yaw": np.pi / 2,
      "size": (LENGTH, 2.4, 3.6),
      "rgb": (0.3, 0.05, 0.05),
      "shape": 2,
      "v_rel": 0.0,
      "lane_d": 0.0,
    }
    return [*others, lorry] if abs(y) < self.reach else others


@dataclass
class Scene:
  """Frame by frame: what the detector says, and who that truly is (-1: nobody)."""

  boxes: list[np.ndarray] = field(default_factory=list)
  scores: list[np.ndarray] = field(default_factory=list)
  classes: list[np.ndarray] = field(default_factory=list)
  truth: list[np.ndarray] = field(default_factory=list)
  pixels: list[dict[int, int]] = field(default_factory=list)  # identity -> pixels to be seen
  gray: list[np.ndarray] = field(default_factory=list)
  looks: list[np.ndarray] = field(default_factory=list)
  turns: list[np.ndarray] = field(default_factory=list)  # since the frame before, (3,) radians, as cameraOdometry says


def boxes_of(instance: np.ndarray) -> dict[int, tuple[int, np.ndarray]]:
  """(H, W) identities -> identity: pixels, box (its pixels' outer edges)."""
  out = {}
  for i in np.unique(instance[instance > 0]).tolist():
    ys, xs = np.nonzero(instance == i)
    out[i] = len(xs), np.array([xs.min() - 0.5, ys.min() - 0.5, xs.max() + 0.5, ys.max() + 0.5])
  return out


def make_scene(
  seed: int,
  hidden: int,
  time_of_day: str = "day",
  rgb: bool = True,
  noise: float = 0.03,
  drop: float = 0.08,
  false: float = 0.05,
) -> Scene:
  """noise: of a box's edges, as part of its size; drop: share of boxes that the detector overlooks; false: alarms a
  frame."""
  world, scene, r = Crossed(seed, hidden, time_of_day), Scene(), np.random.default_rng([seed, hidden])
  spin = np.random.default_rng([seed, hidden, 1])
  largest: dict[int, float] = {}
  for n in range(world.frames):
    frame = render(world, n / FPS, medmodel_intrinsics, W, H, rgb=rgb)
    found = {i: v for i, v in boxes_of(frame.instance).items() if v[0] >= MIN_PIXELS}
    scene.pixels.append({i: v[0] for i, v in found.items()})
    rows = []
    for i, (count, box) in found.items():
      # half of what was to be seen of it lately must be there: detectors find nothing in a sliver
      largest[i] = max(count, largest.get(i, 0) * 0.98)
      if count < 0.4 * largest[i] or r.uniform() < drop:
        continue
      size = np.sqrt(np.prod(box[2:] - box[:2]))
      rows.append(
        (
          *(box + r.normal(0, noise * size + 0.3, 4)),
          r.uniform(0.45, 0.95),
          int(frame.semantic[frame.instance == i][0]),
          i,
        )
      )
    if r.uniform() < false:
      x, y, s = r.uniform(0, W), r.uniform(80, 160), r.uniform(10, 40)
      rows.append((x - s, y - s, x + s, y + s, r.uniform(0.3, 0.6), VEHICLE, -1))
    table = np.array(rows, np.float64).reshape(-1, 7)
    table = table[(table[:, 2] > table[:, 0] + 1) & (table[:, 3] > table[:, 1] + 1)]
    scene.boxes.append(table[:, :4])
    scene.scores.append(table[:, 4])
    scene.classes.append(table[:, 5].astype(np.int64))
    scene.truth.append(table[:, 6].astype(np.int64))
    scene.gray.append(frame.rgb.mean(-1).astype(np.uint8))
    scene.turns.append((world.motion((n - 0.5) / FPS)[1] + spin.normal(0, TURN_NOISE, 3)) / FPS)
    scene.looks.append(looks_of(frame.rgb.transpose(2, 0, 1), table[:, :4]))
  return scene


def follow(scene: Scene, flow: bool, looks: bool, turn: bool = False) -> list[np.ndarray]:
  """-> ObjectTracker's identity of every box."""
  tracker, tracks, out = ObjectTracker(), Tracks(), []
  for n, (boxes, scores, classes) in enumerate(zip(scene.boxes, scene.scores, scene.classes, strict=True)):
    moved = flow_of(scene.gray[n - 1], scene.gray[n], tracks) if flow and n else None
    way = turned(scene.turns[n], medmodel_intrinsics) if turn else None
    out.append(tracker.update(tracks, boxes, scores, classes, (H, W), moved, scene.looks[n] if looks else None, way))
  return out


def without_memory(scene: Scene) -> list[np.ndarray]:
  """The named alternative: who overlaps a box of the last frame goes on, all others are new."""
  out: list[np.ndarray] = []
  last, last_ids, next_id = np.zeros((0, 4)), np.zeros(0, np.int64), 0
  for boxes in scene.boxes:
    ids, over = np.full(len(boxes), -1, np.int64), box_iou(last, boxes)
    rows, columns = linear_sum_assignment(-over)
    good = over[rows, columns] > 0.2
    ids[columns[good]] = last_ids[rows[good]]
    new = np.flatnonzero(ids < 0)
    ids[new] = next_id + np.arange(len(new))
    next_id += len(new)
    out.append(ids)
    last, last_ids = boxes, ids
  return out


@dataclass
class Figures:
  kept: int = 0  # things that came back with the identity they had
  hidden: int = 0  # things that were hidden for about so long
  switches: int = 0  # changes of identity from one box of a thing to the next
  boxes: int = 0
  idf1: list[float] = field(default_factory=list)

  def add(self, scene: Scene, ids: list[np.ndarray], hidden: int) -> None:
    """Of one scene: of those out of sight for 0.5 to 1.25 times `hidden` frames, who was followed before, and who has
    kept their identity."""
    true, said = np.concatenate(scene.truth), np.concatenate(ids)
    names, tracks = np.unique(true[true >= 0]), np.unique(said[said >= 0])
    for i in names.tolist():
      at = [
        (n, int(s[k]))
        for n, (who, s) in enumerate(zip(scene.truth, ids, strict=True))
        for k in np.flatnonzero((who == i) & (s >= 0))
      ]
      steps = list(itertools.pairwise(at))
      self.switches += sum(a[1] != b[1] for a, b in steps)
      for k, (a, b) in enumerate(steps):
        # hidden, not just overlooked: followed for half a second before, and no pixel to be seen at some moment between
        unseen = [n for n in range(a[0], b[0]) if i not in scene.pixels[n]]
        if k >= 9 and unseen and 0.5 * hidden <= b[0] - a[0] - 1 <= 1.25 * hidden and i != LORRY:
          self.hidden += 1
          self.kept += a[1] == b[1]
    both = np.array([[((true == i) & (said == t)).sum() for t in tracks] for i in names]).reshape(
      len(names), len(tracks)
    )
    agreed = both[linear_sum_assignment(-both)].sum()
    self.boxes += int((true >= 0).sum())
    self.idf1.append(2 * agreed / ((true >= 0).sum() + (said >= 0).sum()))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13], help="worlds of the simulator")
  parser.add_argument("--time", default="day", choices=("day", "dusk", "night"))
  args = parser.parse_args()
  ways = {
    "motion": lambda s: follow(s, False, False),
    "+ looks": lambda s: follow(s, False, True),
    "+ looks, turn": lambda s: follow(s, False, True, True),
    "+ looks, flow": lambda s: follow(s, True, True),
    "no memory": without_memory,
  }
  print(f"{'hidden for':>10}  {'':15} {'kept':>12} {'switches':>9} {'boxes':>6} {'IDF1':>6} {'ms/frame':>9}")
  for hidden in HIDDEN:
    figures, spent, frames = {k: Figures() for k in ways}, dict.fromkeys(ways, 0.0), 0
    for seed in args.seeds:
      scene = make_scene(seed, hidden, args.time)
      frames += len(scene.boxes)
      for name, way in ways.items():
        start = time.perf_counter()
        ids = way(scene)
        spent[name] += time.perf_counter() - start
        figures[name].add(scene, ids, hidden)
    for name, f in figures.items():
      share = f"{f.kept}/{f.hidden} {100 * f.kept / max(1, f.hidden):3.0f}%"
      print(
        f"{hidden:>10}  {name:15} {share:>12} {f.switches:>9} {f.boxes:>6} {np.mean(f.idf1):6.3f} "
        f"{1e3 * spent[name] / frames:9.2f}"
      )


if __name__ == "__main__":
  raise SystemExit(cli(main)())

#!/usr/bin/env python3
"""Identity through occlusion: a lorry drives across the simulator's picture and hides all behind it for 5, 15 or 40
frames at 20 Hz; a stand-in of a detector sees the exact visible boxes with noise, drop-outs and false alarms.
ObjectTracker, with and without colors, the camera's turn and flow, and fairmodeld's tracker, with and without colors
and the car's own motion, against one without memory (IoU with the last frame).

python tests/bench/bench_object_tracker.py [--seeds 11 12 13] [--time day]
python tests/bench/bench_object_tracker.py --hidden 40 --seeds 1000 --events 100 --only device --before OLD.py
    fresh worlds from a seed on until so many things were hidden; OLD.py: another tracking.py, e.g. by git show
python tests/bench/bench_object_tracker.py --hidden 0 ...    ordinary drives without a lorry: switches and IDF1
    --bundle models/fair_unified_small: a student sees the pictures, in place of the stand-in; its embeddings are used

Seeds 1 to 10, 21 to 26 and 100 to 125 were used to choose constants: they flatter the trackers.
"""

import argparse
import importlib.util
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
  import from_root  # noqa: F401

import numpy as np
from scipy.optimize import linear_sum_assignment

from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.selfdrive.modeld.fair import tracking
from openpilot.selfdrive.modeld.fair.heads import HEADS
from openpilot.selfdrive.modeld.fair.heads.ground import DEFAULT_HEIGHT, view_ground
from openpilot.selfdrive.modeld.fair.heads.objects import Detections, box_iou
from openpilot.tools.fair.sam.motion import ObjectTracker, Tracks
from openpilot.tools.fair.sam.track import flow_of, looks_of
from openpilot.tools.fair.sam.turn import turned
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.sim.pieces import PEDESTRIAN, VEHICLE
from openpilot.tools.sim.render import CLASSES, render
from openpilot.tools.sim.world import World
from tests.bench.bench_streets import STREETS, Runner, frame_of, view_of

FPS, W, H = 20, 512, 256
HIDDEN = (5, 15, 40)
LORRY, LENGTH, AT = 60000, 9.5, 9.0  # identity, meters long, meters ahead
LEAD_IN, AFTER = 30, 15  # frames before it comes and after it has gone
ORDINARY = 150  # frames of a drive without a lorry
BACK_WITHIN = 10  # frames in which a thing that is seen again must be told
TURN_NOISE = 0.003  # rad/s; the real logs' rotStd is 0.001 to 0.004
SPEED_NOISE = 0.1  # m/s
MIN_PIXELS = 60  # a detector's smallest object


class Crossed(World):
  """A world where a lorry crosses the picture from left to right, so that it hides a direction for `hidden` frames; 0:
  no lorry."""

  def __init__(self, seed: int, hidden: int, time_of_day: str = "day"):
    super().__init__(seed, time_of_day)
    self.crossed, self.frames = hidden > 0, ORDINARY
    if not self.crossed:
      return
    self.lorry_speed = LENGTH / (hidden / FPS)
    self.reach = AT * W / 2 / medmodel_intrinsics[0, 0] + LENGTH / 2 + 1.5
    self.frames = LEAD_IN + int(2 * self.reach / self.lorry_speed * FPS) + AFTER

  def objects(self, t: float) -> list[dict[str, Any]]:
    if not self.crossed:
      return super().objects(t)
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
  speeds: list[float] = field(default_factory=list)  # m/s, as carState says
  embed: list[np.ndarray | None] = field(default_factory=list)  # (N, E), of a student
  height: float = 1.22  # m, of the camera


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
  student: "Student | None" = None,
) -> Scene:
  """noise: of a box's edges, as part of its size; drop: share of boxes that the detector overlooks; false: alarms a
  frame. student: sees in its place."""
  world, scene, r = Crossed(seed, hidden, time_of_day), Scene(), np.random.default_rng([seed, hidden])
  spin = np.random.default_rng([seed, hidden, 1])
  largest: dict[int, float] = {}
  scene.height = world.camera_height
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
    embed = None
    if student is not None:
      table, embed = student(frame.rgb, found)
    scene.embed.append(embed)
    scene.speeds.append(world.ego(n / FPS)["v_ego"] + spin.normal(0, SPEED_NOISE))
    scene.boxes.append(table[:, :4])
    scene.scores.append(table[:, 4])
    scene.classes.append(table[:, 5].astype(np.int64))
    scene.truth.append(table[:, 6].astype(np.int64))
    scene.gray.append(frame.rgb.mean(-1).astype(np.uint8))
    scene.turns.append((world.motion((n - 0.5) / FPS)[1] + spin.normal(0, TURN_NOISE, 3)) / FPS)
    scene.looks.append(looks_of(frame.rgb.transpose(2, 0, 1), table[:, :4]))
  return scene


class Student:
  """A bundle's objects in the simulator's pictures."""

  def __init__(self, path: Path):
    self.runner, self.view = Runner(path), view_of(W, H, medmodel_intrinsics, np.zeros(3))

  def __call__(self, rgb: np.ndarray, true: dict[int, tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray | None]:
    """-> rows as of make_scene(), who each is by overlap with the exact boxes, and (N, E) embeddings."""
    frame, valid = frame_of(rgb, self.view)
    for plan, (_, runner) in zip(self.runner.plans, self.runner.graphs, strict=True):
      if specs := plan.heads.get("objects"):
        out = runner.run({**plan.inputs, "frame": frame[None]})
        d = HEADS["objects"].decode(
          {part: out[x["name"]].copy() for part, x in specs.items()}, specs, valid, DEFAULT_HEIGHT
        )
        names = [c.name if (c := STREETS.find(n)) is not None else "" for n in d.classes]
        cls = np.array([{"vehicle": VEHICLE, "person": PEDESTRIAN}.get(n, 0) for n in names], int)[d.class_ids]
        who, over = (
          np.full(len(d.boxes), -1.0),
          box_iou(d.boxes, np.array([b for _, b in true.values()]).reshape(-1, 4)),
        )
        rows, columns = linear_sum_assignment(-over)
        good = over[rows, columns] > 0.4
        who[rows[good]] = np.array([*true, 0])[columns[good]]
        return np.column_stack([d.boxes, d.scores, cls, who]).astype(np.float64), d.embed
    raise UserError(f"{self.runner.bundle.path} has no head of objects")


def device(scene: Scene, tracker: type[tracking.Tracker], looks: bool = False, moves: bool = True) -> list[np.ndarray]:
  """-> the identity that fairmodeld's tracker tells of every box, -1 none. looks: the student's, else colors."""
  t, ground, out = tracker([*CLASSES], (H, W)), view_ground("medmodel", scene.height), []
  for n, (boxes, scores, classes) in enumerate(zip(scene.boxes, scene.scores, scene.classes, strict=True)):
    order = (-scores).argsort(kind="stable")
    seen = np.clip(boxes[order], -0.5, [W - 0.5, H - 0.5] * 2).astype(np.float32)
    own = scene.embed[n] if scene.embed[n] is not None else scene.looks[n].astype(np.float32)
    d = Detections(
      [*CLASSES], seen, scores[order].astype(np.float32), classes[order], None, own[order] if looks else None
    )
    motion = (None, scene.speeds[n], float(scene.turns[n][2]) * FPS) if moves else ()
    said = t.update(n, d, ground, *motion)
    ids = np.full(len(boxes), -1, np.int64)
    over = box_iou(seen, said.boxes)
    if over.size:  # what is seen is told by the very box
      best = over.argmax(1)
      same = over[np.arange(len(seen)), best] > 0.999
      ids[order[same]] = said.ids[best[same]]
    out.append(ids)
  return out


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
    """Of one scene: who was out of sight for 0.5 to 1.25 times `hidden` frames, and who of them has kept their
    identity. Things count whether they were followed or not."""
    true, said = np.concatenate(scene.truth), np.concatenate(ids)
    names, tracks = np.unique(true[true >= 0]), np.unique(said[said >= 0])
    for i in names.tolist():
      at = [
        (n, int(s[k])) for n, (w, s) in enumerate(zip(scene.truth, ids, strict=True)) for k in np.flatnonzero(w == i)
      ]
      told = [a for a in at if a[1] >= 0]
      self.switches += sum(a[1] != b[1] for a, b in itertools.pairwise(told))
      for k, (a, b) in enumerate(itertools.pairwise(at)):
        # hidden, not just overlooked: seen for half a second before, and no pixel to be seen at some moment between
        unseen = [n for n in range(a[0], b[0]) if i not in scene.pixels[n]]
        if k >= 9 and unseen and 0.5 * hidden <= b[0] - a[0] - 1 <= 1.25 * hidden and i != LORRY:
          before = [s for n, s in told if a[0] - BACK_WITHIN <= n <= a[0]]
          after = [s for n, s in told if b[0] <= n < b[0] + BACK_WITHIN]
          self.hidden += 1
          self.kept += bool(before and after) and before[-1] == after[0]
    both = np.array([[((true == i) & (said == t)).sum() for t in tracks] for i in names]).reshape(
      len(names), len(tracks)
    )
    agreed = both[linear_sum_assignment(-both)].sum()
    self.boxes += int((true >= 0).sum())
    self.idf1.append(2 * agreed / ((true >= 0).sum() + (said >= 0).sum()))


def tracker_of(path: Path) -> type[tracking.Tracker]:
  """Another version's, of its tracking.py."""
  spec = importlib.util.spec_from_file_location("before", path)
  if spec is None or spec.loader is None or not path.exists():
    raise UserError(f"there is no {path}")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.Tracker


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13], help="worlds of the simulator")
  parser.add_argument("--events", type=int, help="go on after the last seed until so many things were hidden")
  parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN, help="frames; 0: no lorry")
  parser.add_argument("--time", default="day", choices=("day", "dusk", "night"))
  parser.add_argument("--only", default="", help="of the trackers, those whose name begins so")
  parser.add_argument("--before", type=Path, metavar="OLD.py", help="another version of fairmodeld's tracker beside it")
  parser.add_argument("--bundle", type=Path, help="its student sees, in place of the stand-in")
  args = parser.parse_args()
  ways: dict[str, Callable[[Scene], list[np.ndarray]]] = {
    "motion": lambda s: follow(s, False, False),
    "+ looks": lambda s: follow(s, False, True),
    "+ looks, turn": lambda s: follow(s, False, True, True),
    "+ looks, flow": lambda s: follow(s, True, True),
    "device": lambda s: device(s, tracking.Tracker),
    "device, still": lambda s: device(s, tracking.Tracker, moves=False),
    "device + looks": lambda s: device(s, tracking.Tracker, True),
    "no memory": without_memory,
  }
  if args.before:
    old = tracker_of(args.before)
    ways |= {
      "device before": lambda s: device(s, old, moves=False),
      "device before + looks": lambda s: device(s, old, True, moves=False),
    }
  ways = {k: w for k, w in ways.items() if k.startswith(args.only)}
  if not ways:
    raise UserError(f"--only {args.only}: no tracker is called so")
  student = Student(args.bundle) if args.bundle else None
  print(f"{'hidden for':>10}  {'':21} {'kept':>12} {'switches':>9} {'boxes':>6} {'IDF1':>6} {'ms/frame':>9}")
  for hidden in args.hidden:
    figures, spent, frames, seeds = {k: Figures() for k in ways}, dict.fromkeys(ways, 0.0), 0, list(args.seeds)
    for seed in seeds:
      scene = make_scene(seed, hidden, args.time, student=student)
      frames += len(scene.boxes)
      for name, way in ways.items():
        start = time.process_time()
        ids = way(scene)
        spent[name] += time.process_time() - start
        figures[name].add(scene, ids, hidden)
      if seed == seeds[-1] and args.events and next(iter(figures.values())).hidden < args.events:
        seeds.append(seed + 1)
    for name, f in figures.items():
      share = f"{f.kept}/{f.hidden} {100 * f.kept / max(1, f.hidden):3.0f}%"
      print(
        f"{hidden:>10}  {name:21} {share:>12} {f.switches:>9} {f.boxes:>6} {np.mean(f.idf1):6.3f} "
        f"{1e3 * spent[name] / frames:9.2f}",
        flush=True,
      )
    print(f"{hidden:>10}  seeds {seeds[0]} to {seeds[-1]}, {frames} frames")


if __name__ == "__main__":
  raise SystemExit(cli(main)())

"""The simulator's exact truth as a teacher: reads `<segment>/truth` beside the log of a simulated route. Nothing runs,
and nothing is guessed."""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.common.transformations.camera import project
from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.teacher import Clip, Entry, Label, Labels, State
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.route import Segment
from openpilot.tools.sim.points import Pose, from_still, ground_depth, inside, lift, to_still
from openpilot.tools.sim.render import CLASSES
from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W
from openpilot.tools.sim.truth import MAP_H, MAP_W, Truth, TruthFrame, map_labels

OBJECTS = ("vehicle", "pedestrian")
POINTS = ("road", "lane")
LIFE = (20, 40)  # frames that a point is followed, at least and at most, unless it leaves the view
LEAST = 6  # frames that a new point will stay in the view: nearer than that, most would be gone in two or three
SPACING = 24  # pixels between new points, about
# pixels that a new point keeps from those of its class that are followed already, and one of the road from all
CLEARANCE = 18
FAR = 80.0  # meters; farther, one pixel is many meters of road
MOST = 128  # points at a time


@lru_cache(4)
def open_truth(folder: Path) -> Truth:
  truth = Truth(folder)
  if "pose" not in truth.info:
    raise UserError(
      f"the truth in {truth.dir} is of an earlier version, without poses; write the route again with `tools/op.sh sim`"
    )
  if tuple(truth.classes) != CLASSES:
    raise UserError(
      f"the truth in {truth.dir} has the classes {', '.join(truth.classes)}, this program knows {', '.join(CLASSES)}; "
      "write the route again"
    )
  return truth


@lru_cache(64)
def hash_truth(folder: Path) -> str:
  """sha256 of all of a segment's truth."""
  h = hashlib.sha256()
  for p in sorted(open_truth(folder).dir.iterdir()):
    h.update(p.name.encode())
    h.update(p.read_bytes())
  return h.hexdigest()


class Points:
  """Points of road and lane lines that are being followed, as arrays of one entry each."""

  def __init__(self, state: State | None):
    s = state or {}
    self.track = s.get("track", np.zeros(0, np.int64))
    self.at = s.get("at", np.zeros((0, 3)))  # where they are, in the frame that stands still, meters
    self.cls = s.get("cls", np.zeros(0, np.int64))
    self.until = s.get("until", np.zeros(0, np.int64))  # first frame id at which they are followed no more
    self.next = int(s.get("next", 0))

  def state(self) -> State:
    return {"track": self.track, "at": self.at, "cls": self.cls, "until": self.until, "next": np.array(self.next)}

  def step(self, truth: Truth, index: int, frame_id: int, frame: TruthFrame) -> dict[str, np.ndarray]:
    """-> the frame's rows. Those that left the view or had their time are dropped, and new ones begin where there is
    room."""
    pose, later, height = (
      truth.info["pose"][index],
      truth.info["pose"][min(index + LEAST, truth.frame_count - 1)],
      truth.info["camera_height"],
    )
    px, z = project(from_still(self.at, pose), medmodel_intrinsics)
    keep = inside(px) & (z > 0.5) & (frame_id < self.until)
    self.track, self.at, self.cls, self.until, px = (
      self.track[keep],
      self.at[keep],
      self.cls[keep],
      self.until[keep],
      px[keep],
    )
    r = np.random.default_rng([truth.info["seed"], frame_id])
    new, cls = self._candidates(frame, height, px, r, (pose, later))
    if len(new):
      self.track = np.concatenate([self.track, self.next + np.arange(len(new))])
      self.at = np.concatenate([self.at, to_still(lift(new, ground_depth(new, height)), pose)])
      self.cls = np.concatenate([self.cls, cls])
      self.until = np.concatenate([self.until, frame_id + r.integers(LIFE[0], LIFE[1] + 1, len(new))])
      self.next += len(new)
      px = np.concatenate([px, new])
    return {
      "track": self.track.astype(np.int32),
      "x": px[:, 0].astype(np.float32),
      "y": px[:, 1].astype(np.float32),
      "visible": on_ground(frame, np.round(px).astype(int), height),
      "cls": self.cls.astype(np.int16),
    }

  def _candidates(
    self, frame: TruthFrame, height: float, px: np.ndarray, r: np.random.Generator, poses: tuple[Pose, Pose]
  ) -> tuple[np.ndarray, np.ndarray]:
    """-> (N, 2) float64 whole pixels that become new points, (N,) their classes."""
    ys, xs = np.nonzero(frame.semantic == CLASSES.index("lane"))
    order = r.permutation(len(ys))
    ys, xs = ys[order], xs[order]
    _, first = np.unique(ys // SPACING * VIEW_W + xs // SPACING, return_index=True)  # one of each cell's
    lane = np.stack([xs[first], ys[first]], 1)
    v, u = np.mgrid[0:VIEW_H:SPACING, 0:VIEW_W:SPACING]
    road = np.stack([u.ravel(), v.ravel()], 1) + r.integers(0, SPACING, (u.size, 2))
    road = road[inside(road)]
    road = r.permutation(road[frame.semantic[road[:, 1], road[:, 0]] == CLASSES.index("road")])
    lanes = clear_of(lane[self._free(lane, frame, height, poses)], px[self.cls == POINTS.index("lane")])[
      : MOST - len(px)
    ]
    roads = clear_of(road[self._free(road, frame, height, poses)], np.concatenate([px, lanes]))[
      : MOST - len(px) - len(lanes)
    ]
    return np.concatenate([lanes, roads]), np.repeat(
      [POINTS.index("lane"), POINTS.index("road")], [len(lanes), len(roads)]
    )

  @staticmethod
  def _free(ij: np.ndarray, frame: TruthFrame, height: float, poses: tuple[Pose, Pose]) -> np.ndarray:
    depth = ground_depth(ij, height)
    near = depth < FAR
    px, z = project(from_still(to_still(lift(ij, np.where(near, depth, 0)), poses[0]), poses[1]), medmodel_intrinsics)
    return near & on_ground(frame, ij, height) & inside(px) & (z > 0.5)


def clear_of(found: np.ndarray, others: np.ndarray) -> np.ndarray:
  """(N, 2) -> those, as float64, that keep CLEARANCE from (M, 2) others and from each other."""
  found = found[(np.linalg.norm(found[:, None] - others[None], axis=2) >= CLEARANCE).all(axis=1)].astype(np.float64)
  kept: list[np.ndarray] = []
  for p in found:
    if all(np.hypot(*(p - q)) >= CLEARANCE for q in kept):
      kept.append(p)
  return np.array(kept).reshape(-1, 2)


def on_ground(frame: TruthFrame, ij: np.ndarray, height: float) -> np.ndarray:
  """(N, 2) whole pixels -> (N,) bool: nothing stands before the ground there."""
  v, u = ij[:, 1], ij[:, 0]
  near = np.abs(frame.depth[v, u] / ground_depth(ij, height) - 1) < 0.01  # depth is stored to 0.05%
  return near & (frame.instance[v, u] == 0)  # a wheel stands on the ground


def object_rows(frame: TruthFrame, objects: list[dict[str, Any]]) -> dict[str, Any]:
  """What is seen of traffic in one frame. Boxes are the outer edges of the visible pixels."""
  seen = [o for o in objects if o["box_view"] is not None]
  boxes = np.array([o["box_view"] for o in seen], np.float32).reshape(-1, 4) + np.array(
    [-0.5, -0.5, 0.5, 0.5], np.float32
  )
  road = np.array([o["position"] for o in seen], np.float32).reshape(-1, 3)
  return {
    **{c: boxes[:, i] for i, c in enumerate(("x0", "y0", "x1", "y1"))},
    "score": np.ones(len(seen), np.float32),
    "cls": np.array([OBJECTS.index(o["cls"]) for o in seen], np.int16),
    "track": np.array([o["id"] for o in seen], np.int32),
    "rle": rle.encode(frame.instance[None] == np.array([o["id"] for o in seen], np.uint16)[:, None, None]),
    "visible_fraction": np.array([o["visible_fraction"] for o in seen], np.float32),
    "occluded": np.array([o["occluded"] for o in seen], bool),
    **{c: road[:, i] for i, c in enumerate(("road_x", "road_y", "road_z"))},
  }


def joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """Tables of single frames -> one with the column 'frame'."""
  out: dict[str, Any] = {"frame": np.repeat(np.arange(len(rows), dtype=np.int32), [len(r["track"]) for r in rows])}
  for c in rows[0]:
    out[c] = [x for r in rows for x in r[c]] if isinstance(rows[0][c], list) else np.concatenate([r[c] for r in rows])
  return out


class SimulatorTeacher:
  """Of the medmodel view. depth: meters along the optical axis at the center of each map pixel, inf in the sky;
  segmentation: ids into its classes."""

  stateful, wants = True, "none"

  def __init__(self, name: str, entry: Entry, path: Path | None, device: str | None = None):
    self.name, self.license, self.model_id, self.checkpoint_hash = name, entry.license, "the simulator's truth", ""
    self.labels = [
      Label("depth", "dense", "float16", (MAP_H, MAP_W), "m"),
      Label("segmentation", "dense", "uint8", (MAP_H, MAP_W), "class", CLASSES),
      Label("objects", "boxes", shape=(VIEW_H, VIEW_W), unit="px, m", classes=OBJECTS),
      Label("points", "points", unit="px", classes=POINTS),
    ]

  def prepare(self, height: int, width: int) -> None: ...

  def settings(self) -> dict[str, Any]:
    return {
      "view": "medmodel",
      "life": LIFE,
      "least": LEAST,
      "spacing": SPACING,
      "clearance": CLEARANCE,
      "far": FAR,
      "most": MOST,
    }

  def source(self, segment: Segment) -> dict[str, Any]:
    """What a segment's labels are made of, for its key: other truth, other labels. Raises UserError where there is
    none."""
    info = open_truth(segment.dir).info
    return {"truth": hash_truth(segment.dir), **{k: info[k] for k in ("seed", "time_of_day", "weather")}}

  def check(self, segment: Segment) -> None:
    """Raises UserError where there is no truth to read: of a real route, or one written without it."""
    if segment.log_path is None:
      raise UserError(
        f"teacher '{self.name}' reads the truth beside a log, and segment {segment.name} in {segment.dir} has none; "
        "leave this teacher out"
      )
    self.source(segment)

  def label(self, clip: Clip, state: State | None = None) -> tuple[Labels, State | None]:
    """Joined to the truth by frame id. The state is the points that are followed."""
    if clip.log_path is None:
      raise UserError(
        f"teacher '{self.name}' reads the truth beside a simulated route's log, and a segment has none; leave this "
        "teacher out"
      )
    truth, points = open_truth(clip.log_path.parent), Points(state)
    depth, segmentation = (
      np.zeros((len(clip.frame_ids), MAP_H, MAP_W), np.float16),
      np.zeros((len(clip.frame_ids), MAP_H, MAP_W), np.uint8),
    )
    objects, tracks = [], []
    for t, frame_id in enumerate(clip.frame_ids):
      index = frame_id - truth.info["frame_id_offset"]
      if not 0 <= index < truth.frame_count:
        raise UserError(
          f"frame {frame_id} of the log is none of the {truth.frame_count} in {truth.dir}; log and truth differ, write "
          "the route again"
        )
      frame = truth.frame(index)
      depth[t], segmentation[t] = map_labels(frame.depth, frame.semantic)
      objects.append(object_rows(frame, truth.objects(index)))
      tracks.append(points.step(truth, index, frame_id, frame))
    return {
      "depth": depth,
      "segmentation": segmentation,
      "objects": joined(objects),
      "points": joined(tracks),
    }, points.state()

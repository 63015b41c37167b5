"""Points on the road followed from frame to frame by chained RAFT flow, visible as long as the flow back agrees with
the flow forth.

Every frame is encoded alone and every pair of frames goes through the same shapes, so results do not depend on how a
video is cut into clips."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from openpilot.tools.fair.cotracker.lane_points import LaneLog, inside, mask_points, project_lines, road_grid
from openpilot.tools.fair.cotracker.raft import MIN_SIDE, Encoded, load_raft
from openpilot.tools.learn.device import choose_device
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import (
  Clip,
  Entry,
  Label,
  Labels,
  State,
  Teacher,
  check_least,
  find_weights,
  hash_weights,
  helper_settings,
  joint_hash,
  joint_license,
  load_helper,
)
from openpilot.tools.lib.errors import UserError

WEIGHTS = "raft-small.pth"
CLASSES = ("road", "lane")
ROAD, LANE = range(2)
POINTS = ("lanes", "grid", "lanes+grid", "segmentation", "segmentation+grid")
MARKING = 0.5  # probability from which a pixel is a marking
Seeds = Callable[[Clip, int], tuple[np.ndarray, np.ndarray]]  # clip, frame in it -> points (N, 2), cls (N,)


def sample(field: np.ndarray, points: np.ndarray) -> np.ndarray:
  """field (C, H, W), points (N, 2) -> (N, C) float64, bilinear, the border's value outside."""
  h, w = field.shape[1:]
  x, y = np.clip(points[:, 0], 0, w - 1), np.clip(points[:, 1], 0, h - 1)
  x0, y0 = np.minimum(x.astype(np.int64), w - 2), np.minimum(y.astype(np.int64), h - 2)
  fx, fy = x - x0, y - y0
  f = field.astype(np.float64)
  return (
    (f[:, y0, x0] * (1 - fx) + f[:, y0, x0 + 1] * fx) * (1 - fy)
    + (f[:, y0 + 1, x0] * (1 - fx) + f[:, y0 + 1, x0 + 1] * fx) * fy
  ).T


def check_video(video: Any, points: Any) -> tuple[np.ndarray, np.ndarray]:
  """-> video as (T, 3, H, W) uint8 and points as (N, 2) float64 numpy. The video may be as CoTracker's package takes
  it: (1, T, 3, H, W), floats that are whole numbers of 0 to 255. Raises UserError on other shapes and values."""
  v, p = (x.detach().cpu().numpy() if torch.is_tensor(x) else np.asarray(x) for x in (video, points))
  said = f"{v.dtype} {v.shape}"
  if v.ndim == 5 and len(v) == 1:
    v = v[0]
  if v.dtype.kind == "f" and v.size and v.min() >= 0 and 1 < v.max() <= 255 and (v == v.astype(np.uint8)).all():
    v = v.astype(np.uint8)
  if v.ndim != 4 or v.shape[1] != 3 or v.dtype != np.uint8 or not len(v):
    raise UserError(f"the video is {said}; tracking needs (T, 3, H, W) RGB, uint8 or whole numbers of 0 to 255")
  if p.ndim != 2 or p.shape[1] != 2:
    raise UserError(f"the points are of shape {p.shape}; tracking needs (N, 2), x and y in pixels")
  return v, p.astype(np.float64)


class LaneTracker:
  """RAFT flow, chained. weights: raft-small.pth, looked for as every teacher's where not given. fb_pixels, fb_share: a
  point is lost where going forth and back misses its start by more than fb_pixels + fb_share * the way gone. scale:
  pictures are enlarged by it first; 2 costs five times as much and leaves a tenth of the gross errors
  (tests/bench/bench_tracker.py). More than 8 iters gain nothing there.

  float32 unless told otherwise: a million parameters cost little, and bfloat16 adds 0.05 px to every step of the chain.
  """

  def __init__(
    self,
    weights: str | Path | None = None,
    device: str | None = None,
    precision: str | None = None,
    iters: int = 8,
    scale: int = 1,
    fb_pixels: float = 1.0,
    fb_share: float = 0.02,
  ):
    self.path = find_weights(WEIGHTS, weights)
    chosen = choose_device(device, precision or "float32")
    self.device, self.precision = chosen.device, chosen.precision
    self.iters, self.scale, self.fb_pixels, self.fb_share = iters, scale, fb_pixels, fb_share
    self.model = load_raft(self.path, chosen.device, chosen.dtype)

  @torch.inference_mode()
  def encode(self, frame: np.ndarray) -> Encoded:
    """(3, H, W) uint8 -> what `step` needs of it."""
    image = torch.from_numpy(np.ascontiguousarray(frame))[None].to(self.device)
    if self.scale != 1:
      image = F.interpolate(image.float(), scale_factor=self.scale, mode="bilinear", align_corners=False)
    return self.model.encode(image)

  @torch.inference_mode()
  def step(self, a: Encoded, b: Encoded, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """points (N, 2) in a -> where they are in b, (N, 2) float64, and (N,) bool whether they are seen there."""
    if not len(points):
      return np.zeros((0, 2)), np.zeros(0, bool)
    forth, back = (f.cpu().numpy() for f in self.model.flow_both(a, b, self.iters))
    k = self.scale
    moved = sample(forth, (points + 0.5) * k - 0.5) / k
    there = points + moved
    missed = np.linalg.norm(moved + sample(back, (there + 0.5) * k - 0.5) / k, axis=1)
    way = np.linalg.norm(moved, axis=1)
    return there, inside(there, b.size[0] // k, b.size[1] // k) & (missed <= self.fb_pixels + self.fb_share * way)

  def track_lane_points(self, video: Any, lane_points: Any) -> tuple[Any, Any]:
    """video (T, 3, H, W) uint8 RGB and lane_points (N, 2) in its first frame, x and y in pixels -> tracks (T, N, 2)
    float32 and visible (T, N) bool; tensors for a tensor, else arrays. A point that is lost stays invisible, at the
    last place where it was seen. Raises UserError on other shapes."""
    frames, points = check_video(video, lane_points)
    tracks, visible = np.zeros((len(frames), len(points), 2)), np.zeros((len(frames), len(points)), bool)
    tracks[0], visible[0] = points, inside(points, *frames.shape[2:])
    last = self.encode(frames[0])
    for t in range(1, len(frames)):
      tracks[t] = tracks[t - 1]
      alive = np.flatnonzero(visible[t - 1])
      if len(alive):
        now = self.encode(frames[t])
        there, seen = self.step(last, now, tracks[t, alive])
        tracks[t, alive[seen]], visible[t, alive[seen]] = there[seen], True
        last = now
    out = tracks.astype(np.float32), visible
    return tuple(torch.from_numpy(x) for x in out) if torch.is_tensor(video) else out  # type: ignore[return-value]


@dataclass
class Points:
  """The points that are being followed."""

  xy: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
  track: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
  age: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # frames
  cls: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
  next_track: int = 0

  @classmethod
  def of_state(cls, state: State | None) -> "Points":
    return (
      cls() if state is None else cls(state["xy"], state["track"], state["age"], state["cls"], int(state["next_track"]))
    )

  def state(self, **more: np.ndarray) -> State:
    return {
      "xy": self.xy,
      "track": self.track,
      "age": self.age,
      "cls": self.cls,
      "next_track": np.array(self.next_track),
      **more,
    }

  def keep(self, which: np.ndarray) -> None:
    self.xy, self.track, self.age, self.cls = (a[which] for a in (self.xy, self.track, self.age, self.cls))

  def seed(self, points: np.ndarray, classes: np.ndarray, spacing: float, limit: int) -> int:
    """Adds those points, in order, that are `spacing` pixels from all others of their class, up to `limit` in all ->
    how many."""
    taken, taken_cls = list(self.xy), list(self.cls)
    for p, c in zip(points, classes, strict=True):
      if len(taken) >= limit:
        break
      near = np.array([q for q, k in zip(taken, taken_cls, strict=True) if k == c]).reshape(-1, 2)
      if not len(near) or ((near - p) ** 2).sum(1).min() >= spacing**2:
        taken.append(p)
        taken_cls.append(c)
    added = len(taken) - len(self.xy)
    self.xy, self.cls = np.array(taken, np.float64).reshape(-1, 2), np.array(taken_cls, np.int64)
    self.track = np.concatenate([self.track, self.next_track + np.arange(added)])
    self.age = np.concatenate([self.age, np.zeros(added, np.int64)])
    self.next_track += added
    return added


class Rows:
  """The table of a clip, row block by row block."""

  def __init__(self) -> None:
    self.blocks: list[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

  def add(self, frame: int, xy: np.ndarray, track: np.ndarray, visible: np.ndarray, cls: np.ndarray) -> None:
    self.blocks.append((frame, xy, track, visible, cls))

  def table(self) -> dict[str, np.ndarray]:
    def column(i: int, dtype: Any) -> np.ndarray:
      return np.concatenate([np.zeros(0, dtype), *[np.asarray(b[i], dtype) for b in self.blocks]])

    xy = np.concatenate([np.zeros((0, 2), np.float32), *[b[1].astype(np.float32) for b in self.blocks]])
    frame = np.repeat(np.array([b[0] for b in self.blocks], np.int64), [len(b[2]) for b in self.blocks])
    return {
      "frame": frame,
      "track": column(2, np.int64),
      "x": xy[:, 0].copy(),
      "y": xy[:, 1].copy(),
      "visible": column(3, bool),
      "cls": column(4, np.int64),
    }


class PointTeacher:
  """What all teachers of tracks share: where new points start.

  points: 'lanes' (lane lines of the clip's log), 'segmentation' (the markings that `segmenter` sees, a teacher of maps
  by its registry name, of which 'lanes' is taken, or the only one), 'grid' (on the road), or one of the first two with
  '+grid'; seeds: a callable of one's own in their place. New points start `spacing` pixels from those of the same class
  that are still there, up to `limit` in all; a track ends at `max_age` frames, before its drift misleads.
  segmenter_weights: where they are, if not where all are looked for. load, device: of the segmenter."""

  stateful = True
  sees = "picture"
  whole = False
  letterboxed = True
  as_fine = 1.0
  ASKS_OTHERS = True

  def __init__(
    self,
    name: str,
    entry: Entry,
    path: Path | None,
    points: str = "lanes+grid",
    seeds: Seeds | None = None,
    spacing: int = 24,
    limit: int = 256,
    max_age: int = 40,
    segmenter: str = "twinlitenet",
    segmenter_weights: str | None = None,
    device: str | None = None,
    load: Callable[..., Teacher] = load_teacher,
  ):
    if points not in POINTS:
      raise UserError(f"teacher '{name}': points '{points}' are not known; {', '.join(POINTS)}")
    check_least(name, 1, spacing=spacing, limit=limit, max_age=max_age)
    self.name, self.license, self.model_id = name, entry.license, "" if path is None else path.name
    self.checkpoint_hash = "" if path is None else hash_weights(path)
    self.labels = [Label("points", "points", unit="px", classes=CLASSES)]
    self.points, self.seeds, self.spacing, self.limit, self.max_age = points, seeds, spacing, limit, max_age
    self.log: tuple[Path, LaneLog] | None = None
    self.segmenter: Teacher | None = (
      load_helper(load, segmenter, segmenter_weights, device) if "segmentation" in points else None
    )
    self.segmented: tuple[int, int] | None = None  # size of the frames that it is prepared for
    self.map = "lanes"
    if self.segmenter is not None:
      self.license = joint_license(name, entry.license, self.segmenter.license)
      self.checkpoint_hash = joint_hash(self.checkpoint_hash, self.segmenter)
      self.model_id = f"{self.model_id} + {self.segmenter.model_id}"

  def settings(self) -> dict[str, Any]:
    seeds = self.points if self.seeds is None else f"{self.seeds.__module__}.{self.seeds.__qualname__}"
    more = (
      {"segmenter": helper_settings(self.segmenter, self.whole), "map": self.map, "marking": MARKING}
      if self.segmenter is not None
      else {}
    )
    return {"points": seeds, "spacing": self.spacing, "limit": self.limit, "max_age": self.max_age, **more}

  def prepare(self, height: int, width: int) -> None:
    if self.segmenter is not None and self.segmented != (height, width):
      self.segmenter.prepare(height, width)
      self.segmented = height, width
      maps = [x.name for x in self.segmenter.labels if x.kind == "dense" and x.unit == "probability"]
      if "lanes" not in maps and len(maps) != 1:
        raise UserError(
          f"teacher '{self.segmenter.name}' gives no map of lane markings; choose another segmenter for '{self.name}', "
          "as twinlitenet"
        )
      self.map = "lanes" if "lanes" in maps else maps[0]
    if min(height, width) < MIN_SIDE:
      raise UserError(
        f"teacher '{self.name}' cannot follow points in {width}x{height} pictures; take a --view of at least "
        f"{MIN_SIDE}x{MIN_SIDE}"
      )

  def marked(self, rgb: np.ndarray) -> np.ndarray:
    """(3, H, W) uint8 -> (N, 2) points on the markings that the segmenter sees. Of one frame at a time: so they do not
    depend on how a video is cut."""
    assert self.segmenter is not None
    height, width = rgb.shape[1:]
    self.prepare(height, width)
    seen = np.asarray(self.segmenter.label(Clip(rgb[None]))[0][self.map][0], np.float32)
    return mask_points(
      cv2.resize(seen, (width, height), interpolation=cv2.INTER_LINEAR) >= MARKING,
      max(1, self.spacing // 2),
      width // 8,
    )

  def start_points(self, clip: Clip, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of frame i: points (N, 2) and cls (N,)."""
    if self.seeds is not None:
      return self.seeds(clip, i)
    height, width = clip.rgb.shape[2:]
    lanes = grid = np.zeros((0, 2))
    rpy = clip.rpy if self.whole else None  # the view is turned already
    if "lanes" in self.points and clip.log_path is not None and clip.intrinsics is not None and clip.frame_ids:
      if self.log is None or self.log[0] != clip.log_path:
        self.log = (clip.log_path, LaneLog(clip.log_path))
      lanes = project_lines(self.log[1].at(clip.frame_ids[i]), clip.intrinsics, height, width, self.spacing, rpy)
    if self.segmenter is not None:
      lanes = self.marked(clip.rgb[i])
    if "grid" in self.points:
      grid = road_grid(height, width, clip.intrinsics, self.spacing, rpy=rpy)
    return np.concatenate([lanes, grid]), np.repeat([LANE, ROAD], [len(lanes), len(grid)])

  def seed(self, points: Points, clip: Clip, i: int) -> int:
    candidates, classes = self.start_points(clip, i)
    ok = inside(candidates, *clip.rgb.shape[2:])
    return points.seed(candidates[ok], classes[ok], self.spacing * 0.7, self.limit)


class RaftTeacher(PointTeacher):
  """A track's last row is the one in which it is no longer seen. device, precision, iters, scale, fb_pixels, fb_share:
  of LaneTracker; the rest: of PointTeacher."""

  def __init__(
    self,
    name: str,
    entry: Entry,
    path: Path | None,
    device: str | None = None,
    precision: str | None = None,
    iters: int = 8,
    scale: int = 1,
    fb_pixels: float = 1.0,
    fb_share: float = 0.02,
    **options: Any,
  ):
    super().__init__(name, entry, path, device=device, **options)
    check_least(name, 1, iters=iters, scale=scale)
    check_least(name, 0, fb_pixels=fb_pixels, fb_share=fb_share)
    self.tracker = LaneTracker(path, device, precision, iters, scale, fb_pixels, fb_share)

  def settings(self) -> dict[str, Any]:
    own = {k: getattr(self.tracker, k) for k in ("iters", "scale", "fb_pixels", "fb_share", "precision")}
    return {**super().settings(), **own}

  def label(self, clip: Clip, state: State | None = None) -> tuple[Labels, State | None]:
    """clip.rgb (T, 3, H, W) -> {'points': table}, and the state behind the clip."""
    if not len(clip.rgb):
      return {"points": Rows().table()}, state
    points, rows = Points.of_state(state), Rows()
    last = None if state is None else self.tracker.encode(state["frame"])
    for i, frame in enumerate(clip.rgb):
      now = self.tracker.encode(frame)
      if last is not None:
        there, seen = self.tracker.step(last, now, points.xy)
        rows.add(i, there, points.track, seen, points.cls)
        points.xy, points.age = there, points.age + 1
        points.keep(seen & (points.age + 1 < self.max_age))
      added = self.seed(points, clip, i)
      if added:
        rows.add(i, points.xy[-added:], points.track[-added:], np.ones(added, bool), points.cls[-added:])
      last = now
    return {"points": rows.table()}, points.state(frame=np.ascontiguousarray(clip.rgb[-1]))

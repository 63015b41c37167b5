"""The teachers that route-depth asks, and what they say of a frame: what is road, what may move, what is sky."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from openpilot.tools.fair.route_depth.fuse import Grid
from openpilot.tools.fair.spec import road_classes
from openpilot.tools.fair.teacher import Clip, Label, Labels, Teacher, helper_settings, joint_license
from openpilot.tools.lib.errors import UserError

ROAD = 0.9  # probability
GROW = 0.1  # of a box's sides, about it: flow is smeared over a border
SKY = "sky"


@dataclass
class Asked:
  """Of the T frames of a clip. boxes: T arrays (N, 4) of what may move, pixels; vehicle: T arrays (N,) bool of them.
  on: (T, h, w) bool road; movable, clear: (T, h, w) bool what may move, and sky, by class; or None. Maps cover the
  picture."""

  boxes: list[np.ndarray]
  vehicle: list[np.ndarray]
  on: np.ndarray | None
  movable: np.ndarray | None
  clear: np.ndarray | None

  def still(self, grid: Grid, i: int) -> np.ndarray:
    """(h, w) bool of the grid: nothing that may move is there."""
    out = np.ones(grid.shape, bool)
    x, y = grid.px[..., 0], grid.px[..., 1]
    for x0, y0, x1, y1 in self.boxes[i]:
      dx, dy = GROW * (x1 - x0), GROW * (y1 - y0)
      out &= ~((x >= x0 - dx) & (x <= x1 + dx) & (y >= y0 - dy) & (y <= y1 + dy))
    return out if self.movable is None else out & ~fitted(self.movable[i], grid.shape, grow=True)

  def road(self, grid: Grid, i: int) -> np.ndarray:
    """(h, w) bool of the grid; nothing where nobody was asked."""
    return np.zeros(grid.shape, bool) if self.on is None else fitted(self.on[i], grid.shape) & self.still(grid, i)

  def sky(self, grid: Grid, i: int) -> np.ndarray:
    return np.zeros(grid.shape, bool) if self.clear is None else fitted(self.clear[i], grid.shape)

  def vehicles(self, i: int) -> np.ndarray:
    return self.boxes[i][self.vehicle[i]]


def fitted(m: np.ndarray, shape: tuple[int, ...], grow: bool = False) -> np.ndarray:
  """(h, w) bool over the picture -> `shape`, of the nearest; grow: by a cell each way."""
  out = cv2.resize(m.astype(np.uint8), shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
  return (cv2.dilate(out, np.ones((3, 3), np.uint8)) if grow else out) > 0


class Helpers:
  """load(name) -> a teacher. Raises UserError where one of them does not say what it is asked for."""

  def __init__(self, name: str, load: Callable[..., Teacher], detector: str, roads: str, scenes: str):
    self.name = name
    self.by_part = {
      k: load(n) for k, n in (("detector", detector), ("roads", roads), ("scenes", scenes)) if n != "none"
    }

  @property
  def all(self) -> list[Teacher]:
    return list(self.by_part.values())

  def hash(self, own: str) -> str:
    return hashlib.sha256(" ".join([own, *(t.checkpoint_hash for t in self.all)]).encode()).hexdigest()

  def license(self, own: str) -> str:
    for t in self.all:
      own = joint_license(self.name, own, t.license)
    return own

  def settings(self) -> dict[str, Any]:
    """Without the sizes of their pictures, which are each segment's own."""
    return {k: helper_settings(t, whole=True) for k, t in self.by_part.items()}

  def prepare(self, height: int, width: int, whole: bool) -> None:
    kinds = {"detector": "boxes", "roads": "probability", "scenes": "class"}
    for part, t in self.by_part.items():
      if hasattr(t, "sees"):
        setattr(t, "whole", whole)  # noqa: B010
      t.prepare(height, width)
      if not any(kinds[part] in (x.kind, x.unit) for x in t.labels):
        raise UserError(f"teacher '{self.name}': '{t.name}' gives no {kinds[part]}, and is asked for {part}")

  def ask(self, clip: Clip) -> Asked:
    """Frame by frame, so that what is said does not depend on how a video is cut."""
    said: dict[str, list[Labels]] = {
      k: [t.label(Clip(clip.rgb[i : i + 1]))[0] for i in range(len(clip.rgb))] for k, t in self.by_part.items()
    }
    out = Asked([np.zeros((0, 4))] * len(clip.rgb), [np.zeros(0, bool)] * len(clip.rgb), None, None, None)
    if "detector" in said:
      label = self._label("detector", "boxes")
      kinds = np.array([role_of(n) == "movable" for n in label.classes])
      cars = np.array([name_of(n) == "vehicle" for n in label.classes])
      for i, x in enumerate(said["detector"]):
        table = x[label.name]
        cls = np.asarray(table["cls"], int)
        mine = kinds[cls]
        out.boxes[i] = np.stack([np.asarray(table[k], float) for k in ("x0", "y0", "x1", "y1")], axis=1)[mine]
        out.vehicle[i] = cars[cls][mine]
    if "roads" in said:
      names = [x.name for x in self.by_part["roads"].labels if role_of(x.name) in ("ground", "marking")]
      sums = [sum(np.asarray(x[n][0], np.float32) for n in names) for x in said["roads"]]
      out.on = np.stack(sums) >= ROAD
    if "scenes" in said:
      label = self._label("scenes", "class")
      ids = np.stack([np.asarray(x[label.name][0]) for x in said["scenes"]])
      out.movable = np.isin(ids, [k for k, n in enumerate(label.classes) if role_of(n) == "movable"])
      out.clear = np.isin(ids, [k for k, n in enumerate(label.classes) if n == SKY])
    return out

  def _label(self, part: str, kind: str) -> Label:
    return next(x for x in self.by_part[part].labels if kind in (x.kind, x.unit))


def name_of(name: str) -> str:
  found = road_classes().find(name)
  return "" if found is None else found.name


def role_of(name: str) -> str:
  found = road_classes().find(name)
  return "" if found is None or found.role is None else found.role

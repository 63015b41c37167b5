"""Where tracks start: lane lines that openpilot's model saw, projected into the view; a lane segmentation; a grid on
the road.

Points are (x, y) in pixels of the view, integers at pixel centers. Lines are in the calibrated frame: x forward, y
right, z down, meters, origin at the camera. The model view is warped by the calibration already, so the camera's rpy
plays no part in it."""

from bisect import bisect_left
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.common.transformations.camera import project, view_frame_from_device_frame
from openpilot.common.transformations.orientation import rot_from_euler
from openpilot.selfdrive.modeld.fair.calibration import mounting
from openpilot.tools.fair.openpilot.lines import CAMERA_HEIGHT, Line, driving_lines, model_lines
from openpilot.tools.lib.logreader import LogReader

NEAR, FAR = 2.0, 80.0  # meters; beyond, lines that the model draws are guesses
PATH_T = np.linspace(0.0, 6.0, 61)  # seconds along drivingModelData's path
MAX_GAP = 10  # frames between a picture and the nearest model message that still stands for it: qlogs hold every tenth


def inside(points: np.ndarray, height: int, width: int) -> np.ndarray:
  """(N, 2) -> (N,) bool, between the centers of the outermost pixels; nan is outside."""
  x, y = points[:, 0], points[:, 1]
  return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


def likely(lines: list[Line], min_prob: float = 0.5) -> list[np.ndarray]:
  """The lane lines among them that are there, (N, 3) each."""
  return [line.road for line in lines if line.name.startswith("lane") and line.score >= min_prob]


class LaneLog:
  """The lane lines of one log by frame: from modelV2 where it is logged (rlogs), else from drivingModelData. Raises
  UserError where the log cannot be read."""

  def __init__(self, path: str | Path, min_prob: float = 0.5):
    full: dict[int, list[np.ndarray]] = {}
    small: dict[int, Any] = {}
    height = CAMERA_HEIGHT
    reader = LogReader([path], services=["modelV2", "drivingModelData", "extrinsicsCalibration"])
    for event in reader:
      with reader.guard(event):
        which = event.which()
        if which == "modelV2":
          full[event.modelV2.frameId] = likely(model_lines(event.modelV2), min_prob)
        elif which == "drivingModelData":
          driving_lines(event.drivingModelData, height, PATH_T)  # a damaged one is left out here
          small[event.drivingModelData.frameId] = event.drivingModelData
        else:
          height = mounting(event.extrinsicsCalibration)[1] or height
    self.lines = full or {k: likely(driving_lines(d, height, PATH_T), min_prob) for k, d in small.items()}
    self.ids = sorted(self.lines)

  def at(self, frame_id: int) -> list[np.ndarray]:
    """Lines of the nearest message, at most MAX_GAP frames away; [] where there is none."""
    i = bisect_left(self.ids, frame_id)
    near = min(self.ids[max(0, i - 1) : i + 1], key=lambda k: abs(k - frame_id), default=None)
    return [] if near is None or abs(near - frame_id) > MAX_GAP else self.lines[near]


def project_lines(
  lines: list[np.ndarray],
  intrinsics: np.ndarray,
  height: int,
  width: int,
  spacing: float = 16.0,
  rpy: np.ndarray | None = None,
) -> np.ndarray:
  """Lines (n, 3) -> (N, 2) float64 points on them inside the view, `spacing` pixels apart, from the nearest on.

  intrinsics: (3, 3) of the view. rpy: radians, only for a raw camera picture that calibration has not warped."""
  rot = None if rpy is None else rot_from_euler(rpy)
  points = []
  for line in lines:
    line = line[(line[:, 0] >= 0) & (line[:, 0] <= FAR) & np.isfinite(line).all(1)]
    if len(line) < 2:
      continue
    x = np.arange(NEAR, min(FAR, line[:, 0].max()), 0.25)
    order = np.argsort(line[:, 0], kind="stable")
    dense = np.stack([x, np.interp(x, line[order, 0], line[order, 1]), np.interp(x, line[order, 0], line[order, 2])], 1)
    px, depth = project(dense, intrinsics, rot)
    px = px[(depth > 0) & inside(px, height, width)]
    if len(px):
      along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(px, axis=0).T))])
      at = np.arange(0.0, along[-1] + 1e-9, spacing)
      points.append(np.stack([np.interp(at, along, px[:, 0]), np.interp(at, along, px[:, 1])], 1))
  return np.concatenate(points) if points else np.zeros((0, 2))


def mask_points(mask: np.ndarray, spacing: int = 8, max_width: int = 64) -> np.ndarray:
  """Lane segmentation (H, W), nonzero on markings -> (N, 2) float64: the middle of every run of marking in every
  spacing-th row, from the bottom up. Runs wider than max_width are no single marking."""
  mask = np.asarray(mask) != 0
  points = []
  for y in range(mask.shape[0] - 1 - spacing // 2, -1, -spacing):
    edges = np.diff(np.concatenate([[0], mask[y].astype(np.int8), [0]]))
    for x0, x1 in zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True):
      if x1 - x0 <= max_width:
        points.append(((x0 + x1 - 1) / 2, float(y)))
  return np.array(points, np.float64).reshape(-1, 2)


def road_grid(
  height: int,
  width: int,
  intrinsics: np.ndarray | None = None,
  spacing: int = 24,
  half_width: float = 8.0,
  far: float = 60.0,
  camera_height: float = CAMERA_HEIGHT,
  rpy: np.ndarray | None = None,
) -> np.ndarray:
  """-> (N, 2) float64: a grid over what of the view is road if the road is flat: up to `half_width` meters aside and
  `far` meters ahead. Without
  intrinsics: over its lower 60%. rpy: radians, only of a raw camera picture."""
  x, y = (np.arange(spacing / 2, n, spacing) for n in (width, height))
  grid = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
  if intrinsics is None:
    return grid[grid[:, 1] > 0.4 * height]
  if rpy is not None:
    ray = np.linalg.inv(intrinsics) @ np.concatenate([grid, np.ones((len(grid), 1))], axis=1).T
    ahead, right, down = rot_from_euler(rpy).T @ view_frame_from_device_frame.T @ ray
    with np.errstate(divide="ignore", invalid="ignore"):
      reach = np.where((down > 0) & (ahead > 0), camera_height / down, np.inf)
      return grid[(reach * ahead <= far) & (reach * np.abs(right) <= half_width)]
  below = (grid[:, 1] - intrinsics[1, 2]) / intrinsics[1, 1]
  with np.errstate(divide="ignore"):
    depth = np.where(below > 0, camera_height / below, np.inf)
  aside = np.abs(grid[:, 0] - intrinsics[0, 2]) / intrinsics[0, 0] * depth
  return grid[(depth <= far) & (aside <= half_width)]

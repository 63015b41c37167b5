"""Points on the simulator's static surfaces, followed through a drive by geometry alone: the exact result of a point
tracker.

Points are (x, y) in pixels of the medmodel view, integers at pixel centers. Places are in the calibrated frame of one
moment: x forward, y right, z down, meters, the camera at the origin. A pose is World.pose: x, y, heading of that frame
in one fixed to the ground; the road is flat."""

import numpy as np

from openpilot.common.transformations.camera import device_frame_from_view_frame, project
from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.tools.sim.render import CLASSES, Frame
from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W
from openpilot.tools.sim.world import World

FPS = 20
STATIC = [CLASSES.index(c) for c in ("background", "road", "lane")]
Pose = tuple[float, float, float]


def inside(points: np.ndarray) -> np.ndarray:
  """(N, 2) -> (N,) bool, between the centers of the view's outermost pixels; nan is outside."""
  x, y = points[:, 0], points[:, 1]
  return (x >= 0) & (x <= VIEW_W - 1) & (y >= 0) & (y <= VIEW_H - 1)


def lift(points: np.ndarray, depth: np.ndarray) -> np.ndarray:
  """(N, 2) pixels and (N,) meters along the optical axis -> (N, 3) places."""
  rays = np.concatenate([points, np.ones((len(points), 1))], 1) @ np.linalg.inv(medmodel_intrinsics).T
  return (rays * np.asarray(depth, np.float64)[:, None]) @ device_frame_from_view_frame.T


def ground_depth(points: np.ndarray, camera_height: float) -> np.ndarray:
  """(N, 2) pixels -> (N,) depth of the ground there, meters; inf at and above the horizon."""
  below = points[:, 1] - medmodel_intrinsics[1, 2]
  with np.errstate(divide="ignore"):
    return np.where(below > 0, camera_height * medmodel_intrinsics[1, 1] / below, np.inf)


def to_still(at: np.ndarray, pose: Pose) -> np.ndarray:
  """(N, 3) places in the frame of `pose` -> (N, 3) in the frame fixed to the ground."""
  x, y, h = pose
  c, s = np.cos(h), np.sin(h)
  return np.stack([x + c * at[:, 0] - s * at[:, 1], y + s * at[:, 0] + c * at[:, 1], at[:, 2]], 1)


def from_still(at: np.ndarray, pose: Pose) -> np.ndarray:
  """The inverse of to_still."""
  x, y, h = pose
  c, s = np.cos(h), np.sin(h)
  dx, dy = at[:, 0] - x, at[:, 1] - y
  return np.stack([c * dx + s * dy, c * dy - s * dx, at[:, 2]], 1)


def follow(world: World, frames: list[Frame], start: float, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """frames: consecutive frames of the view, from `start` seconds on; points: (N, 2), integers, in the first of them ->
  where their surfaces are in every frame (T, N, 2), and whether they are visible (T, N). Exact for static surfaces."""
  ij = points.astype(int)
  at = to_still(lift(points, frames[0].depth[ij[:, 1], ij[:, 0]]), world.pose(start))
  tracks, seen = np.zeros((len(frames), len(points), 2)), np.zeros((len(frames), len(points)), bool)
  for k, frame in enumerate(frames):
    tracks[k], z = project(from_still(at, world.pose(start + k / FPS)), medmodel_intrinsics)
    ok = inside(tracks[k]) & (z > 0.5)
    px = np.round(np.where(ok[:, None], tracks[k], 0)).astype(int)
    there = frame.depth[px[:, 1], px[:, 0]]
    seen[k] = ok & (np.abs(there - z) < 0.05 * z) & np.isin(frame.semantic[px[:, 1], px[:, 0]], STATIC)
  return tracks, seen

"""How the camera has turned between two frames, as the route's log says: what moves everything in the picture alike,
however far away it is."""

from pathlib import Path

import cv2
import numpy as np

from openpilot.common.transformations.camera import view_frame_from_device_frame
from openpilot.common.transformations.orientation import rot_from_euler
from openpilot.tools.lib.logreader import LogReader

MAX_GAP = 1e9  # ns between two messages, and before and after them; turns change slowly
MAX_RATE = 1.0  # rad/s; more is no road


class TurnLog:
  """cameraOdometry of one log: turn rates of the calibrated frame, rad/s. Raises UserError where the log cannot be
  read."""

  def __init__(self, path: str | Path):
    rows = []
    reader = LogReader([path], services=["cameraOdometry"])
    for event in reader:
      with reader.guard(event):
        said = event.cameraOdometry
        if len(said.rot) == 3 and np.isfinite(said.rot).all() and np.abs(said.rot).max() < MAX_RATE:
          rows.append((float(said.timestampEof), *said.rot))
    rows.sort()
    table = np.array(rows, np.float64).reshape(-1, 4)
    self.times, self.rates = table[:, 0], table[:, 1:]

  def between(self, before: int, after: int) -> np.ndarray | None:
    """Times of two frames, ns -> (3,) rotation vector of the turn from the first to the second, radians; None where the
    log does not say."""
    middle = (before + after) / 2
    k = int(np.searchsorted(self.times, middle))
    near = self.times[max(0, k - 1) : k + 1]
    if not len(near) or np.abs(near - middle).max() > MAX_GAP:
      return None
    return np.array([np.interp(middle, self.times, r) for r in self.rates.T]) * (after - before) * 1e-9


def turned(rotation: np.ndarray, intrinsics: np.ndarray, rpy: np.ndarray | None = None) -> np.ndarray:
  """(3,) rotation vector of the calibrated frame (x forward, y right, z down), and (3, 3) of the view -> (3, 3): where
  a pixel's direction of the first frame is in the second, homogeneous. rpy: (3,) radians, the camera's mounting, where
  the pixels are the camera's own and not the view's."""
  if rpy is not None:
    rotation = rot_from_euler(rpy) @ rotation
  new_from_old = cv2.Rodrigues(np.asarray(rotation, np.float64))[0].T
  view = view_frame_from_device_frame
  return intrinsics @ view @ new_from_old @ view.T @ np.linalg.inv(intrinsics)

"""Where a camera that nobody knows looks: the road's vanishing point from what moves in its video, and the mounting
that follows.

Good enough for classes and boxes, whose place in the view it decides; distances in meters want a known camera."""

from dataclasses import replace
from typing import Any

import cv2
import numpy as np

from openpilot.tools.fair.labels.views import SegmentView
from openpilot.tools.lib.errors import UserError, warn
from openpilot.tools.lib.framereader import FrameReader

PAIRS = 40  # of frames that are compared
SECONDS = 0.2  # between the two of a pair
LEAST_FLOW = 1.5  # pixels of a picture 640 wide: below that the car stands
LEAST_POINTS = 40
FORWARD = 0.94  # cosine between the motion and the camera's axis: what is less is a sharp turn, or wrong
LEAST_PAIRS = 5


def mounting_of(vanishing: tuple[float, float], intrinsics: np.ndarray) -> np.ndarray:
  """The pixel at which the road vanishes straight ahead -> (3,) roll, pitch, yaw of the calibration, radians."""
  x, y = (np.array(vanishing) - intrinsics[:2, 2]) / np.diag(intrinsics)[:2]
  yaw = np.arctan(x)
  return np.array([0.0, -np.arctan(y * np.cos(yaw)), yaw])


def vanishing_of(rpy: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
  """(2,) pixel at which the road vanishes straight ahead, of a calibration."""
  _, pitch, yaw = rpy
  return intrinsics[:2, 2] + np.diag(intrinsics)[:2] * np.array([np.tan(yaw), -np.tan(pitch) / np.cos(yaw)])


def heading(before: np.ndarray, after: np.ndarray, intrinsics: np.ndarray) -> np.ndarray | None:
  """(h, w) uint8 of two frames -> (2,) pixel towards which the camera moves, its turn taken out by the essential
  matrix; None where they do not say."""
  scale = before.shape[1] / 640
  start = cv2.goodFeaturesToTrack(before, 400, 0.01, 8 * scale)
  if start is None or len(start) < LEAST_POINTS:
    return None
  guess: Any = None
  end, good, _ = cv2.calcOpticalFlowPyrLK(before, after, start, guess)
  a, b = start[good.ravel() > 0, 0], end[good.ravel() > 0, 0]
  if len(a) < LEAST_POINTS or np.median(np.linalg.norm(b - a, axis=1)) < LEAST_FLOW * scale:
    return None
  cv2.setRNGSeed(0)
  essential, inliers = cv2.findEssentialMat(a, b, intrinsics, method=cv2.RANSAC, prob=0.999, threshold=0.7 * scale)
  if essential is None or essential.shape != (3, 3) or inliers.sum() < LEAST_POINTS:
    return None
  _, _, t, _ = cv2.recoverPose(essential, a, b, intrinsics, mask=inliers)
  x, y, z = t.ravel() * np.sign(t[2, 0] or 1)
  if z < FORWARD:
    return None
  return intrinsics[:2, 2] + np.diag(intrinsics)[:2] * np.array([x, y]) / z


def find_vanishing(view: SegmentView) -> tuple[np.ndarray, float, int]:
  """-> (2,) median pixel towards which the camera moves, half the spread of its height's middle half in pixels, and how
  many pairs of frames say so. Raises UserError where fewer than LEAST_PAIRS do."""
  reader = FrameReader(view.path, "nv12", threads=1)
  step = max(1, round(SECONDS * reader.fps))
  starts = {int(i) for i in np.linspace(0, max(0, reader.frame_count - step - 1), PAIRS)}
  wanted = starts | {i + step for i in starts}
  held: dict[int, np.ndarray] = {}
  found = []
  for i, frame in reader.read_from(0):
    if i in wanted:
      held[i] = frame[: view.height].copy()
      if i - step in held and i - step in starts:
        at = heading(held[i - step], held[i], view.intrinsics)
        found += [] if at is None else [at]
      held.pop(i - step, None)
  if len(found) < LEAST_PAIRS:
    raise UserError(
      f"{view.path}: {len(found)} of {len(starts)} pairs of frames say where the car drives; give the height of the "
      "horizon in pixels with --horizon"
    )
  xy = np.array(found)
  low, high = np.percentile(xy[:, 1], [25, 75])
  return np.median(xy, axis=0), float(high - low) / 2, len(found)


def aimed(view: SegmentView, horizon: float | str | None) -> SegmentView:
  """The view of a video without a calibration, aimed: horizon is its row in the picture, pixels, or 'auto'. A log's own
  calibration stays. Says what was found, not used, or taken by default."""
  if view.calibrated:
    if horizon is not None:
      warn(f"--horizon is not used for segment {view.segment.name}, whose log has a calibration")
    return view
  if horizon is None:
    if view.segment.log_path is not None:
      warn(f"the log of segment {view.segment.name} has no calibration; the default one is taken, or give --horizon")
    return view
  if not isinstance(horizon, str):
    return replace(view, rpy=mounting_of((float(view.intrinsics[0, 2]), horizon), view.intrinsics))
  at, spread, n = find_vanishing(view)
  warn(
    f"{view.segment.name}: the road vanishes at ({at[0]:.0f}, {at[1]:.0f}) of {view.width}x{view.height}, "
    f"+-{spread:.0f} by {n} pairs of frames"
  )
  return replace(view, rpy=mounting_of((float(at[0]), float(at[1])), view.intrinsics), estimated=True)

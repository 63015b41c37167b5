"""The road plane seen by the model view: pixels to meters and back.

The view is rendered as by a camera that looks along the car (the warp takes the mounting out), so a pixel's ray is
known in the calibrated frame (x forward, y right, z down, origin at the camera) without the calibration, and the road
is the plane z = camera height."""

from dataclasses import dataclass

import numpy as np

from openpilot.common.transformations.model import medmodel_intrinsics, sbigmodel_intrinsics

DEFAULT_HEIGHT = 1.22  # m, openpilot's camera height where the calibration has none
MIN_HEIGHT, MAX_HEIGHT = 0.5, 4.0
HEIGHT_STD = 0.05  # of the height: a lean of the car, a tyre, a road that is not level
PITCH_STD = 0.005  # rad; what the car's pitch and the road's slope add to the calibration, frame by frame
FAR = 150.0  # m; beyond, one pixel row is over 20 m and the plane says nothing


@dataclass(frozen=True)
class Ground:
  """f: focal length of the view, pixels; cx, cy: its principal point; height: of the camera above the road, m."""

  f: float
  cx: float
  cy: float
  height: float = DEFAULT_HEIGHT

  def road(self, px: np.ndarray) -> np.ndarray:
    """(..., 2) view pixels -> (..., 3) meters on the road, nan at and above the horizon and beyond FAR."""
    below = px[..., 1] - self.cy
    out = np.empty((*below.shape, 3), below.dtype)
    least = self.f * self.height / FAR
    x = np.where(below >= least, self.f * self.height / np.maximum(below, least), np.nan)  # maximum: nan stays nan
    out[..., 0] = x
    out[..., 1] = x * (px[..., 0] - self.cx) * (1 / self.f)
    out[..., 2] = self.height + 0 * x
    return out

  def view(self, points: np.ndarray) -> np.ndarray:
    """(..., 3) meters, calibrated frame -> (..., 2) view pixels, nan where x is not ahead."""
    x = np.where(points[..., :1] > 0.1, points[..., :1], np.nan)
    return points[..., 1:] * (self.f / x) + np.array([self.cx, self.cy])

  def forward_std(self, x: np.ndarray, pixel_std: np.ndarray | float) -> np.ndarray:
    """Standard deviation, m, of the forward distance x that the plane gives to a pixel known to pixel_std rows."""
    row = np.hypot(pixel_std, self.f * PITCH_STD)
    return np.hypot(x * x / (self.f * self.height) * row, x * HEIGHT_STD)


def view_ground(view: str, height: float | None = None) -> Ground:
  """The Ground of 'medmodel' or 'sbigmodel'; a height that is missing or cannot be one is replaced by openpilot's."""
  k = sbigmodel_intrinsics if view == "sbigmodel" else medmodel_intrinsics
  known = height is not None and MIN_HEIGHT <= height <= MAX_HEIGHT  # False for nan too
  return Ground(
    float(k[0, 0]), float(k[0, 2]), float(k[1, 2]), float(height) if known and height is not None else DEFAULT_HEIGHT
  )

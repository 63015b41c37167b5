"""How the camera is mounted, as an extrinsicsCalibration of any age says."""

import math
from typing import Any

MAX_ANGLE = 0.35  # rad; beyond, a calibration is not one
MAX_TURN = 1.0  # rad/s


def mounting(calibration: Any) -> tuple[list[float] | None, float | None]:
  """A reader of extrinsicsCalibration -> (roll, pitch, yaw) in radians, its rpyCalib, None where that is none; and the
  camera's height above the road, m.

  The height is None where it is not said, as before openpilot 0.9. In every calStatus, as modeld takes it: what
  calibrationd has so far is the best there is."""
  rpy = list(calibration.rpyCalib)
  height = float(calibration.height[0]) if len(calibration.height) else math.nan
  good = len(rpy) == 3 and all(math.isfinite(v) and abs(v) <= MAX_ANGLE for v in rpy)
  return rpy if good else None, height if math.isfinite(height) and height > 0 else None


def turn_rate(odometry: Any) -> float | None:
  """cameraOdometry -> rad/s of the calibrated frame, positive to the right; None where no car turns so fast."""
  rot = odometry.rot
  return float(rot[2]) if len(rot) == 3 and abs(rot[2]) <= MAX_TURN else None  # False for nan

"""Cameras of comma's devices and the frames of reference, in openpilot's names.

device frame: x forward, y right, z down; view frame: x right, y down, z forward; calibrated frame: the device frame
turned so that x is along the car."""

from dataclasses import dataclass
from itertools import product

import numpy as np


@dataclass(frozen=True)
class CameraConfig:
  width: int
  height: int
  focal_length: float  # pixels

  @property
  def size(self) -> tuple[int, int]:
    return (self.width, self.height)

  @property
  def intrinsics(self) -> np.ndarray:
    """(3, 3) pinhole matrix, the principal point at the center of the image."""
    return np.array(
      [[self.focal_length, 0.0, self.width / 2], [0.0, self.focal_length, self.height / 2], [0.0, 0.0, 1.0]]
    )


@dataclass(frozen=True)
class DeviceCameraConfig:
  narrow_road: CameraConfig
  cabin: CameraConfig
  wide_road: CameraConfig

  # the names before August 2026
  @property
  def fcam(self) -> CameraConfig:
    return self.narrow_road

  @property
  def dcam(self) -> CameraConfig:
    return self.cabin

  @property
  def ecam(self) -> CameraConfig:
    return self.wide_road


_none = CameraConfig(0, 0, 0.0)
_ar_ox_narrow, _ar_ox_wide = CameraConfig(1928, 1208, 2648.0), CameraConfig(1928, 1208, 567.0)
_os_narrow, _os_wide = CameraConfig(1344, 760, 1141.5), CameraConfig(1344, 760, 425.25)
_neo = DeviceCameraConfig(CameraConfig(1164, 874, 910.0), CameraConfig(816, 612, 650.0), _none)
_ar_ox = DeviceCameraConfig(_ar_ox_narrow, _ar_ox_wide, _ar_ox_wide)
_os = DeviceCameraConfig(_os_narrow, _os_wide, _os_wide)

# (device type, sensor), both as the log spells them; the sensor decides, except on the oldest devices
DEVICE_CAMERAS: dict[tuple[str, str], DeviceCameraConfig] = {
  ("neo", "unknown"): _neo,
  ("tici", "unknown"): _ar_ox,  # before the sensor was logged
  ("unknown", "ar0231"): _ar_ox,
  ("unknown", "ox03c10"): _ar_ox,
  ("pc", "unknown"): _ar_ox,  # simulators
}
for _device, (_sensor, _config) in product(
  ("tici", "tizi", "mici"), (("ar0231", _ar_ox), ("ox03c10", _ar_ox), ("os04c10", _os))
):
  DEVICE_CAMERAS[(_device, _sensor)] = _config

device_frame_from_view_frame = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
view_frame_from_device_frame = device_frame_from_view_frame.T


def normalize(img_pts: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
  """(N, 2) pixels -> (N, 2) on the plane at depth 1."""
  inv = np.linalg.inv(intrinsics)
  pts = np.hstack([img_pts, np.ones((len(img_pts), 1))]) @ inv.T
  return pts[:, :2]


def project(
  points: np.ndarray, intrinsics: np.ndarray, device_from_calib: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """(N, 3) points in the calibrated frame, meters -> (N, 2) pixels and (N,) depth along the optical axis; pixels are
  nan at depth <= 0."""
  rot = view_frame_from_device_frame @ (np.eye(3) if device_from_calib is None else device_from_calib)
  view = np.asarray(points, dtype=np.float64) @ rot.T
  depth = view[:, 2]
  with np.errstate(divide="ignore", invalid="ignore"):
    px = (view @ intrinsics.T)[:, :2] / depth[:, None]
  px[depth <= 0] = np.nan
  return px, depth

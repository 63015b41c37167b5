"""The views that openpilot's driving model sees, and the warp to them (openpilot: common/transformations/model.py)."""

import numpy as np

from openpilot.common.transformations.camera import view_frame_from_device_frame
from openpilot.common.transformations.orientation import rot_from_euler

MEDMODEL_INPUT_SIZE = (512, 256)  # width, height
MEDMODEL_CY = 47.6
medmodel_fl = 910.0
medmodel_intrinsics = np.array(
  [[medmodel_fl, 0.0, 0.5 * MEDMODEL_INPUT_SIZE[0]], [0.0, medmodel_fl, MEDMODEL_CY], [0.0, 0.0, 1.0]]
)

SBIGMODEL_INPUT_SIZE = (512, 256)
sbigmodel_fl = 455.0
sbigmodel_intrinsics = np.array(
  [[sbigmodel_fl, 0.0, 0.5 * SBIGMODEL_INPUT_SIZE[0]], [0.0, sbigmodel_fl, 0.5 * (256 + MEDMODEL_CY)], [0.0, 0.0, 1.0]]
)


def get_warp_matrix(device_from_calib_euler, intrinsics: np.ndarray, bigmodel_frame: bool = False) -> np.ndarray:
  """(3,) roll, pitch, yaw of the calibration and (3, 3) camera intrinsics -> (3, 3) matrix from model pixel (x, y, 1)
  to camera pixel, up to scale."""
  model_intrinsics = sbigmodel_intrinsics if bigmodel_frame else medmodel_intrinsics
  calib_from_model = np.linalg.inv(model_intrinsics @ view_frame_from_device_frame)
  camera_from_calib = intrinsics @ view_frame_from_device_frame @ rot_from_euler(device_from_calib_euler)
  return camera_from_calib @ calib_from_model

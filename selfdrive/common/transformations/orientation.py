"""Euler angles (roll, pitch, yaw), radians, intrinsic z-y-x, as openpilot's common/transformations."""

import numpy as np


def rot_from_euler(eulers) -> np.ndarray:
  """(..., 3) roll, pitch, yaw -> (..., 3, 3) rotation Rz(yaw) @ Ry(pitch) @ Rx(roll), float64."""
  roll, pitch, yaw = np.moveaxis(np.asarray(eulers, dtype=np.float64), -1, 0)
  cr, sr, cp, sp, cy, sy = np.cos(roll), np.sin(roll), np.cos(pitch), np.sin(pitch), np.cos(yaw), np.sin(yaw)
  rows = [
    [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
    [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
    [-sp, cp * sr, cp * cr],
  ]
  return np.stack([np.stack(r, axis=-1) for r in rows], axis=-2)


def euler_from_rot(rots) -> np.ndarray:
  """(..., 3, 3) -> (..., 3) roll, pitch, yaw; the inverse of rot_from_euler for |pitch| < pi/2."""
  r = np.asarray(rots, dtype=np.float64)
  return np.stack(
    [
      np.arctan2(r[..., 2, 1], r[..., 2, 2]),
      -np.arcsin(np.clip(r[..., 2, 0], -1, 1)),
      np.arctan2(r[..., 1, 0], r[..., 0, 0]),
    ],
    axis=-1,
  )

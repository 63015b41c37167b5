"""Depth: z along the optical axis of the model view."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W
from openpilot.selfdrive.modeld.fair.heads.ground import HEIGHT_STD


@dataclass
class Depth:
  z: np.ndarray  # (H, W) float32, nan outside the camera image
  metric: bool  # True: meters; False: up to one scale
  # factor from what the student gave to z: 1 where it gives meters itself, the camera's height where it gives depth in
  # those, 0 while nobody knows
  scale: float = 1.0
  scale_std: float = 0.0  # its standard deviation, as a share of it


@cache
def map_centers(h: int, w: int, view: tuple[int, int] = (VIEW_H, VIEW_W)) -> tuple[np.ndarray, np.ndarray]:
  """View pixels x (w,), y (h,) of the centers of a map's pixels. view: height, width. The same arrays every time, not
  to be written."""
  x, y = (np.arange(w) + 0.5) * (view[1] / w) - 0.5, (np.arange(h) + 0.5) * (view[0] / h) - 0.5
  x.setflags(write=False)
  y.setflags(write=False)
  return x, y


def shrink(z: np.ndarray) -> np.ndarray:
  """(H, W) with even sides -> half as high and wide. Of each four the second nearest: of a surface that is there, where
  a mean would float between two."""
  a, b, c, d = z[::2, ::2], z[::2, 1::2], z[1::2, ::2], z[1::2, 1::2]
  return np.fmin(
    np.fmax(np.fmin(a, b), np.fmin(c, d)), np.fmin(np.fmax(a, b), np.fmax(c, d))
  )  # f: nan only where all are


def map_valid(valid: np.ndarray, h: int, w: int) -> np.ndarray:
  """(256, 512) bool of the view -> (h, w) bool: is the view pixel at the map pixel's center, (i + .5) * 512 / w - .5,
  rounded down, in the image?"""
  sy, sx = valid.shape[0] // h, valid.shape[1] // w
  return valid[(sy - 1) // 2 :: sy, (sx - 1) // 2 :: sx]


def in_image(points: np.ndarray, valid: np.ndarray) -> np.ndarray:
  """(N, 2) view pixels, (256, 512) bool -> which of them are in the camera's image, rising: not those that are nan."""
  h, w = valid.shape
  x, y = points.T
  inside = ((x > -0.5) & (x < w - 0.5) & (y > -0.5) & (y < h - 0.5)).nonzero()[0]
  px = np.rint(points[inside]).astype(int)
  return inside[valid[px[:, 1], px[:, 0]]]


def decode(raw: np.ndarray, spec: dict[str, Any], valid: np.ndarray, height: float) -> Depth:
  """raw: (1, 1, H, W) float; parameters: activation 'exp' (raw is the logarithm) or 'none'; metric: raw is in meters;
  per_height: raw is in heights of the camera. valid: (256, 512) bool. height: of the camera above the road, m."""
  parameters = spec.get("parameters", {})
  per_height = bool(parameters.get("per_height", False))
  scale = height if per_height else 1.0
  z = raw[0, 0].astype(np.float32, copy=False)
  if parameters.get("activation", "none") == "exp":
    # e^11 m is far enough; more would overflow float16
    z = np.minimum(z + np.float32(np.log(scale)) if per_height else z, 11.0)
    np.exp(z, out=z)
  else:
    z = z * np.float32(scale)  # a copy: raw is the graph's, and written again
  inside = map_valid(valid, *z.shape)
  if not inside.all():  # cameras fill the view, most of the time
    z[~inside] = np.nan
  return Depth(z, per_height or bool(parameters.get("metric", False)), scale, HEIGHT_STD if per_height else 0.0)

"""Dense labels of any size to a student's maps, of a quarter of its picture's sides: by default 64x128 cells of the
512x256 view. A label covers all of the picture; cell i is centered on pixel 4i + 1.5."""

import cv2
import numpy as np

from openpilot.tools.sim.truth import IGNORE, MAP_H, MAP_W

MAP = (MAP_H, MAP_W)
KNOWN = 0.5  # of what lies about a cell's center must be known


def inverse_of(z: np.ndarray, unit: str) -> tuple[np.ndarray, np.ndarray]:
  """(h, w) of a label of depth ('m': meters along the optical axis, inf the sky; 'relative': inverse depth up to scale
  and shift) -> inverse depth (h, w) float32, 0 where it is not known, and known (h, w) float32, 0 or 1."""
  z = z.astype(np.float32).reshape(z.shape[-2:])
  with np.errstate(divide="ignore", invalid="ignore"):
    inverse = 1 / z if unit == "m" else z
    known = (z > 0 if unit == "m" else np.isfinite(z)) & np.isfinite(inverse)
  return np.where(known, inverse, 0).astype(np.float32), known.astype(np.float32)


def depth_of(inverse: np.ndarray, known: np.ndarray, unit: str) -> np.ndarray:
  """What inverse_of() gave, both resampled alike -> depth (h, w) float32 as the label has it, nan: unknown, or the
  sky."""
  with np.errstate(divide="ignore", invalid="ignore"):
    mean = np.where(known >= KNOWN, inverse / known, np.nan)
    z = 1 / mean if unit == "m" else mean
    return np.where(np.isfinite(z) & (z > 0), z, np.nan).astype(np.float32)


def depth_to_map(z: np.ndarray, unit: str, shape: tuple[int, int] = MAP) -> np.ndarray:
  """A label of depth (..., h, w) -> `shape` float32 at the center of each cell, nan: unknown, or the sky. Bilinear in
  inverse depth, which is linear on a plane's picture: of a label of 256x512 the mean of each cell's four inner pixels,
  as the simulator's truth has it."""
  inverse, known = (
    x if x.shape == shape else cv2.resize(x, shape[::-1], interpolation=cv2.INTER_LINEAR) for x in inverse_of(z, unit)
  )
  return depth_of(inverse, known, unit)


def classes_to_map(ids: np.ndarray, count: int, shape: tuple[int, int] = MAP) -> np.ndarray:
  """(..., h, w) class ids -> `shape` uint8: the class that most of a cell's pixels have, of equals the first; 255 where
  that is none of `count` classes."""
  h, w = shape
  ids = np.ascontiguousarray(ids.reshape(ids.shape[-2:]), np.uint8)
  if ids.shape == shape:
    return np.where(ids < count, ids, IGNORE).astype(np.uint8)
  if ids.shape != (4 * h, 4 * w):
    ids = cv2.resize(
      ids, (4 * w, 4 * h), interpolation=cv2.INTER_NEAREST_EXACT
    )  # INTER_NEAREST takes the pixel at the corner
  blocks = ids.reshape(h, 4, w, 4).transpose(0, 2, 1, 3).reshape(h, w, 16)
  votes = np.stack([(blocks == k).sum(-1) for k in range(count)] + [(blocks >= count).sum(-1)], axis=-1)
  best = votes.argmax(-1)
  return np.where(best == count, IGNORE, best).astype(np.uint8)

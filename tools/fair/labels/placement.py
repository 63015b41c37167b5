"""Where a picture lies in an input: letterboxed, upper left, as InputSpec.fit() says; and the same of what was said of
it. All that is placed here counts at pixel centers; boxes' edges are the outer edges of their pixels."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from openpilot.selfdrive.modeld.fair.frames import pack_rgb, unpack_rgb
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.spec import InputSpec, shown_pixels


def place_picture(rgb: np.ndarray, matrix: np.ndarray, width: int, height: int, pad: int) -> np.ndarray:
  """(h, w, 3) uint8 -> (height, width, 3) uint8. matrix: (3, 3) of fit(). Made smaller it is averaged over what a pixel
  covers, exact to less than a pixel's part: nothing is rounded to whole pixels first."""
  h, w = rgb.shape[:2]
  sx, sy = matrix[0, 0], matrix[1, 1]
  to_w, to_h = shown_pixels(sx, w, width), shown_pixels(sy, h, height)
  out = np.full((height, width, 3), pad, np.uint8)
  if (sx, sy) == (1, 1):
    out[:to_h, :to_w] = rgb[:to_h, :to_w]
    return out
  # of the part that is shown, in the picture's pixels; of one that is thinner than half a pixel all of it
  right, low = (n / s if s * side >= 0.5 else side for n, s, side in ((to_w, sx, w), (to_h, sy, h)))
  over = max(0, int(np.ceil(low - h - 1e-9))), max(0, int(np.ceil(right - w - 1e-9)))
  source = np.pad(rgb, ((0, over[0]), (0, over[1]), (0, 0)), mode="edge") if any(over) else rgb
  box = (0, 0, min(right, source.shape[1]), min(low, source.shape[0]))
  out[:to_h, :to_w] = np.asarray(Image.fromarray(source).resize((to_w, to_h), Image.Resampling.BILINEAR, box=box))
  return out


def place_input(rgb: np.ndarray, spec: InputSpec) -> np.ndarray:
  """(h, w, 3) uint8 -> what a student of that input takes, without the batch."""
  h, w = rgb.shape[:2]
  placed = place_picture(rgb, spec.fit(w, h), spec.width, spec.height, spec.pad)
  return placed.transpose(2, 0, 1) if spec.kind == "rgb" else pack_rgb(placed)


def rgb_of(frame: np.ndarray) -> np.ndarray:
  """What a student takes, uint8 (6, h, w) or (3, H, W) -> (H, W, 3) uint8 RGB."""
  return unpack_rgb(frame) if len(frame) == 6 else np.ascontiguousarray(frame.transpose(1, 2, 0))


def place_ids(ids: np.ndarray, matrix: np.ndarray, width: int, height: int, fill: int) -> np.ndarray:
  """(h, w) of numbers that cannot be averaged -> (height, width), each the number where its center lies."""
  h, w = ids.shape
  sx, sy = matrix[0, 0], matrix[1, 1]
  to_w, to_h = shown_pixels(sx, w, width), shown_pixels(sy, h, height)
  out = np.full((height, width), fill, ids.dtype)
  xs = np.minimum(((np.arange(to_w) + 0.5) / sx).astype(int), w - 1)
  ys = np.minimum(((np.arange(to_h) + 0.5) / sy).astype(int), h - 1)
  out[:to_h, :to_w] = ids[np.ix_(ys, xs)]
  return out


def place_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
  """(N, 4) x0 y0 x1 y1 -> (N, 4) float64."""
  b = np.asarray(boxes, np.float64).reshape(-1, 2, 2)
  return (b * np.diag(matrix)[:2] + matrix[:2, 2]).reshape(-1, 4)


def place_polygons(polygons: Sequence[np.ndarray], matrix: np.ndarray, width: int, height: int) -> str:
  """Polygons (K, 2) of one object, counted from the picture's corner as COCO's are -> COCO run lengths of (height,
  width)."""
  scale = np.diag(matrix)[:2]
  flat = [(np.asarray(p, np.float64) * scale).ravel().tolist() for p in polygons]
  return coco.merge(coco.frPyObjects(flat, height, width))["counts"].decode("ascii")


def place_mask(mask: np.ndarray, matrix: np.ndarray, width: int, height: int) -> str:
  """(h, w) bool -> COCO run lengths of (height, width)."""
  return rle.encode(place_ids(mask.astype(np.uint8), matrix, width, height, 0)[None].astype(bool))[0]

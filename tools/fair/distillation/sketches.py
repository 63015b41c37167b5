"""What is said of a frame, drawn on it."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from openpilot.tools.lib.colors import CLASS_COLORS, OTHER_COLOR, track_color


def classes_on(rgb: np.ndarray, classes: np.ndarray, names: Sequence[str]) -> np.ndarray:
  """rgb (H, W, 3) uint8, classes (h, w): index into names, 255 where nothing is known. The first is left as it is."""
  big = np.repeat(np.repeat(classes, len(rgb) // len(classes), 0), rgb.shape[1] // classes.shape[1], 1)
  tints = np.array([CLASS_COLORS.get(c, OTHER_COLOR if k else (0, 0, 0)) for k, c in enumerate(names)], np.float32)
  tint = np.where((big > 0) & (big < len(names)), 0.5, 0.0)[..., None]
  return (rgb * (1 - tint) + tints[np.minimum(big, len(names) - 1)] * tint).astype(np.uint8)


def boxes_on(rgb: np.ndarray, boxes: np.ndarray, cls: np.ndarray, names: Sequence[str]) -> np.ndarray:
  """boxes (N, 4) x0 y0 x1 y1 pixels, cls (N,) index into names."""
  image = Image.fromarray(rgb)
  draw = ImageDraw.Draw(image)
  for box, c in zip(boxes, cls, strict=True):
    draw.rectangle([float(v) for v in box], outline=CLASS_COLORS.get(names[int(c)], (255, 255, 255)), width=2)
  return np.asarray(image)


def points_on(rgb: np.ndarray, points: np.ndarray, visible: np.ndarray) -> np.ndarray:
  """points (N, 2) x, y pixels, visible (N,) bool."""
  image = Image.fromarray(rgb)
  draw = ImageDraw.Draw(image)
  for k, ((x, y), seen) in enumerate(zip(points, visible, strict=True)):
    if seen:
      draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=track_color(k))
  return np.asarray(image)

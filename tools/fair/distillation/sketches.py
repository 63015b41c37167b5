"""What is said of a frame, drawn on it."""

import numpy as np
from PIL import Image, ImageDraw

from openpilot.tools.fair.spec import ClassSet
from openpilot.tools.lib.colors import class_colors, track_color


def classes_on(rgb: np.ndarray, classes: np.ndarray, of: ClassSet) -> np.ndarray:
  """rgb (H, W, 3) uint8, classes (h, w): index into the set's maps, 255 where nothing is known. Background is left as
  it is."""
  colors = class_colors(of.maps, of.roles(of.maps))
  tints, tinted = np.zeros((256, 3), np.float32), np.zeros(256, np.float32)
  for k, name in enumerate(of.maps):
    if name in colors:
      tints[k], tinted[k] = colors[name], 0.5
  big = np.repeat(np.repeat(classes, len(rgb) // len(classes), 0), rgb.shape[1] // classes.shape[1], 1)
  tint = tinted[big][..., None]
  return (rgb * (1 - tint) + tints[big] * tint).astype(np.uint8)


def boxes_on(rgb: np.ndarray, boxes: np.ndarray, cls: np.ndarray, of: ClassSet) -> np.ndarray:
  """boxes (N, 4) x0 y0 x1 y1 pixels, cls (N,) index into the set's boxes."""
  colors = class_colors(of.boxes, of.roles(of.boxes))
  image = Image.fromarray(rgb)
  draw = ImageDraw.Draw(image)
  for box, c in zip(boxes, cls, strict=True):
    draw.rectangle([float(v) for v in box], outline=colors.get(of.boxes[int(c)], (255, 255, 255)), width=2)
  return np.asarray(image)


def points_on(rgb: np.ndarray, points: np.ndarray, visible: np.ndarray) -> np.ndarray:
  """points (N, 2) x, y pixels, visible (N,) bool."""
  image = Image.fromarray(rgb)
  draw = ImageDraw.Draw(image)
  for k, ((x, y), seen) in enumerate(zip(points, visible, strict=True)):
    if seen:
      draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=track_color(k))
  return np.asarray(image)

"""What somebody says of a frame, drawn on it."""

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from openpilot.tools.fair.evaluation.compared import Compared
from openpilot.tools.fair.evaluation.detections import Objects
from openpilot.tools.fair.evaluation.scenes import Scene
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.labels.placement import rgb_of
from openpilot.tools.lib.colors import TINT, class_colors, depth_picture, track_color
from openpilot.tools.lib.said import drawn
from openpilot.tools.sim.truth import IGNORE

GAP = 4  # pixels between two pictures


def large(small: np.ndarray) -> np.ndarray:
  """A map (h, w, ...) at the size of the picture."""
  return small.repeat(4, 0).repeat(4, 1)


def draw_depth(rgb: np.ndarray, s: Scene, compared: Compared) -> np.ndarray | None:
  return None if s.depth is None else large(depth_picture(s.depth))


def draw_classes(rgb: np.ndarray, s: Scene, compared: Compared) -> np.ndarray | None:
  """The picture with its classes; what is unknown is dark."""
  if s.classes is None:
    return None
  colors = np.zeros((256, 3), np.float32)
  on = np.zeros(256, bool)
  shown = class_colors(compared.names("maps"), compared.roles)
  for k, name in enumerate(compared.names("maps")):
    colors[k], on[k] = shown.get(name, (0, 0, 0)), name in shown
  big = large(s.classes)
  out = rgb.copy()
  at = on[big]
  out[at] = (rgb[at] * (1 - TINT) + colors[big[at]] * TINT).astype(np.uint8)
  out[big == IGNORE] //= 3
  return out


def draw_objects(rgb: np.ndarray, s: Scene, compared: Compared) -> np.ndarray | None:
  return None if s.objects is None else objects_on(rgb, s.objects, compared)


def draw_detector(rgb: np.ndarray, s: Scene, compared: Compared) -> np.ndarray | None:
  return None if s.detector is None else objects_on(rgb, s.detector, compared)


def draw_masks(rgb: np.ndarray, s: Scene, compared: Compared) -> np.ndarray | None:
  o = s.tracked if s.tracked is not None else s.objects
  return None if o is None else objects_on(rgb, o, compared)


def objects_on(rgb: np.ndarray, o: Objects, compared: Compared, score: float = 0.3) -> np.ndarray:
  image, names = Image.fromarray(rgb), compared.names("boxes")
  masks = rle.decode(o.rle, *o.map_shape) if o.rle is not None else None
  for i in np.flatnonzero(o.score >= score):
    track = int(o.track[i])
    color = track_color(track if track >= 0 else int(o.cls[i]) + 7)
    if masks is not None:
      mask = Image.fromarray(large(masks[i]).astype(np.uint8) * 110)
      image.paste(Image.new("RGB", image.size, color), (0, 0), mask)
    draw = ImageDraw.Draw(image)
    box = [float(v) + 0.5 for v in o.boxes[i]]
    draw.rectangle(box, outline=(128, 128, 128) if o.ignore[i] else color)
    text = f"{names[int(o.cls[i])]}{f' #{track}' if track >= 0 else ''} {o.score[i]:.2f}"
    draw.text((box[0] + 1, max(0, box[1] - 11)), drawn(text), fill=color)
  return np.asarray(image)


def draw_points(rgb: np.ndarray, points: np.ndarray, visible: np.ndarray, show: np.ndarray) -> np.ndarray:
  """points (N, 2), visible (N,): filled where seen; show (N,): which."""
  image = Image.fromarray(rgb)
  draw = ImageDraw.Draw(image)
  for k in np.flatnonzero(show):
    x, y = float(points[k, 0]) + 0.5, float(points[k, 1]) + 0.5
    color = track_color(int(k))
    draw.ellipse([x - 3, y - 3, x + 3, y + 3], outline=color, fill=color if visible[k] else None)
  return np.asarray(image)


def picture(draw: Any, frame: dict[str, Any], compared: Compared) -> np.ndarray:
  """Input, prediction, truth side by side. draw: a group's."""
  rgb = rgb_of(frame["frame"])
  height, width = rgb.shape[:2]
  out = np.full((height, 3 * width + 2 * GAP, 3), 255, np.uint8)
  for k, part in enumerate((rgb, draw(rgb, frame["found"], compared), draw(rgb, frame["ref"], compared))):
    at = k * (width + GAP)
    out[:, at : at + width] = rgb if part is None else part
  return out

"""Mild changes of a picture and its boxes: mirrored, turned and scaled a little, lighter or darker. No crops. A change
that would lose a tiny box is drawn again."""

from dataclasses import dataclass

import cv2
import numpy as np

TINY = 32.0  # pixels of the network's picture: the geometric mean of sides below which a box is tiny
SEEN = 0.5  # share of a tiny box that must stay in the picture
LARGE_SEEN = 0.25  # share of another below which it is left out
DRAWS = 10  # before the picture is left where it is


@dataclass(frozen=True)
class Changes:
  """flip, affine, color: how often. degrees, shear (degrees), shift (share of a side), scale, light (share of the range
  of gray levels, and of contrast): how far."""

  flip: float = 0.5
  affine: float = 0.4
  degrees: float = 5.0
  shear: float = 3.0
  shift: float = 0.03
  scale: tuple[float, float] = (0.9, 1.1)
  color: float = 0.3
  light: float = 0.1


NONE = Changes(0.0, 0.0, color=0.0)
FLIPS = Changes(affine=0.0, color=0.0)


@dataclass
class Changed:
  """rgb (H, W, 3) uint8; boxes (K, 4) float64 x, y, width, height; kept: (K,) places among those before. redrawn: how
  often the affine change was drawn again; still: it was given up."""

  rgb: np.ndarray
  boxes: np.ndarray
  kept: np.ndarray
  redrawn: int = 0
  still: bool = False


def matrix(c: Changes, width: int, height: int, random: np.random.Generator) -> np.ndarray:
  """(2, 3), about the picture's middle; pixels from its corner."""
  angle, shear = (np.deg2rad(random.uniform(-v, v)) for v in (c.degrees, c.shear))
  scale = random.uniform(*c.scale)
  dx, dy = random.uniform(-c.shift, c.shift, 2) * [width, height]
  cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
  a = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, np.tan(shear)], [0, 1]])
  middle = np.array([width, height]) / 2
  return np.concatenate([a, (middle + [dx, dy] - a @ middle)[:, None]], 1)


def moved(boxes: np.ndarray, m: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
  """-> the boxes around the moved corners, cut at the picture's edge, and the share of each that is left."""
  x0, y0 = boxes[:, 0], boxes[:, 1]
  x1, y1 = x0 + boxes[:, 2], y0 + boxes[:, 3]
  corners = np.stack([np.stack([x0, y0], 1), np.stack([x1, y0], 1), np.stack([x1, y1], 1), np.stack([x0, y1], 1)], 1)
  corners = corners @ m[:, :2].T + m[:, 2]
  low, high = corners.min(1), corners.max(1)
  inner_low, inner_high = np.clip(low, 0, [width, height]), np.clip(high, 0, [width, height])
  share = (inner_high - inner_low).prod(1) / np.maximum((high - low).prod(1), 1e-12)
  return np.concatenate([inner_low, inner_high - inner_low], 1), share


def change(rgb: np.ndarray, boxes: np.ndarray, c: Changes, random: np.random.Generator, shrink: float = 1.0) -> Changed:
  """boxes: (K, 4) x, y, width, height in pixels. shrink: what the picture's sides are multiplied by afterwards, for the
  network. The flip is drawn first: without other changes the same generator gives the same flips."""
  h, w = rgb.shape[:2]
  boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
  out = Changed(rgb, boxes, np.arange(len(boxes)))
  if random.random() < c.flip:
    out.rgb = np.ascontiguousarray(rgb[:, ::-1])
    out.boxes = np.concatenate([w - boxes[:, :1] - boxes[:, 2:3], boxes[:, 1:]], 1)
  if random.random() < c.affine:
    tiny = np.sqrt(out.boxes[:, 2:].prod(1)) * shrink < TINY
    for _ in range(DRAWS):
      m = matrix(c, w, h, random)
      placed, share = moved(out.boxes, m, w, h)
      if not (tiny & (share < SEEN)).any():
        keep = np.flatnonzero(tiny | (share >= LARGE_SEEN))
        border = (124, 116, 104)  # ImageNet's mean: what padding is after normalizing
        pixel = m.copy()
        pixel[:, 2] += m[:, :2] @ [0.5, 0.5] - 0.5  # OpenCV counts from pixels' centers
        out.rgb = cv2.warpAffine(out.rgb, pixel, (w, h), flags=cv2.INTER_LINEAR, borderValue=border)
        out.boxes, out.kept = placed[keep], keep
        break
      out.redrawn += 1
    else:
      out.still = True
  if random.random() < c.color:
    gain, add = 1 + random.uniform(-c.light, c.light), 255 * random.uniform(-c.light, c.light)
    table = np.clip((np.arange(256) - 127.5) * gain + 127.5 + add, 0, 255).round().astype(np.uint8)
    out.rgb = table[out.rgb]
  return out

"""Changes of where things are in a picture, by torchvision's v2 transforms, and the same of masks, polygons and boxes.

Points are pixels counted from the picture's corner, as COCO's. A change of pixels alone is distillation/pixels.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from openpilot.tools.fair.labels import rle

FILL = 114  # gray of what comes from outside
STEP = 8.0  # pixels between points of an outline that is bent
ROUNDS = 30  # of the iteration that inverts a field of displacements
LEAST_SIDE, LEAST_SHARE = 2.0, 0.25  # pixels, share of its area: of an object, to be kept

Points = Callable[[np.ndarray], np.ndarray]  # (K, 2) -> (K, 2)


@dataclass
class Sample:
  """rgb (h, w, 3) uint8; boxes (N, 4) x0 y0 x1 y1; of each object a mask (h, w) bool, polygons (K, 2), or None."""

  rgb: np.ndarray
  boxes: np.ndarray
  masks: list[np.ndarray | None] = field(default_factory=list)
  polygons: list[list[np.ndarray] | None] = field(default_factory=list)
  rows: np.ndarray = field(
    default_factory=lambda: np.zeros(0, np.int64)
  )  # which of the first sample's objects are left

  def __post_init__(self) -> None:
    n = len(self.boxes)
    self.masks = self.masks or [None] * n
    self.polygons = self.polygons or [None] * n
    if not len(self.rows):
      self.rows = np.arange(n)


@dataclass(frozen=True)
class Move:
  """image: of (C, h, w) tensors, with interpolation or without; points: where they go. bends: straight lines become
  curves."""

  image: Callable[..., "object"]
  points: Points
  bends: bool = False


def flip(width: int, height: int) -> Move:
  from torchvision.transforms.v2 import functional as F

  return Move(lambda x, smooth: F.horizontal_flip(x), lambda p: np.stack([width - p[:, 0], p[:, 1]], 1))


def sampling(smooth: bool) -> tuple[Any, list[float]]:
  """Interpolation, and what comes from outside."""
  from torchvision.transforms.v2 import InterpolationMode

  return (InterpolationMode.BILINEAR, [float(FILL)]) if smooth else (InterpolationMode.NEAREST, [0.0])


def affine(
  width: int,
  height: int,
  angle: float = 0.0,
  shift: tuple[float, float] = (0.0, 0.0),
  scale: float = 1.0,
  shear: tuple[float, float] = (0.0, 0.0),
) -> Move:
  """About the picture's center. angle, shear: degrees; shift: whole pixels are used."""
  from torchvision.transforms.v2 import functional as F

  move = [round(v) for v in shift]
  a, sx, sy = np.radians([angle, *shear])
  m = scale * np.array(
    [
      [np.cos(a - sy) / np.cos(sy), -np.cos(a - sy) * np.tan(sx) / np.cos(sy) - np.sin(a)],
      [np.sin(a - sy) / np.cos(sy), -np.sin(a - sy) * np.tan(sx) / np.cos(sy) + np.cos(a)],
    ]
  )
  center = np.array([width / 2, height / 2])

  def image(x: object, smooth: bool) -> object:
    return F.affine(x, angle, [float(v) for v in move], scale, [float(v) for v in shear], *sampling(smooth))

  return Move(image, lambda p: (p - center) @ m.T + center + move)


def perspective(width: int, height: int, corners: np.ndarray) -> Move:
  """corners (4, 2): where the picture's go, from the upper left one clockwise."""
  from torchvision.transforms.v2 import functional as F

  start = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
  end = np.asarray(corners, np.float32)
  m = cv2.getPerspectiveTransform(start, end).astype(np.float64)

  def image(x: object, smooth: bool) -> object:
    return F.perspective(x, start.tolist(), end.tolist(), *sampling(smooth))

  def points(p: np.ndarray) -> np.ndarray:
    q = np.concatenate([p, np.ones((len(p), 1))], 1) @ m.T
    return q[:, :2] / q[:, 2:]

  return Move(image, points)


def bent(width: int, height: int, displacement: np.ndarray) -> Move:
  """displacement (h, w, 2) pixels, smooth: what comes to a pixel lies that far from it."""
  import torch
  from torchvision.transforms.v2 import functional as F

  d = np.ascontiguousarray(displacement, np.float32)
  scaled = torch.from_numpy(d * np.array([2 / width, 2 / height], np.float32))[None]

  def image(x: object, smooth: bool) -> object:
    return F.elastic(x, scaled, *sampling(smooth))

  def points(p: np.ndarray) -> np.ndarray:
    q = p.copy()
    for _ in range(ROUNDS):  # q + d(q) = p
      u, v = (np.ascontiguousarray(q[:, k : k + 1] - 0.5, np.float32) for k in (0, 1))
      q = p - cv2.remap(d, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[:, 0]
    return q

  return Move(image, points, True)


def grid(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
  """(h, w) x and y of pixels' centers."""
  return np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)


def lens(width: int, height: int, k: float) -> Move:
  """A wide lens: k > 0 bends straight lines outwards in the middle (a barrel), by k of the radius at the far side."""
  x, y = grid(width, height)
  u, v = x - width / 2, y - height / 2
  r2 = (u * u + v * v) / (max(width, height) / 2) ** 2
  return bent(width, height, np.stack([u * k * r2, v * k * r2], -1))


def rolling(width: int, height: int, skew: float, wave: float, turns: float, phase: float) -> Move:
  """Rows read one after the other while the camera turns: skewed by `skew` pixels over the height, and shaken by `wave`
  pixels."""
  _, y = grid(width, height)
  dx = skew * (y / height - 0.5) + wave * np.sin(2 * np.pi * turns * y / height + phase)
  return bent(width, height, np.stack([dx, np.zeros_like(dx)], -1))


def elastic(width: int, height: int, size: float, smooth: float, r: np.random.Generator) -> Move:
  """Random displacements of at most about `size` pixels that change over about `smooth` pixels."""
  coarse = max(3, round(width / smooth)), max(3, round(height / smooth))
  d = r.uniform(-1, 1, (coarse[1], coarse[0], 2)).astype(np.float32) * np.float32(size)
  return bent(width, height, cv2.resize(d, (width, height), interpolation=cv2.INTER_CUBIC))


def dense(outline: np.ndarray) -> np.ndarray:
  """A closed outline (K, 2) with points at most STEP apart."""
  out = []
  for a, b in zip(outline, np.roll(outline, -1, axis=0), strict=True):
    n = max(1, int(np.ceil(np.hypot(*(b - a)) / STEP)))
    out.append(a + (b - a) * (np.arange(n) / n)[:, None])
  return np.concatenate(out) if out else outline


def cut(outline: np.ndarray, width: float, height: float) -> np.ndarray:
  """What of a polygon (K, 2) lies in the picture (Sutherland and Hodgman 1974): (M, 2), maybe none."""
  p = outline
  for axis, limit, sign in ((0, 0.0, 1), (0, width, -1), (1, 0.0, 1), (1, height, -1)):
    if not len(p):
      break
    inside = sign * (p[:, axis] - limit) >= 0
    out = []
    for i in range(len(p)):
      j = i - 1
      if inside[i] != inside[j]:
        t = (limit - p[j, axis]) / (p[i, axis] - p[j, axis])
        out.append(p[j] + t * (p[i] - p[j]))
      if inside[i]:
        out.append(p[i])
    p = np.array(out).reshape(-1, 2)
  return p


def area(outline: np.ndarray) -> float:
  """Of a simple polygon (K, 2), square pixels."""
  x, y = outline[:, 0], outline[:, 1]
  return 0.5 * abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) if len(outline) > 2 else 0.0


def corners(box: np.ndarray) -> np.ndarray:
  x0, y0, x1, y1 = box
  return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float64)


def around(points: np.ndarray) -> np.ndarray:
  return np.concatenate([points.min(0), points.max(0)])


def moved(sample: Sample, moves: Sequence[Move]) -> Sample:
  """All of a sample through `moves`, one after the other. Boxes are those around masks and polygons where there are
  any, else around what a box's outline becomes; objects of which too little is left are dropped."""
  if not moves:
    return sample
  import torch
  from torchvision import tv_tensors

  h, w = sample.rgb.shape[:2]
  image = torch.from_numpy(np.ascontiguousarray(sample.rgb.transpose(2, 0, 1)))
  drawn = [i for i, m in enumerate(sample.masks) if m is not None]
  stack = torch.from_numpy(np.stack([sample.masks[i] for i in drawn]).astype(np.uint8)) if drawn else None  # type: ignore[misc]
  picture: object = tv_tensors.Image(image)
  masks: object = tv_tensors.Mask(stack) if stack is not None else None
  for m in moves:
    picture = m.image(picture, True)
    masks = m.image(masks, False) if masks is not None else None

  def through(outline: np.ndarray) -> np.ndarray:
    p = outline.astype(np.float64)
    for m in moves:
      p = m.points(dense(p) if m.bends else p)
    return p

  new_masks = {i: np.asarray(masks[k]) > 0 for k, i in enumerate(drawn)} if masks is not None else {}  # type: ignore[index]
  boxes, kept_masks, kept_polygons, keep = [], [], [], []
  for i in range(len(sample.boxes)):
    whole = through(corners(sample.boxes[i]))
    left = cut(whole, w, h)
    polygons = sample.polygons[i]
    parts = None if polygons is None else [q for p in polygons if area(q := cut(through(p), w, h)) > 0]
    mask = new_masks.get(i)
    if area(left) < LEAST_SHARE * area(whole) or (parts is not None and not parts):
      continue
    if mask is not None and not mask.any():
      continue
    box = box_of(mask, parts, left)
    if (box[2:] - box[:2] < LEAST_SIDE).any():
      continue
    boxes.append(box)
    kept_masks.append(mask)
    kept_polygons.append(parts)
    keep.append(i)
  rgb = np.ascontiguousarray(np.asarray(picture).transpose(1, 2, 0))
  return Sample(rgb, np.array(boxes).reshape(-1, 4), kept_masks, kept_polygons, sample.rows[keep])


def box_of(mask: np.ndarray | None, polygons: list[np.ndarray] | None, outline: np.ndarray) -> np.ndarray:
  """Around the most exact that is known of an object."""
  if polygons:
    return around(np.concatenate(polygons))
  if mask is not None:
    return rle.boxes_of(mask[None])[0].astype(np.float64) + 0.5
  return around(outline)

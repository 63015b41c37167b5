"""Boxes and masks in pixels counted from the picture's corner: scaled, turned as EXIF turns the picture, cut at its
edge; one tight box and the area of each mask."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from openpilot.tools.fair.labels import rle

# EXIF's orientation -> what Pillow does with the picture
TURNS = {
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
Shape = list[np.ndarray] | dict[str, Any]  # polygons (K, 2), or {'size': [h, w], 'counts': text}


def around(p: np.ndarray) -> tuple[float, float, float, float]:
  """(K, 2) points -> x0 y0 x1 y1."""
  (x0, y0), (x1, y1) = p.min(0), p.max(0)
  return float(x0), float(y0), float(x1), float(y1)


@dataclass(frozen=True)
class Place:
  """From a picture as it was labeled, width x height, to the picture as it is shown, w x h. turn: EXIF's orientation
  where labels are of the picture before it, else 1."""

  width: int
  height: int
  w: int
  h: int
  turn: int = 1

  @property
  def same(self) -> bool:
    return self.turn == 1 and (self.width, self.height) == (self.w, self.h)

  def points(self, p: np.ndarray) -> np.ndarray:
    """(K, 2) x, y -> those of the picture shown."""
    x, y = p[:, 0], p[:, 1]
    if self.turn in TURNS:
      x, y = {5: (y, x), 6: (self.height - y, x), 7: (self.height - y, self.width - x), 8: (y, self.width - x)}[
        self.turn
      ]
      return np.stack([x, y], 1)
    return np.stack([x * (self.w / self.width), y * (self.h / self.height)], 1)

  def box(self, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """x0 y0 x1 y1."""
    return around(self.points(np.array(box, np.float64).reshape(2, 2)))

  def runs(self, shape: dict[str, Any]) -> dict[str, Any]:
    if self.same:
      return shape
    image = Image.fromarray(rle.decode(shape["counts"], self.height, self.width).astype(np.uint8))
    if self.turn in TURNS:
      image = image.transpose(TURNS[self.turn])
    else:
      image = image.resize((self.w, self.h), Image.Resampling.NEAREST)
    return {"size": [self.h, self.w], "counts": rle.encode(np.asarray(image)[None] > 0)[0]}


def cut(points: np.ndarray, w: int, h: int) -> np.ndarray:
  return np.clip(points, 0, [w, h])


def perimeter(polygons: list[np.ndarray]) -> float:
  """Pixels along x and y around all polygons."""
  return float(sum(np.abs(p - np.roll(p, 1, axis=0)).sum() for p in polygons))


def runs_bytes(shape: Shape, w: int, h: int) -> Any:
  """As pycocotools takes it. Polygons must lie in the picture."""
  if isinstance(shape, dict):
    return {"size": shape["size"], "counts": shape["counts"].encode("ascii", "replace")}
  return coco_mask.merge(coco_mask.frPyObjects([p.ravel().tolist() for p in shape], h, w))


def as_runs(mask: Any, w: int, h: int) -> dict[str, Any]:
  """A segmentation of COCO's, polygons or compressed run lengths -> run lengths as text. Polygons must lie in the
  picture."""
  shape = mask if isinstance(mask, dict) else [np.reshape(p, (-1, 2)) for p in mask]
  return {"size": [h, w], "counts": runs_bytes(shape, w, h)["counts"].decode()}


def area_of(shape: Shape, w: int, h: int) -> float:
  """Pixels that a mask covers, those of two polygons once."""
  return float(coco_mask.area(runs_bytes(shape, w, h)))


def tight_box(shape: Shape) -> tuple[float, float, float, float]:
  """x0 y0 x1 y1 around a whole mask: of polygons their points, of run lengths the outer edges of pixels."""
  if isinstance(shape, dict):
    x, y, w, h = coco_mask.toBbox(runs_bytes(shape, 0, 0)).tolist()
    return x, y, x + w, y + h
  return around(np.concatenate(shape))

"""Pictures of a camera whose focal length is known, cut to what openpilot's view shows of them: things then have the
size that they have there."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.labels.sources.pictures import Pictures
from openpilot.tools.fair.labels.sources.source import Said
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.lib.errors import UserError

LEFT = 0.3  # of a box's area that must be in sight
LEAST, MOST = 64, 1 << 14  # pixels of a window's width


def window(width: int, height: int, focal: float, spec: InputSpec) -> tuple[int, int, int, int]:
  """x, y, width, height of the view in the pixels of a picture of this size, whose camera looks level: its horizon is
  its middle row. It may reach beyond the picture. Raises UserError."""
  view = np.array(medmodel_intrinsics, np.float64)
  s = focal / view[0, 0]
  w, h = round(spec.width * s), round(spec.height * s)
  if not LEAST <= w <= MOST:
    raise UserError(f"--focal {focal:g}: the view would be {w} pixels wide in pictures of {width}x{height}")
  return round(width / 2 - view[0, 2] * s), round(height / 2 - view[1, 2] * s), w, h


class Aimed(Pictures):
  """inner: the pictures as they are. focal: of their camera, pixels. What is beyond a picture repeats its edge, as in
  openpilot's view."""

  def __init__(self, inner: Pictures, spec: InputSpec, focal: float):
    self.inner, self.spec, self.focal = inner, spec, focal
    self.name, self.license, self.carries, self.segment = inner.name, inner.license, inner.carries, inner.segment
    self.still = inner.still
    self.stills, self.entries = inner.stills, inner.entries

  @property
  def hash(self) -> str:
    return hashlib.sha256(f"{self.inner.hash} {self.focal}".encode()).hexdigest()

  def window(self, row: int) -> tuple[int, int, int, int]:
    return window(*self.inner.size(row), self.focal, self.spec)

  def size(self, row: int) -> tuple[int, int]:
    return self.window(row)[2:]

  def title(self, row: int) -> str:
    return self.inner.title(row)

  def read(self, rows: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    for row, rgb in self.inner.read(rows):
      x, y, w, h = self.window(row)
      ys = np.clip(np.arange(y, y + h), 0, rgb.shape[0] - 1)
      xs = np.clip(np.arange(x, x + w), 0, rgb.shape[1] - 1)
      yield row, np.ascontiguousarray(rgb[ys][:, xs])

  def said(self, row: int) -> Said:
    said = self.inner.said(row)
    x, y, w, h = self.window(row)
    boxes = said.boxes.reshape(-1, 4) - [x, y, x, y]
    cut = np.clip(boxes, -0.5, [w - 0.5, h - 0.5] * 2)
    area = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 1e-6), axis=1)
    keep = np.flatnonzero(np.prod(np.maximum(cut[:, 2:] - cut[:, :2], 0), axis=1) >= LEFT * area)
    masks = [self.moved(said.masks[i], x, y, w, h) for i in keep] if said.masks else []
    return Said(cut[keep], said.cls[keep], masks)

  def moved(self, mask: Any, x: int, y: int, w: int, h: int) -> Any:
    if mask is None:
      return None
    if isinstance(mask, list):  # what lies far outside is not drawn, which would take its length in memory
      return [np.clip(p - [x, y], [-w, -h], [2 * w, 2 * h]) for p in mask]
    full = rle.decode(mask["counts"], *mask["size"]) if isinstance(mask, dict) else np.asarray(mask)
    out = np.zeros((h, w), bool)
    x0, y0 = max(x, 0), max(y, 0)
    part = full[y0 : max(y0, y + h), x0 : max(x0, x + w)]
    out[y0 - y : y0 - y + part.shape[0], x0 - x : x0 - x + part.shape[1]] = part
    return out

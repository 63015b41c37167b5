"""Pictures whose labels are oriented boxes: of polygons and masks the rectangles of least area, of boxes themselves."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.heads.oriented import le90, upright
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.labels.sources.pictures import Pictures
from openpilot.tools.fair.labels.sources.source import Said
from openpilot.tools.fair.rotated import edge_points, min_area_rectangle
from openpilot.tools.fair.spec import UNKNOWN, plain
from openpilot.tools.lib.errors import warn

KEPT = 64  # pictures whose rectangles are remembered


def points_of(mask: Any, size: tuple[int, int]) -> np.ndarray:
  """(K, 2) points around a mask as Said has it, counted from the corner of its picture of `size`, (width, height)."""
  if isinstance(mask, list):
    return np.concatenate([np.asarray(p, np.float64).reshape(-1, 2) for p in mask])
  full = rle.decode(mask["counts"], *mask["size"]) if isinstance(mask, dict) else np.asarray(mask)
  return edge_points(full > 0) * (np.array(size) / full.shape[::-1])  # it may be of another size than the picture


def oriented_of(said: Said, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
  """size: (width, height) of the picture. -> (N, 5) boxes, nan where a mask has no area, and (N,) bool: which come from
  a mask or polygon."""
  out, shaped = np.full((len(said.cls), 5), np.nan), np.zeros(len(said.cls), bool)
  for i, mask in enumerate(said.masks or [None] * len(said.cls)):
    if mask is None:
      x0, y0, x1, y1 = said.boxes[i]
      out[i] = le90(np.array([[(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0, 0.0]]))[0]
      continue
    shaped[i] = True
    box = min_area_rectangle(points_of(mask, size))
    if box is not None:
      out[i] = box - [0.5, 0.5, 0, 0, 0]  # integers at pixel centers
  return out, shaped


class Oriented(Pictures):
  """inner: the pictures as they are read. What is difficult, or of a crowd, keeps its class and is marked."""

  def __init__(self, inner: Pictures):
    self.inner = inner
    self.name, self.license, self.segment, self.still = inner.name, inner.license, inner.segment, inner.still
    self.stills, self.entries = inner.stills, inner.entries
    self.carries = replace(inner.carries, masks=False, oriented=True)
    self.made = lru_cache(KEPT)(self._made)

  @property
  def hash(self) -> str:
    return hashlib.sha256(f"{self.inner.hash} oriented".encode()).hexdigest()

  def size(self, row: int) -> tuple[int, int]:
    return self.inner.size(row)

  def title(self, row: int) -> str:
    return self.inner.title(row)

  def read(self, rows: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    return self.inner.read(rows)

  def _made(self, row: int) -> tuple[Said, Counter[str]]:
    """-> what is said of a picture, and how many labels are left out or guessed, by reason."""
    said, counts = self.inner.said(row), Counter[str]()
    boxes, shaped = oriented_of(said, self.size(row))
    good = np.isfinite(boxes).all(1)
    unknown = [k for k, n in enumerate(self.carries.boxes or ()) if plain(n) in UNKNOWN]
    difficult = np.isin(said.cls, unknown)
    if said.difficult is not None:
      difficult |= said.difficult
    counts["outlines without an area are left out"] += int((~good).sum())
    counts["labels have no outline: their upright boxes are taken"] += int((good & ~shaped).sum())
    kept = boxes[good]
    out = Said(upright(kept), said.cls[good], oriented=kept, difficult=difficult[good])
    return out, counts

  def said(self, row: int) -> Said:
    return self.made(row)[0]


def orient(parts: list[Pictures]) -> list[Pictures]:
  """All labels as oriented boxes; what is left out or guessed is told."""
  made = [Oriented(p) for p in parts]
  for p in made:
    counts: Counter[str] = Counter()
    for row in range(len(p.entries)):
      counts += p.made(row)[1]
    for why, n in counts.items():
      warn(f"{p.segment.route}: {n} {why}")
  return list[Pictures](made)

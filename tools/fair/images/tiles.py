"""Large pictures in tiles that overlap, as DOTA_devkit cuts them (ImgSplit) and puts results together again
(ResultMerge)."""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from openpilot.selfdrive.modeld.fair.heads.objects import intersection
from openpilot.selfdrive.modeld.fair.heads.oriented import corners, upright
from openpilot.tools.fair.images.geometry import area, cut
from openpilot.tools.fair.labels.sources.pictures import Pictures, Still
from openpilot.tools.fair.labels.sources.source import Said
from openpilot.tools.fair.rotated import min_area_rectangle, pair_iou
from openpilot.tools.lib.errors import UserError

LEFT = 0.7  # of an object's area: what has no more of it in a tile is difficult there
OVERLAP = 200  # pixels, of DOTA_devkit's tiles of 1024
SAME = 0.3  # rotated IoU above which two boxes of a class from different tiles are one thing
Window = tuple[int, int, int, int]  # x, y, width, height


def check_tiles(tile: int, overlap: int) -> None:
  """Raises UserError. tile: 0 where none is asked for."""
  if tile and not (tile >= 64 and 0 <= overlap < tile):
    raise UserError(
      f"--tile {tile} --overlap {overlap}: a tile has at least 64 pixels, and overlaps by less than itself"
    )


def starts(length: int, side: int, overlap: int) -> list[int]:
  """Where tiles begin along an edge: side - overlap apart, the last at the picture's end."""
  out = list(range(0, max(length - side, 0), side - overlap))
  return [*out, max(length - side, 0)]


def windows(width: int, height: int, side: int, overlap: int) -> list[Window]:
  """Of a picture; a smaller one is one tile of its own size."""
  return [
    (x, y, min(side, width), min(side, height))
    for y in starts(height, side, overlap)
    for x in starts(width, side, overlap)
  ]


def cut_boxes(boxes: np.ndarray, window: Window) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(N, 5) counted from the picture's corner -> (K, 5) counted from the window's, of what is inside the rectangles of
  least area; (K,) which they are; (K,) share of their area that is inside. DOTA_devkit leaves out what a window cuts to
  more than five corners; here it stays."""
  x, y, w, h = window
  boxes, size = boxes - [x, y, 0, 0, 0], np.array([w, h], float)
  kept, rows, shares = [], [], []
  for i, p in enumerate(corners(boxes)):
    if (p.max(0) <= 0).any() or (p.min(0) >= size).any():
      continue
    box, share = boxes[i], 1.0
    if (p < 0).any() or (p > size).any():
      piece = cut(p, w, h)
      found = min_area_rectangle(piece)
      if found is None:
        continue
      box, share = found, area(piece) / max(box[2] * box[3], 1e-9)
    kept.append(box)
    rows.append(i)
    shares.append(share)
  return np.array(kept).reshape(-1, 5), np.array(rows, int), np.array(shares)


class Tiled(Pictures):
  """inner: pictures whose labels are oriented boxes; each of their tiles is a picture here."""

  def __init__(self, inner: Pictures, side: int, overlap: int):
    self.inner, self.how = inner, (side, overlap)
    self.name, self.license, self.carries, self.segment = inner.name, inner.license, inner.carries, inner.segment
    self.places: list[tuple[int, Window]] = []
    stills = []
    for row in range(len(inner.entries)):
      there = Path(inner.title(row))
      for window in windows(*inner.size(row), side, overlap):
        self.places.append((row, window))
        x, y, w, h = window
        stills.append(Still(there, str(there.with_name(f"{there.stem}__{x}_{y}{there.suffix}")), w, h))
    self.keep(stills)
    self.picture = lru_cache(1)(self._picture)

  @property
  def hash(self) -> str:
    return hashlib.sha256(f"{self.inner.hash} tiles {self.how}".encode()).hexdigest()

  def _picture(self, row: int) -> np.ndarray:
    ((_, rgb),) = self.inner.read([row])
    return rgb

  def read(self, rows: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    for r in rows:
      row, (x, y, w, h) = self.places[r]
      yield r, np.ascontiguousarray(self.picture(row)[y : y + h, x : x + w])

  def said(self, row: int) -> Said:
    of, window = self.places[row]
    said = self.inner.said(of)
    if said.oriented is None or said.difficult is None:
      return Said()
    boxes, rows, shares = cut_boxes(said.oriented + [0.5, 0.5, 0, 0, 0], window)
    boxes -= [0.5, 0.5, 0, 0, 0]
    return Said(upright(boxes), said.cls[rows], oriented=boxes, difficult=said.difficult[rows] | (shares <= LEFT))


def tiled(parts: list[Pictures], side: int, overlap: int) -> list[Pictures]:
  """side: 0 leaves pictures whole."""
  return [Tiled(p, side, overlap) for p in parts] if side else parts


def merged(boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray) -> np.ndarray:
  """(N, 5) of all tiles in the picture's pixels -> indices of those that stay, best first: in each class, the best
  first, what overlaps it by more than SAME goes."""
  order = np.argsort(-scores, kind="stable")
  around, alive = upright(boxes), np.ones(len(boxes), bool)
  kept = []
  for i in order:
    if not alive[i]:
      continue
    kept.append(i)
    alive[i] = False
    near = np.flatnonzero(alive & (classes == classes[i]))
    near = near[intersection(around[i : i + 1], around[near])[0] > 0]
    if len(near):
      alive[near[pair_iou(np.repeat(boxes[i : i + 1], len(near), 0), boxes[near]) > SAME]] = False
  return np.array(kept, int)

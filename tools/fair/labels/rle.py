"""Masks as COCO run lengths (pycocotools): about a thousandth of the pixels, and what every annotation tool reads."""

import numpy as np
from pycocotools import mask as coco

from openpilot.tools.lib.errors import UserError


def encode(masks: np.ndarray) -> list[str]:
  """(N, H, W) bool -> N compressed COCO counts. The size is not in them: the label says it."""
  if not len(masks):
    return []
  return [
    r["counts"].decode("ascii") for r in coco.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
  ]


def decode(counts: list[str] | str, height: int, width: int) -> np.ndarray:
  """-> (N, H, W) bool, or (H, W) of a single string. Raises UserError where counts do not add up to the size."""
  if isinstance(counts, str):
    return decode([counts], height, width)[0]
  for c in counts:
    if total(c) != height * width:
      raise UserError(
        f"a mask's run lengths cover {total(c)} pixels, not {width}x{height}; the label is of another view or damaged"
      )
  if not counts:
    return np.zeros((0, height, width), bool)
  return (
    coco.decode([{"size": [height, width], "counts": c.encode("ascii")} for c in counts])
    .transpose(2, 0, 1)
    .astype(bool)
  )


def total(counts: str) -> int:
  """Pixels that compressed counts cover. pycocotools writes beyond its array where they are more than the size says."""
  runs: list[int] = []
  value = shift = 0
  for char in counts.encode("ascii", "replace"):
    bits = char - 48
    if shift > 60:  # no run is so long; such numbers would grow with the text
      return -1
    value |= (bits & 0x1F) << shift
    shift += 5
    if not bits & 0x20:
      if bits & 0x10:
        value -= 1 << shift
      runs.append(value + (runs[-2] if len(runs) > 2 else 0))
      value = shift = 0
  return sum(runs) if min(runs, default=0) >= 0 and shift == 0 else -1


def boxes_of(masks: np.ndarray) -> np.ndarray:
  """(N, H, W) bool -> (N, 4) float32 x0 y0 x1 y1, the outer edges of the pixels set (integers are pixel centers); nan
  where none is."""
  out = np.full((len(masks), 4), np.nan, np.float32)
  for i, m in enumerate(masks):
    xs, ys = np.flatnonzero(m.any(axis=0)), np.flatnonzero(m.any(axis=1))
    if len(xs):
      out[i] = xs[0] - 0.5, ys[0] - 0.5, xs[-1] + 0.5, ys[-1] + 0.5
  return out

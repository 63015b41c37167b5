"""Masks as COCO's compressed run lengths, many at once, bit for bit what pycocotools makes of them."""

import numpy as np

CHUNKS = 7  # five bits each: enough for any 32-bit difference


def encode_masks(masks: np.ndarray) -> list[str]:
  """(M, H, W) bool -> M strings: runs down the columns, beginning with one of False, each after the second less the one
  two before, base 32 from '0' up."""
  m, h, w = masks.shape
  if not m:
    return []
  size = h * w
  edges = np.empty((m, h, w), bool)  # where a run begins; the first begins with False
  np.not_equal(masks[:, 1:], masks[:, :-1], out=edges[:, 1:])
  np.not_equal(masks[:, 0, 1:], masks[:, -1, :-1], out=edges[:, 0, 1:])
  edges[:, 0, 0] = masks[:, 0, 0]
  row, i = np.divmod(edges.reshape(-1).nonzero()[0], size)
  i, j = np.divmod(i, w)
  # where runs end, counted through all masks and down the columns: there where another begins, and with the mask. They
  # are few: putting them in order takes less than turning the masks
  ends, bounds = np.empty(len(row) + m, np.int64), np.arange(1, m + 1) * size
  ends[:m], ends[m:] = bounds, row * size + j * h + i
  ends.sort()
  last = ends.searchsorted(bounds)  # of each mask's runs; what a mask that begins with True ends there comes after it
  first = np.empty_like(last)
  first[0], first[1:] = 0, last[:-1] + 1
  counts = ends.copy()
  counts[1:] -= ends[:-1]
  delta = counts.copy()
  delta[2:] -= counts[:-2]
  start = np.minimum(first + np.arange(3)[:, None], last)  # nothing comes off the first three
  delta[start] = counts[start]
  # little end first, bit 5 says that more follow; the sign is bit 4 of the last
  size_of = delta ^ (delta >> 63)  # what a number and its sign take: its own bits, or those of -1 - it
  chunks = (int(size_of.max()).bit_length() + 5) // 5
  shift = 5 * np.arange(chunks)
  more = size_of[:, None] >= (16 << shift)
  chars = ((delta[:, None] >> shift) & 0x1F) + (more * 32 + 48)
  used = np.ones_like(more)
  used[:, 1:] = more[:, :-1]
  text = chars[used].astype(np.uint8).tobytes().decode("ascii")
  stops = used.cumsum()[(last + 1) * chunks - 1].tolist()
  return [text[a:b] for a, b in zip([0, *stops[:-1]], stops, strict=True)]


def decode_mask(counts: str, h: int, w: int) -> np.ndarray:
  """The inverse for one mask -> (h, w) bool. Raises ValueError where the runs do not fill it."""
  runs: list[int] = []
  value = shift = 0
  for c in counts.encode():
    c -= 48
    if not 0 <= c < 64 or shift >= 5 * CHUNKS:
      raise ValueError(f"'{counts[:20]}' is not a mask in COCO's compressed form")
    value |= (c & 0x1F) << shift
    shift += 5
    if c & 0x20:
      continue
    if c & 0x10:
      value -= 1 << shift
    runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    value = shift = 0
  if shift or any(r < 0 for r in runs) or sum(runs) != h * w:
    raise ValueError(f"runs cover {sum(runs)} pixels, the mask has {h * w}")
  return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(w, h).T

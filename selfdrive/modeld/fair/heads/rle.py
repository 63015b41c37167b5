"""Masks as COCO's compressed run lengths, many at once, bit for bit what pycocotools makes of them."""
import numpy as np

CHUNKS = 7   # five bits each: enough for any 32-bit difference


def encode_masks(masks: np.ndarray) -> list[str]:
  """(M, H, W) bool -> M strings: runs down the columns, beginning with one of False, each after the second less the one two before, base 32 from '0' up."""
  m = len(masks)
  if not m:
    return []
  flat = np.ascontiguousarray(masks.transpose(0, 2, 1)).reshape(m, -1)
  size = flat.shape[1]
  edges = np.empty((m, size), bool)   # where a run begins; the first begins with False
  edges[:, 0] = flat[:, 0]
  np.not_equal(flat[:, 1:], flat[:, :-1], out=edges[:, 1:])
  at = np.flatnonzero(edges)
  row = at // size
  per = np.bincount(row, minlength=m) + 1          # runs of each mask
  last = np.cumsum(per) - 1                        # index of each mask's last run
  first = last - per + 1
  ends = np.empty(per.sum(), np.int64)
  ends[last] = size
  inner = np.ones(len(ends), bool)
  inner[last] = False
  ends[inner] = at - row * size
  counts = np.diff(ends, prepend=0)
  counts[first] = ends[first]
  delta = counts.copy()
  rank = np.arange(len(ends)) - np.repeat(first, per)
  later = np.flatnonzero(rank > 2)
  delta[later] -= counts[later - 2]
  # little end first, bit 5 says that more follow; the sign is bit 4 of the last
  parts = delta[:, None] >> (5 * np.arange(CHUNKS))
  rest = parts >> 5
  more = np.where(parts & 0x10, rest != -1, rest != 0)
  chars = ((parts & 0x1f) | (more << 5)).astype(np.uint8) + 48
  used = np.ones_like(more)
  np.logical_and.accumulate(more[:, :-1], axis=1, out=used[:, 1:])
  text = chars[used].tobytes().decode("ascii")
  stops = np.cumsum(np.add.reduceat(used.sum(1), first)).tolist()
  return [text[a:b] for a, b in zip([0, *stops[:-1]], stops, strict=True)]


def decode_mask(counts: str, h: int, w: int) -> np.ndarray:
  """The inverse for one mask -> (h, w) bool. Raises ValueError where the runs do not fill it."""
  runs: list[int] = []
  value = shift = 0
  for c in counts.encode():
    c -= 48
    if not 0 <= c < 64 or shift >= 5 * CHUNKS:
      raise ValueError(f"'{counts[:20]}' is not a mask in COCO's compressed form")
    value |= (c & 0x1f) << shift
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

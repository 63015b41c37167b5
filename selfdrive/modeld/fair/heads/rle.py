"""Masks as COCO's compressed run lengths, many at once, bit for bit what pycocotools makes of them."""
import numpy as np

CHUNKS = 7   # five bits each: enough for any 32-bit difference


def encode_masks(masks: np.ndarray) -> list[str]:
  """(M, H, W) bool -> M strings: runs down the columns, beginning with one of False, each after the second less the one two before, base 32 from '0' up."""
  m, h, w = masks.shape
  if not m:
    return []
  size = h * w
  edges = np.empty((m, h, w), bool)   # where a run begins; the first begins with False
  np.not_equal(masks[:, 1:], masks[:, :-1], out=edges[:, 1:])
  np.not_equal(masks[:, 0, 1:], masks[:, -1, :-1], out=edges[:, 0, 1:])
  edges[:, 0, 0] = masks[:, 0, 0]
  at = edges.reshape(-1).nonzero()[0]
  row, i = np.divmod(at, size)
  i, j = np.divmod(i, w)
  at = row * size + j * h + i   # down the columns. They are few: putting them in order takes less than turning the masks
  at.sort()
  per = np.bincount(row, minlength=m) + 1          # runs of each mask
  last = np.cumsum(per) - 1                        # index of each mask's last run
  first = last - per + 1
  ends = np.empty(per.sum(), np.int64)
  ends[last] = size
  inner = np.ones(len(ends), bool)
  inner[last] = False
  ends[inner] = at - row * size
  counts = ends.copy()
  counts[1:] -= ends[:-1]
  counts[first] = ends[first]
  delta = counts.copy()
  rank = np.arange(len(ends)) - np.repeat(first, per)
  later = (rank > 2).nonzero()[0]
  delta[later] -= counts[later - 2]
  # little end first, bit 5 says that more follow; the sign is bit 4 of the last
  chunks = (int(np.abs(delta).max()).bit_length() + 5) // 5   # with the sign
  parts = delta[:, None] >> (5 * np.arange(chunks))
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

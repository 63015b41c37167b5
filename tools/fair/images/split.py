"""Splits pictures into parts: the same ones on every machine, groups whole, every class in its share."""

from dataclasses import dataclass

import numpy as np

from openpilot.tools.fair.images.twins import shuffled
from openpilot.tools.lib.errors import UserError, printable
from openpilot.tools.lib.files import LONG

MOST = 20  # parts
OFF = 0.1  # by which a part may miss its share without a word


@dataclass(frozen=True)
class Part:
  name: str
  share: float


def read_split(text: str) -> tuple[Part, ...]:
  """'train:0.7,val:0.15,test:0.15'. Raises UserError."""
  parts = []
  for word in text.split(","):
    name, _, share = word.strip().partition(":")
    try:
      value = float(share)
    except ValueError:
      value = -1.0
    plain = name.replace("-", "").replace("_", "")
    if not (plain.isascii() and plain.isalnum()) or not 0 < value <= 1:
      raise UserError(f"--split: '{printable(word, 60)}' is no NAME:SHARE, as in train:0.7,val:0.15,test:0.15")
    parts.append(Part(name, value))
  if len({p.name for p in parts}) < len(parts) or len(parts) > MOST:
    raise UserError(f"--split: {printable(text, LONG)} names a part twice, or more than {MOST}")
  if abs(sum(p.share for p in parts) - 1) > 0.005:
    raise UserError(f"--split: the shares of {printable(text, LONG)} add up to {sum(p.share for p in parts):g}, not 1")
  return tuple(parts)


def has_classes(classes: list[set[int]], count: int) -> np.ndarray:
  """Of each picture its classes' indices -> (N, count) bool."""
  out = np.zeros((len(classes), count), bool)
  for row, found in enumerate(classes):
    out[row, sorted(found)] = True
  return out


def split(
  groups: list[list[int]], names: list[str], classes: np.ndarray, parts: tuple[Part, ...], seed: int, stratify: bool
) -> np.ndarray:
  """groups: indices of pictures that stay together. names: of the pictures. classes: (N, C) bool. -> (N,) index of the
  part of each picture.

  Stratified after Sechidis, Tsoumakas and Vlahavas (2011): the class of which fewest pictures are left goes first, each
  group to the part that lacks most of it. Afterwards a class that a part has nothing of, though it has as many groups
  as there are parts, is moved there where that takes no class from another part, and sizes are made good. Single moves
  do not always reach that: table_lines() says what a part lacks."""
  order = {i: k for k, i in enumerate(shuffled(names, seed))}
  groups = sorted(groups, key=lambda g: min(order[i] for i in g))
  size = np.array([len(g) for g in groups], np.float64)
  table = np.stack([classes[g].sum(0) for g in groups]).astype(np.float64)  # pictures of each class in each group
  share = np.array([p.share for p in parts])
  need_size = share * size.sum()
  if not stratify:
    table = table[:, :0]
  part = np.full(len(groups), -1)
  need = share[:, None] * table.sum(0)
  left = table.sum(0)

  def give(g: int, p: int) -> None:
    part[g] = p
    need[p] -= table[g]
    need_size[p] -= size[g]
    left[:] -= table[g]

  while (left > 0).any():
    c = int(np.where(left > 0, left, np.inf).argmin())
    todo = [g for g in range(len(groups)) if part[g] < 0 and table[g, c]]
    for g in sorted(todo, key=lambda g: -size[g]):  # large ones while there is room
      give(g, best(need[:, c], need_size, size[g]))
  for g in sorted(np.flatnonzero(part < 0).tolist(), key=lambda g: -size[g]):
    give(g, best(need_size, need_size, size[g]))
  fill(part, table, size, len(parts))
  balance(part, table, size, share)
  out = np.empty(len(names), np.int64)
  for members, p in zip(groups, part, strict=True):
    out[members] = p
  return out


def best(need: np.ndarray, need_size: np.ndarray, size: float) -> int:
  """The part that lacks most, of those that have room for most of a group of this size, if any; of equals the one that
  lacks most pictures, then the first."""
  room = need_size >= size / 2
  able = np.where(room | ~room.any(), need, -np.inf)
  equal = np.flatnonzero(able >= able.max() - 1e-9)
  return int(equal[need_size[equal].argmax()])


def fill(part: np.ndarray, table: np.ndarray, size: np.ndarray, parts: int) -> None:
  """Moves groups, the smallest first, so that each part has something of each class that has enough of them."""
  has = table > 0
  enough = has.sum(0) >= parts
  count = np.stack([has[part == p].sum(0) for p in range(parts)])  # (P, C) groups
  for c in np.argsort(has.sum(0), kind="stable"):
    for p in np.flatnonzero(count[:, c] == 0) if enough[c] else ():
      able = [
        g
        for g in np.flatnonzero(has[:, c])
        if not (enough & has[g] & (count[part[g]] < 2)).any()  # the last of a class stays
      ]
      if able:
        g = min(able, key=lambda g: (size[g], -count[part[g], c], g))
        count[part[g]] -= has[g]
        count[p] += has[g]
        part[g] = p


def balance(part: np.ndarray, table: np.ndarray, size: np.ndarray, share: np.ndarray) -> None:
  """Moves groups from parts that are too large to those that are too small, where no part loses its last of a class:
  always the group whose classes the one has too much of and the other too little."""
  has, total = table > 0, np.maximum(table.sum(0), 1)
  count = np.stack([has[part == p].sum(0) for p in range(len(share))])
  over = np.stack([table[part == p].sum(0) for p in range(len(share))]) - share[:, None] * table.sum(0)
  for _ in range(len(part)):
    surplus = np.array([size[part == p].sum() for p in range(len(share))]) - share * size.sum()
    p, q = int(surplus.argmax()), int(surplus.argmin())
    own = np.flatnonzero((part == p) & (size < surplus[p] - surplus[q]))
    own = own[~(has[own] & (count[p] < 2)).any(1)]
    if not len(own):
      return
    gain = (table[own] * ((over[p] - over[q]) / total)).sum(1)
    near = np.abs(size[own] - min(surplus[p], -surplus[q]))
    g = int(own[np.lexsort((own, -gain, near))[0]])
    count[p] -= has[g]
    count[q] += has[g]
    over[p] -= table[g]
    over[q] += table[g]
    part[g] = q


def table_lines(
  parts: tuple[Part, ...], part: np.ndarray, classes: np.ndarray, names: list[str]
) -> tuple[list[str], list[str]]:
  """Pictures of each class in each part -> lines of a table, and what is to be said of it."""
  total = len(part)
  counts = [int((part == k).sum()) for k in range(len(parts))]
  wide = max([len("pictures"), *(min(len(n), 24) for n in names)])
  rows = [f"{'':{wide}}  " + "  ".join(f"{p.name:>10}" for p in parts)]
  rows.append(f"{'pictures':{wide}}  " + "  ".join(f"{f'{n} ({n / total:.0%})':>10}" for n in counts))
  per = np.stack([classes[part == k].sum(0) for k in range(len(parts))])
  for c in np.argsort(-per.sum(0), kind="stable"):
    cells = [f"{f'{n} ({n / max(per[:, c].sum(), 1):.0%})':>10}" for n in per[:, c].tolist()]
    rows.append(f"{printable(names[c], 24):{wide}}  " + "  ".join(cells))
  said = []
  for p, n in zip(parts, counts, strict=True):
    if not n or abs(n / total - p.share) > OFF:
      said.append(
        f"'{p.name}' has {n} of {total} pictures, not {p.share:.0%}: what stays together, or rare "
        "classes, leave no other way; --no-videos keeps only pictures that look alike together"
      )
  for p, row in zip(parts, per, strict=True):
    lacking = [printable(names[c], 24) for c in np.flatnonzero((row == 0) & (per.sum(0) > 0))]
    if lacking:
      more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
      said.append(f"'{p.name}' has nothing of {', '.join(lacking[:5])}{more}")
  return rows, said

"""Which track is which detection: pairs of rows and columns that make the largest sum. Exact, and quick where few rows
share a column."""

import numpy as np


def assign(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(N, M) -> rows and columns of the pairs that make the largest sum of positive values, each row and column at most
  once, by rising row. Exact. NaN is no pair; of infinite values as many as can be are taken.

  A pair worth more than what its row and its column could get elsewhere, together, is in every such set: without it the
  sum would be less. Most are, and only the others are solved."""
  n, m = value.shape
  at = (value > 0).ravel().nonzero()[0]
  rows = at // max(m, 1)
  worth = value.ravel()[at]
  if not np.isfinite(worth).all():  # as many of the infinite as can be, and then the largest sum of the others
    worth = np.where(np.isinf(worth), 1.0 + 2.0 * worth[np.isfinite(worth)].sum(), worth)
  pairs = list(zip(rows.tolist(), (at - rows * m).tolist(), worth.tolist(), strict=True))  # few: lists beat arrays
  row_best, row_next, column_best, column_next = [0.0] * n, [0.0] * n, [0.0] * m, [0.0] * m
  for i, j, v in pairs:
    if v > row_best[i]:
      row_best[i], row_next[i] = v, row_best[i]
    elif v > row_next[i]:
      row_next[i] = v
    if v > column_best[j]:
      column_best[j], column_next[j] = v, column_best[j]
    elif v > column_next[j]:
      column_next[j] = v
  found = [(i, j) for i, j, v in pairs if v == row_best[i] == column_best[j] and v > row_next[i] + column_next[j]]
  if len(found) < len(pairs):
    for i, j in found:
      row_best[i] = column_best[j] = 0.0  # taken
    if rest := [(i, j, v) for i, j, v in pairs if row_best[i] and column_best[j]]:
      found = sorted(found + solve(rest))
  return np.array([i for i, _ in found], np.intp), np.array([j for _, j in found], np.intp)


def solve(pairs_left: list[tuple[int, int, float]]) -> list[tuple[int, int]]:
  """The pairs of assign() among those given: row, column, positive value.

  Rows that share no possible column, by however many steps, do not touch each other, so each such group is solved by
  itself: in those of one row or one column the best pair is the answer, the others take the Hungarian method."""
  pairs: dict[int, dict[int, float]] = {}  # row -> column -> value
  for i, j, v in pairs_left:
    pairs.setdefault(i, {})[j] = v
  group: dict[int, list[int]] = {}  # column -> the rows of its group; the same list for all columns of a group
  for i, of_row in pairs.items():
    joined = [i]
    for j in of_row:
      other = group.get(j)
      if other is not None and other is not joined:
        joined += other
        for k in other:
          group.update(dict.fromkeys(pairs[k], joined))
      group[j] = joined
  out: list[tuple[int, int]] = []
  for r in {id(g): g for g in group.values()}.values():
    if len(r) == 1:
      of_row = pairs[r[0]]
      out.append((r[0], max(of_row, key=of_row.__getitem__)))
      continue
    r.sort()
    c = sorted({j for i in r for j in pairs[i]})
    if len(c) == 1:
      out.append((max(r, key=lambda i: pairs[i][c[0]]), c[0]))
    else:
      out += [(r[i], c[j]) for i, j in hungarian([[pairs[i].get(j, 0.0) for j in c] for i in r])]
  return out


def hungarian(value: list[list[float]]) -> list[tuple[int, int]]:
  """The pairs of assign() in a small matrix: shortest augmenting paths, O(n^2 m). Values of 0 and less stand for 'not'.
  Of this size lists beat arrays."""
  n, m = len(value), len(value[0])
  if n > m:
    return [(i, j) for j, i in hungarian([list(c) for c in zip(*value, strict=True)])]
  cost = [[-max(v, 0.0) for v in row] for row in value]
  u, v = [0.0] * (n + 1), [0.0] * (m + 1)  # potentials; index 0 stands for 'none'
  owner, way = [0] * (m + 1), [0] * (m + 1)  # the row of each column; the column before it on the path
  for row in range(1, n + 1):
    owner[0], j = row, 0
    least, used, free = [float("inf")] * (m + 1), [0], list(range(1, m + 1))
    while True:
      i, delta, best = owner[j], float("inf"), 0
      line, at = cost[i - 1], u[i]
      for k in free:
        reduced = line[k - 1] - at - v[k]
        if reduced < least[k]:
          least[k], way[k] = reduced, j
        if least[k] < delta:
          delta, best = least[k], k
      for k in used:
        u[owner[k]] += delta
        v[k] -= delta
      for k in free:
        least[k] -= delta
      j = best
      if owner[j] == 0:
        break
      used.append(j)
      free.remove(j)
    while j:
      owner[j] = owner[way[j]]
      j = way[j]
  return [(owner[j] - 1, j - 1) for j in range(1, m + 1) if owner[j] and value[owner[j] - 1][j - 1] > 0]

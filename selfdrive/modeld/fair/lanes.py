"""The host's side of a graph that tracks lane points: which slots are in use, where points begin, which line they belong to, and the lines that come of it."""
from dataclasses import dataclass
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.heads.ground import Ground
from openpilot.selfdrive.modeld.fair.heads.lanes import SEED_FAR, LanePoints, fit_lines, on_line

MAX_LINES = 4
MAX_HIDDEN = 40        # frames that a point, or a whole line, lives without being visible: 2 s
MAX_STRAY = 10         # frames that a point may be off its line
STRAY = 6.0            # standard deviations
SAME_LINE = 0.9        # m; a lane is some 3 m wide
UNSUPPORTED = 100      # frames that a line lives which the source of seeds does not see
SEEDS_PER_FRAME = 12   # of a line, after the first: as many as a fast car loses in a frame
VISIBLE = 0.5
ENOUGH = 6             # visible points that make a line certain
FLOOR = 0.02           # weight of a point that is not visible: it still goes where its neighbours go


@dataclass
class Line:
  line_id: int
  prob: float            # mean visibility, less where points are few or far from the curve
  kind: str
  points: np.ndarray     # (P, 2) float32 view pixels, nearest first
  visibility: np.ndarray  # (P,) float32
  road: np.ndarray       # (P, 3) float32 metres
  fit: np.ndarray        # (4,) y = sum fit[i] x^i, metres


class LaneTracker:
  """N slots, shared evenly by up to MAX_LINES lines. Each frame: seed(), run the graph on points, mask and fresh, update()."""

  def __init__(self, count: int, view: tuple[int, int], kind: str = "lane"):
    self.view, self.kind = view, kind
    self.per = max(1, count // MAX_LINES)
    self.lines = min(MAX_LINES, count)
    self.points = np.zeros((1, count, 2), np.float32)
    self.mask, self.fresh = np.zeros((1, count), np.float32), np.zeros((1, count), np.float32)
    self.hidden, self.stray = np.zeros(count, np.int64), np.zeros(count, np.int64)
    self.ids, self.unsupported, self.unseen = (np.zeros(self.lines, np.int64) for _ in range(3))   # id 0: no line
    self.fit = np.zeros((self.lines, 4))
    self.next_id = 1

  def reset(self) -> None:
    """Drops all points and lines; the lines' ids never come back."""
    self.mask[:], self.fresh[:], self.ids[:] = 0, 0, 0

  @property
  def wants_seeds(self) -> bool:
    return bool((self.mask[0, :self.lines * self.per] == 0).any() or (self.unsupported[self.ids > 0] > 5).any())

  def _block(self, line: int) -> slice:
    return slice(line * self.per, (line + 1) * self.per)

  def seed(self, seeds: list[np.ndarray], ground: Ground, valid: np.ndarray) -> None:
    """seeds: lines as view pixels (P, 2) from far to near, of the coming frame. Free slots begin on them where their line has the widest gap."""
    self.fresh[:] = 0
    if not seeds:
      return
    self.unsupported[self.ids > 0] += 1
    road = [ground.road(s) for s in seeds]
    pairs = []
    for k, r in enumerate(road):
      near = r[np.isfinite(r[:, 0]) & (r[:, 0] < 40)]
      for line in np.flatnonzero(self.ids):
        if len(near) and (off := float(np.median(np.abs(on_line(self.fit[line], near[:, 0]) - near[:, 1])))) < SAME_LINE:
          pairs.append((off, k, int(line)))
    of_seed: dict[int, int] = {}
    for _, k, line in sorted(pairs):
      if k not in of_seed and line not in of_seed.values():
        of_seed[k] = line
    # lines that begin: those nearest to the car first, while there are free blocks
    for k in sorted((k for k in range(len(seeds)) if k not in of_seed), key=lambda k: abs(float(road[k][-1, 1])) if np.isfinite(road[k][-1, 1]) else np.inf):
      free = np.flatnonzero(self.ids == 0)
      if not free.size:
        break
      line = int(free[0])
      self.ids[line], self.next_id = self.next_id, self.next_id + 1
      self.unseen[line], of_seed[k] = 0, line
      r = road[k][np.isfinite(road[k]).all(1)]
      if len(r):
        self.fit[line] = fit_lines(r[None, :, 0], r[None, :, 1], np.ones((1, len(r))), ground.f)[0][0]
    for k, line in of_seed.items():
      self.unsupported[line] = 0
      self._fill(line, seeds[k], ground, valid)

  def _fill(self, line: int, seed: np.ndarray, ground: Ground, valid: np.ndarray) -> None:
    block = self._block(line)
    free = np.flatnonzero(self.mask[0, block] == 0) + block.start
    if not free.size:
      return
    h, w = self.view
    top = ground.cy + ground.f * ground.height / SEED_FAR
    rows = np.linspace(top, h - 1, self.per)
    rows = rows[(rows >= seed[0, 1]) & (rows <= seed[-1, 1])]
    columns = np.interp(rows, seed[:, 1], seed[:, 0])
    ok = (columns >= 0) & (columns <= w - 1)
    rows, columns = rows[ok], columns[ok]
    ok = valid[np.round(rows).astype(int), np.round(columns).astype(int)]
    rows, columns = rows[ok], columns[ok]
    used = self.points[0, block, 1][self.mask[0, block] > 0]
    gap = np.abs(rows[:, None] - used[None]).min(1, initial=1e3)
    step = (h - 1 - top) / max(1, self.per - 1)
    for slot in free[: self.per if not used.size else SEEDS_PER_FRAME]:
      if not len(rows) or gap.max() < step / 2:
        return
      at = int(gap.argmax())
      self.points[0, slot] = columns[at], rows[at]
      self.mask[0, slot] = self.fresh[0, slot] = 1
      self.hidden[slot] = self.stray[slot] = 0
      np.minimum(gap, np.abs(rows - rows[at]), out=gap)

  def update(self, found: LanePoints, ground: Ground, dt: int = 1) -> list[Line]:
    """found: what the graph made of the slots; dt: frames since the last one. Returns the lines that have points, nearest to the car first."""
    used = self.mask[0] > 0
    self.points[0][used] = found.points[used]
    visibility = np.where(used, found.visibility, 0)
    self.hidden = np.where(visibility >= VISIBLE, 0, self.hidden + dt)
    road = ground.road(self.points[0].astype(np.float64))
    h, w = self.view
    p = self.points[0]
    inside = (p[:, 0] >= 0) & (p[:, 0] <= w - 1) & (p[:, 1] <= h - 1) & np.isfinite(road[:, 0])   # above the horizon a point is not on the road
    used &= inside & (self.hidden <= MAX_HIDDEN)
    n = self.lines * self.per
    shape = (self.lines, self.per)
    weight = np.where(used, np.maximum(visibility, FLOOR), 0)[:n].reshape(shape)
    x, y = road[:n, 0].reshape(shape), road[:n, 1].reshape(shape)
    coef, off = fit_lines(x, y, weight, ground.f)
    self.stray[:n] = np.where(off.ravel() > STRAY, self.stray[:n] + dt, 0)
    used &= self.stray <= MAX_STRAY
    self.mask[0] = used
    lines = []
    for line in np.flatnonzero(self.ids):
      block = self._block(line)
      at = np.flatnonzero(used[block]) + block.start
      seen = visibility[at] >= VISIBLE
      self.unseen[line] = 0 if seen.any() else self.unseen[line] + dt
      if self.unseen[line] > MAX_HIDDEN or self.unsupported[line] > UNSUPPORTED:
        self.ids[line], self.mask[0, block] = 0, 0
        continue
      if len(at) < 2:
        continue
      self.fit[line] = coef[line]
      rms = float(np.sqrt(np.average(off[line][at - block.start] ** 2, weights=weight[line][at - block.start])))
      prob = float(visibility[at].mean()) * min(1.0, float(seen.sum()) / ENOUGH) * float(np.exp(-0.5 * (rms / 3) ** 2))
      at = at[np.argsort(-self.points[0, at, 1], kind="stable")]
      seen_at, road_at = visibility[at].astype(np.float32), road[at].astype(np.float32)
      lines.append(Line(int(self.ids[line]), prob, self.kind, self.points[0, at].copy(), seen_at, road_at, coef[line]))
    return sorted(lines, key=lambda e: abs(float(on_line(e.fit, np.array([10.0]))[0])))


def spec_slots(graph: dict[str, Any]) -> tuple[int, dict[str, str]] | None:
  """A graph's entry in the manifest -> the number of its point slots and the names of the inputs for points, mask and fresh; None without slots."""
  slots = graph.get("point_slots")
  if slots is None:
    return None
  stem = slots["mask"].removesuffix("mask")
  return slots["count"], {"points": slots.get("points", stem + "points"), "mask": slots["mask"], "fresh": slots.get("fresh", stem + "fresh")}

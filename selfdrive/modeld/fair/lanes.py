"""The host's side of a graph that tracks lane points: which slots are in use, where points begin, which line they
belong to, and the lines that come of it."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from openpilot.selfdrive.modeld.fair.heads.depth import Depth
from openpilot.selfdrive.modeld.fair.heads.ground import Ground
from openpilot.selfdrive.modeld.fair.heads.lanes import SEED_FAR, LanePoints, fit_lines
from openpilot.selfdrive.modeld.fair.heads.scale import sample

MAX_LINES = 4
MAX_HIDDEN = 40  # frames that a point, or a whole line, lives without being visible: 2 s
MAX_STRAY = 10  # frames that a point may be off its line
STRAY = 6.0  # standard deviations
SAME_LINE = 0.9  # m; a lane is some 3 m wide
COMPARED = 40.0  # m; up to there a line that is offered is compared with those there are
UNSUPPORTED = 100  # frames that a line lives which the source of seeds does not see
# a point out of sight for so many frames, and so many pixels beside the seeds' line, has lost it and begins on it again
LOST_AFTER, LOST = 5, 4.0
SEED_PERIOD = 3  # frames between two looks for new points: a fast car loses few in them
VISIBLE = 0.5
ENOUGH = 6  # visible points that make a line certain
FLOOR = 0.02  # weight of a point that is not visible: it still goes where its neighbors go


@dataclass
class Line:
  line_id: int
  prob: float  # mean visibility, less where points are few or far from the curve
  kind: str
  points: np.ndarray  # (P, 2) float32 view pixels, nearest first
  visibility: np.ndarray  # (P,) float32
  road: np.ndarray  # (P, 3) float32 meters
  fit: np.ndarray  # (4,) y = sum fit[i] x^i, meters
  depth: np.ndarray | None = None  # (P,) float32 meters, of a metric depth map at the points, nan where it has none


@lru_cache(maxsize=4)
def seed_rows(ground: Ground, height: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Where points of a line begin: (count,) rows of a view so high from SEED_FAR to its lower edge, meters ahead there,
  and their powers 0 to 3 (4, count)."""
  rows = np.linspace(ground.cy + ground.f * ground.height / SEED_FAR, height - 1, count)
  ahead = ground.f * ground.height / (rows - ground.cy)
  return rows, ahead, ahead ** np.arange(4)[:, None]


class LaneTracker:
  """N slots, shared evenly by up to MAX_LINES lines. Each frame: seed(), run the graph on points, mask and fresh,
  update()."""

  def __init__(self, count: int, view: tuple[int, int], kind: str = "lane"):
    self.view, self.kind = view, kind
    self.lines = min(MAX_LINES, count)
    self.per = count // self.lines
    self.n = self.lines * self.per  # slots in use at most
    self.points = np.zeros((1, count, 2), np.float32)
    self.mask, self.fresh = np.zeros((1, count), np.float32), np.zeros((1, count), np.float32)
    self.hidden, self.stray = np.zeros(count, np.int64), np.zeros(count, np.int64)
    self.ids, self.unsupported, self.unseen = (np.zeros(self.lines, np.int64) for _ in range(3))  # id 0: no line
    self.fit = np.zeros((self.lines, 4))
    self.line_of = np.arange(self.lines).repeat(self.per).reshape(self.lines, self.per)
    self.next_id = 1
    self.since_seed = SEED_PERIOD

  def reset(self) -> None:
    """Drops all points and lines; the lines' ids never come back."""
    self.mask[:], self.fresh[:], self.ids[:] = 0, 0, 0
    self.since_seed = SEED_PERIOD

  def wants_seeds(self) -> bool:
    """Whether seed() should be given lines for the coming frame. Counts frames: to be asked once in each."""
    self.since_seed += 1
    return self.since_seed >= SEED_PERIOD

  def seed(self, seeds: list[np.ndarray], ground: Ground, valid: np.ndarray) -> None:
    """seeds: lines as view pixels (P, 2) from far to near, of the coming frame. Free slots begin on them, in rows where
    their line has no point."""
    self.fresh[:] = 0
    if not seeds:
      return
    self.unsupported[self.ids > 0] += self.since_seed
    self.since_seed = 0
    h, w = self.view
    rows, ahead, powers = seed_rows(ground, h, self.per)
    top = float(rows[0])
    columns = np.array([np.interp(rows, s[:, 1], s[:, 0], left=np.nan, right=np.nan) for s in seeds])  # (seeds, per)
    # how far each line there is lies from each one offered: meters, over the rows that the offered one has
    mine = self.fit @ powers
    offered = (columns - ground.cx) * (ahead / ground.f)
    counts = np.isfinite(offered) & (ahead < COMPARED)
    off = (
      np.where(counts[:, None], np.abs(offered[:, None] - mine[None]), 0).sum(2) / np.maximum(counts.sum(1), 1)[:, None]
    )
    off[:, self.ids == 0] = np.inf
    off[~counts.any(1)] = np.inf
    chosen = np.full(self.lines, -1)  # the seed of each line
    taken: list[int] = []
    for flat in off.ravel().argsort(kind="stable").tolist():
      k, line = divmod(flat, self.lines)
      if off[k, line] >= SAME_LINE:
        break
      if chosen[line] < 0 and k not in taken:
        chosen[line] = k
        taken.append(k)
    # lines that begin, those nearest to the car first, while there are free blocks
    free_lines = (self.ids == 0).nonzero()[0].tolist()
    rest = [k for k in range(len(seeds)) if k not in taken and counts[k].any()]
    for k in sorted(rest, key=lambda k: float(np.abs(offered[k][counts[k]][-1])))[: len(free_lines)]:
      line = free_lines.pop(0)
      self.ids[line], self.next_id = self.next_id, self.next_id + 1
      self.unseen[line], chosen[line] = 0, k
      ok = np.isfinite(offered[k])
      self.fit[line] = fit_lines(ahead[None, ok], offered[k][None, ok], np.ones((1, int(ok.sum()))), ground.f)[0][0]
    self.unsupported[chosen >= 0] = 0
    # slots, line by line: a row is empty where no point of the line is nearest to it
    at = np.where((chosen >= 0)[:, None], columns[chosen], np.nan)
    inside = (at >= 0) & (at <= w - 1)
    empty = inside & valid[np.rint(rows).astype(int)[None], np.where(inside, np.rint(at), 0).astype(int)]
    used = self.mask[0, : self.n].reshape(self.lines, self.per) > 0
    nearest = np.rint((self.points[0, : self.n, 1] - top) * ((self.per - 1) / (h - 1 - top)))
    nearest = np.minimum(np.maximum(nearest, 0), self.per - 1).astype(int).reshape(used.shape)
    # what is hidden in its place, e.g. by a car, stays; what glare or a gap has led astray does not False where the
    # line offered does not reach
    astray = np.abs(self.points[0, : self.n, 0].reshape(used.shape) - at[self.line_of, nearest]) > LOST
    used &= ~(astray & (self.hidden[: self.n].reshape(used.shape) > LOST_AFTER))
    self.mask[0, : self.n] = used.ravel()
    empty[self.line_of[used], nearest[used]] = False
    many = np.minimum(empty.sum(1), (~used).sum(1))[:, None]
    row_line, row = (empty & (empty.cumsum(1) <= many)).nonzero()
    slot_line, slot = (
      ~used & ((~used).cumsum(1) <= many)
    ).nonzero()  # as many a line as there are rows: the two lists pair up
    slot = slot_line * self.per + slot
    self.points[0, slot, 0], self.points[0, slot, 1] = at[row_line, row], rows[row]
    self.mask[0, slot] = self.fresh[0, slot] = 1
    self.hidden[slot] = self.stray[slot] = 0

  def update(self, found: LanePoints, ground: Ground, dt: int = 1, depth: Depth | None = None) -> list[Line]:
    """found: what the graph made of the slots; dt: frames since the last one; depth: of this frame.

    Returns the lines that have points, nearest to the car first."""
    used = self.mask[0] > 0
    np.copyto(self.points[0], found.points, where=used[:, None])
    visibility = np.where(used, found.visibility, 0).astype(np.float32, copy=False)
    self.hidden = np.where(visibility >= VISIBLE, 0, self.hidden + dt)
    road = ground.road(self.points[0])
    h, w = self.view
    px, py = self.points[0, :, 0], self.points[0, :, 1]
    used &= (
      (px >= 0) & (px <= w - 1) & (py <= h - 1) & (road[:, 0] > 0) & (self.hidden <= MAX_HIDDEN)
    )  # above the horizon a point is not on the road
    shape = (self.lines, self.per)
    used_at, seen_at = used[: self.n].reshape(shape), visibility[: self.n].reshape(shape)
    weight = np.where(used_at, np.maximum(seen_at, FLOOR), 0)
    coef, off = fit_lines(
      road[: self.n, 0].reshape(shape), road[: self.n, 1].reshape(shape), weight, ground.f, self.fit
    )
    self.stray[: self.n] = np.where(off.ravel() > STRAY, self.stray[: self.n] + dt, 0)
    used &= self.stray <= MAX_STRAY
    many, seen = used_at.sum(1), (used_at & (seen_at >= VISIBLE)).sum(1)
    self.unseen = np.where(seen > 0, 0, self.unseen + dt)
    ended = (self.ids > 0) & ((self.unseen > MAX_HIDDEN) | (self.unsupported > UNSUPPORTED))
    self.ids[ended] = 0
    used_at[self.ids == 0] = False  # a view of `used`
    self.mask[0] = used
    weight = np.where(used_at, weight, 0)
    rms2 = (weight * off * off).sum(1) / np.maximum(weight.sum(1), 1e-6)
    prob = (
      np.where(used_at, seen_at, 0).sum(1) / np.maximum(many, 1) * np.minimum(1, seen / ENOUGH) * np.exp(-rms2 / 18)
    )  # three deviations: 0.6
    order = np.where(used_at, -py[: self.n].reshape(shape), np.inf).argsort(1, kind="stable")
    told = ((self.ids > 0) & (many > 1)).nonzero()[0]
    self.fit[told] = coef[told]
    lines = []
    z = sample(depth, self.points[0]) if depth is not None and depth.metric else None
    for line in told[np.abs(coef[told, 0] + 10 * coef[told, 1]).argsort(kind="stable")].tolist():
      at = order[line, : many[line]] + line * self.per
      lines.append(
        Line(
          int(self.ids[line]),
          float(prob[line]),
          self.kind,
          self.points[0, at],
          visibility[at],
          road[at],
          coef[line],
          z[at] if z is not None else None,
        )
      )
    return lines

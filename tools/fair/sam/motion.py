"""Things followed from box to box: where they were going, and what colors they had.

Between two frames a thing is taken to keep its velocity in space, not in the picture: then what comes nearer moves and
grows faster and faster, and exactly so without knowing its depth or the camera."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from openpilot.selfdrive.modeld.fair.heads.objects import intersection
from openpilot.tools.fair.teacher import State

U, V, SIZE, ASPECT = range(4)  # of a box: center in px, log of the root of its area, log of width by height
MAX_RATE = 0.2  # growth a frame, as logarithm; more is noise
ROWS = ("mean", "cov", "ids", "classes", "hits", "missed", "looks")
LOOKS = 64  # colors that are told apart


def to_measure(boxes: np.ndarray) -> np.ndarray:
  """(N, 4) x0 y0 x1 y1 -> (N, 4) U, V, SIZE, ASPECT, float64."""
  b = np.asarray(boxes, np.float64)
  wh = np.maximum(b[:, 2:] - b[:, :2], 1e-3)
  return np.concatenate(
    [(b[:, :2] + b[:, 2:]) / 2, np.log(wh).mean(1, keepdims=True), np.log(wh[:, :1] / wh[:, 1:])], axis=1
  )


def to_boxes(m: np.ndarray) -> np.ndarray:
  """The reverse of `to_measure`."""
  half = np.exp(m[:, SIZE, None] + m[:, ASPECT, None] * [0.5, -0.5]) / 2
  return np.concatenate([m[:, :2] - half, m[:, :2] + half], axis=1)


def complete(there: np.ndarray, boxes: np.ndarray, covered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Where tracks are expected and the boxes seen of them, (N, 4) each -> boxes with what is hidden of them: a side that
  is too short keeps the edge that is where it was expected, or that nothing covers, and gets the expected length; and
  (N,) the share that was missing. covered: (N, 2) bool, left and right edges that something stands before: those are
  never believed, however little is missing, or things would seem to flee from what comes before them."""
  out, cut = boxes.copy(), np.zeros(len(boxes))
  for lo, hi in ((0, 2), (1, 3)):
    long, short = there[:, hi] - there[:, lo], boxes[:, hi] - boxes[:, lo]
    is_cut = short < 0.85 * long
    low = np.abs(boxes[:, lo] - there[:, lo]) < np.abs(boxes[:, hi] - there[:, hi])
    if lo == 0:
      one = covered[:, 0] != covered[:, 1]
      is_cut, low = is_cut | one, np.where(one, covered[:, 1], low)
    out[:, hi] = np.where(is_cut & low, boxes[:, lo] + long, out[:, hi])
    out[:, lo] = np.where(is_cut & ~low, boxes[:, hi] - long, out[:, lo])
    cut = np.maximum(cut, np.where(is_cut, 1 - short / np.maximum(long, 1e-9), 0))
  return out, np.where(covered.all(1), 1.0, np.clip(cut, 0, 1))


def covered_edges(there: np.ndarray, nearer: np.ndarray, before: np.ndarray) -> np.ndarray:
  """there (N, 4), nearer (M, 4), before (N, M) bool, who of `nearer` may stand before whom -> (N, 2) bool: left and
  right edges that somebody reaches, within what a detector's boxes are off."""
  slack = 2 + 0.05 * np.sqrt(np.maximum(np.prod(nearer[:, 2:] - nearer[:, :2], axis=1), 0))
  a, b = there[:, None], nearer[None]
  tall = np.minimum(a[..., 3], b[..., 3]) - np.maximum(a[..., 1], b[..., 1]) > 0.3 * (a[..., 3] - a[..., 1])
  reach = [(b[..., 0] < a[..., k] + slack) & (b[..., 2] > a[..., k] - slack) for k in (0, 2)]
  return np.stack([(r & tall & before).any(1) for r in reach], axis=1)


@dataclass
class Tracks:
  """What is being followed, and how well it is known: for each of U, V, SIZE, ASPECT value and change a frame, and
  their covariance."""

  mean: np.ndarray = field(default_factory=lambda: np.zeros((0, 4, 2)))
  cov: np.ndarray = field(default_factory=lambda: np.zeros((0, 4, 2, 2)))
  ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
  classes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
  hits: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # frames in which it was seen
  missed: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # frames since
  looks: np.ndarray = field(default_factory=lambda: np.zeros((0, LOOKS)))  # as `looks_of` gives them, of late
  next_id: int = 0

  def state(self) -> State:
    return {k: np.array(v) for k, v in vars(self).items()}

  @classmethod
  def of_state(cls, state: State | None) -> "Tracks":
    return cls() if state is None else cls(**{k: state[k].copy() for k in ROWS}, next_id=int(state["next_id"]))

  def keep(self, which: np.ndarray) -> None:
    for k in ROWS:
      setattr(self, k, getattr(self, k)[which])


class ObjectTracker:
  """Kalman filters and the Hungarian method. All in pixels and frames.

  lost_after: frames after which a thing unseen is let go; one that was seen in less than min_hits frames goes sooner.
  start_score: boxes of a lower score only continue tracks. gate: squared deviations, over the four values of a box,
  beyond which it is somebody else;
  looks: how many of those it is to share no color, after a while unseen. calm: of its velocity what is expected to be
  there a frame later while a thing is unseen, where the camera's turn is not known. stray: of `match_again`, pixels.
  groups: class -> those of the same number are not told apart; without it each class is its own."""

  def __init__(
    self,
    lost_after: int = 60,
    start_score: float = 0.4,
    min_hits: int = 3,
    gate: float = 20.0,
    looks: float = 50.0,
    calm: float = 0.97,
    stray: float = 3.0,
    groups: np.ndarray | None = None,
  ):
    self.lost_after, self.start_score, self.min_hits, self.gate = lost_after, start_score, min_hits, gate
    self.looks, self.calm, self.stray, self.groups = looks, calm, stray, groups

  def settings(self) -> dict[str, Any]:
    groups = None if self.groups is None else self.groups.tolist()
    return {
      k: getattr(self, k) for k in ("lost_after", "start_score", "min_hits", "gate", "looks", "calm", "stray")
    } | {"groups": groups}

  def noise(self, m: np.ndarray) -> np.ndarray:
    """(N, 4) measures -> (N, 4) variance of a detector's boxes: parts of their size, and half a pixel."""
    size = np.exp(m[:, SIZE])
    center, log = (0.05 * size + 0.5) ** 2, (0.06 + 0.7 / size) ** 2
    return np.stack([center, center, log, 2 * log], axis=1)

  def predict(self, t: Tracks, calm: float = 1.0) -> None:
    """A frame later, with constant velocity in space; of what is unseen with `calm` of it."""
    t.mean[t.missed > 1, :, 1] *= calm
    m, size = t.mean, np.exp(t.mean[:, SIZE, 0])
    rate = np.clip(m[:, SIZE, 1], -MAX_RATE, MAX_RATE)
    nearer = 1 / (1 - rate)  # depth before by depth after
    m[:, :2, 0] += m[:, :2, 1] * nearer[:, None]
    m[:, :2, 1] *= nearer[:, None] ** 2
    m[:, SIZE, 0] += np.log(nearer)
    m[:, SIZE, 1] = rate * nearer
    f = np.zeros((len(m), 4, 2, 2))
    f[..., 0, 0], f[..., 0, 1], f[..., 1, 1] = 1, nearer[:, None], nearer[:, None] ** 2
    f[:, ASPECT] = np.eye(2)
    t.cov = f @ t.cov @ f.swapaxes(-1, -2)
    t.cov[:, :2, 0, 0] += ((0.02 * size) ** 2)[:, None]
    t.cov[:, :2, 1, 1] += ((0.002 * size + 0.03) ** 2)[:, None]
    t.cov[:, SIZE] += np.diag([0.02**2, 0.001**2])
    t.cov[:, ASPECT, 0, 0] += 0.02**2
    t.missed += 1

  def correct(
    self, t: Tracks, which: np.ndarray, axes: slice, column: int, value: np.ndarray, variance: np.ndarray
  ) -> None:
    """Kalman's step for the tracks `which`: value, variance (n, axes) of column 0 (value) or 1 (change). What is far
    off counts less, as Huber would."""
    mean, cov = t.mean[which, axes], t.cov[which, axes]
    off = value - mean[..., column]
    spread = cov[..., column, column] + variance
    spread = np.maximum(spread, off**2 / 4)
    gain = cov[..., column] / spread[..., None]
    t.mean[which, axes] = mean + gain * off[..., None]
    t.cov[which, axes] = cov - gain[..., :, None] * cov[..., column, None, :]

  def match(self, t: Tracks, m: np.ndarray, classes: np.ndarray, unlike: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> tracks and measures that belong together: the most likely assignment."""
    spread = t.cov[:, None, :, 0, 0] + self.noise(m)[None]
    d2 = ((m[None] - t.mean[:, None, :, 0]) ** 2 / spread).sum(-1)
    # that of two tracks is preferred which is surer of where it is
    unit = np.exp(2 * m[:, SIZE])[None, :, None] * np.array([1.0, 1.0, 0.0, 0.0]) + np.array([0.0, 0.0, 1.0, 1.0])
    d2 = d2 + unlike
    cost = d2 + np.log(spread / unit).sum(-1)
    ok = (d2 < self.gate) & self.alike(t.classes, classes)
    cost = np.where(ok, cost - 1e3, 0.0)
    rows, columns = linear_sum_assignment(cost)
    good = ok[rows, columns]
    return rows[good], columns[good]

  def match_parts(
    self,
    t: Tracks,
    there: np.ndarray,
    boxes: np.ndarray,
    classes: np.ndarray,
    unlike: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
  ) -> tuple[np.ndarray, np.ndarray]:
    """The same of what is still unmatched: boxes that show a part of a track, where something stands before the rest:
    of the same height and less wide, or of the same width and less high."""
    free, boxless = np.setdiff1d(np.arange(len(there)), rows), np.setdiff1d(np.arange(len(boxes)), columns)
    a, b = there[free, None], boxes[None, boxless]
    side = a[..., 2:] - a[..., :2]
    doubt = np.sqrt(t.cov[free, :2, 0, 0])[:, None]
    slack = np.minimum(0.15 * side + doubt, 0.4 * side)
    same = np.maximum(np.abs(a[..., :2] - b[..., :2]), np.abs(a[..., 2:] - b[..., 2:])) < slack
    less = (b[..., 2:] - b[..., :2] < 1.15 * side) & (
      np.abs(a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2 < side / 2 + 2 * doubt
    )
    ok = (
      ((same & less[..., ::-1]).any(-1))
      & self.alike(t.classes[free], classes[boxless])
      & (unlike[free][:, boxless] < self.gate)
    )
    far = np.linalg.norm((a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2, axis=-1)
    i, j = linear_sum_assignment(np.where(ok, far * (1 + unlike[free][:, boxless]) - 1e4, 0.0))
    good = ok[i, j]
    return free[i[good]], boxless[j[good]]

  def match_again(
    self, t: Tracks, m: np.ndarray, classes: np.ndarray, unlike: np.ndarray, rows: np.ndarray, columns: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """The same of what is unmatched after that: things unseen for a while, who may have changed their way to the left
    or to the right, by up to `stray` pixels for each frame unseen. On a road they stand as low in the picture as they
    should, are as tall, and look as they did."""
    lost = np.setdiff1d(np.flatnonzero((t.missed > 3) & (t.hits >= 2 * self.min_hits)), rows)
    new = np.setdiff1d(np.arange(len(m)), columns)
    a, b, spread = t.mean[lost, :, 0], m[new], self.noise(m[new])[None] + t.cov[lost, None, :, 0, 0]
    off = np.abs(b[None] - a[:, None])
    tall = np.abs((b[None, :, SIZE] - b[None, :, ASPECT] / 2) - (a[:, SIZE] - a[:, ASPECT] / 2)[:, None])
    d2 = (
      off[..., V] ** 2 / spread[..., V] + tall**2 / (spread[..., SIZE] + spread[..., ASPECT] / 4) + unlike[lost][:, new]
    )
    aside = off[..., U] / (3 * np.sqrt(spread[..., U]) + self.stray * t.missed[lost][:, None])
    ok = (d2 < self.gate / 2) & (aside < 1) & self.alike(t.classes[lost], classes[new])
    i, j = linear_sum_assignment(np.where(ok, d2 + 9 * aside**2 - 1e3, 0.0))
    good = ok[i, j]
    return lost[i[good]], new[j[good]]

  def alike(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Classes (N,) and (M,) -> (N, M) bool."""
    group = np.arange(1 + max(a.max(initial=0), b.max(initial=0))) if self.groups is None else self.groups
    return group[a][:, None] == group[b][None]

  def update(
    self,
    t: Tracks,
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    size: tuple[int, int] | None = None,
    flow: tuple[np.ndarray, np.ndarray] | None = None,
    looks: np.ndarray | None = None,
    turn: np.ndarray | None = None,
  ) -> np.ndarray:
    """The next frame: boxes (M, 4) x0 y0 x1 y1, scores and classes (M,) -> (M,) int64 identities, never used twice, -1
    of those not followed.

    size: height and width of the picture; what leaves it is let go. flow: how far each track moved since the last
    frame, (N, 2), and its variance, (N,): of `flow_of`. looks: of the boxes, (M, LOOKS), of `looks_of`. turn: (3, 3),
    where directions have gone in the picture as the camera turned, of `turn.turned`; without it a turn is taken for the
    things' own motion."""
    if turn is not None:
      p = np.concatenate([t.mean[:, :2, 0], np.ones((len(t.ids), 1))], axis=1) @ turn.T
      t.mean[:, :2, 0] = p[:, :2] / np.maximum(p[:, 2:], 0.1)
    # what is left without the turn is the things' own motion: who follows the same bend goes on doing so
    self.predict(t, self.calm if turn is None else 1.0)
    m, classes = to_measure(boxes), np.asarray(classes, np.int64)
    if flow is not None:
      off = ((flow[0] - t.mean[:, :2, 1]) ** 2).max(1) / (t.cov[:, :2, 1, 1].min(1) + flow[1])
      seen = np.flatnonzero(off < 9)  # more is another thing's
      self.correct(t, seen, slice(U, V + 1), 1, flow[0][seen], flow[1][seen, None])
    unlike = np.zeros((len(t.ids), len(m)))
    if looks is not None:
      unlike = np.maximum(0, 1 - t.looks @ looks.T - 0.1) * self.looks * np.minimum(1, t.missed / 5)[:, None]
    rows, columns = self.match(t, m, classes, unlike)
    ids = np.full(len(m), -1, np.int64)
    ids[columns] = t.ids[rows]
    there, boxes = to_boxes(t.mean[:, :, 0]), np.asarray(boxes, np.float64)
    part_rows, part_columns = self.match_parts(t, there, boxes, classes, unlike, rows, columns)
    ids[part_columns] = t.ids[part_rows]
    rows, columns = np.concatenate([rows, part_rows]), np.concatenate([columns, part_columns])
    back_rows, back_columns = self.match_again(t, m, classes, unlike, rows, columns)
    ids[back_columns] = t.ids[back_rows]
    # a box cut by what stands before it (lower in the picture) says less
    before = (boxes[None, :, 3] > there[rows, 3, None]) & (np.arange(len(m)) != columns[:, None])
    whole, cut = complete(there[rows], boxes[columns], covered_edges(there[rows], boxes, before))
    hidden = (intersection(there[rows], boxes) * before).sum(1) / np.maximum(
      np.prod(there[rows, 2:] - there[rows, :2], axis=1), 1e-9
    )
    m = np.concatenate([to_measure(whole)[:, :2], m[columns, 2:]], axis=1)
    less = 1 + 8 * np.minimum(np.maximum(hidden, cut), 1)
    self.correct(t, rows, slice(None), 0, m, self.noise(m) * less[:, None] ** 2)
    if len(back_rows):  # where it is now, going nobody knows where
      t.mean[back_rows, :, 0], t.mean[back_rows, :, 1] = to_measure(boxes[back_columns]), 0
      t.cov[back_rows] = self.unsure(to_measure(boxes[back_columns]))
    rows, columns = np.concatenate([rows, back_rows]), np.concatenate([columns, back_columns])
    t.classes[rows], t.missed[rows] = classes[columns], 0
    t.hits[rows] += 1
    if looks is not None:
      t.looks[rows] = 0.9 * t.looks[rows] + 0.1 * looks[columns]
      t.looks[rows] /= np.maximum(np.linalg.norm(t.looks[rows], axis=1, keepdims=True), 1e-9)
    gone = (t.missed > self.lost_after) | ((t.hits < self.min_hits) & (t.missed > t.hits))
    if size is not None:
      center = t.mean[:, :2, 0]
      gone |= (t.missed > 0) & ((center < 0) | (center > [size[1], size[0]])).any(1)
    t.keep(~gone)
    new = np.flatnonzero((ids < 0) & (np.asarray(scores) >= self.start_score))
    ids[new] = t.next_id + np.arange(len(new))
    self.start(t, to_measure(boxes[new]), classes[new], np.zeros((len(new), LOOKS)) if looks is None else looks[new])
    return ids

  def unsure(self, m: np.ndarray) -> np.ndarray:
    """(N, 4) measures -> (N, 4, 2, 2) covariance of what was seen once."""
    cov = np.zeros((len(m), 4, 2, 2))
    cov[..., 0, 0] = self.noise(m)
    cov[:, :2, 1, 1] = ((0.1 * np.exp(m[:, SIZE]) + 1) ** 2)[:, None]
    cov[:, SIZE, 1, 1] = 0.03**2
    return cov

  def start(self, t: Tracks, m: np.ndarray, classes: np.ndarray, looks: np.ndarray) -> None:
    n = len(m)
    t.mean = np.concatenate([t.mean, np.stack([m, np.zeros_like(m)], axis=-1)])
    t.cov = np.concatenate([t.cov, self.unsure(m)])
    t.ids = np.concatenate([t.ids, t.next_id + np.arange(n)])
    t.classes = np.concatenate([t.classes, classes])
    t.looks = np.concatenate([t.looks, looks])
    t.hits, t.missed = np.concatenate([t.hits, np.ones(n, np.int64)]), np.concatenate([t.missed, np.zeros(n, np.int64)])
    t.next_id += n

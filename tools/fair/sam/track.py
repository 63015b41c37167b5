"""Identity through occlusion without SAM: what a detector sees, where things were going, and what colours they had. The permissive stand-in.

Between two frames a thing is taken to keep its velocity in space, not in the picture: then what comes nearer moves and grows faster and faster, and
exactly so without knowing its depth or the camera. Lucas-Kanade's flow may be added.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy.optimize import linear_sum_assignment

from openpilot.selfdrive.modeld.fair.heads.objects import intersection
from openpilot.tools.fair.sam.turn import TurnLog, turned
from openpilot.tools.fair.teacher import Clip, Entry, Label, Labels, State, Teacher, load_teacher
from openpilot.tools.lib.errors import UserError

# detectors take one for the other
ALIKE = (("car", "truck", "bus", "train", "vehicle"), ("bicycle", "motorcycle"))
U, V, SIZE, ASPECT = range(4)  # of a box: centre in px, log of the root of its area, log of width by height
MAX_RATE = 0.2  # growth a frame, as logarithm; more is noise
ROWS = ("mean", "cov", "ids", "classes", "hits", "missed", "looks")
LOOKS = 64  # colours that are told apart
COLUMNS = {"frame": np.int32, **dict.fromkeys(("x0", "y0", "x1", "y1", "score"), np.float32), "cls": np.int16, "track": np.int64}


def to_measure(boxes: np.ndarray) -> np.ndarray:
  """(N, 4) x0 y0 x1 y1 -> (N, 4) U, V, SIZE, ASPECT, float64."""
  b = np.asarray(boxes, np.float64)
  wh = np.maximum(b[:, 2:] - b[:, :2], 1e-3)
  return np.concatenate([(b[:, :2] + b[:, 2:]) / 2, np.log(wh).mean(1, keepdims=True), np.log(wh[:, :1] / wh[:, 1:])], axis=1)


def to_boxes(m: np.ndarray) -> np.ndarray:
  """The reverse of `to_measure`."""
  half = np.exp(m[:, SIZE, None] + m[:, ASPECT, None] * [0.5, -0.5]) / 2
  return np.concatenate([m[:, :2] - half, m[:, :2] + half], axis=1)


def complete(there: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Where tracks are expected and the boxes seen of them, (N, 4) each -> boxes with what is hidden of them: a side that is too short keeps the edge that is
  where it was expected, and gets the expected length; and (N,) the share that was missing."""
  out, cut = boxes.copy(), np.zeros(len(boxes))
  for lo, hi in ((0, 2), (1, 3)):
    long, short = there[:, hi] - there[:, lo], boxes[:, hi] - boxes[:, lo]
    is_cut = short < 0.85 * long
    low = np.abs(boxes[:, lo] - there[:, lo]) < np.abs(boxes[:, hi] - there[:, hi])
    out[:, hi] = np.where(is_cut & low, boxes[:, lo] + long, out[:, hi])
    out[:, lo] = np.where(is_cut & ~low, boxes[:, hi] - long, out[:, lo])
    cut = np.maximum(cut, np.where(is_cut, 1 - short / np.maximum(long, 1e-9), 0))
  return out, cut


@dataclass
class Tracks:
  """What is being followed, and how well it is known: for each of U, V, SIZE, ASPECT value and change a frame, and their covariance."""

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

  lost_after: frames after which a thing unseen is let go; one that was seen in less than min_hits frames goes sooner. start_score: boxes of a lower score
  only continue tracks. gate: squared deviations, over the four values of a box, beyond which it is somebody else; looks: how many of those it is to share no
  colour, after a while unseen. calm: of its velocity what is expected to be there a frame later while a thing is unseen. groups: class -> those of the same
  number are not told apart; without it each class is its own.
  """

  def __init__(
    self,
    lost_after: int = 45,
    start_score: float = 0.4,
    min_hits: int = 3,
    gate: float = 20.0,
    looks: float = 50.0,
    calm: float = 0.97,
    groups: np.ndarray | None = None,
  ):
    self.lost_after, self.start_score, self.min_hits, self.gate = lost_after, start_score, min_hits, gate
    self.looks, self.calm, self.groups = looks, calm, groups

  def settings(self) -> dict[str, Any]:
    groups = None if self.groups is None else self.groups.tolist()
    return {k: getattr(self, k) for k in ("lost_after", "start_score", "min_hits", "gate", "looks", "calm")} | {"groups": groups}

  def noise(self, m: np.ndarray) -> np.ndarray:
    """(N, 4) measures -> (N, 4) variance of a detector's boxes: parts of their size, and half a pixel."""
    size = np.exp(m[:, SIZE])
    centre, log = (0.05 * size + 0.5) ** 2, (0.06 + 0.7 / size) ** 2
    return np.stack([centre, centre, log, 2 * log], axis=1)

  def predict(self, t: Tracks) -> None:
    """A frame later, with constant velocity in space."""
    t.mean[t.missed > 1, :, 1] *= self.calm
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

  def correct(self, t: Tracks, which: np.ndarray, axes: slice, column: int, value: np.ndarray, variance: np.ndarray) -> None:
    """Kalman's step for the tracks `which`: value, variance (n, axes) of column 0 (value) or 1 (change). What is far off counts less, as Huber would."""
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
    self, t: Tracks, there: np.ndarray, boxes: np.ndarray, classes: np.ndarray, unlike: np.ndarray, rows: np.ndarray, columns: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """The same of what is still unmatched: boxes that show a part of a track, where something stands before the rest: of the same height and less wide, or of
    the same width and less high."""
    free, boxless = np.setdiff1d(np.arange(len(there)), rows), np.setdiff1d(np.arange(len(boxes)), columns)
    a, b = there[free, None], boxes[None, boxless]
    side = a[..., 2:] - a[..., :2]
    doubt = np.sqrt(t.cov[free, :2, 0, 0])[:, None]
    slack = np.minimum(0.15 * side + doubt, 0.4 * side)
    same = np.maximum(np.abs(a[..., :2] - b[..., :2]), np.abs(a[..., 2:] - b[..., 2:])) < slack
    less = (b[..., 2:] - b[..., :2] < 1.15 * side) & (np.abs(a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2 < side / 2 + 2 * doubt)
    ok = ((same & less[..., ::-1]).any(-1)) & self.alike(t.classes[free], classes[boxless]) & (unlike[free][:, boxless] < self.gate)
    far = np.linalg.norm((a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2, axis=-1)
    i, j = linear_sum_assignment(np.where(ok, far * (1 + unlike[free][:, boxless]) - 1e4, 0.0))
    good = ok[i, j]
    return free[i[good]], boxless[j[good]]

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
    """The next frame: boxes (M, 4) x0 y0 x1 y1, scores and classes (M,) -> (M,) int64 identities, never used twice, -1 of those not followed.

    size: height and width of the picture; what leaves it is let go. flow: how far each track moved since the last frame, (N, 2), and its variance, (N,): of
    `flow_of`. looks: of the boxes, (M, LOOKS), of `looks_of`. turn: (3, 3), where directions have
    gone in the picture as the camera turned, of `turn.turned`; without it a turn is taken for the things' own motion.
    """
    if turn is not None:
      p = np.concatenate([t.mean[:, :2, 0], np.ones((len(t.ids), 1))], axis=1) @ turn.T
      t.mean[:, :2, 0] = p[:, :2] / np.maximum(p[:, 2:], 0.1)
    self.predict(t)
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
    whole, cut = complete(there[rows], boxes[columns])
    # a box cut by what stands before it (lower in the picture) says less
    before = (boxes[None, :, 3] > there[rows, 3, None]) & (np.arange(len(m)) != columns[:, None])
    hidden = (intersection(there[rows], boxes) * before).sum(1) / np.maximum(np.prod(there[rows, 2:] - there[rows, :2], axis=1), 1e-9)
    m = np.concatenate([to_measure(whole)[:, :2], m[columns, 2:]], axis=1)
    less = 1 + 8 * np.minimum(np.maximum(hidden, cut), 1)
    self.correct(t, rows, slice(None), 0, m, self.noise(m) * less[:, None] ** 2)
    t.classes[rows], t.missed[rows] = classes[columns], 0
    t.hits[rows] += 1
    if looks is not None:
      t.looks[rows] = 0.9 * t.looks[rows] + 0.1 * looks[columns]
      t.looks[rows] /= np.maximum(np.linalg.norm(t.looks[rows], axis=1, keepdims=True), 1e-9)
    gone = (t.missed > self.lost_after) | ((t.hits < self.min_hits) & (t.missed > t.hits))
    if size is not None:
      centre = t.mean[:, :2, 0]
      gone |= (t.missed > 0) & ((centre < 0) | (centre > [size[1], size[0]])).any(1)
    t.keep(~gone)
    new = np.flatnonzero((ids < 0) & (np.asarray(scores) >= self.start_score))
    ids[new] = t.next_id + np.arange(len(new))
    self.start(t, to_measure(boxes[new]), classes[new], np.zeros((len(new), LOOKS)) if looks is None else looks[new])
    return ids

  def start(self, t: Tracks, m: np.ndarray, classes: np.ndarray, looks: np.ndarray) -> None:
    n, variance = len(m), self.noise(m)
    cov = np.zeros((n, 4, 2, 2))
    cov[..., 0, 0] = variance
    cov[:, :2, 1, 1] = ((0.1 * np.exp(m[:, SIZE]) + 1) ** 2)[:, None]
    cov[:, SIZE, 1, 1] = 0.03**2
    t.mean = np.concatenate([t.mean, np.stack([m, np.zeros_like(m)], axis=-1)])
    t.cov = np.concatenate([t.cov, cov])
    t.ids = np.concatenate([t.ids, t.next_id + np.arange(n)])
    t.classes = np.concatenate([t.classes, classes])
    t.looks = np.concatenate([t.looks, looks])
    t.hits, t.missed = np.concatenate([t.hits, np.ones(n, np.int64)]), np.concatenate([t.missed, np.zeros(n, np.int64)])
    t.next_id += n


def flow_of(before: np.ndarray, after: np.ndarray, t: Tracks) -> tuple[np.ndarray, np.ndarray]:
  """Grey pictures (H, W) uint8 -> (N, 2) how far each track that was seen before has moved, the median of Lucas-Kanade's points in its middle, and (N,) the
  variance, inf where none was followed there and back."""
  moved, variance = np.zeros((len(t.ids), 2)), np.full(len(t.ids), np.inf)
  seen = np.flatnonzero(t.missed == 0)
  if not len(seen):
    return moved, variance
  boxes = to_boxes(t.mean[seen, :, 0])
  grid = np.stack(np.meshgrid(np.linspace(0.2, 0.8, 5), np.linspace(0.2, 0.8, 5)), axis=-1).reshape(1, 25, 2)
  points = (boxes[:, None, :2] + grid * (boxes[:, 2:] - boxes[:, :2])[:, None]).astype(np.float32)
  follow: Any = partial(cv2.calcOpticalFlowPyrLK, nextPts=None, winSize=(13, 13), maxLevel=3)
  there, ok, _ = follow(before, after, points.reshape(-1, 1, 2))
  back, ok_back, _ = follow(after, before, there)
  missed = np.linalg.norm(back.reshape(-1, 25, 2) - points, axis=-1)
  good = (ok.reshape(-1, 25) > 0) & (ok_back.reshape(-1, 25) > 0) & (missed < 0.5)
  for i, k in enumerate(seen):
    if good[i].sum() >= 5:
      d = (there.reshape(-1, 25, 2)[i] - points[i])[good[i]].astype(np.float64)
      moved[k] = np.median(d, axis=0)
      variance[k] = (1 + 1.5 * np.abs(d - moved[k]).mean()) ** 2
  return moved, variance


def looks_of(rgb: np.ndarray, boxes: np.ndarray) -> np.ndarray:
  """(3, H, W) uint8 and boxes (N, 4) -> (N, 64) roots of the colours' shares in each box's middle, 4 steps a channel: their products add up to 1 where two are
  the same."""
  height, width = rgb.shape[1:]
  out = np.zeros((len(boxes), 64))
  code = (rgb[0] >> 6).astype(np.int64) * 16 + (rgb[1] >> 6) * 4 + (rgb[2] >> 6)
  inner = boxes + (boxes[:, 2:] - boxes[:, :2])[:, [0, 1, 0, 1]] * [0.1, 0.1, -0.1, -0.1]
  corners = np.clip(np.round(inner), 0, [width - 1, height - 1] * 2).astype(int)
  for i, (x0, y0, x1, y1) in enumerate(corners):
    share = np.bincount(code[y0 : y1 + 1, x0 : x1 + 1].ravel(), minlength=64)
    out[i] = np.sqrt(share / max(1, share.sum()))
  return out


class TrackerTeacher:
  """Boxes with identity: those of another teacher, `detector`, followed from frame to frame. detector_options: the detector's;
  tracker: of ObjectTracker. flow: with Lucas-Kanade, several times slower, and in the simulator no more identities
  survive with it (tests/bench/bench_object_tracker.py). turn: the camera's turns are read from the route's log and taken out. Boxes that are not followed
  are left out.

  The detector is asked frame by frame, so that the labels do not depend on how a video is cut into clips. Raises UserError where it gives no boxes.
  """

  stateful = True

  def __init__(
    self,
    name: str,
    entry: Entry,
    path: Path | None,
    device: str | None = None,
    precision: str | None = None,
    detector: str = "yolox-nano",
    detector_options: dict[str, Any] | None = None,
    flow: bool = False,
    turn: bool = True,
    **tracker: Any,
  ):
    chosen: dict[str, Any] = {k: v for k, v in (("device", device), ("precision", precision)) if v is not None}
    # who has accepted this teacher's licence, which is its detector's, has accepted that
    self.detector: Teacher = load_teacher(detector, path, (entry.licence,), **chosen, **(detector_options or {}))
    self.name, self.licence, self.model_id = name, self.detector.licence, self.detector.model_id
    self.checkpoint_hash, self.flow, self.turn = self.detector.checkpoint_hash, flow, turn
    self.log: tuple[Path, TurnLog] | None = None
    try:
      self.tracker = ObjectTracker(**tracker)
    except TypeError as e:
      raise UserError(f"teacher '{name}': {str(e).split('.')[-1]}; it has flow, turn, {', '.join(ObjectTracker().settings())}") from None
    self.labels: list[Label] = []
    self.size = [0, 0]

  def prepare(self, height: int, width: int) -> None:
    self.detector.prepare(height, width)
    found = [b for b in self.detector.labels if b.kind == "boxes"]
    if not found:
      raise UserError(f"teacher '{self.detector.name}' gives no boxes; choose another detector for '{self.name}'")
    self.found, self.size, classes = found[0].name, [height, width], found[0].classes
    self.tracker.groups = np.array([next((g for g, names in enumerate(ALIKE) if c in names), len(ALIKE) + i) for i, c in enumerate(classes)], np.int64)
    self.labels = [Label("boxes", "boxes", unit="px", classes=classes)]

  def settings(self) -> dict[str, Any]:
    return {
      "detector": {"name": self.detector.name, "settings": self.detector.settings()},
      "flow": self.flow,
      "turn": self.turn,
      "tracker": self.tracker.settings(),
      "size": self.size,
    }

  def turn_between(self, clip: Clip, before: int | None, after: int | None) -> np.ndarray | None:
    """Times of two frames, ns -> (3, 3) of `turned`; None where the log does not say."""
    if not self.turn or clip.log_path is None or clip.intrinsics is None or before is None or after is None:
      return None
    if self.log is None or self.log[0] != clip.log_path:
      self.log = (clip.log_path, TurnLog(clip.log_path))
    rotation = self.log[1].between(before, after)
    return None if rotation is None else turned(rotation, clip.intrinsics)

  def label(self, clip: Clip, state: State | None = None) -> tuple[Labels, State | None]:
    """'boxes': the detector's, with the column track: identity, never used twice in a video."""
    height, width = clip.rgb.shape[-2:]
    if self.size != [height, width]:
      self.prepare(height, width)
    if state is not None and "size" in state and state["size"].tolist() != [height, width]:
      raise UserError(f"the frames are {width}x{height}, those before were {state['size'][1]}x{state['size'][0]}; begin again with these frames")
    t, parts = Tracks.of_state(state), []
    before = None if state is None else state.get("grey")
    last = int(state["time"]) if state is not None and "time" in state else None
    for n, rgb in enumerate(clip.rgb):
      table = self.detector.label(Clip(rgb[None]))[0][self.found]
      boxes = np.stack([np.asarray(table[k], np.float64) for k in ("x0", "y0", "x1", "y1")], axis=1)
      grey = cv2.cvtColor(np.ascontiguousarray(rgb.transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY) if self.flow else None
      moved = None if grey is None or before is None else flow_of(before, grey, t)
      now = clip.times[n] if clip.times else None
      turn = self.turn_between(clip, last, now)
      ids = self.tracker.update(t, boxes, np.asarray(table["score"]), np.asarray(table["cls"]), (height, width), moved, looks_of(rgb, boxes), turn)
      good, before, last = ids >= 0, grey, now
      parts.append({**{k: np.asarray(table[k])[good] for k in COLUMNS if k in table}, "frame": np.full(int(good.sum()), n), "track": ids[good]})
    labels = {k: np.concatenate([np.zeros(0, dtype), *[np.asarray(p[k], dtype) for p in parts]]) for k, dtype in COLUMNS.items()}
    more = {"size": np.array([height, width])} | ({} if before is None else {"grey": before}) | ({} if last is None else {"time": np.array(last)})
    return {"boxes": labels}, t.state() | more

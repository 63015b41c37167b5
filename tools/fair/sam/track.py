"""Identity through occlusion from boxes alone: what a detector sees, and where things were going. The permissive stand-in for SAM's identity.

Between two frames a thing is taken to keep its velocity in space, not in the picture: then what comes nearer moves and grows faster and faster, and
exactly so without knowing its depth or the camera. With flow, Lucas-Kanade says how fast it moves better than two noisy boxes can.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy.optimize import linear_sum_assignment

from openpilot.tools.fair.teacher import Clip, Entry, Label, Labels, State, load_teacher
from openpilot.tools.lib.errors import UserError

# detectors take one for the other
ALIKE = (("car", "truck", "bus", "train", "vehicle"), ("bicycle", "motorcycle"))
U, V, SIZE, ASPECT = range(4)  # of a box: centre in px, log of the root of its area, log of width by height
MAX_RATE = 0.2  # growth a frame, as logarithm; more is noise
COLUMNS = {"frame": np.int32, **dict.fromkeys(("x0", "y0", "x1", "y1", "score"), np.float32), "cls": np.int16, "track": np.int64}


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Boxes x0 y0 x1 y1, (N, 4) and (M, 4) -> (N, M) intersection over union."""
  inter = overlap(a, b)
  area_a, area_b = ((x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (a, b))
  return inter / np.maximum(area_a[:, None] + area_b[None] - inter, 1e-9)


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """(N, 4) and (M, 4) -> (N, M) pixels in both."""
  wh = np.clip(np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2]), 0, None)
  return wh[..., 0] * wh[..., 1]


def to_measure(boxes: np.ndarray) -> np.ndarray:
  """(N, 4) x0 y0 x1 y1 -> (N, 4) U, V, SIZE, ASPECT, float64."""
  b = np.asarray(boxes, np.float64)
  wh = np.maximum(b[:, 2:] - b[:, :2], 1e-3)
  return np.concatenate([(b[:, :2] + b[:, 2:]) / 2, np.log(wh).mean(1, keepdims=True), np.log(wh[:, :1] / wh[:, 1:])], axis=1)


def to_boxes(m: np.ndarray) -> np.ndarray:
  """The reverse of `to_measure`."""
  half = np.exp(m[:, SIZE, None] + m[:, ASPECT, None] * [0.5, -0.5]) / 2
  return np.concatenate([m[:, :2] - half, m[:, :2] + half], axis=1)


@dataclass
class Tracks:
  """What is being followed, and how well it is known: for each of U, V, SIZE, ASPECT value and change a frame, and their covariance."""

  mean: np.ndarray = field(default_factory=lambda: np.zeros((0, 4, 2)))
  cov: np.ndarray = field(default_factory=lambda: np.zeros((0, 4, 2, 2)))
  ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
  classes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
  hits: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # frames in which it was seen
  missed: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # frames since
  next_id: int = 0

  def state(self) -> State:
    return {k: np.array(v) for k, v in vars(self).items()}

  @classmethod
  def of_state(cls, state: State | None) -> "Tracks":
    return cls() if state is None else cls(**{k: state[k].copy() for k in ("mean", "cov", "ids", "classes", "hits", "missed")}, next_id=int(state["next_id"]))

  def keep(self, which: np.ndarray) -> None:
    for k in ("mean", "cov", "ids", "classes", "hits", "missed"):
      setattr(self, k, getattr(self, k)[which])


class ObjectTracker:
  """Kalman filters and the Hungarian method. All in pixels and frames.

  lost_after: frames after which a thing unseen is let go. start_score: boxes of a lower score only continue tracks. gate: squared deviations, over the four
  values of a box, beyond which it is somebody else. groups: class -> those of the same number are not told apart; without it each class is its own.
  """

  def __init__(self, lost_after: int = 45, start_score: float = 0.4, gate: float = 20.0, min_hits: int = 3, groups: np.ndarray | None = None):
    self.lost_after, self.start_score, self.gate, self.min_hits, self.groups = lost_after, start_score, gate, min_hits, groups

  def noise(self, m: np.ndarray) -> np.ndarray:
    """(N, 4) measures -> (N, 4) variance of a detector's boxes: parts of their size, and half a pixel."""
    size = np.exp(m[:, SIZE])
    centre, log = (0.05 * size + 0.5) ** 2, (0.06 + 0.7 / size) ** 2
    return np.stack([centre, centre, log, 2 * log], axis=1)

  def predict(self, t: Tracks) -> None:
    """A frame later, with constant velocity in space."""
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
    t.cov[:, :2, 0, 0] += ((0.01 * size) ** 2)[:, None]
    t.cov[:, :2, 1, 1] += ((0.004 * size + 0.05) ** 2)[:, None]
    t.cov[:, SIZE] += np.diag([0.01**2, 0.002**2])
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

  def match(self, t: Tracks, m: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> tracks and measures that belong together: the most likely assignment."""
    spread = t.cov[:, None, :, 0, 0] + self.noise(m)[None]
    d2 = ((m[None] - t.mean[:, None, :, 0]) ** 2 / spread).sum(-1)
    # that of two tracks is preferred which is surer of where it is
    unit = np.exp(2 * m[:, SIZE])[None, :, None] * np.array([1.0, 1.0, 0.0, 0.0]) + np.array([0.0, 0.0, 1.0, 1.0])
    cost = d2 + np.log(spread / unit).sum(-1)
    group = np.arange(1 + max(t.classes.max(initial=0), classes.max(initial=0))) if self.groups is None else self.groups
    ok = (d2 < self.gate) & (group[t.classes][:, None] == group[classes][None])
    cost = np.where(ok, cost - 1e3, 0.0)
    rows, columns = linear_sum_assignment(cost)
    good = ok[rows, columns]
    return rows[good], columns[good]

  def update(self, t: Tracks, boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, size: tuple[int, int] | None = None,
             flow: tuple[np.ndarray, np.ndarray] | None = None) -> np.ndarray:
    """The next frame: boxes (M, 4) x0 y0 x1 y1, scores and classes (M,) -> (M,) int64 identities, never used twice, -1 of those not followed.

    size: height and width of the picture; what leaves it is let go. flow: how far each track moved since the last frame, (N, 2), and its variance, (N,).
    """
    self.predict(t)
    m, classes = to_measure(boxes), np.asarray(classes, np.int64)
    if flow is not None:
      seen = np.flatnonzero(np.isfinite(flow[1]))
      self.correct(t, seen, slice(U, V + 1), 1, flow[0][seen], flow[1][seen, None])
    rows, columns = self.match(t, m, classes)
    ids = np.full(len(m), -1, np.int64)
    ids[columns] = t.ids[rows]
    # a box cut by what stands before it (lower in the picture) says less
    there = to_boxes(t.mean[:, :, 0])
    nearer = (there[None, :, 3] > there[:, None, 3]) & (t.missed[None] <= 2)
    area = np.prod(there[:, 2:] - there[:, :2], axis=1)
    hidden = np.minimum((overlap(there, there) * nearer).sum(1) / np.maximum(area, 1e-9), 1)
    self.correct(t, rows, slice(None), 0, m[columns], self.noise(m[columns]) * (1 + 8 * hidden[rows, None]) ** 2)
    t.classes[rows], t.missed[rows] = classes[columns], 0
    t.hits[rows] += 1
    gone = (t.missed > self.lost_after) | ((t.hits < self.min_hits) & (t.missed > t.hits))
    if size is not None:
      centre = t.mean[:, :2, 0]
      gone |= (t.missed > 0) & ((centre < 0) | (centre > [size[1], size[0]])).any(1)
    t.keep(~gone)
    new = np.flatnonzero((ids < 0) & (np.asarray(scores) >= self.start_score))
    ids[new] = t.next_id + np.arange(len(new))
    self.start(t, m[new], classes[new])
    return ids

  def start(self, t: Tracks, m: np.ndarray, classes: np.ndarray) -> None:
    n, variance = len(m), self.noise(m)
    cov = np.zeros((n, 4, 2, 2))
    cov[..., 0, 0] = variance
    cov[:, :2, 1, 1] = ((0.1 * np.exp(m[:, SIZE]) + 1) ** 2)[:, None]
    cov[:, SIZE, 1, 1] = 0.03**2
    t.mean = np.concatenate([t.mean, np.stack([m, np.zeros_like(m)], axis=-1)])
    t.cov = np.concatenate([t.cov, cov])
    t.ids = np.concatenate([t.ids, t.next_id + np.arange(n)])
    t.classes = np.concatenate([t.classes, classes])
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
  there, ok, _ = cv2.calcOpticalFlowPyrLK(before, after, points.reshape(-1, 1, 2), None, winSize=(13, 13), maxLevel=3)
  back, ok_back, _ = cv2.calcOpticalFlowPyrLK(after, before, there, None, winSize=(13, 13), maxLevel=3)
  missed = np.linalg.norm(back.reshape(-1, 25, 2) - points, axis=-1)
  good = (ok.reshape(-1, 25) > 0) & (ok_back.reshape(-1, 25) > 0) & (missed < 0.5)
  for i, k in enumerate(seen):
    if good[i].sum() >= 5:
      d = (there.reshape(-1, 25, 2)[i] - points[i])[good[i]].astype(np.float64)
      moved[k] = np.median(d, axis=0)
      variance[k] = (0.3 + 1.5 * np.abs(d - moved[k]).mean()) ** 2
  return moved, variance

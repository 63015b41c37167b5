"""Objects over a video: J&F of masks, and identities."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from openpilot.tools.fair.evaluation.detections import Objects, overlaps
from openpilot.tools.fair.evaluation.metrics import Sums, known, ratio
from openpilot.tools.fair.labels import rle

MATCH = 0.5  # IoU from which two are the same object
ONCE = 1 << 40  # from here on identities are of objects that were seen once
HIDDEN = 0.3  # share seen, under which an object is occluded
BOUNDARY = 0.008  # of the picture's diagonal


def boundary(mask: np.ndarray) -> np.ndarray:
  """(H, W) bool -> its boundary, one pixel wide, as DAVIS draws it: pixels that differ from the one to the right,
  below, or below to the right."""
  m = mask.astype(bool)
  out = np.zeros_like(m)
  out[:, :-1] |= m[:, :-1] != m[:, 1:]
  out[:-1] |= m[:-1] != m[1:]
  out[:-1, :-1] |= m[:-1, :-1] != m[1:, 1:]
  return out


def disk(radius: int) -> np.ndarray:
  y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
  return (x * x + y * y <= radius * radius).astype(np.uint8)


def region_similarity(a: np.ndarray, b: np.ndarray) -> float:
  """J of DAVIS (Perazzi et al. 2016): IoU of two masks; 1 where both are empty."""
  union = (a | b).sum()
  return float((a & b).sum() / union) if union else 1.0


def boundary_accuracy(found: np.ndarray, truth: np.ndarray, tolerance: float = BOUNDARY) -> float:
  """F of DAVIS (Perazzi et al. 2016): F1 of boundary pixels that have one of the other's within `tolerance` of the
  diagonal, rounded up to whole pixels."""
  import cv2

  radius = int(np.ceil(tolerance * np.hypot(*truth.shape)))
  f, t = boundary(found), boundary(truth)
  if not f.any() or not t.any():
    return float(not f.any() and not t.any())
  wide_f, wide_t = (cv2.dilate(m.astype(np.uint8), disk(radius)).astype(bool) for m in (f, t))
  precision, recall = (f & wide_t).sum() / f.sum(), (t & wide_f).sum() / t.sum()
  return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


@dataclass
class Seen:
  """One frame's objects, as far as identities matter."""

  truth: Objects
  found: Objects
  iou: np.ndarray  # (found, truth)


@dataclass
class Video:
  """Frames of one segment in order; then the sums below."""

  frames: list[Seen] = field(default_factory=list)
  doubles: int = 0

  def _alone(self, o: Objects) -> Objects:
    first = np.zeros(len(o), bool)
    order = np.argsort(-o.score, kind="stable")
    first[order[np.unique(o.track[order], return_index=True)[1]]] = True
    if not first.all():
      o.track = np.where(first, o.track, ONCE + self.doubles + np.arange(len(o)))
      self.doubles += len(o)
    return o

  def add(self, found: Objects, truth: Objects, kind: str) -> None:
    """Objects without identity (track < 0) are left out, and so are those found where the truth counts nowhere. Of
    several of one identity in a frame the surest keeps it; each of the others counts as an object of its own, seen
    once."""
    found, truth = (self._alone(o.take(o.track >= 0)) for o in (found, truth))
    iou = overlaps(found, truth, kind) * (found.cls[:, None] == truth.cls[None])
    counts = ~truth.ignore
    nowhere = (iou[:, ~counts] >= MATCH).any(axis=1) & ~(iou[:, counts] >= MATCH).any(axis=1)
    found, truth, iou = found.take(~nowhere), truth.take(counts), iou[~nowhere][:, counts]
    self.frames.append(Seen(truth, found, iou))


def pairs_of(video: Video, value: Any) -> tuple[np.ndarray, list[int], list[int]]:
  """Sums of value(frame, i found, j truth) over frames where both are and overlap -> (found tracks, truth tracks), and
  the tracks' numbers."""
  found = sorted({int(t) for s in video.frames for t in s.found.track})
  truth = sorted({int(t) for s in video.frames for t in s.truth.track})
  f, t = {k: i for i, k in enumerate(found)}, {k: i for i, k in enumerate(truth)}
  out = np.zeros((len(found), len(truth)))
  for s in video.frames:
    for i, j in zip(*np.nonzero(s.iou > 0), strict=True):
      out[f[int(s.found.track[i])], t[int(s.truth.track[j])]] += value(s, i, j)
  return out, found, truth


class VideoMasks(Sums):
  """J&F (Pont-Tuset et al. 2017; without given masks Caelles et al. 2019): every true object gets at most one found
  track, so that the sum of J + F is greatest; J and F are averaged over the frames in which the object or its track is
  there, then over objects. DAVIS counts frames in which both are absent as 1; objects of a road come and go, so here
  those count nowhere. Masks are the students' maps: of (64, 128) F's tolerance is 2 of their pixels, 8 of the view."""

  def __init__(self) -> None:
    self.sums = np.zeros(3)  # objects, J, F

  def close(self, video: Video) -> "VideoMasks":
    """Adds a whole segment."""
    masks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def of(s: Seen) -> tuple[np.ndarray, np.ndarray]:
      if id(s) not in masks:
        masks.clear()
        found, truth = (rle.decode(o.rle or [], *o.map_shape) for o in (s.found, s.truth))
        masks[id(s)] = found, truth
      return masks[id(s)]

    def f(s: Seen, i: int, j: int) -> float:
      found, truth = of(s)
      return boundary_accuracy(found[i], truth[j])

    there_f = Counter(int(t) for s in video.frames for t in s.found.track)
    there_t = Counter(int(t) for s in video.frames for t in s.truth.track)
    j_sum, found, truth = pairs_of(video, lambda s, i, j: s.iou[i, j])
    f_sum, _, _ = pairs_of(video, f)
    together = pairs_there(video, found, truth)
    # frames where either is: those of the truth, those of the track, less those of both
    frames = np.array([[there_f[a] + there_t[b] for b in truth] for a in found], float).reshape(j_sum.shape) - together
    j, f_ = j_sum / np.maximum(frames, 1), f_sum / np.maximum(frames, 1)
    rows, columns = linear_sum_assignment(-(j + f_)) if j_sum.size else ([], [])
    self.sums += [
      len(truth),
      j[rows, columns].sum() if len(rows) else 0.0,
      f_[rows, columns].sum() if len(rows) else 0.0,
    ]
    return self

  def result(self) -> dict[str, float]:
    n, j, f = self.sums
    return known({"j_and_f": ratio((j + f) / 2, n), "j": ratio(j, n), "f": ratio(f, n)})


def pairs_there(video: Video, found: list[int], truth: list[int]) -> np.ndarray:
  """(found tracks, truth tracks): frames in which both are, whether they touch or not."""
  f, t = {k: i for i, k in enumerate(found)}, {k: i for i, k in enumerate(truth)}
  out = np.zeros((len(found), len(truth)))
  for s in video.frames:
    out[np.ix_([f[int(k)] for k in s.found.track], [t[int(k)] for k in s.truth.track])] += 1
  return out


class Identities(Sums):
  """IDF1 (Ristani et al. 2016): of the one-to-one matching of whole tracks that has the most frames with IoU >= 0.5 in
  common, 2 IDTP / (true + found boxes).
  switches: of CLEAR MOT (Bernardin and Stiefelhagen 2008): times that a true object's track is another than its last;
  that one it keeps as long as their IoU is 0.5, the rest is matched to overlap most; here for 100 true boxes, since
  counts of different data cannot be compared.
  kept_occluded: of the times that an object that was found is occluded (visible_fraction under 0.3), or gone, and then
  found again when it is not, how often its track is the same; switches_occluded, the others, for 100 of those times.
  """

  def __init__(self) -> None:
    self.sums = np.zeros(6)  # IDTP, true boxes, found boxes, switches, occlusions, switches there

  def close(self, video: Video) -> "Identities":
    """Adds a whole segment."""
    same, _, _ = pairs_of(video, lambda s, i, j: float(s.iou[i, j] >= MATCH))
    idtp = same[linear_sum_assignment(-same)].sum() if same.size else 0.0
    n_truth, n_found = (
      sum(len(o) for o in side) for side in ([s.truth for s in video.frames], [s.found for s in video.frames])
    )
    self.sums += [idtp, n_truth, n_found, *self._follow(video)]
    return self

  @staticmethod
  def _follow(video: Video) -> tuple[int, int, int]:
    """-> switches, occlusions that were survived with any identity, and those with another one than before."""
    last: dict[int, int] = {}  # true track -> track it had
    clear: dict[int, int] = {}  # true track -> track it had when last well seen
    hidden: set[int] = set()  # true tracks that have been hidden since
    switches = occlusions = lost = 0
    for s in video.frames:
      f, t = s.found.track.astype(int), s.truth.track.astype(int)
      matched: dict[int, int] = {}
      free_f, free_t = set(range(len(f))), set(range(len(t)))
      for j, k in enumerate(t):
        i = next((i for i in free_f if last.get(int(k)) == f[i] and s.iou[i, j] >= MATCH), None)
        if i is not None:
          matched[int(k)] = int(f[i])
          free_f.discard(i)
          free_t.discard(j)
      fi, ti = sorted(free_f), sorted(free_t)
      if fi and ti:
        iou = s.iou[np.ix_(fi, ti)]
        for a, b in zip(*linear_sum_assignment(-np.where(iou >= MATCH, iou, 0)), strict=True):
          if iou[a, b] >= MATCH:
            matched[int(t[ti[b]])] = int(f[fi[a]])
      switches += sum(k in last and last[k] != v for k, v in matched.items())
      seen = {int(k): float(v) for k, v in zip(t, s.truth.visible, strict=True)}
      hidden |= {k for k in clear if seen.get(k, 0.0) < HIDDEN}
      for k, v in matched.items():
        if seen[k] >= HIDDEN:
          if k in hidden:
            occlusions += 1
            lost += clear[k] != v
            hidden.discard(k)
          clear[k] = v
      last |= matched
    return switches, occlusions, lost

  def result(self) -> dict[str, float]:
    idtp, truth, found, switches, occlusions, lost = self.sums
    out = {"idf1": ratio(2 * idtp, truth + found), "switches": 100 * ratio(switches, truth)}
    return known(
      {**out, "switches_occluded": 100 * ratio(lost, occlusions), "kept_occluded": 1 - ratio(lost, occlusions)}
    )


class IouTracker:
  """The rival of identities: Hungarian matching, by nothing but the IoU of boxes (at least 0.2), with the same class's
  tracks of the last `max_age` frames, each where it was last seen. A new track for all else."""

  def __init__(self, max_age: int = 40, min_iou: float = 0.2):
    self.max_age, self.min_iou = max_age, min_iou
    self.next = 0
    self.boxes, self.cls, self.ids, self.age = np.zeros((0, 4), np.float32), *(np.zeros(0, np.int64) for _ in range(3))

  def step(self, found: Objects) -> Objects:
    """One frame's objects -> the same, with identities."""
    iou = overlaps(found, Objects(self.boxes), "bbox")
    ok = (iou >= self.min_iou) & (found.cls[:, None] == self.cls[None])
    i, j = linear_sum_assignment(-np.where(ok, iou, 0))
    i, j = i[ok[i, j]], j[ok[i, j]]
    track = np.full(len(found), -1, np.int64)
    track[i] = self.ids[j]
    new = np.flatnonzero(track < 0)
    track[new] = self.next + np.arange(len(new))
    self.next += len(new)
    stay = ~np.isin(np.arange(len(self.ids)), j) & (self.age < self.max_age)
    self.boxes, self.cls = np.concatenate([self.boxes[stay], found.boxes]), np.concatenate([self.cls[stay], found.cls])
    self.ids, self.age = (
      np.concatenate([self.ids[stay], track]),
      np.concatenate([self.age[stay] + 1, np.zeros(len(found), np.int64)]),
    )
    out = found.take(np.arange(len(found)))
    out.track = track
    return out

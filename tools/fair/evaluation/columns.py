"""Who is measured: students, teachers, and rivals that a student must beat to be worth anything. Each says a Scene of
every frame."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openpilot.tools.fair.evaluation.detections import MAP, Detections
from openpilot.tools.fair.evaluation.logged import Logged
from openpilot.tools.fair.evaluation.metrics import Classes, Depth, Tracks
from openpilot.tools.fair.evaluation.scenes import Labels, Queries, Scene, Segment, restrict
from openpilot.tools.fair.evaluation.video import Identities, Video, VideoMasks
from openpilot.tools.fair.labels.dataset import Reader
from openpilot.tools.fair.students.classes import OBJECTS, SEGMENTATION
from openpilot.tools.sim.truth import IGNORE

RIVAL_STEP = 5  # each so many-th frame teaches the mean maps


class MeanMaps:
  """The rivals of depth and segmentation: the same picture for every frame. Depth: the geometric mean of each map
  pixel, which errs less by AbsRel than the arithmetic one; segmentation: the class that the pixel most often has."""

  def __init__(self) -> None:
    self.log_depth, self.n = np.zeros(MAP), np.zeros(MAP)
    self.votes = np.zeros((len(SEGMENTATION), *MAP))

  def learn(self, s: Scene) -> None:
    if s.depth is not None and s.depth_kind == "metric":
      ok = np.isfinite(s.depth) & (s.depth > 0) & (s.depth < 1e4)
      self.log_depth[ok] += np.log(s.depth[ok])
      self.n += ok
    if s.classes is not None:
      for k in range(len(SEGMENTATION)):
        self.votes[k] += s.classes == k

  def less(self, other: "MeanMaps") -> "MeanMaps":
    out = MeanMaps()
    out.log_depth, out.n, out.votes = self.log_depth - other.log_depth, self.n - other.n, self.votes - other.votes
    return out

  def scene(self, valid: np.ndarray) -> Scene:
    """valid (64, 128) bool."""
    s = Scene()
    if self.n.any():
      fill = np.exp(self.log_depth.sum() / self.n.sum())
      s.depth = np.where(
        valid, np.where(self.n > 0, np.exp(self.log_depth / np.maximum(self.n, 1)), fill), np.nan
      ).astype(np.float32)
    if self.votes.any():
      s.classes = np.where(valid, self.votes.argmax(axis=0), IGNORE).astype(np.uint8)
    return s


def learn_maps(segments: Sequence[Segment], truth: str) -> dict[str, MeanMaps]:
  """Of each segment by itself, from every RIVAL_STEP-th of its frames."""
  reader, out = Reader(window=1), {}
  reader.labels = 2
  for s in segments:
    if truth not in s.groups or not s.groups[truth].done():
      continue
    labels, out[s.name] = Labels(s, truth, reader), MeanMaps()
    for frame_id in s.ids[::RIVAL_STEP]:
      scene = labels.scene(frame_id)
      out[s.name].learn(Scene(depth=scene.depth, depth_kind=scene.depth_kind, classes=scene.classes))
  return out


def pool_maps(maps: Sequence[MeanMaps]) -> MeanMaps:
  out = MeanMaps()
  for m in maps:
    out.log_depth, out.n, out.votes = out.log_depth + m.log_depth, out.n + m.n, out.votes + m.votes
  return out


class Hold:
  """The rival of tracks: every point stays where it was first, and is always seen."""

  def __init__(self) -> None:
    self.xy = np.zeros((0, 2))

  def step(self, q: Queries) -> Scene:
    self.xy = np.where(q.fresh[:, None], q.xy, self.xy) if len(self.xy) else q.xy.copy()
    return Scene(followed=(self.xy.copy(), np.ones(len(self.xy), bool)))


class TeacherTracks:
  """A teacher starts its points where it likes. One of them stands for a query where both are seen within 4 view pixels
  of each other where the query starts; from then on it is to move as the query does, and what lies between them at
  first is taken off. Queries that no point stands for say nothing."""

  NEAR = 4.0

  def __init__(self) -> None:
    self.of: dict[int, tuple[int, np.ndarray]] = {}  # slot -> teacher's track, offset
    self.known = np.zeros(0, bool)

  def step(self, q: Queries, points: dict[str, np.ndarray]) -> Scene:
    xy, visible, self.known = np.zeros_like(q.truth), np.zeros_like(q.used), np.zeros_like(q.used)
    at = {int(k): i for i, k in enumerate(points["track"])}
    p = np.stack([points["x"], points["y"]], axis=1).astype(np.float64)
    self.of = {s: v for s, v in self.of.items() if q.used[s] and not q.fresh[s] and v[0] in at}
    for s, (track, offset) in self.of.items():
      xy[s], visible[s], self.known[s] = p[at[track]] + offset, points["visible"][at[track]], True
    taken = {v[0] for v in self.of.values()}
    free = np.array([i for k, i in at.items() if k not in taken and points["visible"][i]], int)
    for s in np.flatnonzero(q.fresh).tolist():
      if len(free):
        distance = np.linalg.norm(p[free] - q.truth[s], axis=1)
        i = int(distance.argmin())
        if distance[i] <= self.NEAR:
          self.of[s] = int(points["track"][free[i]]), q.truth[s] - p[free[i]]
          free = np.delete(free, i)
    return Scene(followed=(xy, visible))


@dataclass
class Card:
  """The accumulators of one column against one reference in one segment, filled as what both sides say allows. score:
  task -> from where a detection counts."""

  score: dict[str, float]
  sums: dict[str, Any] = field(default_factory=dict)
  videos: dict[str, Video] = field(default_factory=dict)
  partial: bool = False  # names fewer classes than the reference

  def _get(self, key: str, make: Any) -> Any:
    if key not in self.sums:
      self.sums[key] = make()
    return self.sums[key]

  def add(self, s: Scene, ref: Scene, q: Queries | None, known: np.ndarray | None = None) -> dict[str, float]:
    """known (N,): queries that this column has an answer to. -> error of this frame, by task; nan where there is
    nothing to judge."""
    out: dict[str, float] = {}
    if s.depth is not None and ref.depth is not None and ref.depth_kind == "metric":
      out["depth"] = self._get("depth", Depth).add(s.depth, ref.depth, s.depth_kind)
    if s.classes is not None and ref.classes is not None:
      both = tuple(sorted(set(s.named) & set(ref.named)))
      self.partial |= both != ref.named
      out["segmentation"] = self._get("segmentation", lambda: Classes(SEGMENTATION)).add(
        restrict(s.classes, both), restrict(ref.classes, both)
      )
    for task in ("objects", "detector"):
      found, truth = getattr(s, task), getattr(ref, task)
      if found is None or truth is None:
        continue
      score = self.score.get(task, 0.0)
      out[task] = self._get(task, lambda score=score: Detections(OBJECTS, "bbox", score)).add(found, truth)
      if task == "objects" and found.rle is not None and truth.rle is not None:
        out["masks"] = self._get("masks", lambda score=score: Detections(OBJECTS, "segm", score)).add(found, truth)
    self.follow(s, ref)
    if s.followed is not None and q is not None:
      k = np.flatnonzero(q.known if known is None else q.known & known)
      if len(k):
        out["lanes"] = self._get("lanes", Tracks).add(
          s.followed[0][k], s.followed[1][k], q.truth[k], q.visible[k], q.hidden_before[k]
        )
    return out

  def follow(self, s: Scene, ref: Scene) -> None:
    """Identities, of objects that count."""
    if s.tracked is None or ref.tracked is None:
      return
    kind = "segm" if s.tracked.rle is not None and ref.tracked.rle is not None else "bbox"
    self.videos.setdefault(kind, Video()).add(s.tracked, ref.tracked, kind)

  def close(self) -> None:
    """Behind the segment's last frame."""
    for kind, video in self.videos.items():
      if not any(len(f.truth) for f in video.frames):  # the reference has no identities
        continue
      self.sums["identity"] = Identities().close(video)
      if kind == "segm":
        self.sums["video"] = VideoMasks().close(video)
    self.videos.clear()

  def log(self, s: Scene, lines: dict[str, np.ndarray], leads: dict[str, np.ndarray]) -> None:
    self._get("log", Logged).add(s, lines, leads, self.score.get("objects", self.score.get("detector", 0.0)))

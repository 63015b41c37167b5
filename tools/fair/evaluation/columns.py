"""Who is measured beside students: teachers, and rivals that a student must beat to be worth anything.

Each says a Scene of every frame."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from openpilot.tools.fair.evaluation.compared import Compared
from openpilot.tools.fair.evaluation.labels import Labels
from openpilot.tools.fair.evaluation.scenes import Queries, Scene, Segment
from openpilot.tools.fair.labels.dataset import Reader
from openpilot.tools.sim.truth import IGNORE

RIVAL_STEP = 5  # each so many-th frame teaches the mean maps


class MeanMaps:
  """The rivals of depth and segmentation: the same picture for every frame. Depth: the geometric mean of each map
  pixel, which errs less by AbsRel than the arithmetic one; segmentation: the class that the pixel most often has."""

  def __init__(self, shape: tuple[int, int], classes: int) -> None:
    self.shape, self.classes = shape, classes
    self.log_depth, self.n = np.zeros(shape), np.zeros(shape)
    self.votes = np.zeros((classes, *shape))

  def learn(self, s: Scene) -> None:
    if s.depth is not None and s.depth_kind == "metric":
      ok = np.isfinite(s.depth) & (s.depth > 0) & (s.depth < 1e4)
      self.log_depth[ok] += np.log(s.depth[ok])
      self.n += ok
    if s.classes is not None:
      for k in range(self.classes):
        self.votes[k] += s.classes == k

  def scene(self, valid: np.ndarray) -> Scene:
    """valid (h, w) bool."""
    s = Scene()
    if self.n.any():
      fill = np.exp(self.log_depth.sum() / self.n.sum())
      s.depth = np.where(
        valid, np.where(self.n > 0, np.exp(self.log_depth / np.maximum(self.n, 1)), fill), np.nan
      ).astype(np.float32)
    if self.votes.any():
      s.classes = np.where(valid, self.votes.argmax(axis=0), IGNORE).astype(np.uint8)
      s.named = tuple(range(self.classes))
    return s


def learn_maps(segments: Sequence[Segment], truth: str, compared: Compared) -> dict[str, MeanMaps]:
  """Of each segment by itself, from every RIVAL_STEP-th of its frames."""
  reader, out, uncounted = Reader(window=1), {}, replace(compared, left_out={})
  reader.labels = 2
  for s in segments:
    if truth not in s.groups or not s.groups[truth].done():
      continue
    labels = Labels(s, truth, reader, uncounted)
    out[s.name] = MeanMaps(compared.map_shape, len(compared.names("maps")))
    for frame_id in s.ids[::RIVAL_STEP]:
      scene = labels.scene(frame_id)
      out[s.name].learn(Scene(depth=scene.depth, depth_kind=scene.depth_kind, classes=scene.classes))
  return out


def pool_maps(maps: Sequence[MeanMaps]) -> MeanMaps:
  out = MeanMaps(maps[0].shape, maps[0].classes)
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

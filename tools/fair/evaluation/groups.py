"""Groups of metrics: each one table of the page, with what fills it, what stands for it, and how its worst frames are
drawn. A task from elsewhere brings its own: load_groups()."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openpilot.tools.fair.evaluation import oriented as oriented_boxes
from openpilot.tools.fair.evaluation import pictures
from openpilot.tools.fair.evaluation.compared import Compared
from openpilot.tools.fair.evaluation.detections import Detections, beside, by_masks
from openpilot.tools.fair.evaluation.labels import MIN_SIDE, MIN_VISIBLE, READERS, Read
from openpilot.tools.fair.evaluation.logged import Logged
from openpilot.tools.fair.evaluation.metrics import Classes, Depth, Tracks, align_least_squares, depth_errors
from openpilot.tools.fair.evaluation.scenes import Queries, Scene
from openpilot.tools.fair.evaluation.student import DECODERS, Decode
from openpilot.tools.fair.evaluation.video import Identities, IouTracker, Video, VideoMasks
from openpilot.tools.fair.tasks import TASKS
from openpilot.tools.sim.truth import IGNORE


@dataclass
class Card:
  """The accumulators of one column against one reference in one segment, filled as what both sides say allows. score:
  task -> from where a detection counts."""

  compared: Compared
  score: dict[str, float]
  sums: dict[str, Any] = field(default_factory=dict)  # group -> its accumulator
  videos: dict[str, Video] = field(default_factory=dict)
  missing: set[str] = field(default_factory=set)  # classes of the reference that this column does not name
  lossy: bool = False  # whether the reference names classes that are left out

  def of(self, group: str, make: Callable[[], Any]) -> Any:
    if group not in self.sums:
      self.sums[group] = make()
    return self.sums[group]

  def add(self, s: Scene, ref: Scene, q: Queries | None, known: np.ndarray | None = None) -> dict[str, float]:
    """known (N,): queries that this column has an answer to. -> error of this frame, by group; nan where there is
    nothing to judge."""
    out: dict[str, float] = {}
    for name, group in GROUPS.items():
      if group.judge is not None and (error := group.judge(self, Pair(s, ref, q, known))) is not None:
        out[name] = error
    self.follow(s, ref)
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
    score = self.score.get("objects", self.score.get("detector", 0.0))
    self.of("log", Logged).add(s, lines, leads, score, self.compared)


@dataclass(frozen=True)
class Pair:
  """What a column and a reference say of one frame. known: see Card.add()."""

  found: Scene
  ref: Scene
  queries: Queries | None
  known: np.ndarray | None


@dataclass(frozen=True)
class Group:
  """title, definition: on the page. headline: the metric that stands for it. words: metric -> what it is, in few words.
  judge: adds a frame to Card.of(its own name, ...), whose accumulators are as metrics.Sums. -> error of the frame, by
  which the worst are found; None where one side says nothing. draw: what a Scene says -> (height, width, 3) uint8. Of a
  task and head from elsewhere, both of the group's name: read puts labels into Scene.more, decode what a student says
  (labels.READERS, student.DECODERS)."""

  title: str
  headline: str
  definition: str
  words: dict[str, str] = field(default_factory=dict)
  judge: Callable[[Card, Pair], float | None] | None = None
  draw: Callable[[np.ndarray, Scene, Compared], np.ndarray | None] | None = None
  read: Read | None = None
  decode: Decode | None = None


def restrict(classes: np.ndarray, named: tuple[int, ...], compared: Compared) -> np.ndarray:
  """Classes that the other side does not name are background to it, unknown where the set has none."""
  rest = IGNORE if compared.background is None else compared.background
  table = np.full(256, IGNORE, np.uint8)
  n = len(compared.names("maps"))
  table[:n] = [k if k in named else rest for k in range(n)]
  return table[classes]


def judge_depth(card: Card, p: Pair) -> float | None:
  if p.found.depth is None or p.ref.depth is None or p.ref.depth_kind != "metric":
    return None
  return card.of("depth", Depth).add(p.found.depth, p.ref.depth, p.found.depth_kind)


def judge_classes(card: Card, p: Pair) -> float | None:
  if p.found.classes is None or p.ref.classes is None:
    return None
  compared = card.compared
  names, both = compared.names("maps"), tuple(sorted(set(p.found.named) & set(p.ref.named)))
  card.missing |= {names[k] for k in set(p.ref.named) - set(both)}
  card.lossy |= p.ref.lossy
  if not set(both) - {compared.background}:  # all would be background to both
    return None
  return card.of("segmentation", lambda: Classes(names)).add(
    restrict(p.found.classes, both, compared), restrict(p.ref.classes, both, compared)
  )


def judge_boxes(card: Card, p: Pair, task: str) -> float | None:
  found, truth = getattr(p.found, task), getattr(p.ref, task)
  if found is None or truth is None:
    return None
  names, score = card.compared.names("boxes"), card.score.get(task, 0.0)
  return card.of(task, lambda: Detections(names, "bbox", score)).add(found, beside(truth, p.ref.unknown, len(names)))


def judge_masks(card: Card, p: Pair) -> float | None:
  found, truth = p.found.objects, p.ref.objects
  if found is None or truth is None or found.rle is None or truth.rle is None:
    return None
  names, score = card.compared.names("boxes"), card.score.get("objects", 0.0)
  masks = by_masks(beside(truth, p.ref.unknown, len(names)))
  return card.of("masks", lambda: Detections(names, "segm", score)).add(found, masks)


def judge_oriented(card: Card, p: Pair) -> float | None:
  found, truth = p.found.more.get("oriented"), p.ref.more.get("oriented")
  if found is None or truth is None:
    return None
  names, score = card.compared.names("boxes"), card.score.get("oriented", 0.0)
  return card.of("oriented", lambda: oriented_boxes.OrientedBoxes(names, score)).add(found, truth)


def judge_points(card: Card, p: Pair) -> float | None:
  if p.found.followed is None or p.queries is None:
    return None
  q = p.queries
  k = np.flatnonzero(q.known if p.known is None else q.known & p.known)
  if not len(k):
    return None
  (points, visible), view = p.found.followed, card.compared.view
  return card.of("lanes", Tracks).add(points[k], visible[k], q.truth[k], q.visible[k], q.hidden_before[k], view)


def draw_lanes(rgb: np.ndarray, s: Scene, compared: Compared) -> np.ndarray | None:
  q = s.more.get("queries")
  if q is None:
    return None
  points, visible = s.followed if s.followed is not None else (q.truth, q.visible)
  return pictures.draw_points(rgb, points, visible, q.known)


def text(*parts: Any) -> str:
  """Docstrings, in which the definitions stand, as one paragraph."""
  return " ".join(" ".join((p if isinstance(p, str) else p.__doc__ or "").split()) for p in parts)


COUNTS = (
  f"True objects of which less than {MIN_VISIBLE:.0%} is seen, or with a side under {MIN_SIDE:.0f} pixels, "
  "count nowhere."
)
FAR = "Truth beyond 200 m and outside the camera's image counts nowhere."
AP = {
  "ap": "average precision (COCO)",
  "ap50": "average precision, overlap 0.5",
  "ar": "average recall (COCO)",
  "recall": "share of the true objects that is found",
  "precision": "share of what is found that is true",
  "recall_clear": "found, of those in full view",
  "recall_partly": "found, of those hidden in part",
  "recall_mostly": "found, of those mostly hidden",
}


def depth() -> dict[str, Group]:
  return {
    "depth": Group(
      "Depth",
      "abs_rel",
      text(depth_errors, FAR, Depth, "_lsq:", align_least_squares),
      {"abs_rel": "mean relative error", "delta1": "share of pixels within 25%", "silog": "error but for one scale"},
      judge_depth,
      pictures.draw_depth,
    )
  }


def segmentation() -> dict[str, Group]:
  return {
    "segmentation": Group(
      "Segmentation",
      "miou",
      text(Classes, "A class that a teacher does not know is background on both sides."),
      {"miou": "mean overlap of the classes (IoU)"},
      judge_classes,
      pictures.draw_classes,
    )
  }


def objects() -> dict[str, Group]:
  return {
    "objects": Group(
      "Objects, boxes",
      "ap",
      text(Detections, COUNTS),
      AP,
      lambda c, p: judge_boxes(c, p, "objects"),
      pictures.draw_objects,
    ),
    "masks": Group(
      "Objects, masks",
      "mask_iou",
      text("As of boxes, by the IoU of masks at the size of the student's maps.", COUNTS),
      {**AP, "mask_iou": "mean overlap of the masks (IoU)"},
      judge_masks,
      pictures.draw_masks,
    ),
    "video": Group(
      "Objects over the video, J&F",
      "j_and_f",
      text(VideoMasks),
      {"j_and_f": "mean of the next two", "j": "overlap of the masks", "f": "agreement of their outlines"},
    ),
    "identity": Group(
      "Identities",
      "idf1",
      text(Identities, "Students' identities are those of fairmodeld's tracker; 'IoU only':", IouTracker),
      {
        "idf1": "share of boxes with the right identity",
        "switches": "changes of identity for 100 true boxes",
        "switches_occluded": "the same behind an occlusion, for 100",
        "kept_occluded": "share of occlusions behind which it is the same",
      },
    ),
  }


def detector() -> dict[str, Group]:
  return {
    "detector": Group(
      "Detector",
      "ap",
      text("As of objects.", COUNTS),
      AP,
      lambda c, p: judge_boxes(c, p, "detector"),
      pictures.draw_detector,
    )
  }


def oriented() -> dict[str, Group]:
  return {
    "oriented": Group(
      "Oriented boxes",
      "ap50",
      text(oriented_boxes.OrientedBoxes),
      {
        "ap50": "DOTA's mAP: overlap 0.5, 11 recalls",
        "ap50_area": "area under the curve, overlap 0.5",
        "ap75_area": "area under the curve, overlap 0.75",
        "ap": "area, mean of overlaps 0.50 to 0.95",
        "recall": "share of the true objects that is found",
        "precision": "share of what is found that is true",
      },
      judge_oriented,
      oriented_boxes.draw_oriented,
      oriented_boxes.read_oriented,
      oriented_boxes.decode_oriented,
    )
  }


def lanes() -> dict[str, Group]:
  return {
    "lanes": Group(
      "Tracks of points",
      "average_jaccard",
      text(Tracks, "The rival 'hold still' says that every point stays where it was first, and is seen."),
      {
        "delta_avg": "share of seen points that are in place",
        "occlusion_accuracy": "share of points rightly said to be seen or hidden",
        "average_jaccard": "both at once",
        "delta_after": "in place, of points that were hidden before",
      },
      judge_points,
      draw_lanes,
    )
  }


def log() -> dict[str, Group]:
  return {
    "log": Group(
      "Lane lines and leads",
      "log_lane_recall",
      text(Logged),
      {
        "log_lane_recall": "share of openpilot's lane lines that are seen",
        "log_lane_chance": "the same by chance",
        "log_lead_recall": "share of openpilot's leads that are found",
        "abs_rel_lead": "mean relative error of the depth at a lead",
      },
    )
  }


GROUPS: dict[str, Group] = {}  # in the order of the page


def load_groups() -> None:
  """The groups of all tasks that are registered by now: Task.metric is 'module:function', which gives them by name."""
  found = dict(GROUPS)
  for task in TASKS.values():
    if task.metric:
      module, _, name = task.metric.partition(":")
      found |= getattr(importlib.import_module(module), name)()
  found |= log()
  GROUPS.clear()
  GROUPS.update({k: v for k, v in found.items() if k != "log"}, log=found["log"])
  for name, group in GROUPS.items():
    if group.read is not None:
      READERS.setdefault(name, group.read)
    if group.decode is not None:
      DECODERS.setdefault(name, group.decode)


load_groups()

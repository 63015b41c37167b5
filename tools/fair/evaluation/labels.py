"""Truth and teachers as Scenes, read from a label store.

READERS: which labels say what, and how; a group of metrics from elsewhere adds its own."""

from collections.abc import Callable

import cv2
import numpy as np

from openpilot.tools.fair.evaluation.compared import Compared
from openpilot.tools.fair.evaluation.detections import make_objects
from openpilot.tools.fair.evaluation.scenes import Scene, Segment
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.labels.dataset import Reader, rows_by_frame
from openpilot.tools.fair.maps import classes_to_map, depth_to_map
from openpilot.tools.fair.spec import UNKNOWN, plain
from openpilot.tools.fair.tasks import TASKS, Task, names_of
from openpilot.tools.fair.teacher import Label
from openpilot.tools.sim.truth import IGNORE

MIN_VISIBLE = 0.1  # true objects of which less is seen,
MIN_SIDE = 6.0  # or whose box has a side shorter than this, pixels, count nowhere
DEPTH_KINDS = {"m": "metric", "relative": "affine"}


class Labels:
  """One teacher's labels of one segment as Scenes. name: a group of the store. Raises UserError where a class's name is
  not known."""

  def __init__(self, segment: Segment, name: str, reader: Reader, compared: Compared | None = None):
    self.group, self.reader, self.name = segment.groups[name], reader, name
    self.compared = compared or Compared()
    self.rows = rows_by_frame(self.group)
    self.segment, self.valid = segment, segment.map_valid
    self.by_task: dict[str, list[Label]] = {}
    self.index: dict[str, np.ndarray] = {}  # task -> of each class that its labels name the one compared, -1 none
    for task in READERS if self.group.teacher != "openpilot" else ():
      # openpilot's lines are drawn anew in every frame, no points that are followed
      self._find(TASKS[task])

  def _find(self, task: Task) -> None:
    labels = [x for x in self.group.labels if task.teaches(x, self.compared.classes)]
    if not labels:
      return
    if task.kind:
      if not self.compared.names(task.kind):
        self.compared.leave_out(self.name, labels[0].name, "frames", self.group.row_count)
        return
      names = names_of(labels, self.compared.classes, task.kind)
      index = self.compared.resolve(names, task.kind, f"{self.where}, '{labels[0].name}'")
      if labels[0].unit == "probability":  # one for each class
        for k in np.flatnonzero(index < 0).tolist():
          self.compared.leave_out(self.name, names[k], "maps", self.group.row_count)
        labels, index = [x for x, k in zip(labels, index, strict=True) if k >= 0], index[index >= 0]
      if not (index >= 0).any():
        return
      self.index[task.name] = index
    self.by_task[task.name] = labels

  @property
  def where(self) -> str:
    return f"labels by '{self.name}' of {self.group.segment}"

  def tasks(self) -> set[str]:
    return {"log"} if self.group.teacher == "openpilot" else set(self.by_task)

  def scene(self, frame_id: int) -> Scene:
    row, s = self.rows.get(frame_id), Scene()
    if row is not None:
      self.valid = self.segment.map_valid_at(frame_id)
      for task, labels in self.by_task.items():
        READERS[task](self, labels, row, s)
    return s

  def points(self, frame_id: int) -> dict[str, np.ndarray] | None:
    row, labels = self.rows.get(frame_id), self.by_task.get("lanes")
    return None if row is None or not labels else self.reader.table(self.group, labels[0].name, row)

  def masked(self, x: np.ndarray, fill: float) -> np.ndarray:
    return np.where(self.valid, x, np.array(fill, x.dtype))


def read_depth(x: Labels, labels: list[Label], row: int, s: Scene) -> None:
  label = labels[0]
  s.depth_kind = DEPTH_KINDS[label.unit]
  z = depth_to_map(x.reader.dense(x.group, label.name, [row])[0], label.unit, x.compared.map_shape)
  s.depth = x.masked(z if s.depth_kind == "metric" else 1 / z, np.nan)


def read_classes(x: Labels, labels: list[Label], row: int, s: Scene) -> None:
  if labels[0].unit == "class":
    label = labels[0]
    table = np.full(256, IGNORE, np.uint8)
    found = x.index["segmentation"]
    table[np.flatnonzero(found >= 0)] = found[found >= 0]
    ids = x.masked(
      classes_to_map(x.reader.dense(x.group, label.name, [row])[0], len(label.classes), x.compared.map_shape), IGNORE
    )
    for k in np.flatnonzero(found < 0).tolist():
      x.compared.leave_out(x.name, label.classes[k], "map pixels", int((ids == k).sum()))
    s.classes, s.named = table[ids], tuple(sorted({int(k) for k in found if k >= 0}))
    s.lossy = x.compared.unknown(label.classes)
    return
  # a probability for each class: what comes later in the list of classes lies on top
  h, w = x.compared.map_shape
  rest = x.compared.background
  out, unknown = np.full((h, w), IGNORE if rest is None else rest, np.uint8), np.zeros((h, w), bool)
  named = sorted(zip(x.index["segmentation"].tolist(), (label.name for label in labels), strict=True))
  for k, name in named:
    p = x.reader.dense(x.group, name, [row])[0].astype(np.float32)
    p = cv2.resize(p.reshape(p.shape[-2:]), (w, h), interpolation=cv2.INTER_AREA)
    out[p > 0.5] = k
    unknown |= ~np.isfinite(p)
  s.classes = x.masked(np.where(unknown, np.uint8(IGNORE), out), IGNORE)
  s.named = tuple(sorted({k for k, _ in named} | ({rest} if rest is not None else set())))


def read_objects(x: Labels, labels: list[Label], row: int, s: Scene) -> None:
  label, table = labels[0], x.reader.table(x.group, labels[0].name, row)
  to_class = x.index["objects"]
  n = len(table["cls"])
  boxes = np.stack([np.asarray(table[k], np.float32) for k in ("x0", "y0", "x1", "y1")], axis=1).reshape(n, 4)
  height, width = x.compared.view
  boxes = np.clip(boxes, np.float32(-0.5), np.array([width, height, width, height], np.float32) - 0.5)
  visible = np.asarray(table["visible_fraction"], np.float32) if "visible_fraction" in table else np.ones(n, np.float32)
  cls = table["cls"].astype(int)
  o = make_objects(
    boxes,
    to_class[cls] if n else [],
    table["score"] if "score" in table else None,
    track=table["track"].astype(np.int64) if "track" in table else np.full(n, -1),
    visible=visible,
    ignore=(visible < MIN_VISIBLE) | ((boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=1e9) < MIN_SIDE),
    map_shape=x.compared.map_shape,
  )
  if "rle" in table and label.shape:
    o.rle = [small_rle(str(c), label.shape[-2:], x.compared.map_shape) for c in table["rle"]]
    o.boxed = np.array([not str(c) for c in table["rle"]], bool)
  for k in cls[o.cls < 0].tolist():
    x.compared.leave_out(x.name, label.classes[k], "objects", 1)
  s.objects = s.detector = o.take(o.cls >= 0)
  s.unknown = boxes[[plain(label.classes[k]) in UNKNOWN for k in cls.tolist()]] if n else None
  s.tracked = s.objects if "track" in table else None


def small_rle(counts: str, shape: tuple[int, ...], to: tuple[int, int]) -> str:
  """A mask of the view's label, at the size (h, w) of a student's maps: pixels of which at least 40% are the object, as
  in training."""
  if not counts:
    return rle.encode(np.zeros((1, *to), bool))[0]
  if tuple(shape) == to:
    return counts
  mask = cv2.resize(rle.decode(counts, *shape).astype(np.float32), to[::-1], interpolation=cv2.INTER_AREA)
  return rle.encode((mask > 0.4)[None])[0]


def read_points(x: Labels, labels: list[Label], row: int, s: Scene) -> None:
  s.points = x.reader.table(x.group, labels[0].name, row)


def no_more(x: Labels, labels: list[Label], row: int, s: Scene) -> None:
  """What another task has read already."""


Read = Callable[[Labels, list[Label], int, Scene], None]
# task -> puts what its labels say of one row into the scene
READERS: dict[str, Read] = {
  "depth": read_depth,
  "segmentation": read_classes,
  "objects": read_objects,
  "detector": no_more,
  "lanes": read_points,
}

"""Truth and teachers as Scenes, read from a label store.

READERS: which labels say what, and how; a group of metrics from elsewhere adds its own."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from openpilot.tools.fair.evaluation.compared import Compared
from openpilot.tools.fair.evaluation.detections import make_objects
from openpilot.tools.fair.evaluation.scenes import Scene, Segment
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.labels.dataset import Reader, rows_by_frame
from openpilot.tools.fair.maps import classes_to_map, depth_to_map
from openpilot.tools.fair.teacher import Label
from openpilot.tools.sim.truth import IGNORE

MIN_VISIBLE = 0.1  # true objects of which less is seen,
MIN_SIDE = 6.0  # or whose box has a side shorter than this, pixels, count nowhere
DEPTH_KINDS = {"m": "metric", "relative": "affine"}


@dataclass(frozen=True)
class LabelReader:
  """says: whether a label speaks of the task; over names of classes the Compared decides, and may raise UserError.
  read: puts what the labels say of one row into the scene."""

  says: Callable[[Label, Compared, str], bool]
  read: Callable[["Labels", list[Label], int, Scene], None]


class Labels:
  """One teacher's labels of one segment as Scenes. name: a group of the store. Raises UserError where a class's name is
  not known."""

  def __init__(self, segment: Segment, name: str, reader: Reader, compared: Compared | None = None):
    self.group, self.reader, self.name = segment.groups[name], reader, name
    self.compared = compared or Compared()
    self.rows = rows_by_frame(self.group)
    self.valid = segment.map_valid
    self.by_task: dict[str, list[Label]] = {}
    self.tables: dict[tuple[str, str], np.ndarray] = {}  # label, kind -> index of each of its classes, -1 none
    for task, r in READERS.items() if self.group.teacher != "openpilot" else ():
      # openpilot's lines are drawn anew in every frame, no points that are followed
      if labels := [x for x in self.group.labels if r.says(x, self.compared, self.where)]:
        self.by_task[task] = labels
    for label in self.group.labels:
      if label.unit == "probability" and self.compared.unknown([label.name]):
        self.compared.leave_out(name, label.name, "maps", self.group.row_count)

  @property
  def where(self) -> str:
    return f"labels by '{self.name}' of {self.group.segment}"

  def tasks(self) -> set[str]:
    return {"log"} if self.group.teacher == "openpilot" else set(self.by_task)

  def scene(self, frame_id: int) -> Scene:
    row, s = self.rows.get(frame_id), Scene()
    if row is not None:
      for task, labels in self.by_task.items():
        READERS[task].read(self, labels, row, s)
    return s

  def points(self, frame_id: int) -> dict[str, np.ndarray] | None:
    row, labels = self.rows.get(frame_id), self.by_task.get("lanes")
    return None if row is None or not labels else self.reader.table(self.group, labels[0].name, row)

  def table(self, label: Label, kind: str) -> np.ndarray:
    """(N,) of the label's classes: index into those that are compared, -1 none."""
    key = (label.name, kind)
    if key not in self.tables:
      names = label.classes or self.compared.names(kind)
      self.tables[key] = self.compared.resolve(names, kind, f"{self.where}, '{label.name}'")
    return self.tables[key]

  def masked(self, x: np.ndarray, fill: float) -> np.ndarray:
    return np.where(self.valid, x, np.array(fill, x.dtype))


def read_depth(x: Labels, labels: list[Label], row: int, s: Scene) -> None:
  label = labels[0]
  s.depth_kind = DEPTH_KINDS[label.unit]
  z = depth_to_map(x.reader.dense(x.group, label.name, [row])[0], label.unit, x.compared.map_shape)
  s.depth = x.masked(z if s.depth_kind == "metric" else 1 / z, np.nan)


def names_classes(label: Label, compared: Compared, where: str) -> bool:
  """Of a map of one class's probability, whether that class is compared."""
  if label.unit != "probability":
    return label.unit == "class"
  return label.name != "features" and bool(compared.resolve([label.name], "maps", where)[0] >= 0)


def read_classes(x: Labels, labels: list[Label], row: int, s: Scene) -> None:
  if labels[0].unit == "class":
    label = labels[0]
    table = np.full(256, IGNORE, np.uint8)
    found = x.table(label, "maps")
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
  named = sorted((int(x.compared.resolve([label.name], "maps", x.where)[0]), label.name) for label in labels)
  for k, name in named:
    p = x.reader.dense(x.group, name, [row])[0].astype(np.float32)
    p = cv2.resize(p.reshape(p.shape[-2:]), (w, h), interpolation=cv2.INTER_AREA)
    out[p > 0.5] = k
    unknown |= ~np.isfinite(p)
  s.classes = x.masked(np.where(unknown, np.uint8(IGNORE), out), IGNORE)
  s.named = tuple(sorted({k for k, _ in named} | ({rest} if rest is not None else set())))


def read_objects(x: Labels, labels: list[Label], row: int, s: Scene) -> None:
  label, table = labels[0], x.reader.table(x.group, labels[0].name, row)
  to_class = x.table(label, "boxes")
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
  for k in cls[o.cls < 0].tolist():
    x.compared.leave_out(x.name, label.classes[k], "objects", 1)
  s.objects = s.detector = o.take(o.cls >= 0)
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


def is_boxes(label: Label, compared: Compared, where: str) -> bool:
  return label.kind == "boxes"


READERS: dict[str, LabelReader] = {
  "depth": LabelReader(lambda label, *_: label.unit in DEPTH_KINDS and label.name != "features", read_depth),
  "segmentation": LabelReader(names_classes, read_classes),
  "objects": LabelReader(is_boxes, read_objects),
  "detector": LabelReader(is_boxes, no_more),
  "lanes": LabelReader(lambda label, *_: label.kind == "points" and label.name == "points", read_points),
}

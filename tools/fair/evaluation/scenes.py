"""What is known of one frame, in one form, whoever says it: truth, teacher, student, or rival. Truth and teachers are
read from a label store here."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W
from openpilot.tools.fair.distillation.data import valid_of
from openpilot.tools.fair.evaluation.detections import MAP, Objects, make_objects
from openpilot.tools.fair.labels.dataset import Reader, rows_by_frame
from openpilot.tools.fair.labels.store import Group, LabelStore
from openpilot.tools.fair.maps import classes_to_map, depth_to_map
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.students.classes import NAMES, OBJECTS, SEGMENTATION
from openpilot.tools.fair.tasks import task_of
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import read_json
from openpilot.tools.sim.truth import IGNORE

MIN_VISIBLE = 0.1  # true objects of which less is seen,
MIN_SIDE = 6.0  # or whose box has a side shorter than this, view pixels, count nowhere
SLOTS = 128  # points that are followed at a time
NO_POINTS = {"track": np.zeros(0, np.int64), "x": np.zeros(0), "y": np.zeros(0), "visible": np.zeros(0, bool)}
CONDITIONS = ("time_of_day", "weather")
DEPTH_KINDS = {"m": "metric", "relative": "affine"}


@dataclass
class Scene:
  """One frame. None: nothing is said of it."""

  depth: np.ndarray | None = None  # (64, 128) float32 meters, nan unknown
  depth_kind: str = "metric"  # see metrics.Depth
  classes: np.ndarray | None = None  # (64, 128) uint8, index into SEGMENTATION, 255 unknown
  named: tuple[int, ...] = tuple(range(len(SEGMENTATION)))  # classes that whoever says it knows
  objects: Objects | None = None
  detector: Objects | None = None
  tracked: Objects | None = None  # with identities
  points: dict[str, np.ndarray] | None = None  # track, x, y, visible: of a label
  # points (N, 2) and visible (N,), of the queries that everyone is given
  followed: tuple[np.ndarray, np.ndarray] | None = None


@dataclass
class Segment:
  """One route segment of a store, with its stored model frames."""

  name: str
  groups: dict[str, Group]
  rows: list[int]  # of the frames, in order
  ids: list[int]
  valid: np.ndarray  # (256, 512) bool
  conditions: list[str] = field(default_factory=list)

  @property
  def route(self) -> str:
    return self.name.rsplit("--", 1)[0]

  @property
  def frames(self) -> Group:
    return self.groups["frames"]

  @property
  def map_valid(self) -> np.ndarray:
    return self.valid[1::4, 1::4]


def open_segments(
  root: Path,
  teachers: set[str],
  routes: list[Path],
  only: str | None = None,
  limit: int | None = None,
  stale: bool = False,
) -> list[Segment]:
  """All segments with stored frames; the first `limit` frames of each. routes: folders in which the routes themselves
  may lie. Raises UserError where no segment has frames, one has two sets of them or of labels by one of `teachers`, or
  some are stale (labels/rules.py) and `stale` does not take them."""
  store = LabelStore(root)
  by_segment = store.by_segment({"frames", *teachers})
  out = []
  for name, groups in sorted(by_segment.items()):
    if only not in (None, name) or "frames" not in groups or not groups["frames"].done():
      continue
    frames = groups["frames"]
    rows = sorted(rows_by_frame(frames).values())[:limit]
    ids = frames.frames["frame_id"].to_numpy()[rows].tolist()
    out.append(Segment(name, groups, rows, ids, valid_of(frames), conditions_of(name, groups, routes)))
  store.check_stale((s.groups[t] for s in out for t in ("frames", *sorted(teachers)) if t in s.groups), stale)
  if not out:
    raise UserError(
      f"{root} holds no model frames{f' of {only}' if only else ''} to run a student on; label its routes without "
      "--no-frames"
    )
  return out


def conditions_of(name: str, groups: dict[str, Group], routes: list[Path]) -> list[str]:
  """'night', 'rain', ... as the simulator wrote them in the route's truth.json, which its labels remember; [] where
  neither is at hand."""
  for group in groups.values():
    if source := group.meta.get("source"):
      return [str(source[k]) for k in CONDITIONS if source.get(k)]
  for folder in routes:
    for path in (folder / name, *folder.glob(f"*/{name}")):
      info = path / "truth" / "truth.json"
      if info.exists():
        try:
          said = read_json(info)
        except ValueError:
          raise UserError(f"{info} is not JSON; write the route again, or leave out --routes") from None
        return [str(said[k]) for k in CONDITIONS if said.get(k)]
  return []


class Labels:
  """One teacher's labels of one segment as Scenes. name: a group of the store."""

  def __init__(self, segment: Segment, name: str, reader: Reader):
    self.group, self.reader = segment.groups[name], reader
    self.rows = rows_by_frame(self.group)
    self.by_task: dict[str, list[Label]] = {}
    for label in self.group.labels:
      for task in (
        task_of(label) if name != "openpilot" else ()
      ):  # its lines are drawn anew in every frame, no points that are followed
        self.by_task.setdefault(task, []).append(label)
    self.valid = segment.map_valid

  def tasks(self) -> set[str]:
    if self.group.teacher == "openpilot":
      return {"log"}
    return {t for t in self.by_task if t != "features"}

  def scene(self, frame_id: int) -> Scene:
    row = self.rows.get(frame_id)
    if row is None:
      return Scene()
    s = Scene()
    if labels := self.by_task.get("depth"):
      s.depth_kind = DEPTH_KINDS[labels[0].unit]
      z = depth_to_map(self.reader.dense(self.group, labels[0].name, [row])[0], labels[0].unit)
      s.depth = self._masked(z if s.depth_kind == "metric" else 1 / z, np.nan)
    if labels := self.by_task.get("segmentation"):
      s.classes, s.named = self._classes(labels, row)
    if labels := self.by_task.get("objects"):
      table = self.reader.table(self.group, labels[0].name, row)
      s.objects = s.detector = self._objects(labels[0], table)
      s.tracked = s.objects if "track" in table else None
    s.points = self.points(frame_id)
    return s

  def points(self, frame_id: int) -> dict[str, np.ndarray] | None:
    row, labels = self.rows.get(frame_id), self.by_task.get("lanes")
    return None if row is None or not labels else self.reader.table(self.group, labels[0].name, row)

  def _masked(self, x: np.ndarray, fill: float) -> np.ndarray:
    return np.where(self.valid, x, np.array(fill, x.dtype))

  def _classes(self, labels: list[Label], row: int) -> tuple[np.ndarray, tuple[int, ...]]:
    names = NAMES["segmentation_names"]
    if labels[0].unit == "class":
      x = self.reader.dense(self.group, labels[0].name, [row])[0]
      table = np.full(256, IGNORE, np.uint8)
      for k, name in enumerate(labels[0].classes):
        table[k] = SEGMENTATION.index(names[name]) if name in names else IGNORE
      return self._masked(table[classes_to_map(x, len(labels[0].classes))], IGNORE), tuple(
        sorted({int(k) for k in table if k != IGNORE})
      )
    # a probability for each class: what comes later in the list of classes lies on top
    out, unknown = np.zeros(MAP, np.uint8), np.zeros(MAP, bool)
    found = sorted((SEGMENTATION.index(names[x.name]), x.name) for x in labels)
    for k, name in found:
      p = self.reader.dense(self.group, name, [row])[0].astype(np.float32)
      p = cv2.resize(p.reshape(p.shape[-2:]), (MAP[1], MAP[0]), interpolation=cv2.INTER_AREA)
      out[p > 0.5] = k
      unknown |= ~np.isfinite(p)
    return self._masked(np.where(unknown, np.uint8(IGNORE), out), IGNORE), (0, *(k for k, _ in found))

  def _objects(self, label: Label, table: dict[str, np.ndarray]) -> Objects:
    names = NAMES["object_names"]
    to_class = np.array(
      [OBJECTS.index(names[c]) if c in names else -1 for c in label.classes] or range(len(OBJECTS)), np.int64
    )
    n = len(table["cls"])
    boxes = np.stack([np.asarray(table[k], np.float32) for k in ("x0", "y0", "x1", "y1")], axis=1).reshape(n, 4)
    low, high = np.full(4, -0.5, np.float32), np.array([VIEW_W, VIEW_H, VIEW_W, VIEW_H], np.float32) - 0.5
    boxes = np.clip(boxes, low, high)
    visible = (
      np.asarray(table["visible_fraction"], np.float32) if "visible_fraction" in table else np.ones(n, np.float32)
    )
    o = make_objects(
      boxes,
      to_class[table["cls"].astype(int)] if n else [],
      table["score"] if "score" in table else None,
      track=table["track"].astype(np.int64) if "track" in table else np.full(n, -1),
      visible=visible,
      ignore=(visible < MIN_VISIBLE) | ((boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=1e9) < MIN_SIDE),
    )
    if "rle" in table and label.shape:
      o.rle = [small_rle(str(c), label.shape[-2:]) for c in table["rle"]]
    return o.take(o.cls >= 0)


def small_rle(counts: str, shape: tuple[int, ...]) -> str:
  """A mask of the view's label, at the size of a student's maps: pixels of which at least 40% are the object, as in
  training."""
  if not counts:
    return rle.encode(np.zeros((1, *MAP), bool))[0]
  if tuple(shape) == MAP:
    return counts
  mask = cv2.resize(rle.decode(counts, *shape).astype(np.float32), (MAP[1], MAP[0]), interpolation=cv2.INTER_AREA)
  return rle.encode((mask > 0.4)[None])[0]


@dataclass
class Queries:
  """Points of one frame that every student is to follow, in N fixed slots, and the truth of them."""

  xy: np.ndarray  # (N, 2) where a fresh point is
  used: np.ndarray  # (N,) bool
  fresh: np.ndarray  # (N,) bool
  known: np.ndarray  # (N,) bool: the truth says where it is now, and it is not fresh
  truth: np.ndarray  # (N, 2)
  visible: np.ndarray  # (N,) bool
  hidden_before: np.ndarray  # (N,) bool


class QueryMaker:
  """Slots for the true tracks of one segment: a track takes a free slot in the first frame in which it is seen, and
  gives it back behind its last. Tracks that find no slot are left out, for all alike."""

  def __init__(self, tables: list[dict[str, np.ndarray] | None], slots: int = SLOTS):
    self.tables, self.slots = tables, slots
    self.last = {int(k): t for t, table in enumerate(tables) if table is not None for k in table["track"]}
    self.slot: dict[int, int] = {}
    self.hidden: set[int] = set()
    self.refused: set[int] = set()

  def step(self, t: int) -> Queries:
    table = self.tables[t] or NO_POINTS
    self.slot = {k: s for k, s in self.slot.items() if self.last[k] >= t}
    n = self.slots
    used, fresh, known, visible, hidden_before = (np.zeros(n, bool) for _ in range(5))
    q = Queries(np.zeros((n, 2)), used, fresh, known, np.zeros((n, 2)), visible, hidden_before)
    free = sorted(set(range(n)) - set(self.slot.values()), reverse=True)
    for k, x, y, seen in zip(*(table[c] for c in ("track", "x", "y", "visible")), strict=True):
      k = int(k)
      if k not in self.slot:
        if not seen or k in self.refused:
          continue
        if not free:
          self.refused.add(k)
          continue
        s = self.slot[k] = free.pop()
        q.fresh[s] = True
        q.xy[s] = x, y
        self.hidden.discard(k)
      s = self.slot[k]
      q.known[s] = not q.fresh[s]
      q.truth[s], q.visible[s], q.hidden_before[s] = (x, y), seen, k in self.hidden
      if not seen:
        self.hidden.add(k)
    q.used[list(self.slot.values())] = True
    return q


def restrict(classes: np.ndarray, named: tuple[int, ...]) -> np.ndarray:
  """Classes that the other side does not name are background to it."""
  table = np.array(
    [k if k in named else 0 for k in range(len(SEGMENTATION))] + [IGNORE] * (256 - len(SEGMENTATION)), np.uint8
  )
  return table[classes]


def check_label(segments: list[Segment], name: str, root: Path) -> list[Segment]:
  """The segments that `name` has labeled. Raises UserError where there is none."""
  there = [s for s in segments if name in s.groups and s.groups[name].done()]
  if not there:
    teachers: set[str] = {t for s in segments for t in s.groups if t != "frames"}
    raise UserError(
      f"{root} has no labels by '{name}' of segments with frames; there are "
      f"{', '.join(sorted(teachers)) or 'none at all'}"
    )
  return there


def info_of(group: Group) -> dict[str, Any]:
  t = group.meta["teacher"]
  return {"name": t["name"], "model_id": t["model_id"], "checkpoint": t["checkpoint"][:12], "licence": t["license"]}

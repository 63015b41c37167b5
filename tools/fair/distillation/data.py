"""Which labels of a store teach which task, and clips of consecutive frames with them."""

import copy
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.frames import ModelFrame
from openpilot.selfdrive.modeld.fair.heads.ground import DEFAULT_HEIGHT
from openpilot.tools.fair.distillation.look import Look, look_at, picture_of
from openpilot.tools.fair.distillation.sampling import weights_of
from openpilot.tools.fair.labels.dataset import Reader, rows_by_frame, shuffled_chunks
from openpilot.tools.fair.labels.placement import rgb_of
from openpilot.tools.fair.labels.meta import CHUNK
from openpilot.tools.fair.labels.store import Group
from openpilot.tools.fair.spec import UNKNOWN, ClassSet, InputSpec, plain, road_classes
from openpilot.tools.fair.tasks import TASKS, Said, names_of, task_name
from openpilot.tools.fair.teacher import COORDINATES, LICENSES, Clip, Label, Teacher
from openpilot.tools.lib.errors import UserError, printable
from openpilot.tools.lib.said import command


@dataclass
class Source:
  """What teaches one task in one segment."""

  group: Group
  labels: list[Label]  # one; of a teacher that gives a probability map for each class, all that are learned
  rows: dict[int, int]  # frame id -> row
  index: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # see tasks.Said
  left_out: tuple[str, ...] = ()  # names of classes that are not learned

  def says(self, count: int) -> np.ndarray:
    """(count,) bool of as many classes: of which it says where they are. The simulator knows all that is there."""
    out = np.full(count, self.group is not None and self.group.teacher == "simulator")
    out[self.index[self.index >= 0]] = True
    return out


@dataclass
class Segment:
  name: str
  frames: Group
  sources: dict[str, Source]
  valid: np.ndarray  # (H, W) bool: pixels of the student's picture that the camera's covers
  sizes: np.ndarray | None = None  # (rows, 2) width and height of pictures that are each placed by itself
  height: float | None = None  # of the camera above the road, m, where it was stored
  groups: Mapping[str, Group] = field(default_factory=dict)  # all that the store has of it, by teacher

  @property
  def still(self) -> bool:
    """Whether its frames are pictures of a road camera that do not follow on each other."""
    return bool(self.frames.meta["camera"].get("stream") == "still")

  def valid_in(self, rows: Sequence[int], picture: InputSpec) -> np.ndarray:
    """(H, W) bool, or (len(rows), H, W) where they differ."""
    if self.sizes is None:
      return self.valid
    return np.stack([covered(picture, *map(int, self.sizes[r])) for r in rows])


@lru_cache(64)
def covered(picture: InputSpec, width: int, height: int) -> np.ndarray:
  return picture.covered(width, height)


@dataclass
class RawClip:
  """T consecutive frames and what teachers say of them, as stored."""

  name: str
  frames: np.ndarray  # (T, *picture.shape) uint8
  valid: np.ndarray  # (H, W) or (T, H, W) bool
  said: dict[str, Said] = field(default_factory=dict)  # by task


def learned(labels: list[Label], task: str, classes: ClassSet, where: str, ignore: bool) -> Source | None:
  """Of one teacher's labels that teach `task` those that are learned, with the classes that they name; without group
  and rows. None where no class is learned. Raises UserError where a name is not known: see ClassSet.resolve."""
  labels = labels if labels[0].unit == "probability" else labels[:1]
  kind = TASKS[task].kind
  names = names_of(labels, classes, kind)
  index = classes.resolve(names, kind, where, ignore) if kind else np.zeros(0, np.int64)
  if kind and not (index >= 0).any():
    return None
  out = tuple(n for n, to in zip(names, index, strict=True) if to < 0 and plain(n) not in UNKNOWN)
  if kind and labels[0].unit == "probability":
    labels, index = [x for x, to in zip(labels, index, strict=True) if to >= 0], index[index >= 0]
  return Source(None, labels, {}, index, out)  # type: ignore[arg-type]


def choose(
  groups: dict[str, Group], task: str, prefer: Sequence[str], classes: ClassSet | None = None, ignore: bool = False
) -> Source | None:
  """The teacher of `task` among one segment's: the first of `prefer`, else the simulator's truth, else the first by
  name. Raises UserError as learned() does."""
  classes, teaches = classes or road_classes(), TASKS[task].teaches
  able = {t: [x for x in g.labels if teaches(x, classes)] for t, g in groups.items() if t != "frames" and g.done()}
  able = {t: x for t, x in able.items() if x}
  for t in [t for t in prefer if t in able] + sorted(able, key=lambda t: (t != "simulator", t)):
    if (source := learned(able[t], task, classes, str(groups[t].path), ignore)) is not None:
      source.group, source.rows = groups[t], rows_by_frame(groups[t])
      return source
  return None


class Clips:
  """All clips of `length` frames of a store in which some task of `tasks` is labeled; without tasks all there are.

  prefer: teachers in the order in which they are asked where several label a task. live: a teacher that labels while
  training, in place of what is stored of its tasks. classes: that are learned, by default the road's; ignore: names
  that they do not know are left out. per_height: depth is learned in heights of the camera. Raises UserError where
  nothing teaches a task, a name of a class is not known, one teacher's labels were made with several checkpoints or
  settings, or some are stale (labels/rules.py) and stale_labels does not take them."""

  def __init__(
    self,
    root: str | Path | Look,
    tasks: Sequence[str],
    length: int,
    prefer: Sequence[str] = (),
    live: Teacher | None = None,
    segments: Sequence[str] = (),
    stale_labels: bool = False,
    classes: ClassSet | None = None,
    ignore: bool = False,
    per_height: bool = False,
  ):
    look = look_at(root)
    self.per_height = per_height
    self.root, self.place = look.root, look.place
    self.tasks, self.length, self.live = [task_name(t) for t in tasks], length, live
    self.classes = classes or road_classes()
    self.taught_live: dict[str, Source] = {}
    if live is not None:
      for t in self.tasks:
        able = [x for x in live.labels if TASKS[t].teaches(x, self.classes)]
        source = learned(able, t, self.classes, f"the live teacher '{live.name}'", ignore) if able else None
        if source is not None:
          self.taught_live[t] = source
    self.picture = look.picture(segments)
    self.segments: list[Segment] = []
    seen: dict[str, tuple[str, str]] = {}
    with_frames = 0
    stored = [t for t in self.tasks if t not in self.taught_live]
    for name, groups in look.segments.items():
      if segments and name not in segments:
        continue
      if "frames" not in groups or not groups["frames"].done():
        continue
      with_frames += 1
      found = {t: choose(groups, t, prefer, self.classes, ignore) for t in stored}
      sources = {t: s for t, s in found.items() if s is not None}
      if sources or self.taught_live or not self.tasks:
        frames = groups["frames"]
        shape = valid_of(frames), sizes_of(frames)
        self.segments.append(Segment(name, frames, sources, *shape, camera_height(groups), groups))
      for s in sources.values():
        key = json.dumps([s.group.meta["teacher"], s.group.meta["view"]], sort_keys=True)
        before = seen.setdefault(s.group.teacher, (key, s.group.place))
        if before[0] != key:
          raise UserError(
            f"labels by '{s.group.teacher}' were made with two checkpoints or settings: {before[1]} and "
            f"{s.group.place}; label again with --prune"
          )
    look.store.check_stale(
      (g for s in self.segments for g in (s.frames, *(x.group for x in s.sources.values()))), stale_labels
    )
    if not with_frames:
      raise UserError(
        f"{self.place} holds no segment with model frames to learn from; label routes without --no-frames: "
        "`tools/op.sh label`"
      )
    count = len(self.classes.boxes)
    # of all of them; scores of a teacher say themselves of which classes they are: see tasks/logits.py
    boxes = [t for t in self.tasks if TASKS[t].kind == "boxes" and not TASKS[t].optional]
    self.told, self.verb = {t: np.zeros(count, bool) for t in boxes}, "taught"
    for t, known in self.told.items():
      for source in self._sources(t):
        known |= source.says(count)
    self._index()

  def _sources(self, task: str) -> list[Source]:
    live = [self.taught_live[task]] if task in self.taught_live else []
    return live or [s.sources[task] for s in self.segments if task in s.sources]

  def _index(self) -> None:
    root = self.place
    there = {*self.taught_live, *(t for s in self.segments for t in s.sources)}
    if lacks := [t for t in self.tasks if t not in there]:
      said = ", and ".join(f"nothing that teaches '{t}'; add {TASKS[t].wanted}" for t in lacks)
      raise UserError(f"{root} holds {said}, with `tools/op.sh label ROUTE --teachers ... {command('--out', root)}`")
    self.starts = np.concatenate([self._starts(i) for i in range(len(self.segments))])  # (N, 2) segment, first row
    if not len(self.starts):
      what = "labeled frames" if self.tasks else "frames"
      raise UserError(f"{root} holds no {self.length} consecutive {what}; label more frames, or with a smaller --every")
    self.reader = Reader(window=8)
    self.reader.labels = len(self.tasks) + 1

  def judges(self, learned: "Clips") -> None:
    """For clips that judge what is learned from those: a class that they have a name for is not nowhere here, where
    nothing has one for it, but unknown."""
    self.verb = "judged"
    for task, known in self.told.items():
      known |= learned.told.get(task, False)

  def part(self, segments: Iterable[str]) -> "Clips":
    """Those of some segments alone. Raises UserError where nothing of them teaches a task."""
    names, out = set(segments), copy.copy(self)
    out.segments = [s for s in self.segments if s.name in names]
    out._index()
    return out

  def _starts(self, i: int) -> np.ndarray:
    """Clips overlap by half, and none spans frames that are missing. A still is a clip in which nothing moves."""
    s = self.segments[i]
    ids = s.frames.frames["frame_id"].to_numpy()
    done = np.zeros(len(ids), bool)
    for k in s.frames.done():
      done[list(s.frames.rows(k))] = True
    done[list(s.frames.bad())] = False  # another frame stands for it, or none
    step = int(s.frames.meta["every"])
    every = self.taught_live or not self.tasks
    labeled = set(ids.tolist()) if every else set[int]().union(*(src.rows for src in s.sources.values()))
    if s.still:
      here = [(i, a) for a, f in enumerate(ids) if done[a] and int(f) in labeled]
      return np.array(here, np.int64).reshape(-1, 2)
    out = []
    for a in range(0, len(ids) - self.length + 1, max(1, self.length // 2)):
      span = slice(a, a + self.length)
      if done[span].all() and (np.diff(ids[span]) == step).all() and any(int(f) in labeled for f in ids[span]):
        out.append((i, a))
    return np.array(out, np.int64).reshape(-1, 2)

  def __len__(self) -> int:
    return len(self.starts)

  def drawn_with(self, sample: Sequence[str]) -> np.ndarray:
    """(N,) weight of each clip by `sample`, as sampling.weights_of()."""
    return weights_of([s.name for s in self.segments], sample)[self.starts[:, 0]]

  def per_segment(self) -> np.ndarray:
    """(segments,) number of clips."""
    return np.bincount(self.starts[:, 0], minlength=len(self.segments))

  def order(self, seed: Sequence[int], window: int = 8) -> np.ndarray:
    """A shuffled order of all clips that reads every chunk once."""
    self.reader.window = window
    chunk = np.unique(np.stack([self.starts[:, 0], self.starts[:, 1] // CHUNK]), axis=1, return_inverse=True)[
      1
    ].reshape(-1)
    return shuffled_chunks(chunk, seed, window)

  def read(self, i: int) -> RawClip:
    part, first = self.starts[i]
    s = self.segments[part]
    rows = [int(first)] * self.length if s.still else list(range(first, first + self.length))
    ids = s.frames.frames["frame_id"].to_numpy()[rows]
    clip = RawClip(
      f"{s.name} frames {ids[0]} to {ids[-1]}",
      self.reader.dense(s.frames, "frame", rows),
      s.valid_in(rows, self.picture),
    )
    for task, source in s.sources.items():
      at = [source.rows.get(int(f)) for f in ids]
      values = [None if r is None else self._label(source, r) for r in at]
      clip.said[task] = self._said(task, source, values, s.height)
    if self.taught_live:
      self._ask(clip, ids, s.height)
    return clip

  def _said(self, task: str, source: Source, values: list[Any], height: float | None) -> Said:
    at = (height if height is not None else DEFAULT_HEIGHT) if self.per_height else None
    told = self.told.get(task)  # what nobody has a name for is nowhere, so that its channel stays quiet
    known = None if told is None else source.says(len(told)) | ~told
    return Said(source.labels, values, source.index, self.classes, self.picture, at, known)

  def _label(self, source: Source, row: int) -> Any:
    if source.labels[0].kind != "dense":
      return self.reader.table(source.group, source.labels[0].name, row)
    maps = [self.reader.dense(source.group, x.name, [row])[0] for x in source.labels]
    return maps[0] if len(maps) == 1 and source.labels[0].unit != "probability" else np.stack(maps)

  def _ask(self, clip: RawClip, ids: np.ndarray, height: float | None) -> None:
    """Labels by the live teacher, in the form in which they would be stored. height: of the camera."""
    assert self.live is not None
    rgb = np.stack([rgb_of(f) for f in clip.frames]).transpose(0, 3, 1, 2)
    told, _ = self.live.label(Clip(rgb, frame_ids=ids.tolist()), None)
    for task, source in self.taught_live.items():
      labels = source.labels
      if labels[0].kind == "dense":
        maps = np.stack([np.asarray(told[x.name]).astype(x.dtype) for x in labels], axis=1)  # (T, labels, ...)
        values: list[Any] = list(maps if labels[0].unit == "probability" else maps[:, 0])
      else:
        table = {
          k: np.asarray(v, np.float32) if k in COORDINATES else np.asarray(v) for k, v in told[labels[0].name].items()
        }
        values = [{k: v[table["frame"] == t] for k, v in table.items() if k != "frame"} for t in range(len(ids))]
      clip.said[task] = self._said(task, source, values, height)

  def label_shape(self, task: str) -> tuple[int, ...] | None:
    """Of one frame's label that teaches it; None where nothing does."""
    found = self._sources(task)
    return found[0].labels[0].shape if found else None

  def left_out(self) -> list[str]:
    """A line for each teacher of whose classes some are not learned: which, and how much of its labels."""
    names: dict[tuple[str, str], dict[str, None]] = {}
    count: Counter[tuple[str, str]] = Counter()
    for s in self.segments:
      for source in s.sources.values():
        if not source.left_out:
          continue
        key = source.group.teacher, source.labels[0].kind
        names.setdefault(key, {}).update(dict.fromkeys(source.left_out))
        if source.labels[0].kind == "boxes":
          cls = source.group.table(source.labels[0].name)["cls"].to_numpy().astype(int)
          count[key] += int((source.index[cls[cls >= 0]] < 0).sum())
        else:
          count[key] += 1
    for source in self.taught_live.values():
      if source.left_out and self.live is not None:
        names.setdefault((self.live.name, "live"), {}).update(dict.fromkeys(source.left_out))
    what = {"boxes": "{} boxes", "dense": "class maps of {} segments", "live": "all that it labels"}
    return [
      f"'{', '.join(found)}' by {teacher} are left out, since the class set '{self.classes.name}' does not learn them: "
      + what[kind].format(count[teacher, kind])
      for (teacher, kind), found in names.items()
    ]

  def not_told(self) -> list[str]:
    """A line for each teacher of boxes that has no name for some classes that another one knows, and for those that
    nobody knows."""
    names = np.array(self.classes.boxes)
    out: dict[str, None] = {}
    for task, told in self.told.items():
      lacks: dict[tuple[str, str], int] = {}
      for s in self.segments:
        source = s.sources.get(task)
        if source is not None and (unknown := names[told & ~source.says(len(told))]).size:
          key = source.group.teacher, ", ".join(unknown)
          lacks[key] = lacks.get(key, 0) + 1
      for (teacher, unknown), count in lacks.items():
        segments = f"{count} segment{'s' if count > 1 else ''}"
        of = printable(unknown, 200)
        out[f"{teacher} has no name for {of}: in the {segments} that it labels nothing of that is {self.verb}"] = None
      if not told.all():
        nobody = printable(", ".join(names[~told]), 200)
        out[f"nothing here has a name for {nobody}: {self.verb} as being nowhere"] = None
    return list(out)

  def without_height(self) -> list[str]:
    """A line where depth in meters is learned in heights of the camera and some are not known, else none."""
    if not self.per_height:
      return []
    taught = [(s, s.sources.get("depth", self.taught_live.get("depth"))) for s in self.segments]
    metric = [s for s, source in taught if source is not None and source.labels[0].unit == "m"]
    lacks = [s.name for s in metric if s.height is None]
    if not lacks:
      return []
    what = f"of {len(lacks)} of {len(metric)} segments with depth in meters the camera's height is not known"
    add = "where their logs say it, the same `tools/op.sh label` command adds it"
    return [f"{what}, the first is {lacks[0]}: {DEFAULT_HEIGHT} m is taken; {add}"]

  def provenance(self) -> list[dict[str, str]]:
    """Every teacher that has a say: model, checkpoint_hash, license, as a bundle's manifest has them."""
    out: dict[str, dict[str, str]] = {}
    for s in self.segments:
      for source in s.sources.values():
        t = source.group.meta["teacher"]
        out[t["name"]] = {
          "model": t["model_id"] or t["name"],
          "checkpoint_hash": t["checkpoint"],
          "licence": t["license"],
        }
    if self.live is not None:
      out[self.live.name] = {
        "model": self.live.model_id or self.live.name,
        "checkpoint_hash": self.live.checkpoint_hash,
        "licence": self.live.license,
      }
    return [out[k] for k in sorted(out)]

  def restricted(self) -> list[str]:
    """Licenses among the teachers' that restrict what learns from them."""
    return sorted({p["licence"] for p in self.provenance() if not LICENSES.get(p["licence"], False)})


def camera_height(groups: Mapping[str, Group]) -> float | None:
  """Of one segment's camera above the road, m, as any of its groups has it; None where none does."""
  return next((g.camera_height for g in groups.values() if g.camera_height is not None), None)


def valid_of(frames: Group) -> np.ndarray:
  """(H, W) bool: pixels of the student's picture, by default the 512x256 view, that the camera's covers."""
  c, picture = frames.meta["camera"], picture_of(frames)
  if picture.kind == "rgb":
    return covered(picture, c["width"], c["height"])
  f = ModelFrame(c["width"], c["height"], c["width"], c["width"] * c["height"], frames.meta["view"]["name"])
  f.set_calibration(np.array(c["rpy"]), np.array(c["intrinsics"]))
  return f.valid


def sizes_of(frames: Group) -> np.ndarray | None:
  """(rows, 2) width and height of pictures that are placed in the student's each by itself; None of a camera's
  frames."""
  if not {"width", "height"} <= set(frames.frames.column_names):
    return None
  sizes = np.stack([frames.frames[k].to_numpy() for k in ("width", "height")], axis=1)
  if sizes.dtype.kind not in "iu" or (sizes < 1).any() or (sizes > 1 << 20).any():
    raise UserError(f"{frames.path / 'frames.parquet'} has sizes of pictures that are none; import them again")
  return sizes

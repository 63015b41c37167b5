"""Which labels of a store teach which task, and clips of consecutive frames with them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.frames import ModelFrame, unpack_rgb
from openpilot.tools.fair.labels.dataset import Reader, rows_by_frame, shuffled_chunks
from openpilot.tools.fair.labels.label import COORDINATES
from openpilot.tools.fair.labels.store import CHUNK, Group, LabelStore
from openpilot.tools.fair.teacher import LICENSES, Clip, Label, Teacher
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.said import command

NAMES: dict[str, Any] = json.loads(Path(__file__).with_name("classes.json").read_text())
TASKS = ("depth", "features", "segmentation", "objects", "detector", "points")
WANTED = {  # what to say where a student's task has no labels
  "depth": "a teacher of depth: depth-anything-v2-metric-outdoor-small, or simulator on simulated routes",
  "features": "a teacher of dense features: dinov2-base",
  "segmentation": "a teacher of road classes: twinlitenet, or simulator on simulated routes",
  "objects": "a teacher of boxes: yolox-nano, rtdetr-v2-r50, sam2.1-small, or simulator on simulated routes",
  "detector": "a teacher of boxes: yolox-nano, rtdetr-v2-r50, or simulator on simulated routes",
  "points": "a teacher of tracks: raft-tracker, or simulator on simulated routes",
}


def task_of(label: Label) -> tuple[str, ...]:
  """The tasks that a label can teach."""
  if label.kind == "boxes":
    return ("objects", "detector")
  if label.kind == "points":
    # openpilot's lines and leads are no points of the picture that are followed
    return ("points",) if label.name == "points" else ()
  named = {"m": "depth", "relative": "depth", "class": "segmentation", "probability": "segmentation"}
  task = "features" if label.name == "features" else named.get(label.unit)  # a network's features have no unit
  if label.unit == "probability" and label.name not in NAMES["segmentation_names"]:
    task = None
  return (task,) if task else ()


@dataclass
class Source:
  """What teaches one task in one segment."""

  group: Group
  labels: list[Label]  # one; of a teacher that gives a probability map for each class, all of them
  rows: dict[int, int]  # frame id -> row


@dataclass
class Segment:
  name: str
  frames: Group
  sources: dict[str, Source]
  valid: np.ndarray  # (256, 512) bool, view pixels inside the camera's image


@dataclass
class RawClip:
  """T consecutive frames and what teachers say of them, as stored. Lists have T entries, None where a frame is not
  labeled."""

  name: str
  frames: np.ndarray  # (T, 6, 128, 256) uint8
  valid: np.ndarray  # (256, 512) bool
  labels: dict[str, list[Any]] = field(default_factory=dict)  # task -> dense arrays or tables
  meta: dict[str, list[Label]] = field(default_factory=dict)


def choose(groups: dict[str, Group], task: str, prefer: Sequence[str]) -> Source | None:
  """The teacher of `task` among one segment's: the first of `prefer`, else the simulator's truth, else the first by
  name."""
  able = {t: [x for x in g.labels if task in task_of(x)] for t, g in groups.items() if t != "frames" and g.done()}
  able = {t: x for t, x in able.items() if x}
  order = [t for t in prefer if t in able] + sorted(able, key=lambda t: (t != "simulator", t))
  if not order:
    return None
  teacher = order[0]
  labels = able[teacher] if able[teacher][0].unit == "probability" else able[teacher][:1]
  return Source(groups[teacher], labels, rows_by_frame(groups[teacher]))


class Clips:
  """All clips of `length` frames of a store in which some task of `tasks` is labeled.

  prefer: teachers in the order in which they are asked where several label a task. live: a teacher that labels while
  training, in place of what is stored of its tasks. Raises UserError where nothing teaches a task, one teacher's labels
  were made with several checkpoints or settings, or some are stale (labels/rules.py) and stale_labels does not take
  them."""

  def __init__(
    self,
    root: str | Path,
    tasks: Sequence[str],
    length: int,
    prefer: Sequence[str] = (),
    live: Teacher | None = None,
    segments: Sequence[str] = (),
    stale_labels: bool = False,
  ):
    self.tasks, self.length, self.live = list(tasks), length, live
    self.live_tasks = [t for t in self.tasks if live is not None and any(t in task_of(x) for x in live.labels)]
    store = LabelStore(root)
    by_segment = store.by_segment({g.teacher for g in store.groups()})
    self.segments: list[Segment] = []
    seen: dict[str, tuple[str, Path]] = {}
    with_frames = 0
    for name, groups in by_segment.items():
      if segments and name not in segments:
        continue
      if "frames" not in groups or not groups["frames"].done():
        continue
      with_frames += 1
      sources = {t: s for t in self.tasks if t not in self.live_tasks and (s := choose(groups, t, prefer)) is not None}
      if sources or self.live_tasks:
        self.segments.append(Segment(name, groups["frames"], sources, valid_of(groups["frames"])))
      for s in sources.values():
        key = json.dumps([s.group.meta["teacher"], s.group.meta["view"]], sort_keys=True)
        before = seen.setdefault(s.group.teacher, (key, s.group.path))
        if before[0] != key:
          raise UserError(
            f"labels by '{s.group.teacher}' were made with two checkpoints or settings: {before[1]} and "
            f"{s.group.path}; label again with --prune"
          )
    store.check_stale(
      (g for s in self.segments for g in (s.frames, *(x.group for x in s.sources.values()))), stale_labels
    )
    if not with_frames:
      raise UserError(
        f"{root} holds no segment with model frames to learn from; label routes without --no-frames: `tools/op.sh "
        "label`"
      )
    lacks = [t for t in self.tasks if t not in self.live_tasks and not any(t in s.sources for s in self.segments)]
    if lacks:
      said = ", and ".join(f"nothing that teaches '{t}'; add {WANTED[t]}" for t in lacks)
      raise UserError(f"{root} holds {said}, with `tools/op.sh label ROUTE --teachers ... {command('--out', root)}`")
    self.starts = np.concatenate([self._starts(i) for i in range(len(self.segments))])  # (N, 2) segment, first row
    if not len(self.starts):
      raise UserError(
        f"{root} holds no {length} consecutive labeled frames; label more frames, or with a smaller --every"
      )
    self.reader = Reader(window=8)
    self.reader.labels = len(self.tasks) + 1

  def _starts(self, i: int) -> np.ndarray:
    """Clips overlap by half, and none spans frames that are missing."""
    s = self.segments[i]
    ids = s.frames.frames["frame_id"].to_numpy()
    done = np.zeros(len(ids), bool)
    for k in s.frames.done():
      done[list(s.frames.rows(k))] = True
    step = int(s.frames.meta["every"])
    labeled = set[int]().union(*(src.rows for src in s.sources.values())) if not self.live_tasks else set(ids.tolist())
    out = []
    for a in range(0, len(ids) - self.length + 1, max(1, self.length // 2)):
      span = slice(a, a + self.length)
      if done[span].all() and (np.diff(ids[span]) == step).all() and any(int(f) in labeled for f in ids[span]):
        out.append((i, a))
    return np.array(out, np.int64).reshape(-1, 2)

  def __len__(self) -> int:
    return len(self.starts)

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
    rows = list(range(first, first + self.length))
    ids = s.frames.frames["frame_id"].to_numpy()[rows]
    clip = RawClip(f"{s.name} frames {ids[0]} to {ids[-1]}", self.reader.dense(s.frames, "frame", rows), s.valid)
    for task, source in s.sources.items():
      at = [source.rows.get(int(f)) for f in ids]
      clip.meta[task] = source.labels
      clip.labels[task] = [None if r is None else self._label(source, r) for r in at]
    if self.live_tasks:
      self._ask(clip, ids)
    return clip

  def _label(self, source: Source, row: int) -> Any:
    if source.labels[0].kind != "dense":
      return self.reader.table(source.group, source.labels[0].name, row)
    maps = [self.reader.dense(source.group, x.name, [row])[0] for x in source.labels]
    return maps[0] if len(maps) == 1 and source.labels[0].unit != "probability" else np.stack(maps)

  def _ask(self, clip: RawClip, ids: np.ndarray) -> None:
    """Labels by the live teacher, in the form in which they would be stored."""
    assert self.live is not None
    rgb = np.stack([unpack_rgb(f) for f in clip.frames]).transpose(0, 3, 1, 2)
    said, _ = self.live.label(Clip(rgb, frame_ids=ids.tolist()), None)
    for task in self.live_tasks:
      labels = [x for x in self.live.labels if task in task_of(x)]
      labels = labels if labels[0].unit == "probability" else labels[:1]
      clip.meta[task] = labels
      if labels[0].kind == "dense":
        maps = np.stack([np.asarray(said[x.name]).astype(x.dtype) for x in labels], axis=1)  # (T, labels, ...)
        clip.labels[task] = list(maps if labels[0].unit == "probability" else maps[:, 0])
      else:
        table = {
          k: np.asarray(v, np.float32) if k in COORDINATES else np.asarray(v) for k, v in said[labels[0].name].items()
        }
        clip.labels[task] = [
          {k: v[table["frame"] == t] for k, v in table.items() if k != "frame"} for t in range(len(ids))
        ]

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


def valid_of(frames: Group) -> np.ndarray:
  """(256, 512) bool: view pixels that the camera's image covers."""
  c = frames.meta["camera"]
  f = ModelFrame(c["width"], c["height"], c["width"], c["width"] * c["height"], frames.meta["view"]["name"])
  f.set_calibration(np.array(c["rpy"]), np.array(c["intrinsics"]))
  return f.valid

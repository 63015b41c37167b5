#!/usr/bin/env python3
"""Labels routes with teachers. Killed at any moment, the same command goes on where it stopped, and the result is that
of an unbroken run.

Decoding and warping, the teacher, and writing overlap. A teacher without state gets batches over the boundaries of
segments."""

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from openpilot.selfdrive.modeld.fair.frames import FRAME_SHAPE, VIEW_H, VIEW_W, VIEWS
from openpilot.tools.fair.labels.aim import aimed
from openpilot.tools.fair.labels.picture import SEES, PictureWarp, sees_picture, size_of_picture, view_label
from openpilot.tools.fair.labels.pipeline import Item, Work, ahead, batches, label_batch, load, prefetch
from openpilot.tools.fair.labels.rules import rules_of, stale_rules
from openpilot.tools.fair.labels.store import CHUNK, VERSION, Group, LabelStore
from openpilot.tools.fair.labels.views import SegmentView, segment_view, view_intrinsics
from openpilot.tools.fair.options import parse_options
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Clip, Label, Labels, State, Teacher, failure_is_said
from openpilot.tools.lib.cameras import CAMERAS, VIDEOS
from openpilot.tools.lib.errors import UserError, cli, warn
from openpilot.tools.lib.flags import add_flag
from openpilot.tools.lib.route import Route, Segment
from openpilot.tools.replay.source import choose_camera, usable

MOST_BROKEN = 0.5  # of a chunk's frames: a teacher that says NaN of more is broken, of fewer its NaN is unknown
AHEAD = 3  # batches decoded before they are due
COORDINATES = {"x0": 0, "y0": 1, "x1": 0, "y1": 1, "x": 0, "y": 1}  # column -> axis


class FrameTeacher:
  """The model frames themselves, bit for bit what fairmodeld would see: what students learn from."""

  name, model_id, checkpoint_hash, license, stateful, wants = "frames", "", "", "MIT", False, "frame"
  labels = [Label("frame", "dense", "uint8", FRAME_SHAPE, "YUV 4:2:0")]

  def prepare(self, height: int, width: int) -> None: ...

  def settings(self) -> dict[str, Any]:
    return {}

  def label(self, clip: Clip, state: State | None = None) -> tuple[Labels, State | None]:
    return {"frame": clip.rgb}, None


@dataclass
class Pending:
  """A chunk that is being filled."""

  dense: dict[str, np.ndarray]
  tables: dict[str, list[dict[str, Any]]]
  filled: int = 0
  bad: list[int] = field(default_factory=list)
  broken: dict[str, set[int]] = field(default_factory=dict)  # label -> rows of which it says what is no number


def to_view(table: dict[str, Any], scale: tuple[float, float]) -> dict[str, Any]:
  """A table's coordinates from the pixels of the teacher's picture to those of the 512x256 view, both at pixel
  centers."""
  return {
    k: ((np.asarray(v) + 0.5) / scale[COORDINATES[k]] - 0.5).astype(np.float32) if k in COORDINATES else v
    for k, v in table.items()
  }


def no_numbers(x: np.ndarray, unit: str) -> np.ndarray:
  """(N, ...) of a dense label -> (N,) bool: frames in which it says NaN, or Inf where that is not the sky."""
  if x.dtype.kind != "f":
    return np.zeros(len(x), bool)
  flat = x.reshape(len(x), -1)
  return (np.isnan(flat) if unit == "m" else ~np.isfinite(flat)).any(axis=1)


def take(table: dict[str, Any], keep: np.ndarray, frames: np.ndarray) -> dict[str, Any]:
  return {
    k: frames if k == "frame" else [v[i] for i in keep] if isinstance(v, list) else np.asarray(v)[keep]
    for k, v in table.items()
  }


class Collector:
  """Takes labels batch by batch, and hands whole chunks to the writer."""

  def __init__(
    self,
    labels: list[Label],
    scale: tuple[float, float],
    write: Callable[..., None],
    teacher: str = "",
    said: list[Label] | None = None,
  ):
    """labels: as they are stored; said: as the teacher says them, where it sees another picture than the view."""
    self.labels, self.scale, self.write, self.teacher = labels, scale, write, teacher
    self.said = {x.name: x for x in said or labels}
    self.pending: dict[tuple[Path, int], Pending] = {}
    self.broken: Counter[str] = Counter()  # label -> frames of which it says what is no number

  def add_parts(self, batch: list[Item], parts: list[tuple[Labels, int]], state: State | None) -> None:
    """A batch's labels in pieces of so many frames. state: behind the batch, which no chunk's end cuts."""
    at = 0
    for labels, n in parts:
      self.add(batch[at : at + n], labels, state)
      at += n

  def add(self, batch: list[Item], labels: Labels, state: State | None) -> None:
    at = 0
    while at < len(batch):  # one run of rows within one chunk at a time
      work, k = batch[at].work, batch[at].row // CHUNK
      end = at
      while end < len(batch) and batch[end].work is work and batch[end].row // CHUNK == k:
        end += 1
      if k in work.todo:
        self._add(work, k, batch[at:end], labels, at, end, state)
      at = end

  def _add(self, work: Work, k: int, items: list[Item], labels: Labels, at: int, end: int, state: State | None) -> None:
    rows = work.group.rows(k)
    key = (work.group.path, k)
    if key not in self.pending:
      dense = {x.name: np.zeros((len(rows), *x.shape), x.dtype) for x in self.labels if x.kind == "dense"}
      self.pending[key] = Pending(dense, {x.name: [] for x in self.labels if x.kind != "dense"})
    p = self.pending[key]
    first = items[0].row - rows.start
    for label in self.labels:
      if label.kind == "dense":
        stored = p.dense[label.name][first : first + len(items)]
        with np.errstate(over="ignore"):
          said = np.asarray(labels[label.name][at:end])
          stored[:] = said if work.picture is None else work.picture.dense(self.said[label.name], said)
        p.broken.setdefault(label.name, set()).update(
          first + i for i in np.flatnonzero(no_numbers(stored, label.unit)).tolist()
        )
      else:
        table = labels[label.name]
        frame = np.asarray(table["frame"], np.int64)
        here = (frame >= at) & (frame < end)
        sound = np.all(
          [np.isfinite(np.asarray(table[c], np.float64)) for c in (*COORDINATES, "score") if c in table], axis=0
        ) | np.zeros(len(frame), bool)
        p.broken.setdefault(label.name, set()).update((first + np.unique(frame[here & ~sound]) - at).tolist())
        keep = np.flatnonzero(here & sound)
        taken = take(table, keep, frame[keep] - at + first)
        if work.picture is not None:
          taken = work.picture.table(self.said[label.name], taken)
        p.tables[label.name].append(to_view(taken, self.scale))
    p.filled += len(items)
    p.bad += [i.row for i in items if not i.good]
    if p.filled == len(rows):
      del self.pending[key]
      for name, broken in p.broken.items():
        if len(broken) > MOST_BROKEN * len(rows):
          where = f"{len(broken)} of {len(rows)} frames of {work.group.segment} from row {rows.start}"
          what = f"teacher '{self.teacher}' puts out NaN or Inf as '{name}' in {where}"
          raise UserError(
            f"{what}, which are not stored; look at its checkpoint, or try --option {self.teacher}.precision=float32 "
            "where it has that"
          )
        self.broken[name] += len(broken)
      done: Labels = dict(p.dense)
      for name, parts in p.tables.items():
        columns = {c: [x[c] for x in parts] for c in parts[0]}
        done[name] = {
          c: list(chain.from_iterable(x)) if isinstance(x[0], list) else np.concatenate(x) for c, x in columns.items()
        }
      self.write(work.group, k, done, state, p.bad)


def plan(
  teacher: Teacher,
  views: list[SegmentView],
  store: LabelStore,
  view: str,
  size: tuple[int, int],
  every: int,
  repair: bool,
  whole: bool = False,
) -> list[Work]:
  works = []
  settings, labels = teacher.settings(), [view_label(x) if whole else x for x in teacher.labels]
  if whole:  # its picture's size is each segment's own
    settings = {k: v for k, v in settings.items() if k != "size"}
  for v in views:
    meta = {
      "version": VERSION,
      "segment": v.segment.name,
      "teacher": {
        "name": teacher.name,
        "model_id": teacher.model_id,
        "checkpoint": teacher.checkpoint_hash,
        "licence": teacher.license,
        "settings": settings,
      },
      "labels": [{**vars(x), "shape": list(x.shape), "classes": list(x.classes)} for x in labels],
      "view": {"name": view, "width": VIEW_W if whole else size[0], "height": VIEW_H if whole else size[1]},
      **({"picture": {"width": size[0], "height": size[1]}} if whole else {}),
      "camera": v.camera(),
      **({"source": teacher.source(v.segment)} if hasattr(teacher, "source") else {}),
      "every": every,
      "chunk": CHUNK,
    }
    if rules := rules_of(meta):
      meta["rules"] = rules
    group = store.group(meta, v.entries)
    if repair:
      for k, problem in group.problems():
        print(f"repair: {problem}; its chunk is labeled again", file=sys.stderr)
        group.drop_chunk(k)
    done = group.done()
    picture = PictureWarp(v, view, *size) if whole else None
    work = Work(v, group, set(range(group.chunk_count)) - done, picture=picture)
    if teacher.stateful and work.todo:
      k = min(work.todo)
      work.state = group.state(k - 1)
      work.start = k * CHUNK if work.state is not None else 0
    works.append(work)
  return works


def picture_size(teacher: Teacher, size: tuple[int, int] | None) -> tuple[int, int]:
  """(width, height) of the pictures that a teacher is given: `size`, or what it likes. Of one that reads no picture it
  does not matter."""
  if size is None and hasattr(teacher, "view_size"):
    size = teacher.view_size()
  return size if size is not None and getattr(teacher, "wants", "rgb") == "rgb" else (VIEW_W, VIEW_H)


def run_teacher(
  teacher: Teacher,
  views: list[SegmentView],
  store: LabelStore,
  view: str = "medmodel",
  size: tuple[int, int] | None = None,
  batch: int = 8,
  every: int = 1,
  repair: bool = False,
  progress: bool = True,
  sees: str | None = None,
) -> list[Group]:
  """Labels all of `views` that is not labeled yet. size: of the view's pictures that the teacher is given, (width,
  height); None: what it likes. sees: 'picture' or 'view', None: what it was made for. -> the groups."""
  if not sees_picture(teacher, sees):
    return label_views(teacher, views, store, view, picture_size(teacher, size), batch, every, repair, progress)
  sizes = [size_of_picture(teacher, v) for v in views]
  groups: dict[int, Group] = {}
  for one in dict.fromkeys(sizes):
    some = [i for i, s in enumerate(sizes) if s == one]
    done = label_views(teacher, [views[i] for i in some], store, view, one, batch, every, repair, progress, whole=True)
    groups.update(zip(some, done, strict=True))
  return [groups[i] for i in range(len(views))]


def label_views(
  teacher: Teacher,
  views: list[SegmentView],
  store: LabelStore,
  view: str,
  size: tuple[int, int],
  batch: int,
  every: int,
  repair: bool,
  progress: bool,
  whole: bool = False,
) -> list[Group]:
  """run_teacher() of segments whose pictures have one size. whole: they are the camera's, not the view's."""
  wants = getattr(teacher, "wants", "rgb")
  if hasattr(teacher, "sees"):
    setattr(teacher, "whole", whole)  # noqa: B010
  with failure_is_said(teacher.name):
    teacher.prepare(size[1], size[0])
  intrinsics = view_intrinsics(view, *size) if wants == "rgb" else None
  works = plan(teacher, views, store, view, size, every, repair, whole)
  grid = batches(works, batch, teacher.stateful)
  total = sum(len(b) for b in grid)
  writing: list[Future[None]] = []
  with (
    ThreadPoolExecutor(1) as writer,
    tqdm(total=total, desc=teacher.name, unit="frame", disable=not progress or not total) as bar,
  ):

    def write(group: Group, k: int, labels: Labels, state: State | None, bad: list[int]) -> None:
      while len(writing) > 1 or (writing and writing[0].done()):  # memory for two chunks
        writing.pop(0).result()
      if bad:
        print(
          f"warning: {group.segment}: {len(bad)} frames from row {bad[0]} on cannot be decoded; the frame before "
          "stands for them",
          file=sys.stderr,
        )
      writing.append(writer.submit(group.write_chunk, k, labels, state, bad))

    collector = (
      Collector([view_label(x) for x in teacher.labels], (1, 1), write, teacher.name, list(teacher.labels))
      if whole
      else Collector(teacher.labels, (size[0] / VIEW_W, size[1] / VIEW_H), write, teacher.name)
    )
    if teacher.stateful:
      before: Work | None = None
      state: State | None = None
      for items, images in prefetch(load(grid, wants, view, size), AHEAD):
        if items[0].work is not before:
          before, state = items[0].work, items[0].work.state
        parts, state = label_batch(teacher, items, images, wants, intrinsics, state)
        collector.add_parts(items, parts, state)
        bar.update(len(items))
    else:
      at_once = teacher.at_once() if grid and hasattr(teacher, "at_once") else 1
      frames = load(grid, wants, view, size, reuse=at_once > 1)
      source = frames if at_once > 1 else prefetch(frames, AHEAD)
      for (items, _), (parts, _) in ahead(lambda x: label_batch(teacher, *x, wants, intrinsics), source, at_once):
        collector.add_parts(items, parts, None)
        bar.update(len(items))
    for f in writing:
      f.result()
    for name, n in collector.broken.items():
      if n:
        print(
          f"warning: teacher '{teacher.name}' puts out NaN or Inf as '{name}' in {n} of {total} frames, which counts "
          "as unknown there",
          file=sys.stderr,
        )
  return [w.group for w in works]


def number_or_auto(text: str | None, flag: str) -> float | str | None:
  """Raises UserError."""
  if text is None or text == "auto":
    return text
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not 0 < value < math.inf:
    raise UserError(f"{flag} {text}: a number of pixels above 0, or auto")
  return value


def find_views(
  routes: list[str],
  data_dir: Path | None,
  camera: str,
  every: int,
  focal: float | str | None,
  horizon: float | str | None = None,
) -> list[SegmentView]:
  """Of all segments that have video. Raises UserError where none has."""
  segments: list[Segment] = []
  for r in routes:
    segments += Route(r, data_dir).segments
  views, seen = [], set()
  problems: list[UserError] = []
  for s in segments:
    if s.name in seen:
      continue
    seen.add(s.name)
    if not any(v in s.files for v in VIDEOS.values()):
      print(f"warning: segment {s.name} in {s.dir} has no video, it is left out", file=sys.stderr)
      continue
    try:
      (s,), own = usable([s], choose_camera([s], camera))
      views.append(aimed(segment_view(s, own, every, focal), horizon))
    except UserError as e:
      problems.append(e)
  if problems and not views:
    raise problems[0]
  for problem in problems:
    warn(f"{problem}; the segment is left out")
  if not views:
    raise UserError(f"no video in {', '.join(routes)}; teachers need fcamera.hevc, ecamera.hevc or qcamera.ts")
  return views


def parse_size(text: str) -> tuple[int, int]:
  w, x, h = text.partition("x")
  if not x or not w.isdigit() or not h.isdigit() or int(w) < 64 or int(h) < 32 or int(w) % 32 or int(h) % 32:
    raise UserError(f"--view {text} is not a size; two multiples of 32, as 512x256")
  return int(w), int(h)


def parse_weights(items: list[str], teachers: list[str]) -> dict[str, str]:
  pairs = dict(i.split("=", 1) for i in items if "=" in i)
  wrong = [i for i in items if "=" not in i] + [k for k in pairs if k not in teachers]
  if wrong:
    raise UserError(f"--weights {wrong[0]}: write TEACHER=PATH, with one of --teachers ({', '.join(teachers)})")
  return pairs


def refuse_silence(teacher: Teacher, groups: list[Group], store: LabelStore, every: int) -> None:
  """A teacher that only makes tables and made no row: of pictures that may be so, and is said; of one that reads the
  log nothing was labeled at all: raises UserError, and nothing stays."""
  frames = sum(g.row_count for g in groups)
  if (
    not frames
    or any(x.kind == "dense" for x in teacher.labels)
    or any(g.entry_count(x.name) for g in groups for x in teacher.labels)
  ):
    return
  what = f"teacher '{teacher.name}' says nothing of any of the {frames} frames"
  if getattr(teacher, "wants", "rgb") != "none":
    print(f"warning: {what}: its tables are empty", file=sys.stderr)
    return
  for g in groups:
    store.remove(g)
  hint = "the log has none of the messages"
  if every > 1:
    hint = f"a qlog has its messages for few frames, and --every {every} may meet none of them: label without --every"
  raise UserError(f"{what}, and nothing of it was stored; {hint}")


def main() -> None:
  p = argparse.ArgumentParser(prog="label", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument(
    "routes",
    nargs="+",
    metavar="ROUTE",
    help="a folder with segments, one segment's folder, a route's name (with --data-dir), or a video",
  )
  p.add_argument("--teachers", required=True, help="comma-separated; `tools/op.sh teachers` lists them")
  p.add_argument("--out", type=Path, required=True, help="the label store")
  p.add_argument("--data-dir", type=Path, help="where routes lie")
  p.add_argument("--camera", choices=CAMERAS, default="road")
  p.add_argument("--every", type=int, default=1, metavar="N", help="label each Nth frame of a video")
  p.add_argument(
    "--view", metavar="WxH", help="size at which teachers are shown the view; by itself what each likes, else 512x256"
  )
  p.add_argument(
    "--sees",
    choices=SEES,
    help="what teachers are shown: the camera's whole picture, whose labels are warped into the view, or the view; by "
    "default what each was made for, and the view where --view gives its size",
  )
  p.add_argument("--view-name", choices=VIEWS, default="medmodel")
  p.add_argument("--batch", type=int, default=8)
  p.add_argument(
    "--focal",
    metavar="PIXELS",
    help="focal length, of a camera that is none of comma's; 'auto': guessed where the camera is not known, and then "
    "nothing teaches meters",
  )
  p.add_argument(
    "--horizon",
    metavar="ROW",
    help="of a video without calibration: the horizon's row in the picture, pixels, or 'auto': from what moves in it",
  )
  p.add_argument(
    "--weights",
    action="append",
    default=[],
    metavar="TEACHER=PATH",
    help="a checkpoint's file or folder; else FAIR_WEIGHTS and ./weights are searched",
  )
  p.add_argument(
    "--option",
    action="append",
    default=[],
    metavar="TEACHER.KEY=VALUE",
    help="as sam3.prompts=car,tram; `tools/op.sh teachers TEACHER` lists them",
  )
  add_flag(
    p,
    "--accept-license",
    "--accept-licence",
    action="append",
    default=[],
    metavar="LICENSE",
    help="of a teacher whose license restricts use",
  )
  p.add_argument("--download", action="store_true", help="let weights be downloaded from the hub")
  p.add_argument("--device", help="cuda, mps or cpu; chosen by itself")
  p.add_argument(
    "--no-frames", action="store_true", help="do not store the model frames; they can be made again from the video"
  )
  p.add_argument("--repair", action="store_true", help="check what is there first, and label damaged chunks again")
  p.add_argument(
    "--prune",
    action="store_true",
    help="afterwards delete labels of these teachers and segments that were made with other settings",
  )
  args = p.parse_args()
  if args.every < 1 or args.batch < 1:
    raise UserError("--every and --batch are at least 1")
  names = list(dict.fromkeys(n for n in args.teachers.replace(" ", "").split(",") if n))
  if not names:
    raise UserError("--teachers names nobody; `tools/op.sh teachers` lists who there is")
  weights, size = parse_weights(args.weights, names), parse_size(args.view) if args.view else None
  options, sees = parse_options(args.option, names), args.sees or ("view" if size else None)
  cv2.setNumThreads(1)  # its threads would fight the teacher's
  # everything that can be wrong is found before the first frame
  teachers: list[Teacher] = [
    load_teacher(n, weights.get(n), args.accept_license, args.download, device=args.device, **options[n]) for n in names
  ]
  focal, horizon = number_or_auto(args.focal, "--focal"), number_or_auto(args.horizon, "--horizon")
  views = find_views(args.routes, args.data_dir, args.camera, args.every, focal, horizon)
  for teacher in teachers:
    teacher.prepare(*picture_size(teacher, size)[::-1])
    meters = [x.name for x in teacher.labels if x.unit == "m"]
    if meters and getattr(teacher, "wants", "rgb") == "rgb" and any(v.estimated for v in views):
      raise UserError(
        f"teacher '{teacher.name}' says meters, of a camera whose focal length or mounting is guessed; give --focal "
        "and --horizon in pixels, or leave it out"
      )
    if hasattr(teacher, "check"):
      for view in views:
        teacher.check(view.segment)
  if not args.no_frames:
    teachers.insert(0, FrameTeacher())
  store = LabelStore(args.out, create=True)
  current: list[Group] = []
  with store.writing():
    for teacher in teachers:
      begun = time.monotonic()
      groups = run_teacher(teacher, views, store, args.view_name, size, args.batch, args.every, args.repair, sees=sees)
      current += groups
      refuse_silence(teacher, groups, store, args.every)
      rows, taken = sum(g.row_count for g in groups), time.monotonic() - begun
      print(
        f"{teacher.name:<22} {len(groups)} segments, {rows} frames, {sum(g.size for g in groups) / 1e6:.1f} MB, "
        f"{taken:.1f} s, license {teacher.license}"
      )
    stale = store.stale(current)
    for g in stale:
      if args.prune:
        store.remove(g)
      why = "by rules that were mended since" if stale_rules(g.meta) else "with other settings"
      print(
        f"{'removed' if args.prune else 'stale'}: {g.path}{'' if args.prune else f' (made {why}; --prune deletes it)'}"
      )


if __name__ == "__main__":
  raise SystemExit(cli(main)())

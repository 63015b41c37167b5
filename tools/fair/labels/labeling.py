"""Runs one teacher over the parts that are to be labeled.

Decoding and drawing, the teacher, and writing overlap. Batches stay inside a segment."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W
from openpilot.tools.fair.labels.picture import PictureWarp, sees_picture, size_of_picture, view_label
from openpilot.tools.fair.labels.passes import Failures, Passes
from openpilot.tools.fair.labels.pipeline import Work
from openpilot.tools.fair.labels.refit import Refit, canvas_of, fits_pictures, input_label
from openpilot.tools.fair.labels.rules import rules_of
from openpilot.tools.fair.labels.sources.pictures import Pictures
from openpilot.tools.fair.labels.canvas import Canvas
from openpilot.tools.fair.labels.meta import CHUNK, VERSION
from openpilot.tools.fair.labels.store import Group, LabelStore
from openpilot.tools.fair.labels.views import SegmentView, is_still, view_intrinsics
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.fair.teacher import Clip, Label, Labels, State, Teacher, failure_is_said
from openpilot.tools.lib.errors import UserError


class FrameTeacher:
  """The frames themselves, as students see them: of a route bit for bit what fairmodeld would see."""

  name, model_id, checkpoint_hash, stateful, wants = "frames", "", "", False, "frame"

  def __init__(self, spec: InputSpec | None = None):
    """spec: of single pictures, whose license is the data's own."""
    self.license = "MIT" if spec is None else ""
    spec = spec or InputSpec()
    unit = "YUV 4:2:0" if spec.kind == "model_frame" else "RGB"
    self.labels = [Label("frame", "dense", "uint8", spec.shape, unit)]

  def prepare(self, height: int, width: int) -> None: ...

  def settings(self) -> dict[str, Any]:
    return {}

  def label(self, clip: Clip, state: State | None = None) -> tuple[Labels, State | None]:
    return {"frame": clip.rgb}, None


def route_meta(teacher: Teacher, view: SegmentView, canvas: Canvas, labels: list[Label], whole: bool) -> dict[str, Any]:
  """What of a route's segment decides its labels. A whole picture's size is each segment's own."""
  settings = {k: v for k, v in teacher.settings().items() if not whole or k != "size"}
  size = (VIEW_W, VIEW_H) if whole else (canvas.width, canvas.height)
  return {
    "teacher": teacher_meta(teacher, teacher.license, settings),
    "labels": label_meta(labels),
    "view": {"name": canvas.view, "width": size[0], "height": size[1]},
    **({"picture": {"width": canvas.width, "height": canvas.height}} if whole else {}),
    "camera": view.camera(),
    **({"source": teacher.source(view.segment)} if hasattr(teacher, "source") else {}),
  }


def picture_meta(teacher: Teacher, part: Pictures, canvas: Canvas, labels: list[Label]) -> dict[str, Any]:
  """The same of single pictures. Frames have the data's license. Of model frames the camera is the view's own: that
  each picture fills a part of it, its size says."""
  shown, spec, camera = {"letterbox": canvas.letterbox} if canvas.wants == "rgb" else {}, canvas.input, part.camera()
  if spec.kind == "model_frame":
    own = view_intrinsics(spec.view, spec.width, spec.height).tolist()
    camera |= {"width": spec.width, "height": spec.height, "intrinsics": own}
  view = spec.view if spec.kind == "model_frame" else "picture"
  return {
    "teacher": teacher_meta(teacher, teacher.license or part.license, teacher.settings()),
    "labels": label_meta(labels),
    "view": {"name": view, "width": canvas.width, "height": canvas.height, **shown},
    "input": spec.to_dict(),
    "camera": camera,
  }


def teacher_meta(teacher: Teacher, license: str, settings: dict[str, Any]) -> dict[str, Any]:
  return {
    "name": teacher.name,
    "model_id": teacher.model_id,
    "checkpoint": teacher.checkpoint_hash,
    "licence": license,  # so spelled on disk: see meta.read_meta
    "settings": settings,
  }


def label_meta(labels: list[Label]) -> list[dict[str, Any]]:
  return [{**vars(x), "shape": list(x.shape), "classes": list(x.classes)} for x in labels]


def job_numbers(views: Sequence[SegmentView | Pictures]) -> list[int]:
  """Which of them share batches: each segment has its own, so that labels do not depend on what else is labeled; of
  stills, segments of one frame, each CHUNK in a row do."""
  numbers: list[int] = []
  stills = 0
  for v in views:
    stills = stills + 1 if is_still(v) else 0
    numbers.append(numbers[-1] if stills and (stills - 1) % CHUNK else len(numbers))
  return numbers


def plan(
  teacher: Teacher,
  views: Sequence[SegmentView | Pictures],
  store: LabelStore,
  canvas: Canvas,
  labels: list[Label],
  every: int,
  repair: bool,
  whole: bool = False,
  jobs: Sequence[int] = (),
) -> list[Work]:
  """labels: as they are stored. jobs: of each view, as of jobs_of()."""
  works = []
  for v, job in zip(views, jobs or job_numbers(views), strict=True):
    more, step = None, every
    if isinstance(v, Pictures):
      own, more = picture_meta(teacher, v, canvas, labels), v.columns()
      step = 1 if v.still else every  # of a video each Nth frame is there, of stills all
    else:
      own = route_meta(teacher, v, canvas, labels, whole)
    meta = {"version": VERSION, "segment": v.name, **own, "every": step, "chunk": CHUNK}
    if rules := rules_of(meta):
      meta["rules"] = rules
    group = store.group(meta, v.entries, more, None if isinstance(v, Pictures) else v.camera_height)
    if repair:
      for k, problem in group.problems():
        print(f"repair: {problem}; its chunk is labeled again", file=sys.stderr)
        group.drop_chunk(k)
    if teacher.stateful:
      group.forget_states()  # a run that was killed may have left more than the newest
    work = Work(v, group, job=job)
    work.look(teacher.stateful)
    if isinstance(v, Pictures):
      work.refit = Refit(canvas, canvas.input) if canvas.wants == "rgb" else None
    elif whole:
      work.picture = PictureWarp(v, canvas.view, canvas.width, canvas.height)
    works.append(work)
  return works


def prepare(teacher: Teacher, width: int, height: int) -> None:
  """Raises UserError."""
  with failure_is_said(teacher.name):
    teacher.prepare(height, width)


def picture_size(teacher: Teacher, size: tuple[int, int] | None) -> tuple[int, int]:
  """(width, height) of the pictures that a teacher is given: `size`, or what it likes. Of one that reads no picture it
  does not matter."""
  if size is None and hasattr(teacher, "view_size"):
    size = teacher.view_size()
  return size if size is not None and getattr(teacher, "wants", "rgb") == "rgb" else (VIEW_W, VIEW_H)


@dataclass
class Showing:
  """How a teacher is shown some of the parts."""

  rows: Sequence[int]  # which of them
  canvas: Canvas
  stored: list[Label]  # the teacher's labels as the store has them
  scale: tuple[float, float] = (1, 1)  # pixels of the canvas for one of the view
  whole: bool = False  # a route camera's whole pictures


def showings(
  teacher: Teacher,
  views: Sequence[SegmentView | Pictures],
  view: str = "medmodel",
  size: tuple[int, int] | None = None,
  sees: str | None = None,
  spec: InputSpec | None = None,
) -> Iterator[Showing]:
  """As run_teacher() is told; of routes whose whole pictures are shown one for each size of them. The teacher is
  prepared for each when it is asked for."""
  everything = range(len(views))
  if spec is not None:
    own = fits_pictures(teacher)
    if hasattr(teacher, "sees"):
      setattr(teacher, "whole", own)  # noqa: B010
    canvas = canvas_of(teacher, spec, size)
    prepare(teacher, canvas.width, canvas.height)
    yield Showing(everything, canvas, [input_label(x, spec, own) for x in teacher.labels])
    return
  wants = getattr(teacher, "wants", "rgb")
  if not sees_picture(teacher, sees):
    if hasattr(teacher, "sees"):
      setattr(teacher, "whole", False)  # noqa: B010
    canvas = Canvas(wants, *picture_size(teacher, size), view)
    prepare(teacher, canvas.width, canvas.height)
    yield Showing(everything, canvas, list(teacher.labels), (canvas.width / VIEW_W, canvas.height / VIEW_H))
    return
  sizes = [size_of_picture(teacher, v, view) for v in views if isinstance(v, SegmentView)]
  for one in dict.fromkeys(sizes):
    setattr(teacher, "whole", True)  # noqa: B010
    prepare(teacher, *one)
    rows = [i for i, x in enumerate(sizes) if x == one]
    yield Showing(rows, Canvas(wants, *one, view), [view_label(x) for x in teacher.labels], whole=True)


def run_teacher(
  teacher: Teacher,
  views: Sequence[SegmentView | Pictures],
  store: LabelStore,
  view: str = "medmodel",
  size: tuple[int, int] | None = None,
  batch: int = 8,
  every: int = 1,
  repair: bool = False,
  progress: bool = True,
  sees: str | None = None,
  spec: InputSpec | None = None,
  failures: Failures | None = None,
) -> list[Group]:
  """Labels all of `views` that is not labeled yet, either segments of routes or single pictures. size: of the
  pictures that the teacher is given, (width, height); None: what it likes. sees: of routes, 'picture' or 'view',
  None: what it was made for. spec: of single pictures, the input in which they and their labels are stored. failures:
  where what fails is noted; without it the first failure is raised. -> the groups."""
  more = (batch, every, repair, progress, failures)
  groups: dict[int, Group] = {}
  jobs = job_numbers(views)
  for s in showings(teacher, views, view, size, sees, spec):
    alike, own = [views[i] for i in s.rows], [jobs[i] for i in s.rows]
    done = label_parts(teacher, alike, store, s.canvas, s.stored, s.scale, *more, whole=s.whole, jobs=own)
    groups.update(zip(s.rows, done, strict=True))
  return [groups[i] for i in range(len(views))]


def label_parts(
  teacher: Teacher,
  views: Sequence[SegmentView | Pictures],
  store: LabelStore,
  canvas: Canvas,
  stored: list[Label],
  scale: tuple[float, float],
  batch: int,
  every: int,
  repair: bool,
  progress: bool,
  failures: Failures | None,
  whole: bool = False,
  jobs: Sequence[int] = (),
) -> list[Group]:
  """run_teacher() of parts that are shown on one canvas, by a teacher that is prepared. stored: its labels as the store
  has them. scale: pixels of the canvas for one of the view. whole: a route camera's whole pictures are shown."""
  route = views and isinstance(views[0], SegmentView)
  intrinsics = None
  if canvas.wants == "rgb" and route:
    intrinsics = view_intrinsics(canvas.view, canvas.width, canvas.height)
  works = plan(teacher, views, store, canvas, stored, every, repair, whole, jobs)
  Passes(teacher, works, store.claims, canvas, intrinsics, stored, scale, batch, failures, progress).run()
  return [w.group for w in works]


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

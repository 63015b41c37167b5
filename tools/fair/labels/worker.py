"""Labels what it is given, with teachers that it holds: everything at once, or job by job."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from openpilot.tools.fair.labels.jobs import Job
from openpilot.tools.fair.labels.label_options import Options, shown
from openpilot.tools.fair.labels.labeling import FrameTeacher, picture_size, refuse_silence, run_teacher
from openpilot.tools.fair.labels.passes import Failures
from openpilot.tools.fair.labels.refit import canvas_of
from openpilot.tools.fair.labels.rules import stale_rules
from openpilot.tools.fair.labels.sources import Part, Piece
from openpilot.tools.fair.labels.sources.pictures import Pictures
from openpilot.tools.fair.labels.store import Group, LabelStore
from openpilot.tools.fair.labels.views import SegmentView
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.fair.teacher import Teacher
from openpilot.tools.lib.errors import UserError, warn

OPENED = 64  # parts that are kept open for the next teacher


def split(found: Sequence[Part]) -> tuple[list[SegmentView], list[Pictures]]:
  return [p for p in found if isinstance(p, SegmentView)], [p for p in found if isinstance(p, Pictures)]


def keep_license(store: LabelStore, parts: Sequence[Pictures], given: str) -> None:
  """Pictures whose license is not said have the one under which they are in the store already."""
  for part in parts:
    for g in store.groups("frames", part.name) if not given and part.license == "unstated" else ():
      if g.meta["camera"]["video"] == part.camera()["video"]:
        part.license = g.meta["teacher"]["license"]


def check_teacher(
  teacher: Teacher, views: list[SegmentView], parts: list[Pictures], size: tuple[int, int] | None, spec: InputSpec
) -> None:
  """Everything that can be wrong is found before the first frame. Raises UserError."""
  if views:
    teacher.prepare(*picture_size(teacher, size)[::-1])
  else:
    canvas = canvas_of(teacher, spec, size)
    teacher.prepare(canvas.height, canvas.width)
  meters = [x.name for x in teacher.labels if x.unit == "m"]
  if meters and getattr(teacher, "wants", "rgb") == "rgb" and any(v.estimated for v in views):
    raise UserError(
      f"teacher '{teacher.name}' says meters, of a camera whose focal length or mounting is guessed; give --focal "
      "and --horizon in pixels, or leave it out"
    )
  every: list[SegmentView | Pictures] = [*views, *parts]
  if teacher.stateful and (still := [p.segment.dir for p in every if getattr(p, "still", False)]):
    raise UserError(
      f"teacher '{teacher.name}' follows things from frame to frame, and {still[0]} holds single pictures; give a "
      "video, or leave this teacher out"
    )
  if hasattr(teacher, "check"):
    for segment in [v.segment for v in views] + [p.segment for p in parts]:
      teacher.check(segment)


def run_one(
  teacher: Teacher,
  found: Sequence[Part],
  store: LabelStore,
  args: Options,
  failures: Failures | None,
  progress: bool = True,
) -> list[Group]:
  """One teacher over parts of any kind. failures: as run_teacher()'s. -> their groups."""
  size, spec, sees = shown(args)
  more = (args.view_name, size, args.batch_size, args.every, args.repair, progress)
  views, parts = split(found)
  groups: list[Group] = []
  if views:
    groups += run_teacher(teacher, views, store, *more, sees=sees, failures=failures)
  if parts:
    own = FrameTeacher(spec) if teacher.name == "frames" else teacher
    groups += run_teacher(own, parts, store, *more, spec=spec, failures=failures)
  return groups


def label_all(
  teachers: Sequence[Teacher], found: Sequence[Part], store: LabelStore, args: Options, failures: Failures
) -> list[Group]:
  """-> the groups that are there now."""
  current: list[Group] = []
  for teacher in teachers:
    begun = time.monotonic()
    groups = run_one(teacher, found, store, args, failures)
    current += groups
    refuse_silence(teacher, groups, store, args.every)
    rows, taken = sum(g.row_count for g in groups), time.monotonic() - begun
    licenses = dict.fromkeys(g.meta["teacher"]["license"] for g in groups)
    print(
      f"{teacher.name:<22} {len(groups)} segments, {rows} frames, {sum(g.size for g in groups) / 1e6:.1f} MB, "
      f"{taken:.1f} s, license {', '.join(licenses) or teacher.license}"
    )
  return current


def say_stale(store: LabelStore, current: list[Group], prune: bool) -> None:
  for g in store.stale(current):
    if prune and store.claims.taken(g.name):
      print(f"kept: {g.place}: another command fills it")
      continue
    if prune:
      store.remove(g)
    why = "by rules that were mended since" if stale_rules(g.meta) else "with other settings"
    print(f"{'removed' if prune else 'stale'}: {g.place}{'' if prune else f' (made {why}; --prune deletes it)'}")


@dataclass
class Done:
  """Of one job."""

  rows: int = 0  # frames that are labeled now
  bytes: int = 0
  entries: int = 0  # of tables, or rows of dense labels
  seconds: float = 0.0
  groups: list[Group] = field(default_factory=list)


class Worker:
  def __init__(self, teachers: Mapping[str, Teacher], store: LabelStore, args: Options):
    self.teachers, self.store, self.args = dict(teachers), store, args
    self.failures = Failures()
    self.opened: dict[str, Part] = {}

  def open(self, piece: Piece) -> Part:
    if piece.name not in self.opened:
      part = piece.open()
      while len(self.opened) >= OPENED:
        self.opened.pop(next(iter(self.opened)))
      self.opened[piece.name] = part
    return self.opened[piece.name]

  def do(self, job: Job) -> Done:
    """What fails is noted in `failures`. Raises UserError where the store fails."""
    begun, found, teacher = time.monotonic(), [], self.teachers[job.teacher]
    if self.failures.hopeless(job.teacher):
      return Done()
    for piece in job.pieces:
      try:
        part = self.open(piece)
        views, parts = split([part])
        if job.teacher != "frames":
          size, spec, _ = shown(self.args)
          check_teacher(teacher, views, parts, size, spec)
        found.append(part)
      except Exception as e:
        self.failures.final[job.teacher, piece.name] = e
    keep_license(self.store, split(found)[1], self.args.license)
    groups = run_one(teacher, found, self.store, self.args, self.failures, progress=False)
    done = Done(seconds=time.monotonic() - begun, groups=groups)
    for g in groups:
      done.rows, done.bytes = done.rows + g.row_count, done.bytes + g.size
      done.entries += sum(g.row_count if x.kind == "dense" else g.entry_count(x.name) for x in g.labels)
    return done


def label_jobs(worker: Worker, jobs: Sequence[Job]) -> int:
  """One job after the other. -> the exit code."""
  rows: Counter[str] = Counter()
  entries: Counter[str] = Counter()
  with tqdm(total=sum(j.size for j in jobs), desc="labels", unit="B", unit_scale=True, disable=not jobs) as bar:
    for job in jobs:
      bar.set_postfix_str(f"{job.name} by {job.teacher}", refresh=False)
      done = worker.do(job)
      rows[job.teacher] += done.rows
      entries[job.teacher] += done.entries
      say_stale(worker.store, done.groups, worker.args.prune)
      bar.update(job.size)
  for name in dict.fromkeys(j.teacher for j in jobs):
    if rows[name] and not entries[name]:
      warn(f"teacher '{name}' says nothing of any of the {rows[name]} frames of this part: its tables are empty")
    print(f"{name:<22} {sum(j.teacher == name for j in jobs)} jobs, {rows[name]} frames")
  worker.store.finish()
  return worker.failures.finish()

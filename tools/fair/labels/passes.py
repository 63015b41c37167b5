"""One teacher over what is to be done: each piece is claimed first; what others fill meanwhile is left to them, and
waited for; what fails is tried again after the others, and named."""

import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from openpilot.tools.fair.labels.canvas import Canvas
from openpilot.tools.fair.labels.claims import Claims
from openpilot.tools.fair.labels.collector import Collector
from openpilot.tools.fair.labels.pipeline import (
  Item,
  StoreFailed,
  Work,
  WorkFailed,
  ahead,
  batches,
  failure_of,
  label_batch,
  load,
  prefetch,
)
from openpilot.tools.fair.teacher import Label, Labels, State, Teacher
from openpilot.tools.lib.errors import UserError, explain, printable

AHEAD = 3  # batches decoded before they are due
TRIES = 3
ALIKE = 3  # pieces that fail for one reason, where none succeeds: it is the teacher's
POLL = 1.0  # s between looks at what others fill


def reason_of(error: BaseException) -> str:
  return printable(str(error) if isinstance(error, UserError) else explain(error) or f"{type(error).__name__}: {error}")


@dataclass
class Failures:
  """Pieces of work that failed, of all teachers. most: so often each is tried."""

  most: int = TRIES
  tries: Counter[tuple[str, str]] = field(default_factory=Counter)  # (teacher, segment)
  final: dict[tuple[str, str], BaseException] = field(default_factory=dict)
  succeeded: Counter[str] = field(default_factory=Counter)  # teacher -> segments

  def again(self, teacher: str, segment: str, error: BaseException) -> bool:
    """Whether it is tried again."""
    self.tries[teacher, segment] += 1
    if self.tries[teacher, segment] < self.most:
      return True
    self.final[teacher, segment] = error
    return False

  def hopeless(self, teacher: str) -> bool:
    """Whether all fail in one way."""
    reasons = Counter(reason_of(e) for (t, _), e in self.final.items() if t == teacher)
    return not self.succeeded[teacher] and max(reasons.values(), default=0) >= ALIKE

  def finish(self) -> int:
    """Names them. -> the exit code, 1 where some work is missing. Raises the reason where a teacher did nothing."""
    count = Counter(teacher for teacher, _ in self.final)
    for (teacher, segment), error in self.final.items():
      if self.succeeded[teacher] or count[teacher] > 1:
        often = self.tries[teacher, segment]  # what cannot be opened is not tried again
        times = f", {often} times" if often > 1 else ""
        print(f"failed: {segment} by {teacher}{times}: {reason_of(error)}", file=sys.stderr)
    for (teacher, _), error in self.final.items():
      if not self.succeeded[teacher]:
        raise error
    for error in self.final.values():
      if not isinstance(error, UserError) and explain(error) is None:  # a fault of this program or of a plugin
        traceback.print_exception(error)
    return 1 if self.final else 0


def jobs_of(works: Sequence[Work]) -> list[list[Work]]:
  """Works by job, in order, without the jobs of which nothing is to be done."""
  jobs: dict[int, list[Work]] = {}
  for w in works:
    jobs.setdefault(w.job, []).append(w)
  return [job for job in jobs.values() if any(w.todo for w in job)]


class Passes:
  """stored: the teacher's labels as the store has them. scale: pixels of the canvas for one of the view. failures: what
  fails is noted there, else raised."""

  def __init__(
    self,
    teacher: Teacher,
    works: Sequence[Work],
    claims: Claims,
    canvas: Canvas,
    intrinsics: np.ndarray | None,
    stored: list[Label],
    scale: tuple[float, float],
    batch: int,
    failures: Failures | None,
    progress: bool,
  ):
    self.teacher, self.claims, self.canvas, self.intrinsics = teacher, claims, canvas, intrinsics
    self.stored, self.scale, self.batch, self.failures = stored, scale, batch, failures
    self.todo = deque(jobs_of(works))
    self.opened: list[list[Work]] = []
    self.writing: list[Future[None]] = []
    self.broken: Counter[str] = Counter()
    self.labeled = 0  # frames
    if failures is not None:
      failures.succeeded[teacher.name] += sum(not w.todo for w in works)
    total = self.frames_left()
    self.bar = tqdm(total=total, desc=teacher.name, unit="frame", disable=not progress or not total)

  def frames_left(self) -> int:
    return sum(len(b) for job in self.todo for b in batches(job, self.batch, self.teacher.stateful))

  def run(self) -> None:
    waited = False
    with self.bar:
      while self.todo:
        busy = self.one_pass()
        self.todo.extend(busy)
        if busy and len(busy) == len(self.todo):
          if not waited:
            waited = True
            print(f"{self.teacher.name}: waiting for {len(busy)} pieces that others label", file=sys.stderr)
          time.sleep(POLL)
        self.bar.total = self.bar.n + self.frames_left()
        self.bar.refresh()
    self.report()

  def one_pass(self) -> list[list[Work]]:
    """Over all jobs that are free. -> those that others hold. Leaves in `todo` what is to be tried again."""
    busy: list[list[Work]] = []
    again: list[list[Work]] = []
    self.opened, self.writing = [], []
    failed: int | None = None
    try:
      with ThreadPoolExecutor(1) as writer:
        self.label(self.claimed(busy), writer)
      for f in self.writing:
        f.result()
    except StoreFailed as e:
      assert e.__cause__ is not None
      raise e.__cause__ from e.__cause__.__cause__
    except WorkFailed as e:
      for f in self.writing:
        f.result()
      failed, cause = e.job, e.__cause__
      assert cause is not None
      job = next(job for job in self.opened if job[0].job == failed)
      if self.failures is None:
        raise cause from cause.__cause__
      segment = next((w.group.segment for w in job if w.left), job[0].group.segment)
      if self.failures.again(self.teacher.name, segment, cause):
        again.append(job)
      elif self.failures.hopeless(self.teacher.name):
        print(f"{self.teacher.name}: {ALIKE} pieces failed alike and none succeeded; it is left out", file=sys.stderr)
        self.todo.clear()
        return []
    finally:
      for job in self.opened:
        for w in job:
          if w.claim is not None:
            self.claims.release(w.claim)
            w.claim = None
    busy = [job for job in busy if job[0].job != failed]
    for job in self.opened:
      if any(w.left for w in job) and job[0].job != failed and not any(j is job for j in busy):
        # begun when another one failed; or another command took it over
        (busy if failed is None else again).append(job)
    for job in [*again, *busy]:
      for w in job:
        w.look(self.teacher.stateful)
    self.todo.extend(again)
    return [job for job in busy if any(w.todo for w in job)]

  def claimed(self, busy: list[list[Work]]) -> Iterator[list[list[Item]]]:
    """Of each job that can be had its batches."""
    while self.todo:
      job, held = self.todo.popleft(), False
      self.opened.append(job)
      for w in job:
        w.look(self.teacher.stateful)
        if w.todo and (claim := self.claims.take(w.group.name)) is not None:
          w.claim = claim
          w.look(self.teacher.stateful)  # whoever held it before may have finished it
          if not w.todo:
            self.finished(w)
        elif w.todo:
          w.todo, w.left, held = set(), set(), True
      if held:
        busy.append(job)
      if grid := batches(job, self.batch, self.teacher.stateful):
        yield grid

  def finished(self, work: Work) -> None:
    if self.failures is not None:
      self.failures.succeeded[self.teacher.name] += 1
    if work.claim is not None:
      self.claims.release(work.claim)
      work.claim = None

  def write(self, work: Work, k: int, labels: Labels, state: State | None, bad: list[int]) -> None:
    if work.claim is None or not self.claims.holds(work.claim):
      return  # another command has taken it over
    work.group.write_chunk(k, labels, state, bad)
    work.left.discard(k)
    if not work.left:
      self.finished(work)

  @staticmethod
  def written(future: Future[None]) -> None:
    try:
      future.result()
    except Exception as e:
      raise StoreFailed from e

  def label(self, jobs: Iterator[list[list[Item]]], writer: ThreadPoolExecutor) -> None:
    teacher, wants = self.teacher, self.canvas.wants

    def write(work: Work, k: int, labels: Labels, state: State | None, bad: list[int]) -> None:
      while len(self.writing) > 1 or (self.writing and self.writing[0].done()):  # memory for two chunks
        self.written(self.writing.pop(0))
      if bad:
        print(
          f"warning: {work.group.segment}: {len(bad)} frames from row {bad[0]} on cannot be decoded; nothing is "
          "learned from them, nor judged by them",
          file=sys.stderr,
        )
      self.writing.append(writer.submit(self.write, work, k, labels, state, bad))

    collector = Collector(self.stored, self.scale, write, teacher.name, list(teacher.labels))
    try:
      if teacher.stateful:
        before: Work | None = None
        state: State | None = None
        with closing(prefetch(load(jobs, self.canvas), AHEAD)) as loaded:
          for items, images in loaded:
            if items[0].work is not before:
              before, state = items[0].work, items[0].work.state
            with failure_of(items[0].work):
              parts, state = label_batch(teacher, items, images, wants, self.intrinsics, state)
            self.take(collector, items, parts, state)
        return

      def one(batch: tuple[list[Item], np.ndarray]) -> list[tuple[Labels, int]]:
        with failure_of(batch[0][0].work):
          return label_batch(teacher, *batch, wants, self.intrinsics)[0]

      at_once = teacher.at_once() if self.todo and hasattr(teacher, "at_once") else 1
      frames = load(jobs, self.canvas, reuse=at_once > 1)
      source = frames if at_once > 1 else prefetch(frames, AHEAD)
      with closing(source), closing(ahead(one, source, at_once)) as labeled:
        for (items, _), made in labeled:
          self.take(collector, items, made, None)
    finally:
      self.broken.update(collector.broken)

  def take(self, collector: Collector, items: list[Item], parts: list[tuple[Labels, int]], state: State | None) -> None:
    with failure_of(items[0].work):
      collector.add_parts(items, parts, state)
    self.labeled += len(items)
    self.bar.update(len(items))

  def report(self) -> None:
    teacher = self.teacher
    if self.labeled and hasattr(teacher, "report"):
      for line in teacher.report():
        print(f"{teacher.name}: {line}", file=sys.stderr)
    for name, n in self.broken.items():
      if n:
        print(
          f"warning: teacher '{teacher.name}' puts out NaN or Inf as '{name}' in {n} of {self.labeled} frames, which "
          "counts as unknown there",
          file=sys.stderr,
        )

"""Jobs over workers that come, go and die: who gets which, what is tried again, how long it will take. It knows no
cluster: a Pool is what runs jobs (cluster.RayPool)."""

import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from openpilot.tools.fair.labels.jobs import Job
from openpilot.tools.fair.labels.passes import ALIKE, TRIES
from openpilot.tools.fair.labels.views import is_still
from openpilot.tools.lib.errors import UserError

IN_A_ROW = 5  # jobs that fail on one worker, which none had tried before: it is the worker, if others do not fail
SAY = 10.0  # s from one line of progress to the next


@dataclass
class Result:
  """What a worker says of a job."""

  rows: int = 0  # frames that are labeled
  entries: int = 0  # of tables, or rows of dense labels
  bytes: int = 0
  seconds: float = 0.0
  failed: dict[str, str] = field(default_factory=dict)  # segment -> reason
  died: str = ""  # why the worker is gone, and with it this job


class Pool(Protocol):
  def free(self) -> list[Any]:
    """Workers that could begin a job now."""

  def size(self) -> int:
    """Workers that there are, or may yet be."""

  def give(self, worker: Any, job: Job) -> None: ...

  def wait(self, seconds: float) -> Iterable[tuple[Any, Job, Result]]:
    """What was finished, at the latest after so many seconds: maybe nothing."""

  def retire(self, worker: Any) -> None:
    """It gets no job any more."""


@dataclass
class Outcome:
  rows: Counter[str] = field(default_factory=Counter)  # teacher -> frames
  entries: Counter[str] = field(default_factory=Counter)
  bytes: Counter[str] = field(default_factory=Counter)
  seconds: dict[str, float] = field(default_factory=dict)  # of workers
  sizes: Counter[str] = field(default_factory=Counter)  # teacher -> sizes of its jobs that are done
  pieces: Counter[str] = field(default_factory=Counter)  # teacher -> segments
  failed: dict[tuple[str, str], str] = field(default_factory=dict)  # (teacher, segment) -> reason
  deaths: int = 0

  def code(self) -> int:
    """Names what failed. -> the exit code, 1 where some of it did. Raises UserError where a teacher did nothing."""
    for (teacher, segment), reason in self.failed.items():
      print(f"failed: {segment} by {teacher}, {TRIES} times: {reason}", file=sys.stderr)
    for (teacher, _), reason in self.failed.items():
      if not self.pieces[teacher]:
        raise UserError(reason)
    return 1 if self.failed else 0


def seconds_left(outcome: Outcome, left: Counter[str], workers: int) -> float | None:
  """Until all is done: each teacher's own time for its sizes, of one that has none yet that of the slowest. None where
  nothing is known yet."""
  pace = {t: outcome.seconds[t] / outcome.sizes[t] for t in outcome.sizes if outcome.sizes[t]}
  if not pace or not workers:
    return None
  return sum(size * pace.get(t, max(pace.values())) for t, size in left.items()) / workers


def in_words(seconds: float | None) -> str:
  if seconds is None:
    return "time left not known yet"
  minutes = round(seconds / 60)
  if minutes >= 48 * 60:
    return f"about {minutes / 1440:.1f} days left"
  return f"about {minutes // 60} h {minutes % 60:02d} min left" if minutes >= 60 else f"about {minutes} min left"


class Driver:
  def __init__(self, pool: Pool, jobs: Sequence[Job], say: Any = None):
    """say: takes a line of progress, at most one in SAY seconds; None: stderr."""
    self.pool, self.total = pool, len(jobs)
    self.waiting = deque(sorted(jobs, key=lambda j: -j.size))  # stable: teachers in their order where sizes are one
    self.todo: Counter[str] = Counter()  # teacher -> sizes of what waits: kept, since a million jobs take long to sum
    for job in self.waiting:
      self.todo[job.teacher] += job.size
    self.say = say or (lambda line: print(line, file=sys.stderr))
    self.running: dict[Any, Job] = {}
    self.tries: Counter[tuple[str, str]] = Counter()
    self.good: set[tuple[str, str]] = set()
    self.streak: Counter[Any] = Counter()  # worker -> jobs that failed on it, one after the other
    self.outcome = Outcome()
    self.said = time.monotonic()

  def run(self) -> Outcome:
    """Raises UserError where no worker is left."""
    while self.waiting or self.running:
      for worker in self.pool.free():  # no job waits in a worker: what is left can go to whoever is free first
        if not self.waiting:
          break
        self.running[worker] = job = self.waiting.popleft()
        self.todo[job.teacher] -= job.size
        self.pool.give(worker, job)
      if not self.running and not self.pool.size():
        raise UserError(
          f"no worker is left, with {len(self.waiting)} jobs to do; the same command goes on where this one stopped"
        )
      for worker, job, result in self.pool.wait(SAY / 2):
        self.running.pop(worker, None)
        self.take(worker, job, result)
      self.progress()
    return self.outcome

  def take(self, worker: Any, job: Job, result: Result) -> None:
    out, t = self.outcome, job.teacher
    if result.died:
      out.deaths += 1
      self.say(f"a worker died at {job.name} by {t} ({result.died}); its job is given to another")
      result.failed = {p.name: f"its worker died: {result.died}" for p in job.pieces}
    good = {(t, p.name) for p in job.pieces if p.name not in result.failed}
    out.pieces[t] += len(good - self.good)
    self.good |= good
    for counter, value in (
      (out.rows, result.rows),
      (out.entries, result.entries),
      (out.bytes, result.bytes),
      (out.sizes, sum(p.size for p in job.pieces if p.name not in result.failed)),
    ):
      counter[t] += value
    out.seconds[t] = out.seconds.get(t, 0.0) + result.seconds
    again = []
    for p in job.pieces:
      if p.name not in result.failed:
        continue
      self.tries[t, p.name] += 1
      if self.tries[t, p.name] < TRIES:
        again.append(p)
      else:
        out.failed[t, p.name] = result.failed[p.name]
    if again:  # behind the others: by another worker, when what a dead one held is free
      self.waiting.append(job if is_still(again[0].part) else Job(t, tuple(again)))  # stills share batches
      self.todo[t] += self.waiting[-1].size
    if good:
      self.streak[worker] = 0
    elif any(self.tries[t, name] == 1 for name in result.failed):  # what failed elsewhere says nothing of this worker
      self.streak[worker] += 1
    if self.streak[worker] >= IN_A_ROW and any(not n for w, n in self.streak.items() if w != worker):
      why = next(iter(result.failed.values()))
      self.say(f"a worker fails at everything, and others do not: it gets no job any more ({why})")
      self.pool.retire(worker)
    if not result.failed:
      return
    reasons = Counter(r for (name, _), r in out.failed.items() if name == t)
    if not out.pieces[t] and max(reasons.values(), default=0) >= ALIKE:
      self.say(f"{t}: {ALIKE} pieces failed alike and none succeeded; it is left out")
      self.waiting = deque(j for j in self.waiting if j.teacher != t)
      self.todo[t] = 0

  def left(self) -> Counter[str]:
    """teacher -> sizes of what is not done; of what runs, half."""
    out = Counter(self.todo)
    for job in self.running.values():
      out[job.teacher] += job.size // 2
    return out

  def progress(self) -> None:
    if time.monotonic() - self.said < SAY:
      return
    self.said, left = time.monotonic(), len(self.waiting) + len(self.running)
    self.say(
      f"labels: {max(0, self.total - left)} of {self.total} jobs, {self.outcome.rows.total()} frames, "
      f"{len(self.running)} workers, {in_words(seconds_left(self.outcome, self.left(), len(self.running)))}"
    )

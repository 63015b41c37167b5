"""Frames on their way to a teacher: which, in which batches, decoded and warped ahead of time."""

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from openpilot.tools.fair.labels.claims import Claim
from openpilot.tools.fair.labels.picture import PictureWarp
from openpilot.tools.fair.labels.refit import Refit
from openpilot.tools.fair.labels.sources.pictures import Pictures
from openpilot.tools.fair.labels.canvas import Canvas, Renderer
from openpilot.tools.fair.labels.meta import CHUNK
from openpilot.tools.fair.labels.store import Group
from openpilot.tools.fair.labels.views import SegmentView
from openpilot.tools.learn.memory import halve_on_oom
from openpilot.tools.fair.teacher import Clip, Labels, State, Teacher, failure_is_said

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Work:
  """What is to be done in one segment."""

  view: SegmentView | Pictures
  group: Group
  todo: set[int] = field(default_factory=set)  # chunks
  start: int = 0  # row at which a teacher with state begins
  state: State | None = None
  picture: PictureWarp | None = None  # where the teacher sees a route camera's whole picture
  refit: Refit | None = None  # of single pictures
  job: int = 0  # works of one job share batches
  left: set[int] = field(default_factory=set)  # chunks of `todo` that are not written yet
  claim: Claim | None = None

  def look(self, stateful: bool) -> None:
    """What the store lacks of it now."""
    self.group.refresh()
    done = self.group.done()
    self.todo = set(range(self.group.chunk_count)) - done
    self.left = set(self.todo)
    self.state, self.start = None, 0
    if stateful and self.todo and (k := min(self.todo)):
      self.state = self.group.state(k - 1)
      self.start = k * CHUNK if self.state is not None else 0


class WorkFailed(Exception):
  """Of a job: its cause is what went wrong."""

  def __init__(self, job: int):
    self.job = job


class StoreFailed(Exception):
  """Of no job: its cause came up when the store was written."""


@contextlib.contextmanager
def failure_of(work: Work) -> Iterator[None]:
  """Around what concerns one job alone."""
  try:
    yield
  except StoreFailed:
    raise
  except Exception as e:
    raise WorkFailed(work.job) from e


@dataclass
class Item:
  work: Work
  row: int
  good: bool = True  # False: not decodable, the frame before stands for it


def long_slices() -> None:
  """Of the calling thread: it does not push others off their core when it wakes up. Who labels wants much done, not
  soon, and the caches kept."""
  if hasattr(os, "sched_setscheduler"):
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def prefetch(items: Iterable[T], depth: int) -> Generator[T, None, None]:
  """The same items, made by a thread that stays up to `depth` ahead. Its exceptions come up here."""
  waiting: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
  stop = threading.Event()

  def put(x: tuple[bool, Any]) -> None:
    while not stop.is_set():
      try:
        return waiting.put(x, timeout=0.1)
      except queue.Full:
        continue

  def work() -> None:
    long_slices()
    try:
      for item in items:
        put((True, item))
        if stop.is_set():
          return
      put((False, None))
    except BaseException as e:  # raised again where the user's code waits
      put((False, e))

  thread = threading.Thread(target=work, daemon=True)
  thread.start()
  try:
    while True:
      more, x = waiting.get()
      if not more:
        if x is not None:
          raise x
        return
      yield x
  finally:
    stop.set()
    thread.join()


def ahead(function: Callable[[T], R], items: Iterable[T], threads: int) -> Generator[tuple[T, R], None, None]:
  """(item, function(item)) in the items' order, by so many threads, while what they made is used. Each makes its next
  item itself, one at a time: with a thread on each core, one more that makes items would push them off their cores and
  out of their caches."""
  source = iter(items)
  # in the items' order; None: a thread has ended
  running: queue.SimpleQueue[Future[tuple[T, R]] | None] = queue.SimpleQueue()
  turn, room, stop = threading.Lock(), threading.Semaphore(2 * threads), threading.Event()

  def work() -> None:
    long_slices()
    while True:
      room.acquire()
      future: Future[tuple[T, R]] = Future()
      with turn:
        if stop.is_set():
          return running.put(None)
        try:
          item = next(source)
        except StopIteration:
          stop.set()
          return running.put(None)
        except BaseException as e:  # raised again where the user's code waits
          stop.set()
          future.set_exception(e)
          return running.put(future)
        running.put(future)
      try:
        future.set_result((item, function(item)))
      except BaseException as e:
        future.set_exception(e)

  workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
  for w in workers:
    w.start()
  try:
    working = threads
    while working:
      future = running.get()
      if future is None:
        working -= 1
      else:
        yield future.result()
      room.release()
  finally:
    stop.set()
    room.release(threads)
    for w in workers:
      w.join()


def batches(works: Sequence[Work], size: int, stateful: bool) -> list[list[Item]]:
  """Of one job: a fixed grid over all its rows, so that every row meets the same neighbors in every run, less the
  batches of which nothing is to be done."""
  if stateful:  # one segment at a time, cut at chunks, from where the state is known
    grid = [
      [Item(w, r) for r in range(a, min(a + size, stop))]
      for w in works
      if w.todo
      for k in range(w.start // CHUNK, max(w.todo) + 1)
      for stop in [w.group.rows(k).stop]
      for a in range(k * CHUNK, stop, size)
    ]
    return grid
  items = [Item(w, r) for w in works for r in range(w.group.n)]
  grid = [items[i : i + size] for i in range(0, len(items), size)]
  return [b for b in grid if any(i.row // CHUNK in i.work.todo for i in b)]


def load(
  jobs: Iterable[list[list[Item]]], canvas: Canvas, reuse: bool = False
) -> Generator[tuple[list[Item], np.ndarray], None, None]:
  """The batches of all jobs and their pictures, (T, H, W, 3) uint8 RGB, or what the canvas wants: frames as they are
  stored, or nothing. reuse: pictures lie in the memory of the thread that takes them, until it takes the next; new
  memory has its pages cleared first, a hundredth of the time."""
  memory = threading.local()
  for grid in jobs:
    with failure_of(grid[0][0].work):
      yield from _load(grid, canvas, memory, reuse)


def _load(
  grid: list[list[Item]], canvas: Canvas, memory: threading.local, reuse: bool
) -> Iterator[tuple[list[Item], np.ndarray]]:
  rows: dict[int, list[int]] = {}
  for batch in grid:
    for item in batch:
      rows.setdefault(id(item.work), []).append(item.row)
  current: Work | None = None
  source: Iterator[tuple[int, Any]] = iter(())
  held: tuple[int, Any] | None = None
  last: np.ndarray | None = None
  renderer: Renderer | None = None
  for batch in grid:
    if reuse and len(getattr(memory, "images", ())) >= len(batch):
      images = memory.images[: len(batch)]
    else:
      images = memory.images = np.zeros((len(batch), *canvas.shape), np.uint8)
    for image, item in zip(images, batch, strict=True):
      if canvas.wants == "none":
        continue
      if item.work is not current:
        current, last = item.work, None
        renderer = current.view.renderer(canvas, current.picture)
        source = renderer.read(rows[id(current)])
        held = next(source, None)
      assert renderer is not None
      if held is not None and held[0] == item.row:
        last = renderer.draw(held[1], image)
        held = next(source, None)
      else:
        item.good = False
        image[:] = 0 if last is None else last
    yield batch, images


def clip_of(batch: list[Item], images: np.ndarray, wants: str, intrinsics: np.ndarray | None) -> Clip:
  view = batch[0].work.view
  entries = [i.work.view.entries[i.row] for i in batch]
  if wants == "rgb":
    images = images.transpose(0, 3, 1, 2)
  picture = batch[0].work.picture
  return Clip(
    images,
    intrinsics if picture is None else picture.intrinsics,
    view.rpy,
    [e.frame_id for e in entries],
    [e.timestamp_eof for e in entries],
    view.segment.log_path,
  )


def label_batch(
  teacher: Teacher,
  batch: list[Item],
  images: np.ndarray,
  wants: str,
  intrinsics: np.ndarray | None,
  state: State | None = None,
) -> tuple[list[tuple[Labels, int]], State | None]:
  """-> labels, and of how many frames: of all at once, or of halves where the GPU's memory is too small; and the state
  behind them."""

  def run(part: range) -> list[tuple[Labels, int]]:
    nonlocal state
    a, b = part.start, part.stop
    clip = clip_of(batch[a:b], images[a:b], wants, intrinsics)
    with failure_is_said(teacher.name):
      labels, state = teacher.label(clip, state)
    return [(labels, b - a)]

  parts = halve_on_oom(run, range(len(batch)))
  return parts, state

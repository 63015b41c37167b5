"""Logs: a plain concatenation of Cap'n Proto messages, each an Event, compressed with zstd or bz2 or not at all.

The framing, the time and the union's tag are at fixed places, so that a skipped message costs a few bytes read and no
object."""

import contextlib
import ctypes
import itertools
from array import array
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import capnp
import numpy as np

from openpilot.cereal import log
from openpilot.cereal.services import service_name
from openpilot.tools.lib import fair_slots
from openpilot.tools.lib.errors import UserError, warn
from openpilot.tools.lib.guard import DAMAGE, Guard, open_event, read_all, reading_limit
from openpilot.tools.lib.native import compile_library
from openpilot.tools.lib.route import Route
from openpilot.tools.lib.unpack import decompress, head

MAX_SEGMENTS = 512  # of one Cap'n Proto message; more means that the file is not a log
BATCH = 256  # events opened at once
FAR = 0xFFFF  # tag of messages whose root lies behind a far pointer: pycapnp must find it
DAMAGED = 0xFFFD  # tag of messages that have no root, or none that lies inside them
EVENT_SIZES = (0x10002, 0x10003)  # words of data, and above it pointers: Event's root in every version
MAX_GAPS = 100  # how often a log's chain of lengths may break and be found again
LATEST = 2**62  # ns
ODD_TIME = 600_000_000_000  # ns from its neighbors' times, farther than any message of a log
NOT_OURS = 0xFFFE  # tag of messages of another program in a slot of ours

TAGS: dict[str, int] = {
  f.name: f.discriminantValue for f in log.Event.schema.node.struct.fields if f.discriminantValue != 0xFFFF
}
TAG_NAMES = {tag: name for name, tag in TAGS.items()}
INIT_DATA = TAGS["initData"]


@cache
def library() -> Any:
  """scan.c, which walks the chain of lengths; None without a C compiler: then Python walks it, five times slower."""
  try:
    lib = compile_library(Path(__file__).with_name("scan.c"))
  except UserError:
    return None
  lib.scan.argtypes = [
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
  ]
  lib.scan.restype = ctypes.c_int64
  lib.headers.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, *[ctypes.c_void_p] * 4]
  lib.headers.restype = None
  return lib


def chain_native(lib: Any, words: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
  start, root = np.empty((2, len(words) // 2 + 1), np.int64)  # untouched pages cost nothing
  end = ctypes.c_int64()
  n = lib.scan(words.ctypes.data, len(words), MAX_SEGMENTS, start.ctypes.data, root.ctypes.data, ctypes.byref(end))
  return start[:n], root[:n], end.value


def chain_python(words: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
  """As scan.c: see the comments there."""
  count = len(words)
  q = array("Q", words.tobytes())  # indexing an array is twice as fast as a memoryview
  starts: list[int] = []
  bodies: dict[int, int] = {}  # of messages of several memory segments, by number
  pos = 0
  append, low = starts.append, 0xFFFFFFFF
  while pos < count:
    header = q[pos]
    if header & low:
      more = header & low
      body = pos + (more + 3) // 2
      if more >= MAX_SEGMENTS or body > count:
        break
      bodies[len(starts)] = body
      length = sum(words[pos:body].view("<u4")[1 : more + 2].tolist())
      if not length:
        bodies.pop(len(starts))
        break
      append(pos)
      pos = body + length
    elif header:
      append(pos)
      pos += (header >> 32) + 1
    else:
      break
  if pos > count:
    pos = starts.pop()
    bodies.pop(len(starts), None)
  start = np.array(starts, np.int64)
  root = start + 1
  for n, body in bodies.items():
    root[n] = body
  return start, root, pos


def chain(words: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
  """-> beginnings, root pointers and ends of the messages in `words`, in words, and the end of the last whole one.
  Where a length is damaged, the chain goes on at the next place that looks like an event."""
  lib = library()

  def walk(at: int) -> tuple[np.ndarray, np.ndarray, int]:
    return chain_native(lib, words[at:]) if lib is not None else chain_python(words[at:])

  start, root, pos = walk(0)
  end = np.append(start[1:], pos) if len(start) else start
  if pos == len(words) or not len(start):
    return start, root, end, pos
  size, pointer = words[:-1] >> np.uint64(32), words[1:]
  # one memory segment; its root begins right behind the pointer: the time, then the tag
  event = (words[:-1] & np.uint64(0xFFFFFFFF) == 0) & (pointer & np.uint64(0xFFFFFFFF) == 0) & (size >= 4)
  event &= (np.arange(len(size), dtype=np.uint64) + size < len(words)) & np.isin(pointer >> np.uint64(32), EVENT_SIZES)
  likely = np.flatnonzero(event)
  parts = [(start, root, end)]
  for _ in range(MAX_GAPS):
    k = np.searchsorted(likely, pos)
    if k == len(likely):
      break
    at = int(likely[k])
    start, root, length = walk(at)
    pos = at + length
    parts.append((start + at, root + at, np.append(start[1:], length) + at))
    if pos == len(words):
      break
  start, root, end = (np.concatenate(x) for x in zip(*parts, strict=True))
  return start, root, end, pos


def headers_native(lib: Any, q: np.ndarray, root: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  times, tags = np.empty(len(root), np.uint64), np.empty(len(root), np.uint16)
  root, end = (np.ascontiguousarray(x) for x in (root, end))
  lib.headers(q.ctypes.data, len(q), len(root), *(x.ctypes.data for x in (root, end, times, tags)))
  return times, tags


def headers_numpy(q: np.ndarray, root: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """As scan.c."""
  pointer = q[root]
  data = root + 1 + ((pointer >> np.uint64(2)) & np.uint64(0x3FFFFFFF)).astype(np.int64)
  # a struct pointer: two low bits 0, 30 bits offset in words, then 16 bits of data words
  plain = ((pointer & np.uint64(3)) == 0) & (((pointer >> np.uint64(32)) & np.uint64(0xFFFF)) >= 2) & (data + 2 <= end)
  far = (pointer & np.uint64(3)) == 2
  data = np.where(plain, data, 0)
  times = np.where(plain, q[data] if len(q) else 0, np.uint64(0))
  tags = np.where(
    plain, q[np.minimum(data + 1, len(q) - 1)] & np.uint64(0xFFFF), np.where(far, np.uint64(FAR), np.uint64(DAMAGED))
  ).astype(np.uint16)
  return times, tags


def scan(dat: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """-> beginnings and ends in bytes, times in ns (uint64) and union tags (uint16) of the messages in `dat`."""
  q = np.frombuffer(dat, "<u8", len(dat) // 8)
  start, root, end, _ = chain(q)
  lib = library()
  times, tags = headers_numpy(q, root, end) if lib is None else headers_native(lib, q, root, end)
  return start * 8, end * 8, times, tags


class LogFile:
  """One log in memory: offsets, times and tags of its messages, no objects."""

  def __init__(self, path: str | Path):
    self.path = Path(path)
    self.dat, problem = decompress(self.path)
    self.start, self.end, self.time, self.tag = scan(self.dat)
    for i in np.flatnonzero(self.tag == FAR):
      self.tag[i] = DAMAGED
      with contextlib.suppress(*DAMAGE):  # an unknown union too: which() raises
        event = self.event(int(i))
        self.time[i] = event.logMonoTime
        self.tag[i] = TAGS[event.which()]
    self.tag[self.time > LATEST] = DAMAGED
    if not len(self.start) or (self.tag == DAMAGED).all():
      raise UserError(
        f"{self.path} is not a log: it does not begin with a Cap'n Proto event; expected an rlog or qlog, raw, .zst "
        "or .bz2"
      )
    lost = len(self.dat) - int((self.end - self.start).sum())
    if lost and not problem:
      tail = len(self.dat) - int(self.end[-1])
      problem = f"{lost} bytes {'at its end ' if tail == lost else ''}are no whole message"
    self.problem = problem
    self.notes = self._sort_out_slots()

  def _sort_out_slots(self) -> list[str]:
    """Gives our messages from before the move today's tags, and removes other programs' messages at our slots. Returns
    what was done, in words."""
    slots = np.flatnonzero(np.isin(self.tag, [*fair_slots.OLD_TAGS, *fair_slots.NEW_TAGS]))
    old, other = fair_slots.sort_out((int(i), int(self.tag[i]), self.raw(int(i))) for i in slots)
    notes = []
    if old:
      dat = bytearray(self.dat)
      for i, at in old.items():
        self.tag[i] += fair_slots.MOVED
        dat[self.start[i] + at : self.start[i] + at + 2] = int(self.tag[i]).to_bytes(2, "little")
      self.dat = bytes(dat)
      notes.append(
        f"{len(old)} fair messages were recorded at Event @136..@141, before they moved to @140..@145; they are read "
        "as if of today"
      )
    if other:
      self.tag[other] = NOT_OURS
      notes.append(f"{len(other)} messages at Event @140..@145 are another program's and were left out")
    return notes

  def event(self, i: int) -> Any:
    return open_event(self.raw(i))

  def raw(self, i: int) -> bytes:
    return self.dat[self.start[i] : self.end[i]]


def odd_times(time: np.ndarray, tag: np.ndarray) -> np.ndarray:
  """Numbers of messages whose times are ODD_TIME or more away from those around them. initData is exempt: it has the
  time of the route's beginning."""
  known = np.flatnonzero((tag != DAMAGED) & (tag != INIT_DATA))
  t = time[known].astype(np.int64)
  if not len(t) or int(t.max()) - int(t.min()) < ODD_TIME:
    return known[:0]
  around = np.lib.stride_tricks.sliding_window_view(np.pad(t, 4, mode="reflect" if len(t) > 4 else "edge"), 9)
  with np.errstate(over="ignore"):
    off = np.abs(t.astype(np.float64) - np.median(around, axis=1))
  return known[off >= ODD_TIME]


def is_log(path: Path) -> str:
  """ "" where a log's beginning can be read, else what is wrong with the file. Looks at its first bytes only."""
  try:
    if (scan(head(path))[3] != DAMAGED).any():
      return ""
    LogFile(path)  # the first message may be longer than that
    return ""
  except UserError as e:
    return str(e)


def log_paths(source: Route | str | Path | Sequence[str | Path]) -> list[Path]:
  """A route, a route's name or folder, log files -> log files in order. Raises UserError where a segment has no log."""
  if isinstance(source, (str, Path)):
    if Path(source).is_file():
      return [Path(source)]
    source = Route(source)
  if isinstance(source, Route):
    paths = [s.log_path for s in source.segments]
    lacking = [s.name for s, p in zip(source.segments, paths, strict=True) if p is None]
    if lacking:
      raise UserError(f"no rlog or qlog in segment {', '.join(lacking)}; copy it there, or choose other segments")
    return [p for p in paths if p is not None]
  return [Path(p) for p in source]


Place = tuple[int, int, bytes, int, int]  # a message's time in ns, its union tag, and where it lies in a log's bytes


class LogReader:
  """Iterates log.Event readers of one or more logs as one stream in time order, one log in memory at a time (two around
  a boundary).

  services: names in either spelling; None: all. Put `with reader.guard(event):` around what reads an event's fields: a
  damaged one ends the block and is counted. After an iteration: `unknown`, a Counter of union tags that the schema does
  not have, skipped; `damaged`, messages that have no root, skipped; `truncated`, a line per file of which a part cannot
  be read. Each is reported in a line on stderr."""

  def __init__(
    self,
    source: Route | str | Path | Sequence[str | Path],
    services: Iterable[str] | None = None,
    sort_by_time: bool = True,
  ):
    self.paths, self.sort_by_time = log_paths(source), sort_by_time
    self.tags: set[int] | None = None
    if services is not None:
      names = [service_name(s) for s in services]
      unknown = [s for s in names if s not in TAGS]
      if unknown:
        raise UserError(f"no service {', '.join(unknown)}; names are those of openpilot's log.capnp")
      self.tags = {TAGS[s] for s in names}
    self.unknown: Counter[int] = Counter()
    self.damaged = 0
    self.truncated: list[str] = []
    self.guard = Guard(
      str(self.paths[0]) + (f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else "") if self.paths else ""
    )

  def __iter__(self) -> Generator[Any, None, None]:
    # in batches: pycapnp needs a fifth of the time that opening messages one by one takes
    order = self._order()
    try:
      while batch := list(itertools.islice(order, BATCH)):
        parts = [dat[start:end] for _, _, dat, start, end in batch]
        events = log.Event.read_multiple_bytes(
          b"".join(parts), traversal_limit_in_words=reading_limit(max(map(len, parts)))
        )
        while True:
          try:
            yield from events
            break
          except capnp.KjException:  # a root outside of the message; go on with the next one
            self.guard.damaged["?"] += 1
    finally:
      self.guard.say()

  def whole(self) -> Iterator[Any]:
    """Only events of which all fields can be read, for code that stores messages or passes them on. Slower: every field
    is read."""
    events = iter(self)
    with contextlib.closing(events):
      for event in events:
        good = False
        with self.guard(event):
          read_all(event)
          good = True
        if good:
          yield event

  def raw(self) -> Iterator[tuple[int, int, bytes]]:
    """(logMonoTime, union tag, bytes) without building objects. A log's initData comes first, with the time of the
    message that follows it."""
    for time, tag, dat, start, end in self._order():
      yield time, tag, dat[start:end]

  def _load(self, path: Path) -> tuple[LogFile, np.ndarray]:
    f = LogFile(path)
    bad = int((f.tag == DAMAGED).sum())
    if f.problem:
      self.truncated.append(f"{path}: {f.problem}; {len(f.start) - bad} messages were read")
      warn(self.truncated[-1])
    if bad:
      self.damaged += bad
      warn(f"{path}: {bad} of {len(f.start)} messages are damaged and were left out")
    if self.sort_by_time and len(odd := odd_times(f.time, f.tag)):
      f.tag[odd] = DAMAGED
      warn(
        f"{path}: {len(odd)} messages are {ODD_TIME // 60_000_000_000} minutes and more out of time and were left out"
      )
    for note in f.notes:
      warn(f"{path}: {note}")
    counts = np.bincount(f.tag)
    tags = np.flatnonzero(counts).tolist()
    self.unknown.update({t: int(counts[t]) for t in tags if t not in TAG_NAMES and t not in (DAMAGED, NOT_OURS)})
    wanted = np.zeros(len(counts), dtype=bool)
    wanted[[t for t in tags if t in TAG_NAMES and (self.tags is None or t in self.tags)]] = True
    index = np.flatnonzero(wanted[f.tag])
    if self.sort_by_time:
      if (
        len(index) > 1 and f.tag[index[0]] == INIT_DATA
      ):  # loggerd writes it first in every segment, with the time at which the route began
        f.time[index[0]] = f.time[index[1:]].min()
      index = index[np.argsort(f.time[index], kind="stable")]
    return f, index

  def _order(self) -> Iterator[Place]:
    self.unknown, self.truncated, self.damaged = Counter(), [], 0
    held: list[Place] = []  # messages at the end of the last log that may belong after the next one's first
    for k, path in enumerate(self.paths):
      f, index = self._load(path)
      time, tag, start, end = (x[index].tolist() for x in (f.time, f.tag, f.start, f.end))
      items: Iterable[Place] = zip(time, tag, itertools.repeat(f.dat), start, end)
      if not self.sort_by_time:
        yield from items
        continue
      items = sorted(itertools.chain(held, items), key=lambda x: x[0]) if held else list(items)
      # messages of the last second of a log may overlap with the next log: they wait for it
      limit = items[-1][0] - 1_000_000_000 if items and k + 1 < len(self.paths) else None
      cut = len(items) if limit is None else next((j for j, x in enumerate(items) if x[0] > limit), len(items))
      yield from items[:cut]
      held = items[cut:]


def raw_events(source: Route | str | Path | Sequence[str | Path]) -> Iterator[tuple[int, int, bytes]]:
  """(logMonoTime, union tag, bytes) of every known message, in time order."""
  return LogReader(source).raw()

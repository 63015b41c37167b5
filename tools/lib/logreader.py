"""Logs: a plain concatenation of Cap'n Proto messages, each an Event, compressed with zstd or bz2 or not at all.

The framing, the time and the union's tag stand at fixed places, so that messages nobody asked for cost a few bytes read and no object.
"""
import bz2
import ctypes
import itertools
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import capnp
import numpy as np
import zstandard

from openpilot.cereal import log
from openpilot.cereal.messaging import NO_TRAVERSAL_LIMIT
from openpilot.cereal.services import service_name
from openpilot.tools.lib import fair_slots
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.native import compile_library
from openpilot.tools.lib.route import Route

ZSTD_MAGIC, BZ2_MAGIC = b"\x28\xb5\x2f\xfd", b"BZh"
MAX_SEGMENTS = 512      # of one Cap'n Proto message; more means that this is not a log
BATCH = 256             # events opened at once
FAR = 0xFFFF            # tag of messages whose root lies behind a far pointer: pycapnp must look
NOT_OURS = 0xFFFE       # tag of messages of another program in a slot of ours

TAGS: dict[str, int] = {f.name: f.discriminantValue for f in log.Event.schema.node.struct.fields if f.discriminantValue != 0xFFFF}
TAG_NAMES = {tag: name for name, tag in TAGS.items()}


def decompress(path: Path) -> tuple[bytes, str]:
  """-> the log's bytes, and what was wrong with the file's end ("" if nothing). Raises UserError where nothing can be read."""
  try:
    dat = path.read_bytes()
  except OSError as e:
    raise UserError(f"cannot read {path}: {e.strerror}") from None
  if not dat:
    raise UserError(f"{path} is empty: the recording stopped before anything was written; leave this segment out")
  problem = ""
  out: list[bytes] = []
  try:
    if dat.startswith(ZSTD_MAGIC):
      while dat:   # several frames may follow each other
        z = zstandard.ZstdDecompressor().decompressobj()
        for i in range(0, len(dat), 1 << 20):
          out.append(z.decompress(dat[i:i + (1 << 20)]))
          if z.eof:
            dat = z.unused_data + dat[i + (1 << 20):]
            break
        else:
          problem, dat = "the zstd stream is cut short", b""
    elif dat.startswith(BZ2_MAGIC):
      while dat:
        b = bz2.BZ2Decompressor()
        out.append(b.decompress(dat))
        problem = "" if b.eof else "the bz2 stream is cut short"
        dat = b.unused_data
    else:
      return dat, ""
  except (zstandard.ZstdError, OSError, EOFError) as e:
    problem = f"the compressed stream is damaged ({e})"
  if not any(out):
    raise UserError(f"{path} holds no readable data: {problem}; copy it again, or leave this segment out")
  return b"".join(out), problem


@cache
def library() -> Any:
  """The chain of lengths in C, or None where there is no C compiler: then Python walks it, five times slower."""
  try:
    lib = compile_library(Path(__file__).with_name("scan.c"))
  except UserError:
    return None
  lib.scan.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
  lib.scan.restype = ctypes.c_int64
  return lib


def chain_native(lib: Any, words: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
  start, root = np.empty((2, len(words) // 2 + 1), np.int64)  # untouched pages cost nothing
  end = ctypes.c_int64()
  n = lib.scan(words.ctypes.data, len(words), MAX_SEGMENTS, start.ctypes.data, root.ctypes.data, ctypes.byref(end))
  return start[:n], root[:n], end.value


def chain_python(words: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
  """As scan.c, whose comments hold here."""
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


def scan(dat: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
  """-> start and end offsets, times in ns (uint64) and union tags (uint16) of the messages in `dat`, and the offset behind the last whole one."""
  q = np.frombuffer(dat, "<u8", len(dat) // 8)
  lib = library()
  start, root, pos = chain_native(lib, q) if lib is not None else chain_python(q)  # in words, as all here
  pointer = q[root] if len(root) else np.zeros(0, np.uint64)
  data = root + 1 + ((pointer >> np.uint64(2)) & np.uint64(0x3FFFFFFF)).astype(np.int64)
  end_words = np.append(start[1:], pos)
  # a struct pointer: two low bits 0, 30 bits offset in words, then 16 bits of data words
  plain = ((pointer & np.uint64(3)) == 0) & (((pointer >> np.uint64(32)) & np.uint64(0xFFFF)) >= 2) & (data + 2 <= end_words)
  far = (pointer & np.uint64(3)) == 2
  bad = np.flatnonzero(~(plain | far))
  n = int(bad[0]) if len(bad) else len(start)
  start, data, plain, end_words = start[:n], np.where(plain, data, 0)[:n], plain[:n], end_words[:n]
  if n == 0:
    return start, start, np.zeros(0, np.uint64), np.zeros(0, np.uint16), 0
  times = np.where(plain, q[data], np.uint64(0))
  tags = np.where(plain, q[data + 1] & np.uint64(0xFFFF), np.uint64(FAR)).astype(np.uint16)
  return start * 8, end_words * 8, times, tags, int(end_words[-1]) * 8


class LogFile:
  """One log in memory: offsets, times and tags of its messages, no objects."""

  def __init__(self, path: str | Path):
    self.path = Path(path)
    self.dat, problem = decompress(self.path)
    self.start, self.end, self.time, self.tag, whole = scan(self.dat)
    if not len(self.start):
      raise UserError(f"{self.path} is not a log: it does not begin with a Cap'n Proto event; expected an rlog or qlog, raw, .zst or .bz2")
    if whole < len(self.dat) and not problem:
      problem = f"{len(self.dat) - whole} bytes at its end are no whole message"
    self.problem = problem
    for i in np.flatnonzero(self.tag == FAR):
      event = self.event(int(i))
      self.time[i] = event.logMonoTime
      try:
        self.tag[i] = TAGS[event.which()]
      except capnp.KjException:
        pass
    self.notes = self._sort_out_slots()

  def _sort_out_slots(self) -> list[str]:
    """Gives our messages of before the move their tags of today, and takes other programs' at our slots out. Returns what was done, in words."""
    slots = np.flatnonzero(np.isin(self.tag, [*fair_slots.OLD_TAGS, *fair_slots.NEW_TAGS]))
    old, other = fair_slots.sort_out((int(i), int(self.tag[i]), self.raw(int(i))) for i in slots)
    notes = []
    if old:
      dat = bytearray(self.dat)
      for i, at in old.items():
        self.tag[i] += fair_slots.MOVED
        dat[self.start[i] + at:self.start[i] + at + 2] = int(self.tag[i]).to_bytes(2, "little")
      self.dat = bytes(dat)
      notes.append(f"{len(old)} fair messages were recorded at Event @136..@141, before they moved to @140..@145; they are read as if of today")
    if other:
      self.tag[other] = NOT_OURS
      notes.append(f"{len(other)} messages at Event @140..@145 are another program's and were left out")
    return notes

  def event(self, i: int) -> Any:
    with log.Event.from_bytes(self.dat[self.start[i]:self.end[i]], traversal_limit_in_words=NO_TRAVERSAL_LIMIT) as event:
      return event

  def raw(self, i: int) -> bytes:
    return self.dat[self.start[i]:self.end[i]]


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


class LogReader:
  """Iterates log.Event readers of one or more logs as one stream in time order, one log in memory at a time (two around a boundary).

  services: names in either spelling; None: all. After an iteration: `unknown`, a Counter of union tags that the schema does not have, skipped;
  `truncated`, a line per file with a damaged end, also printed once to stderr.
  """

  def __init__(self, source: Route | str | Path | Sequence[str | Path], services: Iterable[str] | None = None, sort_by_time: bool = True):
    self.paths, self.sort_by_time = log_paths(source), sort_by_time
    self.tags: set[int] | None = None
    if services is not None:
      names = [service_name(s) for s in services]
      unknown = [s for s in names if s not in TAGS]
      if unknown:
        raise UserError(f"no service {', '.join(unknown)}; names are those of openpilot's log.capnp")
      self.tags = {TAGS[s] for s in names}
    self.unknown: Counter[int] = Counter()
    self.truncated: list[str] = []

  def __iter__(self) -> Iterator[Any]:
    # in batches: reading many messages behind each other costs pycapnp a fifth of opening them one by one
    order = self._order()
    while batch := list(itertools.islice(order, BATCH)):
      yield from log.Event.read_multiple_bytes(b"".join([f.dat[f.start[i] : f.end[i]] for f, i in batch]), traversal_limit_in_words=NO_TRAVERSAL_LIMIT)

  def raw(self) -> Iterator[tuple[int, int, bytes]]:
    """(logMonoTime, union tag, bytes) without building objects."""
    for f, i in self._order():
      yield int(f.time[i]), int(f.tag[i]), f.raw(i)

  def _load(self, path: Path) -> tuple[LogFile, np.ndarray]:
    f = LogFile(path)
    if f.problem:
      line = f"{path}: {f.problem}; {len(f.start)} messages before that were read"
      self.truncated.append(line)
      print(f"warning: {line}", file=sys.stderr)
    for note in f.notes:
      print(f"warning: {path}: {note}", file=sys.stderr)
    counts = np.bincount(f.tag)
    tags = np.flatnonzero(counts).tolist()
    self.unknown.update({t: int(counts[t]) for t in tags if t not in TAG_NAMES})
    wanted = np.zeros(len(counts), dtype=bool)
    wanted[[t for t in tags if t in TAG_NAMES and (self.tags is None or t in self.tags)]] = True
    index = np.flatnonzero(wanted[f.tag])
    if self.sort_by_time:
      index = index[np.argsort(f.time[index], kind="stable")]
    return f, index

  def _order(self) -> Iterator[tuple[LogFile, int]]:
    self.unknown, self.truncated = Counter(), []
    held: list[tuple[int, LogFile, int]] = []   # the tail of the last log that may come after the next one's first messages
    for k, path in enumerate(self.paths):
      f, index = self._load(path)
      if not self.sort_by_time:
        yield from ((f, int(i)) for i in index)
        continue
      items = [(int(t), f, int(i)) for t, i in zip(f.time[index], index, strict=True)]
      if held:
        items = sorted(held + items, key=lambda x: x[0])
      # what lies within the last second of a log may be out of turn with the next one: it waits for that
      limit = items[-1][0] - 1_000_000_000 if items and k + 1 < len(self.paths) else None
      cut = len(items) if limit is None else next((j for j, x in enumerate(items) if x[0] > limit), len(items))
      for _, g, i in items[:cut]:
        yield g, i
      held = items[cut:]


def raw_events(source: Route | str | Path | Sequence[str | Path]) -> Iterator[tuple[int, int, bytes]]:
  """(logMonoTime, union tag, bytes) of every known message, in time order."""
  return LogReader(source).raw()

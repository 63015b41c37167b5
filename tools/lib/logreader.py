"""Logs: a plain concatenation of Cap'n Proto messages, each an Event, compressed with zstd or bz2 or not at all.

The framing, the time and the union's tag stand at fixed places, so that messages nobody asked for cost a few bytes read and no object.
"""
import bz2
import struct
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import capnp
import numpy as np
import zstandard

from openpilot.cereal import log
from openpilot.cereal.messaging import NO_TRAVERSAL_LIMIT
from openpilot.cereal.services import service_name
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.route import Route

ZSTD_MAGIC, BZ2_MAGIC = b"\x28\xb5\x2f\xfd", b"BZh"
MAX_SEGMENTS = 512      # of one Cap'n Proto message; more means that this is not a log
HEADER = struct.Struct("<II")
ROOT = struct.Struct("<Q")
TIME_TAG = struct.Struct("<QH")
FAR = 0xFFFF            # tag of messages whose root lies behind a far pointer: pycapnp must look

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


def scan(dat: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
  """-> start and end offsets, times in ns (uint64) and union tags (uint16) of the messages in `dat`, and the offset behind the last whole one."""
  starts: list[int] = []
  ends: list[int] = []
  times: list[int] = []
  tags: list[int] = []
  pos, n = 0, len(dat)
  header, root, time_tag = HEADER.unpack_from, ROOT.unpack_from, TIME_TAG.unpack_from
  while pos + 8 <= n:
    more, words = header(dat, pos)
    body = pos + 8
    if more == 0:
      end = body + 8 * words
    else:
      if more >= MAX_SEGMENTS:
        break
      body = pos + (4 * (more + 2) + 7) // 8 * 8
      if body > n:
        break
      end = body + 8 * (words + sum(struct.unpack_from(f"<{more}I", dat, pos + 8)))
    if end > n or words == 0:
      break
    pointer = root(dat, body)[0]
    # a struct pointer: two low bits 0, 30 bits offset in words, then 16 bits of data words
    data = body + 8 + 8 * ((pointer >> 2) & 0x3FFFFFFF)
    if pointer & 3 == 0 and (pointer >> 32) & 0xFFFF >= 2 and data + 16 <= end:
      t, tag = time_tag(dat, data)
    elif pointer & 3 == 2:
      t, tag = 0, FAR
    else:
      break
    starts.append(pos)
    ends.append(end)
    times.append(t)
    tags.append(tag)
    pos = end
  return np.array(starts, np.int64), np.array(ends, np.int64), np.array(times, np.uint64), np.array(tags, np.uint16), pos


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
    for f, i in self._order():
      yield f.event(i)

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
    tags, counts = np.unique(f.tag, return_counts=True)
    known = [t for t in tags if int(t) in TAG_NAMES]
    self.unknown.update({int(t): int(c) for t, c in zip(tags, counts, strict=True) if int(t) not in TAG_NAMES})
    wanted = [t for t in known if self.tags is None or int(t) in self.tags]
    index = np.flatnonzero(np.isin(f.tag, np.array(wanted, dtype=np.uint16)))
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

"""What is to be labeled, as jobs that workers share: made from what is there, without opening it.

A job is one teacher over one segment; over a whole route where the teacher follows things from frame to frame; over
CHUNK pictures where each is a segment of its own. The longest come first. Labels do not depend on who does what."""

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa

from openpilot.tools.fair.labels.meta import CHUNK
from openpilot.tools.fair.labels.sources import Piece
from openpilot.tools.fair.labels.stored import read_table, write_table
from openpilot.tools.fair.labels.views import is_still
from openpilot.tools.lib.errors import UserError, printable

MOST_SHARDS = 100_000


@dataclass(frozen=True)
class Job:
  teacher: str
  pieces: tuple[Piece, ...]

  @property
  def name(self) -> str:
    first = self.pieces[0]
    return first.name if len(self.pieces) == 1 else f"{first.route}, {len(self.pieces)} segments"

  @property
  def size(self) -> int:
    return sum(p.size for p in self.pieces)


def _alone(pieces: Sequence[Piece]) -> list[tuple[Piece, ...]]:
  """For teachers without state."""
  out: list[tuple[Piece, ...]] = []
  for still, run in groupby(pieces, lambda p: is_still(p.part)):
    own = list(run)
    step = CHUNK if still else 1  # stills share batches: labeling.job_numbers()
    out += [tuple(own[i : i + step]) for i in range(0, len(own), step)]
  return out


def make_jobs(pieces: Sequence[Piece], teachers: Mapping[str, bool]) -> list[Job]:
  """teachers: name -> whether it follows things from frame to frame."""
  routes: dict[str, list[Piece]] = {}
  for p in pieces:
    routes.setdefault(p.route, []).append(p)
  jobs = []
  for name, in_order in teachers.items():
    own = [Job(name, x) for x in ([tuple(r) for r in routes.values()] if in_order else _alone(pieces))]
    jobs += sorted(own, key=lambda j: (-j.size, j.pieces[0].name))
  return jobs


def parse_shard(text: str) -> tuple[int, int]:
  """'3/64' -> (3, 64), the first is 0. Raises UserError."""
  found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
  k, n = (int(found[1]), int(found[2])) if found else (0, 0)
  if not found or not k < n <= MOST_SHARDS:
    raise UserError(f"--shard {printable(text, 40)}: write PART/PARTS, of 64 parts 0/64 to 63/64")
  return k, n


def shards_of(jobs: Sequence[Job], n: int) -> list[int]:
  """Of each job the part that does it. Of each teacher, longest first, to the part that has least of that teacher; so
  all parts have like much, and one segment goes to one part for all teachers that take segments."""
  out = []
  loads: dict[str, list[tuple[int, int, int]]] = {}
  for job in jobs:
    heap = loads.setdefault(job.teacher, [(0, 0, k) for k in range(n)])
    size, count, k = heap[0]
    heapq.heapreplace(heap, (size + job.size, count + 1, k))
    out.append(k)
  return out


COLUMNS = {
  "job": pa.int32(),
  "shard": pa.int32(),
  "teacher": pa.string(),
  "segment": pa.string(),
  "route": pa.string(),
  "size": pa.int64(),
}


def write_plan(path: Path, jobs: Sequence[Job], n: int) -> pa.Table:
  """A row for each segment and teacher, in the order in which they are begun."""
  rows: dict[str, list[Any]] = {c: [] for c in COLUMNS}
  for k, (job, shard) in enumerate(zip(jobs, shards_of(jobs, n), strict=True)):
    for p in job.pieces:
      for c, v in zip(COLUMNS, (k, shard, job.teacher, p.name, p.route, p.size), strict=True):
        rows[c].append(v)
  table = pa.table({c: pa.array(rows[c], t) for c, t in COLUMNS.items()})
  write_table(path, table, compression="zstd")
  return table


def read_plan(path: Path) -> set[tuple[str, str]]:
  """(teacher, segment) of a plan's rows, or of what was taken from one. Raises UserError."""
  try:
    table = read_table(path)
    return set(zip(table["teacher"].to_pylist(), table["segment"].to_pylist(), strict=True))
  except (OSError, ValueError, KeyError) as e:
    raise UserError(f"--only {path} is no plan of work: {printable(e, 120)}; write one with --plan") from None


def only(jobs: Sequence[Job], wanted: set[tuple[str, str]]) -> list[Job]:
  """The jobs of which a piece is wanted, with those alone. Raises UserError where something wanted is not there."""
  there = {(j.teacher, p.name) for j in jobs for p in j.pieces}
  if lacking := sorted(wanted - there):
    raise UserError(
      f"--only names {lacking[0][1]} by {lacking[0][0]}, which is not among these routes and teachers ({len(lacking)} "
      "such)"
    )
  own = [(j, tuple(p for p in j.pieces if (j.teacher, p.name) in wanted)) for j in jobs]
  # stills stay together: their batches are of all of them
  return [j if is_still(some[0].part) else Job(j.teacher, some) for j, some in own if some]

"""Which frames of a label store ranges are taken from and layers chosen by, and which ones judge the result: never the
same route. And what goes into a graph at these frames, its state included."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.bundle import Bundle
from openpilot.tools.fair.distillation.data import camera_height
from openpilot.tools.fair.evaluation.compared import Compared
from openpilot.tools.fair.evaluation.scenes import Queries, Segment
from openpilot.tools.fair.evaluation.student import Student
from openpilot.tools.fair.labels.dataset import Reader
from openpilot.tools.lib.errors import UserError

LEAST = 8  # frames that ranges can be taken from
EVERY = 3  # each so many-th route calibrates
RUN_UP = 2  # frames that the graph has seen before one that is taken, so that its state is as on the road
BLOCKS = 30  # into which single pictures are put: what stands for a route of theirs
AT_ONCE = 64  # pictures that are read


@dataclass
class Parts:
  """calibration: ranges, the search. judged: what the report is of."""

  calibration: list[Segment]
  judged: list[Segment]


def blocks(segments: list[Segment]) -> list[Segment]:
  """Pictures that each stand alone, in at most BLOCKS segments of routes of their own, each with some of the whole."""
  pictures = [(s, i) for s in segments for i in range(len(s.ids))]
  order = np.random.default_rng(0).permutation(len(pictures)).tolist()
  count = min(BLOCKS, len(pictures))
  taken: dict[tuple[int, str], list[int]] = {}
  for n, k in enumerate(order):
    s, i = pictures[k]
    taken.setdefault((n % count, s.name), []).append(i)
  names, out = [s.name for s in segments], []
  for (n, name), rows in sorted(taken.items()):
    k, rows = names.index(name), sorted(rows)
    s = segments[k]
    out.append(replace(s, name=f"block{n:02}--{k}", ids=[s.ids[i] for i in rows], rows=[s.rows[i] for i in rows]))
  return out


def split(segments: list[Segment]) -> Parts:
  """By route; each so many-th of those of one kind calibrates, so that all conditions are among both. Raises UserError
  where there are fewer than two routes."""
  routes: dict[str, list[Segment]] = {}
  for s in segments:
    routes.setdefault(s.route, []).append(s)
  if len(routes) < 2:
    raise UserError(
      f"the data is of one route, {next(iter(routes))}, which cannot both calibrate and judge; give another store with "
      "--calibration"
    )
  order = sorted(routes, key=lambda r: (sorted({c for s in routes[r] for c in s.conditions}), r))
  chosen = set(order[min(1, len(order) - 2) :: EVERY])
  return Parts([s for s in segments if s.route in chosen], [s for s in segments if s.route not in chosen])


def check_apart(parts: Parts, where: str) -> None:
  """Raises UserError where a route, or a single picture, is to calibrate and to be judged."""
  one, other = (
    {s.route: s.route for s in part if s.sizes is None} | pictures_of([s for s in part if s.sizes is not None])
    for part in (parts.calibration, parts.judged)
  )
  if both := sorted(one[k] for k in one.keys() & other.keys()):
    raise UserError(f"{where} has {len(both)} routes or pictures that are judged too, as {both[0]}; give another store")


def pictures_of(segments: Iterable[Segment]) -> dict[str, str]:
  """{sha256: name} of single pictures as they are stored: blocks of two stores are called alike."""
  reader = Reader(window=0)
  return {
    hashlib.sha256(frame.tobytes()).hexdigest(): f"picture {s.ids[k]} of {s.frames.path.parent.name}"
    for s in segments
    for first in range(0, len(s.rows), AT_ONCE)
    for k, frame in enumerate(reader.dense(s.frames, "frame", s.rows[first : first + AT_ONCE]), first)
  }


class Heard:
  """A runner that keeps what is put into it while `on`."""

  def __init__(self, runner: Any):
    self.runner, self.on, self.inputs = runner, False, list[dict[str, np.ndarray]]()

  def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if self.on:
      self.inputs.append({k: np.array(v) for k, v in inputs.items()})
    return self.runner.run(inputs)


def grid(slots: int, height: int, width: int, fresh: bool, seed: int) -> Queries:
  """Points all over the picture, in all slots."""
  xy = np.random.default_rng(seed).uniform([0, 0], [width - 1, height - 1], (slots, 2))
  no, yes = np.zeros(slots, bool), np.ones(slots, bool)
  return Queries(xy, yes, yes if fresh else no, no, xy, yes, no)


def spread(segments: Iterable[Segment], count: int) -> list[tuple[Segment, int]]:
  """`count` frames at even distances over all segments, shared out as evenly as their lengths allow: (segment,
  index)."""
  segments = sorted(segments, key=lambda s: (len(s.ids), s.name))
  out, left = [], count
  for k, s in enumerate(segments):
    n = min(len(s.ids), -(-left // (len(segments) - k)))
    left -= n
    out += [(s, int(i)) for i in (np.arange(n) + 0.5) * len(s.ids) / max(1, n)]
  return out


def record(bundle: Bundle, segments: list[Segment], compared: Compared, count: int) -> dict[str, list[dict[str, Any]]]:
  """What goes into each graph, by its name, at `count` frames of these segments. Raises UserError where they are too
  few."""
  student = Student(bundle, compared)
  heard = {name: Heard(runner) for name, runner in student.runners.items()}
  student.runners = heard  # type: ignore[assignment]
  places = spread(segments, count)
  if len(places) < LEAST:
    raise UserError(
      f"{len(places)} frames to calibrate with are too few, {LEAST} are the least; label more routes, or raise --frames"
    )
  reader, (height, width) = Reader(window=1), compared.view
  for n, (segment, at) in enumerate(places):
    student.reset(camera_height(segment.groups))
    first = at if n % 4 == 0 else max(0, at - RUN_UP)  # some with points that are new
    for i in range(first, at + 1):
      frame_id = segment.ids[i]
      queries = grid(student.slots, height, width, i == first, n) if student.slots is not None else None
      for h in heard.values():
        h.on = i == at
      frame = reader.dense(segment.frames, "frame", [segment.rows[i]])[0]
      student.step(frame, frame_id, segment.valid_at(frame_id), queries)
  return {name: h.inputs for name, h in heard.items()}

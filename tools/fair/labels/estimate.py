"""What labeling so much would take: `tools/op.sh label ... --estimate`. Some of the segments given are labeled as they
would be, into a store that goes away, and timed."""

import copy
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from openpilot.tools.fair.labels.jobs import make_jobs
from openpilot.tools.fair.labels.label_options import Options, shown
from openpilot.tools.fair.labels.labeling import FrameTeacher, plan, showings
from openpilot.tools.fair.labels.loading import held_teachers, inputs, source_options
from openpilot.tools.fair.labels.meta import CHUNK
from openpilot.tools.fair.labels.pipeline import batches, label_batch, load
from openpilot.tools.fair.labels.remote import url_of
from openpilot.tools.fair.labels.sources import Part, Piece, find_pieces
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.labels.views import SegmentView, view_intrinsics
from openpilot.tools.fair.labels.worker import check_teacher, run_one, split
from openpilot.tools.fair.teacher import State, Teacher
from openpilot.tools.lib.errors import UserError, warn

SAMPLES = 5  # segments
SECONDS = 60.0  # of a teacher's work: as many frames of the samples as this is enough for, a chunk at least
clock = time.perf_counter


@dataclass(frozen=True)
class Sample:
  """Of one segment, or of stills that share batches, what one teacher took."""

  frames: int
  seconds: float  # decoding, the network and writing, which overlap
  bytes: int


@dataclass
class Cost:
  """Of one teacher."""

  first: float  # s of the first batch
  decode: float  # s a frame, alone
  network: float  # s a frame, alone
  samples: list[Sample] = field(default_factory=list)

  def seconds(self) -> tuple[float, float, float]:
    """Of a frame: in the mean, in the cheapest and in the dearest segment."""
    return spread([(s.seconds, s.frames) for s in self.samples])

  def bytes(self) -> tuple[float, float, float]:
    return spread([(s.bytes, s.frames) for s in self.samples])


def spread(parts: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
  """(amount, of how many) of each part -> for one: over all, the least, the most."""
  each = [a / n for a, n in parts]
  return sum(a for a, _ in parts) / sum(n for _, n in parts), min(each), max(each)


@dataclass(frozen=True)
class Amount:
  value: float
  low: float
  high: float

  def text(self, unit: str = "", scale: float = 1.0) -> str:
    value, low, high = (figure(x / scale) for x in (self.value, self.low, self.high))
    return f"{value}{unit}" + (f" ({low} to {high})" if (low, high) != (value, value) else "")


@dataclass(frozen=True)
class Estimate:
  frames: float  # of all segments
  start: float  # s, each worker's once
  worker_seconds: Amount
  seconds: Amount  # until all is done
  bytes: Amount
  network_seconds: float
  waits: bool  # for the longest job, as there are more workers than that


def figure(x: float) -> str:
  return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def size_text(amount: Amount) -> str:
  step = next((k for k in (1e12, 1e9, 1e6) if amount.value >= k), 1e3)
  return amount.text({1e12: " TB", 1e9: " GB", 1e6: " MB", 1e3: " kB"}[step], step)


def time_text(amount: Amount) -> str:
  step, unit = next(((k, u) for k, u in ((3600, " h"), (60, " min")) if amount.value >= k), (1, " s"))
  return amount.text(unit, step)


# *** the sample ***


def cut(parts: Sequence[Part], frames: int) -> list[Part]:
  """The first frames of one segment, or the first of the stills."""
  if len(parts) > 1:
    return list(parts[:frames])
  (part,) = parts
  if isinstance(part, SegmentView):
    return [replace(part, entries=part.entries[:frames])]
  own = copy.copy(part)
  if part.still:
    own.keep(part.stills[:frames])
  else:
    own.entries = part.entries[:frames]
  return [own]


def count(parts: Sequence[Part]) -> int:
  return sum(len(p.entries) for p in parts)


def open_samples(pieces: Sequence[Piece]) -> tuple[list[list[Part]], list[tuple[float, float]], float]:
  """-> parts, of each (s to open it, segments), and how many frames there are for one of the pieces' size. Evenly over
  the sizes. Raises UserError where none can be opened."""
  jobs = [j.pieces for j in make_jobs(pieces, {"": False})]
  n = min(SAMPLES, len(jobs))
  found: list[list[Part]] = []
  opening: list[tuple[float, float]] = []
  frames = size = 0
  problem: UserError | None = None
  for own in (jobs[(2 * i + 1) * len(jobs) // (2 * n)] for i in range(n)):
    try:
      begun = clock()
      parts = [p.open() for p in own]
    except UserError as e:
      problem = problem or e
      warn(f"{e}; it is no part of the sample")
      continue
    opening.append((clock() - begun, len(own)))
    found.append(parts)
    frames, size = frames + count(parts), size + sum(p.size for p in own)
  if problem is not None and not found:
    raise problem
  return found, opening, frames / size


def apart(teacher: Teacher, parts: Sequence[Part], args: Options, folder: Path) -> Cost:
  """Decoding and the network one after the other, without what was waited for in the first batch."""
  views, pictures = split(parts)
  size, spec, sees = shown(args)
  if pictures and teacher.name == "frames":
    teacher = FrameTeacher(spec)
  store = LabelStore(folder, create=True)
  marks: list[tuple[int, float, float]] = []  # frames, s of decoding, s of the network
  told = (args.view_name, size, sees, None if views else spec)
  begun = clock()
  for s in showings(teacher, parts, *told):
    rgb = views and s.canvas.wants == "rgb"
    intrinsics = view_intrinsics(args.view_name, s.canvas.width, s.canvas.height) if rgb else None
    own = [parts[i] for i in s.rows]
    works = plan(teacher, own, store, s.canvas, s.stored, args.every, False, s.whole, [0] * len(own))
    state: State | None = None
    with closing(load([batches(works, args.batch_size, teacher.stateful)], s.canvas)) as loaded:
      for items, images in loaded:
        there = clock()
        _, state = label_batch(teacher, items, images, s.canvas.wants, intrinsics, state)
        done = clock()
        marks.append((len(items), there - begun, done - there))
        begun = done
  first = sum(marks[0][1:])
  frames, decode, network = (sum(x) for x in zip(*(marks[1:] or marks), strict=True))
  return Cost(first, decode / frames, network / frames)


def measure(teacher: Teacher, samples: Sequence[Sequence[Part]], args: Options, folder: Path) -> Cost:
  cost = apart(teacher, cut(samples[0], CHUNK), args, folder / "apart")
  if len(samples) == 1:
    samples = [samples[0], samples[0]]  # for a range of some kind: of the clock's
  pace = max(cost.decode + cost.network, 1e-9)
  frames = max(1, int(SECONDS / len(samples) / (pace * CHUNK))) * CHUNK
  for k, own in enumerate(samples):
    store, some = LabelStore(folder / str(k), create=True), cut(own, frames)
    begun = clock()
    groups = run_one(teacher, some, store, args, None, progress=False)
    cost.samples.append(Sample(count(some), clock() - begun, sum(g.size for g in groups)))
  return cost


# *** the sum ***


def add_up(
  pieces: Sequence[Piece],
  costs: Mapping[str, Cost],
  in_order: Mapping[str, bool],
  opening: tuple[float, float, float],
  frames_of_size: float,
  loading: float,
  segments: int,
  workers: int,
) -> Estimate:
  """in_order: of each teacher whether it goes by route. opening: s of a segment."""
  factor = segments / len(pieces)
  frames = frames_of_size * sum(p.size for p in pieces) * factor
  opens = len(costs) if workers > 1 else 1  # jobs of one segment go to different workers
  worker = [0.0, 0.0, 0.0]
  disk = [0.0, 0.0, 0.0]
  for k in range(3):
    worker[k] = segments * opens * opening[k] + sum(frames * c.seconds()[k] for c in costs.values())
    disk[k] = frames * sum(c.bytes()[k] for c in costs.values())
  longest = [0.0, 0.0, 0.0]
  for job in make_jobs(pieces, in_order):
    for k in range(3):
      own = job.size * frames_of_size * costs[job.teacher].seconds()[k] + len(job.pieces) * opening[k]
      longest[k] = max(longest[k], own)
  start = loading + sum(c.first for c in costs.values())
  wall = [start + max(a / workers, b) for a, b in zip(worker, longest, strict=True)]
  network = frames * sum(c.network for c in costs.values())
  waits = workers > 1 and longest[0] > worker[0] / workers
  return Estimate(frames, start, Amount(*worker), Amount(*wall), Amount(*disk), network, waits)


def estimate(args: Options) -> Estimate:
  """Says it; the store is not touched. Raises UserError."""
  if args.segments is not None and args.segments < 1:
    raise UserError("--segments is at least 1")
  workers = args.workers or 1
  begun = clock()
  held = held_teachers(args)
  loading = clock() - begun
  pieces = find_pieces(inputs(args), source_options(args), args.source)
  if len({p.part is None for p in pieces}) > 1:
    raise UserError("--estimate takes routes, or pictures, not both at once: their sizes have no common measure")
  samples, opening, frames_of_size = open_samples(pieces)
  size, spec, _ = shown(args)
  views, pictures = split([p for own in samples for p in own])
  for name, teacher in held.items():
    if name != "frames":
      check_teacher(teacher, views, pictures, size, spec)
  costs: dict[str, Cost] = {}
  for name, teacher in held.items():
    with tempfile.TemporaryDirectory(prefix="fair-estimate-") as folder:
      costs[name] = measure(teacher, samples, args, Path(folder))
  segments = args.segments or len(pieces)
  in_order = {n: t.stateful for n, t in held.items()}
  out = add_up(pieces, costs, in_order, spread(opening), frames_of_size, loading, segments, workers)
  sampled = f"{len(samples)} segments" if len(samples) > 1 else "one segment, twice"
  say(out, costs, Amount(*spread(opening)), sampled, segments, workers, args)
  return out


def say(
  out: Estimate, costs: Mapping[str, Cost], opening: Amount, sampled: str, segments: int, workers: int, args: Options
) -> None:
  print(f"a segment     {time_text(opening)} to open, {figure(out.frames / segments)} frames in the mean")
  for name, cost in costs.items():
    frame, disk = (Amount(*x) for x in (cost.seconds(), cost.bytes()))
    measured = f"{sum(s.frames for s in cost.samples)} frames of {sampled}"
    print(
      f"{name:<13} {frame.text(' ms', 1e-3)} a frame, measured over {measured}; alone decoding "
      f"{figure(cost.decode * 1e3)} ms, network {figure(cost.network * 1e3)} ms; "
      f"{size_text(Amount(*(x * out.frames / segments for x in (disk.value, disk.low, disk.high))))} a segment"
    )
  gpu = args.device != "cpu" and (torch.cuda.is_available() or torch.backends.mps.is_available())
  kind = "GPU hours" if gpu else "hours of workers"
  alone = f", the networks alone {figure(out.network_seconds / 3600)}" if gpu else ""
  who = "one worker" if workers == 1 else f"{workers} workers"
  print(
    f"{segments} segments, {who} like this machine: {time_text(out.seconds)}; "
    f"{out.worker_seconds.text(f' {kind}', 3600)}{alone}; {size_text(out.bytes)} of labels"
  )
  notes = ["in brackets: were all like the cheapest, and like the dearest of the sample"]
  if out.waits:
    notes.append("the longest job is waited for: fewer workers would do")
  if url_of(args.output):
    notes.append(f"what is sent to {args.output} is not timed")
  print(f"({'; '.join(notes)}; {figure(out.start)} s of it each worker's start; nothing was labeled)")

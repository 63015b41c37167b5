#!/usr/bin/env python3
"""Labeling of very many segments on very many workers, played: discrete events, no cluster, no labels. The driver is
the real one (tools/fair/labels/driver.py); workers, their deaths and the store's requests are played.

python tests/bench/bench_scale.py [--segments 1000000] [--workers 1000]

Prints the time beside the ideal, requests to the store a second, and what the driver itself takes for a job, which
bounds how many workers one driver can feed.
"""

import argparse
import heapq
import random
import resource
import time
from collections import Counter
from dataclasses import dataclass
from zlib import crc32

if not __package__:  # run as a file
  import from_root  # noqa: F401

from openpilot.tools.fair.labels.claims import BEAT, EXPIRE
from openpilot.tools.fair.labels.driver import Driver, Result
from openpilot.tools.fair.labels.jobs import make_jobs
from openpilot.tools.fair.labels.meta import CHUNK
from openpilot.tools.fair.labels.sources import Piece
from openpilot.tools.lib.errors import cli, not_negative

FRAMES = 1200  # of a segment
CHUNKS = -(-FRAMES // CHUNK)
LABELS = 2  # of a teacher
# requests of one job: list and sync a group, claim, look again, files of each chunk and its JSON, release, small files
WRITES = 3 + LABELS + 1 + CHUNKS * (LABELS + 1) + 1
READS = 8
S3_WRITES = 3500  # a second and prefix, as Amazon says


@dataclass
class Settings:
  segments: int
  workers: int
  seconds: float  # of a worker for a segment, in the median
  spread: float  # of its logarithm: a tenth of the segments takes e^(1.28 spread) times as long
  death: float  # h from one death of a worker to the next
  reload: float  # s until a dead one is back with its teachers
  broken: float  # share of segments that always fail
  route: int  # segments of a route
  by_route: bool


class Played:
  """Workers on a clock of their own."""

  def __init__(self, s: Settings, seed: int):
    self.s, self.random = s, random.Random(seed)
    self.now, self.events = 0.0, []  # (time, number, worker, job, result)
    self.idle, self.number = list(range(s.workers)), 0
    self.ends: list[float] = []
    self.lost, self.writes = 0.0, Counter()  # s of work that died; minute -> requests
    self.done: dict[str, float] = {}  # share of a segment that a dead worker had finished

  def free(self):
    return list(self.idle)

  def size(self):
    return self.s.workers

  def retire(self, worker):
    raise AssertionError("no worker here fails at everything")

  def seconds_of(self, piece) -> float:
    return piece.size / 1000

  def give(self, worker, job):
    self.idle.remove(worker)
    left = [self.seconds_of(p) * (1 - self.done.get(p.name, 0.0)) for p in job.pieces]
    takes = sum(left)
    until = self.random.expovariate(1 / (self.s.death * 3600)) if self.s.death else float("inf")
    failed = {p.name: "its video is damaged" for p in job.pieces if crc32(p.name.encode()) < self.s.broken * 2**32}
    if until < takes:
      spent = until
      for p, seconds in zip(job.pieces, left, strict=True):
        if spent < seconds:  # of this one whole chunks are kept
          whole = int((self.done.get(p.name, 0.0) + spent / self.seconds_of(p)) * CHUNKS) / CHUNKS
          self.lost += spent - (whole - self.done.get(p.name, 0.0)) * self.seconds_of(p)
          self.done[p.name] = whole
          break
        spent -= seconds
        self.done[p.name] = 1.0
      self.push(until, worker, job, Result(died="preempted"))
    else:
      self.push(takes, worker, job, Result(FRAMES * len(job.pieces), 1, 0, takes, failed))

  def push(self, seconds, worker, job, result):
    self.number += 1
    heapq.heappush(self.events, (self.now + seconds, self.number, worker, job, result))

  def wait(self, seconds):
    if not self.events:
      return
    self.now, _, worker, job, result = heapq.heappop(self.events)
    if job is None:  # it is back
      self.idle.append(worker)
      return
    if result.died:
      self.push(self.s.reload, worker, None, None)
    else:
      self.idle.append(worker)
      self.ends.append(self.now)
      self.writes[int(self.now // 60)] += WRITES * len(job.pieces)
    yield worker, job, result


def play(s: Settings, seed: int) -> dict:
  r = random.Random(seed)
  pieces = [
    Piece(
      f"r{k // s.route}--{k % s.route}",
      f"r{k // s.route}",
      max(1, int(1000 * s.seconds * r.lognormvariate(0, s.spread))),
    )
    for k in range(s.segments)
  ]
  jobs = make_jobs(pieces, {"teacher": s.by_route})
  pool = Played(s, seed)
  begun = time.process_time()
  outcome = Driver(pool, jobs, lambda line: None).run()
  own = time.process_time() - begun
  end, work = max(pool.ends), sum(p.size for p in pieces) / 1000
  minutes = max(1, int(end // 60))
  inside = [pool.writes[m] / 60 for m in range(minutes)]
  return {
    "hours": end / 3600,
    "ideal": work / s.workers / 3600,
    "deaths": outcome.deaths,
    "failed": len(outcome.failed),
    "lost": pool.lost / 3600,
    "writes": (sum(inside) / minutes, max(inside)),
    "beats": s.workers / BEAT,
    "driver": 1e6 * own / max(1, len(pool.ends)),
    "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
  }


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--segments", type=int, default=1_000_000)
  p.add_argument("--workers", type=int, default=1000)
  p.add_argument("--seconds", type=not_negative, default=30.0, help="of a worker for a segment")
  p.add_argument("--spread", type=not_negative, default=0.3)
  p.add_argument("--death", type=not_negative, default=24.0, help="hours between two deaths of a worker; 0: none")
  p.add_argument("--reload", type=not_negative, default=120.0, help="seconds until a dead worker is back")
  p.add_argument("--broken", type=not_negative, default=0.0001, help="share of segments that always fail")
  p.add_argument("--route", type=int, default=20, help="segments of a route")
  p.add_argument("--seed", type=int, default=0)
  args = p.parse_args()
  print(f"{args.segments} segments, {args.workers} workers, {args.seconds:g} s each, a death every {args.death:g} h")
  for by_route in (False, True):
    s = Settings(
      args.segments, args.workers, args.seconds, args.spread, args.death, args.reload, args.broken, args.route, by_route
    )
    f = play(s, args.seed)
    mean, most = f["writes"]
    print(
      f"by {'route' if by_route else 'segment'}: {f['hours']:.2f} h, ideal {f['ideal']:.2f} h "
      f"({f['ideal'] / f['hours']:.1%}); {f['deaths']} deaths cost {f['lost']:.1f} h of workers; {f['failed']} pieces "
      f"failed; writes a second {mean:.0f}, at most {most:.0f} of {S3_WRITES} that a prefix of S3 takes, and "
      f"{f['beats']:.0f} of heartbeats; the driver {f['driver']:.0f} us a job, {f['memory']:.0f} MB"
    )
  print(f"a claim of a dead worker on another machine is free after {EXPIRE:.0f} s")


if __name__ == "__main__":
  raise SystemExit(cli(main)())

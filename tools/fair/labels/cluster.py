"""Labeling on a Ray cluster: one worker on each GPU, or on each group of cores, which loads its teachers once.

All nodes need this checkout, its packages, the weights, the routes and the store at the same paths: a shared disk, or
images that are alike."""

import importlib.metadata
import os
import platform
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from openpilot.tools.fair.labels.driver import Driver, Result
from openpilot.tools.fair.labels.jobs import Job, make_jobs
from openpilot.tools.fair.labels.label_options import Options
from openpilot.tools.fair.labels.loading import held_teachers, inputs, source_options
from openpilot.tools.fair.labels.passes import Failures, reason_of
from openpilot.tools.fair.labels.remote import folder_of, url_of
from openpilot.tools.fair.labels.sources import find_pieces
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.labels.worker import Worker, say_stale
from openpilot.tools.fair.teacher import weight_dirs
from openpilot.tools.lib import python
from openpilot.tools.lib.errors import UserError, load_plugins, printable, warn
from openpilot.tools.lib.options import absolute

PACKAGES = ("numpy", "torch", "onnxruntime", "opencv-python-headless", "av", "zarr", "numcodecs", "pyarrow", "ray")
LOCAL = "local"  # --ray without an address: this machine alone
ANSWER = 5.0  # s for an address to be connected to
READY = 600.0  # s for the first worker to have loaded its teachers


@dataclass
class About:
  """Of a worker."""

  node: str
  versions: dict[str, str]
  stateful: dict[str, bool]  # teacher -> whether it follows things from frame to frame
  wrong: str = ""  # why it cannot work


def versions() -> dict[str, str]:
  """Of what decides labels' bytes."""
  out = {"python": platform.python_version(), "processor": platform.machine()}
  for name in PACKAGES:
    try:
      out[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      out[name] = "none"
  return out


class Actor:
  """A process of the cluster."""

  def __init__(self, args: Options):
    self.args = args
    self.worker: Any = None

  def warm(self) -> About:
    """Loads the teachers."""
    wrong = ""
    try:
      if self.worker is None:
        load_plugins()
        self.worker = Worker(held_teachers(self.args), LabelStore(self.args.output, writes=True), self.args)
    except UserError as e:
      wrong = printable(e)
    stateful = {} if self.worker is None else {n: t.stateful for n, t in self.worker.teachers.items()}
    return About(platform.node(), versions(), stateful, wrong)

  def do(self, job: Job) -> Result:
    if (about := self.warm()).wrong:  # where it was started again
      return Result(failed={p.name: about.wrong for p in job.pieces})
    self.worker.failures = Failures(most=1)  # another worker tries again
    try:
      done = self.worker.do(job)
    except Exception as e:  # of the store
      return Result(failed={p.name: reason_of(e) for p in job.pieces})
    say_stale(self.worker.store, done.groups, self.args.prune)
    failed = {segment: reason_of(e) for (_, segment), e in self.worker.failures.final.items()}
    return Result(done.rows, done.entries, done.bytes, done.seconds, failed)


def load_ray() -> Any:
  os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
  try:
    import ray
  except ImportError:
    raise UserError("--ray needs Ray, which is not installed; run `pip install -e '.[scale]'`") from None
  return ray


def check_address(address: str) -> None:
  """Raises UserError where nothing listens: Ray itself would try for minutes."""
  host, colon, port = address.rpartition(":")
  if not colon or not port.isdecimal() or "/" in host:
    raise UserError(f"--ray {printable(address, 80)}: write HOST:PORT of the head node, as 10.0.0.1:6379")
  try:
    socket.create_connection((host.strip("[]"), int(port)), ANSWER).close()
  except (OSError, OverflowError) as e:
    raise UserError(
      f"--ray {address}: no Ray answers there ({printable(e, 80)}); see `ray status` on the head"
    ) from None


def connect(address: str, workers: int | None) -> Any:
  """-> ray. Raises UserError where there is no cluster, or one of other versions."""
  ray = load_ray()
  own = {
    "PYTHONPATH": python.environment()["PYTHONPATH"],
    "FAIR_WEIGHTS": os.pathsep.join(str(p.absolute()) for p in weight_dirs()),
    **{k: v for k, v in os.environ.items() if k in ("FAIR_PLUGINS", "FAIR_ORT_THREADS", "OMP_NUM_THREADS")},
  }
  common = {"log_to_driver": True, "logging_level": "error", "runtime_env": {"env_vars": own}}
  try:
    if address == LOCAL:
      cpus = workers or os.cpu_count() or 1
      ray.init(address=LOCAL, num_cpus=cpus, include_dashboard=False, object_store_memory=100 << 20, **common)
    else:
      check_address(address)
      ray.init(address=address, **common)
  except UserError:
    raise
  except Exception as e:  # Ray's have no common base
    raise UserError(f"--ray {address}: {printable(e, 300)}") from None
  return ray


def shares(ray: Any, workers: int | None) -> tuple[int, dict[str, float]]:
  """-> how many workers, and what each takes of the cluster: a GPU, else like many cores."""
  there = ray.cluster_resources()
  gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 1))
  if gpus:
    return min(workers or gpus, gpus), {"num_gpus": 1, "num_cpus": 0}
  n = min(workers or len(ray.nodes()), max(1, cpus))
  return n, {"num_cpus": max(1, cpus // n)}


class RayPool:
  def __init__(self, ray: Any, args: Options, workers: int | None):
    self.ray = ray
    n, takes = shares(ray, workers)
    # not restarted by Ray, which fails every call until the new process is there
    self.make = lambda: ray.remote(Actor).options(max_restarts=0, max_task_retries=0, **takes).remote(args)
    self.actors: dict[int, Any] = {}
    self.warming: dict[Any, int] = {}
    self.ready: set[int] = set()
    self.running: dict[Any, tuple[int, Job]] = {}
    self.first: About | None = None
    self.most = self.chances = 3 * n  # workers that are begun anew before one of them has done a job
    self.begun = 0
    for _ in range(n):
      self.begin()

  def begin(self) -> None:
    self.actors[self.begun] = actor = self.make()
    self.warming[actor.warm.remote()] = self.begun
    self.begun += 1

  def replace(self, worker: int) -> None:
    """Another in the place of one that is gone."""
    self.retire(worker)
    if self.chances:
      self.chances -= 1
      self.begin()

  def start(self) -> About:
    """Waits for the first worker. Raises UserError where none can work."""
    end = time.monotonic() + READY
    while self.first is None:
      if not self.warming:
        raise UserError("no worker starts; see the logs that Ray keeps, by default in /tmp/ray/session_latest/logs")
      if time.monotonic() > end:
        raise UserError(f"no worker was ready after {READY:.0f} s; the cluster may be full: see `ray status`")
      list(self.wait(1.0))
    return self.first

  def free(self) -> list[int]:
    busy = {k for k, _ in self.running.values()}
    return sorted(k for k in self.ready if k in self.actors and k not in busy)

  def size(self) -> int:
    return len(self.actors)

  def give(self, worker: int, job: Job) -> None:
    self.running[self.actors[worker].do.remote(job)] = worker, job

  def wait(self, seconds: float) -> Iterable[tuple[int, Job, Result]]:
    refs = [*self.running, *self.warming]
    if not refs:
      return
    done, _ = self.ray.wait(refs, num_returns=1, timeout=seconds)
    for ref in done:
      if ref in self.warming:
        self.greet(self.warming.pop(ref), ref)
        continue
      worker, job = self.running.pop(ref)
      try:
        result = self.ray.get(ref)
        self.chances = self.most
      except self.ray.exceptions.RayError as e:
        result = Result(died=type(e).__name__)
        self.replace(worker)
      yield worker, job, result

  def greet(self, worker: int, ref: Any) -> None:
    """A worker is ready. Raises UserError where it cannot work, or is of other versions than the first."""
    try:
      about = self.ray.get(ref)
    except self.ray.exceptions.RayError as e:
      warn(f"a worker did not start ({type(e).__name__}); it gets no job")
      self.replace(worker)
      return
    if about.wrong:
      raise UserError(f"on node {about.node}: {about.wrong}")
    self.first = self.first or about
    for name, version in about.versions.items():
      if self.first.versions[name] != version:
        raise UserError(
          f"nodes differ: {name} is {self.first.versions[name]} on {self.first.node}, {version} on {about.node}; their "
          "labels would not be the same: install one version"
        )
    self.ready.add(worker)

  def retire(self, worker: int) -> None:
    if (actor := self.actors.pop(worker, None)) is not None:
      self.ray.kill(actor)


def placed(args: Options) -> Options:
  """The options with paths that mean the same on every node."""
  given = {n: getattr(args, n) for n in ("output", "data_dir", "images", "aim")}
  changes: dict[str, Any] = {n: p if url_of(p) else folder_of(p).absolute() for n, p in given.items() if p}
  for n in ("paths", "weights", "option"):
    changes[n] = tuple(absolute(t) for t in getattr(args, n))
  return replace(args, **changes, teachers=",".join(absolute(t) for t in args.teachers.split(",")))


def label_on(args: Options) -> int:
  """-> the exit code."""
  address, args = args.ray or LOCAL, placed(args)
  pieces = find_pieces(inputs(args), source_options(args), args.source)
  ray = connect(address, args.workers)
  try:
    store = LabelStore(args.output, create=True)
    pool = RayPool(ray, args, args.workers)
    jobs = make_jobs(pieces, pool.start().stateful)
    print(f"{len(jobs)} jobs, {pool.size()} workers", file=sys.stderr)
    outcome = Driver(pool, jobs).run()
    store.finish()
  finally:
    ray.shutdown()
  for name, rows in outcome.rows.items():
    if rows and not outcome.entries[name]:
      warn(f"teacher '{name}' says nothing of any of the {rows} frames: its tables are empty")
    print(
      f"{name:<22} {outcome.pieces[name]} segments, {rows} frames, {outcome.bytes[name] / 1e6:.1f} MB, "
      f"{outcome.seconds[name]:.1f} s of workers"
    )
  return outcome.code()

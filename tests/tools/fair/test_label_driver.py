"""Jobs over workers that die, fail and come late, in a pool that is played here; and what the cluster's own answers."""

import pickle
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_label_claims import Mean, Small, contents, find
from test_label_claims import route as small_route

from openpilot.tools.fair.labels import cluster, label, loading
from openpilot.tools.fair.labels.cluster import About, Actor, RayPool
from openpilot.tools.fair.labels.driver import IN_A_ROW, Driver, Outcome, Result, in_words, seconds_left
from openpilot.tools.fair.labels.jobs import make_jobs
from openpilot.tools.fair.labels.label_options import Options
from openpilot.tools.fair.labels.passes import ALIKE, TRIES
from openpilot.tools.fair.labels.sources import Piece
from openpilot.tools.fair.labels.sources.routes import route_pieces
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.lib.errors import UserError, cli

route = small_route  # a fixture of theirs


class Played:
  """workers: name -> function of a job."""

  def __init__(self, workers):
    self.workers, self.running, self.order, self.retired, self.most = dict(workers), {}, [], [], 0

  def free(self):
    return [w for w in self.workers if w not in self.running]

  def size(self):
    return len(self.workers)

  def give(self, worker, job):
    assert worker not in self.running  # one job at a time
    self.running[worker] = job
    self.order.append((worker, job))
    self.most = max(self.most, len(self.running))

  def wait(self, seconds):
    if self.running:
      worker = next(iter(self.running))
      job = self.running.pop(worker)
      yield worker, job, self.workers[worker](job) if worker in self.workers else Result(died="gone")

  def retire(self, worker):
    self.retired.append(worker)
    del self.workers[worker]


def jobs_of(sizes, teachers=None):
  there = [Piece(f"r{k}--0", f"r{k}", size) for k, size in enumerate(sizes)]
  return make_jobs(there, teachers or {"boxes": False})


def good(job):
  return Result(rows=10 * len(job.pieces), entries=1, seconds=job.size, failed={})


def drive(pool, jobs):
  said = []
  driver = Driver(pool, jobs, said.append)
  assert driver.left().total() == sum(j.size for j in jobs)
  try:
    return driver.run(), said
  finally:
    assert driver.left().total() == sum(j.size for j in driver.waiting)


def test_the_longest_come_first_and_each_worker_has_one():
  pool = Played({"a": good, "b": good, "c": good})
  out, _ = drive(pool, jobs_of([5, 9, 1, 7, 3, 8]))
  assert [j.size for _, j in pool.order] == [9, 8, 7, 5, 3, 1] and pool.most == 3
  assert out.rows["boxes"] == 60 and out.pieces["boxes"] == 6 and out.code() == 0


def test_a_worker_that_dies_costs_its_job_once():
  left = Counter({"r1--0": 2})

  def dies(job):
    if left[job.pieces[0].name]:
      left[job.pieces[0].name] -= 1
      return Result(died="ActorDiedError")
    return good(job)

  pool = Played({"a": dies, "b": dies})
  out, said = drive(pool, jobs_of([5, 9, 1]))
  assert out.deaths == 2 and out.code() == 0 and out.pieces["boxes"] == 3
  assert Counter(j.name for _, j in pool.order) == {"r1--0": 3, "r0--0": 1, "r2--0": 1}
  assert said[0] == "a worker died at r1--0 by boxes (ActorDiedError); its job is given to another"
  assert pool.order[-1][1].name == "r1--0"  # behind the others


def test_what_fails_thrice_is_named_and_the_rest_of_its_route_is_done(capsys):
  there = [Piece(f"r--{k}", "r", 1) for k in range(4)]

  def fails(job):
    return Result(failed={p.name: "no video" for p in job.pieces if p.name == "r--2"})

  pool = Played({"a": fails, "b": fails})
  out, _ = drive(pool, make_jobs(there, {"tracks": True}))
  assert [len(j.pieces) for _, j in pool.order] == [4, 1, 1]  # only the piece is tried again
  assert out.code() == 1 and out.pieces["tracks"] == 3
  assert capsys.readouterr().err == f"failed: r--2 by tracks, {TRIES} times: no video\n"


def test_a_teacher_that_fails_everywhere_ends_it_and_another_goes_on():
  def fails(job):
    return Result(failed={job.pieces[0].name: "no weights"}) if job.teacher == "boxes" else good(job)

  pool = Played({"a": fails})
  out, said = drive(pool, jobs_of([1] * 50, {"boxes": False, "maps": False}))
  assert out.pieces["maps"] == 50 and len(out.failed) == ALIKE and "boxes: 3 pieces failed alike" in said[-1]
  assert sum(j.teacher == "boxes" for _, j in pool.order) <= 50 * (TRIES - 1) + ALIKE
  with pytest.raises(UserError, match="no weights"):
    out.code()


def test_a_node_that_eats_jobs_is_left_out():
  def eats(job):
    return Result(failed={p.name: "its GPU is gone" for p in job.pieces})

  pool = Played({"a": good, "bad": eats, "c": good})
  out, said = drive(pool, jobs_of([1] * 40))
  assert pool.retired == ["bad"] and out.code() == 0 and out.pieces["boxes"] == 40
  assert sum(w == "bad" for w, _ in pool.order) == IN_A_ROW and "it gets no job any more (its GPU is gone)" in said[0]


def test_what_fails_everywhere_is_not_its_last_workers_fault():
  """Many pieces that fail, tried again in a row at the end."""

  def fails(job):
    return Result(failed={p.name: "no video" for p in job.pieces if int(p.route[1:]) % 3 == 0})

  pool = Played({"a": fails, "b": fails})
  out, _ = drive(pool, jobs_of([1] * 40))
  assert pool.retired == [] and len(out.failed) == 14 and out.pieces["boxes"] == 26


def test_without_workers_it_ends():
  pool = Played({})
  with pytest.raises(UserError, match="no worker is left, with 3 jobs to do; the same command goes on"):
    drive(pool, jobs_of([1, 2, 3]))


def test_time_left_is_each_teachers_own():
  out = Outcome(seconds={"boxes": 10.0, "tracks": 400.0}, sizes=Counter(boxes=100, tracks=100))
  assert seconds_left(out, Counter(boxes=50, tracks=50), 5) == (50 * 0.1 + 50 * 4) / 5
  assert seconds_left(out, Counter(new=50), 1) == 200  # as the slowest
  assert seconds_left(Outcome(), Counter(boxes=5), 3) is None
  assert [in_words(s) for s in (None, 90.0, 7500.0, 4e5)] == [
    "time left not known yet",
    "about 2 min left",
    "about 2 h 05 min left",
    "about 4.6 days left",
  ]


def test_workers_make_one_machines_store(route, tmp_path, monkeypatch, capsys):
  """Actors as the cluster has them, in this process, their options and jobs pickled on the way."""
  monkeypatch.setattr(loading, "load_teachers", lambda args: [Mean(), Small()])
  words = {"paths": (str(route),), "teachers": "mean,counter", "focal": "110", "batch_size": 7, "every": 2}
  typed = "--teachers mean,counter --focal 110 --batch-size 7 --every 2 --output".split()
  monkeypatch.setattr("sys.argv", ["label", str(route), *typed, str(tmp_path / "whole")])
  assert cli(label.main)() == 0
  args = Options(**words, output=tmp_path / "s")
  LabelStore(args.output, create=True)
  actors = {k: Actor(pickle.loads(pickle.dumps(args))) for k in range(2)}
  about = actors[0].warm()
  assert about.stateful == {"frames": False, "mean": False, "counter": True} and not about.wrong
  jobs = make_jobs(route_pieces([str(route)], None, "road", 2, 110.0), about.stateful)

  def do(k):
    return lambda job: pickle.loads(pickle.dumps(actors[k].do(pickle.loads(pickle.dumps(job)))))

  out, _ = drive(Played({k: do(k) for k in actors}), jobs)
  assert out.code() == 0 and out.pieces == {"frames": 2, "mean": 2, "counter": 2} and out.rows["mean"] == 110
  assert contents(args.output) == contents(tmp_path / "whole")
  assert find(route)  # their teachers' views


def test_a_worker_whose_store_fails_says_so(route, tmp_path, monkeypatch):
  monkeypatch.setattr(loading, "load_teachers", lambda args: [Mean()])
  args = Options(paths=(str(route),), teachers="mean", focal="110", output=tmp_path / "none")
  (job, *_) = make_jobs(route_pieces([str(route)], None, "road", 1, 110.0), {"mean": False})
  assert "no label store" in Actor(args).do(job).failed[job.name]


class FakeRay:
  """Of Ray what RayPool uses."""

  class exceptions:
    class RayError(Exception):
      pass

  def __init__(self, abouts):
    self.abouts, self.killed, self.handles = abouts, [], iter(abouts)

  def cluster_resources(self):
    return {"CPU": float(len(self.abouts))}

  def nodes(self):
    return self.abouts

  def remote(self, cls):
    def make(args):
      about = next(self.handles, self.exceptions.RayError("the cluster is gone"))
      return SimpleNamespace(warm=SimpleNamespace(remote=lambda: about), do=SimpleNamespace(remote=lambda job: job))

    return SimpleNamespace(options=lambda **k: SimpleNamespace(remote=make))

  def wait(self, refs, num_returns, timeout):
    return refs[:1], refs[1:]

  def get(self, ref):
    if isinstance(ref, Exception):
      raise ref
    return ref

  def kill(self, actor):
    self.killed.append(actor)


def test_in_the_place_of_a_dead_worker_another_is_begun():
  fake = FakeRay([Ref("n1", {}, {}), Ref("n2", {}, {}), Ref("n3", {}, {})])
  fake.cluster_resources = lambda: {"CPU": 2.0}
  fake.nodes = lambda: [1, 2]
  pool = RayPool(fake, None, None)
  assert pool.start().node == "n1"
  list(pool.wait(0))
  assert pool.free() == [0, 1]
  pool.give(0, FakeRay.exceptions.RayError("killed"))  # a job's answer
  ((worker, _, result),) = pool.wait(0)
  assert worker == 0 and result.died == "RayError" and pool.free() == [1] and pool.size() == 2
  list(pool.wait(0))
  assert pool.free() == [1, 2]  # not before it has loaded its teachers


class Ref(About):
  __hash__ = object.__hash__


def test_nodes_of_other_versions_are_refused():
  same = {"numpy": "2.3", "torch": "2.11"}
  pool = RayPool(FakeRay([Ref("n1", same, {}), Ref("n2", {**same, "torch": "2.12"}, {})]), None, None)
  assert pool.start().node == "n1"
  with pytest.raises(UserError, match=r"nodes differ: torch is 2\.11 on n1, 2\.12 on n2"):
    list(pool.wait(0))


def test_a_worker_that_cannot_start_is_left_out_and_one_that_cannot_work_ends_it():
  error = FakeRay.exceptions.RayError("died")
  pool = RayPool(FakeRay([error, Ref("n2", {}, {"boxes": False})]), None, None)
  assert pool.start().node == "n2" and pool.free() == [1]
  for _ in range(20):  # what is begun in its place fails, too, and that has an end
    list(pool.wait(0))
  assert pool.free() == [1] and pool.size() == 1 and pool.begun == 2 + pool.most
  pool = RayPool(FakeRay([Ref("n1", {}, {}, "no weights 'x.onnx'")]), None, None)
  with pytest.raises(UserError, match=r"on node n1: no weights 'x\.onnx'"):
    pool.start()


@pytest.mark.parametrize(
  ("address", "says"),
  [
    ("127.0.0.1:1", "no Ray answers there"),
    ("ray://10.0.0.1:10001", "write HOST:PORT"),
    ("nowhere", "write HOST:PORT"),
    ("127.0.0.1:99999", "no Ray answers there"),
  ],
)
def test_an_address_where_no_ray_is(address, says, route, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(cluster, "load_ray", lambda: SimpleNamespace(init=None))
  monkeypatch.setattr(
    "sys.argv", ["label", str(route), "--teachers", "x", "--output", str(tmp_path / "s"), "--ray", address]
  )
  assert cli(label.main)() == 2
  err = capsys.readouterr().err
  assert says in err and err.count("\n") == 1 and not (tmp_path / "s").exists()


def test_a_cluster_of_another_version_and_no_ray_at_all(route, tmp_path, monkeypatch, capsys):
  def init(**_):
    raise RuntimeError(
      "Version mismatch: The cluster was started with:\n    Ray: 2.59.0\nThis process was started with: ..."
    )

  words = ["label", str(route), "--teachers", "x", "--output", str(tmp_path / "s"), "--ray"]
  monkeypatch.setattr("sys.argv", words)
  monkeypatch.setattr(cluster, "load_ray", lambda: SimpleNamespace(init=init))
  assert cli(label.main)() == 2
  err = capsys.readouterr().err
  assert "Version mismatch: The cluster was started with: Ray: 2.59.0" in err and err.count("\n") == 1
  monkeypatch.undo()
  monkeypatch.setattr("sys.argv", words)
  monkeypatch.setitem(sys.modules, "ray", None)
  assert cli(label.main)() == 2
  assert "--ray needs Ray, which is not installed" in capsys.readouterr().err and not Path(tmp_path / "s").exists()

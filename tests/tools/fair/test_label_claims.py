"""Several commands that fill one label store: who does what, what one that dies leaves, and that the bytes are those of
one machine however the work was split."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from test_labels import FRAMES, Counter, command, contents, run, write_network
from test_labels import route as written_route

from openpilot.tools.fair.labels import claims as claims_module
from openpilot.tools.fair.labels.claims import CLAIMS, EXPIRE, Claims, Folder
from openpilot.tools.fair.labels.labeling import FrameTeacher, job_numbers, run_teacher
from openpilot.tools.fair.labels.passes import ALIKE, TRIES, Failures
from openpilot.tools.fair.labels.sources.routes import find_views
from openpilot.tools.fair.labels.sources.stills import StillView
from openpilot.tools.fair.labels.meta import CHUNK
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.videowriter import VideoWriter

large_route = written_route  # a fixture of theirs
GROUP = "0000002c--d68dde99ca--0/tiny-2.1-0123456789ab"


@pytest.fixture(scope="module")
def route(tmp_path_factory):
  """As theirs, of small pictures."""
  root, r = tmp_path_factory.mktemp("small"), np.random.default_rng(3)
  big = r.integers(0, 256, (40, 60, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
  for k, n in enumerate(FRAMES):
    folder = root / f"0000002c--d68dde99ca--{k}"
    folder.mkdir()
    with VideoWriter(folder / "qcamera.ts", 128, 96, 15, 30) as v:
      for i in range(n):
        v.write(big[i % 100 : i % 100 + 96, i : i + 128])
  return root


def find(route):
  return find_views([str(route)], None, "qcamera", 1, 110.0)


class Clock:
  def __init__(self, monkeypatch):
    self.t = 1000.0
    monkeypatch.setattr(claims_module, "now", lambda: self.t)
    monkeypatch.setattr(Claims, "_beat_all", lambda self: None)  # heartbeats by hand


def files(root):
  return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def dead_process():
  with subprocess.Popen([sys.executable, "-c", ""]) as gone:
    gone.wait()
  return gone.pid


def test_a_claim_has_one_owner_and_leaves_nothing(tmp_path):
  mine, other = Claims(Folder(tmp_path)), Claims(Folder(tmp_path))
  claim = mine.take(GROUP)
  assert claim and mine.take(GROUP) is None and other.take(GROUP) is None and other.taken(GROUP)
  assert files(tmp_path) == [f"{CLAIMS}/{GROUP}.0"]
  assert other.take(GROUP[:-1]) is not None  # a name that the other begins with
  other.release(next(iter(other.held.values())))
  mine.release(claim)
  assert list(tmp_path.iterdir()) == [] and not other.taken(GROUP)


def test_of_many_one_gets_it(tmp_path, dead_process):
  """At once, and where the one before is gone."""
  (tmp_path / CLAIMS / GROUP).parent.mkdir(parents=True)
  for k in range(20):
    if k % 2:
      path = tmp_path / CLAIMS / f"{GROUP}.0"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(f"{claims_module.machine_id()} {dead_process} x 0\n".encode())
    takers, got, start = [Claims(Folder(tmp_path)) for _ in range(4)], [], threading.Barrier(4)

    def take(taker, got=got, start=start):
      start.wait()
      got.append((taker, taker.take(GROUP)))

    threads = [threading.Thread(target=take, args=(t,)) for t in takers]
    for t in threads:
      t.start()
    for t in threads:
      t.join()
    winners = [(t, c) for t, c in got if c is not None]
    assert len(winners) == 1
    winners[0][0].release(winners[0][1])
    assert not (tmp_path / CLAIMS).exists()


def test_a_claim_expires_by_the_clock_of_who_wants_it(tmp_path, monkeypatch):
  """Of another machine, whose processes cannot be asked for."""
  clock = Clock(monkeypatch)
  owner, other = Claims(Folder(tmp_path)), Claims(Folder(tmp_path))
  owner.token = f"elsewhere 1 {'0' * 16}"
  claim = owner.take(GROUP)
  for _ in range(5):  # it lives: whoever looks now and then never gets it
    assert other.take(GROUP) is None
    clock.t += EXPIRE / 2
    owner._beat(claim)
  assert other.take(GROUP) is None
  clock.t += EXPIRE - 1
  assert other.take(GROUP) is None and owner.holds(claim)  # asked before it writes, it says that it lives
  assert other.take(GROUP) is None
  clock.t += EXPIRE + 1
  taken = other.take(GROUP)
  assert taken is not None and not owner.holds(claim)
  owner.release(claim)  # not his any more
  assert other.holds(taken) and other.taken(GROUP)
  other.release(taken)
  assert list(tmp_path.iterdir()) == []


def test_what_the_dead_left_is_swept_where_the_work_is_done(tmp_path):
  for name in ("a--0/x-1.0", "a--0/x-1.1", "a--1/x-1.0"):
    (tmp_path / CLAIMS / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / CLAIMS / name).write_bytes(b"elsewhere 1 x 0\n")
  claims = Claims(Folder(tmp_path))
  claims.sweep(lambda group: group == "a--0/x-1")
  assert files(tmp_path) == [f"{CLAIMS}/a--1/x-1.0"]


class Mean:
  """Of each picture, and of its batch: what depends on how frames are put together shows."""

  name, model_id, checkpoint_hash, license, stateful = "mean", "", "", "MIT", False
  labels = [Label("mean", "dense", "float32", (2,)), Label("nothing", "dense", "uint8", (4,))]

  def __init__(self, fails=0):
    """fails: so often at frame 104, which the first segment alone has."""
    self.fails, self.calls = fails, []

  def view_size(self):
    return 64, 32

  def prepare(self, height, width): ...

  def settings(self):
    return {}

  def label(self, clip, state=None):
    n, means = len(clip.rgb), clip.rgb.mean((1, 2, 3))
    self.calls.append(n)
    if 104 in clip.frame_ids and self.fails:
      self.fails -= 1
      raise OSError(5, "the disk stumbles")
    both = np.stack([means, np.full(n, means.sum())], 1)
    return {"mean": both.astype(np.float32), "nothing": np.zeros((n, 4), np.uint8)}, None


class Small(Counter):
  """With state."""

  def view_size(self):
    return 64, 32


def test_labels_do_not_depend_on_the_split(route, tmp_path):
  """Batches of seven, which end at no segment."""
  views = find(route)
  for name, order in (("whole", [views]), ("back", [views[::-1]]), ("one", [[views[1]], [views[0]]])):
    for some in order:
      run_teacher(Mean(), some, LabelStore(tmp_path / name, create=True), batch=7, progress=False)
  want = contents(tmp_path / "whole")
  assert len([k for k in want if "/chunks/" in k]) == 3 + 2
  assert contents(tmp_path / "back") == want and contents(tmp_path / "one") == want


def test_stills_share_batches_in_fixed_blocks(route):
  views = find(route)
  still = StillView(**vars(views[0]))
  numbers = job_numbers([views[0], views[1], *[still] * (2 * CHUNK + 1), views[0]])
  assert numbers[:2] == [0, 1] and len(numbers) == 2 * CHUNK + 4
  assert [numbers.count(n) for n in dict.fromkeys(numbers)] == [1, 1, CHUNK, CHUNK, 1, 1]


@pytest.mark.parametrize("stateful", [False, True])
def test_two_at_once_share_the_work(route, tmp_path, stateful):
  views = find(route)
  make = Small if stateful else Mean
  run_teacher(make(), views, LabelStore(tmp_path / "one", create=True), batch=8, progress=False)
  teachers = [make(), make()]
  LabelStore(tmp_path / "two", create=True)
  threads = [
    threading.Thread(
      target=run_teacher, args=(t, views, LabelStore(tmp_path / "two")), kwargs={"batch": 8, "progress": False}
    )
    for t in teachers
  ]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  done = [t.calls if stateful else sum(t.calls) for t in teachers]
  assert sum(done) == sum(FRAMES)  # nothing twice
  assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_claim_that_was_lost_is_not_written_to(route, tmp_path, monkeypatch):
  """The process was stopped, another took over and is at work: what comes late is not written, and waits."""
  views = find(route)[1:]
  store, written, asked = LabelStore(tmp_path / "s", create=True), [], []
  (group,) = run_teacher(Mean(), views, LabelStore(tmp_path / "whole", create=True), progress=False)

  def holds(claim, first=[True]):  # noqa: B006
    asked.append(claim)
    lost, first[0] = first[0], False
    return not lost

  monkeypatch.setattr(store.claims, "holds", holds)
  monkeypatch.setattr("openpilot.tools.fair.labels.passes.POLL", 0.01)
  real = type(group).write_chunk
  monkeypatch.setattr(type(group), "write_chunk", lambda g, k, *more: (written.append(k), real(g, k, *more)))
  run_teacher(Mean(), views, store, progress=False)
  assert len(asked) == 3 and sorted(written) == [0, 1]  # the first chunk in the second pass
  assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_what_fails_is_tried_thrice_and_named_and_the_rest_is_done(route, tmp_path, capsys):
  views = find(route)
  run_teacher(Mean(), views, LabelStore(tmp_path / "whole", create=True), progress=False)
  # it stumbles, and goes on
  failures, teacher = Failures(), Mean(fails=TRIES - 1)
  run_teacher(teacher, views, LabelStore(tmp_path / "s", create=True), progress=False, failures=failures)
  assert failures.finish() == 0 and contents(tmp_path / "s") == contents(tmp_path / "whole")
  # it fails for good: the other segment is there
  failures, store = Failures(), LabelStore(tmp_path / "half", create=True)
  run_teacher(Mean(fails=99), views, store, progress=False, failures=failures)
  assert failures.finish() == 1
  said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("failed: ")]
  assert said == [
    f"failed: {views[0].name} by mean, 3 times: the disk or its connection fails; copy the data to another disk"
  ]
  assert [g.row_count for g in store.groups()] == [CHUNK, FRAMES[1]]
  assert not (store.root / CLAIMS).exists()
  # the same command goes on
  run_teacher(Mean(), views, store, progress=False)
  assert contents(tmp_path / "half") == contents(tmp_path / "whole")


class Never(Mean):
  def label(self, clip, state=None):
    self.calls.append(len(clip.rgb))
    raise UserError("teacher 'mean' is broken")


def test_a_teacher_that_only_fails_is_left_out(route, tmp_path, capsys):
  (view, _) = find(route)
  views = [replace(view, segment=replace(view.segment, num=k)) for k in range(6)]
  teacher, failures = Never(), Failures()
  run_teacher(teacher, views, LabelStore(tmp_path / "s", create=True), progress=False, failures=failures)
  assert len(failures.final) == ALIKE  # of six
  with pytest.raises(UserError, match="teacher 'mean' is broken"):
    failures.finish()
  assert "3 pieces failed alike and none succeeded" in capsys.readouterr().err


def test_chunks_say_nothing_of_who_wrote_them(route, tmp_path, monkeypatch):
  """Nor when, nor of the data's place: labeled again elsewhere, later, every byte is the same."""
  shutil.copytree(route, tmp_path / "elsewhere" / "deeper", copy_function=shutil.copy)
  stores = []
  for k, place in enumerate((route, tmp_path / "elsewhere" / "deeper")):
    monkeypatch.setattr("socket.gethostname", lambda k=k: f"host{k}")
    monkeypatch.setattr("time.time", lambda k=k: 1e9 + 1e8 * k)
    views = find(place)
    store = LabelStore(tmp_path / f"s{k}", create=True)
    for teacher in (FrameTeacher(), Mean(), Small()):
      run_teacher(teacher, views, store, progress=False)
    stores.append(contents(store.root))
  assert stores[0] == stores[1]
  words = [str(tmp_path).encode(), str(route).encode(), os.fsencode(os.getcwd())]
  for path in (tmp_path / "s0").rglob("*"):
    assert not path.is_file() or not any(w in path.read_bytes() for w in words), path


@pytest.mark.slow
def test_two_commands_on_one_store_one_of_them_killed(large_route, tmp_path):
  network = write_network(tmp_path / "net")
  args = (large_route, "--teachers", network, "--batch", 7)
  assert run(*args, "--out", tmp_path / "whole").returncode == 0
  want, out = contents(tmp_path / "whole"), tmp_path / "s"
  both = [
    subprocess.Popen(command(*args, "--out", out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    for _ in range(2)
  ]
  end = time.monotonic() + 60
  while len(list(out.glob(f"{CLAIMS}/*/*.*"))) < 2 and all(p.poll() is None for p in both):
    assert time.monotonic() < end
    time.sleep(0.002)
  os.kill(both[0].pid, signal.SIGKILL)
  both[0].wait()
  assert both[1].wait(timeout=120) == 0  # it took over what the other had begun
  assert contents(out) == want
  both = [subprocess.Popen(command(*args, "--out", out), stdout=subprocess.DEVNULL) for _ in range(2)]
  assert [p.wait(timeout=120) for p in both] == [0, 0] and contents(out) == want

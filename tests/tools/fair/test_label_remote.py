"""Label stores by URL: the same objects as a folder's files, whatever the connection does, and readers that fetch once.
In obstore's memory where only what is asked matters; against moto's S3 server, which is started here, where it is
installed: pip install -e '.[scale]' 'moto[server]'."""

import json
import shutil
import socket
import threading
import time
import urllib.request
from collections import Counter

import numpy as np
import pytest
import torch
from label_fixture import write_store
from test_label_claims import Mean, Small, contents
from test_label_claims import route as small_route

from openpilot.tools.fair.distillation.batch import Batches
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.evaluation.scenes import open_segments
from openpilot.tools.fair.labels import agree, browse, plane, remote
from openpilot.tools.fair.labels.claims import CLAIMS
from openpilot.tools.fair.labels.dataset import LabelDataset
from openpilot.tools.fair.labels.labeling import FrameTeacher, run_teacher
from openpilot.tools.fair.labels.remote import INDEX, folder_of, url_of
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.lib.errors import UserError, cli

obstore = pytest.importorskip("obstore", reason="obstore is not installed")
route = small_route  # a fixture of theirs
URL = "s3://labels/a/b"


class Counted:
  """obstore's functions, counted by name."""

  def __init__(self):
    self.calls, self.exceptions = Counter(), obstore.exceptions

  def __getattr__(self, name):
    def call(store, *args, **kwargs):
      self.calls[name] += 1
      if args and name in ("get", "put"):
        self.calls[f"{name} {'shard' if '/c/' in args[0] else args[0].rpartition('/')[2]}"] += 1
      return getattr(obstore, name)(store, *args, **kwargs)

    return call


@pytest.fixture
def memory(monkeypatch, tmp_path):
  """-> the objects of all stores that are opened, and what is asked."""
  store, counted = obstore.store.MemoryStore(), Counted()
  monkeypatch.setattr(remote, "open_url", lambda url: store)
  real = remote.Remote.__init__

  def init(self, url, writes):
    real(self, url, writes)
    self.obstore = counted

  monkeypatch.setattr(remote.Remote, "__init__", init)
  monkeypatch.setenv("FAIR_CACHE", str(tmp_path / "cache"))
  return store, counted


def objects(store):
  import hashlib

  names = [x["path"] for part in obstore.list(store) for x in part]
  return {n: hashlib.sha256(bytes(obstore.get(store, n).bytes())).hexdigest() for n in names if n != INDEX}


def fill(store, folder):
  """As the first test shows a store to be."""
  for path in folder.rglob("*"):
    if path.is_file():
      obstore.put(store, f"{path.relative_to(folder)}", path.read_bytes())


def label_into(place, views):
  for teacher in (FrameTeacher(), Mean(), Small()):
    run_teacher(teacher, views, LabelStore(place, create=True), every=2, progress=False)
  LabelStore(place, create=True).finish()


@pytest.fixture(scope="module")
def local(route, tmp_path_factory):
  root = tmp_path_factory.mktemp("local") / "s"
  label_into(root, views_of(route))
  return root


def views_of(route):
  from openpilot.tools.fair.labels.sources.routes import find_views

  return find_views([str(route)], None, "qcamera", 2, 110.0)


def test_places():
  assert url_of("s3://b/x/") == url_of(remote.Path("s3://b/x")) == "s3://b/x" and url_of("gs://b") == "gs://b"
  assert url_of("/tmp/s3:/x") is None and url_of("s3") is None
  assert folder_of(remote.Path("file:///tmp/x")) == folder_of("/tmp/x") == remote.Path("/tmp/x")


def test_the_objects_are_a_folders_files(route, local, memory, tmp_path):
  store, _ = memory
  label_into(URL, views_of(route))
  assert objects(store) == contents(local)
  assert json.loads(bytes(obstore.get(store, INDEX).bytes()))["groups"] == sorted(
    str(p.parent.relative_to(local)) for p in local.rglob("group.json")
  )
  assert not [n for n in objects(store) if n.startswith(CLAIMS)]


def test_readers_fetch_once(route, local, memory, tmp_path):
  store, counted = memory
  fill(store, local)
  LabelStore(URL, writes=True).finish()
  want = LabelDataset(local, ["frames/frame", "mean/mean", "counter/points"])
  for again in (False, True):
    counted.calls.clear()
    data = LabelDataset(URL, ["frames/frame", "mean/mean", "counter/points"])
    assert len(data) == len(want) and counted.calls["put"] == 0
    for i in (0, 60, len(data) - 1):
      a, b = data[i], want[i]
      assert (a["frames/frame"] == b["frames/frame"]).all() and (a["mean/mean"] == b["mean/mean"]).all()
      assert {k: list(v) for k, v in a["counter/points"].items()} == {
        k: list(v) for k, v in b["counter/points"].items()
      }
    # nothing but the index, store.json and sources.yaml
    assert counted.calls["get"] == 3 if again else counted.calls["get shard"] > 0
  # another version of a chunk is fetched, what is gone is not there
  group = next(g for g in LabelStore(URL).groups("mean") if g.segment.endswith("0"))
  name = next(n for n in objects(store) if n.startswith(f"{group.name}/mean.zarr/c/0"))
  obstore.put(store, name, bytes(obstore.get(store, name).bytes())[:-1] + b"x")
  obstore.delete(store, f"{group.name}/chunks/00001.json")
  group = next(g for g in LabelStore(URL).groups("mean") if g.segment.endswith("0"))
  assert group.done() == {0} and "is not what was written" in next(group.problems())[1]


def test_the_index_is_not_trusted(route, local, memory, capsys):
  store, counted = memory
  fill(store, local)
  LabelStore(URL, writes=True).finish()
  names = [g.name for g in LabelStore(URL).groups()]
  obstore.put(store, INDEX, json.dumps({"groups": [*names, "x--0/none-1"]}).encode())
  assert [g.name for g in LabelStore(URL).groups()] == names
  for damaged in (b"{", b'{"groups": ["../../x/y"]}', b'{"groups": 5}'):
    obstore.put(store, INDEX, damaged)
    assert [g.name for g in LabelStore(URL).groups()] == names
  assert "is damaged; the store is listed instead" in capsys.readouterr().err
  obstore.delete(store, INDEX)
  counted.calls.clear()
  assert [g.name for g in LabelStore(URL).groups()] == names and counted.calls["list_with_delimiter"] == 3
  # a new group takes the index away, so that nobody misses it
  obstore.put(store, INDEX, b'{"groups": []}')
  run_teacher(Small(), views_of(route)[:1], LabelStore(URL, create=True), every=1, progress=False)
  assert len(LabelStore(URL).groups()) == len(names) + 1


def test_what_is_said_names_the_url(local, memory):
  """Not the mirror of this process, in which no command would find or mend anything."""
  store, _ = memory
  fill(store, local)
  LabelStore(URL, writes=True).finish()
  with pytest.raises(UserError, match=f"^{URL} holds nothing that teaches 'depth'.*--out {URL}`$"):
    Clips(URL, ["depth"], 2)
  group = next(g for g in LabelStore(URL).groups("mean"))
  for n in [n for n in objects(store) if n.startswith(f"{group.name}/")]:
    obstore.put(store, n.replace("/mean-", "/mean-0"), bytes(obstore.get(store, n).bytes()))
  obstore.delete(store, INDEX)
  with pytest.raises(UserError, match=f"delete one: {URL}/.* or {URL}/"):
    LabelStore(URL).by_segment({"mean"})


def test_groups_come_in_the_order_of_a_folder(memory, tmp_path):
  """A student's clips, and so what it learns, follow it."""
  store, _ = memory
  write_store(tmp_path / "s", n=8)
  first = sorted((tmp_path / "s").glob("*--*"))[0]
  for name in ("cars", "cars-2", "cars 3"):
    (tmp_path / "s" / name).mkdir()
    for group in first.iterdir():
      shutil.copytree(group, tmp_path / "s" / name / group.name)
  fill(store, tmp_path / "s")
  LabelStore(URL, writes=True).finish()
  assert [g.name for g in LabelStore(URL).groups()] == [g.name for g in LabelStore(tmp_path / "s").groups()]


def test_two_writers_share_and_a_broken_run_goes_on(route, local, memory):
  store, _ = memory
  views = views_of(route)

  class Broken(Mean):
    def label(self, clip, state=None):
      if len(self.calls) == 9:
        raise KeyboardInterrupt
      return super().label(clip, state)

  with pytest.raises(KeyboardInterrupt):
    run_teacher(Broken(), views, LabelStore(URL, create=True), every=2, progress=False)
  assert 0 < len([n for n in objects(store) if "/chunks/" in n]) < 3
  teachers = [Mean(), Mean()]
  threads = [
    threading.Thread(
      target=run_teacher, args=(t, views, LabelStore(URL, create=True)), kwargs={"every": 2, "progress": False}
    )
    for t in teachers
  ]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  want = {k: v for k, v in contents(local).items() if "/mean-" in k or k == "store.json"}
  assert objects(store) == want and sum(sum(t.calls) for t in teachers) < 110


class Flaky:
  """A WSGI application whose every nth request goes wrong."""

  def __init__(self, app):
    self.app, self.n, self.every, self.refuse = app, 0, 0, ""

  def __call__(self, environ, start_response):
    self.n += 1
    if environ["REQUEST_METHOD"] in self.refuse.split():
      start_response("403 Forbidden", [("Content-Type", "application/xml")])
      return [b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"]
    if self.every and self.n % self.every == 0:
      kind = self.n // self.every % 3
      if kind == 0:
        start_response("500 Internal Server Error", [("Content-Type", "application/xml")])
        return [b"<Error><Code>InternalError</Code></Error>"]
      if kind == 1:
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return []
      time.sleep(0.2)
    return self.app(environ, start_response)


@pytest.fixture(scope="module")
def server():
  pytest.importorskip("moto", reason="moto is not installed")
  from moto.server import DomainDispatcherApplication, create_backend_app
  from werkzeug.serving import make_server

  flaky = Flaky(DomainDispatcherApplication(create_backend_app))
  made = make_server("127.0.0.1", 0, flaky, threaded=True)
  thread = threading.Thread(target=made.serve_forever, daemon=True)
  thread.start()
  flaky.url = f"http://127.0.0.1:{made.server_port}"
  urllib.request.urlopen(urllib.request.Request(f"{flaky.url}/labels", method="PUT"))
  yield flaky
  made.shutdown()


@pytest.fixture
def s3(server, monkeypatch, tmp_path):
  for name, value in {
    "ENDPOINT_URL": server.url,
    "ACCESS_KEY_ID": "x",
    "SECRET_ACCESS_KEY": "y",
    "REGION": "us-east-1",
  }.items():
    monkeypatch.setenv(f"AWS_{name}", value)
  monkeypatch.setenv("FAIR_CACHE", str(tmp_path / "cache"))
  monkeypatch.setitem(remote.RETRIES, "backoff", {"init_backoff": remote.timedelta(milliseconds=5)})
  yield server
  server.every, server.refuse = 0, ""


def test_a_server_that_stumbles_changes_nothing(route, local, s3):
  s3.every = 7
  label_into(f"{URL}/stumbles", views_of(route))
  want = LabelDataset(local, ["frames/frame", "mean/mean"])
  data = LabelDataset(f"{URL}/stumbles", ["frames/frame", "mean/mean"])
  assert len(data) == len(want)
  for i in range(0, len(data), 9):
    assert all(np.array_equal(data[i][k], want[i][k]) for k in ("frames/frame", "mean/mean"))
  s3.every = 0
  store = remote.open_url(f"{URL}/stumbles")
  assert objects(store) == contents(local)


@pytest.mark.parametrize("how", ["bucket", "read-only", "credentials"])
def test_what_cannot_be_written_is_one_line(how, route, s3, monkeypatch, capsys):
  from openpilot.tools.fair.labels import label, loading

  url, says = (
    "s3://labels/x",
    {"bucket": "there is no such bucket", "read-only": "no permission", "credentials": "no credentials"},
  )
  if how == "bucket":
    url = "s3://nowhere/x"
  elif how == "read-only":
    s3.refuse = "PUT POST"
  else:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(remote.RETRIES, "max_retries", 1)
  monkeypatch.setattr(loading, "load_teachers", lambda args: [Mean()])
  monkeypatch.setattr("sys.argv", ["label", str(route), "--teachers", "mean", "--focal", "110", "--output", url])
  assert cli(label.main)() == 2
  err = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning: ")]
  assert len(err) == 1 and says[how] in err[0] and url in err[0], err


def test_labels_lists_a_store_by_its_url(local, memory, monkeypatch, capsys):
  fill(memory[0], local)
  monkeypatch.setattr("sys.argv", ["labels", URL])
  assert cli(browse.main)() == 0
  assert "mean" in capsys.readouterr().out


@pytest.mark.parametrize("module", [agree, plane])
def test_what_is_missing_is_told_by_the_stores_url(local, memory, monkeypatch, capsys, module):
  """A path of it has one slash less."""
  fill(memory[0], local)
  monkeypatch.setattr("sys.argv", ["x", URL])
  assert cli(module.main)() == 2
  err = capsys.readouterr().err
  assert f"error: {URL} has no segment that" in err and "s3:/labels" not in err


def test_students_and_evaluation_read_it(memory, tmp_path):
  """What they read is there before workers are forked, which cannot fetch."""
  _, counted = memory
  write_store(tmp_path / "s", n=8)
  write_store(URL, n=8)
  here, there = Clips(tmp_path / "s", ["segmentation", "depth"], 2), Clips(URL, ["segmentation", "depth"], 2)
  counted.calls.clear()
  assert len(here) == len(there) > 10
  a, b = (Batches(c, 0, False)[(0, [0, len(here) - 1], False)] for c in (here, there))
  assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in ("frame", "depth", "segmentation"))
  assert not counted.calls
  found = open_segments(remote.Path(URL), {"simulator"}, [])
  assert [s.name for s in found] == [s.name for s in open_segments(tmp_path / "s", {"simulator"}, [])]


def test_routes_come_through_a_server_that_stumbles(route, s3, tmp_path, monkeypatch):
  from openpilot.tools.fair.labels import label, loading

  store = remote.open_url("s3://labels/routes")
  fill(store, route)
  s3.every = 3
  monkeypatch.setattr(loading, "load_teachers", lambda args: [Mean()])
  for place, out in ((route, "want"), ("s3://labels/routes", "s")):
    words = [str(place), "--teachers", "x", "--focal", "110", "--every", "2", "--output", str(tmp_path / out)]
    monkeypatch.setattr("sys.argv", ["label", *words])
    assert cli(label.main)() == 0
  assert contents(tmp_path / "s") == contents(tmp_path / "want")

"""Routes that lie elsewhere, and how much of what was fetched is kept."""

import os
import pickle
import subprocess
import sys
import weakref

import pytest
from test_label_claims import Mean, Small, contents
from test_label_claims import route as small_route
from test_label_remote import Counted, fill, obstore

from openpilot.tools.fair.distillation.initial import place
from openpilot.tools.fair.labels import label, loading, mirrors, remote
from openpilot.tools.fair.labels.fetching import run_folder
from openpilot.tools.fair.labels.mirrors import make_room, release, unit, units, use
from openpilot.tools.fair.labels.sources import SourceOptions, find_pieces
from openpilot.tools.lib.errors import UserError, cli

route = small_route  # a fixture of theirs
URL = "s3://bucket/routes"
TOLD = SourceOptions(focal=110.0)


@pytest.fixture
def memory(monkeypatch, tmp_path):
  """-> the objects of all buckets, and what is asked."""
  store, counted = obstore.store.MemoryStore(), Counted()
  monkeypatch.setattr(remote, "open_url", lambda url: store)
  real = remote.Bucket.__init__

  def init(self, url):
    real(self, url)
    self.obstore = counted

  monkeypatch.setattr(remote.Bucket, "__init__", init)
  monkeypatch.setenv("FAIR_CACHE", str(tmp_path / "cache"))
  return store, counted


def run(monkeypatch, capsys, place, out):
  monkeypatch.setattr(loading, "load_teachers", lambda args: [Mean(), Small()])
  words = [str(place), "--teachers", "x", "--focal", "110", "--every", "2", "--output", str(out)]
  monkeypatch.setattr("sys.argv", ["label", *words])
  code = cli(label.main)()
  return code, capsys.readouterr().err


def test_labels_of_a_bucket_s_routes_are_those_of_a_folder_s(route, tmp_path, memory, monkeypatch, capsys):
  store, counted = memory
  fill(store, route)
  obstore.put(store, "0000002c--d68dde99ca--0/dcamera.hevc", b"nobody wants it")
  obstore.put(store, "notes.txt", b"nor that")
  assert run(monkeypatch, capsys, route, tmp_path / "want")[0] == 0
  assert run(monkeypatch, capsys, URL, tmp_path / "s")[0] == 0
  assert contents(tmp_path / "s") == contents(tmp_path / "want")
  assert counted.calls["get"] == 2  # the videos, once for all teachers
  assert run(monkeypatch, capsys, URL, tmp_path / "again")[0] == 0
  assert counted.calls["get"] == 2
  assert run(monkeypatch, capsys, f"file://{route}", tmp_path / "file")[0] == 0
  assert contents(tmp_path / "file") == contents(tmp_path / "want")
  first = "0000002c--d68dde99ca--0/qcamera.ts"
  obstore.put(store, first, (route / "0000002c--d68dde99ca--1" / "qcamera.ts").read_bytes())
  assert len(find_pieces([URL], TOLD)[0].open().entries) == 70  # another version is fetched anew


def test_segments_are_found_as_in_a_folder(route, memory):
  """In openpilot's layouts, a part of them, and a job can go to another process."""
  store, _ = memory
  fill(store, route)
  for k in range(2):
    video = bytes(obstore.get(store, f"0000002c--d68dde99ca--{k}/qcamera.ts").bytes())
    obstore.put(store, f"flat_0000002d--e68dde99ca--{k}--qcamera.ts", video)
  names = [p.name for p in find_pieces([URL], TOLD)]
  assert names == [f"{r}--{k}" for r in ("0000002c--d68dde99ca", "flat_0000002d--e68dde99ca") for k in range(2)]
  piece = pickle.loads(pickle.dumps(find_pieces([URL], TOLD)[1]))
  assert piece.size == len(bytes(obstore.get(store, "0000002c--d68dde99ca--1/qcamera.ts").bytes()))
  assert len(piece.open().entries) == 70


@pytest.mark.parametrize("name", ["../up/qcamera.ts", "a/../../0000002c--d68dde99ca--1/qcamera.ts", "x.ts"])
def test_names_that_lead_elsewhere_are_left_out(name, memory, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(remote.Bucket, "names", lambda self, prefix: {name: "tag 10"})
  code, err = run(monkeypatch, capsys, URL, tmp_path / "s")
  lines = [x for x in err.splitlines() if not x.startswith("warning: ")]
  assert code == 2 and len(lines) == 1 and f"no segment with video at {URL}" in lines[0]
  assert not (tmp_path / "s").exists()


def test_an_empty_bucket_and_one_that_vanishes(route, memory, tmp_path, monkeypatch, capsys):
  code, err = run(monkeypatch, capsys, f"{URL}/nothing", tmp_path / "s")
  assert code == 2 and err.count("\n") == 1 and f"no segment with video at {URL}/nothing" in err
  fill(memory[0], route)
  (piece, _) = find_pieces([URL], TOLD)
  obstore.delete(memory[0], "0000002c--d68dde99ca--0/qcamera.ts")
  with pytest.raises(UserError, match=r"s3://bucket/routes/0000002c--d68dde99ca--0/qcamera\.ts is gone"):
    piece.open()


def test_a_run_is_fetched_once_without_its_samples(memory):
  store, counted = memory
  for name in ("best.pt", "graphs/a.onnx", "samples/000100.png"):
    obstore.put(store, name, name.encode())
  for text, part in ((URL, ""), (f"{URL}:objects", "objects")):
    folder, found = place(text)
    assert found == part and (folder / "best.pt").read_bytes() == b"best.pt" and counted.calls["get"] == 2
  assert (folder / "graphs" / "a.onnx").exists() and not (folder / "samples").exists()
  obstore.put(store, "best.pt", b"another")
  obstore.delete(store, "graphs/a.onnx")
  assert run_folder(remote.Path(URL)) == folder and (folder / "best.pt").read_bytes() == b"another"
  assert not (folder / "graphs" / "a.onnx").exists() and counted.calls["get"] == 3
  assert place("file:///tmp/x") == (remote.Path("/tmp/x"), "") and place("/nowhere:a") == (remote.Path("/nowhere"), "a")


@pytest.mark.parametrize("name", ["../best.pt", "a/../../best.pt"])
def test_a_run_with_names_that_lead_elsewhere_is_refused(name, memory, monkeypatch):
  monkeypatch.setattr(remote.Bucket, "names", lambda self, prefix: {name: "tag 10"})
  with pytest.raises(UserError, match="is no name of a file in a folder"):
    run_folder(URL)
  monkeypatch.setattr(remote.Bucket, "names", lambda self, prefix: {})
  with pytest.raises(UserError, match="there is nothing at s3://bucket/routes"):
    run_folder(URL)


# *** how much is kept ***


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """(name, bytes, age in s) -> a unit that was used then."""
  monkeypatch.setenv("FAIR_CACHE", str(tmp_path))
  monkeypatch.setenv("FAIR_CACHE_LIMIT", "0.000001")  # 1000 bytes
  mirrors.say_too_much.cache_clear()

  def make(name, size, age):
    folder = unit("routes", name)
    use(folder, "")
    (folder / "video").write_bytes(bytes(size))
    release(folder)
    before = (folder / ".used").stat().st_mtime - age
    os.utime(folder / ".used", (before, before))
    return folder

  return make


def test_what_was_not_used_for_longest_goes_first_and_it_is_said(cache, capsys):
  old, new, older = cache("old", 400, 20), cache("new", 400, 10), cache("older", 150, 30)
  make_room()
  assert older.exists() and not capsys.readouterr().err
  make_room(300)
  assert not older.exists() and not old.exists() and new.exists() and len(list(units())) == 1
  assert "removed 0.00 GB that was not used for longest" in capsys.readouterr().err
  use(new, "")
  make_room(700)
  make_room(700)
  assert new.exists()  # in use
  err = capsys.readouterr().err
  assert err.count("\n") == 1 and "takes more than FAIR_CACHE_LIMIT of 1e-06 GB; it is exceeded" in err
  use(new, "")
  release(new)
  make_room(700)
  assert new.exists()  # still, once
  release(new)
  make_room(700)
  assert not new.exists()


def test_what_another_process_uses_stays_and_of_a_dead_one_it_does_not(cache):
  folder = cache("a", 2000, 5)
  code = f"""
import sys
from pathlib import Path
from openpilot.tools.fair.labels.mirrors import use
use(Path({str(folder)!r}), "")
print(flush=True)
sys.stdin.read()
"""
  with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
    assert other.stdout is not None
    other.stdout.readline()
    make_room()
    assert folder.exists()
    other.kill()
  make_room()
  assert not folder.exists()


def test_a_segment_is_in_use_as_long_as_its_view(route, memory, monkeypatch):
  fill(memory[0], route)
  monkeypatch.setenv("FAIR_CACHE_LIMIT", "0")
  mirrors.say_too_much.cache_clear()
  one, two = find_pieces([URL], TOLD)
  first = one.open()
  kept, gone = first.segment.dir, weakref.ref(first)
  two.open()
  assert kept.exists()
  del first
  assert gone() is None
  make_room()
  assert not kept.exists()


@pytest.mark.parametrize("text", ["much", "-1", "nan", "1e30"])
def test_a_limit_that_is_none_is_one_line(text, cache, monkeypatch):
  monkeypatch.setenv("FAIR_CACHE_LIMIT", text)
  with pytest.raises(UserError, match=f"FAIR_CACHE_LIMIT={text} is no number of GB"):
    make_room()

"""Compiled C: whatever the cache, the home folder and CC are."""

import ctypes
import os
from pathlib import Path

import pytest

from openpilot.tools.lib import native
from openpilot.tools.lib.errors import UserError

build = native.compile_library.__wrapped__  # without this process's memory


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.delenv("CC", raising=False)
  path = tmp_path / "six.c"
  path.write_text("int six(void) { return 6; }\n")
  return path


def kept(tmp_path) -> list[Path]:
  return sorted((tmp_path / "cache" / "openpilot-fair").glob("*"))


def test_another_machines_is_not_taken(source, tmp_path, monkeypatch):
  assert build(source).six() == 6
  (first,) = kept(tmp_path)
  before = first.stat().st_mtime_ns
  assert build(source).six() == 6 and first.stat().st_mtime_ns == before and len(kept(tmp_path)) == 1
  monkeypatch.setattr(native.platform, "machine", lambda: "aarch64")  # a home folder that two machines share
  assert build(source).six() == 6
  assert len(kept(tmp_path)) == 2


def test_a_damaged_one_is_made_anew(source, tmp_path):
  build(source)
  (path,) = kept(tmp_path)
  path.unlink()
  path.write_bytes(b"\x7fELF of another machine")
  assert build(source).six() == 6 and kept(tmp_path) == [path]


def test_no_place_to_keep_it(source, tmp_path, monkeypatch):
  (tmp_path / "file").touch()
  for home in (tmp_path / "file", Path("/proc/none")):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    assert isinstance(build(source), ctypes.CDLL) and build(source).six() == 6
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
  assert build(source).six() == 6


def test_wrong_compilers(source, tmp_path, monkeypatch):
  for cc, said in (
    ("nosuchcc -O1", "CC=nosuchcc -O1 names no program"),
    (str(tmp_path), "names no program"),
    ("false", "'false' could not compile six.c"),
  ):
    monkeypatch.setenv("CC", cc)
    with pytest.raises(UserError, match=said):
      build(source)
  monkeypatch.setenv("CC", "")
  monkeypatch.setenv("PATH", "/nowhere")
  with pytest.raises(UserError, match="no C compiler"):
    build(source)
  assert kept(tmp_path) == []  # nothing half-written


def test_what_does_not_compile_is_one_line(source, tmp_path):
  source.write_text("int six(void) { return }\n")
  with pytest.raises(UserError, match="could not compile") as e:
    build(source)
  assert "\n" not in str(e.value) and kept(tmp_path) == [] and os.path.exists(source)

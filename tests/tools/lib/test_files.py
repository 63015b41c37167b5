"""Files that are hostile: each is refused before it takes time or memory."""

import io
import json
import os
import resource
import zipfile

import numpy as np
import pytest

from openpilot.tools.lib.errors import UserError, printable
from openpilot.tools.lib.files import MB, ordinary, read_arrays, read_bytes, read_header, read_json, read_yaml

READERS = [read_bytes, read_json, read_yaml, read_arrays]


@pytest.fixture(autouse=True)
def little_memory():
  """A reader that takes a gigabyte fails here."""
  soft, hard = resource.getrlimit(resource.RLIMIT_AS)
  with open("/proc/self/statm") as f:
    used = int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
  resource.setrlimit(resource.RLIMIT_AS, (used + 1024 * MB, hard))
  yield
  resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("read", READERS)
def test_what_is_no_ordinary_file_is_not_opened(tmp_path, read):
  os.mkfifo(tmp_path / "pipe")
  for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
    with pytest.raises(UserError, match="no ordinary file") as e:
      read(path)
    assert "\n" not in str(e.value)
  with pytest.raises(FileNotFoundError):
    read(tmp_path / "none")
  with pytest.raises(OSError):
    read(tmp_path / ("x" * 5000))


@pytest.mark.parametrize("read", READERS)
def test_what_is_too_large_is_not_read(tmp_path, read):
  path = tmp_path / "large"
  with open(path, "wb") as f:
    f.truncate(1 << 40)  # a hole
  with pytest.raises(UserError, match="1099511627776 bytes, more than"):
    read(path)
  path.write_bytes(b"12345")
  assert read_bytes(path, 5) == b"12345"
  with pytest.raises(UserError):
    read_bytes(path, 4)


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_headers_of_arrays(version):
  f = io.BytesIO()
  np.lib.format.write_array(f, np.zeros((3, 5), ">i2"), version)
  f.seek(0)
  assert read_header(f) == ((3, 5), np.dtype(">i2"))
  for bad in (b"", f.getvalue()[:20], b"\x93NUMPY\x04\x00" + f.getvalue()[8:]):
    with pytest.raises(ValueError, match="not an array"):
      read_header(io.BytesIO(bad))


def test_json(tmp_path):
  path = tmp_path / "x.json"
  path.write_text(json.dumps({"a": [1, 2.5, "é"]}))
  assert read_json(path) == {"a": [1, 2.5, "é"]}
  for bad in ("[" * 100_000, '{"a":' * 100_000, "", "{", "\x00", "nul"):
    path.write_text(bad)
    with pytest.raises(ValueError):
      read_json(path)
  path.write_bytes(b"\xff\xfe\xfa")
  with pytest.raises(ValueError):
    read_json(path)


LAUGHS = "a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
  f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_yaml(tmp_path):
  path = tmp_path / "x.yaml"
  path.write_text("classes: [car, person]\nscore: 0.3\n")
  assert read_yaml(path) == {"classes": ["car", "person"], "score": 0.3}
  for bad in (
    LAUGHS,
    "a: &a [*a]",
    "[" * 100_000,
    "a: b: c",
    "!!python/object/apply:os.system ['true']",
    "\x00",
    "x: !tag y",
  ):
    path.write_text(bad)
    with pytest.raises(ValueError) as e:
      read_yaml(path)
    assert "\n" not in str(e.value)


def npy(header: str, data: bytes = b"") -> bytes:
  text = header.encode() + b"\n"
  return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def test_arrays(tmp_path):
  path = tmp_path / "x.npz"
  want = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(True)}
  for save in (np.savez, np.savez_compressed):
    save(path, **want)
    got = read_arrays(path)
    assert got.keys() == want.keys() and all(
      np.array_equal(got[k], want[k]) and got[k].dtype == want[k].dtype for k in want
    )
  bombs = {
    "claims 34 GB": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (8500000000,), }"),
    "zeros": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (2000000,), }", bytes(2_000_000)),
  }
  for data in bombs.values():
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
      z.writestr("a.npy", data)
    with pytest.raises(UserError, match="more than such a file may have"):
      read_arrays(path, 1_900_000)
  buffer = io.BytesIO()
  np.save(buffer, np.array([{"code": 1}], object), allow_pickle=True)
  for bad in (
    buffer.getvalue(),
    npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }"),
    npy("[" * 5000),
    b"no array",
    npy("{}"),
  ):
    with zipfile.ZipFile(path, "w") as z:
      z.writestr("a.npy", bad)
    with pytest.raises(ValueError):
      read_arrays(path)
  whole = path.read_bytes()
  for bad in (b"", b"PK", whole[:50], whole[:-10]):
    path.write_bytes(bad)
    with pytest.raises(ValueError):
      read_arrays(path)


def test_names_that_go_to_a_terminal():
  assert printable("a\x1b[2J\x1b]0;title\x07b\nc\u202e") == "a\\x1b[2J\\x1b]0;title\\x07b c\\u202e"
  assert len(printable("x" * 5000, 200)) < 210 and printable("naïve — 日本") == "naïve — 日本"


def test_ordinary_follows_links(tmp_path):
  (tmp_path / "a").write_text("x")
  (tmp_path / "b").symlink_to(tmp_path / "a")
  assert ordinary(tmp_path / "b") == tmp_path / "b" and read_bytes(tmp_path / "b") == b"x"

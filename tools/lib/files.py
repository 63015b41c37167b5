"""Reading files from elsewhere: only ordinary files, whose size is checked first; JSON, YAML and arrays, never code.
And writing files atomically."""

import contextlib
import datetime
import errno
import functools
import hashlib
import json
import math
import os
import platform
import re
import stat
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.tools.lib.errors import SYSTEM, UserError, printable, system_errno

MB = 1 << 20
JSON_LIMIT, YAML_LIMIT, ARRAYS_LIMIT = 256 * MB, MB, 1024 * MB
MANY = 10_000_000  # entries of one table or list
LONG = 200  # characters of a name in a message


def ordinary(path: str | Path, limit: float = math.inf) -> Path:
  """The path, if it is an ordinary file of at most `limit` bytes: reading a pipe or a device might never end. Raises
  FileNotFoundError, UserError."""
  about = os.stat(path)
  if not stat.S_ISREG(about.st_mode):
    raise UserError(f"{printable(path, LONG)} is no ordinary file; copy the file itself")
  if about.st_size > limit:
    raise UserError(
      f"{printable(path, LONG)} has {about.st_size} bytes, more than the {limit:.0f} that such a file may have"
    )
  return Path(path)


def ordinary_size(path: str | Path) -> int:
  """Size of an ordinary file in bytes. Raises UserError where there is none."""
  try:
    return ordinary(path).stat().st_size
  except (OSError, ValueError) as e:
    raise UserError(f"cannot read {printable(path, LONG)}: {getattr(e, 'strerror', None) or e}") from None


def read_bytes(path: str | Path, limit: int = JSON_LIMIT) -> bytes:
  """Raises OSError where it cannot be read, UserError where it is no ordinary file or larger than `limit`."""
  with open(ordinary(path, limit), "rb") as f:
    data = f.read(limit + 1)
  if len(data) > limit:  # it grew
    raise UserError(f"{printable(path, LONG)} has over {limit} bytes, more than such a file may have")
  return data


def read_json(path: str | Path, limit: int = JSON_LIMIT) -> Any:
  """Raises OSError, UserError (see read_bytes), and ValueError where it is no JSON; nested too deeply counts as
  none."""
  try:
    return json.loads(read_bytes(path, limit))
  except RecursionError:
    raise ValueError("it is nested too deeply") from None


def read_yaml(path: str | Path, limit: int = YAML_LIMIT) -> Any:
  """Plain values only. Raises OSError, UserError, and ValueError where it is no YAML, is nested too deeply, or has
  aliases, with which a few lines can expand to gigabytes."""
  import yaml

  class Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
      if self.check_event(yaml.AliasEvent):
        raise yaml.YAMLError("it has aliases (*name), which are not read; write the values out")
      return super().compose_node(parent, index)

  try:
    return yaml.load(read_bytes(path, limit), Loader)  # a SafeLoader: no objects
  except RecursionError:
    raise ValueError("it is nested too deeply") from None
  except yaml.YAMLError as e:
    raise ValueError(printable(e, LONG)) from None


def read_header(f: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
  """Shape and dtype in an .npy file's header. Raises ValueError, also for the many errors that numpy's parser
  raises."""
  try:
    version = np.lib.format.read_magic(f)
    shape, _, dtype = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
      version
    ](f)
    return shape, dtype
  except (OSError, MemoryError):
    raise
  except Exception as e:
    raise ValueError(f"it holds something that is not an array ({printable(e, 80)})") from None


def read_arrays(path: str | Path, limit: int = ARRAYS_LIMIT) -> dict[str, np.ndarray]:
  """An .npz of at most `limit` bytes when unpacked, no objects in it. Raises OSError, UserError, ValueError."""
  try:
    with zipfile.ZipFile(ordinary(path, limit)) as z:
      total = 0
      for member in z.infolist():
        with z.open(member) as f:
          shape, dtype = read_header(f)
        if dtype.hasobject or min(shape, default=0) < 0:
          raise ValueError(
            f"{printable(member.filename, LONG)} holds objects, which are code, or is of an impossible shape"
          )
        total += math.prod(shape) * dtype.itemsize
        if total > limit:
          raise UserError(f"{printable(path, LONG)} holds arrays of over {limit} bytes, more than such a file may have")
    with np.load(path, allow_pickle=False) as arrays:
      return dict(arrays)
  except (zipfile.BadZipFile, EOFError, KeyError, NotImplementedError, RuntimeError, zipfile.zlib.error) as e:  # type: ignore[attr-defined]
    raise ValueError(f"it is not a complete .npz ({printable(e, LONG)})") from None


# *** writing ***

STALE = 24 * 3600.0  # s after which a temporary file counts as left behind, where its process cannot be checked
_TEMPORARY = re.compile(r"\..+\.tmp(?:([0-9a-f]{6})-)?(\d+)(?:\..*)?")
_swept: set[Path] = set()


@functools.cache
def machine_id() -> str:
  """A hash of where this process's number is valid: this machine and its container."""
  with contextlib.suppress(OSError):
    return hashlib.sha256(f"{platform.node()} {os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[:6]
  return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


def process_runs(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except OSError:  # somebody else's
    return True
  return True


def still_runs(machine: str, pid: str) -> bool | None:
  """Whether the process of that number runs, of the machine of that machine_id(); None: of another, or no number, so
  that nobody here can tell."""
  return process_runs(int(pid)) if machine == machine_id() and pid.isdecimal() else None


def remove_left_behind(folder: Path) -> None:
  """Removes the temporary files that killed processes left in a folder: those of this machine at once, those of another
  after a day. A living process's files stay."""
  for path in folder.iterdir():
    found = _TEMPORARY.fullmatch(path.name)
    if found is None:
      continue
    with contextlib.suppress(OSError):
      old = datetime.datetime.now().timestamp() - path.lstat().st_mtime > STALE
      runs = still_runs(found[1], found[2])
      if old if runs is None else not runs:
        path.unlink()


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
  """A temporary path beside `path`. When the block succeeds it is renamed to `path`, else it is removed. Raises
  UserError on a full or read-only disk, or where `path` or a part of it is in the way."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
      raise UserError(f"{path} is a folder, not a file; name a file")
    if path.parent not in _swept:
      _swept.add(path.parent)
      remove_left_behind(path.parent)
    own = f"{machine_id()}-{os.getpid()}.{threading.get_native_id()}"
    tmp = path.with_name(f".{path.stem}.tmp{own}{path.suffix}")
    try:
      yield tmp
      os.replace(tmp, path)
    finally:
      tmp.unlink(missing_ok=True)
  except Exception as e:
    number, name = system_errno(e), getattr(e, "filename", None)
    # only errors of writing, not those of reading the source
    ours = name is None or Path(os.fsdecode(name)).parent in (path.parent, *path.parents)
    if number in (errno.ENOSPC, errno.EDQUOT) or (
      ours and number in (errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EEXIST)
    ):
      what, do = SYSTEM[number]
      raise UserError(f"{path} was not written: {what}; {do}") from e
    raise


def write_bytes(path: Path, data: bytes) -> None:
  """Atomically. Raises UserError as atomic_path() does."""
  with atomic_path(path) as tmp:
    tmp.write_bytes(data)


def write_json(path: Path, what: Any) -> None:
  """Readable, atomically. Raises UserError as atomic_path() does."""
  with atomic_path(path) as tmp:
    tmp.write_text(json.dumps(what, indent=1))

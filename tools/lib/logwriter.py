"""Writes logs: the messages one after the other, compressed as the file's suffix says."""
import bz2
import contextlib
import datetime
import errno
import functools
import hashlib
import os
import platform
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from openpilot.tools.lib.errors import SYSTEM, UserError, system_errno


STALE = 24 * 3600.0  # s after which a temporary file of a process that cannot be asked is taken for left behind
_TEMPORARY = re.compile(r"\..+\.tmp(?:([0-9a-f]{6})-)?(\d+)(?:\..*)?")
_swept: set[Path] = set()


@functools.cache
def _here() -> str:
  """Where this process's number means something: this machine, and its container."""
  with contextlib.suppress(OSError):
    return hashlib.sha256(f"{platform.node()} {os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[:6]
  return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


def _runs(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except OSError:  # somebody else's
    return True
  return True


def remove_left_behind(folder: Path) -> None:
  """Removes what killed processes left of atomic_path() in a folder: of this machine's at once, of another's after a day. A living process's stay."""
  for path in folder.iterdir():
    found = _TEMPORARY.fullmatch(path.name)
    if found is None:
      continue
    with contextlib.suppress(OSError):
      old = datetime.datetime.now().timestamp() - path.lstat().st_mtime > STALE
      if old if found[1] != _here() else not _runs(int(found[2])):
        path.unlink()


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
  """A temporary path beside `path` that becomes it when the block ends well, and is removed when it does not. A full or read-only disk, a folder in the way
  or in place of `path` raise UserError."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
      raise UserError(f"{path} is a folder, where a file is wanted; name a file")
    if path.parent not in _swept:
      _swept.add(path.parent)
      remove_left_behind(path.parent)
    tmp = path.with_name(f".{path.stem}.tmp{_here()}-{os.getpid()}{path.suffix}")
    try:
      yield tmp
      os.replace(tmp, path)
    finally:
      tmp.unlink(missing_ok=True)
  except Exception as e:
    number, name = system_errno(e), getattr(e, "filename", None)
    ours = name is None or Path(os.fsdecode(name)).parent in (path.parent, *path.parents)  # not of what was read to be written
    if number in (errno.ENOSPC, errno.EDQUOT) or (ours and number in (errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EEXIST)):
      what, do = SYSTEM[number]
      raise UserError(f"{path} was not written: {what}; {do}") from e
    raise


def write_log(path: str | Path, messages: Iterable[bytes]) -> int:
  """Serialized events -> path (.zst, .bz2, or raw), atomically. Returns how many. Raises UserError where the disk is full."""
  path = Path(path)
  n = 0
  with atomic_path(path) as tmp, open(tmp, "wb") as raw:
    out: Any
    if path.suffix == ".zst":
      out = zstandard.ZstdCompressor(level=6).stream_writer(raw, closefd=False)
    elif path.suffix == ".bz2":
      out = bz2.open(raw, "wb")
    else:
      out = contextlib.nullcontext(raw)
    with out as f:
      for m in messages:
        f.write(m)
        n += 1
  return n

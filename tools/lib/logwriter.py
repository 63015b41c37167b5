"""Writes logs: the messages one after the other, compressed as the file's suffix says."""
import bz2
import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from openpilot.tools.lib.errors import UserError


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
  """A temporary path beside `path` that becomes it when the block ends well, and is removed when it does not. A full disk raises UserError."""
  path.parent.mkdir(parents=True, exist_ok=True)
  tmp = path.with_name(f".{path.stem}.tmp{os.getpid()}{path.suffix}")
  try:
    yield tmp
    os.replace(tmp, path)
  except OSError as e:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
      raise UserError(f"the disk is full: {path} was not written; free some space and run the command again") from e
    raise
  finally:
    tmp.unlink(missing_ok=True)


def write_log(path: str | Path, messages: Iterable[bytes]) -> int:
  """Serialised events -> path (.zst, .bz2, or raw), atomically. Returns how many. Raises UserError where the disk is full."""
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

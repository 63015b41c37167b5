"""Writes logs: the messages one after the other, compressed by the file's suffix."""

import bz2
import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import zstandard

from openpilot.tools.lib.files import atomic_path


def write_log(path: str | Path, messages: Iterable[bytes]) -> int:
  """Serialized events -> path (.zst, .bz2, or raw), atomically. Returns how many. Raises UserError where the disk is
  full."""
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

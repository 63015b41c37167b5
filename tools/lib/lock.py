"""One process at a time in a folder."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from openpilot.tools.lib.errors import UserError


@contextlib.contextmanager
def only_one(folder: Path, message: str) -> Iterator[None]:
  """Holds `folder`/.lock for the block; a process that dies lets go of it. Raises UserError(message) where another one
  holds it."""
  with open(folder / ".lock", "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise UserError(message) from None
    yield

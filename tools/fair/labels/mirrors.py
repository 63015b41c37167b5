"""What is fetched from elsewhere, and kept on this machine below FAIR_CACHE until the room is wanted.

It is kept in units: a folder for each segment of a route, each label store, each run. Together they take at most
FAIR_CACHE_LIMIT (GB, by default 100): what was not used for longest goes first, and it is said. A unit that a process
uses stays, whatever the limit says."""

import atexit
import contextlib
import functools
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from hashlib import sha256
from pathlib import Path

from openpilot.tools.lib.errors import UserError, warn
from openpilot.tools.lib.files import machine_id, still_runs

KINDS = ("labels", "routes", "runs")
USED = ".used"  # folder of a unit, with a file for each process that uses it
DEFAULT = 100.0  # GB
STALE = 86400.0  # s after which a process of another machine, which cannot be asked for, is taken for gone
GB = 1e9
_held: Counter[Path] = Counter()  # units that this process uses


def cache_folder() -> Path:
  """FAIR_CACHE, else ~/.cache/openpilot-fair."""
  return Path(os.environ.get("FAIR_CACHE") or Path.home() / ".cache" / "openpilot-fair")


def limit() -> float:
  """Bytes. Raises UserError."""
  text = os.environ.get("FAIR_CACHE_LIMIT", "")
  try:
    value = float(text or DEFAULT)
  except ValueError:
    value = -1.0
  if not 0 <= value < 1e9:
    raise UserError(f"FAIR_CACHE_LIMIT={text[:40]} is no number of GB")
  return value * GB


def unit(kind: str, place: str) -> Path:
  """The folder of what is at `place`, a URL or another name of its own."""
  return cache_folder() / kind / sha256(place.encode()).hexdigest()[:16]


def own_mark() -> str:
  return f"{machine_id()}-{os.getpid()}"


def use(folder: Path, place: str) -> None:
  """From here on this process uses the unit, until it ends, or has called release() as often."""
  _held[folder] += 1
  (folder / USED).mkdir(parents=True, exist_ok=True)
  (folder / USED / own_mark()).write_text(f"{place}\n")


def release(folder: Path) -> None:
  _held[folder] -= 1
  if _held[folder] <= 0:
    _held.pop(folder)
    with contextlib.suppress(OSError):
      (folder / USED / own_mark()).unlink(missing_ok=True)


@atexit.register
def release_all() -> None:
  for folder in list(_held):
    _held[folder] = 1
    release(folder)


def users(folder: Path) -> list[Path]:
  """Marks of processes that use it; those of processes that are gone are removed."""
  out = []
  for mark in (folder / USED).iterdir() if (folder / USED).is_dir() else ():
    machine, _, pid = mark.name.partition("-")
    with contextlib.suppress(OSError):
      age = datetime.now().timestamp() - mark.stat().st_mtime
      runs = still_runs(machine, pid)
      if age < STALE if runs is None else runs:
        out.append(mark)
      else:
        mark.unlink(missing_ok=True)
  return out


def size_of(folder: Path) -> int:
  total = 0
  for path in folder.rglob("*"):
    with contextlib.suppress(OSError):
      total += path.stat().st_size if path.is_file() else 0
  return total


def units() -> Iterator[tuple[float, Path]]:
  """(when it was last begun or ended to be used, its folder)"""
  for kind in KINDS:
    place = cache_folder() / kind
    for folder in place.iterdir() if place.is_dir() else ():
      with contextlib.suppress(OSError):
        yield (folder / USED if (folder / USED).is_dir() else folder).stat().st_mtime, folder


def make_room(size: int = 0) -> None:
  """So that `size` more bytes stay below the limit: units that nobody uses are removed. Warns where that is not
  enough. Raises UserError."""
  most, there = limit(), sorted(units())
  sizes = {folder: size_of(folder) for _, folder in there}
  total = sum(sizes.values()) + size
  gone, count = 0, 0
  for _, folder in there:
    if total - gone <= most:
      break
    if users(folder):
      continue
    aside = folder.with_name(f".{folder.name}-{own_mark()}")
    with contextlib.suppress(OSError):
      folder.rename(aside)  # whoever comes now fetches it anew
      if users(aside):  # who came just before goes on with it
        aside.rename(folder)
        continue
      shutil.rmtree(aside, ignore_errors=True)
      gone, count = gone + sizes[folder], count + 1
  if count:
    print(
      f"{cache_folder()}: removed {gone / GB:.2f} GB that was not used for longest ({count} of {len(there)} kept), to "
      f"stay below FAIR_CACHE_LIMIT of {most / GB:g} GB",
      file=sys.stderr,
    )
  if total - gone > most:
    say_too_much(most)


@functools.cache
def say_too_much(most: float) -> None:
  """Once."""
  warn(f"{cache_folder()}: what is used at once takes more than FAIR_CACHE_LIMIT of {most / GB:g} GB; it is exceeded")

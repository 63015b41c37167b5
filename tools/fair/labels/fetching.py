"""Files that lie elsewhere, fetched into a unit of mirrors.py: what is there already, in the same version, stays."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from openpilot.tools.fair.labels import mirrors
from openpilot.tools.fair.labels.remote import Bucket, folder_of, url_of
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import read_json, write_json

TAGS = ".tags.json"


@dataclass(frozen=True)
class There:
  """A file of a segment that lies elsewhere."""

  name: str  # below the place
  size: int  # bytes
  tag: str  # changes with its content


class Place(Protocol):
  """Where segments lie. It goes to other processes, which connect themselves."""

  @property
  def place(self) -> str:
    """By which it is known."""

  def download(self, name: str, path: Path) -> None:
    """Raises UserError."""


@dataclass(frozen=True)
class UrlPlace:
  place: str

  @functools.cached_property
  def bucket(self) -> Bucket:
    return Bucket(self.place)

  def __reduce__(self) -> Any:
    return UrlPlace, (self.place,)

  def download(self, name: str, path: Path) -> None:
    self.bucket.download(name, path)


def fetch(place: Place, folder: Path, files: Mapping[str, There]) -> None:
  """files: name in the folder, a unit of mirrors.py -> where it lies. What is there in another version is fetched anew.
  Raises UserError."""
  try:
    known = read_json(folder / TAGS)
    assert isinstance(known, dict)
  except (OSError, ValueError, AssertionError):
    known = {}
  lacking = {n: f for n, f in files.items() if known.get(n) != f.tag or not (folder / n).exists()}
  if lacking:
    mirrors.make_room(sum(f.size for f in lacking.values()))
  for n, f in lacking.items():
    place.download(f.name, folder / n)
    known[n] = f.tag
    write_json(folder / TAGS, known)


def listed(place: UrlPlace) -> dict[str, There]:
  """All that lies there, by name."""
  return {n: There(n, int(tag.rpartition(" ")[2]), tag) for n, tag in place.bucket.names("").items()}


def run_folder(run: str | Path) -> Path:
  """The folder of a run or a bundle: of one that is given by URL what was fetched of it, without its samples. Raises
  UserError."""
  url = url_of(run)
  if url is None:
    return folder_of(run)
  place = UrlPlace(url)
  files = {n: f for n, f in listed(place).items() if not n.startswith("samples/")}
  if wrong := [n for n in files if ".." in PurePosixPath(n).parts or n.startswith("/") or "\0" in n]:
    raise UserError(f"{url}: '{wrong[0][:80]}' is no name of a file in a folder")
  if not files:
    raise UserError(f"there is nothing at {url}")
  folder = mirrors.unit("runs", url)
  mirrors.use(folder, url)
  for path in sorted(p for p in folder.rglob("*") if p.is_file() and mirrors.USED not in p.parts):
    if path.relative_to(folder).as_posix() not in (*files, TAGS):
      path.unlink(missing_ok=True)
  fetch(place, folder, files)
  return folder

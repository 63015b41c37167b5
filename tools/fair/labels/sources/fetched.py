"""Routes that lie elsewhere: s3://BUCKET/ROUTES, gs://BUCKET/ROUTES, and those of comma connect. What is there is
listed; a segment's video and log are fetched when it is opened, and kept as mirrors.py says."""

import functools
import re
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from openpilot.tools.fair.labels import mirrors
from openpilot.tools.fair.labels.fetching import Place, There, UrlPlace, fetch, listed
from openpilot.tools.fair.labels.remote import url_of
from openpilot.tools.fair.labels.sources.routes import RoutePiece
from openpilot.tools.fair.labels.sources.source import SourceOptions
from openpilot.tools.fair.labels.views import SegmentView
from openpilot.tools.lib.cameras import VIDEOS
from openpilot.tools.lib.connect import Connect, parse_route
from openpilot.tools.lib.errors import Unreadable, UserError, warn
from openpilot.tools.lib.route import FLAT, NAMES, RANGE, Route, Segment, segments_in

CONNECT = "connect:"  # before a route of connect's


@dataclass(frozen=True)
class ConnectPlace:
  dongle: str
  log: str

  @property
  def place(self) -> str:
    return f"{CONNECT}{self.dongle}|{self.log}"

  @functools.cached_property
  def route(self) -> Connect:
    return Connect(self.dongle, self.log)

  def __reduce__(self) -> Any:
    return ConnectPlace, (self.dongle, self.log)

  def download(self, name: str, path: Path) -> None:
    self.route.download(name, path)


def video_of(there: Mapping[str, There], camera: str) -> str | None:
  """The kind of the camera's video, else of another that is there."""
  return next((k for k in (VIDEOS[camera], *VIDEOS.values()) if k in there), None)


@dataclass(frozen=True)
class FetchedPiece(RoutePiece):
  place: Place = field(default_factory=lambda: UrlPlace(""))
  there: Mapping[str, There] = field(default_factory=dict)  # kind -> where it lies

  def open(self) -> SegmentView:
    kinds = [video_of(self.there, self.camera), *[k for k in ("rlog", "qlog") if k in self.there][:1]]
    there = {k: self.there[k] for k in kinds if k is not None}
    names = {k: PurePosixPath(f.name).name.rpartition("--")[2] for k, f in there.items()}
    place = f"{self.place.place} {self.name}"
    folder = mirrors.unit("routes", place)
    mirrors.use(folder, place)
    try:
      fetch(self.place, folder, {names[k]: f for k, f in there.items()})
      files = {k: folder / n for k, n in names.items()}
      view = self.view(Segment(self.segment.route, self.segment.num, folder, files))
    except BaseException as e:
      if isinstance(e, Unreadable):  # a sign-in page, as it may be: fetched anew next time
        for n in names.values():
          (folder / n).unlink(missing_ok=True)
      mirrors.release(folder)
      raise
    weakref.finalize(view, mirrors.release, folder)
    return view


def outline(names: Iterable[str], folder: Path) -> None:
  """Empty files as a folder's that has these objects, of logs and videos alone. Names that lead elsewhere are left
  out."""
  for name in names:
    path = PurePosixPath(name)
    flat = FLAT.match(path.name)
    if path.name.lower() not in NAMES and not (flat and flat["file"] in NAMES):
      continue
    if path.is_absolute() or ".." in path.parts or "\0" in name or len(path.parts) > 8:
      warn(f"'{name[:80]}' is left out: it is no name of a file in a folder")
      continue
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).touch()


def pieces_at(
  place: Place, names: Mapping[str, There], folder: str, part: str, options: SourceOptions
) -> list[FetchedPiece]:
  """names: of objects below the place. folder: what their folder is called.
  part: a number or a slice of segments, or ''. Raises UserError where there is no segment with video."""
  with tempfile.TemporaryDirectory(prefix="fair-outline-") as tmp:
    root = Path(tmp).resolve() / folder
    root.mkdir()
    outline(names, root)
    found = segments_in(root, 2)
    if part or not found:
      found = Route(f"{root}/{part}" if part else root).segments if any(root.iterdir()) else []
  out = []
  for s in found:
    there = {k: names[p.relative_to(root).as_posix()] for k, p in s.files.items()}
    video = video_of(there, options.camera)
    if video is None:
      warn(f"segment {s.name} in {place.place} has no video, it is left out")
      continue
    told = (options.camera, options.every, options.focal, options.horizon)
    out.append(FetchedPiece(s.name, s.route, there[video].size, None, s, *told, place, there))
  if not out:
    raise UserError(
      f"no segment with video at {place.place}{'/' if part else ''}{part}; teachers need fcamera.hevc, ecamera.hevc or "
      "qcamera.ts in folders as openpilot has them"
    )
  return out


def list_url(url: str) -> tuple[Place, dict[str, There], str]:
  """-> the place, its objects, and the part of it that is meant: url may end with /n or /first:last."""
  place = UrlPlace(url)
  names = listed(place)
  head, _, tail = url.rpartition("/")
  part = ""
  if not names and tail and RANGE.match(tail) and url_of(head):
    place, part = UrlPlace(head), tail
    names = listed(place)
  return place, names, part


class Elsewhere(ABC):
  """A source of routes that lie elsewhere."""

  @abstractmethod
  def found(self, path: str) -> tuple[Place, Mapping[str, There], str, str]:
    """What lies at one path -> as pieces_at() takes it. Raises UserError."""

  def pieces(self, paths: list[str], options: SourceOptions) -> list[FetchedPiece]:
    out: dict[str, FetchedPiece] = {}
    for path in paths:
      for piece in pieces_at(*self.found(path), options):
        out.setdefault(piece.name, piece)
    return list(out.values())


class RoutesOfConnect(Elsewhere):
  says = "a route of comma connect, as connect:DONGLE|LOG"

  def accepts(self, path: str, options: SourceOptions) -> bool:
    return path.startswith(CONNECT)

  def found(self, path: str) -> tuple[Place, Mapping[str, There], str, str]:
    dongle, log, part = parse_route(path.removeprefix(CONNECT))
    place = ConnectPlace(dongle, log)
    # sizes are not told: all segments count alike
    return place, {n: There(n, 1, "connect") for n in place.route.files()}, log, part


class RoutesByUrl(Elsewhere):
  says = "routes at s3://BUCKET/... or gs://BUCKET/..."

  def accepts(self, path: str, options: SourceOptions) -> bool:
    return url_of(path) is not None

  def found(self, path: str) -> tuple[Place, Mapping[str, There], str, str]:
    url = url_of(path)
    if url is None:
      raise UserError(f"{path} is no URL of a bucket")
    place, names, part = list_url(url)
    return place, names, re.sub(r"[^\w|.-]", "-", place.place.rpartition("/")[2]), part

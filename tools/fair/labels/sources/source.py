"""What is labeled, and where it comes from.

A source opens paths and yields parts; each part becomes one segment of a label store: frames in order with their ids
and sizes, how they are drawn into an input, and the labels that the data itself carries, if any. A part is a
views.SegmentView of a route, or pictures.Pictures: stills, or a subclass that reads them, and says what they carry, in
its own way."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from openpilot.tools.lib.errors import UserError, warn


@dataclass
class Said:
  """What the data says of one frame, in pixels of its own picture, integers at pixel centers.

  oriented: (N, 5) of each box, see selfdrive/modeld/fair/heads/oriented.py; or None. difficult: (N,) bool, of what need
  not be found; or None. masks: of each box a bool array (h, w), COCO's run lengths {'size': [h, w], 'counts': text}, a
  list of polygons (K, 2) counted from the picture's corner as COCO's are, or None. ids: (h, w) uint8, index into the
  classes, 255: unknown; or None."""

  boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))  # (N, 4) x0 y0 x1 y1, outer edges
  cls: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
  masks: list[Any] = field(default_factory=list)
  ids: np.ndarray | None = None
  oriented: np.ndarray | None = None
  difficult: np.ndarray | None = None


@dataclass(frozen=True)
class Piece:
  """A part that need not be opened yet: what a worker is told to label. It can be pickled."""

  name: str  # of the part in the store
  route: str  # pieces of one route follow each other
  size: int  # how much there is to do, in one measure for all of a source: bytes or frames
  part: Any = None

  def open(self) -> Any:
    """-> the part. Raises UserError."""
    return self.part


class Kind(Protocol):
  """Finds what lies at paths of one kind, or opens it. `accepts` is asked where --source names none; it must be quick
  and raise nothing."""

  says: str  # what it opens, for people

  def accepts(self, path: str, options: "SourceOptions") -> bool: ...


class Finds(Kind, Protocol):
  """Of parts that take long to open."""

  def pieces(self, paths: list[str], options: "SourceOptions") -> Sequence["Piece"]:
    """What is there, not opened. Raises UserError where there is nothing; what is left out is said (errors.warn)."""


class Opens(Kind, Protocol):
  def open(self, paths: list[str], options: "SourceOptions") -> list[Any]:
    """-> parts. Raises UserError where nothing of them can be used; what is left out is said (errors.warn)."""


Source = Finds | Opens


@dataclass(frozen=True)
class SourceOptions:
  """What sources may be told; each takes what concerns it."""

  data_dir: Path | None = None  # routes: where they lie
  camera: str = "road"  # routes
  every: int = 1  # of videos each Nth frame
  focal: float | str | None = None  # pixels, of a camera that is none of comma's; 'auto'
  horizon: float | str | None = None  # row of a video's picture; 'auto'
  aim: Path | None = None  # stills: focal length and horizon of each
  images: Path | None = None  # the folder that annotations name pictures of
  annotations: Path | None = None  # class maps
  classes: tuple[str, ...] = ()  # names of class ids, of data that does not name them
  palette: tuple[tuple[tuple[int, int, int], str], ...] = ()  # colors of class maps
  suffix: str = ""  # of a class map's name, behind its picture's
  name: str = ""  # of the data, else its folder's
  license: str = ""  # of the data, else what it says


SOURCES: dict[str, Source] = {}


def pieces_of(source: Source, paths: list[str], options: SourceOptions) -> Sequence[Piece]:
  """Raises UserError."""
  if hasattr(source, "pieces"):
    return source.pieces(paths, options)
  return [Piece(p.name, p.name, len(p.entries), p) for p in source.open(paths, options)]


def open_pieces(pieces: Sequence[Piece]) -> tuple[list[Any], dict[str, UserError]]:
  """-> the parts of those that can be opened, and by name why others cannot, which is said. Raises UserError where none
  can."""
  parts: list[Any] = []
  problems: dict[str, UserError] = {}
  for piece in pieces:
    try:
      parts.append(piece.open())
    except UserError as e:
      problems[piece.name] = e
  if problems and not parts:
    raise next(iter(problems.values()))
  for problem in problems.values():
    warn(f"{problem}; the segment is left out")
  return parts, problems


def register_source(name: str, source: Source) -> None:
  """Under that name for --source; of those that accept a path the one that was registered last opens it."""
  SOURCES.pop(name, None)
  SOURCES[name] = source

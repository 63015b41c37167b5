"""What is labeled, and where it comes from.

A source opens a path and yields parts; each part becomes one segment of a label store: frames in order with their ids
and sizes, how they are drawn into an input, and the labels that the data itself carries, if any."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.lib.encode_index import EncodeEntry
from openpilot.tools.lib.route import Segment


@dataclass(frozen=True)
class Canvas:
  """The picture that a teacher is given, or that is stored.

  wants: 'rgb', (height, width, 3) uint8; 'frame', what `input` says students see, as stored; 'none', no picture.
  view: of a route's camera, which view is rendered. letterbox, pad: of pictures, as InputSpec's."""

  wants: str = "rgb"
  width: int = VIEW_W
  height: int = VIEW_H
  view: str = "medmodel"
  letterbox: bool = True
  pad: int = 114
  input: InputSpec = field(default_factory=InputSpec)

  @property
  def shape(self) -> tuple[int, ...]:
    return {"none": (0,), "frame": self.input.shape}.get(self.wants, (self.height, self.width, 3))

  def fit(self, width: int, height: int) -> np.ndarray:
    """(3, 3) float64 from the pixels of a picture of this size to the canvas's, as InputSpec.fit()."""
    sx, sy = self.width / width, self.height / height
    if self.letterbox:
      sx = sy = min(sx, sy)
    return np.array([[sx, 0, 0.5 * sx - 0.5], [0, sy, 0.5 * sy - 0.5], [0, 0, 1]])


class Renderer(Protocol):
  """Draws the frames of one part. For one thread at a time."""

  def read(self, rows: list[int]) -> Iterator[tuple[int, Any]]:
    """(row, undrawn picture) of the rows asked for, in order; fewer where some cannot be read."""

  def draw(self, picture: Any, out: np.ndarray) -> np.ndarray: ...


@dataclass
class Said:
  """What the data says of one frame, in pixels of its own picture, integers at pixel centers.

  masks: of each box a bool array (h, w), a list of polygons (K, 2) counted from the picture's corner as COCO's are, or
  None. ids: (h, w) uint8, index into the classes, 255: unknown; or None."""

  boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))  # (N, 4) x0 y0 x1 y1, outer edges
  cls: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
  masks: list[Any] = field(default_factory=list)
  ids: np.ndarray | None = None


class Part(Protocol):
  """One segment of a store."""

  name: str  # '<route>--<n>'
  segment: Segment  # of the route; of pictures, one without files
  entries: list[EncodeEntry]
  rpy: np.ndarray | None
  still: bool  # no frame is a moment after the one before it

  def camera(self) -> dict[str, Any]:
    """What of the frames decides their labels, as JSON: size, calibration, hash of the files."""

  def renderer(self, canvas: Canvas) -> Renderer: ...


class Source(Protocol):
  """Opens paths of one kind. `accepts` is asked where --source names none; it must be quick and raise nothing."""

  says: str  # what it opens, for people

  def accepts(self, path: str, options: "SourceOptions") -> bool: ...

  def open(self, paths: list[str], options: "SourceOptions") -> list[Part]:
    """Raises UserError where nothing of them can be used; what is left out is said (errors.warn)."""


@dataclass(frozen=True)
class SourceOptions:
  """What sources may be told; each takes what concerns it."""

  data_dir: Path | None = None  # routes: where they lie
  camera: str = "road"  # routes
  every: int = 1  # of videos each Nth frame
  focal: float | None = None  # pixels, of a camera that is none of comma's
  images: Path | None = None  # the folder that annotations name pictures of
  annotations: Path | None = None  # class maps
  classes: tuple[str, ...] = ()  # names of class ids, of data that does not name them
  palette: tuple[tuple[tuple[int, int, int], str], ...] = ()  # colors of class maps
  suffix: str = ""  # of a class map's name, behind its picture's
  name: str = ""  # of the data, else its folder's
  license: str = ""  # of the data, else what it says


SOURCES: dict[str, Source] = {}


def register_source(name: str, source: Source) -> None:
  """Under that name for --source; of those that accept a path the one that was registered last opens it."""
  SOURCES.pop(name, None)
  SOURCES[name] = source

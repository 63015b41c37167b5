"""Folders of pictures, and videos of cameras that nobody knows: shown whole, letterboxed, without a log."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from openpilot.tools.fair.labels.placement import place_input, place_picture
from openpilot.tools.fair.labels.canvas import Canvas
from openpilot.tools.fair.labels.sources.source import Said, SourceOptions
from openpilot.tools.lib.encode_index import EncodeEntry, synthetic_index
from openpilot.tools.lib.errors import UserError, printable, warn
from openpilot.tools.lib.files import LONG, ordinary
from openpilot.tools.lib.framereader import FrameReader
from openpilot.tools.lib.pictures import PictureError, find_pictures, is_picture, read_rgb
from openpilot.tools.lib.route import VIDEO_SUFFIXES, Segment

LOOKED_AT = 100_000  # files of a folder, to see what it is
SHOWN = 5  # of what is left out, by name
STILL_NS = 100_000_000  # ns from a still to the next: nothing is meant by it
STILL_STEP = 2  # of ids: no still follows on another, and no clip holds two


@dataclass
class Still:
  """One picture that can be read. width, height: pixels, as it is shown."""

  path: Path
  name: str  # path below the data's folder, for people
  width: int
  height: int
  more: Any = None  # what its source needs of it


@dataclass
class Carries:
  """Of which kind the labels are that the frames of a part carry, and their classes."""

  boxes: tuple[str, ...] | None = None
  masks: bool = False
  oriented: bool = False
  maps: tuple[str, ...] | None = None


class PictureRenderer:
  """Letterboxes one part's pictures into a canvas."""

  def __init__(self, part: "Pictures", canvas: Canvas):
    self.part, self.canvas = part, canvas

  def read(self, rows: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    return self.part.read(rows)

  def draw(self, picture: np.ndarray, out: np.ndarray) -> np.ndarray:
    c = self.canvas
    if c.wants == "rgb":
      h, w = picture.shape[:2]
      out[:] = place_picture(picture, c.fit(w, h), c.width, c.height, c.pad)
      return out
    out[:] = place_input(picture, c.input)
    return out


class Pictures:
  """A part of stills, in the order given. Subclasses say what the data carries."""

  rpy: np.ndarray | None = None
  still = True

  def __init__(self, name: str, folder: Path, stills: list[Still], license: str = "", carries: Carries | None = None):
    self.name, self.license, self.carries = f"{plain_name(name)}--0", license or "unstated", carries or Carries()
    self.segment = Segment(plain_name(name), 0, folder, {}, False)
    self.keep(stills)

  def keep(self, stills: list[Still]) -> None:
    """These are the frames."""
    self.stills = stills
    self.entries = [EncodeEntry(i * STILL_STEP, 0, i, i * STILL_NS, i * STILL_NS) for i in range(len(stills))]

  def columns(self) -> dict[str, list[Any]]:
    """More of every frame than entries say: what frames.parquet has beside ids and times."""
    return {
      "width": [self.size(r)[0] for r in range(len(self.entries))],
      "height": [self.size(r)[1] for r in range(len(self.entries))],
      "name": [self.title(r) for r in range(len(self.entries))],
    }

  def size(self, row: int) -> tuple[int, int]:
    """(width, height) of a frame's picture, pixels."""
    return self.stills[row].width, self.stills[row].height

  def title(self, row: int) -> str:
    return self.stills[row].name

  @cached_property
  def hash(self) -> str:
    h = hashlib.sha256()
    for s in tqdm(self.stills, desc="hash", unit="picture", leave=False):
      h.update(f"{s.name}\n".encode())
      with open(ordinary(s.path), "rb") as f:
        h.update(hashlib.file_digest(f, "sha256").digest())
    return h.hexdigest()

  def camera(self) -> dict[str, Any]:
    widest = max((self.size(r) for r in range(len(self.entries))), default=(1, 1))
    return {
      "stream": "images" if self.still else "video",
      "width": widest[0],
      "height": widest[1],
      "intrinsics": np.eye(3).tolist(),  # not known
      "rpy": [0.0, 0.0, 0.0],
      "calibrated": False,
      "video": self.hash,
    }

  def renderer(self, canvas: Canvas, whole: Any = None) -> PictureRenderer:
    return PictureRenderer(self, canvas)

  def read(self, rows: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(row, (h, w, 3) uint8 RGB)."""
    for r in rows:
      try:
        yield r, read_rgb(self.stills[r].path)
      except PictureError as e:
        raise UserError(f"{e}; it could be read before: run the command again") from None

  def said(self, row: int) -> Said:
    return Said()


class Video(Pictures):
  """A video without a log; its frames one after the other."""

  still = False

  def __init__(self, path: Path, options: SourceOptions):
    super().__init__(options.name or path.stem, path.parent, [], options.license)
    self.path = path
    reader = FrameReader(path)
    self.pixels = reader.w, reader.h
    index = synthetic_index(reader.frame_count, reader.fps, seconds=reader.seconds)
    self.entries = [e for e in index if e.segment_id % options.every == 0]
    reader.close()

  def size(self, row: int) -> tuple[int, int]:
    return self.pixels

  def title(self, row: int) -> str:
    return f"{self.path.name} {self.entries[row].segment_id}"

  @cached_property
  def hash(self) -> str:
    with open(self.path, "rb") as f:
      return hashlib.file_digest(f, "sha256").hexdigest()

  def read(self, rows: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    if not rows:
      return
    wanted = {self.entries[r].position: r for r in rows}
    first, last = min(wanted), max(wanted)
    reader = FrameReader(self.path)
    for i, frame in reader.read_from(first):
      if i in wanted:
        yield wanted[i], frame
      if i >= last:
        break
    reader.close()


def plain_name(name: str) -> str:
  """As a name of folders in a store."""
  return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "pictures"


def name_of(folder: Path) -> str:
  """Of a folder of pictures, with that of the one that it lies in: many are called 'images'."""
  there = folder.resolve()
  return plain_name("-".join(filter(None, (there.parent.name, there.name))))


def look_at(found: list[tuple[Path, str, Any]], where: str) -> list[Still]:
  """(path, name, more) of pictures -> those that can be read whole; the others are named and counted. Raises UserError
  where none is left."""
  good: list[Still] = []
  bad: list[str] = []
  for path, name, more in tqdm(found, desc="check", unit="picture", leave=False):
    try:
      h, w = read_rgb(path).shape[:2]
      good.append(Still(path, name, w, h, more))
    except PictureError as e:
      bad.append(str(e))
  say_left_out(bad, len(found), where)
  if not good:
    raise UserError(f"{bad[0] if bad else f'no pictures in {where}'}; no picture of {where} is left")
  return good


def say_left_out(bad: list[str], total: int, where: str, what: str = "pictures") -> None:
  if bad:
    more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    warn(f"{where}: {len(bad)} of {total} {what} are left out: {'; '.join(bad[:SHOWN])}{more}")


def below(path: Path, folder: Path) -> str:
  """The path of a picture in a folder, for people."""
  return printable(path.relative_to(folder) if path.is_relative_to(folder) else path, LONG)


def is_video(path: Path) -> bool:
  """By its name."""
  return path.suffix.lower() in VIDEO_SUFFIXES and not is_picture(path)


def open_videos(videos: list[Path], options: SourceOptions, where: Path) -> list[Pictures]:
  """Those of a folder that can be read; the others are named and counted. Raises UserError where none is left."""
  good: list[Pictures] = []
  bad: list[str] = []
  for v in videos:
    try:
      good.append(Video(v, replace(options, name=f"{options.name}-{v.stem}" if options.name else "")))
    except UserError as e:
      bad.append(str(e))
  say_left_out(bad, len(videos), str(where), "videos")
  if not good:
    raise UserError(f"{bad[0]}; no video of {where} is left")
  return good


class PictureFolders:
  says = "a folder of pictures or videos, one picture, or a video of any camera"

  def accepts(self, path: str, options: SourceOptions) -> bool:
    p = Path(path)
    if p.is_dir():
      return any(is_picture(x) or is_video(x) for x in islice(p.rglob("*"), LOOKED_AT))
    return p.is_file() and (is_picture(p) or is_video(p))

  def open(self, paths: list[str], options: SourceOptions) -> list[Pictures]:
    return [part for path in paths for part in self._open(Path(path), options)]

  def _open(self, path: Path, options: SourceOptions) -> list[Pictures]:
    if path.is_file() and is_video(path):
      return [Video(path, options)]
    if not path.exists():
      raise UserError(f"no pictures at {path}: there is no such file or folder")
    found = [path] if path.is_file() else find_pictures(path)
    videos = sorted(p for p in path.iterdir() if is_video(p)) if path.is_dir() else []
    if not found and not videos:
      raise UserError(f"no pictures in {path}")
    if not found:
      return open_videos(videos, options, path)
    if videos:
      warn(f"{path}: {len(videos)} videos beside the pictures are left out; name them one by one")
    folder = path.parent if path.is_file() else path
    stills = look_at([(f, below(f, folder), None) for f in found], str(path))
    name = options.name or name_of(path if path.is_dir() else path.with_suffix(""))
    return [Pictures(name, folder, stills, options.license)]

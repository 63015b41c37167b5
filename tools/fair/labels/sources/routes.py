"""Logged routes: a segment of the store for each of the route's, its camera warped into the view that students see."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from openpilot.tools.fair.labels.aim import aimed
from openpilot.selfdrive.modeld.fair.frames import CameraError, camera_intrinsics
from openpilot.tools.fair.labels.sources.source import Piece, SourceOptions, open_pieces
from openpilot.tools.fair.labels.views import SegmentView, segment_view
from openpilot.tools.lib.cameras import VIDEOS
from openpilot.tools.lib.errors import UserError, warn
from openpilot.tools.lib.framereader import picture_size
from openpilot.tools.lib.route import FILES, NAMES, VIDEO_SUFFIXES, Route, Segment, segments_in
from openpilot.tools.replay.source import choose_camera, usable


def number_or_auto(text: str | None, flag: str) -> float | str | None:
  """Raises UserError."""
  if text is None or text == "auto":
    return text
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not 0 < value < math.inf:
    raise UserError(f"{flag} {text}: a number of pixels above 0, or auto")
  return value


@dataclass(frozen=True)
class RoutePiece(Piece):
  """One segment of a route, as it is found in its folder."""

  segment: Segment = field(default_factory=lambda: Segment("", 0, Path()))
  camera: str = "road"
  every: int = 1
  focal: float | str | None = None
  horizon: float | str | None = None

  def open(self) -> SegmentView:
    return self.view(self.segment)

  def view(self, segment: Segment) -> SegmentView:
    (segment,), own = usable([segment], choose_camera([segment], self.camera))
    return aimed(segment_view(segment, own, self.every, self.focal), self.horizon)


def route_pieces(
  routes: list[str],
  data_dir: Path | None,
  camera: str,
  every: int,
  focal: float | str | None,
  horizon: float | str | None = None,
) -> list[RoutePiece]:
  """Of all segments that have video; their size is the video's, bytes. Raises UserError where none has."""
  pieces: dict[str, RoutePiece] = {}
  for s in (s for r in routes for s in Route(r, data_dir).segments):
    if (same := pieces.get(s.name)) is not None:
      if same.segment.dir.resolve() != s.dir.resolve():
        warn(f"segment {s.name} is in {same.segment.dir} and in {s.dir}; the first one is labeled")
      continue
    own = [s.files[v] for v in (VIDEOS[camera], *VIDEOS.values()) if v in s.files]
    if not own:
      warn(f"segment {s.name} in {s.dir} has no video, it is left out")
      continue
    pieces[s.name] = RoutePiece(s.name, s.route, os.stat(own[0]).st_size, None, s, camera, every, focal, horizon)
  if not pieces:
    raise UserError(f"no video in {', '.join(routes)}; teachers need fcamera.hevc, ecamera.hevc or qcamera.ts")
  return list(pieces.values())


def find_views(
  routes: list[str],
  data_dir: Path | None,
  camera: str,
  every: int,
  focal: float | str | None,
  horizon: float | str | None = None,
) -> list[SegmentView]:
  """Of all segments that have video and can be opened; the others are named. Raises UserError where none is."""
  return open_pieces(route_pieces(routes, data_dir, camera, every, focal, horizon))[0]


def is_foreign(path: str, options: SourceOptions) -> bool:
  """A video that is none of openpilot's files, and whose camera nobody knows."""
  p = Path(path)
  if p.suffix.lower() not in VIDEO_SUFFIXES or p.name.lower() in NAMES or options.focal is not None or not p.is_file():
    return False
  size = picture_size(p)
  try:
    return size is None or camera_intrinsics(*size) is None
  except CameraError:
    return True


class Routes:
  says = "a route, a folder with segments, one segment, or a video of one of comma's cameras (or with --focal)"

  def accepts(self, path: str, options: SourceOptions) -> bool:
    if options.data_dir is not None:
      return True
    if is_foreign(path, options):
      return False
    try:
      found = Route(path).segments
    except UserError:  # a route's name, or a folder of several routes: what is wrong with it this source says best
      return not Path(path).exists() or (Path(path).is_dir() and bool(segments_in(Path(path), 2)))
    return any(k in s.files for s in found for k in FILES)

  def pieces(self, paths: list[str], options: SourceOptions) -> list[RoutePiece]:
    if unused := [f"--{k}" for k in ("name", "license") if getattr(options, k)]:
      warn(f"{' and '.join(unused)}: of pictures, not used for routes ({', '.join(paths[:3])})")
    return route_pieces(paths, options.data_dir, options.camera, options.every, options.focal, options.horizon)

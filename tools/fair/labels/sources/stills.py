"""Single pictures as a road camera sees them: each is a segment of its own, with its own focal length and horizon, and
is warped into the view as a route's frames are. Teachers see it whole."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from openpilot.selfdrive.modeld.fair.frames import CameraError, camera_intrinsics
from openpilot.tools.fair.labels.aim import mounting_of
from openpilot.tools.fair.labels.canvas import Canvas
from openpilot.tools.fair.labels.sources.pictures import STILL_NS, below, name_of, plain_name, say_left_out
from openpilot.tools.fair.labels.sources.source import SourceOptions
from openpilot.tools.fair.labels.views import FOCAL_OF_WIDTH, SegmentView, ViewRenderer
from openpilot.tools.lib.cameras import pinhole
from openpilot.tools.lib.encode_index import EncodeEntry
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import ordinary, read_yaml
from openpilot.tools.lib.framereader import Planes
from openpilot.tools.lib.pictures import PictureError, find_pictures, is_picture, picture_size, read_rgb
from openpilot.tools.lib.route import Segment

AIM = ("focal", "horizon")
LEAST = 32  # pixels of a side


def planes_of(rgb: np.ndarray) -> Planes:
  """(h, w, 3) uint8 -> Y, U and V as a video's decoder has them; odd sizes lose their last row or column."""
  h, w = rgb.shape[0] // 2 * 2, rgb.shape[1] // 2 * 2
  yuv = cv2.cvtColor(np.ascontiguousarray(rgb[:h, :w]), cv2.COLOR_RGB2YUV_I420)
  u, v = yuv[h:].reshape(2, h // 2, w // 2)
  return yuv[:h], u, v


@dataclass
class StillView(SegmentView):
  still = True
  file: Path = Path()

  @property
  def path(self) -> Path:
    return self.file

  def renderer(self, canvas: Canvas, whole: Any = None) -> "StillRenderer":
    return StillRenderer(self, canvas, whole)


class StillRenderer(ViewRenderer):
  def read(self, rows: list[int]) -> Iterator[tuple[int, Any]]:
    for r in rows:
      try:
        y, u, v = planes_of(read_rgb(self.view.path))
      except PictureError as e:
        raise UserError(f"{e}; it could be read before: run the command again") from None
      yield r, np.concatenate([y, np.stack([u, v], -1).reshape(len(u), -1)]) if self.is_frame else (y, u, v)


def read_aim(path: Path | None) -> dict[str, dict[str, float]]:
  """{GLOB of pictures' names: {focal, horizon}, pixels}, checked; {} of None. Raises UserError."""
  if path is None:
    return {}
  try:
    said = read_yaml(path)
    if not isinstance(said, dict):
      raise TypeError("it is no table")
    for name, x in said.items():
      if not isinstance(name, str) or not isinstance(x, dict) or not set(x) <= set(AIM):
        raise TypeError(f"'{name}' says something else than {' and '.join(AIM)}")
      for key, value in x.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e5 < value < 1e5:
          raise TypeError(f"'{name}': {key} {value} is no number of pixels")
        if key == "focal" and value <= 0:
          raise TypeError(f"'{name}': a focal length is above 0")
  except (OSError, TypeError, ValueError) as e:
    what = " ".join(str(e).split())[:160]
    raise UserError(f"--aim {path}: {what}; write lines as 'road*.jpg: {{focal: 910, horizon: 240}}'") from None
  return said


def aim_of(name: str, aims: dict[str, dict[str, float]], options: SourceOptions) -> dict[str, Any]:
  """focal and horizon of a picture: what fits its name in `aims`, the last that says it, else the options'."""
  out: dict[str, Any] = {"focal": options.focal, "horizon": options.horizon}
  for glob, said in aims.items():
    if fnmatchcase(name, glob):
      out |= said
  return out


def still_view(path: Path, name: str, segment: str, focal: Any, horizon: Any) -> StillView:
  """Raises UserError where the picture cannot be read, or its camera is not known."""
  width, height = (n // 2 * 2 for n in picture_size(path))
  if min(width, height) < LEAST:
    raise UserError(f"{name} is {width}x{height}, too small for a road camera's picture")
  read_rgb(path)  # whole: raises PictureError
  estimated = horizon is None
  if isinstance(focal, float | int):
    intrinsics = pinhole(focal, width, height)
  else:
    try:
      intrinsics = camera_intrinsics(width, height)
    except CameraError as e:
      if focal is None:
        raise UserError(
          f"{name}: {e}; or give its focal length in pixels with --focal or --aim, or --focal auto"
        ) from None
      intrinsics, estimated = pinhole(FOCAL_OF_WIDTH * width, width, height), True
  rpy = np.zeros(3) if horizon is None else mounting_of((float(intrinsics[0, 2]), float(horizon)), intrinsics)
  with open(ordinary(path), "rb") as f:
    digest = hashlib.file_digest(f, "sha256").hexdigest()
  entries = [EncodeEntry(0, 0, 0, STILL_NS, STILL_NS)]
  part = Segment(segment, 0, path.parent, {}, False)
  return StillView(part, "still", width, height, intrinsics, rpy, False, entries, digest, estimated, file=path)


class Stills:
  says = "a folder of pictures of road cameras, each a segment of its own (--focal, --horizon, --aim)"

  def accepts(self, path: str, options: SourceOptions) -> bool:
    return False  # only by name: a folder of pictures is letterboxed else

  def open(self, paths: list[str], options: SourceOptions) -> list[SegmentView]:
    if options.horizon == "auto":
      raise UserError("--horizon auto: of single pictures it cannot be seen; give a row in pixels, or --aim FILE.yaml")
    aims = read_aim(options.aim)
    views: list[SegmentView] = []
    used: set[str] = set()
    for folder in map(Path, paths):
      found = [folder] if folder.is_file() and is_picture(folder) else find_pictures(folder)
      if not found:
        raise UserError(f"no pictures at {folder}")
      base = folder.parent if folder.is_file() else folder
      whose, bad, first = options.name or name_of(base), [], len(views)
      for path in found:
        name = below(path, base)
        used |= {glob for glob in aims if fnmatchcase(name, glob)}
        segment = plain_name(f"{whose}-{Path(name).with_suffix('')}")
        try:
          views.append(still_view(path, name, segment, **aim_of(name, aims, options)))
        except UserError as e:
          bad.append(str(e))
      if len(views) == first:
        raise UserError(f"{bad[0]}; no picture of {folder} is left")
      say_left_out(bad, len(found), str(folder))
    if idle := [glob for glob in aims if glob not in used]:
      raise UserError(f"--aim {options.aim}: '{idle[0]}' fits no picture")
    return views

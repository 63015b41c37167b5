"""What a replay plays: a route's usable segments, its camera, and the frames of its video joined to the log."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np

from openpilot.cereal.services import SERVICE_LIST
from openpilot.common.transformations.model import MEDMODEL_CY, MEDMODEL_INPUT_SIZE
from openpilot.tools.lib.cameras import CAMERAS, VIDEOS
from openpilot.tools.lib.options import option
from openpilot.tools.lib.encode_index import EncodeEntry, encode_index, join, synthetic_index
from openpilot.tools.lib.errors import Unreadable, UserError, above_zero, not_negative, warn
from openpilot.tools.lib.framereader import FrameReader, picture_size
from openpilot.tools.lib.logreader import TAG_NAMES, LogReader, is_log
from openpilot.tools.lib.route import Route, Segment


def open_route(name: str | Path, data_dir: Path | None, camera: str) -> tuple[list[Segment], str]:
  """-> the segments that can be played, and the camera: `camera`, or the qcamera in its place. Warns of what is left
  out or replaced."""
  segments = Route(name, data_dir).segments
  return usable(segments, choose_camera(segments, camera))


def choose_camera(segments: list[Segment], camera: str) -> str:
  """The camera that is played: in place of a missing road camera the qcamera, which shows the same, with a warning."""
  if any(getattr(s, VIDEOS[camera]) for s in segments):
    return camera
  if camera == "road" and any(s.qcamera for s in segments):
    warn(f"no fcamera in {segments[0].route}, its qcamera plays as road camera")
    return "qcamera"
  if not any(getattr(s, v) for s in segments for v in VIDEOS.values()):
    warn(f"no video in {segments[0].route}, only its messages play")
    return camera
  there = sorted({c for c in CAMERAS for s in segments if getattr(s, VIDEOS[c])})
  raise UserError(
    f"no {VIDEOS[camera]} in {segments[0].route}; its cameras are {', '.join(there)}: choose one with --camera"
  )


def usable(segments: list[Segment], camera: str) -> tuple[list[Segment], str]:
  """Segments whose log and video can be read. In place of an unreadable rlog the qlog is used, in place of an fcamera
  the qcamera; else the segment is left out.

  Raises Unreadable where none is left."""
  out: list[Segment] = []
  for s in segments:
    files = dict(s.files)
    for kind in ("rlog", "qlog"):
      if kind in files and (wrong := is_log(files[kind])):
        del files[kind]
        other = "qlog" if kind == "rlog" and "qlog" in files else ""
        warn(f"{wrong}; {f'its {other} is taken' if other else f'segment {s.name} is left out'}")
        if kind == "rlog" and other:
          continue
        break
    else:
      out.append(replace(s, files=files))
  sizes: dict[int, tuple[int, int]] = {}
  stands: list[int] = []  # segments whose qcamera replaces their fcamera
  for k, s in enumerate(out):
    if (path := s.files.get(VIDEOS[camera])) is None:
      continue
    size = picture_size(path)
    if size is None and camera == "road" and s.qcamera is not None:
      size = picture_size(s.qcamera)
      stands.append(k)
    if size is not None:
      sizes[k] = size
  bad = [k for k, s in enumerate(out) if VIDEOS[camera] in s.files and k not in sizes]
  for k in stands:
    if k in sizes:
      warn(f"{out[k].fcamera} is not a video that can be read; its qcamera is taken")
  first = next((sizes[k] for k in sizes if k not in stands), None)
  # all frames of a stream have one size
  if any(k in sizes and first is not None and sizes[k] != first for k in stands):
    if all(s.qcamera is not None and picture_size(s.qcamera) for s in out):
      warn("so that all frames have one size, the qcamera of every segment plays")
      return out, "qcamera"
    bad += [k for k in stands if k in sizes and sizes[k] != first]
  for k in bad:
    warn(f"{out[k].files[VIDEOS[camera]]} is not a video that can be read; segment {out[k].name} is left out")
  for k in stands:
    out[k].files["fcamera"] = out[k].files["qcamera"]
  out = [s for k, s in enumerate(out) if k not in bad]
  if not out:
    raise Unreadable(f"no segment of {segments[0].route} can be read; copy its files again")
  return out, camera


def segment_index(segment: Segment, camera: str, reader: FrameReader, first_id: int, start: int) -> list[EncodeEntry]:
  """The frames that a segment's video has; warns of those that only the log or only the video has. A video without log
  plays at its own rate from `start` ns on, numbered from first_id."""
  if segment.log_path is None:
    warn(f"segment {segment.name} has no log: its video plays at {reader.fps:g} Hz with the default calibration")
    return synthetic_index(reader.frame_count, reader.fps, segment.num, start, first_id, reader.seconds)
  entries = encode_index(segment, "qcamera" if reader.path == segment.qcamera else camera)
  shown = join(entries, reader)
  if lost := len(entries) - len(shown):
    warn(f"{reader.path} has no picture of {lost} of the {len(entries)} frames in the log's index; they are left out")
  if more := reader.frame_count - len(shown):
    warn(f"{reader.path}: {more} of its {reader.frame_count} pictures are not in the log's index; they are left out")
  return shown


COVERED = 0.7  # a video that fills less of the student's view gets a warning


class KnownCamera:
  """Frames of any camera -> frames as a comma two would have taken them: 1164x874 at a focal length of 910 pixels.
  Outside the picture its border is repeated, as in the warp; for people (rgb24) it is black."""

  width, height, focal = 1164, 874, 910.0

  def __init__(self, focal: float, pix_fmt: str):
    self.scale, self.pix_fmt = self.focal / focal, pix_fmt
    self.said = pix_fmt != "nv12"  # the warning about coverage is given once, for the student's frames

  def __call__(self, frame: np.ndarray) -> np.ndarray:
    nv12 = self.pix_fmt == "nv12"
    h, w = frame.shape[0] * 2 // 3 if nv12 else frame.shape[0], frame.shape[1]
    # the part of the picture that is used, about its middle, in even numbers
    seen_w, seen_h = (
      min(a, math.ceil(b / self.scale / 2) * 2) // 2 * 2 for a, b in ((w, self.width), (h, self.height))
    )
    x, y = (w - seen_w) // 4 * 2, (h - seen_h) // 4 * 2
    to_w, to_h = (min(b, round(a * self.scale / 2) * 2) for a, b in ((seen_w, self.width), (seen_h, self.height)))
    if min(seen_w, seen_h, to_w, to_h) < 2:
      raise UserError(
        f"--focal: a {w}x{h} picture with a focal length of {self.focal / self.scale:g} pixels shows nothing of "
        "the road"
      )
    share = self.covered(to_w, to_h)
    if share < COVERED and not self.said:
      warn(
        f"a {w}x{h} video with a focal length of {self.focal / self.scale:g} pixels fills {share:.0%} of what the "
        "student sees; is --focal right?"
      )
    self.said = True
    planes = [frame[:h], frame[h:].reshape(h // 2, w // 2, 2)] if nv12 else [frame]
    planes = [p[y // k : (y + seen_h) // k, x // k : (x + seen_w) // k] for k, p in enumerate(planes, 1)]
    cut = np.concatenate([p.reshape(len(p), seen_w) for p in planes]) if nv12 else planes[0]
    made = (
      av.VideoFrame.from_ndarray(np.ascontiguousarray(cut), format=self.pix_fmt)
      .reformat(to_w, to_h)
      .to_ndarray(format=self.pix_fmt)
    )
    left, top = (self.width - to_w) // 4 * 2, (self.height - to_h) // 4 * 2
    right, below = self.width - to_w - left, self.height - to_h - top
    if not nv12:
      return np.pad(made, ((top, below), (left, right), (0, 0)))
    luma = np.pad(made[:to_h], ((top, below), (left, right)), mode="edge")
    chroma = np.pad(
      made[to_h:].reshape(to_h // 2, to_w // 2, 2),
      ((top // 2, below // 2), (left // 2, right // 2), (0, 0)),
      mode="edge",
    )
    return np.concatenate([luma, chroma.reshape(self.height // 2, self.width)])

  @staticmethod
  def covered(width: int, height: int) -> float:
    """Share of the medmodel view that a picture of this size, centered in the camera, fills; their focal lengths are
    equal."""
    view_w, view_h = MEDMODEL_INPUT_SIZE
    above, below = MEDMODEL_CY, view_h - MEDMODEL_CY
    return min(1, width / view_w) * (min(above, height / 2) + min(below, height / 2)) / view_h


def is_published(service: str) -> bool:
  """Whether a replay publishes it: a live process publishes the fair ones."""
  return service in SERVICE_LIST and not service.startswith("fair")


def log_begins(segments: list[Segment]) -> int | None:
  """Time of the log's first message that is published, ns: seconds into a route count from there. None without a
  log."""
  paths = [s.log_path for s in segments if s.log_path is not None]
  return next((t for t, tag, _ in LogReader(paths).raw() if is_published(TAG_NAMES[tag])), None) if paths else None


def frames(
  segments: list[Segment],
  camera: str,
  start: float = 0.0,
  pix_fmt: str = "nv12",
  origin: int | None = None,
  focal: float | None = None,
) -> Iterator[tuple[EncodeEntry, np.ndarray]]:
  """(entry, frame) of a route's video over all its segments, in order, from `start` seconds after `origin` ns on, by
  default after the log's first message, without a log after the first frame.

  focal: pixels, of a camera that is not comma's; its frames are converted by KnownCamera. A segment whose video or
  index cannot be read is left out, and so are lost pictures, with a warning."""
  next_id, next_time = 0, 1_000_000_000
  played = 0
  origin = log_begins(segments) if start and origin is None else origin
  known = KnownCamera(focal, pix_fmt) if focal is not None else lambda frame: frame
  for segment in segments:
    path: Path | None = getattr(segment, VIDEOS[camera])
    if path is None:
      continue
    try:
      reader = FrameReader(path, pix_fmt)
      entries = segment_index(segment, camera, reader, next_id, next_time)
    except UserError as e:
      if len(segments) == 1:
        raise
      warn(f"{e}; the video of segment {segment.name} is left out")
      continue
    if not entries:
      warn(f"{path}: none of its pictures is in the log's index; the video of segment {segment.name} is left out")
      continue
    origin = entries[0].timestamp_eof if origin is None else origin
    next_id, next_time = entries[-1].frame_id + 1, entries[-1].timestamp_eof + 50_000_000
    wanted = {e.position: e for e in entries if not start or (e.timestamp_eof - origin) * 1e-9 >= start}
    total = len(wanted)
    if wanted:
      for i, frame in reader.read_from(min(wanted)):
        if i in wanted:
          played += 1
          yield wanted.pop(i), known(frame)
    if wanted:
      warn(f"{path}: {len(wanted)} of {total} pictures cannot be decoded; they are left out")
    reader.close()
  if not played and any(getattr(s, VIDEOS[camera]) for s in segments):
    raise UserError(
      f"no frame of {segments[0].route} from second {start:g} on: the route is shorter, or its video does not "
      "match its log"
    )


def fill_nv12(frame: np.ndarray, out: np.ndarray, stride: int, uv_offset: int) -> np.ndarray:
  """Tight NV12 (h * 3 // 2, w) -> `out`, 1-D uint8, in the camera's buffer layout, as VisionIPC hands it to
  fairmodeld."""
  h, w = frame.shape[0] * 2 // 3, frame.shape[1]
  out[: h * stride].reshape(h, stride)[:, :w] = frame[:h]
  out[uv_offset : uv_offset + h // 2 * stride].reshape(h // 2, stride)[:, :w] = frame[h:]
  return out


@dataclass(frozen=True)
class RouteOptions:
  """Which route a command reads, and which part of it."""

  route: str = option(
    positional=True,
    help="a folder with segments, one segment's folder, a route's name (with --data-dir), or a video; /2 or /2:5 at "
    "its end picks segments",
  )
  data_dir: Path | None = option(None, help="the folder that holds the routes")
  camera: str = option("road", choices=CAMERAS, help="which video to play; qcamera is published as road camera")
  start: float = option(0.0, parse=not_negative, metavar="S", help="seconds into the route")
  seconds: float | None = option(None, parse=above_zero, help="stop after so many seconds of the route")
  focal: float | None = option(
    None, parse=above_zero, metavar="PX", help="focal length in pixels, of a camera that is not comma's"
  )

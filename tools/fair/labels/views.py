"""Frames of a route as teachers and students see them: the camera image warped by the segment's one calibration into
the model view."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np

from openpilot.common.transformations.model import get_warp_matrix, medmodel_intrinsics, sbigmodel_intrinsics
from openpilot.selfdrive.modeld.fair.calibration import mounting
from openpilot.selfdrive.modeld.fair.frames import (
  FRAME_SHAPE,
  VIEW_H,
  VIEW_W,
  CameraError,
  ModelFrame,
  camera_intrinsics,
)
from openpilot.selfdrive.modeld.fair.heads.ground import MAX_HEIGHT, MIN_HEIGHT
from openpilot.tools.fair.labels.canvas import Canvas
from openpilot.tools.lib.cameras import STATE_SERVICES, VIDEOS, pinhole
from openpilot.tools.lib.encode_index import EncodeEntry
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.framereader import FrameReader, Planes
from openpilot.tools.lib.log_fields import calibration_status
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.route import Segment
from openpilot.tools.replay.source import segment_index


SMALL = 640 * 480  # pixels of a picture
FOCAL_OF_WIDTH = 0.85  # of cameras in cars by and large: 61 degrees across; one that chessboards measured has .91
T = TypeVar("T")


@dataclass
class SegmentView:
  """One segment's video, which of its frames are labeled, and the one calibration of all of them."""

  segment: Segment
  stream: str  # road, wide, qcamera
  width: int
  height: int
  intrinsics: np.ndarray  # (3, 3) of the camera
  rpy: np.ndarray  # (3,) rad
  calibrated: bool
  entries: list[EncodeEntry]
  video_hash: str
  estimated: bool = False  # focal length or mounting are guessed: no distances in meters
  camera_height: float | None = None  # above the road, m; no part of camera(), which decides the labels' key

  @property
  def name(self) -> str:
    return self.segment.name

  @property
  def path(self) -> Path:
    return self.segment.files[VIDEOS[self.stream]]

  def renderer(self, canvas: Canvas, whole: Any = None) -> "ViewRenderer":
    """whole: draws the camera's whole picture, picture.PictureWarp."""
    return ViewRenderer(self, canvas, whole)

  def camera(self) -> dict[str, Any]:
    return {
      "stream": self.stream,
      "width": self.width,
      "height": self.height,
      "intrinsics": self.intrinsics.tolist(),
      "rpy": self.rpy.tolist(),
      "calibrated": self.calibrated,
      "video": self.video_hash,
      **({"estimated": True} if self.estimated else {}),
    }


def is_still(part: Any) -> bool:
  """Whether a part is a segment of one single picture."""
  return isinstance(part, SegmentView) and getattr(part, "still", False)


def segment_view(segment: Segment, stream: str, every: int = 1, focal: float | str | None = None) -> SegmentView:
  """focal: pixels, for a camera that is none of comma's; 'auto': guessed where the camera is not known. Raises
  UserError where there is no video, or its camera is not known."""
  path = segment.files.get(VIDEOS[stream])
  if path is None:
    raise UserError(
      f"segment {segment.name} in {segment.dir} has no {VIDEOS[stream]}; there are {', '.join(sorted(segment.files))}: "
      "choose another --camera"
    )
  reader = FrameReader(path, "nv12")
  entries = [e for e in segment_index(segment, stream, reader, 0, 1_000_000_000) if e.segment_id % every == 0]
  device = sensor = rpy = camera_height = None
  calibrated = False
  if segment.log_path is not None:
    state = STATE_SERVICES[stream]
    log = LogReader([segment.log_path], services=["extrinsicsCalibration", "deviceState", state])
    for event in log:
      with log.guard(event):
        which = event.which()
        if which == "deviceState":
          device = str(event.deviceState.deviceType)
        elif which == state:
          sensor = str(getattr(event, state).sensor)
        elif (now := mounting(event.extrinsicsCalibration))[0] is not None:
          # the segment's last, and best, one holds for all of it; one from before the device was calibrated only where
          # there is no other
          status = calibration_status(event.extrinsicsCalibration) == "calibrated"
          if status or not calibrated:
            rpy, calibrated = np.array(now[0], np.float64), status
            if now[1] is not None and MIN_HEIGHT <= now[1] <= MAX_HEIGHT:
              camera_height = now[1]
  if not entries:
    raise UserError(f"{path}: none of its frames is in the log's index; leave segment {segment.name} out")
  estimated = False
  if isinstance(focal, float | int):
    intrinsics = pinhole(focal, reader.w, reader.h)
  else:
    try:
      intrinsics = camera_intrinsics(reader.w, reader.h, device, sensor, stream == "wide")
    except CameraError as e:
      if focal is None:
        raise UserError(f"{path}: {e}; or give its focal length in pixels with --focal, or --focal auto") from None
      intrinsics, estimated = pinhole(FOCAL_OF_WIDTH * reader.w, reader.w, reader.h), True
  with open(path, "rb") as f:
    video_hash = hashlib.file_digest(f, "sha256").hexdigest()
  return SegmentView(
    segment,
    stream,
    reader.w,
    reader.h,
    intrinsics,
    np.zeros(3) if rpy is None else rpy,
    rpy is not None,
    entries,
    video_hash,
    estimated,
    camera_height,
  )


def view_to_view(width: int, height: int) -> np.ndarray:
  """(3, 3) from the pixels of a picture of this size to those of the 512x256 view that it shows, both at pixel
  centers."""
  sx, sy = width / VIEW_W, height / VIEW_H
  return np.array([[1 / sx, 0, (1 / sx - 1) / 2], [0, 1 / sy, (1 / sy - 1) / 2], [0, 0, 1]])


def view_intrinsics(name: str, width: int, height: int) -> np.ndarray:
  """(3, 3) pinhole matrix of the view `name` at this size."""
  return np.linalg.inv(view_to_view(width, height)) @ (
    sbigmodel_intrinsics if name == "sbigmodel" else medmodel_intrinsics
  )


def shrink_of(focal: float, view_focal: float) -> int:
  """By how much a camera's picture is made smaller before a view is taken of it; focal lengths in pixels."""
  return max(1, int(focal / view_focal + 0.2))


class ViewWarp:
  """Renders the model view of one SegmentView, as RGB of any size or as the model frame that students see. For one
  thread: it reuses its memory."""

  def __init__(self, view: SegmentView, name: str = "medmodel", width: int = VIEW_W, height: int = VIEW_H):
    self.view, self.name, self.width, self.height = view, name, width, height
    self.intrinsics = view_intrinsics(name, width, height)
    # a camera that sees finer than the view is made smaller first: bilinear alone would alias
    self.shrink = shrink_of(view.intrinsics[0, 0], self.intrinsics[0, 0])
    self.yuv = np.empty((height * 3 // 2, width), np.uint8)

  @cached_property
  def model_frame(self) -> ModelFrame:
    frame = ModelFrame(
      self.view.width, self.view.height, self.view.width, self.view.width * self.view.height, self.name
    )
    frame.set_calibration(self.view.rpy, self.view.intrinsics)
    return frame

  @cached_property
  def maps(self) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of brightness and of color: where in the camera's picture each pixel is."""
    m = get_warp_matrix(self.view.rpy, self.view.intrinsics, self.name == "sbigmodel") @ view_to_view(
      self.width, self.height
    )
    half = m * np.array([[1, 1, 0.5], [1, 1, 0.5], [2, 2, 1]])
    luma, chroma = (self._maps(x, self.width // k, self.height // k, self.shrink) for x, k in ((m, 1), (half, 2)))
    # brightness in float: faster than OpenCV's 16-bit maps, and they round the place to 1/32 of a pixel; for color that
    # is enough
    return [luma, cv2.convertMaps(*chroma, cv2.CV_16SC2)]

  @staticmethod
  def _maps(m: np.ndarray, w: int, h: int, shrink: int) -> tuple[np.ndarray, np.ndarray]:
    u, v = np.meshgrid(np.arange(w), np.arange(h))
    p = m @ np.stack([u.ravel(), v.ravel(), np.ones(w * h)])
    with np.errstate(divide="ignore", invalid="ignore"):
      x, y = np.where(p[2] > 0, p[:2] / p[2], -1e4)
    x, y = (((q + 0.5) / shrink - 0.5).reshape(h, w).astype(np.float32) for q in (x, y))
    return x, y

  def _smaller(self, plane: np.ndarray) -> np.ndarray:
    """By exactly `shrink`, as _maps() takes it: 1928x1208 is no multiple of 3, and what is over at the right and below
    is left out, as border."""
    h, w = plane.shape[0] // self.shrink, plane.shape[1] // self.shrink
    return cv2.resize(plane[: h * self.shrink, : w * self.shrink], (w, h), interpolation=cv2.INTER_AREA)

  def rgb(self, nv12: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """(h * 3 // 2, w) uint8 -> (height, width, 3) uint8 RGB, in `out` where given."""
    h, w = self.view.height, self.view.width
    u, v = cv2.split(nv12[h:].reshape(h // 2, w // 2, 2))
    return self.rgb_of((nv12[:h], u, v), out)

  def rgb_of(self, planes: Planes, out: np.ndarray | None = None) -> np.ndarray:
    """As rgb(), of planes as a decoder has them: two of color are sampled faster than one of pairs."""
    luma, chroma = self.maps
    y, u, v = planes
    to_u, to_v = self.yuv[self.height :].reshape(2, self.height // 2, self.width // 2)
    if self.shrink > 1:  # color in pairs: OpenCV rounds the mean of one channel in another way, and labels would change
      pairs = np.empty((*u.shape, 2), np.uint8)
      pairs[:, :, 0], pairs[:, :, 1] = u, v
      y, (u, v) = self._smaller(y), cv2.split(self._smaller(pairs))
    for plane, maps, to in ((y, luma, self.yuv[: self.height]), (u, chroma, to_u), (v, chroma, to_v)):
      cv2.remap(plane, *maps, cv2.INTER_LINEAR, dst=to, borderMode=cv2.BORDER_REPLICATE)
    return cv2.cvtColor(self.yuv, cv2.COLOR_YUV2RGB_I420, out)

  def frame(self, nv12: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """(h * 3 // 2, w) uint8 -> (6, 128, 256) uint8, bit for bit what fairmodeld makes of it, in `out` where given."""
    return self.model_frame.warp(nv12.reshape(-1), np.empty(FRAME_SHAPE, np.uint8) if out is None else out)

  @property
  def valid(self) -> np.ndarray:
    """(256, 512) bool, view pixels that lie in the image."""
    return self.model_frame.valid


class ViewRenderer:
  """Draws a segment's frames into a canvas: the model frame, its view as RGB, or the whole picture."""

  def __init__(self, view: SegmentView, canvas: Canvas, whole: Any = None):
    self.view, self.is_frame = view, canvas.wants == "frame"
    warp = whole or ViewWarp(view, canvas.view, canvas.width, canvas.height)
    self.draw: Callable[[Any, np.ndarray], np.ndarray] = warp.frame if self.is_frame else warp.rgb_of

  def read(self, rows: list[int]) -> Iterator[tuple[int, Any]]:
    return read_frames(self.view, rows) if self.is_frame else read_planes(self.view, rows)


def read_frames(view: SegmentView, positions: list[int]) -> Iterator[tuple[int, np.ndarray]]:
  """(position in view.entries, NV12 frame) of the positions asked for, in order; decodes from the first to the last of
  them. Fewer where the end is damaged."""
  return _read(view, positions, FrameReader.read_from)


def read_planes(view: SegmentView, positions: list[int]) -> Iterator[tuple[int, Planes]]:
  """As read_frames(), the decoder's planes."""
  return _read(view, positions, FrameReader.planes_from)


def _read(
  view: SegmentView, positions: list[int], decode: Callable[[FrameReader, int], Iterator[tuple[int, T]]]
) -> Iterator[tuple[int, T]]:
  if not positions:
    return
  wanted = {view.entries[p].position: p for p in positions}
  # of a small picture decoding takes less than a teacher: the cores are the teacher's
  reader = FrameReader(view.path, "nv12", threads=1 if view.width * view.height < SMALL else None)
  first, last = min(wanted), max(wanted)
  for i, frame in decode(reader, first):
    if i in wanted:
      yield wanted[i], frame
    if i >= last:
      break

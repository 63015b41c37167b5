"""Writes videos over PyAV."""

import fractions
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np

FORMATS = {".hevc": ("hevc", "libx265"), ".ts": ("mpegts", "libx264"), ".mp4": ("mp4", "libx264")}


class VideoWriter:
  """HEVC without container (.hevc), H.264 in MPEG-TS (.ts) or MP4: no B frames, groups as comma's encoders make them,
  limited range BT.601."""

  def __init__(self, path: Path, width: int, height: int, gop: int = 20, crf: int = 24, fps: int = 20):
    kind, codec = FORMATS[path.suffix]
    self.fps, self.n = fps, 0
    self.container = av.open(str(path), "w", format=kind)
    stream = self.container.add_stream(codec, rate=fps)
    assert isinstance(stream, av.VideoStream)
    self.stream = stream
    self.stream.width, self.stream.height, self.stream.pix_fmt, self.stream.gop_size = width, height, "yuv420p", gop
    self.stream.codec_context.max_b_frames = 0
    # one thread: with more the bytes would depend on the machine
    options: dict[str, Any] = {"preset": "ultrafast" if kind != "mp4" else "veryfast", "crf": str(crf), "threads": "1"}
    if codec == "libx265":  # blocks of 16 take two thirds of the time of 32, and 5% more bytes
      fast = "log-level=none:bframes=0:scenecut=0:frame-threads=1:ctu=16"
      options["x265-params"] = f"{fast}:keyint={gop}:min-keyint={gop}"
    self.stream.options = options

  def write(self, rgb: np.ndarray) -> None:
    """rgb: (H, W, 3) uint8, scaled to the video's size."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
    frame = frame.reformat(self.stream.width, self.stream.height, "yuv420p", dst_colorspace="ITU601")
    frame.pts, frame.time_base = self.n, fractions.Fraction(1, self.fps)
    self.n += 1
    self.container.mux(self.stream.encode(frame))

  def close(self) -> None:
    self.container.mux(self.stream.encode(None))
    self.container.close()

  def __enter__(self) -> "VideoWriter":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
  ) -> None:
    self.close()

"""Video frames over PyAV: raw HEVC without a container (fcamera.hevc), qcamera.ts, mp4. In order, or at random by group of pictures; memory is bounded."""
import contextlib
import itertools
import os
from collections import OrderedDict
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import av
import av.logging
import numpy as np

from openpilot.tools.lib.errors import UserError

CACHE_BYTES = 256 * 1024 * 1024   # of decoded groups
PIX_FMTS = ("rgb24", "nv12")
PLANAR = ("yuv420p", "yuvj420p")
HEVC_VCL = 32                     # NAL types below are slices
HEVC_IRAP = range(16, 24)         # pictures at which decoding may begin
HEVC_PARAMETER_SETS = (32, 33, 34)
Planes = tuple[np.ndarray, np.ndarray, np.ndarray]   # Y (h, w), U and V (h // 2, w // 2)


@contextlib.contextmanager
def drained(codec: Any) -> Iterator[None]:
  """Lets a decoder's threads finish before it is freed: PyAV frees it with the GIL held, for which a thread that still decodes may be waiting."""
  try:
    yield
  finally:
    with contextlib.suppress(av.FFmpegError):
      codec.decode(None)


class FrameReader:
  """pix_fmt 'rgb24': frames (h, w, 3) uint8; 'nv12': (h * 3 // 2, w) uint8, no padding.

  `for frame in reader` and `read_from(i)` decode in order; so does `planes_from(i)`, whatever pix_fmt, without copying what is 4:2:0 already.
  `get(i)` decodes from the beginning of i's group up to i; asked for a later frame of that group, it decodes the whole group. A few groups are kept.
  threads: 1 decodes a container in the caller's thread alone: slower, for a quarter less processor time.
  Raises UserError where the file cannot be read as video, IndexError beyond its end.
  """

  def __init__(self, path: str | Path, pix_fmt: str = "rgb24", threads: int | None = None):
    if pix_fmt not in PIX_FMTS:
      raise ValueError(f"pix_fmt '{pix_fmt}' is not known; one of {', '.join(PIX_FMTS)}")
    # damaged pictures are counted here; libav would print a line for each
    av.logging.set_libav_level(av.logging.PANIC)
    self.path, self.pix_fmt, self.threads = Path(path), pix_fmt, threads
    if not self.path.is_file():
      raise UserError(f"no video at {self.path}")
    self.raw = self.path.suffix in (".hevc", ".h265")
    self.cache: OrderedDict[int, list[Any]] = OrderedDict()  # first frame of a group -> its first frames, as decoded
    self.reordered = True  # frames may come out in another order than they went in
    try:
      self._index()
    except (av.FFmpegError, StopIteration, IndexError, ValueError) as e:
      raise UserError(f"{self.path} is not a video that can be read ({e}); copy it again, or leave this segment out") from None
    if not self.frame_count:
      raise UserError(f"{self.path} holds no frames; the recording stopped before any was written: leave this segment out")

  def _index(self) -> None:
    """Frame count, size and where groups begin, from the packets alone."""
    self.packets: list[tuple[int, int]] = []   # raw HEVC: offset and end of each picture
    self.keys: list[int] = []                  # frames at which a group begins
    self.times: list[int] = []                 # containers: presentation time of each frame
    if self.raw:
      self._scan_hevc()
    else:
      with av.open(str(self.path)) as c:
        stream = c.streams.video[0]
        stamps = [(p.pts, p.is_keyframe) for p in c.demux(stream) if p.pts is not None and p.size]
        stamps.sort(key=lambda x: x[0])
        self.times, self.keys = [t for t, _ in stamps], [i for i, (_, key) in enumerate(stamps) if key]
        self.w, self.h = stream.codec_context.width, stream.codec_context.height
        self.fps = float(stream.average_rate or 20)
    self.frame_count = len(self.packets) if self.raw else len(self.times)
    if not self.frame_count:
      return
    if not self.keys or self.keys[0] != 0:
      self.keys.insert(0, 0)
    if self.raw:
      self.fps = 20.
      first = next(self._decode(0, 1, 1))
      self.w, self.h = first.width, first.height

  def _scan_hevc(self) -> None:
    """Access units of an Annex B stream: a picture begins with the first slice (first_slice_segment_in_pic_flag) or the parameter sets before it."""
    dat = self.dat = self.path.read_bytes()
    pos, unit, sets = dat.find(b"\x00\x00\x01"), -1, b""
    begin = -1
    while pos >= 0 and pos + 6 <= len(dat):
      kind = (dat[pos + 3] >> 1) & 63
      at = pos - 1 if pos > 0 and dat[pos - 1] == 0 else pos
      if kind < HEVC_VCL:
        if dat[pos + 5] & 0x80:   # the first slice of a picture
          start = begin if begin >= 0 else at
          if unit >= 0:
            self.packets.append((unit, start))
          if kind in HEVC_IRAP:
            self.keys.append(len(self.packets))
          unit = start
        begin = -1
      elif kind in HEVC_PARAMETER_SETS or kind in (35, 39):   # parameter sets, delimiter, prefix SEI belong to the next picture
        begin = at if begin < 0 else begin
        if kind in HEVC_PARAMETER_SETS and not self.packets and unit < 0:
          following = dat.find(b"\x00\x00\x01", pos + 3)
          sets += dat[at:following if following >= 0 else len(dat)]
      pos = dat.find(b"\x00\x00\x01", pos + 3)
    if unit >= 0:
      self.packets.append((unit, len(dat)))
    self.sets = sets

  def __len__(self) -> int:
    return self.frame_count

  def __iter__(self) -> Iterator[np.ndarray]:
    return self.read_from(0)

  def read_from(self, start: int) -> Iterator[np.ndarray]:
    """Frames from `start` to the end, in order, decoded by several threads."""
    return map(self._convert, self._decode_from(start))

  def planes_from(self, start: int) -> Iterator[Planes]:
    """What 'nv12' frames from `start` on are made of: views of the decoder's own memory, to be read only. They stay good as long as they are held."""
    return map(self._planes, self._decode_from(start))

  def _decode_from(self, start: int) -> Iterator[Any]:
    key = max(k for k in self.keys if k <= start)
    with contextlib.closing(self._decode(key, self.frame_count, self.frame_count)) as decoded:
      yield from itertools.islice(decoded, start - key, None)

  def get(self, i: int) -> np.ndarray:
    if not 0 <= i < self.frame_count:
      raise IndexError(f"{self.path} has frames 0 to {self.frame_count - 1}, not {i}")
    g = int(np.searchsorted(self.keys, i, side="right")) - 1
    key, end = self.keys[g], self.keys[g + 1] if g + 1 < len(self.keys) else self.frame_count
    group = self.cache.get(key, [])
    if len(group) <= i - key:
      # one frame of a group is what a shuffling data loader asks for; a second one means that more will follow
      with contextlib.closing(self._decode(key, end if group else i + 1, end)) as decoded:
        group = self.cache[key] = list(decoded)
    self.cache.move_to_end(key)
    if len(group) <= i - key:
      raise UserError(f"{self.path}: frame {i} cannot be decoded; the file is damaged there")
    while len(self.cache) > 1 and sum(map(len, self.cache.values())) * self.w * self.h * 3 // 2 > CACHE_BYTES:
      self.cache.popitem(last=False)
    return self._convert(group[i - key])

  def _decode(self, key: int, stop: int, end: int) -> Generator[Any, None, None]:
    """Frames key..stop-1 as libav has them; key begins a group, end ends one."""
    with contextlib.closing(self._raw_frames(key, end if self.reordered else stop) if self.raw else self._container_frames(key)) as decoded:
      yield from itertools.islice(decoded, stop - key)

  def _raw_frames(self, key: int, end: int) -> Generator[Any, None, None]:
    codec: Any = av.CodecContext.create("hevc", "r")
    # twice the cores: a frame's thread often waits for rows of the frame before
    codec.thread_type, codec.thread_count = ("AUTO", min(16, 2 * (os.cpu_count() or 1))) if end - key > 1 else ("NONE", 1)
    prefix = self.sets if key else b""  # the file's own parameter sets: a group need not repeat them
    with drained(codec):
      for a, b in self.packets[key:end]:
        try:
          out = codec.decode(av.Packet(prefix + self.dat[a:b]))
          self.reordered = bool(codec.has_b_frames)  # said by the parameter sets
          yield from out
        except av.FFmpegError:
          pass  # a damaged picture; the next keyframe is whole again
        prefix = b""
      yield from codec.decode(None)

  def _container_frames(self, key: int) -> Generator[Any, None, None]:
    with av.open(str(self.path)) as c:
      stream = c.streams.video[0]
      stream.thread_type = "NONE" if self.threads == 1 else "AUTO"
      begin = self.times[key]
      if key:
        c.seek(begin, stream=stream)
      with drained(stream.codec_context):
        try:
          for frame in c.decode(stream):
            if frame.pts is None or frame.pts >= begin:
              yield frame
        except av.FFmpegError:
          return  # the file's end is damaged: what came before it was whole

  def _convert(self, frame: Any) -> np.ndarray:
    if self.pix_fmt == "rgb24":
      return frame.to_ndarray(format="rgb24")
    if frame.format.name in PLANAR:   # no scaler: the planes are interleaved as they are
      h, w = frame.height, frame.width
      out = np.empty((h * 3 // 2, w), dtype=np.uint8)
      out[:h], out[h:, 0::2], out[h:, 1::2] = self._planes(frame)
      return out
    return frame.to_ndarray(format="nv12")

  def _planes(self, frame: Any) -> Planes:
    h, w = frame.height, frame.width
    if frame.format.name in PLANAR:
      y, u, v = (np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, :p.width] for p in frame.planes)
      return y, u[:h // 2, :w // 2], v[:h // 2, :w // 2]
    nv12 = frame.to_ndarray(format="nv12")
    return nv12[:h], np.ascontiguousarray(nv12[h:, 0::2]), np.ascontiguousarray(nv12[h:, 1::2])

  def close(self) -> None:
    self.cache.clear()

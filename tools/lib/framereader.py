"""Video frames over PyAV: raw HEVC without a container (fcamera.hevc), qcamera.ts, mp4 and others. In order, or at
random by group of pictures, in bounded memory."""

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

from openpilot.tools.lib import hevc
from openpilot.tools.lib.errors import UserError, warn
from openpilot.tools.lib.files import ordinary_size

CACHE_BYTES = 256 * 1024 * 1024  # of decoded groups
MAX_BYTES = 2**32  # of a raw HEVC file, which is read into memory
MAX_PIXELS = 8192 * 4608  # of a picture
PIX_FMTS = ("rgb24", "nv12")
PLANAR = ("yuv420p", "yuvj420p")
RAW_SUFFIXES = (".hevc", ".h265")
# only formats that contain a video: a playlist names other files, and addresses
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,mpegts,matroska,webm,avi,flv,asf,ogg,mpeg,gif,hevc,h264,mjpeg,ivf,y4m,yuv4mpegpipe"
OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
Planes = tuple[np.ndarray, np.ndarray, np.ndarray]  # Y (h, w), U and V (h // 2, w // 2)


@contextlib.contextmanager
def drained(codec: Any) -> Iterator[None]:
  """Lets a decoder's threads finish before it is freed. PyAV frees it while holding the GIL, for which a decoding
  thread may be waiting: a deadlock."""
  try:
    yield
  finally:
    with contextlib.suppress(av.FFmpegError):
      codec.decode(None)


class FrameReader:
  """pix_fmt 'rgb24': frames (h, w, 3) uint8; 'nv12': (h * 3 // 2, w) uint8, no padding. Turned by the file's rotation;
  odd sizes lose their last row or column.

  `for frame in reader` and `read_from(i)` decode in order; so does `planes_from(i)`, for any pix_fmt, without copying
  pictures that are 4:2:0 already. `get(i)` decodes from the beginning of i's group up to i; for a later frame of that
  group it then decodes the whole group. A few groups are kept. A picture that is damaged, or that comes after a lost
  one in its group, is left out: each i is the right picture or none. numbers: of each picture in the file, which one of
  the recording it is: rising by more than one where pictures are lost. threads: 1 decodes a container in the caller's
  thread alone: slower, for a quarter less processor time. Raises UserError where the file cannot be read as video,
  IndexError beyond its end."""

  def __init__(self, path: str | Path, pix_fmt: str = "rgb24", threads: int | None = None):
    if pix_fmt not in PIX_FMTS:
      raise ValueError(f"pix_fmt '{pix_fmt}' is not known; one of {', '.join(PIX_FMTS)}")
    # damaged pictures are counted here; libav would print a line for each one
    av.logging.set_libav_level(av.logging.PANIC)
    self.path, self.pix_fmt, self.threads = Path(path), pix_fmt, threads
    if not self.path.exists():
      raise UserError(f"no video at {self.path}")
    size = ordinary_size(self.path)
    self.raw = self.path.suffix.lower() in RAW_SUFFIXES
    if not size or (self.raw and size > MAX_BYTES):
      raise UserError(f"{self.path} is {'empty' if not size else 'too large'}; leave this segment out")
    self.cache: OrderedDict[int, dict[int, Any]] = OrderedDict()  # first frame of a group -> its frames, as decoded
    self.reordered = True  # frames may come out in another order than their packets
    self.turn = 0  # quarters by which frames are turned, counter-clockwise
    try:
      self._index()
    except UserError as e:
      raise UserError(f"{self.path} is not a video that can be read: {e}") from None
    except (av.FFmpegError, StopIteration, IndexError, ValueError, OSError, MemoryError) as e:
      raise UserError(
        f"{self.path} is not a video that can be read ({e}); copy it again, or leave this segment out"
      ) from None

  def _index(self) -> None:
    """Frame count, size, where groups begin and what is lost, from the packets alone."""
    self.packets: list[tuple[int, int]] = []  # raw HEVC: offset and end of each picture
    self.keys: list[int] = []  # frames at which a group begins
    self.times: list[int] = []  # containers: presentation time of each frame
    self.broken: set[int] = set()  # frames that the file itself marks as damaged
    self.gop, self.breaks = 0, []  # see hevc.Stream
    self.seconds: np.ndarray | None = None  # containers: presentation times
    self.counted = False  # a container without presentation times, as AVI: decoded frames are counted
    if self.raw:
      self.dat = self.path.read_bytes()
      stream = hevc.scan(self.dat)
      self.packets, self.sets, self.numbers, self.gop, self.breaks = (
        stream.packets,
        stream.sets,
        stream.numbers,
        stream.gop,
        stream.breaks,
      )
      self.positions, self.packet_of = stream.positions, {place: packet for packet, place in stream.keys}
      self.keys, self.fps, self.frame_count = sorted(self.packet_of), 20.0, len(self.packets)
    else:
      self._scan_container()
    if not self.frame_count:
      raise UserError("it holds no frames; the recording stopped before any was written: leave this segment out")
    if not self.keys:
      raise UserError("it has no picture at which decoding can begin; leave this segment out")
    self._first_picture()

  def _scan_container(self) -> None:
    with av.open(str(self.path), options=OPTIONS) as c:
      if not c.streams.video:
        raise UserError("it has no pictures in it")
      stream = c.streams.video[0]
      if stream.codec_context is None:
        raise UserError("its video codec is not supported here")
      stamps: dict[int, tuple[bool, bool]] = {}
      torn = False
      packets = untimed = there = 0
      before = False  # a group begins before the first picture that is shown: cut off by an edit list, and decodable
      with contextlib.suppress(av.FFmpegError):  # a damaged end: everything before it is good
        for p in c.demux(stream):
          there += bool(p.size)
          if not p.size or p.is_discard:
            before |= bool(p.size and p.is_keyframe and not stamps)
            continue
          packets += 1
          untimed += p.pts is None
          if p.pts is not None:
            stamps[p.pts] = (p.is_keyframe, p.is_corrupt or torn)
          torn = p.pts is None  # half a picture: the next one has lost its reference
      if stream.frames > there and "avi" not in c.format.name:
        warn(f"{self.path} says that it has {stream.frames} frames, and {there} are there: it is cut short")
      self.counted = "avi" in c.format.name or untimed * 4 > packets
      if self.counted:
        stamps = {i: (i == 0, False) for i in range(packets)}
      self.times = sorted(stamps)
      self.keys = [i for i, t in enumerate(self.times) if stamps[t][0] or (i == 0 and before)]
      self.broken = {i for i, t in enumerate(self.times) if stamps[t][1]}
      self.fps = float(stream.average_rate or stream.guessed_rate or 20)
      base = 1 / self.fps if self.counted else float(stream.time_base or 1)
    self.frame_count = len(self.times)
    self.seconds = np.array(self.times, np.float64) * base
    steps = np.diff(self.seconds)
    self.numbers = (
      np.concatenate([[0], np.cumsum(np.maximum(1, np.round(steps / np.median(steps))))]).astype(np.int64)[
        : self.frame_count
      ]
      if len(steps)
      else np.zeros(self.frame_count, np.int64)
    )

  def _first_picture(self) -> None:
    """Size and turn, of the first picture that can be decoded."""
    for key in self.keys:
      with contextlib.closing(self._decode(key, key + 1)) as decoded:
        first = next(decoded, None)
      if first is not None:
        frame = first[1]
        self.turn = round((frame.rotation or 0) / 90) % 4
        w, h = frame.width // 2 * 2, frame.height // 2 * 2
        self.coded = frame.width, frame.height
        if not w or not h:
          raise UserError(f"its pictures are {frame.width}x{frame.height}")
        self.w, self.h = (h, w) if self.turn % 2 else (w, h)
        return
    raise UserError("none of its pictures can be decoded; leave this segment out")

  def __len__(self) -> int:
    return self.frame_count

  def __iter__(self) -> Iterator[np.ndarray]:
    return (frame for _, frame in self.read_from(0))

  def read_from(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
    """(i, frame) from `start` to the end, in order, decoded by several threads. What cannot be decoded is left out."""
    return ((i, self._convert(frame)) for i, frame in self._decode_from(start))

  def planes_from(self, start: int) -> Iterator[tuple[int, Planes]]:
    """The planes of 'nv12' frames from `start` on: read-only views of the decoder's memory, valid as long as they are
    referenced."""
    return ((i, self._planes(frame)) for i, frame in self._decode_from(start))

  def _decode_from(self, start: int) -> Iterator[tuple[int, Any]]:
    key = max((k for k in self.keys if k <= start), default=self.keys[0])
    with contextlib.closing(self._decode(key, self.frame_count)) as decoded:
      for i, frame in decoded:
        if i >= start:
          yield i, frame

  def get(self, i: int) -> np.ndarray:
    if not 0 <= i < self.frame_count:
      raise IndexError(f"{self.path} has frames 0 to {self.frame_count - 1}, not {i}")
    g = int(np.searchsorted(self.keys, i, side="right")) - 1
    if g >= 0:
      key, end = self.keys[g], self.keys[g + 1] if g + 1 < len(self.keys) else self.frame_count
      group = self.cache.get(key, {})
      if i not in group and (not group or max(group) < i):
        # a shuffling data loader reads one frame of a group; a second read means that more will follow
        with contextlib.closing(self._decode(key, end if group else i + 1)) as decoded:
          group = self.cache[key] = dict(decoded)
      self.cache.move_to_end(key)
    if g < 0 or i not in group:
      raise UserError(f"{self.path}: frame {i} cannot be decoded; the file is damaged there")
    while len(self.cache) > 1 and sum(map(len, self.cache.values())) * self.w * self.h * 3 // 2 > CACHE_BYTES:
      self.cache.popitem(last=False)
    return self._convert(group[i])

  def _decode(self, key: int, stop: int) -> Generator[tuple[int, Any], None, None]:
    """(i, libav's frame) of the undamaged frames of key..stop-1; key begins a group. After a lost picture the rest of
    its group is left out, since libav invents pictures there."""
    expected, bad_until = key, key
    ends = [k for k in self.keys if k > key]
    with contextlib.closing(self._raw_frames(key, stop) if self.raw else self._container_frames(key)) as decoded:
      for i, frame in decoded:
        if i >= stop:
          return
        if i < expected:  # a picture before the key: it needs another group
          continue
        hole = i > expected or (self.raw and i > key and self.numbers[i] > self.numbers[i - 1] + 1)
        if hole or i in self.broken or frame.is_corrupt:
          first_lost = expected if i > expected else i
          bad_until = max(
            bad_until,
            ends[g] if (g := int(np.searchsorted(ends, first_lost, side="right"))) < len(ends) else self.frame_count,
          )
        expected = i + 1
        if i >= bad_until:
          yield i, frame

  def _raw_frames(self, key: int, stop: int) -> Generator[tuple[int, Any], None, None]:
    codec: Any = av.CodecContext.create("hevc", "r")
    codec.options = {"max_pixels": str(MAX_PIXELS)}
    # twice the cores: a frame's thread often waits for rows of the frame before
    codec.thread_type, codec.thread_count = (
      ("AUTO", min(16, 2 * (os.cpu_count() or 1))) if stop - key > 1 else ("NONE", 1)
    )
    first = self.packet_of[key]
    last = self._last_packet(first, stop)
    # the file's own parameter sets, which a group need not repeat
    prefix = self.sets if key != self.keys[0] or first else b""
    with drained(codec):
      for k in range(first, last):
        a, b = self.packets[k]
        # not Packet(bytes): a decoder's thread frees that one while it holds its lock and waits for Python's
        packet = av.Packet(len(prefix) + b - a)
        packet.update(prefix + self.dat[a:b])
        packet.pts = int(self.positions[k])
        prefix = b""
        try:
          out = codec.decode(packet)
        except av.FFmpegError:
          continue  # a damaged picture; decoding is good again from the next keyframe on
        self.reordered = bool(codec.has_b_frames)  # from the parameter sets
        yield from ((f.pts, f) for f in out if f.pts is not None)
      with contextlib.suppress(av.FFmpegError):
        yield from ((f.pts, f) for f in codec.decode(None) if f.pts is not None)

  def _last_packet(self, first: int, stop: int) -> int:
    """Index after the last packet that frames up to stop-1 need."""
    if not self.reordered:
      return min(len(self.packets), first + stop - int(self.positions[first]))
    last = int(np.max(np.flatnonzero(self.positions < stop), initial=first)) + 1
    return min(len(self.packets), last)

  def _container_frames(self, key: int) -> Generator[tuple[int, Any], None, None]:
    place = {t: i for i, t in enumerate(self.times)}
    count = itertools.count()
    with av.open(str(self.path), options=OPTIONS) as c:
      stream = c.streams.video[0]
      stream.thread_type = "NONE" if self.threads == 1 else "AUTO"
      stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
      if key:
        with contextlib.suppress(av.FFmpegError):  # a damaged index: decode from the beginning
          c.seek(self.times[key], stream=stream)
      with drained(stream.codec_context):
        packets = c.demux(stream)
        while True:
          try:
            packet = next(packets, None)
          except av.FFmpegError:
            break  # the file's end is damaged; everything before it was good
          if packet is None:
            break
          try:
            frames = packet.decode()
          except av.FFmpegError:
            continue
          for f in frames:
            if self.counted:
              yield next(count), f
            elif f.pts in place:
              yield place[f.pts], f

  def _convert(self, frame: Any) -> np.ndarray:
    if self.pix_fmt == "rgb24":
      rgb = frame.to_ndarray(format="rgb24")[: frame.height // 2 * 2, : frame.width // 2 * 2]
      return (
        np.ascontiguousarray(np.rot90(rgb, self.turn))
        if self.turn or rgb.shape[:2] != (frame.height, frame.width)
        else rgb
      )
    y, u, v = self._planes(frame)
    h, w = y.shape
    out = np.empty((h * 3 // 2, w), dtype=np.uint8)  # no scaler: the planes are interleaved as they are
    out[:h] = y
    pairs = out[h:].view("<u2")  # in half the time of every second byte
    np.left_shift(v, 8, out=pairs, dtype=np.uint16, casting="unsafe")
    np.bitwise_or(pairs, u, out=pairs)
    return out

  def _planes(self, frame: Any) -> Planes:
    h, w = frame.height // 2 * 2, frame.width // 2 * 2
    if frame.format.name not in PLANAR:
      frame = frame.reformat(format="yuv420p")
    y, u, v = (np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width] for p in frame.planes)
    planes = y[:h, :w], u[: h // 2, : w // 2], v[: h // 2, : w // 2]
    return tuple(np.ascontiguousarray(np.rot90(p, self.turn)) for p in planes) if self.turn else planes  # type: ignore[return-value]

  def close(self) -> None:
    self.cache.clear()


def picture_size(path: Path) -> tuple[int, int] | None:
  """(width, height) of a video's frames, None where it cannot be read. Decodes its first pictures, and reads the whole
  file only where those are damaged."""
  try:
    if ordinary_size(path):
      raw = path.suffix.lower() in RAW_SUFFIXES
      with av.open(str(path), format="hevc" if raw else None, options=OPTIONS) as c:
        frame = next(c.decode(video=0))
      w, h = frame.width // 2 * 2, frame.height // 2 * 2
      if w and h and not frame.is_corrupt and frame.key_frame:
        return (h, w) if round((frame.rotation or 0) / 90) % 2 else (w, h)
  except (av.FFmpegError, StopIteration, IndexError, ValueError, OSError, UserError):
    pass
  try:
    reader = FrameReader(path)
  except UserError:
    return None
  return reader.w, reader.h

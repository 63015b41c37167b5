"""VisionIPC: camera frames in shared memory. The server hands its buffers' file descriptors over a unix socket, and
announces each frame on a messaging endpoint, as openpilot's does. Memory is anonymous: a killed server leaves nothing
behind."""

import contextlib
import errno
import fcntl
import json
import mmap
import os
import selectors
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from openpilot.cereal.messaging import PubSocket, SubSocket, endpoint_path

ANNOUNCE = struct.Struct("<QIIQQB")  # server id, buffer index, frame id, start and end of frame in ns, valid
MAX_BUFFERS = 253  # descriptors that one message of a unix socket may carry
MAX_SIDE, MAX_SIZE, MAX_MEMORY = (
  16384,
  1 << 28,
  1 << 31,
)  # pixels; bytes of a buffer, and of all that a server hands out
PEERS, PATIENCE = 64, 1.0  # connections at once; s within which one must send its request
REPLY = 4096  # bytes of an answer
ASK_AGAIN = 0.1  # s between two searches for a new server: announcements of unknown servers cost no more than that
# linux/fcntl.h. A buffer that shrank under its reader would kill it by SIGBUS
F_ADD_SEALS, F_GET_SEALS, F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW = 1033, 1034, 1, 2, 4


class VisionStreamType:
  VISION_STREAM_NARROW_ROAD = 0
  VISION_STREAM_CABIN = 1
  VISION_STREAM_WIDE_ROAD = 2
  VISION_STREAM_MAP = 3
  # the names before August 2026
  VISION_STREAM_ROAD = 0
  VISION_STREAM_DRIVER = 1


def align(x: int, to: int) -> int:
  return (x + to - 1) // to * to


def nv12_info(width: int, height: int) -> tuple[int, int, int, int]:
  """stride, y_height, uv_height, buffer size of an NV12 frame in the layout of the Snapdragon's camera and video blocks
  (openpilot: nv12_info.py).

  The chroma plane begins at stride * y_height. The size is what the video block requires: a page behind the chroma
  plane, eight more lines, and half a kilobyte for each column of the width rounded up to 512."""
  stride, y_height, uv_height = align(width, 128), align(height, 32), align(height // 2, 16)
  planes = stride * y_height + stride * uv_height + 4096
  return stride, y_height, uv_height, align(planes + max(16 * 1024, 8 * stride), 4096) + align(width, 512) * 512


class VisionBuf:
  """One frame buffer. data: 1-D uint8 over shared memory, no copy."""

  def __init__(self, fd: int, idx: int, size: int, width: int, height: int, stride: int, uv_offset: int):
    self.fd, self.idx, self.width, self.height, self.stride, self.uv_offset = fd, idx, width, height, stride, uv_offset
    self.map = mmap.mmap(fd, size)
    self.data = np.frombuffer(self.map, dtype=np.uint8)
    self.frame_id = 0

  @property
  def picture_size(self) -> int:
    """Bytes up to the end of the chroma plane; the rest is reserved for the video block."""
    return self.uv_offset + self.stride * (self.height // 2)


def _check_platform() -> None:
  """Raises OSError where camera buffers cannot be shared in openpilot's way."""
  if sys.platform == "darwin":
    what = (
      "VisionIPC is not supported on macOS; label, distill, export and evaluate run here, commands that play or read "
      "camera frames need Linux"
    )
    raise OSError(errno.EOPNOTSUPP, what)


def _memory(size: int) -> int:
  if hasattr(os, "memfd_create"):
    fd = os.memfd_create("visionbuf", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
  else:  # macOS
    fd, path = tempfile.mkstemp()
    os.unlink(path)
    os.ftruncate(fd, size)
  return fd


def check_info(info: Any, fds: list[int]) -> dict[str, int]:
  """Checks a server's description of its buffers. Raises ValueError on impossible sizes, and on files that are smaller
  or may shrink."""
  wanted = ("server", "width", "height", "stride", "uv_offset", "size")
  if not isinstance(info, dict) or any(type(info.get(k)) is not int for k in wanted):
    raise ValueError(f"a server's info lacks one of {', '.join(wanted)}")
  width, height, stride, uv_offset, size = (info[k] for k in wanted[1:])
  if not (
    2 <= width <= stride <= 4 * MAX_SIDE
    and 2 <= height <= MAX_SIDE
    and width <= MAX_SIDE
    and uv_offset >= stride * height
  ):
    raise ValueError(f"a server's frames of {width}x{height} with stride {stride} cannot be")
  if not uv_offset + stride * (height // 2) <= size <= MAX_SIZE or size * len(fds) > MAX_MEMORY:
    raise ValueError(f"a server's {len(fds)} buffers of {size} bytes do not hold its frames, or are too large")
  for fd in fds:
    if os.fstat(fd).st_size < size:
      raise ValueError("a server's buffer is shorter than it says")
    if sys.platform == "linux" and not fcntl.fcntl(fd, F_GET_SEALS) & F_SEAL_SHRINK:  # OSError: no memory file at all
      raise ValueError("a server's buffer may shrink while it is read")
  return info


def close_all(fds: list[int]) -> None:
  for fd in fds:
    os.close(fd)


class VisionIpcServer:
  def __init__(self, name: str):
    _check_platform()
    self.name = name
    self.id = int.from_bytes(os.urandom(8), "little")
    self.buffers: dict[int, list[VisionBuf]] = {}
    self.next: dict[int, int] = {}
    self.pub: dict[int, PubSocket] = {}
    self.listener: socket.socket | None = None
    self.thread: threading.Thread | None = None

  def create_buffers(self, stream: int, num_buffers: int, width: int, height: int) -> None:
    stride, y_height, _, size = nv12_info(width, height)
    self.create_buffers_with_sizes(stream, num_buffers, width, height, size, stride, stride * y_height)

  def create_buffers_with_sizes(
    self, stream: int, num_buffers: int, width: int, height: int, size: int, stride: int, uv_offset: int
  ) -> None:
    """Raises MultiplePublishersError where a living process serves the stream, ValueError on impossible sizes."""
    if not 1 <= num_buffers <= MAX_BUFFERS:
      raise ValueError(f"{num_buffers} buffers; 1 to {MAX_BUFFERS} are possible")
    if size < uv_offset + stride * (height // 2):
      raise ValueError(f"buffers of {size} bytes do not hold {width}x{height} NV12 with stride {stride}")
    assert self.listener is None, "create all buffers before start_listener()"
    self.pub[stream] = PubSocket(f"visionipc_{self.name}_{stream}")
    self.buffers[stream] = [
      VisionBuf(_memory(size), i, size, width, height, stride, uv_offset) for i in range(num_buffers)
    ]
    self.next[stream] = 0

  def start_listener(self) -> None:
    path = endpoint_path(f"visionipc_{self.name}")
    with contextlib.suppress(FileNotFoundError):
      os.unlink(path)  # left by a killed server; a living one would hold the lock of its streams
    self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    self.listener.bind(path)
    self.listener.listen(16)
    self.thread = threading.Thread(target=self._listen, args=(self.listener,), daemon=True)
    self.thread.start()

  def _listen(self, listener: socket.socket) -> None:
    """Answers requests until the listener is closed. A silent connection delays no other."""
    until: dict[socket.socket, float] = {}  # connections without a request yet

    def drop(conn: socket.socket) -> None:
      del until[conn]
      waiting.unregister(conn)
      conn.close()

    with selectors.DefaultSelector() as waiting:
      waiting.register(listener, selectors.EVENT_READ)
      while listener.fileno() >= 0:
        for key, _ in waiting.select(0.1):
          if key.fileobj is not listener:
            conn = key.fileobj
            assert isinstance(conn, socket.socket)
            with contextlib.suppress(OSError, ValueError):  # ValueError: the request is not a number
              self._answer(conn)
            drop(conn)
            continue
          try:
            conn, _ = listener.accept()
          except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED, errno.EAGAIN):
              time.sleep(0.05)
              continue
            return  # closed
          conn.setblocking(False)
          until[conn] = time.monotonic() + PATIENCE
          waiting.register(conn, selectors.EVENT_READ)
          if len(until) > PEERS:
            drop(min(until, key=lambda c: until[c]))
        for conn in [c for c, end in until.items() if end < time.monotonic()]:
          drop(conn)

  def _answer(self, conn: socket.socket) -> None:
    request = conn.recv(64).decode()
    if request == "streams":
      conn.sendall(json.dumps(sorted(self.buffers)).encode())
      return
    bufs = self.buffers.get(int(request))
    if bufs is None:
      conn.sendall(b"{}")
      return
    b = bufs[0]
    info = {
      "server": self.id,
      "width": b.width,
      "height": b.height,
      "stride": b.stride,
      "uv_offset": b.uv_offset,
      "size": len(b.map),
    }
    socket.send_fds(conn, [json.dumps(info).encode()], [x.fd for x in bufs])

  def get_buffer(self, stream: int) -> VisionBuf:
    """The buffer to fill next; hand it over with send_buffer()."""
    bufs = self.buffers[stream]
    buf = bufs[self.next[stream]]
    self.next[stream] = (self.next[stream] + 1) % len(bufs)
    return buf

  def send_buffer(
    self, stream: int, buf: VisionBuf, frame_id: int, timestamp_sof: int, timestamp_eof: int, valid: bool = True
  ) -> None:
    self.pub[stream].send(ANNOUNCE.pack(self.id, buf.idx, frame_id & 0xFFFFFFFF, timestamp_sof, timestamp_eof, valid))

  def send(self, stream: int, data: Any, frame_id: int = 0, timestamp_sof: int = 0, timestamp_eof: int = 0) -> None:
    """data: bytes-like, a whole buffer or its beginning. Copies only the planes: a quarter of a 1928x1208 buffer lies
    behind them."""
    buf = self.get_buffer(stream)
    src = np.frombuffer(data, dtype=np.uint8)[: buf.picture_size]
    np.copyto(buf.data[: src.size], src)
    self.send_buffer(stream, buf, frame_id, timestamp_sof, timestamp_eof)

  def close(self) -> None:
    if self.listener is not None:
      with contextlib.suppress(OSError):
        self.listener.shutdown(socket.SHUT_RDWR)
      self.listener.close()
      with contextlib.suppress(FileNotFoundError):
        os.unlink(endpoint_path(f"visionipc_{self.name}"))
    for pub in self.pub.values():
      pub.close()
    for bufs in self.buffers.values():
      close_all([b.fd for b in bufs])
    self.buffers, self.pub = {}, {}


@contextlib.contextmanager
def _no_server() -> Iterator[None]:
  """Ignores errors of a missing or wrong server. Raises where this process may open no more files, since it would wait
  forever."""
  try:
    yield
  except OSError as e:
    if e.errno in (errno.EMFILE, errno.ENFILE):
      raise
  except ValueError:
    pass


class VisionIpcClient:
  """recv() returns the next frame, with conflate the newest. A restarted server is found at the next recv() or
  connect()."""

  def __init__(self, name: str, stream: int, conflate: bool):
    _check_platform()
    self.name, self.stream, self.conflate = name, stream, conflate
    self.sub: SubSocket | None = None
    self.server = 0
    self.ask_after = 0.0  # monotonic s
    self.buffers: list[VisionBuf] = []
    self.frame_id = self.timestamp_sof = self.timestamp_eof = 0
    self.valid = False
    self.width = self.height = self.stride = self.uv_offset = self.buffer_len = 0

  @staticmethod
  def _ask(name: str, request: str, max_fds: int = 0) -> tuple[Any, list[int]]:
    """The server's answer, and descriptors, which the caller must close. Raises OSError without a server, ValueError on
    an invalid answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
      s.settimeout(1.0)
      s.connect(endpoint_path(f"visionipc_{name}"))
      s.sendall(request.encode())
      fds: list[int] = []
      if max_fds:
        dat, fds, flags, _ = socket.recv_fds(s, REPLY, max_fds)
        if flags & socket.MSG_CTRUNC:  # some of them did not fit into this process
          close_all(fds)
          raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
      else:
        dat = s.recv(REPLY)
      try:
        return json.loads(dat), list(fds)
      except (ValueError, RecursionError):
        close_all(fds)
        raise ValueError(f"the server of {name} answers with something that is not JSON") from None

  @staticmethod
  def available_streams(name: str, block: bool = True) -> set[int]:
    while True:
      with _no_server():
        found = VisionIpcClient._ask(name, "streams")[0]
        if isinstance(found, list):
          return {x for x in found if type(x) is int}
      if not block:
        return set()
      time.sleep(0.05)

  def connect(self, blocking: bool = True) -> bool:
    while True:
      with _no_server():
        info, fds = self._ask(self.name, str(self.stream), MAX_BUFFERS)
        if fds:
          self._take(info, fds)
          return True
      if not blocking:
        return False
      time.sleep(0.05)

  def _take(self, info: Any, fds: list[int]) -> None:
    """Raises ValueError or OSError on an implausible answer; then the descriptors are closed and nothing has
    changed."""
    try:
      info = check_info(info, fds)
      buffers = [
        VisionBuf(fd, i, info["size"], info["width"], info["height"], info["stride"], info["uv_offset"])
        for i, fd in enumerate(fds)
      ]
    except (OSError, ValueError):
      close_all(fds)
      raise
    self._release()
    self.server, self.buffers = info["server"], buffers
    self.width, self.height, self.stride, self.uv_offset, self.buffer_len = (
      info[k] for k in ("width", "height", "stride", "uv_offset", "size")
    )
    if self.sub is None:  # kept over a server's restart: it reconnects automatically
      self.sub = SubSocket(f"visionipc_{self.name}_{self.stream}", conflate=self.conflate)

  def _release(self) -> None:
    close_all([b.fd for b in self.buffers])  # the mapping is freed with the last array over it
    self.buffers, self.server = [], 0

  def is_connected(self) -> bool:
    return bool(self.buffers)

  @property
  def num_buffers(self) -> int:
    return len(self.buffers)

  def recv(self, timeout_ms: int = 100) -> VisionBuf | None:
    """None after timeout_ms without a frame, and where the server has ended or been replaced: is_connected()
    distinguishes the two."""
    if self.sub is None or not self.buffers:
      return None
    self.sub.setTimeout(timeout_ms)
    dat = self.sub.receive()
    if dat is None:
      with _no_server():
        self._ask(self.name, "streams")
        return None  # the server is alive, it only sent nothing
      self._release()
      return None
    if len(dat) != ANNOUNCE.size:
      return None
    server, idx, frame_id, sof, eof, valid = ANNOUNCE.unpack(dat)
    if server != self.server:  # a new server: its buffers must be fetched first
      if time.monotonic() < self.ask_after:
        return None
      self.ask_after = time.monotonic() + ASK_AGAIN
      self.connect(blocking=False)
    if server != self.server or idx >= len(self.buffers):  # an announcement of an unknown server
      return None
    self.frame_id, self.timestamp_sof, self.timestamp_eof, self.valid = frame_id, sof, eof, bool(valid)
    buf = self.buffers[idx]
    buf.frame_id = self.frame_id
    return buf

  def close(self) -> None:
    self._release()
    if self.sub is not None:
      self.sub.close()
      self.sub = None

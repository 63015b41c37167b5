"""Neighbors of VisionIPC that do not keep to the rules: answers, descriptors, announcements, requests. Who reads a
frame afterwards reads inside its buffer, and no descriptor is left."""

import contextlib
import json
import os
import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openpilot.cereal.visionipc import ANNOUNCE, VisionIpcClient, VisionIpcServer, VisionStreamType, _memory
from tests.fuzz.fuzz import Case
from tests.fuzz.json_mutator import spoil_json

REFUSED = ()
ROAD = VisionStreamType.VISION_STREAM_ROAD
W, H, STRIDE, SIZE = 64, 32, 128, 12288
NUMBERS = (-1, 0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 4095, 4096, 4097, 12288, 2**16, 2**31, 2**32, 2**63, 2**64)


class Sub:
  """In place of the subscriber's socket."""

  def __init__(self, *_: object, **__: object):
    self.dat: bytes | None = None

  def setTimeout(self, timeout: int) -> None: ...

  def close(self) -> None: ...

  def receive(self) -> bytes | None:
    dat, self.dat = self.dat, None
    return dat


def open_descriptors() -> int:
  return len(os.listdir("/proc/self/fd"))


def spoiled_info(info: dict[str, Any], r: random.Random) -> dict[str, Any]:
  info = dict(info)
  for _ in range(r.choice((1, 1, 2, 3))):
    info[r.choice(list(info))] = r.choice((r.choice(NUMBERS), r.getrandbits(r.choice((8, 16, 33, 70)))))
  return info


def spoiled(dat: bytes, r: random.Random) -> bytes:
  b = bytearray(dat)
  for _ in range(r.choice((1, 1, 2, 5))):
    at = r.randrange(len(b) + 1)
    kind = r.randrange(4)
    if kind == 0:
      b[at : at + 4] = r.choice(NUMBERS[1:18]).to_bytes(4, "little")
    elif kind == 1:
      del b[at:]
    elif kind == 2:
      b[at:at] = r.randbytes(r.choice((1, 8, 1000)))
    else:
      b[at : at + 1] = r.randbytes(1)
  return bytes(b)


@contextlib.contextmanager
def prepare(tmp: Path, counts: Counter[str]) -> Iterator[Callable[[random.Random], Case]]:
  with pytest.MonkeyPatch.context() as m:
    m.setenv("OPENPILOT_PREFIX", tmp.name)
    m.setattr("openpilot.cereal.visionipc.SubSocket", Sub)
    m.setattr("openpilot.cereal.visionipc.ASK_AGAIN", 0.0)
    server = VisionIpcServer("camerad")
    server.create_buffers(ROAD, 4, W, H)
    good = {"server": 7, "width": W, "height": H, "stride": STRIDE, "uv_offset": STRIDE * H, "size": SIZE}
    small, empty = _memory(SIZE - 1), _memory(0)
    files = [_memory(SIZE) for _ in range(3)]
    reply: list[Any] = []  # what the next answer is, and its descriptors
    m.setattr(VisionIpcClient, "_ask", staticmethod(lambda name, request, most=0: answer(most)))
    client = VisionIpcClient("camerad", ROAD, True)

    def answer(most: int) -> tuple[Any, list[int]]:
      """As VisionIpcClient._ask() gives it, of bytes that came from a socket."""
      text, fds = reply
      handed = [os.dup(fd) for fd in fds[:most]]
      try:
        return json.loads(text), handed
      except (ValueError, RecursionError):
        for fd in handed:
          os.close(fd)
        raise ValueError("no JSON") from None

    def connect(text: bytes, fds: list[int]) -> None:
      reply[:] = [text, fds]
      client.close()
      before = open_descriptors()
      taken = client.connect(blocking=False) and client.is_connected()
      # one is the buffer's, one its mapping's
      assert open_descriptors() == before + 2 * client.num_buffers and (client.num_buffers > 0) == taken
      counts["connected"] += taken
      VisionIpcClient.available_streams("camerad", block=False)

    def hear(dat: bytes) -> None:
      if not client.is_connected():
        reply[:] = [json.dumps(good).encode(), files]
        assert client.connect(blocking=False)
      client.sub.dat = dat
      buf = client.recv(0)
      if buf is not None:
        counts["frames"] += 1
        assert buf in client.buffers and buf.picture_size <= len(buf.data) == client.buffer_len
        assert 0 <= client.frame_id < 2**32 and int(np.asarray(buf.data[: buf.picture_size]).sum()) >= 0

    def serve(request: bytes) -> None:
      ours, theirs = socket.socketpair()
      with ours, theirs:
        theirs.settimeout(1.0)
        theirs.sendall(request)
        ours.setblocking(False)
        with contextlib.suppress(OSError, ValueError):  # as the listener has it
          server._answer(ours)
        ours.close()
        dat, fds, *_ = socket.recv_fds(theirs, 4096, 64)
        assert len(fds) in (0, 4) and len(dat) < 4096
        counts["served"] += len(fds) > 0
        for fd in fds:
          os.close(fd)

    def cases(r: random.Random) -> Case:
      kind = r.randrange(10)
      if kind == 0:
        fds = r.choice((files, files[:1], [*files, small], [empty], [*files, 0], [], files * 10))
        text = json.dumps(good if r.random() < 0.2 else spoiled_info(good, r)).encode()
        yield "info", lambda: connect(text, fds)
      elif kind == 1:
        text = spoil_json(json.dumps(r.choice((good, [0, 1, 2]))).encode(), r)
        yield "answer", lambda: connect(text, files)
      elif kind == 2:
        request = spoiled(r.choice((b"streams", b"0", b"1", b"2")), r)[:64] or b"\0"
        yield "request", lambda: serve(request)
      else:
        announced = ANNOUNCE.pack(
          client.server % 2**64 if r.random() < 0.9 else 8, r.choice((0, 1, 2, 3, 99)), 5, 6, 7, 1
        )
        yield "announcement", lambda: hear(spoiled(announced, r) if r.random() < 0.8 else announced)

    begun = open_descriptors()
    try:
      yield cases
      client.close()
      assert open_descriptors() == begun
      connect(json.dumps(good).encode(), files)
      hear(ANNOUNCE.pack(7, 1, 5, 6, 7, 1))
      assert (client.frame_id, client.timestamp_sof, client.timestamp_eof, client.valid) == (5, 6, 7, True)
    finally:
      client.close()
      server.close()
      for fd in (small, empty, *files):
        os.close(fd)

"""Neighbors of VisionIPC and messaging that do not keep to the rules: nobody ends, hangs, leaks or believes them."""

import contextlib
import json
import os
import socket
import tempfile
import threading
from pathlib import Path

import pytest

from openpilot.cereal import messaging, visionipc
from openpilot.cereal.visionipc import (
  ANNOUNCE,
  MAX_MEMORY,
  PEERS,
  VisionIpcClient,
  VisionIpcServer,
  VisionStreamType,
  _memory,
)

ROAD = VisionStreamType.VISION_STREAM_ROAD
W, H, STRIDE, UV, SIZE = 64, 32, 128, 128 * 32, 128 * 48 + 4096
GOOD = {"server": 7, "width": W, "height": H, "stride": STRIDE, "uv_offset": UV, "size": SIZE}


class Peer:
  """A server that answers every request with the same bytes and descriptors."""

  def __init__(self, answer: bytes, fds: list[int]):
    self.answer, self.fds = answer, fds
    self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    self.socket.bind(messaging.endpoint_path("visionipc_camerad"))
    self.socket.listen(16)
    self.thread = threading.Thread(target=self.run, daemon=True)
    self.thread.start()

  def run(self):
    while True:
      try:
        conn, _ = self.socket.accept()
      except OSError:
        return
      with conn:
        conn.recv(64)
        if self.fds:
          socket.send_fds(conn, [self.answer], self.fds)
        else:
          conn.sendall(self.answer)

  def close(self):
    self.socket.shutdown(socket.SHUT_RDWR)
    self.socket.close()
    self.thread.join()
    os.unlink(messaging.endpoint_path("visionipc_camerad"))


@pytest.fixture
def peer(prefix):
  made = []

  def make(answer, fds=()):
    made.append(Peer(answer if isinstance(answer, bytes) else json.dumps(answer).encode(), list(fds)))
    return made[-1]

  yield make
  for p in made:
    p.close()


def buffers_open() -> int:
  """Descriptors of the kinds that peers hand over here; sockets of threads come and go."""
  links = []
  for name in os.listdir("/proc/self/fd"):
    with contextlib.suppress(OSError):
      links.append(os.readlink(f"/proc/self/fd/{name}"))
  return sum(x.startswith(("/memfd:", "pipe:")) or "pytest" in x for x in links)


def unsealed(size: int) -> int:
  fd = os.memfd_create("x")
  os.ftruncate(fd, size)
  return fd


INFOS = {
  "a list": [],
  "nothing": {},
  "null": None,
  "a number": 5,
  "a text": "x",
  **{f"without {k}": {n: v for n, v in GOOD.items() if n != k} for k in GOOD},
  **{
    f"{k} {v}": {**GOOD, k: v}
    for k in ("width", "height", "stride", "uv_offset", "size")
    for v in (-1, 0, 1, 2**31, 2**63, 2**70, 1.5, True, "64", None, [])
  },
  "chroma over luma": {**GOOD, "uv_offset": STRIDE * (H - 1)},
  "narrow rows": {**GOOD, "stride": W - 1},
  "buffers too short": {**GOOD, "size": UV},
  "one byte of chroma too short": {**GOOD, "size": UV + STRIDE * 16 - 1},
}


@pytest.mark.parametrize("name", INFOS)
def test_sizes_that_cannot_be_are_refused(peer, name):
  fd = _memory(SIZE)
  peer(INFOS[name], [fd])
  client, before = VisionIpcClient("camerad", ROAD, True), buffers_open()
  assert not client.connect(False) and not client.is_connected() and client.recv(1) is None
  assert buffers_open() == before
  os.close(fd)


@pytest.mark.parametrize("answer", [b"", b"{", b"\xff\xfe", b"[" * 4000, b'{"a":' * 700, b"nan", b'{"server": 1e999}'])
def test_answers_that_are_no_json_leave_no_descriptor(peer, answer):
  fd = _memory(SIZE)
  peer(answer or b" ", [fd] * 50)
  client, before = VisionIpcClient("camerad", ROAD, True), buffers_open()
  for _ in range(20):
    assert not client.connect(False)
  assert VisionIpcClient.available_streams("camerad", block=False) == set()
  assert buffers_open() == before
  os.close(fd)


def test_streams_are_numbers(peer):
  peer([0, "1", None, 2.0, [3], True, 2])
  assert VisionIpcClient.available_streams("camerad", block=False) == {0, 2}


@pytest.mark.parametrize("kind", ["sealed", "shorter", "may shrink", "a pipe", "a folder", "too many"])
def test_buffers_are_memory_that_cannot_shrink(peer, tmp_path, kind):
  """One that shrinks under its reader would end it by SIGBUS."""
  fds = {
    "sealed": lambda: [_memory(SIZE)],
    "shorter": lambda: [_memory(SIZE - 1)],
    "may shrink": lambda: [unsealed(SIZE)],
    "a pipe": lambda: list(os.pipe()),
    "a folder": lambda: [os.open(tmp_path, os.O_RDONLY)],
    "too many": lambda: [_memory(1 << 20)] * 250,
  }[kind]()
  peer({**GOOD, "size": MAX_MEMORY // 200} if kind == "too many" else GOOD, fds)
  client, before = VisionIpcClient("camerad", ROAD, True), buffers_open()
  assert client.connect(False) == (kind == "sealed")
  client.close()
  assert buffers_open() == before
  for fd in set(fds):
    os.close(fd)


def test_our_buffers_cannot_shrink(prefix):
  server = VisionIpcServer("camerad")
  server.create_buffers(ROAD, 2, W, H)
  with pytest.raises(PermissionError):
    os.ftruncate(server.buffers[ROAD][0].fd, 0)
  server.close()


@pytest.fixture
def live(prefix):
  server = VisionIpcServer("camerad")
  server.create_buffers(ROAD, 4, W, H)
  server.start_listener()
  client = VisionIpcClient("camerad", ROAD, False)
  assert client.connect()
  for _ in range(500):
    server.send(ROAD, bytes(100), 1)
    if client.recv(20) is not None:
      break
  while client.recv(20) is not None:
    pass
  yield server, client
  client.close()
  server.close()


def test_announcements_that_are_none(live):
  server, client = live
  before = buffers_open()
  good = ANNOUNCE.pack(server.id, 1, 5, 6, 7, 1)
  for bad in (
    b"",
    good[:-1],
    good + b"\0",
    bytes(10**6),
    ANNOUNCE.pack(server.id, 4, 9, 9, 9, 1),
    ANNOUNCE.pack(server.id, 2**32 - 1, 9, 9, 9, 1),
    *(ANNOUNCE.pack(k, 0, 9, 9, 9, 1) for k in range(200)),
  ):
    server.pub[ROAD].sock.send(bad)
  server.pub[ROAD].sock.send(good)
  got = [buf for _ in range(250) if (buf := client.recv(20)) is not None]
  assert len(got) == 1 and (got[0].idx, client.frame_id, client.timestamp_sof, client.timestamp_eof, client.valid) == (
    1,
    5,
    6,
    7,
    True,
  )
  assert buffers_open() == before and client.is_connected()


def test_who_says_nothing_holds_up_nobody(live, monkeypatch):
  monkeypatch.setattr(visionipc, "PATIENCE", 600.0)  # as good as for ever
  path = messaging.endpoint_path("visionipc_camerad")
  silent = []
  for _ in range(2 * PEERS):
    s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    s.settimeout(20)
    s.connect(path)
    silent.append(s)
    assert VisionIpcClient.available_streams("camerad", block=False) == {ROAD}
  assert silent[0].recv(1) == b""  # the oldest of too many was shown out
  for words in (b"\xff" * 64, b"99999999999999999999", b"-1", b"streams\0", b"1e3"):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
      s.settimeout(20)
      s.connect(path)
      s.sendall(words)
      assert s.recv(64) in (b"", b"{}")
  assert VisionIpcClient.available_streams("camerad", block=False) == {ROAD}
  for s in silent:
    s.close()


def test_a_listener_lives_through_a_lack_of_descriptors(prefix, monkeypatch):
  accepts, honest = [], socket.socket.accept

  def accept(self):
    accepts.append(1)
    if len(accepts) <= 3:
      raise OSError(24, "Too many open files")
    return honest(self)

  monkeypatch.setattr(socket.socket, "accept", accept)
  server = VisionIpcServer("camerad")
  server.create_buffers(ROAD, 2, W, H)
  server.start_listener()
  assert VisionIpcClient.available_streams("camerad") == {ROAD} and len(accepts) > 3
  server.close()
  server.thread.join(20)
  assert not server.thread.is_alive()


@pytest.fixture
def short(monkeypatch):
  """A TMPDIR: pytest's own are too long for sockets."""
  with tempfile.TemporaryDirectory(prefix="f", dir="/tmp") as folder:
    monkeypatch.setenv("TMPDIR", folder)
    yield Path(folder)


def test_the_sockets_folder_is_this_users_alone(prefix, short):
  own = short / f"openpilot-{os.getuid()}"
  old = os.umask(0)
  try:
    folder = os.path.dirname(messaging.endpoint_path("x"))
    assert [os.stat(p).st_mode & 0o777 for p in (own, folder)] == [0o700, 0o700]
    os.chmod(own, 0o755)  # as an older version made it
    os.chmod(folder, 0o777)
    messaging.endpoint_path("x")
    assert [os.stat(p).st_mode & 0o777 for p in (own, folder)] == [0o700, 0o700]
  finally:
    os.umask(old)


@pytest.mark.parametrize("kind", ["somebody else's", "a link", "a file"])
def test_a_folder_that_somebody_else_made_is_refused(prefix, short, monkeypatch, kind):
  uid = os.getuid()
  if kind == "somebody else's":
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    (short / f"openpilot-{uid + 1}").mkdir()
  elif kind == "a link":
    (short / "theirs").mkdir()
    (short / f"openpilot-{uid}").symlink_to(short / "theirs")
  else:
    (short / f"openpilot-{uid}").touch()
  with pytest.raises(PermissionError, match="TMPDIR") as e:
    messaging.pub_sock("fairState")
  assert "\n" not in str(e.value)


@pytest.mark.parametrize(("width", "height", "good"), [(2, 2, True), (1, 2, False), (2, 1, False)])
def test_the_smallest_frame_is_of_two_by_two(width, height, good):
  fd = _memory(4096)
  info = {**GOOD, "width": width, "height": height, "stride": 2, "uv_offset": 2 * height, "size": 4096}
  if good:
    assert visionipc.check_info(info, [fd]) == info
  else:
    with pytest.raises(ValueError, match="cannot be"):
      visionipc.check_info(info, [fd])
  os.close(fd)

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from openpilot.cereal.messaging import MultiplePublishersError
from openpilot.cereal.visionipc import VisionIpcClient, VisionIpcServer, VisionStreamType, nv12_info

ROAD, WIDE = VisionStreamType.VISION_STREAM_ROAD, VisionStreamType.VISION_STREAM_WIDE_ROAD
DEADLINE = 20.0

SERVER = """
import sys, time
import numpy as np
from openpilot.cereal.visionipc import VisionIpcServer, nv12_info
s = VisionIpcServer("camerad")
s.create_buffers(0, 8, 1344, 760)
s.start_listener()
size = nv12_info(1344, 760)[3]
i = int(sys.argv[1])
while True:
  i += 1
  s.send(0, np.full(size, i % 251, np.uint8), i, i * 1000, i * 1000 + 7)
  time.sleep(.04)  # of 8 buffers none is written again before a reader of a busy machine has looked
"""


def until(f, what):
  end = time.monotonic() + DEADLINE
  while not (value := f()):
    assert time.monotonic() < end, f"no {what} within {DEADLINE} s"
  return value


def test_sizes_are_openpilots():
  assert nv12_info(1344, 760) == (1408, 768, 384, 2_428_928)
  assert nv12_info(1928, 1208) == (2048, 1216, 608, 4_804_608)


def test_frames_cross_processes_and_a_killed_server_is_found_again(prefix):
  client = VisionIpcClient("camerad", ROAD, False)
  assert (
    client.recv(1) is None
    and not client.connect(False)
    and VisionIpcClient.available_streams("camerad", block=False) == set()
  )
  for start in (0, 5000):
    proc = subprocess.Popen([sys.executable, "-c", SERVER, str(start)])
    if start == 0:
      assert client.connect(True)
    else:
      until(lambda: client.is_connected() or client.connect(False), "connection")
    assert (client.width, client.height, client.stride, client.uv_offset, client.num_buffers) == (
      1344,
      760,
      1408,
      1408 * 768,
      8,
    )
    ids = []
    while len(ids) < 20:
      buf = until(lambda: client.recv(100), "frame")
      i = client.frame_id
      assert (
        (buf.data[: buf.picture_size] == i % 251).all()
        and client.timestamp_sof == i * 1000
        and client.timestamp_eof == i * 1000 + 7
        and client.valid
      )
      ids.append(i)
    assert ids == list(range(ids[0], ids[0] + 20)) and ids[0] > start
    os.kill(proc.pid, signal.SIGKILL)
    proc.wait()
    until(lambda: client.recv(20) is None and not client.is_connected(), "loss of the server")
  client.close()


@pytest.fixture
def server(prefix):
  s = VisionIpcServer("camerad")
  s.create_buffers(ROAD, 4, 526, 330)
  s.create_buffers(WIDE, 4, 1928, 1208)
  s.start_listener()
  yield s
  s.close()


def test_conflate_gives_the_newest(server):
  every, newest = VisionIpcClient("camerad", ROAD, False), VisionIpcClient("camerad", ROAD, True)
  assert every.connect() and newest.connect()
  until(lambda: server.send(ROAD, bytes(100), 0) or (every.recv(20) and newest.recv(20)), "first frame")
  while every.recv(20):
    pass
  for i in range(1, 4):
    server.send(ROAD, np.full(1000, i, np.uint8), i)
  time.sleep(0.1)
  assert [every.recv() is not None and every.frame_id for _ in range(3)] == [1, 2, 3]
  assert newest.recv().data[:1000].tolist() == [3] * 1000 and newest.frame_id == 3
  every.close()
  newest.close()


def test_streams_and_second_server(server):
  assert VisionIpcClient.available_streams("camerad") == {ROAD, WIDE}
  assert not VisionIpcClient("camerad", VisionStreamType.VISION_STREAM_CABIN, True).connect(False)
  with pytest.raises(MultiplePublishersError):
    VisionIpcServer("camerad").create_buffers(ROAD, 4, 526, 330)


def test_no_descriptor_is_lost(server):
  def count():
    return len(os.listdir("/proc/self/fd"))

  def once():
    c = VisionIpcClient("camerad", WIDE, True)
    assert c.connect()
    c.close()

  for _ in range(3):
    once()
  time.sleep(0.3)
  before = count()
  for _ in range(30):
    once()
  time.sleep(0.3)
  assert count() <= before + 2


def test_send_copies_both_planes_to_their_last_line(server):
  """330 lines of luma and 165 of chroma: 526x330 has a stride of 640 and 352 lines of room before the chroma plane."""
  client = VisionIpcClient("camerad", ROAD, True)
  assert client.connect()
  data = np.random.default_rng(0).integers(0, 256, nv12_info(526, 330)[3], np.uint8)
  buf = until(lambda: server.send(ROAD, data, 1) or client.recv(20), "frame")
  end = 640 * 352 + 640 * 165
  assert (buf.data[:end] == data[:end]).all()
  client.close()

#!/usr/bin/env python3
"""A 1928x1208 NV12 frame from a server process to a client process: VisionIPC against sending its bytes through ZeroMQ.
One-way time, from before send() to the frame in hand; and what the call takes of the processor, beside one copy of the
same bytes into the same buffers.

python tests/bench/bench_visionipc.py [FRAMES]"""

import argparse
import ctypes
import multiprocessing
import os
import time

if not __package__:  # run as a file
  import from_root  # noqa: F401

import numpy as np

from openpilot.cereal.messaging import PubSocket, SubSocket
from openpilot.cereal.visionipc import VisionIpcClient, VisionIpcServer, VisionStreamType, nv12_info
from tests.bench.turns import in_turns, ratio

W, H = 1928, 1208
ROAD = VisionStreamType.VISION_STREAM_ROAD
PERIOD = 0.02


def serve_vision(n, go):
  server = VisionIpcServer("bench")
  server.create_buffers(ROAD, 8, W, H)
  server.start_listener()
  frames = [np.full(nv12_info(W, H)[3], i, np.uint8) for i in range(4)]
  go.wait()
  time.sleep(0.3)
  for i in range(n):
    time.sleep(PERIOD)
    server.send(ROAD, frames[i % 4], i, 0, time.monotonic_ns())
  time.sleep(0.5)


def serve_in_place(n, go):
  """As replay does: the frame is made in the buffer and only announced."""
  server = VisionIpcServer("bench")
  server.create_buffers(ROAD, 8, W, H)
  server.start_listener()
  go.wait()
  time.sleep(0.3)
  for i in range(n):
    time.sleep(PERIOD)
    buf = server.get_buffer(ROAD)
    buf.data[0] = buf.data[buf.picture_size - 1] = i % 4
    server.send_buffer(ROAD, buf, i, 0, time.monotonic_ns())
  time.sleep(0.5)


def serve_zmq(n, go):
  pub = PubSocket("benchframes", 3 * (nv12_info(W, H)[3] + 100))
  frame = bytes(nv12_info(W, H)[3])
  go.wait()
  time.sleep(0.3)
  for _ in range(n):
    time.sleep(PERIOD)
    pub.send(time.monotonic_ns().to_bytes(8, "little") + frame)
  time.sleep(0.5)


def run(target, n, receive):
  ctx = multiprocessing.get_context("spawn")
  go = ctx.Event()
  proc = ctx.Process(target=target, args=(n, go))
  proc.start()
  try:
    times = receive(n, go)
  finally:
    proc.join()
  return np.array(times) * 1e-6


def receive_vision(n, go):
  client = VisionIpcClient("bench", ROAD, False)
  client.connect()
  go.set()
  times = []
  while len(times) < n and (buf := client.recv(3000)) is not None:
    now = time.monotonic_ns()
    assert buf.data[0] == buf.data[buf.picture_size - 1] == client.frame_id % 4
    times.append(now - client.timestamp_eof)
  return times


def receive_zmq(n, go):
  sub = SubSocket("benchframes", timeout=3000)
  go.set()
  times = []
  while len(times) < n and (dat := sub.receive()) is not None:
    times.append(time.monotonic_ns() - int.from_bytes(dat[:8], "little"))
  return times


def calls(n):
  """The calls alone, with a client: CPU time, in turns with memcpy."""
  server = VisionIpcServer("bench")
  server.create_buffers(ROAD, 8, W, H)
  server.start_listener()
  client = VisionIpcClient("bench", ROAD, True)
  client.connect()
  frame = np.full(nv12_info(W, H)[3], 7, np.uint8)
  size = server.buffers[ROAD][0].picture_size
  for buf in server.buffers[ROAD]:
    buf.data[:] = 0  # its pages are there from now on
  what = {
    "memcpy": lambda: ctypes.memmove(server.get_buffer(ROAD).data.ctypes.data, frame.ctypes.data, size),
    "send()": lambda: server.send(ROAD, frame, 1, 0, 0),
    "send_buffer()": lambda: server.send_buffer(ROAD, server.get_buffer(ROAD), 1, 0, 0),
  }
  times, _ = in_turns(what, n, time.thread_time)
  client.close()
  server.close()
  return times


def main():
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("frames", type=int, nargs="?", default=300)
  n = p.parse_args().frames
  os.environ["OPENPILOT_PREFIX"] = f"bench-{os.getpid()}"
  call = calls(n)
  print(f"{W}x{H} NV12, the calling thread's CPU time, {n} rounds in turns, ms")
  for name, t in call.items():
    print(
      f"{name:<38} median {np.median(t) * 1e3:6.3f}   of memcpy {ratio(t, call['memcpy']):6.2f} (goal of send() 1.3)"
    )
  ours, in_place, zmq = (
    run(serve_vision, n, receive_vision),
    run(serve_in_place, n, receive_vision),
    run(serve_zmq, n, receive_zmq),
  )
  print(f"{W}x{H} NV12, {nv12_info(W, H)[3] / 1e6:.1f} MB, {len(ours)} and {len(zmq)} frames; one way, ms")
  for name, t in (("VisionIPC send()", ours), ("VisionIPC get_buffer(), send_buffer()", in_place), ("ZeroMQ", zmq)):
    print(f"{name:<38} median {np.median(t):6.3f}   p99 {np.percentile(t, 99):6.3f}")
  print(f"ratio of medians {np.median(zmq) / np.median(ours):.1f}")


if __name__ == "__main__":
  main()

"""Mutated logs through everything that reads logs: fields, pointers, cuts, what is put in between, containers."""

import contextlib
import functools
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from openpilot.cereal import messaging
from openpilot.common.transformations.camera import DEVICE_CAMERAS
from openpilot.tools.dgx.training.drive_log import read_log as read_drive
from openpilot.tools.fair.cotracker.lane_points import LaneLog
from openpilot.tools.fair.openpilot.teacher import read_log as read_lines
from openpilot.tools.fair.sam.turn import TurnLog
from openpilot.tools.lib.encode_index import encode_index
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.guard import is_sound, open_event
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.route import Segment
from openpilot.tools.replay import replay
from openpilot.tools.replay.compare_logs import compare_logs
from openpilot.tools.replay.overlay import Overlay
from openpilot.tools.replay.record import is_fair, on_route_clock
from openpilot.tools.replay.measure import measure
from openpilot.tools.replay.source import usable
from openpilot.tools.sim.messages import segment_messages
from openpilot.tools.sim.world import World
from tests.fuzz.fuzz import Case

REFUSED = (UserError,)


def fair_messages(frame: int) -> list[bytes]:
  """What fairmodeld says of a frame, filled by hand: small, and every kind of field is there."""
  out = []
  for service in ("fairState", "fairDepth", "fairObjects", "fairSegmentation", "fairLanes", "fairFeatures"):
    m = messaging.new_message(service, valid=True, logMonoTime=10**11 + frame * 50_000_000)
    body = getattr(m, service)
    if service != "fairState":
      body.frameId, body.timestampEof = frame, 10**11 + frame * 50_000_000 - 10_000_000
    body.bundle = "a-bundle"
    if service == "fairDepth":
      body.width, body.height, body.data, body.scale = 64, 32, np.full((32, 64), 9, np.float16).tobytes(), 1.0
    elif service == "fairObjects":
      body.classes = ["vehicle", "pedestrian"]
      for k, o in enumerate(body.init("objects", 2)):
        o.trackId, o.classId, o.prob, o.box, o.position, o.positionStd = (
          k,
          k,
          0.9,
          [10.0, 20.0, 60.0, 90.0],
          [20.0, 1.0, 1.2],
          [1.0, 0.2, 0.1],
        )
    elif service == "fairSegmentation":
      body.width, body.height, body.classes, body.runClass, body.runLength = (
        64,
        32,
        ["road", "sky"],
        bytes([1, 0]),
        [1024, 1024],
      )
    elif service == "fairLanes":
      for k, line in enumerate(body.init("lines", 2)):
        line.lineId, line.prob, line.x, line.y, line.visibility, line.fit = (
          k,
          0.9,
          [1.0, 2.0],
          [3.0, 4.0],
          [1.0, 1.0],
          [1.0, 0.0, 0.0],
        )
    out.append(m.to_bytes())
  return out


def seeds() -> list[bytes]:
  """A small log as the simulator writes it, without pictures: three frames' time of each message, and ours."""
  camera = DEVICE_CAMERAS[("tici", "ar0231")].fcam
  logged = segment_messages(World(7, "day", 1.0), 0, 0, 3, camera, "tici", "ar0231", True)
  kept = [dat for k, (_, dat) in enumerate(logged) if k % 2 == 0 or len(dat) > 400]
  return kept + [m for i in range(3) for m in fair_messages(i)]


def mutate(messages: list[bytes], r: random.Random) -> tuple[bytes, str]:
  """-> a log's bytes, and the suffix of its file."""
  mine = list(messages)
  kind = r.randrange(8)
  if kind < 4:  # fields and pointers of some messages
    for _ in range(r.choice((1, 3, 30))):
      i = r.randrange(len(mine))
      b = bytearray(mine[i])
      for _ in range(r.choice((1, 2, 6))):
        at = r.randrange(8 if kind else 0, len(b))
        if kind == 3 and len(b) >= 24:  # a whole word: pointers of every kind
          at = r.randrange(1, len(b) // 8) * 8
          b[at : at + 8] = struct.pack(
            "<Q",
            r.choice(
              (r.getrandbits(64), r.getrandbits(35), r.getrandbits(3) << 32 | 1 | r.getrandbits(29) << 35, 2**64 - 1, 0)
            ),
          )
        else:
          b[at] = r.choice((0, 1, 127, 128, 255, r.randrange(256)))
      mine[i] = bytes(b)
  dat = bytearray(b"".join(mine))
  if kind == 4:
    del dat[r.randrange(len(dat)) :]
  elif kind == 5:
    a = r.randrange(len(dat))
    del dat[a : a + r.choice((1, 8, 100, 5000))]
  elif kind == 6:
    a = r.randrange(len(dat))
    dat[a:a] = r.choice((bytes(16), b"\1" + bytes(15), r.randbytes(r.choice((1, 8, 64, 4096)))))
  if kind == 7 or r.random() < 0.15:
    packed = bytearray(zstandard.compress(bytes(dat), 3))
    for _ in range(r.choice((0, 1, 5))):
      packed[r.randrange(len(packed))] = r.randrange(256)
    return bytes(packed[: r.choice((len(packed), r.randrange(1, len(packed) + 1)))]), ".zst"
  return bytes(dat), ""


def overlay(path: Path, _: Segment) -> None:
  guard, picture = LogReader([path]).guard, Overlay(320, 240, False)
  for event in LogReader([path]).whole():
    with guard(event):
      picture.message(event)


def play(path: Path, segment: Segment) -> None:
  """Replay up to its sockets."""
  r = replay.Replay.__new__(replay.Replay)
  r.segments, r.allow, r.block, r.camera, r.has_video, r.start, r.focal = (
    [segment],
    None,
    {"managerState"},
    "road",
    False,
    0.0,
    None,
  )
  r.guard = LogReader([path]).guard
  r._survey()
  for item in r._items():
    dat = replay.with_time(item.dat, item.time + 5)
    if item.service == "deviceState" and is_sound(dat):
      open_event(dat).as_builder().deviceState.started = True


CONSUMERS: dict[str, Callable[[Path, Segment], Any]] = {
  "LogReader": lambda p, s: [e.which() for e in LogReader([p])],
  "whole": lambda p, s: sum(1 for _ in LogReader([p]).whole()),
  "encode_index": lambda p, s: encode_index(s),
  "usable": lambda p, s: usable([s], "road"),
  "replay": play,
  "drive_log": lambda p, s: (d := read_drive(s)).desires() and d.action_t(),
  "lane_points": lambda p, s: LaneLog(p).at(3),
  "turn": lambda p, s: TurnLog(p).between(10**11, 10**11 + 50_000_000),
  "openpilot teacher": lambda p, s: read_lines(p),
  "report": lambda p, s: measure(p, []),
  "overlay": overlay,
  "compare": lambda p, s: compare_logs(LogReader([p]).raw(), LogReader([p.with_name("good")]).raw()),
  "record": lambda p, s: list(on_route_clock([d for _, tag, d in LogReader([p]).raw() if is_fair(tag)])),
}


@contextlib.contextmanager
def prepare(tmp: Path, _: Counter[str]) -> Iterator[Callable[[random.Random], Case]]:
  messages = seeds()
  (tmp / "good").write_bytes(b"".join(messages))

  def cases(r: random.Random) -> Case:
    dat, suffix = mutate(messages, r)
    path = tmp / f"rlog{suffix}"
    path.write_bytes(dat)
    for name, consume in CONSUMERS.items():
      yield name, functools.partial(consume, path, Segment("fuzz", 0, tmp, {"rlog": path}, False))

  yield cases

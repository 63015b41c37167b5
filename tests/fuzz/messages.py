"""Spoiled messages of everything that fairmodeld hears: none stops it, and nothing of them stays."""

import contextlib
import math
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from openpilot.cereal import messaging
from openpilot.cereal.visionipc import nv12_info
from openpilot.selfdrive.modeld.fair import worker
from openpilot.selfdrive.modeld.fair.calibration import MAX_ANGLE
from openpilot.selfdrive.modeld.fair.frames import ModelFrame
from openpilot.selfdrive.modeld.fair.heads.ground import MAX_HEIGHT, MIN_HEIGHT
from openpilot.selfdrive.modeld.fair.inbox import CAMERA_STATE, EXTRINSICS, MAX_SPEED
from openpilot.selfdrive.modeld.fair.publish import size_limit
from openpilot.selfdrive.modeld.fair.worker import FairModeld
from tests.fuzz.fuzz import Case
from tests.selfdrive.modeld.fair_bundle import lanes_graph, write_graphs

REFUSED = ()
W, H = 1344, 760
STRIDE, Y_HEIGHT, _, SIZE = nv12_info(W, H)
FRAME = np.full(SIZE, 100, np.uint8)
FLOATS = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e38, -1e38, 1e-40, 0.34, 1.5, 3.0]


def good_messages() -> dict[str, bytes]:
  """One of each service that fairmodeld hears."""
  out = {}
  msg = messaging.new_message(EXTRINSICS, valid=True)
  msg.extrinsicsCalibration.calStatus, msg.extrinsicsCalibration.rpyCalib, msg.extrinsicsCalibration.height = (
    "calibrated",
    [0.0, 0.02, 0.01],
    [1.3],
  )
  out[EXTRINSICS] = msg
  out[CAMERA_STATE] = msg = messaging.new_message(CAMERA_STATE, valid=True)
  msg.narrowRoadCameraState.sensor, msg.narrowRoadCameraState.frameId = "os04c10", 7
  out["deviceState"] = msg = messaging.new_message("deviceState", valid=True)
  msg.deviceState.deviceType, msg.deviceState.thermalStatus, msg.deviceState.started = "mici", "overheated", True
  out["modelV2"] = msg = messaging.new_message("modelV2", valid=True)
  x = np.linspace(0, 13, 33) ** 2
  for line, y in zip(msg.modelV2.init("laneLines", 4), (-5.1, -1.7, 1.7, 5.1), strict=True):
    line.x, line.y, line.z = x.tolist(), (y + 0 * x).tolist(), [1.3] * 33
  msg.modelV2.frameId, msg.modelV2.laneLineProbs = 7, [0.9] * 4
  out["carState"] = msg = messaging.new_message("carState", valid=True)
  msg.carState.vEgo = 20.0
  return {k: m.to_bytes() for k, m in out.items()}


def spoil(dat: bytes, other: bytes, r: random.Random) -> bytes:
  """Bits, bytes, words, pointers, floats, lengths: each as chance has it."""
  b = bytearray(dat)
  for _ in range(r.choice((1, 1, 2, 4, 16))):
    kind, at = r.randrange(9), r.randrange(max(1, len(b)))
    if kind == 0 and b:
      b[at] ^= 1 << r.randrange(8)
    elif kind == 1 and b:
      b[at] = r.choice((0, 1, 0x7F, 0x80, 0xFF, r.randrange(256)))
    elif kind == 2:
      b[at // 8 * 8 : at // 8 * 8 + 8] = r.randbytes(8)
    elif kind == 3:  # a pointer: low bits are its kind, the upper half its size
      struct_at = at // 8 * 8
      if struct_at + 8 <= len(b):
        word = int.from_bytes(b[struct_at : struct_at + 8], "little")
        word = (word & ~(7 << 32 | 3)) | r.randrange(4) | r.choice((0, 7, r.getrandbits(32))) << 32
        b[struct_at : struct_at + 8] = word.to_bytes(8, "little")
    elif kind in (4, 5):
      at = at // 4 * 4
      b[at : at + 4] = struct.pack("<f", r.choice(FLOATS))
    elif kind == 6:
      del b[r.choice((at, len(b) // 2, 8, 0)) :]
    elif kind == 7:
      b += r.randbytes(r.choice((1, 8, 64)))
    elif r.random() < 0.3:  # the message of another service, or half of it
      b[r.choice((0, at)) :] = other[r.choice((0, at)) :]
  return bytes(b)


class Sock:
  """Stands in a SubMaster for a socket: gives what was put there."""

  def __init__(self):
    self.dat = None

  def receive(self, non_blocking=False):
    dat, self.dat = self.dat, None
    return dat

  def close(self):
    pass


def calibrate(self, rpy, intrinsics):
  """In place of the warp's own, which takes 20 ms: what it is given must be numbers."""
  assert np.isfinite(rpy).all() and np.abs(rpy).max() <= MAX_ANGLE and np.isfinite(intrinsics).all()
  self.valid[:] = True


def finite(dat: bytes) -> int:
  """How many lines a fairLanes has, all of whose numbers must be some."""
  with messaging.log.Event.from_bytes(dat) as e:
    for line in e.fairLanes.lines:
      assert all(math.isfinite(v) for part in (line.x, line.y, line.roadX, line.roadY, line.fit) for v in part)
    return len(e.fairLanes.lines)


@contextlib.contextmanager
def prepare(tmp: Path, counts: Counter[str]) -> Iterator[Callable[[random.Random], Case]]:
  good = good_messages()
  sent: list[tuple[str, bytes]] = []
  with pytest.MonkeyPatch.context() as m:
    m.setenv("OPENPILOT_PREFIX", tmp.name)
    m.setenv("PARAMS_ROOT", str(tmp / "params"))
    m.setattr(ModelFrame, "set_calibration", calibrate)
    m.setattr(worker, "MODEL_WAIT", 0.0)
    daemon = FairModeld(lambda: write_graphs(tmp, [lanes_graph(tmp)]).path, None)
    layout = {"width": W, "height": H, "stride": STRIDE, "uv_offset": STRIDE * Y_HEIGHT}
    times = {"frame_id": 7, "timestamp_sof": 0, "timestamp_eof": 1}
    daemon.client = SimpleNamespace(**layout, **times, is_connected=lambda: True)
    assert daemon.ready()
    model = daemon.model
    slots = model.plans[0].slots
    m.setattr(daemon.pm, "send", lambda name, dat: sent.append((name, dat)))
    for s in daemon.inbox.sm.sock.values():
      s.close()
    daemon.inbox.sm.sock = {s: Sock() for s in daemon.inbox.sm.services}
    m.setattr(daemon.inbox.sm.poller, "poll", lambda timeout: [])

    def hear(name: str, dat: bytes, r: random.Random) -> None:
      daemon.inbox.sm.sock[name].dat = dat
      daemon.listen()
      assert daemon.update_camera()
      rpy = model.rpy
      assert rpy is None or (rpy.shape == (3,) and np.isfinite(rpy).all() and np.abs(rpy).max() <= MAX_ANGLE)
      assert MIN_HEIGHT <= model.ground.height <= MAX_HEIGHT and model.schedule.factor in (1.0, 0.5, 0.25)
      if name == "modelV2" and (of := daemon.inbox.model_of(7)) is not None:
        model._seed(slots, of)
        used = slots.points[0, slots.mask[0] > 0]
        assert np.isfinite(used).all() and (used >= 0).all() and (used <= (511, 255)).all()
        if r.random() < 0.1:
          slots.reset()
      elif name == "carState":
        assert (v := daemon.inbox.speed()) is None or abs(v) <= MAX_SPEED
      if r.random() < 0.02:
        sent.clear()
        daemon.frame(FRAME, 0)
        for what, msg in sent:
          assert len(msg) < size_limit(what)
          if what == "fairLanes":
            counts["lines"] += finite(msg)
      counts["faults"], counts["frames"] = model.faults, model.frames

    def cases(r: random.Random) -> Case:
      name, other = r.choice(list(good)), r.choice(list(good))
      yield name, lambda: hear(name, spoil(good[name], good[other], r) if r.random() < 0.97 else good[name], r)

    try:
      yield cases
      # what is good is taken as if nothing had been
      for name, dat in good.items():
        daemon.inbox.sm.sock[name].dat = dat
      daemon.listen()
      assert daemon.update_camera() and daemon.layout[4:6] == ("mici", "os04c10") and model.schedule.factor == 0.5
      assert model.rpy.tolist() == pytest.approx([0.0, 0.02, 0.01]) and model.ground.height == pytest.approx(1.3)
      assert daemon.inbox.speed() == 20.0 and daemon.inbox.model_of(7) is not None
      daemon.frame(FRAME, 0)
      daemon.send_state("running")
      assert model.invalid == 0
    finally:
      daemon.inbox.sm.close()
      daemon.pm.close()

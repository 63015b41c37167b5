"""Whatever bytes come as messages, and whatever is written in a manifest: nothing crashes, and nothing is taken for
what it is not."""

import copy
import json
import math
import random
import struct
import time
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest

from fair_bundle import CLASSES, lanes_graph, manifest, objects_graph, write_bundle, write_graphs
from openpilot.cereal import messaging
from openpilot.cereal.visionipc import nv12_info
from openpilot.selfdrive.modeld.fair import worker
from openpilot.selfdrive.modeld.fair.bundle import BundleError, load_bundle, schema
from openpilot.selfdrive.modeld.fair.frames import ModelFrame, camera_intrinsics
from openpilot.selfdrive.modeld.fair.heads.ground import MAX_HEIGHT, MIN_HEIGHT
from openpilot.selfdrive.modeld.fair.calibration import MAX_ANGLE
from openpilot.selfdrive.modeld.fair.inbox import CAMERA_STATE, EXTRINSICS, MAX_SPEED
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.selfdrive.modeld.fair.publish import serialize, size_limit
from openpilot.selfdrive.modeld.fair.worker import FairModeld

W, H = 1344, 760
STRIDE, Y_HEIGHT, _, SIZE = nv12_info(W, H)
FRAME = np.full(SIZE, 100, np.uint8)
FLOATS = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e38, -1e38, 1e-40, 0.34, 1.5, 3.0]


# *** messages ***


def good_messages():
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


@pytest.mark.parametrize("count", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_messages(tmp_path, prefix, monkeypatch, count):
  monkeypatch.setattr(ModelFrame, "set_calibration", calibrate)
  monkeypatch.setattr(worker, "MODEL_WAIT", 0.0)
  good, r = good_messages(), random.Random(count)
  names = list(good)
  daemon = FairModeld(lambda: write_graphs(tmp_path, [lanes_graph(tmp_path)]).path, None)
  daemon.client = SimpleNamespace(
    width=W,
    height=H,
    stride=STRIDE,
    uv_offset=STRIDE * Y_HEIGHT,
    frame_id=7,
    timestamp_sof=0,
    timestamp_eof=1,
    is_connected=lambda: True,
  )
  assert daemon.ready()
  model, sent = daemon.model, []
  monkeypatch.setattr(daemon.pm, "send", lambda name, dat: sent.append((name, dat)))
  for s in daemon.inbox.sm.sock.values():
    s.close()
  daemon.inbox.sm.sock = {s: Sock() for s in daemon.inbox.sm.services}
  monkeypatch.setattr(daemon.inbox.sm.poller, "poll", lambda timeout: [])
  slots, lines, begun = model.plans[0].slots, 0, time.process_time()
  try:
    for i in range(count):
      name = r.choice(names)
      dat = spoil(good[name], good[r.choice(names)], r) if r.random() < 0.97 else good[name]
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
        if i % 8 == 0:
          slots.reset()
      elif name == "carState":
        assert (v := daemon.inbox.speed()) is None or abs(v) <= MAX_SPEED
      if i % 50 == 0:
        sent.clear()
        daemon.frame(FRAME, 0)
        for what, msg in sent:
          assert len(msg if isinstance(msg, bytes) else msg.to_bytes()) < size_limit(what)
          if what == "fairLanes":
            with messaging.log.Event.from_bytes(msg) as e:
              lines += len(e.fairLanes.lines)
              assert all(
                math.isfinite(v)
                for line in e.fairLanes.lines
                for part in (line.x, line.y, line.roadX, line.roadY, line.fit)
                for v in part
              )
    # nothing of it stays: what is good is taken as if nothing had been
    for name, dat in good.items():
      daemon.inbox.sm.sock[name].dat = dat
    daemon.listen()
    assert (
      daemon.update_camera()
      and model.rpy.tolist() == pytest.approx([0.0, 0.02, 0.01])
      and model.ground.height == pytest.approx(1.3)
    )
    assert (
      daemon.layout[4:6] == ("mici", "os04c10")
      and model.schedule.factor == 0.5
      and daemon.inbox.speed() == 20.0
      and daemon.inbox.model_of(7) is not None
    )
    daemon.frame(FRAME, 0)
    daemon.send_state("running")
    assert model.faults > count / 50 and model.frames > count / 200 and lines > 0 and model.invalid == 0, (
      model.faults,
      model.frames,
      lines,
      model.fault,
    )
    print(f" [{count} messages, {model.faults} faults, {time.process_time() - begun:.1f} s of CPU]", end="")
  finally:
    daemon.inbox.sm.close()
    daemon.pm.close()


# *** manifests ***

VALUES = [
  None,
  True,
  False,
  0,
  1,
  -1,
  2,
  3,
  64,
  128,
  256,
  1.5,
  1e308,
  10**30,
  "",
  "frame",
  "depth",
  "uint8",
  "float32",
  "float16",
  "int64",
  "lanes",
  "objects",
  "scene.onnx",
  "../scene.onnx",
  "Bad Name",
  "a\nb",
  "tiny\n",
  "\ud800",
  "x" * 10_000,
  [],
  {},
  [1],
  [0],
  [1, 6, 128, 256],
  [1048576] * 8,
  [2**40],
  {"a": 1},
  ["narrowRoad"],
  ["wideRoad"],
  "sbigmodel",
  "gap",
  CLASSES,
  ["a"] * 300,
]


def nodes(value):
  """(parent, key) of everything in a manifest."""
  for key in value if isinstance(value, dict) else range(len(value)):
    yield value, key
    if isinstance(value[key], (dict, list)):
      yield from nodes(value[key])


def change(value, r: random.Random):
  """One to three nodes replaced, removed, copied, added to, or made a little wrong."""
  value = copy.deepcopy(value)
  for _ in range(r.choice((1, 1, 1, 2, 3))):
    parent, key = r.choice(list(nodes(value)))
    kind = r.randrange(8)
    old = parent[key]
    if kind == 0:
      del parent[key]
    elif kind == 1 and isinstance(parent, list):
      parent.append(copy.deepcopy(old))
    elif kind == 2 and isinstance(parent, dict):
      name = r.choice(
        [
          "extra",
          "phase",
          "period",
          "rate",
          "budget_ms",
          "state",
          "point_slots",
          "classes",
          "head",
          "parameters",
          key + "\n",
        ]
      )
      parent[name] = copy.deepcopy(r.choice(VALUES))
    elif kind == 3 and isinstance(old, (int, float)) and not isinstance(old, bool):
      parent[key] = r.choice([old + 1, old - 1, -old, old * 2, float(old), old * 10**12, 1e999])
    elif kind == 4 and isinstance(old, str):
      parent[key] = r.choice([old + "\n", old[:-1], old.upper(), old + "x", " " + old])
    elif kind == 5:
      other, k = r.choice(list(nodes(value)))
      parent[key] = copy.deepcopy(other[k])
    else:
      parent[key] = copy.deepcopy(r.choice(VALUES))
    if not any(nodes(value)):
      break
  return value


def spoil_text(text: bytes, r: random.Random) -> bytes:
  kind, at = r.randrange(7), r.randrange(len(text))
  if kind == 0:
    return text[:at]
  if kind == 1:
    return text[:at] + r.randbytes(r.choice((1, 4))) + text[at + 1 :]
  if kind == 2:
    return text[:at] + b"[" * 100_000 + text[at:]
  if kind == 3:
    return text.replace(
      b"128", r.choice([b"NaN", b"Infinity", b"1e999", b"128.0", b"9" * 5000, b"0128", b"\xff", b"-0"]), 1
    )
  if kind == 4:
    return text[:at] + text[max(0, at - 40) : at] + text[at:]
  if kind == 5:
    instead = [
      b'"period": 0',
      b'"period": 1, "period": -1',
      b'"period": true',
      b'"period": 3, "phase": 2',
      b'"period": NaN',
    ]
    return text.replace(b'"period": 1', r.choice(instead), 1)
  return b"\xef\xbb\xbf" + text


def bundles(tmp_path):
  raw = {"heat": np.full((1, 3, 32, 64), -9, np.float32), "box": np.full((1, 4, 32, 64), 20, np.float32)}
  raw["heat"][0, 0, 10, 20] = 3
  out = []
  for kind in ("scene", "objects", "lanes"):
    folder = tmp_path / kind
    write_bundle(folder)
    if kind == "objects":
      write_graphs(folder, [objects_graph(folder, raw), {**manifest()["graphs"][0], "period": 2, "phase": 1}])
    elif kind == "lanes":
      write_graphs(folder, [lanes_graph(folder)])
    out.append(folder)
  return out


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_manifests(tmp_path, count):
  r, reference, begun = random.Random(count), jsonschema.Draft202012Validator(schema()), time.process_time()
  warps = {}
  for view in ("medmodel", "sbigmodel"):
    warps[view] = ModelFrame(W, H, STRIDE, STRIDE * Y_HEIGHT, view)
    warps[view].set_calibration(np.zeros(3), camera_intrinsics(W, H))
  folders = bundles(tmp_path)
  texts = [(f / "manifest.json").read_bytes() for f in folders]
  accepted, why = 0, set()
  for i in range(count):
    k = i % len(folders)
    path = folders[k] / "manifest.json"
    if i < len(folders):
      text = texts[k]
    elif r.random() < 0.3:
      text = spoil_text(texts[k], r)
    else:
      text = json.dumps(change(json.loads(texts[k]), r)).encode()
    path.write_bytes(text)
    try:
      model = FairModel(load_bundle(folders[k]))
    except BundleError as e:
      assert "\n" not in str(e) and len(str(e)) < 2000, str(e)[:300]
      assert i >= len(folders)
      why.add("".join(c for c in str(e).split(": ", 1)[-1] if c.isalpha())[:20])
      continue
    accepted += 1
    m = json.loads(text)
    assert reference.is_valid(m), [e.message[:200] for e in reference.iter_errors(m)]
    assert all(len(set(x)) == len(x) for x in ([g["name"] for g in m["graphs"]],))
    model.warp, model.stream, model.intrinsics = warps[m["view"]], (W, H, False), camera_intrinsics(W, H)
    sent = []
    for t in range(3):
      sent += model.process(FRAME, t, t, t + 1)
    sent.append(model.state_message())
    for name, msg in sent:
      assert msg.valid and len(serialize(name, msg)) < size_limit(name)
    assert model.faults == 0, model.fault
  print(
    f" [{count} manifests, {accepted} accepted, {len(why)} kinds of refusal, {time.process_time() - begun:.1f} s "
    "of CPU]",
    end="",
  )
  assert accepted > count / 50 and len(why) > 15

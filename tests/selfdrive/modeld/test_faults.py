"""What must not bring fairmodeld down, each done to the real process over real sockets: frames, clocks, calibration,
heat, modelV2. A table in selfdrive/modeld/fair/README.md says which test is which."""

import threading
import time

import numpy as np
import pytest

from fair_bundle import write_bundle
from fair_rig import PERIOD_NS, device, ids, objects_rig, wait
from msgq_like import beside
from openpilot.cereal import messaging
from openpilot.selfdrive.modeld.fair import worker
from openpilot.selfdrive.modeld.fair.worker import FairModeld

BAD_LEVEL = 255  # of a frame, at which the objects' graph puts out NaN


@pytest.fixture
def rig(tmp_path, prefix):
  yield from objects_rig(tmp_path)


def heard(sock):
  """Frames of the messages that came on a socket."""
  return [m.fairSegmentation.frameId for m in messaging.drain_sock(sock)]


@pytest.fixture(params=[None, "2026-08"])
def any_rig(request, tmp_path, prefix, monkeypatch):
  """In this repository, and on what has msgq's API."""
  with beside(request.param, tmp_path / "site", monkeypatch) as env:
    yield from objects_rig(tmp_path, **env)


# *** frames ***


def test_frames_twice_and_out_of_order(any_rig):
  sock = messaging.sub_sock("fairSegmentation", timeout=100)
  any_rig.flows()
  while not (got := heard(sock)):  # what is sent before a new subscriber is connected does not reach it
    any_rig.flows()
  n = any_rig.frame_id
  wait(lambda: got.extend(heard(sock)) or n in got, "the same frame on the other socket")
  for frame_id in (n, n, n - 1, n - 5, n):  # nothing of these is new
    any_rig.send(frame_id)
    time.sleep(0.12)  # fairmodeld takes the newest only: each of them has its chance
  any_rig.flows()
  got.clear()
  wait(lambda: got.extend(heard(sock)) or any_rig.frame_id in got, "the next frame on the other socket")
  assert min(got) > n and got == sorted(set(got)), got
  sock.close()


def test_frames_of_another_size(any_rig):
  for w, h in ((1928, 1208), (526, 330), (1344, 760)):
    any_rig.camera(w, h)
    any_rig.flows()
    any_rig.until(
      lambda sm, size=(w, h): (sm["fairState"].cameraWidth, sm["fairState"].cameraHeight) == size,
      "fairState with the new size",
    )
  assert any_rig.sm["fairState"].faultCount == 0


@pytest.mark.slow
def test_camera_stalls_five_seconds(rig):
  rig.flows("fairObjects")
  before = ids(rig.sm)
  assert len(before) == 2
  dropped, begun, states = rig.sm["fairState"].framesDropped, time.monotonic(), []
  while time.monotonic() - begun < 5:
    rig.sm.update(100)
    if rig.sm.updated["fairState"]:
      states.append(str(rig.sm["fairState"].status))
  assert states[-1] == "waitingForCamera" and rig.proc.poll() is None
  rig.frame_id += 100  # the sensor counted on
  rig.flows("fairObjects")
  rig.until(
    lambda sm: str(sm["fairState"].status) == "running" and sm["fairState"].framesDropped >= dropped + 100,
    "running, the gap counted",
  )
  assert not ids(rig.sm) & before  # 5 s are too long to say that they are the same


def test_times_jump(any_rig):
  any_rig.flows("fairObjects")
  before = ids(any_rig.sm)
  hour = 3600 * 10**9
  for jump in (hour, -hour, 2**63 - 1, 0):
    any_rig.frame_id += 1
    any_rig.sm.update(0)
    eof = max(0, any_rig.frame_id * PERIOD_NS + jump)
    any_rig.send(any_rig.frame_id, eof)
    wait(
      lambda: any_rig.sm.update(50) or any_rig.sm["fairObjects"].frameId == any_rig.frame_id,
      "message of a frame whose time jumped",
    )
    assert any_rig.sm["fairObjects"].timestampEof == eof and ids(any_rig.sm) == before
  any_rig.until(lambda sm: sm.updated["fairState"], "fairState")
  assert any_rig.sm["fairState"].faultCount == 0


def test_the_device_sleeps_for_an_hour(tmp_path, prefix, monkeypatch):
  """The process's own clock jumps; a back-off under way ends, nothing else happens. It never asks what day it is."""
  real, offset = time.monotonic, [0.0]
  monkeypatch.setattr(worker.time, "monotonic", lambda: real() + offset[0])

  def wall():
    raise AssertionError("fairmodeld looked at the wall clock")

  monkeypatch.setattr(worker.time, "time", wall)
  daemon = FairModeld(lambda: tmp_path / "tiny", None)
  try:
    for _ in range(6):
      daemon.fail("no such bundle")
    assert not daemon.ready() and daemon.model is None
    write_bundle(tmp_path / "tiny")
    offset[0] = 3600.0
    daemon.step()
    assert daemon.model is not None
    daemon.step()
    offset[0] = 0.0
    daemon.step()
  finally:
    daemon.pm.close()
    daemon.inbox.sm.close()


def test_nan_from_one_graph(any_rig):
  any_rig.flows("fairObjects")
  before = ids(any_rig.sm)
  any_rig.level = BAD_LEVEL
  any_rig.until(lambda sm: sm.updated["fairObjects"] and not sm.valid["fairObjects"], "fairObjects that is not valid")
  any_rig.flows("fairSegmentation")  # the other graph goes on
  s = any_rig.fault("graph 'objects' put out NaN or Inf")
  any_rig.until(lambda sm: [g.valid for g in sm["fairState"].graphs] == [False, True], "word of which graph it is")
  assert s.framesInvalid > 0
  any_rig.level = None
  any_rig.flows("fairObjects")
  assert ids(any_rig.sm) == before


def test_a_buffer_cut_short(tmp_path, prefix):
  daemon = FairModeld(lambda: write_bundle(tmp_path / "tiny").path, None)

  class Camera:
    width, height, stride, uv_offset, frame_id, timestamp_sof, timestamp_eof = 1344, 760, 1408, 1408 * 768, 1, 0, 1

    def is_connected(self):
      return True

    def recv(self, timeout_ms):
      self.frame_id += 1
      return np.zeros(1000 if self.frame_id == 2 else 2_000_000, np.uint8)

  try:
    daemon.client = Camera()
    daemon.step()
    assert (
      daemon.model.faults == 1
      and "frame 2 failed: a buffer of 1000 bytes is too short" in daemon.model.fault
      and daemon.model.invalid == 1
    )
    daemon.step()
    assert daemon.model.faults == 1 and daemon.model.frames == 1
  finally:
    daemon.pm.close()
    daemon.inbox.sm.close()


# *** calibration, heat, modelV2 ***


def test_calibration_missing_nonsense_then_there(rig):
  assert not rig.sm["fairState"].calibrated
  pm = messaging.PubMaster(["extrinsicsCalibration"])

  def send(rpy, status="calibrated"):
    msg = messaging.new_message("extrinsicsCalibration", valid=True)
    msg.extrinsicsCalibration.calStatus, msg.extrinsicsCalibration.rpyCalib = status, rpy
    pm.send("extrinsicsCalibration", msg)

  for nonsense in ([float("nan"), 0, 0], [0, 9, 0], [], [0] * 500):
    faults = rig.sm["fairState"].faultCount
    rig.until(
      lambda sm, v=nonsense, n=faults: send(v) or sm["fairState"].faultCount > n, f"a fault over {nonsense[:3]}"
    )
    assert not rig.sm["fairState"].calibrated and "is not one" in rig.sm["fairState"].fault
  rig.flows()
  rig.until(
    lambda sm: send([0, 0.02, 0.01], "uncalibrated") or sm["fairState"].calibrated,
    "what calibrationd has so far, as modeld takes it",
  )
  rig.flows()
  pm.close()


def test_heat_lowers_the_rate(rig):
  pm = messaging.PubMaster(["deviceState"])
  for status, rate in (("overheated", 10), ("critical", 5), ("ok", 20)):
    rig.until(lambda sm, s=status, r=rate: device(pm, thermalStatus=s) or sm["fairState"].rate == r, f"{rate} Hz")
    not_due = rig.sm["fairState"].framesNotDue
    rig.flows()
    if status != "ok":
      rig.until(lambda sm, n=not_due: sm["fairState"].framesNotDue > n, "frames that are not due")
  pm.close()


def test_a_frame_starts_after_its_modelV2(any_rig):
  """modelV2 comes on and on, of the frame that the gate lets through; frames of which it never comes are dropped."""
  pm, gate, stop = messaging.PubMaster(["modelV2"]), [any_rig.frame_id], threading.Event()
  passed = {}

  def modeld():
    while not stop.wait(0.01):
      msg = messaging.new_message("modelV2", valid=True)
      msg.modelV2.frameId = gate[0]
      passed.setdefault(gate[0], time.monotonic_ns())
      pm.send("modelV2", msg)

  thread = threading.Thread(target=modeld)
  thread.start()
  try:
    sock, events = messaging.sub_sock("fairSegmentation", timeout=100), []
    any_rig.flows()  # it may not hear modelV2 yet
    late = any_rig.sm["fairState"].framesLate

    def frame(lets_through):
      any_rig.frame_id += 1
      any_rig.send(any_rig.frame_id)
      time.sleep(0.03 if lets_through else 0.15)
      if lets_through:
        gate[0] = any_rig.frame_id
      any_rig.sm.update(0)
      events.extend(messaging.drain_sock(sock))

    wait(
      lambda: frame(True) or len(events) > 2, "frames after their modelV2: one alone does not tell how often it comes"
    )
    wait(
      lambda: frame(False) or any_rig.sm["fairState"].framesLate > late, "frame dropped since its modelV2 does not come"
    )
    frame(True)
    wait(lambda: frame(True) or len(events) > 5, "frames after their modelV2")
    events.clear()
    first = any_rig.frame_id
    wait(lambda: frame(any_rig.frame_id % 3 > 0) or len(events) > 10, "frames, some without modelV2")
    for m in events:
      n = m.fairSegmentation.frameId
      assert n <= first or (n in passed and m.logMonoTime > passed[n]), n
    sock.close()
  finally:
    stop.set()
    thread.join()
    pm.close()

"""The real process over real sockets, fed by a camera server in the test."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from fair_bundle import write_bundle
from fair_rig import DEADLINE, FAIRMODELD, Rig, wait
from msgq_like import beside
from openpilot.cereal import messaging
from openpilot.cereal.visionipc import VisionStreamType
from openpilot.selfdrive.modeld.fair import worker
from openpilot.selfdrive.modeld.fair.bundle import BundleError
from openpilot.selfdrive.modeld.fair.schedule import ModelPace
from openpilot.selfdrive.modeld.fair.inbox import Inbox
from openpilot.selfdrive.modeld.fair.worker import MODEL_WAIT, OTHER_CAMERA, FairModeld


@pytest.fixture
def rig(tmp_path, prefix):
  r = Rig(write_bundle(tmp_path / "tiny").path)
  yield r
  r.close()


@pytest.fixture(params=[None, "2025-03", "2026-08"])
def any_rig(request, tmp_path, prefix, monkeypatch):
  """In this repository, and in the oldest and the newest of upstream's trees."""
  with beside(request.param, tmp_path / "site", monkeypatch) as env:
    r = Rig(write_bundle(tmp_path / "tiny").path, **env)
    yield r
    r.close()


def test_frames_in_messages_out(rig):
  rig.until(lambda sm: str(sm["fairState"].status) == "waitingForCamera", "fairState that waits")
  rig.camera()
  rig.flows("fairDepth")
  assert rig.sm["fairDepth"].timestampEof == rig.frame_id * 50_000_000 + 1 and rig.sm.valid["fairDepth"]
  rig.until(lambda sm: sm.seen["fairSegmentation"] and str(sm["fairState"].status) == "running", "running")
  s = rig.sm["fairState"]
  assert (
    s.bundle == "tiny"
    and s.framesProcessed > 0
    and s.cameraWidth == 1344
    and not s.calibrated
    and s.graphs[0].executionTime > 0
  )
  # every second frame id is missing: counted as drops
  dropped = s.framesDropped
  rig.until(lambda sm: sm["fairState"].framesDropped >= dropped + 5, "drops counted", step=2)


def test_camera_server_restarts(any_rig):
  any_rig.camera()
  any_rig.until(lambda sm: sm.updated["fairDepth"], "first fairDepth")
  any_rig.server.close()
  any_rig.server = None
  time.sleep(0.3)
  any_rig.camera()
  any_rig.frame_id = 0
  any_rig.sm.update(0)
  any_rig.flows("fairDepth")


def test_unknown_camera_is_a_fault_and_the_process_lives(any_rig):
  any_rig.camera(640, 480)
  any_rig.until(lambda sm: "640x480" in sm["fairState"].fault, "fault that names the size")
  assert str(any_rig.sm["fairState"].status) == "fault"
  any_rig.server.close()
  any_rig.server = None
  any_rig.camera()
  any_rig.until(lambda sm: sm.updated["fairDepth"], "fairDepth once the camera is one that is known")


def test_a_camera_that_the_bundle_does_not_take_is_told_once(any_rig):
  any_rig.camera(stream=VisionStreamType.VISION_STREAM_WIDE_ROAD)
  said = "the camera gives wideRoad, not narrowRoad; --stream wideRoad takes it all the same"
  any_rig.until(lambda sm: said in sm["fairState"].fault, "fault that names the camera")
  any_rig.until(lambda sm: str(sm["fairState"].status) == "waitingForCamera", "waiting")
  assert any_rig.sm["fairState"].faultCount == 1
  any_rig.camera()
  any_rig.until(lambda sm: sm.updated["fairDepth"], "fairDepth once the camera is the one that is taken")


def test_calibration_is_taken(any_rig):
  any_rig.camera()
  pm = messaging.PubMaster(["liveCalibration"])  # the older spelling reaches the same endpoint

  def calibrated(sm):
    msg = messaging.new_message("liveCalibration", valid=True)
    msg.extrinsicsCalibration.calStatus, msg.extrinsicsCalibration.rpyCalib = "calibrated", [0.0, 0.02, 0.01]
    pm.send("liveCalibration", msg)
    return sm["fairState"].calibrated

  any_rig.until(calibrated, "calibrated")
  pm.close()


def test_second_instance_says_so(rig, tmp_path):
  rig.until(lambda sm: sm.seen["fairState"], "fairState")
  r = subprocess.run(
    [*FAIRMODELD, "--bundle", str(tmp_path / "tiny")], capture_output=True, text=True, timeout=DEADLINE
  )
  assert (
    r.returncode == 2 and r.stderr.startswith("error: ") and str(rig.worker) in r.stderr and r.stderr.count("\n") == 1
  )


def test_killed_and_started_again(rig, tmp_path):
  rig.camera()
  rig.until(lambda sm: sm.updated["fairDepth"], "fairDepth")
  os.kill(rig.proc.pid, signal.SIGKILL)
  rig.proc.wait()
  rig.proc = subprocess.Popen([*FAIRMODELD, "--bundle", str(tmp_path / "tiny")])
  rig.sm.update(0)
  rig.flows("fairDepth")


class FakeSubMaster:
  """modelV2 of the frames before `late` is there; each update() brings one more frame's."""

  def __init__(self, frame_id, alive=True, comes=True):
    self.model, self.comes, self.updates = SimpleNamespace(frameId=frame_id), comes, 0
    self.alive, self.seen, self.recv_frame = {"modelV2": alive}, {"modelV2": True}, {"deviceState": 0, "modelV2": 0}

  def __getitem__(self, service):
    return self.model

  def update(self, timeout_ms):
    self.updates += 1
    self.model.frameId += self.comes
    self.recv_frame["modelV2"] += self.comes
    time.sleep(0 if self.comes else timeout_ms / 1000)


def awaits(sm, frame_id, heard=(3, 4), replay=False):
  """heard: frame ids of the modelV2s that came before."""
  daemon = FairModeld.__new__(FairModeld)
  daemon.model, daemon.replay, daemon.inbox = None, replay, Inbox.__new__(Inbox)
  inbox = daemon.inbox
  inbox.sm, inbox.replay, inbox.pace, inbox.taken = sm, replay, ModelPace(), {"modelV2": 0}
  for h in heard:
    inbox.pace.hear(h)
  return daemon.await_model(frame_id)


def test_a_frame_waits_for_its_modelV2():
  sm = FakeSubMaster(4)
  assert awaits(sm, 7) and sm.updates == 3 and sm.model.frameId == 7
  sm = FakeSubMaster(4, alive=False)  # modeld does not run: nothing to wait for
  assert awaits(sm, 7) and sm.updates == 0
  sm = FakeSubMaster(4)  # of another camera
  assert awaits(sm, 4 + OTHER_CAMERA) and sm.updates == 0
  sm, begun = FakeSubMaster(4, comes=False), time.monotonic()  # modeld is late: the frame is dropped
  assert not awaits(sm, 7) and time.monotonic() - begun >= MODEL_WAIT and sm.model.frameId == 4


def test_alive_is_a_modelV2_that_comes_with_every_frame():
  sm = FakeSubMaster(80, comes=False)
  for frame_id in range(81, 130):  # a qlog's
    assert awaits(sm, frame_id, heard=(0, 40, 80)) and awaits(sm, frame_id, heard=(80,))
  assert awaits(sm, 90, heard=(79, 80), replay=True) and sm.updates == 0
  assert not awaits(sm, 81, heard=(0, 4, 5, 9, 80))  # one of the gaps was of one frame: others went by unseen
  sm = FakeSubMaster(80)
  assert (
    awaits(sm, 82, heard=(74, 77, 80)) and sm.updates == 0 and awaits(sm, 83, heard=(74, 77, 80)) and sm.updates == 1
  )


@pytest.mark.parametrize(
  "took, step, replay, sleeps",
  [(0.3, 1, False, [0.03]), (0.04, 1, False, []), (0.08, 2, False, []), (0.3, 1, True, [])],
)
def test_a_frame_that_took_too_long_leaves_its_core_to_others(monkeypatch, took, step, replay, sleeps):
  """s; every step-th frame of 20 Hz is due."""
  daemon, slept = FairModeld.__new__(FairModeld), []
  daemon.replay, daemon.model = replay, SimpleNamespace(schedule=SimpleNamespace(step=step))
  monkeypatch.setattr(time, "sleep", slept.append)
  daemon.leave_core(took)
  assert slept == pytest.approx(sleeps)


def test_whoever_watches_is_told_which_bundle_is_loaded_before_it_is(tmp_path, monkeypatch, capsys):
  """Else one that never returns would hang it again and again."""
  bundle, told = write_bundle(tmp_path / "tiny"), []

  def refuse(*args, **more):
    raise BundleError(f"refused after {told}")

  monkeypatch.setattr(worker, "Link", lambda: SimpleNamespace(loading=told.append))
  monkeypatch.setattr(worker, "FairModel", refuse)
  assert worker.main(["--bundle", str(bundle.path)]) == 2
  assert capsys.readouterr().err == f"error: refused after ['{bundle.manifest_hash}']\n"


@pytest.mark.parametrize(
  ("frame", "retry_at", "valid", "status"),
  [
    (True, 0.0, True, "running"),
    (True, 0.0, False, "fault"),
    (True, 11.0, True, "fault"),
    (False, 0.0, True, "waitingForCamera"),
    (False, 11.0, True, "fault"),
  ],
)
def test_the_state_says_what_it_is(monkeypatch, frame, retry_at, valid, status):
  """At 10 s, with a frame or none, another try at the camera due later or not, the last run valid or not."""
  daemon, told = FairModeld.__new__(FairModeld), []
  buf = np.zeros(1, np.uint8) if frame else None
  client = SimpleNamespace(recv=lambda timeout: buf, timestamp_eof=int(10e9), frame_id=1)
  look = SimpleNamespace(look=lambda *args: (None, 0))
  model = SimpleNamespace(schedule=look, stats={"a": SimpleNamespace(valid=valid), "b": SimpleNamespace(valid=True)})
  daemon.link, daemon.model, daemon.client, daemon.replay = SimpleNamespace(beat=lambda: None), model, client, True
  daemon.log_time, daemon.retry_at, daemon.last_state = 10.0, retry_at, 0.0
  for name, answer in (("ready", True), ("listen", None), ("update_camera", True), ("watch", None)):
    monkeypatch.setattr(daemon, name, lambda answer=answer: answer, raising=False)
  monkeypatch.setattr(daemon, "send_state", told.append)
  daemon.step()
  assert told == [status]


def test_faults_of_frames_are_told_at_once_but_not_twenty_times_a_second(tmp_path, prefix, monkeypatch):
  monkeypatch.setenv("REPLAY", "1")  # the clock is ours
  bundle = write_bundle(tmp_path / "tiny")
  daemon, told = FairModeld(lambda: bundle.path, None), []
  try:
    daemon.model = daemon.choice.load(bundle)
    daemon.model.set_camera(1344, 760, 1344, 1344 * 760)
    monkeypatch.setattr(
      daemon,
      "send_state",
      lambda status: told.append(daemon.log_time) or setattr(daemon, "last_state", daemon.log_time),
    )
    for t, ms in enumerate((0, 50, 99, 150, 200, 260)):
      daemon.log_time = 100 + ms / 1000
      daemon.client = SimpleNamespace(frame_id=t, timestamp_sof=0, timestamp_eof=int(daemon.log_time * 1e9))
      daemon.frame(np.zeros(100, np.uint8), 0)  # a buffer cut short
    assert [round(1000 * (t - 100)) for t in told] == [0, 150, 260] and daemon.model.faults == 6
    assert daemon.drop_perc == 0
  finally:
    daemon.pm.close()
    daemon.inbox.sm.close()


SLOW = """
import os, resource, sys, time
from openpilot.selfdrive.modeld.fair import worker
from openpilot.selfdrive.modeld.fair.model import FairModel
process = FairModel.process
def slow(self, *args):
  end = time.thread_time() + 0.1
  while time.thread_time() < end:
    pass
  return process(self, *args)
FairModel.process = slow
resource.setrlimit(resource.RLIMIT_RTTIME, (600_000, 600_000))
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
raise SystemExit(worker.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_RTTIME is Linux's")
def test_slower_than_the_camera_at_real_time_priority_it_lives(tmp_path, prefix):
  """0.1 s a frame at 20 Hz: without a wait the kernel would end it within seven frames."""
  if subprocess.run(
    [sys.executable, "-c", "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"],
    stderr=subprocess.DEVNULL,
  ).returncode:
    pytest.skip("real-time priority is not permitted here")
  rig, seen = Rig(write_bundle(tmp_path / "b").path, command=[sys.executable, "-c", SLOW]), []
  try:
    rig.camera()
    rig.until(lambda sm: sm.updated["fairDepth"] and (seen.append(1) or len(seen) > 15), "frames")
  finally:
    rig.close()


def test_a_modelV2_in_forty_frames_costs_none(rig):
  """As a qlog has it: SubMaster calls that alive for half a second of every two."""
  pm = messaging.PubMaster(["modelV2"])
  rig.camera()
  rig.flows()
  before = rig.sm["fairState"].framesDropped
  last = rig.frame_id + 130
  while rig.frame_id < last:
    rig.frame_id += 1
    if rig.frame_id % 40 == 0:
      msg = messaging.new_message("modelV2", valid=True)
      msg.modelV2.frameId = rig.frame_id
      pm.send("modelV2", msg)
    rig.send(rig.frame_id)
    n = rig.frame_id
    wait(
      lambda n=n: (
        rig.sm.update(20) or rig.sm["fairSegmentation"].frameId >= n or rig.sm["fairState"].framesDropped > before
      ),
      "an answer to the frame",
    )
    assert rig.sm["fairState"].framesDropped == before
  pm.close()


def limited(limit):
  """The command of a fairmodeld that may open so many files; limit: ulimit's arguments."""
  return ["bash", "-c", f'ulimit {limit}; exec "$0" "$@"', *FAIRMODELD]


def test_too_few_open_files_are_told(tmp_path, prefix):
  """A camera of 40 buffers wants 40 files: it would have waited for it without a word. A limit that it may raise, it
  raises."""
  bundle = write_bundle(tmp_path / "tiny").path
  for limit, works in (("-n 80", False), ("-Sn 80", True)):
    rig = Rig(bundle, command=limited(limit))
    try:
      rig.camera(buffers=60)
      if works:
        rig.flows()
      else:
        rig.fault("no camera: Too many open files; this process may open 80: raise the limit, `ulimit -n")
    finally:
      rig.close()


LAUNCHER = """
import sys
sys.argv = ["manager.py", "--of-the-manager"]
import importlib
raise SystemExit(importlib.import_module("openpilot.selfdrive.modeld.fair.fairmodeld").main())
"""


def test_the_launchers_command_line_is_not_ours(tmp_path, prefix, monkeypatch):
  """openpilot's manager forks and calls main(): sys.argv is its own."""
  monkeypatch.setenv("FAIR_MODELS_DIR", str(tmp_path))
  sm = messaging.SubMaster(["fairState"])
  proc = subprocess.Popen([sys.executable, "-c", LAUNCHER], stderr=subprocess.PIPE, text=True)
  try:
    wait(lambda: sm.update(50) or sm.seen["fairState"] or proc.poll() is not None, "fairState")
  finally:
    proc.send_signal(signal.SIGINT)
    err = proc.communicate(timeout=DEADLINE)[1]
    sm.close()
  assert "usage" not in err and proc.returncode == 0

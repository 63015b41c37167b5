"""fairmodeld in upstream's trees since March 2025, by stand-ins that have their API."""

import contextlib
import json
import os
import subprocess
import sys
import time

import pytest

from fair_bundle import write_bundle
from fair_rig import DEADLINE, Rig, wait
from msgq_like import HEAD, TREES, PubSocket, SubSocket, beside, site, transport
from openpilot.cereal import messaging
from openpilot.selfdrive.modeld.fair import sender

NAMES = """
import json
import numpy as np
from openpilot.selfdrive.modeld.fair import inbox, ipc, publish
from openpilot.selfdrive.modeld.fair.frames import camera_intrinsics
params = ipc.Params()
params.put("FairBundle", "some")
print(json.dumps({
  "services": [inbox.EXTRINSICS, inbox.CAMERA_STATE], "queue": publish.size_limit("fairDepth"),
  "streams": [ipc.stream_type("narrowRoad"), ipc.stream_type("wideRoad")],
  "focal": [camera_intrinsics(1928, 1208)[0, 0], camera_intrinsics(1344, 760, wide=True)[0, 0]],
  "param": [ipc.read_param(params, key) for key in ("FairBundle", "FairRunner", "NoSuchKey")],
  "close": hasattr(ipc.Client, "close"), "layout": ipc.messaging.__name__,
}))
"""


def test_one_of_two_publishers_takes_the_end_back_and_the_reader_goes_on(tmp_path, monkeypatch):
  """Of the stand-in itself: its queue has no lock. The reader would have read zeros for ever."""
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  pub, sub = PubSocket("q", 4096), SubSocket("q", conflate=True)
  pub.send(bytes(100))
  assert sub.receive() == bytes(100)
  HEAD.pack_into(pub.queue.map, 0, pub.uid, sub.at - 50)
  assert sub.receive(non_blocking=True) is None
  pub.send(b"new")
  assert sub.receive() == b"new"


@pytest.mark.parametrize("date", TREES)
def test_what_differs_between_trees_ends_in_ipc(tmp_path, prefix, date):
  env = {**os.environ, "PYTHONPATH": site(date, tmp_path / "site")}
  r = subprocess.run([sys.executable, "-c", NAMES], env=env, capture_output=True, text=True, timeout=DEADLINE)
  assert r.returncode == 0, r.stderr
  said, tree = json.loads(r.stdout), TREES[date]
  assert said["services"] == (
    ["liveCalibration", "roadCameraState"] if tree.old_names else ["extrinsicsCalibration", "narrowRoadCameraState"]
  )
  assert said["queue"] == (2 if tree.queue_size else 10) * 1024 * 1024 // 3
  assert (
    said["streams"] == [0, 2]
    and said["focal"] == [2648.0, 425.25]
    and said["param"] == ["some", None, None]
    and not said["close"]
  )


@pytest.fixture
def upstream(tmp_path, prefix, monkeypatch):
  """A function DATE -> Rig: fairmodeld in that tree, what feeds and hears it on the same transport."""
  with contextlib.ExitStack() as stack:

    def make(date, **more):
      env = stack.enter_context(beside(date, tmp_path / "site", monkeypatch))
      rig = Rig(write_bundle(tmp_path / "tiny").path, **env, **more)
      stack.callback(lambda: rig.close())
      return rig

    yield make


@pytest.mark.parametrize("date", TREES)
def test_frames_in_messages_out(upstream, date):
  rig = upstream(date)
  rig.camera()
  rig.flows("fairDepth")
  rig.until(lambda sm: str(sm["fairState"].status) == "running", "running")
  s = rig.sm["fairState"]
  assert s.framesProcessed > 0 and s.faultCount == 0 and (s.cameraWidth, s.cameraHeight) == (1344, 760)


# *** other publishers ***


def test_the_newest_publisher_wins_and_ours_comes_back(monkeypatch, tmp_path, prefix):
  """As under openpilot's replay, which takes every service and sends what its log holds. Said once, and looked at again
  every RETRY seconds."""
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  transport(monkeypatch.setattr)
  clock, faults, names = [100.0], [], ["fairState", "fairDepth", "fairLanes"]
  ours = sender.Sender(names, lambda: clock[0], faults.append)
  assert all(ours.send(n, b"ours") for n in names) and not faults
  replay = messaging.PubMaster(names)
  assert not any(ours.send(n, b"ours") for n in names for _ in range(3))
  assert (
    len(faults) == 1
    and "another process publishes fairState" in faults[0]
    and "--block" in faults[0]
    and "\n" not in faults[0]
  )
  for _ in range(4):  # it sends fairDepth on and on; the others it only has
    replay.send("fairDepth", b"its own")
    clock[0] += sender.RETRY
    assert not ours.send("fairDepth", b"ours") and ours.send("fairState", b"ours") and ours.send("fairLanes", b"ours")
  ear = messaging.sub_sock("fairDepth")
  replay.send("fairDepth", b"its own")  # it never was disturbed
  clock[0] += sender.RETRY - 0.1
  assert not ours.send("fairDepth", b"ours")
  clock[0] += 0.1
  assert not ours.send("fairDepth", b"ours")  # it sent since the last look
  clock[0] += sender.RETRY
  assert ours.send("fairDepth", b"ours") and messaging.drain_sock_raw(ear) == [b"its own", b"ours"] and len(faults) == 1
  with pytest.raises(messaging.MultiplePublishersError):
    replay.send("fairDepth", b"its own")
  replay = messaging.PubMaster(names)  # another time is another word
  assert not ours.send("fairState", b"ours") and len(faults) == 2


def test_no_send_ends_the_process(monkeypatch, tmp_path, prefix):
  faults = []
  ours = sender.Sender(["fairState"], lambda: 0.0, faults.append)

  def full(dat):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(ours.sock["fairState"], "send", full)
  assert not ours.send("fairState", b"") and faults == [
    "fairState was not sent: OSError: [Errno 28] No space left on device"
  ]
  ours.close()


@pytest.mark.slow
def test_another_publisher_of_everything(upstream):
  """The real process beside one that takes all of its services, sends one, and ends."""
  rig = upstream("2026-08")
  rig.camera()
  rig.flows()
  replay = messaging.PubMaster(
    ["fairState", "fairSegmentation", "fairDepth", "fairObjects", "fairLanes", "fairFeatures"]
  )
  their = messaging.new_message("fairState", valid=True)
  their.fairState.bundle = "replayed"
  their = their.to_bytes()
  seen = []

  def plays(sm):
    replay.send("fairState", their)
    seen.extend([sm["fairState"].bundle] if sm.updated["fairState"] else [])
    return sm.updated["fairSegmentation"]

  rig.sm.update(0)
  rig.until(plays, "what the other one does not send")
  rig.until(lambda sm: plays(sm) and len(seen) > 20, "more of it")
  assert set(seen) == {"replayed"}
  rig.until(lambda sm: sm["fairState"].bundle == "tiny", "our fairState, once the other one is silent")
  assert "another process publishes" in rig.sm["fairState"].fault and rig.sm["fairState"].faultCount == 1
  rig.flows()


def test_a_service_that_another_process_has(tmp_path, prefix):
  """In this repository's messaging the first one keeps what it has. Ours does without, and takes it when it is free."""
  other, clock, faults = messaging.PubMaster(["fairDepth"]), [0.0], []
  ours = sender.Sender(["fairState", "fairDepth"], lambda: clock[0], faults.append)
  try:
    assert len(faults) == 1 and ours.send("fairState", b"") and not ours.send("fairDepth", b"")
    clock[0] += sender.RETRY
    assert not ours.send("fairDepth", b"")
    other.close()
    clock[0] += sender.RETRY
    assert ours.send("fairDepth", b"") and len(faults) == 1
    with pytest.raises(messaging.MultiplePublishersError):  # who has fairState is fairmodeld
      sender.Sender(["fairState", "fairDepth"], lambda: 0.0, faults.append)
  finally:
    ours.close()


# *** process_replay ***


def replayed(rig, pause, early):
  """{service: messages without logMonoTime} of 45 frames, each `pause` seconds after the last one's answer. early: s
  before, in which nothing may be said."""
  socks = {name: messaging.sub_sock(name) for name in ("fairState", "fairSegmentation", "fairDepth")}
  pm = messaging.PubMaster(["modelV2"])
  said = {name: [] for name in socks}

  def hear():
    for name, sock in socks.items():
      for m in messaging.drain_sock(sock):
        m = m.as_builder()
        m.logMonoTime = 0
        said[name].append(m.to_bytes())

  rig.camera()
  time.sleep(early)
  hear()
  assert not any(said.values())
  for i in range(1, 46):
    model = messaging.new_message("modelV2", valid=True)
    model.modelV2.frameId = i - 1
    pm.send("modelV2", model)
    wait(lambda i=i: rig.send(i) or time.sleep(0.02) or hear() or len(said["fairSegmentation"]) >= i, f"frame {i}")
    time.sleep(pause)
  wait(lambda: hear() or len(said["fairState"]) >= 3, "three fairState of 2.25 s")
  return said


def test_the_same_log_gives_the_same_bytes_at_any_pace(upstream):
  """Under REPLAY=1: nothing before the first frame, then the same messages from a slow machine and a fast one,
  fairState by the log's time."""
  runs = []
  for pause, early in ((0.0, 1.5), (0.02, 0.0)):
    rig = upstream("2026-08", REPLAY="1")
    runs.append(replayed(rig, pause, early))
    rig.close()
    rig.close = lambda: None
  assert {k: len(v) for k, v in runs[0].items()} == {"fairState": 3, "fairSegmentation": 45, "fairDepth": 23}
  assert runs[0] == runs[1]

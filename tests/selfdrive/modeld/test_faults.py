"""What must not bring fairmodeld down, each done to the real process over real sockets. A table in selfdrive/modeld/fair/README.md says which test is which."""
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest

from fair_bundle import manifest, objects_graph, write_bundle, write_graphs
from fair_rig import DEADLINE, FAIRMODELD, PERIOD_NS, Rig, wait
from openpilot.cereal import messaging
from openpilot.common.params import Params
from openpilot.selfdrive.modeld.fair import fairmodeld
from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.selfdrive.modeld.fair.fairmodeld import FairModeld
from openpilot.tools.sim.write_route import write_route

BAD_LEVEL = 255  # of a frame, at which the objects' graph puts out NaN


def write_objects(folder, name="tiny"):
  """A scene's graph and one that sees two objects in every frame."""
  write_bundle(folder)
  raw = {"heat": np.full((1, 3, 32, 64), -9, np.float32), "box": np.full((1, 4, 32, 64), 20, np.float32)}
  raw["heat"][0, 0, 10, 20] = raw["heat"][0, 1, 20, 50] = 3
  return write_graphs(folder, [objects_graph(folder, raw), manifest()["graphs"][0]], name).path


@pytest.fixture
def rig(tmp_path, prefix):
  r = Rig(write_objects(tmp_path / "tiny"), ("fairState", "fairObjects", "fairSegmentation"))
  r.camera()
  r.until(lambda sm: str(sm["fairState"].status) == "running", "running")
  yield r
  r.close()


def ids(sm):
  return {o.trackId for o in sm["fairObjects"].objects}


def heard(sock):
  """Frames of the messages that came on a socket."""
  return [m.fairSegmentation.frameId for m in messaging.drain_sock(sock)]


# *** frames ***


def test_frames_twice_and_out_of_order(rig):
  sock = messaging.sub_sock("fairSegmentation", timeout=100)
  rig.flows()
  while not (got := heard(sock)):  # what is sent before a new subscriber is connected does not reach it
    rig.flows()
  n = rig.frame_id
  wait(lambda: got.extend(heard(sock)) or n in got, "the same frame on the other socket")
  for frame_id in (n, n, n - 1, n - 5, n):  # nothing of these is new
    rig.send(frame_id)
    time.sleep(0.12)  # fairmodeld takes the newest only: each of them has its chance
  rig.flows()
  got.clear()
  wait(lambda: got.extend(heard(sock)) or rig.frame_id in got, "the next frame on the other socket")
  assert min(got) > n and got == sorted(set(got)), got
  sock.close()


def test_frames_of_another_size(rig):
  for w, h in ((1928, 1208), (526, 330), (1344, 760)):
    rig.camera(w, h)
    rig.flows()
    rig.until(lambda sm, size=(w, h): (sm["fairState"].cameraWidth, sm["fairState"].cameraHeight) == size, "fairState with the new size")
  assert rig.sm["fairState"].faultCount == 0


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
  rig.until(lambda sm: str(sm["fairState"].status) == "running" and sm["fairState"].framesDropped >= dropped + 100, "running, the gap counted")
  assert not ids(rig.sm) & before  # 5 s are too long to say that they are the same


def test_times_jump(rig):
  rig.flows("fairObjects")
  before = ids(rig.sm)
  hour = 3600 * 10**9
  for jump in (hour, -hour, 2**63 - 1, 0):
    rig.frame_id += 1
    rig.sm.update(0)
    eof = max(0, rig.frame_id * PERIOD_NS + jump)
    rig.send(rig.frame_id, eof)
    wait(lambda: rig.sm.update(50) or rig.sm["fairObjects"].frameId == rig.frame_id, "message of a frame whose time jumped")
    assert rig.sm["fairObjects"].timestampEof == eof and ids(rig.sm) == before
  rig.until(lambda sm: sm.updated["fairState"], "fairState")
  assert rig.sm["fairState"].faultCount == 0


def test_the_device_sleeps_for_an_hour(tmp_path, prefix, monkeypatch):
  """The process's own clock jumps; a back-off under way ends, nothing else happens. It never asks what day it is."""
  real, offset = time.monotonic, [0.0]
  monkeypatch.setattr(fairmodeld.time, "monotonic", lambda: real() + offset[0])

  def wall():
    raise AssertionError("fairmodeld looked at the wall clock")

  monkeypatch.setattr(fairmodeld.time, "time", wall)
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
    daemon.sm.close()


def test_nan_from_one_graph(rig):
  rig.flows("fairObjects")
  before = ids(rig.sm)
  rig.level = BAD_LEVEL
  rig.until(lambda sm: sm.updated["fairObjects"] and not sm.valid["fairObjects"], "fairObjects that is not valid")
  rig.flows("fairSegmentation")  # the other graph goes on
  s = rig.fault("graph 'objects' put out NaN or Inf")
  rig.until(lambda sm: [g.valid for g in sm["fairState"].graphs] == [False, True], "word of which graph it is")
  assert s.framesInvalid > 0
  rig.level = None
  rig.flows("fairObjects")
  assert ids(rig.sm) == before


def test_a_buffer_cut_short(tmp_path, prefix):
  daemon = FairModeld(lambda: write_bundle(tmp_path / "tiny").path, None)

  class Camera:
    width, height, stride, uv_offset, frame_id, timestamp_sof, timestamp_eof = 1344, 760, 1408, 1408 * 768, 1, 0, 1

    def is_connected(self):
      return True

    def recv(self, timeout_ms):
      self.frame_id += 1
      return type("Buf", (), {"data": np.zeros(1000 if self.frame_id == 2 else 2_000_000, np.uint8)})

  try:
    daemon.client = Camera()
    daemon.step()
    assert daemon.model.faults == 1 and "frame 2 failed: a buffer of 1000 bytes is too short" in daemon.model.fault and daemon.model.invalid == 1
    daemon.step()
    assert daemon.model.faults == 1 and daemon.model.frames == 1
  finally:
    daemon.pm.close()
    daemon.sm.close()


# *** calibration, heat, modelV2 ***


def device(pm, **fields):
  msg = messaging.new_message("deviceState", valid=True)
  for k, v in fields.items():
    setattr(msg.deviceState, k, v)
  pm.send("deviceState", msg)


def test_calibration_missing_nonsense_then_there(rig):
  assert not rig.sm["fairState"].calibrated
  pm = messaging.PubMaster(["extrinsicsCalibration"])

  def send(rpy, status="calibrated"):
    msg = messaging.new_message("extrinsicsCalibration", valid=True)
    msg.extrinsicsCalibration.calStatus, msg.extrinsicsCalibration.rpyCalib = status, rpy
    pm.send("extrinsicsCalibration", msg)

  for nonsense in ([float("nan"), 0, 0], [0, 9, 0], [], [0] * 500):
    faults = rig.sm["fairState"].faultCount
    rig.until(lambda sm, v=nonsense, n=faults: send(v) or sm["fairState"].faultCount > n, f"a fault over {nonsense[:3]}")
    assert not rig.sm["fairState"].calibrated and "is not one" in rig.sm["fairState"].fault
  rig.flows()
  rig.until(lambda sm: send([0, 0.02, 0.01], "uncalibrated") or sm.updated["fairState"], "fairState")
  assert not rig.sm["fairState"].calibrated
  rig.until(lambda sm: send([0, 0.02, 0.01]) or sm["fairState"].calibrated, "calibrated")
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


def test_a_frame_starts_after_its_modelV2(rig):
  """modelV2 comes on and on, of the frame that the gate lets through; frames of which it never comes are dropped."""
  pm, gate, stop = messaging.PubMaster(["modelV2"]), [rig.frame_id], threading.Event()
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
    rig.flows()  # it may not hear modelV2 yet
    late = rig.sm["fairState"].framesLate

    def frame(lets_through):
      rig.frame_id += 1
      rig.send(rig.frame_id)
      time.sleep(0.03 if lets_through else 0.15)
      if lets_through:
        gate[0] = rig.frame_id
      rig.sm.update(0)
      events.extend(messaging.drain_sock(sock))

    wait(lambda: frame(False) or rig.sm["fairState"].framesLate > late, "frame dropped since its modelV2 does not come")
    frame(True)
    wait(lambda: frame(True) or len(events) > 5, "frames after their modelV2")
    events.clear()
    first = rig.frame_id
    wait(lambda: frame(rig.frame_id % 3 > 0) or len(events) > 10, "frames, some without modelV2")
    for m in events:
      n = m.fairSegmentation.frameId
      assert n <= first or (n in passed and m.logMonoTime > passed[n]), n
    sock.close()
  finally:
    stop.set()
    thread.join()
    pm.close()


# *** bundles ***


def test_bundle_replaced_in_mid_run(rig, tmp_path):
  rig.flows("fairObjects")
  before, pid = ids(rig.sm), rig.proc.pid
  new = write_objects(tmp_path / "new", "new")
  (tmp_path / "tiny").rename(tmp_path / "old")
  new.rename(tmp_path / "tiny")
  rig.until(lambda sm: sm["fairState"].bundle == "new" and sm["fairState"].status == "running", "fairState of the new bundle")
  rig.flows("fairObjects")
  assert rig.sm["fairObjects"].bundle == "new" and rig.sm["fairState"].faultCount == 0 and rig.sm["fairState"].bundleHash != ""
  assert len(ids(rig.sm)) == 2 and min(ids(rig.sm)) > max(before)
  assert rig.proc.pid == pid and rig.proc.poll() is None


def test_bundle_corrupted_in_mid_run(rig, tmp_path):
  onnx = tmp_path / "tiny" / "scene.onnx"
  good, frames = onnx.read_bytes(), rig.sm["fairState"].framesProcessed
  name = load_bundle(tmp_path / "tiny").name
  for bad in (good[: len(good) // 2], b"", good[:-1] + b"\0"):
    onnx.write_bytes(bad)
    faults = rig.sm["fairState"].faultCount
    rig.until(lambda sm, n=faults: sm["fairState"].faultCount > n, "fault over the changed file")
    s = rig.sm["fairState"]
    assert f"bundle '{name}' goes on: " in s.fault and "scene.onnx has sha256" in s.fault and s.bundle == name
    rig.flows()  # the old one, in memory
  (tmp_path / "tiny" / "manifest.json").unlink()
  rig.fault("has no readable manifest.json")
  shutil.rmtree(tmp_path / "tiny")
  rig.fault("no bundle at")
  rig.flows("fairObjects")
  faults = rig.sm["fairState"].faultCount
  write_objects(tmp_path / "tiny", "again")
  rig.until(lambda sm: sm["fairState"].bundle == "again", "the whole bundle taken over")
  rig.flows("fairObjects")
  assert rig.sm["fairState"].faultCount <= faults + 1  # it may have been met half written
  assert rig.sm["fairState"].framesProcessed > frames


def test_bundle_corrupted_at_the_start_then_repaired_and_another_chosen(tmp_path, prefix):
  models = tmp_path / "models"
  path = write_bundle(models / "a", name="a").path
  write_bundle(models / "b", name="b")
  good = (path / "scene.onnx").read_bytes()
  (path / "scene.onnx").write_bytes(good[:100])
  rig = Rig(None, FAIR_MODELS_DIR=str(models))
  try:
    rig.camera()
    rig.fault("scene.onnx has sha256")
    assert str(rig.sm["fairState"].status) == "fault" and rig.sm["fairState"].bundle == ""
    (path / "scene.onnx").write_bytes(good)
    rig.until(lambda sm: sm["fairState"].bundle == "a", "bundle a")
    rig.flows()
    Params().put("FairBundle", "b")
    rig.until(lambda sm: sm["fairState"].bundle == "b", "bundle b")
    rig.flows()
    Params().put("FairBundle", "nose")
    rig.fault("bundle 'b' goes on: no bundle 'nose'")
    rig.flows()
  finally:
    err = rig.close()
  assert "Traceback" not in err


# *** the manager's side ***

MANAGER = """
from openpilot.selfdrive.manager import manager
from openpilot.selfdrive.manager.process import PythonProcess
from openpilot.selfdrive.manager.process_config import managed_processes, only_onroad
try:
  manager.run([*managed_processes.values(), PythonProcess("bystander", "bystander", only_onroad)])
except KeyboardInterrupt: pass
"""


@pytest.fixture
def manager(prefix, tmp_path, monkeypatch):
  """openpilot's table under the manager, and a process that has nothing to do with it."""
  (tmp_path / "bystander.py").write_text("import time\ntime.sleep(600)\n")
  monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.getcwd()}")
  monkeypatch.setenv("FAIR_MODELS_DIR", str(tmp_path / "models"))
  write_objects(tmp_path / "models" / "tiny")
  proc = subprocess.Popen([sys.executable, "-c", MANAGER], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
  yield proc
  proc.send_signal(signal.SIGINT)
  err = proc.communicate(timeout=DEADLINE)[1]
  assert proc.returncode == 0 and "Traceback" not in "".join(line for line in err.splitlines(True) if "manager.py" in line)


def processes(sm):
  """{name: pid} of what runs, by managerState."""
  return {p.name: p.pid for p in sm["managerState"].processes if p.running}


def alive(pid):
  try:
    with open(f"/proc/{pid}/stat") as f:
      return f.read().rsplit(")", 1)[1].split()[0] != "Z"
  except OSError:
    return False


@pytest.mark.slow
def test_killed_in_mid_replay(manager, tmp_path):
  Params().put_bool("FairEnabled", True)
  route = write_route(tmp_path / "route", seed=11, seconds=1.0)
  replay = subprocess.Popen([sys.executable, "-m", "openpilot.tools.replay.replay", str(route), "--loop"], stderr=subprocess.PIPE, text=True)
  sm, objects, car = messaging.SubMaster(["managerState"]), messaging.sub_sock("fairObjects", timeout=100), messaging.sub_sock("carState", timeout=100)

  def tracked():
    """Identities in the next message that has some: {id: age}."""
    sm.update(0)
    m = messaging.recv_one(objects)
    return {o.trackId: o.age for o in m.fairObjects.objects} if m is not None and m.valid else {}

  try:
    before = wait(lambda: (t := tracked()) and min(t.values()) > 15 and t, "objects that are tracked")
    others = wait(lambda: sm.update(50) or (len(processes(sm)) == 2 and processes(sm)), "managerState")
    os.kill(others["fairmodeld"], signal.SIGKILL)
    wait(lambda: sm.update(50) or processes(sm).get("fairmodeld") not in (None, others["fairmodeld"]), "another fairmodeld")
    messaging.drain_sock(car)
    wait(lambda: (t := tracked()) and min(t) == min(before) == 1 and max(t.values()) < min(before.values()), "identities that begin anew")
    wait(lambda: sm.update(0) or len(messaging.drain_sock(car)) > 3, "the car's messages, which go on")
    assert processes(sm)["bystander"] == others["bystander"] and replay.poll() is None and manager.poll() is None
    assert {p.name: p.exitCode for p in sm["managerState"].processes}["fairmodeld"] == -signal.SIGKILL
  finally:
    replay.send_signal(signal.SIGINT)
    err = replay.communicate(timeout=DEADLINE)[1]
    for sock in (sm, objects, car):
      sock.close()
  assert "Traceback" not in err


@pytest.mark.slow
def test_flag_flapped_a_hundred_times(manager):
  params, pm, sm = Params(), messaging.PubMaster(["deviceState"]), messaging.SubMaster(["managerState", "fairState"])
  pids = set()

  def until(condition, what):
    wait(lambda: device(pm, started=True) or sm.update(50) or pids.update(processes(sm).values()) or condition(), what)

  until(lambda: "bystander" in processes(sm), "onroad")
  bystander = processes(sm)["bystander"]
  files = len(os.listdir(f"/proc/{manager.pid}/fd"))
  for i in range(100):
    params.put_bool("FairEnabled", i % 2 == 0)
    device(pm, started=True)
    sm.update(0)
    pids.update(processes(sm).values())
    time.sleep((0.02, 0.15, 0.3)[i % 3])  # shorter and longer than the manager's turn, and than Python takes to start
  until(lambda: set(processes(sm)) == {"bystander"}, "all off")
  assert not any(alive(pid) for pid in pids - {bystander})
  assert len(os.listdir(f"/proc/{manager.pid}/fd")) <= files + 2
  params.put_bool("FairEnabled", True)
  until(lambda: sm.updated["fairState"] and str(sm["fairState"].status) == "waitingForCamera", "fairmodeld after all")
  assert processes(sm)["bystander"] == bystander and manager.poll() is None
  pm.close()
  sm.close()


# *** a full disk ***

FULL = r"""
set -e
mount -t tmpfs -o size=64k tmpfs /dev/shm
mount -t tmpfs -o size=64k tmpfs "$TMPDIR"
for d in /dev/shm "$TMPDIR"; do head -c 1000000 /dev/zero > "$d/fill" 2>/dev/null || true; done
exec "$@"
"""

IN_FULL = """
import errno, os, sys
from fair_rig import Rig
for d in ("/dev/shm", os.environ["TMPDIR"]):
  try:
    with open(d + "/more", "w") as f:
      f.write("x" * 10000)
    raise SystemExit(f"{d} is not full")
  except OSError as e:
    assert e.errno == errno.ENOSPC
rig = Rig(sys.argv[1])
rig.camera()
rig.flows()
os.remove(os.environ["TMPDIR"] + "/fill")
rig.flows()
with open(os.environ["TMPDIR"] + "/fill", "wb", buffering=0) as f:
  try:
    while f.write(bytes(4096)): pass
  except OSError: pass
rig.flows()
assert rig.sm["fairState"].faultCount == 0, rig.sm["fairState"]
sys.stderr.write(rig.close())
print("went on")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/shm is Linux's")
def test_dev_shm_and_tmp_are_full(tmp_path, prefix):
  """Two true file systems of 64 kB, full before it starts, freed, and filled again: in a mount namespace of its own, so that nobody else sees them."""
  if subprocess.run(["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /dev/shm"], capture_output=True).returncode:
    pytest.skip("this user may not mount a small /dev/shm")
  bundle = write_bundle(tmp_path / "tiny").path
  with tempfile.TemporaryDirectory(prefix="f") as small:  # a short path: it holds sockets
    env = {**os.environ, "TMPDIR": small, "PYTHONPATH": f"{os.path.dirname(__file__)}{os.pathsep}{os.getcwd()}"}
    r = subprocess.run(["unshare", "-m", "sh", "-c", FULL, "sh", sys.executable, "-c", IN_FULL, str(bundle)],
                       capture_output=True, text=True, timeout=4 * DEADLINE, env=env)
  assert r.returncode == 0 and r.stdout.strip() == "went on" and "Traceback" not in r.stderr, r.stderr


def test_no_sockets_is_one_line_and_exit_2(tmp_path, prefix):
  """Where not even the sockets' folder can be made, fairmodeld says so and leaves; the manager tries again with back-off."""
  (tmp_path / f"openpilot-{os.getuid()}").write_text("a file, not a folder")
  r = subprocess.run(FAIRMODELD, capture_output=True, text=True, timeout=DEADLINE, env={**os.environ, "TMPDIR": str(tmp_path)})
  assert r.returncode == 2 and r.stderr.startswith("error: ") and r.stderr.count("\n") == 1, r.stderr

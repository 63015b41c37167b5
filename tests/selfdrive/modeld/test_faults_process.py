"""What must not bring fairmodeld down, each done to the real process: bundles, the manager and its flag, full disks. A
table in selfdrive/modeld/fair/README.md says which test is which."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from fair_bundle import write_bundle
from fair_rig import DEADLINE, FAIRMODELD, Rig, device, ids, objects_rig, wait, write_objects
from openpilot.cereal import messaging
from openpilot.common.params import Params
from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.tools.sim.write_route import write_route


@pytest.fixture
def rig(tmp_path, prefix):
  yield from objects_rig(tmp_path)


# *** bundles ***


def test_bundle_replaced_in_mid_run(rig, tmp_path):
  rig.flows("fairObjects")
  before, pid = ids(rig.sm), rig.proc.pid
  new = write_objects(tmp_path / "new", "new")
  (tmp_path / "tiny").rename(tmp_path / "old")
  new.rename(tmp_path / "tiny")
  rig.until(
    lambda sm: sm["fairState"].bundle == "new" and sm["fairState"].status == "running", "fairState of the new bundle"
  )
  rig.flows("fairObjects")
  assert (
    rig.sm["fairObjects"].bundle == "new"
    and rig.sm["fairState"].faultCount == 0
    and rig.sm["fairState"].bundleHash != ""
  )
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
  assert proc.returncode == 0 and "Traceback" not in "".join(
    line for line in err.splitlines(True) if "manager.py" in line
  )


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
  replay = subprocess.Popen(
    [sys.executable, "-m", "openpilot.tools.replay.replay", str(route), "--loop"], stderr=subprocess.PIPE, text=True
  )
  sm, objects, car = (
    messaging.SubMaster(["managerState"]),
    messaging.sub_sock("fairObjects", timeout=100),
    messaging.sub_sock("carState", timeout=100),
  )

  def tracked():
    """Identities in the next message that has some: {id: age}."""
    sm.update(0)
    m = messaging.recv_one(objects)
    return {o.trackId: o.age for o in m.fairObjects.objects} if m is not None and m.valid else {}

  try:
    before = wait(lambda: (t := tracked()) and min(t.values()) > 15 and t, "objects that are tracked")
    others = wait(lambda: sm.update(50) or (len(processes(sm)) == 2 and processes(sm)), "managerState")
    os.kill(others["fairmodeld"], signal.SIGKILL)
    wait(
      lambda: sm.update(50) or processes(sm).get("fairmodeld") not in (None, others["fairmodeld"]), "another fairmodeld"
    )
    messaging.drain_sock(car)
    wait(
      lambda: (t := tracked()) and min(t) == min(before) == 1 and max(t.values()) < min(before.values()),
      "identities that begin anew",
    )
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
  """Two true file systems of 64 kB, full before it starts, freed, and filled again: in a mount namespace of its own, so
  that nobody else sees them."""
  if subprocess.run(
    ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /dev/shm"], capture_output=True
  ).returncode:
    pytest.skip("this user may not mount a small /dev/shm")
  bundle = write_bundle(tmp_path / "tiny").path
  with tempfile.TemporaryDirectory(prefix="f") as small:  # a short path: it holds sockets
    env = {**os.environ, "TMPDIR": small, "PYTHONPATH": f"{os.path.dirname(__file__)}{os.pathsep}{os.getcwd()}"}
    r = subprocess.run(
      ["unshare", "-m", "sh", "-c", FULL, "sh", sys.executable, "-c", IN_FULL, str(bundle)],
      capture_output=True,
      text=True,
      timeout=4 * DEADLINE,
      env=env,
    )
  assert r.returncode == 0 and r.stdout.strip() == "went on" and "Traceback" not in r.stderr, r.stderr


def test_no_sockets_is_one_line_and_exit_2(tmp_path, prefix):
  """Where not even the sockets' folder can be made, fairmodeld says so and leaves; the manager tries again with
  back-off."""
  (tmp_path / f"openpilot-{os.getuid()}").write_text("a file, not a folder")
  r = subprocess.run(
    FAIRMODELD, capture_output=True, text=True, timeout=DEADLINE, env={**os.environ, "TMPDIR": str(tmp_path)}
  )
  assert r.returncode == 2 and r.stderr.startswith("error: ") and r.stderr.count("\n") == 1, r.stderr

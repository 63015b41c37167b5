import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from openpilot.cereal import messaging
from openpilot.common.params import Params
from openpilot.selfdrive.manager import process
from openpilot.selfdrive.manager.process import PythonProcess, ensure_running
from openpilot.selfdrive.manager.process_config import (
  and_,
  fair,
  iscar,
  managed_processes,
  not_,
  notcar,
  only_offroad,
  only_onroad,
  or_,
)

DEADLINE = 30.0  # s; generous: only a hang reaches it


def wait(condition, what):
  end = time.monotonic() + DEADLINE
  while not condition():
    assert time.monotonic() < end, f"no {what} within {DEADLINE} s"
    time.sleep(0.02)


def test_predicates(prefix):
  class CP:
    notCar = True

  p = Params()
  assert only_onroad(True, p, None) and not only_onroad(False, p, None) and only_offroad(False, p, None)
  assert notcar(True, p, CP) and not iscar(True, p, CP) and iscar(True, p, None)
  assert (
    and_(only_onroad, iscar)(True, p, None)
    and not and_(only_onroad, not_(iscar))(True, p, None)
    and or_(only_offroad, iscar)(True, p, None)
  )
  assert not fair(True, p, None)
  run = managed_processes["fairmodeld"].should_run
  assert not run(True, p, None)
  p.put_bool("FairEnabled", True)
  assert run(True, p, None) and not run(False, p, None)


@pytest.fixture
def module(tmp_path, monkeypatch):
  """A module that writes its pid and waits, or fails at once if `crash` exists."""
  (tmp_path / "dummy_fair.py").write_text(f"""
import os, sys, time
open({str(tmp_path)!r} + "/runs", "a").write(str(os.getpid()) + "\\n")
if os.path.exists({str(tmp_path)!r} + "/crash"): sys.exit(3)
time.sleep(600)
""")
  monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.getcwd()}")
  return "dummy_fair"


def runs(tmp_path):
  f = tmp_path / "runs"
  return [int(line) for line in f.read_text().split()] if f.exists() else []


def alive(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  with open(f"/proc/{pid}/stat") as f:
    return f.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_runs_exactly_while_started_and_flag_is_on(prefix, tmp_path, module):
  params, p = Params(), PythonProcess("dummy", module, and_(only_onroad, fair))
  ensure_running([p], True, params)
  assert not p.alive
  params.put_bool("FairEnabled", True)
  ensure_running([p], False, params)
  assert not p.alive
  ensure_running([p], True, params)
  wait(lambda: runs(tmp_path), "start")
  pid = p.proc.pid
  ensure_running([p], True, params)
  assert p.proc.pid == pid
  params.put_bool("FairEnabled", False)
  ensure_running([p], True, params)
  assert not p.alive and not alive(pid)


def test_crash_restarts_with_growing_back_off(prefix, tmp_path, module, monkeypatch):
  monkeypatch.setattr(process, "BACKOFF", 0.2)
  (tmp_path / "crash").touch()
  p = PythonProcess("dummy", module, only_onroad)
  p.backoff = 0.2
  seen = []

  def turn():
    ensure_running([p], True, Params())
    if p.crashes > len(seen):
      seen.append(p.backoff)
    return len(seen) >= 3

  wait(turn, "three crashes")
  assert seen == [0.4, 0.8, 1.6] and p.exitcode == 3 and len(runs(tmp_path)) == 3
  (tmp_path / "crash").unlink()
  wait(lambda: ensure_running([p], True, Params()) or p.alive, "restart")
  p.stop()
  assert not p.alive and p.backoff == 0.2


MANAGER = """
from openpilot.selfdrive.manager import manager
from openpilot.selfdrive.manager.process import PythonProcess
from openpilot.selfdrive.manager.process_config import and_, only_onroad, fair
try:
  manager.run([PythonProcess("dummy", "dummy_fair", and_(only_onroad, fair))])
except KeyboardInterrupt: pass
"""


@pytest.fixture
def manager(prefix, module):
  proc = subprocess.Popen([sys.executable, "-c", MANAGER])
  yield proc
  if proc.poll() is None:
    proc.send_signal(signal.SIGINT)
    proc.wait(DEADLINE)


def test_flag_and_ignition_in_mid_run(manager, tmp_path, capsys):
  params, pm = Params(), messaging.PubMaster(["deviceState"])

  def device(started):
    msg = messaging.new_message("deviceState", valid=True)
    msg.deviceState.started = started
    pm.send("deviceState", msg)

  def until(condition, what, started=True):
    t0 = time.monotonic()
    wait(lambda: device(started) or condition(), what)
    with capsys.disabled():
      print(f" [{what}: {time.monotonic() - t0:.2f} s]", end="")

  until(lambda: params.get_bool("IsOffroad"), "offroad at first", started=False)
  assert not params.get_bool("IsOnroad")
  until(lambda: params.get_bool("IsOnroad") and not params.get_bool("IsOffroad"), "onroad")
  assert not runs(tmp_path)
  params.put_bool("FairEnabled", True)
  until(lambda: len(runs(tmp_path)) == 1 and alive(runs(tmp_path)[0]), "flag on")
  params.put_bool("FairEnabled", False)
  until(lambda: not alive(runs(tmp_path)[0]), "flag off")
  params.put_bool("FairEnabled", True)
  until(lambda: len(runs(tmp_path)) == 2, "flag on again")
  until(lambda: not alive(runs(tmp_path)[1]), "offroad", started=False)
  pm.close()


def test_killed_manager_leaves_no_child(manager, tmp_path):
  params, pm = Params(), messaging.PubMaster(["deviceState"])
  params.put_bool("FairEnabled", True)

  def start():
    msg = messaging.new_message("deviceState", valid=True)
    msg.deviceState.started = True
    pm.send("deviceState", msg)
    return bool(runs(tmp_path))

  wait(start, "child")
  os.kill(manager.pid, signal.SIGKILL)
  manager.wait()
  wait(lambda: not alive(runs(tmp_path)[0]), "end of the child")
  pm.close()


def test_second_manager_says_so(manager):
  sm = messaging.SubMaster(["managerState"])
  wait(lambda: sm.update(50) or sm.seen["managerState"], "managerState")
  r = subprocess.run(
    [sys.executable, "-m", "openpilot.selfdrive.manager.manager"], capture_output=True, text=True, timeout=DEADLINE
  )
  assert r.returncode == 2 and r.stderr.startswith("error: a manager runs already") and r.stderr.count("\n") == 1


def test_who_does_not_hear_sigint_is_killed(prefix, tmp_path, module, monkeypatch):
  monkeypatch.setattr(process, "STOP_TIMEOUT", 0.3)
  deaf = tmp_path / "dummy_fair.py"
  deaf.write_text("import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + deaf.read_text())
  p = PythonProcess("dummy", module, only_onroad)
  ensure_running([p], True, Params())
  wait(lambda: runs(tmp_path), "start")
  pid = p.proc.pid
  ended = threading.Thread(target=p.stop, daemon=True)
  ended.start()
  ended.join(DEADLINE)
  assert not ended.is_alive() and not alive(pid) and p.exitcode == -signal.SIGKILL

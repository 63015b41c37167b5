import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from openpilot.cereal import messaging
from openpilot.cereal.services import SERVICE_LIST

DEADLINE = 20.0


def until(f, what):
  end = time.monotonic() + DEADLINE
  while (value := f()) is None or value is False:
    assert time.monotonic() < end, f"no {what} within {DEADLINE} s"
    time.sleep(0.005)
  return value


def camera_state(frame_id, name="narrowRoadCameraState"):
  msg = messaging.new_message(name, valid=True)
  msg.narrowRoadCameraState.frameId = frame_id
  return msg


@pytest.fixture
def pm(prefix):
  p = messaging.PubMaster(["roadCameraState"])
  yield p
  p.close()


@pytest.mark.parametrize("spelling", ["roadCameraState", "narrowRoadCameraState"])
def test_both_spellings_meet(pm, spelling):
  sock, sm = messaging.sub_sock(spelling, timeout=10), messaging.SubMaster([spelling])
  got = until(
    lambda: pm.send("narrowRoadCameraState", camera_state(4, "roadCameraState")) or messaging.recv_one(sock), "message"
  )
  assert got.which() == "narrowRoadCameraState" and got.narrowRoadCameraState.frameId == 4
  until(
    lambda: (
      pm.send("roadCameraState", camera_state(5))
      or sm.update(10)
      or (sm.updated[spelling] and sm[spelling].frameId == 5)
    ),
    "update",
  )
  sock.close()
  sm.close()


def connected(pm, sock):
  until(lambda: pm.send("narrowRoadCameraState", camera_state(0)) or sock.receive(non_blocking=True), "connection")
  time.sleep(0.05)
  messaging.drain_sock_raw(sock)


def test_drain_conflate_and_timeout(pm):
  every, newest = (
    messaging.sub_sock("narrowRoadCameraState", timeout=50),
    messaging.sub_sock("narrowRoadCameraState", conflate=True, timeout=50),
  )
  for s in (every, newest):
    connected(pm, s)
  messaging.drain_sock_raw(every)
  for i in range(20):
    pm.send("narrowRoadCameraState", camera_state(i))
  time.sleep(0.1)
  assert [m.narrowRoadCameraState.frameId for m in messaging.drain_sock(every)] == list(range(20))
  assert messaging.recv_one(newest).narrowRoadCameraState.frameId == 19
  t0 = time.monotonic()
  assert messaging.recv_one(every) is None and messaging.recv_one_or_none(newest) is None
  assert time.monotonic() - t0 >= 0.045
  every.close()
  newest.close()


def test_submaster_alive_valid_freq(prefix):
  sm = messaging.SubMaster(["carState", "deviceState", "onroadEvents", "logMessage"])
  assert not any(sm.seen.values()) and sm["carState"].vEgo == 0 and len(sm["onroadEvents"]) == 0

  def event(t, vego, valid=True):
    m = messaging.new_message("carState", valid=valid, logMonoTime=int(t * 1e9))
    m.carState.vEgo = vego
    return messaging.log_from_bytes(m.to_bytes())

  for i in range(200):  # 100 Hz, as promised
    sm.update_msgs(i * 0.01, [event(i * 0.01, i)])
  assert (
    sm.updated["carState"]
    and sm.seen["carState"]
    and sm.alive["carState"]
    and sm.valid["carState"]
    and sm.freq_ok["carState"]
    and sm.recv_frame["carState"] == 199
  )
  assert (
    not sm.alive["deviceState"] and not sm.all_alive() and sm.all_checks(["carState"]) and sm["carState"].vEgo == 199
  )
  sm.update_msgs(2.05, [])
  assert not sm.updated["carState"] and sm.alive["carState"]
  sm.update_msgs(1.99 + 10 / SERVICE_LIST["carState"].frequency + 0.01, [])
  assert not sm.alive["carState"] and not sm.all_checks(["carState"])
  sm.update_msgs(3.0, [event(3.0, 0, valid=False)])
  assert sm.alive["carState"] and not sm.valid["carState"] and not sm.all_valid(["carState"])
  for i in range(300):  # 25 Hz in place of 100
    sm.update_msgs(4 + i * 0.04, [event(4 + i * 0.04, 0)])
  assert not sm.freq_ok["carState"]
  sm.close()
  with pytest.raises(KeyError):
    messaging.SubMaster(["noSuchService"])


def test_too_large_is_said_before_sending(prefix):
  pm = messaging.PubMaster(["fairState"])
  with pytest.raises(messaging.MessageTooLargeError, match="fairState"):
    pm.send("fairState", b"\0" * 90_000)
  pm.close()


def test_second_publisher_is_told_who_has_it(prefix):
  pm = messaging.PubMaster(["fairState"])
  with pytest.raises(messaging.MultiplePublishersError, match=f"fairState.*{os.getpid()}"):
    messaging.PubMaster(["fairState"])
  pm.close()
  messaging.PubMaster(["fairState"]).close()


PUBLISHER = """
import time
from openpilot.cereal import messaging
pm = messaging.PubMaster(["fairState"])
while True:
  pm.send("fairState", messaging.new_message("fairState", valid=True)); time.sleep(.01)
"""


def test_publisher_killed_and_started_again(prefix):
  sock = messaging.sub_sock("fairState", timeout=100)
  for _ in range(3):
    proc = subprocess.Popen([sys.executable, "-c", PUBLISHER])
    until(lambda: messaging.recv_one(sock), "message")
    os.kill(proc.pid, signal.SIGKILL)
    proc.wait()
    messaging.drain_sock_raw(sock)
  pm = messaging.PubMaster(["fairState"])  # what it left behind is taken over
  until(
    lambda: pm.send("fairState", messaging.new_message("fairState")) or messaging.recv_one_or_none(sock),
    "message of a new publisher",
  )
  pm.close()
  sock.close()


def test_very_long_prefix(prefix, monkeypatch):
  monkeypatch.setenv("OPENPILOT_PREFIX", "p" * 200)
  pm, sock = messaging.PubMaster(["fairState"]), messaging.sub_sock("fairState", timeout=50)
  until(lambda: pm.send("fairState", messaging.new_message("fairState")) or messaging.recv_one(sock), "message")
  pm.close()
  sock.close()


def test_a_message_may_take_a_third_of_its_queue(prefix):
  sock = messaging.PubSocket("some", 300)
  sock.send(bytes(100))
  with pytest.raises(messaging.MessageTooLargeError, match="101 bytes, at most 100 fit"):
    sock.send(bytes(101))
  sock.close()


def test_a_prefix_of_ones_own_leaves_no_sockets(monkeypatch):
  with tempfile.TemporaryDirectory(dir="/tmp") as short:  # a socket's path has 107 bytes
    tmp = Path(short)
    monkeypatch.setenv("TMPDIR", short)
    own = tmp / f"openpilot-{os.getuid()}"
    for name in ("mine", "yours", "m" * 80):
      monkeypatch.setenv("OPENPILOT_PREFIX", name)
      messaging.pub_sock("carState").close()
    assert len(list(own.iterdir())) == 3
    messaging.remove_sockets()
    monkeypatch.setenv("OPENPILOT_PREFIX", "mine")
    messaging.remove_sockets()
    assert [f.name for f in own.iterdir()] == ["yours"]
    (tmp / "kept").mkdir()
    for name in ("../kept", ".", "..", str(tmp / "kept")):
      monkeypatch.setenv("OPENPILOT_PREFIX", name)
      messaging.remove_sockets()
    assert (tmp / "kept").is_dir() and (own / "yours").is_dir()

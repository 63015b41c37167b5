"""Replay over real sockets, and the deterministic one without."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import pytest

from openpilot.cereal import log, messaging
from openpilot.cereal.visionipc import VisionIpcClient, VisionStreamType
from openpilot.selfdrive.modeld.fair.bundle import MODELS_DIR, find_bundle
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.logreader import TAG_NAMES, LogReader
from openpilot.tools.lib.logwriter import write_log
from openpilot.tools.lib.route import Route
from openpilot.tools.replay.compare_logs import MACHINE_FIELDS, compare_logs, differences
from openpilot.tools.replay.process_replay import process_replay
from openpilot.tools.replay.record import merge, on_route_clock
from openpilot.tools.replay.replay import Replay, with_time
from openpilot.tools.replay.measure import measure
from openpilot.tools.replay.show import show
from openpilot.tools.replay.source import choose_camera, frames
from openpilot.tools.sim.write_route import write_route

ROAD = VisionStreamType.VISION_STREAM_NARROW_ROAD


@pytest.fixture(scope="module")
def route(tmp_path_factory):
  """1.5 s in two segments: over a boundary."""
  return write_route(tmp_path_factory.mktemp("route"), seed=11, seconds=1.5, segment_seconds=1.0)


class Listener:
  """Hears camera frames and messages while a replay runs."""

  def __init__(self, services):
    self.poller, self.done, self.frames, self.events = messaging.Poller(), threading.Event(), [], []
    self.socks = [messaging.sub_sock(s, self.poller) for s in services]
    self.client = VisionIpcClient("camerad", ROAD, False)
    self.threads = [threading.Thread(target=self._messages), threading.Thread(target=self._camera)]
    for t in self.threads:
      t.start()

  def _messages(self):
    while not self.done.is_set():
      for sock in self.poller.poll(50):
        self.events += messaging.drain_sock(sock)

  def _camera(self):
    while not self.done.is_set():
      if not self.client.is_connected():
        self.client.connect(False) or time.sleep(0.005)
      elif (buf := self.client.recv(50)) is not None:
        self.frames.append(
          (
            self.client.frame_id,
            self.client.timestamp_eof,
            buf.data[: buf.stride * buf.height].reshape(buf.height, buf.stride)[:, : buf.width].mean(),
          )
        )

  def stop(self):
    time.sleep(0.2)
    self.done.set()
    for t in self.threads:
      t.join()
    self.client.close()
    return self


def heard(replay, services=("carState", "modelV2", "deviceState", "narrowRoadCameraState"), enough=None):
  """enough: of frames and of plans, after which a replay without an end is stopped."""
  listener = Listener(services)
  if enough is not None:
    threading.Thread(target=stop_after, args=(replay, listener, enough)).start()
  replay.run(progress=False, warm_up=0.5)
  return listener.stop()


def stop_after(replay, listener, enough):
  end = time.monotonic() + 30
  while time.monotonic() < end:
    plans = sum(e.which() == "modelV2" for e in list(listener.events))
    if min(len(listener.frames), plans) >= enough:
      break
    time.sleep(0.05)
  replay.stop.set()


def test_frames_and_messages_come_as_recorded(route, prefix):
  segments = Route(route).segments
  got = heard(Replay(segments))
  want = list(frames(segments, "road"))
  assert [f[0] for f in got.frames] == [e.frame_id for e, _ in want] and len(want) == 30
  assert [f[1] for f in got.frames] == [e.timestamp_eof for e, _ in want]
  for (_, _, mean), (_, frame) in zip(got.frames, want, strict=True):
    assert abs(mean - frame[:760].mean()) < 1e-9
  logged = [e.logMonoTime for e in LogReader(Route(route), services=["modelV2"])]
  assert [e.logMonoTime for e in got.events if e.which() == "modelV2"] == logged and len(logged) == 30
  assert sum(e.which() == "carState" for e in got.events) == 150
  assert all(e.deviceState.started for e in got.events if e.which() == "deviceState")
  assert [e.narrowRoadCameraState.frameId for e in got.events if e.which() == "narrowRoadCameraState"] == [
    e.frame_id for e, _ in want
  ]


def test_start_allow_block_and_loop(route, prefix):
  segments = Route(route).segments
  got = heard(Replay(segments, start=1.0, allow=["carState", "roadCameraState"], block=["carState"]))
  assert {e.which() for e in got.events} == {"narrowRoadCameraState", "deviceState"} and len(got.frames) in (9, 10, 11)
  got = heard(Replay(segments, loop=True, speed=2.0), enough=41)
  ids, times = [f[0] for f in got.frames], [f[1] for f in got.frames]
  assert len(ids) > 40 and ids == list(range(ids[0], ids[0] + len(ids))) and times == sorted(set(times))
  times = [e.logMonoTime for e in got.events if e.which() == "modelV2"]
  assert len(times) > 40 and times == sorted(set(times))
  with pytest.raises(UserError, match="no service nonsense"):
    Replay(segments, allow=["nonsense"])


def test_live_publisher_is_one_line_and_2(route, prefix):
  pm = messaging.PubMaster(["deviceState"])
  r = subprocess.run(
    [sys.executable, "-m", "openpilot.tools.replay.replay", str(route)], capture_output=True, text=True
  )
  assert (
    r.returncode == 2
    and r.stderr.startswith("error: 'deviceState' is being published already")
    and r.stderr.count("\n") == 1
  )
  pm.close()


def test_what_our_own_processes_say_is_not_played(prefix, tmp_path):
  """A log has managerState and fair* of the drive; manager and fairmodeld beside the replay make new ones, whichever
  came first."""
  events = []
  for i, service in enumerate(("carState", "managerState", "fairState", "carState")):
    events.append(messaging.new_message(service, valid=True, logMonoTime=10**9 + i).to_bytes())
  write_log(tmp_path / "r" / "rlog.zst", events)
  segments = Route(tmp_path / "r").segments
  pm = messaging.PubMaster(["managerState", "fairState"])
  try:
    replay = Replay(segments)
    assert replay.services == {"carState", "deviceState"}
    replay.run(progress=False, warm_up=0)
    assert replay.sent_messages == 2
    with pytest.raises(messaging.MultiplePublishersError, match="managerState"):
      Replay(segments, allow=["managerState"])
  finally:
    pm.close()
  replay = Replay(segments, allow=["managerState"])  # asked for, it plays
  assert replay.services == {"managerState", "deviceState"}
  replay.close()
  replay = Replay(segments)
  messaging.PubMaster(["managerState"]).close()  # a manager after the replay
  replay.close()


def test_video_without_log_and_log_without_video(route, prefix, tmp_path, capsys):
  segment = Route(route).segments[0]
  (tmp_path / "v").mkdir()
  (tmp_path / "v" / "qcamera.ts").write_bytes(segment.qcamera.read_bytes())
  segments = Route(tmp_path / "v").segments
  assert choose_camera(segments, "road") == "qcamera"
  got = heard(Replay(segments, seconds=0.5))
  assert len(got.frames) >= 9 and "no log" in capsys.readouterr().err
  (tmp_path / "l").mkdir()
  (tmp_path / "l" / "rlog.zst").write_bytes(segment.rlog.read_bytes())
  got = heard(Replay(Route(tmp_path / "l").segments, seconds=0.3))
  assert not got.frames and len(got.events) > 20 and "no video" in capsys.readouterr().err
  with pytest.raises(UserError, match=r"no ecamera.*its cameras are qcamera"):
    choose_camera(segments, "wide")


def test_a_machines_own_figures_can_be_left_out_of_a_comparison():
  tag = next(t for t, n in TAG_NAMES.items() if n == "fairState")

  def state(time, late):
    msg = messaging.new_message("fairState", logMonoTime=1)
    s = msg.fairState
    s.warpTime, s.memoryMB, s.publishTime = time, 100 * time, time
    (g,) = s.init("graphs", 1)
    g.executionTime, g.executionTimeMax, g.late = time, time, late
    return [(1, tag, msg.to_bytes())]

  assert len(compare_logs(state(0.1, 0), state(0.2, 0))) == 5
  assert not compare_logs(state(0.1, 0), state(0.2, 0), MACHINE_FIELDS)
  (line,) = compare_logs(state(0.1, 0), state(0.2, 1), MACHINE_FIELDS)
  assert "graphs[0].late" in line
  known = {
    f"{s}.{f}"
    for s in ("fairState", "fairDepth", "fairObjects", "fairSegmentation", "fairLanes", "modelV2")
    for f in log.Event.schema.fields[s].schema.fields
  }
  assert {f for f in MACHINE_FIELDS if f.count(".") == 1} <= known


def test_time_is_patched_in_place():
  msg = messaging.new_message("carState", valid=True, logMonoTime=5)
  msg.carState.vEgo = 3.0
  with log.Event.from_bytes(with_time(msg.to_bytes(), 77)) as e:
    assert (e.logMonoTime, e.carState.vEgo, e.valid) == (77, 3.0, True)


def run(route):
  return list(
    process_replay(Route(route).segments, FairModel(find_bundle("scene-nano", MODELS_DIR)), "road", progress=False)
  )


def test_process_replay_is_equal_byte_for_byte(route, tmp_path):
  a, b = run(route), run(route)
  assert a == b and len(a) == 47  # 30 class maps, depth of every second frame, and fairState at 1 Hz
  write_log(tmp_path / "a.zst", a)
  write_log(tmp_path / "b.zst", b)
  assert (tmp_path / "a.zst").read_bytes() == (tmp_path / "b.zst").read_bytes()
  assert compare_logs(LogReader(tmp_path / "a.zst").raw(), LogReader(tmp_path / "b.zst").raw()) == []
  events = list(LogReader(tmp_path / "a.zst"))
  ids = [e.fairDepth.frameId for e in events if e.which() == "fairDepth"]
  assert ids == [e.frame_id for e, _ in frames(Route(route).segments, "road")][::2]
  assert all(e.valid and e.fairDepth.modelExecutionTime == 0 for e in events if e.which() == "fairDepth")
  numbers = measure(tmp_path / "a.zst", Route(route).segments, live=False)
  assert numbers["frames"] == 30 and numbers["calibrated"] and numbers["gaps"] == 0
  # scene-nano on a world that it has not seen; its card says .07 and .89 over many
  assert numbers["quality"]["abs_rel"] < 0.25 and numbers["quality"]["iou_road"] > 0.85


def test_compare_logs_finds_a_planted_difference(route, tmp_path):
  a = run(route)
  event = messaging.log_from_bytes(a[5]).as_builder()
  which = event.which()
  getattr(event, which).frameId += 1
  write_log(tmp_path / "a.zst", a)
  write_log(tmp_path / "b.zst", [*a[:5], event.to_bytes(), *a[6:-1]])
  r = subprocess.run(
    [sys.executable, "-m", "openpilot.tools.replay.compare_logs", str(tmp_path / "a.zst"), str(tmp_path / "b.zst")],
    capture_output=True,
    text=True,
  )
  assert r.returncode == 1 and f"{which}.frameId is" in r.stdout and " messages and " in r.stdout
  r = subprocess.run(
    [sys.executable, "-m", "openpilot.tools.replay.compare_logs", str(tmp_path / "a.zst"), str(tmp_path / "none")],
    capture_output=True,
    text=True,
  )
  assert r.returncode == 2 and r.stderr.startswith("error:")


def test_overlay_and_merge(route, tmp_path):
  segments = Route(route).segments
  merge([s.log_path for s in segments], run(route), tmp_path / "rlog.zst")
  times = [e.logMonoTime for e in LogReader(tmp_path / "rlog.zst", sort_by_time=False)]
  assert times == sorted(times)
  n, kept = show([tmp_path / "rlog.zst"], segments, "road", tmp_path / "o.mp4", keep=2)
  assert n == 30 and len(kept) == 2
  with av.open(str(tmp_path / "o.mp4")) as c:
    pictures = [f.to_ndarray(format="rgb24") for f in c.decode(video=0)]
  assert len(pictures) == 30 and pictures[0].shape == (760, 1344, 3)
  plain = [f for _, f in frames(segments, "road", pix_fmt="rgb24")]
  tint = (pictures[10].astype(int) - plain[10])[500:640, 500:840]
  assert tint[..., 2].mean() > 20 > tint[..., 0].mean()  # the road before the car is blue
  with pytest.raises(UserError, match="no fair messages"):
    show([segments[0].rlog], segments, "road", tmp_path / "none.mp4")
  assert not (tmp_path / "none.mp4").exists()


@pytest.mark.slow
def test_real_route_over_its_boundary(shared_data, prefix):
  segments = Route(shared_data / "realdata" / "0000002c--d68dde99ca").segments
  got = heard(
    Replay(segments, camera="road", start=57.0, seconds=6.0, speed=2.0), ("narrowRoadCameraState", "liveCalibration")
  )
  ids = [f[0] for f in got.frames]
  assert (
    len(ids) > 100 and ids == list(range(ids[0], ids[0] + len(ids))) and ids[0] < 1202 < ids[-1]
  )  # segment 1 begins at 1202
  assert any(e.which() == "extrinsicsCalibration" and len(e.extrinsicsCalibration.rpyCalib) == 3 for e in got.events)


def test_messages_of_another_route_are_not_drawn(route, tmp_path):
  """Frames of two routes may have the same numbers."""
  events = [messaging.log_from_bytes(dat).as_builder() for dat in run(route)]
  for e in events:
    if e.which() != "fairState":
      getattr(e, e.which()).timestampEof += 60 * 10**9
  write_log(tmp_path / "other.zst", [e.to_bytes() for e in events])
  with pytest.raises(UserError, match="s from when the fair messages say; they are of another route"):
    show([tmp_path / "other.zst"], Route(route).segments, "road", tmp_path / "o.mp4")
  assert not (tmp_path / "o.mp4").exists()


@pytest.mark.slow
def test_demo(tmp_path):
  r = subprocess.run(
    [sys.executable, "-m", "openpilot.tools.demo", "--seconds", "3", "--out", str(tmp_path / "demo")],
    capture_output=True,
    text=True,
  )
  assert r.returncode == 0, r.stdout + r.stderr
  assert {"overlay.mp4", "rlog.zst", "report.html", "report.json"} <= {p.name for p in (tmp_path / "demo").iterdir()}
  numbers = json.loads((tmp_path / "demo" / "report.json").read_text())
  # of 60; how many a busy machine drops says nothing
  assert 1 <= numbers["frames"] and numbers["frames"] + numbers["dropped"] <= 60
  assert numbers["calibrated"] and numbers["invalid"] == 0 and numbers["quality"]["iou_road"] > 0.8
  page = (tmp_path / "demo" / "report.html").read_text()
  assert page.count("<img") <= 4 and (page.count("<img") or numbers["frames"] < 5)
  assert find_bundle(None, MODELS_DIR).name in page and "<svg" in page
  kinds = {e.which() for e in LogReader(tmp_path / "demo" / "rlog.zst")}
  assert {"fairState", "fairDepth", "fairSegmentation", "modelV2", "carState"} <= kinds


def of_this_demo(pid: int) -> list[int]:
  """The processes that live by the prefix of the demo with this number."""
  found = []
  for folder in Path("/proc").iterdir():
    with contextlib.suppress(OSError):
      if (
        folder.name.isdigit() and f"OPENPILOT_PREFIX=demo-{pid}\0".encode() in (folder / "environ").read_bytes() + b"\0"
      ):
        found.append(int(folder.name))
  return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_demo_that_is_ended_leaves_no_process(route, tmp_path, number):
  command = [sys.executable, "-m", "openpilot.tools.demo", "--route", str(route), "--out", str(tmp_path / "demo")]
  demo = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  try:
    wait_for(lambda: len(of_this_demo(demo.pid)) >= 3, "manager, fairmodeld and its worker")
    demo.send_signal(number)
    assert demo.wait(60) != 0
    wait_for(lambda: not of_this_demo(demo.pid), "their end")
  finally:
    demo.kill()
    demo.wait()


def wait_for(condition, what):
  end = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < end, f"no {what} within a minute"
    time.sleep(0.05)


def test_the_fastest_message_sets_the_clock():
  """The others keep what they took longer."""
  live = []
  for frame, latency in ((1, 9_000_000), (2, 5_000_000), (3, 12_000_000)):
    msg = messaging.new_message("fairDepth", valid=True)
    msg.fairDepth.frameId, msg.fairDepth.timestampEof = frame, frame * 50_000_000
    msg.logMonoTime = 7_000_000_000 + frame * 50_000_000 + latency
    live.append(msg.to_bytes())
  assert [t - frame * 50_000_000 for frame, (t, _) in enumerate(on_route_clock(live), 1)] == [4_000_000, 0, 7_000_000]
  assert [messaging.log_from_bytes(dat).logMonoTime for _, dat in on_route_clock(live)] == [
    t for t, _ in on_route_clock(live)
  ]


@pytest.mark.parametrize(
  ("other", "tolerance", "same"),
  [
    (10.1, 0.0, False),
    (10.1, 0.009, False),
    (10.1, 0.0092, True),
    (float("nan"), 1.0, False),
    (10.0, 0.0, True),
    (9.9, 0.0092, True),
  ],
)
def test_tolerance_is_absolute_and_relative(other, tolerance, same):
  assert (not list(differences({"x": [10.0]}, {"x": [other]}, tolerance=tolerance))) == same  # 0.1 beside 1 + 10
  assert not list(differences({"x": float("nan")}, {"x": float("nan")}))

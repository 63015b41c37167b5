"""Replay over gaps, from beyond the end, on a pipe; segments that cannot be read."""

import subprocess
import sys
import time

import numpy as np
import pytest

from openpilot.cereal import messaging
from openpilot.tools.lib.logwriter import write_log
from openpilot.tools.lib.route import Route
from openpilot.tools.lib.videowriter import VideoWriter
from openpilot.tools.replay.replay import Replay
from openpilot.tools.replay.source import KnownCamera

SECOND = 10**9


def segment(root, num, begin, count=30):
  folder = root / f"0000002c--bbbbbbbbbb--{num}"
  folder.mkdir(parents=True)
  with VideoWriter(folder / "fcamera.hevc", 128, 96, 10, 24) as v:
    for i in range(count):
      v.write(np.full((96, 128, 3), 3 * i, np.uint8))
  out = []
  for i in range(count):
    for service in ("carState", "narrowRoadEncodeIdx"):
      m = messaging.new_message(service, valid=True, logMonoTime=begin + i * 50_000_000 + 40_000_000)
      if service == "narrowRoadEncodeIdx":
        x = m.narrowRoadEncodeIdx
        x.frameId, x.segmentNum, x.segmentId = num * 1200 + i, num, i
        x.timestampSof, x.timestampEof = begin + i * 50_000_000, begin + i * 50_000_000 + 9_000_000
      out.append(m.to_bytes())
  write_log(folder / "rlog.zst", out)
  return folder


@pytest.fixture
def route(tmp_path):
  for num in (0, 2):
    segment(tmp_path, num, 100 * SECOND + num * 60 * SECOND)
  return tmp_path


def test_a_missing_segment_is_jumped(route, prefix, capsys):
  replay = Replay(Route(route).segments, speed=5.0)
  begun = time.monotonic()
  replay.run(progress=False)
  assert replay.sent_frames == 60 and replay.sent_messages > 120
  err = capsys.readouterr().err
  assert err.count("replay jumps over them") == 1 and "the log has nothing for 118." in err
  assert time.monotonic() - begun < 100  # not two minutes


def command(name, *words):
  return subprocess.run(
    [sys.executable, "-m", f"openpilot.tools.{name}", *map(str, words)], capture_output=True, text=True, timeout=120
  )


@pytest.mark.parametrize("words", [["--start", "500"], ["--start", "nan"], ["--focal", "inf"]])
def test_what_plays_nothing_is_one_line(route, prefix, words):
  done = command("replay.replay", route, *words)
  assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_process_replay_beyond_the_end(route, tmp_path):
  done = command("replay.process_replay", route, "--focal", "100", "--start", "500", "--out", tmp_path / "out.zst")
  assert done.returncode == 2 and "error: no frame of" in done.stderr and not (tmp_path / "out.zst").exists()


def test_a_pipe_gets_few_lines(route, prefix):
  done = command("replay.replay", route, "--speed", "20")
  assert done.returncode == 0 and "60 frames" in done.stdout and done.stderr.count("\n") <= 2, done.stderr


def test_segments_that_cannot_be_read(route, prefix):
  (route / "0000002c--bbbbbbbbbb--2" / "rlog.zst").write_bytes(b"")
  done = command("replay.replay", route, "--speed", "20")
  assert done.returncode == 0 and "30 frames" in done.stdout and done.stderr.count("left out") == 1, done.stderr
  (route / "0000002c--bbbbbbbbbb--0" / "fcamera.hevc").write_bytes(b"headless" * 100)
  done = command("replay.replay", route, "--speed", "20")
  assert done.returncode == 2 and "no segment of 0000002c--bbbbbbbbbb can be read" in done.stderr


@pytest.mark.parametrize(
  ("size", "focal", "said"),
  [((640, 360), 550, False), ((640, 360), 1100, False), ((640, 360), 3000, True), ((1080, 1920), 1500, False)],
)
def test_a_focal_length_that_leaves_the_view_empty_is_said_once(size, focal, said, capsys):
  w, h = size
  camera = KnownCamera(focal, "nv12")
  for _ in range(2):
    assert camera(np.full((h * 3 // 2, w), 90, np.uint8)).shape == (874 * 3 // 2, 1164)
  assert capsys.readouterr().err.count("is --focal right?") == said
  # of the 512x256 view 47.6 rows lie above the camera's middle, 208.4 below
  assert KnownCamera.covered(512, 418) == pytest.approx(1, abs=0.001) and KnownCamera.covered(256, 2000) == 0.5
  assert KnownCamera.covered(600, 100) == pytest.approx((47.6 + 50) / 256)


def test_outside_a_video_it_is_black_for_people():
  rgb = KnownCamera(1820, "rgb24")(np.full((200, 300, 3), 90, np.uint8))
  assert rgb.shape == (874, 1164, 3) and (rgb[437, 582] == 90).all() and not rgb[:380].any() and not rgb[:, :500].any()

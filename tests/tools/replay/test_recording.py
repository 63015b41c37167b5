"""What `record` writes, and when; which frames a second of a route names."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from openpilot.cereal import messaging
from openpilot.selfdrive.modeld.fair.bundle import MODELS_DIR, find_bundle
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.tools.lib.encode_index import encode_index
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.logwriter import write_log
from openpilot.tools.lib.route import Route
from openpilot.tools.replay import record
from openpilot.tools.replay.process_replay import process_replay
from openpilot.tools.replay.replay import Replay
from openpilot.tools.replay.source import frames
from openpilot.tools.sim.write_route import write_route

SECOND = 1_000_000_000


@pytest.mark.parametrize("words", [["file/x.zst"], ["."], ["x.zst", "--seconds", "0"], ["x.zst", "--seconds", "nan"]])
def test_a_log_that_cannot_be_written_is_told_before_the_drive(prefix, tmp_path, words):
  """It was told when the recording ended, with all of it lost; 0 seconds recorded for ever."""
  (tmp_path / "file").write_text("")
  command = [sys.executable, "-m", "openpilot.tools.replay.record", *words]
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
  assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_messages_are_written_as_they_come_and_nothing_takes_the_place_of_a_log(tmp_path):
  """All of them were held in memory until the end; a recording of nothing replaced the log of that name."""
  out, ended = tmp_path / "fair.zst", []
  recorder = SimpleNamespace(messages=[], stop=lambda: ended.append(len(recorder.messages)))
  coming = iter([[0, 1], [], [2]])

  def over():
    assert recorder.messages == []  # what came before is written, and let go
    recorder.messages += map(message, new := next(coming))
    return new == [2]

  assert write_log(out, record.Recorder.until(recorder, over)) == 3 and ended == [1]
  assert [e.fairState.frameId for e in LogReader([out])] == [0, 1, 2]
  before = out.read_bytes()
  with pytest.raises(UserError, match="no fair message came, nothing is written"):
    write_log(out, record.Recorder.until(recorder, lambda: True))
  assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]


def message(frame_id):
  msg = messaging.new_message("fairState")
  msg.fairState.frameId = frame_id
  return msg.to_bytes()


@pytest.fixture(scope="module")
def late_camera(tmp_path_factory):
  """A route whose log begins 1.1 s before its first frame, as openpilot's do."""
  route = Route(write_route(tmp_path_factory.mktemp("route"), seed=5, seconds=1.5, segment_seconds=5.0))
  path = route.segments[0].rlog
  messages = [dat for _, _, dat in LogReader([path]).raw()]
  first = encode_index(route.segments[0])[0].timestamp_eof
  early = messaging.new_message("carState", valid=True, logMonoTime=first - 11 * SECOND // 10)
  write_log(path, [messages[0], early.to_bytes(), *messages[1:]])
  return route.segments


def test_a_second_of_a_route_is_the_same_frame_live_and_without_a_clock(late_camera, prefix):
  """process-replay counted from the first frame: 21 frames later than replay, on a log of a comma 3X."""
  entries = encode_index(late_camera[0])
  want = [e.frame_id for e in entries if e.timestamp_eof - entries[0].timestamp_eof >= 4 * SECOND // 10]
  assert [e.frame_id for e, _ in frames(late_camera, "road", 1.5)] == want and 20 < len(want) < 24
  replay = Replay(late_camera, start=1.5)
  replay.pm.close()
  assert [i.entry.frame_id for i in replay._items() if i.entry is not None] == want
  model = FairModel(find_bundle(None, MODELS_DIR), clock=None)
  begins = process_replay(late_camera, model, "road", 1.5, progress=False)
  messages = (messaging.log_from_bytes(dat) for dat in begins)
  about = next(m.fairObjects.frameId for m in messages if m.which() == "fairObjects")
  assert about == want[0] and next(iter(frames(late_camera, "road")))[0].frame_id == entries[0].frame_id


def test_without_a_log_seconds_count_from_the_first_frame(late_camera, tmp_path):
  film = tmp_path / "film.hevc"
  film.write_bytes(late_camera[0].fcamera.read_bytes())
  played = [e.timestamp_eof for e, _ in frames(Route(film).segments, "road", 0.5)]
  assert 18 <= len(played) <= 20 and played[0] >= 1.5 * SECOND

"""A route with a road and a wide camera: which of them was looked at is told, and is missed where it is another."""

import shutil

import pytest

from fair_bundle import write_bundle
from openpilot.cereal import log, messaging
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.logwriter import write_log
from openpilot.tools.lib.route import Route
from openpilot.tools.replay.process_replay import process_replay
from openpilot.tools.replay.show import show
from openpilot.tools.sim.write_route import write_route

EARLIER = 10_000_000  # ns that the wide camera's exposures end before the road camera's


@pytest.fixture(scope="module")
def route(tmp_path_factory):
  """Half a second; the wide camera has a picture less than the road camera."""
  root = write_route(tmp_path_factory.mktemp("route"), seed=3, seconds=0.5)
  folder = Route(root).segments[0].log_path.parent
  shutil.copy(folder / "fcamera.hevc", folder / "ecamera.hevc")
  events = [e.as_builder() for e in LogReader(Route(root))]
  for e in [e for e in events if e.which() == "narrowRoadEncodeIdx"][:-1]:
    m = messaging.new_message("wideRoadEncodeIdx", valid=True, logMonoTime=e.logMonoTime)
    m.wideRoadEncodeIdx = e.narrowRoadEncodeIdx
    m.wideRoadEncodeIdx.timestampEof -= EARLIER
    events.append(m)
  path = Route(root).segments[0].log_path
  write_log(path, [e.to_bytes() for e in sorted(events, key=lambda e: e.logMonoTime)])
  return Route(root).segments


@pytest.fixture
def replayed(route, tmp_path):
  """camera -> the log that process-replay of it makes."""
  bundle = write_bundle(tmp_path / "tiny")

  def replay(camera):
    raw = list(process_replay(route, FairModel(bundle), camera, progress=False))
    write_log(tmp_path / f"{camera}.zst", raw)
    out = []
    for dat in raw:
      with log.Event.from_bytes(dat) as e:
        out.append(e)
    return tmp_path / f"{camera}.zst", out

  return replay


@pytest.mark.parametrize(("camera", "stream", "frames"), [("road", "narrowRoad", 10), ("wide", "wideRoad", 9)])
def test_which_camera_it_was_is_told(replayed, capsys, camera, stream, frames):
  _, events = replayed(camera)
  assert {e.fairState.stream for e in events if e.which() == "fairState"} == {stream}
  seen = [e.fairSegmentation.frameId for e in events if e.which() == "fairSegmentation"]
  assert len(seen) == frames and seen == sorted(set(seen))
  err = capsys.readouterr().err
  assert ("bundle 'tiny' is made for narrowRoad; it is given wideRoad" in err) == (camera == "wide"), err
  assert ("1 of its 10 pictures are not in the log's index" in err) == (camera == "wide"), err


@pytest.mark.parametrize("drawn", ["road", "wide"])
def test_messages_of_one_camera_in_the_others_video(route, replayed, tmp_path, capsys, drawn):
  path, _ = replayed("wide")
  capsys.readouterr()
  assert show([path], route, drawn, tmp_path / "out.mp4", limit=2)[0] == 2
  err = capsys.readouterr().err
  assert ("the fair messages are of wideRoad, the video is of narrowRoad" in err) == (drawn == "road"), err

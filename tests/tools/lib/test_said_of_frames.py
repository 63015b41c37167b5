"""What a log and its video do not both have is said, and so is what was guessed in place of it."""

import shutil

import numpy as np
import pytest

from openpilot.selfdrive.modeld.fair.bundle import MODELS_DIR, find_bundle
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.tools.fair.labels.sources import open_sources
from openpilot.tools.fair.labels.sources.routes import Routes, find_views
from openpilot.tools.fair.labels.sources.source import SourceOptions
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.logwriter import write_log
from openpilot.tools.lib.route import Route
from openpilot.tools.lib.videowriter import VideoWriter
from openpilot.tools.replay.process_replay import process_replay
from openpilot.tools.sim.write_route import write_route

INDEX = "qNarrowRoadEncodeIdx"


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
  """40 frames with a qcamera."""
  return write_route(tmp_path_factory.mktemp("drive"), seed=11, seconds=2, qcamera_only=True)


def without(drive, folder, drop):
  """A copy of the drive whose logs lack the messages of which drop(event) is true."""
  shutil.copytree(drive, folder)
  for path in [*folder.rglob("rlog.zst"), *folder.rglob("qlog.zst")]:
    write_log(path, [e.as_builder().to_bytes() for e in LogReader(path) if not drop(e)])
  return folder


def views(path, every=1):
  return find_views([str(path)], None, "qcamera", every, None)


@pytest.mark.parametrize("kept", [range(30), range(12, 40), [*range(9), *range(20, 40)]])
def test_pictures_without_an_index(drive, tmp_path, kept, capsys):
  short = without(
    drive, tmp_path / "route", lambda e: e.which().endswith("EncodeIdx") and getattr(e, e.which()).segmentId not in kept
  )
  (view,) = views(short)
  assert [e.segment_id for e in view.entries] == list(kept)
  said = capsys.readouterr().err
  assert f"{40 - len(kept)} of its 40 pictures are not in the log's index" in said and said.count("\n") == 1


def test_frames_without_a_picture(drive, tmp_path, capsys):
  """A video that is cut short: what it lacks at its end, too."""
  shutil.copytree(drive, tmp_path / "route")
  (video,) = (tmp_path / "route").rglob("qcamera.ts")
  video.write_bytes(video.read_bytes()[: video.stat().st_size // 2 // 188 * 188])
  (view,) = views(tmp_path / "route")
  assert 5 < len(view.entries) < 35
  assert f"has no picture of {40 - len(view.entries)} of the 40 frames in the log's index" in capsys.readouterr().err


def test_what_is_whole_is_silent(drive, capsys):
  views(drive, every=7)
  assert capsys.readouterr().err == ""


def test_no_calibration(drive, tmp_path, capsys):
  bare = without(drive, tmp_path / "route", lambda e: e.which() == "extrinsicsCalibration")
  assert not views(bare)[0].calibrated
  assert "has no calibration; the default one is taken" in capsys.readouterr().err
  model = FairModel(find_bundle("scene-nano", MODELS_DIR))
  assert list(process_replay(Route(bare).segments, model, "qcamera", seconds=0.5, progress=False))
  assert f"{model.frames} of {model.frames} frames were before the log's first calibration" in capsys.readouterr().err


def test_the_video_of_another_segment(shared_data, tmp_path, capsys):
  """As many pictures as frames, and all of another minute."""
  one, other = (shared_data / "realdata" / f"0000002c--d68dde99ca--{n}" for n in (0, 1))
  folder = tmp_path / one.name
  folder.mkdir()
  shutil.copy(one / "qlog.zst", folder)
  shutil.copy(other / "qcamera.ts", folder)
  views(folder, 300)
  assert "its pictures begin at 584.98 s, those of the log's index at 524.98 s" in capsys.readouterr().err
  for right in (one, other, shared_data / "realdata" / "2023-07-27--13-01-19--0"):
    views(right, 300)
  assert capsys.readouterr().err == ""


def test_two_drives(drive, tmp_path, capsys):
  """A folder of several routes is named as one by whoever reads it; one segment in two folders is said."""
  (segment,) = Route(drive).segments
  for name in ("a/0000002c--d68dde99ca--0", "a/0000002d--d68dde99ca--0", "b/0000002c--d68dde99ca--0"):
    shutil.copytree(segment.dir, tmp_path / name)
  folder = str(tmp_path / "a")
  assert Routes().accepts(folder, SourceOptions())
  with pytest.raises(UserError, match="holds 2 routes; name one"):
    Routes().pieces([folder], SourceOptions())
  both = [f"{folder}/0000002c--d68dde99ca--0", str(tmp_path / "b")]
  (piece,) = Routes().pieces(both, SourceOptions())
  assert str(piece.segment.dir).startswith(folder)
  assert "the first one is labeled" in capsys.readouterr().err
  assert len(Routes().pieces([both[0], both[0] + "/"], SourceOptions())) == 1
  assert capsys.readouterr().err == ""


def test_options_that_do_nothing_are_said(drive, capsys):
  options = SourceOptions(camera="qcamera", horizon=100.0, license="CC0-1.0", name="mine")
  (view,) = open_sources([str(drive)], options, "routes")
  said = capsys.readouterr().err
  assert view.calibrated and "--name and --license: of pictures, not used" in said and "--horizon is not used" in said


def test_a_camera_that_nobody_knows(tmp_path):
  with VideoWriter(tmp_path / "dashcam.mp4", 640, 480, 20, 20) as v:
    for _ in range(4):
      v.write(np.full((480, 640, 3), 90, np.uint8))
  model = FairModel(find_bundle("scene-nano", MODELS_DIR))
  segments = Route(tmp_path / "dashcam.mp4").segments
  with pytest.raises(UserError, match=r"640x480 frames.*with --focal"):
    list(process_replay(segments, model, "road", progress=False))
  assert list(process_replay(segments, model, "road", progress=False, focal=500.0))


def test_a_segment_that_is_missing_in_the_middle(tmp_path, capsys):
  route = write_route(tmp_path, seed=11, seconds=3, segment_seconds=1, qcamera_only=True)
  for whole in (True, False):
    segments = Route(route).segments
    model = FairModel(find_bundle(None, MODELS_DIR))
    assert any(process_replay(segments, model, "qcamera", seconds=1.5, progress=False))
    assert ("lacks segment 1 in its middle" in capsys.readouterr().err) is not whole
    shutil.rmtree(segments[1].dir)

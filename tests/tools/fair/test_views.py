"""Where the teachers' view of a camera's picture lies, to hundredths of a pixel."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from openpilot.cereal import messaging
from openpilot.common.transformations.model import get_warp_matrix
from openpilot.selfdrive.modeld.fair.frames import camera_intrinsics
from openpilot.tools.fair.labels import views
from openpilot.tools.fair.labels.rules import is_shrunk
from openpilot.tools.fair.labels.sources import routes
from openpilot.tools.fair.labels.views import SegmentView, ViewWarp, segment_view, view_to_view
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.logwriter import write_log
from openpilot.tools.lib.route import Segment

WAVE = 40  # view pixels


def stripes(width, height, axis, period):
  """YUV planes of a picture whose brightness is a wave along one axis."""
  y, x = np.mgrid[:height, :width]
  luma = np.round(125 + 100 * np.cos(2 * np.pi * (x, y)[axis] / period)).astype(np.uint8)
  gray = np.full((height // 2, width // 2), 128, np.uint8)
  return luma, gray, gray


@pytest.mark.parametrize("name", ["medmodel", "sbigmodel"])
@pytest.mark.parametrize("size", [(1928, 1208), (1344, 760), (1164, 874), (526, 330)])
def test_the_view_is_not_displaced(size, name):
  """The phase of a wave says where the view's pixels were taken from: within .02 of a view pixel of openpilot's warp,
  in both directions."""
  k = camera_intrinsics(*size)
  view = SegmentView(Segment("a", 0, Path(), {}), "road", *size, k, np.zeros(3), True, [], "")
  for width, height in ((512, 256), (640, 320)):
    warp = ViewWarp(view, name, width, height)
    period = WAVE * k[0, 0] / warp.intrinsics[0, 0]  # camera pixels
    u, v = np.meshgrid(np.arange(width), np.arange(height))
    p = (
      get_warp_matrix(np.zeros(3), k, name == "sbigmodel")
      @ view_to_view(width, height)
      @ np.stack([u.ravel(), v.ravel(), np.ones(u.size)])
    )
    want = (p[:2] / p[2]).reshape(2, height, width)
    inside = ((want > 8) & (want < np.array(size)[:, None, None] - 9)).all(axis=0)
    assert inside.mean() > 0.2
    for axis in (0, 1):
      warp.rgb_of(stripes(*size, axis, period))
      phase = 2 * np.pi * want[axis][inside] / period
      c, s, _ = np.linalg.lstsq(
        np.stack([np.cos(phase), np.sin(phase), np.ones(len(phase))], 1),
        warp.yuv[:height][inside].astype(float),
        rcond=None,
      )[0]
      off = np.arctan2(-s, c) / (2 * np.pi) * WAVE
      assert abs(off) < 0.02, (size, name, axis, off)


def test_a_pictures_pixels_in_the_views():
  """Centers: of a picture of twice the size the first four pixels lie about the view's first."""
  assert view_to_view(1024, 512).tolist() == [[0.5, 0, -0.25], [0, 0.5, -0.25], [0, 0, 1]]
  assert view_to_view(256, 64).tolist() == [[2, 0, 0.5], [0, 4, 1.5], [0, 0, 1]]


@pytest.mark.parametrize(
  "said, rpy",
  [
    ([], None),
    ([("uncalibrated", 0.01), ("calibrated", 0.02), ("calibrated", 0.03), ("recalibrating", 0.04)], 0.03),
    ([("uncalibrated", 0.01), ("recalibrating", 0.02)], 0.02),
    ([("calibrated", 0.01), ("invalid", 0.02)], 0.01),
  ],
)
def test_a_segments_mounting_is_its_last_that_is_calibrated(tmp_path, monkeypatch, said, rpy):
  """One from before that only where there is no other; straight ahead, and said so, where the log has none."""
  messages = []
  for k, (status, pitch) in enumerate(said):
    m = messaging.new_message("extrinsicsCalibration", valid=True, logMonoTime=1 + k)
    m.extrinsicsCalibration.calStatus, m.extrinsicsCalibration.rpyCalib = status, [0, pitch, 0]
    m.extrinsicsCalibration.height = [1.2 + pitch if pitch else 9.0]
    messages.append(m.to_bytes())
  m = messaging.new_message("deviceState", valid=True, logMonoTime=99)
  m.deviceState.deviceType = "tici"
  write_log(tmp_path / "rlog", [*messages, m.to_bytes()])
  video = tmp_path / "fcamera.hevc"
  video.write_bytes(b"frames")
  monkeypatch.setattr(views, "FrameReader", lambda path, pixels: SimpleNamespace(w=1928, h=1208))
  entries = [SimpleNamespace(segment_id=k) for k in range(7)]
  monkeypatch.setattr(views, "segment_index", lambda *_: entries)
  view = segment_view(Segment("a", 0, tmp_path, {"fcamera": video, "rlog": tmp_path / "rlog"}), "road", 3)
  assert view.calibrated == (rpy is not None)
  np.testing.assert_allclose(view.rpy, [0, rpy or 0.0, 0], atol=1e-7)
  assert view.camera_height == (None if rpy is None else pytest.approx(1.2 + rpy))
  assert "camera_height" not in view.camera()  # which is part of the labels' key
  assert view.entries == [entries[0], entries[3], entries[6]]
  assert view.video_hash == hashlib.sha256(b"frames").hexdigest() and not view.estimated


@pytest.mark.parametrize("focal, shrunk", [(720, False), (1330, False), (1340, True), (1500, True), (2400, True)])
def test_views_of_finer_cameras_are_made_smaller(focal, shrunk):
  """From 1.8 times the view's focal length on, which is 910 pixels of 512, so 739 of 416."""
  meta = {
    "teacher": {"name": "yolox"},
    "camera": {"stream": "road", "intrinsics": [[focal, 0, 963], [0, focal, 603], [0, 0, 1]]},
    "view": {"name": "medmodel", "width": 416, "height": 208},
  }
  assert is_shrunk(meta) is shrunk
  assert not is_shrunk({**meta, "camera": {**meta["camera"], "stream": "images"}})


def test_what_is_wrong_with_some_segments_is_a_warning_and_with_all_an_error(tmp_path, monkeypatch, capsys):
  def one(s, camera, every, focal):
    if s.num in bad:
      raise UserError(f"{s.name} is odd")
    return s.name

  video = tmp_path / "x"
  video.touch()
  segments = [Segment("a", n, Path("d"), {"fcamera": video} if n != 2 else {}) for n in (0, 1, 2, 1)]
  monkeypatch.setattr(routes, "Route", lambda name, data_dir: SimpleNamespace(segments=segments))
  monkeypatch.setattr(routes, "usable", lambda found, camera: (found, camera))
  monkeypatch.setattr(routes, "segment_view", one)
  monkeypatch.setattr(routes, "aimed", lambda view, horizon: view)
  bad = set()
  assert routes.find_views(["a"], None, "road", 1, None) == ["a--0", "a--1"]
  bad.add(0)
  assert routes.find_views(["a"], None, "road", 1, None) == ["a--1"]
  said = capsys.readouterr().err
  assert said.count("a--2 in d has no video, it is left out") == 1
  assert said.count("is odd; the segment is left out") == 1
  bad.add(1)
  with pytest.raises(UserError, match=r"^a--0 is odd$"):
    routes.find_views(["a"], None, "road", 1, None)
  segments[:] = segments[2:3]
  with pytest.raises(UserError, match="no video in a; teachers need fcamera"):
    routes.find_views(["a"], None, "road", 1, None)

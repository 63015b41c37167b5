"""Teachers that see the whole picture: where what they say of it lies in the view, beside OpenCV's own projection."""

from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import helper

from openpilot.common.transformations.camera import view_frame_from_device_frame as VIEW
from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.common.transformations.orientation import rot_from_euler
from openpilot.selfdrive.modeld.fair.frames import camera_intrinsics
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.labels.aim import LEAST_PAIRS, find_vanishing, mounting_of, vanishing_of
from openpilot.tools.fair.labels.labeling import run_teacher
from openpilot.tools.fair.labels.sources.routes import find_views
from openpilot.tools.fair.labels.picture import PictureWarp, view_label
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.labels.views import SegmentView
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Clip, Label
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.route import Segment
from openpilot.tools.lib.videowriter import VideoWriter

RPY = np.array([0.02, -0.035, 0.05])
SIZES = [(1928, 1208), (1344, 760), (526, 330)]


def view_of(width, height, rpy=RPY):
  k = camera_intrinsics(width, height)
  return SegmentView(Segment("a", 0, Path(), {}), "road", width, height, k, rpy, True, [], "")


def seen(points, intrinsics, rpy):
  """(N, 3) of the calibrated frame -> (N, 2) pixels, by OpenCV."""
  turn = cv2.Rodrigues(VIEW @ rot_from_euler(rpy) @ VIEW.T)[0]
  return cv2.projectPoints(points @ VIEW.T, turn, np.zeros(3), intrinsics, None)[0][:, 0]


def road_points(n=200):
  r = np.random.default_rng(1)
  return np.stack([r.uniform(5, 80, n), r.uniform(-6, 6, n), r.uniform(-2, 1.5, n)], axis=1)


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("part", [(1.0, 1.0), (0.47, 0.47), (0.4, 0.7)])
def test_points_lie_where_opencv_projects_them(width, height, part):
  view = view_of(width, height)
  w, h = (int(a * b) // 2 * 2 for a, b in zip((width, height), part, strict=True))
  p = road_points()
  in_camera = seen(p, view.intrinsics, RPY)
  given = (in_camera + 0.5) * [w / width, h / height] - 0.5
  want = seen(p, medmodel_intrinsics, np.zeros(3))
  warp = PictureWarp(view, "medmodel", w, h)
  np.testing.assert_allclose(warp.points(given), want, atol=1e-3)
  table = warp.table(
    Label("points", "points"),
    {"frame": np.zeros(len(p)), "x": given[:, 0], "y": given[:, 1], "visible": np.ones(len(p), bool)},
  )
  inside = (want > -0.5).all(1) & (want < [511.5, 255.5]).all(1)
  np.testing.assert_array_equal(table["visible"], inside)


def test_boxes_are_cut_at_the_views_border_and_left_out_beyond():
  view = view_of(526, 330, np.zeros(3))
  warp = PictureWarp(view, "medmodel", 526, 330)
  corners = np.array(
    [[100.0, 60.0, 180.0, 100.0], [-40.0, 60.0, 60.0, 100.0], [-90.0, 60.0, 10.0, 100.0]]
  )  # of the view
  at = (view.intrinsics @ np.linalg.inv(medmodel_intrinsics)) @ np.stack(
    [corners[:, [0, 2]].ravel(), corners[:, [1, 3]].ravel(), np.ones(6)]
  )
  x, y = (at[:2] / at[2]).reshape(2, 3, 2)
  mask = np.zeros((3, 330, 526), bool)
  for i in range(3):
    mask[i, round(y[i, 0]) : round(y[i, 1]) + 1, max(0, round(x[i, 0])) : max(0, round(x[i, 1]) + 1)] = True
  table = {
    "frame": np.arange(3),
    "x0": x[:, 0],
    "y0": y[:, 0],
    "x1": x[:, 1],
    "y1": y[:, 1],
    "score": np.ones(3),
    "rle": rle.encode(mask),
  }
  label = Label("objects", "boxes", shape=(330, 526))
  out = warp.table(label, table)
  assert out["frame"].tolist() == [0, 1]  # of the third the view shows a tenth
  np.testing.assert_allclose([out[k][0] for k in ("x0", "y0", "x1", "y1")], corners[0], atol=1e-3)
  assert out["x0"][1] == pytest.approx(-0.5) and out["x1"][1] == pytest.approx(60, abs=1e-3)
  shown = rle.decode(out["rle"][0], 256, 512)
  v, u = np.nonzero(shown)
  np.testing.assert_allclose([u.min(), v.min(), u.max(), v.max()], corners[0], atol=1.5)
  assert view_label(label).shape == (256, 512)


def test_maps_are_sampled_where_the_view_looks():
  """A map whose value is its own place in the picture says where each pixel of the view came from; ids do not mix."""
  view = view_of(526, 330)
  warp = PictureWarp(view, "medmodel", 448, 256)
  v, u = np.mgrid[:256, :448].astype(np.float32)
  ids = (u // 16 + 28 * (v // 16)).astype(np.uint8) % 200
  got = warp.dense(Label("segmentation", "dense", "uint8", (256, 448), "class"), ids[None])[0]
  x, y = warp.maps((256, 448), (256, 512))
  inside = (x > 0) & (x < 447) & (y > 0) & (y < 255)
  np.testing.assert_array_equal(got[inside], ids[np.rint(y[inside]).astype(int), np.rint(x[inside]).astype(int)])
  assert (got[(x < -1) | (y < -1) | (x > 448) | (y > 256)] == 255).all() and inside.mean() > 0.5
  # the view's own pixels, projected by OpenCV
  p = np.stack([np.full(50, 30.0), np.linspace(-6, 6, 50), np.linspace(-1, 5, 50)], axis=1)
  at, there = seen(p, medmodel_intrinsics, np.zeros(3)), seen(p, view.intrinsics, RPY)
  good = ((at > 2) & (at < [509, 253])).all(1)
  found = [cv2.remap(m, *at[good].T.astype(np.float32), cv2.INTER_LINEAR).ravel() for m in (x, y)]
  np.testing.assert_allclose(np.stack(found, 1), (there[good] + 0.5) * [448 / 526, 256 / 330] - 0.5, atol=0.05)


def test_meters_are_along_the_views_axis():
  """A wall that is upright to the road: one depth in the view, many in the turned camera."""
  view = view_of(526, 330)
  warp = PictureWarp(view, "medmodel", 526, 330)
  v, u = np.mgrid[:330, :526]
  ray = np.linalg.inv(view.intrinsics) @ np.stack([u.ravel(), v.ravel(), np.ones(u.size)])
  forward = (VIEW @ rot_from_euler(RPY))[:, 0]  # the calibrated frame's x in the camera's
  depth = (25.0 / (forward @ ray)).reshape(330, 526)
  assert np.ptp(depth) > 1.0
  got = warp.dense(Label("depth", "dense", "float16", (330, 526), "m"), depth[None])[0]
  x, y = warp.maps((330, 526), got.shape)
  inside = (x > 1) & (x < 524) & (y > 1) & (y < 328)
  np.testing.assert_allclose(got[inside], 25.0, atol=0.02)


def write_network(folder):
  """A detector-like graph in NHWC: its map is the red channel."""
  pick = helper.make_tensor("pick", onnx.TensorProto.FLOAT, (3, 2), [1, 0, 0, 0, 0, 1])
  graph = helper.make_graph(
    [helper.make_node("MatMul", ["images", "pick"], ["out"])],
    "net",
    [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, (1, 64, 96, 3))],
    [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, (1, 64, 96, 2))],
    [pick],
  )
  folder.mkdir(exist_ok=True)
  onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "net.onnx")
  (folder / "net.yaml").write_text(
    "name: red\nweights: net.onnx\nlicense: MIT\ndecode: maps\nmaps: {road: {output: out, channel: 0}}\n"
    "input: {name: images, size: [64, 96], layout: NHWC, color: RGB, scale: 0.00392156862745098, mean: [0, 0, 0], "
    "std: [1, 1, 1], fit: stretch}\n"
  )
  return folder / "net.yaml"


@pytest.fixture(scope="module")
def video(tmp_path_factory):
  """The left two fifths are red."""
  path = tmp_path_factory.mktemp("video") / "drive.mp4"
  picture = np.zeros((330, 526, 3), np.uint8)
  picture[:, :210, 0] = 255
  with VideoWriter(path, 526, 330, 15, 10) as v:
    for _ in range(3):
      v.write(picture)
  return path


def test_a_teacher_is_given_the_whole_picture(tmp_path, video):
  """The red part's edge lies where the warp puts it, and a chunk's key says what was seen; of the view alone the labels
  have the key that they had before there was a choice."""
  teacher = load_teacher(str(write_network(tmp_path / "net")))
  views = find_views([str(video)], None, "road", 1, None)
  store = LabelStore(tmp_path / "labels", create=True)
  (whole,) = run_teacher(teacher, views, store, progress=False)
  (view,) = run_teacher(teacher, views, store, progress=False, sees="view")
  assert whole.path != view.path
  assert whole.meta["picture"] == {"width": 96, "height": 64} and "size" not in whole.meta["teacher"]["settings"]
  assert "picture" not in view.meta and view.meta["teacher"]["settings"]["size"] == [64, 96]
  edge = PictureWarp(views[0], "medmodel", 526, 330).points(np.array([[209.5, 165.0]]))[0, 0]
  for group, near in ((whole, 4), (view, 4)):
    row = group.row("road", 0).astype(float)[64]
    assert abs(2 * np.argmax(row < 0.5) - edge) < near
  assert whole.label("road").shape == (128, 256)


def test_nhwc_gives_what_the_network_gives(tmp_path):
  teacher = load_teacher(str(write_network(tmp_path)))
  teacher.whole = True
  teacher.prepare(64, 96)
  rgb = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 96), dtype=np.uint8)
  got = teacher.label(Clip(rgb))[0]["road"]
  np.testing.assert_allclose(got, rgb[:, 0] / 255, atol=1 / 256)
  (tmp_path / "net.yaml").write_text((tmp_path / "net.yaml").read_text().replace("NHWC", "HWCN"))
  with pytest.raises(UserError, match="layout 'HWCN' is not known"):
    load_teacher(str(tmp_path / "net.yaml"))


def test_mounting_and_vanishing_point_are_each_others_inverse():
  k = np.array([[800.0, 0, 320], [0, 800, 180], [0, 0, 1]])
  rpy = mounting_of((300.0, 210.0), k)
  np.testing.assert_allclose(vanishing_of(rpy, k), (300.0, 210.0), atol=1e-9)
  np.testing.assert_allclose(seen(np.array([[1e6, 0, 0]]), k, rpy)[0], (300.0, 210.0), atol=1e-3)


def drive(path, at, k, frames=24):
  """A camera that moves ahead between dots on the ground and beside the road."""
  r = np.random.default_rng(0)
  rpy = mounting_of(at, k)
  p = np.stack([r.uniform(2, 90, 1000), r.uniform(-15, 15, 1000), r.choice([1.3, 1.3, -2.0, 0.0], 1000)], axis=1)
  with VideoWriter(path, 640, 360, 15, 10) as v:
    for i in range(frames):
      q = p - [0.5 * i, 0, 0]
      q = q[q[:, 0] > 1.5]
      picture = np.full((360, 640, 3), 90, np.uint8)
      for (x, y), z in zip(seen(q, k, rpy), q[:, 0], strict=True):
        if -50 < x < 700 and -50 < y < 400:
          cv2.circle(picture, (round(x * 16), round(y * 16)), round(16 * 40 / z), (220, 220, 220), -1, cv2.LINE_AA, 4)
      v.write(picture)


def test_the_vanishing_point_of_a_drive(tmp_path):
  k = np.array([[544.0, 0, 320], [0, 544, 180], [0, 0, 1]])
  drive(tmp_path / "a.mp4", (340.0, 165.0), k)
  (view,) = find_views([str(tmp_path / "a.mp4")], None, "road", 1, "auto")
  assert view.estimated and view.camera()["estimated"] and view.intrinsics[0, 0] == pytest.approx(544)
  at, spread, n = find_vanishing(view)
  assert n >= LEAST_PAIRS and np.abs(at - (340, 165)).max() < 3, (at, spread, n)
  (aimed,) = find_views([str(tmp_path / "a.mp4")], None, "road", 1, "auto", 165.0)
  np.testing.assert_allclose(vanishing_of(aimed.rpy, view.intrinsics), (320, 165), atol=1e-6)


def test_a_parked_camera_has_no_vanishing_point(tmp_path, video):
  with pytest.raises(UserError, match="--horizon"):
    find_views([str(video)], None, "road", 1, "auto", "auto")

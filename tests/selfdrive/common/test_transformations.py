import numpy as np
import pytest

from openpilot.common.transformations.camera import DEVICE_CAMERAS, normalize, project, view_frame_from_device_frame
from openpilot.common.transformations.model import get_warp_matrix, medmodel_intrinsics, sbigmodel_intrinsics
from openpilot.common.transformations.orientation import euler_from_rot, rot_from_euler


def test_rotation_turns_axes_the_right_way():
  """Signs by hand: x forward, y right, z down. Positive yaw turns forward to the right, positive pitch turns the nose
  up."""
  np.testing.assert_allclose(rot_from_euler([0, 0, np.pi / 2]) @ [1, 0, 0], [0, 1, 0], atol=1e-15)
  np.testing.assert_allclose(rot_from_euler([0, np.pi / 2, 0]) @ [1, 0, 0], [0, 0, -1], atol=1e-15)
  np.testing.assert_allclose(rot_from_euler([np.pi / 2, 0, 0]) @ [0, 1, 0], [0, 0, 1], atol=1e-15)


def test_euler_round_trip_and_orthogonality():
  r = np.random.default_rng(0)
  e = r.uniform(-1.4, 1.4, (500, 3))
  rot = rot_from_euler(e)
  np.testing.assert_allclose(
    rot @ np.swapaxes(rot, -1, -2), np.broadcast_to(np.eye(3), rot.shape), atol=1e-14
  )  # float64 rounding
  np.testing.assert_allclose(euler_from_rot(rot), e, atol=1e-12)


@pytest.mark.parametrize("big", [False, True])
def test_warp_matrix_takes_a_road_point_from_view_to_camera(big):
  r = np.random.default_rng(1)
  k = DEVICE_CAMERAS[("mici", "os04c10")].narrow_road.intrinsics
  view_k = sbigmodel_intrinsics if big else medmodel_intrinsics
  for _ in range(100):
    rpy, point = r.uniform(-0.05, 0.05, 3), np.array([[r.uniform(5, 80), r.uniform(-3, 3), r.uniform(-1, 1.5)]])
    in_view, _ = project(point, view_k)
    in_camera, _ = project(point, k, rot_from_euler(rpy))
    q = get_warp_matrix(rpy, k, big) @ [*in_view[0], 1.0]
    np.testing.assert_allclose(q[:2] / q[2], in_camera[0], atol=1e-8)  # pixels; float64


def test_project_and_normalize():
  k = DEVICE_CAMERAS[("tizi", "ox03c10")].fcam.intrinsics
  px, depth = project(np.array([[10.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]), k)
  np.testing.assert_allclose(px[0], [964, 604])
  assert depth.tolist() == [10.0, -1.0] and np.isnan(px[1]).all()
  np.testing.assert_allclose(normalize(px[:1], k), [[0, 0]], atol=1e-15)
  assert (view_frame_from_device_frame @ [1, 2, 3]).tolist() == [2, 3, 1]
  px, depth = project(np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), k)  # beside the camera, and in it
  assert depth.tolist() == [0.0, 0.0] and np.isnan(px).all()


def test_cameras():
  assert (
    DEVICE_CAMERAS[("mici", "os04c10")].fcam.size == (1344, 760)
    and DEVICE_CAMERAS[("mici", "os04c10")].ecam.focal_length == 425.25
  )
  assert DEVICE_CAMERAS[("tizi", "ox03c10")].narrow_road.focal_length == 2648 and DEVICE_CAMERAS[
    ("neo", "unknown")
  ].fcam.size == (1164, 874)

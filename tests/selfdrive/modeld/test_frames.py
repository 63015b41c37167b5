import av
import numpy as np
import pytest

from openpilot.cereal.visionipc import nv12_info
from openpilot.common.transformations.model import medmodel_intrinsics, sbigmodel_intrinsics
from openpilot.selfdrive.modeld.fair.frames import (
  CameraError,
  ModelFrame,
  camera_intrinsics,
  find_camera,
  pack_rgb,
  unpack_rgb,
)

DEVICE_FROM_VIEW = np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]], dtype=np.float64)


def rotation(roll, pitch, yaw):
  def r(axis, a):
    c, s = np.cos(a), np.sin(a)
    return {
      "x": np.array([[1, 0, 0], [0, c, -s], [0, s, c]]),
      "y": np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]),
      "z": np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]),
    }[axis]

  return r("z", yaw) @ r("y", pitch) @ r("x", roll)


def source_pixel(x, y, k_model, k, rpy):
  """Where a model pixel comes from: its ray in the calibrated frame, turned into the device's, seen by the camera.
  Scalar float64, no matrix of ours."""
  ray = DEVICE_FROM_VIEW @ np.array([(x - k_model[0, 2]) / k_model[0, 0], (y - k_model[1, 2]) / k_model[1, 1], 1.0])
  view = DEVICE_FROM_VIEW.T @ rotation(*rpy) @ ray
  return view[0] / view[2] * k[0, 0] + k[0, 2], view[1] / view[2] * k[1, 1] + k[1, 2]


@pytest.mark.parametrize("size", [(1344, 760), (1928, 1208), (526, 330), (1164, 874)])
@pytest.mark.parametrize("view", ["medmodel", "sbigmodel"])
def test_warp_is_the_nearest_camera_pixel(size, view):
  r = np.random.default_rng(sum(size))
  w, h = size
  stride, y_height, _, length = nv12_info(w, h)
  uv = stride * y_height
  buf = r.integers(0, 256, length, dtype=np.uint8)
  rpy = r.uniform(-0.04, 0.04, 3)
  k, k_model = camera_intrinsics(w, h), medmodel_intrinsics if view == "medmodel" else sbigmodel_intrinsics
  frame = ModelFrame(w, h, stride, uv, view)
  frame.set_calibration(rpy, k)
  out = frame.warp(buf)
  checked = 0
  for _ in range(3000):
    x, y = int(r.integers(512)), int(r.integers(256))
    sx, sy = source_pixel(x, y, k_model, k, rpy)
    if abs(sx % 1 - 0.5) < 1e-6 or abs(sy % 1 - 0.5) < 1e-6:
      continue  # a tie: either neighbor is the nearest
    inside = -0.5 < sx < w - 0.5 and -0.5 < sy < h - 0.5
    assert frame.valid[y, x] == inside
    px, py = min(max(round(sx), 0), w - 1), min(max(round(sy), 0), h - 1)
    assert out[(y % 2) + 2 * (x % 2), y // 2, x // 2] == buf[py * stride + px]
    checked += 1
  assert checked > 2900
  # chroma: openpilot scales the matrix so that chroma pixel (x, y) is the view's (2x, 2y), in half the camera's pixels
  for _ in range(1000):
    x, y = int(r.integers(256)), int(r.integers(128))
    sx, sy = (v / 2 for v in source_pixel(2 * x, 2 * y, k_model, k, rpy))
    if abs(sx % 1 - 0.5) < 1e-6 or abs(sy % 1 - 0.5) < 1e-6:
      continue
    px, py = min(max(round(sx), 0), w // 2 - 1), min(max(round(sy), 0), h // 2 - 1)
    assert [out[4, y, x], out[5, y, x]] == list(buf[uv + py * stride + 2 * px :][:2])


def test_medmodel_fits_every_road_camera():
  for size in ((1344, 760), (1928, 1208), (526, 330)):
    stride, y_height, _, _ = nv12_info(*size)
    frame = ModelFrame(*size, stride, stride * y_height)
    frame.set_calibration(np.zeros(3), camera_intrinsics(*size))
    assert frame.filled >= 255 / 256  # the view's last row lies half a pixel below the 1928x1208 image


def test_pack_rgb_is_what_the_encoder_makes():
  """libswscale computes in fixed point and sites chroma to the left; on smooth colors that leaves 2 of 255."""
  r = np.random.default_rng(0)
  corners = r.integers(0, 256, (5, 9, 3)).astype(np.float64)
  y, x = np.mgrid[0:4:256j, 0:8:512j]
  i, j = np.minimum(y.astype(int), 3), np.minimum(x.astype(int), 7)
  u, v = (y - i)[..., None], (x - j)[..., None]
  rgb = (
    (
      (1 - u) * (1 - v) * corners[i, j]
      + (1 - u) * v * corners[i, j + 1]
      + u * (1 - v) * corners[i + 1, j]
      + u * v * corners[i + 1, j + 1]
    )
    .round()
    .astype(np.uint8)
  )
  nv12 = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="nv12", dst_colorspace="ITU601").to_ndarray()
  luma, chroma = nv12[:256], nv12[256:].reshape(128, 256, 2)
  want = np.stack(
    [luma[0::2, 0::2], luma[1::2, 0::2], luma[0::2, 1::2], luma[1::2, 1::2], chroma[..., 0], chroma[..., 1]]
  ).astype(int)
  got = pack_rgb(rgb).astype(int)
  assert np.abs(got - want).max() <= 2
  assert np.abs(unpack_rgb(got.astype(np.uint8)).astype(int) - rgb).mean() < 2


def test_unknown_camera_is_named():
  unknown = (
    ((640, 480), ()),
    ((1280, 720), ("mici", "os04c10")),
    ((964, 604), ()),
    ((528, 330), (None, None, True)),
    ((100, 60), ("tizi", "ox03c10")),
  )
  for size, about in unknown:
    with pytest.raises(CameraError, match=rf"{size[0]}x{size[1]} frames; known are .*1344x760") as e:
      camera_intrinsics(*size, *about)
    assert "\n" not in str(e.value)
  assert camera_intrinsics(1344, 760)[0, 0] == 1141.5
  assert camera_intrinsics(1928, 1208, "tizi", "ox03c10")[0, 0] == 2648.0
  assert (
    camera_intrinsics(1344, 760, "tizi", "ox03c10")[0, 0] == 1141.5
  )  # the size decides where the log's sensor cannot be


@pytest.mark.parametrize("device, size", [(("tizi", "ox03c10"), (1928, 1208)), (("mici", "os04c10"), (1344, 760))])
def test_a_pixel_of_the_qcamera_is_where_the_resized_picture_has_it(device, size):
  """A blob in the camera's picture, resized by libswscale: its centroid, in pixels of the qcamera, is where the two
  matrices send the ray."""
  full, small = camera_intrinsics(*size, *device), camera_intrinsics(526, 330, *device)
  y, x = np.mgrid[: size[1], : size[0]]
  for u, v in ((size[0] / 2, size[1] / 2), (300.0, 200.0), (size[0] - 200.0, size[1] - 150.0)):
    blob = (250 * np.exp(-((x - u) ** 2 + (y - v) ** 2) / (2 * 12.0**2))).astype(np.uint8)
    resized = (
      av.VideoFrame.from_ndarray(blob, format="gray")
      .reformat(width=526, height=330, interpolation="AREA")
      .to_ndarray()
      .astype(np.float64)
    )
    rows, columns = np.mgrid[:330, :526]
    seen = np.array([(resized * columns).sum(), (resized * rows).sum()]) / resized.sum()
    expected = (small @ np.linalg.inv(full) @ [u, v, 1])[:2]
    assert np.abs(seen - expected).max() < 0.05, (seen, expected)


@pytest.mark.parametrize(
  "size, about, like, picture",
  [
    ((528, 330), (), (526, 330), (526, 330)),  # as openpilot's replay pads a qcamera
    ((528, 336), ("mici", "os04c10"), (526, 330), (526, 330)),
    ((1936, 1216), (), (1928, 1208), (1928, 1208)),
    ((1344, 768), ("mici", "os04c10"), (1344, 760), (1344, 760)),
    ((644, 402), ("tizi", "ox03c10"), None, (642, 402)),
  ],
)
def test_padding_moves_nothing(size, about, like, picture):
  k, found = find_camera(*size, *about)
  assert found == picture
  if like is not None:
    assert np.array_equal(k, camera_intrinsics(*like, *about))


def test_a_scaled_camera_is_known_by_its_sensor():
  k = camera_intrinsics(964, 604, "tizi", "ox03c10")
  np.testing.assert_allclose(k, [[1324, 0, 481.75], [0, 1324, 301.75], [0, 0, 1]])
  k, picture = find_camera(642, 402, "tici", "ar0231", True)
  assert picture == (642, 402)
  np.testing.assert_allclose(
    k[:2], [[567 * 642 / 1928, 0, 964.5 * 642 / 1928 - 0.5], [0, 567 * 402 / 1208, 604.5 * 402 / 1208 - 0.5]]
  )


def test_short_buffer_is_refused():
  frame = ModelFrame(1344, 760, 1408, 1408 * 768)
  frame.set_calibration(np.zeros(3), camera_intrinsics(1344, 760))
  with pytest.raises(ValueError, match="too short"):
    frame.warp(np.zeros(1000, np.uint8))

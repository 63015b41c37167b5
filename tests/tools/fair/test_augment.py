"""Changes of a clip: by hand on pictures whose pixels are known, and of many drawn ones what all of them keep."""

import numpy as np
import pytest

from openpilot.tools.fair.distillation.augment import NONE, Augmentation, draw, warp_boxes, warp_frame, warp_grid

MIRROR = Augmentation(np.array([[-1.0, 0, 511], [0, 1, 0], [0, 0, 1]]), 1.0)


def luma(frame):
  """(6, 128, 256) -> (256, 512): top left, below it, top right, below that, of every two by two."""
  return frame[[0, 2, 1, 3]].reshape(2, 2, 128, 256).transpose(2, 0, 3, 1).reshape(256, 512)


@pytest.fixture(scope="module")
def frame():
  return np.random.default_rng(0).integers(0, 256, (6, 128, 256), dtype=np.uint8)


def test_no_change_is_none(frame):
  assert (warp_frame(NONE, frame) == frame).all() and not NONE.is_geometric


def test_a_mirrored_frame(frame):
  out = warp_frame(MIRROR, frame)
  assert (luma(out) == luma(frame)[:, ::-1]).all() and (out[4:] == frame[4:, :, ::-1]).all()
  assert warp_boxes(MIRROR, np.array([[10.0, 20, 30, 40]])).tolist() == [[481, 20, 501, 40]]


def test_colors_go_from_0_to_255(frame):
  a = Augmentation(np.eye(3), 1.0, gain=2.0, bias=0.1, chroma=3.0, tint=(5.0, -5.0))
  out = warp_frame(a, frame).astype(int)
  want = [np.clip(np.floor(128 + 3.0 * (frame[4 + k].astype(float) - 128) + (5, -5)[k] + 0.5), 0, 255) for k in (0, 1)]
  assert (out[4:] == want).all() and out[4:].min() == 0 and out[4:].max() == 255
  assert (out[:4] == np.clip(np.floor(2.0 * frame[:4] + 25.5 + 0.5), 0, 255)).all()


@pytest.mark.parametrize("channels", [0, 1, 3, 4, 5, 9])
def test_every_channel_of_a_grid_is_warped_alike(channels):
  r = np.random.default_rng(1)
  grid = r.normal(0, 1, (64, 128, *([channels] if channels else []))).astype(np.float32)
  a = Augmentation(np.array([[0.8, -0.02, 30], [0.02, 0.8, 20], [0, 0, 1]]), 0.8)
  out = warp_grid(a, grid, True, fill=-7.0)
  assert out.shape == grid.shape and (out == -7).any()
  for c in range(channels):
    np.testing.assert_array_equal(out[..., c], warp_grid(a, np.ascontiguousarray(grid[..., c]), True, fill=-7.0))
  np.testing.assert_allclose(warp_grid(MIRROR, grid, True), grid[:, ::-1], atol=1e-6)


def test_what_drawn_ones_have_in_common():
  """Seven of ten turn and zoom a little, about the horizon; half are mirrored where they may be; none is anything but
  that."""
  r = np.random.default_rng(2)
  drawn = [draw(r, mirror=i % 2 == 0) for i in range(2000)]
  matrices, zooms = np.array([a.matrix for a in drawn]), np.array([a.zoom for a in drawn])
  assert (matrices[:, 2] == [0, 0, 1]).all()
  np.testing.assert_allclose(np.abs(np.linalg.det(matrices)), zooms**2, rtol=1e-9)
  turned = matrices[:, :2, :2].transpose(0, 2, 1) @ matrices[:, :2, :2]
  np.testing.assert_allclose(turned, (zooms**2)[:, None, None] * np.eye(2)[None], atol=1e-9)
  assert 0.66 < np.mean(zooms != 1) < 0.74 and zooms.min() >= 0.9 and zooms.max() <= 1.35
  mirrored = np.linalg.det(matrices) < 0
  assert not mirrored[1::2].any() and 0.45 < mirrored[::2].mean() < 0.55
  middle = matrices @ [255.5, 60, 1]
  assert (np.abs(middle[:, :2] - [255.5, 60]) < [24, 24]).all()
  seeds = np.array([a.seed for a in drawn])
  assert 0 <= seeds.min() and 2**30 < seeds.max() < 2**31

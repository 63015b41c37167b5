"""Augmentation: labels move with the picture, whatever its size and kind."""

from dataclasses import replace

import numpy as np
import pytest

from openpilot.selfdrive.modeld.fair.frames import pack_rgb, unpack_rgb
from openpilot.tools.fair.distillation.augment import (
  NONE,
  draw,
  grid_matrix,
  none,
  warp_boxes,
  warp_frame,
  warp_grid,
  warp_points,
)
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.fair.tasks import TASKS, say
from openpilot.tools.fair.tasks.segmentation import class_maps
from openpilot.tools.fair.teacher import Label


def test_nothing_drawn_changes_nothing():
  frame = np.random.default_rng(0).integers(0, 256, (6, 128, 256), dtype=np.uint8)
  assert np.array_equal(warp_frame(NONE, frame), frame)


@pytest.mark.parametrize("seed", range(4))
def test_labels_move_with_an_rgb_picture(seed):
  """Of another size than the view's: the picture, its points and its class maps. Colors change, and come back into
  their order."""
  r, picture = np.random.default_rng(seed), InputSpec("rgb", 160, 224)
  a = draw(r, picture=picture)
  color = warp_frame(a, np.full(picture.shape, 90, np.uint8))
  assert color.shape == picture.shape and color.dtype == np.uint8
  a = replace(none(picture), matrix=a.matrix, zoom=a.zoom)
  x, y = r.integers(80, 140), r.integers(60, 100)
  frame = np.zeros(picture.shape, np.uint8)
  frame[:] = np.array([200, 40, 90], np.uint8)[:, None, None]
  frame[:, y - 8 : y + 9, x - 8 : x + 9] = np.array([30, 220, 60], np.uint8)[:, None, None]
  moved = warp_frame(a, frame).astype(int)
  ys, xs = np.nonzero(moved[1] > 130)
  assert np.allclose(warp_points(a, np.array([x, y], float)), [xs.mean(), ys.mean()], atol=0.6)
  assert np.abs(moved[:, ys, xs].mean(1) - [30, 220, 60]).max() < 30  # R, G and B are where they were
  ids = np.zeros((160, 224), np.uint8)
  ids[y - 8 : y + 9, x - 8 : x + 9] = 1
  label = Label("maps", "dense", "uint8", (160, 224), "class", ("background", "vehicle"))
  p, _ = class_maps(a, replace(say([label], [], TASKS["segmentation"]), picture=picture), ids)
  assert p.shape == (5, 40, 56)
  gy, gx = np.nonzero(p[3] > 0.5)
  at = grid_matrix(56, 40, picture) @ [*warp_points(a, np.array([x, y], float)), 1]
  assert np.allclose([gx.mean(), gy.mean()], at[:2], atol=1.0)  # cells: voted in whole ones, then the nearest is taken


@pytest.mark.parametrize("seed", range(8))
def test_labels_move_with_the_picture(seed):
  r = np.random.default_rng(seed)
  a = draw(r)
  a.gain, a.bias, a.gamma, a.noise, a.blur = 1.0, 0.0, 1.0, 0.0, 0.0  # the geometry alone
  x, y = r.integers(150, 350), r.integers(70, 180)
  rgb = np.full((256, 512, 3), 40, np.uint8)
  rgb[y - 8 : y + 9, x - 8 : x + 9] = 230
  seen = unpack_rgb(warp_frame(a, pack_rgb(rgb)))[..., 1] > 135
  ys, xs = np.nonzero(seen)
  # the square's middle, to a pixel of bilinear sampling and chroma
  assert np.allclose(warp_points(a, np.array([x, y], float)), [xs.mean(), ys.mean()], atol=0.6)
  box = warp_boxes(a, np.array([[x - 8.5, y - 8.5, x + 8.5, y + 8.5]]))[0]
  assert np.allclose(box, [xs.min() - 0.5, ys.min() - 0.5, xs.max() + 0.5, ys.max() + 0.5], atol=1.6)
  # a map of the same square, at a quarter of the size
  grid = (rgb[..., 0] == 230).reshape(64, 4, 128, 4).mean(axis=(1, 3)).astype(np.float32)
  gy, gx = np.nonzero(warp_grid(a, grid, True) > 0.5)
  in_grid = grid_matrix(128, 64) @ [*warp_points(a, np.array([x, y], float)), 1]
  assert np.allclose([gx.mean(), gy.mean()], in_grid[:2], atol=0.5)
  assert a.zoom == pytest.approx(np.sqrt(abs(np.linalg.det(a.matrix[:2, :2]))), rel=1e-6)

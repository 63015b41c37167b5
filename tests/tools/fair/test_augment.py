"""Augmentation: labels move with the picture, whatever its size and kind."""

from dataclasses import replace

import cv2
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
from openpilot.tools.fair.distillation.light import HIGH, LOW, Light, lit, stored
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


def test_stronger_light_is_drawn_after_all_that_was_drawn_before():
  """Of strength 1 as without one; above, the place is the same, and middle gray stays between dark and bright."""
  for seed in range(40):
    a, b, c = (draw(np.random.default_rng(seed), strength=s) for s in (1.0, 1.0, 3.0))
    assert a.light == Light() == draw(np.random.default_rng(seed)).light
    assert np.array_equal(a.matrix, c.matrix) and replace(a, matrix=0) == replace(b, matrix=0)
    assert c.light != Light() and c.light == draw(np.random.default_rng(seed), strength=3.0).light
    assert LOW - 1e-6 <= c.gain * 0.5**c.gamma + c.bias <= HIGH + 1e-6
  drawn = [draw(np.random.default_rng(seed), strength=3.0).light for seed in range(40)]
  kinds = [[x.contrast != 1, any(x.ramp), x.vignette > 0, x.flare > 0, x.shrink > 1, x.quality > 0] for x in drawn]
  assert np.all(np.sum(kinds, axis=0) >= 5) and any(x.ghost for x in drawn)


def test_gradients_of_light_keep_the_mean():
  """A ramp to the right and down, by hand; a vignette, darkest in the corners."""
  y = np.full((64, 128), 100, np.uint8)
  gx, gy = np.linspace(-1, 1, 128), np.linspace(-1, 1, 64)[:, None]
  assert np.abs(lit(Light(ramp=(0.3, -0.2)), y) - (100 * (1 + 0.3 * gx - 0.2 * gy))).max() <= 1
  shaded = 1 - 0.4 * (gx**2 + gy**2) / 2
  assert np.abs(lit(Light(vignette=0.4), y) - 100 * shaded / shaded.mean()).max() <= 1
  dark = np.arange(64, dtype=np.uint8).reshape(8, 8)  # of a mean of 31.5, which stays
  levels = lit(Light(contrast=1.5), dark).ravel()
  assert np.abs(levels - np.clip(31.5 + 1.5 * (np.arange(64) - 31.5), 0, 255)).max() <= 1


def test_a_dark_frame_is_not_made_darker():
  """of gain 0.4 and gamma 1.5 a frame of gray 26 keeps its level, where an ordinary change does not; gray 120 loses."""
  a = replace(none(InputSpec()), gain=0.4, gamma=1.5)
  for gray, low, high in ((26, 24, 27), (120, 28, 50)):
    frame = np.full((6, 128, 256), gray, np.uint8)
    seen = warp_frame(replace(a, light=Light(contrast=1.01)), frame)[:4].mean()
    assert low <= seen <= high and warp_frame(a, frame)[:4].mean() < gray * 0.4


def test_flares_are_discs_around_bright_spots():
  """Of a lamp, and not of a bright sky or of gray; the ghost lies opposite the middle."""
  y = np.full((256, 512), 60, np.uint8)
  y[:40] = 255
  assert np.array_equal(lit(Light(flare=1.0, radius=4.0), y), y)
  y[150:162, 100:112] = 255
  seen = lit(Light(flare=1.0, radius=4.0), y)
  ys, xs = np.nonzero(seen.astype(int) - y > 5)
  assert abs(xs.mean() - 105.5) < 2 and abs(ys.mean() - 155.5) < 2
  assert 12 < np.hypot(xs - 105.5, ys - 155.5).max() < 40
  ghost = lit(Light(flare=1.0, radius=4.0, ghost=True), y).astype(int) - seen
  ys, xs = np.nonzero(ghost > 5)
  assert abs(xs.mean() - (511 - 105.5)) < 3 and abs(ys.mean() - (255 - 155.5)) < 3


def test_little_pixels_and_compression(rng):
  y = rng.integers(0, 256, (64, 128)).astype(np.uint8)
  small = cv2.resize(y, (64, 32), interpolation=cv2.INTER_AREA)
  assert np.array_equal(stored(Light(shrink=2.0), y), cv2.resize(small, (128, 64), interpolation=cv2.INTER_LINEAR))
  y = np.clip(rng.normal(128, 8, (64, 128)), 0, 255).astype(np.uint8)  # so little that most is rounded to nothing
  few, many = (stored(Light(quality=q), y).astype(float) for q in (10, 90))
  assert np.abs(few - y).mean() > 2 * np.abs(many - y).mean() > 0
  kept = [(np.abs(cv2.dct(few[i : i + 8, j : j + 8])) > 4).mean() for i in range(0, 64, 8) for j in range(0, 128, 8)]
  assert np.mean(kept) < 0.1  # of the 8 x 8 blocks' cosines


@pytest.mark.parametrize("picture", [InputSpec(), InputSpec("rgb", 160, 224)])
def test_stronger_light_in_every_kind_of_picture(picture, rng):
  """What comes out keeps its shape, is the same again, and does not change where the place is not."""
  frame = rng.integers(0, 256, picture.shape).astype(np.uint8)
  a = replace(
    draw(np.random.default_rng(3), picture=picture, strength=3.0), light=Light(1.2, (0.2, 0), 0.3, 1, 2, True, 2, 30)
  )
  seen = warp_frame(a, frame)
  assert seen.shape == picture.shape and seen.dtype == np.uint8 and np.array_equal(seen, warp_frame(a, frame))
  assert not np.array_equal(seen, warp_frame(replace(a, light=Light()), frame))
  assert not replace(none(picture), light=Light(contrast=1.1)).is_none

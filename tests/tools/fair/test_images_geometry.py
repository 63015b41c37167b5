"""Changes of place and of pixels: random pictures, against painting the moved things anew, pixel by pixel."""

import cv2
import numpy as np
import pytest

from openpilot.tools.fair.distillation.pixels import CHANGES, apply
from openpilot.tools.fair.images import geometry as g

W, H = 120, 90


def star(r, center, size, points=7):
  """A polygon that is not convex."""
  a = np.sort(r.uniform(0, 2 * np.pi, points))
  k = r.uniform(0.4, 1.0, points) * size
  return np.asarray(center) + np.stack([np.cos(a) * k, np.sin(a) * k], 1)


def paint(polygons):
  """(H, W) bool: pixels whose center lies within, by the even-odd rule, tested one by one."""
  y, x = np.mgrid[:H, :W] + 0.5
  out = np.zeros((H, W), bool)
  for p in polygons:
    inside = np.zeros((H, W), bool)
    for a, b in zip(p, np.roll(p, -1, axis=0), strict=True):
      crosses = (a[1] > y) != (b[1] > y)
      with np.errstate(divide="ignore", invalid="ignore"):
        inside ^= crosses & (x < a[0] + (y - a[1]) * (b[0] - a[0]) / (b[1] - a[1]))
    out |= inside
  return out


def moves(r):
  yield "flip", g.flip(W, H)
  yield (
    "affine",
    g.affine(
      W, H, r.uniform(-40, 40), tuple(r.uniform(-20, 20, 2)), float(r.uniform(0.6, 1.6)), tuple(r.uniform(-15, 15, 2))
    ),
  )
  yield "perspective", g.perspective(W, H, np.array([[0, 0], [W, 0], [W, H], [0, H]]) + r.uniform(-12, 12, (4, 2)))
  yield "lens", g.lens(W, H, float(r.uniform(-0.2, 0.3)))
  yield "rolling", g.rolling(W, H, float(r.uniform(-15, 15)), float(r.uniform(0, 3)), 2.0, float(r.uniform(0, 6)))
  yield "elastic", g.elastic(W, H, 4.0, 40.0, r)


def edge(mask):
  """Pixels beside the border of a mask: there, rounding may say either."""
  m = mask.astype(np.uint8)
  return cv2.dilate(m, np.ones((3, 3), np.uint8)) != cv2.erode(m, np.ones((3, 3), np.uint8))


@pytest.mark.parametrize("seed", range(4))
def test_picture_mask_polygon_and_box_go_the_same_way(seed):
  r = np.random.default_rng(seed)
  for name, move in moves(r):
    shape = star(r, r.uniform([30, 25], [W - 30, H - 25]), 22)
    mask = paint([shape])
    rgb = np.where(mask[..., None], 255, 0).astype(np.uint8).repeat(3, -1)[..., :3]
    box = g.around(shape)
    a = g.moved(g.Sample(rgb, box[None], polygons=[[shape]]), [move])
    b = g.moved(g.Sample(rgb, box[None], masks=[mask]), [move])
    if not len(a.boxes):
      assert not len(b.boxes) or g.area(g.cut(move.points(g.corners(box)), W, H)) < g.area(move.points(g.corners(box)))
      continue
    want = paint([move.points(g.dense(shape))])
    inner = ~edge(want) & ~edge(paint([g.dense(move.points(shape))]))
    wrong = [
      (paint(a.polygons[0]) != want)[~edge(want)],
      (b.masks[0] != want)[inner],
      ((a.rgb[..., 0] > 185) != want)[inner],  # gray comes from outside
    ]
    assert max(x.sum() for x in wrong) <= 6, name
    ys, xs = np.flatnonzero(want.any(1)), np.flatnonzero(want.any(0))
    tight = np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])
    np.testing.assert_allclose(b.boxes[0], tight, atol=1.3, err_msg=name)
    outline = move.points(g.dense(shape)).clip(0, [W, H])  # a spike may be too thin to be painted
    assert (a.boxes[0][:2] <= tight[:2] + 1).all() and (a.boxes[0][2:] >= tight[2:] - 1).all(), name
    assert (a.boxes[0][:2] >= outline.min(0) - 0.01).all() and (a.boxes[0][2:] <= outline.max(0) + 0.01).all(), name


@pytest.mark.parametrize("seed", range(3))
def test_a_box_alone_holds_all_that_was_in_it(seed):
  r = np.random.default_rng(100 + seed)
  for name, move in moves(r):
    x0, y0 = r.uniform([5, 5], [70, 50])
    box = np.array([x0, y0, x0 + r.uniform(8, 40), y0 + r.uniform(8, 35)])
    after = g.moved(g.Sample(np.zeros((H, W, 3), np.uint8), box[None]), [move])
    inside = r.uniform(box[:2], box[2:], (500, 2))
    to = move.points(inside)
    seen = to[((to >= 0) & (to <= [W, H])).all(1)]
    if len(after.boxes):
      b = after.boxes[0]
      assert (seen >= b[:2] - 0.3).all() and (seen <= b[2:] + 0.3).all(), name
      assert (b[:2] >= 0).all() and (b[2:] <= [W, H]).all()
      hull = move.points(g.dense(g.corners(box))).clip(0, [W, H])
      assert (b[:2] >= hull.min(0) - 0.6).all() and (b[2:] <= hull.max(0) + 0.6).all(), name  # and not much more
    else:
      assert len(seen) < 400, name


def test_several_changes_are_their_sequence_and_who_is_left_is_known():
  r = np.random.default_rng(7)
  a, b = g.affine(W, H, 20, (30, 0), 1.5), g.lens(W, H, 0.1)
  boxes = np.array([[2.0, 2, 20, 20], [50, 30, 80, 60], [110, 76, 118, 88]])
  rgb = r.integers(0, 255, (H, W, 3), np.uint8)
  both = g.moved(g.Sample(rgb, boxes), [a, b])
  first = g.moved(g.Sample(rgb, boxes), [a])
  assert both.rows.tolist() == [i for i in first.rows if i in both.rows] and 2 not in both.rows
  one = both.rows.tolist().index(1)
  want = g.around(b.points(g.dense(a.points(g.corners(boxes[1])))))
  np.testing.assert_allclose(both.boxes[one], want.clip(0, [W, H, W, H]), atol=0.1)
  assert g.moved(g.Sample(rgb, boxes), []).rows.tolist() == [0, 1, 2]


def test_a_polygon_is_cut_at_the_picture_exactly():
  """Beside the mean of very many points."""
  r = np.random.default_rng(3)
  for _ in range(5):
    p = star(r, r.uniform([0, 0], [W, H]), 40)
    q = g.cut(p, W, H)
    assert (q >= 0).all() and (q <= [W, H]).all()
    fine = paint([p])
    assert g.area(q) == pytest.approx(fine.sum(), abs=0.06 * fine.sum() + 12)
  assert len(g.cut(np.array([[-9.0, -9], [-2, -9], [-2, -1]]), W, H)) == 0


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_pixels_keep_the_shape_and_repeat(name):
  r = np.random.default_rng(1)
  smooth = cv2.resize(r.integers(0, 256, (40, 50, 3), np.uint8), (W, H), interpolation=cv2.INTER_CUBIC)
  for s in (0.0, 0.4, 1.0):
    a = apply(name, smooth.copy(), 5, s)
    assert a.shape == smooth.shape and a.dtype == np.uint8
    np.testing.assert_array_equal(a, apply(name, smooth.copy(), 5, s))
  weak, strong = (
    np.mean([np.abs(apply(name, smooth, k, s).astype(int) - smooth).mean() for k in range(6)]) for s in (0.1, 1.0)
  )
  assert strong > weak and strong > 0.02, name
  for tiny in (np.zeros((1, 1, 3), np.uint8), np.full((2, 7, 3), 255, np.uint8)):
    assert apply(name, tiny, 0, 1.0).shape == tiny.shape


def test_light_changes_as_it_is_named():
  rgb = np.random.default_rng(2).integers(60, 200, (H, W, 3), np.uint8)
  mean = {k: np.mean([apply(k, rgb, i, 1.0).mean() for i in range(5)]) for k in ("dark", "bright", "fog", "shadow")}
  assert mean["dark"] < 100 < mean["bright"] and mean["fog"] > rgb.mean() > mean["shadow"]
  contrast = {
    k: np.mean([apply(k, rgb, i, 1.0).std() for i in range(5)]) for k in ("fog", "fade", "defocus", "sharpen")
  }
  assert all(contrast[k] < rgb.std() for k in ("fog", "fade", "defocus")) and contrast["sharpen"] > rgb.std()

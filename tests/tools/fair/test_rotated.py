"""Oriented boxes: their convention, the smallest one around points, rotated IoU beside two other clippers."""

from fractions import Fraction

import cv2
import numpy as np
import pytest

from openpilot.selfdrive.modeld.fair.heads.oriented import corners, le90, upright
from openpilot.tools.fair.rotated import edge_points, min_area_rectangle, outline, pair_iou, rotated_iou


def boxes(rng, n, size=40.0):
  return np.column_stack(
    [rng.uniform(0, size, (n, 2)), rng.uniform(1, size, (n, 2)), rng.uniform(-2 * np.pi, 2 * np.pi, n)]
  )


def test_the_convention():
  """A box twice as wide as high whose longer side points right and down is turned by +30 degrees."""
  box = np.array([[10.0, 20, 8, 4, np.pi / 6]])
  p = corners(box)[0]
  c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
  np.testing.assert_allclose(p[0], [10 - 4 * c + 2 * s, 20 - 4 * s - 2 * c])
  np.testing.assert_allclose(p[1], [10 + 4 * c + 2 * s, 20 + 4 * s - 2 * c])
  assert p[1, 1] > p[0, 1]  # down the picture
  area = 0.5 * sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(p, np.roll(p, -1, 0), strict=True))
  assert area == pytest.approx(32)  # positive: clockwise where y points down
  np.testing.assert_allclose(outline(box)[0], p.ravel())


def test_every_way_to_say_a_box_is_put_into_one(rng):
  b = boxes(rng, 200)
  want = le90(b)
  assert (want[:, 2] >= want[:, 3]).all() and (np.abs(want[:, 4] + 1e-12) <= np.pi / 2).all()
  assert (want[:, 4] < np.pi / 2).all()
  swapped = b[:, [0, 1, 3, 2, 4]] + [0, 0, 0, 0, np.pi / 2]
  for other in (b + [0, 0, 0, 0, np.pi], swapped, swapped - [0, 0, 0, 0, np.pi], want):
    np.testing.assert_allclose(pair_iou(le90(other), want), 1, atol=1e-9)
    turn = (le90(other)[:, 4] - want[:, 4] + np.pi / 2) % np.pi - np.pi / 2
    np.testing.assert_allclose(turn, 0, atol=1e-9)
  assert le90(np.array([[0, 0, 2, 1, -np.pi / 2 - 1e-17]]))[0, 4] < np.pi / 2  # % rounds up to pi here


def test_iou_beside_opencvs_clipper(rng):
  """OpenCV's is of float32, and wrong for rectangles that lie upon each other: those are below."""
  a, b = boxes(rng, 400), boxes(rng, 400)
  want = []
  for x, y in zip(a, b, strict=True):
    _, p = cv2.rotatedRectangleIntersection(*(((u[0], u[1]), (u[2], u[3]), np.degrees(u[4])) for u in (x, y)))
    shared = 0.0 if p is None or len(p) < 3 else cv2.contourArea(cv2.convexHull(p))
    want.append(shared / (x[2] * x[3] + y[2] * y[3] - shared))
  got = pair_iou(a, b)
  np.testing.assert_allclose(got, want, atol=2e-3)
  assert (got > 0.01).sum() > 100
  np.testing.assert_allclose(got, pair_iou(b, a), atol=1e-9)
  np.testing.assert_allclose(np.diag(rotated_iou(a[:40], b[:40])), got[:40], atol=1e-12)


def exact_shared(p, q):
  """Area that two convex polygons of fractions share, by Sutherland and Hodgman, without rounding."""

  def side(a, b, x):
    return (b[0] - a[0]) * (x[1] - a[1]) - (b[1] - a[1]) * (x[0] - a[0])

  for a, b in zip(q, [*q[1:], q[0]], strict=True):
    out = []
    for x, y in zip(p, [*p[1:], *p[:1]], strict=True):
      u, v = side(a, b, x), side(a, b, y)
      if u >= 0:
        out.append(x)
      if u * v < 0:
        t = u / (u - v)
        out.append((x[0] + t * (y[0] - x[0]), x[1] + t * (y[1] - x[1])))
    p = out
    if not p:
      return Fraction(0)
  return sum(x[0] * y[1] - y[0] * x[1] for x, y in zip(p, [*p[1:], p[0]], strict=True)) / 2


TURNS = [(1, 0, 1), (3, 4, 5), (-5, 12, 13), (8, 15, 17), (0, 1, 1)]  # cosine and sine are fractions


def exact_corners(cx, cy, w, h, turn):
  c, s = Fraction(turn[0], turn[2]), Fraction(turn[1], turn[2])
  x, y = Fraction(w, 2), Fraction(h, 2)
  return [(cx + u * c - v * s, cy + u * s + v * c) for u, v in ((-x, -y), (x, -y), (x, y), (-x, y))]


def exact_cases(rng):
  """Pairs (cx, cy, w, h, turn): at random, the same, said in another way, nested, nested with a common edge, touching
  along an edge and at a corner, crossing, apart, without width."""
  n = [int(v) for v in rng.integers(1, 20, 4)]
  for turn in TURNS:
    a = (n[0], n[1], 2 * n[2], 2 * n[3], turn)
    quarter = (-turn[1], turn[0], turn[2])
    c, s = Fraction(turn[0], turn[2]), Fraction(turn[1], turn[2])
    along = (n[0] + 2 * n[2] * c, n[1] + 2 * n[2] * s)  # its neighbor at the right
    beyond = (along[0] - 2 * n[3] * s, along[1] + 2 * n[3] * c)
    yield "same", a, a
    yield "said otherwise", a, (n[0], n[1], 2 * n[3], 2 * n[2], quarter)
    yield "nested", a, (n[0], n[1], n[2], n[3], turn)
    yield "common edge", a, (n[0] - n[2] * c / 2, n[1] - n[2] * s / 2, n[2], n[3], turn)
    yield "touching edge", a, (*along, 2 * n[2], 2 * n[3], turn)
    yield "touching corner", a, (*beyond, 2 * n[2], 2 * n[3], turn)
    yield "crossing", a, (n[0], n[1], 50, 1, quarter)
    yield "apart", a, (n[0] + 100, n[1], 5, 5, turn)
    yield "no width", a, (n[0], n[1], 9, 0, turn)
    yield "both without width", (*a[:3], 0, turn), (*a[:3], 0, turn)
    for other in TURNS:
      m = [int(v) for v in rng.integers(1, 25, 4)]
      yield "any", a, (*m, other)


def test_iou_beside_exact_fractions(rng):
  got, want, kinds = [], [], []
  for kind, a, b in exact_cases(rng):
    p, q = exact_corners(*a), exact_corners(*b)
    shared = exact_shared(p, q)
    union = a[2] * a[3] + b[2] * b[3] - shared
    want.append(float(shared / union) if union else 0.0)
    x, y = (np.array([[float(u[0]), float(u[1]), u[2], u[3], np.arctan2(u[4][1], u[4][0])]]) for u in (a, b))
    got.append(float(pair_iou(x, y)[0]))
    kinds.append(kind)
  np.testing.assert_allclose(got, want, atol=1e-7)
  assert all(g == pytest.approx(1) for g, k in zip(got, kinds, strict=True) if k.startswith(("same", "said")))
  assert all(g < 1e-7 for g, k in zip(got, kinds, strict=True) if k.startswith(("touching", "apart", "no", "both")))


def test_far_out_and_tiny_and_none():
  a = np.array([[1e6, 1e6, 10, 5, 0.3], [3, 3, 1e-3, 5e-4, 1.0]])
  np.testing.assert_allclose(pair_iou(a, a), 1, atol=1e-6)
  assert rotated_iou(np.zeros((0, 5)), a).shape == (0, 2) and rotated_iou(a, np.zeros((0, 5))).shape == (2, 0)


def test_the_smallest_rectangle_of_a_rectangle_is_itself(rng):
  for b in le90(boxes(rng, 60)):
    p = corners(b)[0]
    more = np.concatenate([p, p.mean(0) + (p - p.mean(0)) * rng.uniform(0, 1, (4, 1))])
    found = min_area_rectangle(rng.permutation(more))
    np.testing.assert_allclose(found[:4], b[:4], atol=1e-4)
    assert pair_iou(found[None], b[None])[0] > 1 - 1e-4


def test_the_smallest_rectangle_beside_opencvs_and_all_angles(rng):
  for _ in range(20):
    p = rng.normal(0, 1, (12, 2)) @ rng.normal(0, 20, (2, 2)) + 300
    found = min_area_rectangle(p)
    _, (w, h), _ = cv2.minAreaRect(p.astype(np.float32))
    assert found[2] * found[3] == pytest.approx(w * h, rel=1e-3)
    angles = np.linspace(0, np.pi, 721)
    c, s = np.cos(angles), np.sin(angles)
    u, v = p @ np.array([c, s]), p @ np.array([-s, c])
    assert found[2] * found[3] <= (np.ptp(u, 0) * np.ptp(v, 0)).min() * (1 + 1e-5)
    local = (p - found[:2]) @ np.array([[np.cos(found[4]), -np.sin(found[4])], [np.sin(found[4]), np.cos(found[4])]])
    assert (np.abs(local) <= found[2:4] / 2 + 1e-4).all()


@pytest.mark.parametrize("points", [[[1, 1]], [[1, 1], [5, 5], [9, 9]], [[2, 3]] * 6, [[0, 0], [4, 0], [8, 1e-9]]])
def test_a_line_has_no_rectangle(points):
  assert min_area_rectangle(np.array(points, float)) is None


def test_many_points_take_bounded_memory():
  angle = np.linspace(0, 2 * np.pi, 20_000)
  found = min_area_rectangle(np.stack([50 + 30 * np.cos(angle), 40 + 30 * np.sin(angle)], 1))
  np.testing.assert_allclose(found[:4], [50, 40, 60, 60], rtol=1e-3)


def test_the_corners_of_a_masks_pixels():
  mask = np.zeros((9, 12), bool)
  mask[2, 3:5] = mask[3, 3:9] = mask[6, 1] = True
  p = edge_points(mask)
  want = np.array([[x + i, y + j] for y, x in zip(*np.nonzero(mask), strict=True) for i in (0, 1) for j in (0, 1)])
  hull = [cv2.convexHull(v.astype(np.float32))[:, 0] for v in (p, want)]
  np.testing.assert_array_equal(*[h[np.lexsort(h.T)] for h in hull])
  np.testing.assert_allclose(upright(min_area_rectangle([[2, 1], [6, 1], [6, 3], [2, 3]])), [[2, 1, 6, 3]], atol=1e-6)

"""TuSimple's accuracy, by hand-made cases whose figures its definition gives."""

from types import SimpleNamespace

import numpy as np
import pytest

from openpilot.selfdrive.modeld.fair.heads.ground import view_ground
from openpilot.tools.fair.evaluation.lane_lines import (
  LaneLines,
  at_rows,
  instance_lines,
  nearest_lines,
  published,
  tusimple,
)

ROWS = np.arange(0.0, 100.0, 10.0)
NAN = float("nan")


def upright(x: float) -> np.ndarray:
  return np.full(10, x)


def test_what_is_right_and_what_is_not():
  truth = [upright(100.0), upright(300.0)]
  assert tusimple(truth, truth, ROWS) == (1.0, 0.0, 0.0)
  assert tusimple([], truth, ROWS) == (0.0, 0.0, 1.0)
  assert tusimple([upright(119.9), upright(320.1)], truth, ROWS) == (0.5, 0.5, 0.5)  # 20 pixels are not within 20
  assert tusimple([upright(100.0)], [], ROWS) == (0.0, 1.0, 0.0)


def test_rows_without_the_line_count_where_both_lack_it():
  truth = upright(100.0)
  truth[:4] = NAN
  found = upright(100.0)
  assert tusimple([found], [truth], ROWS) == (pytest.approx(0.6), 1.0, 1.0)  # too long: four rows are wrong
  found = upright(100.0)
  found[:5] = NAN
  assert tusimple([found], [truth], ROWS) == (pytest.approx(0.9), 0.0, 0.0)


def test_a_slanted_line_is_given_more_room():
  slanted = 2.0 * ROWS + 50  # the slope 2 in x: 20 / cos(atan 2) = 44.7 pixels
  assert tusimple([slanted + 44.0], [slanted], ROWS) == (1.0, 0.0, 0.0)
  assert tusimple([slanted + 45.0], [slanted], ROWS) == (0.0, 1.0, 1.0)


def test_of_five_lines_the_worst_is_forgiven_and_too_many_are_none():
  truth = [upright(100.0 * k) for k in range(1, 6)]
  assert tusimple(truth[:4], truth, ROWS) == (1.0, 0.0, 0.0)
  assert tusimple(truth[:3], truth, ROWS) == (0.75, 0.0, 0.25)
  assert tusimple([upright(k * 50.0) for k in range(4)], truth[:1], ROWS) == (0.0, 0.0, 1.0)


def test_lines_of_other_rows_are_refused():
  with pytest.raises(ValueError, match="10 rows"):
    tusimple([np.zeros(9)], [upright(1.0)], ROWS)


def test_pictures_are_averaged():
  a, b = LaneLines(), LaneLines()
  assert a.add([upright(100.0)], [upright(100.0)], ROWS) == 0
  assert b.add([], [upright(100.0), upright(300.0)], ROWS) == 1
  assert np.isnan(b.add([upright(5.0)], [], ROWS))  # no truth: counts nowhere
  assert LaneLines.pooled([a, b]).result() == {
    "lines_accuracy": 0.5,
    "lines_false_positive": 0.0,
    "lines_false_negative": 0.5,
  }


def test_lines_of_masks_and_points():
  mask = np.zeros((100, 200), np.uint8)
  mask[20:60, 50:53], mask[30:, 150] = 20, 70
  first, second = instance_lines(mask, ROWS)
  assert np.array_equal(first, [NAN, NAN, 51, 51, 51, 51, NAN, NAN, NAN, NAN], equal_nan=True)
  assert np.array_equal(second, [NAN] * 3 + [150] * 7, equal_nan=True)
  points = np.array([[210.0, 90.0], [10.0, 10.0], [NAN, 50.0]])
  assert np.array_equal(
    at_rows(points, ROWS, 200), [NAN, 10, 35, 60, 85, 110, 135, 160, 185, NAN], equal_nan=True
  )  # the last lies outside
  assert np.isnan(at_rows(points[:1], ROWS, 200)).all()


def test_a_published_line_is_its_curve_as_far_as_it_is_seen():
  ground = view_ground("medmodel", 1.2)
  line = SimpleNamespace(prob=0.9, roadX=[8.0, 20.0, 40.0], visibility=[0.9, 0.8, 0.1], fit=[1.8, 0.0, 0.0, 0.0])
  weak = SimpleNamespace(prob=0.1, roadX=[8.0], visibility=[0.9], fit=[0.0] * 4)
  (found,) = published(SimpleNamespace(lines=[line, weak]), ground)
  road = ground.road(found)
  assert (
    np.allclose(road[:, 1], 1.8, atol=1e-6) and np.isclose(road[:, 0].max(), 20) and np.isclose(road[:, 0].min(), 2)
  )


def test_the_lines_beside_the_car_are_the_nearest():
  lines = [np.array([[5.0, y, 1.2], [10.0, y, 1.2], [60.0, 0.0, 1.2]]) for y in (-9.0, 1.8, -5.4, 5.4, -1.8)]
  assert [x[0, 1] for x in nearest_lines(lines, 3)] == [1.8, -1.8, -5.4]

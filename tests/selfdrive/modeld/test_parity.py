import numpy as np
import pytest

from openpilot.selfdrive.modeld.fair.parity import difference, worst

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
  ("values", "want"), [([], 0), ([1, 3, 2], 3), ([NAN, 1], INF), ([1, NAN], INF), ([NAN], INF), ([INF, NAN, 2], INF)]
)
def test_what_is_not_a_number_is_the_worst_wherever_it_stands(values, want):
  assert worst(values) == worst(reversed(values)) == want


def test_difference_is_in_parts_of_the_largest_value():
  want = np.array([[-4.0, 1], [0, 2]], np.float32)
  assert difference(want, want) == 0
  assert difference(want + np.array([[0, 0], [-1, 0]], np.float32), want) == pytest.approx(0.25)
  assert difference(np.zeros(3, np.float32), np.zeros(3, np.float32)) == 0 and difference(np.zeros(0), np.zeros(0)) == 0
  # 1e-6 is the least that a value counts as large
  assert difference(np.full(2, 1e-6), np.zeros(2)) == pytest.approx(1)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_or_not_of_the_shape_is_infinitely_far(value):
  x, bad = np.ones(3, np.float32), np.array([1, value, 1], np.float32)
  assert difference(bad, x) == difference(x, bad) == difference(bad, bad) == difference(x, x[:2]) == INF

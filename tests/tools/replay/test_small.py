"""Small pieces of replay and compare-logs, by hand."""

import math

import pytest

from openpilot.cereal import messaging
from openpilot.tools.replay.compare_logs import differences
from openpilot.tools.replay.replay import with_time


def test_a_message_at_another_time():
  m = messaging.new_message("carState", valid=True, logMonoTime=5)
  m.carState.vEgo = 7.5
  event = messaging.log_from_bytes(with_time(m.to_bytes(), 2**60 + 3))
  assert (event.logMonoTime, event.valid, event.carState.vEgo) == (2**60 + 3, True, 7.5)
  assert len(with_time(m.to_bytes(), 9)) == len(m.to_bytes())
  several = bytes([1, 0, 0, 0]) + bytes(4 * 3)  # two memory segments: three words of lengths and their filling
  dat = several + bytes(8) + (5).to_bytes(8, "little") + bytes(8)
  assert with_time(dat, 9) == several + bytes(8) + (9).to_bytes(8, "little") + bytes(8)


@pytest.mark.parametrize(
  ("a", "b", "same"),
  [
    (1.0, 1.0, True),
    (0.0, -0.0, True),
    (1.0, 1.0019, True),
    (1.0, 1.0021, False),
    (0.0, 0.0009, True),
    (0.0, 0.0011, False),
    (math.nan, math.nan, True),
    (math.nan, 1.0, False),
    (math.inf, math.inf, True),
    (math.inf, -math.inf, False),
    (math.inf, 1.0, False),
    (1.0, math.inf, False),
    (1, 1, True),
    (1, 2, False),
    ("a", "b", False),
    ([1.0, 2.0], [1.0, 2.0], True),
    ([1.0], [1.0, 2.0], False),
    ({"x": 1.0}, {"x": 9.0}, False),
  ],
)
def test_what_counts_as_a_difference(a, b, same):
  """Up to a thousandth of 1 and of the number together."""
  assert (list(differences(a, b, "", 1e-3)) == []) is same

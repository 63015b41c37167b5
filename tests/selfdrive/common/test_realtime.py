"""The loop's keeper of time, on a clock of the test's own."""

import time

import pytest

from openpilot.common.realtime import Ratekeeper


@pytest.mark.parametrize(
  ("threshold", "late", "lags"), [(None, 5.0, False), (0.0, 0.001, True), (0.1, 0.05, False), (0.1, 0.15, True)]
)
def test_a_turn_lags_where_it_is_later_than_the_threshold(monkeypatch, threshold, late, lags):
  """At 20 Hz the first turn ends 50 ms after the start; None: nobody wants to hear of it."""
  monkeypatch.setattr(time, "monotonic", lambda: 100.0)
  keeper = Ratekeeper(20, threshold)
  monkeypatch.setattr(time, "monotonic", lambda: 100.05 + late)
  assert keeper.monitor_time() is lags and keeper.lagging and keeper.frame == 1
  assert keeper.remaining == pytest.approx(-late) and keeper.next_frame_time == pytest.approx(100.1)


def test_after_a_pause_it_goes_on_from_now(monkeypatch):
  now, slept = [100.0], []
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  monkeypatch.setattr(time, "sleep", slept.append)
  keeper = Ratekeeper(20)
  now[0] = 100.02
  assert not keeper.keep_time() and slept == [pytest.approx(0.03)]
  now[0] = 100.5  # late by less than a second: it catches up
  assert keeper.keep_time() and keeper.next_frame_time == pytest.approx(100.15) and len(slept) == 1
  now[0] = 109.0
  assert keeper.keep_time() and keeper.next_frame_time == pytest.approx(109.05) and len(slept) == 1

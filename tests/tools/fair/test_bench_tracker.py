"""The bench that judges point trackers: its measures, and what it says of trackers that are not here."""

import argparse

import numpy as np
import pytest

pytest.importorskip("torch")

from openpilot.tools.fair.evaluation.metrics import Tracks
from tests.bench.bench_tracker import add, trackers_here


def test_trackers_are_judged_by_tap_vid():
  """Truth with a known mistake: a third of the points 3 px off (of 256x256: x of the view is halved), and one in four
  said to be hidden."""
  r = np.random.default_rng(0)
  true, seen = r.uniform(50, 200, (5, 12, 2)), r.uniform(size=(5, 12)) < 0.8
  seen[0] = True
  acc = Tracks()
  add(acc, true, seen, true, seen)
  assert acc.result()["average_jaccard"] == acc.result()["delta_avg"] == acc.result()["occlusion_accuracy"] == 1
  off, said = true.copy(), np.ones_like(seen)
  off[:, :4, 0] += 6.0
  said[:, ::4] = False
  acc = Tracks()
  add(acc, off, said, true, np.ones_like(seen))
  got = acc.result()
  # of 12 points 4 are off: those count at 4, 8 and 16 px only. 9 are said to be seen, of which 3 are off
  assert got["delta_avg"] == pytest.approx((2 * 8 / 12 + 3) / 5) and got["occlusion_accuracy"] == pytest.approx(9 / 12)
  assert got["average_jaccard"] == pytest.approx((2 * 6 / (12 + 3) + 3 * 9 / 12) / 5)


def test_who_cannot_run_is_said(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.delenv("FAIR_WEIGHTS", raising=False)
  here = trackers_here(argparse.Namespace(weights=None, iters=8, scale=1, accept_license=[]))
  out = capsys.readouterr().out
  assert list(here) == ["Lucas-Kanade"]
  assert (
    "raft-tracker: left out, no weights 'raft-small.pth'" in out
    and "cotracker2: left out, teacher 'cotracker2' is under the license CC-BY-NC-4.0" in out
  )

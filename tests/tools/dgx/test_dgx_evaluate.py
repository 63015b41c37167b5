"""What drives are judged by: errors of paths, rivals, intervals."""

import numpy as np
import pytest
from driving_fixture import T

from openpilot.tools.dgx import hardware
from openpilot.tools.dgx.training.evaluate import accelerated, compare, drives, errors_of, interval
from openpilot.tools.dgx.training.paths import DrivenPath, constant_curvature, path_error
from openpilot.tools.dgx.training.reference_turn import SETTLING
from openpilot.tools.dgx.training.teacher import DrivingTeacher
from openpilot.tools.lib.errors import UserError


def test_path_errors():
  plan, truth = np.zeros((2, 33, 15)), np.zeros((2, 33, 15))
  plan[..., 0], truth[..., 0] = 10 * T, 12 * T
  truth[1, 20:] = np.nan
  assert path_error(plan, truth, 2.0)[0] == pytest.approx(4.0, abs=1e-9)
  assert np.isnan(path_error(plan, truth, 9.0)[1]) and path_error(plan, truth, 1.0)[1] == pytest.approx(2.0)
  straight = constant_curvature(np.array([10.0, 0, 0, 0, 0, 0]))
  assert np.allclose(straight[:, 0], 10 * T) and np.allclose(straight[:, 1], 0)
  arc = constant_curvature(np.array([10.0, 0, 0, 0, 0, 0.2]))
  assert np.allclose(arc[:, 0], 50 * np.sin(0.2 * T)) and np.allclose(arc[:, 1], 50 * (1 - np.cos(0.2 * T)))


def test_intervals_hold_the_truth_as_often_as_they_say():
  """Frames of a block are alike: intervals by frames would be far too narrow. Of 200 means of 40 blocks, about 95% of
  the intervals hold the truth."""
  r = np.random.default_rng(0)
  blocks = np.repeat(np.arange(40), 20)
  held = 0
  for k in range(200):
    values = r.normal(3, 1, 40)[blocks] + r.normal(0, 0.1, 800)
    mean, low, high = interval(values, blocks, k)
    held += low <= 3 <= high
    assert low <= mean <= high
  assert 180 <= held <= 198
  assert np.isnan(interval(np.full(3, np.nan), np.zeros(3))).all()


def test_evaluation_compares_on_the_same_frames(data, base):
  clips = drives(data, 4)
  teacher = DrivingTeacher(base, device="cpu")
  errors, blocks = errors_of({"a": teacher, "b": teacher}, clips, 1, progress=False)
  assert set(errors) == {"constant curvature", "and acceleration", "a", "b"} and len(blocks) == len(
    errors["a"]
  ) == 3 * len(clips)
  result = compare(errors, blocks, "a")
  assert all(v == 0 for row in result["gain"]["b"] for v in row)
  assert result["error"]["constant curvature"][0][0] < 0.01 < result["error"]["a"][0][0]  # arcs: the rival knows all
  with pytest.raises(UserError, match="no 99 steps"):
    drives(data, 99)


def test_the_rival_that_accelerates_knows_the_drive_by_its_speeds():
  """A car on an arc that gains 1.5 m/s^2, less and less: known from the third step on, half after one, not at all
  before."""
  t = np.arange(0, 14, 0.2)
  v = 8 + 1.5 * SETTLING * (1 - np.exp(-t / SETTLING))
  pose = np.stack([v, *[0 * v] * 4, 0.02 * v], -1)
  driven = DrivenPath(t, pose[:, :3], pose[:, 3:]).plan(t[:15])
  plans = {"accelerated": accelerated(pose[:15]), "constant": constant_curvature(pose[:15])}
  off = {k: path_error(p, driven, 2.0) for k, p in plans.items()}
  assert (off["accelerated"][2:] < 0.25 * off["constant"][2:]).all()
  assert (
    off["accelerated"][0] == pytest.approx(off["constant"][0], rel=1e-3)
    and off["accelerated"][1] < 0.75 * off["constant"][1]
  )
  assert accelerated(pose[:1]).shape == (1, 33, 15)


def test_hardware_says_something():
  d = hardware.describe()
  assert d["memory_gb"] > 0 and d["cpus"] >= 1 and str(d["cpus"]) in hardware.one_line()

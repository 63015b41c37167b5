"""The path really driven: integrated against exact motion; desires, and what a log says between its samples."""

import numpy as np
import pytest

from openpilot.common.transformations.orientation import rot_from_euler
from openpilot.tools.dgx.training.constants import T_IDXS
from openpilot.tools.dgx.training.drive_log import DriveLog, between, held, motion_of, pulses
from openpilot.tools.dgx.training.paths import DrivenPath, rodrigues
from openpilot.tools.sim.world import World

T = np.array(T_IDXS)
OPTIONS = {
  "camera": "road",
  "fps": 20,
  "min_speed": 0.0,
  "engaged": False,
  "gps_box": None,
  "traffic": "log",
  "focal": None,
}


def test_rodrigues_is_the_matrix_exponential():
  scipy_linalg = pytest.importorskip("scipy.linalg")
  r = np.random.default_rng(0)
  for scale in (1e-9, 1e-4, 0.3, 3.0):
    phi = r.normal(0, scale, 3)
    k = np.array([[0, -phi[2], phi[1]], [phi[2], 0, -phi[0]], [-phi[1], phi[0], 0]])
    turn, carry = rodrigues(phi[None])
    # the exponential of [[K, I], [0, 0]] holds both in its upper rows
    both = scipy_linalg.expm(np.block([[k, np.eye(3)], [np.zeros((3, 6))]]))
    assert np.abs(turn[0] - both[:3, :3]).max() < 1e-10 and np.abs(carry[0] - both[:3, 3:]).max() < 1e-10


def circle(v: float, w: float, t: np.ndarray) -> np.ndarray:
  """(N, 15) exact plan of a circle to the right (w > 0)."""
  a = w * t
  zero = np.zeros_like(t)
  return np.stack(
    [
      v / w * np.sin(a),
      v / w * (1 - np.cos(a)),
      zero,
      v * np.cos(a),
      v * np.sin(a),
      zero,
      -v * w * np.sin(a),
      v * w * np.cos(a),
      zero,
      zero,
      zero,
      (a + np.pi) % (2 * np.pi) - np.pi,
      zero,
      zero,
      zero + w,
    ],
    -1,
  )


@pytest.mark.parametrize("hertz", [20, 5, 2])
def test_circle_is_exact_at_every_rate(hertz):
  v, w = 14.0, -0.12
  t = np.arange(0, 30, 1 / hertz)
  path = DrivenPath(t, np.tile([v, 0, 0], (len(t), 1)), np.tile([0, 0, w], (len(t), 1)))
  plan = path.plan(np.array([3.21, 7.777]))
  exact = circle(v, w, T)
  assert np.abs(plan[..., :3] - exact[:, :3]).max() < 1e-4  # float32 of 140 m
  assert np.abs(plan[..., 3:6] - exact[:, 3:6]).max() < 1e-4
  # a difference over half a second: v w (1 - sinc), 2e-4 of 1.7 m/s^2
  assert np.abs(plan[..., 6:9] - exact[:, 6:9]).max() < 1e-3
  assert np.abs(plan[..., 9:] - exact[:, 9:]).max() < 1e-5


def test_braking_straight_in_a_tilted_frame():
  """Constant braking, and a constant roll rate, which must turn nothing but the frame."""
  t = np.arange(0, 20, 0.05)
  speed = 20 - 0.8 * t
  path = DrivenPath(t, np.stack([speed, 0 * t, 0 * t], -1), np.tile([0.05, 0, 0], (len(t), 1)))
  plan = path.plan(np.array([1.0]))[0]
  assert np.abs(plan[:, 0] - (19.2 * T - 0.4 * T**2)).max() < 1e-3
  assert np.abs(plan[:, 6] + 0.8).max() < 1e-4 and np.abs(plan[:, [1, 2]]).max() < 1e-6
  assert np.abs(plan[:, 9] - 0.05 * T).max() < 1e-6


def test_what_the_log_does_not_say_is_nan():
  t = np.concatenate([np.arange(0, 5, 0.05), np.arange(7, 12, 0.05)])  # two seconds are missing
  one = np.tile([10.0, 0, 0], (len(t), 1))
  path = DrivenPath(t, one, 0 * one)
  plan = path.plan(np.array([0.0, 4.0, 6.0, 7.5, -1.0]))
  ends = [4.95, 4.95, None, 11.95, None]
  for row, t0, end in zip(plan, [0.0, 4.0, 6.0, 7.5, -1.0], ends, strict=True):
    known = (t0 + T <= end) if end is not None else np.zeros(33, bool)
    assert (np.isfinite(row).all(1) == known).all() and (np.isnan(row).all(1) == ~known).all()
  assert np.isnan(DrivenPath(np.zeros(1), one[:1], one[:1]).plan(np.zeros(2))).all()
  assert np.isnan(DrivenPath(np.zeros(0), np.zeros((0, 3)), np.zeros((0, 3))).state(np.zeros(2))[0]).all()


def test_simulated_motion():
  """The simulator's world says exactly where its car is; speeds and turn rates by small differences of that, sampled as
  in logs, must lead back there."""
  world = World(5, "day", seconds=40)
  h = 1e-4

  def motion(t: float) -> np.ndarray:
    (x0, y0, a0), (x1, y1, a1) = world.pose(t - h), world.pose(t + h)
    a = (a0 + a1) / 2
    dx, dy = (x1 - x0) / (2 * h), (y1 - y0) / (2 * h)
    return np.array([np.cos(a) * dx + np.sin(a) * dy, -np.sin(a) * dx + np.cos(a) * dy, 0, 0, 0, (a1 - a0) / (2 * h)])

  for hertz, bound in (
    (20, 0.05),
    (5, 0.4),
  ):  # the world's road is interpolated between points, so its turn rate has steps that samples miss
    t = np.arange(1, 32, 1 / hertz)
    m = np.array([motion(x) for x in t])
    plan = DrivenPath(t, m[:, :3], m[:, 3:]).plan(np.array([2.013, 11.4, 20.25]))
    for row, t0 in zip(plan, (2.013, 11.4, 20.25), strict=True):
      x, y, a = world.pose(t0)
      truth = np.array([world.pose(t0 + dt)[:2] for dt in T]) - (x, y)
      truth = np.stack(
        [np.cos(a) * truth[:, 0] + np.sin(a) * truth[:, 1], -np.sin(a) * truth[:, 0] + np.cos(a) * truth[:, 1]], -1
      )
      assert truth[-1, 0] > 50
      assert np.linalg.norm(row[:, :2] - truth, axis=1).max() < bound


# *** logs ***


def test_device_velocities_are_turned_into_the_calibrated_frame():
  rpy = np.array([0.01, -0.03, 0.05])
  device_from_calib = rot_from_euler(rpy)
  log = DriveLog()
  for k in range(5):
    log.motion.append((float(k), *(device_from_calib @ [12.0, 0, 0]), *(device_from_calib @ [0, 0, 0.2])))
  motion, source, hertz = motion_of([log], rpy)
  assert source == "deviceMotion" and hertz == 1.0
  assert np.abs(motion[:, 1:] - [12, 0, 0, 0, 0, 0.2]).max() < 1e-12
  odometry = DriveLog(odometry=[(0.0, 12, 0, 0, 0, 0, 0.2), (0.5, 12, 0, 0, 0, 0, 0.2)])  # is in that frame already
  assert motion_of([odometry], rpy)[1:] == ("cameraOdometry", 2.0)
  assert motion_of([DriveLog()], rpy)[1] == "none"


def test_desire_pulses():
  t = np.arange(0, 5, 0.05)
  code = np.array([[0.0, 0], [1.0, 3], [2.0, 3], [2.5, 0], [3.0, 4], [3.6, 3], [4.0, 0]])
  p = pulses(t, code)
  at = [(int(np.flatnonzero(t >= s)[0]), k) for s, k in ((1.0, 3), (3.0, 4), (3.6, 3))]
  assert [(int(i), int(k)) for i, k in zip(*np.nonzero(p), strict=True)] == at
  assert not pulses(t, np.zeros((0, 2))).any()
  assert not pulses(t, np.array([[-0.5, 3.0], [0.5, 3.0], [1.5, 0]])).any()  # began before this segment


def test_blinkers_stand_in_for_the_lane_change_state():
  log = DriveLog(car=[(0.0, 15, 0, 0, 0, 0), (0.1, 15, 0, 0, 1, 0), (0.2, 15, 0, 0, 1, 1), (0.3, 5, 0, 0, 0, 1)])
  rows, source = log.desires()
  assert source == "carState blinkers" and rows[:, 1].tolist() == [
    0,
    3,
    0,
    2,
  ]  # lane change, hazard lights, slow: a turn
  log.desire["drivingModelData"] = [(0.0, 4)]
  assert log.desires()[1] == "drivingModelData.meta.laneChangeState"


def test_last_and_interpolated_values():
  rows = np.array([[1.0, 10.0], [2.0, 20.0]])
  assert held(np.array([0.5, 1.0, 1.9, 4.1]), rows)[:, 0].tolist()[1:3] == [10, 10]
  assert np.isnan(held(np.array([0.5, 4.1]), rows)).all()
  b = between(np.array([-2.0, 1.5, 9.0]), rows)[:, 0]
  assert np.isnan(b[[0, 2]]).all() and b[1] == 15
  assert np.isnan(between(np.array([1.0]), np.zeros((0, 2)))).all()

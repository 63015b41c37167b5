"""Who comes back into sight, in little scenes that are known exactly: boxes on a flat road, seen from a moving car."""

import numpy as np
import pytest

from openpilot.selfdrive.modeld.fair.heads.ground import view_ground
from openpilot.selfdrive.modeld.fair.heads.objects import Detections
from openpilot.selfdrive.modeld.fair.recall import (
  Course,
  along,
  median,
  DT,
  HEIGHT,
  KEPT,
  WIDTH,
  ACCELERATION,
  SPEED,
  Recall,
  believed,
  box_noise,
  fit,
  free_edges,
  project,
)
from openpilot.selfdrive.modeld.fair.tracking import MAX_LOST, REMEMBERED, UNDECIDED, Tracker

VIEW = (256, 512)
GROUND = view_ground("medmodel", 1.22)
CAR = (1.8, 1.5)  # m wide and high


def box(x, y, size=CAR, view=True):
  """Where the rear of a thing stands x m ahead and y m to the right -> its box."""
  k = GROUND.f / x
  out = np.array([y - size[0] / 2, GROUND.height - size[1], y + size[0] / 2, GROUND.height]) * k
  out += [GROUND.cx, GROUND.cy, GROUND.cx, GROUND.cy]
  return np.clip(out, -0.5, [511.5, 255.5] * 2) if view else out


def cut(boxes, front):
  """What is to be seen of boxes, which are behind `front`: None where that is less than a third of the width."""
  out = []
  for b in boxes:
    x0, y0, x1, y1 = b
    if front is not None and front[0] < x1 and x0 < front[2]:
      x0, x1 = (front[2], x1) if front[0] <= x0 else (x0, front[0])
    out.append(np.array([x0, y0, x1, y1]) if x1 - x0 > (b[2] - b[0]) / 3 else None)
  return out


def see(boxes):
  b = np.array(boxes, np.float32).reshape(-1, 4)
  return Detections(["vehicle"], b, np.full(len(b), 0.9, np.float32), np.zeros(len(b), np.int64), None, None)


def drive(place, frames, speed=15.0, yaw_rate=0.0, noise=0.3, told=None, seed=0):
  """place(t) -> things as {name: (x, y)} in the order from near to far, and the box in front or None. -> name -> ids
  that its boxes were told with, frame by frame, None where it was not told or not seen."""
  tracker, r = Tracker(["vehicle"], VIEW), np.random.default_rng(seed)
  out = {}
  for t in range(frames):
    things, front = place(t * DT)
    shown = cut([box(*p) for p in things.values()], front)
    seen = {n: b + r.normal(0, noise, 4) for n, b in zip(things, shown, strict=True) if b is not None}
    every = [*seen.values()] + ([] if front is None else [np.clip(front, -0.5, [511.5, 255.5] * 2)])
    said = tracker.update(t, see(every), GROUND, None, speed, yaw_rate)
    for name in things:
      at = [] if name not in seen else np.flatnonzero(np.abs(said.boxes - seen[name]).max(1) < 1e-3)
      out.setdefault(name, []).append(int(said.ids[at[0]]) if len(at) else None)
  return out


def truck(t, begin, hidden=2.0):
  """A lorry that crosses from the left 8 m ahead, 9 m long, so that it hides each direction for `hidden` seconds."""
  y = -9.5 + 9 / hidden * (t - begin)
  return box(8, y, (9.0, 3.5), view=False) if abs(y) < 9.5 else None


def ids(told):
  return [i for i in told if i is not None]


def test_a_car_that_brakes_behind_a_lorry_keeps_its_name():
  """Hidden for 40 frames, it brakes by 1.5 m/s^2 as it did before; another car comes into sight where it would be by
  its speed alone, in the lane beside."""

  def place(t):
    braked = max(0.0, t - 1.0)
    things = {"it": (36 - 0.75 * braked**2, 0.0)}
    if t > 3.5:
      things["other"] = (34.0, 3.4)
    return things, truck(t, 1.0)

  told = drive(place, 120)
  gap = [k for k, i in enumerate(told["it"]) if i is None]
  assert 36 <= len(gap) <= 46 and len(set(ids(told["it"]))) == 1
  assert len(set(ids(told["other"]))) == 1 and told["other"][-1] != told["it"][-1]


@pytest.mark.parametrize("seed", range(3))
def test_two_cars_that_change_places_out_of_sight_are_not_taken_for_each_other(seed):
  """Alike, 30 m ahead; one goes to the right, one to the left, and behind the lorry they cross."""

  def place(t):
    return {"a": (29.0, -2.4 + 0.95 * t), "b": (31.0, 2.6 - 0.95 * t)}, truck(t, 1.0)

  told = drive(place, 125, seed=seed)
  for name in "ab":
    assert told[name][20] is not None and told[name][-1] == told[name][20]
  assert told["a"][-1] != told["b"][-1]


def test_who_left_for_good_is_not_the_next_one_that_comes():
  """A car turns off behind the lorry; where the lorry was, another one stands, 12 m nearer and a lane to the left."""

  def place(t):
    return ({"gone": (40.0, 1.0)} if t < 2.0 else {"new": (27.0, -2.5)}), truck(t, 1.0)

  told = drive(place, 120)
  assert len(set(ids(told["gone"]))) == 1 and len(set(ids(told["new"]))) == 1
  assert told["new"][-1] != told["gone"][20]


@pytest.mark.parametrize("known", [True, False])
def test_the_cars_own_turn_is_taken_out(known):
  """The car bends to the right while a parked one is hidden: by the log's motion it is found where it must be now."""
  speed, rate, seen, hidden = 8.0, 0.16, 30, 25
  tracker = Tracker(["vehicle"], VIEW)
  x, y, heading = 0.0, 0.0, 0.0
  for t in range(seen + hidden + UNDECIDED + 1):
    if t >= seen:
      heading += rate * DT
    x, y = x + speed * DT * np.cos(heading), y + speed * DT * np.sin(heading)
    c, s = np.cos(heading), np.sin(heading)
    dx, dy = 45.0 - x, 2.0 - y
    there = [box(c * dx + s * dy, c * dy - s * dx)] if not seen <= t < seen + hidden else []
    motion = (speed, rate if t >= seen else 0.0) if known else ()
    said = tracker.update(t, see(there), GROUND, None, *motion)
    if t == seen - 1:
      first = said.ids.tolist()
  assert len(first) == 1 and (first[0] in said.ids[said.visibility > 0]) == known


def test_what_may_be_someone_who_was_hidden_is_told_once_that_is_decided():
  """Until then who is out of sight is told in its place; after at most UNDECIDED frames it is seen again, or new."""
  tracker = Tracker(["vehicle"], VIEW)
  near, far = box(18, -1.6), box(30, 0.0)
  for t in range(20):
    tracker.update(t, see([near, far]), GROUND, None, 15.0, 0.0)
  for t in range(20, 50):
    tracker.update(t, see([]), GROUND, None, 15.0, 0.0)
  # between the two: it may be either
  between, told = box(23.5, -0.8), []
  for t in range(50, 50 + UNDECIDED + 1):
    out = tracker.update(t, see([between]), GROUND, None, 15.0, 0.0)
    told.append([int(i) for i, v in zip(out.ids, out.visibility, strict=True) if v > 0])
    assert len(out.ids) >= 1 and (out.ids > 0).all()
  assert told[0] == [] and len(told[-1]) == 1 and all(x in ([], told[-1]) for x in told)


def test_it_is_told_for_two_seconds_and_remembered_for_three():
  for away, same in ((MAX_LOST + 5, True), (REMEMBERED + 1, False)):
    tracker = Tracker(["vehicle"], VIEW)
    for t in range(20):
      tracker.update(t, see([box(30, 0)]), GROUND, None, 15.0, 0.0)
    for t in range(20, 20 + away):
      out = tracker.update(t, see([]), GROUND, None, 15.0, 0.0)
      assert len(out.ids) == (t < 20 + MAX_LOST)
    for t in range(20 + away, 20 + away + UNDECIDED + 1):
      out = tracker.update(t, see([box(30, 0)]), GROUND, None, 15.0, 0.0)
    assert (out.ids.tolist() == [1]) == same and len(out.ids) == 1


# *** its parts ***


def poses(speed, rate, n=KEPT):
  """(n, 3) of a car that drives an arc; the last is at the origin and looks along x."""
  t = (np.arange(n) - n + 1) * DT
  h = rate * t
  return np.stack(
    [speed * np.sin(h) / rate if rate else speed * t, speed * (1 - np.cos(h)) / rate if rate else 0 * t, h], axis=-1
  ), t


def test_derivatives_are_those_of_differences():
  r = np.random.default_rng(1)
  pose, t = poses(12.0, 0.2, 5)
  state = np.array([[35.0, 2.0, 9.0, -1.0, 0.5, 0.3, 1.8, 1.5], [60.0, -4.0, -12.0, 0.5, 0.0, -1.0, 2.4, 3.0]])
  bend = r.normal(0, 0.01, (2, 5))
  args = Course(np.broadcast_to(t, (2, 5)), np.broadcast_to(pose, (2, 5, 3)), bend), GROUND
  j = project(state, *args)[1]
  for k in range(8):
    step = np.zeros(8)
    step[k] = 1e-5
    difference = (project(state + step, *args)[0] - project(state - step, *args)[0]) / 2e-5
    np.testing.assert_allclose(j[..., k], difference, rtol=1e-5, atol=1e-5)
  # one that stands at the origin's height, straight on, seen from there
  here = Course(np.zeros((1, 1)), np.zeros((1, 1, 3)), np.zeros((1, 1)))
  np.testing.assert_allclose(
    project(np.array([[30.0, 1.0, 0, 0, 0, 0, *CAR]]), here, GROUND)[0][0, 0], box(30.0, 1.0, view=False)
  )


def test_fit_is_the_least_squares_of_scipy():
  """The same sum of squares with its priors, minimized by another program from another start."""
  optimize = pytest.importorskip("scipy.optimize")
  r = np.random.default_rng(2)
  pose, t = poses(14.0, 0.1)
  true = np.array([32.0, 1.5, 12.0, 1.2, -0.8, 0.4, 1.85, 1.45])
  t, pose, bend = t[None], pose[None], np.zeros((1, KEPT))
  boxes = project(true[None], Course(t, pose, bend), GROUND)[0]
  boxes = boxes + r.normal(0, 0.3, boxes.shape)
  free = np.ones(boxes.shape, bool)
  state, cov = fit(boxes, free, t, pose, bend, GROUND, np.zeros(1))
  sigma = box_noise(boxes)[..., None]
  mean = np.array([0, 0, 0, 0, 0, 0, WIDTH[0], HEIGHT[0]])
  deviation = np.array([1e9, 1e9, *SPEED, *ACCELERATION, WIDTH[1], HEIGHT[1]])

  def residuals(x):
    off = (project(x[None], Course(t, pose, bend), GROUND)[0] - boxes) / sigma
    return np.concatenate([off.ravel(), (x - mean) / deviation])

  other = optimize.least_squares(residuals, true + [5, 1, 3, 1, 0, 0, 0.3, 0.3], x_scale=np.sqrt(np.diag(cov[0])))
  np.testing.assert_allclose(state[0], other.x, atol=1e-3 * np.sqrt(np.diag(cov[0])).max() + 1e-3)
  np.testing.assert_allclose(cov[0], np.linalg.inv(other.jac.T @ other.jac), rtol=1e-2, atol=1e-4)


def test_a_few_wrong_boxes_do_not_lead_it_astray():
  pose, t = poses(14.0, 0.0)
  true = np.array([30.0, 0.0, 14.0, 0.0, 0.0, 0.0, *CAR])
  t, pose, bend = t[None], pose[None], np.zeros((1, KEPT))
  boxes = project(true[None], Course(t, pose, bend), GROUND)[0]
  boxes[0, ::9] += [40, 0, 40, 0]
  state, _ = fit(boxes, np.ones(boxes.shape, bool), t, pose, bend, GROUND, np.zeros(1))
  assert abs(state[0, 1]) < 0.15 and abs(state[0, 0] - 30) < 1


@pytest.mark.parametrize(
  ("front", "want"),
  [
    ((90, 80, 115, 220), [0, 1, 1, 1]),  # left edge
    ((150, 80, 210, 220), [1, 1, 0, 1]),  # right edge
    ((90, 120, 210, 220), [0, 1, 0, 0]),  # all of the lower half
    ((120, 125, 135, 220), [1, 1, 1, 1]),  # in the middle, narrow
    ((90, 80, 120, 140), [1, 1, 1, 1]),  # farther away: it does not reach as low
    ((np.nan,) * 4, [1, 1, 1, 1]),
  ],
)
def test_free_edges(front, want):
  seen = np.array([100.0, 100, 160, 150])
  assert free_edges(seen, np.array([front, seen]), VIEW).astype(int).tolist() == want


def test_the_views_ends_cut():
  ends = np.array([[-0.5, 100, 60, 150], [460, -0.5, 511.5, 150], [100, 100, 160, 255.5]])
  assert free_edges(ends, np.full((3, 1, 4), np.nan), VIEW).astype(int).tolist() == [
    [0, 1, 1, 1],
    [1, 0, 0, 1],
    [1, 1, 1, 0],
  ]


def test_edges_that_are_rarely_free_are_not_believed():
  """An occluder that the detector overlooks in two of ten frames: the lower edge seen then is the occluder's upper."""
  free = np.ones((1, 10, 4), bool)
  free[0, 2:, 3] = False
  assert believed(free, np.ones((1, 10), bool))[0].sum(0).tolist() == [10, 10, 10, 0]
  free[:] = False
  free[0, :2, 0] = True  # of left and right no other was ever free
  assert believed(free, np.ones((1, 10), bool))[0].sum(0).tolist() == [2, 10, 0, 10]


def test_memory_is_bounded_and_the_same_twice():
  def run():
    r, recall = np.random.default_rng(5), Recall(VIEW, 50)
    for _ in range(3 * KEPT):
      recall.move(1, 10.0, 0.05)
      if recall.frame % 40 == 1:
        recall.start(np.array([box(30, 0)], np.float32))
      recall.see(np.arange(len(recall.known)), np.tile(box(30, r.normal()), (len(recall.known), 1)), np.zeros((60, 4)))
    recall.move(3, None, None)
    recall.lose(np.arange(len(recall.known)), GROUND)
    return recall.expect(GROUND)

  rows, edges, cov = run()
  assert rows.tolist() == [0, 1, 2] and np.isfinite(edges).all() and np.isfinite(cov).all()
  assert all(np.array_equal(a, b) for a, b in zip(run(), (rows, edges, cov), strict=True))


def test_medians_are_numpys():
  r = np.random.default_rng(5)
  for count in (1, 2, 7, 40):
    x = r.normal(size=(6, count))
    np.testing.assert_array_equal(median(x), np.median(x, axis=1, keepdims=True))
    x[r.uniform(size=x.shape) < 0.4] = np.nan
    x[0] = np.nan
    some = ~np.isnan(x).all(1)
    np.testing.assert_array_equal(median(x)[some], np.nanmedian(x[some], axis=1, keepdims=True))
    assert np.isnan(median(x)[~some]).all()


def test_what_is_known_along_a_heading_is_turned():
  r = np.random.default_rng(6)
  heading = r.uniform(-4, 4, 20)
  c, s = np.cos(heading), np.sin(heading)
  turn = np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)
  want = turn @ np.diag([9.0, 0.25]) @ turn.swapaxes(1, 2)
  np.testing.assert_allclose(along(heading, (3.0, 0.5)), want, rtol=0, atol=1e-12)
  # the inverse is as well known, by one over the deviations
  np.testing.assert_allclose(along(heading, (1 / 3, 2.0)), np.linalg.inv(want), rtol=0, atol=1e-12)

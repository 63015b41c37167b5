"""Lines of point slots: which are one, and when they end. Driven by hand, without a graph."""

import numpy as np

from openpilot.selfdrive.modeld.fair.heads.ground import view_ground
from openpilot.selfdrive.modeld.fair.heads.lanes import LanePoints
from openpilot.selfdrive.modeld.fair.lanes import MAX_HIDDEN, SAME_LINE, SEED_PERIOD, UNSUPPORTED, LaneTracker

VIEW = (256, 512)
GROUND = view_ground("medmodel", 1.22)
VALID = np.ones(VIEW, bool)


def straight(y: float) -> np.ndarray:
  """A line y m to the right, (P, 2) view pixels from far to near."""
  x = np.linspace(60, 5, 80)
  return GROUND.view(np.stack([x, np.full(80, y), np.full(80, GROUND.height)], axis=1))


def offer(tracker: LaneTracker, *ys: float) -> None:
  tracker.seed([straight(y) for y in ys], GROUND, VALID)


def see(tracker: LaneTracker, visibility: float = 0.9, dt: int = 1):
  """The graph finds every point where it is."""
  tracker.fresh[:] = 0
  n = tracker.points.shape[1]
  return tracker.update(LanePoints(tracker.points[0].copy(), np.full(n, visibility, np.float32)), GROUND, dt)


def begun(*ys: float) -> LaneTracker:
  tracker = LaneTracker(64, VIEW)
  offer(tracker, *ys)
  assert len(see(tracker)) == len(ys)
  return tracker


def test_a_line_offered_beside_one_is_the_same_up_to_same_line():
  assert SAME_LINE == 0.9  # half of a narrow lane's width less a line's: two lines of a lane never become one
  for beside, lines in ((0.85, 1), (0.95, 2)):
    tracker = begun(1.7)
    offer(tracker, 1.7 + beside)
    assert (tracker.ids > 0).sum() == lines, beside


def test_a_point_out_of_sight_lives_for_max_hidden_frames():
  tracker = begun(1.7)
  last = int(tracker.mask[0].argmax())
  used = tracker.mask[0].copy()
  hidden = np.full(64, 0.9, np.float32)
  hidden[last] = 0
  for t in range(1, MAX_HIDDEN + 2):
    tracker.update(LanePoints(tracker.points[0].copy(), hidden), GROUND)
    assert tracker.mask[0, last] == (t <= MAX_HIDDEN), t
  assert tracker.mask[0].sum() == used.sum() - 1  # the others stay


def test_a_line_that_the_source_of_seeds_does_not_see_ends():
  """It is offered another line all the time; the points of the first one are in sight throughout."""
  tracker = begun(-1.7)
  offer(tracker, -1.7, 1.7)
  see(tracker)
  alive = 0
  for t in range(1, UNSUPPORTED + 3 * SEED_PERIOD):
    if tracker.wants_seeds():
      offer(tracker, 1.7)
    alive = t if 1 in {line.line_id for line in see(tracker)} else alive
  assert tracker.ids[tracker.ids > 0].tolist() == [2]
  assert UNSUPPORTED <= alive <= UNSUPPORTED + SEED_PERIOD

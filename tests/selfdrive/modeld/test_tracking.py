"""Identities through occlusion, on drives that are known exactly."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from openpilot.selfdrive.modeld.fair.assignment import assign, hungarian
from openpilot.selfdrive.modeld.fair.heads.depth import Depth
from openpilot.selfdrive.modeld.fair.heads.ground import view_ground
from openpilot.selfdrive.modeld.fair.heads.objects import Detections, box_iou, intersection
from openpilot.selfdrive.modeld.fair.locate import DEPTH_GROWTH, DEPTH_STD, locate
from openpilot.selfdrive.modeld.fair.tracked import merge
from openpilot.selfdrive.modeld.fair.tracking import (
  FROM_BOX,
  MAX_LOST,
  MAX_TRACKS,
  MIN_VALUE,
  REMEMBERED,
  TO_BOX,
  UNSEEN,
  W_MOTION,
  W_OVERLAP,
  Q,
  R,
  Tracker,
)

VIEW = (256, 512)
CLASSES = ["vehicle", "pedestrian", "cyclist"]
GROUND = view_ground("medmodel", 1.22)


def best_sum(value):
  """By trying all."""
  n, m = value.shape
  if n > m:
    return best_sum(value.T)
  return max(sum(max(value[i, j], 0) for i, j in enumerate(p)) for p in permutations(range(m), n))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1), st.sampled_from([0.2, 0.5, 1.0]))
def test_assignment_is_the_best_of_all(n, m, seed, density):
  r = np.random.default_rng(seed)
  value = np.where(
    r.random((n, m)) < density, r.choice([r.random((n, m)), r.integers(-1, 3, (n, m)) / 2]), 0
  )  # with ties, and below 0
  want = best_sum(value)
  for rows, cols in (assign(value), tuple(np.array(hungarian(value.tolist()), int).reshape(-1, 2).T)):
    assert len(set(rows.tolist())) == len(rows) and len(set(cols.tolist())) == len(cols)
    assert (value[rows, cols] > 0).all() and value[rows, cols].sum() == pytest.approx(want)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_infinite_values_are_taken_first_and_nan_never(n, m, seed):
  """As many of the infinite as can be, then the largest sum of the others: as if infinity were a number beyond all
  others."""
  r = np.random.default_rng(seed)
  value = r.choice([0, np.inf, -np.inf, np.nan, 0.25, 0.5, 1], (n, m))
  rows, cols = assign(value)
  assert len(set(rows.tolist())) == len(rows) and len(set(cols.tolist())) == len(cols) and (value[rows, cols] > 0).all()
  large = np.nan_to_num(value, nan=0, posinf=1e3, neginf=0)
  assert large[rows, cols].sum() == pytest.approx(best_sum(large))
  assert len(assign(np.full((n, m), np.inf))[0]) == min(n, m)


def test_large_assignment_equals_scipys():
  scipy = pytest.importorskip("scipy.optimize")
  r = np.random.default_rng(0)
  for density in (0.03, 0.1, 1.0):
    value = np.where(r.random((50, 46)) < density, r.random((50, 46)), 0)
    rows, cols = assign(value)
    i, j = scipy.linear_sum_assignment(value, maximize=True)
    assert value[rows, cols].sum() == pytest.approx(value[i, j].sum())
  assert all(a.size == 0 for a in assign(np.zeros((4, 3)))) and all(a.size == 0 for a in assign(np.zeros((0, 3))))


def test_assignment_of_a_crowd_that_moved_a_little_equals_scipys():
  """Most tracks have one detection that is plainly theirs, some neighbors are worth nearly as much."""
  scipy = pytest.importorskip("scipy.optimize")
  for seed in range(40):
    r = np.random.default_rng(seed)
    value = np.where(r.random((30, 27)) < 0.1, r.uniform(0, 0.5, (30, 27)), 0)
    own = r.permutation(30)[:27]
    value[own, np.arange(27)] = r.uniform(0.2, 0.75, 27)
    rows, cols = assign(value)
    i, j = scipy.linear_sum_assignment(value, maximize=True)
    wanted = value[i, j] > 0
    assert (np.diff(rows) > 0).all() and (rows == i[wanted]).all() and (cols == j[wanted]).all()


def test_boxes_to_centers_and_back_round_once():
  """As products they are the same bits as halves of sums and differences."""
  r = np.random.default_rng(4)
  state = np.concatenate([r.uniform(-50, 600, (500, 2)), r.uniform(0, 400, (500, 2))], axis=1)
  half = state[:, 2:] / 2
  assert (state @ TO_BOX == np.concatenate([state[:, :2] - half, state[:, :2] + half], axis=1)).all()
  for boxes in (state @ TO_BOX, (state @ TO_BOX).astype(np.float32)):
    got = boxes @ FROM_BOX
    assert (
      got.dtype == boxes.dtype
      and (got == np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)).all()
    )


def looks(seed):
  e = np.random.default_rng(seed).normal(0, 1, 16)
  return (e / np.linalg.norm(e)).astype(np.float32)


def mask_of(box):
  y, x = np.mgrid[0:64, 0:128] * 4 + 1.5
  return (x >= box[0]) & (x <= box[2]) & (y >= box[1]) & (y <= box[3])


def detections(boxes, cls=None, embed=None, scores=None, masks=True):
  boxes = np.array(boxes, np.float32).reshape(-1, 4)
  n = len(boxes)
  m = np.array([mask_of(b) for b in boxes], bool).reshape(n, 64, 128) if masks else None
  return Detections(
    CLASSES,
    boxes,
    np.full(n, 0.9, np.float32) if scores is None else np.array(scores, np.float32),
    np.array(cls or [0] * n, np.int64),
    m,
    None if embed is None else np.array(embed, np.float32).reshape(n, 16),
  )


def box(x, y, w=40.0, h=30.0):
  return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


@pytest.mark.parametrize("gap", [1, 5, 15, 40])
@pytest.mark.parametrize("kind", ["masks and looks", "boxes alone"])
def test_identity_survives_occlusion(gap, kind):
  """Two cars cross; the one behind is not seen for `gap` frames. A third one drives elsewhere."""
  r = np.random.default_rng(gap)
  rich = kind != "boxes alone"
  tracker = Tracker(CLASSES, VIEW)
  begin, ids = 12, []
  for t in range(begin + gap + 10):
    a, b, c = box(100 + 2.0 * t, 120), box(420 - 1.0 * t, 128, 60, 45), box(256, 60, 12, 10)
    there = [b, c] if begin <= t < begin + gap else [a, b, c]
    order = r.permutation(len(there))
    faces = ([looks(2), looks(3)] if len(there) == 2 else [looks(1), looks(2), looks(3)]) if rich else None
    noisy = [np.array(there[k]) + r.normal(0, 0.4, 4) for k in order]
    out = tracker.update(t, detections(noisy, embed=[faces[k] for k in order] if faces else None, masks=rich), GROUND)
    at = [int(np.argmax(box_iou(np.array([x]), out.boxes))) for x in (a, b, c)]
    if begin <= t < begin + gap:
      at[0] = int(np.flatnonzero(out.ids == ids[0][0])[0])  # it is still told, where it should be
      assert out.occluded[at[0]] and out.visibility[at[0]] == 0 and out.mask_of[at[0]] == -1
      assert abs(out.boxes[at[0], [0, 2]].mean() - (100 + 2.0 * t)) < 25
    assert out.ages[at[0]] == t
    ids.append(tuple(out.ids[at].tolist()))
  assert len(set(ids)) == 1 and tracker.next_id == 4


def test_longer_than_three_seconds_is_a_new_one_and_ids_are_never_used_again():
  tracker = Tracker(CLASSES, VIEW)
  empty = tracker.update(
    -1, detections([], embed=np.zeros((0, 16))), GROUND, Depth(np.ones((64, 128), np.float32), True)
  )
  assert len(empty.ids) == 0 and empty.position.shape == (0, 3)
  seen = []
  for t in range(400):
    there = t % 80 < 80 - REMEMBERED - 2  # gone for 62 frames
    out = tracker.update(
      t, detections([box(256, 128)] if there else [], embed=[looks(1)] if there else np.zeros((0, 16))), GROUND
    )
    if there:
      assert len(out.ids) == 1
      seen.append(int(out.ids[0]))
    elif t % 80 >= 80 - REMEMBERED - 2 + MAX_LOST:
      assert len(out.ids) == 0  # remembered for another second, but not told
  assert sorted(set(seen)) == [1, 2, 3, 4, 5] and seen == sorted(seen)
  tracker.reset()
  assert tracker.update(1000, detections([box(256, 128)]), GROUND).ids.tolist() == [6]


@pytest.mark.parametrize(("step", "kept"), [(1, True), (10, True), (500, False), (-3, False)])
def test_jumps_of_the_frames_number(step, kept):
  tracker = Tracker(CLASSES, VIEW)
  for t in range(10):
    out = tracker.update(t, detections([box(256, 128)]), GROUND)
  after = tracker.update(9 + step, detections([box(256, 128)]), GROUND)
  assert (after.ids.tolist() == out.ids.tolist()) == kept
  assert (
    tracker.update(9 + step, detections([box(256, 128)]), GROUND).ids.tolist() == after.ids.tolist()
  )  # the same frame twice


def test_looks_decide_where_boxes_cannot():
  """Two cars side by side are hidden at once for 1.5 s and come back with places changed."""
  tracker = Tracker(CLASSES, VIEW)
  for t in range(10):
    first = tracker.update(t, detections([box(200, 128), box(245, 128)], embed=[looks(2), looks(3)]), GROUND)
  for t in range(10, 40):
    tracker.update(t, detections([], embed=np.zeros((0, 16))), GROUND, Depth(np.ones((64, 128), np.float32), True))
  out = tracker.update(40, detections([box(245, 128), box(200, 128)], embed=[looks(2), looks(3)]), GROUND)
  where = {int(i): b[0] for i, b in zip(out.ids, out.boxes, strict=True)}
  assert where[int(first.ids[0])] == 225 and where[int(first.ids[1])] == 180


def test_masks_decide_where_boxes_cross():
  """One long diagonal thing before another: equal boxes, disjoint masks."""
  y, x = np.mgrid[0:64, 0:128] * 4 + 1.5
  b = np.array([box(256, 128, 100, 80)] * 2, np.float32)
  inside, rising = mask_of(b[0]), (x - 206) / 100 + (y - 88) / 80
  masks = np.stack([inside & (rising < 0.8), inside & (rising > 1.2)])
  tracker = Tracker(CLASSES, VIEW)
  ids = []
  for t in range(12):
    order = [0, 1] if t % 2 else [1, 0]
    out = tracker.update(
      t, Detections(CLASSES, b, np.full(2, 0.9, np.float32), np.zeros(2, np.int64), masks[order], None), GROUND
    )
    of = {order[int(m)]: int(i) for i, m in zip(out.ids, out.mask_of, strict=True)}
    ids.append((of[0], of[1]))
  assert len(set(ids)) == 1


def test_half_hidden_is_told_and_its_edges_do_not_push_it():
  """A car drives behind a nearer one: the detector sees less and less of it."""
  tracker = Tracker(CLASSES, VIEW)
  front = [250, 100, 350, 200]
  for t in range(40):
    x1 = 150 + 2.0 * t
    hidden = max(0.0, x1 + 60 - 250)
    behind = [x1, 110, min(x1 + 60, 250), 150]
    there = [front] + ([behind] if x1 < 240 else [])
    out = tracker.update(t, detections(there, embed=[looks(1), looks(2)][: len(there)]), GROUND)
    me = int(np.flatnonzero(out.ids != 1)[0]) if t else 1
    if hidden > 36:
      assert out.occluded[me] and out.visibility[me] < 0.5
    elif hidden == 0:
      assert not out.occluded[me] and out.visibility[me] > 0.9
    assert not out.occluded[out.ids == 1].any()
  # not seen for 20 frames, it comes out on the other side
  for t in range(40, 100):
    x1 = 150 + 2.0 * t
    there = [front] + ([[max(x1, 350), 110, x1 + 60, 150]] if x1 + 60 > 362 else [])
    out = tracker.update(t, detections(there, embed=[looks(1), looks(2)][: len(there)]), GROUND)
  assert sorted(out.ids.tolist()) == [1, 2] and tracker.next_id == 3


def test_weak_detections_are_told_when_seen_twice():
  tracker = Tracker(CLASSES, VIEW)
  assert len(tracker.update(0, detections([box(256, 128)], scores=[0.35]), GROUND).ids) == 0
  assert len(tracker.update(1, detections([box(256, 128)], scores=[0.35]), GROUND).ids) == 1
  tracker.update(2, detections([box(256, 128), box(60, 60)], scores=[0.35, 0.35]), GROUND)
  for t in range(3, 6):
    out = tracker.update(t, detections([box(256, 128)], scores=[0.35]), GROUND)
  assert len(out.ids) == 1 and len(tracker.ids) == 1


def test_class_is_the_vote_of_many_frames():
  tracker = Tracker(CLASSES, VIEW)
  for t in range(12):
    out = tracker.update(t, detections([box(256, 128)], cls=[2 if t == 8 else 1]), GROUND)
    assert out.ids.tolist() == [1] and out.class_ids.tolist() == [1]


def test_street_of_thirty():
  """30 things that cross, 5% of them missed in any frame: hardly an identity changes, the ground is bounded, and it is
  the same twice."""

  def drive():
    r = np.random.default_rng(1)
    at, speed, size = (
      r.uniform([20, 80], [490, 200], (30, 2)),
      r.normal(0, 1.5, (30, 2)) * [1, 0.2],
      r.uniform(15, 60, (30, 2)),
    )
    faces = np.stack([looks(k) for k in range(30)])
    tracker, switches, last, all_out = Tracker(CLASSES, VIEW), 0, {}, []
    for t in range(100):
      at += speed
      speed[(at < [20, 80]) & (speed < 0) | (at > [490, 200]) & (speed > 0)] *= -1
      who = r.permutation(30)[: 30 - r.binomial(30, 0.05)]
      c, s = (at + r.normal(0, 0.5, at.shape))[who], size[who]
      boxes = np.clip(np.concatenate([c - s / 2, c + s / 2], 1), -0.5, [511.5, 255.5] * 2)
      out = tracker.update(t, detections(boxes, embed=faces[who]), GROUND)
      for track, m in zip(out.ids.tolist(), out.mask_of.tolist(), strict=True):
        if m >= 0:
          switches += last.get(who[m], track) != track
          last[who[m]] = track
      all_out.append(np.concatenate([out.ids, out.boxes.ravel(), out.position.ravel()]))
      assert len(out.ids) <= MAX_TRACKS
    return switches, tracker.next_id - 1, np.concatenate(all_out)

  switches, ids, out = drive()
  assert switches <= 3 and ids <= 36
  assert np.array_equal(drive()[2], out, equal_nan=True)


def test_never_more_than_the_most():
  r = np.random.default_rng(2)
  tracker = Tracker(CLASSES, VIEW)
  for t in range(30):
    at = r.uniform([10, 10], [500, 240], (50, 2))
    out = tracker.update(t, detections([box(*a, 8, 8) for a in at], embed=r.normal(0, 1, (50, 16))), GROUND)
    assert len(out.ids) <= MAX_TRACKS and len(set(out.ids.tolist())) == len(out.ids)


def test_position_on_the_road():
  car = np.array([20.0, 2.0, 1.22])
  foot = GROUND.view(car)
  b = np.array([[foot[0] - 30, foot[1] - 40, foot[0] + 30, foot[1]]])
  one, yes = np.ones(1), np.ones(1, bool)
  position, std, shown = locate(b, one, yes, GROUND, None, VIEW)
  assert np.isnan(shown).all()
  np.testing.assert_allclose(position[0], car, rtol=1e-5)
  assert std[0, 0] == pytest.approx(float(GROUND.forward_std(np.array(20.0), 1.0)), rel=1e-5)
  z = np.full((64, 128), np.nan, np.float32)
  z[:, int(foot[0] // 4) - 4 : int(foot[0] // 4) + 5] = 22.0
  both, both_std, shown = locate(b, one, yes, GROUND, Depth(z, True), VIEW)
  assert 20 < both[0, 0] < 22 and both_std[0, 0] < std[0, 0] and shown[0] == 22
  vague = locate(b, one, yes, GROUND, Depth(z, True, 3.0, 0.3), VIEW)[0]  # meters by a scale that is known to 30 %
  assert 20 < vague[0, 0] < both[0, 0]
  w0, w1 = std[0, 0] ** -2.0, (np.hypot(DEPTH_STD, DEPTH_GROWTH * 22.0) * 22.0) ** -2.0
  assert both[0, 0] == pytest.approx((20 * w0 + 22 * w1) / (w0 + w1), rel=1e-4) and both[0, 1] / both[
    0, 0
  ] == pytest.approx(0.1, rel=1e-4)
  z[:] = 60.0  # they contradict each other
  assert locate(b, one, yes, GROUND, Depth(z, True), VIEW)[1][0, 0] > 5
  for d in (Depth(z, False), Depth(z * np.nan, True)):  # relative, or empty: not used
    np.testing.assert_allclose(locate(b, one, yes, GROUND, d, VIEW)[0], position)
  np.testing.assert_allclose(locate(b, one, ~yes, GROUND, Depth(z, True), VIEW)[0], position)  # behind something
  cut = b.copy()
  cut[0, 3] = 255.5  # the view ends before the car does
  assert np.isnan(locate(cut, one, yes, GROUND, None, VIEW)[0]).all()
  z[:] = 4.0
  assert locate(cut, one, yes, GROUND, Depth(z, True), VIEW)[0][0, 0] == pytest.approx(4)
  sky = np.array([[10.0, 5, 30, 20]])
  assert np.isnan(locate(sky, one, yes, GROUND, None, VIEW)[0]).all()


def test_position_std_is_honest():
  """Over many tracks with noisy boxes, heights and pitch the error is about what it says."""
  r = np.random.default_rng(5)
  errors = []
  for _ in range(300):
    x, y = r.uniform(8, 60), r.uniform(-4, 4)
    u, v = GROUND.view(np.array([x, y, 1.22 * r.normal(1, 0.05)])) + [0, 910 * r.normal(0, 0.005)]
    v += r.normal(0, 2)
    h = 910 * 1.5 / x
    d = detections([[u - h / 2, v - h, u + h / 2, v]], masks=False)
    out = Tracker(CLASSES, VIEW).update(0, d, GROUND)
    if np.isfinite(out.position).all():
      errors.append((out.position[0, 0] - x) / out.position_std[0, 0])
  assert 0.6 < np.std(errors) < 1.4 and abs(np.median(errors)) < 0.3


def test_merge_keeps_the_richer_of_two():
  a = detections([box(100, 100), box(300, 100)], cls=[0, 1], embed=[looks(1), looks(2)], scores=[0.6, 0.5])
  b = Detections(
    ["cyclist", "vehicle"],
    np.array([box(101, 100), box(300, 101), box(400, 50)], np.float32),
    np.array([0.9, 0.8, 0.7], np.float32),
    np.array([1, 1, 0]),
    None,
    None,
  )
  d = merge([a, b], CLASSES)
  assert d.scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.5]) and d.class_ids.tolist() == [
    0,
    0,
    2,
    1,
  ]  # vehicle, other class at the pedestrian, cyclist
  assert d.masks.any((1, 2)).tolist() == [True, False, False, True] and d.embed.any(1).tolist() == [
    True,
    False,
    False,
    True,
  ]
  out = Tracker(CLASSES, VIEW).update(0, d, GROUND)
  assert len(out.ids) == 4


@pytest.mark.parametrize(("cls", "ids"), [(0, [1]), (1, [1, 2])])
def test_what_overlaps_little_is_the_same_only_if_the_class_agrees(cls, ids):
  tracker = Tracker(CLASSES, VIEW)
  for t in range(10):
    tracker.update(t, detections([box(256, 128)], masks=False), GROUND)
  near = box(256 + 14, 128)  # IoU .48: over MIN_OVERLAP, under what makes any two the same
  out = tracker.update(10, detections([near], cls=[cls], masks=False), GROUND)
  assert sorted(out.ids.tolist()) == ids


def test_out_of_sight_a_prediction_grows_vaguer_than_in_sight():
  """By UNSEEN times the noise of the acceleration: who braked behind a lorry is looked for where it would be then."""

  def spread(frames):
    tracker = Tracker(CLASSES, VIEW)
    for t in range(30):
      tracker.update(t, detections([box(256, 128)], masks=False), GROUND)
    start = tracker.p11[0]
    for t in range(30, 30 + frames):
      tracker.update(t, detections([], masks=False), GROUND)
    return tracker.p11[0] - start

  # the first of these frames is predicted as in sight; each of the others adds (UNSEEN Q)^2
  assert spread(11) - spread(1) == pytest.approx(10 * (UNSEEN * Q) ** 2, rel=1e-9)


@pytest.mark.parametrize("sigmas", [0.0, 1.0, 2.0])
def test_what_a_pair_is_worth(sigmas):
  """Overlap and motion, each 1 for the box where it was predicted; motion falls as a bell curve does, by standard
  deviations of the prediction in shares of the box's size."""
  t = Tracker(CLASSES, VIEW)
  w, h = 40.0, 30.0
  t.update(0, detections([box(200, 100, w, h)], masks=False), GROUND)
  t.predict(1)
  variance = float(t.p00[0]) + R * R
  dx = sigmas * np.sqrt(variance * w * h)
  d = detections([box(200 + dx, 100, w, h)], masks=False)
  inter, nobody = intersection(t.boxes.astype(np.float32), d.boxes), np.zeros(1, int)
  value = t._values(d, inter, np.array([w * h], np.float32), None, nobody, np.zeros(1, bool))
  iou = max(w - dx, 0) / (w + min(dx, w))
  want = (W_OVERLAP * iou + W_MOTION * np.exp(-0.5 * sigmas**2)) / (W_OVERLAP + W_MOTION) - MIN_VALUE
  assert value.shape == (1, 1) and value[0, 0] == pytest.approx(want, abs=1e-5)


def test_the_filter_is_kalmans():
  """As textbooks have it, in matrices: a position and its speed, pushed by a white acceleration, of which the position
  is measured. A box that is hidden by a tenth is measured with twice the variance."""
  t = Tracker(CLASSES, VIEW)
  r = np.random.default_rng(4)
  t.update(0, detections([box(200, 100)], masks=False), GROUND)
  x, p = np.stack([t.mean[0], t.speed[0]]), np.array([[t.p00[0], t.p01[0]], [t.p01[0], t.p11[0]]])
  for dt, cover in ((1, 0.0), (2, 0.1), (1, 0.3), (3, 1.0), (1, 0.0)):
    t.predict(dt)
    f, g = np.array([[1.0, dt], [0.0, 1.0]]), np.array([[dt * dt / 2], [dt]])
    x, p = f @ x, f @ p @ f.T + Q * Q * g @ g.T
    measured = x[0] + r.normal(0, 3, 4)
    t._correct(np.zeros(1, int), (measured @ TO_BOX)[None], np.array([cover]))
    gain = p[:, :1] / (p[0, 0] + R * R * (1 + cover / 0.1))
    x, p = x + gain * (measured - x[0]), p - gain @ p[:1]
    np.testing.assert_allclose(t.mean[0], x[0], rtol=1e-9)
    np.testing.assert_allclose(t.speed[0], x[1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose([t.p00[0], t.p01[0], t.p11[0]], [p[0, 0], p[0, 1], p[1, 1]], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
  ("front", "seen", "want"),
  [
    # from the left, from the right, from below over the whole width, with one edge in common, in the middle alone
    ((280, 90, 310, 140), (310, 100, 340, 130), (300, 100, 340, 130)),
    ((330, 90, 360, 140), (300, 100, 330, 130), (300, 100, 340, 130)),
    ((290, 115, 350, 200), (300, 100, 340, 115), (300, 100, 340, 130)),
    ((300, 115, 350, 200), (300, 100, 339, 115), (300, 100, 339, 130)),
    ((310, 115, 320, 200), (300, 100, 340, 129), (300, 100, 340, 129)),
  ],
)
def test_hidden_edges_are_where_the_other_edge_and_the_size_say(front, seen, want):
  """Of a box predicted at 300 to 340 and 100 to 130."""
  boxes = [np.array([b], np.float32) for b in (seen, (300, 100, 340, 130), front)]
  out = Tracker(CLASSES, VIEW)._uncover(*boxes, np.array([0.3], np.float32))
  assert out[0].tolist() == list(want)
  assert Tracker(CLASSES, VIEW)._uncover(*boxes, np.array([0.01], np.float32))[0].tolist() == list(seen)


@pytest.mark.parametrize(
  ("seen", "want"),
  [
    ((0, 100, 20, 130), (-20, 100, 20, 130)),
    ((491, 100, 511, 130), (491, 100, 531, 130)),
    ((300, 235, 340, 255), (300, 235, 340, 265)),
    ((1, 100, 20, 130), (1, 100, 20, 130)),
  ],
)
def test_edges_at_the_views_end_are_beyond_it(seen, want):
  """Of a box predicted 40 wide and 30 high."""
  seen, size = np.array([seen], np.float32), np.array([[0, 0, 40, 30]], np.float32)
  predicted = seen[:, [0, 1, 0, 1]] + size
  assert Tracker(CLASSES, VIEW)._uncover(seen, predicted, np.zeros((1, 4)), np.zeros(1))[0].tolist() == list(want)

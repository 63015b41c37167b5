"""Every metric against another way to compute it: the reference library, scipy, or the definition written out in
loops."""

import itertools

import numpy as np
import pytest
from scipy import ndimage, stats

from openpilot.tools.fair.evaluation.detections import Detections, Objects, best_iou, make_objects
from openpilot.tools.fair.evaluation.metrics import (
  Classes,
  Depth,
  Tracks,
  bootstrap,
  depth_errors,
  lower_is_better,
  paired_bootstrap,
  standing,
)
from openpilot.tools.fair.evaluation.columns import TeacherTracks
from openpilot.tools.fair.evaluation.logged import Logged, cells
from openpilot.tools.fair.evaluation.run import gap
from openpilot.tools.fair.evaluation.scenes import NO_POINTS, Queries
from openpilot.tools.fair.evaluation.video import (
  Identities,
  IouTracker,
  Video,
  VideoMasks,
  boundary_accuracy,
  region_similarity,
)
from openpilot.tools.fair.labels import rle


def test_depth_by_definition():
  r = np.random.default_rng(0)
  acc, expected = Depth(), []
  for _ in range(3):
    truth = r.uniform(2, 250, (64, 128))  # beyond 200 counts nowhere
    truth[:5] = np.inf
    depth = truth * np.exp(r.normal(0.1, 0.2, truth.shape))
    depth[:, :7] = np.nan
    depth[:5] = 30
    acc.add(depth.astype(np.float32), truth.astype(np.float32))
    e = []
    for i, j in itertools.product(range(64), range(128)):
      d, t = float(np.float32(depth[i, j])), float(np.float32(truth[i, j]))
      if t < 200 and d == d:
        e.append((d, t))
    p, t = np.array(e).T
    slope, shift = np.polyfit(1 / p, 1 / t, 1)
    fitted = 1 / np.maximum(slope / p + shift, 1 / 200)
    scaled = p * np.median(t) / np.median(p)
    rel = [np.mean(np.abs(x - t) / t) for x in (p, scaled, fitted)]
    delta = [np.mean(np.maximum(x / t, t / x) < 1.25) for x in (p, scaled, fitted)]
    silog = [np.std(np.log(x) - np.log(t)) for x in (p, scaled, fitted)]
    expected.append((*rel, *delta, silog[0], silog[2]))
  names = ("abs_rel", "abs_rel_median", "abs_rel_lsq", "delta1", "delta1_median", "delta1_lsq", "silog", "silog_lsq")
  result = acc.result()
  assert result.keys() == set(names)
  for name, v in zip(names, np.mean(expected, axis=0), strict=True):
    assert result[name] == pytest.approx(v, rel=1e-6), name


def test_delta1_at_exactly_a_quarter_off():
  """The definition is a ratio below 1.25. The difference of two logarithms is not: it is rounded to either side."""
  truth = np.arange(1, 160, dtype=np.float64)
  for depth in (truth * 1.25, truth / 1.25):
    exact = np.maximum(depth / truth, truth / depth) == 1.25
    assert exact.sum() > 50 and depth_errors(depth[exact], truth[exact])[1] == 0
    assert depth_errors(depth[exact] * (1 - 1e-12 if depth[0] > 1 else 1 + 1e-12), truth[exact])[1] == 1


def test_depth_up_to_scale_or_shift_is_judged_only_where_that_means_something():
  r = np.random.default_rng(1)
  truth = r.uniform(2, 100, (64, 128))
  scale, affine = Depth(), Depth()
  assert scale.add(truth * 3, truth, "scale") == pytest.approx(0, abs=1e-9)
  assert affine.add(1 / (5 / truth + 0.3), truth, "affine") == pytest.approx(0, abs=1e-6)
  assert "abs_rel" not in scale.result() and "abs_rel_median" in scale.result()
  assert affine.result().keys() == {"abs_rel_lsq", "delta1_lsq", "silog_lsq"}
  assert np.isnan(Depth().add(np.full((64, 128), np.nan), truth)) and Depth().result() == {}


def test_classes_by_sets_of_pixels():
  r = np.random.default_rng(2)
  names = ["a", "b", "c", "never"]
  acc, truths, found = Classes(names), [], []
  for _ in range(2):
    t, p = r.integers(0, 3, (64, 128)).astype(np.uint8), r.integers(0, 4, (64, 128)).astype(np.uint8)
    t[:9], p[:, :5] = 255, 255
    acc.add(p, t)
    ok = (t != 255) & (p != 255)
    truths += t[ok].tolist()
    found += p[ok].tolist()
  iou = []
  for k in range(3):
    a, b = ({i for i, v in enumerate(x) if v == k} for x in (truths, found))
    iou.append(len(a & b) / len(a | b))
    assert acc.result()[f"iou_{names[k]}"] == pytest.approx(iou[-1], abs=1e-12)
  assert acc.result()["miou"] == pytest.approx(np.mean(iou), abs=1e-12)
  assert "iou_never" not in acc.result()  # the truth has none
  two = Classes.pooled([acc, acc])
  assert two.result() == acc.result() and two.sums.sum() == 2 * acc.sums.sum()


def tapvid(tracks, visible, truth, truth_visible):
  """The definition in loops: (frames, points, 2) at 256x256, the query is frame 0."""
  frames, n = visible.shape
  right = total = seen = 0
  within, tp, fp = (dict.fromkeys((1, 2, 4, 8, 16), 0) for _ in range(3))
  for f in range(1, frames):
    for k in range(n):
      error = float(np.sqrt(((tracks[f, k] - truth[f, k]) ** 2).sum()))
      right += visible[f, k] == truth_visible[f, k]
      total += 1
      seen += truth_visible[f, k]
      for t in within:
        good = error < t
        within[t] += truth_visible[f, k] and good
        if visible[f, k]:
          if truth_visible[f, k] and good:
            tp[t] += 1
          else:
            fp[t] += 1
  delta = np.mean([within[t] / seen for t in within])
  # FN: visible points that are no TP
  jaccard = np.mean([tp[t] / (tp[t] + (seen - tp[t]) + fp[t]) for t in within])
  return delta, right / total, jaccard


def test_tracks_by_tap_vid():
  r = np.random.default_rng(3)
  truth = r.uniform(0, 256, (9, 20, 2))
  found = truth + r.normal(0, 1, truth.shape) * r.choice([0.5, 3, 12], truth.shape)
  truth_visible, visible = r.random((9, 20)) < 0.7, r.random((9, 20)) < 0.6
  acc = Tracks()
  wide = np.array([2.0, 1.0])  # the view is twice as wide as TAP-Vid's picture
  hidden = np.zeros(20, bool)
  after = []
  for f in range(1, 9):
    acc.add(found[f] * wide, visible[f], truth[f] * wide, truth_visible[f], hidden)
    error = np.linalg.norm(found[f] - truth[f], axis=1)
    after += [np.mean(e < np.array([1, 2, 4, 8, 16])) for e in error[hidden & truth_visible[f]]]
    hidden = hidden | ~truth_visible[f]
  delta, oa, aj = tapvid(found, visible, truth, truth_visible)
  got = acc.result()
  assert (got["delta_avg"], got["occlusion_accuracy"], got["average_jaccard"]) == pytest.approx(
    (delta, oa, aj), abs=1e-12
  )
  assert got["delta_after"] == pytest.approx(np.mean(after), abs=1e-12)


def random_scene(r, masks=True):
  """Truth, some of which counts nowhere, and detections near and far of it."""
  n = int(r.integers(0, 6))
  corner, size = r.uniform(0, 80, (n, 2)) * [4, 2], r.uniform(12, 120, (n, 2))
  boxes = np.concatenate([corner, corner + size], axis=1)
  truth = make_objects(boxes, r.integers(0, 2, n), visible=r.random(n).astype(np.float32), ignore=r.random(n) < 0.25)
  m = int(r.integers(0, 8))
  take = r.integers(0, max(n, 1), m)
  base = boxes[take] if n else np.tile([10.0, 10, 60, 60], (m, 1))
  near = base + r.normal(0, 1, base.shape) * r.choice([1, 6, 30], (m, 1))
  near = np.concatenate([np.minimum(near[:, :2], near[:, 2:] - 4), near[:, 2:]], axis=1)
  cls = np.where(r.random(m) < 0.8, truth.cls[take] if n else 0, 1)
  found = make_objects(near, cls, r.random(m))
  for o in (found, truth):
    maps = np.zeros((len(o), 64, 128), bool)
    for k, (x0, y0, x1, y1) in enumerate(np.clip(o.boxes / 4, 0, [128, 64, 128, 64]).astype(int)):
      maps[k, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = True
    o.rle = rle.encode(maps)
  return found, truth


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_detections_by_two_libraries(kind):
  """Ours, which the intervals need, faster-coco-eval, which is reported, and pycocotools are one."""
  r = np.random.default_rng(4)
  parts = []
  for _ in range(3):
    parts.append(Detections(["vehicle", "pedestrian"], kind))
    for _ in range(12):
      parts[-1].add(*random_scene(r))
  acc = Detections.pooled(parts)
  ours, fast, slow = acc.result(), acc.coco(), acc.coco("pycocotools")
  assert 0.05 < slow["ap"] < slow["ap50"] < 0.95  # says something
  for k, v in slow.items():
    assert fast[k] == pytest.approx(v, abs=1e-9) and ours[k] == pytest.approx(v, abs=1e-9), k


def test_detections_without_any():
  truth, none = make_objects([[0, 0, 50, 50]], [0]), Objects()
  acc = Detections(["vehicle"])
  assert np.isnan(acc.add(none, none)) and acc.result() == {} and acc.coco() == {}
  assert acc.add(none, truth) == 1 and acc.coco() == {"ap": 0, "ap50": 0, "ar": 0} and acc.result()["ap"] == 0
  assert acc.add(truth, truth) == 0


def test_recall_at_a_score_and_by_occlusion():
  boxes = np.array([[0, 0, 40, 40], [100, 0, 140, 40], [200, 0, 240, 40], [300, 0, 340, 40]])
  truth = make_objects(boxes, [0, 0, 0, 0], visible=np.array([1, 0.9, 0.89, 0.49], np.float32))
  found = make_objects(boxes[[0, 2, 3]] + 1, [0, 0, 0], [0.9, 0.6, 0.3])  # the third is too unsure
  acc = Detections(["vehicle"], score=0.5)
  assert acc.add(found, truth) == pytest.approx(1 - 2 * 2 / (2 * 2 + 2))
  got = acc.result()
  assert (got["recall"], got["precision"], got["recall_clear"], got["recall_partly"], got["recall_mostly"]) == (
    0.5,
    1.0,
    0.5,
    1.0,
    0.0,
  )


def test_mask_iou_takes_the_best_pairs():
  r = np.random.default_rng(5)
  iou = r.random((4, 3))
  best = max(sum(iou[p[j], j] for j in range(3)) for p in itertools.permutations(range(4), 3))
  assert best_iou(iou) == pytest.approx(best)
  masks = np.zeros((2, 64, 128), bool)
  masks[0, :10, :10], masks[1, 20:30, 20:40] = True, True
  moved = np.roll(masks[:1], 5, axis=2)
  truth = make_objects(rle.boxes_of(masks) * 4, [0, 0], rle=rle.encode(masks))
  acc = Detections(["vehicle"], "segm")
  acc.add(make_objects(rle.boxes_of(moved) * 4, [0], rle=rle.encode(moved)), truth)
  assert acc.result()["mask_iou"] == pytest.approx((50 / 150 + 0) / 2)


def blob(r, shape=(64, 128)):
  y, x = np.mgrid[: shape[0], : shape[1]]
  cy, cx = r.uniform(0, shape[0]), r.uniform(0, shape[1])
  return ((y - cy) / r.uniform(4, 14)) ** 2 + ((x - cx) / r.uniform(4, 20)) ** 2 < 1


def reference_f(found, truth, radius):
  """F by distances: no dilation, and the boundary pixel by pixel."""

  def edge(m):
    out = np.zeros(m.shape, bool)
    for i, j in itertools.product(*map(range, m.shape)):
      out[i, j] = any(
        m[min(i + a, m.shape[0] - 1), min(j + b, m.shape[1] - 1)] != m[i, j] for a, b in ((0, 1), (1, 0), (1, 1))
      )
    return out

  f, t = edge(found), edge(truth)
  if not f.any() or not t.any():
    return 1.0 if f.any() == t.any() else 0.0
  p = (ndimage.distance_transform_edt(~t)[f] <= radius).mean()
  q = (ndimage.distance_transform_edt(~f)[t] <= radius).mean()
  return 2 * p * q / (p + q) if p + q else 0.0


def test_j_and_f_of_a_frame():
  r = np.random.default_rng(6)
  assert np.ceil(0.008 * np.hypot(64, 128)) == 2 and np.ceil(0.008 * np.hypot(256, 512)) == 5
  values = []
  for _ in range(6):
    a = blob(r)
    b = np.roll(a, r.integers(-4, 5, 2), (0, 1)) ^ (blob(r) if r.random() < 0.3 else False)
    values.append(boundary_accuracy(a, b))
    assert values[-1] == pytest.approx(reference_f(a, b, 2), abs=1e-12)
    assert region_similarity(a, b) == pytest.approx(
      1 - sum(x != y for x, y in zip(a.ravel(), b.ravel(), strict=True)) / (a | b).sum()
    )
  assert min(values) < 0.8 < max(values)
  empty = np.zeros((64, 128), bool)
  assert boundary_accuracy(empty, empty) == region_similarity(empty, empty) == 1 and boundary_accuracy(a, empty) == 0


def test_j_and_f_of_a_video_by_trying_all_matchings():
  r = np.random.default_rng(7)
  start = [blob(r) for _ in range(3)]
  video, frames = Video(), []
  for f in range(5):
    truth = {k: np.roll(m, 3 * f, 1) for k, m in enumerate(start) if not (k == 1 and f > 2)}
    found = {10 + k: np.roll(m, r.integers(-2, 3, 2), (0, 1)) for k, m in truth.items() if r.random() < 0.8}
    found[20] = blob(r)
    frames.append((found, truth))
    o = [
      make_objects(
        np.zeros((len(x), 4)), np.zeros(len(x)), track=np.array(list(x)), rle=rle.encode(np.stack(list(x.values())))
      )
      for x in (found, truth)
    ]
    video.add(*o, "segm")

  def quality(a, b):
    there = [(x.get(a), t.get(b)) for x, t in frames if a in x or b in t]
    zero = np.zeros((64, 128), bool)
    both = [(zero if x is None else x, zero if t is None else t) for x, t in there]
    return np.mean([(x & t).sum() / (x | t).sum() for x, t in both]), np.mean(
      [boundary_accuracy(x, t) for x, t in both]
    )

  tracks = sorted({k for x, _ in frames for k in x})
  best = max(
    ((sum(sum(quality(a, b)) for a, b in zip(p, range(3), strict=True)), p) for p in itertools.permutations(tracks, 3)),
    key=lambda x: x[0],
  )[1]
  expected = np.mean([quality(a, b) for a, b in zip(best, range(3), strict=True)], axis=0)
  got = VideoMasks().close(video).result()
  # F of pairs that do not overlap is left out, where it can be a little over 0
  assert (got["j"], got["f"]) == pytest.approx(tuple(expected), abs=0.01)
  assert got["j"] == pytest.approx(expected[0], abs=1e-9) and got["j_and_f"] == pytest.approx((got["j"] + got["f"]) / 2)


def box_at(x, size=40):
  return [x, 50, x + size, 50 + size]


def test_idf1_by_trying_all_matchings():
  r = np.random.default_rng(8)
  video, counts, n_truth, n_found = Video(), {}, 0, 0
  swap = {f: bool(r.random() < 0.4) for f in range(30)}
  for f in range(30):
    truth = [(k, box_at(100 * k + f)) for k in range(3) if not (k == 2 and f > 20)]
    found = [((1 - k if swap[f] and k < 2 else k) + 7, b) for k, b in truth if r.random() < 0.9] + (
      [(40, box_at(420))] if f % 3 == 0 else []
    )
    for a, x in found:
      for b, y in truth:
        counts[a, b] = counts.get((a, b), 0) + (x == y)
    n_truth, n_found = n_truth + len(truth), n_found + len(found)
    o = [
      make_objects(np.array([b for _, b in x]), np.zeros(len(x)), track=np.array([k for k, _ in x]))
      for x in (found, truth)
    ]
    video.add(*o, "bbox")
  tracks = sorted({a for a, _ in counts})
  idtp = max(
    sum(counts.get((a, b), 0) for a, b in zip(p, range(3), strict=True)) for p in itertools.permutations(tracks, 3)
  )
  assert Identities().close(video).result()["idf1"] == pytest.approx(2 * idtp / (n_truth + n_found))
  assert 0.4 < 2 * idtp / (n_truth + n_found) < 0.95


def identities(frames):
  """frames: ({found track: x}, {true track: (x, visible)})."""
  video = Video()
  for found, truth in frames:
    f = make_objects([box_at(x) for x in found.values()], np.zeros(len(found)), track=np.array(list(found), int))
    seen = np.array([v for _, v in truth.values()], np.float32)
    t = make_objects(
      [box_at(x) for x, _ in truth.values()],
      np.zeros(len(truth)),
      track=np.array(list(truth), int),
      visible=seen,
      ignore=seen < 0.1,
    )
    video.add(f, t, "bbox")
  return Identities().close(video)


def test_switches_through_occlusion():
  # true 1 is hidden twice: the first time its track goes on as 5, the second time it comes back as 9; true 2 switches
  # in plain sight
  frames = [
    ({5: 0, 6: 200}, {1: (0, 1.0), 2: (200, 1.0)}),
    ({6: 200}, {1: (2, 0.05), 2: (200, 1.0)}),
    ({5: 4, 6: 200}, {1: (4, 0.9), 2: (200, 1.0)}),
    ({7: 200}, {2: (200, 1.0)}),  # 1 is not even in the label
    ({9: 8, 7: 200}, {1: (8, 1.0), 2: (200, 1.0)}),
  ]
  idtp, truth, found, switches, occlusions, lost = identities(frames).sums
  assert (truth, found, switches, occlusions, lost) == (
    8,
    8,
    2,
    2,
    1,
  )  # a true object of which a twentieth is seen counts nowhere
  assert idtp == 2 + 3
  got = identities(frames).result()
  assert got["kept_occluded"] == 0.5 and got["switches_occluded"] == 50 and got["switches"] == 25
  assert lower_is_better("switches") and not lower_is_better("kept_occluded")


def test_an_object_is_occluded_under_three_tenths():
  """At 0.3 it is not: it is found again there, once."""
  for back, occlusions in ((0.3, 1), (0.29, 0)):
    video = Video()
    for seen in (1.0, 0.2, back):
      found = make_objects([box_at(0)], [0], track=np.array([5]))
      video.add(found, make_objects([box_at(0)], [0], track=np.array([1]), visible=np.array([seen])), "bbox")
    assert Identities().close(video).sums[3:].tolist() == [0, occlusions, 0]


def test_one_identity_twice_in_a_frame_is_one_object_and_a_false_one():
  """Two boxes of one track on one true object must not count as two frames in common: IDF1 would be 4 / 3."""
  video = Video()
  for _ in range(4):
    found = make_objects([box_at(0), box_at(2)], np.zeros(2), [0.5, 0.9], track=np.array([5, 5]))
    video.add(found, make_objects([box_at(0)], np.zeros(1), track=np.array([1])), "bbox")
  score = Identities().close(video)
  assert score.sums[:3].tolist() == [4, 4, 8] and score.result()["idf1"] == pytest.approx(2 * 4 / 12)
  assert found.track.tolist() == [5, 5]  # what was given is as it was
  twice = Video()
  for _ in range(3):
    twice.add(
      make_objects([box_at(0)], np.zeros(1), track=np.array([5])),
      make_objects([box_at(0), box_at(200)], np.zeros(2), track=np.array([1, 1])),
      "bbox",
    )
  assert Identities().close(twice).sums[:3].tolist() == [3, 6, 3]


def test_what_is_found_where_the_truth_counts_nowhere_is_no_error():
  s = identities([({5: 0}, {1: (0, 0.05)}), ({5: 0}, {1: (0, 1.0)})]).sums
  assert s[:3].tolist() == [1, 1, 1]


def test_the_rival_keeps_what_overlaps_and_no_more():
  t = IouTracker(max_age=2)

  def step(*xs, cls=0):
    return t.step(make_objects([box_at(x) for x in xs], [cls] * len(xs))).track.tolist()

  assert step(0, 200) == [0, 1] and step(204, 3) == [1, 0]
  assert step() == [] and step(6) == [0]  # over a gap
  assert step(90) == [2] and step(92, cls=1) == [3]  # elsewhere; of another class
  assert step() == step() == [] and step(92) == [4]  # forgotten


def test_bootstrap_against_scipy():
  r = np.random.default_rng(9)
  parts = []
  for _ in range(12):
    c = Classes(["a", "b"])
    c.sums[:] = r.integers(20, 200, (2, 2))
    parts.append(c)
  low, high = bootstrap(parts, 3000)["iou_a"]

  def iou(idx):
    c = np.sum([parts[i].sums for i in idx], axis=0)
    return c[0, 0] / (c[0].sum() + c[:, 0].sum() - c[0, 0])

  ref = stats.bootstrap(
    (np.arange(12),), iou, n_resamples=3000, vectorized=False, method="percentile", rng=np.random.default_rng(1)
  ).confidence_interval
  width = ref.high - ref.low
  # 3000 draws each: an end moves by 1.8% of the width (one standard deviation); 5% for 2.5% would move it by 8%
  assert abs(low - ref.low) < 0.05 * width and abs(high - ref.high) < 0.05 * width
  assert bootstrap(parts[:2]) == {} and bootstrap(parts, 50) == bootstrap(parts, 50)


def test_paired_differences_see_what_intervals_hide():
  """Segments differ more than the two do, but all in the same direction."""
  r = np.random.default_rng(10)
  a, b = [], []
  for level in r.uniform(0.1, 0.6, 10):
    for out, more in ((a, 0.02), (b, 0.0)):
      out.append(Depth())
      truth = np.full((4, 4), 10.0)
      out[-1].add(truth * (1 + level + more), truth)
  low, high = paired_bootstrap(a, b)["abs_rel"]
  assert (low, high) == pytest.approx((0.02, 0.02), abs=1e-9)
  (a_low, _), (_, b_high) = bootstrap(a)["abs_rel"], bootstrap(b)["abs_rel"]
  assert a_low < b_high


class Fixed:
  """A route whose metrics are given."""

  def __init__(self, **values):
    self.values = values

  @classmethod
  def pooled(cls, parts):
    return parts[0]

  def result(self):
    return self.values


def test_a_difference_is_better_or_worse_where_its_interval_lies_on_one_side():
  assert [standing("miou", *x) for x in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (0.0, 0.1), (None, None))] == [
    "better",
    "worse",
    "not decided",
    "not decided",
    "not decided",
  ]
  assert standing("abs_rel", 0.1, 0.2) == "worse" and standing("abs_rel", -0.2, -0.1) == "better"


def test_only_what_both_have_is_compared():
  got = paired_bootstrap([Fixed(x=3.0, y=1.0)] * 3, [Fixed(x=1.0, z=1.0)] * 3, 20)
  assert got == {"x": (2.0, 2.0)}


def test_no_objects_have_no_entries():
  nothing = Objects()
  assert len(nothing) == 0 and {len(v) for v in vars(nothing).values() if isinstance(v, np.ndarray)} == {0}
  assert {len(v) for v in NO_POINTS.values()} == {0} and set(NO_POINTS) == {"track", "x", "y", "visible"}


def test_several_of_one_identity_are_objects_of_their_own():
  """The surest keeps it, the others' are nobody's, in all frames."""
  video = Video()
  boxes = np.array([[0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9], [60, 0, 69, 9.0]])
  for _ in range(2):
    found = make_objects(boxes, [0] * 4, [0.9, 0.5, 0.8, 0.7], track=np.array([2, 7, 7, 7]))
    video.add(found, make_objects(boxes, [0] * 4, track=np.arange(4)), "bbox")
  tracks = [f.found.track.tolist() for f in video.frames]
  assert [t[0] for t in tracks] == [2, 2] and [t[2] for t in tracks] == [7, 7]
  assert len(set(tracks[0] + tracks[1])) == 6


def queries(fresh, truth, used=None):
  n = len(truth)
  truth, fresh = np.array(truth, float), np.array(fresh)
  used = np.ones(n, bool) if used is None else np.array(used)
  return Queries(truth.copy(), used, fresh, ~fresh, truth, np.ones(n, bool), np.zeros(n, bool))


def points(**places):
  """t5=(x, y): a teacher's track 5, seen there."""
  xy = np.array(list(places.values()), float).reshape(-1, 2)
  track = np.array([int(k[1:]) for k in places])
  return {"track": track, "x": xy[:, 0], "y": xy[:, 1], "visible": np.ones(len(xy), bool)}


def test_a_teachers_point_stands_for_a_query_beside_it():
  """It is to move as the query does: what lies between them where it starts is taken off. Four pixels off at most."""
  t = TeacherTracks()
  start = [(100, 100), (200, 100), (300, 100)]
  t.step(queries([True] * 3, start), points(t5=(102, 101), t6=(200, 104.5), t7=(300, 96)))
  assert {s: k for s, (k, _) in t.of.items()} == {0: 5, 2: 7}
  scene = t.step(queries([False] * 3, start), points(t5=(112, 91), t6=(210, 100), t7=(280, 96)))
  xy, visible = scene.followed
  assert xy[0].tolist() == [110, 90] and xy[2].tolist() == [280, 100]
  assert visible.tolist() == [True, False, True] and t.known.tolist() == [True, False, True]
  # a track that ends, and a slot that is given to another point, stand for nothing more
  scene = t.step(queries([False, False, True], start), points(t5=(112, 91)))
  assert t.known.tolist() == [True, False, False] and set(t.of) == {0}


def test_a_gap_is_a_share_of_the_best_or_of_perfect():
  assert gap("abs_rel", 0.12, 0.1) == pytest.approx(0.2) and gap("abs_rel", 0.12, None) == 0.12
  assert gap("miou", 0.4, 0.5) == pytest.approx(0.2) and gap("miou", 0.4, None) == pytest.approx(0.6)


def test_cells_of_view_pixels():
  """Of a map of 64x128: four by four pixels each, from half a pixel before the first center on."""
  x = np.array([-0.6, -0.5, 3.4, 3.5, 511.4, 511.5, 5.0, 5.0])
  y = np.array([10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 255.5, -0.6])
  i, j, inside = cells(x, y, (64, 128))
  assert inside.tolist() == [False, True, True, True, True, False, False, False]
  assert j.tolist() == [0, 0, 0, 1, 127, 127, 1, 1] and i.tolist() == [2] * 6 + [63, 0]


def test_sums_of_a_log_are_ratios_of_pairs():
  logged = Logged()
  logged.sums[:] = [1, 2, 3, 4, 5, 8, 7, 16]
  got = logged.result()
  want = {"log_lane_recall": 1 / 2, "log_lane_chance": 3 / 4, "log_lead_recall": 5 / 8, "abs_rel_lead": 7 / 16}
  assert got == pytest.approx(want)

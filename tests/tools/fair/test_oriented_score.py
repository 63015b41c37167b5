"""AP of oriented boxes beside a plain loop that follows DOTA's rules."""

import numpy as np
import pytest

from openpilot.tools.fair.images.oriented_score import Boxes, average_precision, oriented_scores, picture_error
from openpilot.tools.fair.rotated import pair_iou


def scene(rng, pictures=6, objects=12):
  """Truth with difficult objects, and what was found: moved a little, twice, of the wrong class, where nothing is."""
  truth, found = [], []
  for _ in range(pictures):
    n = int(rng.integers(0, objects))
    b = np.column_stack([rng.uniform(0, 200, (n, 2)), rng.uniform(8, 40, (n, 2)), rng.uniform(-1.5, 1.5, n)])
    cls = rng.integers(0, 3, n)
    truth.append(Boxes(b, cls, difficult=rng.uniform(size=n) < 0.25, unknown=np.zeros(n, bool)))
    again = rng.integers(0, n, int(rng.integers(0, 2 * n + 1))) if n else np.zeros(0, int)
    moved = b[again] + rng.normal(0, 1, (len(again), 5)) * [2, 2, 1, 1, 0.08]
    moved[:, 2:4] = np.maximum(moved[:, 2:4], 1)
    wrong = rng.uniform(size=len(again)) < 0.2
    kinds = np.where(wrong, (cls[again] + 1) % 3, cls[again])
    free = np.column_stack([rng.uniform(0, 200, (3, 2)), np.full((3, 2), 15.0), np.zeros(3)])
    boxes = np.concatenate([moved, free])
    found.append(Boxes(boxes, np.append(kinds, [0, 1, 2]), rng.permutation(1000)[: len(boxes)] / 1000))
  return truth, found


def plain_ap(truth, found, cls, least, eleven):
  """One detection after the other."""
  rows = [(f.scores[i], p, f.boxes[i]) for p, f in enumerate(found) for i in range(len(f.cls)) if f.cls[i] == cls]
  rows.sort(key=lambda r: -r[0])
  used, tp, fp = set(), [], []
  for _, p, box in rows:
    t = truth[p]
    best, which = -1.0, None
    for j in range(len(t.cls)):
      if t.cls[j] == cls and (iou := float(pair_iou(box[None], t.boxes[j][None])[0])) > best:
        best, which = iou, j
    hit = best > least
    if hit and t.difficult[which]:
      continue
    new = hit and (p, which) not in used
    used.add((p, which)) if new else None
    tp.append(int(new))
    fp.append(int(not new))
  total = sum(int(((t.cls == cls) & ~t.difficult).sum()) for t in truth)
  if not total:
    return None
  recall = [sum(tp[: i + 1]) / total for i in range(len(tp))]
  precision = [sum(tp[: i + 1]) / (i + 1) for i in range(len(tp))]
  if eleven:
    # recalls are compared as whole numbers: 3 of 10 are 0.3
    hits = [sum(tp[: i + 1]) for i in range(len(tp))]
    return (
      sum(max([p for h, p in zip(hits, precision, strict=True) if 10 * h >= k * total], default=0.0) for k in range(11))
      / 11
    )
  area, last = 0.0, 0.0
  for i in range(len(tp)):
    area += (recall[i] - last) * max(precision[i:])
    last = recall[i]
  return area


def test_ap_beside_a_plain_loop(rng):
  truth, found = scene(rng)
  got = oriented_scores(truth, found, ["a", "b", "c"], 0.5)
  want = {}
  for k, name in enumerate("abc"):
    every = [plain_ap(truth, found, k, t, False) for t in np.round(np.arange(0.5, 0.96, 0.05), 2)]
    if every[0] is None:
      assert name not in got["classes"]
      continue
    c = got["classes"][name]
    want[name] = plain_ap(truth, found, k, 0.5, True)
    assert c["ap50"] == pytest.approx(want[name], abs=1e-12)
    assert (c["ap50_area"], c["ap75_area"], c["ap"]) == pytest.approx((every[0], every[5], np.mean(every)), abs=1e-12)
    assert got["curves"][name]["0.50"][0] == pytest.approx(max(got["curves"][name]["0.50"]))
  if want:
    assert got["stats"]["ap50"] == pytest.approx(np.mean(list(want.values())), abs=1e-12)


def one(boxes, **more):
  return Boxes(np.array(boxes, float).reshape(-1, 5), np.zeros(len(boxes), int), **more)


def test_what_is_difficult_or_unknown_counts_nowhere():
  there = [[20, 20, 10, 6, 0.5], [60, 20, 10, 6, 0.5], [100, 20, 30, 30, 0]]
  truth = one(there, difficult=np.array([False, True, True]), unknown=np.array([False, False, True]))
  truth.cls[2] = 7
  found = one([*there, [60, 20, 10, 6, 0.5]], scores=np.array([0.6, 0.9, 0.8, 0.7]))
  got = oriented_scores([truth], [found], ["a"], 0.5)
  assert got["stats"]["ap"] == 1 and got["classes"]["a"]["truths"] == 1
  assert got["at_score"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0} and picture_error(truth, found, 1, 0.5) == 0
  truth.difficult[1] = truth.unknown[2] = truth.difficult[2] = False
  truth.cls[2] = 0
  again = oriented_scores([truth], [found], ["a"], 0.5)
  assert again["classes"]["a"]["truths"] == 3 and again["at_score"]["precision"] == 0.75  # the second time is wrong


def test_nothing_found_and_nothing_there():
  some, none = one([[20, 20, 10, 6, 0.5]], difficult=np.zeros(1, bool), unknown=np.zeros(1, bool)), one([])
  assert oriented_scores([some], [none], ["a"], 0.3)["stats"]["ap50"] == 0
  got = oriented_scores([none], [none], ["a"], 0.3)
  assert got["stats"]["ap50"] is None and got["classes"] == {} and got["at_score"]["f1"] is None
  assert picture_error(none, none, 1, 0.3) is None and picture_error(some, none, 1, 0.3) == 1


def test_eleven_recalls_and_the_area():
  """Right, wrong, right of two objects: precision 1, 1/2, 2/3."""
  recall, precision = np.array([0.5, 0.5, 1.0]), np.array([1.0, 0.5, 2 / 3])
  assert average_precision(recall, precision, True) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
  assert average_precision(recall, precision, False) == pytest.approx(0.5 + 0.5 * 2 / 3)

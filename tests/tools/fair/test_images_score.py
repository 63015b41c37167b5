"""What `images evaluate` tells, beside pycocotools and plain loops."""

import numpy as np
import pytest

from openpilot.tools.fair.images.page import page
from openpilot.tools.fair.images.score import at_score, coco_scores, confusion, errors, matched_iou, mean_iou
from openpilot.tools.fair.labels import rle

W, H = 200, 160


def mask_of(x, y, w, h):
  m = np.zeros((H, W), bool)
  m[int(y) : int(y + h), int(x) : int(x + w)] = True
  return {"size": [H, W], "counts": rle.encode(m[None])[0]}


def row(box, **more):
  x, y, w, h = (float(v) for v in box)
  return {"bbox": [x, y, w, h], "area": w * h, "segmentation": mask_of(x, y, w, h), **more}


@pytest.fixture(scope="module")
def case():
  """30 pictures, 3 classes, crowds; detections near the truth, of other classes, doubled, and of nothing."""
  r = np.random.default_rng(5)
  truth = {"images": [], "annotations": [], "categories": [{"id": k, "name": n} for k, n in enumerate("abc")]}
  found = []
  for i in range(1, 31):
    truth["images"].append({"id": i, "file_name": f"{i}.png", "width": W, "height": H})
    for _ in range(r.integers(0, 6)):
      side = r.choice([14, 50, 110])
      box = (*r.integers(0, [W - side, H - side]), side, side)
      crowd = int(r.uniform() < 0.1)
      k = int(r.integers(0, 3))
      own = {"id": len(truth["annotations"]) + 1, "image_id": i, "category_id": k, "iscrowd": crowd}
      truth["annotations"].append(row(box, **own))
      for _ in range(r.choice([0, 1, 1, 2])):
        moved = np.maximum(np.array(box) + r.integers(-6, 7, 4), [0, 0, 4, 4])
        other = k if r.uniform() < 0.8 else int(r.integers(0, 3))
        found.append(row(moved, image_id=i, category_id=other, score=round(float(r.uniform()), 3)))
    if r.uniform() < 0.5:
      found.append(row((5, 5, 30, 30), image_id=i, category_id=0, score=round(float(r.uniform()), 3)))
  return truth, [{**f, "id": n} for n, f in enumerate(found, 1)]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_coco_numbers_are_those_of_pycocotools(case, kind):
  a, b = (coco_scores(*case, kind, library) for library in ("faster_coco_eval", "pycocotools"))
  assert a["stats"] == pytest.approx(b["stats"], abs=1e-12) and 0.2 < a["stats"]["ap50"] < 0.95
  assert a["stats"]["ap_small"] != a["stats"]["ap_large"]
  for name, c in a["classes"].items():
    assert c == pytest.approx(b["classes"][name], abs=1e-12)
  np.testing.assert_allclose(a["curves"]["all"]["0.50"], b["curves"]["all"]["0.50"], atol=1e-12)
  assert np.mean(a["curves"]["all"]["0.50"]) == pytest.approx(a["stats"]["ap50"], abs=1e-9)


def test_the_best_score_is_the_best_by_trying_each(case):
  truth, found = case
  own = {**truth, "annotations": [a for a in truth["annotations"] if not a["iscrowd"] and a["category_id"] == 0]}
  mine = [f for f in found if f["category_id"] == 0]
  c = coco_scores(own, mine, "bbox")["classes"]["a"]
  f1 = {s: at_score(confusion(own, mine, s))["f1"] for s in {f["score"] for f in mine}}
  assert c["best_f1"] == pytest.approx(max(f1.values()), abs=0.03)
  assert f1[min(f1, key=lambda s: abs(s - c["best_score"]))] > max(f1.values()) - 0.03


def iou(a, b):
  w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
  h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
  inter = max(0, w) * max(0, h)
  return inter / (a[2] * a[3] + b[2] * b[3] - inter)


def best(table):
  """The greatest sum of one-to-one pairs, by trying all."""
  if not table or not table[0]:
    return 0.0
  rest = [r[1:] for r in table]
  out = best(rest)
  for i in range(len(table)):
    out = max(out, table[i][0] + best([r for j, r in enumerate(rest) if j != i]))
  return out


def test_mean_iou_beside_trying_all_pairs(case):
  truth, found = case
  truth_ids = {"id": 1, "image_id": 1, "category_id": 0, "iscrowd": 0}
  total = n = 0
  for i in range(1, 31):
    for k in range(3):
      g = [a["bbox"] for a in truth["annotations"] if (a["image_id"], a["category_id"], a["iscrowd"]) == (i, k, 0)]
      d = [f["bbox"] for f in found if (f["image_id"], f["category_id"]) == (i, k) and f["score"] >= 0.4]
      total += best([[iou(x, y) for y in g] for x in d])
      n += len(g)
  assert mean_iou(truth, found, "bbox", 0.4) == pytest.approx(total / n, abs=1e-9)
  pairs = matched_iou(truth, found, "bbox", 0.4)
  assert pairs is not None and 0.5 <= pairs <= 1 and pairs > total / n
  one = row((0, 0, 20, 20), image_id=1, category_id=0, score=0.9)
  alone = {**truth, "images": truth["images"][:1], "annotations": [{**row((0, 0, 20, 25)), **truth_ids}]}
  assert matched_iou(alone, [one], "bbox", 0.4) == pytest.approx(400 / 500)
  assert matched_iou(alone, [{**one, "category_id": 1}], "bbox", 0.4) is None
  assert mean_iou({**truth, "annotations": []}, found, "bbox", 0.4) is None
  assert mean_iou(truth, [], "bbox", 0.4) == 0


def test_confusion_of_a_case_that_is_counted_by_hand():
  truth = {"images": [{"id": 1, "file_name": "a"}], "categories": [{"id": 5, "name": "a"}, {"id": 9, "name": "b"}]}
  squares = [((0, 0, 20, 20), 5, 0), ((40, 0, 20, 20), 5, 0), ((80, 0, 20, 20), 9, 0), ((0, 80, 90, 70), 9, 1)]
  truth["annotations"] = [row(b, id=i + 1, image_id=1, category_id=c, iscrowd=w) for i, (b, c, w) in enumerate(squares)]
  said = [
    ((0, 0, 20, 20), 5, 0.9),  # right
    ((1, 0, 20, 20), 9, 0.9),  # of the same, less exact: found where nothing is left
    ((40, 0, 20, 18), 9, 0.9),  # of another class
    ((81, 0, 20, 20), 9, 0.2),  # below the score: missed
    ((10, 90, 20, 20), 9, 0.9),  # in the crowd
    ((150, 90, 20, 20), 5, 0.9),  # nothing there
  ]
  found = [row(b, image_id=1, category_id=c, score=s) for b, c, s in said]
  m = confusion(truth, found, 0.5)
  np.testing.assert_array_equal(m, [[1, 1, 0], [0, 0, 1], [1, 1, 0]])
  assert at_score(m) == pytest.approx({"precision": 1 / 4, "recall": 1 / 3, "f1": 2 / 7})
  assert errors(truth, found, 0.5) == pytest.approx({1: 1 - 2 / 7})
  assert errors({**truth, "annotations": []}, [], 0.5) == {}


def test_nothing_found_is_zero_and_has_a_page(case):
  truth, _ = case
  scores = coco_scores(truth, [], "bbox")
  assert scores["stats"]["ap"] == 0 and scores["stats"]["ap_small"] is None
  results = {"model": "<b>m</b>", "pictures": 30, "data": "x", "objects": 3, "crowds": 0, "seconds_per_picture": 0.1}
  results |= {"classes": ["a", "b", "c"], "score": 0.3, "bbox": scores, "at_score": at_score(np.zeros((4, 4), int))}
  results |= {
    "confusion": np.zeros((4, 4), int).tolist(),
    "bundle_sha256": "0",
    "worst": [{"picture": "<p>", "error": 1}],
  }
  made = page(results, [np.zeros((4, 4, 3), np.uint8)])
  assert "<b>m</b>" not in made and "&lt;p&gt;" in made and "http" not in made

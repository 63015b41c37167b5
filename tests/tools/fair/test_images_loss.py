"""The four parts of a student's loss: what they are, beside plain loops; which can be, and their weights."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openpilot.tools.fair.distillation.augment import draw, none
from openpilot.tools.fair.distillation.soft_boxes import bernoulli_divergence, cell_loss, query_loss
from openpilot.tools.fair.images.families import check_family, select_student_model
from openpilot.tools.fair.images.loss import PARTS, balance
from openpilot.tools.fair.images.train_student import Options
from openpilot.tools.fair.spec import Class, ClassSet, InputSpec
from openpilot.tools.fair.tasks import TASKS, say
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.errors import UserError

PICTURE = InputSpec("rgb", 64, 96)


def divergence(logit, score):
  s = 1 / (1 + math.exp(-logit))
  t = min(max(score, 1e-4), 1 - 1e-4)
  return t * math.log(t / s) + (1 - t) * math.log((1 - t) / (1 - s))


def test_divergence_is_zero_where_both_agree_and_as_in_the_book(rng):
  logits = torch.tensor(rng.normal(0, 3, 50))
  own = logits.clamp(-9, 9)  # beyond 9.21 scores are taken to be EDGE from 0 and 1, and no longer what the student says
  np.testing.assert_allclose(bernoulli_divergence(own, own.sigmoid()), 0, atol=1e-12)
  far = torch.tensor([-14.0, -11.0, 11.0, 14.0], dtype=torch.float64)
  want = [divergence(x, float(torch.tensor(x, dtype=torch.float64).sigmoid())) for x in far.tolist()]
  np.testing.assert_allclose(bernoulli_divergence(far, far.sigmoid()), want, rtol=1e-9, atol=1e-12)
  scores = torch.tensor(rng.uniform(0, 1, 50))
  want = [divergence(a, b) for a, b in zip(logits.tolist(), scores.tolist(), strict=True)]
  np.testing.assert_allclose(bernoulli_divergence(logits, scores), want, rtol=1e-9, atol=1e-12)


def soft(rng, n, known=(True, True, False)):
  a = rng.uniform([0, 0], [88, 56], (n, 2))
  boxes = np.concatenate([a, a + rng.uniform(3, 20, (n, 2))], 1)
  scores = rng.uniform(0, 1, (n, 3)) * known
  return {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "known": torch.tensor(known)}


def test_cell_loss_beside_a_plain_loop(rng):
  heat = torch.tensor(rng.normal(0, 2, (2, 3, 8, 12)))
  said = [soft(rng, 9), soft(rng, 4)]
  valid = torch.ones(2, 16, 24, dtype=torch.bool)
  valid[1, :, 12:] = False
  total = weights = 0.0
  for i, s in enumerate(said):
    at = {}
    for box, scores in zip(s["boxes"].tolist(), s["scores"].tolist(), strict=True):
      x = min(int(((box[0] + box[2]) / 2 + 0.5) // 8), 11)
      y = min(int(((box[1] + box[3]) / 2 + 0.5) // 8), 7)
      if i == 1 and x >= 6:
        continue
      at[y, x] = [max(a, b) for a, b in zip(at.get((y, x), (0, 0, 0)), scores, strict=True)]
    for (y, x), scores in at.items():
      best = max(scores)
      total += best * sum(divergence(float(heat[i, k, y, x]), scores[k]) for k in (0, 1))
      weights += best
  assert float(cell_loss(heat, said, valid)) == pytest.approx(total / max(1, weights), rel=1e-9)
  assert float(cell_loss(heat, [soft(rng, 0)], valid[:1])) == 0


def test_query_loss_asks_the_query_whose_box_it_is(rng):
  s = soft(rng, 3)
  size = torch.tensor([96.0, 64.0, 96.0, 64.0])
  own = torch.stack([s["boxes"][:, [0, 2]].mean(1) + 0.5, s["boxes"][:, [1, 3]].mean(1) + 0.5], 1)
  exact = torch.cat([own, s["boxes"][:, 2:] - s["boxes"][:, :2]], 1) / size
  boxes = torch.cat([torch.full((4, 4), 0.01), exact[[2, 0, 1]]]).float()[None]
  logits = torch.tensor(rng.normal(0, 0.1, (1, 7, 3)))
  total = 0.0
  for query, m in ((4, 2), (5, 0), (6, 1)):
    best = float(s["scores"][m].max())
    total += best * sum(divergence(float(logits[0, query, k]), float(s["scores"][m, k])) for k in (0, 1))
  want = total / max(1.0, float(s["scores"].max(1).values.sum()))
  assert float(query_loss(logits, boxes, [s], (96, 64))) == pytest.approx(want, rel=1e-5)


def classes(*names):
  return ClassSet("pictures", tuple(Class(n, maps=False, boxes=True) for n in names))


def test_rows_of_one_box_are_one_with_a_score_of_each_class():
  label = Label("scores", "boxes", unit="score", classes=("gromp", "flurb", "other"))
  own = classes("flurb", "zott", "gromp")
  said = say([label], [], TASKS["logits"], replace(own, ignored=("other",)), PICTURE)
  assert TASKS["logits"].teaches(label, own) and not TASKS["objects"].teaches(label, own)
  table = {
    "x0": np.array([4, 4, 30, 4, 60], np.float32),
    "y0": np.array([4, 4, 8, 4, 9], np.float32),
    "x1": np.array([20, 20, 50, 20, 61], np.float32),
    "y1": np.array([24, 24, 30, 24, 10], np.float32),
    "score": np.array([0.7, 0.2, 0.4, 0.9, 0.9], np.float32),
    "cls": np.array([0, 1, 1, 2, 0], np.int16),
  }
  said.values = [table, None]
  found, nothing = TASKS["logits"].targets(said, none(PICTURE), np.random.default_rng(0))["soft"]
  assert nothing is None
  np.testing.assert_array_equal(found["known"], [True, False, True])
  np.testing.assert_array_equal(found["boxes"], [[4, 4, 20, 24], [30, 8, 50, 30]])  # that of one pixel is too small
  np.testing.assert_allclose(found["scores"], [[0.2, 0, 0.7], [0.4, 0, 0]])


def test_zoom_of_an_unknown_camera_is_as_wide_as_it_is_said():
  zooms = [draw(np.random.default_rng(i), picture=InputSpec(), zoom_range=(0.4, 2.2)).zoom for i in range(300)]
  assert min(zooms) < 0.45 and max(zooms) > 2.0 and min(zooms) >= 0.4 and max(zooms) <= 2.2 and 1.0 not in zooms
  assert max(draw(np.random.default_rng(i)).zoom for i in range(300)) < 1.36


def told(**more):
  return Options(data=Path("a.json"), output=Path("out"), **more)


def learned(masks=True, scores=True, features=True, teachers=("t",)):
  return SimpleNamespace(
    info={"has_boxes": True, "has_masks": masks}, scores=scores, features=features, teachers=teachers
  )


@pytest.mark.parametrize(
  "args, said, student, weights",
  [
    ({}, learned(), "objects-nano", {"detection": 0.3, "segmentation": 0.3, "logit": 0.2, "feature": 0.2}),
    ({}, learned(scores=False, features=False, teachers=()), "objects-nano", {"detection": 0.5, "segmentation": 0.5}),
    ({}, learned(masks=False, features=False), "detector-nano", {"detection": 0.6, "logit": 0.4}),
    ({}, learned(features=False), "detector-nano", {"detection": 0.6, "logit": 0.4}),
    ({"logit": False, "feature": False}, learned(), "objects-nano", {"detection": 0.5, "segmentation": 0.5}),
    ({"detection": False}, learned(), "objects-nano", {"segmentation": 3 / 7, "logit": 2 / 7, "feature": 2 / 7}),
    (
      {"weight": ("logit=0.4", "feature=0")},
      learned(),
      "objects-nano",
      {"detection": 0.3, "segmentation": 0.3, "logit": 0.4},
    ),
  ],
)
def test_what_cannot_be_is_off_and_the_rest_sums_to_one(args, said, student, weights):
  found, off = balance(told(**args), said, student)
  assert found == pytest.approx(weights) and sum(found.values()) == pytest.approx(1)
  assert off.keys() | found.keys() == PARTS.keys() and not off.keys() & found.keys() and all(off.values())


def test_no_part_left_and_wrong_weights_are_said():
  none_left = {"detection": False, "segmentation": False, "logit": False, "feature": False}
  with pytest.raises(UserError, match=r"no part of the loss is left: .*--no-detection"):
    balance(told(**none_left), learned(), "objects-nano")
  for wrong in ("boxes=1", "logit", "logit=-1", "logit=x", "logit=nan"):
    with pytest.raises(UserError, match="--weight"):
      balance(told(weight=(wrong,)), learned(), "objects-nano")


@pytest.mark.parametrize(
  "info, size, name",
  [
    ({"has_boxes": True, "has_masks": True}, "small", "objects-small"),
    ({"has_boxes": False, "has_masks": True}, "n", "objects-nano"),
    ({"has_boxes": True, "has_masks": False}, "s", "detector-small"),
  ],
)
def test_the_data_chooses_the_student(info, size, name):
  assert select_student_model(info, size) == name


def test_no_student_of_nothing_and_none_of_other_licenses():
  with pytest.raises(UserError, match="neither boxes nor masks"):
    select_student_model({"has_boxes": False, "has_masks": False})
  with pytest.raises(UserError, match="no size 'huge'"):
    select_student_model({"has_boxes": True}, "huge")
  for name in ("yolov8n", "YOLOv8s_seg", "FastSAM-s"):
    with pytest.raises(UserError, match=r"AGPL-3\.0"):
      check_family(name)
  with pytest.raises(UserError, match="prompt"):
    check_family("mobilesam")
  check_family("objects-small")

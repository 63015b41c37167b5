"""The device's decoder of oriented boxes: no jump of the angle, ProbIoU by its definition, no box twice."""

import numpy as np
import pytest

from openpilot.selfdrive.modeld.fair.heads import HEADS
from openpilot.selfdrive.modeld.fair.heads.oriented import (
  boxes_of,
  corners,
  covariance,
  decode,
  le90,
  prob_iou,
  raw_of,
  without_twins,
)

SPECS = {"heat": {"classes": ["a", "b"], "parameters": {"threshold": 0.5}}, "box": {}}


def boxes(r, n):
  return le90(np.column_stack([r.uniform(0, 60, (n, 2)), r.uniform(4, 50, (n, 2)), r.uniform(-4, 4, n)]))


def test_what_is_encoded_is_decoded():
  b = boxes(np.random.default_rng(), 300)
  center = np.random.default_rng().uniform(0, 60, (300, 2))
  np.testing.assert_allclose(corners(boxes_of(raw_of(b, center), center)), corners(b), atol=1e-9)


def test_the_code_has_no_jump():
  """Around a turn by pi, past a square where the sides change places, and for a square by a quarter turn: boxes that
  are nearly the same have nearly the same code."""
  turn = np.linspace(-np.pi, np.pi, 2000)
  for w, h in ((30.0, 10.0), (20.0, 20.0), (20.001, 20.0)):
    code = raw_of(le90(np.column_stack([np.zeros((2000, 2)), np.full(2000, w), np.full(2000, h), turn])), np.zeros(2))
    assert np.abs(np.diff(code, axis=0)).max() < 0.02
    np.testing.assert_allclose(code[0], code[-1], atol=1e-6)
  side = np.linspace(10, 30, 2000)  # of one side, the other is 20, turned by 0.7
  b = np.column_stack([np.zeros((2000, 2)), side, np.full(2000, 20.0), np.full(2000, 0.7)])
  assert np.abs(np.diff(raw_of(le90(b), np.zeros(2)), axis=0)).max() < 0.02
  assert np.abs(np.diff(le90(b)[:, 4])).max() > 1.5  # the angle itself jumps


def test_a_turned_square_keeps_its_turn():
  b = np.array([[0, 0, 20.0, 20.0, 0.6]])
  code = raw_of(b, np.zeros(2)) + [0, 0, 0, 1e-3, -1e-3, 0, 0]  # a network's noise
  np.testing.assert_allclose(corners(boxes_of(code, np.zeros(2)))[0].sum(0), [0, 0], atol=1e-9)
  angle = boxes_of(code, np.zeros(2))[0, 4]
  assert (angle - 0.6 + np.pi / 4) % (np.pi / 2) - np.pi / 4 == pytest.approx(0, abs=1e-6)


def test_any_numbers_make_boxes():
  raw = np.random.default_rng().normal(0, 1e4, (50, 7))
  b = boxes_of(raw, np.zeros(2))
  assert np.isfinite(b).all() and (b[:, 2] >= b[:, 3]).all() and (b[:, 3] > 0).all() and b[:, 2].max() < 1e5
  assert np.isfinite(boxes_of(np.zeros((1, 7)), np.zeros(2))).all()


def test_a_uniform_densitys_covariance():
  r = np.random.default_rng(0)
  b = np.array([[3.0, 5, 20, 8, 0.5]])
  p = corners(b)[0]
  some = r.uniform(0, 1, (400_000, 2))
  points = p[0] + some[:, :1] * (p[1] - p[0]) + some[:, 1:] * (p[3] - p[0])
  c = np.cov(points.T)
  np.testing.assert_allclose(covariance(b)[0], [c[0, 0], c[1, 1], c[0, 1]], rtol=0.02)


def test_prob_iou_is_one_less_the_hellinger_distance():
  """The integral of sqrt(p q) over the plane, on a grid."""
  a, b = boxes(np.random.default_rng(), 3), boxes(np.random.default_rng(), 3)
  y, x = np.mgrid[-150:210:0.5, -150:210:0.5]

  def density(box):
    xx, yy, xy = covariance(box)[0]
    inverse = np.linalg.inv([[xx, xy], [xy, yy]])
    d = np.stack([x - box[0], y - box[1]], -1)
    return np.exp(-0.5 * np.einsum("hwi,ij,hwj->hw", d, inverse, d)) / (2 * np.pi * np.sqrt(xx * yy - xy * xy))

  want = [[1 - np.sqrt(max(0.0, 1 - np.sqrt(density(p) * density(q)).sum() / 4)) for q in b] for p in a]
  np.testing.assert_allclose(prob_iou(a, b), want, atol=2e-3)
  np.testing.assert_allclose(np.diag(prob_iou(a, a)), 1, atol=1e-6)


def outputs(b, cls, score):
  raw = {"heat": np.full((1, 2, 8, 12), -9.0, np.float32), "box": np.zeros((1, 7, 8, 12), np.float32)}
  for box, k, s in zip(b, cls, score, strict=True):
    j, i = ((box[:2] + 0.5) // 8).astype(int)
    raw["heat"][0, k, i, j] = s
    raw["box"][0, :, i, j] = raw_of(box, 8 * np.array([j, i]) + 3.5)[0]
  return raw


def test_decoding():
  b = np.array([[20.0, 20, 16, 8, 0.6], [70, 40, 20, 5, -1.2], [40, 55, 9, 9, 0.1]])
  valid = np.ones((64, 96), bool)
  found = HEADS["oriented"].decode(outputs(b, [0, 1, 0], [1.0, 3.0, -1.0]), SPECS, valid, 1.2)
  np.testing.assert_allclose(found.boxes, b[[1, 0]], atol=1e-4)  # the third is below the threshold
  assert found.class_ids.tolist() == [1, 0] and found.classes == ["a", "b"]
  np.testing.assert_allclose(found.scores, 1 / (1 + np.exp([-3.0, -1.0])), rtol=1e-6)
  valid[:, 64:] = False
  assert len(decode(outputs(b, [0, 1, 0], [1.0, 3.0, 2.0]), SPECS, valid).boxes) == 2


def test_one_thing_that_peaks_twice_is_told_once():
  b = np.array([[20.0, 20, 30, 12, 0.6], [30.0, 24, 30, 12, 0.6], [70, 40, 20, 9, 0]])
  raw = outputs(b, [0, 1, 0], [1.0, 2.0, 0.5])
  raw["box"][0, :, 2, 2] = raw_of(b[1] + [-0.5, 0, 0, 0, 0], 8 * np.array([2, 2]) + 3.5)[0]
  found = decode(raw, SPECS, np.ones((64, 96), bool))
  assert found.class_ids.tolist() == [1, 0] and len(found.boxes) == 2
  beside = np.array([[20.0, 20, 30, 12, 0.6], [20 - 14 * np.sin(0.6), 20 + 14 * np.cos(0.6), 30, 12, 0.6]])
  assert without_twins(beside).tolist() == [0, 1]  # parked side by side


def test_fairmodeld_leaves_out_what_has_no_message():
  from types import SimpleNamespace

  from openpilot.selfdrive.modeld.fair.model import FairModel

  plan = SimpleNamespace(heads={"oriented": SPECS}, rare=frozenset())
  model = SimpleNamespace(warp=SimpleNamespace(valid=np.ones((256, 512), bool)))
  assert FairModel._decode(model, plan, {}, SimpleNamespace(valid=True), 1) == []

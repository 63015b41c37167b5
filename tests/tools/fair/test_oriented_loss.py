"""The losses of oriented boxes: ProbIoU by the paper's formula in higher precision and by its integral, what does not
change it, gradients; targets and cells; the masked distance from a teacher's patch map."""

import mpmath
import numpy as np
import pytest
import torch
from loss_checks import finite_gradients, t, value

from openpilot.selfdrive.modeld.fair.heads.oriented import boxes_of, corners, le90, prob_iou, raw_of
from openpilot.tools.fair.distillation.augment import Augmentation, none, turned
from openpilot.tools.fair.distillation.oriented import (
  code_of,
  coded_gaussian,
  gaussian,
  holds,
  oriented_loss,
  probiou_loss,
)
from openpilot.tools.fair.spec import Class, ClassSet, InputSpec
from openpilot.tools.fair.tasks import TASKS, say
from openpilot.tools.fair.tasks.oriented import moved, oriented_list
from openpilot.tools.fair.tasks.patches import on_objects
from openpilot.tools.fair.teacher import Label

PICTURE = InputSpec("rgb", 64, 96)


def boxes(rng, n):
  return le90(np.column_stack([rng.uniform(0, 60, (n, 2)), rng.uniform(3, 50, (n, 2)), rng.uniform(-4, 4, n)]))


def hellinger(a, b):
  """1 - ProbIoU of two boxes: equations 3 to 9 of the paper, 50 digits."""
  with mpmath.workdps(50):

    def terms(box):
      w, h, angle = (mpmath.mpf(float(v)) for v in box[2:])
      p, q = w**2 / 12, h**2 / 12
      c, s = mpmath.cos(angle), mpmath.sin(angle)
      return p * c**2 + q * s**2, p * s**2 + q * c**2, (p - q) * s * c

    (a1, b1, c1), (a2, b2, c2) = terms(a), terms(b)
    x1, y1, x2, y2 = (mpmath.mpf(float(v)) for v in (*a[:2], *b[:2]))
    den = (a1 + a2) * (b1 + b2) - (c1 + c2) ** 2
    first = ((a1 + a2) * (y1 - y2) ** 2 + (b1 + b2) * (x1 - x2) ** 2) / den / 4
    second = (c1 + c2) * (x2 - x1) * (y1 - y2) / den / 2
    third = mpmath.log(den / (4 * mpmath.sqrt((a1 * b1 - c1**2) * (a2 * b2 - c2**2)))) / 2
    return float(mpmath.sqrt(1 - mpmath.exp(-(first + second + third))))


def test_probiou_is_the_papers(rng):
  a = boxes(rng, 40)
  b = a + rng.normal(0, 1, (40, 5)) * [8, 8, 3, 3, 0.5]
  b[:, 2:4] = np.maximum(b[:, 2:4], 1)
  want = [hellinger(x, y) for x, y in zip(a, b, strict=True)]
  got = probiou_loss(gaussian(t(a)), gaussian(t(b)), eps=0.0)
  np.testing.assert_allclose(got.numpy(), want, rtol=1e-7, atol=1e-9)
  np.testing.assert_allclose(1 - np.diag(prob_iou(a, b)), want, rtol=1e-6, atol=1e-7)  # the device's
  single = probiou_loss(gaussian(t(a).float()), gaussian(t(b).float()))
  np.testing.assert_allclose(single.numpy(), want, atol=2e-3)


def test_turns_by_pi_and_sides_that_change_places_are_nothing(rng):
  a, b = boxes(rng, 30), boxes(rng, 30)
  want = probiou_loss(gaussian(t(a)), gaussian(t(b)))
  swapped = a[:, [0, 1, 3, 2, 4]] + [0, 0, 0, 0, np.pi / 2]
  for other in (a + [0, 0, 0, 0, np.pi], swapped, a + [0, 0, 0, 0, -3 * np.pi]):
    torch.testing.assert_close(probiou_loss(gaussian(t(other)), gaussian(t(b))), want, rtol=1e-9, atol=1e-9)
  torch.testing.assert_close(probiou_loss(gaussian(t(b)), gaussian(t(a))), want)
  assert float(probiou_loss(gaussian(t(a)), gaussian(t(a))).abs().max()) < 1e-3


def test_the_code_is_the_devices(rng):
  b, center = boxes(rng, 50), rng.uniform(0, 60, (50, 2))
  code = code_of(t(b), t(center))
  np.testing.assert_allclose(code.numpy(), raw_of(b, center), rtol=1e-9, atol=1e-9)
  offset, covariance = coded_gaussian(code)
  point, want = gaussian(t(b))
  torch.testing.assert_close(t(center) + offset, point)
  torch.testing.assert_close(covariance, want, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(corners(boxes_of(code.numpy(), center)), corners(b), atol=1e-8)


def test_gradients(rng):
  b = boxes(rng, 6)
  code = code_of(t(b), t(b[:, :2])) + t(rng.normal(0, 0.3, (6, 7)))
  target = gaussian(t(b - [*b[0, :2], 0, 0, 0]))

  def loss(code):
    return probiou_loss(coded_gaussian(code), target)

  assert torch.autograd.gradcheck(loss, (code.clone().requires_grad_(True),))
  for far in (0.0, 1e6):  # a square's code, and one far away, of any size
    wild = torch.zeros(6, 7, dtype=torch.float64) + far
    wild.requires_grad_(True)
    finite_gradients(loss(wild).sum(), wild)
  same = code_of(t(b), t(b[:, :2])).requires_grad_(True)
  (g,) = finite_gradients(probiou_loss(coded_gaussian(same), gaussian(t(b * [0, 0, 1, 1, 1]))).sum(), same)
  assert float(g.abs().max()) < 1e-3


def objects_of(b, cls):
  return [{"boxes": t(b).float(), "cls": t(np.array(cls)), "score": torch.ones(len(b))}]


def perfect(b, cls, shape=(8, 12), classes=2):
  """Outputs that say the boxes at every cell near their centers."""
  heat = torch.full((1, classes, *shape), -12.0)
  box = torch.zeros(1, 7, *shape)
  for one, k in zip(b, cls, strict=True):
    j, i = ((one[:2] + 0.5) // 8).astype(int)
    heat[0, k, i, j] = 12
    for y in range(max(0, i - 1), min(shape[0], i + 2)):
      for x in range(max(0, j - 1), min(shape[1], j + 2)):
        box[0, :, y, x] = t(raw_of(one, 8 * np.array([x, y]) + 3.5)[0])
  return {"oriented_heat": heat, "oriented_box": box}


FAR = np.array([[16.0, 20, 18, 8, 0.7], [70, 40, 22, 6, -1.1]])


def test_the_right_answer_costs_nothing_and_a_wrong_one_does():
  valid = torch.ones(1, 16, 24, dtype=torch.bool)
  out = perfect(FAR, [0, 1])
  parts = oriented_loss(out, objects_of(FAR, [0, 1]), valid)
  assert set(parts) == {"heat", "probiou", "code", "angle"} and all(float(v) < 1e-3 for v in parts.values())
  for channel, part in ((0, "probiou"), (2, "probiou"), (3, "probiou"), (0, "code"), (4, "code"), (6, "angle")):
    moved_ = {**out, "oriented_box": out["oriented_box"].clone()}
    moved_["oriented_box"][:, channel] += 0.5
    assert float(oriented_loss(moved_, objects_of(FAR, [0, 1]), valid)[part]) > 0.03
  assert float(oriented_loss(perfect(FAR, [1, 0]), objects_of(FAR, [0, 1]), valid)["heat"]) > 5


def test_only_cells_in_the_box_answer():
  """The box lies across the diagonal: of the eight cells around its own two hold their centers in it."""
  b = np.array([[35.5, 27.5, 28, 6, np.pi / 4]])
  out = {"oriented_heat": torch.zeros(1, 1, 8, 12), "oriented_box": torch.zeros(1, 7, 8, 12, requires_grad=True)}
  parts = oriented_loss(out, objects_of(b, [0]), torch.ones(1, 16, 24, dtype=torch.bool))
  (parts["probiou"] + parts["code"] + parts["angle"]).backward()
  taught = out["oriented_box"].grad.abs().sum((0, 1)) > 0
  assert sorted(map(tuple, taught.nonzero().tolist())) == [(2, 3), (3, 4), (4, 5)]


def test_nothing_there_and_nothing_known():
  out = {"oriented_heat": torch.zeros(1, 1, 8, 12, requires_grad=True), "oriented_box": torch.zeros(1, 7, 8, 12)}
  out["oriented_box"].requires_grad_(True)
  for valid in (torch.ones(1, 16, 24, dtype=torch.bool), torch.zeros(1, 16, 24, dtype=torch.bool)):
    parts = oriented_loss(out, objects_of(np.zeros((0, 5)), np.zeros(0, int)), valid)
    assert value(parts["probiou"]) == 0 and (value(parts["heat"]) > 0) == bool(valid.any())
    finite_gradients(sum(parts.values()), *out.values())
  outside = objects_of(np.array([[500.0, 500, 10, 5, 0]]), [0])
  assert value(oriented_loss(out, outside, torch.ones(1, 16, 24, dtype=torch.bool))["probiou"]) == 0


def test_points_in_a_box(rng):
  b = boxes(rng, 20)
  some = rng.uniform(-1, 1, (20, 30, 2))
  p = corners(b)
  along, across = (p[:, 1] - p[:, 0]) / 2, (p[:, 3] - p[:, 0]) / 2
  points = b[:, None, :2] + 1.3 * (some[..., :1] * along[:, None] + some[..., 1:] * across[:, None])
  want = (np.abs(1.3 * some) <= 1).all(-1)
  assert (holds(t(b), t(points)).numpy() == want).all()


# targets


def change(rng):
  angle, zoom = rng.uniform(-3, 3), rng.uniform(0.5, 2)
  c, s = zoom * np.cos(angle), zoom * np.sin(angle)
  flip = np.diag([rng.choice([-1.0, 1.0]), 1, 1])
  return Augmentation(np.array([[c, -s, rng.uniform(-9, 9)], [s, c, rng.uniform(-9, 9)], [0, 0, 1]]) @ flip, zoom)


def test_boxes_move_as_their_corners_do(rng):
  a, b = change(rng), boxes(rng, 20)
  got = corners(moved(a, b))
  want = corners(b) @ a.matrix[:2, :2].T + a.matrix[:2, 2]
  for x, y in zip(got, want, strict=True):
    apart = np.linalg.norm(x[:, None] - y[None], axis=-1)
    assert apart.min(0).max() < 1e-6 and apart.min(1).max() < 1e-6
  assert (le90(moved(a, b)) == moved(a, b)).all()


def test_a_picture_is_turned_about_its_center():
  a = turned(none(PICTURE), 90)
  x, y = (PICTURE.width - 1) / 2, (PICTURE.height - 1) / 2
  np.testing.assert_allclose(a.matrix @ [x, y, 1], [x, y, 1])
  np.testing.assert_allclose(a.matrix @ [x + 10, y, 1], [x, y + 10, 1], atol=1e-9)
  assert a.is_geometric and a.picture == PICTURE


CLASSES = ClassSet("pictures", tuple(Class(n, maps=False, boxes=True) for n in ("zott", "flurb")))
LABEL = Label("oriented", "boxes", classes=("flurb", "zott", "unknown"))


def table(b, cls):
  columns = dict(zip(("cx", "cy", "w", "h", "angle"), np.asarray(b, np.float32).T, strict=True))
  return {**columns, "cls": np.array(cls, np.int16), "score": np.ones(len(cls), np.float32)}


def test_targets_of_a_frame():
  """In their order: whole; its center outside; too thin; difficult; far outside."""
  b = [[30, 30, 20, 8, 0.5], [-3, 30, 20, 8, 0.0], [50, 20, 20, 1, 0.0], [70, 40, 20, 8, 1.0], [-90, 0, 20, 8, 0]]
  said = say([LABEL], [table(b, [0, 1, 0, 2, 0])], TASKS["oriented"], CLASSES, PICTURE)
  got = oriented_list(none(PICTURE), said, said.values[0])
  np.testing.assert_allclose(got["boxes"], np.array(b[:1], np.float32), rtol=1e-6)
  assert got["cls"].tolist() == [1] and got["upright"].shape == (1, 4) and len(got["ignore"]) == 3
  np.testing.assert_allclose(got["ignore"][0], [-0.5, 26, 7, 34])
  batch = TASKS["oriented"].targets(said, none(PICTURE), np.random.default_rng(0))["oriented"]
  assert len(batch) == 1 and batch[0]["cls"].tolist() == [1]


def test_what_teaches():
  teaches = TASKS["oriented"].teaches
  assert teaches(LABEL, CLASSES) and not teaches(Label("objects", "boxes", classes=("zott",)), CLASSES)
  assert not teaches(Label("oriented", "boxes", classes=("unknown",)), CLASSES)


def test_nobody_is_blamed_where_something_is_ignored():
  """A peak in an ignored region costs nothing, elsewhere it does."""
  o = {"boxes": torch.zeros(0, 5), "cls": torch.zeros(0, dtype=torch.int64), "score": torch.zeros(0)}
  o |= {"upright": torch.zeros(0, 4), "ignore": torch.tensor([[20.0, 10, 60, 50]])}
  batch = {"oriented": [o], "valid": torch.ones(1, 16, 24, dtype=torch.bool)}
  heat = torch.full((1, 2, 8, 12), -12.0)
  heat[0, 0, 3, 4] = 5
  inside = TASKS["oriented"].loss(None, {"oriented_heat": heat, "oriented_box": torch.zeros(1, 7, 8, 12)}, batch)
  heat = heat.roll(6, 3)
  outside = TASKS["oriented"].loss(None, {"oriented_heat": heat, "oriented_box": torch.zeros(1, 7, 8, 12)}, batch)
  assert float(inside["heat"]) < 1e-3 < 1 < float(outside["heat"])
  assert TASKS["oriented"].loss(None, {}, {"oriented": [None], "valid": batch["valid"]}) == {}


# the patch map


def test_the_mask_of_objects_is_the_boxes_and_a_margin():
  objects = [{"boxes": torch.tensor([[48.0, 32, 20, 8, 0.6]])}, None]
  on = on_objects(torch.ones(2, 16, 24, dtype=torch.bool), objects)
  y, x = np.mgrid[:16, :24] * 4 + 1.5
  c, s = np.cos(0.6), np.sin(0.6)
  u, v = (x - 48) * c + (y - 32) * s, (y - 32) * c - (x - 48) * s
  np.testing.assert_array_equal(on[0].numpy(), (np.abs(u) <= 18) & (np.abs(v) <= 12))
  assert not on[1].any()


@pytest.mark.parametrize("only", ["all", "objects"])
def test_the_patch_maps_distance_is_of_the_cells_that_count(only, rng):
  from types import SimpleNamespace

  teacher, student = t(rng.normal(0, 1, (1, 6, 4, 6))).float(), t(rng.normal(0, 1, (1, 6, 4, 6))).float()
  teacher[:, :, 0] = torch.nan  # unknown
  valid = torch.ones(1, 16, 24, dtype=torch.bool)
  valid[:, :, 20:] = False
  objects = [{"boxes": torch.tensor([[40.0, 40, 16, 16, 0.0]])}]
  model = SimpleNamespace(standardiser=lambda x: x, projector=lambda x, size: x)
  parts = TASKS["patches"].loss(
    model, {"features": student}, {"features": teacher, "valid": valid, "oriented": objects}
  )
  a, b = student.double().numpy()[0], teacher.double().nan_to_num().numpy()[0]
  apart = 1 - (a * b).sum(0) / np.sqrt((a * a).sum(0) * (b * b).sum(0) + 1e-30)
  weight = np.zeros((4, 6))
  weight[1:, :5] = 1
  if only == "objects":
    weight *= on_objects(valid, objects)[0].reshape(4, 4, 6, 4).float().mean((1, 3)).numpy()  # shares of cells
  assert float(parts[only]) == pytest.approx((apart * weight).sum() / weight.sum(), abs=1e-5)

"""Every loss of distillation against a reference written plainly in numpy and scipy, in float64, on fresh random input;
and its edges."""

import itertools
import math

import numpy as np
import pytest
import torch
from loss_checks import TIGHT, finite_gradients, t, value
from scipy.special import expit, huber, log_expit, log_softmax, logsumexp, rel_entr, softmax

from openpilot.tools.fair.distillation import losses as ls

# soft labels


def test_soft_labels(rng):
  s, q, targets = rng.normal(size=(2, 5, 3, 4)) * 3, rng.normal(size=(2, 5, 3, 4)) * 3, rng.integers(0, 5, (2, 3, 4))
  targets[0, 0, :2] = 255
  soft, hard = [], []
  for b, y, x in zip(*np.nonzero(targets != 255), strict=True):
    soft.append(rel_entr(softmax(q[b, :, y, x] / 3), softmax(s[b, :, y, x] / 3)).sum() * 9)
    hard.append(-log_softmax(s[b, :, y, x])[targets[b, y, x]])
  expected = 0.6 * np.mean(soft) + 0.4 * np.mean(hard)
  assert value(ls.soft_label_loss(t(s), t(q), t(targets), 3.0, 0.6)) == pytest.approx(expected, rel=1e-10)
  last = ls.soft_label_loss(
    t(s).movedim(1, -1).reshape(-1, 5), t(q).movedim(1, -1).reshape(-1, 5), t(targets).reshape(-1), 3.0, 0.6
  )
  assert value(last) == pytest.approx(expected, rel=1e-10)


def test_soft_labels_at_the_edges(rng):
  s, q = t(rng.normal(size=(6, 4)), True), t(rng.normal(size=(6, 4)))
  loss = ls.soft_label_loss(s, q, torch.full((6,), 255))
  assert value(loss) == 0 and not finite_gradients(loss, s)[0].any()
  wild = t(np.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]]), True)
  assert finite_gradients(ls.soft_label_loss(wild, -wild.detach(), torch.tensor([1, 0])), wild)[0].any()
  assert ls.soft_label_loss(s.half(), q.half(), torch.zeros(6, dtype=torch.int64)).dtype == torch.float32


def segmentation_reference(logits, p, valid, w):
  c = logits.shape[1]
  mass = entropy = 0.0
  inter, pp, qq = np.zeros(c), np.zeros(c), np.zeros(c)
  for b, y, x in np.ndindex(valid.shape):
    if valid[b, y, x] and p[b, :, y, x].sum() > 0:
      q = softmax(logits[b, :, y, x])
      mass += (w * p[b, :, y, x]).sum()
      entropy -= (w * p[b, :, y, x] * np.log(q)).sum()
      inter, pp, qq = inter + p[b, :, y, x] * q, pp + p[b, :, y, x] ** 2, qq + q**2
  return entropy / mass + np.average(1 - (2 * inter + 1) / (pp + qq + 1), weights=w * (pp > 0))


def test_segmentation(rng):
  logits, p = rng.normal(size=(2, 4, 5, 6)) * 2, rng.dirichlet(np.ones(4), (2, 5, 6)).transpose(0, 3, 1, 2)
  valid, w = rng.random((2, 5, 6)) < 0.7, rng.random(4) + 0.1
  p[:, :, :2, 3] = 0  # unknown
  p[:, 3] = 0  # a class that the teacher never sees
  p[:, :, 3, 3], valid[:, 3, 3] = np.nan, False
  args = t(logits), t(p), t(valid)
  assert value(ls.segmentation_loss(*args)) == pytest.approx(
    segmentation_reference(logits, p, valid, np.ones(4)), rel=1e-10
  )
  assert value(ls.segmentation_loss(*args, weights=t(w))) == pytest.approx(
    segmentation_reference(logits, p, valid, w), rel=1e-10
  )


def test_a_class_of_less_than_a_pixel_counts_too(rng):
  logits, p = rng.normal(size=(1, 3, 1, 2)), np.array([[[[0.6, 0.9]], [[0.4, 0.1]], [[0.0, 0.0]]]])
  valid, w = np.ones((1, 1, 2), bool), np.array([1.0, 5.0, 2.0])
  assert value(ls.segmentation_loss(t(logits), t(p), t(valid), weights=t(w))) == pytest.approx(
    segmentation_reference(logits, p, valid, w), rel=1e-10
  )


def test_segmentation_at_the_edges(rng):
  logits, p = t(rng.normal(size=(2, 3, 4, 5)), True), rng.dirichlet(np.ones(3), (2, 4, 5)).transpose(0, 3, 1, 2)
  valid = rng.random((2, 4, 5)) < 0.5
  p[:, :, 0, 0] = 0
  counts = valid.copy()
  counts[:, 0, 0] = False
  (grad,) = finite_gradients(ls.segmentation_loss(logits, t(p), t(valid)), logits)
  np.testing.assert_array_equal(grad.abs().sum(1).numpy() > 0, counts)
  for nothing in (
    ls.segmentation_loss(logits, t(p), t(valid) & False),
    ls.segmentation_loss(logits, t(p * 0), t(valid)),
  ):
    assert value(nothing) == 0 and not finite_gradients(nothing, logits)[0].any()
  wild = t(rng.choice([-1e4, 1e4], (2, 3, 4, 5)), True)
  finite_gradients(ls.segmentation_loss(wild, t(p), t(valid)), wild)


def test_soft_segmentation(rng):
  """0.7 of the divergence at temperature 4, and 0.3 of the hard loss of the likeliest class; pixels of which nothing is
  known count in neither."""
  logits, p = rng.normal(size=(2, 4, 3, 5)), softmax(rng.normal(size=(2, 4, 3, 5)) * 2, axis=1)
  p[0, :, 0, 0], valid, w = 0, rng.random((2, 3, 5)) < 0.8, rng.uniform(0.5, 2, 4)
  p[1, :, 1, 1], valid[1, 1, 1] = [1, 0, 0, 0], True
  soft = []
  for b, y, x in zip(*np.nonzero(valid & (p.sum(1) > 0)), strict=True):
    teacher = np.maximum(p[b, :, y, x], 1e-4) ** (1 / 4)
    soft.append(16 * rel_entr(teacher / teacher.sum(), softmax(logits[b, :, y, x] / 4)).sum())
  one_hot = (np.arange(4)[None, :, None, None] == p.argmax(1)[:, None]) * (p.sum(1) > 0)[:, None]
  hard = value(ls.segmentation_loss(t(logits), t(one_hot.astype(float)), t(valid), t(w)))
  x = t(logits, True)
  loss = ls.soft_segmentation_loss(x, t(p), t(valid), t(w))
  assert value(loss) == pytest.approx(0.7 * np.mean(soft) + 0.3 * hard, rel=1e-10)
  finite_gradients(loss, x)
  nothing = ls.soft_segmentation_loss(x, t(p), t(valid & False), t(w))
  assert value(nothing) == 0 and not finite_gradients(nothing, x)[0].any()


# depth


def depth_reference(log_depth, depth, valid, metric):
  sums = {k: [] for k in ("invariant", "gradient", "silog", "metric")}
  for z, d, v in zip(log_depth[:, 0], depth, valid, strict=True):
    known = v & np.isfinite(d) & ((d > 0) | (not metric))
    if not known.any():
      continue
    difference = np.zeros(z.shape)
    for sign, q in ((1, np.exp(-z)), (-1, 1 / d if metric else d)):
      values = np.sort(q[known])
      median = values[(len(values) - 1) // 2]
      difference[known] += sign * (q[known] - median) / np.mean(np.abs(values - median))
    sums["invariant"].append(np.abs(difference[known]).mean())
    gradient = 0.0
    for step in (1, 2, 4, 8):
      total = 0.0
      h, w = range(0, z.shape[0], step), range(0, z.shape[1], step)
      for y, x in itertools.product(h, w):
        for yy, xx in ((y + step, x), (y, x + step)):
          if yy < z.shape[0] and xx < z.shape[1] and known[y, x] and known[yy, xx]:
            total += abs(difference[yy, xx] - difference[y, x])
      gradient += total / max(sum(known[y, x] for y in h for x in w), 1)
    sums["gradient"].append(0.5 * gradient)
    if metric:
      g = z[known] - np.log(d[known])
      sums["silog"].append(math.sqrt((g**2).mean() - 0.85 * g.mean() ** 2 + 1e-8) - 1e-4)
      sums["metric"].append(np.abs(g).mean())
  return {k: np.mean(v) for k, v in sums.items() if v}


def random_depth(rng, b=3, h=12, w=17):
  depth, valid = np.exp(rng.normal(2, 1, (b, h, w))), rng.random((b, h, w)) < 0.8
  depth[rng.random((b, h, w)) < 0.1] = np.nan
  depth[0, 0] = np.inf
  return rng.normal(2, 1, (b, 1, h, w)), depth, valid


@pytest.mark.parametrize("metric", [True, False])
def test_depth(rng, metric):
  log_depth, depth, valid = random_depth(rng)
  depth[1, 3, :4] = -1.0
  valid[2] = False  # an image that knows nothing is no part of the mean
  parts = ls.depth_loss(t(log_depth), t(depth), t(valid), metric)
  expected = depth_reference(log_depth, depth, valid, metric)
  assert parts.keys() == expected.keys()
  for k, v in expected.items():
    assert value(parts[k]) == pytest.approx(v, rel=1e-9), k


def test_depth_invariances(rng):
  log_depth, depth, valid = random_depth(rng)
  one = ls.depth_loss(t(log_depth), t(depth), t(valid), metric=False)
  two = ls.depth_loss(
    t(log_depth), t(7.3 * depth - 2.1), t(valid), metric=False
  )  # any scale and shift of inverse depth
  three = ls.depth_loss(t(log_depth) + 0.4, t(depth), t(valid), metric=False)  # any scale of the student's
  for k in one:
    assert value(one[k]) == pytest.approx(value(two[k]), rel=1e-9) == pytest.approx(value(three[k]), rel=1e-9)
  right = ls.depth_loss(t(np.log(depth))[:, None].nan_to_num(0.0, 0.0, 0.0), t(depth), t(valid))
  assert all(abs(value(v)) < 1e-12 for v in right.values())


def test_depth_at_the_edges(rng):
  z, depth, valid = random_depth(rng)
  for metric in (True, False):
    log_depth = t(z, True)
    (grad,) = finite_gradients(sum(ls.depth_loss(log_depth, t(depth), t(valid), metric).values()), log_depth)
    assert not grad[:, 0][~(t(valid) & torch.isfinite(t(depth)))].any()
    for nothing in (
      ls.depth_loss(log_depth, t(depth), t(valid) & False, metric),
      ls.depth_loss(log_depth, t(depth) * np.nan, t(valid), metric),
    ):
      assert (
        all(value(v) == 0 for v in nothing.values()) and not finite_gradients(sum(nothing.values()), log_depth)[0].any()
      )
    single = np.zeros_like(valid)
    single[0, 3, 4] = True
    for wild in (np.zeros_like(z), np.full_like(z, 1e3), np.full_like(z, -1e3), z * 1e3):
      for where in (valid, single):
        for d in (depth, np.full_like(depth, 5.0)):
          x = t(wild.astype(np.float32), True)
          finite_gradients(sum(ls.depth_loss(x, t(d.astype(np.float32)), t(where), metric).values()), x)


def test_depth_of_a_flat_student(rng):
  """A student that still says the same depth everywhere: its deviation is next to none, but what it is told to do is
  not without bounds."""
  _, depth, valid = random_depth(rng)
  log_depth = t(2 + 1e-6 * rng.normal(size=(3, 1, 12, 17)), True)
  (grad,) = finite_gradients(sum(ls.depth_loss(log_depth, t(depth), t(valid), metric=False).values()), log_depth)
  assert 0 < grad.norm() < 100


def test_depth_gradient_is_right(rng):
  log_depth, depth, valid = random_depth(rng, 2, 4, 5)
  x = t(log_depth, True)
  assert torch.autograd.gradcheck(lambda x: sum(ls.depth_loss(x, t(depth), t(valid)).values()), (x,), atol=1e-5)


# masks


def test_focal_and_dice(rng):
  x, y, known = rng.normal(size=(3, 4, 5)) * 3, rng.integers(0, 2, (3, 4, 5)).astype(float), rng.random((3, 4, 5)) < 0.6
  p = expit(x)
  expected = np.where(y == 1, -0.3 * (1 - p) ** 1.5 * np.log(p), -0.7 * p**1.5 * np.log(1 - p))
  np.testing.assert_allclose(ls.sigmoid_focal_loss(t(x), t(y), 0.3, 1.5).numpy(), expected, **TIGHT)
  for i in range(3):
    a, b = p[i][known[i]], y[i][known[i]]
    assert value(ls.dice(t(a @ b), t(a.sum() + b.sum()))) == pytest.approx(
      1 - (2 * (a @ b) + 1) / (a.sum() + b.sum() + 1), rel=1e-10
    )
  wild = t(rng.choice([-1e5, 0.0, 1e5], (3, 4, 5)), True)
  finite_gradients(ls.sigmoid_focal_loss(wild, t(y)).sum(), wild)


# points


def test_points(rng):
  pred, logits = rng.normal(size=(3, 2, 4, 5, 2)) * 9, rng.normal(size=(3, 2, 4, 5))
  points, visible, known = rng.normal(size=(2, 4, 5, 2)) * 9, rng.random((2, 4, 5)).round(), rng.random((2, 4, 5)) < 0.7
  error = total = entropy = count = 0.0
  for i, c, k, n in np.ndindex(logits.shape):
    if known[c, k, n]:
      w = 0.8 ** (2 - i) * (1.0 if visible[c, k, n] else 0.2)
      error += w * huber(6.0, pred[i, c, k, n] - points[c, k, n]).sum()
      total += w
      entropy -= 0.8 ** (2 - i) * (
        log_expit(logits[i, c, k, n]) if visible[c, k, n] else log_expit(-logits[i, c, k, n])
      )
      count += 0.8 ** (2 - i)
  points[~known] = np.nan
  parts = ls.points_loss(t(pred), t(logits), t(points), t(visible), t(known))
  assert value(parts["points"]) == pytest.approx(0.05 * error / total, rel=1e-10)
  assert value(parts["visible"]) == pytest.approx(entropy / count, rel=1e-10)
  single = ls.points_loss(t(pred[2]), t(logits[2]), t(points), t(visible), t(known))
  twice = ls.points_loss(t(pred[[2, 2]]), t(logits[[2, 2]]), t(points), t(visible), t(known))
  assert all(value(single[k]) == pytest.approx(value(twice[k]), rel=1e-12) for k in parts)
  reached = rng.random(known.shape) < 0.5  # the others' places teach nothing, whether they are seen still does
  near, only = (
    ls.points_loss(
      t(pred), t(logits), t(points), t(visible), t(known if n else known & reached), t(reached) if n else None
    )
    for n in (1, 0)
  )
  assert value(near["points"]) == pytest.approx(value(only["points"]), rel=1e-10) and value(near["visible"]) == value(
    parts["visible"]
  )
  x, v = t(pred * 1e6, True), t(logits * 1e6, True)
  for where in (known, known & False):
    loss = sum(ls.points_loss(x, v, t(points), t(visible), t(where)).values())
    grads = finite_gradients(loss, x, v)
    assert all(not g[:, ~where].any() for g in grads) and (where.any() or value(loss) == 0)


def test_match(rng):
  """By hand, place by place; what is hidden, unknown or out of the window has no gradient."""
  sizes = (5, 3)
  looks = [(rng.integers(-3, 4, (2, 3, 6, 2)).astype(float), rng.normal(size=(2, 3, 6, s * s)) * 3) for s in sizes]
  cells = [
    c + rng.uniform(-s / 2, s / 2, c.shape) for (c, _), s in zip(looks, sizes, strict=True)
  ]  # up to half a cell beyond the outer places' middles
  visible, known = rng.random((2, 3, 6)).round(), rng.random((2, 3, 6)) < 0.8
  visible[0, 0, :2], known[0, 0, :2] = 1, True
  for (center, _), at, s in zip(looks, cells, sizes, strict=True):  # one inside and one outside, whatever is drawn
    at[0, 0, :2] = center[0, 0, :2] + [[0, 0], [s / 2, 0]]
  expected, counted = 0.0, []
  for (center, logits), at, size in zip(looks, cells, sizes, strict=True):
    terms, where = [], np.zeros(known.shape, bool)
    for i in np.ndindex(known.shape):
      dx, dy = at[i] - center[i]
      if known[i] and visible[i] and max(abs(dx), abs(dy)) <= size // 2:
        where[i] = True
        log_p = logits[i] - logsumexp(logits[i])
        terms.append(
          -sum(
            max(0, 1 - abs(dx - (k % size - size // 2))) * max(0, 1 - abs(dy - (k // size - size // 2))) * log_p[k]
            for k in range(size * size)
          )
        )
    expected += np.mean(terms)
    counted.append(where)
  assert all(0 < w.sum() < (known & (visible > 0)).sum() for w in counted)
  cells = [np.where(known[..., None], c, np.nan) for c in cells]
  given = [(t(c), t(x, True)) for c, x in looks]
  loss = ls.match_loss(given, [t(c) for c in cells], t(visible), t(known), weight=0.7)
  assert value(loss) == pytest.approx(0.7 * expected, rel=1e-10)
  grads = finite_gradients(loss, *(x for _, x in given))
  assert all(not g[~w].any() and g[w].any() for g, w in zip(grads, counted, strict=True))
  nothing = ls.match_loss(given, [t(c) for c in cells], t(visible), t(known & False))
  assert value(nothing) == 0 and all(not g.any() for g in finite_gradients(nothing, *(x for _, x in given)))


# task weights


def test_task_weights():
  losses = {"depth": torch.tensor(2.0, requires_grad=True), "points": torch.tensor(3.0, requires_grad=True)}
  fixed = ls.TaskWeights({"depth": 0.5, "points": 2.0, "objects": 9.0})
  assert value(fixed(losses)) == 7.0 and not list(fixed.parameters()) and fixed.effective()["points"] == 2.0
  learned = ls.TaskWeights({"depth": 1.0, "points": 1.0, "objects": 1.0}, learned=True)
  assert value(learned(losses)) == 2.5
  parameters = [learned.log_variance[k] for k in losses]
  for _ in range(100):
    for p, g in zip(parameters, torch.autograd.grad(learned(losses), parameters), strict=True):
      p.data -= g
  # the optimum of exp(-s) L + s is s = log L: the noisier task weighs less; the task without a loss is as it was
  assert learned.effective() == pytest.approx({"depth": 0.25, "points": 1 / 6, "objects": 0.5}, rel=1e-4)
  again = ls.TaskWeights({"depth": 1.0, "points": 1.0, "objects": 1.0}, learned=True)
  again.load_state_dict(learned.state_dict())
  assert again.effective() == learned.effective()
  for wrong, said in (({"lanes": torch.ones(())}, "lanes"), ({}, "no task")):
    with pytest.raises(ValueError, match=said):
      fixed(wrong)

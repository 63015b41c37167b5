"""Losses of features against references written plainly in numpy and scipy, in float64, on fresh random input; and
their edges."""

import numpy as np
import pytest
import torch
from loss_checks import finite_gradients, t, value
from scipy.spatial.distance import cosine
from scipy.special import rel_entr, softmax

from openpilot.tools.fair.distillation import features as ft
from openpilot.tools.fair.distillation import losses as ls


def test_hadamard_matrices():
  for n in (1, 2, 4, 12, 16, 20, 28, 36, 192, 384, 768, 1024, 1280):
    h = ft.hadamard(n)
    assert h is not None and h.abs().eq(1).all() and torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64)), n
  assert all(ft.hadamard(n) is None for n in (3, 5, 6, 10, 14))  # none can exist


@pytest.mark.parametrize("channels", [1, 2, 5, 6, 12, 16])
def test_standardiser(rng, channels):
  mix = rng.normal(size=(channels, channels)) * np.geomspace(1, 30, channels)
  x = (
    np.einsum("dc,bchw->bdhw", mix, rng.normal(size=(6, channels, 5, 7)))
    + 100 * rng.normal(size=channels)[:, None, None]
  )
  valid = rng.random((6, 5, 7)) < 0.9
  s = ft.Standardiser(channels, torch.float64)
  with pytest.raises(RuntimeError, match="not fitted"):
    s(t(x))
  for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
    s.update(t(x[part]), t(valid[part]))
  s.update(t(x), t(valid) & False)
  s.finish()
  y = s(t(x)).numpy()
  inside = y.transpose(0, 2, 3, 1)[valid]
  np.testing.assert_allclose(inside.mean(0), 0, atol=1e-9)
  np.testing.assert_allclose(inside.var(0), 1, rtol=1e-8)  # every channel alike
  np.testing.assert_allclose(s.inverse(t(y)).numpy(), x, rtol=1e-9, atol=1e-9)
  # a rotation and one scalar: all distances are those of the teacher, over the root of numpy's mean variance
  scale = np.sqrt(np.trace(np.atleast_2d(np.cov(x.transpose(0, 2, 3, 1)[valid].T, bias=True))) / channels)
  a, b = x[0, :, 0, 0] - x[1, :, 2, 3], y[0, :, 0, 0] - y[1, :, 2, 3]
  assert np.linalg.norm(a) / np.linalg.norm(b) == pytest.approx(scale, rel=1e-9)
  again = ft.Standardiser(channels, torch.float64)
  again.load_state_dict(s.state_dict())
  np.testing.assert_array_equal(again(t(x)).numpy(), y)


def test_standardiser_refuses(rng):
  s = ft.Standardiser(4)
  with pytest.raises(ValueError, match="at least 2"):
    s.finish()
  s.update(torch.ones(1, 4, 3, 3))
  with pytest.raises(ValueError, match="mean variance is 0"):
    s.finish()
  s.update(torch.full((1, 4, 3, 3), torch.nan))
  with pytest.raises(ValueError, match="cannot be standardised"):
    s.finish()


def test_shrink_valid(rng):
  valid = rng.random((2, 8, 12)) < 0.8
  small = ft.shrink_valid(t(valid), 4, 3).numpy()
  for b, y, x in np.ndindex(small.shape):
    assert small[b, y, x] == valid[b, 2 * y : 2 * y + 2, 4 * x : 4 * x + 4].all()
  assert torch.equal(ft.shrink_valid(t(valid), 8, 12), t(valid)) and ft.shrink_valid(t(valid), 3, 5).shape == (2, 3, 5)


def test_feature_loss(rng):
  p, q, valid = rng.normal(size=(2, 6, 3, 4)), rng.normal(size=(2, 6, 3, 4)) * 2, rng.random((2, 6, 8)) < 0.95
  each = []
  for b, y, x in np.ndindex(2, 3, 4):
    if valid[b, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].all():
      d = np.abs(p[b, :, y, x] - q[b, :, y, x])
      each.append(0.9 * cosine(p[b, :, y, x], q[b, :, y, x]) + 0.1 * np.where(d < 1, d * d / 2, d - 0.5).mean())
  # the loss guards its roots with 1e-6, beside norms of about 6 and more
  assert value(ft.feature_loss(t(p), t(q), t(valid))) == pytest.approx(np.mean(each), rel=1e-5)
  for x, where in ((p, valid & False), (p * 0, valid), (p * 1e8, valid)):
    x = t(x, True)
    (grad,) = finite_gradients(ft.feature_loss(x, t(q), t(where)), x)
    assert grad.abs().max() < 1e3 and (where.any() or not grad.any())


def test_gram_loss(rng):
  a, b, valid = rng.normal(size=(3, 6, 3, 4)), rng.normal(size=(3, 9, 3, 4)), rng.random((3, 3, 4)) < 0.7
  valid[2] = False
  valid[2, 1, 1] = True  # one token has nothing to be like
  each = []
  for i in range(2):
    at = np.flatnonzero(valid[i])
    for j in at if len(at) > 1 else ():
      others = [k for k in at if k != j]
      q, p = (
        softmax(
          [(1 - cosine(m[i].reshape(len(m[i]), -1)[:, j], m[i].reshape(len(m[i]), -1)[:, k])) / 0.07 for k in others]
        )
        for m in (a, b)
      )
      each.append(rel_entr(p, q).sum())
  assert value(ft.gram_loss(t(a), t(b), t(valid))) == pytest.approx(
    np.mean(each), rel=1e-4
  )  # as above, over a temperature of 0.07
  assert (
    abs(value(ft.gram_loss(t(b[:, ::-1].copy() * 3), t(b), t(valid)))) < 1e-4
  )  # any rotation and scale of the student's space will do
  for x, where in ((a, valid & False), (a * 0, valid), (a * 1e8, valid)):
    x = t(x, True)
    finite_gradients(ft.gram_loss(x, t(b), t(where)), x)


def test_projector(rng):
  x = t(rng.normal(size=(2, 5, 4, 6)).astype(np.float32))
  linear, mlp = ft.Projector(5, 8), ft.Projector(5, 8, hidden=16)
  weight, bias = linear.layers[0].weight.detach().numpy()[:, :, 0, 0], linear.layers[0].bias.detach().numpy()
  np.testing.assert_allclose(
    linear(x).detach().numpy(),
    np.einsum("dc,bchw->bdhw", weight, x.numpy()) + bias[:, None, None],
    rtol=1e-4,
    atol=1e-5,
  )
  assert linear(x, (2, 3)).shape == mlp(x, (2, 3)).shape == (2, 8, 2, 3) and mlp(x).shape == (2, 8, 4, 6)


def test_autocast_changes_nothing(rng):
  """Losses run inside the trainer's autocast; products of matrices would lose most of their digits there."""
  x, y = (t(rng.normal(size=(2, 4, 6, 5)).astype(np.float32)) for _ in range(2))
  valid = torch.ones(2, 6, 5, dtype=torch.bool)
  s = ft.Standardiser(4)
  s.update(y)
  s.finish()

  def run() -> list[float]:
    return [
      value(ft.gram_loss(x, y, valid)),
      value(ft.feature_loss(x, s(y), valid)),
      value(s.inverse(s(y)).sum()),
      value(ls.segmentation_loss(x, y.softmax(1), valid)),
      value(ls.soft_label_loss(x, y, torch.zeros(2, 6, 5, dtype=torch.int64))),
      value(sum(ls.depth_loss(x[:, :1], y[:, 0].exp(), valid).values())),
    ]

  expected = run()
  with torch.autocast("cpu", torch.bfloat16):
    assert run() == expected


def test_primes():
  assert [n for n in range(-2, 60) if ft.is_prime(n)] == [
    2,
    3,
    5,
    7,
    11,
    13,
    17,
    19,
    23,
    29,
    31,
    37,
    41,
    43,
    47,
    53,
    59,
  ]

"""Each loss beside its formula written out in float64, and where its gradient goes."""

import math

import pytest
import torch

from openpilot.tools.dgx.training.constants import OUTPUT_SIZE, output_slices
from openpilot.tools.dgx.training.losses import (
  LOG_STD,
  WEIGHTS,
  bce,
  check_weights,
  cross_entropy,
  driving_loss,
  l1_loss,
  laplacian_nll_loss,
  lead_loss,
  plan_loss,
)
from openpilot.tools.dgx.training.outputs import parse_outputs
from openpilot.tools.lib.errors import UserError


@pytest.fixture
def g() -> torch.Generator:
  return torch.Generator().manual_seed(5)


def test_laplacian_beside_its_formula(g):
  """The formula of the notes: |d| / s + log(2 s), summed over horizon and coordinates, the least of the hypotheses,
  mean over the batch."""
  mean, target = torch.randn(4, 3, 6, 2, generator=g), torch.randn(4, 6, 2, generator=g)
  std = torch.rand(4, 3, 6, 2, generator=g) + 0.2
  want = 0.0
  for b in range(4):
    want += (
      min(
        sum(
          float(abs(mean[b, h, t, d] - target[b, t, d]) / std[b, h, t, d]) + math.log(2 * float(std[b, h, t, d]))
          for t in range(6)
          for d in range(2)
        )
        for h in range(3)
      )
      / 4
    )
  assert float(laplacian_nll_loss(mean, std, target)) == pytest.approx(want, rel=1e-5)


def test_only_the_winner_learns(g):
  mean, target = torch.randn(2, 3, 5, 2, generator=g), torch.zeros(2, 5, 2)
  mean[0, 1], mean[1, 2] = 0.1, -0.1
  std = torch.full_like(mean, 0.5).requires_grad_()
  mean.requires_grad_()
  laplacian_nll_loss(mean, std, target).backward()
  won = torch.zeros(2, 3, dtype=torch.bool)
  won[0, 1] = won[1, 2] = True
  for grad in (mean.grad, std.grad):
    assert ((grad != 0).flatten(2).any(2) == won).all()


def test_scales_are_held_and_unknown_targets_count_nothing(g):
  mean = torch.zeros(1, 1, 3, 2, requires_grad=True)
  for std in (0.0, 1e-30, 1e30):
    loss = laplacian_nll_loss(mean, torch.full((1, 1, 3, 2), std), torch.ones(1, 3, 2))
    assert torch.isfinite(loss)
    log = min(max(math.log(std) if std else -1e9, LOG_STD[0]), LOG_STD[1])
    assert loss.item() == pytest.approx(6 * (math.exp(-log) + log + math.log(2)), rel=1e-5)
  target = torch.ones(1, 3, 2)
  target[0, 1:] = float("nan")
  loss = laplacian_nll_loss(mean, torch.ones(1, 1, 3, 2), target)
  mean.grad = None
  loss.backward()
  assert loss.item() == pytest.approx(2 * (1 + math.log(2)), rel=1e-6)
  assert torch.isfinite(mean.grad).all() and (mean.grad[0, 0, 1:] == 0).all() and (mean.grad[0, 0, 0] == -1).all()
  masked = laplacian_nll_loss(
    mean, torch.ones(1, 1, 3, 2), torch.ones(1, 3, 2), mask=torch.tensor([1, 0, 0])[None, :, None]
  )
  assert masked.item() == pytest.approx(loss.item())


def test_half_precision_is_computed_in_float32(g):
  mean, target = torch.randn(2, 1, 33, 15, generator=g), torch.randn(2, 33, 15, generator=g)
  std = torch.rand(2, 1, 33, 15, generator=g) + 0.1
  half = laplacian_nll_loss(mean.bfloat16(), std.bfloat16(), target)
  assert half.dtype == torch.float32
  assert float(half) == pytest.approx(float(laplacian_nll_loss(mean, std, target)), rel=1e-2)


def test_plans_per_number_and_their_weights(g):
  hypotheses, target = torch.randn(2, 5, 33, 15, generator=g), torch.randn(2, 33, 15, generator=g)
  hypotheses[:, 3] = target + 0.01
  weights = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15]).repeat(2, 1)[:, :, None].requires_grad_()
  out = plan_loss(
    {"plan_hypotheses": hypotheses, "plan_stds_hypotheses": torch.ones_like(hypotheses), "plan_weights": weights},
    target,
  )
  assert float(out["plan"]) == pytest.approx(0.01 + math.log(2), rel=1e-4)
  assert float(out["plan_weights"]) == pytest.approx(-math.log(0.25), rel=1e-6)
  out["plan_weights"].backward()
  assert (weights.grad[:, 3] != 0).all() and (weights.grad[:, [0, 1, 2, 4]] == 0).all()


def test_lines_and_leads(g):
  a, b = torch.zeros(2, 4, 33, 2), torch.ones(2, 4, 33, 2)
  b[:, 1] = 3.0
  assert float(l1_loss(a, b)) == pytest.approx(1.5)
  sure = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0]])
  assert float(l1_loss(a, b, sure)) == pytest.approx((3 + 1.5 + 0.5) / 2)
  b[:, 1] = float("nan")
  assert float(l1_loss(a, b)) == pytest.approx(1.0)
  lead, target = torch.zeros(1, 3, 6, 4), torch.zeros(1, 3, 6, 4)
  target[0, 0], target[0, 1] = 0.5, 10.0
  assert float(lead_loss(lead, target, torch.tensor([[1.0, 0, 0]]))) == pytest.approx(0.125)
  assert float(lead_loss(lead, target, torch.tensor([[0.0, 1, 0]]))) == pytest.approx(9.5)
  assert float(lead_loss(lead, target, torch.zeros(1, 3))) == 0


def test_cross_entropies_are_torchs(g):
  logits, target = torch.randn(3, 55, generator=g), torch.rand(3, 55, generator=g)
  want = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
  assert float(bce(torch.sigmoid(logits), target)) == pytest.approx(float(want), rel=1e-5)
  logits = torch.randn(3, 4, 8, generator=g)
  target = torch.softmax(torch.randn(3, 4, 8, generator=g), -1)
  want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1))
  assert float(cross_entropy(torch.softmax(logits, -1), target)) == pytest.approx(float(want), rel=1e-5)


def test_driving_loss_falls_to_the_teacher(g):
  """A free vector learns to say what the teacher says."""
  slices = output_slices()
  teacher = parse_outputs(torch.randn(2, OUTPUT_SIZE, generator=g), slices)
  teacher["lead_prob"] = torch.ones_like(teacher["lead_prob"])
  vector = torch.zeros(2, OUTPUT_SIZE, requires_grad=True)
  optimizer = torch.optim.Adam([vector], 0.05)
  first = last = None
  for _ in range(120):
    last = driving_loss(parse_outputs(vector, slices), teacher)
    first = first or {k: float(v.detach()) for k, v in last.items()}
    optimizer.zero_grad()
    last["total"].backward()
    assert torch.isfinite(vector.grad).all()
    optimizer.step()
  assert set(first) == set(WEIGHTS) - {"plan_weights", "hidden_state"} | {"total"}
  assert all(float(last[k]) < first[k] for k in first)
  assert float((parse_outputs(vector, slices)["plan"] - teacher["plan"]).abs().mean()) < 0.1
  assert float(last["total"]) == pytest.approx(
    sum(WEIGHTS[k] * float(v) for k, v in last.items() if k != "total"), rel=1e-5
  )


def test_what_is_missing_is_not_taught(g):
  slices = output_slices()
  out = parse_outputs(torch.randn(1, OUTPUT_SIZE, generator=g), slices)
  plan = torch.full((1, 33, 15), float("nan"))
  plan[:, :, :2] = 1.0  # the driven path: position alone
  assert set(driving_loss(out, {"plan": plan})) == {"plan", "total"}
  assert set(driving_loss(out, {"plan": plan, "meta": out["meta"]}, {"meta": 2.0})) == {"meta", "total"}
  with pytest.raises(UserError, match="nothing to learn"):
    driving_loss(out, {"plan": plan}, {"plan": 0.0})
  with pytest.raises(UserError, match="nothing to learn"):
    driving_loss(out, {"speed": torch.ones(1)})


def test_weights_are_checked():
  assert check_weights({"plan": 2}) == {**WEIGHTS, "plan": 2.0}
  with pytest.raises(UserError, match="no loss path"):
    check_weights({"path": 1})
  for wrong in ("1", -1, float("nan"), True):
    with pytest.raises(UserError, match="weight of loss plan"):
      check_weights({"plan": wrong})

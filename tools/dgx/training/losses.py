"""What a driving model is taught with: winner-takes-all Laplacian likelihood, L1 of lines, Huber of leads, cross
entropies. Weights are data."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openpilot.tools.dgx.training.constants import output_slices
from openpilot.tools.dgx.training.outputs import parse_outputs
from openpilot.tools.fair.distillation.losses import masked_mean
from openpilot.tools.lib.errors import UserError

LOG_STD = (-5.0, 5.0)  # a scale beyond these is held there: neither overflow nor an infinite reward for being sure
LEAD_HUBER = 1.0  # m, m/s
TINY = 1e-6  # of probabilities

# Terms not in a table of weights weigh nothing. A term is the mean over its numbers, so that weights do not depend on
# how many there are.
WEIGHTS: dict[str, float] = {
  "plan": 1.0,
  "plan_weights": 0.1,
  "lane_lines": 0.5,
  "road_edges": 0.25,
  "lead": 0.1,
  "pose": 0.2,
  "wide_from_device_euler": 0.1,
  "road_transform": 0.1,
  "action": 0.2,
  "lane_lines_prob": 0.1,
  "lead_prob": 0.1,
  "meta": 0.1,
  "desire_state": 0.05,
  "desire_pred": 0.05,
  "hidden_state": 0.0,
}


def laplacian(mean: Tensor, std: Tensor, target: Tensor) -> Tensor:
  """Negative log likelihood of each number under Laplace(mean, std): |target - mean| / std + log(2 std), computed in
  float32 or better. Broadcasts."""
  kind = torch.promote_types(mean.dtype, torch.float32)
  log = torch.log(std.to(kind)).clamp(*LOG_STD)
  return (target.to(kind) - mean.to(kind)).abs() * torch.exp(-log) + log + 0.6931471805599453


def per_hypothesis(pred_mean: Tensor, pred_std: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
  """(B, H): likelihoods summed over horizon and coordinates. See laplacian_nll_loss."""
  known = torch.isfinite(target) if mask is None else torch.isfinite(target) & mask.bool().expand(target.shape)
  nll = laplacian(pred_mean, pred_std, torch.where(known, target, torch.zeros_like(target)).unsqueeze(1))
  return torch.where(known.unsqueeze(1), nll, torch.zeros_like(nll)).flatten(2).sum(2)


def laplacian_nll_loss(pred_mean: Tensor, pred_std: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
  """pred_mean, pred_std (B, H, T, D), target (B, T, D) -> scalar: each example's likelihood under its best hypothesis,
  summed over T and D, mean over B.

  Winner takes all: the other hypotheses get no gradient. Numbers of the target that are not finite, or 0 in mask
  (broadcast), count nothing."""
  nll = per_hypothesis(pred_mean, pred_std, target, mask)
  best = nll.detach().argmin(1, keepdim=True)
  return nll.gather(1, best).mean()


def _filled(target: Tensor) -> tuple[Tensor, Tensor]:
  known = torch.isfinite(target)
  return torch.where(known, target, torch.zeros_like(target)), known


def l1_loss(pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
  """Mean absolute error over the known numbers; weight (broadcast from the front) says how much each line counts."""
  target, known = _filled(target)
  d = (pred.float() - target).abs()
  if weight is None:
    return masked_mean(d, known)
  w = weight.reshape(*weight.shape, *[1] * (d.dim() - weight.dim())).expand(d.shape) * known
  return (d * w).sum() / w.sum().clamp(min=TINY)


def lead_loss(pred: Tensor, target: Tensor, probability: Tensor | None = None) -> Tensor:
  """Huber over (B, leads, steps, 4), leads weighted by how sure it is that they are there (B, leads)."""
  target, known = _filled(target)
  d = F.huber_loss(pred.float(), target.float(), reduction="none", delta=LEAD_HUBER)
  w = known.float() if probability is None else known * probability[:, :, None, None].float()
  return (d * w).sum() / w.sum().clamp(min=TINY)


def bce(p: Tensor, target: Tensor) -> Tensor:
  """Binary cross entropy of probabilities with (soft) targets. Not torch's, which refuses to run under autocast."""
  target, known = _filled(target.float())
  p = p.float().clamp(TINY, 1 - TINY)
  return masked_mean(-(target * p.log() + (1 - target) * torch.log1p(-p)), known)


def cross_entropy(p: Tensor, target: Tensor) -> Tensor:
  """Cross entropy of probabilities over the last axis with (soft) targets of the same shape."""
  target, known = _filled(target.float())
  return masked_mean(-(target * p.float().clamp(min=TINY).log()).sum(-1), known.all(-1))


def plan_loss(outputs: Mapping[str, Tensor], target: Tensor) -> dict[str, Tensor]:
  """Winner-takes-all over the plan's hypotheses (one, or several), and of several their weights' cross entropy with the
  winner. Per number."""
  many = "plan_hypotheses" in outputs
  mean, std = (
    (outputs["plan_hypotheses"], outputs["plan_stds_hypotheses"])
    if many
    else (outputs["plan"][:, None], outputs["plan_stds"][:, None])
  )
  nll = per_hypothesis(mean, std, target)
  best = nll.detach().argmin(1, keepdim=True)
  count = torch.isfinite(target).flatten(1).sum(1)
  known = count > 0
  out = {"plan": masked_mean(nll.gather(1, best)[:, 0] / count.clamp(min=1), known)}
  if many:
    chosen = outputs["plan_weights"].float()[:, :, 0].gather(1, best)[:, 0]
    out["plan_weights"] = masked_mean(-chosen.clamp(min=TINY).log(), known)
  return out


def check_weights(weights: Mapping[str, Any]) -> dict[str, float]:
  """A user's table over the default one. Raises UserError for a term that does not exist or a weight that is no
  number."""
  unknown = sorted(set(weights) - set(WEIGHTS))
  if unknown:
    raise UserError(f"there is no loss {', '.join(unknown)}; there are {', '.join(WEIGHTS)}")
  wrong = [
    k for k, v in weights.items() if isinstance(v, bool) or not isinstance(v, (int, float)) or not 0 <= v < float("inf")
  ]
  if wrong:
    raise UserError(f"the weight of loss {', '.join(wrong)} is no number from 0 on")
  return {**WEIGHTS, **{k: float(v) for k, v in weights.items()}}


def amount(name: str, targets: Mapping[str, Tensor]) -> Tensor:
  """By how much a batch's target teaches, scalar: what its loss is divided by. Of several parts of a batch these add
  up, as the losses themselves do not."""
  known = torch.isfinite(targets[name])
  if name == "plan":
    return known.flatten(1).any(1).sum().float()
  if name == "lane_lines" and "lane_lines_prob" in targets:
    return (targets["lane_lines_prob"][:, 1::2, None, None].float() * known).sum()
  if name == "lead" and "lead_prob" in targets:
    return (targets["lead_prob"][:, :, None, None].float() * known).sum()
  if name in ("desire_state", "desire_pred"):
    return known.all(-1).sum().float()
  return known.sum().float()


def driving_loss(
  outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], weights: Mapping[str, float] | None = None
) -> dict[str, Tensor]:
  """outputs: parse_outputs of the student's vector (torch). targets: the same names and shapes, from a teacher (parsed
  too) or from the drive; what is missing or not finite is not taught. -> each weighted term's value, unweighted, and
  "total", their weighted sum. Raises UserError where nothing is taught."""
  w = WEIGHTS if weights is None else weights
  out: dict[str, Tensor] = {}
  for name in targets.keys() & outputs.keys():
    if not w.get(name) or name not in WEIGHTS:
      continue
    a, b = outputs[name], targets[name].to(outputs[name].device)
    if name == "plan":
      out.update({k: v for k, v in plan_loss(outputs, b).items() if w.get(k)})
    elif name == "lane_lines":  # the odd ones of 8 probabilities are the lines', as openpilot reads them
      out[name] = l1_loss(
        a, b, targets["lane_lines_prob"].to(a.device)[:, 1::2] if "lane_lines_prob" in targets else None
      )
    elif name == "road_edges":
      out[name] = l1_loss(a, b)
    elif name == "lead":
      out[name] = lead_loss(a, b, targets["lead_prob"].to(a.device) if "lead_prob" in targets else None)
    elif name in ("lane_lines_prob", "lead_prob", "meta"):
      out[name] = bce(a, b)
    elif name in ("desire_state", "desire_pred"):
      out[name] = cross_entropy(a, b)
    elif name in ("pose", "wide_from_device_euler", "road_transform", "action") and f"{name}_stds" in outputs:
      b, known = _filled(b)
      out[name] = masked_mean(laplacian(a, outputs[f"{name}_stds"], b), known)
    elif name in ("hidden_state", "action"):
      out[name] = l1_loss(a, b)
  if not out:
    raise UserError(
      "there is nothing to learn: no weighted loss has both an output of the model and a target; see the weights and "
      "the data"
    )
  out["total"] = torch.stack([w[k] * v for k, v in out.items()]).sum()
  return out


def compute_loss(
  pred: Tensor | Mapping[str, Tensor], target: Tensor | Mapping[str, Tensor], weights: Mapping[str, float] | None = None
) -> Tensor:
  """driving_loss() of one step, as a scalar. pred and target: parsed outputs, or vectors (B, OUTPUT_SIZE) as they leave
  the network, in the order of constants.output_slices()."""
  a, b = (x if isinstance(x, Mapping) else parse_outputs(x, output_slices()) for x in (pred, target))
  return driving_loss(a, b, weights)["total"]

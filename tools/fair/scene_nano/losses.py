"""Losses of scene-nano. All take float tensors and skip what is not known: class 255, depth that is not finite or
beyond MAX_DEPTH."""

import torch
import torch.nn.functional as F
from torch import Tensor

from openpilot.tools.sim.truth import IGNORE, MAX_DEPTH


def depth_mask(depth: Tensor, classes: Tensor) -> Tensor:
  """(B, 64, 128) meters and classes -> bool, where depth is known and wanted."""
  return torch.isfinite(depth) & (depth > 0) & (depth < MAX_DEPTH) & (classes != IGNORE)


def depth_loss(log_depth: Tensor, depth: Tensor, mask: Tensor, lam: float = 0.5) -> Tensor:
  """L1 in log meters plus SiLog, sqrt(mean(g^2) - lam mean(g)^2) (Eigen et al. 2014), over the mask. log_depth (B, 64,
  128), depth (B, 64, 128) meters."""
  g = log_depth[mask] - torch.log(depth[mask])
  if g.numel() == 0:
    return log_depth.sum() * 0.0
  return g.abs().mean() + torch.sqrt((g * g).mean() - lam * g.mean() ** 2 + 1e-8)


def segmentation_loss(logits: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
  """Weighted cross-entropy plus the mean soft Dice loss over the classes (Milletari et al. 2016).

  logits (B, C, H, W), classes (B, H, W) int64, weights (C,)."""
  ce = F.cross_entropy(logits, classes, weight=weights, ignore_index=IGNORE)
  known = (classes != IGNORE).unsqueeze(1)
  prob = logits.softmax(1) * known
  target = F.one_hot(classes.clamp(max=logits.shape[1] - 1), logits.shape[1]).permute(0, 3, 1, 2).to(prob.dtype) * known
  overlap, total = (prob * target).sum((0, 2, 3)), (prob + target).sum((0, 2, 3))
  return ce + (1 - (2 * overlap + 1) / (total + 1)).mean()

"""A student's class scores beside a teacher's, at the teacher's boxes: one Bernoulli distribution a class, as both say
sigmoids."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from openpilot.tools.fair.distillation.features import shrink_valid
from openpilot.tools.fair.distillation.losses import wide
from openpilot.tools.fair.distillation.matching import CELL, hungarian_match

EDGE = 1e-4  # scores are at least so far from 0 and 1


def bernoulli_divergence(logits: Tensor, scores: Tensor) -> Tensor:
  """KL(teacher || student), elementwise, >= 0. logits: the student's; scores: the teacher's, 0..1."""
  t = scores.clamp(EDGE, 1 - EDGE)
  entropy = -(t * t.log() + (1 - t) * (1 - t).log())
  return F.binary_cross_entropy_with_logits(logits, t, reduction="none") - entropy


def weighted(divergence: Tensor, scores: Tensor, known: Tensor) -> Tensor:
  """(n, K) -> scalar: the sum over classes that the teacher knows, the mean over boxes by their best score."""
  best = scores.amax(1)
  return ((divergence * known).sum(1) * best).sum() / best.sum().clamp(min=1)


def cell_loss(heat: Tensor, soft: Sequence[Mapping[str, Tensor]], valid: Tensor) -> Tensor:
  """Of a center-based head: at the cell of each box's center, that of several boxes by the best of their scores.

  heat: (B, K, h, w) logits; soft: see tasks/logits.py; valid: (B, 4h', 4w') bool at the cells' size or finer."""
  heat = wide(heat)
  _, k, h, w = heat.shape
  cells_valid = shrink_valid(valid, h, w)
  logits, scores, known = [], [], []
  for i, s in enumerate(soft):
    boxes = s["boxes"].to(heat)
    x, y = (((boxes[:, a] + boxes[:, a + 2]) / 2 + 0.5) / CELL for a in (0, 1))
    x, y = x.floor().long().clamp(0, w - 1), y.floor().long().clamp(0, h - 1)
    counts = cells_valid[i, y, x]
    place = (y * w + x)[counts]
    at, which = place.unique(return_inverse=True)
    own = s["scores"].to(heat)[counts]
    scores.append(own.new_zeros(len(at), k).scatter_reduce(0, which[:, None].expand(-1, k), own, "amax"))
    logits.append(heat[i].flatten(1)[:, at].T)
    known.append(s["known"].to(heat).expand(len(at), -1))
  all_scores = torch.cat(scores)
  return weighted(bernoulli_divergence(torch.cat(logits), all_scores), all_scores, torch.cat(known))


def query_loss(logits: Tensor, boxes: Tensor, soft: Sequence[Mapping[str, Tensor]], picture: tuple[int, int]) -> Tensor:
  """Of a head of queries: of the one that answers for each box by the set loss's own matching.

  logits: (B, Q, K), boxes: (B, Q, 4) cx cy w h in 0..1; picture: (width, height) pixels."""
  asked = [{"boxes": s["boxes"], "cls": s["scores"].argmax(1)} for s in soft]
  pairs = hungarian_match(logits, boxes, asked, picture)
  logits = wide(logits)
  own = torch.cat([logits[i, q.to(logits.device)] for i, (q, _) in enumerate(pairs)])
  scores = torch.cat([s["scores"][m.to(s["scores"].device)] for s, (_, m) in zip(soft, pairs, strict=True)]).to(own)
  known = torch.cat([s["known"].expand(len(m), -1) for s, (_, m) in zip(soft, pairs, strict=True)]).to(own)
  return weighted(bernoulli_divergence(own, scores), scores, known)

"""Losses of the center-based head of oriented boxes.

objects: one dict for each of the B images of {boxes (M, 5) cx, cy, w, h, angle in pixels of the picture, cls (M,)
int64, score (M,)}. Convention and code of a box: selfdrive/modeld/fair/heads/oriented.py."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from openpilot.selfdrive.modeld.fair.heads.oriented import LOG_SIDE, MOST_LOG_RATIO
from openpilot.tools.fair.distillation.features import shrink_valid
from openpilot.tools.fair.distillation.losses import wide
from openpilot.tools.fair.distillation.matching import CELL, assign_cells, flatten_objects, heat_loss, known_classes

PROBIOU_WEIGHT, CODE_WEIGHT, ANGLE_WEIGHT = 2.0, 0.5, 0.5
THINNEST = 1.0  # pixels: a side of the target, as long at least; nothing of a Gaussian is left below


def gaussian(boxes: Tensor) -> tuple[Tensor, Tensor]:
  """(..., 5) -> centers (..., 2) and covariances (..., 3) xx, yy, xy of a uniform density on each box."""
  long, short = (boxes[..., k] ** 2 / 12 for k in (2, 3))
  mean, half = (long + short) / 2, (long - short) / 2
  cos, sin = torch.cos(2 * boxes[..., 4]), torch.sin(2 * boxes[..., 4])
  return boxes[..., :2], torch.stack([mean + half * cos, mean - half * cos, half * sin], -1)


def coded_gaussian(code: Tensor) -> tuple[Tensor, Tensor]:
  """code (..., 7) -> offsets of the center in pixels (..., 2), and covariances (..., 3): of the logarithm's trace and
  doubled-angle vector their exponential, without an angle in between."""
  size = torch.exp(2 * code[..., 2].clamp(*LOG_SIDE)) / 12
  ratio = torch.sqrt((code[..., 3:5] ** 2).sum(-1) + 1e-12)
  direction = code[..., 3:5] / ratio[..., None]
  bounded = ratio.clamp(max=MOST_LOG_RATIO)
  cosh, sinh = size * torch.cosh(bounded), (size * torch.sinh(bounded))[..., None] * direction
  return CELL * code[..., :2], torch.stack([cosh + sinh[..., 0], cosh - sinh[..., 0], sinh[..., 1]], -1)


def bhattacharyya(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
  """Distance of two Gaussians, each (..., 2) centers and (..., 3) covariances xx, yy, xy -> (...), 0 and up."""
  (p, s), (q, t) = a, b
  d, u = p - q, s + t
  det = u[..., 0] * u[..., 1] - u[..., 2] ** 2
  own = [(x[..., 0] * x[..., 1] - x[..., 2] ** 2).clamp(min=1e-9) for x in (s, t)]
  det = det.clamp(min=1e-9)
  far = u[..., 1] * d[..., 0] ** 2 + u[..., 0] * d[..., 1] ** 2 - 2 * u[..., 2] * d[..., 0] * d[..., 1]
  return (far / (4 * det) + 0.5 * (det.log() - own[0].log() / 2 - own[1].log() / 2 - 2 * 0.6931471805599453)).clamp(
    min=0
  )


def probiou_loss(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], eps: float = 1e-6) -> Tensor:
  """1 - ProbIoU, the Hellinger distance sqrt(1 - exp(-Bhattacharyya distance)), 0 to 1: loss L1 of Llerena et al. 2021,
  arXiv:2106.06072. eps keeps the root's gradient finite where both are the same."""
  return torch.sqrt(-torch.expm1(-bhattacharyya(a, b)) + eps) - eps**0.5


def code_of(boxes: Tensor, center: Tensor) -> Tensor:
  """(n, 5) boxes, (n, 2) centers of the cells that answer for them, pixels -> (n, 7): heads/oriented.py's raw_of()."""
  ratio = (boxes[:, 2] / boxes[:, 3]).log()
  turn = 2 * boxes[:, 4]
  return torch.cat(
    [
      (boxes[:, :2] - center) / CELL,
      torch.stack(
        [
          (boxes[:, 2] * boxes[:, 3]).log() / 2,
          ratio * turn.cos(),
          ratio * turn.sin(),
          (2 * turn).cos(),
          (2 * turn).sin(),
        ],
        -1,
      ),
    ],
    -1,
  )


def holds(boxes: Tensor, points: Tensor) -> Tensor:
  """(n, 5) boxes, (n, k, 2) points -> (n, k) bool: which lie in them."""
  d = points - boxes[:, None, :2]
  cos, sin = (f(boxes[:, 4])[:, None] for f in (torch.cos, torch.sin))
  along, across = d[..., 0] * cos + d[..., 1] * sin, d[..., 1] * cos - d[..., 0] * sin
  return (along.abs() <= boxes[:, None, 2] / 2) & (across.abs() <= boxes[:, None, 3] / 2)


def oriented_loss(
  outputs: Mapping[str, Tensor], objects: Sequence[Mapping[str, Any]], valid: Tensor
) -> dict[str, Tensor]:
  """valid: (B, H, W) bool, of a quarter of the picture's sides. outputs: 'oriented_heat' (B, K, h, w) logits,
  'oriented_box' (B, 7, h, w), an eighth. An object counts where its center's cell is in the picture and wholly valid.

  Parts: 'heat', CenterNet's focal loss (heat_loss); at the object's own cell and those around it whose centers lie in
  the box 'probiou', 2 (1 - ProbIoU); 'code', 0.5 smooth-L1 of the first five channels, which pulls where boxes are far
  apart; 'angle', 0.5 squared distance of the last two from the cosine and sine of four times the angle."""
  heat, box = (wide(outputs[f"oriented_{k}"]) for k in ("heat", "box"))
  h, w = heat.shape[2:]
  cells_valid = shrink_valid(valid, h, w)
  every = torch.cat([o["boxes"] for o in objects]).to(heat)
  every = torch.cat([every[:, :2], every[:, 2:4].clamp(min=THINNEST), every[:, 4:]], 1)
  half = every[:, 2:4] / 2
  sides = torch.cat([every[:, :2] - half, every[:, :2] + half], 1)  # of its own axes: the heat's width goes by them
  split = sides.split([len(o["cls"]) for o in objects])
  flat = flatten_objects(
    [{"boxes": s, "cls": o["cls"], "score": o["score"], "mask": None} for s, o in zip(split, objects, strict=True)],
    heat,
    1,
    1,
  )
  cells = torch.floor((every[:, :2] + 0.5) / CELL).long()
  inside = ((cells >= 0) & (cells < torch.tensor([w, h], device=cells.device))).all(-1)
  place = torch.where(inside[:, None], cells, 0)
  keep = inside & cells_valid[flat.image, place[:, 1], place[:, 0]]
  parts = {"heat": heat_loss(heat, flat, cells, keep, cells_valid, known_classes(objects, heat))}

  flat, cells, every = flat.take(keep), cells[keep], every[keep]
  row, place, _ = assign_cells(flat, cells, cells_valid, lambda points: holds(every, points))
  n = max(len(flat.cls), 1)
  share = (flat.score / torch.bincount(row, minlength=len(flat.cls)).clamp(min=1))[row] / n
  code = box[flat.image[row], :, place[:, 1], place[:, 0]]  # (r, 7)
  center = place * CELL + (CELL - 1) / 2
  target = code_of(every[row], center)
  offset, covariance = coded_gaussian(code)
  apart = probiou_loss((center + offset, covariance), gaussian(every[row]))
  smooth = F.smooth_l1_loss(code[:, :5], target[:, :5], reduction="none").sum(1)
  parts["probiou"] = PROBIOU_WEIGHT * (apart * share).sum()
  parts["code"] = CODE_WEIGHT * (smooth * share).sum()
  parts["angle"] = ANGLE_WEIGHT * (((code[:, 5:] - target[:, 5:]) ** 2).sum(1) * share).sum()
  return parts

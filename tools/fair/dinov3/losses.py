"""Distillation towards dense features."""

import torch.nn.functional as F
from torch import Tensor


def masked_cosine_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
  """Mean of 1 - cosine between the student's and the teacher's features, over the cells and in proportion to how far
  the mask holds them: 0 to 2, 0 is alike.

  student (B, C, h, w), sampled bilinearly at the teacher's grid where its own is another; teacher (B, C, H, W), gets no
  gradient; mask (B, y, x), bool or weights of any resolution, none: everything. -> scalar float32; 0, with gradients of
  0, where the mask is empty.
  Raises ValueError on shapes that do not fit."""
  if student.ndim != 4 or teacher.ndim != 4 or student.shape[:2] != teacher.shape[:2]:
    raise ValueError(
      f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree in batch and channels; project "
      "the student's channels"
    )
  grid = teacher.shape[2:]
  if student.shape[2:] != grid:
    student = F.interpolate(student, grid, mode="bilinear", align_corners=False, antialias=True)
  distance = 1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=1)  # (B, H, W)
  if mask is None:
    return distance.mean()
  if mask.ndim != 3 or len(mask) != len(student):
    raise ValueError(f"mask {tuple(mask.shape)} must be (B, y, x) with the batch of {len(student)}")
  weight = F.interpolate(mask[:, None].float(), grid, mode="area")[:, 0]
  return (distance * weight).sum() / weight.sum().clamp(min=1e-6)

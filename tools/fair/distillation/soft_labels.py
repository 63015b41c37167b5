"""Distillation of one classifier by another, by the names of Hinton et al. 2015: soft labels at a temperature, and
features through a projector. Students of the label store are taught by trainer.py."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from openpilot.tools.fair.distillation.features import Projector
from openpilot.tools.fair.distillation.losses import soft_label_loss


class DistillationTrainer:
  """teacher: put in eval mode. projector: from the student's channels to the teacher's; where not given, a 1x1
  convolution that the first feature_distillation_loss() makes: call that once before the optimizer takes
  projector.parameters()."""

  def __init__(
    self, teacher: nn.Module, student: nn.Module, temperature: float = 4.0, projector: nn.Module | None = None
  ):
    self.teacher, self.student, self.temperature, self.projector = teacher.eval(), student, temperature, projector

  def distillation_loss(self, student_out: Tensor, teacher_out: Tensor, targets: Tensor) -> Tensor:
    """soft_label_loss() of logits (B, C) or (B, C, H, W) and int64 targets: 0.7 soft, 0.3 hard. scalar"""
    return soft_label_loss(student_out, teacher_out, targets, self.temperature)

  def feature_distillation_loss(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """(B, F, h, w) and (B, C, H, W) -> scalar: mean squared error of the projected student, resized to the teacher's
    grid."""
    more: dict[str, Any] = {}
    if self.projector is None:
      self.projector = Projector(student_features.shape[1], teacher_features.shape[1]).to(student_features)
    if student_features.shape[2:] != teacher_features.shape[2:]:
      more["size"] = tuple(teacher_features.shape[2:])
    return F.mse_loss(self.projector(student_features, **more), teacher_features.detach())

"""DinoOBBTrainer, by the name of the bridge's note: a student of oriented boxes that DINOv3 teaches while it learns.

`images train-obb` is the way to a whole run: it stores what the teacher says once. Here the teacher is asked at every
step, about the very pictures that the student sees, however they were changed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openpilot.tools.fair.dinov3.config import DinoV3Config
from openpilot.tools.fair.dinov3.losses import masked_cosine_loss
from openpilot.tools.fair.dinov3.teacher import DinoV3Teacher
from openpilot.tools.fair.distillation.features import Projector
from openpilot.tools.fair.distillation.oriented import oriented_loss
from openpilot.tools.fair.students.student import Student


class DinoOBBTrainer(nn.Module):
  """config: anything with dino_root, a DINOv3 folder. student: of task 'oriented'; None where only the loss is wanted.
  feature_weight: of the distillation beside the boxes' losses. The projector from the student's channels to the
  teacher's is made at its first use; make the optimizer after that, or by `prepare`. Raises UserError."""

  def __init__(
    self,
    config: Any,
    device: str | torch.device | None = None,
    student: Student | None = None,
    feature_weight: float = 1.0,
  ):
    super().__init__()
    self.config, self.feature_weight = config, feature_weight
    self.teacher = DinoV3Teacher(DinoV3Config(root=Path(config.dino_root), resize="multiple"), device)
    self.teacher.eval()  # frozen: it stays so whatever holds it
    self.student = student
    self.projector: Projector | None = None
    if student is not None:
      student.hint = True
      self.prepare(student.size.neck)

  def prepare(self, channels: int) -> Projector:
    """The projector from `channels` of the student."""
    if self.projector is None:
      self.projector = Projector(channels, self.teacher.cfg.channels)
    return self.projector

  def compute_distillation_loss(self, images: Tensor, student_features: Tensor, mask: Tensor | None = None) -> Tensor:
    """images (B, 3, H, W) RGB, uint8 or 0 to 1; student_features (B, F, h, w) of the same pictures, any grid and width;
    mask (B, y, x), where it counts, or everywhere. -> scalar, 0 to 2: the mean of 1 - cosine over the teacher's
    cells."""
    with torch.no_grad():
      teacher_features = self.teacher.extract_feature_map(images).to(student_features.device)
    projector = self.prepare(student_features.shape[1]).to(student_features.device)
    return masked_cosine_loss(projector(student_features, tuple(teacher_features.shape[2:])), teacher_features, mask)

  def losses(
    self, images: Tensor, objects: Sequence[Mapping[str, Any]], mask: Tensor | None = None
  ) -> dict[str, Tensor]:
    """images (B, 3, H, W) uint8 of the student's size; objects: see distillation/oriented.py. -> the boxes' parts and
    'features'; the loss is their sum."""
    assert self.student is not None, "it was made without a student"
    out = self.student(images)
    valid = torch.ones(len(images), *(s // 4 for s in images.shape[2:]), dtype=torch.bool, device=images.device)
    apart = self.compute_distillation_loss(images, out["features"], mask)
    return {**oriented_loss(out, objects, valid), "features": self.feature_weight * apart}

  def train_step(
    self,
    images: Tensor,
    objects: Sequence[Mapping[str, Any]],
    optimizer: torch.optim.Optimizer,
    mask: Tensor | None = None,
  ) -> dict[str, float]:
    """One step. -> the parts' values before it."""
    optimizer.zero_grad(set_to_none=True)
    parts = self.losses(images, objects, mask)
    torch.stack(list(parts.values())).sum().backward()
    optimizer.step()
    return {k: float(v.detach()) for k, v in parts.items()}

  def parameters_to_learn(self) -> list[nn.Parameter]:
    """The student's and the projector's: the teacher is frozen."""
    return [p for m in (self.student, self.projector) if m is not None for p in m.parameters()]

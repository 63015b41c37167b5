"""A network with adapters, taught by dense labels: the parts of its loss."""

import copy
import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn

from openpilot.tools.dgx.dense.driving_features import DrivingFeatures, pair_up, trace
from openpilot.tools.fair.distillation.batch import Batch, Batches
from openpilot.tools.fair.distillation.distiller import Distiller
from openpilot.tools.fair.students.student import Student
from openpilot.tools.learn.adapters.apply import apply_dora, check_rank

TAUGHT = ("features", "depth")
WEIGHTS = {"features": 1.0, "depth": 1.0, "keep": 1.0, "path": 1.0}


@dataclasses.dataclass
class Settings:
  """All that decides a run, beside network and labels."""

  steps: int = 2000
  batch_size: int = 8  # clips
  dora_rank: int = 16
  dora_alpha: float | None = None
  dora_dropout: float = 0.0
  targets: list[str] | None = None
  tap: str | None = None
  lr: float = 1e-3
  weights: dict[str, float] = dataclasses.field(default_factory=lambda: dict(WEIGHTS))
  augment: bool = True
  eval_every: int = 200
  clip: int = 8  # steps of the driven path, at 5 Hz
  seed: int = 0


def moved(new: dict[str, Tensor], base: dict[str, Tensor]) -> Tensor:
  """How far outputs are from the base's: the mean over them of mean |new - base| / mean |base|. scalar."""
  parts = [(new[k].float() - b.float()).abs().mean() / b.float().abs().mean().clamp(min=1e-3) for k, b in base.items()]
  return torch.stack(parts).mean()


class Pairs(Batches):
  """Batches of pairs of frames, for driving networks."""

  def __getitem__(self, what: tuple[int, list[int], bool]) -> Batch:
    return pair_up(super().__getitem__(what), self.clips.length)


class DoRADistillation(nn.Module):
  """forward(batch) -> {"features/...", "depth/...", "keep"}: the parts of the loss; total(parts) -> the loss. The
  network's own weights are frozen: its adapters learn, the projector, and of a driving network the depth that is read
  from its map.

  student: a driving network's features, or a fair student. feature_shape: (C, h, w) of the teacher's, where `tasks` has
  features."""

  def __init__(
    self,
    student: DrivingFeatures | Student,
    tasks: list[str],
    settings: Settings,
    feature_shape: tuple[int, ...] | None,
  ):
    super().__init__()
    self.settings = settings
    self.driving = isinstance(student, DrivingFeatures)
    self.network: nn.Module = student.model if isinstance(student, DrivingFeatures) else student
    self.base = copy.deepcopy(self.network).eval().requires_grad_(False)
    names = settings.targets
    if names is None:  # what the map or the heads are made of; with a path to learn, all
      if isinstance(student, DrivingFeatures):
        names = [x.name for x in student.layers] if settings.weights.get("path") else student.upto
      else:
        frame = torch.zeros(1, 6, 128, 256, dtype=torch.uint8)
        names = [
          x.name
          for x in trace(student, lambda: student(frame))
          if not x.name.startswith(("objects", "detector", "lanes"))
        ]
    check_rank(self.network, settings.dora_rank, names)
    self.adapted = apply_dora(self.network, settings.dora_rank, settings.dora_alpha, names, settings.dora_dropout)
    self.distiller = Distiller(cast(Student, student), tasks, settings.weights, feature_shape=feature_shape)

  def train(self, mode: bool = True) -> "DoRADistillation":
    super().train(mode)
    self.base.eval()
    for m in self.network.modules():
      if isinstance(m, nn.modules.batchnorm._BatchNorm):  # statistics stay the base's
        m.eval()
    return self

  @torch.no_grad()
  def before(self, frame: Tensor) -> dict[str, Tensor]:
    """What the base says, of all that no teacher speaks of."""
    student: Any = self.distiller.student
    said = student.outputs(frame, self.base) if self.driving else self.base(frame)
    return {k: v for k, v in said.items() if torch.is_tensor(v) and k not in TAUGHT}

  def forward(self, batch: Batch) -> dict[str, Tensor]:
    parts, out = self.distiller.losses(batch)
    base = self.before(batch["frame"])
    return {**parts, "keep": moved(out, base)} if base else parts

  def total(self, parts: dict[str, Tensor]) -> Tensor:
    loss = self.distiller.total({k: v for k, v in parts.items() if "/" in k and not k.startswith("driven/")})
    return loss + sum(self.settings.weights[k] * parts[k] for k in ("keep", "path") if k in parts)

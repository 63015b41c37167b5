"""A network with adapters, taught by dense labels: the parts of its loss."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from openpilot.selfdrive.modeld.fair.frames import FRAME_SHAPE
from openpilot.tools.dgx.dense.driving_features import DrivingFeatures, pair_up, trace
from openpilot.tools.dgx.dense.live import live_batch, parsed, taught
from openpilot.tools.dgx.training.losses import driving_loss
from openpilot.tools.dgx.training.model import OnnxModule
from openpilot.tools.fair.distillation.batch import Batch, Batches, What
from openpilot.tools.fair.distillation.distiller import Distiller
from openpilot.tools.fair.hf import DenseTeacher
from openpilot.tools.fair.students.student import Student
from openpilot.tools.learn.adapters.apply import apply_dora, check_rank
from openpilot.tools.learn.checkpoint import to_device
from openpilot.tools.learn.one_batch import gathered_outputs
from openpilot.tools.lib.errors import UserError

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

  def __getitem__(self, what: What) -> Batch:
    return pair_up(super().__getitem__(what), self.clips.length)


class DoRADistillation(nn.Module):
  """forward(batch) -> {"features/...", "depth/...", "keep"}: the parts of the loss; total(parts) -> the loss. The
  network's own weights are frozen: its adapters learn, the projector, and of a driving network the depth that is read
  from its map.

  base_model: a driving network (of load_onnx(), or its features), or a fair student. fair_teacher: of train_step(); no
  batch of a label store wants one. tasks: of TAUGHT, by default what the teacher gives. feature_shape: (C, h, w) of the
  teacher's, where `tasks` has features. Raises UserError."""

  def __init__(
    self,
    base_model: DrivingFeatures | OnnxModule | Student,
    fair_teacher: DenseTeacher | None = None,
    tasks: list[str] | None = None,
    settings: Settings | None = None,
    feature_shape: tuple[int, ...] | None = None,
  ):
    super().__init__()
    self.settings = settings = settings or Settings()
    student = DrivingFeatures(base_model, settings.tap) if isinstance(base_model, OnnxModule) else base_model
    self.teacher = fair_teacher
    if fair_teacher is not None:
      given = taught(fair_teacher, TAUGHT)
      tasks, feature_shape = tasks or list(given), feature_shape or given.get("features")
    if not tasks:
      raise UserError("there is nothing to learn: give a fair_teacher, or the tasks of a label store")
    self.driving = isinstance(student, DrivingFeatures)
    self.network: nn.Module = student.model if isinstance(student, DrivingFeatures) else student
    self.base = copy.deepcopy(self.network).eval().requires_grad_(False)
    names = settings.targets
    if names is None:  # what the map or the heads are made of; with a path to learn, all
      if isinstance(student, DrivingFeatures):
        names = [x.name for x in student.layers] if settings.weights.get("path") else student.upto
      else:
        frame = torch.zeros(1, *FRAME_SHAPE, dtype=torch.uint8)
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
    return self.losses(batch)[0]

  def losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """-> the parts, and the student's outputs; of a batch.together() those of all processes' shares."""
    parts, out = self.distiller.losses(batch)
    base = self.before(batch["frame"])
    if (whole := batch.get("whole")) is not None:  # of several processes, as the student's outputs are
      base = gathered_outputs(base, whole["frames"], whole["counts"])
    return {**parts, "keep": moved(out, base)} if base else parts, out

  def train_step(self, images: Tensor, targets: Mapping[str, Tensor] | None = None) -> Tensor:
    """The loss of pictures that the teacher labels now, a scalar whose gradients reach what is learned. images: of
    live_batch(). targets: of a driving network parsed outputs (B, ...) of the drive, as "plan"; of a student parts of a
    batch, which go before the teacher's. The first call standardizes the teacher's features by its pictures. Raises
    UserError."""
    if self.teacher is None:
      raise UserError("train_step wants a fair_teacher; give one to DoRADistillation, or call it with a batch")
    student: Any = self.distiller.student
    batch = live_batch(self.teacher, images, self.driving)
    wrong = [] if self.driving else [k for k in targets or {} if k not in (*TAUGHT, "metric", "valid")]
    if wrong:
      raise UserError(f"targets has {', '.join(wrong)}; a student learns {', '.join(TAUGHT)}, and where they are valid")
    batch = batch if self.driving else {**batch, **(targets or {})}
    standardiser = self.distiller.standardiser
    if standardiser is not None and standardiser.scale == 0:
      self.distiller.fit_features([batch])
    parts, out = self.losses(to_device(batch, next(student.parameters()).device))
    if self.driving and targets:
      parts["path"] = driving_loss(parsed(out, student.slices), targets)["total"]
    return self.total(parts)

  def total(self, parts: dict[str, Tensor]) -> Tensor:
    loss = self.distiller.total({k: v for k, v in parts.items() if "/" in k and not k.startswith("driven/")})
    return loss + sum(self.settings.weights[k] * parts[k] for k in ("keep", "path") if k in parts)

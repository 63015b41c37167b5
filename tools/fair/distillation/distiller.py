"""A student in training: the student, what is needed only while it learns (projector, standardiser, task weights), and
its losses of a batch."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openpilot.tools.fair.distillation.batch import Batch
from openpilot.tools.fair.distillation.features import Projector, Standardiser
from openpilot.tools.fair.distillation.losses import TaskWeights
from openpilot.tools.fair.distillation.self_taught import Teacher
from openpilot.tools.fair.spec import ClassSet, road_classes
from openpilot.tools.fair.students.fake_quant import Rounding
from openpilot.tools.fair.students.student import Student
from openpilot.tools.fair.tasks import BEFORE, TASKS
from openpilot.tools.learn.one_batch import gathered_outputs
from openpilot.tools.learn.processes import touch


class Distiller(nn.Module):
  """forward(batch, tasks) -> {"task/part": scalar, "total": the loss}, of `tasks` alone where any are named; where the
  batch has no labels of them, nothing but a "total" of 0. feature_shape: (C, h, w) of the teacher's features, where the
  student learns them. classes: that it tells apart, by default those of the student. parts: weights of parts of tasks'
  losses, 1 where not named; one of 0 is left out. label_weight: of the losses of labels; of 0
  these teach nothing."""

  class_weights: Tensor  # of class maps
  projector: Projector | None  # where features are learned
  standardiser: Standardiser | None
  rounding: Rounding | None  # where it learns in 8 bits
  teacher: Teacher | None  # where a float student teaches it

  def __init__(
    self,
    student: Student,
    tasks: list[str],
    weights: Mapping[str, float],
    learned: bool = False,
    feature_shape: tuple[int, ...] | None = None,
    classes: ClassSet | None = None,
    parts: Mapping[str, float] | None = None,
    label_weight: float = 1.0,
  ):
    super().__init__()
    self.student, self.tasks, self.parts = student, tasks, dict(parts or {})
    # in the order of the names that tasks had first, in which optimizers of earlier checkpoints count
    first = {new: old for old, new in BEFORE.items()}
    ordered = sorted(tasks, key=lambda t: first.get(t, t))
    self.weights = TaskWeights({t: weights.get(t, 1.0) for t in ordered}, learned)
    if classes is None:
      classes = student.spec.classes if hasattr(student, "spec") else road_classes()
    self.register_buffer("class_weights", torch.tensor(classes.map_weights))
    self.projector = self.standardiser = self.rounding = self.teacher = None
    self.label_weight = label_weight
    for t in tasks:
      if (aids := TASKS[t].aids) is not None and label_weight:
        for name, module in aids(student, feature_shape).items():
          setattr(self, name, module)
    self.register_load_state_dict_pre_hook(renamed)

  def forward(self, batch: Batch, tasks: Sequence[str] = ()) -> dict[str, Tensor]:
    # the sum is made in here, so that DistributedDataParallel sees which parameters have a share in it
    parts = {k: v for k, v in self.losses(batch)[0].items() if not tasks or k.split("/")[0] in tasks}
    return {**parts, "total": self.total(parts) if parts else touch(self)}

  def losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """-> the parts of every task that this batch has labels of, or a float student teaches, and the student's outputs.
    Of a batch.together() they are those of all processes' shares."""
    mine = [t for t in TASKS.values() if t.name in self.tasks]
    special = next((t.forward for t in mine if t.forward is not None and t.fills.keys() <= batch.keys()), None)
    by_itself = getattr(self.student, "learn", None)  # of a family, whose loss needs the labels in its forward
    with contextlib.nullcontext() if self.rounding is None else self.rounding.of(self.student):
      if special is not None:
        out = special(self.student, batch)
      else:
        out = self.student(batch["frame"]) if by_itself is None else by_itself(batch)
    frame = batch["frame"]
    shares: tuple[list[int], list[int]] | None = None
    if (whole := batch.get("whole")) is not None:
      shares, batch = (whole["frames"], whole["counts"]), whole
      out = gathered_outputs(out, *shares)
    found: dict[str, Tensor] = {}
    if self.label_weight:
      by = self.label_weight
      found = {f"{t.name}/{k}": v * by if by != 1 else v for t in mine for k, v in t.loss(self, out, batch).items()}
    if self.teacher is not None:
      found |= self.teacher.parts(out, frame, shares)
    weight = {k: self.parts.get(k, 1.0) for k in found}
    return {k: v if weight[k] == 1 else v * weight[k] for k, v in found.items() if weight[k]}, out

  def total(self, parts: Mapping[str, Tensor]) -> Tensor:
    tasks: dict[str, Tensor] = {}
    for k, v in parts.items():
      task = k.split("/")[0]
      tasks[task] = tasks[task] + v if task in tasks else v
    return self.weights(tasks)

  @torch.no_grad()
  def fit_features(self, batches: Any) -> None:
    """Standardises the teacher's features by those of `batches`."""
    assert self.standardiser is not None
    for batch in batches:
      if "features" in batch:
        x = batch["features"]
        good = torch.isfinite(x).all(1).all(-1).all(-1)
        if good.any():
          self.standardiser.update(x[good])
    self.standardiser.finish()


def renamed(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
  """Of checkpoints of before: the names that tasks have now."""
  for old, new in BEFORE.items():
    key = f"{prefix}weights.log_variance."
    if key + old in state:
      state[key + new] = state.pop(key + old)

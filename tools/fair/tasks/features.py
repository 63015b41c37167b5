"""Dense features of a teacher, which the student's are projected to while it learns.

Batch: features (B, C, h, w) float32, nan: unknown."""

from typing import Any

import numpy as np

from openpilot.tools.fair.distillation.augment import Augmentation, warp_grid
from openpilot.tools.fair.spec import ClassSet
from openpilot.tools.fair.tasks.task import Batch, Outputs, Said, Targets, Task
from openpilot.tools.fair.teacher import Label


def teaches(label: Label, classes: ClassSet) -> bool:
  return label.kind == "dense" and label.name == "features"  # a network's features have no unit


def targets(said: Said, a: Augmentation, r: np.random.Generator) -> Targets:
  shape = said.label.shape[-3:]
  grids = [
    np.full(shape, np.nan, np.float32) if x is None else x.astype(np.float32).reshape(shape) for x in said.values
  ]
  warped = [warp_grid(a, np.ascontiguousarray(g.transpose(1, 2, 0)), True, np.nan).transpose(2, 0, 1) for g in grids]
  return {"features": np.stack(warped)}


def aids(student: Any, shape: tuple[int, ...] | None) -> dict[str, Any]:
  """The projector to the teacher's channels, and what standardises them; shape: (C, h, w). A student whose heads make
  no features shows its pyramid's."""
  from openpilot.tools.fair.distillation.features import Projector, Standardiser

  assert shape is not None
  own = "depth" in getattr(student, "tasks", ("depth",))
  student.hint = not own
  channels = student.size.features if own else student.size.neck
  return {"projector": Projector(channels, shape[0]), "standardiser": Standardiser(shape[0])}


def loss(model: Any, out: Outputs, batch: Batch) -> dict[str, Any]:
  import torch

  from openpilot.tools.fair.distillation.features import feature_loss, gram_loss

  if "features" not in batch:
    return {}
  valid = batch["valid"]
  # of a grid that need not divide the map's
  finite = torch.isfinite(batch["features"]).all(1, keepdim=True).float()
  known = valid & (torch.nn.functional.interpolate(finite, valid.shape[1:], mode="nearest-exact")[:, 0] > 0)
  teacher = model.standardiser(batch["features"].nan_to_num(0.0))
  return {
    "features": feature_loss(model.projector(out["features"], tuple(teacher.shape[2:])), teacher, known),
    "gram": 0.1 * gram_loss(out["features"], teacher, known),
  }


TASK = Task(
  name="features",
  head="depth",
  wanted="a teacher of dense features: dinov2-base",
  teaches=teaches,
  targets=targets,
  loss=loss,
  aids=aids,
  fills={"features": np.nan},
  outputs=("features",),
  decode={"features": {"head": "features", "parameters": {}}},
  optional=True,
  mirror=False,  # a ViT's grid of a mirrored picture is not the mirrored grid: position embeddings
)

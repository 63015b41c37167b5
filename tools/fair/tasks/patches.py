"""A teacher's patch map at the neck: masked cosine distance, as in the note of DINOv3's bridge. Labels and batch are
those of tasks/features.py."""

from typing import Any

from openpilot.tools.fair.tasks import features
from openpilot.tools.fair.tasks.task import Batch, Outputs, Task

MARGIN = 8.0  # pixels around an object that are its own


def aids(student: Any, shape: tuple[int, ...] | None) -> dict[str, Any]:
  """The projector from the neck's map of stride 16 to the teacher's channels, and what standardizes them. shape:
  (C, h, w)."""
  from openpilot.tools.fair.distillation.features import Projector, Standardiser

  assert shape is not None
  student.hint = True
  return {"projector": Projector(student.size.neck, shape[0]), "standardiser": Standardiser(shape[0])}


def loss(model: Any, out: Outputs, batch: Batch) -> dict[str, Any]:
  """'all': over cells of which the teacher's features are known; 'objects': over those of them on oriented boxes, where
  there are any. The teacher's are standardized first: what all cells share would hide what tells them apart."""
  import torch

  from openpilot.tools.fair.dinov3.losses import masked_cosine_loss

  if "features" not in batch:
    return {}
  valid, seen = batch["valid"], batch["features"]
  finite = torch.isfinite(seen).all(1, keepdim=True).float()
  known = valid & (torch.nn.functional.interpolate(finite, valid.shape[1:], mode="nearest-exact")[:, 0] > 0)
  teacher = model.standardiser(seen.nan_to_num(0.0))
  said = model.projector(out["features"], tuple(teacher.shape[2:]))
  parts = {"all": masked_cosine_loss(said, teacher, known)}
  if any(o is not None and len(o["boxes"]) for o in batch.get("oriented", ())):
    parts["objects"] = masked_cosine_loss(said, teacher, known & on_objects(valid, batch["oriented"]))
  return parts


def on_objects(valid: Any, objects: Any) -> Any:
  """(B, h, w) bool of a quarter of the picture's sides: pixels on an oriented box, or MARGIN beside it."""
  import torch

  from openpilot.tools.fair.distillation.matching import MAP
  from openpilot.tools.fair.distillation.oriented import holds

  out = torch.zeros_like(valid)
  h, w = valid.shape[1:]
  y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
  places = (torch.stack([x, y], -1).reshape(-1, 2) * MAP + (MAP - 1) / 2).to(valid.device)
  for i, o in enumerate(objects):
    if o is not None and len(o["boxes"]):
      wider = o["boxes"] + o["boxes"].new_tensor([0, 0, 2 * MARGIN, 2 * MARGIN, 0])
      out[i] = holds(wider, places[None].to(wider)).any(0).reshape(h, w)
  return out


TASK = Task(
  name="patches",
  head="oriented",
  wanted="a teacher of dense features: dinov3-vits16, or another",
  teaches=features.teaches,
  targets=features.targets,
  loss=loss,
  aids=aids,
  fills=features.TASK.fills,
  outputs=(),
  decode={},
  optional=True,
  mirror=False,
)

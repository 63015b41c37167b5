"""Objects as a set of queries: boxes and classes. Its batch is that of tasks/objects.py."""

from typing import Any

import numpy as np

from openpilot.tools.fair.spec import StudentSpec
from openpilot.tools.fair.tasks import objects
from openpilot.tools.fair.tasks.task import Batch, Outputs, Task


def loss(model: Any, out: Outputs, batch: Batch) -> dict[str, Any]:
  from openpilot.tools.fair.distillation.matching import set_loss

  if "own_loss" in out:  # of a family, see students/family.py
    return dict(out["own_loss"])
  some = objects.labeled(batch)
  if not some:
    return {}
  own: dict[str, Any] = {k: out[k][some] for k in ("detector_logits", "detector_boxes")}
  own["detector_aux"] = [(logits[some], boxes[some]) for logits, boxes in out.get("detector_aux", ())]
  height, width = (4 * n for n in batch["valid"].shape[1:])
  return set_loss(own, [batch["objects"][i] for i in some], (width, height))


def sketch(rgb: np.ndarray, i: int, batch: Batch, out: dict[str, np.ndarray], spec: StudentSpec) -> list[np.ndarray]:
  truth = [] if "objects_heat" in out else objects.sketch_truth(rgb, i, batch, spec)  # there it stands already
  return objects.sketch_boxes(rgb, i, batch, out, spec, "detector") + truth


TASK = Task(
  name="detector",
  head="detector",
  wanted="a teacher of boxes: yolox-nano, rtdetr-v2-r50, or simulator on simulated routes",
  kind="boxes",
  teaches=objects.teaches,
  targets=objects.targets,
  loss=loss,
  fills=objects.TASK.fills,
  outputs=("detector_",),
  decode={
    "detector_logits": {"head": "detector", "parameters": {"part": "logits"}, "classes": "boxes"},
    "detector_boxes": {"head": "detector", "parameters": {"part": "boxes"}},
    "detector_masks": {"head": "detector", "parameters": {"part": "masks"}},
  },
  taught_by={"detector_masks": ("masks",)},
  sketch=sketch,
  metric="openpilot.tools.fair.evaluation.groups:detector",
)

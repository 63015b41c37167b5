"""A teacher's score of every class at each of its boxes, as soft targets: what it is unsure of teaches too.

Its labels are boxes of the unit 'score', all that the teacher scored and not only what it found; one box under several
classes is one with a score of each. Batch: soft, a list of B dicts {boxes (M, 4) x0 y0 x1 y1 pixels of the picture,
scores (M, K) float32 0..1, known (K,) bool: classes that the teacher can tell}, or None: not labeled."""

from typing import Any

import numpy as np

from openpilot.tools.fair.distillation.augment import Augmentation
from openpilot.tools.fair.spec import ClassSet
from openpilot.tools.fair.tasks.objects import SCORES, moved_boxes
from openpilot.tools.fair.tasks.task import Batch, Outputs, Said, Targets, Task, names_of, speaks
from openpilot.tools.fair.teacher import Label

MOST = 100  # boxes of a picture, the best


def teaches(label: Label, classes: ClassSet) -> bool:
  return (
    label.kind == "boxes" and label.unit == SCORES and speaks(names_of([label], classes, "boxes"), classes, "boxes")
  )


def soft_list(a: Augmentation, said: Said, table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """One frame's table -> what the loss takes."""
  count = len(said.classes.boxes)
  known = np.zeros(count, bool)
  known[said.index[said.index >= 0]] = True
  cls = np.append(said.index, -1)[table["cls"].astype(int)]
  rows = np.stack([table[k].astype(np.float64) for k in ("x0", "y0", "x1", "y1")], axis=1)
  boxes, which = np.unique(rows[cls >= 0], axis=0, return_inverse=True)
  scores = np.zeros((len(boxes), count), np.float32)
  np.maximum.at(scores, (which.reshape(-1), cls[cls >= 0]), table["score"][cls >= 0].astype(np.float32))
  cut, good = moved_boxes(a, boxes)
  keep = np.flatnonzero(good)
  keep = keep[np.argsort(-scores[keep].max(1, initial=0), kind="stable")][:MOST]
  return {"boxes": cut[keep].astype(np.float32), "scores": scores[keep], "known": known}


def targets(said: Said, a: Augmentation, r: np.random.Generator) -> Targets:
  return {"soft": [None if x is None else soft_list(a, said, x) for x in said.values]}


def loss(model: Any, out: Outputs, batch: Batch) -> dict[str, Any]:
  from openpilot.tools.fair.distillation.soft_boxes import cell_loss, query_loss

  soft = batch.get("soft", [])
  some = [i for i, s in enumerate(soft) if s is not None]
  if not some:
    return {}
  parts, mine = {}, [soft[i] for i in some]
  if "objects_heat" in out:
    parts["cells"] = cell_loss(out["objects_heat"][some], mine, batch["valid"][some])
  if "detector_logits" in out:
    height, width = (4 * n for n in batch["valid"].shape[1:])
    parts["queries"] = query_loss(out["detector_logits"][some], out["detector_boxes"][some], mine, (width, height))
  return parts


TASK = Task(
  name="logits",
  head="",  # of no student by itself: `tools/op.sh images train-student` asks for it
  wanted="a teacher's scores of all classes",
  kind="boxes",
  teaches=teaches,
  targets=targets,
  loss=loss,
  fills={"soft": None},
  outputs=(),
  decode={},
  optional=True,
)

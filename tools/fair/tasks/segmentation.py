"""Class maps.

Batch: segmentation (B, K, H / 4, W / 4) float32, segmentation_rest (B, H / 4, W / 4): probability of the classes that
the teacher does not name; all zero: unknown; segmentation_named (B, K) bool: those that it names; segmentation_soft
(B,) bool: it says how sure it is."""

from typing import Any

import cv2
import numpy as np

from openpilot.tools.fair.distillation.augment import Augmentation, warp_grid
from openpilot.tools.fair.maps import classes_to_map
from openpilot.tools.fair.spec import UNKNOWN, ClassSet, StudentSpec, plain
from openpilot.tools.fair.tasks.task import Batch, Outputs, Said, Targets, Task, names_of, speaks
from openpilot.tools.fair.teacher import Label
from openpilot.tools.sim.truth import IGNORE


def teaches(label: Label, classes: ClassSet) -> bool:
  if label.kind != "dense" or label.unit not in ("class", "probability") or label.name == "features":
    return False
  return speaks(names_of([label], classes, "maps"), classes, "maps")


def class_maps(a: Augmentation, said: Said, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """x: ids (..., h, w), or probabilities (labels, ..., h, w) -> (K, H / 4, W / 4), (H / 4, W / 4) float32."""
  shape = a.picture.map_shape
  out, rest = np.zeros((len(said.classes.maps), *shape), np.float32), np.zeros(shape, np.float32)
  if said.label.unit == "class":
    x = warp_grid(a, classes_to_map(x, len(said.label.classes), shape), False, IGNORE)
    for k, (to, name) in enumerate(zip(said.index, said.label.classes, strict=True)):
      if to >= 0:
        out[to] += x == k
      elif said.classes.is_ignored(name) and plain(name) not in UNKNOWN:
        rest += x == k  # a teacher's word for all that it has no name for: none of those that it names
    return out, rest
  # one map for each class, made by a teacher that asks of each by itself: what is said later in the class list lies on
  # top of what is said earlier
  known = np.ones(shape, np.float32)
  if a.is_geometric:
    known = warp_grid(a, known, True)
  at = sorted((i for i, to in enumerate(said.index) if to >= 0), key=lambda i: -said.index[i])
  free = np.ones(shape, np.float32)
  for i in at:
    p = cv2.resize(x[i].astype(np.float32).reshape(x[i].shape[-2:]), shape[::-1], interpolation=cv2.INTER_AREA)
    if not np.isfinite(p).all():  # a teacher says NaN: not known
      known = known * warp_grid(a, np.isfinite(p).astype(np.float32), True)
      p = np.nan_to_num(p, nan=0.0, posinf=0.0, neginf=0.0)
    p = warp_grid(a, p, True)
    out[said.index[i]] += p * free
    free = free * (1 - p)
  sure = known > 0.99
  return out * sure, free * sure


def targets(said: Said, a: Augmentation, r: np.random.Generator) -> Targets:
  k, steps = len(said.classes.maps), len(said.values)
  nothing = np.zeros((k, *a.picture.map_shape), np.float32), np.zeros(a.picture.map_shape, np.float32)
  maps, rest = zip(*(nothing if x is None else class_maps(a, said, x) for x in said.values), strict=True)
  return {
    "segmentation": np.stack(maps),
    "segmentation_rest": np.stack(rest),
    "segmentation_soft": np.full(steps, said.label.unit == "probability"),
    "segmentation_named": np.repeat(np.isin(np.arange(k), said.index)[None], steps, 0),
  }


def segmentation(logits: Any, batch: Batch, valid: Any, weights: Any) -> Any:
  """A teacher that names only some of the classes teaches those, and the sum of the others; one that says how sure it
  is teaches that, too. logits (B, K, h, w), valid (B, h, w) bool, weights (K,) of the classes. scalar"""
  import torch

  from openpilot.tools.fair.distillation.losses import segmentation_loss, soft_segmentation_loss

  named = batch["segmentation_named"]
  soft = batch.get("segmentation_soft", torch.zeros_like(named[:, 0]))
  loss = logits.new_zeros(())
  for kind in torch.unique(torch.cat([named, soft[:, None]], dim=1), dim=0):
    pattern, is_soft = kind[:-1], kind[-1]
    some = (named == pattern).all(1) & (soft == is_soft)
    q, p, w = logits[some], batch["segmentation"][some], weights
    if not pattern.all():
      log_q = q.log_softmax(1)
      q = torch.cat([log_q[:, pattern], log_q[:, ~pattern].logsumexp(1, keepdim=True)], dim=1)
      p = torch.cat([p[:, pattern], batch["segmentation_rest"][some][:, None]], dim=1)
      w = torch.cat([weights[pattern], weights[~pattern].min()[None]])
    of = soft_segmentation_loss if is_soft else segmentation_loss
    loss = loss + of(q, p, valid[some], w) * some.float().mean()
  return loss


def loss(model: Any, out: Outputs, batch: Batch) -> dict[str, Any]:
  if "segmentation" not in batch:
    return {}
  return {"segmentation": segmentation(out["segmentation"], batch, batch["valid"], model.class_weights)}


def sketch(rgb: np.ndarray, i: int, batch: Batch, out: dict[str, np.ndarray], spec: StudentSpec) -> list[np.ndarray]:
  from openpilot.tools.fair.distillation.sketches import classes_on

  row = [classes_on(rgb, out["segmentation"][i].argmax(0), spec.classes)]
  if "segmentation" in batch:
    p = batch["segmentation"][i].numpy()
    row.append(classes_on(rgb, np.where(p.sum(0) > 0, p.argmax(0), IGNORE), spec.classes))
  return row


TASK = Task(
  name="segmentation",
  head="objects",
  wanted="a teacher of road classes: twinlitenet, or simulator on simulated routes",
  kind="maps",
  teaches=teaches,
  targets=targets,
  loss=loss,
  fills=dict.fromkeys(("segmentation", "segmentation_rest", "segmentation_soft", "segmentation_named"), 0),
  outputs=("segmentation",),
  decode={"segmentation": {"head": "segmentation", "parameters": {}, "classes": "maps"}},
  sketch=sketch,
  metric="openpilot.tools.fair.evaluation.groups:segmentation",
)

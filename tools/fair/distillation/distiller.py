"""A student in training: the student, what is needed only while it learns (projector, standardiser, task weights), and
its losses of a batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from openpilot.tools.fair.distillation.batch import Batch
from openpilot.tools.fair.distillation.features import Projector, Standardiser, feature_loss, gram_loss
from openpilot.tools.fair.distillation.losses import (
  TaskWeights,
  depth_loss,
  in_window,
  match_loss,
  points_loss,
  segmentation_loss,
  soft_segmentation_loss,
)
from openpilot.tools.fair.distillation.matching import objects_loss, set_loss
from openpilot.tools.learn.processes import touch
from openpilot.tools.fair.students.lanes import STRIDES, view_to_cell
from openpilot.tools.fair.students.student import Student

# of classes.json's "segmentation": thin and small things count more than their few pixels
CLASS_WEIGHTS = (0.5, 0.7, 2.5, 1.5, 4.0)
LEARNS = {
  "depth": ("depth", "features"),
  "objects": ("objects", "segmentation"),
  "detector": ("detector",),
  "lanes": ("points",),
}  # a head -> what teaches it


class Distiller(nn.Module):
  """forward(batch, tasks) -> {"task/part": scalar, "total": the loss}, of `tasks` alone where any are named; where the
  batch has no labels of them, nothing but a "total" of 0. feature_shape: (C, h, w) of the teacher's features, where the
  student learns them."""

  class_weights: Tensor

  def __init__(
    self,
    student: Student,
    tasks: list[str],
    weights: Mapping[str, float],
    learned: bool = False,
    feature_shape: tuple[int, ...] | None = None,
  ):
    super().__init__()
    self.student, self.tasks = student, tasks
    self.weights = TaskWeights({t: weights.get(t, 1.0) for t in tasks}, learned)
    self.register_buffer("class_weights", torch.tensor(CLASS_WEIGHTS))
    self.projector: Projector | None = None
    self.standardiser: Standardiser | None = None
    if "features" in tasks:
      assert feature_shape is not None
      self.projector, self.standardiser = (
        Projector(student.size.features, feature_shape[0]),
        Standardiser(feature_shape[0]),
      )

  def forward(self, batch: Batch, tasks: Sequence[str] = ()) -> dict[str, Tensor]:
    # the sum is made in here, so that DistributedDataParallel sees which parameters have a share in it
    parts = {k: v for k, v in self.losses(batch)[0].items() if not tasks or k.split("/")[0] in tasks}
    return {**parts, "total": self.total(parts) if parts else touch(self)}

  def losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """-> the parts of every task that this batch has labels of, and the student's outputs."""
    tracked = "points" in self.tasks and "points" in batch
    steps = batch["points"].shape[1] if tracked else 1
    if tracked:
      started = batch["points_known"][:, :1].float()
      out = self.student.forward_clips(batch["frame"], batch["points"], started.expand(-1, steps, -1))
    else:
      out = self.student(batch["frame"])
    valid = batch["valid"]
    parts: dict[str, dict[str, Tensor]] = {}
    if "depth" in self.tasks and "depth" in batch:
      depth, metric = batch["depth"], batch["metric"]
      parts["depth"] = {}
      for kind in (True, False):
        if (metric == kind).any():
          some = metric == kind
          for k, v in depth_loss(out["depth"][some], depth[some], valid[some], metric=kind).items():
            parts["depth"][k] = parts["depth"].get(k, 0) + v * some.float().mean()
    if "segmentation" in self.tasks and "segmentation" in batch:
      parts["segmentation"] = {"segmentation": self.segmentation(out["segmentation"], batch, valid)}
    if "features" in self.tasks and "features" in batch:
      assert self.projector is not None and self.standardiser is not None
      # of a grid that need not divide the map's
      finite = torch.isfinite(batch["features"]).all(1, keepdim=True).float()
      known = valid & (functional.interpolate(finite, valid.shape[1:], mode="nearest-exact")[:, 0] > 0)
      teacher = self.standardiser(batch["features"].nan_to_num(0.0))
      parts["features"] = {
        "features": feature_loss(self.projector(out["features"], tuple(teacher.shape[2:])), teacher, known),
        "gram": 0.1 * gram_loss(out["features"], teacher, known),
      }
    objects = batch.get("objects", ())
    labeled = [i for i, o in enumerate(objects) if o is not None]
    if labeled and "objects" in self.tasks:
      nothing = {k: (v[:0] if torch.is_tensor(v) else v) for k, v in objects[labeled[0]].items()}
      counts = valid.clone()
      counts[[i for i, o in enumerate(objects) if o is None]] = False
      parts["objects"] = objects_loss(out, [nothing if o is None else o for o in objects], counts, batch["clip"])
    if labeled and "detector" in self.tasks:
      own: dict[str, Any] = {k: out[k][labeled] for k in ("detector_logits", "detector_boxes")}
      own["detector_aux"] = [(logits[labeled], boxes[labeled]) for logits, boxes in out.get("detector_aux", ())]
      parts["detector"] = set_loss(own, [objects[i] for i in labeled])
    if tracked and batch["points_known"][:, 1:].any():
      known = batch["points_known"].clone()
      known[:, 0] = False  # given, not found
      cells = [view_to_cell(batch["points"], s) for s in STRIDES]
      reached = in_window(out["lanes_looks"][0], cells[0])[1]
      parts["points"] = points_loss(
        out["lanes_points_out"], out["lanes_visible"], batch["points"], batch["points_visible"], known, reached
      )
      parts["points"]["match"] = match_loss(out["lanes_looks"], cells, batch["points_visible"], known)
    return {f"{task}/{k}": v for task, ps in parts.items() for k, v in ps.items()}, out

  def segmentation(self, logits: Tensor, batch: Batch, valid: Tensor) -> Tensor:
    """A teacher that names only some of the classes teaches those, and the sum of the others; one that says how sure it
    is teaches that, too."""
    named, weights = batch["segmentation_named"], self.class_weights
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

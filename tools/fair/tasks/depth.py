"""Depth along the optical axis in heights of the camera above the road, or in meters; or inverse depth up to scale and
shift.

In heights a road looks the same from any camera: the device, which knows its camera's height, multiplies by it.

Batch: depth (B, H / 4, W / 4) float32, heights or meters, or where `metric` (B,) bool is False inverse depth; nan:
unknown."""

from typing import Any

import numpy as np

from openpilot.tools.fair.distillation.augment import Augmentation, warp_grid
from openpilot.tools.fair.maps import depth_of, depth_to_map, inverse_of
from openpilot.tools.fair.spec import ClassSet, StudentSpec
from openpilot.tools.fair.tasks.task import Batch, Outputs, Said, Targets, Task
from openpilot.tools.fair.teacher import Label

# by so much inverse depth changes within half a cell where a surface ends; the road's own by less, to 140 m
EDGE = 0.25
# of the runtime's head, where depth was learned in heights of the camera
PER_HEIGHT = {"activation": "exp", "per_height": True}


def teaches(label: Label, classes: ClassSet) -> bool:
  return label.kind == "dense" and label.unit in ("m", "relative") and label.name != "features"


def depth_map(a: Augmentation, label: Label, z: np.ndarray) -> np.ndarray:
  """-> (h, w) of a.picture.map_shape float32 at the centers of the augmented view's cells, nan: unknown. Where a
  surface ends the nearer pixel's is taken, nothing in between."""
  shape = a.picture.map_shape
  if not a.is_geometric:
    return depth_to_map(z, label.unit, shape)
  size, parts = shape[::-1], inverse_of(z, label.unit)
  (inverse, known), (nearest, sure) = ([warp_grid(a, x, linear, size=size) for x in parts] for linear in (True, False))
  ends = (sure > 0) & (np.abs(inverse - nearest * known) > EDGE * np.maximum(inverse, nearest * known))
  return depth_of(np.where(ends, nearest, inverse), np.where(ends, 1, known), label.unit) / (
    a.zoom if label.unit == "m" else 1.0
  )


def targets(said: Said, a: Augmentation, r: np.random.Generator) -> Targets:
  nothing = np.full(a.picture.map_shape, np.nan, np.float32)
  unit = said.height if said.height is not None and said.label.unit == "m" else 1.0
  maps = [nothing if x is None else depth_map(a, said.label, x) / unit for x in said.values]
  return {"depth": np.stack(maps).astype(np.float32), "metric": np.full(len(maps), said.label.unit == "m")}


def loss(model: Any, out: Outputs, batch: Batch) -> dict[str, Any]:
  from openpilot.tools.fair.distillation.losses import depth_loss

  parts: dict[str, Any] = {}
  if "depth" not in batch:
    return parts
  depth, metric = batch["depth"], batch["metric"]
  for kind in (True, False):
    if (metric == kind).any():
      some = metric == kind
      for k, v in depth_loss(out["depth"][some], depth[some], batch["valid"][some], metric=kind).items():
        parts[k] = parts.get(k, 0) + v * some.float().mean()
  return parts


def sketch(rgb: np.ndarray, i: int, batch: Batch, out: dict[str, np.ndarray], spec: StudentSpec) -> list[np.ndarray]:
  from openpilot.tools.lib.colors import depth_picture

  row = [depth_picture(np.exp(out["depth"][i, 0]))]
  return row + ([depth_picture(batch["depth"][i].numpy())] if "depth" in batch else [])


TASK = Task(
  name="depth",
  head="depth",
  wanted="a teacher of depth: depth-anything-v2-metric-outdoor-small, or simulator on simulated routes",
  teaches=teaches,
  targets=targets,
  loss=loss,
  fills={"depth": np.nan, "metric": 0},
  outputs=("depth",),
  decode={"depth": {"head": "depth", "parameters": {"activation": "exp", "metric": True}}},
  sketch=sketch,
  metric="openpilot.tools.fair.evaluation.groups:depth",
)

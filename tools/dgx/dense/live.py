"""Pictures labeled by a teacher as they are learned from, without a label store."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W, pack_rgb
from openpilot.tools.dgx.dense.driving_features import pair_up
from openpilot.tools.dgx.training.outputs import parse_outputs
from openpilot.tools.fair.hf import DenseTeacher
from openpilot.tools.fair.maps import depth_to_map
from openpilot.tools.lib.errors import UserError
from openpilot.tools.sim.truth import MAP_H, MAP_W


def taught(teacher: DenseTeacher, wanted: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
  """What of `wanted` the teacher says of frames of the model view, and its shapes. Raises UserError where that is
  nothing."""
  teacher.prepare(VIEW_H, VIEW_W)
  found = {x.name: x.shape for x in teacher.labels if x.name in wanted}
  if not found:
    raise UserError(f"teacher '{teacher.name}' gives none of {', '.join(wanted)}; take one of dense features or depth")
  return found


@torch.no_grad()
def live_batch(teacher: DenseTeacher, images: Tensor, driving: bool) -> dict[str, Any]:
  """images (B, 3, 256, 512) uint8 RGB of the medmodel view, or for a driving network (B, 2, 3, 256, 512), two moments
  200 ms apart, the older first -> a batch (distillation/batch.py) with the teacher's labels of the last moment. Raises
  UserError on other shapes."""
  shape = (2, 3, VIEW_H, VIEW_W) if driving else (3, VIEW_H, VIEW_W)
  if images.shape[1:] != shape or images.dtype != torch.uint8:
    raise UserError(f"images are {tuple(images.shape)} {images.dtype}; this network learns from (B, {shape}) uint8 RGB")
  rgb = images.reshape(-1, 3, VIEW_H, VIEW_W).permute(0, 2, 3, 1).cpu().numpy()
  frame = torch.from_numpy(np.stack([pack_rgb(x) for x in rgb]))
  now, n = (images[:, -1] if driving else images), len(images)
  said = teacher.encode(now)
  batch: dict[str, Any] = {
    "frame": pair_up({"frame": frame}, 2)["frame"] if driving else frame,
    "valid": torch.ones(n, MAP_H, MAP_W, dtype=torch.bool),
    "clip": torch.arange(n),
  }
  if "features" in said:
    batch["features"] = said["features"].float().cpu()
  if "depth" in said:
    unit = next(x.unit for x in teacher.labels if x.name == "depth")
    maps = [depth_to_map(z, unit) for z in said["depth"].float().cpu().numpy()]
    batch["depth"], batch["metric"] = torch.from_numpy(np.stack(maps)), torch.full((n,), unit == "m")
  return batch


def parsed(out: dict[str, Tensor], slices: dict[str, slice]) -> dict[str, Tensor]:
  """A driving network's outputs, each as it lies in the vector -> parsed."""
  parts = [out[k] for k in slices]
  vector = parts[0].new_zeros(len(parts[0]), max(s.stop for s in slices.values()))
  for x, s in zip(parts, slices.values(), strict=True):
    vector[:, s] = x
  return parse_outputs(vector, slices)

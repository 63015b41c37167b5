"""openpilot's driving network as a student of dense teachers: a map inside it, and a depth that is read from that map
while training only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openpilot.selfdrive.modeld.fair.frames import FRAME_SHAPE
from openpilot.common.transformations.model import medmodel_intrinsics, sbigmodel_intrinsics
from openpilot.tools.dgx.training.constants import ACTION_T_LEN, DESIRE_LEN, FRAME_SKIP
from openpilot.tools.dgx.training.history import History
from openpilot.tools.dgx.training.model import OnnxModule
from openpilot.tools.dgx.training.outputs import model_slices
from openpilot.tools.dgx.training.student import Student as DrivingStudent
from openpilot.tools.dgx.training.student import shapes_of
from openpilot.tools.dgx.training.teacher import LATERAL_DELAY
from openpilot.tools.fair.distillation.augment import Augmentation, warp_frame
from openpilot.tools.learn.adapters.layers import KINDS
from openpilot.tools.lib.errors import UserError
from openpilot.tools.sim.truth import MAP_H, MAP_W

LEAST_MAP = (8, 16)  # cells: a coarser map has no place for what a teacher says
TYPICAL_SPEED = 12.0  # m/s, told to a network that wants the car's: label stores do not hold it
TYPICAL_DEPTH = 20.0  # m, what an untrained depth says
# a pixel of the medmodel view -> of the sbigmodel view, which has the same center of projection and half the focal
# length
TO_BIG = Augmentation(sbigmodel_intrinsics @ np.linalg.inv(medmodel_intrinsics), zoom=0.5)


def big_frame(frame: np.ndarray) -> np.ndarray:
  """(6, 128, 256) uint8 of the medmodel view -> the sbigmodel view of it: a label store has no wide camera. Its edges
  are continued outwards."""
  return warp_frame(TO_BIG, frame)


@dataclass
class Layer:
  name: str
  shape: tuple[int, ...]  # of its output


def trace(model: nn.Module, run: Callable[[], Any]) -> list[Layer]:
  """The dense layers, convolutions and GRUs that DoRA can adapt (not depthwise ones, whose filters are too small), in
  the order in which they run."""
  found: list[Layer] = []
  hooks = []
  for name, m in model.named_modules():
    if type(m) in KINDS and getattr(m, "groups", 1) == 1:
      hooks.append(
        m.register_forward_hook(
          lambda _m, _x, y, name=name: found.append(Layer(name, tuple(y.shape) if torch.is_tensor(y) else ()))
        )
      )
  try:
    with torch.no_grad():
      run()
  finally:
    for h in hooks:
      h.remove()
  return list({x.name: x for x in found}.values())


class DrivingFeatures(nn.Module):
  """pairs (B, 24, 128, 256) uint8 (two frames of the medmodel view, the older first, then the same of the sbigmodel
  view) -> 'features' (B, C, h, w) of the layer `tap`, 'depth' (B, 1, 64, 128), log meters, and the network's own
  outputs at the start of a drive, (B, N) each, as they lie in its vector.

  tap: by itself the last convolution whose map has at least LEAST_MAP cells. Raises UserError where the network takes
  no images or has no such layer."""

  def __init__(self, model: OnnxModule, tap: str | None = None):
    super().__init__()
    self.model = model
    self.shapes, self.slices = shapes_of(model), model_slices(model.base, model.where)
    if "img" not in self.shapes:
      raise UserError(
        f"{model.where} takes no images, and so sees nothing that a teacher could label; give a supercombo, or the "
        "vision network"
      )
    noise = torch.randint(
      0, 256, (1, 4 * FRAME_SHAPE[0], *FRAME_SHAPE[1:]), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    self.layers = trace(model, lambda: self.outputs(noise))
    maps = [x for x in self.layers if len(x.shape) == 4]
    if tap is None:
      tap = next((x.name for x in reversed(maps) if x.shape[2] >= LEAST_MAP[0] and x.shape[3] >= LEAST_MAP[1]), None)
    at = next((x for x in maps if x.name == tap), None)
    if at is None:
      named = ", ".join(f"{x.name} {x.shape[1]}x{x.shape[2]}x{x.shape[3]}" for x in maps) or "none"
      raise UserError(
        f"{model.where} has no map {tap or 'of 8x16 cells or more'} to read features from; --tap takes one of: {named}"
      )
    self.tap, channels = at.name, at.shape[1]
    self.features = channels
    self.upto = [x.name for x in self.layers[: self.layers.index(at) + 1]]
    factor = min(MAP_H // at.shape[2], MAP_W // at.shape[3]) or 1
    self.depth = nn.Sequential(
      nn.Conv2d(channels, 128, 1), nn.GELU(), nn.Conv2d(128, factor**2, 3, padding=1), nn.PixelShuffle(factor)
    )
    nn.init.constant_(self.depth[2].bias, float(np.log(TYPICAL_DEPTH)))  # type: ignore[arg-type]

  @property
  def size(self) -> "DrivingFeatures":
    """As fair students have it: .features is the map's width."""
    return self

  def train(self, mode: bool = True) -> "DrivingFeatures":
    """Batch norms keep the base's statistics, as in tools/dgx."""
    super().train(mode)
    for m in self.model.modules():
      if isinstance(m, nn.modules.batchnorm._BatchNorm):
        m.eval()
    return self

  def inputs(self, pairs: Tensor) -> dict[str, Tensor]:
    b, device = len(pairs), pairs.device
    right = torch.tensor([[1.0, 0.0]], device=device).expand(b, -1)
    x = History(self.shapes, b, device, every=1).see(
      pairs[:, :12],
      pairs[:, 12:],
      torch.zeros(b, DESIRE_LEN, device=device),
      right,
      torch.full((b, ACTION_T_LEN), LATERAL_DELAY, device=device),
    )
    if "lateral_control_params" in self.shapes:
      x["lateral_control_params"] = torch.tensor([[TYPICAL_SPEED, LATERAL_DELAY]], device=device).expand(b, -1)
    return x

  def outputs(self, pairs: Tensor, model: OnnxModule | None = None) -> dict[str, Tensor]:
    """model: another network of the same interface."""
    vector = DrivingStudent.vector(model or self.model, self.inputs(pairs)).float()
    return {name: vector[:, s] for name, s in self.slices.items()}

  def forward(self, pairs: Tensor) -> dict[str, Tensor]:
    seen: list[Tensor] = []
    layer = self.model.get_submodule(self.tap)
    hook = layer.register_forward_hook(lambda _m, _x, y: seen.append(y))
    try:
      outputs = self.outputs(pairs)
    finally:
      hook.remove()
    features = torch.cat(seen)[
      -len(pairs) :
    ].float()  # a file of batch 1 may run one example after the other, and is tried out before
    depth = self.depth(features)
    if depth.shape[2:] != (MAP_H, MAP_W):
      depth = F.interpolate(depth, (MAP_H, MAP_W), mode="bilinear", align_corners=False)
    return {**outputs, "features": features, "depth": depth}


def frames_back(every: int) -> int:
  """Labeled frames between the two of a pair, 200 ms apart, in a store that has every n-th. Raises UserError."""
  if FRAME_SKIP % every:
    raise UserError(
      f"the label store has every {every}th frame, and a driving network looks at frames 4 apart; label with --every "
      "1, 2 or 4"
    )
  return FRAME_SKIP // every


def pair_up(batch: dict[str, Any], steps: int) -> dict[str, Any]:
  """A batch of clips of `steps` frames (distillation/batch.py) -> of their last frames, whose 'frame' is the pair of
  both views that DrivingFeatures takes."""
  frames = batch["frame"].reshape(-1, steps, *batch["frame"].shape[1:])
  pair = torch.stack([frames[:, 0], frames[:, -1]], 1)  # (clips, 2, 6, 128, 256)
  big = torch.from_numpy(np.stack([big_frame(f) for f in pair.flatten(0, 1).numpy()])).reshape(pair.shape)
  last = {k: v[steps - 1 :: steps] for k, v in batch.items() if k in ("valid", "depth", "metric", "features")}
  about: dict[str, Any] = {k: batch[k] for k in ("clips", "names") if k in batch}
  return {"frame": torch.cat([pair.flatten(1, 2), big.flatten(1, 2)], 1), **last, **about}

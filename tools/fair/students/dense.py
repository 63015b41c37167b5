"""Heads that put out maps: depth and DINO features; prompt-free instance masks with identity, and classes."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpilot.tools.fair.students.layers import quarters, separable

PROTOTYPES = 16
EMBEDDING = 16
BOX_STRIDE = 8


class DepthHead(nn.Module):
  """depth (B, 1, 64, 128), natural log of meters along the optical axis; features (B, F, 16, 32), which a projector of
  the training maps to a teacher's."""

  fixed = ("depth.1", "features.1")

  def __init__(self, neck: int, width: int, features: int):
    super().__init__()
    meters = quarters(width, 1)
    self.depth = nn.Sequential(separable(neck, width), meters)
    self.features = nn.Sequential(separable(neck, neck), nn.Conv2d(neck, features, 1))
    assert meters.bias is not None
    nn.init.constant_(meters.bias, 3.0)  # about 20 m

  def forward(self, maps: dict[int, Tensor]) -> dict[str, Tensor]:
    return {"depth": self.depth(maps[8]), "features": self.features(maps[16])}


def biases(layers: Sequence[nn.Conv2d | nn.ConvTranspose2d]) -> Tensor:
  return torch.cat([cast(Tensor, m.bias) for m in layers])


class ObjectsHead(nn.Module):
  """Objects at their centers, local maxima of the heat instead of NMS: box distances, mask coefficients and an identity
  embedding per cell of view stride 8; and class maps. boxes, maps: how many classes each has; a kind without any has
  none of its outputs.

  Of a picture of H x W pixels, by default 256 x 512, cells are h x w, an eighth of that: objects_heat (B, boxes, h, w)
  logits, objects_box (B, 4, h, w) left, top, right, bottom >= 0, view pixels from the cell's center (8j + 3.5);
  objects_coef (B, 16, h, w) in -1..1; objects_proto (B, 16, 2h, 2w): mask logits = sum over coef x proto;
  objects_embed (B, 16, h, w); segmentation (B, maps, 2h, 2w) logits."""

  @property
  def fixed(self) -> tuple[str, ...]:
    return (
      *(("heat", "box", "coef", "embed", "proto") if self.boxes else ()),
      *(("segmentation",) if self.maps else ()),
    )

  def __init__(self, neck: int, width: int, boxes: int, maps: int):
    super().__init__()
    self.tower = nn.Sequential(separable(neck, width), separable(width, width))
    self.boxes, self.maps = boxes, maps
    if boxes:
      self.heat, self.box = nn.Conv2d(width, boxes, 1), nn.Conv2d(width, 4, 1)
      self.coef, self.embed = nn.Conv2d(width, PROTOTYPES, 1), nn.Conv2d(width, EMBEDDING, 1)
      self.proto = quarters(width, PROTOTYPES)
      assert self.heat.bias is not None
      nn.init.constant_(self.heat.bias, -4.0)  # objects are rare: a focal loss starts calm
    if maps:
      self.segmentation = quarters(width, maps)

  def apart(self, maps: dict[int, Tensor]) -> list[Tensor]:
    """The last layers one by one: see Student.apart()."""
    x = self.tower(maps[8])
    return [self.get_submodule(name)(x) for name in self.fixed]

  def forward(self, maps: dict[int, Tensor]) -> dict[str, Tensor]:
    x = self.tower(maps[8])
    out: dict[str, Tensor] = {}
    # those of the same map are one convolution
    cells = [self.heat, self.box, self.coef, self.embed] if self.boxes else []
    finer = ([self.proto] if self.boxes else []) + ([self.segmentation] if self.maps else [])
    if cells:
      heat, box, coef, embed = F.conv2d(x, torch.cat([m.weight for m in cells]), biases(cells)).split(
        [m.out_channels for m in cells], dim=1
      )
    fine = F.conv_transpose2d(x, torch.cat([m.weight for m in finer], 1), biases(finer), 2).split(
      [m.out_channels for m in finer], dim=1
    )
    if self.maps:
      out["segmentation"] = fine[-1]
    if cells:
      out["objects_heat"] = heat
      # softplus; ONNX Runtime's own takes four times as long
      out["objects_box"] = (torch.relu(box) - torch.log(torch.sigmoid(box.abs()))) * BOX_STRIDE
      out["objects_coef"] = torch.tanh(coef)
      out["objects_proto"] = fine[0]
      out["objects_embed"] = embed
    return out

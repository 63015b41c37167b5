"""Oriented boxes at their centers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpilot.selfdrive.modeld.fair.heads.oriented import CHANNELS
from openpilot.tools.fair.students.dense import biases
from openpilot.tools.fair.students.layers import separable

USUAL = 3.3  # natural logarithm of a side's pixels, with which an untaught head starts


class OrientedHead(nn.Module):
  """Of a picture of H x W pixels, cells are h x w, an eighth of that: oriented_heat (B, boxes, h, w) logits;
  oriented_box (B, 7, h, w), the code of selfdrive/modeld/fair/heads/oriented.py's boxes_of()."""

  fixed = ("heat", "box")

  def __init__(self, neck: int, width: int, boxes: int):
    super().__init__()
    self.tower = nn.Sequential(separable(neck, width), separable(width, width))
    self.heat, self.box = nn.Conv2d(width, boxes, 1), nn.Conv2d(width, CHANNELS, 1)
    assert self.heat.bias is not None and self.box.bias is not None
    nn.init.constant_(self.heat.bias, -4.0)  # objects are rare: a focal loss starts calm
    nn.init.zeros_(self.box.bias)
    nn.init.constant_(self.box.bias[2:3], USUAL)

  def apart(self, maps: dict[int, Tensor]) -> list[Tensor]:
    """The last layers one by one: see Student.apart()."""
    x = self.tower(maps[8])
    return [self.heat(x), self.box(x)]

  def forward(self, maps: dict[int, Tensor]) -> dict[str, Tensor]:
    cells = [self.heat, self.box]  # one convolution
    out = F.conv2d(self.tower(maps[8]), torch.cat([m.weight for m in cells]), biases(cells))
    heat, box = out.split([m.out_channels for m in cells], dim=1)
    return {"oriented_heat": heat, "oriented_box": box}

"""scene-nano: depth and segmentation of the road scene from one model frame."""

import torch
from torch import Tensor, nn

from openpilot.tools.fair.students.layers import Residual, conv, up
from openpilot.tools.sim.render import CLASSES


class SceneStudent(nn.Module):
  """(B, 6, 128, 256) uint8 model frame -> depth (B, 1, 64, 128), the natural log of meters; segmentation (B, 5, 64,
  128), logits of CLASSES."""

  def __init__(self, width: int = 24):
    super().__init__()
    c1, c2, c3, c4, neck = width, width * 5 // 3, width * 3, width * 14 // 3, width * 2
    self.stem = conv(6, c1, 3, 2)  # (B, c1, 64, 128)
    self.stage2 = nn.Sequential(conv(c1, c2, 3, 2), Residual(c2))  # (B, c2, 32, 64)
    self.stage3 = nn.Sequential(conv(c2, c3, 3, 2), Residual(c3))  # (B, c3, 16, 32)
    self.stage4 = nn.Sequential(conv(c3, c4, 3, 2), Residual(c4), conv(c4, c4, 5))  # (B, c4, 8, 16)
    self.lateral4, self.lateral3, self.lateral2 = nn.Conv2d(c4, neck, 1), nn.Conv2d(c3, neck, 1), nn.Conv2d(c2, neck, 1)
    self.smooth = conv(neck, neck)
    self.fuse = conv(neck + c1, c2)
    self.depth, self.segmentation = nn.Conv2d(c2, 1, 1), nn.Conv2d(c2, len(CLASSES), 1)
    assert self.depth.bias is not None
    nn.init.constant_(self.depth.bias, 3.0)  # about 20 m

  def forward(self, frame: Tensor) -> tuple[Tensor, Tensor]:
    x1 = self.stem((frame.float() - 128.0) / 64.0)
    x2 = self.stage2(x1)
    x3 = self.stage3(x2)
    x4 = self.stage4(x3)
    p3 = self.lateral3(x3) + up(self.lateral4(x4))
    p2 = self.smooth(self.lateral2(x2) + up(p3))
    y = self.fuse(torch.cat([up(p2), x1], dim=1))
    return self.depth(y), self.segmentation(y)

"""Pictures for a detection transformer: resized by the shortest and the longest edge, padded at the right and below.

Boxes are relative to the picture, not to its padding, as DETR's own weights have them: what the network says is put
back by the picture's size alone, which is what transformers' post-processing does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openpilot.tools.fair.detr.teacher import Pictures
from openpilot.tools.fair.students.backbone import RGB_MEAN, RGB_STD

MULTIPLE = 32  # that padded sides are of, where the patch asks for no other


@dataclass(frozen=True)
class Frame:
  """short, long: edges in pixels. pad: 'orientation', to one size for landscape and its turn for portrait, or 'batch',
  to the largest of it. multiple: that padded sides are of: the backbone's patch. mean, std: of RGB of 0 to 1."""

  short: int = 960
  long: int = 1536
  pad: str = "orientation"
  multiple: int = MULTIPLE
  mean: tuple[float, ...] = RGB_MEAN
  std: tuple[float, ...] = RGB_STD

  def fit(self, height: int, width: int) -> tuple[int, int]:
    """(height, width) that a picture is resized to, by DETR's rule."""
    edges = {"shortest_edge": self.short, "longest_edge": self.long}
    h, w = Pictures({"size": edges}).fit(height, width)
    return max(1, h), max(1, w)  # of a panorama

  def up(self, side: int) -> int:
    return -(-side // self.multiple) * self.multiple

  def canvas(self, height: int, width: int) -> tuple[int, int]:
    """(height, width) of the padded picture, of one that is resized to this size."""
    if self.pad == "batch":
      return self.up(height), self.up(width)
    short, long = self.up(self.short), self.up(self.long)
    return (short, long) if height <= width else (long, short)

  def resize(self, rgb: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, h, w) float32, normalized: the arithmetic of transformers' processor."""
    x = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)[None]  # a copy: Pillow's array cannot be written
    size = self.fit(*rgb.shape[:2])
    if size != rgb.shape[:2]:
      x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
    return (x[0].float() / 255 - mean) / std

  def processor(self, head: str) -> Any:
    """transformers' own, which does the same but for the padding."""
    import transformers

    kind = {"detr": "DetrImageProcessor", "deformable": "DeformableDetrImageProcessor"}[head]
    return getattr(transformers, kind)(
      size={"shortest_edge": self.short, "longest_edge": self.long},
      image_mean=list(self.mean),
      image_std=list(self.std),
    )


def to_relative(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
  """(K, 4) x, y, width, height in pixels -> center and size relative to the picture, float32."""
  b = np.asarray(boxes, np.float64).reshape(-1, 4)
  return (np.concatenate([b[:, :2] + b[:, 2:] / 2, b[:, 2:]], 1) / [width, height, width, height]).astype(np.float32)


def to_pixels(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
  """(K, 4) center and size relative to the picture -> x, y, width, height in pixels, float64."""
  b = np.asarray(boxes, np.float64).reshape(-1, 4) * [width, height, width, height]
  return np.concatenate([b[:, :2] - b[:, 2:] / 2, b[:, 2:]], 1)


def padded(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
  """(C, h, w) each -> (B, C, *size), zeros at the right and below."""
  out = maps[0].new_zeros(len(maps), maps[0].shape[0], *size)
  for i, x in enumerate(maps):
    out[i, :, : x.shape[1], : x.shape[2]] = x
  return out


def valid(sizes: Sequence[tuple[int, int]], size: tuple[int, int]) -> Tensor:
  """(B, *size) bool: where the pictures, of those (height, width), are."""
  out = torch.zeros(len(sizes), *size, dtype=torch.bool)
  for i, (h, w) in enumerate(sizes):
    out[i, :h, :w] = True
  return out

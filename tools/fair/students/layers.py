"""What necks and heads are made of: plain convolutions, matmul attention. All of it runs in ONNX Runtime and tinygrad,
and quantizes.

Tokens may come without a batch, (L, d): heads drop it where they run on a single frame. ONNX Runtime puts two copies
around each dense layer of more than two dimensions, and has a LayerNorm for those that is three times slower."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(cin: int, cout: int, k: int = 3, stride: int = 1) -> nn.Sequential:
  return nn.Sequential(nn.Conv2d(cin, cout, k, stride, k // 2, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True))


def up(x: Tensor) -> Tensor:
  return F.interpolate(x, scale_factor=2.0, mode="nearest")


def up_to(x: Tensor, like: Tensor) -> Tensor:
  """up(), cut to like's height and width: a side of an odd number of cells is half a cell longer one stride coarser."""
  big = up(x)
  return big if big.shape[-2:] == like.shape[-2:] else big[..., : like.shape[-2], : like.shape[-1]]


class Residual(nn.Module):
  """ResNet's basic block. Plain convolutions: on a CPU they train eight times faster than depthwise ones of the same
  accuracy."""

  def __init__(self, c: int):
    super().__init__()
    self.conv1 = conv(c, c)
    self.conv2 = nn.Sequential(nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c))

  def forward(self, x: Tensor) -> Tensor:
    return F.relu(x + self.conv2(self.conv1(x)))


def depthwise(c: int, k: int = 3) -> nn.Sequential:
  return nn.Sequential(nn.Conv2d(c, c, k, 1, k // 2, groups=c, bias=False), nn.BatchNorm2d(c), nn.ReLU(inplace=True))


def separable(cin: int, cout: int, k: int = 3) -> nn.Sequential:
  """Depthwise k x k, then pointwise, each with BatchNorm and ReLU."""
  return nn.Sequential(depthwise(cin, k), conv(cin, cout, 1))


def split_heads(x: Tensor, heads: int) -> Tensor:
  """(..., L, d) -> (..., heads, L, d / heads)."""
  return x.reshape(*x.shape[:-1], heads, -1).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
  """(..., heads, L, d / heads) -> (..., L, d)."""
  return x.transpose(-3, -2).flatten(-2)


class Attention(nn.Module):
  """Multi-head attention by two matmuls and a softmax."""

  def __init__(self, d: int, heads: int = 4):
    super().__init__()
    self.heads, self.scale = heads, (d // heads) ** -0.5
    self.q, self.k, self.v, self.out = (nn.Linear(d, d) for _ in range(4))

  def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """query (..., Q, d), key and value (..., L, d), bias broadcastable to (..., heads, Q, L), added to the logits ->
    (..., Q, d)."""
    if query is key:  # one product for both
      both = F.linear(
        query,
        torch.cat([self.q.weight * self.scale, self.k.weight]),
        torch.cat([self.q.bias * self.scale, self.k.bias]),
      )
      q, k = split_heads(both, 2 * self.heads).split(self.heads, dim=-3)
    else:
      q, k = split_heads(self.q(query) * self.scale, self.heads), split_heads(self.k(key), self.heads)
    v = split_heads(self.v(value), self.heads)
    scores = q @ k.transpose(-2, -1)
    return self.out(merge_heads(torch.softmax(scores if bias is None else scores + bias, dim=-1) @ v))


def feed_forward(d: int, hidden: int) -> nn.Sequential:
  return nn.Sequential(nn.Linear(d, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, d))


class Neck(nn.Module):
  """Feature pyramid: {view stride: map of the backbone} -> {8, 16, 32: (B, width, H / stride, W / stride)} of a picture
  of H x W pixels, coarse added to fine.

  The stride-4 map comes in by a 2 x 2 convolution of stride 2, so that the stride-8 map knows what lies in each quarter
  of a cell: dense outputs are unfolded from it (quarters()), at a fraction of a wide stride-4 map's cost. Its
  convolutions are plain ones: all heads share them, and on a CPU they cost little more time than depthwise ones and
  train far faster."""

  def __init__(self, channels: dict[int, int], width: int):
    super().__init__()
    self.strides = [s for s in channels if s >= 8]
    self.lateral = nn.ModuleDict(
      {str(s): nn.Sequential(nn.Conv2d(channels[s], width, 1, bias=False), nn.BatchNorm2d(width)) for s in self.strides}
    )
    self.detail = nn.Sequential(nn.Conv2d(channels[4], width, 2, 2, bias=False), nn.BatchNorm2d(width))
    self.smooth = nn.ModuleDict({str(s): conv(width, width) for s in (8, 16, 32)})
    self.more = nn.Sequential(
      nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
    )  # at stride 16, where all heads gain and cells are few
    for branch in (self.detail, self.more):  # a fresh network is the plain pyramid
      nn.init.zeros_(cast(nn.BatchNorm2d, branch[1]).weight)

  def forward(self, maps: dict[int, Tensor]) -> dict[int, Tensor]:
    out: dict[int, Tensor] = {}
    above: Tensor | None = None
    for s in reversed(self.strides):
      x = self.lateral[str(s)](maps[s])
      above = x if above is None else x + up_to(above, x)
      if s == 8:
        above = above + self.detail(maps[4])
      if s <= 32:
        above = self.smooth[str(s)](above)
        if s == 16:
          above = F.relu(above + self.more(above))
        out[s] = above
    return out


def quarters(cin: int, cout: int) -> nn.ConvTranspose2d:
  """(B, cin, h, w) -> (B, cout, 2h, 2w): each cell's four quarters by a product of their own, as ESPCN's
  (arXiv:1609.05158). ONNX Runtime takes less than half as long over it as over a 1 x 1 convolution and DepthToSpace."""
  return nn.ConvTranspose2d(cin, cout, 2, 2)

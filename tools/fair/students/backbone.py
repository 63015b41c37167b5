"""timm backbones on the model frame: packed YUV in, feature maps by view stride out."""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpilot.tools.fair.students.layers import conv
from openpilot.tools.lib.errors import UserError

FRAME_SHAPE = (6, 128, 256)
VIEW_STRIDE = 2  # of the packed frame itself: its planes have half the view's height and width
SCALE = 64.0  # what one unit after normalization is in 8-bit steps
YUV_TO_RGB = torch.tensor(
  [[1.164384, 0.0, 1.596027], [1.164384, -0.391762, -0.812968], [1.164384, 2.017232, 0.0]], dtype=torch.float64
)
RGB_MEAN, RGB_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# name -> the deepest view stride that is used: the last stages of the larger networks alone would fill a student's
# budget
BACKBONES: dict[str, int] = {
  "mobilenetv4_conv_small_050": 64,
  "mobilenetv4_conv_small": 64,
  "mobilenetv4_conv_medium": 32,
  "efficientvit_b0": 64,
  "efficientvit_b1": 32,
  "vit_tiny_patch16_224": 32,
}
VIT_BLOCKS = 8  # of ViT-Ti's twelve: all of them would pass the depth student's budget


def yuv_offset(mean: tuple[float, ...]) -> Tensor:
  """(6,) float64: the packed YUV values of the RGB color `mean` (0..1), which normalization maps to zero, so that zero
  padding is that color."""
  yuv = torch.linalg.solve(YUV_TO_RGB, 255.0 * torch.tensor(mean, dtype=torch.float64)) + torch.tensor(
    [16.0, 128.0, 128.0], dtype=torch.float64
  )
  return yuv[[0, 0, 0, 0, 1, 2]]


def packed_stem(weight: Tensor, std: tuple[float, ...]) -> Tensor:
  """The first convolution's weight for RGB, (O, 3, k, k), as one for the normalized packed frame, (O, 6, k, k).

  Exact: the result is what the RGB network gives on the frame's picture at half the view's size, whose luma is the mean
  of the four luma planes. From there training can tell the four planes apart, which hold the view's full resolution.
  """
  per_yuv = (
    torch.einsum(
      "ocij,cy->oyij", weight.double() / (255.0 * torch.tensor(std, dtype=torch.float64).view(1, 3, 1, 1)), YUV_TO_RGB
    )
    * SCALE
  )
  return torch.cat([per_yuv[:, :1].expand(-1, 4, -1, -1) / 4, per_yuv[:, 1:]], dim=1).to(weight.dtype)


def load_timm(name: str, deepest: int, pretrained: bool) -> tuple[Any, bool]:
  """-> (timm's feature network for RGB, whether its weights are pretrained). Raises UserError without timm or on a name
  that it does not have."""
  try:
    import timm
  except Exception as e:  # a torchvision that does not fit torch makes it fail with a RuntimeError
    raise UserError(
      f"timm cannot be imported ({e}); students need it: install timm, torch and torchvision of the same release as "
      "pyproject's 'train' lists"
    ) from None
  if not timm.is_model(name):
    raise UserError(f"timm has no backbone '{name}'; tried and measured are {', '.join(BACKBONES)}")
  vit = name.startswith("vit_")

  def create(weights: bool) -> Any:
    options: dict[str, Any] = {"img_size": FRAME_SHAPE[1:], "out_indices": (VIT_BLOCKS - 1,)} if vit else {}
    try:
      net: Any = timm.create_model(name, features_only=True, pretrained=weights, **options)
      used = [i for i, r in enumerate(net.feature_info.reduction()) if r * VIEW_STRIDE <= deepest]
      if not vit and len(used) < len(net.feature_info.reduction()):
        net = timm.create_model(name, features_only=True, pretrained=weights, out_indices=tuple(used))
    except RuntimeError as e:
      if weights:
        raise
      raise UserError(
        f"backbone '{name}' gives no feature maps at the frame's size ({e}); take one of {', '.join(BACKBONES)}"
      ) from None
    return net

  if pretrained:
    try:
      return create(True), True
    except Exception as e:  # the hub's client raises many kinds; being offline is no reason to stop
      print(
        f"warning: no pretrained weights of '{name}' ({type(e).__name__}: {str(e).splitlines()[0][:120]}); it starts "
        "from random ones",
        file=sys.stderr,
      )
  return create(False), False


class Backbone(nn.Module):
  """(B, 6, 128, 256) uint8 packed frame -> {view stride: (B, C, 256 / stride, 512 / stride)} for 4, 8, 16, 32 and,
  where `deepest` says so, 64.

  Maps finer than the timm network's first come from a few convolutions of our own. channels: {view stride: C}.
  pretrained: whether weights were found. Raises UserError without timm, or on a name that timm does not have."""

  def __init__(self, name: str, pretrained: bool = False, deepest: int | None = None):
    super().__init__()
    self.name, self.deepest = name, BACKBONES.get(name, 32) if deepest is None else deepest
    self.net: Any
    self.net, self.pretrained = load_timm(name, self.deepest, pretrained)
    info: Any = self.net.feature_info
    strides = [r * VIEW_STRIDE for r in info.reduction()]
    channels = dict(zip(strides, info.channels(), strict=True))
    if hasattr(self.net, "blocks") and hasattr(
      self.net, "_stage_out_idx"
    ):  # timm leaves the unused stages of its EfficientNet family in
      self.net.blocks = self.net.blocks[: max(self.net._stage_out_idx)]
    cfg = getattr(self.net, "pretrained_cfg", None) or getattr(getattr(self.net, "model", None), "pretrained_cfg", {})
    mean, std = tuple(cfg.get("mean", RGB_MEAN)), tuple(cfg.get("std", RGB_STD))
    self.offset: Tensor
    self.register_buffer("offset", yuv_offset(mean).float(), persistent=False)
    self._replace_stem(std)
    self.finer = nn.ModuleList()
    cin, stride = FRAME_SHAPE[0], 2 * VIEW_STRIDE
    while stride < min(strides):
      cout = 24 * stride // 4
      self.finer.append(conv(cin, cout, 3, 2))
      channels[stride] = cin = cout
      stride *= 2
    self.strides = strides
    self.channels: dict[int, int] = {s: channels[s] for s in sorted(channels)}

  def _replace_stem(self, std: tuple[float, ...]) -> None:
    name, old = next((n, m) for n, m in self.net.named_modules() if isinstance(m, nn.Conv2d))
    assert old.in_channels == 3, f"the first convolution of {self.name}, {name}, is not its stem"
    size: dict[str, Any] = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding}
    new = nn.Conv2d(FRAME_SHAPE[0], old.out_channels, **size, bias=old.bias is not None)
    if self.pretrained:
      new.weight.data.copy_(packed_stem(old.weight.data, std))
      if old.bias is not None and new.bias is not None:
        new.bias.data.copy_(old.bias.data)
    parent, _, leaf = name.rpartition(".")
    setattr(self.net.get_submodule(parent), leaf, new)

  def normalize(self, frame: Tensor) -> Tensor:
    """(B, 6, 128, 256) uint8 -> float32, zero mean color, about unit variance."""
    scale = torch.full_like(self.offset, SCALE**2)  # as one operation, a batch norm: half the time of two
    return F.batch_norm(frame.float(), self.offset, scale, eps=1e-5)

  def forward(self, frame: Tensor) -> dict[int, Tensor]:
    x = self.normalize(frame)
    maps = dict(zip(self.strides, self.net(x), strict=True))
    for i, layer in enumerate(self.finer):
      x = layer(x)
      maps[4 << i] = x
    return {s: maps[s] for s in self.channels}

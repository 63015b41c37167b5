"""timm backbones on a student's picture: the packed YUV model frame or RGB in, feature maps by view stride out."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.fair.students.layers import conv
from openpilot.tools.lib.errors import UserError

# of the frame itself: the planes of a packed one have half the view's height and width
VIEW_STRIDE = {"model_frame": 2, "rgb": 1}
FINEST, COARSE = 4, 32  # view strides that there are at least
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
  "mobilenetv2_100_same": 32,
  "mobilenet_edgetpu_100_same": 32,
}


@dataclass(frozen=True)
class Variant:
  """A network of timm by other conventions, as its published weights have them. same: padded as TensorFlow does, at the
  right and below first. unit: sees RGB of 0 to 1, mean and deviation are in its stem. linear: norms without the
  activation that timm puts behind them."""

  timm: str
  same: bool = False
  unit: bool = False
  linear: tuple[str, ...] = ()


VARIANTS = {
  "mobilenetv2_100_same": Variant("mobilenetv2_100", True, True),
  "mobilenet_edgetpu_100_same": Variant("mobilenet_edgetpu_100", True, True, ("blocks.0.0.bn1",)),
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


def rgb_stem(weight: Tensor, std: tuple[float, ...]) -> Tensor:
  """The same of the normalized RGB frame, (O, 3, k, k)."""
  return weight / (255.0 * torch.tensor(std).view(1, 3, 1, 1)) * SCALE


def other_stem(weight: Tensor) -> Tensor:
  """A first convolution's weight for the normalized packed frame, (O, 6, k, k), as one for the normalized RGB frame,
  (O, 3, k, k), or the other way round.

  Exact, for pictures of half the view's size: what a packed one tells of its four luma planes apart is lost."""
  if weight.shape[1] == 3:
    per_yuv = torch.einsum("ocij,cy->oyij", weight.double(), YUV_TO_RGB)
    return torch.cat([per_yuv[:, :1].expand(-1, 4, -1, -1) / 4, per_yuv[:, 1:]], dim=1).to(weight.dtype)
  per_yuv = torch.cat([weight[:, :4].sum(1, keepdim=True), weight[:, 4:]], dim=1).double()
  return torch.einsum("oyij,yc->ocij", per_yuv, torch.linalg.inv(YUV_TO_RGB)).to(weight.dtype)


class Same(nn.Conv2d):
  """A convolution of stride 2 on even sides, padded as TensorFlow does: what is odd goes to the right and below."""

  def __init__(self, like: nn.Conv2d, cin: int | None = None):
    size: dict[str, Any] = {"kernel_size": like.kernel_size, "stride": like.stride}
    cin = cin or like.in_channels
    super().__init__(cin, like.out_channels, **size, groups=like.groups, bias=like.bias is not None)
    if cin == like.in_channels:
      self.load_state_dict(like.state_dict())

  def forward(self, x: Tensor) -> Tensor:
    h, w = ((k - s) for k, s in zip(self.kernel_size, self.stride, strict=True))
    return super().forward(F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2)))


def by_conventions(net: nn.Module, variant: Variant) -> None:
  """Makes timm's network what `variant` says, in place."""
  for name, old in list(net.named_modules()):
    if variant.same and isinstance(old, nn.Conv2d) and old.stride != (1, 1):
      parent, _, leaf = name.rpartition(".")
      setattr(net.get_submodule(parent), leaf, Same(old))
  for name in variant.linear:
    setattr(net.get_submodule(name), "act", nn.Identity())  # noqa: B010


def load_weights(net: nn.Module, path: str | Path) -> None:
  """A state dict of timm's whole network into its feature network, whose every tensor must be there. Raises
  UserError."""
  try:
    state = torch.load(path, map_location="cpu", weights_only=True)
    own = net.state_dict()
    absent = [k for k, v in own.items() if k not in state or state[k].shape != v.shape]
    if absent:
      raise ValueError(f"{len(absent)} tensors of the backbone are not in it, the first is {absent[0]}")
    net.load_state_dict({k: state[k].to(v.dtype) for k, v in own.items()})
  except Exception as e:  # torch's ways to fail at a file have no common base
    said = " ".join(str(e).split())[:160]
    raise UserError(f"--pretrained {path}: no weights for this backbone: {said}; --backbone says which it is") from None


def load_timm(name: str, deepest: int, pretrained: bool | str, picture: InputSpec) -> tuple[Any, bool, list[int]]:
  """-> (timm's feature network for RGB, whether its weights are pretrained, view strides of its maps). pretrained: the
  hub's weights, or a file of them. Raises UserError without timm or on a name that it does not have."""
  try:
    import timm
  except Exception as e:  # a torchvision that does not fit torch makes it fail with a RuntimeError
    raise UserError(
      f"timm cannot be imported ({e}); students need it: install timm, torch and torchvision of the same release as "
      "pyproject's 'train' lists"
    ) from None
  variant = VARIANTS.get(name, Variant(name))
  own, name = name, variant.timm
  if not timm.is_model(name):
    raise UserError(f"timm has no backbone '{name}'; tried and measured are {', '.join(BACKBONES)}")
  vit = name.startswith("vit_")
  stride = VIEW_STRIDE[picture.kind]

  def create(weights: bool) -> Any:
    options: dict[str, Any] = {"img_size": picture.shape[1:], "out_indices": (VIT_BLOCKS - 1,)} if vit else {}
    try:
      net: Any = timm.create_model(name, features_only=True, pretrained=weights, **options)
      used = [i for i, r in enumerate(net.feature_info.reduction()) if FINEST <= r * stride <= deepest]
      if not vit and len(used) < len(net.feature_info.reduction()):
        net = timm.create_model(name, features_only=True, pretrained=weights, out_indices=tuple(used))
      by_conventions(net, variant)
    except RuntimeError as e:
      if weights:
        raise
      raise UserError(
        f"backbone '{name}' gives no feature maps at the frame's size ({e}); take one of {', '.join(BACKBONES)}"
      ) from None
    return net

  if isinstance(pretrained, str):
    net = create(False)
    load_weights(net, pretrained)
    return net, True, [r * stride for r in net.feature_info.reduction()]
  if pretrained and own != name:
    raise UserError(f"the hub's weights of {name} are by other conventions than {own}; give a file: --pretrained FILE")
  if pretrained:
    try:
      net = create(True)
      return net, True, [r * stride for r in net.feature_info.reduction()]
    except Exception as e:  # the hub's client raises many kinds; being offline is no reason to stop
      print(
        f"warning: no pretrained weights of '{name}' ({type(e).__name__}: {str(e).splitlines()[0][:120]}); it starts "
        "from random ones",
        file=sys.stderr,
      )
  net = create(False)
  return net, False, [r * stride for r in net.feature_info.reduction()]


class Backbone(nn.Module):
  """(B, *picture.shape) uint8 frame -> {view stride: (B, C, height / stride, width / stride)} for 4, 8, 16, 32 and,
  where `deepest` says so, 64. picture: by default the (6, 128, 256) packed model frame.

  Maps finer than the timm network's first, or coarser than its last, come from a few convolutions of our own. channels:
  {view stride: C}. pretrained: the hub's weights, or a file of them; then whether they were found. Raises UserError
  without timm, or on a name that timm does not have."""

  def __init__(
    self, name: str, pretrained: bool | str = False, deepest: int | None = None, picture: InputSpec | None = None
  ):
    super().__init__()
    self.picture = picture or InputSpec()
    self.name, self.deepest = name, BACKBONES.get(name, 32) if deepest is None else deepest
    self.net: Any
    self.net, self.pretrained, strides = load_timm(name, self.deepest, pretrained, self.picture)
    info: Any = self.net.feature_info
    channels = dict(zip(strides, info.channels(), strict=True))
    if hasattr(self.net, "blocks") and hasattr(
      self.net, "_stage_out_idx"
    ):  # timm leaves the unused stages of its EfficientNet family in
      self.net.blocks = self.net.blocks[: max(self.net._stage_out_idx)]
    cfg = getattr(self.net, "pretrained_cfg", None) or getattr(getattr(self.net, "model", None), "pretrained_cfg", {})
    mean, std = tuple(cfg.get("mean", RGB_MEAN)), tuple(cfg.get("std", RGB_STD))
    if name in VARIANTS and VARIANTS[name].unit:
      mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    self.offset: Tensor
    packed = self.picture.kind == "model_frame"
    offset = yuv_offset(mean) if packed else 255.0 * torch.tensor(mean, dtype=torch.float64)
    self.register_buffer("offset", offset.float(), persistent=False)
    self._replace_stem(std)
    self.finer = nn.ModuleList()
    self.finer_strides: list[int] = []
    cin, stride = self.picture.shape[0], 2 * VIEW_STRIDE[self.picture.kind]
    while stride < min(strides):
      cout = 24 * stride // 4
      self.finer.append(conv(cin, cout, 3, 2))
      self.finer_strides.append(stride)
      channels[stride] = cin = cout
      stride *= 2
    self.coarser = nn.ModuleList()  # of a ViT on RGB
    while (stride := max(channels)) < COARSE:
      self.coarser.append(conv(channels[stride], channels[stride], 3, 2))
      channels[2 * stride] = channels[stride]
    self.strides = strides
    self.channels: dict[int, int] = {s: channels[s] for s in sorted(channels) if s >= FINEST}

  def _replace_stem(self, std: tuple[float, ...]) -> None:
    name, old = next((n, m) for n, m in self.net.named_modules() if isinstance(m, nn.Conv2d))
    assert old.in_channels == 3, f"the first convolution of {self.name}, {name}, is not its stem"
    size: dict[str, Any] = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding}
    new = (
      Same(old, self.picture.shape[0])
      if isinstance(old, Same)
      else nn.Conv2d(self.picture.shape[0], old.out_channels, **size, bias=old.bias is not None)
    )
    if self.pretrained:
      stem = packed_stem if self.picture.kind == "model_frame" else rgb_stem
      new.weight.data.copy_(stem(old.weight.data, std))
      if old.bias is not None and new.bias is not None:
        new.bias.data.copy_(old.bias.data)
    parent, _, leaf = name.rpartition(".")
    setattr(self.net.get_submodule(parent), leaf, new)

  def normalize(self, frame: Tensor) -> Tensor:
    """(B, *picture.shape) uint8 -> float32, zero mean color, about unit variance."""
    scale = torch.full_like(self.offset, SCALE**2)  # as one operation, a batch norm: half the time of two
    return F.batch_norm(frame.float(), self.offset, scale, eps=1e-5)

  def forward(self, frame: Tensor) -> dict[int, Tensor]:
    x = self.normalize(frame)
    maps = dict(zip(self.strides, self.net(x), strict=True))
    for stride, layer in zip(self.finer_strides, self.finer, strict=True):
      maps[stride] = x = layer(x)
    for layer in self.coarser:
      stride = max(maps)
      maps[2 * stride] = layer(maps[stride])
    return {s: maps[s] for s in self.channels}

"""RAFT, the small model (Teed and Deng, 2020): dense optical flow by looking up all-pairs correlations around a flow
that a recurrent unit refines.

Parameter names are those of the published checkpoint. What differs from the published code is how, not what: features
of a frame are made once for both directions and both of its pairs, and the part of the recurrent unit's convolutions
that sees only the context is made once a pair."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import ordinary

HIDDEN, CONTEXT, FEATURES = 96, 64, 128
LEVELS, RADIUS = 4, 3
WINDOW = 2 * RADIUS + 1
STRIDE = 8
MIN_SIDE = STRIDE * 2 ** (LEVELS - 1)  # the coarsest correlations are still a pixel wide


def norm(channels: int, instance: bool) -> nn.Module:
  return nn.InstanceNorm2d(channels) if instance else nn.Identity()


class Bottleneck(nn.Module):
  def __init__(self, c_in: int, c_out: int, stride: int, instance: bool):
    super().__init__()
    mid = c_out // 4
    self.conv1, self.norm1 = nn.Conv2d(c_in, mid, 1), norm(mid, instance)
    self.conv2, self.norm2 = nn.Conv2d(mid, mid, 3, stride=stride, padding=1), norm(mid, instance)
    self.conv3, self.norm3 = nn.Conv2d(mid, c_out, 1), norm(c_out, instance)
    self.downsample = (
      nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride=stride), norm(c_out, instance)) if stride > 1 else nn.Identity()
    )

  def forward(self, x: Tensor) -> Tensor:
    y = F.relu(self.norm1(self.conv1(x)))
    y = F.relu(self.norm2(self.conv2(y)))
    y = F.relu(self.norm3(self.conv3(y)))
    return F.relu(self.downsample(x) + y)


class Encoder(nn.Module):
  """(B, 3, H, W) -> (B, c_out, H/8, W/8)"""

  def __init__(self, c_out: int, instance: bool):
    super().__init__()
    self.conv1, self.norm1 = nn.Conv2d(3, 32, 7, stride=2, padding=3), norm(32, instance)
    self.layer1 = nn.Sequential(Bottleneck(32, 32, 1, instance), Bottleneck(32, 32, 1, instance))
    self.layer2 = nn.Sequential(Bottleneck(32, 64, 2, instance), Bottleneck(64, 64, 1, instance))
    self.layer3 = nn.Sequential(Bottleneck(64, 96, 2, instance), Bottleneck(96, 96, 1, instance))
    self.conv2 = nn.Conv2d(96, c_out, 1)

  def forward(self, x: Tensor) -> Tensor:
    x = F.relu(self.norm1(self.conv1(x)))
    return self.conv2(self.layer3(self.layer2(self.layer1(x))))


class MotionEncoder(nn.Module):
  def __init__(self) -> None:
    super().__init__()
    self.convc1 = nn.Conv2d(LEVELS * WINDOW**2, 96, 1)
    self.convf1, self.convf2 = nn.Conv2d(2, 64, 7, padding=3), nn.Conv2d(64, 32, 3, padding=1)
    self.conv = nn.Conv2d(128, 80, 3, padding=1)

  def forward(self, flow: Tensor, corr: Tensor) -> Tensor:
    cor = F.relu(self.convc1(corr))
    flo = F.relu(self.convf2(F.relu(self.convf1(flow))))
    return torch.cat([F.relu(self.conv(torch.cat([cor, flo], 1))), flow.to(cor.dtype)], 1)  # (B, 82, h, w)


class ConvGRU(nn.Module):
  """Its input is [context, motion]; the context's share of the three convolutions does not change from step to step."""

  def __init__(self) -> None:
    super().__init__()
    c = HIDDEN + CONTEXT + 82
    self.convz, self.convr, self.convq = (nn.Conv2d(c, HIDDEN, 3, padding=1) for _ in range(3))

  def of_context(self, context: Tensor) -> Tensor:
    """(B, 64, h, w) -> (B, 3 * 96, h, w), biases included"""
    convs = (self.convz, self.convr, self.convq)
    weight, bias = (
      torch.cat([c.weight[:, HIDDEN : HIDDEN + CONTEXT] for c in convs]),
      torch.cat([c.bias for c in convs if c.bias is not None]),
    )
    return F.conv2d(context, weight, bias, padding=1)

  def step_weights(self) -> tuple[Tensor, Tensor]:
    """Weights for [hidden, motion]: of z and r together, and of q."""
    z, r, q = (
      torch.cat([c.weight[:, :HIDDEN], c.weight[:, HIDDEN + CONTEXT :]], 1)
      for c in (self.convz, self.convr, self.convq)
    )
    return torch.cat([z, r]), q

  def forward(self, h: Tensor, motion: Tensor, of_context: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    zr, q_weight = weights
    cz, cr, cq = of_context.split(HIDDEN, 1)
    z, r = F.conv2d(torch.cat([h, motion], 1), zr, padding=1).split(HIDDEN, 1)
    z, r = torch.sigmoid(z + cz), torch.sigmoid(r + cr)
    q = torch.tanh(F.conv2d(torch.cat([r * h, motion], 1), q_weight, padding=1) + cq)
    return (1 - z) * h + z * q


class FlowHead(nn.Module):
  def __init__(self) -> None:
    super().__init__()
    self.conv1, self.conv2 = nn.Conv2d(HIDDEN, 128, 3, padding=1), nn.Conv2d(128, 2, 3, padding=1)

  def forward(self, x: Tensor) -> Tensor:
    return self.conv2(F.relu(self.conv1(x)))


class UpdateBlock(nn.Module):
  def __init__(self) -> None:
    super().__init__()
    self.encoder, self.gru, self.flow_head = MotionEncoder(), ConvGRU(), FlowHead()


def pixel_grid(h: int, w: int, device: torch.device) -> Tensor:
  """-> (1, 2, h, w) float32, the x and the y of each pixel"""
  y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
  return torch.stack([x, y]).float()[None]


def correlation_pyramid(f1: Tensor, f2: Tensor) -> list[Tensor]:
  """(B, C, h, w) twice -> for each level i (B*h*w, 1, h/2^i, w/2^i): every pixel of f1 against all of f2."""
  b, c, h, w = f1.shape
  corr = (f1.flatten(2).transpose(1, 2) @ f2.flatten(2) / c**0.5).reshape(b * h * w, 1, h, w)
  pyramid = [corr]
  for _ in range(LEVELS - 1):
    pyramid.append(F.avg_pool2d(pyramid[-1], 2, stride=2))
  return pyramid


def lookup(pyramid: list[Tensor], coords: Tensor) -> Tensor:
  """coords (B, 2, h, w): where in f2, in pixels of level 0, each pixel of f1 looks -> (B, 4 * 49, h, w): 7x7 bilinear
  samples around it at each level, zero outside. Within a level the x offset is the slower index: so the checkpoint was
  trained."""
  b, _, h, w = coords.shape
  d = torch.arange(-RADIUS, RADIUS + 1, device=coords.device, dtype=coords.dtype)
  delta = torch.stack(torch.meshgrid(d, d, indexing="ij"), -1)  # (7, 7, 2): [i, j] -> (x, y) = (d[i], d[j])
  center = coords.permute(0, 2, 3, 1).reshape(b * h * w, 1, 1, 2)
  out = []
  for i, corr in enumerate(pyramid):
    size = torch.tensor([corr.shape[-1], corr.shape[-2]], device=coords.device, dtype=coords.dtype)
    grid = (2 * (center / 2**i + delta) + 1) / size - 1
    out.append(F.grid_sample(corr, grid, align_corners=False).reshape(b, h, w, WINDOW**2))
  return torch.cat(out, -1).permute(0, 3, 1, 2).contiguous()


@dataclass
class Encoded:
  """What flow needs of one frame, or of a batch of them."""

  size: tuple[int, int]  # before padding
  features: Tensor  # (B, 128, h, w) float32
  hidden: Tensor  # (B, 96, h, w)
  context: Tensor  # (B, 64, h, w)


class RaftSmall(nn.Module):
  def __init__(self) -> None:
    super().__init__()
    self.fnet, self.cnet = Encoder(FEATURES, instance=True), Encoder(HIDDEN + CONTEXT, instance=False)
    self.update_block = UpdateBlock()
    self.amp: torch.dtype | None = None  # dtype of the networks; flow and correlations stay float32

  def autocast(self, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=self.amp or torch.bfloat16, enabled=self.amp is not None)

  def encode(self, images: Tensor) -> Encoded:
    """images (B, 3, H, W) RGB 0..255, uint8 or float. Sides are padded by the border's pixels to multiples of 8."""
    height, width = images.shape[-2:]
    left, right, top, bottom = padding(height, width)
    x = F.pad(images.float() * (2 / 255) - 1, (left, right, top, bottom), mode="replicate")
    with self.autocast(x.device):
      features, (hidden, context) = self.fnet(x), self.cnet(x).split([HIDDEN, CONTEXT], 1)
    return Encoded((height, width), features.float(), torch.tanh(hidden), F.relu(context))

  def refine(self, a: Encoded, pyramid: list[Tensor], iters: int) -> Tensor:
    """-> (B, 2, H, W) float32 flow from `a` to the frame whose correlations with it are in `pyramid`, in pixels."""
    block: UpdateBlock = self.update_block
    _, _, h, w = a.hidden.shape
    base = pixel_grid(h, w, a.hidden.device)
    flow = torch.zeros_like(base).expand(a.hidden.shape[0], -1, -1, -1)
    hidden = a.hidden
    with self.autocast(hidden.device):
      of_context, weights = block.gru.of_context(a.context), block.gru.step_weights()
      for _ in range(iters):
        motion = block.encoder(flow, lookup(pyramid, base + flow))
        hidden = block.gru(hidden, motion, of_context, weights)
        flow = flow + block.flow_head(hidden).float()
    up = STRIDE * F.interpolate(flow, scale_factor=STRIDE, mode="bilinear", align_corners=True)
    left, _, top, _ = padding(*a.size)
    return up[:, :, top : top + a.size[0], left : left + a.size[1]]

  def flow(self, a: Tensor, b: Tensor, iters: int = 12) -> Tensor:
    """a, b (B, 3, H, W) RGB 0..255, uint8 or float -> (B, 2, H, W) float32: what is at p in a is at p + flow(p) in b;
    pixels, (x, y)."""
    ea, eb = self.encode(a), self.encode(b)
    return self.refine(ea, correlation_pyramid(ea.features, eb.features), iters)

  def flow_both(self, a: Encoded, b: Encoded, iters: int = 12) -> tuple[Tensor, Tensor]:
    """Of single frames -> flow a to b and flow b to a, (2, H, W) float32 each."""
    fa, fb = torch.cat([a.features, b.features]), torch.cat([b.features, a.features])
    both = Encoded(a.size, fa, torch.cat([a.hidden, b.hidden]), torch.cat([a.context, b.context]))
    flows = self.refine(both, correlation_pyramid(fa, fb), iters)
    return flows[0], flows[1]


def padding(height: int, width: int) -> tuple[int, int, int, int]:
  """-> left, right, top, bottom: to the next multiple of 8, at least 64, as much on either side"""
  pad_h, pad_w = (max(MIN_SIDE, -(-n // STRIDE) * STRIDE) - n for n in (height, width))
  return pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2


def load_raft(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> RaftSmall:
  """The published small checkpoint -> RaftSmall, frozen. dtype: of the networks' arithmetic. Raises UserError on any
  other file."""
  try:
    state = torch.load(ordinary(path), map_location="cpu", weights_only=True)
    state = {k.removeprefix("module."): v for k, v in state.items()}
    model = RaftSmall()
    model.load_state_dict(state)
  except OSError as e:
    raise UserError(f"{path}: cannot be read ({e.strerror}); give the RAFT small checkpoint's file") from None
  except Exception as e:  # torch.load raises whatever the bytes provoke
    raise UserError(
      f"{path}: not a RAFT small checkpoint ({str(e).splitlines()[0][:120]}); give raft-small.pth of the RAFT project"
    ) from None
  model.amp = None if dtype == torch.float32 else dtype
  return model.eval().requires_grad_(False).to(device)

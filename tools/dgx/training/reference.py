"""A small driving network of openpilot's exact inputs and outputs, for those who have no weights and for tests. It
knows nothing until it is trained."""

import warnings
from itertools import pairwise
from pathlib import Path

import onnx
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from openpilot.tools.dgx.training.constants import (
  ACTION_T_LEN,
  DESIRE_HISTORY,
  DESIRE_LEN,
  FEATURE_LEN,
  FRAME_SHAPE,
  HISTORY,
  IDX_N,
  INPUTS,
  LEAD_HYPOTHESES,
  LEAD_STEPS,
  OUTPUT_NAME,
  OUTPUT_SIZES,
  PLAN_WIDTH,
  T_IDXS,
  TRAFFIC_CONVENTION_LEN,
  X_IDXS,
  output_slices,
)
from openpilot.tools.dgx.training.outputs import SLICES_KEY, encode_slices
from openpilot.tools.lib.files import atomic_path

WIDTHS = (24, 48, 96, 160, 256)  # channels after each halving: 64x128 to 4x8
OPSET = 14
POLICY = (
  "plan",
  "desire_state",
  "action",
)  # what depends on the past and on what is wanted; the rest the image alone decides
SPEED = 12.0  # m/s, of the drive that an untrained network expects: straight on
SPEED_INPUT = "lateral_control_params"  # (1, 2): m/s, and s of lateral delay; openpilot's policies took it until 2025


def prior() -> tuple[Tensor, Tensor]:
  """-> offset and scale of the vector, (OUTPUT_SIZE,) each: heads put out numbers near 1, which become meters, m/s,
  radians about a straight road."""
  t, x = torch.tensor(T_IDXS)[:, None], torch.tensor(X_IDXS)[None, :, None]
  one = torch.ones_like(t)
  scale = {
    "plan": torch.cat(
      [1 + 8 * t, 0.5 + 2 * t, 0.2 + 0.3 * t, 8 * one, 2 * one, 0.5 * one, 2 * one, 2 * one, one, *[0.1 * one] * 6], 1
    )
  }
  offset = {"plan": torch.cat([SPEED * t, 0 * t, 0 * t, SPEED * one, *[0 * t] * 11], 1)}
  for name, sides in (
    ("lane_lines", (-5.4, -1.8, 1.8, 5.4)),
    ("road_edges", (-7.0, 7.0)),
  ):  # y, z of the road under the camera
    y = torch.tensor(sides)[:, None, None].expand(-1, IDX_N, 1)
    offset[name] = torch.cat([y, torch.full_like(y, 1.22)], 2)
    scale[name] = torch.cat([0.5 + x / 20, 0.2 + x / 100], 2).expand(len(sides), -1, -1)
  offset["lead"] = torch.tensor([40.0, 0, 10, 0]).repeat(LEAD_STEPS)
  scale["lead"] = torch.tensor([30.0, 2, 8, 1]).repeat(LEAD_STEPS)
  offsets, scales = [], []
  for name, size in OUTPUT_SIZES.items():
    if name not in scale:
      offsets.append(torch.zeros(size))
      scales.append(torch.ones(size))
      continue
    s, o = scale[name].flatten(), offset[name].flatten()
    mean_and_log = torch.cat([o, s.log()]), torch.cat([s, torch.ones_like(s)])
    copies = LEAD_HYPOTHESES if name == "lead" else 1
    rest = torch.zeros((size - copies * 2 * len(s)) // copies)
    offsets += [mean_and_log[0], rest] * copies
    scales += [mean_and_log[1], rest + 1] * copies
  return torch.cat(offsets), torch.cat(scales)


def speed_prior(offset: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
  """prior() for a network that is told its speed -> offset, scale, and what of both each m/s adds: straight on at that
  speed, from which it strays by what brakes, wheels and seconds allow; sideways in proportion to the speed, so that it
  is the road's turn that heads put out."""
  t = torch.tensor(T_IDXS)
  start = output_slices()["plan"].start
  x, y, vx, vy, ay = (slice(start + k, start + IDX_N * PLAN_WIDTH, PLAN_WIDTH) for k in (0, 1, 3, 4, 7))
  offset, scale, per_offset, per_scale = (
    offset.clone(),
    scale.clone(),
    torch.zeros_like(offset),
    torch.zeros_like(scale),
  )
  for part, rate, stray in ((x, t, 0.05 + 0.2 * t + 0.5 * t**2), (vx, torch.ones_like(t), 0.3 + t)):
    offset[part], per_offset[part], scale[part] = 0.0, rate, stray
  for part in (y, vy, ay):
    per_scale[part], scale[part] = scale[part] / SPEED, 0.05 * scale[part]
  return offset, scale, per_offset, per_scale


class Block(nn.Module):
  """Halves the image: a strided convolution and a residual one, ELU as openpilot's network has it."""

  def __init__(self, a: int, b: int):
    super().__init__()
    self.down = nn.Conv2d(a, b, 3, 2, 1)
    self.mix = nn.Conv2d(b, b, 3, 1, 1, groups=b // 8)
    self.out = nn.Conv2d(b, b, 1)

  def forward(self, x: Tensor) -> Tensor:
    x = F.elu(self.down(x))
    return F.elu(x + self.out(F.elu(self.mix(x))))


class Vision(nn.Module):
  """img, big_img, and a vector that is added before the features are squashed -> features (B, 512)."""

  def __init__(self) -> None:
    super().__init__()
    widths = (4 * FRAME_SHAPE[0], *WIDTHS)
    self.blocks = nn.Sequential(*(Block(a, b) for a, b in pairwise(widths)))
    self.squeeze = nn.Conv2d(WIDTHS[-1], 48, 1)
    self.features = nn.Linear(48 * 4 * 8, FEATURE_LEN)

  def forward(self, img: Tensor, big_img: Tensor, more: Tensor | None = None) -> Tensor:
    x = torch.cat([img, big_img], 1).to(self.features.weight.dtype) * (1 / 64) - 2.0
    features = self.features(F.elu(self.squeeze(self.blocks(x))).flatten(1))
    return torch.tanh(features if more is None else features + more)


class Temporal(nn.Module):
  """Attention of the present over `past` features. -> summary (B, 512)."""

  def __init__(self, past: int = HISTORY, heads: int = 8):
    super().__init__()
    self.heads = heads
    self.positions = nn.Parameter(torch.randn(1, past + 1, FEATURE_LEN) * 0.02)
    self.query, self.key, self.value, self.project = (nn.Linear(FEATURE_LEN, FEATURE_LEN) for _ in range(4))

  def forward(self, present: Tensor, past: Tensor) -> Tensor:
    x = torch.cat([past, present[:, None]], 1) + self.positions

    def split(y: Tensor) -> Tensor:
      return y.reshape(y.shape[0], -1, self.heads, FEATURE_LEN // self.heads).transpose(1, 2)

    q, k, v = split(self.query(x[:, -1:])), split(self.key(x)), split(self.value(x))
    weights = torch.softmax(q @ k.transpose(2, 3) * (FEATURE_LEN // self.heads) ** -0.5, -1)
    return present + self.project((weights @ v).transpose(1, 2).reshape(present.shape[0], FEATURE_LEN))


class Head(nn.Module):
  def __init__(self, inside: int, size: int, width: int):
    super().__init__()
    self.hidden, self.out = nn.Linear(inside, width), nn.Linear(width, size)

  def forward(self, x: Tensor) -> Tensor:
    return self.out(F.elu(self.hidden(x)))


class ReferenceDriving(nn.Module):
  """Inputs as constants.INPUTS (any batch, images uint8 or float of 0-255) -> (B, OUTPUT_SIZE): the raw vector that
  outputs.parse_outputs reads.

  speed: it takes SPEED_INPUT too, remembers it among its features, and starts from driving straight on at that
  speed."""

  def __init__(self, seed: int = 0, speed: bool = False):
    with torch.random.fork_rng(devices=[]):
      torch.manual_seed(seed)
      super().__init__()
      self.vision, self.temporal = Vision(), Temporal()
      self.wanted = nn.Linear(DESIRE_HISTORY * DESIRE_LEN + TRAFFIC_CONVENTION_LEN + ACTION_T_LEN, 128)
      wide = {"plan": 512, "lane_lines": 256, "road_edges": 256, "lead": 128}
      inside = {name: FEATURE_LEN + (128 if name in POLICY else 0) for name in OUTPUT_SIZES}
      self.heads = nn.ModuleDict(
        {n: Head(inside[n], size, wide.get(n, 64)) for n, size in OUTPUT_SIZES.items() if n != "hidden_state"}
      )
      self.speed = nn.Linear(2, FEATURE_LEN) if speed else None
      offset, scale, *per_speed = speed_prior(*prior()) if speed else prior()
      self.offset, self.scale = nn.Buffer(offset), nn.Buffer(scale)
      if per_speed:
        self.per_offset, self.per_scale = (nn.Buffer(x) for x in per_speed)

  def forward(
    self,
    img: Tensor,
    big_img: Tensor,
    desire_pulse: Tensor,
    traffic_convention: Tensor,
    action_t: Tensor,
    features_buffer: Tensor,
    lateral_control_params: Tensor | None = None,
  ) -> Tensor:
    told = None if self.speed is None or lateral_control_params is None else self.speed(lateral_control_params / SPEED)
    features = self.vision(img, big_img, told)
    wanted = F.elu(self.wanted(torch.cat([desire_pulse.flatten(1), traffic_convention, action_t], 1)))
    summary = torch.cat([self.temporal(features, features_buffer), wanted], 1)
    raw = torch.cat(
      [features if n == "hidden_state" else self.heads[n](summary if n in POLICY else features) for n in OUTPUT_SIZES],
      1,
    )
    if told is None or lateral_control_params is None:
      return raw * self.scale + self.offset
    v = lateral_control_params[:, :1]
    return raw * (self.scale + v * self.per_scale) + (self.offset + v * self.per_offset)


def sample_inputs(batch: int = 1, seed: int = 0, speed: bool = False) -> dict[str, Tensor]:
  """Inputs of the right shapes and ranges: noise images, a desire, right-hand traffic, small features, and where asked
  for 12 m/s."""
  g = torch.Generator().manual_seed(seed)
  out = {}
  for name, (shape, dtype) in INPUTS.items():
    full = (batch, *shape[1:])
    out[name] = (
      torch.randint(0, 256, full, generator=g, dtype=torch.uint8)
      if dtype == "uint8"
      else torch.randn(full, generator=g) * 0.3
    )
  out["desire_pulse"] = (out["desire_pulse"] > 0.8).float()
  out["traffic_convention"] = torch.tensor([[1.0, 0.0]]).repeat(batch, 1)
  out["action_t"] = torch.full((batch, ACTION_T_LEN), 0.2)
  if speed:
    out[SPEED_INPUT] = torch.tensor([[SPEED, 0.2]]).repeat(batch, 1)
  return out


def save_reference(path: str | Path, model: nn.Module | None = None, seed: int = 0, speed: bool = False) -> Path:
  """Writes a ReferenceDriving (a fresh one of `seed` if none is given), or another network of its inputs and outputs,
  as openpilot writes its model: ONNX with batch 1 and output_slices metadata."""
  path = Path(path)
  model = (model if model is not None else ReferenceDriving(seed, speed)).eval()
  device = next(model.parameters()).device
  inputs = sample_inputs(speed=getattr(model, "speed", None) is not None)
  args = tuple(v.to(device) for v in inputs.values())
  with atomic_path(path) as tmp:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of torch's: the old exporter is the one that writes opset 14
      torch.onnx.export(
        model, args, str(tmp), input_names=list(inputs), output_names=[OUTPUT_NAME], opset_version=OPSET, dynamo=False
      )
    graph = onnx.load(str(tmp))
    for key, value in ((SLICES_KEY, encode_slices(output_slices())), ("model_checkpoint", "reference")):
      graph.metadata_props.add(key=key, value=value)
    onnx.save(graph, str(tmp))
  return path

"""The reference driving network that starts from constant curvature: the turn rate that it sees itself, and the speeds
that it is told and remembers.

Nothing but the turn rate has to be learned before its plan is as good as the constant-curvature path; heads learn what
the road ahead changes of that. Inputs, outputs and memory are openpilot's, as in reference.py; four of the 512 features
carry what was told and seen a moment ago."""

from itertools import pairwise

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
  IDX_N,
  OUTPUT_SIZES,
  PLAN_WIDTH,
  T_IDXS,
  TRAFFIC_CONVENTION_LEN,
  output_slices,
)
from openpilot.tools.dgx.training.reference import POLICY, SPEED, Block, Head, Temporal, prior, speed_prior

WIDTHS = (48, 64, 96, 128)  # of its view of the road, after a quarter and each halving: 32x64 to 4x8
REACH = 5  # past features that it looks back on: a second
TOLD = 4  # features of its memory that say: 1, there was such a moment; speed / 20; turn rate * 2; acceleration / 4
SETTLING = 2.0  # s: the acceleration of the moment fades so fast
SHIFTS = 12  # cells of 4 pixels, either way, that something may have moved between two frames
# Of the map of (64, 128) cells: rows and columns about the horizon that every camera fills, of the narrow and of the
# wide view
WINDOWS = {"img": (slice(0, 24), slice(0, 128)), "big_img": (slice(20, 52), slice(20, 108))}
FOCAL = {"img": 910.0, "big_img": 455.0}  # pixels
HEADING = 1.5  # rad, half of the turn beyond which a path is not followed


def correlate(a: Tensor, b: Tensor, reach: int) -> Tensor:
  """(B, C, H, W) each -> (B, 2 reach + 1, H, W): at (y, x), the product of a there with b at (y, x - reach), ... (y, x
  + reach); 0 beyond the edges."""
  n, _, h, w = a.shape
  wide = w + 2 * reach
  rows = a.permute(0, 2, 3, 1) @ F.pad(b, (reach, reach)).permute(
    0, 2, 1, 3
  )  # (B, H, W, W + 2 reach): each cell with all of its row
  flat = F.pad(rows.reshape(n, h, w * wide), (0, w))  # one longer rows: what was a diagonal is a column now
  return flat.reshape(n, h, w, wide + 1)[..., : 2 * reach + 1].permute(0, 3, 1, 2)


def local(y: Tensor) -> Tensor:
  """(B, C, H, W) brightness -> the same about its surroundings' mean, in units of their contrast: by night as by
  day."""
  d = y - F.avg_pool2d(y, (5, 9), 1, (2, 4))
  contrast = F.avg_pool2d((d * d).mean(1, keepdim=True), (5, 9), 1, (2, 4))
  return d / torch.sqrt(contrast + 9.0)


class Shift(nn.Module):
  """One view's pair of frames -> the turn rate (B, 1) rad/s that best explains how what is near the horizon moved
  sideways, and what else is seen (B, size)."""

  def __init__(self, view: str, size: int):
    super().__init__()
    self.rows, self.columns = WINDOWS[view]
    h, w = self.rows.stop - self.rows.start, self.columns.stop - self.columns.start
    self.look = nn.Conv2d(4, 16, 3, 2, 1, bias=False)
    self.gate = nn.Conv2d(2 * SHIFTS + 1, 1, 1)  # which cells to believe
    self.read = nn.Conv2d(2 * SHIFTS + 1, 24, 1)
    self.join = nn.Conv2d(24, 24, 3, 2, 1)
    self.pool = nn.AvgPool2d(4)
    self.out = nn.Linear(24 * (h // 8) * (w // 8), size)
    with torch.no_grad():  # all alike at first
      for p in self.gate.parameters():
        p.zero_()
    self.sure = nn.Parameter(torch.tensor(6.0))
    shifts = torch.arange(-SHIFTS, SHIFTS + 1.0)
    self.rates = nn.Buffer(
      shifts / (FOCAL[view] / 4 * 0.2)
    )  # a cell is 4 pixels of the view, the frames are 0.2 s apart
    self.share = nn.Buffer((w - shifts.abs()) / w)  # of the cells that have a partner

  def seen(self, frame: Tensor) -> Tensor:
    r, c = self.rows, self.columns
    y = self.look(local(frame[:, :4, 2 * r.start : 2 * r.stop, 2 * c.start : 2 * c.stop]))
    return y / torch.sqrt((y * y).sum(1, keepdim=True) + 1e-3)

  def forward(self, pair: Tensor) -> tuple[Tensor, Tensor]:
    alike = correlate(self.seen(pair[:, FRAME_SHAPE[0] :]), self.seen(pair[:, : FRAME_SHAPE[0]]), SHIFTS)
    gate = torch.sigmoid(self.gate(4 * alike))
    profile = (alike * gate).mean((2, 3)) / self.share
    profile = profile - profile.mean(1, keepdim=True)
    profile = profile / torch.sqrt((profile * profile).mean(1, keepdim=True) + 1e-8)
    rate = (torch.softmax(self.sure * profile, 1) * self.rates).sum(1, keepdim=True)
    return rate, F.elu(self.out(self.pool(F.elu(self.join(F.elu(self.read(4 * alike))))).flatten(1)))


class Road(nn.Module):
  """Both pairs and a vector that is added before the features are squashed -> features (B, size)."""

  def __init__(self, size: int):
    super().__init__()
    self.stem = nn.Conv2d(4 * FRAME_SHAPE[0], WIDTHS[0], 4, 4)
    self.blocks = nn.Sequential(*(Block(a, b) for a, b in pairwise(WIDTHS)))
    self.squeeze = nn.Conv2d(WIDTHS[-1], 48, 1)
    self.features = nn.Linear(48 * 4 * 8, size)

  def forward(self, narrow: Tensor, wide: Tensor, more: Tensor) -> Tensor:
    x = self.blocks(F.elu(self.stem(torch.cat([narrow, wide], 1) * (1 / 64) - 2.0)))
    return torch.tanh(self.features(F.elu(self.squeeze(x)).flatten(1)) + more)


def bow(half: Tensor) -> Tensor:
  """sin(half) / half, of angles up to HEADING."""
  q = half * half
  return 1 - q / 6 * (1 - q / 20 * (1 - q / 42 * (1 - q / 72)))


def arc(speed: Tensor, turn: Tensor, acceleration: Tensor, t: Tensor) -> Tensor:
  """(B, 1) m/s, rad/s, m/s^2 of the moment; t (33,) s -> (B, 33, 15) a plan: the curvature stays, the acceleration
  fades and never makes the car back up."""
  fade = torch.exp(-t / SETTLING)
  a = torch.maximum(acceleration, -speed / SETTLING)
  v = speed + a * SETTLING * (1 - fade)
  s = speed * t + a * SETTLING * (t - SETTLING * (1 - fade))
  curvature = turn / torch.clamp(speed, min=1.0)
  half = torch.clamp(curvature * s / 2, -HEADING, HEADING)
  sin, cos, chord = torch.sin(2 * half), torch.cos(2 * half), s * bow(half)
  rate, none = curvature * v, torch.zeros_like(s)
  return torch.stack(
    [
      chord * torch.cos(half),
      chord * torch.sin(half),
      none,
      v * cos,
      v * sin,
      none,
      a * fade * cos - v * rate * sin,
      a * fade * sin + v * rate * cos,
      none,
      none,
      none,
      2 * half,
      none,
      none,
      rate,
    ],
    2,
  )


class TurnDriving(nn.Module):
  """Inputs as reference.ReferenceDriving's with speed=True -> (B, OUTPUT_SIZE)."""

  def __init__(self, seed: int = 0):
    with torch.random.fork_rng(devices=[]):
      torch.manual_seed(seed)
      super().__init__()
      self.road, self.temporal = Road(FEATURE_LEN - TOLD), Temporal(REACH)
      self.narrow, self.wide = Shift("img", 64), Shift("big_img", 64)
      self.turn = Head(128 + 3, 2, 64)
      self.trend = nn.Linear(REACH, 1, bias=False)
      self.speed = nn.Linear(2, FEATURE_LEN - TOLD)
      self.wanted = nn.Linear(DESIRE_HISTORY * DESIRE_LEN + TRAFFIC_CONVENTION_LEN + ACTION_T_LEN, 64)
      self.moved = nn.Linear(TOLD * (REACH + 1) + REACH, 64)
      width = {"plan": 512, "lane_lines": 128, "road_edges": 128, "lead": 64}
      inside = {name: FEATURE_LEN + (128 if name in POLICY else 0) for name in OUTPUT_SIZES}
      self.heads = nn.ModuleDict(
        {n: Head(inside[n], size, width.get(n, 64)) for n, size in OUTPUT_SIZES.items() if n != "hidden_state"}
      )
      with torch.no_grad():  # what is not learned yet shall not hide what is known
        self.trend.weight.copy_(torch.tensor([[0.5, 0.5, *[0.0] * (REACH - 2)]]))
        for weight in (
          self.heads.get_parameter("plan.out.weight"),
          self.heads.get_parameter("pose.out.weight"),
          self.turn.out.weight,
        ):
          weight.mul_(0.2)
    offset, scale, per_offset, per_scale = speed_prior(*prior())
    plan, pose = output_slices()["plan"].start, output_slices()["pose"].start
    offset[plan : plan + IDX_N * PLAN_WIDTH] = 0.0  # arc() says it
    per_offset[plan : plan + IDX_N * PLAN_WIDTH] = 0.0
    scale[pose : pose + 6] = torch.tensor([1.0, 0.3, 0.3, 0.02, 0.02, 0.02])
    offset[pose + 6 : pose + 12] = torch.log(scale[pose : pose + 6])
    self.offset, self.scale, self.per_offset, self.per_scale = (
      nn.Buffer(x) for x in (offset, scale, per_offset, per_scale)
    )
    self.t = nn.Buffer(torch.tensor(T_IDXS))
    self.ago = nn.Buffer(0.2 * torch.arange(1.0, REACH + 1))

  def forward(
    self,
    img: Tensor,
    big_img: Tensor,
    desire_pulse: Tensor,
    traffic_convention: Tensor,
    action_t: Tensor,
    features_buffer: Tensor,
    lateral_control_params: Tensor,
  ) -> Tensor:
    v = lateral_control_params[:, :1]
    narrow, wide = (x.to(self.offset.dtype) for x in (img, big_img))
    (near, near_seen), (far, far_seen) = (
      self.narrow(narrow),
      self.wide(wide),
    )  # the narrow view is finer, the wide one sees faster turns
    mixed = self.turn(torch.cat([near_seen, far_seen, v / SPEED, 5 * near, 5 * far], 1))
    share = torch.sigmoid(mixed[:, 1:] - 1)
    turn = share * near + (1 - share) * far + 0.1 * mixed[:, :1]
    past = features_buffer[:, -REACH:]
    told = past[:, :, -TOLD:].flip(1)  # (B, REACH, TOLD): the moment before first
    trends = told[:, :, 0] * (v - 20 * told[:, :, 1]) / self.ago
    acceleration = self.trend(trends)
    now = torch.cat([torch.ones_like(v), v / 20, turn * 2, acceleration / 4], 1)
    features = torch.cat([self.road(narrow, wide, self.speed(lateral_control_params / SPEED)), now], 1)
    wanted = F.elu(self.wanted(torch.cat([desire_pulse.flatten(1), traffic_convention, action_t], 1)))
    moved = F.elu(self.moved(torch.cat([now, told.flatten(1), trends / 4], 1)))
    summary = torch.cat([self.temporal(features, past), wanted, moved], 1)
    known = {
      "plan": arc(v, turn, acceleration, self.t).flatten(1),
      "pose": torch.cat([v, *[torch.zeros_like(v)] * 4, turn], 1),
    }
    parts = []
    for n, size in OUTPUT_SIZES.items():
      raw = features if n == "hidden_state" else self.heads[n](summary if n in POLICY else features)
      at = output_slices()[n]
      raw = raw * (self.scale[at] + v * self.per_scale[at]) + (self.offset[at] + v * self.per_offset[at])
      parts.append(raw + F.pad(known[n], (0, size - known[n].shape[1])) if n in known else raw)
    return torch.cat(parts, 1)

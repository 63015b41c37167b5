"""How the points of a flat road move together, and how the car's movement is read off them.

A camera h meters above a flat road sees a point d pixels below the horizon at depth f h / d. When the car has gone on
by v meters, it is at d / (1 - q d), q = v / (f h), and as much farther from the column of the vanishing point; where
the car turns, all points go aside by the same number of pixels. So two numbers a frame say how all points of the road
move; what a point does beside them is its own."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from openpilot.common.transformations.model import medmodel_intrinsics, sbigmodel_intrinsics
from openpilot.tools.fair.spec import InputSpec

LEAST = 2.0  # pixels below the horizon: of what is nearer to it, as if it were there
NEAREST = 0.7  # of q d: what would pass under the car goes on to there
SPEEDS = np.arange(25) * 0.1  # candidates of q, in 1 / 1000 pixels: up to 50 m/s at 20 Hz, 1.2 m above the road
FINER = (np.arange(13) - 6) * 0.02  # beside the speed that was found
USUAL, SPREAD = 0.7, 0.5  # the speed before anything is seen, and its standard deviation
TURNS = 16.0  # pixels: the unit of the state's turn
FORGET = 0.7  # of what is not known of the speed a frame later


@dataclass
class Drive:
  """All (B, 1). speed: q, in 1 / 1000 pixels; turn: pixels aside, positive to the right; sure: 0 where nothing is known
  of frames before, up to 1."""

  speed: Tensor
  turn: Tensor
  sure: Tensor

  @classmethod
  def of_state(cls, shared: Tensor, kept: Tensor) -> "Drive":
    """shared (B, N, 3): what the points' state holds of it, the same for all; kept (B, N): 1 for those that have
    one."""
    speed, turn, sure = ((kept[:, None] @ shared).squeeze(1) / (torch.relu(kept.sum(1, keepdim=True) - 1) + 1)).split(
      1, dim=1
    )
    return cls(speed, turn * TURNS, sure)

  def state(self, kept: Tensor) -> Tensor:
    """(B, 3), for the frame after this one, in which kept (B, N) were followed."""
    some = 1.0 - torch.relu(1.0 - kept.sum(1, keepdim=True))
    return torch.cat([self.speed, self.turn / TURNS, (1.0 - (1.0 - self.sure) * FORGET) * some], dim=1)


@dataclass(frozen=True)
class Road:
  """Where its vanishing point lies in the camera's view, pixels."""

  x: float
  y: float

  def move(self, points: Tensor, speed: Tensor, turn: Tensor, view: Tensor | None = None) -> Tensor:
    """points (B, N, 2), speed, turn (B, 1) -> where they are a frame later (B, N, 2); or points (B, N, 1, 2), speed
    (B, 1, K), turn (B, 1, 1) -> (B, N, K, 2). view (B, 3, 3): from the camera's view to the points' pixels, where these
    are of an augmented picture."""
    if view is not None:
      back = torch.linalg.inv(view)
      return affine(view, self.move(affine(back, points), speed, turn))
    below = torch.relu(points[..., 1] - (self.y + LEAST)) + LEAST
    part = NEAREST - torch.relu(NEAREST - speed * below * 1e-3)
    more = part / (1.0 - part)
    return torch.stack(
      [points[..., 0] + (points[..., 0] - self.x) * more + turn, points[..., 1] + below * more], dim=-1
    )

  def speed(self, before: Tensor, after: Tensor, known: Tensor, view: Tensor | None = None) -> Tensor:
    """The speed by which points (B, N, 2) of the road came from before to after, (B,): least squares of those `known`
    (B, N); 0 where there are none."""
    if view is not None:
      back = torch.linalg.inv(view)
      before, after = affine(back, before), affine(back, after)
    a, b = (torch.relu(x[..., 1] - (self.y + LEAST)) + LEAST for x in (before, after))
    product = a * b * known
    return 1e3 * ((b - a) * product).sum(1) / (product * product).sum(1).clamp(min=1.0)

  def aside(self, off: Tensor, view: Tensor | None = None) -> Tensor:
    """off (B, N, 2): pixels between two places -> (B, N), how far across the camera's view."""
    if view is not None:
      off = off @ torch.linalg.inv(view)[:, :2, :2].transpose(1, 2)
    return off[..., 0]


def affine(m: Tensor, points: Tensor) -> Tensor:
  """m (B, 3, 3), points (B, ..., 2) -> the same moved, each clip's by its own."""
  flat = points.flatten(1, -2)
  return (flat @ m[:, :2, :2].transpose(1, 2) + m[:, None, :2, 2]).reshape(points.shape)


def road_of(picture: InputSpec) -> Road | None:
  """None of pictures of any camera."""
  if picture.kind == "rgb":
    return None
  view = sbigmodel_intrinsics if picture.view == "sbigmodel" else medmodel_intrinsics
  return Road(float(view[0, 2]) * picture.width / 512, float(view[1, 2]) * picture.height / 256)


def read_window(window: Tensor, at: Tensor) -> Tensor:
  """window (M, S * S) row-major, at (M, K, 2) cells from its middle -> (M, K), bilinear, 0 outside."""
  size = math.isqrt(window.shape[-1])
  steps = torch.arange(size, dtype=at.dtype, device=at.device) - size // 2
  x, y = (torch.relu(1.0 - (at[..., k, None] - steps).abs()) for k in (0, 1))
  return ((y @ window.reshape(-1, size, size)) * x).sum(-1)


class Vote(nn.Module):
  """The speed that most points agree on: each says at which candidate it sees itself again."""

  def __init__(self, spread: float) -> None:
    super().__init__()
    # what a vote weighs, and one over how far the speed may be from before: products alone, see onnx_import.py
    self.loud, self.steady = (nn.Parameter(torch.tensor(x)) for x in (2.7, 1 / spread))

  def forward(
    self, seen: Tensor, weight: Tensor, speeds: Tensor, before: Tensor, sure: Tensor
  ) -> tuple[Tensor, Tensor]:
    """seen (B, N, K): what each point sees at each candidate; weight (B, N); speeds (B, K); before, sure (B, 1) ->
    (B, 1), and the candidates' logits (B, K)."""
    said = (weight[:, None] @ seen).squeeze(1) * self.loud  # (B, K)
    off, first = (speeds - before) * self.steady, (speeds - USUAL) / SPREAD
    said = said - 0.5 * (sure * off * off + (1.0 - sure) * first * first)
    return (torch.softmax(said, dim=-1) * speeds).sum(-1, keepdim=True), said

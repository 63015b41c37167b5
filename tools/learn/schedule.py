"""The learning rate of a step, and the average of a model's weights over steps."""

import copy
import math

import torch
from torch import nn


def learning_rate(
  lr: float, step: int, steps: int, warmup: int = 0, shape: str = "cosine", floor: float = 0.02, start: int = 0
) -> float:
  """A linear rise to `lr` over `warmup` steps, times the shape: "constant", or "cosine", which is 1 until step `start`
  and `floor` at the end of `steps`. Raises ValueError for another shape."""
  warm = lr * min(1.0, (step + 1) / max(1, warmup))
  if shape == "constant":
    return warm
  if shape != "cosine":
    raise ValueError(f"no shape '{shape}'; there are cosine, constant")
  length = max(1, steps - start)
  turn = math.pi * min(max(0, step - start), length) / length
  return warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(turn)))


def averaged(model: nn.Module) -> nn.Module:
  """A copy to follow() the model: in eval mode, without gradients."""
  return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
  """average <- decay * average + (1 - decay) * model, weights and buffers; counters are copied. step: steps done, of
  which the first count more: the decay is at most (1 + step) / (10 + step)."""
  share = 1 - min(decay, (1 + step) / (10 + step))
  for a, b in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
    if a.is_floating_point():
      a.lerp_(b, share)
    else:
      a.copy_(b)

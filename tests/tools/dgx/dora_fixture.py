"""What the tests of DoRA share."""

import pytest
import torch
from torch import nn

from openpilot.tools.learn.adapters.layers import dora_layers

try:
  import peft
except ImportError:
  peft = None
needs_peft = pytest.mark.skipif(peft is None, reason="compares with peft, which is not installed")


# of relative(), in float32: two ways to sum the same differ by up to 3e-7 here, and by more with another processor's,
# BLAS's or number of threads'
CLOSE = 5e-6


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
  return float((a.detach().double() - b.detach().double()).abs().max() / b.detach().double().abs().max())


def stir(model: nn.Module) -> None:
  """An adapter as after training: B and m away from where they start."""
  with torch.no_grad():
    for layer in dora_layers(model).values():
      for adapter in layer.adapters[layer.active].values():
        adapter.b.normal_(std=0.1)
        adapter.m.mul_(1 + 0.2 * torch.randn_like(adapter.m))

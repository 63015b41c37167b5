"""What tests of losses share."""

import numpy as np
import torch

TIGHT = {"rtol": 1e-9, "atol": 1e-11}  # float64 on both sides, another order of sums


def t(a, grad: bool = False) -> torch.Tensor:
  return torch.as_tensor(np.asarray(a)).requires_grad_(grad)


def value(x) -> float:
  return float(x.detach())


def finite_gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
  assert torch.isfinite(loss)
  grads = torch.autograd.grad(loss, inputs, allow_unused=True)
  grads = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]
  assert all(torch.isfinite(g).all() for g in grads)
  return grads

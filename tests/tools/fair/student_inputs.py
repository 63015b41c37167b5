"""What tests of students share."""

import numpy as np
import torch
from torch import nn

from openpilot.tools.fair.students.student import Student


def randomise(student: Student, seed: int = 0) -> Student:
  """BatchNorm statistics and whatever starts at zero become random: a freshly made network would hide a term that is
  dropped or used twice."""
  g = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for m in student.modules():
      if isinstance(m, nn.BatchNorm2d):
        m.running_mean.normal_(0, 0.2, generator=g)
        m.running_var.uniform_(0.5, 1.5, generator=g)
        m.weight.uniform_(0.7, 1.3, generator=g)
        m.bias.normal_(0, 0.2, generator=g)
    for p in student.parameters():
      if p.numel() > 1 and p.ndim == 2 and not p.any():
        p.normal_(0, 0.05, generator=g)
  return student.eval()


def some_inputs(student: Student, seed: int = 1, b: int = 1) -> dict:
  """Fresh random inputs of the graph; points also outside the view, some slots unused, some points new."""
  g = torch.Generator().manual_seed(seed)
  out = {}
  for name, like in student.inputs().items():
    shape = (b, *like.shape[1:])
    if name == "frame":
      out[name] = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    elif name == "lanes_points":
      out[name] = torch.rand(shape, generator=g) * torch.tensor([560.0, 300.0]) - 24
    elif name in ("lanes_mask", "lanes_fresh"):
      out[name] = (torch.rand(shape, generator=g) < 0.7).float()
    else:
      out[name] = torch.randn(shape, generator=g) * 0.3
  return out


def assert_close(name: str, got: np.ndarray, want: np.ndarray, rel: float) -> None:
  """Against the largest value of the output: float32 sums in another order differ by parts of the largest term, not of
  each result."""
  assert got.shape == want.shape, name
  assert np.abs(got - want).max() <= rel * max(1.0, np.abs(want).max()), name

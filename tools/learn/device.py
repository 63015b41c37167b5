"""Which device and precision teachers and students run on: chosen by itself, said aloud, overridable."""

import sys
from dataclasses import dataclass
from functools import cache

import torch

from openpilot.tools.lib.errors import UserError


@dataclass(frozen=True)
class Device:
  device: torch.device
  dtype: torch.dtype  # of weights and activations

  @property
  def precision(self) -> str:
    return str(self.dtype).removeprefix("torch.")


def mixed_precision() -> str:
  """The best that students learn in here: bf16 on GPUs that have it."""
  return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


@cache
def choose_device(name: str | None = None, precision: str | None = None) -> Device:
  """CUDA with bf16, else MPS, else the CPU with fp32; both can be named. Says on stderr, once, what runs. Raises
  UserError where it is not there."""
  found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
  name = name or found
  try:
    device = torch.device(name)
    torch.empty(1, device=device)
  except (RuntimeError, AssertionError, NotImplementedError) as e:
    raise UserError(f"no device '{name}' here: {str(e).splitlines()[0]}; this machine has {found}") from None
  if precision is not None and precision not in ("float32", "bfloat16", "float16"):
    raise UserError(f"precision '{precision}' is not known; float32, bfloat16 or float16")
  bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
  dtype = getattr(torch, precision) if precision else torch.bfloat16 if bf16 else torch.float32
  what = f"{torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type
  slow = "" if device.type == "cuda" else "; teachers are meant for a GPU, this will be slow"
  print(f"device: {what}, {str(dtype).removeprefix('torch.')}{slow}", file=sys.stderr)
  if device.type == "cuda":
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
  return Device(device, dtype)

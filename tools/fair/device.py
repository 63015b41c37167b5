"""Which device and precision teachers and students run on: chosen by itself, said aloud, overridable."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch

from openpilot.tools.lib.errors import UserError

R = TypeVar("R")


@dataclass(frozen=True)
class Device:
  device: torch.device
  dtype: torch.dtype  # of weights and activations

  @property
  def precision(self) -> str:
    return str(self.dtype).removeprefix("torch.")


@cache
def choose_device(name: str | None = None, precision: str | None = None) -> Device:
  """CUDA with bf16, else MPS, else the CPU with fp32; both can be named. Says on stderr, once, what runs. Raises UserError where it is not there."""
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


def halve_on_oom(run: Callable[[Any], list[R]], batch: Any) -> list[R]:
  """run(batch), and where the GPU's memory is too small, run on both halves, and so on. batch: anything with len() and slices."""
  try:
    return run(batch)
  except torch.cuda.OutOfMemoryError:
    if len(batch) <= 1:
      raise UserError("the GPU's memory does not hold a single frame of this teacher; take a smaller --view, a smaller model, or --device cpu") from None
    torch.cuda.empty_cache()
    half = len(batch) // 2
    print(f"warning: out of GPU memory with {len(batch)} frames at once; going on with {half}", file=sys.stderr)
  return halve_on_oom(run, batch[:half]) + halve_on_oom(run, batch[half:])

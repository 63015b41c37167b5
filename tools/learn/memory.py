"""Out of memory: the batch is halved, whichever runtime ran out of it. Without torch, as ONNX teachers run without
it."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from openpilot.tools.lib.errors import UserError

R = TypeVar("R")


class OutOfMemory(MemoryError):
  """Of a runtime that has no error of its own for it."""


def is_out_of_memory(error: Exception) -> bool:
  torch = sys.modules.get("torch")
  return isinstance(error, OutOfMemory) or (torch is not None and isinstance(error, torch.cuda.OutOfMemoryError))


def does_not_fit(error: Exception) -> bool:
  """A GPU's memory, or a CPU's, for which torch has words alone."""
  return is_out_of_memory(error) or "not enough memory" in str(error)


def halve_on_oom(run: Callable[[Any], list[R]], batch: Any) -> list[R]:
  """run(batch), and where the GPU's memory is too small, run on both halves, and so on. batch: anything with len() and
  slices."""
  try:
    return run(batch)
  except Exception as e:
    if not is_out_of_memory(e):
      raise
    if len(batch) <= 1:
      raise UserError(
        "the GPU's memory does not hold a single frame of this teacher; take a smaller --view, a smaller model, or "
        "--device cpu"
      ) from None
    if "torch" in sys.modules:
      sys.modules["torch"].cuda.empty_cache()
    half = len(batch) // 2
    print(f"warning: out of GPU memory with {len(batch)} frames at once; going on with {half}", file=sys.stderr)
  return halve_on_oom(run, batch[:half]) + halve_on_oom(run, batch[half:])

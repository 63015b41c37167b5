"""Memory: the batch is halved where a runtime runs out of it; a training on a CPU keeps what it frees. No torch here:
ONNX teachers run without it."""

import ctypes
import platform
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from openpilot.tools.lib.errors import UserError

R = TypeVar("R")


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h


def keep_freed() -> None:
  """From now on this process keeps memory that it frees, and takes it again. glibc gives large blocks back at once, and
  the system then hands them out anew in zeroed pages of 4 kB: every step of a training, which wants the same blocks
  again, waits for 300 to 600 MB of them. Does nothing where malloc is another."""
  if platform.libc_ver()[0] != "glibc":
    return
  mallopt = ctypes.CDLL(None).mallopt
  mallopt(M_TRIM_THRESHOLD, -1)
  if not mallopt(M_MMAP_THRESHOLD, 1 << 30):  # older ones refuse more than 32 MiB
    mallopt(M_MMAP_MAX, 0)


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

"""What this machine is, for a table and a file: its accelerator, whether that shares the memory with the CPU, as DGX
Spark's does, and how much there is."""

import os
import platform
from typing import Any

import torch

UNIFIED = ("GB10", "Thor", "Orin", "GH200", "GB200")  # parts of names of chips whose GPU reads the CPU's memory


def system_memory() -> int:
  """Bytes; 0 where the system does not say."""
  try:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  except (ValueError, OSError):
    return 0


def describe() -> dict[str, Any]:
  """machine, cpus, memory (GB), and where there is a GPU: gpu, gpu_memory (GB), unified, dgx_spark, capability."""
  out: dict[str, Any] = {
    "machine": platform.machine(),
    "cpus": os.cpu_count(),
    "memory_gb": round(system_memory() / 2**30, 1),
    "torch": torch.__version__,
  }
  if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    unified = bool(getattr(p, "is_integrated", False)) or any(x in p.name for x in UNIFIED)
    out.update(
      gpu=p.name, gpus=torch.cuda.device_count(), gpu_memory_gb=round(p.total_memory / 2**30, 1), unified=unified
    )
    out.update(dgx_spark="GB10" in p.name, capability=f"{p.major}.{p.minor}")
  return out


def one_line() -> str:
  d = describe()
  cpu = f"{d['cpus']} cores, {d['memory_gb']:.0f} GB"
  if "gpu" not in d:
    return f"no GPU; {d['machine']}, {cpu}"
  spark = "DGX Spark, " if d["dgx_spark"] else ""
  memory = "memory shared with the CPU" if d["unified"] else f"{d['gpu_memory_gb']:.0f} GB of its own"
  return f"{spark}{d['gpus']} x {d['gpu']}, {memory}; {cpu}"

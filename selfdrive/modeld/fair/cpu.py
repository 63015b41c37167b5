"""What this processor is, for graphs in 8 bits: they are made for one, and another computes them wrongly or slowly."""

import platform
from functools import cache
from pathlib import Path
from typing import Any

TARGETS = ("x86-vnni", "x86", "aarch64")  # of variants that ONNX Runtime takes; others are of other runners
CPUINFO = Path("/proc/cpuinfo")
VNNI = {"avx512_vnni", "avx_vnni"}  # sums of four products of 8 bits in 32: without it ONNX Runtime's saturate at 16


@cache
def targets() -> tuple[str, ...]:
  """Targets of variants that run rightly here, the best first; none on processors that no variant is made for."""
  machine = platform.machine().lower()
  if machine in ("aarch64", "arm64"):
    return ("aarch64",)
  if machine in ("x86_64", "amd64"):
    return ("x86-vnni", "x86") if VNNI & flags() else ("x86",)
  return ()


def flags() -> set[str]:
  """Of an x86 processor as Linux tells them; elsewhere none, so that the variant is taken that is right on all."""
  try:
    lines = CPUINFO.read_text().splitlines()
  except OSError:
    return set()
  return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def variant_of(graph: dict[str, Any], wanted: tuple[str, ...] | None = None) -> dict[str, Any] | None:
  """Of a manifest's graph the variant for the first of these targets that it has one for, by default the one that this
  processor runs best; None: the graph's own file, in float."""
  made = {v["target"]: v for v in graph.get("variants", [])}
  return next((made[t] for t in (targets() if wanted is None else wanted) if t in made), None)

"""Machine code for the comma four's GPU, made on a PC: tinygrad lowers a graph for its NULL device with Mesa's compiler
for the Adreno 630 (tinymesa).

A process of its own, for tinygrad reads its settings on import: python -m openpilot.tools.fair.comma_four.adreno
GRAPH.onnx OUT.json The flags are those with which openpilot compiles for the device (selfdrive/modeld/SConscript).
Nothing runs: a NULL device has no memory."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.runners.tinygrad_ops import improve

DEVICE = "NULL:IR3:a630,IMAGE_PITCH_ALIGNMENT=64"
# constants of the graph (shapes, slices) are worked out on a device that has memory, then all goes to the NULL one
FLAGS = {"DEV": "CPU", "IMAGE": "1", "FLOAT16": "1", "NOLOCALS": "1", "JIT_BATCH_SIZE": "0", "OPENPILOT_HACKS": "1"}


def capture(path: Path) -> list[Any]:
  """The kernels' calls of one run of the graph, in order, as the jit would replay them."""
  from tinygrad import Tensor, TinyJit
  from tinygrad.helpers import DEV
  from tinygrad.nn.onnx import OnnxRunner
  from tinygrad.uop.ops import Ops

  net = improve(OnnxRunner(str(path)))
  net(
    {k: Tensor.zeros(*v.shape, dtype=v.dtype) for k, v in net.graph_inputs.items()}
  )  # nothing is computed but what Python has to know: it is kept by name
  DEV.value = DEVICE
  net.to("NULL")
  inputs = {k: Tensor.empty(*v.shape, dtype=v.dtype).realize() for k, v in net.graph_inputs.items()}
  jit = TinyJit(lambda **x: {k: v.contiguous() for k, v in net(x).items()}, prune=True)
  for _ in range(2):
    jit(**inputs)
  calls: list[Any] = []
  for call in jit.captured._linear.src:  # type: ignore[union-attr]
    calls += call.src[0].src[0].src if call.src[0].op is Ops.CUSTOM_FUNCTION else [call]
  return [c for c in calls if c.src[0].op is Ops.PROGRAM]


def moved(call: Any, written: dict[Any, int]) -> tuple[int, int]:
  """Bytes that a kernel reads and writes, each byte of a buffer once. written: buffer -> what was written into it, to
  which this is added: an image's rows are padded, up to eight times what is in them, and of those nothing is read."""
  from tinygrad.renderer import Estimates
  from tinygrad.uop.ops import Ops

  def parts(kind: Any) -> dict[Any, int]:
    """Of each buffer that is loaded from, or stored into."""
    others, out = {u for u in lines if u.op in (Ops.LOAD, Ops.STORE) and u.op is not kind}, {}
    for slot in {slot_of(u) for u in lines if u.op is kind} - {None}:
      mine = [u for u in lines if u not in others and (u.op is not kind or slot_of(u) == slot)]
      out[call.src[1 + slot]] = int(Estimates.from_uops(tuple(mine)).mem)
    return out

  def slot_of(u: Any) -> Any:
    while len(u.src) and u.op is not Ops.PARAM:
      u = u.src[0]
    return u.arg.slot if u.op is Ops.PARAM else None

  lines = call.src[0].src[1].src
  reads = sum(min(n, written.get(buffer, n)) for buffer, n in parts(Ops.LOAD).items())
  made = parts(Ops.STORE)
  written |= made
  return reads, sum(made.values())


def describe(call: Any, written: dict[Any, int]) -> dict[str, Any]:
  """One kernel: its size, what it reads and writes, see moved(), floating-point operations, and what Mesa made of
  it."""
  from tinygrad.runtime.support.compiler_mesa import IR3Compiler

  program = call.src[0]
  kernel, _, _, binary = program.src
  read, stored = moved(call, written)
  variant, _, _, code = IR3Compiler.unpack_lib(binary.arg)
  info = variant.info
  return {
    "name": re.sub(r"\x1b\[[0-9;]*m", "", kernel.arg.name),
    "items": int(np.prod([*program.arg.global_size, *(program.arg.local_size or ())])),
    "instructions": info.instrs_count,
    "code": len(code),
    "registers": max(0, info.max_reg + 1),  # of 4 x 32 bits
    "half_registers": max(0, info.max_half_reg + 1),  # of 4 x 16 bits
    "waves": info.max_waves,
    "spilled": variant.pvtmem_size,
    "textures": variant.image_mapping.num_tex,
    "read": read,
    "written": stored,
    "flops": int(kernel.arg.estimates.ops),
  }


def main() -> None:
  written: dict[Any, int] = {}
  kernels = [describe(call, written) for call in capture(Path(sys.argv[1]))]
  Path(sys.argv[2]).write_text(json.dumps(kernels))


if __name__ == "__main__":
  main()

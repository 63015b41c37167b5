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

DEVICE = "NULL:IR3:a630,IMAGE_PITCH_ALIGNMENT=64"
# constants of the graph (shapes, slices) are worked out on a device that has memory, then all goes to the NULL one
FLAGS = {"DEV": "CPU", "IMAGE": "1", "FLOAT16": "1", "NOLOCALS": "1", "JIT_BATCH_SIZE": "0", "OPENPILOT_HACKS": "1"}


def capture(path: Path) -> list[Any]:
  """The kernels' calls of one run of the graph, in order, as the jit would replay them."""
  from tinygrad import Tensor, TinyJit
  from tinygrad.helpers import DEV
  from tinygrad.nn.onnx import OnnxRunner
  from tinygrad.uop.ops import Ops

  net = OnnxRunner(str(path))
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


def describe(call: Any) -> dict[str, Any]:
  """One kernel: its size, what it reads and writes (bytes, each byte of a buffer once), floating-point operations, and
  what Mesa made of it."""
  from tinygrad.renderer import Estimates
  from tinygrad.runtime.support.compiler_mesa import IR3Compiler
  from tinygrad.uop.ops import Ops

  program = call.src[0]
  kernel, lines, _, binary = program.src
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
    "read": int(Estimates.from_uops(tuple(u for u in lines.src if u.op is not Ops.STORE)).mem),
    "written": int(Estimates.from_uops(tuple(u for u in lines.src if u.op is not Ops.LOAD)).mem),
    "flops": int(kernel.arg.estimates.ops),
  }


def main() -> None:
  kernels = [describe(call) for call in capture(Path(sys.argv[1]))]
  Path(sys.argv[2]).write_text(json.dumps(kernels))


if __name__ == "__main__":
  main()

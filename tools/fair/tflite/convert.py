#!/usr/bin/env python3
"""A bundle's graph as TFLite, in float and in 8 bits. Runs in an environment of its own (environment.py), which
`op optimize --format tflite` starts: python -m openpilot.tools.fair.tflite.convert FOLDER.

FOLDER has job.json, what is to be done, and frames.npz, what goes into the graph; it gets the .tflite files and
said.json, what became of it."""

import contextlib
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from openpilot.selfdrive.modeld.fair.bundle import BundleError, load_bundle
from openpilot.selfdrive.modeld.fair.parity import worst
from openpilot.selfdrive.modeld.fair.runners.onnx import OnnxRunner
from openpilot.selfdrive.modeld.fair.runners.tflite import TARGETS, Network
from openpilot.tools.fair.bundle.export import apart
from openpilot.tools.fair.optimize.quantize import LAYERS, last_layers, trunk
from openpilot.tools.fair.students.onnx_import import student_of
from openpilot.tools.fair.students.student import Student
from openpilot.tools.fair.tflite.bias import Shifts, shift_biases, shifts
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.files import atomic_path, read_json, write_json

JOB, FRAMES, SAID = "job.json", "frames.npz", "said.json"
FLOAT, INT8 = TARGETS
# operators by ONNX's names, of which optimize/quantize.py knows what may be 8 bits; others keep TFLite's
ONNX = {
  "CONV_2D": "Conv",
  "DEPTHWISE_CONV_2D": "Conv",
  "CONV_2D_TRANSPOSE": "ConvTranspose",
  "ADD": "Add",
  "MUL": "Mul",
  "CONCATENATION": "Concat",
  "AVERAGE_POOL_2D": "AveragePool",
  "MAX_POOL_2D": "MaxPool",
  "PAD": "Pad",
  "RELU": "Relu",
  "LOGISTIC": "Sigmoid",
  "RESIZE_BILINEAR": "Resize",
  "RESIZE_NEAREST_NEIGHBOR": "Resize",
}
FIRST = "one of the first layers, whose rounding all outputs feel"
ALIKE = 1e-2  # of an output's largest value: torch sums in another order
Inputs = dict[str, np.ndarray]


def write_frames(folder: Path, frames: list[Inputs]) -> None:
  np.savez(folder / FRAMES, **{f"{n}:{k}": v for n, x in enumerate(frames) for k, v in x.items()})  # type: ignore[arg-type]


def read_frames(folder: Path) -> list[Inputs]:
  out: dict[int, Inputs] = {}
  with np.load(folder / FRAMES, allow_pickle=False) as f:
    for key in f.files:
      n, _, name = key.partition(":")
      out.setdefault(int(n), {})[name] = f[key]
  return [out[n] for n in sorted(out)]


class Named(nn.Module):
  """The student with inputs by name, and these outputs: the file then has their names, too."""

  def __init__(self, student: Student, outputs: list[str]):
    super().__init__()
    self.student, self.outputs = student, outputs

  def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
    out = self.student(**inputs)
    return {k: out[k] for k in self.outputs}


def parts(x: Tensor, sizes: list[int], dim: int = 0) -> list[Tensor]:
  """torch.split(): the converter fails where there is one part alone."""
  ends = np.cumsum(sizes).tolist()
  return [torch.ops.aten.slice(x, dim, end - n, end) for n, end in zip(sizes, ends, strict=True)]


def to_tflite(module: nn.Module, inputs: dict[str, Tensor], path: Path) -> None:
  """Raises UserError with the operator that TFLite's converter lacks."""
  import litert_torch
  from litert_torch.fx_infra import decomp

  decomp.add_pre_convert_decomp(torch.ops.aten.split_with_sizes.default, parts)
  try:
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
      warnings.simplefilter("ignore")
      edge = litert_torch.convert(module, sample_kwargs=inputs)
  except Exception as e:  # torch's, MLIR's and JAX's have no common base
    raise UserError(f"TFLite's converter does not take it: {why(str(e) or type(e).__name__)}") from None
  with atomic_path(path) as tmp, contextlib.redirect_stdout(sys.stderr):
    edge.export(str(tmp))


def why(text: str) -> str:
  """The operator at which a conversion stopped, and what was said of it, of an error that is pages long."""
  said = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
  at = next((m[1] for line in said if (m := re.match(r"While executing .*target=([\w.:]+)", line))), None)
  return f"{f'operator {at}: ' if at else ''}{(said or ['?'])[0][:200]}"


def operators(blob: bytes) -> tuple[onnx.ModelProto, dict[str, str]]:
  """A TFLite file's graph as far as it matters what is computed of what; and of each node, by its name, its operator in
  TFLite. Names are those by which the quantizer asks."""
  from ai_edge_quantizer.utils import tfl_flatbuffer_utils as tfl

  model = tfl.read_model(blob)
  graph, out, kinds = model.subgraphs[0], onnx.ModelProto(), {}
  for op in graph.operators:
    code, name = model.operatorCodes[op.opcodeIndex].builtinCode, tfl.get_op_scope(op, graph.tensors)
    kind = tfl.TFL_OP_CODE_TO_NAME[code].value if code in tfl.TFL_OP_CODE_TO_NAME else str(code)
    kinds[name] = kind
    said = [str(i) for i in op.inputs if i >= 0], [str(o) for o in op.outputs]
    out.graph.node.append(onnx.helper.make_node(ONNX.get(kind, kind), *said, name=name))
  for i, tensor in enumerate(graph.tensors):
    if model.buffers[tensor.buffer].data is not None:
      out.graph.initializer.append(onnx.TensorProto(name=str(i)))
  for i in graph.outputs:
    out.graph.output.append(onnx.ValueInfoProto(name=str(i)))
  return out, kinds


def bias_shifts(blob: bytes, frames: list[Inputs]) -> Shifts:
  """Of a float file's layers that may be 8 bits, at frames that go into it."""
  graph, _ = operators(blob)
  return shifts(blob, set(trunk(graph, last_layers(graph))), frames)


def to_int8(path: Path, out: Path, frames: list[Inputs], shift: Shifts, first: int = 0) -> dict[str, list[str]]:
  """path: the float file; frames: what goes into it; shift: bias_shifts(). Convolutions and what lies between them in 8
  bits, weights of each channel; the last ones stay float, and so many of the first. -> reason -> nodes that do."""
  from ai_edge_quantizer import quantizer

  blob = path.read_bytes()
  graph, kinds = operators(blob)
  last = last_layers(graph)
  layers = [n.name for n in graph.graph.node if n.op_type in LAYERS]
  front = [n for n in trunk(graph, last) if n in layers][:first]
  chosen = trunk(graph, [*last, *front])
  q = quantizer.Quantizer(shift_biases(blob, {n: shift[n] for n in chosen if n in shift}))
  for name in chosen:
    q.add_static_config(f"^{re.escape(name)}$", kinds[name], 8, 8)
  with contextlib.redirect_stdout(sys.stderr):
    ranges = q.calibrate({"serving_default": frames}, num_threads=1)
    done = q.quantize(ranges, enable_progress_report=False)
  with atomic_path(out) as tmp:
    tmp.write_bytes(bytes(done.quantized_model))
  rest = [n for n in layers if n not in {*chosen, *last, *front}]
  left = {"the last layer of an output": last, FIRST: front, "the converter lacks it": rest}
  return {why: nodes for why, nodes in left.items() if nodes}


def compared(net: Network, want: list[Inputs], frames: list[Inputs]) -> dict[str, dict[str, float]]:
  """-> of each output its largest and its mean difference to the student's over the frames, in parts of the largest
  value."""
  most: dict[str, list[float]] = {k: [] for k in want[0]}
  mean: dict[str, list[float]] = {k: [] for k in want[0]}
  for x, w in zip(frames, want, strict=True):
    got = net.run(x)
    for k, v in apart(got, w).items():
      most[k].append(v)
      mean[k].append(float(np.abs(got[k] - w[k]).mean()) / max(1e-6, float(np.abs(w[k]).max())))
  return {k: {"max": worst(most[k]), "mean": float(np.mean(mean[k]))} for k in most}


def tensors(x: Inputs, names: list[str]) -> dict[str, Tensor]:
  return {k: torch.from_numpy(x[k]) for k in names}


def run(folder: Path) -> None:
  """Raises UserError, BundleError."""
  job, frames = read_json(folder / JOB), read_frames(folder)
  calibrating, judged = frames[: job["calibrate"]], frames[job["calibrate"] :]
  bundle = load_bundle(job["bundle"])
  graph = next(g for g in bundle.graphs if g["name"] == job["graph"])
  names, outputs = [i["name"] for i in graph["inputs"]], [o["name"] for o in graph["outputs"]]
  print(f"{graph['name']}: the student that its weights are of", flush=True)
  module = Named(student_of(bundle, graph)[0], outputs).eval()
  want = []
  with torch.no_grad():
    for x in judged:
      want.append({k: v.numpy().copy() for k, v in module(**tensors(x, names)).items()})
  runner = OnnxRunner(bundle, graph, variants=False)
  off = worst(v for x, w in zip(judged, want, strict=True) for v in apart(runner.run(x), w).values())
  if not off <= ALIKE:
    raise UserError(f"{bundle.path}: the student of graph '{graph['name']}' is off from its file by {off:.2g}")
  said_of: dict[str, Any] = {"frames": len(judged), "student": off}
  said_of["forms"] = []
  whole, shift = folder / f"{graph['name']}.tflite", Shifts()
  some = [{k: x[k] for k in names} for x in calibrating]
  for first in (None, *job["first"]):
    left: dict[str, list[str]] = {}
    if first is None:
      print(f"{graph['name']}: {FLOAT}", flush=True)
      to_tflite(module, tensors(frames[0], names), path := whole)
      if job["first"]:
        shift = bias_shifts(whole.read_bytes(), some)
    else:
      print(f"{graph['name']}: {INT8}, the first {first} layers in float", flush=True)
      (path := folder / str(first) / f"{graph['name']}-int8.tflite").parent.mkdir()
      left = to_int8(whole, path, some, shift, first)
    net = Network(path.read_bytes(), graph["inputs"], graph["outputs"])
    outs = compared(net, want, judged)
    said_of["forms"].append(
      {
        "target": FLOAT if first is None else INT8,
        "path": str(path.relative_to(folder)),
        "file": path.name,
        "precision": "float32" if first is None else "int8",
        "bytes": path.stat().st_size,
        "outputs": outs,
        "float": left,
      }
    )
  write_json(folder / SAID, said_of)


def main() -> int:
  folder = Path(sys.argv[1])
  try:
    run(folder)
  except (UserError, BundleError) as e:
    write_json(folder / SAID, {"error": str(e)})
    return 2
  return 0


if __name__ == "__main__":
  raise SystemExit(cli(main)())

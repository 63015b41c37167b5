"""What a graph costs: multiply-accumulates of its ONNX file, bytes and operations of its kernels, their time at a share
of a GPU's peaks, budgets."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from openpilot.selfdrive.modeld.fair.ort import ort
from openpilot.tools.lib.errors import UserError

HERE = Path(__file__).parent


@dataclass
class Cost:
  """Exact for one tinygrad and one Mesa; parameters and macs for any."""

  parameters: int
  macs: int
  kernels: int
  read: int  # bytes
  written: int
  flops: int

  @property
  def bytes(self) -> int:
    return self.read + self.written


COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def shapes_of(path: Path, model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
  """Shape of every weight and of whatever goes into and comes out of a counted node: as inferred, else as one run of
  zeros shows it. Raises UserError."""
  shapes = {i.name: tuple(i.dims) for i in model.graph.initializer}
  graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
  for v in (*graph.input, *graph.value_info, *graph.output):
    dims = tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
    if v.type.tensor_type.HasField("shape") and 0 not in dims:
      shapes.setdefault(v.name, dims)
  wanted = {
    n for node in graph.node if node.op_type in COUNTED for n in (*node.input[:2], node.output[0])
  } - shapes.keys()
  if not wanted:
    return shapes
  if any(i.name not in shapes for i in graph.input):
    raise UserError(f"{path}: the shapes of its inputs are not fixed; export the graph with fixed shapes")
  asked = onnx.ModelProto()
  asked.CopyFrom(model)
  asked.graph.output.extend(onnx.ValueInfoProto(name=n) for n in sorted(wanted))
  session = ort.InferenceSession(asked.SerializeToString(), providers=["CPUExecutionProvider"])
  kinds = {i.name: onnx.helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in graph.input}
  values = session.run(sorted(wanted), {i.name: np.zeros(shapes[i.name], kinds[i.name]) for i in session.get_inputs()})
  return shapes | {n: v.shape for n, v in zip(sorted(wanted), values, strict=True)}


def count(path: Path) -> tuple[int, int]:
  """(parameters, multiply-accumulates) of a graph with fixed shapes: those of Conv, ConvTranspose, Gemm and MatMul, as
  papers count them. Raises UserError."""
  try:
    model = onnx.load(str(path))
  except Exception as e:  # protobuf's and onnx's own
    raise UserError(
      f"{path} is not an ONNX graph ({str(e).splitlines()[0][:120]}); a git-lfs pointer must be pulled first"
    ) from None
  shapes = shapes_of(path, model)
  parameters = sum(int(np.prod(i.dims)) for i in model.graph.initializer)
  macs = 0
  for node in model.graph.node:
    if node.op_type not in COUNTED:
      continue
    x, w, out = (shapes[n] for n in (*node.input[:2], node.output[0]))
    if node.op_type == "Conv":  # every output value takes what is in one filter
      macs += int(np.prod(out)) * int(np.prod(w[1:]))
    elif node.op_type == "ConvTranspose":  # every input value is spread over one filter
      macs += int(np.prod(x)) * int(np.prod(w[1:]))
    else:
      transposed = any(a.name == "transA" and a.i for a in node.attribute)
      macs += int(np.prod(out)) * x[0 if transposed else -1]
  return parameters, macs


def read_gpu(path: Path = HERE / "adreno630.json") -> dict[str, Any]:
  return json.loads(path.read_text())


def seconds(kernel: dict[str, Any], gpu: dict[str, Any], share: float) -> float:
  """A kernel at that share of the GPU's peaks: the slower of its arithmetic and its memory (the roofline of Williams et
  al. 2009)."""
  return max(kernel["flops"] / gpu["flops_per_s"], (kernel["read"] + kernel["written"]) / gpu["bytes_per_s"]) / share


def total(path: Path, kernels: list[dict[str, Any]]) -> Cost:
  parameters, macs = count(path)
  return Cost(parameters, macs, len(kernels), *(sum(k[key] for k in kernels) for key in ("read", "written", "flops")))


def read_budgets(path: Path = HERE / "budgets.json") -> dict[str, dict[str, int]]:
  """{graph: {macs, bytes, kernels}} with 'default' for all others. Raises UserError."""
  try:
    budgets = json.loads(path.read_text())
  except (OSError, ValueError) as e:
    raise UserError(f"{path} is no readable file of budgets ({e})") from None
  if not isinstance(budgets, dict) or "default" not in budgets:
    raise UserError(f"{path} has no budget 'default'; it is a map of graph names to macs, bytes and kernels")
  for name, budget in budgets.items():
    if set(budget) != {"macs", "bytes", "kernels"} or not all(isinstance(v, int) and v > 0 for v in budget.values()):
      raise UserError(f"{path}: the budget '{name}' needs macs, bytes and kernels, whole numbers over zero")
  return budgets


def over_budget(name: str, cost: Cost, budgets: dict[str, dict[str, int]]) -> list[str]:
  """One line for each budget that the graph breaks."""
  given = {**asdict(cost), "bytes": cost.bytes}
  budget = budgets.get(name, budgets["default"])
  return [
    f"graph '{name}' has {given[k]:,} {k}, its budget is {limit:,}" for k, limit in budget.items() if given[k] > limit
  ]

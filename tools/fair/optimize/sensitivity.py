"""What each layer costs in 8 bits: it alone is quantized, by arithmetic of our own on the float graph, and the outputs
are compared."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from tqdm import tqdm

from openpilot.selfdrive.modeld.fair.ort import ort
from openpilot.selfdrive.modeld.fair.runners.onnx import DISABLED
from openpilot.tools.fair.optimize.quantize import ACTIVATIONS, LAYERS, Calibrated, Target, shift_biases

Inputs = Sequence[dict[str, np.ndarray]]


@dataclass
class Source:
  """What 8 bits disturb: the values of a tensor, and the weights of the layer that says them, if one does. errors: what
  it alone does to each output, see errors()."""

  tensor: str
  layer: str | None
  errors: dict[str, float]

  @property
  def output(self) -> str:
    """The one that it hurts most."""
    return max(self.errors, key=lambda o: self.errors[o])


def channel_axis(node: onnx.NodeProto) -> int:
  """Of a layer's weights, along which each has a scale of its own."""
  return 0 if node.op_type == "Conv" else 1


def shapes_of(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
  shapes = {i.name: tuple(i.dims) for i in model.graph.initializer}
  for v in (*model.graph.input, *model.graph.value_info, *model.graph.output):
    shapes[v.name] = tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
  return shapes


def macs_of(model: onnx.ModelProto) -> dict[str, int]:
  """Multiply-accumulates of each node of LAYERS."""
  shapes, out = shapes_of(model), {}
  for node in model.graph.node:
    if node.op_type in LAYERS:
      x, w, y = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
      out[node.name] = int(np.prod(y if node.op_type == "Conv" else x) * np.prod(w[1:]))
  return out


def session_of(blob: bytes) -> Any:
  options = ort.SessionOptions()
  options.intra_op_num_threads, options.log_severity_level = 1, 3
  options.add_session_config_entry("session.set_denormal_as_zero", "1")
  return ort.InferenceSession(blob, options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED)


def run_all(blob: bytes, inputs: Inputs) -> list[dict[str, np.ndarray]]:
  """All outputs of a graph, one dict a frame."""
  session = session_of(blob)
  names = [o.name for o in session.get_outputs()]
  return [dict(zip(names, session.run(names, x), strict=True)) for x in inputs]


def errors(got: Inputs, want: Inputs) -> dict[str, float]:
  """Of each output: root mean square of the difference, in parts of its standard deviation over all frames."""
  out = {}
  for name in want[0]:
    a, b = (np.stack([x[name] for x in xs]).astype(np.float64) for xs in (got, want))
    out[name] = float(np.sqrt(np.mean((a - b) ** 2)) / max(float(b.std()), 1e-12))
  return out


def rounded(w: np.ndarray, axis: int, target: Target) -> np.ndarray:
  """Weights of each channel as 8 bits hold them, 7 of a narrow target: as ONNX Runtime's quantizer rounds them."""
  limit = target.limit
  rest = tuple(i for i in range(w.ndim) if i != axis or target.whole)
  scale = np.maximum(np.abs(w).max(axis=rest, keepdims=True) / limit, 1e-12)
  return (np.clip(np.rint(w / scale), -limit, limit) * scale).astype(np.float32)


def steps(low: float, high: float, target: Target) -> tuple[np.ndarray, np.ndarray]:
  """Scale and zero point of a tensor's range."""
  low, high = min(low, 0.0), max(high, 0.0)
  if target.symmetric:
    low, high = -max(-low, high), max(-low, high)
  scale = max((high - low) / (254 if target.symmetric else 255), 1e-12)
  kind = np.uint8 if target.activations == "uint8" else np.int8
  first = 0 if target.activations == "uint8" else -128
  zero = 0 if target.symmetric and first else round(first - low / scale)
  return np.array(scale, np.float32), np.array(zero, kind)


def rounded_tensors(model: onnx.ModelProto, nodes: Collection[str]) -> dict[str, str | None]:
  """nodes: a trunk(). -> tensors whose values are rounded where these are in 8 bits, and the layer that says each: of a
  layer with an activation what that says."""
  constants = {i.name for i in model.graph.initializer}
  constants |= {o for n in model.graph.node if n.op_type == "Constant" for o in n.output}
  users: dict[str, list[onnx.NodeProto]] = {}
  for n in model.graph.node:
    for i in n.input:
      users.setdefault(i, []).append(n)
  outputs = {o.name for o in model.graph.output}
  said_by: dict[str, str] = {}
  found: dict[str, str | None] = {}
  for n in model.graph.node:
    if n.name not in nodes:
      continue
    if n.op_type in LAYERS:
      said_by[n.output[0]] = n.name
    elif n.op_type in ACTIVATIONS and n.input[0] in said_by:
      said_by[n.output[0]] = said_by[n.input[0]]
    for t in (*n.input, *n.output):
      after = users.get(t, [])
      within = len(after) == 1 and after[0].op_type in ACTIVATIONS and after[0].name in nodes and t in said_by
      if t and t not in constants and t not in outputs and not within:
        found[t] = said_by.get(t)
  return found


def alone(
  calibrated: Calibrated, tensor: str, layer: str | None, target: Target, shift: np.ndarray | None = None
) -> bytes:
  """The float graph with one tensor's values rounded as 8 bits would, and the weights of the layer that says them.
  shift: of its bias."""
  model = onnx.ModelProto()
  model.CopyFrom(calibrated.model)
  mine = f"{tensor}.rounded"
  low, high = (float(np.asarray(v).reshape(-1)[0]) for v in calibrated.ranges[tensor].range_value)
  more = [f"{mine}.scale", f"{mine}.zero"]
  model.graph.initializer.extend(
    numpy_helper.from_array(v, k) for k, v in zip(more, steps(low, high, target), strict=True)
  )
  pair = [
    onnx.helper.make_node("QuantizeLinear", [tensor, *more], [f"{mine}.q"], name=f"{mine}.q"),
    onnx.helper.make_node("DequantizeLinear", [f"{mine}.q", *more], [mine], name=mine),
  ]
  at = 0
  for k, node in enumerate(model.graph.node):
    for n, i in enumerate(node.input):
      if i == tensor:
        node.input[n] = mine
    if tensor in node.output:
      at = k + 1
    if node.name == layer:
      weights = next(i for i in model.graph.initializer if i.name == node.input[1])
      w = rounded(numpy_helper.to_array(weights), channel_axis(node), target)
      model.graph.initializer.append(numpy_helper.from_array(w, f"{mine}.w"))
      node.input[1] = f"{mine}.w"
  if layer is not None and shift is not None:
    shift_biases(model, {layer: shift})
  nodes = list(model.graph.node)
  del model.graph.node[:]
  model.graph.node.extend([*nodes[:at], *pair, *nodes[at:]])
  return model.SerializeToString()


def sensitivity(
  calibrated: Calibrated,
  target: Target,
  inputs: Inputs,
  nodes: Collection[str],
  shifts: Mapping[str, np.ndarray] | None = None,
) -> list[Source]:
  """nodes: a trunk(). Of each tensor that is rounded there what it alone does."""
  want = run_all(calibrated.model.SerializeToString(), inputs)
  found = []
  for tensor, layer in tqdm(rounded_tensors(calibrated.model, nodes).items(), desc="tensors", unit="tensor"):
    shift = (shifts or {}).get(layer) if layer is not None else None
    got = run_all(alone(calibrated, tensor, layer, target, shift), inputs)
    found.append(Source(tensor, layer, errors(got, want)))
  return found

"""What each layer costs in 8 bits: it alone is quantized, by arithmetic of our own on the float graph, and the outputs
are compared."""

from collections.abc import Mapping, Sequence
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
MOVED = 32  # multiply-adds in whose time a value goes from 8 bits to float or back: about that on x86 with AVX512


@dataclass
class Layer:
  """macs: multiply-accumulates. values: that go in and come out. errors: what it alone does to each output, see
  errors()."""

  name: str
  macs: int
  values: int
  errors: dict[str, float]

  @property
  def saves(self) -> int:
    """What it saves in 8 bits, in multiply-adds."""
    return max(1, self.macs + MOVED * self.values)

  @property
  def output(self) -> str:
    """The one that it hurts most."""
    return max(self.errors, key=lambda o: self.errors[o])


def channel_axis(node: onnx.NodeProto) -> int:
  """Of a layer's weights, along which each has a scale of its own."""
  return 0 if node.op_type == "Conv" else 1


def work_of(model: onnx.ModelProto) -> dict[str, tuple[int, int]]:
  """Of each node of LAYERS its multiply-accumulates, and how many values go in and come out."""
  shapes = {i.name: tuple(i.dims) for i in model.graph.initializer}
  for v in (*model.graph.input, *model.graph.value_info, *model.graph.output):
    shapes[v.name] = tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
  out = {}
  for node in model.graph.node:
    if node.op_type in LAYERS:
      x, w, y = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
      macs = np.prod(y if node.op_type == "Conv" else x) * np.prod(w[1:])
      out[node.name] = int(macs), int(np.prod(x) + np.prod(y))
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
  limit = 64 if target.narrow else 127
  rest = tuple(i for i in range(w.ndim) if i != axis)
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


def behind(model: onnx.ModelProto, node: onnx.NodeProto) -> str:
  """The tensor that a layer's values are rounded in: behind the activation that is computed with it."""
  name = node.output[0]
  while True:
    users = [n for n in model.graph.node if name in n.input]
    if len(users) != 1 or users[0].op_type not in ACTIVATIONS:
      return name
    name = users[0].output[0]


def alone(calibrated: Calibrated, name: str, target: Target, shift: np.ndarray | None = None) -> bytes:
  """The float graph with one layer's weights, what goes into it and what comes out rounded as 8 bits would. shift: of
  its bias. What is an output of the graph is not rounded."""
  model = onnx.ModelProto()
  model.CopyFrom(calibrated.model)
  node = next(n for n in model.graph.node if n.name == name)
  weights = next(i for i in model.graph.initializer if i.name == node.input[1])
  out = behind(model, node)
  mine = f"{name}.rounded"
  model.graph.initializer.append(
    numpy_helper.from_array(rounded(numpy_helper.to_array(weights), channel_axis(node), target), f"{mine}.w")
  )
  if shift is not None:
    shift_biases(model, {name: shift})

  def pair(tensor: str, tag: str) -> list[onnx.NodeProto]:
    low, high = (float(np.asarray(v).reshape(-1)[0]) for v in calibrated.ranges[tensor].range_value)
    more = [f"{tag}.scale", f"{tag}.zero"]
    model.graph.initializer.extend(
      numpy_helper.from_array(v, k) for k, v in zip(more, steps(low, high, target), strict=True)
    )
    return [
      onnx.helper.make_node("QuantizeLinear", [tensor, *more], [f"{tag}.q"], name=f"{tag}.q"),
      onnx.helper.make_node("DequantizeLinear", [f"{tag}.q", *more], [f"{tag}.x"], name=f"{tag}.x"),
    ]

  pairs = {node.input[0]: pair(node.input[0], mine)}
  if out in calibrated.ranges and out not in {o.name for o in model.graph.output}:
    for user in model.graph.node:
      for k, i in enumerate(user.input):
        if i == out:
          user.input[k] = f"{mine}.out.x"
    pairs[out] = pair(out, f"{mine}.out")
  node.input[0], node.input[1] = f"{mine}.x", f"{mine}.w"
  nodes = []
  for n in list(model.graph.node):
    nodes.append(n)
    for o in n.output:
      nodes += pairs.pop(o, [])
  nodes = [*[n for rest in pairs.values() for n in rest], *nodes]  # of what goes into the graph
  del model.graph.node[:]
  model.graph.node.extend(nodes)
  return model.SerializeToString()


def sensitivity(
  calibrated: Calibrated,
  target: Target,
  inputs: Inputs,
  names: Sequence[str],
  shifts: Mapping[str, np.ndarray] | None = None,
) -> list[Layer]:
  """Of each of these layers what it alone does in 8 bits."""
  work = work_of(calibrated.model)
  want = run_all(calibrated.model.SerializeToString(), inputs)
  found = []
  for name in tqdm(names, desc="layers", unit="layer"):
    got = run_all(alone(calibrated, name, target, (shifts or {}).get(name)), inputs)
    found.append(Layer(name, *work[name], errors(got, want)))
  return found

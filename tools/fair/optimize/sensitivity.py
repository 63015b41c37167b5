"""What each layer costs in 8 bits: it alone is quantized, by arithmetic of our own on the float graph, and the outputs
are compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from tqdm import tqdm

from openpilot.selfdrive.modeld.fair.ort import ort
from openpilot.selfdrive.modeld.fair.runners.onnx import DISABLED
from openpilot.tools.fair.optimize.quantize import LAYERS, Calibrated, Target

Inputs = Sequence[dict[str, np.ndarray]]


@dataclass
class Layer:
  """error: what it does to the worst output, see errors(). macs: multiply-accumulates."""

  name: str
  macs: int
  error: float
  output: str

  @property
  def price(self) -> float:
    return self.error / max(1, self.macs)


def macs_of(model: onnx.ModelProto) -> dict[str, int]:
  """Multiply-accumulates of each node of LAYERS."""
  shapes = {i.name: tuple(i.dims) for i in model.graph.initializer}
  for v in (*model.graph.input, *model.graph.value_info, *model.graph.output):
    shapes[v.name] = tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
  out = {}
  for node in model.graph.node:
    if node.op_type in LAYERS:
      x, w, y = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
      out[node.name] = int(np.prod(y) * np.prod(w[1:]) if node.op_type == "Conv" else np.prod(x) * np.prod(w[1:]))
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
  """Weights of each channel as 8 bits hold them, 7 of a narrow target."""
  limit = 63 if target.narrow else 127
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


def alone(calibrated: Calibrated, name: str, target: Target) -> bytes:
  """The float graph with one layer's weights and what goes into it rounded as 8 bits would."""
  model = onnx.ModelProto()
  model.CopyFrom(calibrated.model)
  at, node = next((i, n) for i, n in enumerate(model.graph.node) if n.name == name)
  weights = next(i for i in model.graph.initializer if i.name == node.input[1])
  axis = 0 if node.op_type == "Conv" else 1
  mine = f"{name}.rounded"
  model.graph.initializer.append(
    numpy_helper.from_array(rounded(numpy_helper.to_array(weights), axis, target), f"{mine}.w")
  )
  low, high = (float(np.asarray(v).reshape(-1)[0]) for v in calibrated.ranges[node.input[0]].range_value)
  scale, zero = steps(low, high, target)
  model.graph.initializer.extend(
    [numpy_helper.from_array(scale, f"{mine}.scale"), numpy_helper.from_array(zero, f"{mine}.zero")]
  )
  more = [f"{mine}.scale", f"{mine}.zero"]
  pair = [
    onnx.helper.make_node("QuantizeLinear", [node.input[0], *more], [f"{mine}.q"], name=f"{mine}.q"),
    onnx.helper.make_node("DequantizeLinear", [f"{mine}.q", *more], [f"{mine}.x"], name=f"{mine}.x"),
  ]
  node.input[0], node.input[1] = f"{mine}.x", f"{mine}.w"
  nodes = list(model.graph.node)
  del model.graph.node[:]
  model.graph.node.extend([*nodes[:at], *pair, *nodes[at:]])
  return model.SerializeToString()


def sensitivity(calibrated: Calibrated, target: Target, inputs: Inputs, names: Sequence[str]) -> list[Layer]:
  """Each of these layers, the one that costs most for what it saves first."""
  macs = macs_of(calibrated.model)
  want = run_all(calibrated.model.SerializeToString(), inputs)
  found = []
  for name in tqdm(names, desc="layers", unit="layer"):
    apart = errors(run_all(alone(calibrated, name, target), inputs), want)
    worst = max(apart, key=lambda o: apart[o])
    found.append(Layer(name, macs[name], apart[worst], worst))
  return sorted(found, key=lambda x: -x.price)

"""A graph in half precision: convolutions and what lies between them compute in float16; normalization, attention,
coordinates, and what float16 does not hold stay float32. For GPUs, TensorRT and tinygrad: ONNX Runtime has no such
kernels for x86, it computes in float32 between casts, as fast as ever, and rounds nothing. So what is judged here is
another graph, emulated(), which rounds each tensor as float16 does."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from openpilot.tools.fair.optimize.quantize import drop_unused, plain, trunk
from openpilot.tools.fair.optimize.sensitivity import Inputs, run_all

LARGEST = 65504.0  # that float16 holds
ROOM = 2.0  # times what frames that calibrate reach: others may reach more
FLOATS = ("Resize",)  # whose constants are float32 by ONNX's definition
KEPT = ("MatMul", "Gemm", "Softmax", "LayerNormalization", "InstanceNormalization", "BatchNormalization")


@dataclass
class Halves:
  """inside: nodes that compute in float16. over: nodes that would, and the largest of what they take and say, which is
  too large."""

  inside: list[str]
  over: dict[str, float]


def constants_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
  found = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
  for node in model.graph.node:
    if node.op_type == "Constant" and node.attribute[0].name == "value":
      found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
  return found


def peaks(model: onnx.ModelProto, tensors: Sequence[str], inputs: Inputs) -> dict[str, float]:
  """The largest absolute value of each tensor over all frames; inf where one is not finite."""
  asked = onnx.ModelProto()
  asked.CopyFrom(model)
  del asked.graph.output[:]
  for t in tensors:
    asked.graph.node.extend(
      [
        helper.make_node("Abs", [t], [f"{t}.abs"], name=f"{t}.abs"),
        helper.make_node("ReduceMax", [f"{t}.abs"], [f"{t}.peak"], name=f"{t}.peak", keepdims=0),
      ]
    )
    asked.graph.output.append(helper.make_tensor_value_info(f"{t}.peak", TensorProto.FLOAT, []))
  found = run_all(asked.SerializeToString(), inputs) if tensors else []
  values = {t: max(float(x[f"{t}.peak"]) for x in found) for t in tensors}
  return {t: v if np.isfinite(v) else np.inf for t, v in values.items()}


def halves(model: onnx.ModelProto, inputs: Inputs) -> Halves:
  """model: as of quantize.prepare(). inputs: of it, at frames that calibrate."""
  constants = constants_of(model)
  names = set(trunk(model))
  nodes = [n for n in model.graph.node if n.name in names]
  tensors = {n.name: [t for t in (*n.input, *n.output) if t and t not in constants] for n in nodes}
  most = peaks(model, sorted({t for ts in tensors.values() for t in ts}), inputs)
  most |= {k: float(np.abs(v).max(initial=0)) for k, v in constants.items() if v.dtype == np.float32}
  inside, over = [], {}
  for n in nodes:
    mine = tensors[n.name] if n.op_type in FLOATS else [t for t in (*n.input, *n.output) if t in most]
    reached = max(most[t] for t in mine)
    if reached * ROOM > LARGEST:
      over[n.name] = reached
    else:
      inside.append(n.name)
  return Halves(inside, over)


def rewrite(model: onnx.ModelProto, inside: Collection[str], emulate: bool) -> onnx.ModelProto:
  out = onnx.ModelProto()
  out.CopyFrom(model)
  constants, names = constants_of(model), set(inside)
  made = {o for n in model.graph.node if n.name in names for o in n.output}
  wanted = {i for n in model.graph.node if n.name not in names for i in n.input}
  wanted |= {o.name for o in model.graph.output}
  nodes: list[onnx.NodeProto] = []
  ready: set[str] = set()  # tensors and constants of which there is a half by now

  def cast(source: str, to: str, kind: int) -> None:
    nodes.append(helper.make_node("Cast", [source], [to], name=f"{to}.cast", to=kind))

  def half_of(name: str) -> str:
    half = f"{name}.half"
    if name not in ready:
      ready.add(name)
      if name in constants:
        value = constants[name].astype(np.float16)
        out.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32) if emulate else value, half))
      else:
        rounded(name, half)
    return half

  def rounded(name: str, half: str) -> None:
    """half: what nodes of float16 take of a float32 tensor."""
    cast(name, half if not emulate else f"{name}.16", TensorProto.FLOAT16)
    if emulate:
      cast(f"{name}.16", half, TensorProto.FLOAT)

  for node in list(out.graph.node):
    if node.name not in names:
      nodes.append(node)
      continue
    for k, i in enumerate(node.input):
      floats = i in constants and (constants[i].dtype != np.float32 or node.op_type in FLOATS)
      if i and not floats:
        node.input[k] = half_of(i)
    said = list(node.output)
    for k, o in enumerate(said):
      node.output[k] = f"{o}.whole" if emulate else f"{o}.half"
    nodes.append(node)
    for o in said:
      ready.add(o)
      if emulate:
        rounded(f"{o}.whole", f"{o}.half")
      if o in wanted:
        cast(f"{o}.half", o, TensorProto.FLOAT)
  kept = [v for v in out.graph.value_info if v.name not in made]
  del out.graph.value_info[:], out.graph.node[:]
  out.graph.value_info.extend(kept)
  out.graph.node.extend(nodes)
  drop_unused(out)
  return out


def half(model: onnx.ModelProto, inside: Collection[str]) -> bytes:
  """The file of the graph in which these nodes compute in float16."""
  return plain(rewrite(model, inside, False))


def emulated(model: onnx.ModelProto, inside: Collection[str]) -> bytes:
  """The file of a float32 graph that rounds what these nodes take and say, their weights too, to float16, for ONNX
  Runtime on a CPU. Sums within a layer are of float32, as GPUs' are."""
  return plain(rewrite(model, inside, True))

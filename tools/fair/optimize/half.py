"""A graph that computes in float16, by casts in the graph itself: what TensorRT 11, whose networks keep their types,
wants in place of a builder's flag. ONNX Runtime has no such kernels for x86: it computes these files in float32 between
casts, as fast as ever, and rounds nothing. What they lose is judged by another graph, emulated()."""

from collections.abc import Iterable, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from openpilot.tools.fair.optimize.quantize import NEVER, plain, trunk
from openpilot.tools.fair.optimize.sensitivity import Inputs, run_all
from openpilot.tools.fair.students.onnx_pads import drop_unused

LARGEST = float(np.finfo(np.float16).max)
ROOM = 2.0  # times what frames that calibrate reach: others may reach more
FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
# of any network: what sums many numbers, or divides by small ones
SENSITIVE = ("Softmax", "LayerNormalization", "InstanceNormalization", "ReduceMean", "ReduceSum", "Pow", "Sqrt", "Exp")
# what makes numbers of no others, or has bodies of its own
NEVER_HALF = (
  "Cast",
  "Constant",
  "ConstantOfShape",
  "CumSum",
  "If",
  "Loop",
  "NonMaxSuppression",
  "Range",
  "Scan",
  "TopK",
)
KEPT = {"Resize": (1, 2)}  # inputs that are float32 whatever the node computes in


def kinds(model: onnx.ModelProto) -> dict[str, int]:
  """Type of each tensor of a prepared graph."""
  out = {
    v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.value_info, *model.graph.output)
  }
  return out | {i.name: i.data_type for i in model.graph.initializer}


def too_large(model: onnx.ModelProto) -> set[str]:
  """Nodes with a weight that float16 does not hold."""
  large = {
    i.name
    for i in model.graph.initializer
    if i.data_type == FLOAT and np.abs(numpy_helper.to_array(i)).max(initial=0) > LARGEST
  }
  return {n.name for n in model.graph.node if large & set(n.input)}


def computing(model: onnx.ModelProto, leave: Iterable[str]) -> set[str]:
  """Nodes that compute in float16 where these are left."""
  left = {*leave, *too_large(model)}
  return {n.name for n in model.graph.node if n.name not in left and n.op_type not in NEVER_HALF}


def half(model: onnx.ModelProto, leave: Iterable[str]) -> bytes:
  """model: prepared (quantize.py). -> its file, in float16 but for the nodes that are left; inputs and outputs keep
  their types. Whatever is left takes what it took before, not what came through float16."""
  out, kind = onnx.ModelProto(), kinds(model)
  out.CopyFrom(model)
  weights, mine = {i.name: i for i in model.graph.initializer}, computing(model, leave)
  # first in float16, as NAME.half
  made = {o for n in out.graph.node for o in n.output if n.name in mine and kind.get(o) == FLOAT}
  rest = {i for n in out.graph.node if n.name not in mine for i in n.input} | {o.name for o in model.graph.output}
  known, nodes = set(made), []

  def halved(name: str) -> str:
    if name not in known:
      known.add(name)
      if name in weights:
        array = numpy_helper.to_array(weights[name]).astype(np.float16)
        out.graph.initializer.append(numpy_helper.from_array(array, f"{name}.half"))
      else:
        nodes.append(onnx.helper.make_node("Cast", [name], [f"{name}.half"], name=f"{name}.to_half", to=HALF))
    return f"{name}.half"

  for node in out.graph.node:
    if node.name not in mine:
      nodes.append(node)
      continue
    for k, name in enumerate(node.input):
      if kind.get(name) == FLOAT and k not in KEPT.get(node.op_type, ()):
        node.input[k] = halved(name)
    after = [o for o in node.output if o in made]
    for k, name in enumerate(node.output):
      if name in made:
        node.output[k] = f"{name}.half"
    nodes.append(node)
    nodes += [
      onnx.helper.make_node("Cast", [f"{o}.half"], [o], name=f"{o}.from_half", to=FLOAT) for o in after if o in rest
    ]
  return with_nodes(out, nodes)


def emulated(model: onnx.ModelProto, leave: Iterable[str]) -> bytes:
  """The file of a float32 graph that says, also on a CPU, what half()'s says on a GPU: what its nodes of float16 take
  and say, weights too, is rounded by casts to float16 and back, which ONNX Runtime keeps. Sums within a node are of
  float32."""
  out, kind = onnx.ModelProto(), kinds(model)
  out.CopyFrom(model)
  weights, mine = {i.name: i for i in model.graph.initializer}, computing(model, leave)
  made = {o for n in out.graph.node for o in n.output if n.name in mine and kind.get(o) == FLOAT}
  ends = {o.name for o in model.graph.output}
  known, nodes = set[str](), []

  def casts(name: str, to: str) -> list[onnx.NodeProto]:
    there = onnx.helper.make_node("Cast", [name], [f"{to}.16"], name=f"{to}.to_half", to=HALF)
    return [there, onnx.helper.make_node("Cast", [f"{to}.16"], [to], name=f"{to}.from_half", to=FLOAT)]

  def rounded(name: str) -> str:
    if name in made and name in ends:  # it is so itself
      return name
    if name not in known:
      known.add(name)
      if name in weights:
        array = numpy_helper.to_array(weights[name]).astype(np.float16).astype(np.float32)
        out.graph.initializer.append(numpy_helper.from_array(array, f"{name}.rounded"))
      else:
        nodes.extend(casts(name, f"{name}.rounded"))
    return f"{name}.rounded"

  for node in out.graph.node:
    takes = node.name in mine
    for k, name in enumerate(node.input):
      if kind.get(name) == FLOAT and (name in made or (takes and k not in KEPT.get(node.op_type, ()))):
        node.input[k] = rounded(name)
    nodes.append(node)
    for k, name in enumerate(node.output):
      if name in made and name in ends:
        node.output[k] = f"{name}.whole"
        nodes.extend(casts(f"{name}.whole", name))
  return with_nodes(out, nodes)


def peaks(model: onnx.ModelProto, tensors: Sequence[str], inputs: Inputs) -> dict[str, float]:
  """The largest absolute value of each tensor over all frames; inf where one is not finite."""
  asked = onnx.ModelProto()
  asked.CopyFrom(model)
  del asked.graph.output[:]
  for t in tensors:
    asked.graph.node.append(onnx.helper.make_node("Abs", [t], [f"{t}.abs"], name=f"{t}.abs"))
    peak = onnx.helper.make_node("ReduceMax", [f"{t}.abs"], [f"{t}.peak"], name=f"{t}.peak", keepdims=0)
    asked.graph.node.append(peak)
    asked.graph.output.append(onnx.helper.make_tensor_value_info(f"{t}.peak", FLOAT, []))
  found = run_all(asked.SerializeToString(), inputs) if tensors else []
  values = {t: max(float(x[f"{t}.peak"]) for x in found) for t in tensors}
  return {t: v if np.isfinite(v) else np.inf for t, v in values.items()}


def overflowing(model: onnx.ModelProto, leave: Iterable[str], inputs: Inputs) -> dict[str, float]:
  """inputs: of the graph, at frames that calibrate. -> of the nodes that would compute in float16 those that take or
  say values beyond it, with ROOM, and the largest of them."""
  kind, mine = kinds(model), computing(model, leave)
  weights = {i.name for i in model.graph.initializer}
  nodes = [n for n in model.graph.node if n.name in mine]
  tensors = {n.name: [t for t in (*n.input, *n.output) if kind.get(t) == FLOAT and t not in weights] for n in nodes}
  most = peaks(model, sorted({t for ts in tensors.values() for t in ts}), inputs)
  reached = {name: max((most[t] for t in ts), default=0.0) for name, ts in tensors.items()}
  return {name: v for name, v in reached.items() if v * ROOM > LARGEST}


def with_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> bytes:
  """The file of a graph of these nodes, and of the weights that they take alone."""
  copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
  del model.graph.node[:], model.graph.value_info[:]
  model.graph.node.extend(copies)
  drop_unused(model)
  return plain(model)


def outside(model: onnx.ModelProto, last: Iterable[str]) -> dict[str, list[str]]:
  """Of a student's graph, reason -> nodes that stay float32: all but convolutions and what lies between them, as in 8
  bits. A coordinate of 400 pixels has steps of a quarter in float16."""
  mine = set(trunk(model, last))
  rest = [n for n in model.graph.node if n.name not in mine and n.op_type != "Constant"]
  return {
    "a last layer: what it says is the answer itself": sorted(last),
    "a product of attention or of coordinates": [n.name for n in rest if n.op_type in NEVER],
    "computes with coordinates, scores or attention": [
      n.name for n in rest if n.op_type not in NEVER and n.name not in set(last)
    ],
  }


def teachers(model: onnx.ModelProto) -> list[str]:
  """Of any other network, the nodes that stay float32."""
  return [n.name for n in model.graph.node if n.op_type in SENSITIVE]

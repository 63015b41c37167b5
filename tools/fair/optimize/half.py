"""A graph that computes in float16, by casts in the graph itself: what TensorRT 11, whose networks keep their types,
wants in place of a builder's flag."""

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import numpy_helper

from openpilot.tools.fair.optimize.quantize import NEVER, plain, trunk

LARGEST = float(np.finfo(np.float16).max)
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


def half(model: onnx.ModelProto, leave: Iterable[str]) -> bytes:
  """model: prepared (quantize.py). -> its file, in float16 but for the nodes that are left; inputs and outputs keep
  their types. Whatever is left takes what it took before, not what came through float16."""
  out, kind = onnx.ModelProto(), kinds(model)
  out.CopyFrom(model)
  left = {*leave, *too_large(model)}
  weights = {i.name: i for i in model.graph.initializer}
  mine = {n.name for n in out.graph.node if n.name not in left and n.op_type not in NEVER_HALF}
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


def with_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> bytes:
  """The file of a graph of these nodes, and of the weights that they take alone."""
  copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
  del model.graph.node[:], model.graph.value_info[:]
  model.graph.node.extend(copies)
  taken = {i for n in copies for i in n.input}
  kept = [i for i in model.graph.initializer if i.name in taken]
  del model.graph.initializer[:]
  model.graph.initializer.extend(kept)
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

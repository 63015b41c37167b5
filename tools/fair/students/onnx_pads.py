"""Zeros around a picture as the padding of the convolutions behind them, in an exported graph."""

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

# what the exporters count the zeros by, of constants alone; none gives more numbers than go in, but by its own count
COUNTING = ("Cast", "Concat", "ConstantOfShape", "Reshape", "Slice", "Transpose")
SMALL = 64  # numbers, of a constant that is counted with


def small_constants(model: onnx.ModelProto, wanted: set[str]) -> dict[str, np.ndarray]:
  """Values of initializers, Constants and what is counted of them, as far as `wanted` tensors are of them; none larger
  than SMALL."""
  known = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer if np.prod(i.dims) <= SMALL}
  wanted = set(wanted)
  for node in reversed(model.graph.node):
    if wanted & set(node.output) and node.op_type in COUNTING:
      wanted |= set(node.input)
  for node in model.graph.node:  # in order: what goes in was there before
    if not wanted & set(node.output):
      continue
    if node.op_type == "Constant" and node.attribute[0].name == "value":
      value = numpy_helper.to_array(node.attribute[0].t)
    elif node.op_type in COUNTING and all(i in known for i in node.input if i):
      if node.op_type == "ConstantOfShape" and not 0 <= np.prod(known[node.input[0]], dtype=float) <= SMALL:
        continue
      value = one_node(model, node, {i: known[i] for i in node.input if i})
    else:
      continue
    if value.size <= SMALL:
      known[node.output[0]] = value
  return known


def one_node(model: onnx.ModelProto, node: onnx.NodeProto, inputs: dict[str, np.ndarray]) -> np.ndarray:
  info = [
    onnx.helper.make_tensor_value_info(k, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
    for k, v in inputs.items()
  ]
  out = onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.UNDEFINED, None)
  graph = onnx.helper.make_graph([node], "one", info, [out])
  whole: Any = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=model.opset_import))
  return np.asarray(whole.run(None, inputs)[0])


def fold_pads(model: onnx.ModelProto) -> int:
  """Zeros that a Pad puts around a picture become the padding of the convolutions behind it: the same numbers, and
  ONNX Runtime, which keeps channels in blocks of its own around convolutions, does not put the picture into order and
  back for them. -> how many Pads are gone."""
  pads = [n for n in model.graph.node if n.op_type == "Pad"]
  if not pads:
    return 0
  constants = small_constants(model, {i for pad in pads for i in pad.input[1:] if i})
  outputs = {o.name for o in model.graph.output}
  outputs |= {i for n in model.graph.node for a in n.attribute for m in a.g.node for i in m.input}  # of branches
  gone = 0
  for pad in pads:
    mode = next((a.s for a in pad.attribute if a.name == "mode"), b"constant")
    known = len(pad.input) in (2, 3) and all(i in constants for i in pad.input[1:] if i)
    users = [n for n in model.graph.node if pad.output[0] in n.input]
    if mode != b"constant" or not known or pad.output[0] in outputs or any(n.op_type != "Conv" for n in users):
      continue
    around = constants[pad.input[1]].reshape(2, -1)
    zero = len(pad.input) < 3 or not pad.input[2] or not np.any(constants[pad.input[2]])
    plain_users = all(
      n.input[0] == pad.output[0] and not any(a.name == "auto_pad" and a.s != b"NOTSET" for a in n.attribute)
      for n in users
    )
    if not zero or not plain_users or np.any(around < 0) or np.any(around[:, :2]):
      continue
    for conv in users:
      had = next((a.ints for a in conv.attribute if a.name == "pads"), [0] * (around.shape[1] - 2) * 2)
      attributes = [a for a in conv.attribute if a.name != "pads"]
      sums = [int(a + b) for a, b in zip(had, around[:, 2:].reshape(-1), strict=True)]
      del conv.attribute[:]
      conv.attribute.extend([*attributes, onnx.helper.make_attribute("pads", sums)])
      conv.input[0] = pad.input[0]
    model.graph.node.remove(pad)
    gone += 1
  if gone:
    drop_unused(model)
  return gone


def drop_unused(model: onnx.ModelProto) -> None:
  """Takes out nodes and constants that nothing takes; of a graph with others inside, whose nodes may take them,
  none."""
  if any(a.HasField("g") for n in model.graph.node for a in n.attribute):
    return
  used = {o.name for o in model.graph.output}
  nodes = []
  for node in reversed(model.graph.node):
    if used & set(node.output):
      nodes.append(node)
      used |= set(node.input)
  kept = [i for i in model.graph.initializer if i.name in used]
  del model.graph.node[:], model.graph.initializer[:]
  model.graph.node.extend(nodes[::-1])
  model.graph.initializer.extend(kept)

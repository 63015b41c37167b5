"""Classes that nobody asks for are left out of a network's graph before it runs."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper


def yolox_classes(model: onnx.ModelProto, output: str, classes: list[int]) -> bool:
  """Cuts (T, A, 5 + C) down to the columns of `classes`, in their order, where the last convolutions make them: a
  value's own arithmetic is not touched. False, and nothing is changed, where the graph does not end as YOLOX's does:
  [box, sigmoid(objectness), sigmoid(classes)] of each grid, put together."""
  graph = model.graph
  makers = {o: n for n in graph.node for o in n.output}
  constants = {t.name: t for t in graph.initializer}
  uses = [i for n in graph.node for i in n.input]

  def up(name: str, kind: str, **attributes: Any) -> onnx.NodeProto:
    node = makers.get(name)
    if node is None or node.op_type != kind or (name != output and uses.count(name) != 1):
      raise LookupError(name)
    said = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if any(said.get(k) != v for k, v in attributes.items()):
      raise LookupError(name)
    return node

  def own(name: str) -> onnx.TensorProto:
    if name not in constants or uses.count(name) != 1:
      raise LookupError(name)
    return constants[name]

  def cuts() -> Iterator[tuple[onnx.TensorProto, np.ndarray]]:
    """Constants and what they become."""
    for grid in up(up(output, "Transpose", perm=[0, 2, 1]).input[0], "Concat", axis=2).input:
      flat = up(grid, "Reshape")
      parts = up(flat.input[0], "Concat", axis=1).input
      conv = up(up(parts[-1], "Sigmoid").input[0], "Conv", group=1)
      shape, weights = own(flat.input[1]), [own(i) for i in conv.input[1:]]
      whole, count = numpy_helper.to_array(shape).copy(), weights[0].dims[0]
      if len(parts) != 3 or len(whole) != 3 or whole[1] != 5 + count or max(classes) >= count:
        raise LookupError(grid)
      whole[1] = 5 + len(classes)
      yield shape, whole
      for w in weights:
        yield w, numpy_helper.to_array(w)[classes]

  try:
    done = list(cuts())
  except LookupError:
    return False
  for tensor, value in done:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), tensor.name))
  for value in graph.output:
    if value.name == output and len(value.type.tensor_type.shape.dim) == 3:
      value.type.tensor_type.shape.dim[2].dim_value = 5 + len(classes)
  del graph.value_info[:]  # says the old shapes
  return True

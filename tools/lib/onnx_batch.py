"""The batch axis of ONNX graphs."""

import onnx
from onnx import numpy_helper


def free_batch(model: onnx.ModelProto) -> onnx.ModelProto:
  """A graph exported for one image -> for any number: the first axis of inputs and outputs, and of reshapes that wrote
  it down as 1."""
  for value in [*model.graph.input, *model.graph.output]:
    dims = value.type.tensor_type.shape.dim
    if len(dims) and dims[0].dim_value == 1:
      dims[0].dim_param = "batch"
  constants: dict[str, onnx.TensorProto] = {t.name: t for t in model.graph.initializer}
  constants.update(
    {n.output[0]: a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"}
  )
  for node in model.graph.node:
    if node.op_type == "Reshape" and node.input[1] in constants:
      shape = numpy_helper.to_array(constants[node.input[1]]).copy()
      if shape.size > 1 and shape[0] == 1:
        shape[0] = 0  # as the input has it
        constants[node.input[1]].CopyFrom(numpy_helper.from_array(shape, constants[node.input[1]].name))
  del model.graph.value_info[:]  # says the old shapes
  return model

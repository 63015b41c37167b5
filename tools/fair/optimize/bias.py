"""What rounded weights add to a layer's mean, and is taken off its bias again. Values behind a ReLU are all positive:
rounding errors of weights do not cancel out but move each channel as a whole. Of mobile networks, whose depthwise
layers have nine weights a channel, this is most of what 8 bits cost."""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from openpilot.tools.fair.optimize.quantize import Calibrated, Target
from openpilot.tools.fair.optimize.sensitivity import Inputs, channel_axis, rounded, run_all


def shifts(calibrated: Calibrated, target: Target, inputs: Inputs, names: Sequence[str]) -> dict[str, np.ndarray]:
  """inputs: of the graph, at frames that calibrate. -> by layer (channels,) float32, to add to its bias: the mean of
  what its float weights give more than its rounded ones, over the frames and the picture."""
  model = onnx.ModelProto()
  model.CopyFrom(calibrated.model)
  weights = {i.name: i for i in model.graph.initializer}
  twins, said = [], []
  for node in [n for n in model.graph.node if n.name in set(names)]:
    w = numpy_helper.to_array(weights[node.input[1]])
    apart = (w - rounded(w, channel_axis(node), target)).astype(np.float32)
    mine = f"{node.name}.apart"
    model.graph.initializer.append(numpy_helper.from_array(apart, f"{mine}.w"))
    twin = onnx.NodeProto()
    twin.CopyFrom(node)
    twin.name = mine
    del twin.input[1:], twin.output[:]
    twin.input.append(f"{mine}.w")
    twin.output.append(mine)
    twins += [twin, onnx.helper.make_node("GlobalAveragePool", [mine], [f"{mine}.mean"], name=f"{mine}.mean")]
    said.append(onnx.helper.make_tensor_value_info(f"{mine}.mean", onnx.TensorProto.FLOAT, None))
  if not said:
    return {}
  model.graph.node.extend(twins)
  del model.graph.output[:]
  model.graph.output.extend(said)
  found = run_all(model.SerializeToString(), inputs)
  return {
    o.name.removesuffix(".apart.mean"): np.mean([x[o.name].reshape(-1) for x in found], 0).astype(np.float32)
    for o in said
  }

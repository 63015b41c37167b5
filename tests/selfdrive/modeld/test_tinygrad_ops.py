"""Operators that tinygrad is given in place of its own, beside ONNX Runtime."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from openpilot.selfdrive.modeld.fair.runners.onnx import open_session
from openpilot.selfdrive.modeld.fair.runners.tinygrad_ops import improve

pytest.importorskip("tinygrad", reason="tinygrad is not installed")


def network(path, kernel, bias, group=1, **said):
  """x -> y: one ConvTranspose."""
  r = np.random.default_rng(0)
  weights = [numpy_helper.from_array(r.normal(size=(4, 3, *kernel)).astype(np.float32), "w")]
  if bias:
    weights.append(numpy_helper.from_array(r.normal(size=3 * group).astype(np.float32), "b"))
  node = helper.make_node("ConvTranspose", ["x", "w", *(["b"] if bias else [])], ["y"], group=group, **said)
  ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 4, 3, 5]), ("y", None))]
  graph = helper.make_graph([node], "up", ends[:1], ends[1:], weights)
  onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
  return path


@pytest.mark.parametrize(
  "kernel, bias, said, ours",
  [
    ((2, 2), True, {"strides": [2, 2]}, True),
    ((2, 2), False, {"strides": [2, 2], "kernel_shape": [2, 2], "pads": [0, 0, 0, 0], "dilations": [1, 1]}, True),
    ((2, 3), True, {"strides": [2, 3], "auto_pad": "VALID"}, True),
    ((3, 3), True, {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}, False),
    ((2, 2), True, {"strides": [1, 1]}, False),
    ((2, 2), True, {"strides": [2, 2], "pads": [1, 1, 1, 1]}, False),
    ((2, 2), True, {"strides": [2, 2], "output_padding": [1, 1]}, False),
    ((2, 2), True, {"strides": [2, 2], "group": 2}, False),
  ],
)
def test_a_transposed_convolution_is_onnx_runtimes(tmp_path, kernel, bias, said, ours):
  from tinygrad import Tensor
  from tinygrad.nn.onnx import OnnxRunner

  path = network(tmp_path / "up.onnx", kernel, bias, **said)
  x = np.random.default_rng(1).normal(size=(1, 4, 3, 5)).astype(np.float32)
  (want,) = open_session(path.read_bytes(), 1).run(None, {"x": x})
  net, asked = OnnxRunner(str(path)), []
  own = net.onnx_ops["ConvTranspose"]

  def counted(*args, **more):
    asked.append(args)
    return own(*args, **more)

  net.onnx_ops = {**net.onnx_ops, "ConvTranspose": counted}
  got = improve(net).to("PYTHON")({"x": Tensor(x, device="PYTHON")})["y"].numpy()
  assert got.shape == want.shape and bool(asked) is not ours
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)  # sums of 4 to 36 products of numbers near 1, in any order


def test_a_runner_of_another_time_is_left_as_it_is():
  class Old:
    pass

  assert not vars(improve(Old()))

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


def product(path, matrix, bias=None, turned=False, shape=(5, None)):
  """x -> y: one product with a constant."""
  shape = [n if n else matrix.shape[0] for n in shape]
  stored = [numpy_helper.from_array(np.ascontiguousarray(matrix.T if turned else matrix), "w")]
  if bias is not None:
    stored.append(numpy_helper.from_array(bias, "b"))
  names = ["x", *(i.name for i in stored)]
  node = helper.make_node("Gemm", names, ["y"], transB=int(turned)) if bias is not None else None
  node = node or helper.make_node("MatMul", names, ["y"])
  ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shape), ("y", None))]
  graph = helper.make_graph([node], "product", ends[:1], ends[1:], stored)
  onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
  return path, shape


EYE = np.eye(3, dtype=np.float32)
ONE = np.ones((1, 4), np.float32)


@pytest.mark.parametrize(
  "matrix, op",
  [
    (np.kron(EYE, ONE), "Picked"),  # 0 0 0 0 1 1 1 1 2 2 2 2
    (np.kron(ONE, EYE), "Picked"),  # 0 1 2 0 1 2 0 1 2 0 1 2
    (np.kron(ONE, np.kron(EYE, ONE)), "Picked"),
    (np.concatenate([np.kron(EYE, ONE), np.kron(ONE[:, :1], np.kron(ONE, EYE))]), "Picked"),  # the sum of two
    (np.kron(EYE, ONE) * np.arange(1, 13, dtype=np.float32) * np.float32(-0.5), "Picked"),
    (EYE[:, 1:], "Picked"),
    (EYE[:, :1], "Picked"),
    (EYE[:, [0, 2]], "Own"),  # what lies between is not picked
    (EYE[:, [2, 1, 0]], "Own"),
    (EYE[:, [0, 0, 1]], "Own"),
    (np.stack([[1, 1, 0], [2, 0, 1]], 1).astype(np.float32), "Own"),  # two, with weights that differ
    (np.full((6, 4), 0.25, np.float32), "Summed"),
    (np.full((6, 1), 1, np.float32), "Summed"),
    (np.zeros((6, 4), np.float32), "Summed"),
  ],
)
@pytest.mark.parametrize("bias, turned", [(False, False), (True, False), (True, True)])
def test_a_product_that_picks_or_adds_up_is_onnx_runtimes(tmp_path, matrix, op, bias, turned):
  from tinygrad import Tensor
  from tinygrad.nn.onnx import OnnxRunner

  r = np.random.default_rng(2)
  more = r.normal(size=matrix.shape[1]).astype(np.float32) if bias else None
  path, shape = product(tmp_path / "product.onnx", matrix, more, turned)
  x = r.normal(size=shape).astype(np.float32)
  (want,) = open_session(path.read_bytes(), 1).run(None, {"x": x})
  net = improve(OnnxRunner(str(path)))
  (node,) = net.graph_nodes
  assert (node.op if node.op in ("Picked", "Summed") else "Own") == op
  got = net.to("PYTHON")({"x": Tensor(x, device="PYTHON")})["y"].numpy()
  assert got.shape == want.shape
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)  # sums of 6 numbers near 1 at most, in any order


def test_a_matrix_that_is_filled_while_the_graph_runs_is_summed_too(tmp_path):
  from tinygrad import Tensor
  from tinygrad.nn.onnx import OnnxRunner

  half = helper.make_tensor("v", TensorProto.FLOAT, [1], [0.5])
  nodes = [
    helper.make_node("ConstantOfShape", ["s"], ["w"], value=half),
    helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1),
  ]
  stored = [numpy_helper.from_array(np.array([3, 6]), "s"), numpy_helper.from_array(np.ones(3, np.float32), "b")]
  ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [5, 6]), ("y", None))]
  model = helper.make_model(
    helper.make_graph(nodes, "filled", ends[:1], ends[1:], stored),
    opset_imports=[helper.make_opsetid("", 17)],
    ir_version=8,
  )
  onnx.save(model, str(tmp_path / "filled.onnx"))
  x = np.random.default_rng(4).normal(size=(5, 6)).astype(np.float32)
  net = improve(OnnxRunner(str(tmp_path / "filled.onnx")))
  assert [n.op for n in net.graph_nodes] == ["ConstantOfShape", "Summed"]
  got = net.to("PYTHON")({"x": Tensor(x, device="PYTHON")})["y"].numpy()
  np.testing.assert_allclose(got, np.repeat(x.sum(1, keepdims=True) / 2 + 1, 3, 1), rtol=0, atol=1e-5)


def test_constants_that_are_alike_are_one(tmp_path):
  from tinygrad.nn.onnx import OnnxRunner

  stored = [numpy_helper.from_array(np.full(n, 2, np.float32), f"c{i}") for i, n in enumerate((3, 3, 4))]
  nodes = [helper.make_node("Mul", [n, f"c{i}"], [f"y{i}"]) for i, n in enumerate("aab")]
  shapes = {"a": [3], "b": [4]} | {f"y{i}": None for i in range(3)}
  ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
  graph = helper.make_graph(nodes, "alike", ends[:2], ends[2:], stored)
  onnx.save(
    helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(tmp_path / "a.onnx")
  )
  net = improve(OnnxRunner(str(tmp_path / "a.onnx")))
  assert [tuple(n.inputs) for n in net.graph_nodes] == [("a", "c0"), ("a", "c0"), ("b", "c2")]


@pytest.mark.parametrize("a, b", [((7, 1, 4), (7, 4, 5)), ((7, 2, 4), (7, 4, 5)), ((1, 1, 4), (1, 4, 5))])
def test_rows_with_a_matrix_each_are_onnx_runtimes(tmp_path, a, b):
  from tinygrad import Tensor
  from tinygrad.nn.onnx import OnnxRunner

  path, r = tmp_path / "rows.onnx", np.random.default_rng(3)
  ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("a", a), ("b", b), ("y", None))]
  graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["y"])], "rows", ends[:2], ends[2:])
  onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
  x = {"a": r.normal(size=a).astype(np.float32), "b": r.normal(size=b).astype(np.float32)}
  (want,) = open_session(path.read_bytes(), 1).run(None, x)
  net = improve(OnnxRunner(str(path))).to("PYTHON")
  got = net({k: Tensor(v, device="PYTHON") for k, v in x.items()})["y"].numpy()
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)  # sums of four


def test_a_runner_of_another_time_is_left_as_it_is():
  class Old:
    pass

  assert not vars(improve(Old()))

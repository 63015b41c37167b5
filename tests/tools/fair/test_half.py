"""Half precision: what it holds and what it does not, against numpy."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from optimize_fixture import network
from openpilot.tools.fair.optimize.half import emulated, half, halves
from openpilot.tools.fair.optimize.quantize import prepare
from openpilot.tools.fair.optimize.sensitivity import errors, run_all

SIZE = (1, 4, 8, 10)


def branches(scale: float = 1.0) -> onnx.ModelProto:
  """x -> 'a' -> Relu -> 'b', scaled up and down again -> Clip -> 'c'; and a Softmax of the last."""
  r = np.random.default_rng(0)
  weights = {k: r.normal(0, 0.4, (4, 4, 1, 1)).astype(np.float32) for k in ("wa", "wb", "wc")}
  weights["wb"] *= np.float32(scale)
  weights |= {"low": np.array(0, np.float32), "high": np.array(6, np.float32), "bias": r.normal(0, 1, 4)}
  weights["wd"] = (np.eye(4, dtype=np.float32) / np.float32(scale)).reshape(4, 4, 1, 1)
  weights["sizes"] = np.array([1, 1, 2, 2], np.float32)
  nodes = [
    helper.make_node("Conv", ["x", "wa", "bias"], ["a"], "a"),
    helper.make_node("Relu", ["a"], ["ra"], "ra"),
    helper.make_node("Conv", ["ra", "wb"], ["b"], "b"),
    helper.make_node("Conv", ["b", "wd"], ["down"], "down"),
    helper.make_node("Clip", ["down", "low", "high"], ["cb"], "cb"),
    helper.make_node("Resize", ["cb", "", "sizes"], ["larger"], "larger", mode="nearest"),
    helper.make_node("Conv", ["larger", "wc"], ["c"], "c"),
    helper.make_node("Softmax", ["c"], ["parts"], "parts", axis=1),
  ]
  sides = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, SIZE)]
  said = [helper.make_tensor_value_info(o, onnx.TensorProto.FLOAT, None) for o in ("c", "parts")]
  constants = [
    numpy_helper.from_array(v if v.dtype == np.float32 else v.astype(np.float32), k) for k, v in weights.items()
  ]
  graph = helper.make_graph(nodes, "branches", sides, said, constants)
  model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
  return prepare(model.SerializeToString())


@pytest.fixture(scope="module")
def inputs():
  r = np.random.default_rng(1)
  return [{"x": r.normal(0, 1, SIZE).astype(np.float32)} for _ in range(3)]


def numpys(model, x, kind):
  """'c' with each tensor rounded to `kind`, sums in double."""
  w = {i.name: numpy_helper.to_array(i).astype(kind).astype(np.float64) for i in model.graph.initializer}

  def to(v):
    return v.astype(kind).astype(np.float64)

  def conv(v, k):
    return np.einsum("oc,bchw->bohw", w[k][:, :, 0, 0], v)

  a = to(np.maximum(to(conv(to(x), "wa") + w["bias"][:, None, None]), 0))
  b = to(np.clip(to(conv(a, "wb")), 0, 6))
  return to(conv(b.repeat(2, 2).repeat(2, 3), "wc"))


def test_what_is_judged_rounds_as_float16_does(inputs):
  model = branches()
  found = halves(model, inputs)
  assert not found.over and {"a", "b", "c", "larger"} <= set(found.inside) and "parts" not in found.inside
  got = run_all(emulated(model, found.inside), inputs)
  for x, g in zip(inputs, got, strict=True):
    want = numpys(model, x["x"], np.float16)
    # a sum half-way between two numbers of float16 may go to either, and on from there
    assert np.mean(np.abs(g["c"] - want) > 1e-6) < 0.02 and np.abs(g["c"] - want).max() < 0.02
    assert np.mean(np.abs(g["c"] - numpys(model, x["x"], np.float32)) > 1e-6) > 0.3  # it does round


def test_the_file_computes_in_half_and_says_what_the_float_graph_says(inputs):
  model = branches()
  blob = half(model, halves(model, inputs).inside)
  made = onnx.load_from_string(blob)
  onnx.checker.check_model(made)
  inferred = onnx.shape_inference.infer_shapes(made, strict_mode=True)
  kinds = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
  for node in made.graph.node:
    if node.op_type in ("Conv", "Relu", "Clip", "Resize"):
      assert kinds[node.output[0]] == onnx.TensorProto.FLOAT16, node.name
  weights = {i.name: i.data_type for i in made.graph.initializer}
  assert {weights[n.input[1]] for n in made.graph.node if n.op_type == "Conv"} == {onnx.TensorProto.FLOAT16}
  assert {o.type.tensor_type.elem_type for o in made.graph.output} == {onnx.TensorProto.FLOAT}
  assert sum(n.op_type == "Cast" for n in made.graph.node) == 2  # of the picture, and of what is said
  apart = errors(run_all(blob, inputs), run_all(model.SerializeToString(), inputs))
  assert max(apart.values()) < 3e-3


def test_what_float16_does_not_hold_stays_float_and_is_named(inputs):
  model = branches(1e5)
  found = halves(model, inputs)
  assert set(found.over) == {"b", "down"} and found.over["b"] > 65504  # what says it, and what takes it
  assert {"a", "cb", "c"} <= set(found.inside)
  want = run_all(model.SerializeToString(), inputs)
  for make in (half, emulated):
    got = run_all(make(model, found.inside), inputs)
    assert all(np.isfinite(g["c"]).all() for g in got)
    assert errors(got, want)["c"] < 3e-3
    broken = run_all(make(model, [*found.inside, *found.over]), inputs)
    # what would be without; on a CPU the file itself rounds nothing
    assert make is half or not errors(broken, want)["c"] < 0.01


def test_coordinates_and_products_stay_float():
  r = np.random.default_rng(0)
  frames = [{"frame": r.integers(0, 256, (1, 6, 128, 256), dtype=np.uint8)} for _ in range(2)]
  model = prepare(network().SerializeToString())
  found = halves(model, frames)
  kinds = {n.name: n.op_type for n in model.graph.node}
  assert {"stem", "middle", "out", "classes"} <= set(found.inside)
  assert not {"MatMul", "Mul", "Cast"} & {kinds[n] for n in found.inside} and "sum" not in found.inside
  want = run_all(model.SerializeToString(), frames)
  for make in (half, emulated):
    apart = errors(run_all(make(model, found.inside), frames), want)
    assert 0 < max(apart.values()) < 3e-3

"""Half precision: what it holds and what it does not, against numpy."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from optimize_fixture import network
from openpilot.tools.fair.optimize.half import emulated, half, outside, overflowing
from openpilot.tools.fair.optimize.quantize import last_layers, prepare
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


def left(model):
  return [n for nodes in outside(model, last_layers(model)).values() for n in nodes]


@pytest.fixture(scope="module")
def inputs():
  r = np.random.default_rng(1)
  return [{"x": r.normal(0, 1, SIZE).astype(np.float32)} for _ in range(3)]


def numpys(model, x, kind):
  """'c' with each tensor before it rounded to `kind`, sums in double. The last layer is float."""
  w = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
  w = {k: v if k == "wc" else v.astype(kind) for k, v in w.items()}

  def to(v):
    return v.astype(kind).astype(np.float64)

  def conv(v, k):
    return np.einsum("oc,bchw->bohw", w[k][:, :, 0, 0], v)

  a = to(np.maximum(to(conv(to(x), "wa") + w["bias"][:, None, None]), 0))
  b = to(np.clip(to(conv(a, "wb")), 0, 6))
  return conv(b.repeat(2, 2).repeat(2, 3), "wc")


def test_what_is_judged_rounds_as_float16_does(inputs):
  model = branches()
  got = run_all(emulated(model, left(model)), inputs)
  for x, g in zip(inputs, got, strict=True):
    want = numpys(model, x["x"], np.float16)
    # a sum half-way between two numbers of float16 may go to either, and on from there
    assert np.mean(np.abs(g["c"] - want) > 1e-5) < 0.05 and np.abs(g["c"] - want).max() < 0.02
    assert np.mean(np.abs(g["c"] - numpys(model, x["x"], np.float32)) > 1e-5) > 0.3  # it does round
  # the file itself does not, on a CPU: but for its weights it is the float graph
  near = errors(run_all(half(model, left(model)), inputs), run_all(model.SerializeToString(), inputs))
  assert near["c"] < 2 * errors(got, run_all(model.SerializeToString(), inputs))["c"]


def test_outputs_that_are_computed_in_half_are_rounded_too(inputs):
  model = branches()
  got = run_all(emulated(model, ["parts"]), inputs)[0]
  np.testing.assert_array_equal(got["c"], got["c"].astype(np.float16).astype(np.float32))
  assert np.any(got["parts"] != got["parts"].astype(np.float16).astype(np.float32))


def test_what_float16_does_not_hold_stays_float_and_is_named(inputs):
  model = branches(5e4)  # its weights are within, its values are not
  stay = left(model)
  over = overflowing(model, stay, inputs)
  assert set(over) == {"b", "down"} and over["b"] > 65504 / 2  # what says it, and what takes it
  assert overflowing(branches(), left(branches()), inputs) == {}
  want = run_all(model.SerializeToString(), inputs)
  for make in (half, emulated):
    got = run_all(make(model, [*stay, *over]), inputs)
    assert errors(got, want)["c"] < 3e-3
  # what would be without, and what a CPU does not show of the file itself
  assert not errors(run_all(emulated(branches(1e5), stay), inputs), want)["c"] < 0.01


def test_the_picture_of_a_network_with_products_beside_its_trunk():
  r = np.random.default_rng(0)
  frames = [{"frame": r.integers(0, 256, (1, 6, 128, 256), dtype=np.uint8)} for _ in range(2)]
  model = prepare(network().SerializeToString())
  want = run_all(model.SerializeToString(), frames)
  apart = errors(run_all(emulated(model, left(model)), frames), want)
  assert 0 < max(apart.values()) < 3e-3 and overflowing(model, left(model), frames) == {}

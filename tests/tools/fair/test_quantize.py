"""What is put into 8 bits, and how: against arithmetic of numpy and onnx's own reference."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from optimize_fixture import chain, network
from openpilot.selfdrive.modeld.fair.ort import ort
from openpilot.tools.fair.optimize.bias import shifts
from openpilot.tools.fair.optimize.quantize import TARGETS, calibrate, last_layers, prepare, quantize, trunk
from openpilot.tools.fair.optimize.sensitivity import (
  alone,
  errors,
  macs_of,
  rounded,
  rounded_tensors,
  run_all,
  sensitivity,
  steps,
)
from openpilot.tools.lib.errors import UserError


@pytest.fixture(scope="module")
def prepared():
  return prepare(network().SerializeToString())


@pytest.fixture(scope="module")
def frames():
  r = np.random.default_rng(0)
  return [{"frame": r.integers(0, 256, (1, 6, 128, 256), dtype=np.uint8)} for _ in range(4)]


@pytest.fixture(scope="module")
def ranges(prepared, frames):
  """By whether zero is in the middle."""
  return {s: calibrate(prepared, frames, s) for s in (False, True)}


def weights_of(model):
  return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


def test_layers_and_what_is_between_them_and_nothing_that_is_computed_of_a_product(prepared):
  kinds = {n.name: n.op_type for n in prepared.graph.node}
  inside = trunk(prepared)
  # the first Relu may be within the convolution before it by now; the scale of the frame is of no layer
  assert {"stem", "middle", "out", "classes"} <= set(inside) and "residual" in inside
  assert {kinds[n] for n in kinds if n not in inside} == {"Cast", "Mul", "MatMul", "Add"}
  assert "sum" not in inside and last_layers(prepared) == ["classes", "out"]


def test_the_activation_of_a_layer_is_of_its_8_bits_also_where_no_layer_follows(prepared):
  """Its range is half of what the layer itself says: the steps are half as wide."""
  last = last_layers(prepared)
  inside = trunk(prepared, last)
  assert not set(inside) & set(last) and "residual" not in inside  # a sum is none
  model = chain(
    [
      onnx.helper.make_node("Conv", ["x", "w"], ["a"], "a"),
      onnx.helper.make_node("Relu", ["a"], ["b"], "b"),
      onnx.helper.make_node("Conv", ["b", "w"], ["c"], "c"),
    ],
    {"w": np.ones((4, 4, 1, 1), np.float32)},
    ["c"],
  )
  assert trunk(model, ["c"]) == ["a", "b"]


def test_multiply_adds(prepared):
  found = macs_of(prepared)
  there = 64 * 128
  assert found == {"stem": 8 * there * 54, "middle": 8 * there * 72, "out": there * 8, "classes": 5 * there * 8}


@pytest.mark.parametrize("name", list(TARGETS))
def test_the_form_that_each_target_wants(name, prepared, ranges, frames):
  target = TARGETS[name]
  blob = quantize(ranges[target.symmetric], target, last_layers(prepared))
  model = onnx.load_from_string(blob)
  onnx.checker.check_model(model)
  assert [(x.domain, x.version) for x in model.opset_import] == [("", 17)]
  made, whole = weights_of(model), weights_of(prepared)
  for layer in ("stem", "middle"):
    w = next(v for k, v in made.items() if v.dtype == np.int8 and v.shape == whole[f"w_{layer}"].shape)
    scale = np.abs(whole[f"w_{layer}"]).max(axis=(1, 2, 3), keepdims=True) / (64 if target.narrow else 127)
    assert np.abs(w).max() <= (64 if target.narrow else 127)
    assert np.abs(w - whole[f"w_{layer}"] / scale).max() <= (1.01 if target.narrow else 0.51)  # of a step
  zeros = [made[n.input[2]] for n in model.graph.node if n.op_type == "QuantizeLinear"]
  assert zeros and {z.dtype.name for z in zeros} == {target.activations}
  assert not target.symmetric or not np.any(zeros)
  # ONNX's own arithmetic of the same file, and the float graph
  got = run_all(blob, frames[:1])[0]
  model.opset_import[0].version = 21  # onnx's reference knows these operators from 19 on; they say the same
  want = dict(zip(("depth", "segmentation"), ReferenceEvaluator(model).run(None, frames[0]), strict=True))
  apart = errors([got], [want])
  assert max(apart.values()) < 0.03, (
    apart
  )  # a step of 8 bits here and there: it fuses, and rounds once where ONNX does twice
  apart = errors([got], run_all(network().SerializeToString(), frames[:1]))
  assert 1e-4 < max(apart.values()) < 0.1, apart


def test_what_is_left_float_is_float(prepared, ranges):
  model = onnx.load_from_string(quantize(ranges[False], TARGETS["x86-vnni"], [*last_layers(prepared), "middle"]))
  node = {n.name: n for n in model.graph.node}
  assert node["middle"].input[1] == "w_middle" and node["stem"].input[1] != "w_stem"
  assert node["gate"].input[1] in ("w_gate", "w_gate.cast") and node["out"].input[1] == "w_out"


def test_a_layer_that_is_left_float_between_others_keeps_its_weights():
  """Unless told not to, ONNX Runtime quantizes them on load, with one scale for all channels."""
  r = np.random.default_rng(0)
  weights = {k: r.normal(0, 0.3, (8, 8, 3, 3)).astype(np.float32) for k in "abcd"}
  weights["b"] *= np.float32(200) ** -np.linspace(0, 1, 8, dtype=np.float32)[:, None, None, None]
  nodes = [
    onnx.helper.make_node("Conv", [x, k], [f"{k}_out"], k, pads=[1, 1, 1, 1])
    for x, k in zip(("x", "a_out", "b_out", "c_out"), "abcd", strict=True)
  ]
  value = onnx.helper.make_tensor_value_info
  sides = [[value(n, onnx.TensorProto.FLOAT, [1, 8, 16, 16])] for n in ("x", "d_out")]
  constants = [numpy_helper.from_array(w, k) for k, w in weights.items()]
  graph = onnx.helper.make_graph(nodes, "chain", *sides, constants)
  model = prepare(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]).SerializeToString())
  inputs = [{"x": r.normal(0, 1, (1, 8, 16, 16)).astype(np.float32)} for _ in range(2)]
  blob = quantize(calibrate(model, inputs), TARGETS["x86-vnni"], ["b"])
  assert next(n for n in onnx.load_from_string(blob).graph.node if n.name == "b").input[1] == "b"
  options = ort.SessionOptions()
  options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
  as_written = ort.InferenceSession(blob, options)
  want = [{"d_out": as_written.run(None, x)[0]} for x in inputs]
  assert errors(run_all(blob, inputs), want)["d_out"] < 0.02


def test_float_layers_read_what_float_layers_say_and_not_its_roundings():
  """'a' in float -> 'b' in 8 bits, and 'c' in float, which the quantizer would have read what is rounded for 'b'."""
  r = np.random.default_rng(0)
  weights = {f"w{k}": r.normal(0, 0.3, (4, 4, 3, 3)).astype(np.float32) for k in "abcd"}
  links = {"a": "x", "b": "a", "d": "b", "c": "a"}
  nodes = [onnx.helper.make_node("Conv", [i, f"w{k}"], [k], k, pads=[1, 1, 1, 1]) for k, i in links.items()]
  model = prepare(chain(nodes, weights, ["c", "d"]).SerializeToString())
  inputs = [{"x": r.normal(0, 1, (1, 4, 9, 12)).astype(np.float32)} for _ in range(6)]
  blob = quantize(calibrate(model, inputs), TARGETS["x86-vnni"], ["a", "c", "d"])
  want, got = (run_all(b, inputs)[0] for b in (model.SerializeToString(), blob))
  np.testing.assert_allclose(got["c"], want["c"], atol=1e-5)
  assert np.abs(got["d"] - want["d"]).max() > 1e-3


def test_what_lies_between_layers_that_stay_float_is_not_rounded(prepared, ranges, frames):
  target, want = TARGETS["x86-vnni"], run_all(prepared.SerializeToString(), frames[:2])
  last = quantize(ranges[False], target, ["stem", "middle"])  # the last layers alone: what goes into them is rounded
  assert max(errors(run_all(last, frames[:2]), want).values()) < 0.02
  none = quantize(ranges[False], target, ["stem", "middle", "out", "classes"])
  # but for the large weights that are stored in half
  assert max(errors(run_all(none, frames[:2]), want).values()) < 1e-3


def test_large_weights_that_stay_float_are_stored_in_half(prepared, ranges):
  made = weights_of(onnx.load_from_string(quantize(ranges[False], TARGETS["x86-vnni"])))
  assert made["w_gate.half"].dtype == np.float16


def test_a_graph_that_is_quantized_already_is_refused(prepared, ranges):
  blob = quantize(ranges[False], TARGETS["x86-vnni"])
  with pytest.raises(UserError, match="quantized already"):
    prepare(blob)
  with pytest.raises(UserError, match="no ONNX graph"):
    prepare(b"\x00nothing")


def test_steps_of_a_range_by_hand():
  u8, s8, middle = TARGETS["x86-vnni"], TARGETS["aarch64"], TARGETS["tensorrt"]
  assert [float(v) for v in steps(0.0, 2.55, u8)] == pytest.approx([0.01, 0])
  assert [float(v) for v in steps(-1.0, 1.55, u8)] == pytest.approx([0.01, 100])
  assert [float(v) for v in steps(-1.0, 1.55, s8)] == pytest.approx([0.01, -28])
  assert [float(v) for v in steps(-1.27, 0.3, middle)] == pytest.approx([0.01, 0])
  assert [float(v) for v in steps(1.0, 2.55, u8)] == pytest.approx([0.01, 0])  # zero is always among what it holds


def test_rounded_weights_by_hand():
  w = np.array([[[[1.27, -0.004]]], [[[63.5, 0.3]]]], np.float32)
  np.testing.assert_allclose(rounded(w, 0, TARGETS["x86-vnni"]), [[[[1.27, 0]]], [[[63.5, 0.5]]]], atol=1e-6)
  narrow = rounded(w, 0, TARGETS["x86"]).reshape(2, 2)
  np.testing.assert_allclose(narrow, [[1.27, 0], [63.5, 0]], atol=1e-6)


def test_one_tensor_alone_is_numpys_arithmetic_of_rounded_numbers(prepared, ranges, frames):
  """'middle' with its weights and what it says rounded: what the last convolutions make of it is easily had."""
  target = TARGETS["x86-vnni"]
  node = {n.name: n for n in prepared.graph.node}
  said, before, source = node["middle"].output[0], node["middle"].input[0], node["classes"].input[0]
  asked = onnx.ModelProto()
  asked.CopyFrom(prepared)
  asked.graph.output.append(onnx.helper.make_tensor_value_info(before, onnx.TensorProto.FLOAT, None))
  x = run_all(asked.SerializeToString(), frames[:1])[0][before].astype(np.float64)
  w = rounded(weights_of(prepared)["w_middle"], 0, target).astype(np.float64)
  shift = np.linspace(-0.2, 0.2, 8)
  padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
  y = sum(
    np.einsum("oc,bchw->bohw", w[:, :, i, j], padded[:, :, i : i + 64, j : j + 128]) for i in range(3) for j in range(3)
  )
  y = y + shift[:, None, None]
  low, high = (float(np.asarray(v).reshape(-1)[0]) for v in ranges[False].ranges[said].range_value)
  scale, zero = (v.astype(np.float64) for v in steps(low, high, target))
  y = (np.clip(np.rint(y / scale) + zero, 0, 255) - zero) * scale
  e = np.maximum(x + y, 0)
  want = np.einsum("oc,bchw->bohw", weights_of(prepared)["w_classes"][:, :, 0, 0], e)
  blob = alone(ranges[False], said, "middle", target, shift.astype(np.float32))
  got = run_all(blob, frames[:1])[0]["segmentation"]
  assert source != said  # the residual is between
  # a value half-way between two steps is rounded to either
  assert (np.abs(got - want) < 1e-4 * np.abs(want).max()).mean() > 0.995


def test_tensors_that_are_rounded_are_those_behind_activations(prepared):
  node = {n.name: n for n in prepared.graph.node}
  found = rounded_tensors(prepared, trunk(prepared, last_layers(prepared)))
  stem = next(t for t, layer in found.items() if layer == "stem")
  assert set(found.values()) == {None, "stem", "middle"}
  assert node["middle"].input[0] == stem and found[node["middle"].output[0]] == "middle"
  assert found[node["stem"].input[0]] is None and len(found) == 3  # the sum leads to last layers alone
  # with the stem in float the others round what goes in and what comes out
  assert set(rounded_tensors(prepared, trunk(prepared, [*last_layers(prepared), "stem"]))) == {
    stem,
    node["middle"].output[0],
  }


def test_what_each_tensor_alone_does(prepared, frames):
  target = TARGETS["x86-vnni"]
  model = onnx.ModelProto()
  model.CopyFrom(prepared)
  middle = next(i for i in model.graph.initializer if i.name == "w_middle")
  whole = rounded(numpy_helper.to_array(middle), 0, target)
  middle.CopyFrom(numpy_helper.from_array(whole, "w_middle"))
  last = last_layers(prepared)
  own, other = (
    {s.layer: s for s in sensitivity(calibrate(m, frames), target, frames[:2], trunk(m, last))}
    for m in (prepared, model)
  )
  assert set(own) == {None, "stem", "middle"} and set(own["stem"].errors) == {"depth", "segmentation"}
  assert own["stem"].errors[own["stem"].output] == max(own["stem"].errors.values()) > 0
  # of weights that are whole steps nothing but the values is rounded
  assert other["middle"].errors["depth"] < own["middle"].errors["depth"]


def test_shifts_are_the_mean_of_what_rounding_takes_away():
  r = np.random.default_rng(0)
  weights = {"wa": r.normal(0, 0.3, (6, 4, 1, 1)), "wb": r.normal(0, 0.3, (6, 1, 3, 3)), "bias": r.normal(0, 1, 6)}
  weights = {k: v.astype(np.float32) for k, v in weights.items()}
  nodes = [
    onnx.helper.make_node("Conv", ["x", "wa", "bias"], ["a"], "a"),
    onnx.helper.make_node("Conv", ["a", "wb"], ["b"], "b", group=6),
    onnx.helper.make_node("Conv", ["b", "wa2"], ["c"], "c"),
  ]
  weights["wa2"] = r.normal(0, 0.3, (2, 6, 1, 1)).astype(np.float32)
  model = prepare(chain(nodes, weights, ["c"]).SerializeToString())
  inputs = [{"x": r.uniform(0, 1, (1, 4, 9, 12)).astype(np.float32)} for _ in range(3)]
  target = TARGETS["x86"]
  found = shifts(calibrate(model, inputs), target, inputs, ["a", "b"])
  assert set(found) == {"a", "b"} and found["a"].shape == found["b"].shape == (6,)
  apart = (weights["wa"] - rounded(weights["wa"], 0, target))[:, :, 0, 0].astype(np.float64)
  mean = np.mean([x["x"] for x in inputs], axis=(0, 1, 3, 4))
  np.testing.assert_allclose(found["a"], apart @ mean, atol=1e-6)
  a = [
    np.einsum("oc,bchw->bohw", weights["wa"][:, :, 0, 0], x["x"])[0] + weights["bias"][:, None, None] for x in inputs
  ]
  lost = (weights["wb"] - rounded(weights["wb"], 0, target))[:, 0]
  want = np.zeros(6)
  for i in range(3):
    for j in range(3):
      want += lost[:, i, j] * np.mean([v[:, i : i + 7, j : j + 10] for v in a], axis=(0, 2, 3))
  np.testing.assert_allclose(found["b"], want, atol=1e-5)


def test_biases_that_are_shifted_take_the_means_back():
  """Of nine positive weights a channel on values that are positive, too: the rounding moves it as a whole."""
  r = np.random.default_rng(0)
  weights = {
    "wa": r.uniform(0, 1, (8, 1, 3, 3)) ** 4,
    "wb": r.normal(0, 0.3, (8, 1, 3, 3)),
    "wc": r.normal(0, 1, (2, 8, 1, 1)),
  }
  weights = {k: v.astype(np.float32) for k, v in weights.items()}
  nodes = [
    onnx.helper.make_node("Conv", ["x", "wa"], ["a"], "a", group=8),
    onnx.helper.make_node("Relu", ["a"], ["ra"], "ra"),
    onnx.helper.make_node("Conv", ["ra", "wb"], ["b"], "b", group=8),
    onnx.helper.make_node("Conv", ["b", "wc"], ["c"], "c"),
  ]
  model = prepare(chain(nodes, weights, ["c"], (1, 8, 24, 24)).SerializeToString())
  inputs = [{"x": r.uniform(4, 5, (1, 8, 24, 24)).astype(np.float32)} for _ in range(6)]
  target, want = TARGETS["x86"], run_all(model.SerializeToString(), inputs[3:])
  calibrated = calibrate(model, inputs[:3])
  found = shifts(calibrated, target, inputs[:3], ["a", "b"])

  def mean_error(blob):
    got = run_all(blob, inputs[3:])
    return np.abs(np.mean([g["c"] - w["c"] for g, w in zip(got, want, strict=True)], axis=(0, 1, 3, 4)))

  without = mean_error(quantize(calibrated, target, ["c"]))
  taken_back = mean_error(quantize(calibrated, target, ["c"], found))
  assert np.all(taken_back < without / 3), (without, taken_back)
  # of layers that stay float nothing is shifted
  np.testing.assert_allclose(mean_error(quantize(calibrated, target, ["a", "b", "c"], found)), 0, atol=1e-5)

"""What is put into 8 bits, and how: against arithmetic of numpy and onnx's own reference."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from optimize_fixture import network
from openpilot.selfdrive.modeld.fair.ort import ort
from openpilot.tools.fair.optimize.quantize import TARGETS, calibrate, last_layers, prepare, quantize, trunk
from openpilot.tools.fair.optimize.sensitivity import alone, errors, macs_of, rounded, run_all, sensitivity, steps
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


def test_multiply_adds(prepared):
  found = macs_of(prepared)
  assert found == {
    "stem": 8 * 64 * 128 * 54,
    "middle": 8 * 64 * 128 * 72,
    "out": 64 * 128 * 8,
    "classes": 5 * 64 * 128 * 8,
  }


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


def test_one_layer_alone_is_numpys_convolution_of_rounded_numbers(prepared, ranges, frames):
  """The depth of the last convolution, 1x1: the only one of which both sides are easily had."""
  target = TARGETS["x86-vnni"]
  blob = alone(ranges[False], "classes", target)
  model = onnx.load_from_string(blob)
  source = next(n for n in prepared.graph.node if n.name == "classes").input[0]
  for m in (model, prepared):
    assert source in {o for n in m.graph.node for o in n.output}
  asked = onnx.ModelProto()
  asked.CopyFrom(prepared)
  asked.graph.output.append(onnx.helper.make_tensor_value_info(source, onnx.TensorProto.FLOAT, [1, 8, 64, 128]))
  e = run_all(asked.SerializeToString(), frames[:1])[0][source].astype(np.float64)
  low, high = (float(np.asarray(v).reshape(-1)[0]) for v in ranges[False].ranges[source].range_value)
  scale, zero = (v.astype(np.float64) for v in steps(low, high, target))
  x = (np.clip(np.rint(e / scale) + zero, 0, 255) - zero) * scale
  w = rounded(weights_of(prepared)["w_classes"], 0, target)[:, :, 0, 0].astype(np.float64)
  want = np.einsum("oc,bchw->bohw", w, x)
  got = run_all(blob, frames[:1])[0]
  # a value half-way between two steps is rounded to either
  near = np.abs(got["segmentation"] - want) < 1e-4 * np.abs(want).max()
  assert near.mean() > 0.999
  whole = run_all(prepared.SerializeToString(), frames[:1])[0]
  np.testing.assert_array_equal(got["depth"], whole["depth"])  # the other branch is as it was


def test_the_layer_that_costs_most_for_what_it_saves_comes_first(prepared, frames):
  model = onnx.ModelProto()
  model.CopyFrom(prepared)
  stem = next(i for i in model.graph.initializer if i.name == "w_stem")
  w = numpy_helper.to_array(stem)
  steps_of = np.abs(w).max(axis=(1, 2, 3), keepdims=True) / 127
  stem.CopyFrom(numpy_helper.from_array((np.rint(w / steps_of) * steps_of).astype(np.float32), "w_stem"))
  found = sensitivity(calibrate(model, frames), TARGETS["x86-vnni"], frames[:2], ["stem", "middle"])
  assert [x.name for x in found] == ["middle", "stem"]
  # its weights are whole steps, and bytes nearly are of what goes in
  assert found[1].error < found[0].error / 2 and found[0].macs == 8 * 64 * 128 * 72

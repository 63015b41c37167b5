"""ONNX to torch and back, beside ONNX Runtime: operator by operator, and on whole networks, openpilot's own among
them."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn as nn
from onnx import TensorProto, helper, numpy_helper

from openpilot.tools.dgx.training.constants import INPUTS, OUTPUT_NAME, OUTPUT_SIZE, output_slices
from openpilot.tools.dgx.training.model import OnnxModule, hash_file, load_onnx
from openpilot.tools.dgx.training.outputs import parse_outputs, read_slices
from openpilot.tools.dgx.training.reference import ReferenceDriving, sample_inputs, save_reference
from openpilot.tools.lib.errors import UserError

TYPES = {
  np.dtype("float32"): TensorProto.FLOAT,
  np.dtype("float16"): TensorProto.FLOAT16,
  np.dtype("int64"): TensorProto.INT64,
  np.dtype("uint8"): TensorProto.UINT8,
  np.dtype("bool"): TensorProto.BOOL,
}


def session(model) -> ort.InferenceSession:
  options = ort.SessionOptions()
  options.intra_op_num_threads, options.log_severity_level = 1, 4
  return ort.InferenceSession(
    model if isinstance(model, str) else model.SerializeToString(), options, providers=["CPUExecutionProvider"]
  )


def graph(
  nodes, inputs: dict, constants: dict | None = None, opset: int = 17, outputs=("y",), kind=np.float32
) -> onnx.ModelProto:
  ins = [helper.make_tensor_value_info(k, TYPES[v.dtype], v.shape) for k, v in inputs.items()]
  outs = [helper.make_tensor_value_info(k, TYPES[np.dtype(kind)], None) for k in outputs]
  made = [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()]
  model = helper.make_model(
    helper.make_graph(nodes, "g", ins, outs, made), opset_imports=[helper.make_opsetid("", opset)]
  )
  model.ir_version = 8
  return model


def node(op, inputs, **attributes):
  return helper.make_node(op, inputs, ["y"], **attributes)


def agree(model: onnx.ModelProto, inputs: dict, tolerance: float = 1e-5) -> OnnxModule:
  """torch beside ONNX Runtime; 1e-5 of the largest value: both sum in float32, in their own order."""
  module = OnnxModule(model, "test.onnx").eval()
  with torch.no_grad():
    got = module(**{k: torch.from_numpy(v) for k, v in inputs.items()})
  for name, want in zip([o.name for o in model.graph.output], session(model).run(None, inputs), strict=True):
    assert tuple(got[name].shape) == want.shape
    assert np.abs(got[name].numpy().astype(np.float64) - want).max() <= tolerance * max(1.0, np.abs(want).max()), name
  return module


R = np.random.default_rng(7)


def f(*shape) -> np.ndarray:
  return R.normal(size=shape).astype(np.float32)


def i(*numbers) -> np.ndarray:
  return np.array(numbers, np.int64)


X, IMG = f(2, 3, 8), f(2, 4, 9, 11)
UNARY = [
  "Relu",
  "Sigmoid",
  "Tanh",
  "Exp",
  "Erf",
  "Neg",
  "Abs",
  "Floor",
  "Ceil",
  "Round",
  "Sin",
  "Cos",
  "Softplus",
  "Identity",
  "Sign",
  "Elu",
  "LeakyRelu",
  "HardSigmoid",
  "HardSwish",
  "Softmax",
  "LogSoftmax",
  "Transpose",
  "Flatten",
]
NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
GROUPED = {"group": 2, "pads": [1, 1, 1, 1], "output_padding": [1, 1], "strides": [2, 2]}
CASES = [
  *[(o, X, {}, {}, 17) for o in UNARY],
  *[(o, np.abs(X) + 0.1, {}, {}, 17) for o in ("Sqrt", "Log", "Reciprocal")],
  *[(o, X, {"c": np.abs(f(3, 8)) + 0.5}, {}, 17) for o in ("Add", "Sub", "Mul", "Div", "Max", "Min")],
  ("Pow", np.abs(X), {"c": np.float32(2.5)}, {}, 17),
  ("PRelu", X, {"c": f(3, 1)}, {}, 17),
  ("Elu", X, {}, {"alpha": 0.3}, 17),
  ("Gelu", X, {}, {}, 20),
  ("Gelu", X, {}, {"approximate": "tanh"}, 20),
  ("Mish", X, {}, {}, 18),
  ("Softmax", X, {}, {"axis": 1}, 17),
  ("Softmax", X, {}, {"axis": 1}, 11),
  ("Softmax", X, {}, {}, 11),
  ("Softmax", X, {}, {"axis": 0}, 9),
  ("Transpose", X, {}, {"perm": [0, 2, 1]}, 17),
  ("Flatten", IMG, {}, {"axis": 2}, 17),
  ("Flatten", IMG, {}, {"axis": 0}, 17),
  ("Reshape", X, {"c": i(2, -1)}, {}, 17),
  ("Reshape", X, {"c": i(0, 4, 6)}, {}, 17),
  ("Slice", X, {"a": i(1, -5), "b": i(3, 9999), "c": i(1, 2)}, {}, 17),
  ("Slice", X, {"a": i(-1), "b": i(-9999), "c": i(2), "d": i(-2)}, {}, 17),
  ("Slice", X, {"a": i(0), "b": i(8), "c": i(2), "d": i(3)}, {}, 17),
  ("Slice", X, {}, {"starts": [1], "ends": [7], "axes": [2]}, 9),
  ("Gather", X, {"c": i(2, -1, 0)}, {"axis": 1}, 17),
  ("Gather", X, {"c": np.int64(1)}, {"axis": 2}, 17),
  ("Gather", X, {"c": np.array([[0, 1], [7, 2]])}, {"axis": 2}, 17),
  ("Concat", X, {"c": f(2, 1, 8)}, {"axis": 1}, 17),
  ("Unsqueeze", X, {"c": i(0, -1)}, {}, 17),
  ("Unsqueeze", X, {}, {"axes": [1]}, 11),
  ("Squeeze", f(2, 1, 3), {"c": i(1)}, {}, 17),
  ("Squeeze", f(2, 1, 3), {}, {"axes": [1]}, 11),
  ("Expand", f(2, 1, 8), {"c": i(1, 3, 8)}, {}, 17),
  ("Tile", X, {"c": i(1, 2, 3)}, {}, 17),
  ("Clip", X, {"a": np.float32(-0.5), "b": np.float32(0.5)}, {}, 17),
  ("Clip", X, {}, {"min": -0.3, "max": 0.2}, 9),
  ("Pad", IMG, {"c": i(0, 0, 1, 2, 0, 0, 3, 0)}, {}, 17),
  ("Pad", IMG, {"c": i(0, 0, 1, 2, 0, 0, 1, 2), "v": np.float32(2)}, {}, 17),
  ("Pad", IMG, {"c": i(0, 0, 1, 2, 0, 0, 1, 2)}, {"mode": "reflect"}, 17),
  ("Pad", IMG, {}, {"pads": [0, 0, 1, 1, 0, 0, 1, 1]}, 9),
  ("GlobalAveragePool", IMG, {}, {}, 17),
  ("GlobalMaxPool", IMG, {}, {}, 17),
  ("MaxPool", IMG, {}, {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, 17),
  ("MaxPool", IMG, {}, {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0, 0, 1, 1]}, 17),
  ("AveragePool", IMG, {}, {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, 17),
  ("AveragePool", IMG, {}, {"kernel_shape": [2, 2], "count_include_pad": 1}, 17),
  *[
    (o, X, {}, {"axes": [-1], "keepdims": k}, 11)
    for k in (0, 1)
    for o in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare")
  ],
  ("ReduceMean", X, {"c": i(1, 2)}, {}, 18),
  ("ReduceMean", X, {}, {}, 17),
  ("LayerNormalization", X, {"a": f(8), "b": f(8)}, {"epsilon": 1e-3}, 17),
  ("LayerNormalization", X, {"a": f(8)}, {}, 17),
  ("LayerNormalization", X, {"a": f(3, 8), "b": f(3, 8)}, {"axis": 1}, 17),
  ("LayerNormalization", X, {"a": f(3, 8), "b": f(3, 8)}, {"axis": -2}, 17),
  ("BatchNormalization", IMG, {"a": f(4), "b": f(4), "c": f(4), "d": np.abs(f(4)) + 0.5}, {"epsilon": 1e-3}, 17),
  ("MatMul", X, {"w": f(8, 5)}, {}, 17),
  ("MatMul", X, {"w": f(2, 8, 5)}, {}, 17),
  ("Gemm", f(3, 8), {"w": f(5, 8), "b": f(5)}, {"transB": 1}, 17),
  ("Gemm", f(3, 8), {"w": f(8, 5)}, {}, 17),
  ("Gemm", f(3, 8), {"w": f(8, 5), "b": f(1, 5)}, {"alpha": 0.5, "beta": 2.0}, 17),
  ("Gemm", f(8, 3), {"w": f(8, 5)}, {"transA": 1}, 17),
  ("Conv", IMG, {"w": f(6, 4, 3, 3), "b": f(6)}, {"pads": [1, 1, 1, 1], "strides": [2, 2]}, 17),
  ("Conv", IMG, {"w": f(8, 1, 3, 3)}, {"group": 4, "dilations": [2, 1]}, 17),
  ("Conv", IMG, {"w": f(6, 4, 3, 3)}, {"pads": [0, 1, 2, 1]}, 17),
  ("Conv", IMG, {"w": f(6, 4, 3, 2)}, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, 17),
  ("Conv", IMG, {"w": f(6, 4, 2, 2)}, {"auto_pad": "SAME_LOWER"}, 17),
  ("Conv", X, {"w": f(6, 3, 3), "b": f(6)}, {"pads": [1, 1]}, 17),
  ("ConvTranspose", IMG, {"w": f(4, 6, 2, 2), "b": f(6)}, {"strides": [2, 2]}, 17),
  ("ConvTranspose", IMG, {"w": f(4, 3, 3, 3)}, GROUPED, 17),
  ("Resize", IMG, {"r": np.zeros(0, np.float32), "s": np.array([1, 1, 2, 2], np.float32)}, NEAREST, 17),
  (
    "Resize",
    IMG,
    {"r": np.zeros(0, np.float32), "q": np.zeros(0, np.float32), "s": i(2, 4, 18, 20)},
    {"mode": "linear"},
    17,
  ),
]


@pytest.mark.parametrize(
  ("op", "x", "constants", "attributes", "opset"), CASES, ids=[f"{k}-{c[0]}" for k, c in enumerate(CASES)]
)
def test_operators(op, x, constants, attributes, opset):
  agree(graph([node(op, ["x", *constants], **attributes)], {"x": x}, constants, opset), {"x": x})


def test_operators_of_several_inputs_and_outputs():
  parts = helper.make_node("Split", ["x", "s"], ["y", "z"], axis=2)
  agree(graph([parts], {"x": X}, {"s": i(3, 5)}, outputs=("y", "z")), {"x": X})
  agree(graph([helper.make_node("Split", ["x"], ["y", "z"], axis=2)], {"x": X}, opset=13, outputs=("y", "z")), {"x": X})
  mask = [helper.make_node("Greater", ["x", "c"], ["m"]), node("Where", ["m", "x", "c"])]
  agree(graph(mask, {"x": X}, {"c": f(3, 8)}), {"x": X})
  # the shape computed in the graph, as torch's exporter writes flatten
  shape = [
    helper.make_node("Shape", ["x"], ["s"]),
    helper.make_node("Gather", ["s", "k"], ["n"]),
    helper.make_node("Unsqueeze", ["n", "o"], ["u"]),
    helper.make_node("Concat", ["u", "m"], ["t"], axis=0),
    node("Reshape", ["x", "t"]),
  ]
  agree(graph(shape, {"x": X}, {"k": np.int64(0), "o": i(0), "m": i(-1)}), {"x": X})


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_recurrent_layers(kind, directions):
  n, hidden, x, h = {"GRU": 3, "LSTM": 4}[kind], 6, f(7, 2, 5), f(directions, 2, 6)
  constants = {
    "w": f(directions, n * hidden, 5),
    "r": f(directions, n * hidden, hidden),
    "b": f(directions, 2 * n * hidden),
  }
  extra = {"linear_before_reset": 1} if kind == "GRU" else {}
  layer = helper.make_node(
    kind,
    ["x", "w", "r", "b", "", "h"] + (["h"] if kind == "LSTM" else []),
    ["y", "last"],
    hidden_size=hidden,
    direction="bidirectional" if directions == 2 else "forward",
    **extra,
  )
  model = graph([layer], {"x": x, "h": h}, constants, outputs=("y", "last"))
  module = agree(model, {"x": x, "h": h})
  found = [m for m in module.modules() if isinstance(m, nn.GRU if kind == "GRU" else nn.LSTM)]
  assert len(found) == 1 and module.to_onnx().SerializeToString() == model.SerializeToString()
  with torch.no_grad():
    for p in found[0].parameters():
      p.mul_(1.1)
  written = module.to_onnx()
  for name, array in constants.items():
    back = next(numpy_helper.to_array(t) for t in written.graph.initializer if t.name == name)
    np.testing.assert_allclose(back, array * np.float32(1.1), rtol=1e-6)
  agree(written, {"x": x, "h": h})


def test_a_constant_that_exporters_shared_is_written_for_those_that_stayed_too():
  """Exporters write equal constants once, and an Identity for each other place. One place learns; the other computes
  what it did."""
  nodes = [
    helper.make_node("Identity", ["one"], ["same"]),
    helper.make_node("Mul", ["x", "one"], ["a"]),
    node("Add", ["a", "same"]),
  ]
  module = agree(graph(nodes, {"x": f(2, 4)}, {"one": np.ones(4, np.float32)}), {"x": f(2, 4)})
  with torch.no_grad():
    next(iter(module.parameters())).mul_(3)
  x = f(2, 4)
  (got,) = session(module.to_onnx()).run(None, {"x": x})
  np.testing.assert_allclose(got, 3 * x + 1, atol=1e-6)
  np.testing.assert_allclose(module(x=torch.from_numpy(x))["y"].detach().numpy(), got, atol=1e-6)


def test_what_is_not_known_is_named():
  x = f(1, 8)
  odd = [
    helper.make_node("Hardmax", ["x"], ["a"]),
    helper.make_node("NonZero", ["a"], ["b"]),
    node("FusedGemm", ["x"], domain="com.microsoft"),
  ]
  with pytest.raises(UserError, match=r"test.onnx uses operators .*: Hardmax, NonZero, com.microsoft.FusedGemm"):
    OnnxModule(graph(odd, {"x": x}), "test.onnx")
  old = helper.make_node("GRU", ["x", "w", "r"], ["y"], hidden_size=2)
  with pytest.raises(UserError, match="linear_before_reset=0"):
    OnnxModule(graph([old], {"x": f(3, 1, 4)}, {"w": f(1, 6, 4), "r": f(1, 6, 2)}), "test.onnx")


def test_files_that_are_none(tmp_path):
  with pytest.raises(UserError, match="there is no"):
    load_onnx(tmp_path / "none.onnx")
  (tmp_path / "lfs.onnx").write_text("version https://git-lfs.github.com/spec/v1\n")
  with pytest.raises(UserError, match="git-lfs"):
    load_onnx(tmp_path / "lfs.onnx")
  with pytest.raises(UserError, match="cannot be read"):
    hash_file(tmp_path / "none.onnx")


def test_half_precision_is_widened_and_narrowed_again():
  """The file keeps float16 and its interface; torch computes in float32 with the same weights."""
  x = f(1, 8).astype(np.float16)
  constants = {"w": f(8, 5).astype(np.float16), "b": f(5).astype(np.float16)}
  nodes = [
    helper.make_node("MatMul", ["x", "w"], ["a"]),
    helper.make_node("Add", ["a", "b"], ["c"]),
    node("Cast", ["c"], to=TensorProto.FLOAT16),
  ]
  model = graph(nodes, {"x": x}, constants, kind=np.float16)
  module = agree(model, {"x": x}, tolerance=2e-3)  # half precision keeps 11 bits
  assert {p.dtype for p in module.parameters()} == {
    torch.float32
  } and module.to_onnx().SerializeToString() == model.SerializeToString()
  with torch.no_grad():
    next(m for m in module.modules() if isinstance(m, nn.Linear)).weight.mul_(0.5)
  written = module.to_onnx()
  assert {t.data_type for t in written.graph.initializer} == {
    TensorProto.FLOAT16
  } and written.graph.input == model.graph.input
  agree(written, {"x": x}, tolerance=2e-3)


def test_parameters_that_the_graph_computes_and_shares():
  """A weight behind a Transpose, and one of two layers: both are layers, and after they changed the file says so."""
  x = f(1, 8)
  nodes = [
    helper.make_node("Transpose", ["w"], ["wt"]),
    helper.make_node("MatMul", ["x", "wt"], ["a"]),
    helper.make_node("MatMul", ["a", "v"], ["b"]),
    helper.make_node("Gemm", ["b", "v", "c"], ["y"]),
  ]
  model = graph(nodes, {"x": x}, {"w": f(6, 8), "v": f(6, 6), "c": f(6)})
  module = agree(model, {"x": x})
  linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
  assert len(linears) == 3
  with torch.no_grad():
    for k, m in enumerate(linears):
      m.weight.mul_(2 + k)
    want = module(x=torch.from_numpy(x))["y"].numpy()
  written = module.to_onnx()
  np.testing.assert_allclose(session(written).run(None, {"x": x})[0], want, rtol=1e-5)
  assert "Transpose" not in [n.op_type for n in written.graph.node]


def test_batches_at_once_only_where_that_is_right():
  """A graph of one example that mixes examples when it is given two runs them one after the other."""
  x = f(3, 4, 8)
  fine = graph(
    [helper.make_node("Reshape", ["x", "s"], ["a"]), node("MatMul", ["a", "w"])],
    {"x": x[:1]},
    {"s": i(1, 32), "w": f(32, 5)},
  )
  mixing = graph(
    [
      helper.make_node("Reshape", ["x", "s"], ["a"]),
      helper.make_node("Transpose", ["a"], ["b"]),
      helper.make_node("MatMul", ["b", "w"], ["c"]),
      helper.make_node("ReduceMean", ["c"], ["d"], axes=[0]),
      node("Reshape", ["d", "t"]),
    ],
    {"x": x[:1]},
    {"s": i(4, 8), "w": f(4, 5), "t": i(1, 5)},
  )
  for model, at_once in ((fine, True), (mixing, False)):
    module = OnnxModule(model, "test.onnx")
    with torch.no_grad():
      got = module(x=torch.from_numpy(x))["y"].numpy()
    assert module._batches is at_once and module.training
    run = session(model)
    np.testing.assert_allclose(
      got, np.concatenate([run.run(None, {"x": x[k : k + 1]})[0] for k in range(3)]), rtol=1e-4, atol=1e-5
    )


def test_openpilots_driver_monitoring_network(shared_data):
  """A real openpilot file: parity, its layers under its names, and back bit for bit."""
  path = shared_data / "weights" / "openpilot_dmonitoring_model.onnx"
  module = load_onnx(path).eval()
  x = np.random.default_rng(0).uniform(0, 1, (2, 6, 320, 160)).astype(np.float32)
  with torch.no_grad():
    got = module(input_img=torch.from_numpy(x))["outputs"].numpy()
  run = session(str(path))
  want = np.concatenate([run.run(None, {"input_img": x[k : k + 1]})[0] for k in range(2)])
  assert got.shape == (2, 39) and np.abs(got - want).max() < 1e-5 * np.abs(want).max()  # measured 2e-7
  names = dict(module.named_modules())
  assert isinstance(names["net._classic_predictor.fc1"], nn.Linear) and isinstance(
    names["net._vision._backbone._conv_stem"], nn.Conv2d
  )
  assert sum(p.numel() for p in module.parameters()) + sum(b.numel() for b in module.buffers()) == 816395
  assert module.to_onnx().SerializeToString() == onnx.load(str(path)).SerializeToString()


def test_reference_network_is_openpilots_interface(tmp_path):
  """Names, shapes, dtypes and slices; torch, ONNX Runtime and the module read back agree; a batch is its examples; of a
  seed it is always the same."""
  network = ReferenceDriving(seed=2).eval()
  assert 3e6 < sum(p.numel() for p in network.parameters()) < 5e6
  path = save_reference(tmp_path / "reference.onnx", network)
  model = onnx.load(str(path))
  assert {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in model.graph.input} == {
    k: s for k, (s, _) in INPUTS.items()
  }
  assert [v.name for v in model.graph.output] == [OUTPUT_NAME] and model.opset_import[0].version == 14
  assert read_slices(path) == output_slices()
  module, x, run = load_onnx(path).eval(), sample_inputs(3, seed=1), session(str(path))
  with torch.no_grad():
    a, b = network(**x), module(**x)[OUTPUT_NAME]
    again = ReferenceDriving(seed=2).eval()(**x)
  want = np.concatenate([run.run(None, {k: v[j : j + 1].numpy() for k, v in x.items()})[0] for j in range(3)])
  assert a.shape == (3, OUTPUT_SIZE) and torch.equal(a, again) and module._batches
  scale = np.abs(want).max()
  assert np.abs(a.numpy() - want).max() < 1e-6 * scale and np.abs(b.numpy() - want).max() < 1e-6 * scale
  plan = parse_outputs(want, output_slices())["plan"]
  assert plan[0, 32, 0] == pytest.approx(120, rel=0.5) and abs(plan[0, 0, 0]) < 1.5  # straight on until it has learned


def test_reference_network_learns_through_the_file(base):
  """Gradients reach every layer but those of outputs that are not asked for; a step changes the file's weights and
  nothing else of it."""
  module, x = load_onnx(base), sample_inputs(2)
  optimizer = torch.optim.SGD(module.parameters(), 1e-3)
  out = parse_outputs(module(**x)[OUTPUT_NAME], output_slices())
  (out["plan"].square().mean() + out["lane_lines"].mean()).backward()
  learning = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
  assert {
    "net.vision.blocks.0.down.weight",
    "net.temporal.query.MatMul.weight",
    "net.heads.plan.out.weight",
    "net.wanted.bias",
  } <= learning
  assert not any(n.startswith("net.heads.meta") for n in learning)
  optimizer.step()
  written, given = module.to_onnx(), onnx.load(str(base))
  assert [n.SerializeToString() for n in written.graph.node] == [n.SerializeToString() for n in given.graph.node]
  assert written.metadata_props == given.metadata_props and written.graph.input == given.graph.input
  was, now = ({t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (given, written))
  assert was.keys() == now.keys() and not np.array_equal(was["heads.plan.out.weight"], now["heads.plan.out.weight"])
  assert np.array_equal(was["heads.meta.out.weight"], now["heads.meta.out.weight"])
  with torch.no_grad():
    want = module(**x)[OUTPUT_NAME][:1].numpy()
  got = session(written).run(None, {k: v[:1].numpy() for k, v in x.items()})[0]
  assert np.abs(got - want).max() < 1e-6 * np.abs(want).max()

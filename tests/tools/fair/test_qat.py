"""Students that learn in 8 bits: rounding and its gradients against numpy and onnx's reference; what is rounded against
the graph that PTQ makes; the commands."""

import json

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from label_fixture import interrupted, same, taught, write_store
from onnx.reference import ReferenceEvaluator
from torch import nn

import optimize_fixture
from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.selfdrive.modeld.fair.ort import ort
from openpilot.tools.fair.bundle import export
from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.distillation.options import Options, target_of
from openpilot.tools.fair.optimize import optimize, told
from openpilot.tools.fair.optimize.qat import inputs_with, make_plan, told_apart
from openpilot.tools.fair.optimize.quantize import TARGETS, Target, calibrate, last_layers, prepare, quantize
from openpilot.tools.fair.optimize.sensitivity import rounded
from openpilot.tools.fair.students.fake_quant import Calls, Rounding, Rounds, RoundValues, grid, round_weights
from openpilot.tools.fair.students.onnx_export import export_onnx
from openpilot.tools.fair.students.student import build
from openpilot.tools.learn.adapters.apply import apply_dora, unload
from openpilot.tools.learn.adapters.lowrank import Adapter
from openpilot.tools.learn.checkpoint import load_checkpoint
from openpilot.tools.lib.errors import UserError

WHOLE = Target("one scale for all weights of a layer, all zero points 0", "int8", True, whole=True)


def scalars(*values):
  return [torch.tensor(v, dtype=torch.float32) for v in values]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("low, high", [(-1.3, 2.9), (0.0, 5.2), (-4.0, 0.0), (-0.7, 0.2), (0.5, 3.0)])
def test_values_are_rounded_as_onnx_says(low, high, symmetric, rng):
  """Against QuantizeLinear and DequantizeLinear of onnx's own reference, with values beyond the range; asymmetric ones
  as int8, too, whose zero point is 128 less."""
  x = rng.normal(0, 2, (3, 4, 8, 8)).astype(np.float32)
  scale, zero, _, _ = grid(*scalars(low, high), symmetric)
  got = RoundValues.apply(torch.from_numpy(x), *scalars(low, high), symmetric).numpy()
  kinds = [(np.int8, 0)] if symmetric else [(np.uint8, 0), (np.int8, 128)]
  for kind, less in kinds:
    constants = {"s": scale.numpy(), "z": np.array(int(zero) - less).astype(kind)}
    nodes = [
      onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
      onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
      nodes,
      "g",
      [info("x", onnx.TensorProto.FLOAT, x.shape)],
      [info("y", onnx.TensorProto.FLOAT, x.shape)],
      [onnx.numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    want = ReferenceEvaluator(model).run(None, {"x": x})[0]
    apart = np.abs(got - want)
    # half-way between two steps either is right: a quotient and a product with the inverse differ in their last bit
    assert apart.max() <= 1.001 * float(scale) and np.mean(apart > 1e-3 * float(scale)) < 0.01
  inside = (x > min(low, 0)) & (x < max(high, 0))
  assert np.abs(got - x)[inside].max() <= 0.51 * float(scale) and np.abs(got).max() > 0


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_by_hand(symmetric):
  """Straight through within the range. Of its ends: 1 of what lies beyond each, and of the rest by how much a step's
  change moves it."""
  low, high = -1.0, 3.0
  x = torch.tensor([-5.0, -1.5, -0.2, 0.01, 0.41, 1.003, 2.7, 4.0], requires_grad=True)
  ends = [v.requires_grad_() for v in scalars(low, high)]
  weight = torch.arange(1.0, 9.0)
  (RoundValues.apply(x, *ends, symmetric) * weight).sum().backward()
  v, w = x.detach().numpy().astype(np.float64), weight.numpy().astype(np.float64)
  span = 2 * high if symmetric else high - low
  step = span / (254 if symmetric else 255)
  first, last = (-128 * step, 127 * step) if symmetric else (low, high)
  beyond = np.where(v < first - step / 2, -1, np.where(v > last + step / 2, 1, 0))
  assert list(beyond) == ([-1, 0, 0, 0, 0, 0, 0, 1] if symmetric else [-1, -1, 0, 0, 0, 0, 0, 1])
  np.testing.assert_array_equal(x.grad.numpy(), np.where(beyond == 0, w, 0))
  moved = np.rint(v / step) * step - v
  inside = (w * moved)[beyond == 0].sum()
  damp = (8 * 255) ** -0.5
  if symmetric:  # the wider end says both
    want = (0.0, ((w * beyond).sum() + inside / high) * damp)
  else:
    want = ((w[beyond == -1].sum() - inside / span) * damp, (w[beyond == 1].sum() + inside / span) * damp)
  np.testing.assert_allclose([float(e.grad) for e in ends], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*TARGETS, "whole"])
@pytest.mark.parametrize("axis", [0, 1])
def test_weights_are_rounded_as_the_quantizer_does(name, axis, rng):
  """numpy's arithmetic, of the weights folded with the norm's gain where all have one scale; the gradient is theirs."""
  target = TARGETS.get(name, WHOLE)
  w, gain = rng.normal(0, 0.2, (6, 5, 3, 3)), rng.uniform(0.1, 3, 6 if axis == 0 else 5)
  gain = gain.reshape((-1, 1, 1, 1) if axis == 0 else (1, -1, 1, 1)).astype(np.float32)
  w = torch.from_numpy(w.astype(np.float32)).requires_grad_()
  own = torch.from_numpy(gain) if target.whole else None
  got = round_weights(w, None if target.whole else axis, target.limit, own)
  folded = w.detach().numpy() * gain  # with one scale for each channel the gain changes nothing
  np.testing.assert_allclose(got.detach().numpy() * gain, rounded(folded, axis, target), atol=2e-6)
  (got * 3).sum().backward()
  assert torch.equal(w.grad, torch.full_like(w, 3))


class Small(nn.Module):
  def __init__(self):
    super().__init__()
    self.first, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
    self.act, self.last = nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)

  def forward(self, x):
    x = self.act(self.norm(self.first(x)))
    return self.last(x + x)


def test_calls_are_named_by_the_module_that_makes_them():
  model, found = Small().eval(), []

  class Names(Calls):
    def called(self, place, func, args, kwargs):
      found.append(place)
      return super().called(place, func, args, kwargs)

  x = torch.randn(1, 3, 8, 8)
  with Names(model) as names:
    y = model(x)
  with names:
    assert torch.equal(model(x), y)
  mine = ["first:conv2d:0", "norm:batch_norm:0", "act:relu:0", ":add:0", "last:conv2d:0"]
  assert [p for p in found if p in mine] == mine * 2
  count = len(found)
  model(x)
  assert len(found) == count  # outside nothing is caught


@pytest.mark.parametrize("whole", [False, True])
def test_a_student_is_rounded_where_it_is_said_and_learns_its_ranges(whole):
  torch.manual_seed(0)
  model = Small().eval()
  model.norm.running_var.uniform_(0.5, 2)
  model.norm.weight.data.uniform_(0.5, 2)
  x = torch.randn(2, 3, 8, 8)
  rounding = Rounding(
    {"a": "act:relu:0"}, {"act:relu:0": "act:relu:0"}, {"first:conv2d:0": "norm"}, {"f": "first:conv2d:0"}, whole=whole
  )
  rounding.observe({"act:relu:0": (0.0, 1.5)})
  rounding.shift(model, {"f": torch.tensor([0.1, 0.2, 0.3, 0.4])})
  assert torch.allclose(model.norm.bias, torch.tensor([0.1, 0.2, 0.3, 0.4]))
  with rounding.of(model):
    got = model(x)
  gain = (model.norm.weight / torch.sqrt(model.norm.running_var + model.norm.eps)).reshape(-1, 1, 1, 1)
  folded = (model.first.weight * gain).detach().numpy()
  w = rounded(folded, 0, Target("", whole=whole))
  shift = model.norm.bias - model.norm.running_mean * gain.reshape(-1)
  inner = torch.relu(F.conv2d(x, torch.from_numpy(w), shift))
  inner = torch.fake_quantize_per_tensor_affine(inner, 1.5 / 255, 0, 0, 255)
  assert torch.allclose(got, model.last(inner + inner), atol=0.05)  # but where a value lies between two steps
  assert (got - model.last(inner + inner)).abs().median() < 1e-5
  assert (got - model(x)).abs().max() > 1e-3  # outside it is not rounded
  got.square().sum().backward()
  assert rounding.high.grad.abs() > 0 and rounding.low.grad == 0 and model.first.weight.grad.abs().sum() > 0


def test_what_goes_into_an_activation_in_place_is_rounded_and_learned_too():
  """As where all zero points are 0."""
  torch.manual_seed(0)
  model, places = Small().eval(), ("norm:batch_norm:0", "act:relu:0")
  rounding = Rounding({"a": places[1]}, dict.fromkeys(places, places[1]), {}, {}, symmetric=True)
  rounding.observe({places[1]: (0.0, 1.5)})
  x = torch.randn(2, 3, 8, 8)
  with rounding.of(model):
    got = model(x)
  got.square().sum().backward()
  assert rounding.high.grad.abs() > 0 and model.first.weight.grad.abs().sum() > 0
  with torch.no_grad(), rounding.of(model):
    assert torch.equal(model(x), got)


# *** a student and its graph ***


def adapted(name):
  """A student with adapters of DoRA that changed its weights, merged."""
  student = told_apart(build(name))[0]
  apply_dora(student, 2, targets=["*pw_exp.conv", "*depth.0.1.0"])
  with torch.no_grad():
    for m in student.modules():
      if isinstance(m, Adapter):
        for p in m.parameters():
          p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)
  unload(student)
  return student


def graph_values(calibrated, target, inputs):
  """-> by tensor what its DequantizeLinear says, computed as it is written."""
  model = onnx.load_from_string(quantize(calibrated, target, last_layers(calibrated.model)))
  quantized = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
  back = {n.output[0]: quantized[n.input[0]] for n in model.graph.node if n.input[0] in quantized}
  info = onnx.helper.make_tensor_value_info
  model.graph.output.extend(info(n, onnx.TensorProto.FLOAT, None) for n in back)
  options = ort.SessionOptions()
  options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
  session = ort.InferenceSession(model.SerializeToString(), options)
  said = dict(zip([o.name for o in session.get_outputs()], session.run(None, inputs), strict=True))
  return {tensor: said[name] for name, tensor in back.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, backbone, target",
  [
    ("depth-nano", "dora", TARGETS["x86-vnni"]),
    ("objects-nano", "mobilenetv2_100_same", WHOLE),  # padded on one side, ReLU6, one scale for a layer
    ("detector-nano", "efficientvit_b0", TARGETS["x86"]),  # attention, 7 bits
    ("lanes-nano", None, TARGETS["tensorrt"]),
  ],
)
def test_the_graph_computes_what_the_rounded_student_does(name, backbone, target, tmp_path):
  """Each tensor by itself: every call goes on from what the graph says, so that a value which lies between two steps is
  off by one here and does not grow."""
  student = adapted(name) if backbone == "dora" else told_apart(build(name, backbone))[0]
  plan = make_plan(student, ("",), (), target)
  assert not plan.absent and set(plan.made) == set(plan.tensors) and len(plan.tensors) > 30 and len(plan.nodes) > 20
  export_onnx(student, tmp_path / "s.onnx")
  model = prepare((tmp_path / "s.onnx").read_bytes())
  frame = np.random.default_rng(0).integers(0, 256, (1, *student.spec.input.shape), dtype=np.uint8)
  inputs = inputs_with(student, model, [frame[0]])[0]
  found = calibrate(model, [inputs], target.symmetric)
  rounding = Rounding(plan.tensors, plan.values, plan.layers, plan.nodes, target.symmetric, target.limit, target.whole)
  seen = {plan.tensors[t]: found.ranges[t].range_value for t in plan.tensors}
  rounding.observe({k: (float(a) * 0.8, float(b) * 0.9) for k, (a, b) in seen.items()})
  low, high = (x.detach().tolist() for x in rounding.now())
  ranges = {t: (low[rounding.ranges.index(n)], high[rounding.ranges.index(n)]) for t, n in plan.tensors.items()}
  taught = found.with_ranges(ranges)
  want = graph_values(taught, target, inputs)
  by_call = {place: want[t] for t, places in plan.made.items() for place in places}
  worst = {}

  class Beside(Rounds):
    def called(self, place, func, args, kwargs):
      out = super().called(place, func, args, kwargs)
      if place not in by_call:
        return out
      step = float(grid(*(x[plan_index(place)] for x in self.rounding.now()), target.symmetric)[0])
      apart = np.abs(out.numpy() - by_call[place]) / step
      worst[place] = np.mean(apart > 0.1), np.mean(apart > 1.01)
      return torch.from_numpy(by_call[place])

  def plan_index(place):
    return rounding.ranges.index(plan.values[place])

  with torch.no_grad(), Beside(rounding, student):
    student.encode(torch.from_numpy(frame))
  assert len(worst) >= len(plan.tensors)
  # a step where a value, more where a weight lies between two: a few, of layers whose weights have one scale
  assert max(a for a, _ in worst.values()) < 0.02 and max(b for _, b in worst.values()) < 0.01, worst


# *** the commands ***


def teach(store, out, *more):
  return taught(store, out, "--batch-size", 2, "--eval-every", 1, "--no-augment", *more)


@pytest.mark.slow
def test_it_is_learned_resumed_and_made_a_variant(tmp_path, monkeypatch, capsys):
  write_store(tmp_path / "s", n=4)
  teach(tmp_path / "s", tmp_path / "float", "--steps", 2)
  before = load_checkpoint(tmp_path / "float" / "best.pt")
  args = ["--init", tmp_path / "float", "--qat", "--steps", 2, "--lr", "0.0005"]
  whole = teach(tmp_path / "s", tmp_path / "whole", *args)
  with interrupted(1):
    teach(tmp_path / "s", tmp_path / "parts", *args)
  again = teach(tmp_path / "s", tmp_path / "parts", *args, "--resume")
  assert (
    same(again["model"], whole["model"]) and same(again["ema"], whole["ema"]) and again["ranges"] == whole["ranges"]
  )
  assert same(again["optimizer"], whole["optimizer"]) and same(again["teacher"], whole["teacher"])
  # ranges were observed, and move; in the average, too, by less
  assert (whole["model"]["rounding.first"][:, 1] > 0).all() and len(whole["ranges"]) > 50
  for part in ("model", "ema"):
    moved = (whole[part]["rounding.high"] - 1).abs()
    assert 0 < float(moved.max()) < 0.002
  # norms are frozen: their statistics are those of the student that it started from
  norms = [k for k in before["ema"] if k.endswith("running_var")]
  assert norms and all(torch.equal(whole["model"][k], before["ema"][k]) for k in norms)
  said = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
  assert said[0]["before"].keys() == said[-1]["val"].keys()

  export.run(export.Options(run=tmp_path / "float", output=tmp_path / "models" / "float", tinygrad=False))
  optimize_fixture.write_routes(tmp_path / "labels", count=2, n=8)
  monkeypatch.setattr(told, "footprint", lambda bundle, runner: {"load_s": 0.1, "memory_mb": 1.0})
  said = {"int8": True, "frames": 8, "rounds": 1, "max_loss": 0.9, "qat": tmp_path / "whole"}
  options = optimize.Options(
    bundle=tmp_path / "models" / "float", data=tmp_path / "labels", output=tmp_path / "out", target=("aarch64",), **said
  )
  with pytest.raises(UserError, match="it learned the 8 bits of x86-vnni, aarch64, tinygrad, not of tensorrt"):
    optimize.run(optimize.replace(options, target=("tensorrt",)))
  with pytest.raises(UserError, match="has not learned in 8 bits"):
    optimize.run(optimize.replace(options, qat=tmp_path / "float"))
  with pytest.raises(UserError, match="give what it started from"):
    optimize.run(optimize.replace(options, bundle=tmp_path / "whole", qat=None))
  assert not (tmp_path / "out" / "optimize.json").exists()
  results = optimize.run(options)
  assert results["variants"][1]["output_errors"]["depth"] < 0.5
  bundle = load_bundle(tmp_path / "out" / "float")
  entry = bundle.graphs[0]["variants"][0]
  n = load_checkpoint(tmp_path / "whole" / "best.pt")["step"]
  how = f"ranges and weights learned in {n} steps of quantization-aware training, taught by its own float copy"
  assert entry["calibration"]["method"] == how
  assert any(x.startswith(f"8 bits: {n} steps on ") for x in bundle.manifest["provenance"]["data"])
  # its ranges are in the file, not those of the calibration frames
  model = onnx.load_from_string(bundle.onnx(bundle.graphs[0], entry))
  constants = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
  scales = sorted({float(constants[n.input[1]]) for n in model.graph.node if n.op_type == "QuantizeLinear"})
  ema = load_checkpoint(tmp_path / "whole" / "best.pt")["ema"]
  ends = (ema["rounding.low"] * ema["rounding.first"][:, 0], ema["rounding.high"] * ema["rounding.first"][:, 1])
  own = [float(grid(a, b, False)[0]) for a, b in zip(*ends, strict=True)]
  assert len(scales) > 50 and all(np.isclose(own, s, rtol=1e-5, atol=0).any() for s in scales)


@pytest.mark.parametrize(
  "more, says",
  [
    ({"qat": "x87"}, "--qat x87: no such target; there are x86-vnni"),
    ({"init": ()}, "name it with --init"),
    ({"precision": "bf16"}, "--qat and --precision bf16"),
    ({"student": "d-fine-nano"}, "only our own students"),
  ],
)
def test_what_cannot_learn_in_8_bits(more, says, tmp_path):
  said = {"labels": tmp_path, "output": tmp_path, "student": "depth-nano", "init": ("x",), "qat": True} | more
  with pytest.raises(UserError, match=says):
    target_of(Options(**said))


def test_checkpoints_of_before_have_not_learned_in_8_bits():
  assert Config.from_dict({"student": "depth-nano", "tasks": ["depth"]}).qat == ""

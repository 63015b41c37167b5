"""Driving teachers with modeld's memory, and exports: what is written is the base with the adapter in its weights."""

import builtins

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from openpilot.tools.dgx.training.constants import FEATURE_LEN, OUTPUT_NAME, output_slices
from openpilot.tools.learn.adapters.apply import adapter_parameters, apply_dora
from openpilot.tools.dgx.training.export import export, main
from openpilot.tools.dgx.training.history import History
from openpilot.tools.dgx.training.model import hash_file, load_onnx
from openpilot.tools.dgx.training.outputs import encode_slices, parse_outputs
from openpilot.tools.dgx.training.runners import open_runner
from openpilot.tools.dgx.training.teacher import DrivingTeacher
from openpilot.tools.lib.errors import UserError

SHAPES = {
  "img": (1, 12, 128, 256),
  "big_img": (1, 12, 128, 256),
  "desire_pulse": (1, 25, 8),
  "traffic_convention": (1, 2),
  "action_t": (1, 2),
  "features_buffer": (1, 24, 512),
}


def clip(steps: int, channels: int = 6, seed: int = 0) -> dict:
  r = np.random.default_rng(seed)
  frames = r.integers(0, 256, (2, steps, channels, 128, 256), dtype=np.uint8)
  return {
    "frames": frames[0],
    "big_frames": frames[1],
    "desire": (r.uniform(size=(steps, 8)) > 0.9).astype(np.float32),
    "traffic_convention": np.array([1, 0], np.float32),
    "action_t": np.array([0.3, 0.2], np.float32),
  }


def test_memory_is_modelds():
  """Frame by frame beside modeld's queues as openpilot writes them: shift, append, every fourth; the desire's largest
  of each four."""
  r = np.random.default_rng(0)
  features, desires, frames = (
    np.zeros((96, 512), np.float32),
    np.zeros((100, 8), np.float32),
    np.zeros((5, 6, 128, 256), np.uint8),
  )
  history = History(SHAPES, 1)
  for _ in range(110):
    frame, desire = r.integers(0, 256, (6, 128, 256), dtype=np.uint8), (r.uniform(size=8) > 0.95).astype(np.float32)
    f = torch.from_numpy(frame)[None]
    x = history.see(f, f.flip(1), torch.from_numpy(desire)[None], torch.tensor([[1.0, 0]]), torch.zeros(1, 2))
    frames, desires = np.concatenate([frames[1:], frame[None]]), np.concatenate([desires[1:], desire[None]])
    assert np.array_equal(x["img"][0], np.concatenate([frames[0], frames[4]]))
    assert np.array_equal(x["big_img"][0], np.concatenate([frames[0][::-1], frames[4][::-1]]))
    assert np.array_equal(x["desire_pulse"][0], desires.reshape(25, 4, 8).max(1))
    assert np.array_equal(x["features_buffer"][0], features[::4])
    feature = r.normal(size=(1, 512)).astype(np.float32)
    history.remember(torch.from_numpy(feature))
    features = np.concatenate([features[1:], feature])


def test_gradients_go_back_in_time_until_they_are_cut():
  history = History(SHAPES, 1, every=1)
  feature = torch.ones(1, FEATURE_LEN, requires_grad=True)
  history.remember(feature * 2)
  history.features_buffer().sum().backward()
  assert (feature.grad == 2).all()
  history.detach()
  assert not history.features_buffer().requires_grad and float(history.features_buffer().sum()) == 2 * FEATURE_LEN


def test_teacher_carries_its_features(reference, capsys):
  """Labels of a clip are those of the file run step by step with what it said before, in ONNX Runtime and in torch; a
  batch is its clips."""
  c = clip(3, channels=12)
  teacher = DrivingTeacher(reference, device="cpu")
  assert "ONNX Runtime (CPU)" in capsys.readouterr().err
  labels = teacher.label(c)
  assert labels["plan"].shape == (3, 33, 15) and labels["lead"].shape == (3, 3, 6, 4)
  module, slices = load_onnx(reference).eval(), output_slices()
  buffer, desire = torch.zeros(1, 24, 512), torch.zeros(1, 25, 8)
  for t in range(3):
    desire = torch.cat([desire[:, 1:], torch.from_numpy(c["desire"][t])[None, None]], 1)
    with torch.no_grad():
      v = module(
        img=torch.from_numpy(c["frames"][t])[None],
        big_img=torch.from_numpy(c["big_frames"][t])[None],
        desire_pulse=desire,
        traffic_convention=torch.tensor([[1.0, 0]]),
        action_t=torch.tensor([[0.3, 0.2]]),
        features_buffer=buffer,
      )[OUTPUT_NAME]
    want = parse_outputs(v, slices)
    buffer = torch.cat([buffer[:, 1:], want["hidden_state"][:, None]], 1)
    for k in ("plan", "lane_lines", "lead", "meta", "hidden_state"):
      torch.testing.assert_close(labels[k][t], want[k][0], rtol=1e-4, atol=1e-4)
  other = clip(3, channels=12, seed=1)
  both = DrivingTeacher(reference, "torch", "cpu").label({k: np.stack([c[k], other[k]]) for k in c})
  torch.testing.assert_close(both["plan"][0], labels["plan"], rtol=1e-4, atol=1e-3)
  torch.testing.assert_close(both["plan"][1], teacher.label(other)["plan"], rtol=1e-4, atol=1e-3)
  assert float((both["plan"][0] - both["plan"][1]).abs().max()) > 0.01


def small(path, inputs: dict, nodes, outputs: int, slices: dict, constants: dict | None = None):
  types = {"img": TensorProto.UINT8, "big_img": TensorProto.UINT8}
  ins = [helper.make_tensor_value_info(k, types.get(k, TensorProto.FLOAT), s) for k, s in inputs.items()]
  made = [numpy_helper.from_array(v, k) for k, v in (constants or {}).items()]
  out = helper.make_tensor_value_info("outputs", TensorProto.FLOAT, [1, outputs])
  model = helper.make_model(
    helper.make_graph(nodes, "g", ins, [out], made), opset_imports=[helper.make_opsetid("", 14)]
  )
  model.ir_version = 8
  model.metadata_props.add(key="output_slices", value=encode_slices(slices))
  onnx.save(model, str(path))
  return path


@pytest.fixture
def pair(tmp_path):
  """A vision file whose feature is the images' means, and a policy whose desire_state is the buffer's: both can be
  computed by hand."""
  r = np.random.default_rng(0)
  look = [
    helper.make_node("Cast", ["img"], ["a"], to=1),
    helper.make_node("ReduceMean", ["a"], ["b"], axes=[2, 3], keepdims=0),
    helper.make_node("MatMul", ["b", "w"], ["outputs"]),
  ]
  vision = small(
    tmp_path / "driving_vision.onnx",
    {k: SHAPES[k] for k in ("img",)},
    look,
    512,
    {"hidden_state": slice(0, 512)},
    {"w": r.normal(size=(12, 512)).astype(np.float32) / 100},
  )
  plan = [
    helper.make_node("ReduceSum", ["features_buffer", "axes"], ["a"], keepdims=0),
    helper.make_node("Slice", ["a", "zero", "eight", "one"], ["b"]),
    helper.make_node("ReduceMax", ["desire_pulse"], ["c"], axes=[1], keepdims=0),
    helper.make_node("Add", ["b", "c"], ["outputs"]),
  ]
  numbers = {k: np.array([v], np.int64) for k, v in (("axes", 1), ("zero", 0), ("eight", 8), ("one", 1))}
  policy = small(
    tmp_path / "driving_policy.onnx",
    {"features_buffer": (1, 25, 512), "desire_pulse": (1, 25, 8)},
    plan,
    8,
    {"desire_state": slice(0, 8)},
    numbers,
  )
  return vision, policy


def test_a_vision_and_policy_pair(pair):
  """The policy is given the present feature too, and those of every fourth frame before."""
  c = clip(6)
  c["desire"][:] = 0
  for files in (pair, pair[::-1]):
    labels = DrivingTeacher(files, "onnxruntime", "cpu").label(c)
    hidden = labels["hidden_state"].numpy()
    for t in range(6):
      logits = hidden[t::-4, :8].sum(0).astype(np.float64)
      want = np.exp(logits - logits.max())
      np.testing.assert_allclose(labels["desire_state"][t], want / want.sum(), rtol=1e-3, atol=1e-6)


def test_files_that_make_no_teacher(reference, pair, tmp_path):
  vision, policy = pair
  with pytest.raises(UserError, match="exactly one must take images"):
    DrivingTeacher(policy, device="cpu")
  with pytest.raises(UserError, match="whole supercombo; leave out driving_policy"):
    DrivingTeacher([reference, policy], device="cpu")
  with pytest.raises(UserError, match="there is no"):
    DrivingTeacher(tmp_path / "none.onnx", device="cpu")
  with pytest.raises(UserError, match="provider 'tpu'"):
    DrivingTeacher(reference, "tpu")
  with pytest.raises(UserError, match="frames are"):
    DrivingTeacher(reference, device="cpu").label({**clip(1), "frames": np.zeros((1, 3, 128, 256), np.uint8)})
  identity = [helper.make_node("Identity", ["nav_features"], ["outputs"])]
  odd = small(tmp_path / "nav.onnx", {"nav_features": (1, 4)}, identity, 4, {"plan": slice(0, 4)})
  with pytest.raises(UserError, match="wants the inputs nav_features"):
    DrivingTeacher([vision, odd], device="cpu")


def test_without_tensorrt_it_goes_on_and_says_so(reference, monkeypatch, capsys):
  real = builtins.__import__

  def without(name, *args, **kwargs):
    if name == "tensorrt":
      raise ImportError("No module named 'tensorrt'")
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", without)
  runner = open_runner(reference, "tensorrt", "cpu")
  said = capsys.readouterr().err
  assert (
    "warning: TensorRT is not here (No module named 'tensorrt'); going on with ONNX Runtime" in said
    and runner.what == "ONNX Runtime (CPU)"
  )


def checkpoint(path, base, model, rank, names):
  adapter = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
  dora = {"rank": rank, "alpha": None, "targets": names}
  torch.save(
    {
      "base": str(base),
      "base_hash": hash_file(base),
      "adapter": adapter,
      "dora": dora,
      "epoch": 1,
      "step": 1,
      "config": {},
      "val": {},
    },
    path,
  )
  return path


@pytest.fixture
def tuned(reference, tmp_path):
  torch.manual_seed(0)
  model = load_onnx(reference)
  names = apply_dora(model, 4, targets=["*heads.plan*"])
  with torch.no_grad():
    for p in adapter_parameters(model):
      p.add_(torch.randn_like(p) * 0.1)
  return checkpoint(tmp_path / "best_model.pt", reference, model, 4, names)


def test_export_is_the_base_but_for_the_plan(reference, tuned, tmp_path, capsys):
  out = tmp_path / "custom_driving_policy.onnx"
  assert main(["--checkpoint", str(tuned), "--output", str(out), "--no-tinygrad"]) == 0
  said = capsys.readouterr().out
  base, new = onnx.load(str(reference)), onnx.load(str(out))
  assert (new.graph.input, new.graph.output, new.opset_import) == (
    base.graph.input,
    base.graph.output,
    base.opset_import,
  )
  assert new.metadata_props == base.metadata_props
  assert [n.op_type for n in new.graph.node] == [n.op_type for n in base.graph.node]
  found = {
    line.split()[0]: float(line.split()[1])
    for line in said.splitlines()
    if len(line.split()) == 3 and line.split()[0] in output_slices()
  }
  assert found["plan"] > 0.01 and found["lane_lines"] == 0 and found["hidden_state"] == 0
  c = clip(2, channels=12)
  was, now = (DrivingTeacher(p, device="cpu").label(c) for p in (reference, out))
  assert float((was["plan"] - now["plan"]).abs().mean()) > 0.005 and torch.equal(was["lane_lines"], now["lane_lines"])


def test_export_compares_along_a_drive(reference, tuned, tmp_path, monkeypatch):
  """Each file with its own memory: what is said is what teachers say of the same clips."""
  clips = [clip(3, channels=12, seed=k) for k in range(2)]
  monkeypatch.setattr("openpilot.tools.dgx.training.export.read_dataset", lambda root: ({}, []))
  monkeypatch.setattr("openpilot.tools.dgx.training.export.DrivingClips", lambda shards, length: clips)
  out = tmp_path / "out.onnx"
  rows = {name: change for name, change, _ in export(tuned, out, data=tmp_path, tinygrad=False)["moved"]}
  was, now = ([DrivingTeacher(p, device="cpu").label(c)["plan"] for c in clips] for p in (reference, out))
  assert rows["plan"] == pytest.approx(float((torch.cat(now) - torch.cat(was)).abs().mean()), rel=1e-4)
  d = (torch.cat(now) - torch.cat(was))[:, 14, :2].norm(dim=-1).mean()
  assert rows["plan at 1.9 s, m"] == pytest.approx(float(d), rel=1e-4) and rows["lane_lines"] == 0


def test_export_measures_what_it_says(tuned, tmp_path):
  found = export(tuned, tmp_path / "out.onnx", tinygrad=False)
  assert found["torch_merge"] < 1e-5 and found["onnxruntime"] < 1e-5 and found["opset"] == 14


def test_checkpoints_that_are_refused(reference, tuned, tmp_path, capsys):
  state = torch.load(tuned, weights_only=True)

  def said(changed) -> str:
    torch.save(changed, tmp_path / "bad.pt")
    assert (
      main(["--checkpoint", str(tmp_path / "bad.pt"), "--output", str(tmp_path / "out.onnx"), "--no-tinygrad"]) == 2
    )
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and not (tmp_path / "out.onnx").exists()
    return err

  assert "trained on another base" in said({**state, "base_hash": "0" * 64})
  assert "lacks adapter" in said({k: v for k, v in state.items() if k != "adapter"})
  assert "does not fit" in said({**state, "adapter": dict(list(state["adapter"].items())[1:])})
  assert "another rank" in said({**state, "dora": {**state["dora"], "rank": 8}})
  assert "is not there; give it with --base" in said({**state, "base": str(tmp_path / "gone.onnx")})
  assert "holds code, and is not opened" in said({**state, "config": print})
  (tmp_path / "bad.pt").write_bytes(b"none")
  assert main(["--checkpoint", str(tmp_path / "bad.pt"), "--output", str(tmp_path / "out.onnx")]) == 2
  assert main(["--checkpoint", str(tmp_path / "no.pt"), "--output", str(tmp_path / "out.onnx")]) == 2


@pytest.mark.slow
def test_the_driver_monitoring_network_goes_the_whole_way(shared_data, tmp_path):
  """openpilot's own file: an adapter learns to say what a perturbed twin says, and is exported. A perturbed twin proves
  the plumbing, not the worth."""
  torch.manual_seed(0)
  path = shared_data / "weights" / "openpilot_dmonitoring_model.onnx"
  twin, student = load_onnx(path).eval(), load_onnx(path).eval()
  size = sum(p.numel() for p in student.parameters())
  with torch.no_grad():
    for n, p in twin.named_parameters():
      if "fc" in n or "_head" in n:
        p.add_(0.2 * p.std() * torch.randn_like(p) if p.numel() > 1 else 0.1)
  names = apply_dora(student, 16)
  assert (
    sum(p.numel() for p in adapter_parameters(student)) < 0.07 * size
  )  # measured 5.8%: the rank is clipped in the small layers
  optimizer = torch.optim.Adam(adapter_parameters(student), 3e-3)
  x = torch.rand(4, 6, 320, 160)
  test = torch.rand(2, 6, 320, 160)

  def loss(images):
    return (student(input_img=images)["outputs"] - want[len(images)]).square().mean()

  with torch.no_grad():
    want = {len(i): twin(input_img=i)["outputs"] for i in (x, test)}
    before = float(loss(x)), float(loss(test))
  for _ in range(16):
    optimizer.zero_grad()
    loss(x).backward()
    optimizer.step()
  with torch.no_grad():
    after = float(loss(x)), float(loss(test))
  assert after[0] < 0.2 * before[0] and after[1] < 0.4 * before[1]  # measured 0.093 and 0.094
  best = checkpoint(tmp_path / "best_model.pt", path, student, 16, names)
  out = tmp_path / "custom.onnx"
  found = export(best, out, opset=9)
  assert found["torch_merge"] < 1e-5 and found["onnxruntime"] < 1e-5
  base, new = onnx.load(str(path)), onnx.load(str(out))
  assert (new.graph.input, new.graph.output) == (base.graph.input, base.graph.output)
  assert [n.op_type for n in new.graph.node] == [n.op_type for n in base.graph.node]
  assert export(best, tmp_path / "default.onnx", tinygrad=False)["opset"] == 14
  assert onnx.load(str(tmp_path / "default.onnx")).graph.input == base.graph.input

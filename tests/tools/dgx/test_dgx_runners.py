"""Batches in one run where a file's graph takes them, in ONNX Runtime and, by a stand-in of it and its GPU, in
TensorRT; else one after the other."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tensorrt_fixture import install

from openpilot.tools.dgx.training import runners
from openpilot.tools.dgx.training.runners import OrtRunner, TensorRTRunner, open_runner
from openpilot.tools.dgx.training.teacher import DrivingTeacher
from openpilot.tools.lib.errors import UserError


def write(path, nodes, constants, shape=(1, 4), out=(1, 3)):
  ins, outs = ([helper.make_tensor_value_info(k, TensorProto.FLOAT, s)] for k, s in (("x", shape), ("y", out)))
  made = [numpy_helper.from_array(v, k) for k, v in constants.items()]
  model = helper.make_model(helper.make_graph(nodes, "g", ins, outs, made), opset_imports=[helper.make_opsetid("", 14)])
  model.ir_version = 8
  onnx.save(model, str(path))
  return path


def dense(folder):
  """A matrix, and a reshape that wrote the batch of one down."""
  r = np.random.default_rng(0)
  nodes = [
    helper.make_node("MatMul", ["x", "w"], ["a"]),
    helper.make_node("Reshape", ["a", "s"], ["b"]),
    helper.make_node("Flatten", ["b"], ["y"]),
  ]
  return write(
    folder / "dense.onnx", nodes, {"w": r.normal(size=(4, 3)).astype(np.float32), "s": np.array([1, 3, 1], np.int64)}
  )


def recurrent(folder):
  r = np.random.default_rng(0)
  nodes = [
    helper.make_node("Unsqueeze", ["x", "zero"], ["a"]),
    helper.make_node("GRU", ["a", "w", "r"], ["", "b"], hidden_size=3),
    helper.make_node("Squeeze", ["b", "zero"], ["y"]),
  ]
  weights = {
    "w": r.normal(size=(1, 9, 4)).astype(np.float32),
    "r": r.normal(size=(1, 9, 3)).astype(np.float32),
    "zero": np.array([0], np.int64),
  }
  return write(folder / "recurrent.onnx", nodes, weights)


def mixing(folder):
  """Its output is of all examples together."""
  nodes = [
    helper.make_node("ReduceMean", ["x"], ["a"], axes=[0], keepdims=1),
    helper.make_node("MatMul", ["a", "w"], ["y"]),
  ]
  return write(folder / "mixing.onnx", nodes, {"w": np.ones((4, 3), np.float32)})


def counted(monkeypatch) -> list[int]:
  seen: list[int] = []
  real = runners.first_output

  def first_output(session, x):
    seen.append(max(map(len, x.values())))
    return real(session, x)

  monkeypatch.setattr(runners, "first_output", first_output)
  return seen


@pytest.mark.parametrize(
  ("make", "why"), [(dense, ""), (recurrent, "recurrent (GRU)"), (mixing, "two examples at once give something else")]
)
def test_onnxruntime_takes_a_batch_at_once_where_the_graph_can(make, why, tmp_path, monkeypatch, capsys):
  path, x = make(tmp_path), torch.rand(5, 4)
  runner = OrtRunner(path, "cpu")
  alone = torch.cat([runner.run({"x": x[i : i + 1]}) for i in range(5)])
  assert not capsys.readouterr().err
  runner.run({"x": x})
  said = capsys.readouterr().err
  seen = counted(monkeypatch)
  torch.testing.assert_close(runner.run({"x": x}), alone)
  assert seen == ([1] * 5 if why else [5]) and (f"one example after the other: {why}" in said if why else not said)
  runner.run({"x": x})
  assert not capsys.readouterr().err  # found out, and said, once


@pytest.mark.parametrize("version", ["10.13", "11.4"])
def test_tensorrt_runs_whole_batches(version, tmp_path, monkeypatch):
  trt, path, x = install(monkeypatch, tmp_path / "cache", version), dense(tmp_path), torch.rand(11, 4)
  runner = TensorRTRunner(path, batch=4)
  assert trt.builds == [{"x": ((1, 4), (4, 4), (4, 4))}]  # least, best, most
  assert runner.what == f"TensorRT {version} (no-GPU, {'float16' if version == '10.13' else 'float32'}, batch 4)"
  got = runner.run({"x": x})
  assert trt.runs == [4, 4, 3]
  torch.testing.assert_close(got, OrtRunner(path, "cpu").run({"x": x}))
  torch.testing.assert_close(runner.run({"x": x[:1]}), got[:1])
  TensorRTRunner(path, batch=4)
  assert len(trt.builds) == 1  # kept
  TensorRTRunner(path, batch=2)
  assert trt.builds[1:] == [{"x": ((1, 4), (2, 4), (2, 4))}]
  one = TensorRTRunner(path)
  assert trt.builds[2:] == [None]
  trt.runs.clear()
  torch.testing.assert_close(one.run({"x": x[:3]}), got[:3])
  assert trt.runs == [1, 1, 1]


def test_tensorrt_runs_a_file_whose_batch_is_free(tmp_path, monkeypatch):
  trt, x = install(monkeypatch, tmp_path / "cache"), torch.rand(3, 4)
  path = write(
    tmp_path / "free.onnx",
    [helper.make_node("MatMul", ["x", "w"], ["y"])],
    {"w": np.ones((4, 3), np.float32)},
    ("n", 4),
    ("n", 3),
  )
  torch.testing.assert_close(TensorRTRunner(path, batch=3).run({"x": x}), x @ torch.ones(4, 3))
  assert trt.builds == [{"x": ((1, 4), (3, 4), (3, 4))}] and trt.runs == [3]
  other = write(tmp_path / "long.onnx", [helper.make_node("Identity", ["x"], ["y"])], {}, (1, "length"), (1, "length"))
  with pytest.raises(UserError, match="other free axes than the batch's"):
    TensorRTRunner(other)


def test_tensorrt_stays_at_one_for_recurrent_graphs_and_says_so(tmp_path, monkeypatch, capsys):
  trt, path, x = install(monkeypatch, tmp_path / "cache"), recurrent(tmp_path), torch.rand(3, 4)
  runner = open_runner(path, "tensorrt", batch=16)
  assert "batch 1: recurrent (GRU)" in capsys.readouterr().err and trt.builds == [None]
  torch.testing.assert_close(runner.run({"x": x}), OrtRunner(path, "cpu").run({"x": x}))
  assert trt.runs == [1, 1, 1]


def test_tensorrt_11_keeps_a_networks_types(tmp_path, monkeypatch):
  install(monkeypatch, tmp_path / "cache", "11.4")
  with pytest.raises(
    UserError, match=r"TensorRT 11.4 keeps a graph's own types; take --precision float32, or a file in bfloat16"
  ):
    TensorRTRunner(dense(tmp_path), "bfloat16")


def test_a_teacher_labels_drives_at_once(reference, tmp_path, monkeypatch):
  """Several drives in one execution a step: the same labels as ONNX Runtime's of each drive."""
  trt, r = install(monkeypatch, tmp_path / "cache"), np.random.default_rng(0)
  frames = torch.from_numpy(r.integers(0, 256, (3, 2, 12, 128, 256), dtype=np.uint8))
  clips = {
    "frames": frames,
    "big_frames": frames.flip(1),
    "desire": torch.zeros(3, 2, 8),
    "traffic_convention": torch.tensor([[1.0, 0]]).repeat(3, 1),
  }
  labels = DrivingTeacher(reference, "tensorrt", batch=3).label(clips)
  assert trt.runs == [3, 3]
  each = DrivingTeacher(reference, "onnxruntime", "cpu")
  for i in range(3):
    want = each.label({k: v[i] for k, v in clips.items()})
    torch.testing.assert_close(labels["plan"][i], want["plan"], rtol=1e-4, atol=1e-3)

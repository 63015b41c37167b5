"""The benchmarks' measuring and their reasons for not measuring; the numbers themselves are no test."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tensorrt_fixture import install

from openpilot.tools.dgx import benchmark_inference, benchmark_tensorrt
from openpilot.tools.lib.errors import cli


def test_rows(base, tmp_path, monkeypatch, capsys):
  words = [
    base,
    "--seconds",
    "0.01",
    "--device",
    "cpu",
    "--runners",
    "torch",
    "onnxruntime",
    "tensorrt",
    "--json",
    tmp_path / "x.json",
  ]
  monkeypatch.setattr("sys.argv", ["benchmark_inference", *map(str, words)])
  assert cli(benchmark_inference.main)() == 0
  found = json.loads((tmp_path / "x.json").read_text())
  rows = {(r["runner"], r["precision"]): r for r in found["rows"]}
  assert found["hardware"]["cpus"] >= 1
  assert (
    rows["torch", "float32"]["off"] == 0
    and rows["onnxruntime", "float32"]["off"] < 1e-5 < rows["torch", "bfloat16"]["off"] < 0.05
  )
  for r in rows.values():
    if "skipped" not in r:
      assert r["p50_ms"] <= r["p99_ms"] and r["calls"] >= 10
      assert r["per_second"] == pytest.approx(1e3 / r["mean_ms"])
  assert "float8" in rows["torch", "float8"]["skipped"]  # the file holds none
  out = capsys.readouterr().out
  assert "own precision" in out and "not measured" in out


def test_a_failing_runner_leaves_the_others_measured(base, monkeypatch):
  file = benchmark_inference.File(base)
  x = benchmark_inference.inputs_of(file.inputs, 1)
  want = file.reference(x)

  def broken(*_):
    raise RuntimeError("no such driver")

  monkeypatch.setattr(benchmark_inference, "open_run", broken)
  row = benchmark_inference.row_of("torch", "float32", 1, file, want, x, 0.01, "cpu")
  assert row["skipped"] == "RuntimeError: no such driver"


def test_measure_warms_up_and_counts():
  calls = []

  def run(x):
    calls.append(len(x["a"]))
    return x["a"] + 1

  out, times = benchmark_inference.measure(run, {"a": torch.zeros(2)}, 0.0)
  assert len(times) == 10 and len(calls) == 10 + benchmark_inference.WARM_UP and out.tolist() == [1, 1]


def test_teacher_rows(base, monkeypatch):
  flops = benchmark_tensorrt.flops_of(base)
  assert flops is not None and flops > 1e8
  rows = benchmark_tensorrt.measure([base], "onnxruntime", None, [1, 2], 2, flops)
  assert [r["batch"] for r in rows] == [1, 2]
  for r in rows:
    assert r["of_800"] == pytest.approx(r["frames_per_second"] / 800)
    assert r["tflops"] == pytest.approx(r["frames_per_second"] * flops / 1e12)
  try:
    import tensorrt  # noqa: F401
  except ImportError:
    assert benchmark_tensorrt.measure([base], "tensorrt", None, [1], 1, flops)[0]["skipped"] == "TensorRT is not here"


def other(path, first: int = 1):
  """No driving model."""
  ins, outs = ([helper.make_tensor_value_info(k, TensorProto.FLOAT, [first, n])] for k, n in (("x", 8), ("y", 4)))
  nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Relu", ["a"], ["y"])]
  weights = [numpy_helper.from_array(np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32), "w")]
  model = helper.make_model(
    helper.make_graph(nodes, "g", ins, outs, weights), opset_imports=[helper.make_opsetid("", 15)]
  )
  model.ir_version = 8
  onnx.save(model, str(path))
  return path


def determinant(path):
  """Of an operator that our torch does not know."""
  info = helper.make_tensor_value_info
  graph = helper.make_graph(
    [helper.make_node("Det", ["x"], ["y"])],
    "g",
    [info("x", TensorProto.FLOAT, [1, 3, 3])],
    [info("y", TensorProto.FLOAT, [1])],
  )
  model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)])
  model.ir_version = 8
  onnx.save(model, str(path))
  return path


def command(monkeypatch, module, *words) -> int:
  monkeypatch.setattr("sys.argv", ["benchmark", *map(str, words)])
  return cli(module.main)()


@pytest.mark.parametrize(("make", "known"), [(other, True), (determinant, False)])
def test_any_network_is_measured(make, known, tmp_path, monkeypatch, capsys):
  path = make(tmp_path / "other.onnx")
  words = [path, "--batches", 1, "--json", tmp_path / "x.json"]
  assert command(monkeypatch, benchmark_tensorrt, *words, "--steps", 2) == 0
  out = capsys.readouterr().out
  assert "other.onnx is no driving model: the bare network, on noise" in out and ("GFLOP a step" in out) == known
  rows = {r["provider"]: r for r in json.loads((tmp_path / "x.json").read_text())["rows"]}
  assert rows["onnxruntime"]["frames_per_second"] > 0
  assert rows["torch"]["frames_per_second"] > 0 if known else "Det" in rows["torch"]["skipped"]
  assert (
    command(
      monkeypatch,
      benchmark_inference,
      *words,
      "--seconds",
      0.01,
      "--device",
      "cpu",
      "--runners",
      "torch",
      "onnxruntime",
    )
    == 0
  )
  rows = {(r["runner"], r["precision"]): r for r in json.loads((tmp_path / "x.json").read_text())["rows"]}
  assert rows["onnxruntime", "float32"]["off"] < 1e-5
  assert rows["torch", "float32"]["off"] == 0 if known else "Det" in rows["torch", "float32"]["skipped"]


def test_nothing_measured_is_an_error(base, tmp_path, monkeypatch, capsys):
  def refused(module, *words) -> str:
    assert command(monkeypatch, module, *words) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]

  assert "nothing was measured: this hardware has no float4" in refused(
    benchmark_inference, base, "--device", "cpu", "--precisions", "float4"
  )
  assert "no input has an axis of examples" in refused(
    benchmark_inference, other(tmp_path / "four.onnx", first=4), "--batches", 2, "--device", "cpu"
  )
  for module in (benchmark_inference, benchmark_tensorrt):
    assert "there is no" in refused(module, tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("version https://git-lfs.github.com/spec/v1")
    assert "not a sound ONNX file" in refused(module, tmp_path / "text.onnx")
  monkeypatch.setattr(benchmark_tensorrt, "PROVIDERS", ("onnxruntime",))
  policy = other(tmp_path / "policy.onnx")
  assert (
    "error: nothing was measured: " in (said := refused(benchmark_tensorrt, base, policy))
    and "has no output_slices" in said
  )


def test_batches_in_tensorrt(base, tmp_path, monkeypatch):
  trt = install(monkeypatch, tmp_path / "cache")
  rows = benchmark_tensorrt.measure([base], "tensorrt", None, [1, 4], 2, None)
  assert [r["what"] for r in rows] == [f"TensorRT 10.13 (no-GPU, float16, batch {n})" for n in (1, 4)] and trt.runs == [
    1,
    1,
    1,
    4,
    4,
    4,
  ]

"""The benchmarks' measuring and their reasons for not measuring; the numbers themselves are no test."""

import json

import pytest
import torch

from openpilot.tools.dgx import benchmark_inference, benchmark_tensorrt
from openpilot.tools.dgx.training.model import load_onnx
from openpilot.tools.dgx.training.reference import save_reference
from openpilot.tools.lib.errors import cli


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  return save_reference(tmp_path_factory.mktemp("base") / "reference.onnx")


def test_rows(base, tmp_path, monkeypatch, capsys):
  words = [base, "--seconds", "0.01", "--device", "cpu", "--runners", "torch", "onnxruntime", "tensorrt", "--json", tmp_path / "x.json"]
  monkeypatch.setattr("sys.argv", ["benchmark_inference", *map(str, words)])
  assert cli(benchmark_inference.main)() == 0
  found = json.loads((tmp_path / "x.json").read_text())
  rows = {(r["runner"], r["precision"]): r for r in found["rows"]}
  assert found["hardware"]["cpus"] >= 1
  assert rows["torch", "float32"]["off"] == 0 and rows["onnxruntime", "float32"]["off"] < 1e-5 < rows["torch", "bfloat16"]["off"] < 0.05
  for r in rows.values():
    if "skipped" not in r:
      assert r["p50_ms"] <= r["p99_ms"] and r["calls"] >= 10
      assert r["per_second"] == pytest.approx(1e3 / r["mean_ms"])
  assert "float8" in rows["torch", "float8"]["skipped"]  # the file holds none
  out = capsys.readouterr().out
  assert "own precision" in out and "not measured" in out


def test_a_failing_runner_leaves_the_others_measured(base, monkeypatch):
  model = load_onnx(base).eval()
  x = benchmark_inference.inputs_of(model, 1)
  want = next(iter(model(**x).values()))

  def broken(*_):
    raise RuntimeError("no such driver")

  monkeypatch.setattr(benchmark_inference, "open_run", broken)
  row = benchmark_inference.row_of("torch", "float32", 1, base, model, want, x, 0.01, "cpu")
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

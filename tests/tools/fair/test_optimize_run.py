"""`op optimize` of a finished run of distill: it is exported first."""

import sys

import pytest

import optimize_fixture
from label_fixture import write_store
from openpilot.selfdrive.modeld.fair import cpu
from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.selfdrive.modeld.fair.runners.onnx import OnnxRunner
from openpilot.tools.fair.distillation import distill
from openpilot.tools.fair.optimize import optimize as module, told
from openpilot.tools.lib.errors import UserError


@pytest.mark.slow
def test_a_run_is_exported_and_quantized(tmp_path, monkeypatch):
  write_store(tmp_path / "s", license="CC-BY-NC-4.0")
  words = ["distill", "--labels", tmp_path / "s", "--student", "depth-nano", "--output", tmp_path / "My-Run"]
  words += ["--steps", 3, "--batch-size", 4, "--eval-every", 2, "--workers", 0, "--accept-license", "CC-BY-NC-4.0"]
  monkeypatch.setattr(sys, "argv", [str(w) for w in words])
  distill.main()
  store = tmp_path / "labels"
  optimize_fixture.write_routes(store, count=2, n=8)
  monkeypatch.setattr(told, "footprint", lambda bundle, runner: {"load_s": 0.1, "memory_mb": 1.0})
  said = {"int8": True, "target": ("x86",), "frames": 8, "rounds": 1, "max_loss": 0.5}
  args = module.Options(bundle=tmp_path / "My-Run", data=store, output=tmp_path / "out", **said)
  with pytest.raises(UserError, match="CC-BY-NC-4"):
    module.run(args)
  assert not (tmp_path / "out" / "my-run").exists()
  results = module.run(module.replace(args, accept_license=("CC-BY-NC-4.0",)))
  bundle = load_bundle(tmp_path / "out" / "my-run")
  assert results["bundle"] == bundle.name == "my-run"
  assert [v["target"] for g in bundle.graphs for v in g["variants"]] == ["x86"]
  # layers of a real student: depthwise, strided, behind a neck
  assert len(results["disturbs"]["x86"]) > 10 and results["variants"][1]["output_errors"]["depth"] < 0.2
  monkeypatch.setattr(cpu, "targets", lambda: ("x86",))
  assert OnnxRunner(bundle, bundle.graphs[0]).what == "ONNX Runtime, int8 for x86"
  assert "run" in (tmp_path / "out" / "options.yaml").read_text().lower()

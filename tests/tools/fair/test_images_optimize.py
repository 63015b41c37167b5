"""`images optimize`, and the note's name for it: what it asks of `op optimize`, and which file lies where."""

import runpy
import sys
from pathlib import Path

import pytest

import optimize_fixture
from openpilot.selfdrive.modeld.fair.bundle import write_manifest
from openpilot.tools.fair.images import optimize as module
from openpilot.tools.lib.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def asked(tmp_path, monkeypatch):
  """What `op optimize` is asked; it writes a bundle with every variant."""
  found = []

  def run(options):
    found.append(options)
    made = optimize_fixture.write_conv(options.output / "conv")
    rows = []
    for target, name, precision in (
      ("x86", "scene.int8-x86.onnx", "int8"),
      ("tflite", "scene.tflite", "float32"),
      ("tflite-int8", "scene-int8.tflite", "int8"),
    ):
      (made.path / name).write_text(name)
      rows.append({"target": target, "file": name, "precision": precision})
    made.manifest["graphs"][0]["variants"] = rows
    write_manifest(made.path, made.manifest)
    (options.output / "scene.tensorrt.engine").write_text("an engine")

  monkeypatch.setattr(module.optimize, "run", run)
  monkeypatch.setattr("openpilot.selfdrive.modeld.fair.cpu.targets", lambda: ("x86",))
  return found


def note(monkeypatch, *words):
  """python tools/fair/grounded_sam/optimize_model.py WORDS -> exit code."""
  monkeypatch.setattr(sys, "argv", ["optimize_model.py", *map(str, words)])
  with pytest.raises(SystemExit) as e:
    runpy.run_path(str(ROOT / "tools/fair/grounded_sam/optimize_model.py"), run_name="__main__")
  return e.value.code


def test_the_notes_three_commands(tmp_path, asked, monkeypatch):
  student = tmp_path / "exp1" / "student"
  bundle = optimize_fixture.write_conv(student / "conv")
  (student / "best.pt").touch()
  out, data = student / "optimized", tmp_path / "train.json"
  assert note(monkeypatch, "--model", student / "best.pt", "--format", "onnx", "--output", out / "model.onnx") == 0
  assert (out / "model.onnx").read_bytes() == bundle.onnx(bundle.graphs[0]) and not asked
  words = ("--quantize", "int8", "--calibration-data", data, "--output", out / "int8.onnx")
  assert note(monkeypatch, "--model", bundle.path / "scene.onnx", *words) == 0
  (said,) = asked
  assert (said.bundle, said.data, said.output) == (bundle.path, data, out / "int8")
  assert said.int8 and said.format == ("onnx",) and (out / "int8.onnx").read_text() == "scene.int8-x86.onnx"
  words = ("--format", "tensorrt", "--precision", "fp16", "--data", data, "--output", out / "model.engine")
  assert note(monkeypatch, "--model", bundle.path, *words) == 0
  assert not asked[1].int8 and asked[1].format == ("tensorrt",) and (out / "model.engine").read_text() == "an engine"
  words = ("--format", "onnx", "tensorrt", "--quantize", "int8", "--data", data, "--output", out)
  assert note(monkeypatch, "--model", student / "best.pt", *words) == 0
  assert asked[2].format == ("onnx", "tensorrt") and asked[2].output == out


@pytest.mark.parametrize("quantize, name", [(None, "scene.tflite"), ("int8", "scene-int8.tflite")])
def test_a_tflite_file(tmp_path, asked, quantize, name):
  bundle = optimize_fixture.write_conv(tmp_path / "conv")
  options = module.Options(
    bundle.path, tmp_path / "x.tflite", format=("tflite",), quantize=quantize, data=tmp_path / "d.json"
  )
  assert module.run(options).read_text() == name


@pytest.mark.parametrize(
  "said, match",
  [
    ({"quantize": "int8"}, "say --data"),
    ({"format": ("tflite",)}, "say --data"),
    ({"output": Path("x.pb")}, "ends with .onnx, .engine, .tflite"),
    ({"output": Path("x.tflite")}, "x.tflite is a file of tflite, --format says onnx"),
    ({"precision": "fp16"}, "--precision fp16 is of --format tensorrt"),
    ({"format": ("tensorrt",), "data": Path("d")}, "say --precision fp16, or --quantize int8"),
    ({"format": ("pb",)}, "--format pb: there are"),
  ],
)
def test_bad_input_is_one_line(tmp_path, asked, said, match):
  with pytest.raises(UserError, match=match):
    module.run(module.Options(**({"model": tmp_path, "output": tmp_path / "out"} | said)))
  assert not asked and not (tmp_path / "out").exists()

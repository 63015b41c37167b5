"""Nothing of the folder that one works in is taken for a module: a route's folder with numpy.py in it would run with
every command that is given there."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OP = (ROOT / "tools" / "op.sh").read_text()
PLANTED = (
  "numpy",
  "capnp",
  "zmq",
  "json",
  "argparse",
  "typing",
  "onnxruntime",
  "torch",
  "pip",
  "venv",
  "openpilot",
  "site",
  "pytest",
  "av",
  "cv2",
)
COMMANDS = re.findall(r"^  ([a-z-]+)\) setup [a-z,]+; py openpilot", OP, re.M)
LIGHT = ("demo", "replay", "flag", "manager", "fairmodeld")


@pytest.fixture
def op(tmp_path, monkeypatch):
  """op.sh with this Python, in a folder of planted modules. -> run(words): its result; fails where one of them ran."""
  venv, here = tmp_path / "venv", tmp_path / "here"
  (venv / "bin").mkdir(parents=True)
  (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
  (venv / "bin" / "python").chmod(0o755)
  number = subprocess.run(
    ["cksum"], stdin=open(ROOT / "pyproject.toml"), capture_output=True, text=True
  ).stdout.split()[0]
  (venv / f".installed-tools,train,test-{number}").touch()
  here.mkdir()
  for name in PLANTED:
    (here / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\nraise SystemExit(99)\n")
  for key, value in {
    "FAIR_VENV": venv,
    "PARAMS_ROOT": tmp_path / "params",
    "OPENPILOT_PREFIX": f"safe-{os.getpid()}",
  }.items():
    monkeypatch.setenv(key, str(value))
  monkeypatch.delenv("PYTHONPATH")
  monkeypatch.delenv("PYTHONSAFEPATH")

  def run(*words: str, timeout: float = 120) -> subprocess.CompletedProcess:
    r = subprocess.run(
      ["bash", str(ROOT / "tools" / "op.sh"), *words], cwd=here, capture_output=True, text=True, timeout=timeout
    )
    assert not (tmp_path / "ran").exists(), f"{words}: ran {(tmp_path / 'ran').read_text()}"
    return r

  return run


def test_light_commands(op):
  assert len(COMMANDS) >= 20 and set(LIGHT) <= set(COMMANDS)
  for name in LIGHT:
    r = op(name, "--help")
    assert r.returncode == 0 and r.stdout.startswith("usage:"), f"{name}: {r.stderr}"
  assert op("flag", "status").stdout.startswith("FairEnabled")
  r = op("python", "-c", "import numpy, sys; print(numpy.__version__, '' in sys.path)")
  assert r.returncode == 0 and r.stdout.endswith("False\n"), r.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(COMMANDS) - set(LIGHT)))
def test_other_commands(op, name):
  r = op(name, "--help")
  assert r.returncode == 0 and r.stdout.startswith("usage:"), r.stderr


@pytest.mark.slow
def test_a_whole_demo(op, tmp_path):
  """Its manager, that one's fairmodeld, the C compiler's cache: none of these processes finds the planted ones
  either."""
  if shutil.which("cc") is None:
    pytest.skip("no C compiler here")
  r = op("demo", "--seconds", "1", "--out", str(tmp_path / "demo"), timeout=300)
  assert r.returncode == 0 and (tmp_path / "demo" / "report.html").exists(), r.stderr


def test_python_is_started_safely():
  """Every process of this Python that our code starts has -P."""
  found = []
  for path in [p for d in ("cereal", "selfdrive", "tools") for p in (ROOT / d).rglob("*.py")]:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
      if isinstance(node, ast.List) and node.elts and ast.unparse(node.elts[0]) == "sys.executable":
        found.append(path.name)
        assert len(node.elts) > 1 and ast.unparse(node.elts[1]) == "'-P'", (
          f"{path}:{node.lineno}: without -P; tools have lib/python.py"
        )
  assert {"child.py", "process.py", "python.py"} <= set(found)
  scons = (ROOT / "selfdrive" / "modeld" / "fair" / "SConscript").read_text()
  assert scons.count("sys.executable") == scons.count("[sys.executable, '-P', ") == 1


def test_onnx_runtime_is_loaded_in_one_place():
  """Its telemetry is off before it is loaded; by any other import it would not be. Its quantizer is a module of its
  own, which asks that place first."""
  importers = []
  for path in [p for d in ("cereal", "selfdrive", "tools") for p in (ROOT / d).rglob("*.py")]:
    for node in ast.walk(ast.parse(path.read_text())):
      names = (
        [a.name for a in node.names]
        if isinstance(node, ast.Import)
        else [node.module or ""]
        if isinstance(node, ast.ImportFrom)
        else []
      )
      if any(n.split(".")[0] == "onnxruntime" for n in names):
        importers.append(path.relative_to(ROOT).as_posix())
  assert set(importers) == {"selfdrive/modeld/fair/ort.py", "tools/fair/optimize/quantize.py"}
  env = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | {"PYTHONPATH": str(ROOT)}
  code = """
import importlib, os, sys
class Watch:
  def find_spec(self, name, path=None, target=None):
    if name == "onnxruntime":
      print(os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.meta_path.insert(0, Watch())
importlib.import_module(sys.argv[1])
"""
  for module in ("selfdrive.modeld.fair.runners.onnx", "tools.fair.optimize.quantize"):
    words = [sys.executable, "-P", "-c", code, f"openpilot.{module}"]
    r = subprocess.run(words, env=env, capture_output=True, text=True)
    assert r.stdout == "1\n", r.stderr
  assert "export ORT_DISABLE_TELEMETRY=1" in OP

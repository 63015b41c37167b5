"""The two worlds stay apart: cereal imports nothing of ours, selfdrive no tools, and the runtime nothing that a device
does not have."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from openpilot.selfdrive.modeld.fair.roles import FORMER, ROLES

ROOT = Path(__file__).resolve().parents[1]
FAIR = ROOT / "selfdrive" / "modeld" / "fair"
API = {
  "openpilot",
  "openpilot.cereal",
  "openpilot.cereal.services",
  "openpilot.cereal.visionipc",
  "openpilot.common.params",
  "openpilot.common.realtime",
  "openpilot.common.transformations.camera",
  "openpilot.common.transformations.model",
}  # openpilot's own, in any checkout
OLDER = {"cereal", "cereal.services", "msgq.visionipc"}  # of older checkouts
HEAVY = {
  "torch",
  "torchvision",
  "transformers",
  "peft",
  "timm",
  "matplotlib",
  "av",
  "zstandard",
  "PIL",
  "tqdm",
  "jinja2",
  "onnx",
  "jsonschema",
}


def imports(folder):
  for path in sorted(folder.rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        for a in node.names:
          yield path, a.name
      elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{path}: relative import"
        yield path, node.module


def test_cereal_imports_nothing_of_ours():
  found = list(imports(ROOT / "cereal"))
  assert found and not [x for x in found if x[1].startswith("openpilot") and not x[1].startswith("openpilot.cereal")]


def test_selfdrive_imports_no_tools_and_nothing_heavy():
  found = list(imports(ROOT / "selfdrive"))
  assert found and not [x for x in found if x[1].startswith("openpilot.tools") or x[1].split(".")[0] in HEAVY]
  assert not [x for x in imports(ROOT / "cereal") if x[1].split(".")[0] in HEAVY]


def test_the_runtime_can_be_lifted_out():
  """Only the standard library, numpy, what runs graphs, its own folder and openpilot's API; and the process API through
  ipc.py alone."""
  for path, name in imports(FAIR):
    top = name.split(".")[0]
    if top == "openpilot":
      assert name.startswith("openpilot.selfdrive.modeld.fair") or name in API, f"{path} imports {name}"
      if name.startswith("openpilot.cereal") or name in ("openpilot.common.params", "openpilot.common.realtime"):
        assert path.name == "ipc.py", f"{path} imports {name}: that belongs into ipc.py"
    elif name in OLDER:
      assert path.name == "ipc.py"
    else:
      assert top in sys.stdlib_module_names | {
        "numpy",
        "onnxruntime",
        "tinygrad",
        "tensorrt",
        "ai_edge_litert",
        "setproctitle",
      }, f"{path} imports {name}"


def test_the_runtime_names_no_class():
  """It asks for roles. roles.py has the one table of names, of bundles from before manifests had roles. What else is
  called so: the line of fairLanes, the road camera."""
  names, other = set(FORMER) - set(ROLES), {"lanes.py": {"lane"}, "frames.py": {"road"}}
  assert len(names) == 5
  for path in sorted(FAIR.rglob("*.py")):
    said = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant) and n.value in names}
    assert path.name == "roles.py" or said <= other.get(path.name, set()), f"{path} names {said}"


def test_no_file_of_this_project_is_long_beyond_reading():
  sizes = {
    p.relative_to(ROOT): len(p.read_text().splitlines())
    for d in ("cereal", "selfdrive", "tools")
    for p in (ROOT / d).rglob("*.py")
  }
  assert sizes and not {p: n for p, n in sizes.items() if n > 450}


RUN = """
import sys
import numpy as np
from openpilot.cereal.visionipc import nv12_info
from openpilot.selfdrive.modeld.fair import worker
from openpilot.selfdrive.modeld.fair.bundle import find_bundle
from openpilot.selfdrive.modeld.fair.model import FairModel
model = FairModel(find_bundle("scene-nano", worker.MODELS_DIR))
stride, y_height, _, size = nv12_info(1344, 760)
model.set_camera(1344, 760, stride, stride * y_height)
for i in range(3):
  messages = model.process(np.random.default_rng(i).integers(0, 256, size, dtype=np.uint8), i, 0, 1)
  assert [n for n, m in messages if m.valid] == ["fairDepth", "fairSegmentation"][i % 2:]  # depth at 10 Hz
heavy = {"torch", "transformers", "matplotlib", "av", "onnx", "tinygrad"} & set(sys.modules)
assert not heavy, heavy
print("ran", model.bundle.name)
"""


@pytest.mark.slow
def test_runtime_in_an_environment_of_its_own(tmp_path):
  """A fresh virtual environment with what pyproject.toml calls the runtime, nothing else: no torch can be in it."""
  import tomllib

  wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
  assert sorted(d.split(">")[0] for d in wanted) == ["numpy", "onnxruntime", "pycapnp", "pyzmq"]
  subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
  python = tmp_path / "venv" / "bin" / "python"
  subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted], check=True)
  r = subprocess.run(
    [python, "-c", RUN],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
  )
  assert r.returncode == 0 and r.stdout.startswith("ran "), r.stderr
  assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode != 0

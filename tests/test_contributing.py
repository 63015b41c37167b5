"""The recipes of CONTRIBUTING.md, as they stand there: their blocks are written into a package outside the repository,
imported, and do what they promise. No file of the repository changes."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from openpilot.tools.lib.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture(scope="module")
def package(tmp_path_factory):
  """The recipes' package, imported; what it registered is taken out again."""
  from openpilot.selfdrive.modeld.fair.runners import RUNNERS
  from openpilot.tools.fair.registry import TEACHERS

  folder = tmp_path_factory.mktemp("outside")
  for kind, text in re.findall(r"^```(python|yaml)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
    first, _, _ = text.partition("\n")
    name = first.removeprefix("# ")
    assert name.startswith("my_package/") and name.endswith((".py", ".yaml")[kind == "yaml"]), first
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
  registries = (RUNNERS, TEACHERS)
  before = [dict(r) for r in registries]
  with pytest.MonkeyPatch.context() as m:
    m.syspath_prepend(str(folder))
    importlib.import_module("my_package")
    yield folder
  for r, b in zip(registries, before, strict=True):
    r.clear()
    r.update(b)
  for name in [n for n in sys.modules if n.split(".")[0] == "my_package"]:
    del sys.modules[name]


def test_teacher(package):
  from openpilot.tools.fair.registry import load_teacher
  from openpilot.tools.fair.teacher import Clip

  teacher = load_teacher("bright-lines", threshold=100)
  rgb = np.zeros((2, 3, 8, 16), np.uint8)
  rgb[1, :, 6, 3] = 101  # bright, in the lower half
  rgb[1, :, 1, 3] = 101  # in the upper half
  rgb[1, :2, 7, 3] = 101  # not bright in blue
  teacher.prepare(8, 16)
  labels, state = teacher.label(Clip(rgb))
  assert state is None and np.argwhere(labels["segmentation"]).tolist() == [[1, 6, 3]]
  assert teacher.labels[0].shape == (8, 16) and teacher.license == "MIT"


def test_commands_know_the_teacher_and_its_option(package):
  env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{package}", "FAIR_PLUGINS": "my_package"}
  command = [sys.executable, "-P", "-m", "openpilot.tools.fair.list_teachers", "bright-lines"]
  done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=package)
  assert done.returncode == 0 and "bright-lines.threshold=200" in done.stdout, done.stderr
  done = subprocess.run(command, env={**env, "FAIR_PLUGINS": "nothing"}, capture_output=True, text=True, cwd=package)
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr == "error: FAIR_PLUGINS: no module 'nothing'; add the folder that holds it to PYTHONPATH\n"


def test_classes(package):
  from openpilot.tools.fair.spec import read_classes

  classes = read_classes(package / "my_package" / "classes.yaml")
  assert classes.maps == ("background", "road", "vehicle", "cone") and classes.boxes == ("vehicle", "cone")
  assert classes.resolve(["Traffic-Cone", "sky", "truck"], "boxes", "here").tolist() == [1, -1, 0]
  with pytest.raises(UserError, match="'pothole' is no class of 'road with cones'"):
    classes.resolve(["pothole"], "maps", "here")


def test_runner(package, tmp_path):
  from fair_bundle import write_bundle

  from openpilot.selfdrive.modeld.fair.runners import open_runner

  bundle = write_bundle(tmp_path / "tiny")
  graph = bundle.graphs[0]
  frame = np.random.default_rng(0).integers(0, 255, (1, 6, 128, 256), np.uint8)
  ours = open_runner(bundle, graph, "onnx-reference")
  assert ours.what == "onnx's reference implementation"
  got = {k: v.copy() for k, v in ours.run({"frame": frame}).items()}
  for name, want in open_runner(bundle, graph, "onnx").run({"frame": frame}).items():
    assert np.abs(got[name] - want).max() <= 1e-5 * np.abs(want).max(), name

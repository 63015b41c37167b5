"""The recipes of CONTRIBUTING.md, as they stand there: their blocks are written into a package outside the repository,
imported, and do what they promise. No file of the repository changes."""

import importlib
import json
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
  from openpilot.tools.fair.evaluation.groups import GROUPS
  from openpilot.tools.fair.labels.sources import SOURCES
  from openpilot.tools.fair.registry import TEACHERS
  from openpilot.tools.fair.students.sizes import SIZES
  from openpilot.tools.fair.students.student import HEADS
  from openpilot.tools.fair.tasks import TASKS

  folder = tmp_path_factory.mktemp("outside")
  for kind, text in re.findall(r"^```(python|yaml)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
    first, _, _ = text.partition("\n")
    name = first.removeprefix("# ")
    assert name.startswith("my_package/") and name.endswith((".py", ".yaml")[kind == "yaml"]), first
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
  registries: tuple[dict, ...] = (RUNNERS, TEACHERS, TASKS, HEADS, SIZES, GROUPS, SOURCES)
  before = [dict(r) for r in registries]
  with pytest.MonkeyPatch.context() as m:
    m.syspath_prepend(str(folder))
    importlib.import_module("my_package")
    importlib.import_module("my_package.student")
    importlib.import_module("my_package.metric")
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
  assert labels["contrast"][0] == 0 < labels["contrast"][1] < 0.1
  assert teacher.labels[0].shape == (8, 16) and teacher.license == "MIT"


def test_commands_know_the_teacher_and_its_option(package):
  env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{package}", "FAIR_PLUGINS": "my_package"}
  command = [sys.executable, "-P", "-m", "openpilot.tools.fair.list_teachers", "bright-lines"]
  done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=package)
  assert done.returncode == 0 and "bright-lines.threshold=200" in done.stdout, done.stderr
  done = subprocess.run(command, env={**env, "FAIR_PLUGINS": "nothing"}, capture_output=True, text=True, cwd=package)
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr == "error: FAIR_PLUGINS: no module 'nothing'; add the folder that holds it to PYTHONPATH\n"


def test_source(package, tmp_path, monkeypatch):
  from PIL import Image

  from openpilot.tools.fair.labels import import_labels
  from openpilot.tools.fair.labels.store import LabelStore

  data = tmp_path / "data"
  data.mkdir()
  for name in ("a.png", "b.png"):
    Image.new("RGB", (640, 320), (60, 60, 60)).save(data / name)
  (data / "boxes.csv").write_text("file,class,x0,y0,x1,y1\nb.png,cone,100,50,200,150\nb.png,car,0,0,640,320\n")
  words = ["import", data, "--name", "mine", "--license", "MIT", "--size", "320x256", "--output", tmp_path / "store"]
  monkeypatch.setattr(sys, "argv", [*map(str, words)])
  assert not import_labels.main()
  [group] = [g for g in LabelStore(tmp_path / "store").groups() if g.teacher != "frames"]
  assert group.meta["teacher"]["licence"] == "MIT"
  table = group.table(group.labels[0].name).to_pydict()
  assert [group.labels[0].classes[k] for k in table["cls"]] == ["cone", "car"]
  scale = 320 / 640  # the whole picture fits into the input
  for column, corner in zip(("x0", "y0", "x1", "y1"), (100, 50, 200, 150), strict=True):
    assert table[column][0] == pytest.approx(corner * scale - 0.5)


def test_classes(package):
  from openpilot.tools.fair.spec import read_classes

  classes = read_classes(package / "my_package" / "classes.yaml")
  assert classes.maps == ("background", "road", "vehicle", "cone") and classes.boxes == ("vehicle", "cone")
  assert classes.resolve(["Traffic-Cone", "sky", "truck"], "boxes", "here").tolist() == [1, -1, 0]
  with pytest.raises(UserError, match="'pothole' is no class of 'road with cones'"):
    classes.resolve(["pothole"], "maps", "here")


def test_metric(package):
  from openpilot.tools.fair.evaluation.compared import Compared
  from openpilot.tools.fair.evaluation.groups import GROUPS, Card, load_groups
  from openpilot.tools.fair.evaluation.scenes import Scene

  load_groups()
  assert GROUPS["near"].headline == "abs_rel_near"
  truth = np.array([[10.0, 16.0, 40.0, np.nan]], np.float32)
  cards = [Card(Compared(), {}) for _ in range(2)]
  for card, depth in zip(cards, ([11.0, 16.0, 1.0, 5.0], [10.0, np.nan, 40.0, 5.0]), strict=True):
    ref = Scene(depth=truth, depth_kind="metric")
    error = card.add(Scene(depth=np.array([depth], np.float32), depth_kind="metric"), ref, None)["near"]
    assert error == pytest.approx(0.05 if depth[0] == 11 else 0)  # of two pixels; of one
  pooled = type(cards[0].sums["near"]).pooled([c.sums["near"] for c in cards])
  assert pooled.result() == {"abs_rel_near": pytest.approx(0.1 / 3)}
  assert "near" not in cards[0].add(Scene(), ref, None)


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


def write_labels(root: Path, teacher) -> np.ndarray:
  """A store of 8 frames, ever brighter on one side, labeled by the recipe's teacher. -> their contrast"""
  from label_fixture import FRAME, group_of

  from openpilot.selfdrive.modeld.fair.frames import pack_rgb
  from openpilot.tools.fair.labels.store import LabelStore
  from openpilot.tools.fair.teacher import Clip

  rgb = np.full((8, 256, 512, 3), 60, np.uint8)
  rgb[:, :, 256:] += 20 * np.arange(8, dtype=np.uint8)[:, None, None, None]
  teacher.prepare(256, 512)
  labels, _ = teacher.label(Clip(rgb.transpose(0, 3, 1, 2)))
  store = LabelStore(root, create=True)
  group_of(store, "r--0", "frames", FRAME, 8, "").write_chunk(0, {"frame": np.stack([pack_rgb(x) for x in rgb])})
  group_of(store, "r--0", teacher.name, teacher.labels, 8).write_chunk(0, labels)
  return labels["contrast"]


@pytest.mark.slow
def test_task_head_and_size_learn_from_the_teacher(package, tmp_path, monkeypatch):
  import torch

  from openpilot.selfdrive.modeld.fair.bundle import load_bundle
  from openpilot.selfdrive.modeld.fair.runners import open_runner
  from openpilot.tools.fair.bundle import export
  from openpilot.tools.fair.distillation import distill
  from openpilot.tools.fair.labels.store import LabelStore
  from openpilot.tools.fair.registry import load_teacher

  def run(main, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
    assert not main()

  torch.set_num_threads(1)
  store = tmp_path / "labels"
  want = write_labels(store, load_teacher("bright-lines"))
  how = ("--student", "contrast-pico", "--steps", 2, "--batch", 2, "--warmup", 1, "--eval-every", 2, "--workers", 0)
  run(distill.main, "--labels", store, *how, "--no-augment", "--out", tmp_path / "run")
  run(export.main, tmp_path / "run", "--no-tinygrad", "--weights", "float32", "--out", tmp_path / "mine")
  bundle = load_bundle(tmp_path / "mine")
  runner = open_runner(bundle, bundle.graphs[0], "onnx")
  frames = next(g for g in LabelStore(store).groups() if g.teacher == "frames").dense("frame")[:8]
  got = [runner.run({"frame": x[None]})["contrast"].item() for x in frames]
  held_out = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["val"]["contrast/l1"]
  assert held_out == pytest.approx(abs(got[7] - want[7, 0]), rel=1e-4)  # the last eighth of the segment is held out

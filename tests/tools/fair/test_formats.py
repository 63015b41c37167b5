"""`op optimize --format`: the environment of TFLite's converter, what becomes of its answers, float16 in the graph. The
converter itself, 750 MB, is stood for by a script."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import optimize_fixture
import tensorrt_mock
import tflite_mock
from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.tools.fair.optimize import formats, optimize as module, told
from openpilot.tools.fair.optimize.half import half, outside
from openpilot.tools.fair.optimize.quantize import last_layers, prepare
from openpilot.tools.fair.optimize.sensitivity import run_all
from openpilot.tools.fair.tflite import convert, environment
from openpilot.tools.lib.errors import UserError
from openpilot.tools.replay.runner import named_runner


# the environment


@pytest.fixture
def place(tmp_path, monkeypatch):
  where = tmp_path / "env"
  monkeypatch.setenv("FAIR_TFLITE_ENV", str(where))
  monkeypatch.setattr(environment, "ROOM", 0)
  return where


class Shell:
  """In place of subprocess.run: makes what `-m venv` would, and keeps what was started."""

  def __init__(self, monkeypatch):
    self.words, self.code = [], 0
    monkeypatch.setattr(subprocess, "run", self)

  def __call__(self, words, **kwargs):
    self.words.append([str(w) for w in words])
    if "venv" in self.words[-1]:
      where = Path(self.words[-1][-1])
      for folder in ("bin", "lib/python3.11/site-packages"):
        (where / folder).mkdir(parents=True)
      (where / "pyvenv.cfg").touch()
      (where / "bin" / "python").touch()
      return subprocess.CompletedProcess(words, 0)
    return subprocess.CompletedProcess(words, self.code)

  @property
  def installs(self):
    return [w for w in self.words if "pip" in w]


def test_the_environment_is_made_once_and_sees_what_is_there_already(place, monkeypatch, capsys):
  shell = Shell(monkeypatch)
  monkeypatch.setenv("FAIR_PIP_ARGS", "--index-url somewhere")
  words = environment.command("-m", "x", place)
  assert words == [str(place / "bin" / "python"), "-P", "-m", "x", str(place)]
  assert "about 750 MB, once" in capsys.readouterr().out
  assert (place / "lib/python3.11/site-packages/_base.pth").read_text().strip() == environment.base()
  (install,) = shell.installs
  assert install[-5:] == ["--index-url", "somewhere", *environment.PACKAGES]
  environment.command("-m", "x")
  assert len(shell.installs) == 1 and capsys.readouterr().out == ""


def test_one_that_was_interrupted_or_is_of_other_packages_is_made_anew(place, monkeypatch):
  shell = Shell(monkeypatch)
  environment.command("x")
  (place / environment.STAMP).unlink()  # killed before its end
  (place / "half").touch()
  environment.command("x")
  assert len(shell.installs) == 2 and not (place / "half").exists()
  monkeypatch.setattr(environment, "PACKAGES", ("litert-torch==99",))
  environment.command("x")
  assert shell.installs[2][-1] == "litert-torch==99"


def test_an_environment_that_cannot_be_made_is_one_line_and_leaves_nothing(place, monkeypatch):
  shell = Shell(monkeypatch)
  shell.code = 1
  with pytest.raises(UserError, match="pip could not install TFLite's converter"):
    environment.command("x")
  assert not place.exists()
  monkeypatch.setattr(environment, "ROOM", 1 << 60)
  with pytest.raises(UserError, match="GB free, TFLite's converter wants"):
    environment.command("x")
  place.mkdir()
  (place / "letters.txt").touch()
  with pytest.raises(UserError, match="is there and is no virtual environment"):
    environment.command("x")
  assert (place / "letters.txt").exists()


# what is asked for


def test_formats_by_commas_or_words():
  assert formats.formats_said(("onnx,tflite", "tensorrt", "onnx")) == ("onnx", "tflite", "tensorrt")
  with pytest.raises(UserError, match=r"--format coreml: there are onnx, tensorrt, tflite"):
    formats.formats_said(("onnx,coreml",))


def options(tmp_path, bundle, store, *said, **kwargs):
  return module.Options(bundle=bundle, data=store, output=tmp_path / "out", format=said, frames=8, rounds=2, **kwargs)


def test_what_is_made_of_what_is_asked_for(tmp_path, monkeypatch):
  tflite_mock.install(monkeypatch)
  monkeypatch.setattr(formats.tensorrt, "missing", lambda: None)
  monkeypatch.setattr(module, "targets", lambda: ("x86-vnni", "x86"))

  def wanted(*said, **kwargs):
    w = module.check(options(tmp_path, tmp_path, tmp_path, *said, **kwargs))
    return w.targets, w.half, w.tflite, w.engines

  assert wanted("onnx", int8=True) == (("x86-vnni",), False, False, False)
  assert wanted("onnx", int8=True, target=("x86", "aarch64")) == (("x86", "aarch64"), False, False, False)
  assert wanted("tflite", int8=True) == ((), False, True, False)
  assert wanted("onnx,tensorrt,tflite", int8=True) == (("x86-vnni", "tensorrt"), False, True, True)
  assert wanted("tensorrt") == ((), True, False, True)
  assert wanted("onnx", target=("tensorrt",)) == ((), True, False, False)
  with pytest.raises(UserError, match="nothing to do"):
    wanted("onnx")


def test_tensorrt_that_is_not_here_is_said_before_any_work(tmp_path, monkeypatch):
  monkeypatch.setattr(formats.tensorrt, "missing", lambda: "TensorRT is not installed; pip install tensorrt")
  monkeypatch.setattr(module, "open_bundle", lambda args: pytest.fail("it went on"))
  with pytest.raises(UserError, match=r"--format tensorrt cannot be made here: TensorRT is not installed; .*--target"):
    module.run(options(tmp_path, tmp_path / "b", tmp_path, "tensorrt"))


# what the converter is given, and what it says


def converter(monkeypatch, tmp_path, answer):
  """A script in the converter's place: `answer` is Python that is given `folder`, `job` and `frames`."""
  script = tmp_path / "converter.py"
  script.write_text(
    "import sys, json, shutil\nfrom pathlib import Path\nimport numpy as np\n"
    "folder = Path(sys.argv[1]); job = json.loads((folder / 'job.json').read_text())\n"
    "frames = dict(np.load(folder / 'frames.npz'))\n" + answer
  )
  monkeypatch.setattr(environment, "command", lambda *words: [sys.executable, str(script), str(words[-1])])
  monkeypatch.setattr(formats, "student_names", lambda: ["scene"])


# a form with the first k layers in float is off by what `off` says of it
GOOD = """
import onnx
from onnx import numpy_helper
forms, off = [], {off}
for first in (None, *job["first"]):
  t = "tflite" if first is None else "tflite-int8"
  file = job["graph"] + (".tflite" if first is None else "-int8.tflite")
  path = folder / (file if first is None else str(first) + "/" + file)
  path.parent.mkdir(exist_ok=True)
  net = onnx.load(str(Path(job["bundle"]) / "scene.onnx"))
  for w in net.graph.initializer:
    if w.name == "w_out":
      w.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(w) * np.float32(1 + off.get(first, 0)), w.name))
  onnx.save(net, str(path))
  outputs = {"depth": {"max": .03, "mean": .001}, "segmentation": {"max": .01, "mean": .002}}
  one = {"target": t, "file": file, "path": str(path.relative_to(folder)), "bytes": path.stat().st_size}
  one |= {"precision": "float32" if first is None else "int8", "outputs": outputs}
  left = {"the last layer of an output": ["a/b/x.y.Head_out;13;"]}
  if first:
    left["one of the first layers, whose rounding all outputs feel"] = ["a/b/x.y.layer_%d;1;" % k for k in range(first)]
  forms.append(one | {"float": {} if first is None else left})
(folder / "said.json").write_text(json.dumps({"frames": len(frames), "forms": forms}))
"""


def good(off: str = "{}") -> str:
  return GOOD.replace("{off}", off)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  root = tmp_path_factory.mktemp("store") / "labels"
  optimize_fixture.write_routes(root, count=4, n=8)
  return root


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(told, "footprint", lambda bundle, runner: {"load_s": 0.1, "memory_mb": 1.0})
  tflite_mock.install(monkeypatch)


def test_tflite_files_become_variants_that_run(tmp_path, store, quick, monkeypatch, capsys):
  converter(monkeypatch, tmp_path, good())
  bundle = optimize_fixture.write_conv(tmp_path / "conv")
  stale = optimize_fixture.write_conv(tmp_path / "out" / "conv", seed=1)  # of an earlier run, of another network
  results = module.run(options(tmp_path, bundle.path, store, "tflite", int8=True))
  made = load_bundle(tmp_path / "out" / "conv")
  assert made.onnx(made.graphs[0]) == bundle.onnx(bundle.graphs[0]) != stale
  float_, int8 = made.graphs[0]["variants"]
  assert (float_["target"], float_["precision"]) == ("tflite", "float32") and set(float_) == {
    "target",
    "file",
    "precision",
  }
  assert int8["calibration"]["frames"] == 8 and "moving average" in int8["calibration"]["method"]
  assert int8["float"] == [{"why": "the last layer of an output", "nodes": ["Head_out;13"]}]
  assert [t["frames"] for t in results["formats"]] == [8 + formats.JUDGED] * 2  # one input a frame
  assert (
    "scene-int8.tflite" in (said := capsys.readouterr().out) and "3.0e-02 at most, 1.0e-03 on average, in depth" in said
  )
  assert "scene-int8.tflite" in (page := (tmp_path / "out" / "optimize.html").read_text()) and "was not judged" in page
  assert named_runner("tflite-int8", made, made.graphs[0]).what == "LiteRT, int8"
  # once more: in place of those that it had
  module.run(options(tmp_path, tmp_path / "out" / "conv", store, "tflite", apply=True))
  again = load_bundle(tmp_path / "out" / "conv").graphs[0]["variants"]
  assert sorted(v["target"] for v in again) == ["tflite", "tflite-int8"]


def test_first_layers_of_tflite_stay_float_as_far_as_its_metrics_need_it(tmp_path, store, quick, monkeypatch, capsys):
  converter(monkeypatch, tmp_path, good("{0: 100, 3: 60}"))
  bundle = optimize_fixture.write_conv(tmp_path / "conv")
  results = module.run(options(tmp_path, bundle.path, store, "tflite", int8=True))
  tries = results["search"]["tflite-int8"]
  assert [t["float"] for t in tries] == [f"the first {k} layers in float" for k in (0, 3, 6)]
  assert tries[0]["share"] > tries[1]["share"] > formats.ENOUGH >= tries[2]["share"] == 0
  assert tries[2]["back"] == [f"a/b/x.y.layer_{k};1;" for k in range(6)]
  float_, eight = results["variants"][1:]
  assert (float_["label"], eight["label"]) == ("tflite", "tflite-int8") and "verdict" not in float_
  assert eight["worst"] and eight["output_errors"] == {"depth": 0.0, "segmentation": 0.0}
  made = load_bundle(tmp_path / "out" / "conv")
  left = made.graphs[0]["variants"][1]["float"]
  assert [len(x["nodes"]) for x in left] == [1, 6]
  assert "What was tried" in (tmp_path / "out" / "optimize.html").read_text()


def test_a_tflite_file_that_loses_too_much_is_named_and_left_out(tmp_path, store, quick, monkeypatch):
  converter(monkeypatch, tmp_path, good("dict.fromkeys((0, 3, 6, 9, 15), 100)"))
  bundle = optimize_fixture.write_conv(tmp_path / "conv")
  with pytest.raises(UserError, match=r"--max-loss 0.01 is not met: tflite-int8: Depth, abs_rel"):
    module.run(options(tmp_path, bundle.path, store, "tflite", int8=True, apply=True))
  for place in (bundle.path, tmp_path / "out" / "conv"):
    assert [v["target"] for v in load_bundle(place).graphs[0]["variants"]] == ["tflite"]
  results = json.loads((tmp_path / "out" / "optimize.json").read_text())
  assert results["applied"] == ["tflite"] and results["recommendation"]["variant"] in ("float", "tflite")


def test_tflite_wants_litert_here_before_any_work(tmp_path, monkeypatch):
  for name in ("ai_edge_litert", "ai_edge_litert.interpreter"):  # another test may have imported it
    monkeypatch.setitem(sys.modules, name, None)
  monkeypatch.setattr(module, "open_bundle", lambda args: pytest.fail("it went on"))
  with pytest.raises(UserError, match=r"--format tflite: LiteRT judges and times the files; pip install"):
    module.run(options(tmp_path, tmp_path / "b", tmp_path, "tflite"))


@pytest.mark.parametrize(
  "answer, match",
  [
    ("(folder / 'said.json').write_text('{\"error\": \"operator aten.grid: no lowering\"}'); sys.exit(2)", "aten.grid"),
    ("print('Segmentation fault', file=sys.stderr); sys.exit(139)", "Segmentation fault"),
    ("sys.exit(9)", "exit code 9"),
  ],
)
def test_what_tflite_lacks_is_one_line_and_nothing_is_written(tmp_path, store, quick, monkeypatch, answer, match):
  converter(monkeypatch, tmp_path, answer)
  bundle = optimize_fixture.write_conv(tmp_path / "conv")
  with pytest.raises(UserError, match=f"--format tflite: .*{match}") as e:
    module.run(options(tmp_path, bundle.path, store, "tflite"))
  assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_a_network_that_is_no_student_of_ours_makes_no_environment(tmp_path, monkeypatch):
  monkeypatch.setattr(environment, "command", lambda *words: pytest.fail("it was made"))
  bundle = optimize_fixture.write_conv(tmp_path / "conv")
  with pytest.raises(UserError, match=r"--format tflite: .*conv: its graph 'scene' is none of our students"):
    formats.to_tflite(bundle, {}, {}, None)


def test_the_operator_at_which_a_conversion_stopped():
  text = (
    "No lowering\n\nWhile executing %x : [num_users=1] = call_function[target=torch.ops.aten.cummax.default](args = ())"
  )
  assert convert.why(text) == "operator torch.ops.aten.cummax.default: No lowering"
  assert convert.why("broken") == "broken"


def test_frames_go_through_a_file(tmp_path):
  r = np.random.default_rng(0)
  frames = [{"frame": r.integers(0, 256, (1, 2), np.uint8), "state": r.random((3,))} for _ in range(12)]
  convert.write_frames(tmp_path, frames)
  found = convert.read_frames(tmp_path)
  assert len(found) == 12 and all(np.array_equal(a[k], b[k]) for a, b in zip(found, frames, strict=True) for k in b)


# float16 in the graph


def test_convolutions_are_in_float16_and_coordinates_are_not():
  """Against numpy with roundings of its own; what does not go through the trunk is the same bit for bit."""
  r = np.random.default_rng(3)
  w, w2 = (r.normal(0, 0.3, s).astype(np.float32) for s in ((4, 3, 1, 1), (2, 4, 1, 1)))
  large = np.array([1e6], np.float32)
  nodes = [
    helper.make_node("Conv", ["x", "w"], ["a"], "first"),
    helper.make_node("Relu", ["a"], ["b"], "relu"),
    helper.make_node("Conv", ["b", "w2"], ["y"], "second"),
    helper.make_node("Mul", ["points", "large"], ["moved"], "move"),
  ]
  shapes = {"x": (1, 3, 8, 8), "points": (1, 5), "y": (1, 2, 8, 8), "moved": (1, 5)}
  info = {k: helper.make_tensor_value_info(k, TensorProto.FLOAT, s) for k, s in shapes.items()}
  weights = [numpy_helper.from_array(v, k) for k, v in (("w", w), ("w2", w2), ("large", large))]
  graph = helper.make_graph(nodes, "g", [info["x"], info["points"]], [info["y"], info["moved"]], weights)
  model = prepare(
    helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
  )
  left = outside(model, last_layers(model))
  assert "second" in left["a last layer: what it says is the answer itself"]
  blob = half(model, [n for nodes in left.values() for n in nodes])
  x = {"x": r.random(shapes["x"], np.float32), "points": np.float32([[400.12, 1.5, 3, 4, 5]])}
  (got,) = run_all(blob, [x])
  rounded = (v.astype(np.float16).astype(np.float32) for v in (w[:, :, 0, 0], x["x"][0]))
  a = np.einsum("oc,chw->ohw", *rounded).astype(np.float16).astype(np.float32)
  want = np.einsum("oc,chw->ohw", w2[:, :, 0, 0], np.maximum(a, 0))
  assert np.abs(got["y"][0] - want).max() < 2e-3 * np.abs(want).max()  # sums may round once more, or not
  np.testing.assert_array_equal(got["moved"], x["points"] * large)
  made = onnx.load_from_string(blob)
  kinds = {i.name: i.data_type for i in made.graph.initializer}
  first = next(n for n in made.graph.node if n.name == "first")
  assert kinds[first.input[1]] == TensorProto.FLOAT16 and "large.half" not in kinds
  assert [n.op_type for n in made.graph.node].count("Cast") == 2
  # a weight beyond float16 keeps its node in float32, whoever asks
  everything = onnx.load_from_string(half(model, []))
  move = next(n for n in everything.graph.node if n.name == "move")
  assert list(move.input) == ["points", "large"]


def test_a_students_graph_for_tensorrt_is_judged_and_built(tmp_path, store, quick, monkeypatch):
  bundle = optimize_fixture.write_conv(tmp_path / "conv")
  variant = {"target": "tensorrt", "file": "scene.float16-tensorrt.onnx", "precision": "float16"}
  built = []
  monkeypatch.setattr(formats.tensorrt, "build_engine", lambda made, graph: built.append((made, graph)))
  monkeypatch.setattr(formats.tensorrt, "missing", lambda: None)
  monkeypatch.setattr(formats, "read_sidecar", lambda folder, name: {"files": [f"{name}.engine"]})
  monkeypatch.setattr(formats, "folder_of", lambda made: tmp_path / "kept")
  (tmp_path / "kept").mkdir()
  for name in ("scene.tensorrt.json", "scene.tensorrt.engine"):
    (tmp_path / "kept" / name).write_text(name)
  results = module.run(options(tmp_path, bundle.path, store, "tensorrt", max_loss=0.5))
  (row,) = results["variants"][1:]
  assert row["label"] == "float16 tensorrt" and row["verdict"] == "within" and not row["here"]
  ((made, graph),) = built
  (found,) = graph["variants"]
  assert {k: found[k] for k in variant} == variant and "calibration" not in found and found["float"]
  kinds = {i.data_type for i in onnx.load_from_string(made.onnx(graph, found)).graph.initializer}
  assert TensorProto.FLOAT16 in kinds
  assert (tmp_path / "out" / "scene.tensorrt.engine").read_text() == "scene.tensorrt.engine"
  assert json.loads((tmp_path / "out" / "optimize.json").read_text())["recommendation"]["variant"] == "float"


def test_a_plan_of_another_version_is_one_line(tmp_path, monkeypatch):
  bundle = optimize_fixture.write_conv(tmp_path / "conv")
  graph = bundle.graphs[0]
  tensorrt_mock.install(monkeypatch, bundle, graph)
  formats.tensorrt.build_engine(bundle, graph)
  monkeypatch.setattr(formats.tensorrt, "package_version", lambda package: "11.4")
  with pytest.raises(UserError, match=r"--runner tensorrt: .* was built for tensorrt 10\.13, here it is 11\.4; build"):
    named_runner("tensorrt", bundle, graph)

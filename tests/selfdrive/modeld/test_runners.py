"""Which runner runs a graph, what happens where it cannot, and that all of them compute what ONNX Runtime does on real
frames."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fair_bundle import write_bundle
from openpilot.selfdrive.modeld.fair import runners
from openpilot.selfdrive.modeld.fair.artifact import ArtifactError
from openpilot.selfdrive.modeld.fair.bundle import BundleError, load_bundle
from openpilot.selfdrive.modeld.fair.compile import CompileError, build, missing
from openpilot.selfdrive.modeld.fair.parity import sample_inputs
from openpilot.selfdrive.modeld.fair.frames import ModelFrame, camera_intrinsics
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.selfdrive.modeld.fair.runners import open_runner, preferred, tensorrt
from openpilot.selfdrive.modeld.fair.runners.onnx import OnnxRunner

ROOT = Path(__file__).resolve().parents[3]


def test_what_is_preferred_where(tmp_path, monkeypatch):
  there, absent = tmp_path / "gpu", tmp_path / "none"
  there.touch()
  for qcom, nvidia, first in (
    (there, absent, "tinygrad-qcom"),
    (absent, there, "tensorrt"),
    (absent, absent, "onnx"),
    (there, there, "tinygrad-qcom"),
  ):
    monkeypatch.setattr(runners, "QCOM_GPU", qcom)
    monkeypatch.setattr(runners, "NVIDIA_GPU", nvidia)
    assert preferred()[0] == first and preferred()[-2:] == ("onnx", "tinygrad-cpu")


@pytest.mark.parametrize("choice", ["tinygrad-cpu", "tinygrad-qcom", "tensorrt"])
def test_without_an_artifact_onnx_runtime_runs_and_one_line_says_why(tmp_path, capfd, choice):
  bundle = write_bundle(tmp_path)
  runner = open_runner(bundle, bundle.graphs[0], choice)
  said = capfd.readouterr().err
  assert (
    isinstance(runner, OnnxRunner)
    and said.count("\n") == 1
    and f"graph 'scene' runs in ONNX Runtime; {choice}: " in said
  )
  assert np.isfinite(runner.run(sample_inputs(bundle.graphs[0], 0))["depth"]).all()


def test_a_device_with_a_gpu_and_no_artifact(tmp_path, monkeypatch, capfd):
  (tmp_path / "gpu").touch()
  monkeypatch.setattr(runners, "QCOM_GPU", tmp_path / "gpu")
  model = FairModel(write_bundle(tmp_path / "b"))
  assert model.runners["scene"].what == "ONNX Runtime" and "tinygrad-qcom: " in capfd.readouterr().err


def test_where_nothing_runs_every_reason_is_told(tmp_path, monkeypatch):
  bundle = write_bundle(tmp_path)
  for name in ("runners.onnx", "ort"):
    monkeypatch.delitem(sys.modules, f"openpilot.selfdrive.modeld.fair.{name}")
  monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as in openpilot, which has none
  for choice, order in (
    ("tinygrad-cpu", "tinygrad-cpu: .*; onnx: onnxruntime is not installed"),
    (None, "onnx: onnxruntime is not installed; tinygrad-cpu: "),
  ):
    with pytest.raises(
      BundleError,
      match=f"has no runner here; {order}.*; compile it: python -m openpilot.*fair.compile {re.escape(str(tmp_path))}$",
    ) as e:
      open_runner(bundle, bundle.graphs[0], choice)
    assert "\n" not in str(e.value)


def test_what_is_wrong_with_the_graph_itself_is_told_alone(tmp_path, monkeypatch):
  """Where ONNX Runtime, which runs any, comes first: why the others do not run it says nothing more."""
  bundle = write_bundle(tmp_path)

  def fails(why):
    def make(*_):
      raise BundleError(why)

    return make

  monkeypatch.setattr(runners, "RUNNERS", {"onnx": fails("its graph is broken"), "tinygrad-cpu": fails("not built")})
  for order, said in (
    (("onnx", "tinygrad-cpu"), "its graph is broken"),
    (("onnx",), "its graph is broken"),
    (("tinygrad-cpu", "onnx"), f"{tmp_path}: graph 'scene' has no runner here; tinygrad-cpu: not built; onnx: its "),
  ):
    monkeypatch.setattr(runners, "preferred", lambda order=order: order)
    with pytest.raises(BundleError, match=f"^{re.escape(said)}"):
      open_runner(bundle, bundle.graphs[0])


def test_compiling_wants_no_onnx_runtime(tmp_path):
  """What can be built here is known without it, and none of the runners is needed to ask."""
  code = """
import sys
sys.modules['onnxruntime'] = None
from openpilot.selfdrive.modeld.fair import compile as c
print([c.missing(t) for t in c.TARGETS])
"""
  r = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert r.returncode == 0 and r.stdout.startswith("["), r.stderr


def test_unknown_runners_are_refused(tmp_path):
  bundle = write_bundle(tmp_path)
  with pytest.raises(BundleError, match="runner 'cuda' is not known; one of tinygrad-qcom, "):
    open_runner(bundle, bundle.graphs[0], "cuda")
  r = subprocess.run(
    [sys.executable, "-m", "openpilot.selfdrive.modeld.fair.fairmodeld", "--runner", "cuda"],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert r.returncode == 2 and "invalid choice: 'cuda'" in r.stderr


def test_tensorrt_is_skipped_with_one_reason(tmp_path):
  bundle = write_bundle(tmp_path)
  why = tensorrt.missing()
  if why is None:
    pytest.skip("TensorRT and a GPU are here")
  assert why in (
    "TensorRT is not installed; pip install tensorrt",
    "no CUDA driver here (libcuda.so.1)",
  ) or why.startswith("CUDA's ")
  with pytest.raises(CompileError, match="tensorrt cannot be built here"):
    build(bundle, "tensorrt")
  with pytest.raises(ArtifactError):
    tensorrt.TensorRTRunner(bundle, bundle.graphs[0])


def real_frames(data, folder, n):
  """n model frames of a real drive, one a second."""
  from openpilot.tools.lib.framereader import FrameReader

  reader = FrameReader(data / "realdata" / "0000002c--d68dde99ca--1" / "qcamera.ts", "nv12")
  warp = ModelFrame(526, 330, 526, 526 * 330)
  warp.set_calibration(np.zeros(3), camera_intrinsics(526, 330))
  np.save(folder / "frames.npy", np.stack([warp.warp(reader.get(20 * i).reshape(-1)).copy() for i in range(n)]))
  return folder / "frames.npy"


PARITY = """
import sys
import numpy as np
from pathlib import Path
from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.selfdrive.modeld.fair.parity import differences
from openpilot.selfdrive.modeld.fair.runners import open_runner
bundle, target, frames, folder = load_bundle(sys.argv[1]), sys.argv[2], np.load(sys.argv[3]), Path(sys.argv[4])
graph = bundle.graphs[0]
ours, theirs = open_runner(bundle, graph, target, folder=folder), open_runner(bundle, graph, "onnx")
assert ours.what != theirs.what
print(max(max(differences(ours.run({"frame": f[None]}), theirs.run({"frame": f[None]})).values()) for f in frames))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  "target, tolerance", [("tinygrad-cpu", 1e-4), ("tinygrad-cuda", 1e-3), ("tinygrad-qcom", 5e-2), ("tensorrt", 5e-2)]
)
def test_runners_agree_on_real_frames(tmp_path, shared_data, target, tolerance):
  """The shipped bundle, eight frames at night in a city; in parts of an output's largest value. float32 sums in another
  order, or half precision."""
  if (why := missing(target)) is not None:
    pytest.skip(why)
  bundle = load_bundle(ROOT / "models" / "scene-nano")
  build(bundle, target, tmp_path / "a")
  frames = real_frames(shared_data, tmp_path, 8)
  assert np.load(frames).std() > 10
  command = [sys.executable, "-c", PARITY, str(bundle.path), target, str(frames), str(tmp_path / "a")]
  r = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
  assert r.returncode == 0, r.stderr[-2000:]
  assert float(r.stdout) <= tolerance


def test_compiling_imports_nothing_before_it_is_wanted():
  if importlib.util.find_spec("tinygrad") is None:
    pytest.skip("tinygrad is not installed")
  code = """
import sys
from openpilot.selfdrive.modeld.fair import compile
assert not {'tinygrad', 'onnxruntime', 'tensorrt', 'torch'} & set(sys.modules)
"""
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

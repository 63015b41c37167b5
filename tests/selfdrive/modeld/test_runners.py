"""Which runner runs a graph, what happens where it cannot, and that all of them compute what ONNX Runtime does on real
frames."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from fair_bundle import lanes_graph, write_bundle, write_graphs
from openpilot.selfdrive.modeld.fair import runners
from openpilot.selfdrive.modeld.fair.artifact import ArtifactError, folder_of
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


class HostCuda:
  """Memory of this process in place of a GPU's."""

  def __init__(self):
    self.memory, self.stream = {}, SimpleNamespace(value=7)

  def name(self):
    return "no GPU"

  def alloc(self, size):
    pointer = 256 * (len(self.memory) + 1)
    self.memory[pointer] = np.full(size, 255, np.uint8)
    return pointer

  def free(self, pointer):
    del self.memory[pointer]

  def upload(self, pointer, array):
    self.memory[pointer][:] = array.reshape(-1).view(np.uint8)

  def download(self, array, pointer):
    array.reshape(-1).view(np.uint8)[:] = self.memory[pointer]

  def wait(self):
    pass


def fake_tensorrt(cuda, bundle, graph):
  """The calls of TensorRT 10 that are used, by the names of its bindings; ONNX Runtime computes. It cannot say whether
  TensorRT likes a graph."""
  trt, io = ModuleType("tensorrt"), {s["name"]: (s, side) for side in ("inputs", "outputs") for s in graph[side]}

  class Context:
    def __init__(self):
      self.address = {}

    def set_tensor_address(self, name, pointer):
      self.address[name] = pointer

    def execute_async_v3(self, stream_handle):
      assert stream_handle == 7 and self.address.keys() == io.keys()
      x = {
        n: cuda.memory[self.address[n]].view(s["dtype"]).reshape(s["shape"])
        for n, (s, side) in io.items()
        if side == "inputs"
      }
      for name, array in OnnxRunner(bundle, graph).run(x).items():
        cuda.upload(self.address[name], array)
      return True

  engine = SimpleNamespace(
    num_io_tensors=len(io),
    get_tensor_name=lambda i: list(io)[i],
    get_tensor_shape=lambda n: tuple(io[n][0]["shape"]),
    get_tensor_dtype=lambda n: io[n][0]["dtype"],
    get_tensor_mode=lambda n: io[n][1],
    create_execution_context=Context,
  )
  trt.__version__, trt.nptype, trt.TensorIOMode = (
    "10",
    lambda t: np.dtype(t).type,
    SimpleNamespace(INPUT="inputs", OUTPUT="outputs"),
  )
  trt.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
  trt.BuilderFlag, trt.MemoryPoolType = SimpleNamespace(FP16="fp16"), SimpleNamespace(WORKSPACE="workspace")
  trt.Runtime = lambda logger: SimpleNamespace(
    deserialize_cuda_engine=lambda blob: engine if blob == b"engine" else None
  )
  config = SimpleNamespace(flags=[], set_memory_pool_limit=lambda kind, size: None)
  config.set_flag = config.flags.append
  trt.Builder = lambda logger: SimpleNamespace(
    create_network=lambda flags: "network",
    create_builder_config=lambda: config,
    build_serialized_network=lambda network, c: b"engine",
  )
  trt.OnnxParser = lambda network, logger: SimpleNamespace(parse=lambda blob: blob == bundle.onnx(graph), num_errors=0)
  trt.config = config
  return trt


def test_tensorrt_engine_is_built_kept_and_run(tmp_path, monkeypatch):
  """All but the GPU: addresses, copies, state and slots, the sidecar's keys."""
  (tmp_path / "b").mkdir()
  bundle = write_graphs(tmp_path / "b", [lanes_graph(tmp_path / "b")])
  graph, cuda = bundle.graphs[0], HostCuda()
  trt = fake_tensorrt(cuda, bundle, graph)
  monkeypatch.setitem(sys.modules, "tensorrt", trt)
  monkeypatch.setattr(tensorrt, "missing", lambda: None)
  monkeypatch.setattr(tensorrt, "Cuda", lambda: cuda)
  monkeypatch.setattr(tensorrt, "package_version", lambda package: "10")
  tensorrt.build_engine(bundle, graph)
  said = json.loads((folder_of(bundle) / "lanes.tensorrt.json").read_text())
  assert (said["gpu"], said["precision"], said["tensorrt"], said["parity"]) == (
    "no GPU",
    "float16",
    "10",
    0.0,
  ) and trt.config.flags == ["fp16"]
  runner = open_runner(bundle, graph, "tensorrt")
  x = sample_inputs(graph, 3)
  got, want = runner.run(x), OnnxRunner(bundle, graph).run(x)
  assert runner.what == "TensorRT 10 (no GPU, float16)" and all(np.array_equal(got[k], w) for k, w in want.items())
  assert runner.run(x)["lanes_visible"] is got["lanes_visible"]
  del runner
  assert not cuda.memory  # what was allocated is given back
  with pytest.raises(ArtifactError, match="was built for precision"):
    tensorrt.TensorRTRunner(bundle, graph, precision="float32")
  monkeypatch.setattr(tensorrt, "package_version", lambda package: "11")
  with pytest.raises(ArtifactError, match="was built for tensorrt 10"):
    tensorrt.TensorRTRunner(bundle, graph)
  del trt.BuilderFlag.FP16
  assert tensorrt.usual_precision() == "float32"
  with pytest.raises(ArtifactError, match="keeps a graph's own types"):
    tensorrt.build_engine(bundle, graph, precision="float16")


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

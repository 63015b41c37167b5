"""ONNX teachers: the device that was asked for is the one that runs, or it is refused; a batch that memory does not
hold is halved."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from openpilot.tools.fair.onnx import device as onnx_device
from openpilot.tools.fair.onnx.device import choose_providers
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Clip
from openpilot.tools.lib.errors import UserError
from test_labels import write_network

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@pytest.fixture(autouse=True)
def said_before():
  onnx_device.say.cache_clear()


def greedy(folder, most):
  """The network of `write_network`, which asks for 4 petabytes for every image beyond `most` at once, as ONNX Runtime
  is asked by a real one."""
  description = write_network(folder)
  model = onnx.load(str(folder / "net.onnx"))
  graph = model.graph
  for name, value in (("most", most), ("none", 0), ("one", 1), ("much", 2**50), ("first", 0)):
    graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, (1,), [value]))
  graph.node[-1].output[0] = "before"
  graph.node.extend(
    [
      helper.make_node("Shape", ["images"], ["n"], start=0, end=1),
      helper.make_node("Sub", ["n", "most"], ["over"]),
      helper.make_node("Max", ["over", "none"], ["more"]),
      helper.make_node("Mul", ["more", "much"], ["bytes"]),
      helper.make_node("Add", ["bytes", "one"], ["length"]),
      helper.make_node("ConstantOfShape", ["length"], ["zeros"]),
      helper.make_node("ReduceSum", ["zeros"], ["zero"], keepdims=0),
      helper.make_node("Add", ["before", "zero"], ["out"]),
    ]
  )
  onnx.save(model, str(folder / "net.onnx"))
  return description


@pytest.mark.parametrize("most", [2, 3])
def test_a_batch_that_memory_does_not_hold_is_halved(tmp_path, capfd, most):
  rgb = np.random.default_rng(0).integers(0, 256, (7, 3, 32, 64), dtype=np.uint8)
  said = []
  for path in (write_network(tmp_path / "plain"), greedy(tmp_path / "greedy", most)):
    teacher = load_teacher(str(path), device="cpu")
    assert not teacher.single
    teacher.prepare(32, 64)
    said.append(teacher.label(Clip(rgb))[0]["thing"])
  assert "out of GPU memory with 7 frames at once; going on with 3" in capfd.readouterr().err
  np.testing.assert_array_equal(said[0], said[1])


def test_not_even_one_is_said(tmp_path):
  teacher = load_teacher(str(greedy(tmp_path / "greedy", 0)), device="cpu")
  teacher.prepare(32, 64)
  with pytest.raises(UserError, match="does not hold a single frame"):
    teacher.label(Clip(np.zeros((2, 3, 32, 64), np.uint8)))


def test_another_failure_is_no_lack_of_memory(tmp_path):
  teacher = load_teacher(str(write_network(tmp_path / "net")), device="cpu")
  with pytest.raises(Exception, match="INVALID_ARGUMENT"):
    teacher.forward(np.zeros((2, 3, 5, 5), np.float32))


def test_what_runs_is_said_once(tmp_path, capsys):
  path = str(write_network(tmp_path / "net"))
  for _ in range(2):
    load_teacher(path, device="cpu")
  assert capsys.readouterr().err == "device: ONNX Runtime's CPU\n"


def test_a_device_without_a_provider_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
  path = str(write_network(tmp_path / "net"))
  with pytest.raises(UserError, match="no CUDAExecutionProvider for --device cuda: pip install onnxruntime-gpu"):
    load_teacher(path, device="cuda")
  with pytest.raises(UserError, match="no CoreMLExecutionProvider for --device mps"):
    load_teacher(path, device="mps")
  for wrong in ("tpu", "cuda:x"):
    with pytest.raises(UserError, match=f"no device '{wrong}'; cuda, mps, cpu"):
      load_teacher(path, device=wrong)
  assert load_teacher(path).providers == [CPU]


def test_providers_follow_the_device(monkeypatch):
  monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
  assert choose_providers(None) == choose_providers("cuda") == ([CUDA, CPU], [{}, {}])
  assert choose_providers("cuda:1") == ([CUDA, CPU], [{"device_id": "1"}, {}])
  assert choose_providers("cpu") == ([CPU], [{}])


def test_a_provider_that_does_not_start(tmp_path, monkeypatch, capsys):
  """onnxruntime-gpu without CUDA's libraries opens the session on the CPU instead, and says it in a log that nobody
  sees."""
  real = ort.InferenceSession
  monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
  monkeypatch.setattr(
    ort, "InferenceSession", lambda graph, options, providers, provider_options: real(graph, options, providers=[CPU])
  )
  path = str(write_network(tmp_path / "net"))
  with pytest.raises(UserError, match="could not start CUDAExecutionProvider for --device cuda"):
    load_teacher(path, device="cuda")
  assert load_teacher(path).providers == [CPU] and "device: ONNX Runtime's CPU" in capsys.readouterr().err


def test_below_a_flatter_picture_is_padding_not_the_picture_before(tmp_path):
  """A letterboxed network that is shown pictures of several shapes in turn: each input is what it would be alone."""
  path = write_network(tmp_path / "net")
  path.write_text(path.read_text().replace("fit: stretch", "fit: letterbox, pad: 114"))
  teacher = load_teacher(str(path), device="cpu")

  def shown(teacher, height, width, value):
    teacher.prepare(height, width)
    return teacher.prepare_batch(np.full((1, 3, height, width), value, np.uint8)).copy()

  shown(teacher, 32, 64, 255)
  flat, narrow = shown(teacher, 16, 64, 0), shown(teacher, 64, 32, 0)
  assert np.allclose(flat[..., 16:, :] * 255, 114) and (flat[..., :16, :] == 0).all()
  assert np.allclose(narrow[..., 16:] * 255, 114) and (narrow[..., :16] == 0).all()
  assert (flat == shown(load_teacher(str(path), device="cpu"), 16, 64, 0)).all()

"""A stand-in of TensorRT 10 and 11 and of its GPU, by the names of the bindings: whatever a version has not raises
AttributeError, and every call is kept. ONNX Runtime computes. It cannot say whether TensorRT likes a graph."""

from types import ModuleType, SimpleNamespace

import numpy as np
import onnx

from openpilot.selfdrive.modeld.fair.runners import tensorrt
from openpilot.selfdrive.modeld.fair.runners.onnx import OnnxRunner

KINDS = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.UINT8: "uint8", onnx.TensorProto.FLOAT16: "float16"}


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


def fake_tensorrt(cuda, bundle, graph, version="10.13", variant=None):
  """`calls`: what the builder was asked for, in order. variant: of the graph, whose file it must be given."""
  trt, io = ModuleType("tensorrt"), {s["name"]: (s, side) for side in ("inputs", "outputs") for s in graph[side]}
  trt.calls, trt.__version__ = [], version
  ten = version.startswith("10")

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
      for name, array in OnnxRunner(bundle, graph, variants=False, variant=variant).run(x).items():
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

  def network(flags):
    trt.calls.append(("create_network", flags))
    return SimpleNamespace(flags=flags)

  def config():
    found = SimpleNamespace(set_memory_pool_limit=lambda kind, size: trt.calls.append(("workspace", size)))
    found.set_flag = lambda flag: trt.calls.append(("set_flag", flag))
    return found

  def build(made, found):
    # of a typed network no flag says a precision
    assert not (made.flags & 2 and ("set_flag", "fp16") in trt.calls)
    return b"engine"

  def parse(blob):
    trt.parsed = onnx.load_from_string(blob)
    return blob == bundle.onnx(graph, variant)

  trt.nptype, trt.TensorIOMode = lambda t: np.dtype(t).type, SimpleNamespace(INPUT="inputs", OUTPUT="outputs")
  trt.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
  # 11 took FP16, INT8, BF16 and the calibrator away; a network there is typed, without a flag
  trt.BuilderFlag = SimpleNamespace(FP16="fp16", INT8="int8") if ten else SimpleNamespace(TF32="tf32")
  trt.NetworkDefinitionCreationFlag = SimpleNamespace(EXPLICIT_BATCH=0, STRONGLY_TYPED=1) if ten else SimpleNamespace()
  trt.MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
  trt.Runtime = lambda logger: SimpleNamespace(
    deserialize_cuda_engine=lambda blob: engine if blob == b"engine" else None
  )
  trt.Builder = lambda logger: SimpleNamespace(
    create_network=network, create_builder_config=config, build_serialized_network=build
  )
  trt.OnnxParser = lambda network, logger: SimpleNamespace(parse=parse, num_errors=0)
  return trt


def install(monkeypatch, bundle, graph, version="10.13", variant=None):
  """-> the stand-in, and the memory of its GPU."""
  import sys

  cuda = HostCuda()
  trt = fake_tensorrt(cuda, bundle, graph, version, variant)
  monkeypatch.setitem(sys.modules, "tensorrt", trt)
  monkeypatch.setattr(tensorrt, "missing", lambda: None)
  monkeypatch.setattr(tensorrt, "Cuda", lambda: cuda)
  monkeypatch.setattr(tensorrt, "package_version", lambda package: version)
  return trt, cuda

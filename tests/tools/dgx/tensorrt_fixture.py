"""A stand-in of TensorRT and its GPU: the calls of versions 10 and 11 that are used, by the names of its bindings, with
optimization profiles. ONNX Runtime computes, in this process's memory. It cannot say whether TensorRT likes a graph."""

import ctypes
import pickle
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import torch

STREAM = 7
KINDS = {1: "float32", 2: "uint8", 6: "int32", 7: "int64", 9: "bool", 10: "float16"}


def shapes_of(values) -> dict[str, tuple[int, ...]]:
  """-1 where an axis is free."""
  return {v.name: tuple(-1 if d.dim_param else d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}


class Parser:
  num_errors = 0

  def __init__(self, network, logger):
    self.network = network

  def parse(self, blob: bytes) -> bool:
    model = onnx.load_from_string(blob)
    shapes = shapes_of(model.graph.input)
    self.network.blob, self.network.num_inputs = blob, len(shapes)
    self.network.get_input = lambda i: SimpleNamespace(name=list(shapes)[i], shape=list(shapes.values())[i])
    return True

  def parse_from_file(self, path: str) -> bool:
    with open(path, "rb") as f:
      return self.parse(f.read())


class Profile(dict):
  def set_shape(self, name, least, best, most):
    self[name] = tuple(map(tuple, (least, best, most)))


class Context:
  def __init__(self, engine):
    self.engine, self.address, self.shapes = engine, {}, {k: s for k, s in engine.inputs.items() if -1 not in s}

  def set_tensor_address(self, name, pointer):
    self.address[name] = pointer

  def set_input_shape(self, name, shape) -> bool:
    least, _, most = self.engine.profile[name]
    if not all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)):
      return False
    self.shapes[name] = shape
    return True

  def execute_async_v3(self, stream_handle) -> bool:
    e = self.engine
    assert stream_handle == STREAM and self.address.keys() == {**e.inputs, **e.outputs}.keys()
    if self.shapes.keys() != e.inputs.keys():
      return False  # a free axis of which nobody said how long it is
    x = {n: self.memory(n, np.dtype(e.kinds[n]), self.shapes[n]).copy() for n in e.inputs}
    for name, y in zip(e.outputs, e.session.run(list(e.outputs), x), strict=True):
      self.memory(name, y.dtype, y.shape)[...] = y
    e.runs.append(max(s[0] for s in self.shapes.values()))
    return True

  def memory(self, name, kind, shape) -> np.ndarray:
    raw = (ctypes.c_uint8 * (int(np.prod(shape)) * kind.itemsize)).from_address(self.address[name])
    return np.frombuffer(raw, kind).reshape(shape)


class Engine:
  def __init__(self, blob: bytes, runs: list[int]):
    model, self.profile = pickle.loads(blob)
    graph = onnx.load_from_string(model).graph
    self.runs, self.session = runs, ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    self.inputs, self.outputs = shapes_of(graph.input), shapes_of(graph.output)
    self.kinds = {v.name: KINDS[v.type.tensor_type.elem_type] for v in (*graph.input, *graph.output)}
    self.num_io_tensors = len(self.kinds)

  def get_tensor_name(self, i):
    return list(self.kinds)[i]

  def get_tensor_shape(self, name):
    return {**self.inputs, **self.outputs}[name]

  def get_tensor_dtype(self, name):
    return self.kinds[name]

  def get_tensor_mode(self, name):
    return "input" if name in self.inputs else "output"

  def create_execution_context(self):
    return Context(self)


def fake_tensorrt(version: str = "10.13") -> ModuleType:
  """`builds`: the profile of each engine that was built, None without one. `runs`: the batch of each execution."""
  trt = ModuleType("tensorrt")
  trt.builds, trt.runs, trt.__version__ = [], [], version
  trt.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
  trt.NetworkDefinitionCreationFlag, trt.TensorIOMode = (
    SimpleNamespace(),
    SimpleNamespace(INPUT="input", OUTPUT="output"),
  )
  trt.BuilderFlag = SimpleNamespace(FP16="fp16", BF16="bf16") if version.startswith("10") else SimpleNamespace()
  for name in (*KINDS.values(), "bfloat16"):
    setattr(trt, name, name)

  def config():
    made = SimpleNamespace(flags=[], profiles=[])
    made.set_flag, made.add_optimization_profile = made.flags.append, made.profiles.append
    return made

  def build(network, config):
    profile = dict(config.profiles[0]) if config.profiles else None
    free = [n for n, s in shapes_of(onnx.load_from_string(network.blob).graph.input).items() if -1 in s]
    if free and (profile is None or set(free) - set(profile)):
      return None  # as TensorRT: free axes want a profile
    trt.builds.append(profile)
    return pickle.dumps((network.blob, profile))

  trt.Builder = lambda logger: SimpleNamespace(
    create_network=lambda flags: SimpleNamespace(),
    create_builder_config=config,
    create_optimization_profile=Profile,
    build_serialized_network=build,
  )
  trt.OnnxParser = Parser
  trt.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda blob: Engine(blob, trt.runs))
  return trt


def install(monkeypatch, folder, version: str = "10.13") -> ModuleType:
  """TensorRT and a GPU for runners.py, which keeps engines in `folder`."""
  trt = fake_tensorrt(version)
  monkeypatch.setitem(sys.modules, "tensorrt", trt)
  monkeypatch.setenv("FAIR_TENSORRT_CACHE", str(folder))
  monkeypatch.setattr("openpilot.tools.dgx.training.runners.GPU", torch.device("cpu"))
  monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
  monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "no GPU")
  monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=STREAM))
  return trt

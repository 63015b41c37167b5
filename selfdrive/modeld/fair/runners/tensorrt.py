"""Builds and runs one graph of a bundle as an engine of TensorRT 10 or 11. Memory and stream come from the CUDA driver
itself: only the package `tensorrt` is wanted.

A network has the types of its graph, as all have from TensorRT 11 on: `op optimize` makes a variant of the graph in
float16, or in 8 bits by QuantizeLinear and DequantizeLinear. Of a graph without one TensorRT 10 still makes float16 by
a builder's flag.

An engine is of one GPU, precision, TensorRT and manifest; it lies with the other artifacts and is opened only where its
sidecar's hashes agree, as pickles are."""

import ctypes
import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.artifact import (
  ArtifactError,
  folder_of,
  package_version,
  read_artifact,
  stem,
  write_artifact,
)
from openpilot.selfdrive.modeld.fair.bundle import Bundle
from openpilot.selfdrive.modeld.fair.cpu import variant_of
from openpilot.selfdrive.modeld.fair.parity import TOLERANCE, differences, sample_inputs, worst

TARGET = "tensorrt"
PRECISIONS = ("float16", "float32")  # of a graph without a variant for TensorRT
OFF = {"int8": 0.1}  # from ONNX Runtime, of a variant: a step of rounding here or there
WORKSPACE = 1 << 30  # bytes that the builder may try tactics with


class Cuda:
  """What is needed of the CUDA driver: device 0's memory, one stream, copies. Raises ArtifactError where there is no
  driver or no GPU."""

  def __init__(self) -> None:
    try:
      self.lib = ctypes.CDLL("libcuda.so.1")
    except OSError:
      raise ArtifactError("no CUDA driver here (libcuda.so.1)") from None
    self.device, self.context, self.stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    self.call("cuInit", 0)
    self.call("cuDeviceGet", ctypes.byref(self.device), 0)
    self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), self.device)  # the context that TensorRT uses
    self.call("cuCtxSetCurrent", self.context)
    self.call("cuStreamCreate", ctypes.byref(self.stream), 1)  # 1: non-blocking

  def call(self, name: str, *args: Any) -> None:
    if (code := getattr(self.lib, name)(*args)) != 0:
      raise ArtifactError(f"CUDA's {name} failed with code {code}")

  def name(self) -> str:
    text = ctypes.create_string_buffer(128)
    self.call("cuDeviceGetName", text, len(text), self.device)
    return text.value.decode()

  def alloc(self, size: int) -> int:
    pointer = ctypes.c_uint64()
    self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
    return pointer.value

  def free(self, pointer: int) -> None:
    self.call("cuMemFree_v2", ctypes.c_uint64(pointer))

  def upload(self, pointer: int, array: np.ndarray) -> None:
    self.call(
      "cuMemcpyHtoDAsync_v2",
      ctypes.c_uint64(pointer),
      ctypes.c_void_p(array.ctypes.data),
      ctypes.c_size_t(array.nbytes),
      self.stream,
    )

  def download(self, array: np.ndarray, pointer: int) -> None:
    self.call(
      "cuMemcpyDtoHAsync_v2",
      ctypes.c_void_p(array.ctypes.data),
      ctypes.c_uint64(pointer),
      ctypes.c_size_t(array.nbytes),
      self.stream,
    )

  def wait(self) -> None:
    self.call("cuStreamSynchronize", self.stream)


def missing() -> str | None:
  """Why TensorRT cannot run here, in one line; None where it can."""
  if importlib.util.find_spec("tensorrt") is None:
    return "TensorRT is not installed; pip install tensorrt"
  try:
    Cuda()
  except ArtifactError as e:
    return str(e)
  return None


def flags_of(trt: Any, typed: bool) -> int:
  """For create_network(). Batches are explicit by themselves; typed: as the graph says, which a flag asks for in 10,
  and which is all there is in 11."""
  flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
  return 1 << int(flag) if typed and flag is not None else 0


def usual_precision(graph: dict[str, Any]) -> str:
  """Of a graph's variant its own; else float16 where the builder turns a graph of floats into it, which from TensorRT
  11 on it does not."""
  if (variant := variant_of(graph, (TARGET,))) is not None:
    return variant["precision"]
  import tensorrt as trt

  return "float16" if hasattr(trt.BuilderFlag, "FP16") else "float32"


def requirements(gpu: str, precision: str) -> dict[str, Any]:
  return {"gpu": gpu, "precision": precision, "tensorrt": package_version("tensorrt")}


def build_engine(
  bundle: Bundle, graph: dict[str, Any], folder: Path | None = None, precision: str | None = None
) -> None:
  """Builds, compares with ONNX Runtime and writes the engine of one graph; minutes. precision: one of PRECISIONS of the
  graph itself, or the usual. Raises ArtifactError."""
  if precision not in (None, *PRECISIONS):
    raise ArtifactError(f"precision '{precision}' is not known; one of {', '.join(PRECISIONS)}")
  variant = variant_of(graph, (TARGET,)) if precision is None else None
  if (why := missing()) is not None:
    raise ArtifactError(why)
  import tensorrt as trt

  t0 = time.perf_counter()
  precision = precision or usual_precision(graph)
  cuda, path = Cuda(), bundle.path / (variant or graph)["file"]
  logger = trt.Logger(trt.Logger.ERROR)
  builder = trt.Builder(logger)
  by_flag = variant is None and precision == "float16"
  network = builder.create_network(flags_of(trt, not by_flag))
  parser = trt.OnnxParser(network, logger)
  if not parser.parse(bundle.onnx(graph, variant)):
    raise ArtifactError(
      f"TensorRT does not read {path}: {parser.get_error(0).desc() if parser.num_errors else 'it does not say why'}"
    )
  config = builder.create_builder_config()
  config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
  if by_flag:
    if not hasattr(trt.BuilderFlag, "FP16"):
      raise ArtifactError(
        f"TensorRT {trt.__version__} keeps a graph's own types; build it in float32, or make its variant in float16: "
        "`op optimize --target tensorrt`"
      )
    config.set_flag(trt.BuilderFlag.FP16)
  plan = builder.build_serialized_network(network, config)
  if plan is None:
    raise ArtifactError(f"TensorRT does not build {path} in {precision}")
  blob, inputs = bytes(plan), sample_inputs(graph, 2)
  got, apart = Engine(blob, graph, cuda).run(inputs), None
  if importlib.util.find_spec("onnxruntime") is not None:
    from openpilot.selfdrive.modeld.fair.runners.onnx import OnnxRunner

    runner = OnnxRunner(bundle, graph, variants=False, variant=variant)
    apart = worst(differences(got, runner.run(inputs)).values())
    if not apart <= OFF.get(precision, TOLERANCE[TARGET]):
      raise ArtifactError(
        f"{path} in TensorRT, {precision}, is off from ONNX Runtime by {apart:.2g} of the largest value"
      )
  about = {
    "bundle": bundle.name,
    "manifest": bundle.manifest_hash,
    "graph": graph["name"],
    "target": TARGET,
    **requirements(cuda.name(), precision),
  }
  about |= {"parity": apart, "seconds": round(time.perf_counter() - t0, 1)}
  write_artifact(folder_of(bundle, folder), stem(graph["name"], TARGET), blob, about)


class Engine:
  """An engine with its buffers: host arrays by name, device memory, one stream."""

  def __init__(self, blob: bytes, graph: dict[str, Any], cuda: Cuda):
    import tensorrt as trt

    self.cuda = cuda
    self.logger = trt.Logger(trt.Logger.ERROR)
    self.runtime = trt.Runtime(self.logger)  # must outlive the engine
    self.engine = self.runtime.deserialize_cuda_engine(blob)
    if self.engine is None:
      raise ArtifactError("TensorRT does not read its engine; build it again with compile.py")
    self.context = self.engine.create_execution_context()
    names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
    specs = {s["name"]: s for s in (*graph["inputs"], *graph["outputs"])}
    if set(names) != specs.keys():
      raise ArtifactError(
        f"the engine has {', '.join(sorted(names))}, the manifest {', '.join(sorted(specs))}; build it again with "
        "compile.py"
      )
    arrays, self.pointers = {}, {}
    for name in names:
      spec, kind = specs[name], np.dtype(trt.nptype(self.engine.get_tensor_dtype(name)))
      if tuple(self.engine.get_tensor_shape(name)) != tuple(spec["shape"]) or kind != spec["dtype"]:
        raise ArtifactError(
          f"the engine's '{name}' is {kind}{list(self.engine.get_tensor_shape(name))}; build it again with compile.py"
        )
      arrays[name] = np.zeros(spec["shape"], kind)
      self.pointers[name] = cuda.alloc(arrays[name].nbytes)
      self.context.set_tensor_address(name, self.pointers[name])
    self.inputs = {n: arrays[n] for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT}
    self.outputs = {n: arrays[n] for n in names if n not in self.inputs}

  def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for name, buffer in self.inputs.items():
      if inputs[name] is not buffer:
        np.copyto(buffer, inputs[name], casting="no")
      self.cuda.upload(self.pointers[name], buffer)
    if not self.context.execute_async_v3(self.cuda.stream.value):
      raise RuntimeError("TensorRT did not run the graph")
    for name, array in self.outputs.items():
      self.cuda.download(array, self.pointers[name])
    self.cuda.wait()
    return self.outputs

  def __del__(self) -> None:
    for pointer in getattr(self, "pointers", {}).values():
      self.cuda.free(pointer)


class TensorRTRunner:
  """`run({name: array}) -> {name: array}`. Outputs are the same arrays at every call: copy what must outlive the next
  one.

  Raises ArtifactError where there is no TensorRT, no GPU, or no engine of this bundle for this GPU: building one takes
  minutes and is compile.py's."""

  def __init__(self, bundle: Bundle, graph: dict[str, Any], folder: Path | None = None, precision: str | None = None):
    if (why := missing()) is not None:
      raise ArtifactError(why)
    cuda, precision = Cuda(), precision or usual_precision(graph)
    gpu = cuda.name()
    blob, _ = read_artifact(bundle, graph["name"], TARGET, requirements(gpu, precision), folder)
    self.engine = Engine(blob, graph, cuda)
    self.what = f"TensorRT {package_version('tensorrt')} ({gpu}, {precision})"

  def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return self.engine.run(inputs)

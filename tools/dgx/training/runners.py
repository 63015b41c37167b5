"""ONNX files for inference: TensorRT where it is, else ONNX Runtime with the best provider, or torch. All take and give torch tensors."""

import os
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from openpilot.tools.dgx.training.model import Value, hash_file, load_onnx, values
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.logwriter import atomic_path

PROVIDERS = ("tensorrt", "onnxruntime", "torch")


class Runner(Protocol):
  inputs: list[Value]
  device: torch.device
  what: str  # said to the user

  def run(self, inputs: dict[str, Tensor]) -> Tensor:
    """Inputs by the file's names, (B, ...) -> the first output (B, N) float32."""


def cache_folder() -> Path:
  return Path(os.environ.get("FAIR_TENSORRT_CACHE", Path.home() / ".cache" / "openpilot-fair" / "tensorrt"))


class OrtRunner:
  """ONNX Runtime. A file of batch 1 runs one example after the other."""

  def __init__(self, path: Path, device: str | None = None):
    available = ort.get_available_providers()
    wanted = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in available and (device != "cpu" or p.startswith("CPU"))]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = int(os.environ.get("FAIR_ORT_THREADS", "0"))
    try:
      self.session = ort.InferenceSession(str(path), options, providers=wanted)
    except Exception as e:  # onnxruntime's errors have no common base
      raise UserError(f"ONNX Runtime does not load {path}: {str(e).splitlines()[0][:160]}; a git-lfs pointer must be pulled first") from None
    self.inputs = values(onnx.load(str(path), load_external_data=False).graph.input)
    names = {i.name for i in self.session.get_inputs()}
    self.inputs = [v for v in self.inputs if v.name in names]
    self.device = torch.device("cpu")
    self.what = f"ONNX Runtime ({self.session.get_providers()[0].removesuffix('ExecutionProvider')})"

  def run(self, inputs: dict[str, Tensor]) -> Tensor:
    x = {v.name: np.ascontiguousarray(inputs[v.name].detach().cpu().to(v.dtype).numpy()) for v in self.inputs}
    fixed = all(v.shape and v.shape[0] == 1 for v in self.inputs)
    n = max(len(a) for a in x.values())
    parts = [{k: a[i : i + 1] for k, a in x.items()} for i in range(n)] if fixed and n > 1 else [x]
    return torch.from_numpy(np.concatenate([self.session.run(None, p)[0] for p in parts]).astype(np.float32))


class TorchRunner:
  """The file as a torch module: batches at once on a GPU."""

  def __init__(self, path: Path, device: str | None = None, precision: str = "float32"):
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    self.device = torch.device(name)
    self.module = load_onnx(path, getattr(torch, precision)).eval().requires_grad_(False).to(self.device)
    self.inputs = self.module.inputs
    self.what = f"torch ({name}, {precision})"

  @torch.inference_mode()
  def run(self, inputs: dict[str, Tensor]) -> Tensor:
    x = {v.name: inputs[v.name].to(self.device) for v in self.inputs}
    return next(iter(self.module(**x).values())).float()


class TensorRTRunner:
  """A TensorRT engine, built once per file, GPU, precision and TensorRT version, and kept in cache_folder()."""

  def __init__(self, path: Path, precision: str = "float16"):
    import tensorrt as trt
    if not torch.cuda.is_available():
      raise ImportError("no CUDA device")
    self.device = torch.device("cuda")
    gpu = torch.cuda.get_device_name().replace(" ", "-").replace("/", "-")
    kept = cache_folder() / f"{hash_file(path)[:16]}-{gpu}-{precision}-trt{trt.__version__}.engine"
    logger = trt.Logger(trt.Logger.ERROR)
    if not kept.is_file():
      print(f"building a TensorRT engine of {path.name} for {gpu}, {precision}: minutes, once", file=sys.stderr)
      blob = self._build(trt, logger, path, precision)
      with atomic_path(kept) as tmp:
        tmp.write_bytes(blob)
    self.engine = trt.Runtime(logger).deserialize_cuda_engine(kept.read_bytes())
    if self.engine is None:
      raise UserError(f"TensorRT does not read its engine {kept}; delete it, it is built again")
    self.context = self.engine.create_execution_context()
    self.inputs = values(onnx.load(str(path), load_external_data=False).graph.input)
    self.names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
    kinds = {trt.float32: torch.float32, trt.float16: torch.float16, trt.uint8: torch.uint8, trt.int32: torch.int32, trt.bool: torch.bool}
    self.buffers = {n: torch.empty(tuple(self.engine.get_tensor_shape(n)), dtype=kinds[self.engine.get_tensor_dtype(n)], device="cuda") for n in self.names}
    for n, b in self.buffers.items():
      self.context.set_tensor_address(n, b.data_ptr())
    self.output = next(n for n in self.names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT)
    self.what = f"TensorRT {trt.__version__} ({gpu}, {precision})"

  @staticmethod
  def _build(trt: Any, logger: Any, path: Path, precision: str) -> bytes:
    builder = trt.Builder(logger)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
      raise UserError(f"TensorRT does not read {path}: {parser.get_error(0).desc()}; use --provider onnxruntime")
    config = builder.create_builder_config()
    name = {"float16": "FP16", "bfloat16": "BF16"}.get(precision)
    if name is not None and hasattr(trt.BuilderFlag, name):
      config.set_flag(getattr(trt.BuilderFlag, name))
    blob = builder.build_serialized_network(network, config)
    if blob is None:
      raise UserError(f"TensorRT does not build {path} in {precision}; use --provider onnxruntime, or another precision")
    return bytes(blob)

  def run(self, inputs: dict[str, Tensor]) -> Tensor:
    n = max(len(inputs[v.name]) for v in self.inputs)
    stream = torch.cuda.current_stream()
    out = []
    for i in range(n):
      for v in self.inputs:
        x = inputs[v.name]
        self.buffers[v.name].copy_(x[i : i + 1] if len(x) > 1 else x)
      self.context.execute_async_v3(stream.cuda_stream)
      out.append(self.buffers[self.output].float().clone())
    return torch.cat(out)


def open_runner(path: str | Path, provider: str | None = None, device: str | None = None, precision: str | None = None) -> Runner:
  """The best runner here, or the named one of PROVIDERS; says on stderr what runs and, where TensorRT was wanted and is absent, why not. Raises UserError."""
  path = Path(path)
  if not path.is_file():
    raise UserError(f"there is no model {path}; give the path of one of openpilot's ONNX files")
  if provider not in (None, *PROVIDERS):
    raise UserError(f"provider '{provider}' is not known; {', '.join(PROVIDERS)}")
  runner: Runner | None = None
  if provider == "torch":
    runner = TorchRunner(path, device, precision or "float32")
  elif provider == "tensorrt" or (provider is None and device != "cpu" and torch.cuda.is_available()):
    try:
      runner = TensorRTRunner(path, precision or "float16")
    except ImportError as e:
      print(f"warning: TensorRT is not here ({e}); going on with ONNX Runtime", file=sys.stderr)
  if runner is None:
    runner = OrtRunner(path, device)
  print(f"teacher: {path.name} in {runner.what}", file=sys.stderr)
  return runner

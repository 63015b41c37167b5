"""ONNX files for inference: TensorRT where it is, else ONNX Runtime with the best provider, or torch. All take and give
torch tensors."""

import os
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import torch
from torch import Tensor

from openpilot.selfdrive.modeld.fair.ort import ort
from openpilot.selfdrive.modeld.fair.runners.tensorrt import flags_of
from openpilot.tools.dgx.training.model import Value, hash_file, load_onnx, values
from openpilot.tools.fair.optimize.half import half, teachers
from openpilot.tools.fair.optimize.quantize import prepare
from openpilot.tools.lib.onnx_batch import free_batch
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import atomic_path

PROVIDERS = ("tensorrt", "onnxruntime", "torch")
RECURRENT = {"GRU", "LSTM", "RNN", "Scan", "Loop"}
GPU = torch.device("cuda")  # TensorRT's


class Runner(Protocol):
  inputs: list[Value]
  device: torch.device
  what: str  # said to the user

  def run(self, inputs: dict[str, Tensor]) -> Tensor:
    """Inputs by the file's names, (B, ...) -> the first output (B, N) float32."""


def cache_folder() -> Path:
  return Path(os.environ.get("FAIR_TENSORRT_CACHE", Path.home() / ".cache" / "openpilot-fair" / "tensorrt"))


def inputs_of(path: Path) -> list[Value]:
  """A file's inputs, without the weights that old files list among them."""
  graph = onnx.load(str(path), load_external_data=False).graph
  weights = {i.name for i in graph.initializer}
  return [v for v in values(graph.input) if v.name not in weights]


def session_of(model: str | bytes, device: str | None) -> ort.InferenceSession:
  """Of a path, or of a graph's bytes, with the best provider here."""
  available = ort.get_available_providers()
  options = ort.SessionOptions()
  options.log_severity_level = 4  # errors are raised, and that a graph takes no batch is one that is looked for
  options.intra_op_num_threads = int(os.environ.get("FAIR_ORT_THREADS", "0"))
  wanted = [
    p
    for p in ("CUDAExecutionProvider", "CPUExecutionProvider")
    if p in available and (device != "cpu" or p.startswith("CPU"))
  ]
  return ort.InferenceSession(model, options, providers=wanted)


def first_output(session: ort.InferenceSession, x: dict[str, np.ndarray]) -> np.ndarray:
  return session.run([session.get_outputs()[0].name], x)[0]


def with_free_batch(path: Path, inputs: list[Value]) -> tuple[bytes, str]:
  """A file of one example -> its graph for any number of them, tried out on two: each must give what it gives alone.
  Else no bytes, and why not."""
  try:
    model = onnx.load(str(path))
    if found := sorted({n.op_type for n in model.graph.node} & RECURRENT):
      return b"", f"recurrent ({', '.join(found)})"
    blob = free_batch(model).SerializeToString()
    r = np.random.default_rng(0)
    x = {}
    for v in inputs:
      noise = r.uniform(
        0, 1 if v.dtype.is_floating_point else 255, (2, *(d if isinstance(d, int) else 1 for d in v.shape[1:]))
      )
      x[v.name] = torch.from_numpy(noise).to(v.dtype).numpy()
    both, single = first_output(session_of(blob, "cpu"), x), session_of(str(path), "cpu")
    alone = np.concatenate([first_output(single, {k: v[i : i + 1] for k, v in x.items()}) for i in range(2)])
  except Exception as e:  # onnxruntime's and protobuf's errors have no common base
    return b"", f"its inner shapes hold for one example ({str(e).splitlines()[0][:80]})"
  same = both.shape == alone.shape and np.allclose(both, alone, atol=1e-3, rtol=1e-2, equal_nan=True)
  return (blob, "") if same else (b"", "two examples at once give something else than each alone")


def in_half(path: Path, graph: bytes) -> bytes:
  """graph: the file's with its batch axis free; empty: the file as it is. -> it in float16, but for what sums or
  divides. Raises UserError."""
  model = prepare(graph or onnx.load(str(path)).SerializeToString())
  return half(model, teachers(model))


class OrtRunner:
  """ONNX Runtime. A file of one example takes batches at once where its graph can (found out at the first), else one
  example after the other."""

  def __init__(self, path: Path, device: str | None = None):
    self.path, self.asked = path, device
    try:
      self.session = session_of(str(path), device)
    except Exception as e:  # onnxruntime's errors have no common base
      raise UserError(
        f"ONNX Runtime does not load {path}: {str(e).splitlines()[0][:160]}; a git-lfs pointer must be pulled first"
      ) from None
    self.inputs = inputs_of(path)
    self.fixed = all(v.shape and v.shape[0] == 1 for v in self.inputs)
    self.batched = {v.name for v in self.inputs if self.fixed or (v.shape and not isinstance(v.shape[0], int))}
    self.whole: ort.InferenceSession | None = None if self.fixed else self.session  # takes batches
    self.device = torch.device("cpu")
    self.what = f"ONNX Runtime ({self.session.get_providers()[0].removesuffix('ExecutionProvider')})"

  def free(self) -> None:
    blob, why = with_free_batch(self.path, self.inputs)
    self.fixed = False
    if blob:
      self.whole = session_of(blob, self.asked)
    else:
      print(f"{self.path.name}: ONNX Runtime runs one example after the other: {why}", file=sys.stderr)

  def run(self, inputs: dict[str, Tensor]) -> Tensor:
    x = {v.name: np.ascontiguousarray(inputs[v.name].detach().cpu().to(v.dtype).numpy()) for v in self.inputs}
    n = max((len(x[k]) for k in self.batched), default=1)
    if n > 1 and self.fixed:
      self.free()
    x = {k: np.repeat(a, n, 0) if k in self.batched and len(a) == 1 < n else a for k, a in x.items()}
    if n == 1 or self.whole is not None:
      return torch.from_numpy(first_output(self.whole or self.session, x).astype(np.float32))
    return torch.from_numpy(
      np.concatenate([first_output(self.session, {k: a[i : i + 1] for k, a in x.items()}) for i in range(n)]).astype(
        np.float32
      )
    )


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
  """A TensorRT engine, built once per file, GPU, precision, batch and TensorRT version, and kept in cache_folder().

  batch: the examples that are run at once, and for which the engine is tuned; fewer are taken too, more in turns. Where
  the batch axis cannot be freed they are run one by one, and `what` says why. precision: None is float16 where the
  builder turns a graph into it; from TensorRT 11 on a network keeps its own types, and float16 is put into the graph
  where it is asked for. A file with QuantizeLinear in it is of float32."""

  def __init__(self, path: Path, precision: str | None = None, batch: int = 1):
    import tensorrt as trt

    if not torch.cuda.is_available():
      raise ImportError("no CUDA device")
    flags = {"float32": None, "float16": "FP16", "bfloat16": "BF16"}
    precision = precision or ("float16" if hasattr(trt.BuilderFlag, "FP16") else "float32")
    flag = flags[precision]
    in_graph = flag is not None and not hasattr(trt.BuilderFlag, flag)  # from 11 on
    if in_graph and precision != "float16":
      raise UserError(
        f"TensorRT {trt.__version__} keeps a graph's own types; take --precision float32, or a file in {precision}"
      )
    self.device = GPU
    found = inputs_of(path)
    graph, why = b"", ""
    if batch > 1 and all(v.shape and v.shape[0] == 1 for v in found):
      graph, why = with_free_batch(path, found)
    self.batch = 1 if why else batch
    if in_graph:
      graph, flag = in_half(path, graph), None
    gpu = torch.cuda.get_device_name().replace(" ", "-").replace("/", "-")
    kept = cache_folder() / f"{hash_file(path)[:16]}-{gpu}-{precision}-b{self.batch}-trt{trt.__version__}.engine"
    self.logger = trt.Logger(trt.Logger.ERROR)
    if not kept.is_file():
      print(
        f"building a TensorRT engine of {path.name} for {gpu}, {precision}, batch {self.batch}: minutes, once",
        file=sys.stderr,
      )
      blob = self._build(trt, path, graph, flag)
      with atomic_path(kept) as tmp:
        tmp.write_bytes(blob)
    self.runtime = trt.Runtime(self.logger)  # must outlive the engine
    self.engine = self.runtime.deserialize_cuda_engine(kept.read_bytes())
    if self.engine is None:
      raise UserError(f"TensorRT does not read its engine {kept}; delete it, it is built again")
    self.context = self.engine.create_execution_context()
    names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
    self.inputs = [v for v in found if v.name in names]
    kinds = {
      trt.float32: torch.float32,
      trt.float16: torch.float16,
      trt.bfloat16: torch.bfloat16,
      trt.uint8: torch.uint8,
      trt.int32: torch.int32,
      trt.int64: torch.int64,
      trt.bool: torch.bool,
    }
    shapes = {n: tuple(self.engine.get_tensor_shape(n)) for n in names}
    self.free = {n for n, s in shapes.items() if s[:1] == (-1,)}
    if odd := [n for n, s in shapes.items() if -1 in s[1:]]:
      raise UserError(f"{path}: {', '.join(odd)} has other free axes than the batch's; give a file of fixed shapes")
    self.buffers = {
      n: torch.empty(
        (self.batch, *s[1:]) if n in self.free else s, dtype=kinds[self.engine.get_tensor_dtype(n)], device=self.device
      )
      for n, s in shapes.items()
    }
    for n, b in self.buffers.items():
      self.context.set_tensor_address(n, b.data_ptr())
    self.output = next(n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT)
    self.what = f"TensorRT {trt.__version__} ({gpu}, {precision}, batch {self.batch}{f': {why}' if why else ''})"

  def _build(self, trt: Any, path: Path, graph: bytes, flag: str | None) -> bytes:
    """graph: the file's with its batch axis free; empty: the file as it is. Raises UserError."""
    builder = trt.Builder(self.logger)
    explicit = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
    # without a builder's flag as the graph says, which may be of float16, or have QuantizeLinear in it
    network = builder.create_network(flags_of(trt, flag is None) | (0 if explicit is None else 1 << int(explicit)))
    parser = trt.OnnxParser(network, self.logger)
    if not (parser.parse(graph) if graph else parser.parse_from_file(str(path))):
      why = parser.get_error(0).desc() if parser.num_errors else "it does not say why"
      raise UserError(f"TensorRT does not read {path}: {why}; use --provider onnxruntime")
    config = builder.create_builder_config()
    if flag is not None:
      config.set_flag(getattr(trt.BuilderFlag, flag))
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if any(-1 in tuple(x.shape) for x in inputs):
      profile = builder.create_optimization_profile()
      for x in inputs:
        first, *rest = tuple(x.shape) or (1,)
        least, most = ((n if first == -1 else first, *rest) for n in (1, self.batch))
        profile.set_shape(x.name, least, most, most)
      config.add_optimization_profile(profile)
    blob = builder.build_serialized_network(network, config)
    if blob is None:
      raise UserError(
        f"TensorRT does not build {path}{f' in {flag}' if flag else ''}; use --provider onnxruntime, or another "
        "precision"
      )
    return bytes(blob)

  def run(self, inputs: dict[str, Tensor]) -> Tensor:
    n = max(len(inputs[v.name]) for v in self.inputs)
    out = []
    for at in range(0, n, self.batch):
      m = min(self.batch, n - at)
      for v in self.inputs:
        x, buffer = inputs[v.name], self.buffers[v.name]
        if v.name in self.free:
          buffer = buffer[:m]
          if not self.context.set_input_shape(v.name, tuple(buffer.shape)):
            raise RuntimeError(f"TensorRT does not take {v.name} of {tuple(buffer.shape)}")
        buffer.copy_(x[at : at + m] if len(x) > 1 else x)
      if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
        raise RuntimeError("TensorRT did not run the graph")
      result = self.buffers[self.output]
      out.append((result[:m] if self.output in self.free else result).float().clone())
    return torch.cat(out)


def open_runner(
  path: str | Path, provider: str | None = None, device: str | None = None, precision: str | None = None, batch: int = 1
) -> Runner:
  """The best runner here, or the named one of PROVIDERS; says on stderr what runs and, where TensorRT was wanted and is
  absent, why not. batch: how many examples will be given at once. Raises UserError."""
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
      runner = TensorRTRunner(path, precision, batch)
    except ImportError as e:
      print(f"warning: TensorRT is not here ({e}); going on with ONNX Runtime", file=sys.stderr)
  if runner is None:
    runner = OrtRunner(path, device)
  print(f"teacher: {path.name} in {runner.what}", file=sys.stderr)
  return runner

#!/usr/bin/env python3
"""How fast an ONNX file runs here, a driving model or any other, and how far off it is then: torch, ONNX Runtime,
tinygrad, TensorRT, in each precision.

python tools/dgx/benchmark_inference.py [MODEL.onnx ...] [--batches 1 16] [--json FILE]      (without a file: the small
    reference network)

Latencies are of one call with the inputs in host memory and the output read back, after warm-up. `off` is the largest
difference from torch's float32 in parts of the largest output, or from ONNX Runtime's where torch does not know the
file's operators. What does not run is listed with the reason."""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the modules beside it must not be found under their bare names
  sys.path[: not sys.flags.safe_path] = [str(Path(__file__).resolve().parents[2])]

import numpy as np
import onnx
import psutil
import torch
from torch import Tensor

from openpilot.tools.dgx import hardware
from openpilot.tools.dgx.training import runners
from openpilot.tools.dgx.training.model import FLOATS, OnnxModule, Value, load_onnx
from openpilot.tools.dgx.training.reference import save_reference
from openpilot.tools.dgx.training.runners import OrtRunner, TensorRTRunner, TorchRunner
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.files import atomic_path
from openpilot.tools.lib.options import option, parse

RUNNERS = ("torch", "onnxruntime", "tinygrad", "tensorrt")
PRECISIONS = ("float32", "float16", "bfloat16", "float8", "float4")
WARM_UP = 3
Run = Callable[[dict[str, Tensor]], Tensor]


class Skipped(Exception):
  """Why something is not measured."""


class File:
  """An ONNX file to be measured. model: as a torch module; None where torch does not know its operators, and then
  `why`. Raises UserError."""

  def __init__(self, path: Path):
    self.path, self.why = path, ""
    self.model: OnnxModule | None = None
    try:
      self.model = load_onnx(path).eval()
    except UserError as e:
      if "operators" not in str(e) and "not known here" not in str(e):
        raise
      self.why = str(e).removeprefix(f"{path} ")
    self.inputs = runners.inputs_of(path)
    weights = onnx.load(str(path), load_external_data=False).graph.initializer
    self.half = any(i.data_type == onnx.TensorProto.FLOAT16 for i in weights)

  def reference(self, x: dict[str, Tensor]) -> Tensor:
    """The first output, to compare with."""
    if self.model is None:
      return OrtRunner(self.path, "cpu").run(x)
    with torch.no_grad():
      return next(iter(self.model(**x).values())).float()


def inputs_of(inputs: list[Value], batch: int, seed: int = 0) -> dict[str, Tensor]:
  """Noise in the range of each input: bytes, 0 to 1, or for other whole numbers 0 and 1. Raises UserError where no
  input has an axis of examples."""
  g = torch.Generator().manual_seed(seed)
  out = {}
  for v in inputs:
    shape = [d if isinstance(d, int) and (i or d > 1) else 1 if i else batch for i, d in enumerate(v.shape)]
    most = 256 if v.dtype == torch.uint8 else 2
    out[v.name] = (
      torch.rand(shape, generator=g) if v.dtype in FLOATS else torch.randint(0, most, shape, generator=g).to(v.dtype)
    )
  if batch > 1 and not any(t.dim() and len(t) == batch for t in out.values()):
    raise UserError(
      f"{', '.join(f'{v.name} {v.shape}' for v in inputs)}: no input has an axis of examples; take --batches 1"
    )
  return out


def tinygrad_run(file: File) -> Run:
  try:
    from tinygrad import Tensor as TinyTensor
    from tinygrad import TinyJit
    from tinygrad.nn.onnx import OnnxRunner
  except ImportError as e:
    raise Skipped(f"tinygrad is not installed ({e})") from None
  runner = OnnxRunner(str(file.path))
  kinds = {v.name: v.dtype for v in file.inputs}
  jit = TinyJit(lambda **x: next(iter(runner(x).values())).cast("float32").realize())

  def run(x: dict[str, Tensor]) -> Tensor:
    if len(next(iter(x.values()))) > 1:
      raise Skipped("the file is of batch 1, for which tinygrad compiles it")
    return torch.from_numpy(jit(**{k: TinyTensor(v.to(kinds[k]).numpy()).realize() for k, v in x.items()}).numpy())

  return run


def open_run(name: str, precision: str, batch: int, file: File, device: str | None) -> Run:
  """Raises Skipped saying why not."""
  cuda = torch.cuda.is_available() and device != "cpu"
  if precision in ("float8", "float4"):
    capability = torch.cuda.get_device_capability() if cuda else (0, 0)
    least = (8, 9) if precision == "float8" else (10, 0)
    if capability < least:
      raise Skipped(f"this hardware has no {precision}: a GPU of capability {least[0]}.{least[1]} has")
    raise Skipped(f"the file holds no {precision}: quantize it first, with ModelOpt, and measure that file")
  if name == "torch":
    if file.why:
      raise Skipped(file.why)
    if precision == "float16" and not cuda:
      raise Skipped("a CPU has no fast float16")
    return TorchRunner(file.path, device, precision).run
  if name == "onnxruntime":
    own = "float16" if file.half else "float32"
    if precision != own:
      raise Skipped(f"ONNX Runtime runs a file in its own precision, here {own}")
    return OrtRunner(file.path, device).run
  if name == "tinygrad":
    if precision != "float32":
      raise Skipped("tinygrad runs a file in its own precision")
    return tinygrad_run(file)
  try:
    return TensorRTRunner(file.path, precision, batch).run
  except ImportError as e:
    raise Skipped(f"TensorRT is not here ({e})") from None


def measure(run: Run, x: dict[str, Tensor], seconds: float, least: int = 10) -> tuple[Tensor, list[float]]:
  """-> the output, and milliseconds of each call: `least` of them, and more while the time lasts."""
  for _ in range(WARM_UP):
    out = run(x).cpu()
  times: list[float] = []
  begin = time.perf_counter()
  while len(times) < least or time.perf_counter() - begin < seconds:
    t = time.perf_counter()
    out = run(x).cpu()  # read back: a GPU has ended then
    times.append((time.perf_counter() - t) * 1e3)
  return out, times


def row_of(
  name: str,
  precision: str,
  batch: int,
  file: File,
  want: Tensor,
  x: dict[str, Tensor],
  seconds: float,
  device: str | None,
) -> dict[str, Any]:
  """One line of the table; with `skipped`, the reason, where it does not run."""
  row: dict[str, Any] = {"model": file.path.name, "runner": name, "precision": precision, "batch": batch}
  if torch.cuda.is_available():
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
  before = psutil.Process().memory_info().rss
  try:
    out, times = measure(open_run(name, precision, batch, file, device), x, seconds)
  except (Skipped, UserError) as e:
    return {**row, "skipped": str(e)}
  except torch.cuda.OutOfMemoryError:
    return {**row, "skipped": f"the GPU's memory does not hold a batch of {batch}"}
  except Exception as e:  # compilers and drivers fail in their own ways; the others must still be measured
    return {**row, "skipped": f"{type(e).__name__}: {' '.join(str(e).split())[:120]}"}
  off = float((out.reshape(want.shape) - want).abs().max()) / max(1e-6, float(want.abs().max()))
  on_gpu = torch.cuda.is_available() and device != "cpu" and name == "torch"
  memory = torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss - before
  return {
    **row,
    "mean_ms": float(np.mean(times)),
    "p50_ms": float(np.median(times)),
    "p99_ms": float(np.quantile(times, 0.99)),
    "calls": len(times),
    "per_second": batch * 1e3 / float(np.mean(times)),
    "memory_mb": max(0, memory) / 1e6,
    "off": off,
  }


def keep(rows: list[dict[str, Any]], path: Path | None) -> None:
  """Writes the rows as JSON where a path is given. Raises UserError where all were skipped."""
  if all("skipped" in r for r in rows):
    raise UserError(f"nothing was measured: {'; '.join(dict.fromkeys(r['skipped'] for r in rows))}")
  if path is not None:
    with atomic_path(path) as tmp:
      tmp.write_text(json.dumps({"hardware": hardware.describe(), "rows": rows}, indent=1))


def table(rows: list[dict[str, Any]]) -> str:
  done, rest = [r for r in rows if "skipped" not in r], [r for r in rows if "skipped" in r]
  lines = [
    (
      f"{'model':<28} {'runner':<12} {'precision':<9} {'batch':>5} {'mean ms':>8} {'p50':>8} {'p99':>8} {'per s':>8} "
      f"{'MB':>7} {'off':>8}"
    )
  ]
  for r in done:
    times = f"{r['mean_ms']:>8.2f} {r['p50_ms']:>8.2f} {r['p99_ms']:>8.2f}"
    numbers = f"{times} {r['per_second']:>8.1f} {r['memory_mb']:>7.0f} {r['off']:>8.1e}"
    lines.append(f"{r['model'][:28]:<28} {r['runner']:<12} {r['precision']:<9} {r['batch']:>5} {numbers}")
  why: dict[str, list[str]] = {}
  for r in rest:
    why.setdefault(r["skipped"], []).append(f"{r['runner']} {r['precision']} batch {r['batch']}")
  return "\n".join(lines + [f"not measured: {', '.join(dict.fromkeys(v))}: {k}" for k, v in why.items()])


@dataclass(frozen=True)
class Options:
  models: tuple[Path, ...] = option(
    (), positional=True, metavar="MODEL.onnx", help="networks; the small reference network without"
  )
  batches: tuple[int, ...] = option((1,), nargs="+", help="sizes of a batch that are measured")
  runners: tuple[str, ...] = option(RUNNERS, nargs="+", choices=RUNNERS, help="what runs them")
  precisions: tuple[str, ...] = option(PRECISIONS, nargs="+", choices=PRECISIONS, help="in which")
  device: str | None = option(None, help="cpu leaves a GPU out")
  seconds: float = option(2.0, help="of calls for each line, at least 10")
  json: Path | None = option(None, help="write the rows there too")


def main() -> None:
  args = parse(Options, __doc__, "benchmark_inference")
  if min(args.batches) < 1:
    raise UserError("--batches are at least 1")
  print(hardware.one_line())
  rows: list[dict[str, Any]] = []
  with tempfile.TemporaryDirectory() as folder:
    for path in args.models or [save_reference(Path(folder) / "reference.onnx")]:
      file = File(path)
      for batch in args.batches:
        x = inputs_of(file.inputs, batch)
        try:
          want = file.reference(x)
        except UserError:
          raise
        except Exception as e:  # graphs fail in their own ways, at shapes above all
          shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in x.items())
          raise UserError(f"{path} does not run on noise of {shapes}: {' '.join(str(e).split())[:160]}") from None
        for precision in args.precisions:
          for name in args.runners:
            rows.append(row_of(name, precision, batch, file, want, x, args.seconds, args.device))
  keep(rows, args.json)
  print(table(rows))


if __name__ == "__main__":
  raise SystemExit(cli(main)())

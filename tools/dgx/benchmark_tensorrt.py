#!/usr/bin/env python3
"""How many frames a second a teacher labels: with TensorRT where it is, beside ONNX Runtime and torch; against 800, and
as a share of the GPU's bf16 peak.

python tools/dgx/benchmark_tensorrt.py [MODEL.onnx ...] [--batches 1 16 64] [--json FILE]      (without a file: the
    small reference network)

A batch is of that many drives, one step of each, with modeld's memory and openpilot's parsing: what labeling really
costs. Of a file that is no driving model the bare network is measured, on noise."""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the modules beside it must not be found under their bare names
  sys.path[: not sys.flags.safe_path] = [str(Path(__file__).resolve().parents[2])]

import onnx
import torch
from torch.utils.flop_counter import FlopCounterMode

from openpilot.tools.dgx import hardware
from openpilot.tools.dgx.benchmark_inference import File, inputs_of, keep
from openpilot.tools.dgx.training.constants import DESIRE_LEN, FRAME_SHAPE
from openpilot.tools.dgx.training import runners
from openpilot.tools.dgx.training.outputs import SLICES_KEY
from openpilot.tools.dgx.training.reference import save_reference
from openpilot.tools.dgx.training.runners import PROVIDERS, Runner, open_runner
from openpilot.tools.dgx.training.teacher import KNOWN, NAMES, DrivingTeacher
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.options import option, parse

TARGET = 800  # frames/s
PEAK = {
  "GB10": 125.0,
  "H100": 989.0,
  "H200": 989.0,
  "A100": 312.0,
  "RTX 4090": 165.0,
  "RTX 5090": 209.0,
}  # dense bf16 TFLOPS, of the makers' sheets


def flops_of(path: Path) -> float | None:
  """Multiply-adds times two of one step; None where torch does not know the file's operators."""
  file = File(path)
  if file.model is None:
    return None
  with FlopCounterMode(display=False) as counter:
    file.reference(inputs_of(file.inputs, 1))
  return float(counter.get_total_flops())


def is_driving(path: Path) -> bool:
  """Whether a teacher can be made of it: its outputs are named, and clips have its inputs."""
  named = any(p.key == SLICES_KEY for p in onnx.load(str(path), load_external_data=False).metadata_props)
  return named and {NAMES.get(v.name, v.name) for v in runners.inputs_of(path)} <= set(KNOWN)


def clip_of(batch: int, steps: int) -> dict[str, torch.Tensor]:
  g = torch.Generator().manual_seed(0)
  frames = torch.randint(0, 256, (batch, steps, 2 * FRAME_SHAPE[0], *FRAME_SHAPE[1:]), generator=g, dtype=torch.uint8)
  traffic, desire = torch.tensor([[1.0, 0.0]]).repeat(batch, 1), torch.zeros(batch, steps, DESIRE_LEN)
  return {
    "frames": frames,
    "big_frames": frames,
    "desire": desire,
    "traffic_convention": traffic,
    "speed": torch.zeros(batch, steps),
  }


def workload(
  paths: list[Path], provider: str, precision: str | None, batch: int, steps: int
) -> tuple[Runner, Callable[[int], None]]:
  """-> what runs the images, and what runs so many steps of them and waits for the end. Raises UserError."""
  if len(paths) == 1 and not is_driving(paths[0]):
    runner = open_runner(paths[0], provider, None, precision, batch)
    x = inputs_of(runner.inputs, batch)

    def bare(n: int) -> None:
      for _ in range(n):
        out = runner.run(x)
      float(out.sum())

    return runner, bare
  teacher, clip = DrivingTeacher(paths, provider, None, precision, batch), clip_of(batch, steps)
  assert teacher.vision is not None

  def label(n: int) -> None:
    out = teacher.label({k: v[:, :n] if v.dim() > 2 or k == "speed" else v for k, v in clip.items()})
    float(out["plan"].sum() if "plan" in out else next(iter(out.values())).sum())

  return teacher.vision.runner, label


def measure(
  paths: list[Path], provider: str, precision: str | None, batches: Sequence[int], steps: int, flops: float | None
) -> list[dict[str, Any]]:
  """A row a batch; where the provider is not here, or does not take the file, one with the reason."""
  row: dict[str, Any] = {"models": [p.name for p in paths], "provider": provider, "precision": precision}
  rows: list[dict[str, Any]] = []
  peak = next((v for k, v in PEAK.items() if torch.cuda.is_available() and k in torch.cuda.get_device_name()), None)
  for batch in batches:
    try:
      runner, run = workload(paths, provider, precision, batch, steps)
      if provider == "tensorrt" and not runner.what.startswith("TensorRT"):
        return [{**row, "skipped": "TensorRT is not here"}]
      run(1)  # warm
      t = time.perf_counter()
      run(steps)
      fps = batch * steps / (time.perf_counter() - t)
    except UserError as e:
      return [*rows, {**row, "skipped": str(e)}]
    except torch.cuda.OutOfMemoryError:
      rows.append({**row, "batch": batch, "skipped": "the GPU's memory does not hold it"})
      continue
    except Exception as e:  # compilers and drivers fail in their own ways; the others must still be measured
      rows.append({**row, "batch": batch, "skipped": f"{type(e).__name__}: {' '.join(str(e).split())[:120]}"})
      continue
    done = {**row, "what": runner.what, "batch": batch, "frames_per_second": fps, "of_800": fps / TARGET}
    if flops is not None:
      done["tflops"] = fps * flops / 1e12
      done["of_peak"] = None if peak is None or runner.device.type != "cuda" else done["tflops"] / peak
    rows.append(done)
  return rows


@dataclass(frozen=True)
class Options:
  models: tuple[Path, ...] = option(
    (),
    positional=True,
    metavar="MODEL.onnx",
    help="one driving model, a vision file and its policy, or any other network",
  )
  batches: tuple[int, ...] = option((1, 16, 64), nargs="+", help="sizes of a batch that are measured")
  steps: int = option(10, help="of each drive")
  precision: str | None = option(
    None, choices=("float32", "float16", "bfloat16"), help="of TensorRT and torch; by default each one's usual one"
  )
  json: Path | None = option(None, help="write the rows there too")


def main() -> None:
  args = parse(Options, __doc__, "benchmark_tensorrt")
  if min(args.batches) < 1 or args.steps < 1:
    raise UserError("--batches and --steps are at least 1")
  print(hardware.one_line())
  with tempfile.TemporaryDirectory() as folder:
    paths = list(args.models) or [save_reference(Path(folder) / "reference.onnx")]
    each = [flops_of(x) for x in paths]
    flops = None if None in each else sum(x for x in each if x is not None)
    if len(paths) == 1 and not is_driving(paths[0]):
      print(f"{paths[0].name} is no driving model: the bare network, on noise")
    rows = [
      r for provider in PROVIDERS for r in measure(paths, provider, args.precision, args.batches, args.steps, flops)
    ]
  keep(rows, args.json)
  if flops is not None:
    print(f"{', '.join(x.name for x in paths)}: {flops / 1e9:.2f} GFLOP a step")
  print(f"{'':<44} {'batch':>5} {'frames/s':>9} {'of 800':>7} {'TFLOPS':>7} {'of peak':>8}")
  for r in rows:
    if "skipped" in r:
      print(f"{r['provider']:<44} not measured: {r['skipped']}")
      continue
    share = f"{r['of_peak'] * 100:.1f}%" if r.get("of_peak") is not None else "unknown"
    print(
      f"{r['what'][:44]:<44} {r['batch']:>5} {r['frames_per_second']:>9.1f} {r['of_800']:>7.2f} "
      f"{r.get('tflops', float('nan')):>7.3f} {share:>8}"
    )


if __name__ == "__main__":
  raise SystemExit(cli(main)())

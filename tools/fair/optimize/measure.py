"""What variants of a bundle cost here: milliseconds in turns, memory, the time to load, bytes, multiply-adds."""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openpilot.selfdrive.modeld.fair.bundle import Bundle
from openpilot.selfdrive.modeld.fair.runners import make_runner
from openpilot.selfdrive.modeld.fair.runners.onnx import open_session
from openpilot.tools.fair.comma_four.cost import count
from openpilot.tools.lib import python
from openpilot.tools.lib.errors import UserError

if TYPE_CHECKING:
  from openpilot.tools.fair.students.student import Student

WARM = 3  # rounds that are not counted
TIMEOUT = 300  # s


def milliseconds(
  bundles: Mapping[str, Bundle],
  inputs: Mapping[str, list[dict[str, Any]]],
  rounds: int,
  threads: int,
  base: str,
  runners: Mapping[str, str] | None = None,
) -> dict[str, dict[str, float]]:
  """inputs: of each graph. runners: of bundles that ONNX Runtime does not run. All take turns, so that what else the
  machine does falls on all. -> of each p50 and p99, and how many times as fast as `base` it is: the median over rounds,
  by the fastest of each, and by this process's CPU time, which is that of a busy machine."""
  of = {name: (runners or {}).get(name, "onnx") for name in bundles}
  made = {n: [(make_runner(of[n], b, g, threads), inputs[g["name"]]) for g in b.graphs] for n, b in bundles.items()}
  times: dict[str, list[float]] = {name: [] for name in bundles}
  cpu: dict[str, list[float]] = {name: [] for name in bundles}
  for n in range(rounds + WARM):
    for name, graphs in made.items():
      begun, busy = time.perf_counter(), time.process_time()
      for runner, some in graphs:
        runner.run(some[n % len(some)])
      if n >= WARM:
        times[name].append(time.perf_counter() - begun)
        cpu[name].append(time.process_time() - busy)
  first = np.array(times[base])
  out = {}
  for name, taken in times.items():
    t = np.array(taken)
    out[name] = {
      **{f"p{q}": round(1e3 * float(np.percentile(t, q)), 3) for q in (50, 99)},
      "ratio": round(float(np.median(first / t)), 3),
      "ratio_of_minima": round(float(first.min() / t.min()), 3),
      "ratio_of_cpu": round(float(np.median(np.array(cpu[base]) / np.maximum(cpu[name], 1e-9))), 3),
    }
  return out


def frame_of(student: "Student") -> Callable[[], Any]:
  """A call that computes one frame by ONNX Runtime on one thread, of the student as it is now."""
  from openpilot.tools.fair.students.onnx_export import export_onnx

  with tempfile.TemporaryDirectory() as folder:
    inputs = export_onnx(student, path := Path(folder) / "student.onnx")["inputs"]
    session = open_session(path.read_bytes(), 1)
  feed = {s["name"]: np.zeros(s["shape"], s["dtype"]) for s in inputs}
  return lambda: session.run(None, feed)


def milliseconds_in_turns(calls: Sequence[Callable[[], Any]], rounds: int = 40) -> list[float]:
  """Each one's median, of CPU, which is what it takes where nothing else runs."""
  times = np.zeros((len(calls), WARM + rounds))
  for n in range(WARM + rounds):
    for k, call in enumerate(calls):
      begun = time.thread_time()
      call()
      times[k, n] = time.thread_time() - begun
  return (1e3 * np.median(times[:, WARM:], axis=1)).tolist()


def footprint(bundle: Bundle, runner: str = "onnx") -> dict[str, float]:
  """In a process of its own. Raises UserError."""
  words = python.command("-m", "openpilot.tools.fair.optimize.footprint", bundle.path.resolve(), runner)
  done = subprocess.run(words, env=python.environment(), capture_output=True, text=True, timeout=TIMEOUT)
  if done.returncode:
    raise UserError(f"{bundle.path} does not run by itself: {python.why_failed(done)}")
  return json.loads(done.stdout)


def sizes(bundle: Bundle) -> dict[str, int]:
  """Bytes of the graphs' files, parameters and multiply-accumulates; these of the float graph are its variants' too."""
  paths: list[Path] = [bundle.path / g["file"] for g in bundle.graphs]
  counted = [count(p) for p in paths]
  return {
    "bytes": sum(p.stat().st_size for p in paths),
    "parameters": sum(p for p, _ in counted),
    "macs": sum(m for _, m in counted),
  }


def static_cost(bundle: Bundle) -> dict[str, Any]:
  """Of a comma four, which has no use for 8 bits: tinygrad computes them in float there."""
  from openpilot.tools.fair.comma_four.report import TIMEOUT, measure

  graphs = [measure(bundle.path / g["file"], g["name"], TIMEOUT) for g in bundle.graphs]
  return {k: sum(g[k] for g in graphs) for k in ("kernels", "bytes", "macs")}

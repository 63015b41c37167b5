"""What runs a graph here. A runner's package is imported only when that runner is made: a device has no ONNX Runtime, a
PC no tinygrad."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from openpilot.selfdrive.modeld.fair.artifact import ArtifactError, ignored
from openpilot.selfdrive.modeld.fair.bundle import Bundle, BundleError
from openpilot.selfdrive.modeld.fair.cpu import variant_of

QCOM_GPU = Path("/dev/kgsl-3d0")
NVIDIA_GPU = Path("/dev/nvidiactl")
TOLD: set[Path] = set()  # bundles of whose own artifacts it was said that they are ignored


class Runner(Protocol):
  """`run({name: array}) -> {name: array}`: the outputs are the same arrays at every call. `what` says which runner, for
  people."""

  what: str

  def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]: ...


def preferred() -> tuple[str, ...]:
  """Runners that are tried here when none is named: the GPU's where there is one, then ONNX Runtime. tinygrad's CPU
  code is slower than that, and the last."""
  first = ("tinygrad-qcom",) if QCOM_GPU.exists() else ("tensorrt", "tinygrad-cuda") if NVIDIA_GPU.exists() else ()
  return (*first, "onnx", "tinygrad-cpu")


Maker = Callable[[Bundle, dict[str, Any], int, Path | None], Runner]


def make_onnx(bundle: Bundle, graph: dict[str, Any], threads: int, folder: Path | None) -> Runner:
  from openpilot.selfdrive.modeld.fair.runners.onnx import OnnxRunner

  return OnnxRunner(bundle, graph, threads)


def make_tensorrt(bundle: Bundle, graph: dict[str, Any], threads: int, folder: Path | None) -> Runner:
  from openpilot.selfdrive.modeld.fair.runners.tensorrt import TensorRTRunner

  return TensorRTRunner(bundle, graph, folder)


def tinygrad_maker(target: str) -> Maker:
  def make(bundle: Bundle, graph: dict[str, Any], threads: int, folder: Path | None) -> Runner:
    from openpilot.selfdrive.modeld.fair.runners.tinygrad import TinygradRunner

    return TinygradRunner(bundle, graph, target, folder)

  return make


def tflite_maker(target: str) -> Maker:
  def make(bundle: Bundle, graph: dict[str, Any], threads: int, folder: Path | None) -> Runner:
    from openpilot.selfdrive.modeld.fair.runners.tflite import TfliteRunner

    return TfliteRunner(bundle, graph, target, threads)

  return make


# name -> maker of (bundle, graph, threads, folder of artifacts or None); other packages may add to it
RUNNERS: dict[str, Maker] = {
  **{target: tinygrad_maker(target) for target in ("tinygrad-qcom", "tinygrad-cuda", "tinygrad-cpu")},
  "tensorrt": make_tensorrt,
  **{target: tflite_maker(target) for target in ("tflite", "tflite-int8")},
  "onnx": make_onnx,
}


def file_of(graph: dict[str, Any], runner: str) -> str:
  """Which file of the bundle this runner runs here, or is compiled of."""
  return (variant_of(graph, None if runner == "onnx" else (runner,)) or graph)["file"]


def make_runner(
  name: str, bundle: Bundle, graph: dict[str, Any], threads: int = 1, folder: Path | None = None
) -> Runner:
  """Raises ArtifactError, ImportError or BundleError where this runner cannot run the graph here."""
  if name not in RUNNERS:
    raise BundleError(f"runner '{name}' is not known; one of {', '.join(RUNNERS)}")
  return RUNNERS[name](bundle, graph, threads, folder)


def open_runner(
  bundle: Bundle, graph: dict[str, Any], choice: str | None = None, threads: int = 1, folder: Path | None = None
) -> Runner:
  """The chosen runner, else the first of preferred() that can; ONNX Runtime where the chosen one cannot, saying why on
  stderr.

  folder: where artifacts are, if not where this machine keeps its own. Raises BundleError with every reason where none
  can."""
  if choice is not None and choice not in RUNNERS:
    raise BundleError(f"runner '{choice}' is not known; one of {', '.join(RUNNERS)}")
  if (word := ignored(bundle.path)) is not None and bundle.path not in TOLD:
    TOLD.add(bundle.path)
    print(f"fairmodeld: {word}", file=sys.stderr, flush=True)
  where = f"{bundle.path}: graph '{graph['name']}'"
  reasons, absent = [], False
  for name in preferred() if choice is None else dict.fromkeys((choice, "onnx")):
    try:
      runner = make_runner(name, bundle, graph, threads, folder)
    except ImportError as e:
      reasons.append(f"{name}: {e.name or e} is not installed")
      absent = True
      continue
    except (ArtifactError, BundleError) as e:
      reasons.append(f"{name}: {e}")
      continue
    if reasons:
      print(f"fairmodeld: {where} runs in {runner.what}; {'; '.join(reasons)}", file=sys.stderr, flush=True)
    return runner
  if not absent and (len(reasons) == 1 or reasons[0].startswith("onnx: ")):
    raise BundleError(reasons[0].split(": ", 1)[1])
  # openpilot has tinygrad and no ONNX Runtime: there a bundle runs once it is compiled
  compile_it = f"compile it: python -m openpilot.selfdrive.modeld.fair.compile {bundle.path}" if absent else ""
  raise BundleError(f"{where} has no runner here; {'; '.join(reasons)}{'; ' + compile_it if compile_it else ''}")

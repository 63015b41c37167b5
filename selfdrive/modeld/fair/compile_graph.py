"""One graph of a bundle compiled by tinygrad, checked and written: what compile.py runs in a process of its own."""

import hashlib
import importlib.util
import itertools
import pickle
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.artifact import package_version, read_sidecar, stem, write_artifact
from openpilot.selfdrive.modeld.fair.bundle import Bundle
from openpilot.selfdrive.modeld.fair.child import environment, python
from openpilot.selfdrive.modeld.fair.parity import TOLERANCE, differences, sample_inputs
from openpilot.selfdrive.modeld.fair.runners.tinygrad import read_jit, requirements
from openpilot.selfdrive.modeld.fair.runners.tinygrad_ops import improve

NUMBERS = 1 << 20  # of buffers that a jit may have


class CompileError(ValueError):
  """A graph that was not compiled. One line: what, where, what to do."""


def make_jit(path: Path, graph: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, np.ndarray], dict[str, Any]]:
  """(jit, arrays, tensors): the tensors are the arrays, which are filled before each call of jit(**tensors) -> {output:
  Tensor}. See runners/tinygrad.py."""
  from tinygrad import Device, Tensor, TinyJit
  from tinygrad.dtype import _from_np_dtype

  try:
    from tinygrad.nn.onnx import OnnxRunner
  except ImportError:  # before November 2025
    try:
      from tinygrad.frontend.onnx import OnnxRunner  # type: ignore[no-redef]
    except ImportError:
      raise NotImplementedError(
        "it reads ONNX files by itself since September 2025, and this one is older; update it, or use ONNX Runtime"
      ) from None
  net = improve(OnnxRunner(str(path)))
  kinds = {o["name"]: _from_np_dtype(np.dtype(o["dtype"]).type) for o in graph["outputs"]}

  def step(**inputs: Tensor) -> dict[str, Tensor]:
    here = {k: v.to(Device.DEFAULT) for k, v in inputs.items()}
    Tensor.realize(*here.values())
    outputs = net(here)
    return {k: outputs[k].cast(kind).contiguous() for k, kind in kinds.items()}

  arrays = {i["name"]: np.zeros(i["shape"], i["dtype"]) for i in graph["inputs"]}
  return TinyJit(step, prune=True), arrays, {k: Tensor(v, device="NPY").realize() for k, v in arrays.items()}


def compile_graph(bundle: Bundle, graph: dict[str, Any], target: str, folder: Path) -> dict[str, Any]:
  """Compiles, checks and writes one graph; returns what its sidecar says. tinygrad's settings are in the environment
  already. Raises CompileError."""
  t0 = time.perf_counter()
  path = bundle.path / graph["file"]
  with (
    tempfile.TemporaryDirectory() as private
  ):  # tinygrad reads weights from the disk while it compiles: from a file that nobody else can change
    mine = Path(private) / "graph.onnx"
    mine.write_bytes(bundle.onnx(graph))
    return compile_file(mine, path, bundle, graph, target, folder, t0)


def compile_file(
  mine: Path, path: Path, bundle: Bundle, graph: dict[str, Any], target: str, folder: Path, t0: float
) -> dict[str, Any]:
  """compile_graph() of the bundle's file `path`, of which `mine` is a copy of our own."""
  first = first_number(bundle.manifest_hash, graph["name"], target)
  try:
    number_from(first + NUMBERS // 2)  # apart from those that slim.py gives
    jit, arrays, tensors = make_jit(mine, graph)

    def run(step: Callable[..., Any], seed: int) -> dict[str, np.ndarray]:
      for k, v in sample_inputs(graph, seed).items():
        np.copyto(arrays[k], v)
      return {k: v.numpy().copy() for k, v in step(**tensors).items()}

    plain = run(jit, 0)  # the first runs as it is, the second is captured
    run(jit, 1)
    unjitted, want = check(run(jit, 0), plain, path, target, "tinygrad without its jit"), run(jit, 2)
  except CompileError:
    raise
  except Exception as e:  # a tinygrad of another time, an operator that it has not, a compiler that fails
    said = (str(e).splitlines() or [""])[0][:200] or type(e).__name__
    raise CompileError(
      f"{path}: tinygrad {package_version('tinygrad')} does not compile it for {target}: {said}"
    ) from e
  captured: Any = jit.captured  # type: ignore[attr-defined]
  if hasattr(captured, "free_intermediates"):
    captured.free_intermediates()  # or what lies between the layers would be written too
  blob, why = None, ""
  for form in (light, whole, as_it_is):
    try:
      if form is as_it_is:
        run(jit, 2)  # takes the memory again: an output without it would lose its kernel when it is read back
      blob = form(jit, first)
      got = read_back(blob, bundle, graph, target, mine.parent)
    except Exception as e:  # a tinygrad whose jits look otherwise: then more of it is written
      blob, why = None, (str(e).splitlines() or [""])[0][:200] or type(e).__name__
      continue
    if all(np.array_equal(got[k], w, equal_nan=True) for k, w in want.items()):
      break
    blob, why = None, "it computes something else when it is read back"
  if blob is None:
    raise CompileError(
      f"{path}: the jit of tinygrad {package_version('tinygrad')} for {target} cannot be written and read: {why}"
    )
  about = {
    "bundle": bundle.name,
    "manifest": bundle.manifest_hash,
    "graph": graph["name"],
    "onnx": bundle.manifest["sha256"][graph["file"]],
    "target": target,
  }
  about |= requirements(target) | {
    "parity": parity(bundle, graph, target, want),
    "unjitted": unjitted,
    "seconds": round(time.perf_counter() - t0, 1),
  }
  return read_sidecar(folder, write_artifact(folder, stem(graph["name"], target), blob, about).stem)


def first_number(*names: str) -> int:
  """Where the numbers of a jit's buffers begin: of its own for every manifest, graph and target, far above those that a
  process gives out."""
  return int.from_bytes(hashlib.sha256("\0".join(names).encode()).digest()[:5], "big") * NUMBERS + NUMBERS * NUMBERS


def number_from(first: int) -> None:
  """tinygrad's count of buffers in this process begins here: why, see slim.with_own_numbers(), which not every
  tinygrad's jits can be given to."""
  from tinygrad.uop.ops import UOp

  UOp.unique_num = itertools.count(first)


def light(jit: Any, first: int) -> bytes:
  """The jit as bytes for read_jit(), as small as it can be."""
  from openpilot.selfdrive.modeld.fair import slim

  return pickle.dumps(slim.device_programs(), protocol=5) + pickle.dumps(
    slim.slim(slim.with_own_numbers(jit, first)), protocol=5
  )


def whole(jit: Any, first: int) -> bytes:
  """All of the jit, with numbers of its own and the CPU device's programs."""
  from openpilot.selfdrive.modeld.fair import slim

  return pickle.dumps(slim.device_programs(), protocol=5) + pickle.dumps(slim.with_own_numbers(jit, first), protocol=5)


def as_it_is(jit: Any, first: int) -> bytes:
  """What openpilot writes of its own networks: for a tinygrad that slim.py does not know."""
  return pickle.dumps({}, protocol=5) + pickle.dumps(jit, protocol=5)


def command_for(bundle: Bundle, graph: dict[str, Any], target: str, flag: str, path: Path) -> list[str]:
  """compile.py's command line for one graph, in a process of its own."""
  words = ["--target", target, "--graph", graph["name"], flag, str(path)]
  return python("openpilot.selfdrive.modeld.fair.compile", str(bundle.path), *words)


def read_back(blob: bytes, bundle: Bundle, graph: dict[str, Any], target: str, folder: Path) -> dict[str, np.ndarray]:
  """What the written jit computes of sample_inputs(seed 2) in a process of its own, which holds nothing of what it was
  made from. folder: only ours."""
  file = folder / "jit.pkl"
  file.write_bytes(blob)
  done = subprocess.run(
    command_for(bundle, graph, target, "--read", file), env=environment(), capture_output=True, text=True
  )
  if done.returncode:
    raise CompileError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
  with np.load(file.with_suffix(".npz")) as outputs:
    return dict(outputs)


def run_written(file: Path, graph: dict[str, Any]) -> None:
  """read_back()'s process."""
  from tinygrad import Tensor

  jit = read_jit(file.read_bytes())
  inputs = sample_inputs(graph, 2)
  outputs = jit(**{k: Tensor(v, device="NPY").realize() for k, v in inputs.items()})
  np.savez(file.with_suffix(".npz"), **{k: v.numpy() for k, v in outputs.items()})


def check(got: dict[str, np.ndarray], want: dict[str, np.ndarray], path: Path, target: str, whose: str) -> float:
  """Worst of differences(). Raises CompileError beyond TOLERANCE."""
  found = differences(got, want)
  name, worst = max(found.items(), key=lambda x: x[1])
  if not worst <= TOLERANCE[target]:
    raise CompileError(f"{path}: output '{name}' in {target} is off from {whose} by {worst:.2g} of its largest value")
  return worst


def parity(bundle: Bundle, graph: dict[str, Any], target: str, got: dict[str, np.ndarray]) -> float | None:
  """Worst difference from ONNX Runtime on sample_inputs(seed 2), None where there is none here. Raises CompileError
  beyond TOLERANCE."""
  if importlib.util.find_spec("onnxruntime") is None:
    return None
  from openpilot.selfdrive.modeld.fair.runners.onnx import OnnxRunner

  want = OnnxRunner(bundle, graph, variants=False).run(sample_inputs(graph, 2))
  return check(got, want, bundle.path / graph["file"], target, "ONNX Runtime")

#!/usr/bin/env python3
"""Compiles the graphs of a bundle for one target, as openpilot compiles its own networks: ONNX -> a pickled TinyJit,
with a sidecar of hashes.

python -m openpilot.selfdrive.modeld.fair.compile BUNDLE [--target tinygrad-cpu] [--output DIR]

Artifacts lie where this machine keeps its own (trust.py), never with the bundle, and are for this machine, this
tinygrad and this manifest: after a change of any of them they are refused and the graph runs in ONNX Runtime. On a
comma four and wherever else the target's device is, run it there, while the car is off; what a PC can say of a comma
four is `op compile --report`."""

import argparse
import hashlib
import importlib.util
import itertools
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.artifact import (
  KEPT,
  ArtifactError,
  folder_of,
  note_failure,
  package_version,
  prune,
  read_artifact,
  read_sidecar,
)
from openpilot.selfdrive.modeld.fair.artifact import stem, tree_folder, write_artifact
from openpilot.selfdrive.modeld.fair.bundle import Bundle, BundleError, load_bundle
from openpilot.selfdrive.modeld.fair.child import environment, python
from openpilot.selfdrive.modeld.fair.parity import TOLERANCE, differences, sample_inputs
from openpilot.selfdrive.modeld.fair.runners import NVIDIA_GPU, QCOM_GPU, preferred
from openpilot.selfdrive.modeld.fair.runners.tinygrad import FLAGS, find_clang, read_jit, requirements, set_flags
from openpilot.selfdrive.modeld.fair.trust import TrustError

TARGETS = (*FLAGS, "tensorrt", "onnx")
NUMBERS = 1 << 20  # of buffers that a jit may have


class CompileError(ValueError):
  """A graph that was not compiled. One line: what, where, what to do."""


def missing(target: str) -> str | None:
  """Why this target cannot be built here, in one line; None where it can."""
  if target == "onnx":
    return None if importlib.util.find_spec("onnxruntime") is not None else "ONNX Runtime is not installed"
  if target == "tensorrt":
    from openpilot.selfdrive.modeld.fair.runners.tensorrt import missing as tensorrt_missing

    return tensorrt_missing()
  if target not in TARGETS:
    return f"target '{target}' is not known; one of {', '.join(TARGETS)}"
  if importlib.util.find_spec("tinygrad") is None:
    return "tinygrad is not installed; pip install tinygrad"
  if target == "tinygrad-qcom" and not QCOM_GPU.exists():
    return f"no Adreno GPU here ({QCOM_GPU}); run it on the device, or see `op compile --report` for what it would be"
  if target == "tinygrad-cuda" and not NVIDIA_GPU.exists():
    return f"no NVIDIA GPU here ({NVIDIA_GPU})"
  if target == "tinygrad-cpu":
    return None if find_clang() else "tinygrad's CPU device wants a C compiler: install clang, or pip install ziglang"
  return None


# *** in the process that compiles ***


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
  net = OnnxRunner(str(path))
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


def read_back(blob: bytes, bundle: Bundle, graph: dict[str, Any], target: str, folder: Path) -> dict[str, np.ndarray]:
  """What the written jit computes of sample_inputs(seed 2) in a process of its own, which holds nothing of what it was
  made from. folder: only ours."""
  file = folder / "jit.pkl"
  file.write_bytes(blob)
  command = python(
    "openpilot.selfdrive.modeld.fair.compile",
    str(bundle.path),
    "--target",
    target,
    "--graph",
    graph["name"],
    "--read",
    str(file),
  )
  done = subprocess.run(command, env=environment(), capture_output=True, text=True)
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

  return check(
    got, OnnxRunner(bundle, graph).run(sample_inputs(graph, 2)), bundle.path / graph["file"], target, "ONNX Runtime"
  )


# *** the process that is asked ***


def build(
  bundle: Bundle, target: str, folder: Path | None = None, timeout: float | None = None
) -> list[dict[str, Any]]:
  """Builds every graph of the bundle in processes of their own, as tinygrad reads its settings on import. -> their
  sidecars. Raises CompileError."""
  if (why := missing(target)) is not None:
    raise CompileError(f"{target} cannot be built here: {why}")
  if target == "onnx":  # the graph is the artifact
    return []
  folder, built = folder_of(bundle, folder), []
  for graph in bundle.graphs:
    name = stem(graph["name"], target)
    command = python(
      "openpilot.selfdrive.modeld.fair.compile",
      str(bundle.path),
      "--target",
      target,
      "--graph",
      graph["name"],
      "--output",
      str(folder),
    )
    try:
      done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
      note_failure(folder, name, f"not within {timeout:.0f} s")
      raise CompileError(
        f"{bundle.path}: graph '{graph['name']}' was not compiled for {target} within {timeout:.0f} s"
      ) from None
    if done.returncode:
      why = (done.stdout.strip().splitlines() or [f"graph '{graph['name']}': exit code {done.returncode}"])[
        -1
      ].removeprefix("error: ")
      note_failure(folder, name, why)
      raise CompileError(why)
    note_failure(folder, name, None)
    print(done.stdout, end="")  # what DEBUG=2 makes tinygrad say of its kernels
    built.append(read_sidecar(folder, name))
  return built


def onroad() -> bool:
  """Whether this is a device whose car is on: then its cores and its GPU are not ours to compile with."""
  try:
    params = Path("/data/params") / (os.environ.get("OPENPILOT_PREFIX") or "d")
    return os.path.isfile("/TICI") and (params / "IsOnroad").read_bytes() == b"1"
  except OSError:
    return False


def lacking(bundle: Bundle, choice: str | None) -> str | None:
  """The target that fairmodeld would run here and whose artifacts are not there; None where there is nothing to build.
  choice: the param FairRunner."""
  target = next((t for t in ((choice, "onnx") if choice else preferred()) if missing(t) is None), None)
  if target is None or target == "onnx":
    return None
  try:
    if target == "tensorrt":
      from openpilot.selfdrive.modeld.fair.runners.tensorrt import Cuda, usual_precision
      from openpilot.selfdrive.modeld.fair.runners.tensorrt import requirements as engine_requirements

      must = engine_requirements(Cuda().name(), usual_precision())
    else:
      must = requirements(target)
    for graph in bundle.graphs:
      read_artifact(bundle, graph["name"], target, must)
  except ArtifactError:
    return target
  return None


def one_graph(bundle: Bundle, name: str, target: str, folder: Path, written: Path | None = None) -> None:
  """Compiles one graph, or runs what was written of it."""
  graph = next((g for g in bundle.graphs if g["name"] == name), None)
  if graph is None:
    raise CompileError(f"{bundle.path} has no graph '{name}'; it has {', '.join(g['name'] for g in bundle.graphs)}")
  if target == "tensorrt":
    from openpilot.selfdrive.modeld.fair.runners.tensorrt import build_engine

    build_engine(bundle, graph, folder)
  else:
    set_flags(target)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault(
      "PARALLEL", str(cores if cores > 2 else 0)
    )  # processes that compile kernels; NUM_CPU_THREADS would decide it
    if written is not None:
      run_written(written, graph)
    else:
      compile_graph(bundle, graph, target, folder)


def main() -> int:
  p = argparse.ArgumentParser(prog="compile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("bundle", type=Path, help="a bundle's folder")
  p.add_argument("--lacking", metavar="RUNNER", help="only what fairmodeld with that runner, or '', would miss")
  p.add_argument(
    "--tree", action="store_true", help="into the tree, as a build does: what lies there is trusted as the code is"
  )
  p.add_argument(
    "--target", choices=TARGETS, action="append", help="several times for several; default: all that can be built here"
  )
  p.add_argument("--output", type=Path, help="default: where this machine keeps its own")
  p.add_argument("--graph", help=argparse.SUPPRESS)
  p.add_argument("--read", type=Path, help=argparse.SUPPRESS)
  args = p.parse_args()
  try:
    if onroad():
      raise CompileError("the car is on; compiling is for when it is off")
    bundle = load_bundle(args.bundle)
    if args.tree:
      args.output = tree_folder(bundle)
    if args.lacking is not None:
      args.target = [lacking(bundle, args.lacking or None) or "onnx"]
    if args.graph is not None:
      one_graph(bundle, args.graph, args.target[0], folder_of(bundle, args.output), args.read)
      return 0
    for target in args.target or [t for t in TARGETS if missing(t) is None]:
      for said in build(bundle, target, args.output):
        if said["parity"] is not None:
          off = f"off from ONNX Runtime by {said['parity']:.1e} of the largest value"
        else:
          off = f"off from tinygrad without its jit by {said['unjitted']:.1e}; there is no ONNX Runtime here to compare with"  # noqa: E501
        print(
          f"{bundle.name}, graph '{said['graph']}', {target}: {said['size'] / 1e6:.1f} MB in {said['seconds']:.0f} "
          f"s, {off}"
        )
      if target != "onnx" and args.output is None:
        for old in prune(folder_of(bundle)):
          print(f"{old} was deleted: artifacts of the {KEPT} newest manifests are kept")
      if target == "onnx":
        print(f"{bundle.name}, onnx: nothing to build, {', '.join(g['file'] for g in bundle.graphs)} runs as it is")
  except (ArtifactError, BundleError, CompileError, TrustError) as e:
    print(f"error: {e}", file=sys.stdout if args.graph is not None else sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  raise SystemExit(main())

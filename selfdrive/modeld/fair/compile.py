#!/usr/bin/env python3
"""Compiles the graphs of a bundle for one target, as openpilot compiles its own networks: ONNX -> a pickled TinyJit,
with a sidecar of hashes.

python -m openpilot.selfdrive.modeld.fair.compile BUNDLE [--target tinygrad-cpu] [--output DIR]

Artifacts lie where this machine keeps its own (trust.py), never with the bundle, and are for this machine, this
tinygrad and this manifest: after a change of any of them they are refused and the graph runs in ONNX Runtime. On a
comma four and wherever else the target's device is, run it there, while the car is off; what a PC can say of a comma
four is `op compile --report`."""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from openpilot.selfdrive.modeld.fair.artifact import (
  KEPT,
  ArtifactError,
  folder_of,
  note_failure,
  prune,
  read_artifact,
  read_sidecar,
  stem,
  tree_folder,
)
from openpilot.selfdrive.modeld.fair.bundle import Bundle, BundleError, load_bundle
from openpilot.selfdrive.modeld.fair.child import environment
from openpilot.selfdrive.modeld.fair.compile_graph import CompileError, command_for, compile_graph, run_written
from openpilot.selfdrive.modeld.fair.runners import NVIDIA_GPU, QCOM_GPU, preferred
from openpilot.selfdrive.modeld.fair.runners.tinygrad import FLAGS, find_clang, requirements, set_flags
from openpilot.selfdrive.modeld.fair.trust import TrustError

TARGETS = (*FLAGS, "tensorrt", "onnx")


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
    command = command_for(bundle, graph, target, "--output", folder)
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

      gpu = Cuda().name()
      must = [engine_requirements(gpu, usual_precision(g)) for g in bundle.graphs]
    else:
      must = [requirements(target)] * len(bundle.graphs)
    for graph, m in zip(bundle.graphs, must, strict=True):
      read_artifact(bundle, graph["name"], target, m)
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
          off = f"off from tinygrad without its jit by {said['unjitted']:.1e}; ONNX Runtime is not installed to compare"
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

"""Runs one graph of a bundle as a tinygrad jit that compile.py made: on the comma four's GPU, on NVIDIA's, on a CPU."""

import importlib.util
import io
import os
import pickle
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.artifact import (
  ArtifactError,
  machine,
  package_version,
  read_artifact,
  write_atomic,
)
from openpilot.selfdrive.modeld.fair.bundle import Bundle
from openpilot.selfdrive.modeld.fair.trust import TrustError, private_folder

# target -> what tinygrad reads from its environment; of the comma four what openpilot's SConscript sets
FLAGS: dict[str, dict[str, str]] = {
  "tinygrad-qcom": {
    "DEV": "QCOM",
    "IMAGE": "1",
    "FLOAT16": "1",
    "NOLOCALS": "1",
    "JIT_BATCH_SIZE": "0",
    "OPENPILOT_HACKS": "1",
  },
  "tinygrad-cuda": {"DEV": "CUDA"},
  "tinygrad-cpu": {
    "DEV": "CPU",
    "NUM_CPU_THREADS": "1",
    "CPU_COUNT": "1",
  },  # one core, as ONNX Runtime gets; the second name is of before August 2026
}
QCOM_PRIORITY = "14"  # of the GPU's 0 (first) to 15; openpilot's networks have 12, ours come after them


def requirements(target: str) -> dict[str, Any]:
  """What an artifact's sidecar must agree with to be run here."""
  return {"tinygrad": package_version("tinygrad"), "flags": FLAGS[target], "machine": machine()}


def find_clang() -> str | None:
  """The CC for tinygrad, whose CPU device compiles even to start: what CC names, else clang, else the compiler of the
  ziglang package. None without any.

  tinygrad wants one executable, so for ziglang's a script is kept in the user's cache."""
  for name in (os.environ.get("CC"), "clang"):
    if name and (path := shutil.which(name)):
      return path
  spec = importlib.util.find_spec("ziglang")
  if spec is None or not spec.submodule_search_locations:
    return None
  try:
    folder = private_folder()
  except TrustError:
    folder = Path(tempfile.mkdtemp(prefix="openpilot-fair-"))
  wrapper = folder / "ziglang-cc"
  script = f'#!/bin/sh\nexec "{Path(spec.submodule_search_locations[0]) / "zig"}" clang "$@"\n'.encode()
  if not wrapper.is_file() or wrapper.read_bytes() != script:
    write_atomic(wrapper, script, 0o755)
  return str(wrapper)


def set_flags(target: str) -> None:
  """Before tinygrad's first import: it reads its environment then. Raises ArtifactError where this process has it on
  another device."""
  flags = FLAGS[target]
  if "tinygrad" in sys.modules and os.environ.get("DEV", "").split(":")[0] != flags["DEV"]:
    raise ArtifactError(
      f"tinygrad runs on DEV={os.environ.get('DEV', '')} in this process already; {target} needs one of its own"
    )
  os.environ.update(flags)
  os.environ.setdefault("QCOM_PRIORITY", QCOM_PRIORITY)
  if target == "tinygrad-cpu" and (cc := find_clang()) is not None:
    os.environ["CC"] = cc


def read_jit(blob: bytes) -> Any:
  """An artifact's bytes, which are known to be ours -> the jit.

  They are two pickles. First come the programs that tinygrad's CPU device compiles for itself whenever it is opened: a
  quarter of a second and a compiler, for what no jit of ours calls. It is given them ready."""
  stream = io.BytesIO(blob)
  programs = pickle.load(stream)
  if programs:
    from tinygrad.device import Device
    from tinygrad.runtime import ops_cpu

    compile_one: Any = ops_cpu.do_to_program
    try:
      ops_cpu.do_to_program = lambda ast, renderer: SimpleNamespace(to_elf=lambda: programs[ast.arg.name])
      Device["CPU"]
    finally:
      ops_cpu.do_to_program = compile_one
  jit = pickle.load(stream)
  # what its kernels write, for the case that an input is among it: ours are arrays of the host, and to find it out
  # takes as long as to read the jit
  jit.captured._written_uops = set()
  return jit


class TinygradRunner:
  """`run({name: array}) -> {name: array}`. Outputs are the same arrays at every call: copy what must outlive the next
  one.

  Inputs are numpy arrays that tinygrad knows as its NPY device, filled in place; the jit itself copies them to where it
  runs, as modeld's does. Raises ArtifactError where there is no artifact for this bundle, machine and tinygrad: then no
  pickle was opened."""

  def __init__(self, bundle: Bundle, graph: dict[str, Any], target: str, folder: Path | None = None):
    if not package_version("tinygrad"):
      raise ArtifactError("tinygrad is not installed")
    blob, about = read_artifact(bundle, graph["name"], target, requirements(target), folder)
    set_flags(target)
    from tinygrad import Tensor

    try:
      self.jit = read_jit(blob)
    except (
      Exception
    ) as e:  # the bytes are ours: what fails is the device behind them, and how it does is the driver's business
      raise ArtifactError(
        f"{target} does not start: {str(e).splitlines()[0][:160] if str(e) else type(e).__name__}"
      ) from None
    self.what = f"tinygrad {about['tinygrad']} ({target.removeprefix('tinygrad-')})"
    self.inputs = {i["name"]: np.zeros(i["shape"], i["dtype"]) for i in graph["inputs"]}
    self.tensors = {k: Tensor(v, device="NPY").realize() for k, v in self.inputs.items()}
    self.outputs = {o["name"]: np.zeros(o["shape"], o["dtype"]) for o in graph["outputs"]}

  def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for name, buffer in self.inputs.items():
      if inputs[name] is not buffer:
        np.copyto(buffer, inputs[name], casting="no")
    outputs = self.jit(**self.tensors)
    for name, array in self.outputs.items():
      np.copyto(array, outputs[name].numpy())
    return self.outputs

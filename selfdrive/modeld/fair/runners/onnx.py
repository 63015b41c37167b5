"""Runs one graph of a bundle with ONNX Runtime on the CPU."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.bundle import Bundle, BundleError
from openpilot.selfdrive.modeld.fair.cpu import TARGETS, targets, variant_of
from openpilot.selfdrive.modeld.fair.ort import ort

ORT_TYPES = {
  "tensor(uint8)": "uint8",
  "tensor(float)": "float32",
  "tensor(float16)": "float16",
  "tensor(int32)": "int32",
  "tensor(int64)": "int64",
  "tensor(bool)": "bool",
}
# on load ONNX Runtime would quantize the weights of a layer that was left float between others in 8 bits, with one
# scale for all channels, in silence: in unified-small's boxes an error of half their standard deviation
DISABLED = ["WeightBiasQuantization"]
TOLD: set[str] = set()  # what was said of variants that are not for this processor


def open_session(model: bytes, threads: int) -> Any:
  """An InferenceSession, as the car runs it. Raises what ONNX Runtime does, whose exceptions have no common base."""
  options = ort.SessionOptions()
  options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
  options.add_session_config_entry(
    "session.intra_op.allow_spinning", "0"
  )  # a waiting thread must not burn the driving stack's cores
  # trained students make numbers below 1e-38, which cost a CPU a hundred times as long as zero: a fifth of
  # unified-small's time. ONNX Runtime sets this for the thread that makes the process's first session
  options.add_session_config_entry("session.set_denormal_as_zero", "1")
  options.add_session_config_entry("session.load_model_format", "ONNX")
  options.log_severity_level = 3
  return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED)


class OnnxRunner:
  """`run({name: array}) -> {name: array}`. Outputs are the same arrays at every call: copy what must outlive the next
  one.

  Inputs and outputs are bound once to buffers of this object, so that a call allocates nothing. Raises BundleError
  where the graph cannot be loaded or disagrees with the manifest. It runs from memory, from the bytes that were hashed.

  Of a graph with variants in 8 bits it takes the one for this processor; where none is, the graph in float, and says
  so. variants: whether it may. variant: this one, of another runner, to compare with."""

  what = "ONNX Runtime"

  def __init__(
    self,
    bundle: Bundle,
    graph: dict[str, Any],
    threads: int = 1,
    variants: bool = True,
    variant: dict[str, Any] | None = None,
  ):
    variant = variant_of(graph) if variants else variant
    path, model = bundle.path / (variant or graph)["file"], bundle.onnx(graph, variant)
    if variant is not None:
      self.what = f"ONNX Runtime, {variant['precision']} for {variant['target']}"
    elif variants and (made := [v["target"] for v in graph.get("variants", []) if v["target"] in TARGETS]):
      self._tell(path, made)
    try:
      self.session = open_session(model, threads)
    except Exception as e:
      raise BundleError(f"{path} is not a graph that ONNX Runtime can load: {str(e).splitlines()[0][:200]}") from None
    self.session._model_bytes = None  # it keeps them for other providers to be tried
    self.inputs = self._buffers(path, "input", self.session.get_inputs(), graph["inputs"])
    self.outputs = self._buffers(path, "output", self.session.get_outputs(), graph["outputs"])
    self.binding = self.session.io_binding()
    self._values = []  # OrtValues over the buffers, kept alive
    for buffers, bind in (
      (self.inputs, self.binding.bind_ortvalue_input),
      (self.outputs, self.binding.bind_ortvalue_output),
    ):
      for name, array in buffers.items():
        value = ort.OrtValue.ortvalue_from_numpy(array)  # on the CPU it is a view of the array
        self._values.append(value)
        bind(name, value)

  @staticmethod
  def _tell(path: Path, made: list[str]) -> None:
    here = " or ".join(targets())
    said = (
      f"{path} runs in float: its variants in 8 bits are for {', '.join(made)}, this processor is {here or 'another'}"
    )
    if said not in TOLD:
      TOLD.add(said)
      print(f"fairmodeld: {said}", file=sys.stderr, flush=True)

  @staticmethod
  def _buffers(path: Path, side: str, nodes: Sequence[Any], specs: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    there, said = {n.name: n for n in nodes}, {s["name"]: s for s in specs}
    if there.keys() != said.keys():
      raise BundleError(
        f"{path}: the graph's {side}s are {', '.join(sorted(there))}, the manifest's {', '.join(sorted(said))}; export "
        "the bundle again"
      )
    for name, node in there.items():
      shape, dtype = list(node.shape), ORT_TYPES.get(node.type, node.type)
      if shape != said[name]["shape"] or dtype != said[name]["dtype"]:
        raise BundleError(
          f"{path}: {side} '{name}' is {dtype}{shape}, the manifest says {said[name]['dtype']}{said[name]['shape']}; "
          "export the bundle again"
        )
    return {s["name"]: np.zeros(s["shape"], dtype=s["dtype"]) for s in specs}

  def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for name, buffer in self.inputs.items():
      if inputs[name] is not buffer:
        np.copyto(buffer, inputs[name], casting="no")
    self.session.run_with_iobinding(self.binding)
    return self.outputs

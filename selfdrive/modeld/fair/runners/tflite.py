"""Runs one graph of a bundle as TFLite, in LiteRT on the CPU: the variant that `op optimize --format tflite` made."""

from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.bundle import Bundle, BundleError
from openpilot.selfdrive.modeld.fair.cpu import variant_of

TARGETS = ("tflite", "tflite-int8")  # of variants, and the names of their runners


class Network:
  """A TFLite file at work. Raises ValueError where it is none, or its inputs and outputs are others than the
  manifest's."""

  def __init__(self, blob: bytes, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]], threads: int = 1):
    """inputs, outputs: the manifest's."""
    from ai_edge_litert.interpreter import Interpreter  # only here: a device does not have it

    try:
      self.net: Any = Interpreter(model_content=blob, num_threads=threads)
      self.net.allocate_tensors()
      self.signature = self.net.get_signature_runner()
    except (RuntimeError, ValueError) as e:
      raise ValueError(f"is no TFLite network: {' '.join(str(e).split())[:120]}") from None
    self.check("input", self.signature.get_input_details(), inputs)
    self.check("output", self.signature.get_output_details(), outputs)
    self.names = [i["name"] for i in inputs]
    self.outputs = {o["name"]: np.zeros(o["shape"], o["dtype"]) for o in outputs}

  @staticmethod
  def check(side: str, there: dict[str, Any], said: list[dict[str, Any]]) -> None:
    own = {k: (v["shape"].tolist(), np.dtype(v["dtype"]).name) for k, v in there.items()}
    if own != (wanted := {s["name"]: (s["shape"], s["dtype"]) for s in said}):
      odd = next(k for k in (*own, *wanted) if own.get(k) != wanted.get(k))
      raise ValueError(f"has {own.get(odd, 'no')} as {side} '{odd}', the manifest {wanted.get(odd, 'none')}")

  def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """-> the same arrays at every call."""
    for name, value in self.signature(**{k: inputs[k] for k in self.names}).items():
      np.copyto(self.outputs[name], value, casting="no")
    return self.outputs


class TfliteRunner:
  """`run({name: array}) -> {name: array}`. Outputs are the same arrays at every call: copy what must outlive the next
  one.

  Raises BundleError where the bundle has no such variant, or LiteRT cannot load it. It runs from memory, from the bytes
  that were hashed. target: one of TARGETS."""

  def __init__(self, bundle: Bundle, graph: dict[str, Any], target: str, threads: int = 1):
    variant = variant_of(graph, (target,))
    if variant is None:
      raise BundleError(
        f"{bundle.path}: graph '{graph['name']}' has no variant for {target}; `op optimize --format tflite` makes it"
      )
    try:
      self.network = Network(bundle.read(variant["file"]), graph["inputs"], graph["outputs"], threads)
    except ImportError:
      raise BundleError(f"{target} needs the package ai-edge-litert: pip install -e .[tflite]") from None
    except ValueError as e:
      raise BundleError(f"{bundle.path / variant['file']} {e}; make it again") from None
    self.what = f"LiteRT, {variant['precision']}"

  def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return self.network.run(inputs)

"""How far two runs of one network are apart. What is not a number is infinitely far: max() and < would let it pass."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.bundle import spec_slots

# of a target from ONNX Runtime, in parts of an output's largest value
TOLERANCE = {"tinygrad-cpu": 1e-4, "tinygrad-cuda": 1e-3, "tinygrad-qcom": 5e-2, "tensorrt": 5e-2}


def worst(values: Iterable[float]) -> float:
  """The largest; inf where one is not a number, 0 where there are none."""
  return max((v if v == v else float("inf") for v in values), default=0.0)


def difference(got: np.ndarray, want: np.ndarray) -> float:
  """Largest |got - want|, in parts of the largest |want|; inf where the shapes differ or either has a value that is not
  finite."""
  if got.shape != want.shape or not (np.isfinite(got).all() and np.isfinite(want).all()):
    return float("inf")
  return float(np.abs(got.astype(np.float64) - want).max(initial=0) / max(1e-6, float(np.abs(want).max(initial=0))))


def differences(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> dict[str, float]:
  """difference() of each output."""
  return {k: difference(got[k], w) for k, w in want.items()}


def sample_inputs(graph: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
  """Noise in each input's range: bytes, 0 to 1, and point slots somewhere in the view of which some are in use and some
  fresh."""
  r = np.random.default_rng(seed)
  x = {}
  for i in graph["inputs"]:
    kind = np.dtype(i["dtype"]).kind
    x[i["name"]] = (
      r.random(i["shape"]) if kind == "f" else r.integers(0, 256 if kind == "u" else 2, i["shape"])
    ).astype(i["dtype"])
  if (found := spec_slots(graph)) is not None:
    names = found[1]
    x[names["points"]] *= np.array([511, 255], x[names["points"]].dtype)
    for name in (names["mask"], names["fresh"]):
      x[name] = np.round(x[name])
  return x

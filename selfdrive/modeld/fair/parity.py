"""How far two runs of one network are apart. What is not a number is infinitely far: max() and < would let it pass."""
from collections.abc import Iterable

import numpy as np


def worst(values: Iterable[float]) -> float:
  """The largest; inf where one is not a number, 0 where there are none."""
  return max((v if v == v else float("inf") for v in values), default=0.0)


def difference(got: np.ndarray, want: np.ndarray) -> float:
  """Largest |got - want|, in parts of the largest |want|; inf where the shapes differ or either has a value that is not finite."""
  if got.shape != want.shape or not (np.isfinite(got).all() and np.isfinite(want).all()):
    return float("inf")
  return float(np.abs(got.astype(np.float64) - want).max(initial=0) / max(1e-6, float(np.abs(want).max(initial=0))))

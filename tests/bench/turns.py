"""What benches compare: several ways to do a thing, in turns, so that other work on the machine weighs on all alike."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def in_turns(
  what: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.process_time
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """-> seconds of each round by name, by default CPU time of this process and all its threads; and the last results."""
  times: dict[str, list[float]] = {k: [] for k in what}
  results: dict[str, Any] = {}
  for _ in range(rounds):
    for k, f in what.items():
      t = clock()
      results[k] = f()
      times[k].append(clock() - t)
  return {k: np.array(v) for k, v in times.items()}, results


def ratio(a: np.ndarray, b: np.ndarray) -> float:
  """a over b: the median of the rounds' own."""
  return float(np.median(a / b))

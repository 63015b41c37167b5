"""python -m openpilot.tools.fair.optimize.footprint BUNDLE RUNNER: a bundle is loaded and run in a process of its own.
Prints how long that took and what memory it took, as JSON."""

import json
import sys
import time
from pathlib import Path

import numpy as np

from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.selfdrive.modeld.fair.machine import memory_mb
from openpilot.selfdrive.modeld.fair.runners import make_runner

RUNS = 3


def main(path: str, runner: str) -> None:
  before, begun = memory_mb(), time.perf_counter()
  bundle = load_bundle(Path(path))
  runners = [make_runner(runner, bundle, g) for g in bundle.graphs]
  loaded = time.perf_counter() - begun
  for graph, made in zip(bundle.graphs, runners, strict=True):
    for _ in range(RUNS):
      made.run({i["name"]: np.zeros(i["shape"], i["dtype"]) for i in graph["inputs"]})
  print(json.dumps({"load_s": round(loaded, 3), "memory_mb": round(memory_mb() - before, 1)}))


if __name__ == "__main__":
  main(*sys.argv[1:])

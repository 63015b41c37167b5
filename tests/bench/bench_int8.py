#!/usr/bin/env python3
"""Bundles in 8 bits against their float graphs: ONNX Runtime, this processor's form, in turns, in the same run.

python tests/bench/bench_int8.py [BUNDLE ...] [--rounds 60] [--threads 1]      (default: the bundles that ship)

A bundle that has a variant for this processor is timed with it; of others all layers but the last ones, and those that
are faster in float, are quantized here, by ranges of noise: how fast that is does not depend on them. How good it is,
`tools/op.sh optimize` says."""

import argparse
import tempfile
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

from openpilot.selfdrive.modeld.fair.bundle import MODELS_DIR, load_bundle
from openpilot.selfdrive.modeld.fair.cpu import targets, variant_of
from openpilot.selfdrive.modeld.fair.ort import ort
from openpilot.selfdrive.modeld.fair.parity import sample_inputs
from openpilot.tools.fair.optimize.measure import milliseconds
from openpilot.tools.fair.optimize.search import Graphs
from openpilot.tools.fair.optimize.variants import by_itself
from openpilot.tools.replay.report import cpu_name

GOALS = {"solo": 1.9, "unified": 1.6}
FRAMES = 8


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("bundles", nargs="*", type=Path)
  p.add_argument("--rounds", type=int, default=60)
  p.add_argument("--threads", type=int, default=1)
  args = p.parse_args()
  if not targets():
    print("skipped: no form in 8 bits is of this processor")
    return
  paths = args.bundles or sorted(m.parent for m in MODELS_DIR.glob("*/manifest.json"))
  print(f"{cpu_name()}, {targets()[0]}, ONNX Runtime {ort.__version__}, {args.threads} thread(s), {args.rounds} rounds")
  for path in paths:
    bundle = load_bundle(path)
    inputs = {g["name"]: [sample_inputs(g, seed) for seed in range(FRAMES)] for g in bundle.graphs}
    with tempfile.TemporaryDirectory() as tmp:
      floats = by_itself(bundle, {g["name"]: bundle.onnx(g) for g in bundle.graphs}, Path(tmp) / "float")
      chosen = {g["name"]: variant_of(g) for g in bundle.graphs}
      if all(chosen.values()):
        files, how = {g["name"]: bundle.onnx(g, chosen[g["name"]]) for g in bundle.graphs}, "as it ships"
      else:
        graphs, target = Graphs(floats, inputs), targets()[0]
        back = graphs.slow(target)
        files, how = graphs.make("int8", target, back).files, f"all layers but the last, and {len(back)} slow ones"
      eight = by_itself(bundle, files, Path(tmp) / "int8")
      found = milliseconds({"float": floats, "int8": eight}, inputs, args.rounds, args.threads, "float")
    a, b = found["float"], found["int8"]
    goal = GOALS["unified" if "unified" in bundle.name else "solo"]
    print(
      f"{bundle.name:<22} float {a['p50']:6.1f} ms   int8 {b['p50']:6.1f} ms   x{b['ratio']:.2f}, by the fastest "
      f"x{b['ratio_of_minima']:.2f}, by CPU time x{b['ratio_of_cpu']:.2f} (goal {goal})   {how}"
    )


if __name__ == "__main__":
  main()

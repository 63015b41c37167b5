#!/usr/bin/env python3
"""unified-small, one network with all heads, against the four solo students one after the other: ONNX Runtime, same
inputs, interleaved.

python tests/bench/bench_unified.py [--size small] [--rounds 60] [--threads 1]"""

import argparse
import tempfile
import time
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

import numpy as np
import torch

from openpilot.selfdrive.modeld.fair.ort import ort
from openpilot.tools.fair.students.onnx_export import export_onnx
from openpilot.tools.fair.students.student import UNIFIED, build
from openpilot.tools.fair.students.list_students import macs

GOAL = 2.5


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--size", default="small")
  p.add_argument("--backbone")
  p.add_argument("--rounds", type=int, default=60)
  p.add_argument("--threads", type=int, default=1)
  args = p.parse_args()
  options = ort.SessionOptions()
  options.intra_op_num_threads = args.threads
  options.add_session_config_entry(
    "session.intra_op.allow_spinning", "0"
  )  # five sessions in one process must not wait on each other's threads
  torch.manual_seed(0)
  rng = np.random.default_rng(0)
  runs, mega = {}, {}
  with tempfile.TemporaryDirectory() as folder:
    for task in (*UNIFIED, "unified"):
      student = build(f"{task}-{args.size}", args.backbone)
      export_onnx(student, Path(folder) / f"{task}.onnx")
      mega[task] = macs(student) / 1e6
      inputs = {k: np.zeros(v.shape, v.numpy().dtype) for k, v in student.inputs().items()}
      inputs["frame"] = rng.integers(0, 256, inputs["frame"].shape, dtype=np.uint8)
      if "lanes_points" in inputs:
        inputs["lanes_points"] = rng.uniform(0, [511, 255], inputs["lanes_points"].shape).astype(np.float32)
        inputs["lanes_mask"][:] = 1
        inputs["lanes_template"] = rng.normal(0, 0.2, inputs["lanes_template"].shape).astype(np.float32)
      runs[task] = (
        ort.InferenceSession(str(Path(folder) / f"{task}.onnx"), options, providers=["CPUExecutionProvider"]),
        inputs,
      )
  times: dict[str, list[float]] = {task: [] for task in runs}
  for i in range(args.rounds + 3):
    for task, (session, inputs) in runs.items():
      t = time.perf_counter()
      session.run(None, inputs)
      if i >= 3:
        times[task].append(time.perf_counter() - t)
  solo = list(UNIFIED)
  ms = {t: 1e3 * np.array(v) for t, v in times.items()}
  ratio = sum(ms[t] for t in solo) / ms["unified"]  # round by round: what else the machine does weighs on both alike
  print(f"{args.size}, ONNX Runtime {ort.__version__}, {args.threads} thread(s), {args.rounds} rounds, interleaved")
  for task in [*solo, "unified"]:
    print(f"{task:<9} {mega[task]:6.0f} MMAC   median {np.median(ms[task]):7.2f} ms   min {ms[task].min():7.2f} ms")
  low, mid, high = np.percentile(ratio, [25, 50, 75])
  print(
    f"four solo / unified: {mid:.2f} (quartiles {low:.2f}-{high:.2f}), of minima "
    f"{sum(ms[t].min() for t in solo) / ms['unified'].min():.2f}; goal {GOAL}"
  )
  print(f"multiply-accumulates: {sum(mega[t] for t in solo) / mega['unified']:.2f}")


if __name__ == "__main__":
  main()

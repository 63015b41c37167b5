#!/usr/bin/env python3
"""What quantization-aware training brings back, where PTQ loses: values and weights int8 around zero, one scale for all
weights of a layer.

python tests/bench/bench_qat.py RUN --labels LABELS --data HELD_OUT [--steps 60] [--lr 1e-4] [--batch-size 8]
    [--seeds 3] [--limit 20] [--frames 32] [--prefer TEACHER,...] [--labels-teach]

RUN is a finished run of `tools/op.sh distill`; LABELS are what it learned from, HELD_OUT routes that it did not see:
some of them calibrate, the others judge. All layers but the last are in 8 bits. The goal: half of the loss back."""

import argparse
import contextlib
import tempfile
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

import numpy as np

from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.tools.fair.bundle import export
from openpilot.tools.fair.distillation import distill
from openpilot.tools.fair.distillation.options import Options
from openpilot.tools.fair.evaluation.groups import load_groups
from openpilot.tools.fair.optimize import optimize
from openpilot.tools.fair.optimize.calibration import record
from openpilot.tools.fair.optimize.judge import FLOAT, judge
from openpilot.tools.fair.optimize.learned import learned
from openpilot.tools.fair.optimize.quantize import TARGETS, Target
from openpilot.tools.fair.optimize.search import Graphs
from openpilot.tools.fair.optimize.variants import by_itself

NAME, GOAL = "whole", 0.5
LEAST = 0.03  # what PTQ loses of a metric that is looked at


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("run", type=Path)
  p.add_argument("--labels", type=Path, required=True)
  p.add_argument("--data", type=Path, required=True)
  p.add_argument("--steps", type=int, default=60)
  p.add_argument("--lr", type=float, default=1e-4)
  p.add_argument("--batch-size", type=int, default=8)
  p.add_argument("--seeds", type=int, default=3)
  p.add_argument("--limit", type=int, default=20)
  p.add_argument("--frames", type=int, default=32)
  p.add_argument("--prefer", default="")
  p.add_argument("--labels-teach", action="store_true", help="in place of the float student")
  args = p.parse_args()
  TARGETS[NAME] = Target("int8 around zero, one scale for all weights of a layer", "int8", True, whole=True)
  load_groups()
  _, config, _ = export.load_student(args.run)
  with tempfile.TemporaryDirectory() as tmp:
    folder = Path(tmp)
    export.run(export.Options(run=args.run, output=folder / "base", tinygrad=False))
    base = load_bundle(folder / "base")
    floats = by_itself(base, {g["name"]: base.onnx(g) for g in base.graphs}, folder / "float")
    said = optimize.Options(bundle=args.run, data=args.data, output=folder / "out", limit=args.limit, stale_labels=True)
    data = optimize.open_data(said, floats)
    inputs = record(floats, data.parts.calibration, data.compared, args.frames)
    forms = {"PTQ": Graphs(floats, inputs).make("PTQ", NAME)}
    for seed in range(args.seeds):
      out = folder / f"seed{seed}"
      options = Options(
        labels=args.labels,
        output=out,
        student=config.student,
        tasks=",".join(config.tasks),
        backbone=config.backbone,
        init=(str(args.run),),
        qat=NAME,
        self_taught="off" if args.labels_teach else None,
        steps=args.steps,
        lr=args.lr,
        warmup=args.steps // 10,
        batch_size=args.batch_size,
        seed=seed,
        workers=0,
        prefer=args.prefer,
        stale_labels=True,
        ignore_classes=True,
        per_height=config.per_height,
        eval_every=args.steps,
      )
      with contextlib.ExitStack() as held:
        run, _ = distill.start(options, held)
        run.fit()
      forms[f"QAT {seed}"] = Graphs(floats, inputs, learned(out, floats, (NAME,), ())).make(f"QAT {seed}", NAME)
    bundles = {FLOAT: floats} | {k: by_itself(floats, v.files, folder / k) for k, v in forms.items()}
    rows = judge(bundles, data.parts.judged, data.truth, data.compared, 0.01)
  for k, ptq in enumerate(rows["PTQ"]):
    found = [rows[f"QAT {seed}"][k] for seed in range(args.seeds)]
    line = f"{ptq.task:<12} {ptq.metric:<22} float {ptq.base:.4f}   PTQ loses {ptq.loss:.1%}   QAT "
    line += ", ".join(f"{r.loss:.1%}" for r in found)
    if ptq.loss >= LEAST:
      back = 1 - np.mean([r.loss for r in found]) / ptq.loss
      line += f"   {back:.0%} of the loss back (goal {GOAL:.0%})"
    print(line)


if __name__ == "__main__":
  main()

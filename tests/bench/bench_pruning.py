#!/usr/bin/env python3
"""What a student loses when channels go, before it is distilled on, by how they are chosen.

python tests/bench/bench_pruning.py RUN --data LABELS [--prune .4] [--frames 48]

By what they are worth to the losses, as `optimize --prune` does, here in one round; by the scales of their norms; by
the size of their weights; at random. Half of the frames choose, the others judge. And how long both take."""

import argparse
import copy
import math
import tempfile
import time
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

import numpy as np
import torch
from torch import Tensor

from openpilot.selfdrive.modeld.fair.ort import ort
from openpilot.tools.fair.optimize.prune import Calibration, open_source
from openpilot.tools.fair.optimize.pruning import CONVOLUTIONS, Group, apply, choose, make_plan, values
from openpilot.tools.fair.students.list_students import macs
from openpilot.tools.fair.students.onnx_export import export_onnx
from openpilot.tools.fair.students.student import Student
from openpilot.tools.fair.students.widths import BatchNorm, depthwise


def scales(student: Student, group: Group) -> Tensor:
  norms = [m for n in group.outputs if isinstance(m := student.get_submodule(n), BatchNorm)]
  found = torch.stack([m.weight.detach().abs() for m in norms]).sum(0)
  return found / found.mean()


def sizes(student: Student, group: Group) -> Tensor:
  """Squares of all weights that make or read a channel."""
  out = torch.zeros(group.channels)
  for side, names in ((0, group.outputs), (1, group.inputs)):
    for m in map(student.get_submodule, names):
      if isinstance(m, CONVOLUTIONS) and not (side and depthwise(m)):
        w = m.weight.detach()
        turned = (side == 1) != isinstance(m, torch.nn.ConvTranspose2d)
        out += (w.transpose(0, 1) if turned else w).flatten(1).square().sum(1)
  return out / out.mean()


def halves(calibration: Calibration) -> tuple[Calibration, Calibration]:
  a, b = copy.copy(calibration), copy.copy(calibration)
  a.which, b.which = calibration.which[::2], calibration.which[1::2]
  return a, b


def timed(students: dict[str, Student], rounds: int) -> dict[str, tuple[float, float]]:
  """-> name -> median and CPU time of a frame, ms, one thread."""
  options = ort.SessionOptions()
  options.intra_op_num_threads = options.inter_op_num_threads = 1
  sessions = {}
  with tempfile.TemporaryDirectory() as tmp:
    for name, student in students.items():
      path = Path(tmp) / "student.onnx"
      export_onnx(student, path)
      sessions[name] = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
  spent: dict[str, list[tuple[float, float]]] = {name: [] for name in students}
  for _ in range(rounds):
    for name, session in sessions.items():
      inputs = {k: v.numpy() for k, v in students[name].inputs().items()}
      wall, cpu = time.monotonic(), time.process_time()
      session.run(None, {i.name: inputs[i.name] for i in session.get_inputs()})
      spent[name].append((time.monotonic() - wall, time.process_time() - cpu))
  return {name: tuple(1e3 * np.median(t, axis=0)) for name, t in spent.items()}


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("run", type=Path, help="of `tools/op.sh distill`, or a bundle")
  p.add_argument("--data", type=Path, required=True, help="a label store of its view and classes")
  p.add_argument("--prune", type=float, default=0.4, help="share of the multiply-adds that goes")
  p.add_argument("--frames", type=int, default=48, help="half of them choose")
  p.add_argument("--prefer", default="", help="the teacher that comes first where several label the same")
  p.add_argument("--rounds", type=int, default=100, help="in which graphs are timed, in turns")
  args = p.parse_args()
  torch.manual_seed(0)
  source = open_source(args.run, args.data)
  prefer = [args.prefer] if args.prefer else []
  chosen, judged = halves(Calibration(source, args.data, args.frames, prefer, True, True))
  student = source.student
  plan, remove = make_plan(student), math.ceil(args.prune * macs(student))
  worth = values(student, plan.groups, chosen.losses(student))
  plan.groups = [g for g in plan.groups if worth[g.name].any()]
  whole = {g.name: torch.arange(g.channels) for g in plan.groups}
  ways = {
    "worth to the losses": worth,
    "scales of norms": {g.name: scales(student, g) for g in plan.groups},
    "size of weights": {g.name: sizes(student, g) for g in plan.groups},
    "at random": {g.name: torch.rand(g.channels) for g in plan.groups},
  }
  print(f"{'':<22} {'MACs':>6} {'mean loss':>10} {'norms as before':>16}")
  print(f"{'whole':<22} {macs(student) / 1e6:>5.0f}M {judged.mean(student):>10.3f}")
  made = {"whole": student}
  for name, by in ways.items():
    kept, _ = choose(student, plan, whole, by, remove)
    made[name] = copy.deepcopy(student)
    apply(made[name], plan, kept)
    before = judged.mean(made[name])
    chosen.settle(made[name])
    print(f"{name:<22} {macs(made[name]) / 1e6:>5.0f}M {judged.mean(made[name]):>10.3f} {before:>16.3f}")
  for name, (wall, cpu) in timed({k: made[k] for k in ("whole", "worth to the losses")}, args.rounds).items():
    print(f"{name:<22} {wall:.1f} ms, of CPU time {cpu:.1f} ms a frame, one thread")


if __name__ == "__main__":
  main()

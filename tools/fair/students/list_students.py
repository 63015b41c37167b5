#!/usr/bin/env python3
"""Lists the students, or those of runs: backbone, parameters, multiply-accumulates of one frame, outputs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.distillation.trained import load_student_checkpoint
from openpilot.tools.fair.students.student import Student, build, parameters, student_names
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.options import option, parse


def macs(student: Student) -> int:
  """Multiply-accumulates of convolutions and matmuls for one frame, as torch counts them."""
  student.eval()
  with FlopCounterMode(
    display=False
  ) as counter:  # under no_grad its module tracker fails on the detector's learned queries
    student(**student.inputs())
  return counter.get_total_flops() // 2


@dataclass(frozen=True)
class Options:
  runs: tuple[Path, ...] = option((), positional=True, metavar="RUN", help="of `tools/op.sh distill`, in place of all")
  backbone: str | None = option(None, help="put all students on this backbone of timm instead of their own")


def listed(args: Options) -> Iterator[tuple[str, Student]]:
  """Raises UserError."""
  if args.runs and args.backbone:
    raise UserError("--backbone: a run has its own; leave it out")
  for run in args.runs:
    config = Config.from_dict(load_student_checkpoint(run / "best.pt" if run.is_dir() else run)["config"])
    yield run.resolve().name, build(config.spec)
  for name in student_names() if not args.runs else ():
    yield name, build(name, args.backbone)


def main() -> None:
  args = parse(Options, __doc__, "students")
  print(f"{'student':<15} {'backbone':<27} {'parameters':>10} {'MACs':>6}  outputs")
  for name, student in listed(args):
    student.eval()
    with torch.no_grad():
      outputs = [k for k in student(**student.inputs()) if k not in ("lanes_template_out", "lanes_hidden_out")]
    print(
      f"{name:<15} {student.backbone.name:<27} {parameters(student) / 1e6:>9.2f}M {macs(student) / 1e6:>5.0f}M  "
      f"{', '.join(outputs)}"
    )


if __name__ == "__main__":
  raise SystemExit(cli(main)())

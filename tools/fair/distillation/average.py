#!/usr/bin/env python3
"""The mean of runs of one student: `tools/op.sh average RUN RUN --output OUT`. A student that goes on with other data
forgets some of what it knew; the mean of its weights before and after keeps most of both (Wortsman and others,
arXiv:2109.01903). OUT is a run of no steps: export it, or distill on with --init."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from openpilot.tools.fair.bundle.export import load_student, read_environment
from openpilot.tools.fair.distillation import history
from openpilot.tools.fair.distillation.made import check_new, write_run
from openpilot.tools.fair.distillation.trained import Trained, trained_on, union
from openpilot.tools.fair.teacher import check_license
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.options import option, parse
from openpilot.tools.lib.said import command


@dataclass(frozen=True)
class Options:
  runs: tuple[Path, ...] = option(positional=True, help="finished runs of distill, of one student")
  output: Path = option(aliases=("--out",), help="the run's folder, a new one")
  weights: str | None = option(None, metavar="W,W", help="of each run, as .4,.6; default: all alike")
  accept_license: tuple[str, ...] = option(
    (), aliases=("--accept-licence",), metavar="LICENSE", help="of teachers whose license restricts what learns of them"
  )


def weights_of(text: str | None, count: int) -> list[float]:
  """-> of each run, with a sum of 1. Raises UserError."""
  if text is None:
    return [1 / count] * count
  try:
    found = [float(x) for x in text.split(",")]
  except ValueError:
    found = []
  if len(found) != count or not all(math.isfinite(x) and x >= 0 for x in found) or not sum(found) > 0:
    raise UserError(f"--weights {text}: write {count} numbers of 0 or above, as {','.join(['1'] * count)}")
  return [x / sum(found) for x in found]


def mean_of(states: Sequence[dict[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
  """Tensors by name, the same names and shapes in all -> their mean, in float64 on the way; numbers that count, as of
  batches that a norm has seen, are the last one's."""
  out = {}
  for name, last in states[-1].items():
    out[name] = last.clone()
    if last.is_floating_point():
      total = sum(w * s[name].double() for s, w in zip(states, weights, strict=True))
      assert isinstance(total, Tensor)
      out[name] = total.to(last.dtype)
  return out


def run(args: Options) -> Path:
  """Raises UserError."""
  if len(args.runs) < 2:
    raise UserError("average wants two runs at least")
  weights = weights_of(args.weights, len(args.runs))
  check_new(args.output)
  loaded = [load_student(path) for path in args.runs]
  config, states = loaded[-1][1], [student.state_dict() for student, _, _ in loaded]
  for path, (_, other, _) in zip(args.runs, loaded, strict=True):
    if (other.spec, other.tasks, other.per_height) != (config.spec, config.tasks, config.per_height):
      raise UserError(f"{path} is of another student than {args.runs[-1]}: a mean wants the same layers and tasks")
  teachers = [t for _, _, state in loaded for t in state["provenance"]]
  for t in teachers:
    check_license(t["model"], t["licence"], args.accept_license)
  shown: history.History = []
  trained: Trained = {"segments": [], "unknown": []}
  for path, (_, _, state) in zip(args.runs, loaded, strict=True):
    shown = history.joined(shown, history.earlier(state))
    trained = union(trained, trained_on(state, path))
  said = {"average": {"runs": [str(x) for x in args.runs], "weights": weights}}
  write_run(args, config, mean_of(states, weights), teachers, trained, shown, read_environment(args.runs[-1]), said)
  return args.output


def main() -> None:
  args = parse(Options, __doc__, "average")
  out = run(args)
  export = command("tools/op.sh", "export", out, "--output", "models/NAME")
  print(f"{out}: the mean of {len(args.runs)} runs; next, `{export}`")


if __name__ == "__main__":
  raise SystemExit(cli(main)())

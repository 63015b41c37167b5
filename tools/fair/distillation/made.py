"""A run of no steps: a student that was made of others, not taught. `export`, `distill --init` and the rest read it as
any run."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.distillation.history import History
from openpilot.tools.fair.distillation.trained import Trained, distinct
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import atomic_path, write_json
from openpilot.tools.lib.options import save


def check_new(output: Path) -> None:
  """Raises UserError where the folder holds something."""
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise UserError(f"--output {output}: there is something already; choose another folder")


def write_run(
  args: Any,
  config: Config,
  weights: Mapping[str, Tensor],
  teachers: Sequence[Mapping[str, str]],
  trained: Trained,
  history: History,
  environment: Mapping[str, Any],
  said: Mapping[str, Any],
) -> None:
  """Fills args.output. args: the command's options; weights: a student's state_dict(); teachers: with repetitions;
  said: what the log's one line says besides."""
  config = dataclasses.replace(config, steps=0, stages=[], pretrained=False)
  state = {
    "config": dataclasses.asdict(config),
    "step": 0,
    "ema": {f"student.{k}": v.clone() for k, v in weights.items()},
    "provenance": distinct(teachers),
    "trained": trained,
    "history": history,
  }
  args.output.mkdir(parents=True, exist_ok=True)
  save(args, args.output)
  write_json(args.output / "config.json", state["config"])
  write_json(args.output / "environment.json", {**environment, "trained": trained})
  with atomic_path(args.output / "log.jsonl") as tmp:
    tmp.write_text(json.dumps({"step": 0, **said}) + "\n")
  for name in ("best.pt", "last.pt"):
    with atomic_path(args.output / name) as tmp:
      torch.save(state, tmp)

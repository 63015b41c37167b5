"""Checkpoints of tensors and plain values; one that holds code is refused."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import ordinary


def load_checkpoint(
  path: Path, hint: str = "train first: `tools/op.sh distill`", keys: Collection[str] = (), of: str = "such a run"
) -> dict[str, Any]:
  """keys: what a checkpoint of this kind holds; of: who writes it. Raises UserError where it is missing, damaged, a
  pickle that holds code, or of another kind."""
  try:
    state = torch.load(ordinary(path), weights_only=True, map_location="cpu")
  except FileNotFoundError:
    raise UserError(f"no checkpoint at {path}; {hint}") from None
  except Exception as e:  # pickle's many ways to fail; weights_only refuses code
    why = str(e).split("\n")[0].split(". ")[0][:120]  # what follows tells how to open it all the same
    raise UserError(
      f"{path} is no checkpoint of tensors ({why}); it is damaged or holds code, and is not opened"
    ) from None
  lacks = [k for k in keys if k not in state] if isinstance(state, dict) else ["everything"]
  if lacks:
    raise UserError(f"{path} lacks {', '.join(lacks)}; it is no checkpoint of {of}")
  return state


def same_run(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
  """Raises UserError where a checkpoint at `path` is of a run with other options, data or base than the one that is to
  go on from it."""
  differ = [f"{k} {old.get(k)} then, {v} now" for k, v in new.items() if old.get(k) != v]
  if differ:
    raise UserError(f"{path} is of another run: {', '.join(differ)}; give the same, or choose another --output")


def to_device(x: Any, device: torch.device) -> Any:
  if torch.is_tensor(x):
    return x.to(device, non_blocking=True)
  if isinstance(x, dict):
    return {k: to_device(v, device) for k, v in x.items()}
  if isinstance(x, list):
    return [to_device(v, device) for v in x]
  return x

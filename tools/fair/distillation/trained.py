"""Which route segments a student has learned from: its own, and those of the students that it started from, as far as
that is known."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from openpilot.tools.learn.checkpoint import load_checkpoint
from openpilot.tools.lib.files import read_json

Trained = dict[
  str, list[str]
]  # "segments": their names; "unknown": students that have a share in it, of which it is not known
STUDENT = ("config", "ema", "step", "provenance")


def load_student_checkpoint(path: Path) -> dict[str, Any]:
  """A checkpoint of a run of `tools/op.sh distill`. Raises UserError where it is none."""
  return load_checkpoint(path, keys=STUDENT, of="`tools/op.sh distill`")


def trained_on(state: dict[str, Any], where: Path) -> Trained:
  """Of the checkpoint or bundle that was read at `where`; of a checkpoint that does not say it, what the
  environment.json beside it does."""
  if "trained" in state:
    return state["trained"]
  folder = where if where.is_dir() else where.parent
  name = folder.resolve().name
  try:
    said = read_json(folder / "environment.json")
    if "trained" in said:
      return said["trained"]
    return {"segments": sorted(said["segments"]), "unknown": [name] if "--init" in said["command"] else []}
  except (OSError, ValueError, KeyError, TypeError):
    return {"segments": [], "unknown": [name]}


def union(a: Trained, b: Trained) -> Trained:
  return {k: sorted({*a[k], *b[k]}) for k in ("segments", "unknown")}


def distinct(teachers: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
  """Each once, in one order."""
  return [dict(x) for x in sorted({tuple(sorted(t.items())) for t in teachers})]

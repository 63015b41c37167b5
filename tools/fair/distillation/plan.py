"""What a run learns from: made once of one look at the labels, and passed on."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.distillation.look import HELD_OUT, Look, look_at
from openpilot.tools.fair.tasks import TASKS, task_of
from openpilot.tools.learn.processes import is_first
from openpilot.tools.lib.errors import UserError, warn


@dataclass(frozen=True)
class Plan:
  """train, val: clips with their sources; None: nothing is held out. labels: digest of the store. teachers: whose
  labels are used, with their licenses."""

  train: Clips
  val: Clips | None
  labels: str
  teachers: list[dict[str, str]]


def make_plan(
  look: Look, val: Path | None, config: Config, prefer: Sequence[str], live: Any, stale: bool = False
) -> Plan:
  """val: another store to evaluate on. Raises UserError as Clips does."""
  train, held = split(look, val, config, prefer, live, stale)
  return Plan(train, held, look.digest, train.provenance())


def held_out(root: str | Path | Look) -> set[str]:
  """Segments kept for evaluation: of each kind of labels a tenth of the routes, at least one where there are two; else
  the last segment of a route."""
  kinds: dict[tuple[str, ...], list[str]] = {}
  for name, groups in look_at(root).segments.items():
    kinds.setdefault(tuple(sorted(groups)), []).append(name)
  out: set[str] = set()
  for names in kinds.values():
    routes = sorted({n.rpartition("--")[0] or n for n in names})
    if len(routes) > 1:
      r = np.random.default_rng(0)
      chosen = {routes[i] for i in r.permutation(len(routes))[: max(1, round(HELD_OUT * len(routes)))]}
      out |= {n for n in names if (n.rpartition("--")[0] or n) in chosen}
    elif len(names) > 1:
      out.add(sorted(names)[-1])
  return out


def split(
  root: str | Path | Look, val: Path | None, config: Config, prefer: Sequence[str], live: Any, stale: bool = False
) -> tuple[Clips, Clips | None]:
  """-> what is learned, and what is held out. What of the labels is left out is said."""
  look = look_at(root)
  whole = clips_of(look, config, prefer, live, stale)
  if val is not None:
    there = look_at(val)
    judged = [
      t for t in config.tasks if not TASKS[t].optional or any(t in task_of(x, config.classes) for x in there.labels)
    ]
    if judged != config.tasks and config.labeled and is_first():
      print(f"{val} judges {', '.join(judged)} alone: nothing in it teaches the rest")
    other = clips_of(there, replace(config, tasks=judged), prefer, live, stale, whole)
    if other.picture != whole.picture:
      raise UserError(
        f"--val {val} holds {other.picture}, and {look.place} {whole.picture}; give labels of the same kind"
      )
    return whole, other
  names, out = set(look.segments), held_out(look)
  if out and names - out:
    return whole.part(names - out), whole.part(out)
  end = whole.part(names)
  n = len(whole)
  keep = max(1, n // 8)
  if n < 8:
    return whole, None
  if is_first():
    alone = "one segment only" if len(names) == 1 else f"no two of the {len(names)} segments have the same teachers"
    print(f"warning: {alone}; the last eighth is held out, which is too alike to judge by", file=sys.stderr)
  end.starts = whole.starts[n - keep :]
  whole.starts = whole.starts[: n - keep - 2]
  return whole, end


def clips_of(
  look: Look, config: Config, prefer: Sequence[str], live: Any, stale: bool, learned: Clips | None = None
) -> Clips:
  """learned: what these are to judge. What of the labels is left out is said."""
  clips = Clips(
    look,
    config.labeled,
    config.clip,
    prefer,
    live,
    stale_labels=stale,
    classes=config.classes,
    ignore=config.ignore_classes,
    per_height=config.per_height,
  )
  if learned is not None:
    clips.judges(learned)
  if is_first():
    for line in (*clips.left_out(), *clips.not_told(), *clips.without_height()):
      warn(line)
  return clips

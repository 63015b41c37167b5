"""A bundle's model card, and its manifest's metrics, from the evaluations of `tools/op.sh evaluate`."""

import json
from pathlib import Path
from typing import Any

from openpilot.tools.fair.bundle.sources import source_table, teacher_table, warning
from openpilot.tools.fair.distillation.trained import Trained
from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.evaluation.groups import GROUPS
from openpilot.tools.fair.evaluation.metrics import standing
from openpilot.tools.fair.evaluation.report import sparse
from openpilot.tools.fair.students.student import Student
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import read_json
from openpilot.tools.lib.said import public, public_command, public_path


def read_evaluation(path: Path, name: str) -> dict[str, Any]:
  """An evaluation.json in which the bundle `name` is a student's column. Raises UserError."""
  try:
    found = read_json(path)
    columns = [c for c, kind in found["kinds"].items() if kind == "student"]
    missing = [k for k in ("tables", "differences", "data", "frames", "routes", "segments") if k not in found]
    if missing:
      raise KeyError(missing[0])
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise UserError(
      f"{path} is no evaluation's JSON ({type(e).__name__}: {e}); make one with `tools/op.sh evaluate`"
    ) from None
  if name not in columns:
    raise UserError(
      f"{path} evaluates {', '.join(columns)}, not {name}; export to a folder of that name, evaluate it, and export "
      "again with --evaluation"
    )
  return found


def headlines(evaluation: dict[str, Any], name: str) -> list[dict[str, Any]]:
  """Of every reference and task the headline metric of `name`: task, metric, reference, value, low, high (95%; None
  where routes are too few), others."""
  out = []
  for reference, tasks in evaluation["tables"].items():
    for task, columns in tasks.items():
      metric = GROUPS[task].headline if task in GROUPS else None
      if metric in columns.get(name, {}):
        cell = columns[name][metric]
        mine = [c for c in columns if not c.endswith(", IoU only") or c.startswith(f"{name}, ")]
        others = {c: columns[c][metric]["value"] for c in mine if c != name and metric in columns[c]}
        found = {"task": task, "metric": metric, "reference": reference, "others": others}
        out.append({**found, "value": cell["value"], "low": cell.get("low"), "high": cell.get("high")})
  return out


def seen(evaluation: dict[str, Any], trained: Trained) -> str:
  """How much of what was evaluated the student had learned from, as the end of a sentence on it."""
  names = [s["name"] for s in evaluation["segments"]]
  both = sorted(set(names) & set(trained["segments"]))
  if both:
    return f"{len(both)} of {len(names)} segments were trained on"
  if trained["unknown"]:
    return (
      f"not trained on as far as is known: it is not recorded what {public(', '.join(trained['unknown']))} learned from"
    )
  return "not trained on"


def metrics_of(evaluations: list[dict[str, Any]], name: str, run: Path, trained: Trained) -> list[dict[str, Any]]:
  """The manifest's metrics: headlines of the evaluations where there are any, else the run's own held-out losses."""
  if evaluations:
    out = []
    for e in evaluations:
      for h in headlines(e, name):
        interval = "" if h["low"] is None else f", 95% interval {h['low']:.3f} to {h['high']:.3f}"
        where = f"{e['frames']} frames of {e['routes']} routes, {seen(e, trained)}, {public_path(e['data'])}"
        data = f"{where}, by {h['reference']}{interval}"
        out.append({"name": f"{GROUPS[h['task']].title}: {h['metric']}", "value": h["value"], "data": data})
    return out
  try:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    held: dict[str, float] = next((x["val"] for x in reversed(lines) if x.get("val")), {})
  except (OSError, ValueError, AttributeError) as e:
    raise UserError(
      f"{run / 'log.jsonl'} is not readable ({type(e).__name__}: {e}), and no --evaluation was given; train again, or "
      "give one"
    ) from None
  return [
    {"name": f"held-out loss {k}", "value": v, "data": "held out of what was learned from"} for k, v in held.items()
  ]


def interval(low: float | None, high: float | None) -> str:
  return "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"


def tables(evaluations: list[dict[str, Any]], name: str, trained: Trained) -> str:
  """Each evaluation as a table, then what `name` is better than, route by route."""
  out = []
  for e in evaluations:
    rows = [
      f"| {GROUPS[h['task']].title} | {h['metric']} | {h['reference']} "
      f"| {h['value']:.3f}{interval(h['low'], h['high'])} | "
      + "; ".join(f"{c.removeprefix(name + ', ')} {v:.3f}" for c, v in h["others"].items())
      + " |"
      for h in headlines(e, name)
    ]
    known = seen(e, trained)
    known = f"**{known}**" if known != "not trained on" else known
    routes = "route" if e["routes"] == 1 else "routes"
    what = f"{e['frames']} frames of {e['routes']} {routes} (`{public_path(e['data'])}`), {known}"
    if apart := sparse(e):
      what += f". {apart}"
    out.append(f"{what}:\n\n| what | metric | by | value [95%] | others |\n|---|---|---|---|---|\n" + "\n".join(rows))
    if beside := teacher_table(e, name):
      out.append(beside)
    pairs = [d for d in e["differences"] if d["a"] == name]
    if pairs:
      lines = [
        f"| {GROUPS[d['task']].title}, {d['metric']} | {d['b'].removeprefix(name + ', ')} | "
        f"{d['difference']:+.3f}{interval(d['low'], d['high'])} | " + standing(d["metric"], d["low"], d["high"]) + " |"
        for d in pairs
      ]
      out.append(
        "Its difference to others, paired by route:\n\n| metric | other | difference [95%] | |\n|---|---|---|---|\n"
        + "\n".join(lines)
      )
  return "\n\n".join(out)


def card(
  name: str,
  student: Student,
  config: Config,
  state: dict[str, Any],
  environment: dict[str, Any],
  metrics: list[dict[str, Any]],
  evaluations: list[dict[str, Any]],
  checked: list[str],
  notes: str,
  trained: Trained,
) -> str:
  """Markdown. notes: the author's own words, put first."""
  count = sum(p.numel() for p in student.parameters())
  teachers = "\n".join(
    f"- {public(t['model'])} ({', '.join(filter(None, (t['licence'], t['checkpoint_hash'][:12])))})"
    for t in state["provenance"]
  )
  losses = "\n".join(f"| {m['name']} | {m['value']:.4g} | {m['data']} |" for m in metrics)
  learned = f"learned {', '.join(config.tasks)} in {state['step']} steps of {config.batch} frames"
  learned += f", {config.taught_by}" if config.taught_by else ""
  made = "put together from students that had learned before"
  if config.widths:
    made = "pruned, and not taught since" if environment.get("pruned") else f"pruned, {made}"
  how = learned if config.steps else made
  measured = tables(evaluations, name, trained) or f"| metric | value | data |\n|---|---|---|\n{losses}"
  table, picture = source_table(state), student.spec.input
  sources = f"\n## Learned from\n\n{table}\n" if table else ""
  what = f"the {picture.view} view" if picture.kind == "model_frame" else "RGB"
  metrics_note = (
    'Metrics are defined on the page that `tools/op.sh evaluate` writes. "mean map", "hold still" and "IoU only" are '
    "rivals without a network."
  )
  return f"""# {name}

{config.student}{", pruned" if config.widths and config.steps else ""}: {count / 1e6:.2f}M parameters, {how}.

{warning(state)}

{notes.strip() + chr(10) if notes.strip() else ""}
## Taught by

{teachers}
{sources}
{environment.get("clips", 0)} clips of {config.clip} frames from {len(environment.get("segments", []))} segments:
`tools/op.sh {public(environment.get("verb", "distill"))} {public_command(environment.get("command", ""))}`

## Measured

{measured}

{metrics_note}

Input `frame` uint8 {(1, *picture.shape)}, {what}; the graph normalizes.
In parts of an output's largest value: {"; ".join(checked)}.
"""

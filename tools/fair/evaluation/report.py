"""The page of an evaluation: tables of every task, what exceeds its limit in red, differences, conditions, latency, and
the worst frames as pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openpilot.tools.fair.evaluation.compared import Compared
from openpilot.tools.fair.evaluation.groups import GROUPS
from openpilot.tools.fair.evaluation.metrics import lower_is_better, standing
from openpilot.tools.fair.evaluation.pictures import picture
from openpilot.tools.replay.report import load_template, png

KINDS = {"rival": "baseline"}  # as the page calls them


def number(v: float) -> str:
  return f"{v:.3f}" if abs(v) < 10 else f"{v:.1f}"


def metrics(columns: dict[str, dict[str, Any]]) -> list[str]:
  """All that any column has, in the order in which the accumulators give them."""
  return list(dict.fromkeys(k for cells in columns.values() for k in cells))


def summary(results: dict[str, Any]) -> str:
  """Lines for the terminal: the headline metric of every task and column."""
  lines = []
  for reference, tasks in results["tables"].items():
    for task, columns in tasks.items():
      metric = GROUPS[task].headline
      found = {c: cells[metric]["value"] for c, cells in columns.items() if metric in cells}
      if found:
        lines.append(
          f"{GROUPS[task].title}, {metric} by {reference}: " + ", ".join(f"{c} {number(v)}" for c, v in found.items())
        )
  return "\n".join(lines)


FOLLOWED = ("lanes", "video", "identity")  # tasks in which things are followed from frame to frame


def sparse(results: dict[str, Any]) -> str:
  """Of frames that lie apart what that means for what is followed; '' where it is judged on all of them, or nothing
  is."""
  step = results.get("every", 1)
  tasks = dict.fromkeys(t for tasks in results["tables"].values() for t in FOLLOWED if t in tasks)
  if step == 1 or not tasks:
    return ""
  what = ", ".join(GROUPS[t].title for t in tasks)
  return f"{what}: of {step} frames one is labeled, so that things move {step} times as far between two as on the road"


def left_out(results: dict[str, Any]) -> list[str]:
  """What was not compared or not as on the road, a line each."""
  found = [line] if (line := sparse(results)) else []
  found += [
    f"not compared, of {who}: " + "; ".join(f"{name}: {n}" for name, n in names.items())
    for who, names in results["compared"]["left_out"].items()
  ]
  for reference, columns in results["compared"]["not_named"].items():
    for column, names in columns.items():
      found.append(f"{column} does not tell apart, of {reference}: {', '.join(names)}; background to both, no mIoU")
  return found


def words(task: str, metric: str) -> str:
  """What a metric is, in few words; '' where it is not said."""
  known = GROUPS[task].words
  if metric in known:
    return known[metric]
  if metric.startswith("iou_"):
    return f"overlap of {metric.removeprefix('iou_')} (IoU)"
  base, _, how = metric.rpartition("_")
  aligned = {"median": "after the best factor", "lsq": "after the best factor and shift"}
  return f"{known[base]}, {aligned[how]}" if how in aligned and base in known else ""


def page(results: dict[str, Any], worst: dict[tuple[str, str], Any], compared: Compared) -> str:
  """-> HTML, with its pictures in it. worst: (student, task) -> its worst frames."""
  template = load_template(Path(__file__).with_name("page.html.j2"))
  shown = []
  for (student, task), w in worst.items():
    frames: Sequence[dict[str, Any]] = [f for _, _, f in sorted(w.frames, key=lambda f: -f[0])]
    if frames and GROUPS[task].draw is not None:
      pictures = [
        {"data": png(picture(GROUPS[task].draw, f, compared)), **{k: f[k] for k in ("title", "error", "reference")}}
        for f in frames
      ]
      shown.append({"student": student, "task": task, "pictures": pictures})
  by_condition: dict[str, Any] = {}
  for condition, said in results["conditions"].items():
    for ref, tasks in said["tables"].items():
      for task, columns in tasks.items():
        for column, values in columns.items():
          if (metric := GROUPS[task].headline) in values:
            by_condition.setdefault(ref, {}).setdefault(task, {}).setdefault(column, {})[condition] = values[metric]
  return template.render(
    title=f"Evaluation of {', '.join(results['bundles'])}",
    r=results,
    groups=GROUPS,
    metrics=metrics,
    words=words,
    kinds={c: KINDS.get(kind, kind) for c, kind in results["kinds"].items()},
    left_out=left_out(results),
    number=number,
    by_condition=by_condition,
    worst=shown,
    lower_is_better=lower_is_better,
    standing=standing,
  )

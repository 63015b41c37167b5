"""What a card says of where a student's pictures came from, and how it stands beside its teachers."""

from collections.abc import Mapping
from typing import Any

from openpilot.tools.fair.distillation.history import by_kind, totals
from openpilot.tools.fair.distillation.sampling import in_words
from openpilot.tools.fair.evaluation.groups import GROUPS
from openpilot.tools.fair.evaluation.metrics import lower_is_better
from openpilot.tools.fair.evaluation.run import gap
from openpilot.tools.lib.said import public

TOY = "boxes for cars, hashes for asphalt"
NO_NAME = "origin not stated"
MUCH = 0.5  # of what it was shown
GUESS = "What it says of a real camera is a guess, and must control nothing."
SIMULATOR = "this project's ray-cast simulator"
NOT_REAL = f"**Not made for real streets.** It has learned from nothing but {SIMULATOR}: {TOY}. {GUESS}"
ADVISES = "It advises; it must control nothing."


def percent(share: float) -> str:
  return f"{share:.0%}" if share >= 0.01 else "under 1%"


def warning(state: Mapping[str, Any]) -> str:
  """What it has learned from, in one or two sentences, and what that means."""
  found, known = totals(state.get("history", []))
  simulated = any("simulator" in t["model"] for t in state["provenance"])
  if not found:
    if not simulated:
      return ADVISES
    if len(state["provenance"]) == 1:
      return NOT_REAL
    return f"It has learned from {SIMULATOR} ({TOY}) and others; their shares are not recorded. {GUESS}"
  kinds = by_kind(found)
  rest = "" if known else " What the students that it started from were shown is not recorded."
  toy = kinds.get("simulated drives", 0.0)
  if toy > 0.995 and known:
    return NOT_REAL
  words = [f"{k} ({percent(share)})" for k, share in kinds.items()]
  listed = " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
  said = f"It has learned from {listed}, by share of the frames that it was shown.{rest}"
  if toy >= MUCH or (simulated and not known):
    return f"{said} Simulated streets are {TOY}. {GUESS}"
  return f"{said} {ADVISES}"


def source_table(state: Mapping[str, Any]) -> str:
  """Every source with its license and share, and what was drawn more often than the rest; '' where it is not known."""
  history = state.get("history", [])
  found, _ = totals(history)
  if not found:
    return ""
  rows = [
    f"| {x['kind']} | {public(x['name']) or NO_NAME} | {public(x['license'])} | {percent(x['share'])} |" for x in found
  ]
  table = "| kind | source | license | share of the frames shown |\n|---|---|---|---|\n" + "\n".join(rows)
  drawn = [public(line) for line in in_words(history[-1].get("sample", []))]
  return table + ("\n\nIn the last run " + "; ".join(drawn) + "." if drawn else "")


def data_lines(state: Mapping[str, Any]) -> list[str]:
  """The same for a manifest's provenance.data."""
  return [
    f"{x['kind']}, {public(x['name']) or NO_NAME} ({public(x['license'])}): {percent(x['share'])} of the frames shown"
    for x in totals(state.get("history", []))[0]
  ]


def shown_runs(state: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The same, run by run, for a manifest's provenance.history, so that a student that starts from the bundle knows it.
  A run that did not record its sources has none."""
  keys = ("kind", "name", "license", "share")
  return [
    {
      **{k: run[k] for k in ("steps", "frames")},
      **(
        {}
        if run["sources"] is None
        else {"sources": [{k: public(x[k]) if isinstance(x[k], str) else x[k] for k in keys} for x in run["sources"]]}
      ),
    }
    for run in state.get("history", [])
  ]


def over_teachers(evaluation: Mapping[str, Any], name: str) -> list[tuple[str, str, str, float, str, float]]:
  """Of every task whose truth both were judged by, in all frames and in each condition: task, metric, condition, the
  student's value, the best teacher, its value."""
  truth = evaluation.get("truth")
  places = {"all": evaluation["tables"].get(truth, {})}
  for condition, said in evaluation.get("conditions", {}).items():
    places[condition] = said["tables"].get(truth, {})
  out = []
  for task in GROUPS:
    metric = GROUPS[task].headline
    for condition, tasks in places.items():
      columns = {
        c: (v[metric]["value"] if isinstance(v[metric], dict) else v[metric])
        for c, v in tasks.get(task, {}).items()
        if metric in v and (c == name or evaluation["kinds"].get(c) == "teacher")
      }
      teachers = {c: v for c, v in columns.items() if c != name}
      if name in columns and teachers:
        best = (min if lower_is_better(metric) else max)(teachers, key=lambda c: teachers[c])
        out.append((task, metric, condition, columns[name], best, teachers[best]))
  return out


def teacher_table(evaluation: Mapping[str, Any], name: str) -> str:
  """Student over teacher; '' where no teacher was judged by the truth."""
  rows = []
  for task, metric, condition, mine, teacher, its in over_teachers(evaluation, name):
    apart = gap(metric, mine, its)
    words = f"{apart:.0%} behind" if apart >= 0.005 else f"{-apart:.0%} ahead" if apart <= -0.005 else "as good"
    ratio = f"{mine / its:.2f}" if its else "-"
    rows.append(
      f"| {GROUPS[task].title} | {metric} | {condition} | {mine:.3f} | {teacher} {its:.3f} | {ratio}, {words} |"
    )
  head = "| what | metric | condition | student | best teacher | student over teacher |\n|---|---|---|---|---|---|\n"
  return f"Beside its teachers, by the truth:\n\n{head}" + "\n".join(rows) if rows else ""

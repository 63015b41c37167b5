"""What the page and the JSON say of variants: what each costs, what it loses, and which is recommended."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from openpilot.selfdrive.modeld.fair.bundle import Bundle
from openpilot.tools.fair.evaluation.scenes import Segment
from openpilot.tools.fair.optimize.choose import variances
from openpilot.tools.fair.optimize.judge import (
  BEYOND,
  FLOAT,
  UNDECIDED,
  WITHIN,
  Row,
  counts,
  hardest,
  most_shown,
  verdict,
  worst,
)
from openpilot.tools.fair.optimize.measure import footprint
from openpilot.tools.fair.optimize.quantize import TARGETS
from openpilot.tools.fair.optimize.search import Graphs, Rung
from openpilot.tools.fair.optimize.sensitivity import Source
from openpilot.tools.fair.optimize.variants import ONNX, Variant


def described(segments: Sequence[Segment]) -> dict[str, Any]:
  kinds = sorted({" ".join(s.conditions) for s in segments} - {""})
  routes = len({s.route for s in segments})
  return {"segments": len(segments), "routes": routes, "frames": sum(len(s.ids) for s in segments), "conditions": kinds}


def verdicts(variants: list[Variant], rows: dict[str, list[Row]]) -> dict[str, str]:
  """Of each by its label; what was not judged is float itself."""
  return {v.label: verdict(rows[v.label]) if v.label in rows else WITHIN for v in variants}


def recommend(variants: list[Variant], rows: dict[str, list[Row]], ms: dict[str, dict[str, float]]) -> tuple[str, str]:
  """-> the variant's label, and why. The rule: of those for this processor whose metrics are all shown to stay within
  what they may lose, the one whose median is shortest with one thread."""
  said = verdicts([v for v in variants if v.here], rows)
  fit = [name for name, v in said.items() if v == WITHIN]
  best = min([FLOAT, *fit], key=lambda name: ms[name]["p50"])
  why = f"{ms[best]['p50']:.1f} ms, the shortest of {', '.join([FLOAT, *fit])}"
  if (runner := next((v.runner for v in variants if v.label == best), ONNX)) != ONNX:
    why += f"; --runner {runner} runs it, where it is asked for"
  for what, words in ((BEYOND, "would lose more than it may"), (UNDECIDED, "is undecided: these routes are too few")):
    if others := [name for name, v in said.items() if v == what]:
      why += f"; {', '.join(others)} {words}"
  return best, why


def column(label: str, ms: dict[int, Any], bundle: Bundle, runner: str = ONNX) -> dict[str, Any]:
  """What of a variant is measured here."""
  return {"label": label, "ms": {n: t[label] for n, t in ms.items()}, **footprint(bundle, runner)}


def told(variant: Variant, graphs: Graphs, rows: list[Row] | None) -> dict[str, Any]:
  """rows: None of one that is float itself, and is not judged."""
  said = {
    "precision": variant.precision,
    "target": variant.target,
    "here": variant.here,
    "bytes": sum(map(len, variant.files.values())),
    "output_errors": graphs.output_errors(variant),
    "float": variant.left,
  }
  if rows is None:
    return said
  return {
    **said,
    "verdict": verdict(rows),
    "counts": counts(rows),
    "worst": hardest(rows).words,
    "metrics": [{**asdict(r), "verdict": r.verdict} for r in rows],
  }


def sources_told(graphs: Graphs, target: str, rows: list[Row]) -> list[dict[str, Any]]:
  """Of each tensor that is rounded what that does alone, those first that disturb most; and its part of what each
  metric lost where all were: the part that it has in the variance of the outputs that the metric is of."""
  sources = graphs.sources(TARGETS[target])
  whole = variances(sources)

  def part(source: Source, outputs: set[str]) -> float:
    parts = [source.errors[o] ** 2 / whole[o] for o in outputs if o in source.errors and whole[o]]
    return sum(parts) / max(1, len(parts))

  out = []
  for graph, x in sorted(sources, key=lambda x: -part(x[1], set(whole))):
    costs = {f"{r.task} {r.metric}": max(0.0, r.loss) * part(x, graphs.outputs_of(r.task)) for r in rows if r.limit}
    out.append({"graph": graph, **asdict(x), "output": x.output, "costs": costs})
  return out


def tried(rungs: list[Rung]) -> list[dict[str, Any]]:
  out = []
  for r in rungs:
    row = worst(r.rows)
    out.append(
      {
        "float": r.label,
        "share": row.share,
        "shown": most_shown(r.rows),
        "worst": row.words,
        "over": [x.words for x in r.rows if x.shown > 1],
        "back": sorted(layer for _, layer in r.back),
      }
    )
  return out

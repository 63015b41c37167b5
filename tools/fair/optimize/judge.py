"""Variants of a bundle judged side by side on labeled frames: every metric as a paired difference to the float one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.bundle import Bundle
from openpilot.tools.fair.evaluation.compared import Compared
from openpilot.tools.fair.evaluation.evaluate import check_tasks
from openpilot.tools.fair.evaluation.groups import GROUPS, Card
from openpilot.tools.fair.evaluation.metrics import lower_is_better, paired_bootstrap
from openpilot.tools.fair.evaluation.run import Evaluation, values_of
from openpilot.tools.fair.evaluation.scenes import Segment
from openpilot.tools.fair.evaluation.student import Student
from openpilot.tools.lib.errors import UserError

WITHIN, UNDECIDED, BEYOND = "within", "undecided", "beyond"  # what it may lose
FLOAT = "float"  # the column that all are compared with
LEAST = 0.05  # a metric under it is hardly one: its losses are parts of this
Cards = dict[tuple[str, str], dict[str, Card]]  # (reference, column) -> segment -> what was counted
RECALL = 0.5  # of --max-loss, in points: half a point where others may lose one percent


@dataclass
class Row:
  """One metric of one variant. difference: value less base, with its 95% interval over routes where there are three.
  loss: how much worse, in parts of the base, of a recall in points, least and most: by the ends of that interval;
  limit: what it may be, None where nothing is asked of this metric. conditions: name -> (base, value)."""

  task: str
  metric: str
  base: float
  value: float
  difference: float
  low: float | None
  high: float | None
  loss: float
  limit: float | None
  conditions: dict[str, tuple[float, float]] = field(default_factory=dict)
  least: float | None = None
  most: float | None = None

  @property
  def verdict(self) -> str:
    """Whether the interval lies on one side of the limit, or holds it; "" where nothing is asked. Without an interval
    nothing is decided."""
    if self.limit is None:
      return ""
    if self.most is not None and self.most <= self.limit:
      return WITHIN
    return BEYOND if self.least is not None and self.least > self.limit else UNDECIDED

  @property
  def share(self) -> float:
    """Of what it may lose, how much it does; over 1 is too much."""
    return self.loss / self.limit if self.limit else 0.0

  @property
  def shown(self) -> float:
    """Its share, where its routes show a loss at all, else 0: of few routes most that a metric loses is chance. Without
    an interval it is taken for a loss."""
    return self.share if self.least is None or self.least > 0 else 0.0

  @property
  def words(self) -> str:
    unit = " points" if self.metric.startswith("recall") else "%"
    said = f"{100 * self.loss:.2f}{unit}"
    if self.least is not None and self.most is not None:
      said += f" ({100 * self.least:+.2f} to {100 * self.most:+.2f})"
    return f"{GROUPS[self.task].title}, {self.metric}: {self.base:.4f} to {self.value:.4f}, {said}"

  def spread(self, low: float, high: float) -> None:
    """Takes the 95% interval of its difference."""
    ends = sorted(loss_of(self.metric, self.base, d) for d in (low, high))
    self.low, self.high, (self.least, self.most) = low, high, ends


class NoRival:
  """In place of the mean maps, which nobody asks for here."""

  def scene(self, valid: np.ndarray) -> None:
    return None


def bounded(task: str, metric: str) -> bool:
  """Whether it may not fall: what stands for each group, and how many objects are found."""
  return metric == GROUPS[task].headline or metric == "recall"


def loss_of(metric: str, base: float, difference: float) -> float:
  """difference: of a value less base."""
  down = difference if lower_is_better(metric) else 0.0 - difference  # not -0.0, which is told as a gain
  return down if metric.startswith("recall") else down / max(abs(base), LEAST)


def make_row(task: str, metric: str, base: float, value: float, max_loss: float) -> Row:
  limit = (RECALL * max_loss if metric.startswith("recall") else max_loss) if bounded(task, metric) else None
  return Row(task, metric, base, value, value - base, None, None, loss_of(metric, base, value - base), limit)


def worst(rows: Sequence[Row]) -> Row:
  """The metric that is nearest to what it may lose, or furthest beyond. Raises UserError where nothing was judged."""
  return max(asked(rows), key=lambda r: r.share)


def most_shown(rows: Sequence[Row]) -> float:
  """Of what a metric may lose, the most that one is shown to. Raises UserError as asked()."""
  return max(r.shown for r in asked(rows))


def asked(rows: Sequence[Row]) -> list[Row]:
  """Those that may not fall. Raises UserError where there are none."""
  found = [r for r in rows if r.limit]
  if not found:
    raise UserError("no metric that stands for a task could be judged; give data with labels of what the student says")
  return found


def counts(rows: Sequence[Row]) -> dict[str, int]:
  """Of a variant, how many of its metrics have each verdict."""
  said = [r.verdict for r in asked(rows)]
  return {v: said.count(v) for v in (WITHIN, UNDECIDED, BEYOND)}


def verdict(rows: Sequence[Row]) -> str:
  """Of a variant: that of its worst metric."""
  found = counts(rows)
  return next((v for v in (BEYOND, UNDECIDED) if found[v]), WITHIN)


def hardest(rows: Sequence[Row]) -> Row:
  """Of those with the variant's verdict the metric that lost most of what it may."""
  return worst([r for r in asked(rows) if r.verdict == verdict(rows)])


def judge(
  bundles: Mapping[str, Bundle],
  segments: list[Segment],
  truth: str,
  compared: Compared,
  max_loss: float,
  known: Cards | None = None,
  runners: Mapping[str, str] | None = None,
) -> dict[str, list[Row]]:
  """bundles: by column, FLOAT among them. known: of columns that were run on these segments before, and need not be
  again; those that are run now are added. runners: of columns that ONNX Runtime does not run. -> of each other column
  its metrics. Raises UserError where the labels say nothing of what the bundle puts out."""
  known = {} if known is None else known
  students = []
  for name, bundle in bundles.items():
    if not any(column == name for _, column in known):
      students.append(Student(bundle, compared, runner=(runners or {}).get(name, "onnx")))
      students[-1].name = name
  check_tasks(students, segments, [truth], compared, segments[0].frames.path.parent)
  nobody: Any = NoRival()
  run = Evaluation(students, segments, truth, [], {truth: nobody}, compared)
  run.run()
  known |= run.cards
  run.cards = dict(known)
  out: dict[str, list[Row]] = {name: [] for name in bundles if name != FLOAT}
  names = sorted({c for s in segments for c in s.conditions})
  for reference in dict.fromkeys(r for r, _ in run.cards):
    base_cards = run.cards.get((reference, FLOAT))
    for name, rows in out.items():
      cards = run.cards.get((reference, name))
      if base_cards is None or cards is None:
        continue
      for task in GROUPS:
        a, b = run.by_route(task, cards, base_cards)
        if not a:
          continue
        va, vb = values_of(a), values_of(b)
        ranges = paired_bootstrap(a, b, a[0].draws)
        mine = [make_row(task, m, vb[m], va[m], max_loss) for m in va if m in vb]
        for row in mine:
          if row.metric in ranges:
            row.spread(*ranges[row.metric])
        rows += mine
        for condition in names:
          here = {s.name for s in segments if condition in s.conditions}
          both = [[c[n].sums[task] for n in c if n in here and task in c[n].sums] for c in (base_cards, cards)]
          if all(both):
            x, y = (values_of(p) for p in both)
            for row in mine:
              if row.metric in x and row.metric in y:
                row.conditions[condition] = (x[row.metric], y[row.metric])
  return out

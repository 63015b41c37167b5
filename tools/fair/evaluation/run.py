"""Runs students, teachers and rivals over all frames, and makes tables of what came of it."""

import heapq
import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from openpilot.tools.fair.distillation.data import camera_height
from openpilot.tools.fair.evaluation.columns import Hold, MeanMaps, TeacherTracks, learn_maps, pool_maps
from openpilot.tools.fair.evaluation.compared import Compared
from openpilot.tools.fair.evaluation.detections import Objects
from openpilot.tools.fair.evaluation.groups import GROUPS, Card
from openpilot.tools.fair.evaluation.labels import Labels
from openpilot.tools.fair.evaluation.metrics import bootstrap, lower_is_better, paired_bootstrap, standing
from openpilot.tools.fair.evaluation.scenes import SLOTS, QueryMaker, Scene, Segment
from openpilot.tools.fair.evaluation.student import Student
from openpilot.tools.fair.evaluation.video import IouTracker
from openpilot.tools.fair.labels.dataset import Reader

LIMIT, RECALL_LIMIT = 0.10, 0.05  # a gap beyond is marked
WORST = 3  # pictures of each task of each student
APART = 40  # frames of one segment of which only the worst is shown


@dataclass
class Worst:
  """The frames in which one student errs most in one task."""

  frames: list[tuple[float, int, dict[str, Any]]] = field(default_factory=list)
  best: dict[tuple[str, int], float] = field(default_factory=dict)  # of each block of APART frames
  count: Any = field(default_factory=itertools.count)

  def add(self, error: float, segment: str, i: int, make: Any) -> None:
    """make() gives the picture's data, only where it is among the worst."""
    block = (segment, i // APART)
    if not np.isfinite(error) or error <= 0 or error <= self.best.get(block, 0.0):
      return
    if len(self.frames) >= WORST and error <= self.frames[0][0] and block not in {f[2]["block"] for f in self.frames}:
      return
    self.best[block] = error
    self.frames = [f for f in self.frames if f[2]["block"] != block]
    heapq.heapify(self.frames)
    heapq.heappush(self.frames, (error, next(self.count), {**make(), "block": block, "error": error}))
    while len(self.frames) > WORST:
      heapq.heappop(self.frames)


class Evaluation:
  """cards: (reference, column) -> segment -> Card. Columns are named as on the page; kinds says what each is."""

  def __init__(
    self,
    students: list[Student],
    segments: list[Segment],
    truth: str | None,
    teachers: list[str],
    rivals: dict[str, MeanMaps],
    compared: Compared,
  ):
    """rivals: reference -> what its labels of other data teach; of references that are not in it the other segments
    do."""
    self.students, self.segments, self.truth, self.teachers, self.rivals = students, segments, truth, teachers, rivals
    self.compared = compared
    self.references = [*([truth] if truth else []), *(t for t in teachers if t != truth)]
    self.cards: dict[tuple[str, str], dict[str, Card]] = {}
    self.kinds: dict[str, str] = {}
    self.worst: dict[tuple[str, str], Worst] = {}
    self.frames = 0
    self.slots = min([SLOTS, *(s.slots for s in students if s.slots is not None)])
    self.maps = {r: learn_maps(segments, r, compared) for r in self.references if r not in rivals}

  def _card(self, reference: str, column: str, kind: str, segment: Segment, score: dict[str, float]) -> Card:
    self.kinds[column] = kind
    return self.cards.setdefault((reference, column), {}).setdefault(segment.name, Card(self.compared, score))

  def run(self) -> None:
    with tqdm(total=sum(len(s.ids) for s in self.segments), unit="frame", desc="evaluate") as bar:
      for segment in self.segments:
        self._segment(segment, bar)

  def _segment(self, segment: Segment, bar: Any) -> None:
    reader = Reader(window=1)
    labels = {
      name: Labels(segment, name, reader, self.compared)
      for name in self.references
      if name in segment.groups and segment.groups[name].done()
    }
    reader.labels = 1 + sum(len(x.group.labels) for x in labels.values())
    queries = {
      n: QueryMaker([x.points(i) for i in segment.ids], self.slots) for n, x in labels.items() if "lanes" in x.tasks()
    }
    follow = next(iter(queries), None)  # the truth's points where it has any
    logged = (
      Labels(segment, "openpilot", reader, self.compared)
      if "openpilot" in segment.groups and "simulator" not in segment.groups
      else None
    )
    for s in self.students:
      s.reset(camera_height(segment.groups))
    by_iou = {s.name: IouTracker() for s in self.students}
    means, hold = {name: self._mean_scene(name, segment) for name in labels}, Hold()
    teacher_tracks = {t: TeacherTracks() for t in self.teachers}
    mine: list[Card] = []
    for i, (row, frame_id) in enumerate(zip(segment.rows, segment.ids, strict=True)):
      frame = reader.dense(segment.frames, "frame", [row])[0]
      said = {name: x.scene(frame_id) for name, x in labels.items()}
      q = queries[follow].step(i) if follow is not None else None
      found = [s.step(frame, frame_id, segment.valid_at(frame_id), q) for s in self.students]
      plain: dict[str, Objects | None] = dict.fromkeys(by_iou)
      for s, scene in zip(self.students, found, strict=True):
        if scene.objects is not None:
          plain[s.name] = by_iou[s.name].step(scene.objects.take(scene.objects.score >= s.scores["objects"]))
      self.frames += 1
      bar.update()
      if logged is not None and frame_id in logged.rows:
        self._log(segment, logged, logged.rows[frame_id], reader, found, said)
      judged: set[str] = set()  # tasks
      for name, ref in said.items():
        asked = q if name == follow else None
        fresh: set[str] = set()
        for s, scene in zip(self.students, found, strict=True):
          card = self._card(name, s.name, "student", segment, s.scores)
          errors = card.add(scene, ref, asked)
          mine.append(card)
          fresh |= errors.keys() - judged
          self._worst(
            s.name, {k: v for k, v in errors.items() if k not in judged}, segment, i, frame, scene, name, ref, asked
          )
          if plain[s.name] is not None and ref.tracked is not None:
            mine.append(self._card(name, f"{s.name}, IoU only", "rival", segment, s.scores))
            mine[-1].follow(Scene(tracked=plain[s.name]), ref)
        judged |= fresh
        if (mean := means[name]) is not None:
          mine.append(self._card(name, "mean map", "rival", segment, {}))
          mine[-1].add(mean, ref, None)
        if asked is not None:
          mine.append(self._card(name, "hold still", "rival", segment, {}))
          mine[-1].add(hold.step(asked), ref, asked)
        if name == self.truth:
          for t in self.teachers:
            if t != name and t in said:
              scene, answered = said[t], None
              if asked is not None and scene.points is not None:
                scene.followed = teacher_tracks[t].step(asked, scene.points).followed
                answered = teacher_tracks[t].known
              mine.append(self._card(name, t, "teacher", segment, {}))
              mine[-1].add(scene, ref, asked if answered is not None else None, answered)
    for card in {id(c): c for c in mine}.values():
      card.close()

  def _mean_scene(self, reference: str, segment: Segment) -> Scene | None:
    if reference in self.rivals:
      return self.rivals[reference].scene(segment.map_valid)
    others = [
      self.maps[reference][s.name] for s in self.segments if s.route != segment.route and s.name in self.maps[reference]
    ]
    return pool_maps(others).scene(segment.map_valid) if others else None

  def _log(
    self, segment: Segment, logged: Labels, row: int, reader: Reader, found: list[Scene], said: dict[str, Scene]
  ) -> None:
    lines, leads = (reader.table(logged.group, name, row) for name in ("lines", "leads"))
    for s, scene in zip(self.students, found, strict=True):
      self._card("openpilot", s.name, "student", segment, s.scores).log(scene, lines, leads)
    for name, scene in said.items():
      self._card("openpilot", name, "teacher", segment, {}).log(scene, lines, leads)

  def _worst(
    self,
    name: str,
    errors: dict[str, float],
    segment: Segment,
    i: int,
    frame: np.ndarray,
    found: Scene,
    reference: str,
    ref: Scene,
    q: Any,
  ) -> None:
    def make() -> dict[str, Any]:
      # what it is called stays in the JSON
      seen = "".join(f", {c}" for c in segment.conditions)
      title = f"segment {self.segments.index(segment) + 1} frame {segment.ids[i]}{seen}"
      said = {"found": replace(found, more={**found.more, "queries": q})}
      said["ref"] = replace(ref, followed=None, more={**ref.more, "queries": q})
      return {"frame": frame.copy(), **said, "reference": reference, "title": title}

    for task, error in errors.items():
      self.worst.setdefault((name, task), Worst()).add(error, segment.name, i, make)

  # *** results ***

  def results(self) -> dict[str, Any]:
    """{reference: {task: {column: {metric: {value, low, high, gap_teacher, gap_truth, marked}}}}}, conditions,
    differences, latency."""
    tables: dict[str, Any] = {}
    for (reference, column), cards in self.cards.items():
      for task in GROUPS:
        parts = [c.sums[task] for c in cards.values() if task in c.sums]
        if not parts:
          continue
        values = values_of(parts)
        if any(c.missing or c.lossy for c in cards.values()) and task == "segmentation":
          values = {k: v for k, v in values.items() if k not in self._whole}
        ranges = bootstrap(self.by_route(task, cards), parts[0].draws)
        cells = {
          k: {"value": v, **({"low": ranges[k][0], "high": ranges[k][1]} if k in ranges else {})}
          for k, v in values.items()
        }
        if cells:
          tables.setdefault(reference, {}).setdefault(task, {})[column] = cells
    for reference, tasks in tables.items():
      if reference != "openpilot":
        for task, columns in tasks.items():
          self._gaps(reference, columns, task)
    return {
      "tables": tables,
      "kinds": self.kinds,
      "conditions": self._conditions(),
      "differences": self._differences(),
      "compared": {
        "classes": {kind: list(self.compared.names(kind)) for kind in ("maps", "boxes")},
        "left_out": {who: dict(sorted(names.items())) for who, names in sorted(self.compared.left_out.items())},
        "not_named": self._not_named(),
      },
      "latency_ms": {s.name: {g: percentiles(t) for g, t in s.times.items()} for s in self.students},
    }

  @property
  def _whole(self) -> set[str]:
    """Metrics that mean nothing where a class of the reference is missing."""
    rest = self.compared.background
    return {"miou"} | ({f"iou_{self.compared.names('maps')[rest]}"} if rest is not None else set())

  def _not_named(self) -> dict[str, dict[str, list[str]]]:
    """{reference: {column: classes of the reference's maps that the column does not name}}."""
    out: dict[str, dict[str, list[str]]] = {}
    for (reference, column), cards in self.cards.items():
      if names := set[str]().union(*(c.missing for c in cards.values())):
        out.setdefault(reference, {})[column] = sorted(names)
    return out

  def by_route(self, task: str, *cards: dict[str, Card]) -> Any:
    """Parts of the segments that all of `cards` have, pooled by route: its segments are no independent draws. One list
    for each of `cards`."""
    routes: dict[str, list[str]] = {}
    for s in self.segments:
      if all(s.name in c and task in c[s.name].sums for c in cards):
        routes.setdefault(s.route, []).append(s.name)
    out = []
    for c in cards:
      lists = [[c[n].sums[task] for n in names] for names in routes.values()]
      out.append([type(x[0]).pooled(x) for x in lists])
    return out if len(cards) > 1 else out[0]

  def _gaps(self, reference: str, columns: dict[str, Any], task: str) -> None:
    """To the reference itself, which would be perfect, and, where it is the truth, to how far the best teacher of the
    metric gets."""
    teachers = [c for c in columns if self.kinds[c] == "teacher"]
    for column, cells in columns.items():
      for metric, cell in cells.items() if self.kinds[column] == "student" else ():
        gaps = {"gap_reference": gap(metric, cell["value"], None)}
        others = [columns[t][metric]["value"] for t in teachers if metric in columns[t]]
        if others:
          gaps["gap_teacher"] = gap(metric, cell["value"], (min if lower_is_better(metric) else max)(others))
        limit = RECALL_LIMIT if metric.startswith("recall") else LIMIT
        cell |= gaps
        cell["marked"] = [k for k, v in gaps.items() if v > limit]

  def _conditions(self) -> dict[str, Any]:
    """{condition: {reference: {task: {column: {metric: value}}}}}, where the segments are not all alike."""
    names = sorted({c for s in self.segments for c in s.conditions})
    out: dict[str, Any] = {}
    for name in names:
      here = {s.name for s in self.segments if name in s.conditions}
      for (reference, column), cards in self.cards.items():
        for task in GROUPS:
          parts = [c.sums[task] for n, c in cards.items() if n in here and task in c.sums]
          values = values_of(parts) if parts else {}
          if values:
            out.setdefault(name, {"segments": len(here), "tables": {}})["tables"].setdefault(reference, {}).setdefault(
              task, {}
            )[column] = values
    return out

  def _differences(self) -> list[dict[str, Any]]:
    """Paired over routes: of every student to its rivals and to the students behind it, by the task's headline metric
    and the first reference that has it."""
    out = []
    mine = [s.name for s in self.students]
    columns = list(dict.fromkeys(c for _, c in self.cards))
    for a in mine:
      for b in columns:
        own = b.startswith(f"{a}, ") if b.endswith(", IoU only") else True
        if not own or (b not in mine[mine.index(a) + 1 :] and self.kinds[b] != "rival"):
          continue
        for task, group in GROUPS.items():
          rows = (self._difference(r, a, b, task, group.headline) for r in self.references)
          if row := next(filter(None, rows), None):
            out.append(row)
    return out

  def _difference(self, reference: str, a: str, b: str, task: str, metric: str) -> dict[str, Any] | None:
    if (reference, a) not in self.cards or (reference, b) not in self.cards:
      return None
    p, q = self.by_route(task, self.cards[reference, a], self.cards[reference, b])
    va, vb = (values_of(x).get(metric) if x else None for x in (p, q))
    if va is None or vb is None:
      return None
    low, high = paired_bootstrap(p, q, p[0].draws).get(metric, (None, None))
    sure = standing(metric, low, high) == "better"
    row = {"reference": reference, "task": task, "metric": metric, "a": a, "b": b, "a_value": va, "b_value": vb}
    return {**row, "difference": va - vb, "low": low, "high": high, "better": sure, "routes": len(p)}


def values_of(parts: list[Any]) -> dict[str, float]:
  """Point values of all segments together; of detections COCO's by the library."""
  return type(parts[0]).pooled(parts).reported()


def gap(metric: str, value: float, best: float | None) -> float:
  """How much worse than `best`, as a share of it; without it, than perfect."""
  if lower_is_better(metric):
    return value if best is None else (value - best) / max(best, 1e-9)
  return 1 - value if best is None else (best - value) / max(best, 1e-9)


def percentiles(times: list[float]) -> dict[str, float]:
  return {f"p{q}": round(float(np.percentile(times, q)) * 1e3, 3) for q in (50, 99)} if times else {}

#!/usr/bin/env python3
"""How good students are: against the truth, against their teachers, and against rivals that need no network, on frames
of a label store. HTML and JSON."""

import argparse
import heapq
import itertools
import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from openpilot.selfdrive.modeld.fair.bundle import BundleError, load_bundle
from openpilot.tools.fair.evaluation import report
from openpilot.tools.fair.evaluation.columns import Card, Hold, MeanMaps, TeacherTracks, learn_maps, pool_maps
from openpilot.tools.fair.evaluation.detections import Detections, Objects
from openpilot.tools.fair.evaluation.metrics import bootstrap, lower_is_better, paired_bootstrap
from openpilot.tools.fair.evaluation.scenes import (
  SLOTS,
  Labels,
  QueryMaker,
  Scene,
  Segment,
  check_label,
  info_of,
  open_segments,
)
from openpilot.tools.fair.evaluation.student import Student
from openpilot.tools.fair.evaluation.video import IouTracker
from openpilot.tools.fair.labels.dataset import Reader
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.files import atomic_path
from openpilot.tools.lib.said import public_path
from openpilot.tools.replay.report import cpu_name

LIMIT, RECALL_LIMIT = 0.10, 0.05  # a gap beyond is marked
WORST = 3  # pictures of each task of each student
APART = 40  # frames of one segment of which only the worst is shown
DRAWS, DETECTION_DRAWS = 1000, 200  # of the bootstrap
TASKS = ("depth", "segmentation", "objects", "masks", "video", "identity", "detector", "lanes", "log")


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
  ):
    """rivals: reference -> what its labels of other data teach; of references that are not in it the other segments
    do."""
    self.students, self.segments, self.truth, self.teachers, self.rivals = students, segments, truth, teachers, rivals
    self.references = [*([truth] if truth else []), *(t for t in teachers if t != truth)]
    self.cards: dict[tuple[str, str], dict[str, Card]] = {}
    self.kinds: dict[str, str] = {}
    self.worst: dict[tuple[str, str], Worst] = {}
    self.frames = 0
    self.slots = min([SLOTS, *(s.slots for s in students if s.slots is not None)])
    self.maps = {r: learn_maps(segments, r) for r in self.references if r not in rivals}

  def _card(self, reference: str, column: str, kind: str, segment: Segment, score: dict[str, float]) -> Card:
    self.kinds[column] = kind
    return self.cards.setdefault((reference, column), {}).setdefault(segment.name, Card(score))

  def run(self) -> None:
    with tqdm(total=sum(len(s.ids) for s in self.segments), unit="frame", desc="evaluate") as bar:
      for segment in self.segments:
        self._segment(segment, bar)

  def _segment(self, segment: Segment, bar: Any) -> None:
    reader = Reader(window=1)
    labels = {
      name: Labels(segment, name, reader)
      for name in self.references
      if name in segment.groups and segment.groups[name].done()
    }
    reader.labels = 1 + sum(len(x.group.labels) for x in labels.values())
    queries = {
      n: QueryMaker([x.points(i) for i in segment.ids], self.slots) for n, x in labels.items() if "lanes" in x.tasks()
    }
    follow = next(iter(queries), None)  # the truth's points where it has any
    logged = (
      Labels(segment, "openpilot", reader)
      if "openpilot" in segment.groups and "simulator" not in segment.groups
      else None
    )
    for s in self.students:
      s.reset()
    by_iou = {s.name: IouTracker() for s in self.students}
    means, hold = {name: self._mean_scene(name, segment) for name in labels}, Hold()
    teacher_tracks = {t: TeacherTracks() for t in self.teachers}
    mine: list[Card] = []
    for i, (row, frame_id) in enumerate(zip(segment.rows, segment.ids, strict=True)):
      frame = reader.dense(segment.frames, "frame", [row])[0]
      said = {name: x.scene(frame_id) for name, x in labels.items()}
      q = queries[follow].step(i) if follow is not None else None
      found = [s.step(frame, frame_id, segment.valid, q) for s in self.students]
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
      title = f"segment {self.segments.index(segment) + 1} frame {segment.ids[i]}"
      return {"frame": frame.copy(), "found": found, "ref": ref, "reference": reference, "queries": q, "title": title}

    for task, error in errors.items():
      self.worst.setdefault((name, task), Worst()).add(error, segment.name, i, make)

  # *** results ***

  def results(self) -> dict[str, Any]:
    """{reference: {task: {column: {metric: {value, low, high, gap_teacher, gap_truth, marked}}}}}, conditions,
    differences, latency."""
    tables: dict[str, Any] = {}
    for (reference, column), cards in self.cards.items():
      for task in TASKS:
        parts = [c.sums[task] for c in cards.values() if task in c.sums]
        if not parts:
          continue
        values = values_of(parts)
        if any(c.partial for c in cards.values()) and task == "segmentation":
          values = {k: v for k, v in values.items() if k not in ("miou", "iou_background")}
        ranges = bootstrap(self._by_route(task, cards), DETECTION_DRAWS if isinstance(parts[0], Detections) else DRAWS)
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
      "latency_ms": {s.name: {g: percentiles(t) for g, t in s.times.items()} for s in self.students},
    }

  def _by_route(self, task: str, *cards: dict[str, Card]) -> Any:
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
        for task in TASKS:
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
        for task, metric in report.HEADLINE.items():
          if row := next(filter(None, (self._difference(r, a, b, task, metric) for r in self.references)), None):
            out.append(row)
    return out

  def _difference(self, reference: str, a: str, b: str, task: str, metric: str) -> dict[str, Any] | None:
    if (reference, a) not in self.cards or (reference, b) not in self.cards:
      return None
    p, q = self._by_route(task, self.cards[reference, a], self.cards[reference, b])
    va, vb = (values_of(x).get(metric) if x else None for x in (p, q))
    if va is None or vb is None:
      return None
    low, high = paired_bootstrap(p, q, DETECTION_DRAWS if isinstance(p[0], Detections) else DRAWS).get(
      metric, (None, None)
    )
    sure = low is not None and high is not None and (high < 0 if lower_is_better(metric) else low > 0)
    row = {"reference": reference, "task": task, "metric": metric, "a": a, "b": b, "a_value": va, "b_value": vb}
    return {**row, "difference": va - vb, "low": low, "high": high, "better": sure, "routes": len(p)}


def values_of(parts: list[Any]) -> dict[str, float]:
  """Point values of all segments together; of detections COCO's by the library."""
  pooled = type(parts[0]).pooled(parts)
  values = pooled.result()
  return {**values, **pooled.coco()} if isinstance(pooled, Detections) and values else values


def gap(metric: str, value: float, best: float | None) -> float:
  """How much worse than `best`, as a share of it; without it, than perfect."""
  if lower_is_better(metric):
    return value if best is None else (value - best) / max(best, 1e-9)
  return 1 - value if best is None else (best - value) / max(best, 1e-9)


def percentiles(times: list[float]) -> dict[str, float]:
  return {f"p{q}": round(float(np.percentile(times, q)) * 1e3, 3) for q in (50, 99)} if times else {}


def check_tasks(
  students: list[Student], segments: list[Segment], truth: str | None, references: list[str], root: Path
) -> None:
  """Raises UserError where a student has nothing that any reference speaks of."""
  spoken: set[str] = set()
  for name in references:
    for segment in segments:
      if name in segment.groups:
        spoken |= Labels(segment, name, Reader()).tasks()
  for s in students:
    if not s.tasks & spoken and not (s.tasks - {"lanes"} and "log" in spoken):
      what = f"{root}: labels by {', '.join(references)} say nothing of {', '.join(sorted(s.tasks))}, which is what {s.name} puts out"  # noqa: E501
      raise UserError(
        f"{what}; they have {', '.join(sorted(spoken)) or 'no task at all'}: choose another --truth or --teacher"
      )


def load_students(paths: list[Path], threads: int) -> list[Student]:
  students = [Student(load_bundle(p if p.exists() else Path("models") / p), threads) for p in paths]
  names = [s.name for s in students]
  for s, path in zip(students, paths, strict=True):  # two versions of one bundle
    if names.count(s.name) > 1:
      s.name = str(path)
  return students


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
  """Runs it all, and writes evaluation.html and evaluation.json into args.out. -> what is in the JSON. Raises
  UserError."""
  if args.frames is not None and args.frames < 1:
    raise UserError(f"--frames {args.frames}: it is at least 1; leave it out for all frames")
  if absent := [r for r in args.routes if not r.is_dir()]:
    raise UserError(f"--routes {absent[0]}: there is no such folder; give the one in which the simulated routes lie")
  students = load_students(args.bundles, args.threads)
  segments = open_segments(
    args.data, {*args.teacher, args.truth or "simulator"}, args.routes, args.segment, args.frames, args.stale_labels
  )
  truth = args.truth or next((t for t in ("simulator",) if any(t in s.groups for s in segments)), None)
  references = [*([truth] if truth else []), *args.teacher]
  if not references:
    there = sorted({t for s in segments for t in s.groups} - {"frames"})
    raise UserError(
      f"{args.data} has no labels by 'simulator' to take as truth; name one with --truth or --teacher, there are "
      f"{', '.join(there) or 'none'}"
    )
  kept: dict[str, Segment] = {}
  for name in references:
    kept |= {s.name: s for s in check_label(segments, name, args.data)}
  segments = [kept[k] for k in sorted(kept)] if truth is None else check_label(segments, truth, args.data)
  check_tasks(students, segments, truth, references, args.data)
  rivals = {}
  if args.rival_data is not None:
    others = open_segments(args.rival_data, set(references), [], stale=args.stale_labels)
    if same := {s.name for s in others} & {s.name for s in segments}:
      raise UserError(
        f"--rival-data {args.rival_data} has segments that are evaluated, as {sorted(same)[0]}; give the labels of the "
        "training routes"
      )
    rivals = {r: pool_maps(list(learn_maps(check_label(others, r, args.rival_data), r).values())) for r in references}
  run = Evaluation(students, segments, truth, args.teacher, rivals)
  run.run()
  results = {
    "data": str(args.data),
    "frames": run.frames,
    "segments": [{"name": s.name, "frames": len(s.ids), "conditions": s.conditions} for s in segments],
    "routes": len({s.route for s in segments}),
    "truth": truth,
    "teachers": {
      t: info_of(next(s.groups[t] for s in segments if t in s.groups))
      for t in references
      if any(t in s.groups for s in segments)
    },
    "rival_data": str(args.rival_data) if args.rival_data else "the other routes of DATA",
    "bundles": {
      s.name: {"version": s.bundle.manifest["version"], "hash": s.bundle.manifest_hash, "tasks": sorted(s.tasks)}
      for s in students
    },
    "threads": args.threads,
    "machine": f"{platform.system()} {platform.machine()}, {cpu_name()}, Python {platform.python_version()}",
    **run.results(),
  }
  # the page may be shown around: the names of drives stay in the JSON, in this order
  shown = {
    **results,
    "segments": [{**s, "name": f"segment {n}"} for n, s in enumerate(results["segments"], 1)],
    "data": public_path(args.data),
    "rival_data": public_path(args.rival_data) if args.rival_data else results["rival_data"],
  }
  page = report.page(shown, run.worst)
  with atomic_path(args.out / "evaluation.html") as tmp:
    tmp.write_text(page)
  with atomic_path(args.out / "evaluation.json") as tmp:
    tmp.write_text(json.dumps(results, indent=1) + "\n")
  return results


def parser() -> argparse.ArgumentParser:
  p = argparse.ArgumentParser(prog="evaluate", description=__doc__)
  p.add_argument(
    "bundles",
    nargs="+",
    type=Path,
    metavar="BUNDLE",
    help="folders with a manifest.json, or names in models/; several become columns",
  )
  p.add_argument(
    "data", type=Path, metavar="DATA", help="a label store with model frames that no bundle was trained on"
  )
  p.add_argument("--out", type=Path, default=Path("out/evaluation"))
  p.add_argument(
    "--truth", metavar="TEACHER", help="whose labels are the truth; by itself 'simulator' where it is there"
  )
  p.add_argument(
    "--teacher",
    action="append",
    default=[],
    metavar="TEACHER",
    help="compare with this teacher, too, and the teacher with the truth",
  )
  p.add_argument(
    "--rival-data",
    type=Path,
    metavar="STORE",
    help="labels of the training routes, for the mean maps; by itself the other segments of DATA",
  )
  p.add_argument(
    "--routes",
    type=Path,
    action="append",
    default=[],
    metavar="DIR",
    help="where the simulated routes lie, to tell day, night and rain apart",
  )
  p.add_argument(
    "--stale-labels",
    action="store_true",
    help="take labels by rules that were mended since, which are refused by themselves",
  )
  p.add_argument("--segment", help="only this one, as ROUTE--N")
  p.add_argument("--frames", type=int, help="at most so many of each segment")
  p.add_argument("--threads", type=int, default=1, help="of ONNX Runtime")
  return p


def main() -> None:
  args = parser().parse_args()
  results = evaluate(args)
  print(report.summary(results))
  print(
    f"{args.out / 'evaluation.html'} and evaluation.json: {results['frames']} frames of {len(results['segments'])} "
    "segments"
  )


if __name__ == "__main__":
  raise SystemExit(cli(main, (BundleError,))())

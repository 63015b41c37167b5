#!/usr/bin/env python3
"""How good students are: against the truth, against their teachers, and against rivals that need no network, on frames
of a label store. HTML and JSON."""

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openpilot.selfdrive.modeld.fair.bundle import Bundle, BundleError, given_or_shipped, load_bundle
from openpilot.selfdrive.modeld.fair.runners import RUNNERS
from openpilot.tools.fair.evaluation import report
from openpilot.tools.fair.evaluation.columns import learn_maps, pool_maps
from openpilot.tools.fair.evaluation.compared import Compared, classes_said, input_of, set_of
from openpilot.tools.fair.evaluation.groups import load_groups
from openpilot.tools.fair.evaluation.labels import Labels
from openpilot.tools.fair.evaluation.run import Evaluation
from openpilot.tools.fair.evaluation.scenes import Segment, check_label, info_of, open_segments
from openpilot.tools.fair.evaluation.student import Student
from openpilot.tools.fair.labels.dataset import Reader
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.files import atomic_path
from openpilot.tools.lib.options import option, parse, save
from openpilot.tools.lib.said import public_path
from openpilot.tools.replay.report import cpu_name


@dataclass(frozen=True)
class Options:
  bundles: tuple[Path, ...] = option(
    positional=True,
    metavar="BUNDLE",
    path=True,
    help="folders with a manifest.json, or names in models/; several become columns",
  )
  data: Path = option(
    positional=True, metavar="DATA", help="a label store with model frames that no bundle was trained on"
  )
  output: Path = option(Path("out/evaluation"), aliases=("--out",), help="folder of the page and its JSON")
  truth: str | None = option(
    None, metavar="TEACHER", help="whose labels are the truth; default: 'simulator' where it is there"
  )
  teacher: tuple[str, ...] = option(
    (), metavar="TEACHER", help="compare with this teacher too, and this teacher with the truth"
  )
  classes: str | None = option(
    None,
    metavar="FILE.yaml or a,b,c",
    path=True,
    help="the classes that are compared, with their aliases; default: those that the bundles name",
  )
  ignore_classes: bool = option(
    False, help="leave out labels of unknown classes, and report how many; by default they are an error"
  )
  rival_data: Path | None = option(
    None, metavar="STORE", help="labels of the training routes, for the mean maps; default: the other segments of DATA"
  )
  routes: tuple[Path, ...] = option(
    (), metavar="DIR", help="folder of the simulated routes, to report day, night and rain apart"
  )
  stale_labels: bool = option(False, help="use labels made by outdated rules, which are refused by default")
  segment: str | None = option(None, help="only this segment, as ROUTE--N")
  frames: int | None = option(None, help="at most so many frames of each segment")
  runner: str = option("onnx", help=f"what runs the graphs: {', '.join(RUNNERS)}")
  threads: int = option(1, help="of the runner")


def check_tasks(
  students: list[Student], segments: list[Segment], references: list[str], compared: Compared, root: Path
) -> None:
  """Raises UserError where a student has nothing that any reference speaks of, or a class's name is not known."""
  spoken: set[str] = set()
  for name in references:
    for segment in segments:
      if name in segment.groups:
        spoken |= Labels(segment, name, Reader(), compared).tasks()
  for s in students:
    if not s.tasks & spoken and not (s.tasks - {"lanes"} and "log" in spoken):
      tasks = ", ".join(sorted(s.tasks))
      what = f"{root}: labels by {', '.join(references)} say nothing of {tasks}, which is what {s.name} puts out"
      raise UserError(
        f"{what}; they have {', '.join(sorted(spoken)) or 'no task at all'}: choose another --truth or --teacher"
      )


def load_bundles(paths: Sequence[Path]) -> list[Bundle]:
  return [load_bundle(given_or_shipped(p)) for p in paths]


def open_students(
  bundles: list[Bundle], paths: Sequence[Path], compared: Compared, threads: int, runner: str
) -> list[Student]:
  students = [Student(b, compared, threads, runner) for b in bundles]
  names = [s.name for s in students]
  for s, path in zip(students, paths, strict=True):  # two versions of one bundle
    if names.count(s.name) > 1:
      s.name = str(path)
  return students


def evaluate(args: Options) -> dict[str, Any]:
  """Runs it all, and writes evaluation.html and evaluation.json into args.output. -> what is in the JSON. Raises
  UserError."""
  load_groups()
  if args.frames is not None and args.frames < 1:
    raise UserError(f"--frames {args.frames}: it is at least 1; leave it out for all frames")
  if absent := [r for r in args.routes if not r.is_dir()]:
    raise UserError(f"--routes {absent[0]}: there is no such folder; give the one in which the simulated routes lie")
  bundles = load_bundles(args.bundles)
  classes = set_of(bundles) if args.classes is None else classes_said(args.classes)
  compared = Compared(classes, input_of(bundles), args.ignore_classes)
  students = open_students(bundles, args.bundles, compared, args.threads, args.runner)
  segments = open_segments(
    args.data,
    {*args.teacher, args.truth or "simulator"},
    list(args.routes),
    args.segment,
    args.frames,
    args.stale_labels,
    compared.input,
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
  check_tasks(students, segments, references, compared, args.data)
  rivals = {}
  if args.rival_data is not None:
    others = open_segments(args.rival_data, set(references), [], stale=args.stale_labels, wanted=compared.input)
    if same := {s.name for s in others} & {s.name for s in segments}:
      raise UserError(
        f"--rival-data {args.rival_data} has segments that are evaluated, as {sorted(same)[0]}; give the labels of the "
        "training routes"
      )
    for r in references:
      rivals[r] = pool_maps(list(learn_maps(check_label(others, r, args.rival_data), r, compared).values()))
  compared.left_out.clear()  # of what was only looked at
  run = Evaluation(students, segments, truth, list(args.teacher), rivals, compared)
  run.run()
  results = {
    "data": str(args.data),
    "frames": run.frames,
    "every": max((int(s.frames.meta["every"]) for s in segments), default=1),
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
    "runner": ", ".join(dict.fromkeys(r.what for s in students for r in s.runners.values())),
    "threads": args.threads,
    "machine": f"{platform.system()} {platform.machine()}, {cpu_name()}, Python {platform.python_version()}",
    **run.results(),
  }
  if not results["tables"]:
    why = "; ".join(report.left_out(results)) or "no frame has labels of what the bundles put out"
    raise UserError(f"{args.data}: nothing could be compared: {why}")
  # the page may be shown around: the names of drives stay in the JSON, in this order
  shown = {
    **results,
    "segments": [{**s, "name": f"segment {n}"} for n, s in enumerate(results["segments"], 1)],
    "data": public_path(args.data),
    "rival_data": public_path(args.rival_data) if args.rival_data else results["rival_data"],
  }
  page = report.page(shown, run.worst, compared)
  with atomic_path(args.output / "evaluation.html") as tmp:
    tmp.write_text(page)
  with atomic_path(args.output / "evaluation.json") as tmp:
    tmp.write_text(json.dumps(results, indent=1) + "\n")
  save(args, args.output)
  return results


def main() -> None:
  args = parse(Options, __doc__, "evaluate")
  results = evaluate(args)
  print(report.summary(results))
  for line in report.left_out(results):
    print(line)
  print(
    f"{args.output / 'evaluation.html'} and evaluation.json: {results['frames']} frames of {len(results['segments'])} "
    "segments"
  )


if __name__ == "__main__":
  raise SystemExit(cli(main, (BundleError,))())

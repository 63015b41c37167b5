#!/usr/bin/env python3
"""Makes a bundle smaller and faster for a processor: its graphs in 8 bits, calibrated and chosen on some routes of a
label store, judged on the others. A page that decides, and JSON.

The bundle keeps its float graphs; the 8-bit ones are variants beside them, of which each processor takes its own."""

import platform
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


from openpilot.selfdrive.modeld.fair.bundle import Bundle, BundleError, given_or_shipped, load_bundle
from openpilot.selfdrive.modeld.fair.cpu import targets
from openpilot.selfdrive.modeld.fair.ort import ort
from openpilot.tools.fair.evaluation.compared import Compared, classes_said, input_of, set_of
from openpilot.tools.fair.evaluation.evaluate import check_tasks
from openpilot.tools.fair.evaluation.groups import load_groups
from openpilot.tools.fair.evaluation.scenes import Segment, check_label, open_segments
from openpilot.tools.fair.optimize import formats, report
from openpilot.tools.fair.optimize.calibration import Parts, blocks, check_apart, record, split
from openpilot.tools.fair.optimize.judge import BEYOND, FLOAT, UNDECIDED, WITHIN, judge
from openpilot.tools.fair.optimize.learned import Learned, learned, learned_by_itself
from openpilot.tools.fair.optimize.measure import milliseconds, sizes, static_cost
from openpilot.tools.fair.optimize.quantize import PERCENTILE, TARGETS
from openpilot.tools.fair.optimize.search import Graphs, Rung, search
from openpilot.tools.fair.optimize.told import column, described, recommend, sources_told, told, tried, verdicts
from openpilot.tools.fair.optimize.variants import ONNX, Variant, by_itself, write
from openpilot.tools.lib.errors import UserError, above_zero, cli, warn
from openpilot.tools.lib.files import atomic_path, write_json
from openpilot.tools.lib.options import option, parse, save
from openpilot.tools.lib.said import public_path
from openpilot.tools.replay.report import cpu_name

MOST = 3000  # frames that calibrate and judge, unless --limit says otherwise
PICTURES = "labeled"  # of a COCO JSON's labels in the store


@dataclass(frozen=True)
class Options:
  bundle: Path = option(
    positional=True, path=True, help="a folder with a manifest.json, or a name in models/; or a finished run of distill"
  )
  data: Path = option(
    help="a label store of routes that the student was not trained on; or a COCO JSON, a YOLO or DOTA folder"
  )
  output: Path = option(aliases=("--out",), help="folder of the page, its JSON, and the bundle with its variants")
  int8: bool = option(False, help="8 bits, for what --target says")
  fp16: bool = option(False, help="computation in half precision, for TensorRT; a CPU casts, and gains nothing by it")
  format: tuple[str, ...] = option(
    ("onnx",), nargs="+", metavar=",".join(formats.FORMATS), help="what is made; tflite in an environment of its own"
  )
  target: tuple[str, ...] = option((), choices=tuple(TARGETS), help="may be repeated; default: this processor")
  max_loss: float = option(
    0.01, parse=above_zero, help="what each metric may lose, in parts of it; recalls half of it, in points"
  )
  calibration: Path | None = option(
    None, metavar="STORE", help="labels to calibrate and choose by; default: each third route of --data"
  )
  frames: int = option(48, help="that ranges are taken from")
  limit: int | None = option(
    None, metavar="N", help=f"judge and choose by at most so many frames of each segment; default: {MOST} of all"
  )
  truth: str | None = option(None, metavar="TEACHER", help="whose labels judge; default: 'simulator' where it is there")
  images: Path | None = option(None, help="of a COCO JSON: the pictures' folder, where it is not beside")
  classes: str | None = option(
    None, metavar="FILE.yaml or a,b,c", path=True, help="the classes that are compared; default: the bundle's own"
  )
  ignore_classes: bool = option(False, help="leave out labels of unknown classes; by default they are an error")
  stale_labels: bool = option(False, help="use labels made by outdated rules")
  rounds: int = option(100, help="in which variants are timed, in turns")
  qat: Path | None = option(
    None, metavar="RUN", help="8 bits as a run of `distill --qat` learned them, --init of the same student"
  )
  comma_four: bool = option(False, help="compile for a comma four, too: kernels and bytes; minutes")
  apply: bool = option(False, help="put the variants that are within what they may lose into the bundle itself")
  undecided: bool = option(False, help="with --apply: also those of which the routes that judge are too few to tell")
  prune: float | None = option(
    None, metavar="SHARE", help="remove this share of the multiply-adds, as .4: --output is a run for `distill --init`"
  )
  prune_macs: float | None = option(None, metavar="MILLIONS", help="the same, until so many are left")
  prune_ms: float | None = option(
    None, parse=above_zero, metavar="MS", help="the same, until a frame takes so long here, on one thread"
  )
  accept_license: tuple[str, ...] = option(
    (),
    aliases=("--accept-licence",),
    metavar="LICENSE",
    help="of a run, or of labels to prune by: of teachers whose license restricts what learns from them",
  )


@dataclass
class Data:
  parts: Parts
  truth: str
  compared: Compared
  public: str


def open_bundle(args: Options) -> Bundle:
  """The bundle, or a run's, exported first. Raises UserError, BundleError."""
  if (args.bundle / "best.pt").is_file():
    from openpilot.tools.fair.bundle import export

    if args.qat is None and args.int8 and learned_by_itself(args.bundle):
      raise UserError(f"{args.bundle} learned in 8 bits; give what it started from, and this one as --qat")
    out = args.output / (args.bundle.resolve().name.lower() or "run")
    export.run(export.Options(run=args.bundle, output=out, tinygrad=False, accept_license=args.accept_license))
    return load_bundle(out)
  return load_bundle(given_or_shipped(args.bundle))


def store_of(args: Options, compared: Compared, oriented: bool) -> Path:
  """The label store; of labeled pictures one is made, of oriented boxes where the bundle says those. Raises
  UserError."""
  if (args.data / "store.json").is_file():
    return args.data
  if not args.data.exists():
    raise UserError(f"--data {args.data}: there is no such file or folder; give a label store, or a COCO JSON")
  from openpilot.tools.fair.images.oriented import orient
  from openpilot.tools.fair.images.store import named, open_labeled
  from openpilot.tools.fair.labels.import_labels import import_parts
  from openpilot.tools.fair.labels.store import LabelStore

  parts = open_labeled(args.data, args.images, "")
  parts = orient(parts) if oriented else parts
  store = LabelStore(args.output / "labels", create=True)
  import_parts(store, named(parts, PICTURES), PICTURES, compared.input)
  return store.root


def open_data(args: Options, bundle: Bundle) -> Data:
  """Raises UserError where the data, or what calibrates, is of another picture or of other classes, or cannot be
  parted."""
  classes = set_of([bundle]) if args.classes is None else classes_said(args.classes)
  compared = Compared(classes, input_of([bundle]), args.ignore_classes)
  heads = {out.get("head") for g in bundle.graphs for out in g["outputs"]}
  root = store_of(args, compared, "oriented" in heads)

  def opened(store: Path) -> tuple[list[Segment], str]:
    wanted = {args.truth or "simulator", PICTURES}
    segments = open_segments(store, wanted, [], None, args.limit, args.stale_labels, compared.input)
    if args.limit is None and (count := sum(len(s.ids) for s in segments)) > MOST:
      limit = max(1, MOST // len(segments))
      print(f"{store}: of {count} frames the first {limit} of each segment are used; --limit takes more")
      segments = open_segments(store, wanted, [], None, limit, args.stale_labels, compared.input)
    there = {t for s in segments for t in s.groups} - {"frames"}
    truth = args.truth or next((t for t in ("simulator", PICTURES) if t in there), None)
    if truth is None:
      raise UserError(f"{store}: name who judges with --truth; there are {', '.join(sorted(there)) or 'no labels'}")
    found = check_label(segments, truth, store)
    check_tasks([], found, [truth], replace(compared, left_out={}), store)  # the classes that both must know
    return (blocks(found) if all(s.sizes is not None for s in found) else found), truth

  segments, truth = opened(root)
  if args.calibration is None:
    parts = split(segments)
  else:
    parts = Parts(opened(args.calibration)[0], segments)
    check_apart(parts, f"--calibration {args.calibration}")
  return Data(parts, truth, compared, public_path(str(args.data)))


@dataclass
class Wanted:
  """targets: in 8 bits, of ONNX. half: TensorRT's graph in float16, asked for, or since 8 bits are not."""

  targets: tuple[str, ...]
  half: bool
  tflite: bool
  engines: bool


def check(args: Options) -> Wanted:
  """Raises UserError."""
  said = formats.formats_said(args.format)
  engine = "tensorrt" in (*said, *args.target)
  if args.fp16 and args.int8 and engine:
    raise UserError("TensorRT takes one of a bundle's graphs: --fp16 or --int8, the other in a command of its own")
  half = args.fp16 or (not args.int8 and engine)
  if not (args.int8 or half or "tflite" in said):
    raise UserError("nothing to do; say --int8, --fp16, --prune, or --format tflite or tensorrt")
  if min(args.frames, args.rounds, 1 if args.limit is None else args.limit) < 1:
    raise UserError("--frames, --rounds and --limit are at least 1")
  formats.check(said)
  made: tuple[str, ...] = ()
  if args.qat is not None and not args.int8:
    raise UserError("--qat says how 8 bits are made; add --int8")
  if args.undecided and not args.apply:
    raise UserError("--undecided says what --apply takes; add that")
  if args.int8 and "onnx" in said:
    made = args.target or targets()[:1]
    if not made:
      raise UserError(f"this processor ({platform.machine()}) has no 8-bit form of its own; name one with --target")
  if args.int8 and "tensorrt" in said:
    made = (*made, "tensorrt")
  return Wanted(tuple(dict.fromkeys(made)), half, "tflite" in said, "tensorrt" in said)


def run(args: Options) -> dict[str, Any]:
  """-> what is in the JSON. Raises UserError, BundleError."""
  if any(x is not None for x in (args.prune, args.prune_macs, args.prune_ms)):
    from openpilot.tools.fair.optimize.prune import prune

    return prune(args)
  load_groups()
  wanted = check(args)
  base = open_bundle(args)
  with tempfile.TemporaryDirectory() as tmp:
    floats = by_itself(base, {g["name"]: base.onnx(g) for g in base.graphs}, Path(tmp) / "float")
    taught = learned(args.qat, floats, wanted.targets, args.accept_license) if args.qat is not None else None
    data = open_data(args, floats)
    inputs = record(floats, data.parts.calibration, data.compared, args.frames)
    calibration = calibration_of(data, inputs, taught)
    rungs: dict[str, list[Rung]] = {}
    made = None
    if wanted.tflite:
      judging = record(floats, data.parts.judged, data.compared, formats.JUDGED)
      made, *more = formats.to_tflite(base, inputs, judging, calibration if args.int8 else None)
      if args.int8:
        parts = data.parts.calibration, data.truth, data.compared, args.max_loss
        made, rungs[formats.convert.INT8] = formats.chosen([made, *more], floats, *parts)
    variants: list[Variant] = [formats.to_half(base, inputs)] if wanted.half else []
    bundles = {FLOAT: floats} | {v.label: by_itself(floats, v.said, Path(tmp) / "judged") for v in variants}
    timed = {v.label: by_itself(floats, v.files, Path(tmp) / "half") for v in variants}
    graphs = Graphs(floats, inputs, taught)
    for t in wanted.targets:
      found, rungs[t] = search(graphs, floats, t, data.parts.calibration, data.truth, data.compared, args.max_loss)
      bundles[found.label] = by_itself(floats, found.files, Path(tmp) / t)
      variants.append(found)
    runners: dict[str, str] = {}
    if made is not None:
      lite = formats.put(floats, made, Path(tmp) / "tflite", args.data)
      for v in made.variants():
        variants.append(v)
        runners[v.label], timed[v.label] = v.runner, lite
        if v.precision == "int8":  # the other is float, equal to rounding
          bundles[v.label] = lite
    rows = {}
    if len(bundles) > 1:
      rows = judge(bundles, data.parts.judged, data.truth, data.compared, args.max_loss, runners=runners)
    some = {name: x[:8] for name, x in inputs.items()}
    timed = bundles | timed
    ms = {n: milliseconds(timed, some, args.rounds, n, FLOAT, runners) for n in (1, 2)}
    best, why = recommend(variants, rows, ms[1])
    whole = sizes(floats)
    results: dict[str, Any] = {
      "bundle": base.name,
      "bundle_sha256": base.manifest_hash,
      "data": str(args.data),
      "truth": data.truth,
      "max_loss": args.max_loss,
      "calibration": {**described(data.parts.calibration), "taken": len(next(iter(inputs.values())))},
      "judged": described(data.parts.judged),
      "machine": f"{platform.system()} {platform.machine()}, {cpu_name()}, ONNX Runtime {ort.__version__}",
      "targets_here": list(targets()),
      "disturbs": {t: sources_told(graphs, t, rungs[t][0].rows) for t in wanted.targets},
      "search": {t: tried(r) for t, r in rungs.items()},
      "variants": [
        {**column(FLOAT, ms, floats), **whole, "precision": "float32", "target": "", "here": True},
        *(
          {**whole, **column(v.label, ms, timed[v.label], v.runner), **told(v, graphs, rows.get(v.label))}
          for v in variants
        ),
      ],
      "recommendation": {"variant": best, "why": why, "rule": report.RULE},
      **({"formats": made.told} if made is not None else {}),
      **({"comma_four": static_cost(floats)} if args.comma_four else {}),
    }
    judged = verdicts(variants, rows)
    fit = [v for v in variants if judged[v.label] != BEYOND]
    places = {args.output / base.name: fit}
    if args.apply:
      places[base.path] = [v for v in fit if args.undecided or judged[v.label] == WITHIN]
    results["applied"] = keep(args, base, places, results, data.public, calibration, taught)
    if made is not None:
      said = {v["label"]: report.in_short(v) for v in results["variants"]}
      for place, here in places.items():
        mine = made.only([v.label for v in here])
        if mine.told:
          formats.put(load_bundle(place) if any(v.run for v in here) else base, mine, place, args.data, said)
          results["applied"] += [t["target"] for t in mine.told] if place == base.path else []
      print("\n".join(formats.lines(made)))
    if wanted.engines and any(v.target == "tensorrt" for v in fit):
      print("wrote       ", *formats.engines(load_bundle(args.output / base.name), args.output))
  write_json(args.output / "optimize.json", results)
  with atomic_path(args.output / "optimize.html") as path:
    path.write_text(report.page({**results, "data": data.public}))
  save(replace(args, apply=False), args.output)
  print(report.summary(results))
  print(f"wrote        {args.output / 'optimize.html'}, optimize.json")
  missed = {what: [v for v in results["variants"][1:] if v.get("verdict") == what] for what in (BEYOND, UNDECIDED)}
  if missed[BEYOND]:
    near = "; ".join(f"{v['label']}: {v['worst']}" for v in missed[BEYOND])
    raise UserError(f"--max-loss {args.max_loss:g} is not met: {near}; the page says what disturbs")
  if missed[UNDECIDED]:
    few = "; ".join(report.undecided(v, results) for v in missed[UNDECIDED])
    if args.apply and not args.undecided:
      raise UserError(f"{few}; judge by more routes, or --apply --undecided takes it as it is")
    warn(few)
  return results


def calibration_of(data: Data, inputs: dict[str, list[dict[str, Any]]], taught: Learned | None) -> dict[str, Any]:
  """For the manifest."""
  segments, frames = data.parts.calibration, len(next(iter(inputs.values())))
  method = f"percentile {PERCENTILE}, of each channel, biases shifted" if taught is None else taught.method
  return {"data": data.public, "frames": frames, "segments": len(segments), "method": method}


def keep(
  args: Options,
  base: Bundle,
  places: dict[Path, list[Variant]],
  results: dict[str, Any],
  public: str,
  calibration: dict[str, Any],
  taught: Learned | None,
) -> list[str]:
  """Writes into each bundle its variants, into a copy first; those of other programs as files. -> what was applied."""
  args.output.mkdir(parents=True, exist_ok=True)
  for v in next(iter(places.values())):
    for g in base.graphs if not v.run and v.runner == ONNX else ():
      with atomic_path(args.output / v.file(g)) as path:
        path.write_bytes(v.files[g["name"]])
  names: list[str] = []
  for place, here in places.items():
    kept = [v for v in here if v.run]
    names = [v.label for v in kept]
    said = report.card([v for v in results["variants"] if v["label"] in names], results, public)
    by = taught if any(v.precision == "int8" for v in kept) else None
    if kept:
      write(base, kept, calibration, said, place, args.data, by)
      print(f"wrote        {place}: {', '.join(names)}")
  return names if args.apply else []


def main() -> None:
  run(parse(Options, __doc__, "optimize"))


if __name__ == "__main__":
  raise SystemExit(cli(main, (BundleError,))())

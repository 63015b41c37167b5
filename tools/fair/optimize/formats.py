"""A bundle's graphs as TFLite files and TensorRT engines: what `op optimize --format` makes beside the ONNX files."""

import copy
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openpilot.selfdrive.modeld.fair.artifact import ArtifactError, folder_of, read_sidecar, stem
from openpilot.selfdrive.modeld.fair.bundle import MANIFEST, Bundle, load_bundle, write_manifest
from openpilot.selfdrive.modeld.fair.runners import tensorrt
from openpilot.tools.fair.bundle.replace import CARD, new_bundle
from openpilot.tools.fair.evaluation.compared import Compared
from openpilot.tools.fair.evaluation.scenes import Segment
from openpilot.tools.fair.optimize.half import ROOM, emulated, half, outside, overflowing
from openpilot.tools.fair.optimize.judge import FLOAT, Cards, judge, most_shown
from openpilot.tools.fair.optimize.quantize import last_layers, prepare
from openpilot.tools.fair.optimize.search import Rung
from openpilot.tools.fair.optimize.variants import Variant
from openpilot.tools.fair.students.student import student_names
from openpilot.tools.fair.tflite import convert, environment
from openpilot.tools.lib import python
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import read_json, write_json

FORMATS = ("onnx", "tensorrt", "tflite")
FIRST = [0, 3, 6, 9, 15]  # layers that stay float, from the picture on: the fewest that lose little
ENOUGH = 0.5  # of what a metric may lose, on the routes that choose: these layers cost little, and others judge
JUDGED = 16  # frames of the routes that judge, at which a TFLite file is compared with the student
METHOD = "moving average of the least and the largest value, weights of each channel, biases shifted"
OVER = f"its values at frames that calibrate, times {ROOM:g}, are beyond float16"
HEADING = "\n## As TFLite\n"
Inputs = dict[str, list[dict[str, Any]]]


def formats_said(words: tuple[str, ...]) -> tuple[str, ...]:
  """Of --format, separated by commas or not. Raises UserError."""
  found = tuple(dict.fromkeys(w for word in words for w in word.split(",") if w))
  if odd := [w for w in found if w not in FORMATS]:
    raise UserError(f"--format {odd[0]}: there are {', '.join(FORMATS)}")
  return found


def check(formats: tuple[str, ...]) -> None:
  """Before any work is done. Raises UserError where a format cannot be made here."""
  if "tensorrt" in formats and (why := tensorrt.missing()) is not None:
    raise UserError(
      f"--format tensorrt cannot be made here: {why}; --target tensorrt writes the graph that the GPU's machine builds "
      "by `op compile BUNDLE --target tensorrt`"
    )
  if "tflite" in formats:
    try:
      import ai_edge_litert.interpreter  # noqa: F401
    except ImportError:
      raise UserError("--format tflite: LiteRT judges and times the files; pip install -e '.[tflite]'") from None


@dataclass
class Made:
  """files: by name. entries: graph -> its variants in the manifest. told: what the JSON and the page say."""

  files: dict[str, bytes] = field(default_factory=dict)
  entries: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
  told: list[dict[str, Any]] = field(default_factory=list)

  def add(self, graph: str, one: dict[str, Any], blob: bytes, calibration: dict[str, Any] | None, frames: int) -> None:
    """one: of the converter's forms."""
    row: dict[str, Any] = {k: one[k] for k in ("target", "file", "precision")}
    if one["precision"] == "int8":
      left = [{"why": why, "nodes": [short(n) for n in nodes]} for why, nodes in one["float"].items()]
      said = {**(calibration or {}), "method": METHOD}
      row |= {"activations": "int8", "weight_bits": 8, "calibration": said, "float": left}
    self.files[one["file"]] = blob
    self.entries.setdefault(graph, []).append(row)
    self.told.append({"graph": graph, "frames": frames, **one})

  def variants(self) -> list[Variant]:
    """One for each target."""
    out: dict[str, Variant] = {}
    for name, rows in self.entries.items():
      for row in rows:
        v = out.setdefault(
          row["target"], Variant(row["target"], row["precision"], row["target"], {}, runner=row["target"])
        )
        v.files[name] = self.files[row["file"]]
        v.left[name] = {x["why"]: x["nodes"] for x in row.get("float", [])}
    return list(out.values())

  def only(self, targets: Collection[str]) -> "Made":
    """What is of these."""
    entries = {name: [r for r in rows if r["target"] in targets] for name, rows in self.entries.items()}
    files = {r["file"]: self.files[r["file"]] for rows in entries.values() for r in rows}
    return Made(files, entries, [t for t in self.told if t["target"] in targets])


def short(node: str) -> str:
  """What TFLite's converter calls a node, without the modules that it lies in."""
  return node.rstrip(";").rpartition("/")[2].rpartition(".")[2][:100]


def to_tflite(bundle: Bundle, calibrating: Inputs, judging: Inputs, calibration: dict[str, Any] | None) -> list[Made]:
  """calibrating, judging: what goes into each graph at some frames. calibration: what the manifest says of it; None: no
  file in 8 bits. -> one for each of FIRST. Raises UserError where a graph is none of our students, or has an operator
  that TFLite lacks."""
  for graph in bundle.graphs:
    if graph["name"] not in student_names():
      raise UserError(
        f"--format tflite: {bundle.path}: its graph '{graph['name']}' is none of our students; TFLite is made of these"
      )
  first = [] if calibration is None else FIRST
  rungs = [Made() for _ in first or [0]]
  for graph in bundle.graphs:
    name = graph["name"]
    with tempfile.TemporaryDirectory() as tmp:
      folder = Path(tmp)
      job = {"bundle": str(bundle.path.resolve()), "graph": name, "first": first}
      write_json(folder / convert.JOB, {**job, "calibrate": len(calibrating[name])})
      convert.write_frames(folder, [*calibrating[name], *judging[name]])
      words = environment.command("-m", "openpilot.tools.fair.tflite.convert", folder)
      print(f"{bundle.name}, {name}: as TFLite, some minutes", flush=True)
      done = subprocess.run(words, env=python.environment(), stderr=subprocess.PIPE, text=True)
      said = read_json(folder / convert.SAID) if (folder / convert.SAID).is_file() else {}
      if done.returncode or "error" in said:
        raise UserError(f"--format tflite: {said.get('error') or python.why_failed(done)}")
      whole, *eight = said["forms"]
      for n, made in enumerate(rungs):
        for one in (whole, *eight[n : n + 1]):
          made.add(name, one, (folder / one["path"]).read_bytes(), calibration, said["frames"])
  return rungs


def chosen(
  rungs: list[Made], base: Bundle, segments: list[Segment], truth: str, compared: Compared, max_loss: float
) -> tuple[Made, list[Rung]]:
  """The one with the fewest float layers of which no metric is shown to lose more than ENOUGH on these segments, or the
  one that comes nearest; and all that were tried."""
  cards: Cards = {}
  tried: list[Rung] = []
  for n, made in enumerate(rungs):
    column = f"{convert.INT8} {n}"
    back = frozenset((t["graph"], node) for t in made.told for node in t["float"].get(convert.FIRST, []))
    with tempfile.TemporaryDirectory() as tmp:
      bundles = {FLOAT: base, column: put(base, made, Path(tmp) / "bundle", base.path)}
      runners = {column: convert.INT8}
      rows = judge(bundles, segments, truth, compared, max_loss, known=cards, runners=runners)[column]
    tried.append(Rung(f"the first {FIRST[n]} layers in float", back, rows))
    if most_shown(rows) <= ENOUGH:
      break
  best = min(range(len(tried)), key=lambda n: (max(ENOUGH, most_shown(tried[n].rows)), n))
  return rungs[best], tried


def to_half(base: Bundle, inputs: Inputs | None = None) -> Variant:
  """For TensorRT: its networks have the types of the graph. inputs: of each graph, at frames that calibrate: what
  overflows there stays float."""
  files, judged, left = {}, {}, {}
  for graph in base.graphs:
    name, model = graph["name"], prepare(base.onnx(graph))
    mine = outside(model, last_layers(model))
    leave = [n for nodes in mine.values() for n in nodes]
    over = overflowing(model, leave, inputs[name]) if inputs is not None else {}
    leave += over
    left[name] = mine | ({OVER: [f"{n} ({v:.3g})" for n, v in over.items()]} if over else {})
    files[name], judged[name] = half(model, leave), emulated(model, leave)
  return Variant("float16 tensorrt", "float16", "tensorrt", files, left, judged)


def lines(made: Made) -> list[str]:
  """For the terminal."""
  out = []
  for t in made.told:
    worst = max(t["outputs"], key=lambda k: t["outputs"][k]["max"])
    o = t["outputs"][worst]
    out.append(
      f"{t['file']:<28} {t['bytes'] / 1e6:>5.2f} MB; off from the float student at "
      f"{t['frames']} frames by {o['max']:.1e} at most, {o['mean']:.1e} on average, in {worst}"
    )
  return out


def put(base: Bundle, made: Made, out: Path, away: Path, said: Mapping[str, str] | None = None) -> Bundle:
  """The bundle at `out`, with these files as its variants for the same targets. away: a folder that must not be lost.
  said: target -> for the card. Raises UserError as new_bundle() does."""
  manifest = copy.deepcopy(base.manifest)
  targets = {e["target"] for rows in made.entries.values() for e in rows}
  former = {v["file"] for g in manifest["graphs"] for v in g.get("variants", []) if v["target"] in targets}
  with new_bundle(out, away) as folder:
    for name in base.manifest["sha256"]:
      if name not in former and name != MANIFEST:
        shutil.copyfile(base.path / name, folder / name)
    for name, blob in made.files.items():
      (folder / name).write_bytes(blob)
    for graph in manifest["graphs"]:
      kept = [v for v in graph.get("variants", []) if v["target"] not in targets]
      graph["variants"] = [*kept, *made.entries[graph["name"]]]
    if (card := folder / CARD).exists():
      text = card.read_text().partition(HEADING)[0].rstrip("\n")
      more = {target: f"; {words}" for target, words in (said or {}).items()}
      rows = "\n".join(
        f"- `{t['file']}`: {t['precision']}, {t['bytes'] / 1e6:.2f} MB{more.get(t['target'], '')}" for t in made.told
      )
      card.write_text(f"{text}\n{HEADING}\nWhat runs them: `--runner tflite`, `--runner tflite-int8`.\n\n{rows}\n")
    write_manifest(folder, manifest)
  return load_bundle(out)


def engines(bundle: Bundle, out: Path) -> list[Path]:
  """Builds each graph's TensorRT engine where this machine keeps its own, and copies plan and sidecar, which says GPU
  and version, to `out`. Raises UserError."""
  written = []
  for graph in bundle.graphs:
    try:
      tensorrt.build_engine(bundle, graph)
      folder, name = folder_of(bundle), stem(graph["name"], tensorrt.TARGET)
      files = [f"{name}.json", *read_sidecar(folder, name)["files"]]
    except ArtifactError as e:
      raise UserError(f"--format tensorrt: {e}") from None
    written += [Path(shutil.copyfile(folder / f, out / f)) for f in files]
  return written

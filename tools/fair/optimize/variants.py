"""Graphs of a bundle in other forms: as bundles of their own to be judged, and as variants of the one that is run."""

import copy
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openpilot.selfdrive.modeld.fair.bundle import MANIFEST, Bundle, load_bundle, write_manifest
from openpilot.selfdrive.modeld.fair.cpu import TARGETS as ON_CPU, targets
from openpilot.tools.fair.bundle.replace import CARD, new_bundle
from openpilot.tools.fair.optimize.learned import Learned
from openpilot.tools.fair.optimize.quantize import TARGETS

ONNX = "onnx"  # the runner of all that is no TFLite
RUN = (*ON_CPU, "tensorrt")  # targets whose variants lie in a bundle: ONNX Runtime's, and what an engine is built of
INT8, HALF = "\n## In 8 bits\n", "\n## In float16\n"  # of the card


@dataclass
class Variant:
  """One form of all graphs of a bundle. files: graph -> its ONNX file. left: graph -> reason -> nodes that stay
  float. judged: files that say here what those say where they run; without it they do so themselves. runner: that runs
  it here."""

  label: str
  precision: str
  target: str
  files: dict[str, bytes]
  left: dict[str, dict[str, list[str]]] = field(default_factory=dict)
  judged: dict[str, bytes] | None = None
  runner: str = ONNX

  @property
  def said(self) -> dict[str, bytes]:
    return self.files if self.judged is None else self.judged

  @property
  def here(self) -> bool:
    """Whether its milliseconds here say something of its target: it is this processor's, float, or LiteRT's."""
    return self.runner != ONNX or self.target in ("", *targets())

  @property
  def run(self) -> bool:
    return self.target in RUN

  def file(self, graph: dict[str, Any]) -> str:
    return f"{graph['name']}.{self.precision}-{self.target}.onnx"


def by_itself(base: Bundle, files: dict[str, bytes], folder: Path) -> Bundle:
  """The bundle with these graphs in place of its own, and no variants, in a folder."""
  folder.mkdir(parents=True)
  manifest = copy.deepcopy(base.manifest)
  for graph in manifest["graphs"]:
    graph.pop("variants", None)
    graph["file"] = f"{graph['name']}.onnx"
    (folder / graph["file"]).write_bytes(files[graph["name"]])
  return write_manifest(folder, manifest)


def entry(variant: Variant, graph: dict[str, Any], calibration: dict[str, Any]) -> dict[str, Any]:
  """Of the manifest."""
  target = TARGETS[variant.target]
  left = [{"why": why, "nodes": nodes} for why, nodes in variant.left[graph["name"]].items() if nodes]
  said = {"target": variant.target, "file": variant.file(graph), "precision": variant.precision, "float": left}
  if variant.precision != "int8":
    return said
  return {
    **said,
    "activations": target.activations,
    "weight_bits": 7 if target.narrow else 8,
    "calibration": calibration,
  }


def write(
  base: Bundle,
  chosen: list[Variant],
  calibration: dict[str, Any],
  said: str,
  out: Path,
  away: Path,
  learned: Learned | None = None,
) -> Bundle:
  """The bundle with the chosen variants, in place of those that it had, at `out`. said: of them, for the card. away: a
  folder that must not be lost. learned: what those of 8 bits are of. Raises UserError as new_bundle() does."""
  manifest = copy.deepcopy(base.manifest)
  if learned is not None:
    learned.join(manifest)
  former = {v["file"] for g in manifest["graphs"] for v in g.get("variants", [])}
  with new_bundle(out, away) as folder:
    for name in base.manifest["sha256"]:
      if name not in former and name != MANIFEST:
        shutil.copyfile(base.path / name, folder / name)
    for graph in manifest["graphs"]:
      graph["variants"] = [entry(v, graph, calibration) for v in chosen]
      for v in chosen:
        (folder / v.file(graph)).write_bytes(v.files[graph["name"]])
    card = folder / CARD
    if card.exists():
      heading = INT8 if any(v.precision == "int8" for v in chosen) else HALF
      text = card.read_text().partition(INT8)[0].partition(HALF)[0].rstrip("\n")
      card.write_text(f"{text}\n{heading}\n{said.strip()}\n")
    write_manifest(folder, manifest)
  return load_bundle(out)

"""Which layers stay float: those that cost most for what they save go back first, as many as a task's own metrics ask
for. Chosen by calibration frames; the report judges by others."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openpilot.selfdrive.modeld.fair.bundle import Bundle
from openpilot.tools.fair.evaluation.compared import Compared
from openpilot.tools.fair.evaluation.scenes import Segment
from openpilot.tools.fair.optimize.judge import FLOAT, Row, judge, worst
from openpilot.tools.fair.optimize.quantize import (
  LAYERS,
  NEVER,
  Calibrated,
  calibrate,
  last_layers,
  prepare,
  quantize,
  trunk,
  Target,
  TARGETS,
)
from openpilot.tools.fair.optimize.sensitivity import Layer, errors, run_all, sensitivity
from openpilot.tools.fair.optimize.variants import Variant, by_itself
from openpilot.tools.lib.errors import UserError

LADDER = (0.0, 0.1, 0.25, 0.5)  # shares of the layers that go back to float
LOOKED_AT = 6  # frames by which layers are compared
LAST = "a last layer: what it says is the answer itself"
PRICE = "costs more than it saves in 8 bits"


@dataclass
class Rung:
  """back: layers that went back to float, with why. rows: its metrics on the calibration frames."""

  label: str
  back: list[tuple[str, Layer]]
  rows: list[Row] = field(default_factory=list)


class Graphs:
  """The graphs of a bundle, prepared, with what goes into them: calibrated once for each kind of activation."""

  def __init__(self, base: Bundle, inputs: dict[str, list[dict[str, Any]]]):
    self.base, self.inputs = base, inputs
    self.models = {g["name"]: prepare(base.onnx(g)) for g in base.graphs}
    self.last = {name: last_layers(m) for name, m in self.models.items()}
    self.ranges: dict[tuple[str, bool], Calibrated] = {}
    self.ranked: dict[tuple[str, bool, bool], list[tuple[str, Layer]]] = {}
    if not any(self.layers(name) for name in self.models):
      raise UserError(
        f"{base.path}: no graph has a layer that 8 bits would make faster: no convolution before the last"
      )

  def layers(self, name: str) -> list[str]:
    """That may be quantized."""
    nodes, last = set(trunk(self.models[name])), set(self.last[name])
    return [n.name for n in self.models[name].graph.node if n.op_type in LAYERS and n.name in nodes - last]

  def calibrated(self, name: str, target: Target) -> Calibrated:
    key = name, target.symmetric
    if key not in self.ranges:
      self.ranges[key] = calibrate(self.models[name], self.inputs[name], target.symmetric)
    return self.ranges[key]

  def rank(self, target: Target) -> list[tuple[str, Layer]]:
    """Layers of all graphs, those first that cost most for what they save."""
    kind = target.activations, target.symmetric, target.narrow
    if kind not in self.ranked:
      found = []
      for name in self.models:
        some = self.inputs[name][:: max(1, len(self.inputs[name]) // LOOKED_AT)][:LOOKED_AT]
        layers = sensitivity(self.calibrated(name, target), target, some, self.layers(name))
        found += [(name, layer) for layer in layers]
      self.ranked[kind] = sorted(found, key=lambda x: -x[1].price)
    return self.ranked[kind]

  def make(self, label: str, target: str, back: list[tuple[str, Layer]]) -> Variant:
    files, left = {}, {}
    for name, model in self.models.items():
      mine = [layer.name for graph, layer in back if graph == name]
      calibrated = self.calibrated(name, TARGETS[target])
      files[name] = quantize(calibrated, TARGETS[target], [*self.last[name], *mine])
      rest = [n for n in model.graph.node if n.op_type in NEVER]
      left[name] = {
        LAST: self.last[name],
        PRICE: mine,
        "a product of attention or of coordinates": [n.name for n in rest],
      }
      left[name] = {why: nodes for why, nodes in left[name].items() if nodes}
    return Variant(label, "int8", target, files, left)

  def output_errors(self, variant: Variant) -> dict[str, float]:
    """How far its outputs are from the float graph's, in parts of their standard deviation, at frames that
    calibrate."""
    out: dict[str, float] = {}
    for name, model in self.models.items():
      some = self.inputs[name][:LOOKED_AT]
      out |= errors(run_all(variant.files[name], some), run_all(model.SerializeToString(), some))
    return out


def search(
  graphs: Graphs,
  float_bundle: Bundle,
  target: str,
  segments: list[Segment],
  truth: str,
  compared: Compared,
  max_loss: float,
) -> tuple[Variant, list[Rung]]:
  """The variant with the fewest float layers whose metrics all stay within what they may lose on these segments, or,
  where none does, the one that comes nearest; and all that were tried."""
  ranked = graphs.rank(TARGETS[target])
  tried: list[tuple[Variant, Rung]] = []
  for n in sorted({round(share * len(ranked)) for share in LADDER}):
    rung = Rung(f"{n} of {len(ranked)} layers in float", ranked[:n])
    variant = graphs.make(f"int8 {target}", target, rung.back)
    with tempfile.TemporaryDirectory() as tmp:
      bundles = {FLOAT: float_bundle, variant.label: by_itself(graphs.base, variant.files, Path(tmp) / "bundle")}
      rung.rows = judge(bundles, segments, truth, compared, max_loss, intervals=False)[variant.label]
    tried.append((variant, rung))
    if worst(rung.rows).share <= 1:
      break
  best, _ = min(tried, key=lambda x: worst(x[1].rows).share) if worst(tried[-1][1].rows).share > 1 else tried[-1]
  return best, [rung for _, rung in tried]

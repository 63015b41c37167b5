"""Which layers stay float. Of the tasks that lose more than they may, those layers go back first that disturb their
outputs most for what they save in 8 bits; until all lose little. Chosen by calibration frames; the report judges by
others."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.bundle import Bundle
from openpilot.tools.fair.evaluation.compared import Compared
from openpilot.tools.fair.evaluation.scenes import Segment
from openpilot.tools.fair.optimize.bias import shifts
from openpilot.tools.fair.optimize.judge import FLOAT, Cards, Row, judge, worst
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

RUNGS = 8  # variants that are tried
STEP = (
  0.5,
  0.8,
)  # a rung leaves at least, at most, so much of the variance in the outputs of a task that loses too much
HEADS = {"masks": "objects", "video": "objects", "identity": "objects"}  # of tasks that are judged by another's outputs
LOOKED_AT = 6  # frames by which layers are compared
Found = tuple[str, Layer]  # the graph's name, one of its layers
LAST = "a last layer: what it says is the answer itself"
PRICE = "costs more than it saves in 8 bits"


@dataclass
class Rung:
  """back: layers that went back to float, with why. rows: its metrics on the calibration frames."""

  label: str
  back: list[Found]
  rows: list[Row] = field(default_factory=list)


class Graphs:
  """The graphs of a bundle, prepared, with what goes into them: calibrated once for each kind of activation."""

  def __init__(self, base: Bundle, inputs: dict[str, list[dict[str, Any]]]):
    self.base, self.inputs = base, inputs
    self.models = {g["name"]: prepare(base.onnx(g)) for g in base.graphs}
    self.last = {name: last_layers(m) for name, m in self.models.items()}
    self.ranges: dict[tuple[str, bool], Calibrated] = {}
    self.shifts: dict[tuple[str, bool, bool], dict[str, np.ndarray]] = {}
    self.found: dict[tuple[str, bool, bool], list[Found]] = {}
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

  def shifted(self, name: str, target: Target) -> dict[str, np.ndarray]:
    """What is added to biases, of layers that may be quantized."""
    key = name, target.symmetric, target.narrow
    if key not in self.shifts:
      self.shifts[key] = shifts(self.calibrated(name, target), target, self.inputs[name], self.layers(name))
    return self.shifts[key]

  def sensitivity(self, target: Target) -> list[Found]:
    """Layers of all graphs, in their order there."""
    kind = target.activations, target.symmetric, target.narrow
    if kind not in self.found:
      self.found[kind] = []
      for name in self.models:
        some = self.inputs[name][:: max(1, len(self.inputs[name]) // LOOKED_AT)][:LOOKED_AT]
        shift = self.shifted(name, target)
        layers = sensitivity(self.calibrated(name, target), target, some, self.layers(name), shift)
        self.found[kind] += [(name, layer) for layer in layers]
    return self.found[kind]

  def outputs_of(self, task: str) -> set[str]:
    """Outputs that a task is judged by; all, where none is of its name."""
    said = {o["name"]: o.get("head") for g in self.base.graphs for o in g["outputs"]}
    return {name for name, head in said.items() if head == HEADS.get(task, task)} or set(said)

  def make(self, label: str, target: str, back: list[Found]) -> Variant:
    files, left = {}, {}
    for name, model in self.models.items():
      mine = [layer.name for graph, layer in back if graph == name]
      calibrated, shift = self.calibrated(name, TARGETS[target]), self.shifted(name, TARGETS[target])
      files[name] = quantize(calibrated, TARGETS[target], [*self.last[name], *mine], shift)
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


def variances(layers: list[Found]) -> dict[str, float]:
  """What all of them together do to each output: their errors are as of independent noise."""
  return {
    o: sum(layer.errors.get(o, 0.0) ** 2 for _, layer in layers) for o in {o for _, x in layers for o in x.errors}
  }


def more_float(layers: list[Found], back: list[Found], left: Mapping[str, float]) -> list[Found]:
  """The layers that go back to float, with those that must follow so that of the variance of these outputs at most
  such parts are left: each time the one that takes most of what is too much, for what it saves in 8 bits."""
  back = list(back)
  rest = [x for x in layers if x not in back]
  now = variances(rest)
  allowed = {o: now.get(o, 0.0) * part for o, part in left.items()}
  while rest:
    now = variances(rest)
    over = {o: now[o] - most for o, most in allowed.items() if now.get(o, 0.0) > most}
    if not over:
      break

    def gain(x: Found, over: dict[str, float] = over) -> float:
      return sum(min(1.0, x[1].errors.get(o, 0.0) ** 2 / much) for o, much in over.items()) / x[1].saves

    best = max(rest, key=gain)
    rest.remove(best)
    back.append(best)
  return back


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
  layers = graphs.sensitivity(TARGETS[target])
  tried: list[tuple[Variant, Rung]] = []
  back: list[Found] = []
  cards: Cards = {}
  for n in range(RUNGS):
    rung = Rung(f"{len(back)} of {len(layers)} layers in float", back)
    variant = graphs.make(f"int8 {target}", target, back)
    with tempfile.TemporaryDirectory() as tmp:
      column = f"{variant.label} {n}"
      bundles = {FLOAT: float_bundle, column: by_itself(graphs.base, variant.files, Path(tmp) / "bundle")}
      rung.rows = judge(bundles, segments, truth, compared, max_loss, intervals=False, known=cards)[column]
    tried.append((variant, rung))
    left: dict[str, float] = {}  # of each output's variance, by the task that loses most by it
    for row in rung.rows:
      if row.share > 1:
        part = min(max(1 / row.share, STEP[0]), STEP[1])
        left |= {o: min(part, left.get(o, 1.0)) for o in graphs.outputs_of(row.task)}
    if not left or len(back) == len(layers):
      break
    back = more_float(layers, back, left)
  if worst(tried[-1][1].rows).share <= 1:
    best = tried[-1][0]
  else:
    best = min(tried, key=lambda x: worst(x[1].rows).share)[0]
  return best, [rung for _, rung in tried]

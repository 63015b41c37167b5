"""Which layers stay float: of the tasks that lose more than they may those that disturb their outputs most, for what
they save in 8 bits, until all lose little. Chosen by calibration frames; the report judges by others."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.bundle import Bundle
from openpilot.selfdrive.modeld.fair.runners.tflite import Network
from openpilot.tools.fair.evaluation.compared import Compared
from openpilot.tools.fair.evaluation.scenes import Segment
from openpilot.tools.fair.optimize.bias import shifts
from openpilot.tools.fair.optimize.choose import Back, Found, Net, mine, more_float, not_worth
from openpilot.tools.fair.optimize.learned import Learned
from openpilot.tools.fair.optimize.judge import FLOAT, Cards, Row, judge, most_shown
from openpilot.tools.fair.optimize.quantize import (
  NEVER,
  Calibrated,
  calibrate,
  last_layers,
  prepare,
  quantize,
  Target,
  TARGETS,
)
from openpilot.tools.fair.optimize.sensitivity import errors, run_all, sensitivity
from openpilot.tools.fair.optimize.variants import ONNX, Variant, by_itself
from openpilot.tools.lib.errors import UserError

RUNGS = 8  # variants that are tried
STEP = (
  0.5,
  0.8,
)  # a rung leaves at least, at most, so much of the variance in the outputs of a task that loses too much
HEADS = {"masks": "objects", "video": "objects", "identity": "objects"}  # of tasks that are judged by another's outputs
LOOKED_AT = 6  # frames by which layers are compared
LAST = "a last layer: what it says is the answer itself"
PRICE = "costs more than it saves in 8 bits"
SLOW = "is faster in float, with the ways there and back"


@dataclass
class Rung:
  """back: layers that went back to float. rows: its metrics on the calibration frames."""

  label: str
  back: Back
  rows: list[Row] = field(default_factory=list)


class Graphs:
  """The graphs of a bundle, prepared, with what goes into them: calibrated once for each kind of activation. learned:
  what has learned in 8 bits, in place of the bundle's own graph."""

  def __init__(self, base: Bundle, inputs: dict[str, list[dict[str, Any]]], learned: Learned | None = None):
    self.base, self.inputs, self.learned = base, inputs, learned
    if learned is None:
      self.models = {g["name"]: prepare(base.onnx(g)) for g in base.graphs}
    else:
      self.models = {learned.graph: learned.model}
    self.last = {name: last_layers(m) for name, m in self.models.items()}
    self.nets = {name: Net(m, self.last[name]) for name, m in self.models.items()}
    self.slow_known: Back | None = None
    self.ranges: dict[tuple[str, bool], Calibrated] = {}
    self.shifts: dict[tuple[str, bool, bool], dict[str, np.ndarray]] = {}
    self.found: dict[tuple[str, bool, bool], list[Found]] = {}
    if not any(net.layers for net in self.nets.values()):
      raise UserError(
        f"{base.path}: no graph has a layer that 8 bits would make faster: no convolution before the last"
      )

  def slow(self, target: str) -> Back:
    """Layers that are faster in float, on the processor that this is known of; none where all are: 8 bits are smaller
    all the same."""
    if target != "x86-vnni":
      return frozenset()
    if self.slow_known is None:
      found = not_worth(self.nets)
      self.slow_known = found if len(found) < sum(len(net.layers) for net in self.nets.values()) else frozenset()
    return self.slow_known

  def calibrated(self, name: str, target: Target) -> Calibrated:
    key = name, target.symmetric
    if key not in self.ranges:
      found = calibrate(self.models[name], self.inputs[name], target.symmetric)
      self.ranges[key] = found if self.learned is None else found.with_ranges(self.learned.ranges)
    return self.ranges[key]

  def shifted(self, name: str, target: Target) -> dict[str, np.ndarray]:
    """What is added to biases, of layers that may be quantized: nothing where they were learned so."""
    if self.learned is not None:
      return {}
    key = name, target.symmetric, target.narrow
    if key not in self.shifts:
      self.shifts[key] = shifts(self.calibrated(name, target), target, self.inputs[name], list(self.nets[name].layers))
    return self.shifts[key]

  def sources(self, target: Target) -> list[Found]:
    """Of all graphs what 8 bits disturb, and what that does."""
    kind = target.activations, target.symmetric, target.narrow
    if kind not in self.found:
      self.found[kind] = []
      for name, net in self.nets.items():
        some = self.inputs[name][:: max(1, len(self.inputs[name]) // LOOKED_AT)][:LOOKED_AT]
        found = sensitivity(self.calibrated(name, target), target, some, net.nodes, self.shifted(name, target))
        self.found[kind] += [(name, source) for source in found]
    return self.found[kind]

  def outputs_of(self, task: str) -> set[str]:
    """Outputs that a task is judged by; all, where none is of its name."""
    said = {o["name"]: o.get("head") for g in self.base.graphs for o in g["outputs"]}
    return {name for name, head in said.items() if head == HEADS.get(task, task)} or set(said)

  def make(self, label: str, target: str, back: Back = frozenset()) -> Variant:
    files, left = {}, {}
    slow = self.slow(target)
    for name, model in self.models.items():
      costly, slower = (sorted(mine(x, name)) for x in (back - slow, back & slow))
      calibrated, shift = self.calibrated(name, TARGETS[target]), self.shifted(name, TARGETS[target])
      files[name] = quantize(calibrated, TARGETS[target], [*self.last[name], *costly, *slower], shift)
      rest = [n for n in model.graph.node if n.op_type in NEVER]
      left[name] = {
        LAST: self.last[name],
        PRICE: costly,
        SLOW: slower,
        "a product of attention or of coordinates": [n.name for n in rest],
      }
      left[name] = {why: nodes for why, nodes in left[name].items() if nodes}
    return Variant(label, "int8", target, files, left)

  def output_errors(self, variant: Variant) -> dict[str, float]:
    """How far its outputs are from the float graph's, in parts of their standard deviation, at frames that
    calibrate."""
    out: dict[str, float] = {}
    for graph in self.base.graphs:
      name = graph["name"]
      some = self.inputs[name][:LOOKED_AT]
      want = run_all(self.base.onnx(graph), some)
      if variant.runner == ONNX:
        out |= errors(run_all(variant.said[name], some), want)
      else:
        net = Network(variant.files[name], graph["inputs"], graph["outputs"])
        out |= errors([{k: v.copy() for k, v in net.run(x).items()} for x in some], want)
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
  """The variant with the fewest float layers of which no metric is shown to lose more than it may on these segments,
  or, where there is none, the one that comes nearest; and all that were tried."""
  sources = graphs.sources(TARGETS[target])
  count = sum(len(net.layers) for net in graphs.nets.values())
  tried: list[tuple[Variant, Rung]] = []
  back = graphs.slow(target)
  cards: Cards = {}
  for n in range(RUNGS):
    rung = Rung(f"{len(back)} of {count} layers in float", back)
    variant = graphs.make(f"int8 {target}", target, back)
    with tempfile.TemporaryDirectory() as tmp:
      column = f"{variant.label} {n}"
      bundles = {FLOAT: float_bundle, column: by_itself(graphs.base, variant.files, Path(tmp) / "bundle")}
      rung.rows = judge(bundles, segments, truth, compared, max_loss, known=cards)[column]
    tried.append((variant, rung))
    left: dict[str, float] = {}  # of each output's variance, by the task that loses most by it
    for row in rung.rows:
      if row.shown > 1:
        part = min(max(1 / row.shown, STEP[0]), STEP[1])
        left |= {o: min(part, left.get(o, 1.0)) for o in graphs.outputs_of(row.task)}
    if not left or len(back) == count:
      break
    back = more_float(graphs.nets, sources, back, left)
  best = min(range(len(tried)), key=lambda n: (max(1.0, most_shown(tried[n][1].rows)), n))
  return tried[best][0], [rung for _, rung in tried]

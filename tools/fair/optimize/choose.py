"""Which layers go back to float, for outputs that 8 bits disturb too much. What disturbs is a tensor that is rounded,
and it is so until the last layer that writes or reads it is float: layers go back together, in such groups."""

import math
from collections.abc import Mapping, Sequence

import onnx

from openpilot.tools.fair.optimize.quantize import LAYERS, trunk
from openpilot.tools.fair.optimize.sensitivity import Source, macs_of, rounded_tensors, shapes_of

# multiply-adds that 8 bits save in the time in which one value goes to float or back, its order in memory changed, too:
# measured on x86 with AVX512
MOVED = 100
Found = tuple[str, Source]  # the graph's name, one of its tensors
Back = frozenset[tuple[str, str]]  # of layers in float: the graph's name, its own


class Net:
  """One graph, and which of its tensors are rounded where some layers are float. last: layers that always are."""

  def __init__(self, model: onnx.ModelProto, last: Sequence[str]):
    self.model, self.last = model, last
    self.nodes = set(trunk(model, last))
    self.layers = {name: macs for name, macs in macs_of(model).items() if name in self.nodes}
    self.values = {t: math.prod(shape) for t, shape in shapes_of(model).items()}
    self.touching: dict[str, list[onnx.NodeProto]] = {}
    for n in model.graph.node:
      if n.name in self.nodes:
        for t in {*n.input, *n.output}:
          self.touching.setdefault(t, []).append(n)
    self.known: dict[frozenset[str], set[str]] = {}

  def rounded(self, back: frozenset[str]) -> set[str]:
    if back not in self.known:
      self.known[back] = set(rounded_tensors(self.model, set(trunk(self.model, [*self.last, *back]))))
    return self.known[back]

  def cost(self, back: frozenset[str]) -> int:
    """What 8 bits save no more, in multiply-adds: those of float layers, and the ways to float and back at their edges:
    layers that lie together have fewer."""
    edges = [t for t in self.rounded(back) if back & {n.name for n in self.touching[t]}]
    return sum(self.layers[layer] for layer in back) + MOVED * sum(self.values[t] for t in edges)

  def silencing(self, tensor: str, back: frozenset[str]) -> frozenset[str]:
    """The layers, those in `back` among them, with which in float a tensor is not rounded: its own, or, as far as it
    needs, those beyond sums, activations and the like."""
    tensors, seen = {tensor}, set[str]()
    while tensors - seen:
      seen |= tensors
      nodes = [n for t in tensors for n in self.touching.get(t, [])]
      back |= {n.name for n in nodes if n.op_type in LAYERS}
      if tensor not in self.rounded(back):
        break
      tensors = {t for n in nodes if n.op_type not in LAYERS for t in (*n.input, *n.output) if t in self.touching}
    return back


def variances(sources: Sequence[Found]) -> dict[str, float]:
  """What all of them together do to each output: their errors are as of independent noise."""
  outputs = {o for _, s in sources for o in s.errors}
  return {o: sum(s.errors.get(o, 0.0) ** 2 for _, s in sources) for o in outputs}


def more_float(nets: Mapping[str, Net], sources: Sequence[Found], back: Back, left: Mapping[str, float]) -> Back:
  """back, and the layers that follow so that of the variance of these outputs at most such parts are left: each time
  the group that takes most of what is too much, for what it saves in 8 bits."""

  def loud(there: Back) -> list[Found]:
    mine = {g: net.rounded(frozenset(layer for name, layer in there if name == g)) for g, net in nets.items()}
    return [(g, s) for g, s in sources if s.tensor in mine[g]]

  def cost(there: Back) -> int:
    return sum(net.cost(frozenset(layer for name, layer in there if name == g)) for g, net in nets.items())

  now = variances(loud(back))
  allowed = {o: now.get(o, 0.0) * part for o, part in left.items()}
  while over := {o: now[o] - most for o, most in allowed.items() if now.get(o, 0.0) > most}:
    best, most, paid = back, -1.0, cost(back)
    for g, s in loud(back):
      if not any(s.errors.get(o) for o in over):
        continue
      mine = nets[g].silencing(s.tensor, frozenset(layer for name, layer in back if name == g))
      more = back | {(g, layer) for layer in mine}
      then = variances(loud(more))
      gain = sum(min(1.0, (now[o] - then.get(o, 0.0)) / much) for o, much in over.items())
      price = max(1, cost(more) - paid)
      if more > back and gain / price > most:
        best, most = more, gain / price
    if best == back:
      break
    back = best
    now = variances(loud(back))
  return back

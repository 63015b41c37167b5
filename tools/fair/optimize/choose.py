"""Which layers go back to float, for outputs that 8 bits disturb too much. What disturbs is a tensor that is rounded,
and it is so until the last layer that writes or reads it is float: layers go back together, in such groups."""

import math
from collections.abc import Mapping, Sequence

import onnx

from openpilot.tools.fair.optimize.quantize import LAYERS, trunk
from openpilot.tools.fair.optimize.sensitivity import Source, macs_of, rounded_tensors, shapes_of

# Prices, in multiply-adds that 8 bits save in that time, fitted to the layers of fair_unified_small as ONNX Runtime
# computes them on x86 with AVX512-VNNI
MOVED = 100  # one value that goes to float or back, its order in memory changed, too
VALUE = 24  # one value that a layer writes: a quarter of the bytes; one whose channels are apart reads more than that
TAP, TAP_APART = 350, 150  # one place of a layer's window, at one place of the picture: channels are copied one by one
RESIZED = 50  # one value of a Resize, which is slower in 8 bits
Found = tuple[str, Source]  # the graph's name, one of its tensors
Back = frozenset[tuple[str, str]]  # of layers in float: the graph's name, its own


class Net:
  """One graph, and which of its tensors are rounded where some layers are float. last: layers that always are."""

  def __init__(self, model: onnx.ModelProto, last: Sequence[str]):
    self.model, self.last = model, last
    self.nodes = set(trunk(model, last))
    self.layers = {name: macs for name, macs in macs_of(model).items() if name in self.nodes}
    self.shapes = shapes_of(model)
    self.values = {t: math.prod(shape) for t, shape in self.shapes.items()}
    self.saved = {n.name: self.saving(n) for n in model.graph.node if n.name in self.layers}
    self.touching: dict[str, list[onnx.NodeProto]] = {}
    for n in model.graph.node:
      if n.name in self.nodes:
        for t in {*n.input, *n.output}:
          self.touching.setdefault(t, []).append(n)
    self.readers: dict[str, list[str]] = {}
    for n in model.graph.node:
      for t in n.input:
        self.readers.setdefault(t, []).append(n.name)
    self.by = {t: n.name for n in model.graph.node for t in n.output}
    self.known: dict[frozenset[str], tuple[set[str], set[str]]] = {}

  def saving(self, layer: onnx.NodeProto) -> int:
    """Multiply-adds that 8 bits save in a layer: less than none where its channels are few. One whose channels are
    apart (depthwise) saves memory alone."""
    weights, out = self.shapes[layer.input[1]], self.shapes[layer.output[0]]
    places = math.prod(weights[2:]) * math.prod(out[2:])
    if weights[1] == 1:
      return VALUE * self.values[layer.input[0]] - TAP_APART * places
    return self.layers[layer.name] + VALUE * math.prod(out) - TAP * places

  def parted(self, back: frozenset[str]) -> tuple[set[str], set[str]]:
    """Nodes of 8 bits, and the tensors that are rounded."""
    if back not in self.known:
      nodes = set(trunk(self.model, [*self.last, *back]))
      self.known[back] = nodes, set(rounded_tensors(self.model, nodes))
    return self.known[back]

  def rounded(self, back: frozenset[str]) -> set[str]:
    return self.parted(back)[1]

  def cost(self, back: frozenset[str]) -> int:
    """Its time, less that of all layers in 8 bits alone, in multiply-adds: what float layers do not save, and the ways
    to float and back: layers that lie together have fewer."""
    nodes, tensors = self.parted(back)
    # values go to 8 bits where they come of a float node, and to float where one reads them
    edges = [t for t in tensors if self.by.get(t) not in nodes or not nodes.issuperset(self.readers.get(t, []))]
    resized = [n.output[0] for n in self.model.graph.node if n.op_type == "Resize" and n.name in nodes]
    more = MOVED * sum(self.values[t] for t in edges) + RESIZED * sum(self.values[t] for t in resized)
    return sum(self.saved[layer] for layer in back) + more

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


def mine(back: Back, graph: str) -> frozenset[str]:
  return frozenset(layer for name, layer in back if name == graph)


def not_worth(nets: Mapping[str, Net]) -> Back:
  """The layers that are faster in float, with the ways there and back: with few channels, and what lies around them."""
  back: Back = frozenset()
  for g, net in nets.items():
    while True:
      now = mine(back, g)
      groups = {net.silencing(t, now) for t in net.rounded(now)}
      best = min(groups, key=lambda x: (net.cost(x), sorted(x)), default=now)
      if net.cost(best) >= net.cost(now):
        break
      back |= {(g, layer) for layer in best}
  return back


def more_float(nets: Mapping[str, Net], sources: Sequence[Found], back: Back, left: Mapping[str, float]) -> Back:
  """back, and the layers that follow so that of the variance of these outputs at most such parts are left: each time
  the group that takes most of what is too much, for what it saves in 8 bits."""

  def loud(there: Back) -> list[Found]:
    rounded = {g: net.rounded(mine(there, g)) for g, net in nets.items()}
    return [(g, s) for g, s in sources if s.tensor in rounded[g]]

  def cost(there: Back) -> int:
    return sum(net.cost(mine(there, g)) for g, net in nets.items())

  now = variances(loud(back))
  allowed = {o: now.get(o, 0.0) * part for o, part in left.items()}
  while over := {o: now[o] - most for o, most in allowed.items() if now.get(o, 0.0) > most}:
    best, most, paid = back, -1.0, cost(back)
    for g, s in loud(back):
      if not any(s.errors.get(o) for o in over):
        continue
      more = back | {(g, layer) for layer in nets[g].silencing(s.tensor, mine(back, g))}
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

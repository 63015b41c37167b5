"""Which layers go back to float, for outputs that 8 bits disturb too much. What disturbs is a tensor that is rounded,
and it is so until the last layer that writes or reads it is float: layers go back together, in such groups."""

from collections.abc import Mapping, Sequence

import onnx

from openpilot.tools.fair.optimize.quantize import LAYERS, trunk
from openpilot.tools.fair.optimize.sensitivity import Source, layers_of, rounded_tensors

Found = tuple[str, Source]  # the graph's name, one of its tensors
Back = frozenset[tuple[str, str]]  # of layers in float: the graph's name, its own


class Net:
  """One graph, and which of its tensors are rounded where some layers are float. last: layers that always are."""

  def __init__(self, model: onnx.ModelProto, last: Sequence[str]):
    self.model, self.last = model, last
    self.nodes = set(trunk(model, last))
    self.layers = {x.name: x for x in layers_of(model) if x.name in self.nodes}
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

  now = variances(loud(back))
  allowed = {o: now.get(o, 0.0) * part for o, part in left.items()}
  while over := {o: now[o] - most for o, most in allowed.items() if now.get(o, 0.0) > most}:
    best, most = back, -1.0
    for g, s in loud(back):
      if not any(s.errors.get(o) for o in over):
        continue
      mine = nets[g].silencing(s.tensor, frozenset(layer for name, layer in back if name == g))
      more = back | {(g, layer) for layer in mine}
      then = variances(loud(more))
      gain = sum(min(1.0, (now[o] - then.get(o, 0.0)) / much) for o, much in over.items())
      price = sum(nets[name].layers[layer].saves for name, layer in more - back)
      if more > back and gain / price > most:
        best, most = more, gain / price
    if best == back:
      break
    back = best
    now = variances(loud(back))
  return back

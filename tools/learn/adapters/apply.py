"""Adapters onto a model and off it again: which layers, of which rank, the active one, merged or not."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from openpilot.tools.learn.adapters.layers import DEFAULT, KINDS, DoRAGRU, DoRALayer, dora_layers
from openpilot.tools.learn.adapters.lowrank import Adapter
from openpilot.tools.lib.errors import UserError

# What is adapted unless told otherwise: dense layers (final layers and heads) and recurrent projections, but not the
# image network.
NOT_BY_DEFAULT = ("*vision*", "*backbone*", "*encoder*", "*stem*", "*patch_embed*")


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
  """Layers that are, or can be, adapted. Not those that a fused layer reads the weights of by itself."""
  fused = {
    id(c)
    for m in model.modules()
    if isinstance(m, (nn.TransformerEncoderLayer, DoRALayer))
    for c in m.modules()
    if c is not m
  }
  return {
    n: m
    for n, m in model.named_modules()
    if n and id(m) not in fused and (type(m) in KINDS or isinstance(m, DoRALayer))
  }


def adapted(layer: nn.Module) -> DoRALayer:
  return layer if isinstance(layer, DoRALayer) else KINDS[type(layer)](layer, None).train(layer.training)


def wrap(model: nn.Module, layer: nn.Module) -> DoRALayer:
  """The adapted form of a layer, in its place wherever the model holds it."""
  new = adapted(layer)
  if new is not layer:
    replace(model, layer, new)
  return new


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
  for parent in list(model.modules()):
    if parent is not new:
      for n, child in parent._modules.items():
        if child is old:
          parent._modules[n] = new


def target_names(model: nn.Module, targets: Sequence[str] | None) -> list[str]:
  able = adaptable(model)
  kinds = {n: m.base_layer if isinstance(m, DoRALayer) else m for n, m in able.items()}
  if targets is None:
    out = [
      n
      for n, m in kinds.items()
      if not isinstance(m, nn.Conv2d) and not any(fnmatchcase(n.lower(), p) for p in NOT_BY_DEFAULT)
    ]
    missing = [] if out else ["a dense layer or GRU outside the image network"]
  else:
    hits = {t: [n for n in able if fnmatchcase(n, t) or n.endswith(f".{t}")] for t in targets}
    missing = [t for t, h in hits.items() if not h]
    out = [n for n in able if any(n in h for h in hits.values())]
  if missing or not out:
    raise UserError(
      f"nothing to adapt under {', '.join(missing) or 'no name at all'}; name some of: "
      f"{', '.join(able) or 'nothing (no Linear, Conv2d or GRU)'}"
    )
  return out


def apply_dora(
  model: nn.Module,
  rank: int = 16,
  alpha: float | None = None,
  targets: Sequence[str] | None = None,
  dropout: float = 0.0,
  clip_rank: bool = True,
  name: str = DEFAULT,
) -> list[str]:
  """Freezes the model and gives an adapter `name` to the layers that `targets` name (shell patterns, or the end of a
  dotted name), in place; it becomes the active one. Default: every dense layer and GRU outside the image network.
  Returns the layers' names.

  The update is scaled by alpha / rank (alpha: rank), also where clip_rank lowers the rank to what a small layer can
  take. Raises UserError for a rank that a layer cannot take (without clip_rank), patterns that match nothing, a name in
  use."""
  if rank < 1 or not 0 <= dropout < 1:
    raise UserError(f"rank {rank}, dropout {dropout}: a rank is at least 1, a dropout at least 0 and below 1")
  check_not_merged(model)
  if not name or "." in name or name in adapter_names(model):
    raise UserError(
      f"adapter '{name}': give a name that has no dot and is not in use "
      f"({', '.join(adapter_names(model)) or 'none is'})"
    )
  names, able = target_names(model, targets), adaptable(model)
  if not clip_rank:
    for n in names:
      layer = adapted(able[n])
      low = min(layer.limit(w) for w in layer.names)
      if rank > low:
        raise UserError(
          f"rank {rank} is larger than {n}, which takes at most {low}; lower the rank, or let it be clipped (clip_rank)"
        )
  scaling = (rank if alpha is None else alpha) / rank
  for n in names:
    layer = wrap(model, able[n])
    p = 0.0 if isinstance(layer, DoRAGRU) else dropout
    layer.add(
      name,
      {w: Adapter.new(layer.base_weight(w), min(rank, layer.limit(w)), scaling, layer.groups, p) for w in layer.names},
    )
  set_adapter(model, name)
  return names


def check_rank(model: nn.Module, rank: int, targets: Sequence[str] | None = None) -> None:
  """Raises UserError, which names the largest sensible rank, for one that none of the layers that apply_dora would
  adapt can take, or at which what is trained is as large as the model: apply_dora would clip it without a word."""
  able = adaptable(model)
  weights = [(layer, w) for layer in (adapted(able[n]) for n in target_names(model, targets)) for w in layer.names]
  size = sum(p.numel() for n, p in model.named_parameters() if ".adapters." not in n)

  def trained(r: int) -> int:
    total = 0
    for layer, name in weights:
      w, of = layer.base_weight(name), min(r, layer.limit(name))
      total += of * (layer.groups * w[0].numel() + len(w)) + len(w)  # A, B and m
    return total

  most = max(layer.limit(name) for layer, name in weights)
  best = next((r for r in range(most, 0, -1) if trained(r) < size), 0)
  if rank <= best:
    return
  why = (
    f"no layer to adapt takes more than {most}"
    if rank > most
    else f"{trained(rank):,} parameters would be trained beside {size:,} of the base"
  )
  largest = (
    f"the largest sensible rank is {best}" if best else "every rank is: train all parameters, or name fewer targets"
  )
  raise UserError(f"rank {rank} is too large: {why}; {largest}")


def clipped(model: nn.Module, rank: int) -> str:
  """Where the active adapter has a lower rank than was asked for, one line for a user; empty where nowhere."""
  layers = {n: layer for n, layer in dora_layers(model).items() if layer.active is not None}
  low = {n: [layer.limit(w) for w in layer.names if layer.limit(w) < rank] for n, layer in layers.items()}
  names = [n for n, ranks in low.items() if ranks]
  if not names:
    return ""
  ranks = sorted(r for n in names for r in low[n])
  more = f" and {len(names) - 4} more" if len(names) > 4 else ""
  return (
    f"rank clipped on {len(names)} of {len(layers)} layers, to {ranks[0]}..{ranks[-1]}: {', '.join(names[:4])}{more}"
  )


def adapter_names(model: nn.Module) -> list[str]:
  return sorted({n for layer in dora_layers(model).values() for n in layer.adapters})


def set_adapter(model: nn.Module, name: str | None) -> None:
  """Switches to the adapter of that name (only it learns), or with None to the base. Raises UserError."""
  check_not_merged(model)
  if name is not None and name not in adapter_names(model):
    raise UserError(f"no adapter '{name}' on this model; it has {', '.join(adapter_names(model)) or 'none'}")
  model.requires_grad_(False)
  for layer in dora_layers(model).values():
    layer.activate(name)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
  """A, B and m of the active adapter: what an optimizer gets."""
  return [
    p
    for layer in dora_layers(model).values()
    if layer.active is not None
    for p in layer.adapters[layer.active].parameters()
  ]


def merge(model: nn.Module) -> None:
  """Puts the active adapter into the weights, for speed; unmerge() takes it out again, bit for bit."""
  for layer in dora_layers(model).values():
    layer.merge()


def unmerge(model: nn.Module) -> None:
  for layer in dora_layers(model).values():
    layer.unmerge()


def unload(model: nn.Module) -> None:
  """Merges the active adapter and puts the plain layers back in place: the model is as before apply_dora, with other
  weights. For export."""
  merge(model)
  for layer in dora_layers(model).values():
    replace(model, layer, layer.base_layer)


def check_not_merged(model: nn.Module) -> None:
  if any(layer.merged for layer in dora_layers(model).values()):
    raise UserError("an adapter is merged into this model; unmerge() it first")

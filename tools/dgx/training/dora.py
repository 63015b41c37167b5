"""DoRA (weight-decomposed low-rank adaptation) for dense layers, convolutions and GRUs: W' = m * (W + s B A) / ||W + s
B A||, one magnitude m per output row.

The norm is a constant for the gradients (as the paper's section 4.3 and PEFT have it), the bias is never scaled, and
the base weights stay as they are."""

import hashlib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpilot.tools.dgx.training.adapters import Matrix, fits, read_adapter, write_adapter
from openpilot.tools.dgx.training.lowrank import Adapter, DoRAProduct
from openpilot.tools.lib.errors import UserError

__all__ = [
  "DoRAConv2d",
  "DoRAGRU",
  "DoRALayer",
  "DoRALinear",
  "adapter_parameters",
  "apply_dora",
  "base_hash",
  "check_rank",
  "clipped",
  "dora_layers",
  "load_adapter",
  "merge",
  "save_adapter",
  "set_adapter",
  "unload",
  "unmerge",
]

DEFAULT = "default"
# What is adapted unless told otherwise: dense layers (final layers and heads) and recurrent projections, but not the
# image network.
NOT_BY_DEFAULT = ("*vision*", "*backbone*", "*encoder*", "*stem*", "*patch_embed*")


class DoRALayer(nn.Module):
  """A frozen layer and its named adapters. `active` names the one at work; None is the base alone.

  DoRALayer(layer, rank=16) is the form for that kind of layer with an adapter at work, of a lower rank where the layer
  takes no more; rank=None: without one. UserError: a kind that cannot be adapted.

  fake_quant: where set, the forward pass runs on fake_quant(weight()), the weight that will be exported:
  quantization-aware training. No dropout then."""

  def __new__(cls, base_layer: nn.Module | None = None, *args: Any, **kwargs: Any) -> "DoRALayer":
    if cls is not DoRALayer:
      return super().__new__(cls)
    if base_layer is None or type(base_layer) not in KINDS:
      raise UserError(f"{type(base_layer).__name__} cannot be adapted; {', '.join(k.__name__ for k in KINDS)} can")
    return super().__new__(KINDS[type(base_layer)])

  def __init__(self, base_layer: nn.Module, rank: int | None = 16):
    super().__init__()
    self.base_layer = base_layer
    self.adapters = nn.ModuleDict()
    self.active: str | None = None
    self.fake_quant: Callable[[Tensor], Tensor] | None = None
    self.originals: dict[str, nn.Parameter] = {}
    self.names = self.weight_names()
    if rank is not None:
      new = {w: Adapter.new(self.base_weight(w), min(rank, self.limit(w)), 1.0, self.groups) for w in self.names}
      self.add(DEFAULT, new)
      self.activate(DEFAULT)

  def weight_names(self) -> tuple[str, ...]:
    """Of the base's weights that are adapted."""
    return ("weight",)

  @property
  def merged(self) -> bool:
    return bool(self.originals)

  @property
  def groups(self) -> int:
    return getattr(self.base_layer, "groups", 1)

  def base_weight(self, name: str = "weight") -> nn.Parameter:
    """The base's own, merged or not."""
    return self.originals[name] if name in self.originals else getattr(self.base_layer, name)

  def adapter(self, name: str = "weight") -> Adapter | None:
    """The active adapter of a weight; None where there is none or it is merged."""
    if self.active is None or self.merged:
      return None
    return cast(Adapter, cast(nn.ModuleDict, self.adapters[self.active])[name])

  def weight(self, name: str = "weight") -> Tensor:
    """The weight in effect, in the base's shape and dtype; gradients reach A, B and m."""
    w, adapter = cast(Tensor, getattr(self.base_layer, name)), self.adapter(name)
    return w if adapter is None else adapter.effective(w)

  def in_effect(self, name: str = "weight") -> Tensor:
    return self.weight(name) if self.fake_quant is None else self.fake_quant(self.weight(name))

  def limit(self, name: str = "weight") -> int:
    """The largest rank that the weight can take."""
    w = self.base_weight(name)
    return min(w.shape[0] // self.groups, w[0].numel())

  def add(self, adapter_name: str, matrices: dict[str, Adapter]) -> None:
    self.adapters[adapter_name] = nn.ModuleDict(matrices)

  def activate(self, adapter_name: str | None) -> None:
    self.active = adapter_name if adapter_name is not None and adapter_name in self.adapters else None
    self.base_layer.requires_grad_(False)
    for n, a in self.adapters.items():
      a.requires_grad_(n == self.active)

  @torch.no_grad()
  def merge(self) -> None:
    if self.active is None or self.merged:
      return
    new = {n: nn.Parameter(self.weight(n).clone(), requires_grad=False) for n in self.names}
    originals = {n: getattr(self.base_layer, n) for n in self.names}
    for n, p in new.items():
      setattr(self.base_layer, n, p)
    self.originals = originals

  def unmerge(self) -> None:
    """Exact: the base's own weights are put back."""
    for n, p in self.originals.items():
      p.data = p.data.to(getattr(self.base_layer, n).device)
      setattr(self.base_layer, n, p)
    self.originals = {}

  def extra_repr(self) -> str:
    return f"active={self.active}, merged={self.merged}"


class DoRALinear(DoRALayer):
  """nn.Linear with DoRA. x (..., in) -> (..., out). Dropout acts on the low-rank path only, so the base's product is
  computed once."""

  def forward(self, x: Tensor) -> Tensor:
    base, adapter = cast(nn.Linear, self.base_layer), self.adapter()
    if self.fake_quant is not None:
      return F.linear(x, self.in_effect(), base.bias)
    if adapter is None:
      return base(x)
    c = adapter.scale(base.weight)
    weight, device = base.weight, x.device.type
    if torch.is_autocast_enabled(device):
      dtype = torch.get_autocast_dtype(device)
      x, weight = x.to(dtype), weight.to(dtype)
    a, b = adapter.a.to(x.dtype), (adapter.b * adapter.scaling).to(x.dtype)
    p = adapter.dropout if self.training else 0.0
    mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p).view(-1, x.shape[-1]) if p else None
    return cast(Tensor, DoRAProduct.apply(x, weight, a, b, c, base.bias, mask, 1 - p))


class DoRAConv2d(DoRALayer):
  """nn.Conv2d with DoRA: A is a convolution like the base's (stride, padding, dilation, groups), B a 1x1 one. r counts
  per group."""

  def forward(self, x: Tensor) -> Tensor:
    base, adapter = cast(nn.Conv2d, self.base_layer), self.adapter()
    if self.fake_quant is not None:
      return base._conv_forward(x, self.in_effect(), base.bias)
    if adapter is None:
      return base(x)
    c = adapter.scale(base.weight).view(-1, 1, 1)
    low = F.dropout(x, adapter.dropout, self.training) if adapter.dropout else x
    h = base._conv_forward(low, adapter.a.to(base.weight.dtype), None)
    h = F.conv2d(h, (adapter.b * adapter.scaling).to(base.weight.dtype), groups=base.groups)
    u = base._conv_forward(x, base.weight, None).add_(h)
    y = u * c if base.bias is None else torch.addcmul(base.bias.to(c.dtype).view(-1, 1, 1), u, c)
    return y.to(u.dtype)


class DoRAGRU(DoRALayer):
  """nn.GRU with DoRA on each weight_ih and weight_hh, of all layers and directions. Same call as nn.GRU. The weights
  are formed once per call, as they serve at every step; there is no dropout on them."""

  def weight_names(self) -> tuple[str, ...]:
    return tuple(n for n, _ in self.base_layer.named_parameters() if n.startswith("weight_"))

  def forward(self, x: Any, h: Tensor | None = None) -> tuple[Any, Tensor]:
    base = cast(nn.GRU, self.base_layer)
    if self.fake_quant is None and (self.active is None or self.merged):
      return base(x, h)
    base._update_flat_weights()  # else base() does it itself after a merge, over what is set below
    own = base._flat_weights
    try:
      base._flat_weights = [
        self.in_effect(n) if n in self.names else getattr(base, n) for n in base._flat_weights_names
      ]
      return base(x, h)
    finally:
      base._flat_weights = own


KINDS: dict[type[nn.Module], type[DoRALayer]] = {nn.Linear: DoRALinear, nn.Conv2d: DoRAConv2d, nn.GRU: DoRAGRU}


def dora_layers(model: nn.Module) -> dict[str, DoRALayer]:
  return {n: m for n, m in model.named_modules() if isinstance(m, DoRALayer)}


def _adaptable(model: nn.Module) -> dict[str, nn.Module]:
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


def _adapted(layer: nn.Module) -> DoRALayer:
  return layer if isinstance(layer, DoRALayer) else KINDS[type(layer)](layer, None).train(layer.training)


def _wrap(model: nn.Module, layer: nn.Module) -> DoRALayer:
  """The adapted form of a layer, in its place wherever the model holds it."""
  new = _adapted(layer)
  if new is not layer:
    _replace(model, layer, new)
  return new


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
  for parent in list(model.modules()):
    if parent is not new:
      for n, child in parent._modules.items():
        if child is old:
          parent._modules[n] = new


def _targets(model: nn.Module, targets: Sequence[str] | None) -> list[str]:
  able = _adaptable(model)
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
  _not_merged(model)
  if not name or "." in name or name in adapter_names(model):
    raise UserError(
      f"adapter '{name}': give a name that has no dot and is not in use "
      f"({', '.join(adapter_names(model)) or 'none is'})"
    )
  names, able = _targets(model, targets), _adaptable(model)
  if not clip_rank:
    for n in names:
      layer = _adapted(able[n])
      low = min(layer.limit(w) for w in layer.names)
      if rank > low:
        raise UserError(
          f"rank {rank} is larger than {n}, which takes at most {low}; lower the rank, or let it be clipped (clip_rank)"
        )
  scaling = (rank if alpha is None else alpha) / rank
  for n in names:
    layer = _wrap(model, able[n])
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
  able = _adaptable(model)
  weights = [(layer, w) for layer in (_adapted(able[n]) for n in _targets(model, targets)) for w in layer.names]
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
  _not_merged(model)
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
    _replace(model, layer, layer.base_layer)


def _not_merged(model: nn.Module) -> None:
  if any(layer.merged for layer in dora_layers(model).values()):
    raise UserError("an adapter is merged into this model; unmerge() it first")


def base_hash(model: nn.Module) -> str:
  """Of the base's parameters (names, shapes, values), the same before and after apply_dora, with an adapter merged or
  not: which base an adapter is for."""
  originals = {
    id(getattr(layer.base_layer, w)): p for layer in dora_layers(model).values() for w, p in layer.originals.items()
  }
  adapters = {id(p) for layer in dora_layers(model).values() for p in layer.adapters.parameters()}
  h = hashlib.sha256()
  for n, p in sorted(
    (n.replace(".base_layer.", "."), p)
    for n, p in model.named_parameters(remove_duplicate=False)
    if id(p) not in adapters
  ):
    t = originals.get(id(p), p).detach().cpu().contiguous()
    h.update(f"{n} {tuple(t.shape)} {t.dtype} ".encode())
    h.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
  return h.hexdigest()


def save_adapter(model: nn.Module, path: str | Path, base_hash: str, name: str | None = None) -> None:
  """Writes A, B and m of the adapter `name` (the active one) into the folder `path`, in PEFT's format, with the hash of
  the base. Raises UserError."""
  layers = dora_layers(model)
  chosen = name or next((layer.active for layer in layers.values() if layer.active), "")
  found = {
    (n, w): cast(dict[str, Adapter], layer.adapters[chosen])[w]
    for n, layer in layers.items()
    if chosen in layer.adapters
    for w in layer.names
  }
  if not found:
    raise UserError(
      f"no adapter {name or 'is active'} on this model; it has {', '.join(adapter_names(model)) or 'none'}"
    )
  write_adapter(
    Path(path),
    [Matrix(n, w, a.a, a.b, a.m, a.scaling) for (n, w), a in found.items()],
    base_hash,
    max(a.dropout for a in found.values()),
  )


def load_adapter(model: nn.Module, path: str | Path, base_hash: str, name: str = DEFAULT) -> list[str]:
  """Reads a folder that save_adapter or PEFT wrote, onto a model that may have adapters already, and makes it the
  active one under `name` (an adapter of that name is replaced). Returns the layers' names. PEFT's files keep no hash:
  then shapes alone are checked. Raises UserError for the adapter of another base."""
  _not_merged(model)
  matrices, made_for, dropout = read_adapter(Path(path))
  if made_for is not None and made_for != base_hash:
    raise UserError(
      f"{path} was trained on another base ({made_for[:12]}) than this model ({base_hash[:12]}); load the model that "
      "it was trained on"
    )
  if not name or "." in name:
    raise UserError(f"adapter '{name}': give a name that has no dot")
  able = _adaptable(model)
  grouped: dict[str, dict[str, Matrix]] = {}
  for x in matrices:
    grouped.setdefault(x.module, {})[x.weight] = x
  for n, group in grouped.items():  # all is checked before anything changes
    probe = _adapted(able[n]) if n in able else None
    if (
      probe is None
      or set(group) != set(probe.names)
      or not all(fits(x, probe.base_weight(w).shape, probe.groups) for w, x in group.items())
    ):
      raise UserError(f"{path}: the adapter of {n} does not fit this model; load the model that it was trained on")
  for layer in dora_layers(model).values():
    if name in layer.adapters:
      del layer.adapters[name]
  for n, group in grouped.items():
    wrapped = _wrap(model, able[n])
    p = 0.0 if isinstance(wrapped, DoRAGRU) else dropout
    wrapped.add(name, {w: _of(x, wrapped, w, p) for w, x in group.items()})
  set_adapter(model, name)
  return list(grouped)


def _of(x: Matrix, layer: DoRALayer, weight: str, dropout: float) -> Adapter:
  w = layer.base_weight(weight)
  dtype = torch.promote_types(w.dtype, torch.float32)
  return Adapter(
    x.a.to(w.device, dtype), x.b.to(w.device, dtype), x.m.to(w.device, dtype), x.scaling, layer.groups, dropout
  )

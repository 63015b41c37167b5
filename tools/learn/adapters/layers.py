"""DoRA (weight-decomposed low-rank adaptation) for dense layers, convolutions and GRUs: W' = m * (W + s B A) / ||W + s
B A||, one magnitude m per output row.

The norm is a constant for the gradients (as the paper's section 4.3 and PEFT have it), the bias is never scaled, and
the base weights stay as they are."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpilot.tools.learn.adapters.lowrank import Adapter, DoRAProduct
from openpilot.tools.lib.errors import UserError

DEFAULT = "default"


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

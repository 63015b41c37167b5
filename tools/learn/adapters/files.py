"""Adapters of a model in files of PEFT's format, and for which base each is."""

import hashlib
from pathlib import Path
from typing import cast

import torch
from torch import nn

from openpilot.tools.learn.adapters.apply import adaptable, adapted, adapter_names, check_not_merged, set_adapter, wrap
from openpilot.tools.learn.adapters.layers import DEFAULT, DoRAGRU, DoRALayer, dora_layers
from openpilot.tools.learn.adapters.lowrank import Adapter
from openpilot.tools.learn.adapters.peft import Matrix, fits, read_adapter, write_adapter
from openpilot.tools.lib.errors import UserError


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
  check_not_merged(model)
  matrices, made_for, dropout = read_adapter(Path(path))
  if made_for is not None and made_for != base_hash:
    raise UserError(
      f"{path} was trained on another base ({made_for[:12]}) than this model ({base_hash[:12]}); load the model that "
      "it was trained on"
    )
  if not name or "." in name:
    raise UserError(f"adapter '{name}': give a name that has no dot")
  able = adaptable(model)
  grouped: dict[str, dict[str, Matrix]] = {}
  for x in matrices:
    grouped.setdefault(x.module, {})[x.weight] = x
  for n, group in grouped.items():  # all is checked before anything changes
    probe = adapted(able[n]) if n in able else None
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
    wrapped = wrap(model, able[n])
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

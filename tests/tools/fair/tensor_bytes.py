"""How much memory a structure's tensors hold."""

import torch


def tensors(x, seen=None):
  """Bytes of all tensors that are reachable from a session's dicts, each counted once."""
  seen = {} if seen is None else seen
  if isinstance(x, torch.Tensor):
    seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
  elif isinstance(x, dict):
    for v in x.values():
      tensors(v, seen)
  elif isinstance(x, (list, tuple)):
    for v in x:
      tensors(v, seen)
  return sum(seen.values())

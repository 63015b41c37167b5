"""Widths of a student's layers, where they are others than its size says: data, by which a pruned student is built
without the package that pruned it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from openpilot.tools.lib.errors import UserError

Widths = dict[str, list[int]]  # name of a convolution or norm -> [inputs, outputs], 0: as its size says

BatchNorm = nn.modules.batchnorm._BatchNorm
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, BatchNorm)


def sides(layer: nn.Module) -> tuple[int, int]:
  """Channels of a convolution or norm: inputs, outputs."""
  if isinstance(layer, BatchNorm):
    return layer.num_features, layer.num_features
  assert isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
  return layer.in_channels, layer.out_channels


def depthwise(layer: nn.Module) -> bool:
  """Whether each output sees one input alone: norms, too."""
  return isinstance(layer, BatchNorm) or (
    isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels > 1
  )


def cut(layer: nn.Module, inputs: Tensor | None, outputs: Tensor | None) -> None:
  """Leaves the layer these of its channels, in place; None: all. Of a depthwise one `outputs` are the inputs, too."""
  both = depthwise(layer)
  for name, old in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
    if old.dim() == 0:  # a norm's count of batches
      continue
    new, first = old.data, isinstance(layer, nn.ConvTranspose2d) and name == "weight"  # (in, out, ...)
    if outputs is not None:
      new = new.index_select(1 if first else 0, outputs)
    if inputs is not None and not both and name == "weight":
      new = new.index_select(0 if first else 1, inputs)
    if isinstance(old, nn.Parameter):
      setattr(layer, name, nn.Parameter(new.clone(), old.requires_grad))
    else:
      setattr(layer, name, new.clone())
  if isinstance(layer, BatchNorm):
    layer.num_features = len(layer.running_mean) if layer.running_mean is not None else layer.num_features
    return
  assert isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
  if outputs is not None:
    layer.out_channels = len(outputs)
    if both:
      layer.in_channels = layer.groups = len(outputs)
  if inputs is not None and not both:
    layer.in_channels = len(inputs)


def narrow(student: nn.Module, widths: Mapping[str, Sequence[int]]) -> None:
  """Gives a student that was just built these widths, in place. Raises UserError where they are not of its layers."""
  for name, said in widths.items():
    try:
      layer = student.get_submodule(name)
    except AttributeError:
      layer = None
    if not isinstance(layer, LAYERS):
      raise UserError(f"widths: '{name}' is no convolution and no norm of this student; they are of another one")
    wide = sides(layer)
    if len(said) != 2 or any(type(n) is not int or not 0 <= n <= most for n, most in zip(said, wide, strict=True)):
      raise UserError(f"widths: {name} cannot have {list(said)} inputs and outputs, it has up to {list(wide)}")
    keep = [torch.arange(n) if 0 < n < most else None for n, most in zip(said, wide, strict=True)]
    cut(layer, keep[0], keep[1])


def widths_of(student: nn.Module, whole: nn.Module) -> Widths:
  """What narrow() makes `student` of, out of `whole`, the same as its size says."""
  out: Widths = {}
  for name, layer in whole.named_modules():
    if isinstance(layer, LAYERS):
      now, then = sides(student.get_submodule(name)), sides(layer)
      if now != then:
        out[name] = [0 if a == b else a for a, b in zip(now, then, strict=True)]
  return out

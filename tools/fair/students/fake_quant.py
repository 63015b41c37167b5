"""Students that learn to be in 8 bits: in their forward pass the weights of convolutions and the values between layers
are rounded as the 8-bit graph will round them, and gradients pass as if they were not (straight-through,
arXiv:1308.3432). The ranges of values are learned, too (LSQ+, arXiv:2004.09576).

A student's own code knows nothing of it: calls of torch's functions are caught where they are made, and are named by
the module that makes them. Which of them are rounded is said by the graph: optimize/qat.py."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

AXIS: dict[Any, int] = {F.conv2d: 0, F.conv_transpose2d: 1}  # of the weights of layers, along which channels come out
GATES: dict[Any, Any] = {F.hardswish: F.hardsigmoid, F.silu: torch.sigmoid}  # x times this, which a graph has as two


class Calls(TorchFunctionMode):
  """Within it each call of a torch function comes to called() by a name: "MODULE:FUNCTION:N", the module of `student`
  that makes it, and how many such calls that has made before."""

  def __init__(self, student: nn.Module):
    super().__init__()
    self.names = {m: n for n, m in student.named_modules()}

  def __enter__(self) -> Any:
    self.inside, self.made = [""], Counter[tuple[str, str]]()
    self.hooks = (register_module_forward_pre_hook(self.enters), register_module_forward_hook(self.leaves))
    return super().__enter__()

  def __exit__(self, *error: Any) -> None:
    super().__exit__(*error)
    for h in self.hooks:
      h.remove()

  def enters(self, module: nn.Module, args: Any) -> None:
    self.inside.append(self.names.get(module, self.inside[-1]))

  def leaves(self, module: nn.Module, args: Any, out: Any) -> None:
    self.inside.pop()

  def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
    if func in GATES:
      gate = self.called(self.place(GATES[func]), GATES[func], [args[0]], {})
      return self.called(self.place(func), torch.mul, [args[0], gate], {})
    return self.called(self.place(func), func, list(args), dict(kwargs or {}))

  def place(self, func: Callable[..., Any]) -> str:
    who = self.inside[-1], func.__name__
    n = self.made[who]
    self.made[who] += 1
    return f"{who[0]}:{who[1]}:{n}"

  def called(self, place: str, func: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def grid(low: Tensor, high: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, int, int]:
  """Of a range, scalars: scale (float32), zero point (int32), the least and the most step, as QuantizeLinear has them
  for uint8, and for int8 but for a zero point that is 128 less; symmetric: for int8 with its zero in the middle."""
  low, high = low.detach().double().clamp(max=0), high.detach().double().clamp(min=0)
  if symmetric:
    scale = (torch.maximum(-low, high) / 127).clamp(min=1e-12)
    return scale.float(), torch.zeros_like(scale, dtype=torch.int32), -128, 127
  scale = ((high - low) / 255).clamp(min=1e-12).float()
  return scale, torch.round(-low / scale).int(), 0, 255


class RoundValues(torch.autograd.Function):
  """x of any shape, float32; low, high: scalars, the range. -> x rounded. To x goes the gradient of what lies in the
  range. To its ends goes that of what lies beyond them, and by how much rounding moves the rest as steps grow, both
  divided by the square root of how many steps and values there are."""

  @staticmethod
  def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor, symmetric: bool) -> Tensor:
    scale, zero, least, most = grid(low, high, symmetric)
    ctx.symmetric, ctx.ends = symmetric, (least, most)
    ctx.save_for_backward(x, scale, zero, low, high)  # not what is returned: an activation may write into that
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, least, most)

  @staticmethod
  def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    (grad,), (x, scale, zero, low, high) = grads, ctx.saved_tensors
    moved = torch.fake_quantize_per_tensor_affine(x, scale, zero, *ctx.ends) - x
    passed = grad * (moved.abs() <= scale * 0.5001)
    if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
      return passed, None, None, None
    stopped = grad - passed
    below = (stopped * (moved > 0)).sum()
    above = stopped.sum() - below
    inside = (passed * moved).sum()
    damp = (x.numel() * 255) ** -0.5
    if ctx.symmetric:
      most = torch.maximum(-low, high).clamp(min=1e-12)
      own = (above - below + inside / most) * damp
      none = torch.zeros_like(own)
      return (passed, -own, none, None) if -low > high else (passed, none, own, None)
    span = (high.clamp(min=0) - low.clamp(max=0)).clamp(min=1e-12)
    return passed, (below - inside / span) * damp, (above + inside / span) * damp, None


def round_weights(w: Tensor, axis: int | None, limit: int, gain: Tensor | None = None) -> Tensor:
  """Weights as 8 bits hold them, in steps of -limit to limit: each channel of `axis` with a scale of its own, or, where
  that is None, all with one. gain: (channels,) of the norm behind them, with which they are folded. The gradient is
  that of w."""
  v = w.detach() if gain is None else w.detach() * gain
  rest = [d for d in range(w.dim()) if d != axis]
  scale = (v.abs().amax(rest, keepdim=True) / limit).clamp(min=1e-12)
  rounded = torch.round(v / scale).clamp(-limit, limit) * scale
  return w + ((rounded if gain is None else rounded / gain) - w).detach()


class Rounding(nn.Module):
  """What of a student is rounded, and the ranges, which it learns. tensors: of its graph -> the range's name. values:
  call -> the range's name. layers: call of a convolution -> the norm behind it, '' where there is none. nodes: layer of
  the graph -> its call. Calls are named as Calls does. symmetric: ranges with zero in the middle. limit, whole: of
  weights, see round_weights(); whole: one scale for all of a layer."""

  first: Tensor  # (ranges, 2): low, high, as they were observed

  def __init__(
    self,
    tensors: Mapping[str, str],
    values: Mapping[str, str],
    layers: Mapping[str, str],
    nodes: Mapping[str, str],
    symmetric: bool = False,
    limit: int = 127,
    whole: bool = False,
  ):
    super().__init__()
    self.tensors, self.layers, self.nodes = dict(tensors), dict(layers), dict(nodes)
    self.ranges = list(dict.fromkeys(tensors.values()))
    self.values = {place: self.ranges.index(name) for place, name in values.items()}
    self.symmetric, self.limit, self.whole = symmetric, limit, whole
    self.register_buffer("first", torch.zeros(len(self.ranges), 2))
    self.low, self.high = (nn.Parameter(torch.ones(len(self.ranges))) for _ in range(2))  # in parts of `first`

  def observe(self, found: Mapping[str, tuple[float, float]]) -> None:
    """Where ranges start."""
    with torch.no_grad():
      self.first.copy_(torch.tensor([found[name] for name in self.ranges]))
      self.low.fill_(1.0)
      self.high.fill_(1.0)

  def shift(self, student: nn.Module, shifts: Mapping[str, Tensor]) -> None:
    """Adds to what layers say, by the graph's name of each, (channels,): to the bias of its norm, or to its own."""
    for node, by in shifts.items():
      place = self.nodes[node]
      layer: Any = student.get_submodule(self.layers[place] or place.partition(":")[0])
      if isinstance(getattr(layer, "bias", None), Tensor):
        layer.bias.data += by.to(layer.bias)

  def now(self) -> tuple[Tensor, Tensor]:
    """(ranges,) low, high."""
    return self.low * self.first[:, 0], self.high * self.first[:, 1]

  def of(self, student: nn.Module) -> "Rounds":
    """Within it the student is rounded."""
    return Rounds(self, student)


class Rounds(Calls):
  def __init__(self, rounding: Rounding, student: nn.Module):
    super().__init__(student)
    self.rounding, self.student = rounding, student

  def __enter__(self) -> Any:
    self.low, self.high = (x.unbind() for x in self.rounding.now())
    return super().__enter__()

  def called(self, place: str, func: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
    r = self.rounding
    if place in r.layers and func in AXIS:
      axis, gain = AXIS[func], None
      if r.whole and r.layers[place]:
        norm: Any = self.student.get_submodule(r.layers[place])
        gain = (norm.weight * torch.rsqrt(norm.running_var + norm.eps)).detach()
        gain = gain.reshape([-1 if d == axis else 1 for d in range(4)])
      args[1] = round_weights(args[1], None if r.whole else axis, r.limit, gain)
    out = func(*args, **kwargs)
    at = r.values.get(place)
    return out if at is None else RoundValues.apply(out, self.low[at], self.high[at], r.symmetric)

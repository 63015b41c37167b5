"""ONNX nodes with parameters as torch layers, and back: `make` reads a node's constants, `dump` gives a layer's
parameters in the node's layout."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from openpilot.tools.dgx.training.onnx_ops import Attributes, Inputs, symmetric, torch_pads

# ONNX's order of gates -> torch's; each is its own inverse's argsort
GATES = {"GRU": [1, 0, 2], "LSTM": [0, 2, 3, 1]}  # ONNX z r h -> torch r z n; ONNX i o f c -> torch i f g o
Dumped = dict[int, Tensor]  # number of the node's input -> value


class FrozenBatchNorm(nn.Module):
  """Batch normalization with the statistics that the network came with: a few routes must not move them. Any number of
  dimensions."""

  def __init__(self, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float):
    super().__init__()
    self.weight, self.bias, self.eps = nn.Parameter(weight), nn.Parameter(bias), eps
    self.running_mean, self.running_var = nn.Buffer(mean), nn.Buffer(var)

  def forward(self, x: Tensor) -> Tensor:
    return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def conv(x: Inputs, a: Attributes) -> nn.Module | None:
  w, b = x[1], x[2] if len(x) > 2 else None
  dims = w.dim() - 2
  if dims not in (1, 2, 3) or (len(x) > 2 and b is None):
    return None
  pads = symmetric(a, dims) if a.get("auto_pad", "NOTSET") in ("NOTSET", "VALID") else None
  groups = a.get("group", 1)
  cls: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
  m = cls(
    w.shape[1] * groups,
    w.shape[0],
    tuple(w.shape[2:]),
    tuple(a.get("strides", [1] * dims)),
    tuple(pads or [0] * dims),
    tuple(a.get("dilations", [1] * dims)),
    groups,
    b is not None,
  )
  return fill(m, w, b)


def conv_pads(x: Tensor, m: Any, a: Attributes) -> Tensor:
  """The padding that torch's convolution has no words for, done before it."""
  dims = x.dim() - 2
  auto = a.get("auto_pad", "NOTSET")
  if auto in ("SAME_UPPER", "SAME_LOWER"):
    total = [
      max(0, (math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n)
      for n, s, k, d in zip(x.shape[2:], m.stride, m.kernel_size, m.dilation, strict=True)
    ]
    low = [(t if auto == "SAME_UPPER" else t + 1) // 2 for t in total]
    return F.pad(x, torch_pads(low + [t - n for t, n in zip(total, low, strict=True)], dims))
  return x if symmetric(a, dims) is not None else F.pad(x, torch_pads(a["pads"], dims))


def conv_transpose(x: Inputs, a: Attributes) -> nn.Module | None:
  w, b = x[1], x[2] if len(x) > 2 else None
  dims = w.dim() - 2
  pads = symmetric(a, dims)
  if (
    dims not in (1, 2)
    or pads is None
    or "output_shape" in a
    or a.get("auto_pad", "NOTSET") != "NOTSET"
    or (len(x) > 2 and b is None)
  ):
    return None
  groups = a.get("group", 1)
  cls: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d)[dims - 1]
  m = cls(
    w.shape[0],
    w.shape[1] * groups,
    tuple(w.shape[2:]),
    tuple(a.get("strides", [1] * dims)),
    tuple(pads),
    tuple(a.get("output_padding", [0] * dims)),
    groups,
    b is not None,
    tuple(a.get("dilations", [1] * dims)),
  )
  return fill(m, w, b)


def fill(m: nn.Module, w: Tensor, b: Tensor | None) -> nn.Module:
  m.weight = nn.Parameter(w.contiguous().clone())
  if b is not None:
    m.bias = nn.Parameter(b.contiguous().clone())
  return m


def gemm(x: Inputs, a: Attributes) -> nn.Module | None:
  b = x[2] if len(x) > 2 else None
  plain = not a.get("transA") and a.get("alpha", 1.0) == 1.0 and (b is None or a.get("beta", 1.0) == 1.0)
  if not plain or x[1].dim() != 2 or (len(x) > 2 and b is None):
    return None
  w = x[1] if a.get("transB") else x[1].T
  if b is not None and b.shape not in ((w.shape[0],), (1, w.shape[0])):
    return None
  return fill(nn.Linear(w.shape[1], w.shape[0], b is not None), w, None if b is None else b.reshape(-1))


def matmul(x: Inputs, a: Attributes) -> nn.Module | None:
  return fill(nn.Linear(x[1].shape[0], x[1].shape[1], bias=False), x[1].T, None) if x[1].dim() == 2 else None


def batch_norm(x: Inputs, a: Attributes) -> nn.Module | None:
  return FrozenBatchNorm(x[1].clone(), x[2].clone(), x[3].clone(), x[4].clone(), a.get("epsilon", 1e-5))


def layer_norm(x: Inputs, a: Attributes) -> nn.Module | None:
  if a.get("axis", -1) >= 0 or x[1].dim() != -a.get("axis", -1) or a["outputs"] > 1:
    return None
  return fill(
    nn.LayerNorm(tuple(x[1].shape), a.get("epsilon", 1e-5), bias=len(x) > 2), x[1], x[2] if len(x) > 2 else None
  )


def recurrent(kind: str) -> Callable[[Inputs, Attributes], nn.Module | None]:
  def make(x: Inputs, a: Attributes) -> nn.Module | None:
    w, r, b = x[1], x[2], x[3] if len(x) > 3 else None
    usual = ["Sigmoid", "Tanh"] + (["Tanh"] if kind == "LSTM" else [])
    if (
      a.get("activations", usual * w.shape[0]) != usual * w.shape[0]
      or "clip" in a
      or a.get("direction") == "reverse"
      or (len(x) > 7 and x[7] is not None)
    ):
      raise NotImplementedError(f"{kind} with other activations, clipping, peepholes or backwards alone")
    if kind == "GRU" and not a.get("linear_before_reset"):
      raise NotImplementedError("GRU with linear_before_reset=0")
    cls: Any = nn.GRU if kind == "GRU" else nn.LSTM
    m = cls(w.shape[2], r.shape[2], bias=b is not None, bidirectional=w.shape[0] == 2)
    order, hidden = GATES[kind], r.shape[2]
    n = len(order)
    for d, suffix in enumerate(("", "_reverse")[: w.shape[0]]):
      parts = [("weight_ih", w[d]), ("weight_hh", r[d])] + (
        [("bias_ih", b[d, : n * hidden]), ("bias_hh", b[d, n * hidden :])] if b is not None else []
      )
      for name, value in parts:
        value = value.reshape(n, hidden, *value.shape[1:])[order].flatten(0, 1)
        setattr(m, f"{name}_l0{suffix}", nn.Parameter(value.contiguous().clone()))
    return m

  return make


def run_recurrent(kind: str, m: Any, x: Inputs, a: Attributes) -> tuple[Tensor, ...]:
  """-> Y (T, directions, B, H), Y_h (directions, B, H)[, Y_c], or batch first where layout is 1."""
  if len(x) > 4 and x[4] is not None:
    raise NotImplementedError(f"{kind} with sequence_lens")
  first = bool(a.get("layout"))
  seq = x[0].transpose(0, 1) if first else x[0]
  states = [s.transpose(0, 1) if first else s for s in x[5:7] if s is not None]
  states = [s.expand(s.shape[0], seq.shape[1], -1).contiguous().to(seq.dtype) for s in states]
  start: Any = None if not states else states[0] if kind == "GRU" else tuple(states)
  y, last = m(seq.contiguous(), start)
  y = y.reshape(*y.shape[:2], -1, a["hidden_size"])
  last = (last,) if kind == "GRU" else last
  if first:
    return y, *(s.transpose(0, 1) for s in last)
  return y.permute(0, 2, 1, 3), *last


def dump(kind: str, m: Any, a: Attributes, inputs: int) -> Dumped:
  """A layer's parameters as the node's constants."""
  bias = {2: m.bias} if inputs > 2 and getattr(m, "bias", None) is not None and kind not in ("GRU", "LSTM") else {}
  if kind in ("Conv", "ConvTranspose", "LayerNormalization"):
    return {1: m.weight, **bias}
  if kind == "Gemm":
    return {1: m.weight if a.get("transB") else m.weight.T, **bias}
  if kind == "MatMul":
    return {1: m.weight.T}
  if kind == "BatchNormalization":
    return {1: m.weight, 2: m.bias, 3: m.running_mean, 4: m.running_var}
  back = torch.tensor(GATES[kind]).argsort().tolist()
  n, hidden = len(back), m.hidden_size
  suffixes = ("", "_reverse")[: 2 if m.bidirectional else 1]

  def part(name: str, suffix: str) -> Tensor:
    value = getattr(m, f"{name}_l0{suffix}")
    return value.reshape(n, hidden, *value.shape[1:])[back].flatten(0, 1)

  out = {
    1: torch.stack([part("weight_ih", s) for s in suffixes]),
    2: torch.stack([part("weight_hh", s) for s in suffixes]),
  }
  if m.bias:
    out[3] = torch.stack([torch.cat([part("bias_ih", s), part("bias_hh", s)]) for s in suffixes])
  return out


PLAIN = (
  nn.Linear,
  nn.Conv1d,
  nn.Conv2d,
  nn.Conv3d,
  nn.ConvTranspose1d,
  nn.ConvTranspose2d,
  nn.GRU,
  nn.LSTM,
  nn.LayerNorm,
  FrozenBatchNorm,
)
MAKERS: dict[
  str, tuple[int, Callable[[Inputs, Attributes], nn.Module | None]]
] = {  # how many inputs come from the graph, and what makes the layer
  "Conv": (1, conv),
  "ConvTranspose": (1, conv_transpose),
  "Gemm": (1, gemm),
  "MatMul": (1, matmul),
  "BatchNormalization": (1, batch_norm),
  "LayerNormalization": (1, layer_norm),
  "GRU": (1, recurrent("GRU")),
  "LSTM": (1, recurrent("LSTM")),
}

"""Operators of ONNX that tinygrad's OnnxRunner computes with more work than they are."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PICKED = 4  # columns of the input that one of the output is the sum of, at most
PLAIN = {"alpha": 1.0, "beta": 1.0, "transA": 0, "broadcast": 0}  # of a Gemm
LOOKED_AT = 1 << 14  # numbers of a constant that is looked into


def pairs(x: Any, n: int, default: int) -> list[int]:
  """An attribute that may be one number, one for each side, or absent."""
  return [default] * n if x is None else [x] * n if isinstance(x, int) else list(x)


def transposed(own: Callable[..., Any]) -> Callable[..., Any]:
  """own: tinygrad's ConvTranspose, which puts zeros between the pixels and convolves these: for a kernel as large as
  its stride four times the work of 2 x 2. There a 1 x 1 convolution says each pixel's block, and pixels change
  places."""

  def ConvTranspose(X: Any, W: Any, B: Any = None, *more: Any, **said: Any) -> Any:
    kernel = list(W.shape[2:])
    n = len(kernel)
    apart = pairs(said.get("strides"), n, 1) == kernel and pairs(said.get("dilations"), n, 1) == [1] * n
    whole = not any(pairs(said.get("pads"), 2 * n, 0)) and not any(pairs(said.get("output_padding"), n, 0))
    usual = said.get("auto_pad", "NOTSET") in ("NOTSET", "VALID") and said.get("output_shape") is None
    if more or n != 2 or said.get("group", 1) != 1 or not (apart and whole and usual):
      return own(X, W, B, *more, **said)
    (inside, out), (a, b), (batch, _, h, w) = W.shape[:2], kernel, X.shape
    y = X.conv2d(W.permute(1, 2, 3, 0).reshape(out * a * b, inside, 1, 1))
    y = y.reshape(batch, out, a, b, h, w).permute(0, 1, 4, 2, 5, 3).reshape(batch, out, h * a, w * b)
    return y if B is None else y + B.reshape(1, out, 1, 1)

  return ConvTranspose


@dataclass(frozen=True)
class Pick:
  """Columns `first` to `first + count` of an input, each `times` times, and all of this again and again."""

  first: int
  count: int
  times: int

  def of(self, x: Any, width: int) -> Any:
    """x (..., n) -> (..., width), by moving numbers alone."""
    head, again = x.shape[:-1], width // (self.count * self.times)
    part = x[..., self.first : self.first + self.count].reshape(*head, 1, self.count, 1)
    return part.expand(*head, again, self.count, self.times).reshape(*head, width)


def pick_of(index: np.ndarray) -> Pick | None:
  """index (width,): which column of the input each of the output is."""
  first, width = int(index.min()), len(index)
  count = int(index.max()) - first + 1
  times = int(np.argmax(np.append(index, -1) != index[0]))
  pick = Pick(first, count, times)
  if width % (count * times) or not np.array_equal(index, first + np.arange(width) // times % count):
    return None
  return pick


def picks_of(matrix: np.ndarray) -> tuple[list[Pick], np.ndarray | None] | None:
  """A matrix (n, width), not empty, that only picks columns and adds them: what it picks, and by what the sum is
  multiplied, None: by 1. None where it does more."""
  there = matrix != 0
  each = there.sum(0)
  if not 1 <= each[0] <= PICKED or (each != each[0]).any():
    return None
  index = np.argsort(~there, axis=0, kind="stable")[: each[0]]  # (picked, width)
  values = np.take_along_axis(matrix, index, 0)
  found = [pick_of(i) for i in index]
  if (values != values[0]).any() or None in found:
    return None
  return [p for p in found if p is not None], None if (values == 1).all() else values[0]


def Picked(X: Any, C: Any = None, weight: Any = None, picks: Any = (), width: int = 0) -> Any:
  """A product with such a matrix, plus C. As a product it is a kernel, and another that writes what it multiplies as an
  image; so it is a part of the kernel that asks for it."""
  y = sum((p.of(X, width) for p in picks[1:]), picks[0].of(X, width))
  y = y if weight is None else y * weight
  return y if C is None else y + C


def Summed(X: Any, B: Any, C: Any = None, value: float = 1.0, turned: int = 0) -> Any:
  """A product with B, whose numbers are all `value`, plus C: one sum of each row, not as many as B has columns."""
  y = (X.sum(-1, keepdim=True) * value).expand(*X.shape[:-1], B.shape[0 if turned else 1])
  return y if C is None else y + C


def multiplied(own: Callable[..., Any]) -> Callable[..., Any]:
  """own: tinygrad's MatMul, which first writes what it multiplies as images. Rows that each have a matrix of their own
  are multiplied and added up: what the matrix is gathered from is then read where it lies."""

  def MatMul(A: Any, B: Any) -> Any:
    if len(A.shape) == len(B.shape) == 3 and A.shape[0] == B.shape[0] > 1 and A.shape[1] == 1:
      return (A.transpose(1, 2) * B).sum(1, keepdim=True)
    return own(A, B)

  return MatMul


def constants_of(net: Any) -> tuple[dict[str, Any], dict[str, float]]:
  """Of an OnnxRunner before it runs, by name: tensors that are known, and numbers that fill others."""
  told = {n.outputs[0]: n.opts.get("value") for n in net.graph_nodes if n.op == "Constant"}
  fill = {n.outputs[0]: n.opts.get("value") for n in net.graph_nodes if n.op == "ConstantOfShape"}
  known = {k: v for k, v in {**net.graph_values, **told}.items() if hasattr(v, "numpy")}
  return known, {k: float(v.numpy().flat[0]) if hasattr(v, "numpy") else 0.0 for k, v in fill.items()}


def merged(nodes: Sequence[Any], constants: dict[str, Any]) -> list[Any]:
  """Constants that are alike become one, so that what is computed from them twice is computed once."""
  first: dict[Any, str] = {}
  same = {}
  for name, x in constants.items():
    if math.prod(x.shape) <= LOOKED_AT:
      same[name] = first.setdefault((str(x.dtype), x.shape, x.numpy().tobytes()), name)
  return [type(n)(n.op, n.opset_id, tuple(same.get(i, i) for i in n.inputs), n.outputs, n.opts) for n in nodes]


def replaced(node: Any, constants: dict[str, Any], filled: dict[str, float]) -> Any:
  """A product with a matrix that only picks or adds up -> a node that does so; others as they are."""
  said = {**PLAIN, "transB": 0, **node.opts}
  turned = said.pop("transB")
  if node.op not in ("MatMul", "Gemm") or said != PLAIN:
    return node
  x, b, *more = node.inputs
  alike = filled.get(b)
  w = constants.get(b)
  if w is not None and len(w.shape) == 2 and 0 < math.prod(w.shape) <= LOOKED_AT:
    matrix = w.numpy().T if turned else w.numpy()
    if (found := picks_of(matrix)) is not None:
      weight = None if found[1] is None else type(w)(found[1].copy(), device=w.device)
      opts = {"picks": found[0], "weight": weight, "width": matrix.shape[1]}
      return type(node)("Picked", node.opset_id, (x, *more), node.outputs, opts)
    if (matrix == matrix.flat[0]).all():
      alike = float(matrix.flat[0])
  if alike is None:
    return node
  return type(node)("Summed", node.opset_id, node.inputs, node.outputs, {"value": alike, "turned": turned})


def improve(net: Any) -> Any:
  """net: an OnnxRunner, before it is moved to a device; one of another time keeps its own operators. -> the same."""
  ops = getattr(net, "onnx_ops", None)
  if not isinstance(ops, dict):
    return net
  better = {"ConvTranspose": transposed, "MatMul": multiplied}
  net.onnx_ops = {**ops, **{k: f(ops[k]) for k, f in better.items() if callable(ops.get(k))}}
  if all(hasattr(net, k) for k in ("graph_nodes", "graph_values")):
    constants, filled = constants_of(net)
    net.onnx_ops |= {"Picked": Picked, "Summed": Summed}
    net.graph_nodes = tuple(replaced(n, constants, filled) for n in merged(net.graph_nodes, constants))
  return net

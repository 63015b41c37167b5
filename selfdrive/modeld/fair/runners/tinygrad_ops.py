"""Operators of ONNX that tinygrad's OnnxRunner computes with more work than they are."""

from collections.abc import Callable
from typing import Any


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


def improve(net: Any) -> Any:
  """net: an OnnxRunner; one of another time keeps its own operators. -> the same."""
  ops = getattr(net, "onnx_ops", None)
  if isinstance(ops, dict) and callable(ops.get("ConvTranspose")):
    net.onnx_ops = {**ops, "ConvTranspose": transposed(ops["ConvTranspose"])}
  return net

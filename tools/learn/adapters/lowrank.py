"""The arithmetic of DoRA: one weight's A, B and m, its norm in factored form, and a dense layer's forward and backward
pass in one go over the output."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TINY = 1e-12  # the least norm: a row of zeros gives zeros, not NaN
CANCELLED = 0.1  # below this share of its terms the factored norm has lost digits, and the row is computed directly
CHUNK = 32  # rows reduced at once on the CPU: the partial sums of a wide layer stay in the cache


class DoRAProduct(torch.autograd.Function):
  """y = c * (x W^T + z A^T B^T) + bias in one pass over the output: z is x after dropout, B carries the scaling, c
  (fp32) is m / norm. Saves x, z A^T and the sum that c multiplies: one tensor of the output's size."""

  @staticmethod
  def forward(
    ctx: Any,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    keep: float,
  ) -> Tensor:
    x2 = x.reshape(-1, x.shape[-1])
    z = x2 if mask is None else x2 * mask
    h = torch.mm(z, a.t())
    if mask is not None:
      h /= keep
    u = torch.mm(x2, weight.t()).addmm_(h, b.t())
    ctx.save_for_backward(x2, weight, a, b, c, mask, h, u)
    ctx.keep, ctx.shape, ctx.bias_dtype = keep, x.shape, None if bias is None else bias.dtype
    return _affine(u, c, bias).view(*x.shape[:-1], -1)

  @staticmethod
  @once_differentiable
  def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, a, b, c, mask, h, u = ctx.saved_tensors
    needs = ctx.needs_input_grad
    g = grads[0].reshape(-1, grads[0].shape[-1])
    gc = torch.empty_like(g, memory_format=torch.contiguous_format)
    dc = _scale_and_reduce(g, u, c, gc)
    dh = torch.mm(gc, b)
    db = torch.mm(gc.t(), h) if needs[3] else None
    if mask is not None:
      dh /= ctx.keep
    da = torch.mm(dh.t(), x if mask is None else x * mask) if needs[2] else None
    dx = None
    if needs[0]:
      dx = torch.mm(gc, weight)
      dx = dx.addmm_(dh, a) if mask is None else dx.add_(torch.mm(dh, a).mul_(mask))
      dx = dx.view(ctx.shape)
    dbias = g.sum(0).to(ctx.bias_dtype) if needs[5] else None
    return dx, None, da, db, dc, dbias, None, None


def _affine(u: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
  """u * c + bias over the last dimension, computed in c's precision, in u's dtype."""
  if u.dtype == c.dtype:
    return u * c if bias is None else torch.addcmul(bias, u, c)
  y = u * c
  return (y if bias is None else y.add_(bias)).to(u.dtype)


def _scale_and_reduce(g: Tensor, u: Tensor, c: Tensor, gc: Tensor) -> Tensor:
  """Writes g * c into gc and returns the sum of g * u over rows, in c's precision. On the CPU in chunks, without a
  temporary of the output's size."""
  if g.is_cuda or g.dtype != c.dtype:
    gc.copy_(g * c)
    return torch.sum(g * u, 0, dtype=c.dtype)
  acc = torch.zeros(CHUNK, g.shape[1], dtype=c.dtype)
  for gi, ui, oi in zip(g.split(CHUNK), u.split(CHUNK), gc.split(CHUNK), strict=True):
    acc[: len(gi)].addcmul_(gi, ui)
    torch.mul(gi, c, out=oi)
  return acc.sum(0)


class Adapter(nn.Module):
  """A, B and m of one weight. The weight is seen as (groups, out / groups, in * kh * kw); A as (groups, r, ...), B as
  (groups, out / groups, r)."""

  def __init__(self, a: Tensor, b: Tensor, m: Tensor, scaling: float, groups: int = 1, dropout: float = 0.0):
    super().__init__()
    self.a, self.b, self.m = nn.Parameter(a), nn.Parameter(b), nn.Parameter(m)
    self.scaling, self.groups, self.dropout = scaling, groups, dropout
    self._square: tuple[Any, Tensor | None] = (None, None)

  @classmethod
  def new(cls, weight: Tensor, rank: int, scaling: float, groups: int = 1, dropout: float = 0.0) -> "Adapter":
    """One that changes nothing yet: A random as PEFT draws it, B zero, m the norms of the rows."""
    w = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    a = torch.empty(groups * rank, *w.shape[1:], dtype=w.dtype, device=w.device)
    nn.init.kaiming_uniform_(a, a=5**0.5)
    return cls(a, w.new_zeros(len(w), rank, *(1,) * (w.ndim - 2)), w.flatten(1).norm(dim=1), scaling, groups, dropout)

  def parts(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a, b = self.a.to(dtype), self.b.to(dtype)
    return a.reshape(self.groups, -1, a[0].numel()), b.reshape(self.groups, -1, b.shape[1])

  @torch.no_grad()
  def norm(self, weight: Tensor) -> Tensor:
    """Norms (out,) of the rows of W + s B A in fp32 or better, without forming it: ||w||^2 + 2 s rowsum(W A^T * B) +
    s^2 rowsum(B A A^T * B)."""
    with torch.autocast(weight.device.type, enabled=False):
      dtype = torch.promote_types(weight.dtype, torch.float32)
      a, b = self.parts(dtype)
      w = weight.to(dtype).reshape(*b.shape[:2], -1)
      square = self._weight_square(weight, w)
      cross = (torch.matmul(w, a.mT) * b).sum(-1).flatten() * (2 * self.scaling)
      low = (torch.matmul(b, torch.matmul(a, a.mT)) * b).sum(-1).flatten() * self.scaling**2
      total = square + cross + low
      lost = total < CANCELLED * (square + low)
      if not torch.compiler.is_compiling() and bool(lost.any()):
        rows = w.flatten(0, 1)[lost]
        group = lost.nonzero()[:, 0] // b.shape[1]
        rows = rows + self.scaling * torch.matmul(b.flatten(0, 1)[lost][:, None], a[group])[:, 0]
        total[lost] = rows.square().sum(-1)
      return total.clamp_min(0).sqrt().clamp_min(TINY)

  def _weight_square(self, weight: Tensor, w: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
      return w.square().sum(-1).flatten()
    key = (weight.data_ptr(), weight._version, weight.device, weight.dtype)
    if self._square[0] != key or self._square[1] is None:
      self._square = (key, w.square().sum(-1).flatten())
    return cast(Tensor, self._square[1])

  def scale(self, weight: Tensor) -> Tensor:
    """m / norm (out,), through which m learns; fp32 or better."""
    norm = self.norm(weight)
    return self.m.to(norm.dtype) / norm

  def effective(self, weight: Tensor) -> Tensor:
    """W' in the weight's shape and dtype."""
    c = self.scale(weight)
    with torch.autocast(weight.device.type, enabled=False):
      a, b = self.parts(c.dtype)
      v = weight.to(c.dtype) + torch.matmul(b * self.scaling, a).reshape(weight.shape)
      return (v * c.view(-1, *(1,) * (v.ndim - 1))).to(weight.dtype)

"""Several processes that learn from one batch as one process would: each runs the network over its share of the
examples. Batch norms take their statistics of all of them, and a loss that is no mean over examples, as one over known
pixels or over boxes, is taken of all outputs."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

# *** batch norms ***


class Normalized(torch.autograd.Function):
  """(x (N, C, ...), eps) -> x with mean 0 and variance 1 of each channel over all processes' examples; that mean; that
  variance, unbiased. In float32. No gradient through the latter two."""

  @staticmethod
  def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dims = [d for d in range(x.ndim) if d != 1]
    var, mean = torch.var_mean(x, dims, correction=0)
    n = x.numel() / x.shape[1]
    mine = torch.cat([mean, var, mean.new_tensor([n])])
    each = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(each, mine)
    means, variances = (torch.stack(y) for y in zip(*(e[:-1].chunk(2) for e in each), strict=True))
    counts = torch.stack([e[-1:] for e in each])
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    var = (counts * (variances + (means - mean) ** 2)).sum(0) / total
    shape = [1, -1] + [1] * (x.ndim - 2)
    scale = torch.rsqrt(var + eps).reshape(shape)
    out = (x - mean.reshape(shape)) * scale
    ctx.save_for_backward(out, scale, total)
    unbiased = var * (total / (total - 1).clamp(min=1))
    ctx.mark_non_differentiable(mean, unbiased)
    return out, mean, unbiased

  @staticmethod
  def backward(ctx: Any, *gradients: Any) -> Any:
    (grad, *_), (out, scale, total) = gradients, ctx.saved_tensors
    dims = [d for d in range(out.ndim) if d != 1]
    sums = torch.cat([grad.sum(dims), (grad * out).sum(dims)])
    dist.all_reduce(sums)
    mean, along = (s.reshape(scale.shape) for s in (sums / total).chunk(2))
    return scale * (grad - mean - out * along), None


TORCH_S = functional.batch_norm


def batch_norm(
  x: Tensor,
  running_mean: Tensor | None,
  running_var: Tensor | None,
  weight: Tensor | None = None,
  bias: Tensor | None = None,
  training: bool = False,
  momentum: float = 0.1,
  eps: float = 1e-5,
) -> Tensor:
  """torch.nn.functional.batch_norm() over the examples of all processes."""
  if not training:
    return TORCH_S(x, running_mean, running_var, weight, bias, False, momentum, eps)
  out, mean, var = Normalized.apply(x.float(), eps)
  if running_mean is not None and running_var is not None:
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_(var.to(running_var.dtype), momentum)
  shape = [1, -1] + [1] * (x.ndim - 2)
  if weight is not None:
    out = out * weight.reshape(shape)
  if bias is not None:
    out = out + bias.reshape(shape)
  return out.to(x.dtype)


@contextlib.contextmanager
def norms_of_all() -> Iterator[None]:
  """Within it every batch norm that is in training mode, torch's and those that other packages made of it, is one over
  all processes. torch.nn.SyncBatchNorm runs on GPUs alone, and is none of the other packages'."""
  setattr(functional, "batch_norm", batch_norm)  # noqa: B010
  try:
    yield
  finally:
    functional.batch_norm = TORCH_S


# *** outputs ***


def gathered_outputs(x: Any, frames: Sequence[int], clips: Sequence[int]) -> Any:
  """Tensors in dicts, lists and tuples whose first axis is this process's frames or clips -> that axis over all
  processes', by rank. frames, clips: of each process. Only this process's part has a gradient, which is scaled so that
  the mean over processes, which DistributedDataParallel takes, is the gradient of the loss of all."""
  if isinstance(x, dict):
    return {k: gathered_outputs(v, frames, clips) for k, v in x.items()}
  if isinstance(x, (list, tuple)):
    return type(x)(gathered_outputs(v, frames, clips) for v in x)
  if not torch.is_tensor(x) or not x.ndim:
    return x
  rank, world = dist.get_rank(), dist.get_world_size()
  rows = frames if len(x) == frames[rank] else clips
  if len(x) != rows[rank]:
    raise ValueError(f"an output of {list(x.shape)} is neither of {frames[rank]} frames nor of {clips[rank]} clips")
  padded = x.new_zeros((max(rows), *x.shape[1:]))  # what is gathered has one size everywhere
  padded[: len(x)] = x.detach()
  each = [torch.empty_like(padded) for _ in range(world)]
  dist.all_gather(each, padded)
  parts = [e[:n] for e, n in zip(each, rows, strict=True)]
  if x.requires_grad:
    own = x.view_as(x)
    own.register_hook(lambda g: g * world)
    parts[rank] = own
  return torch.cat(parts)

"""ONNX operators as torch functions: those that openpilot's networks and their kin use. Parameters of layers are not
here, see model.py.

Each takes (inputs, attributes, opset) with None for inputs left out, and gives one tensor or a tuple. Shapes, axes and
other integers come as int64 tensors."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Inputs = Sequence[Any]  # of Tensor | None
Attributes = dict[str, Any]
Op = Callable[[Inputs, Attributes, int], Any]

# onnx.TensorProto's numbers
DTYPES = {
  1: torch.float32,
  2: torch.uint8,
  3: torch.int8,
  5: torch.int16,
  6: torch.int32,
  7: torch.int64,
  9: torch.bool,
  10: torch.float16,
  11: torch.float64,
  16: torch.bfloat16,
}


def ints(x: Any) -> list[int]:
  return [int(v) for v in (x.tolist() if isinstance(x, Tensor) else x)] if not isinstance(x, int) else [x]


def axes_of(x: Inputs, a: Attributes, default: list[int] | None = None, at: int = 1) -> list[int] | None:
  """Axes are an attribute in old opsets, an input in new ones."""
  if len(x) > at and x[at] is not None:
    return ints(x[at])
  return ints(a["axes"]) if "axes" in a else default


def symmetric(a: Attributes, dims: int) -> list[int] | None:
  """ONNX's pads (all begins, all ends) where both sides are equal, else None."""
  pads = a.get("pads", [0] * (2 * dims))
  return list(pads[:dims]) if pads[:dims] == pads[dims:] else None


def torch_pads(pads: Sequence[int], dims: int) -> list[int]:
  """ONNX's order (begins, then ends, first axis first) -> torch's (pairs, last axis first)."""
  return [p for i in reversed(range(dims)) for p in (pads[i], pads[i + dims])]


def cast(x: Inputs, a: Attributes, opset: int) -> Tensor:
  to = DTYPES[a["to"]]
  if to in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    to = a["float"]  # the precision the module computes in
  return x[0] if x[0].dtype == to else x[0].to(to)


def gemm(x: Inputs, a: Attributes, opset: int) -> Tensor:
  left = x[0].transpose(0, 1) if a.get("transA") else x[0]
  right = x[1].transpose(0, 1) if a.get("transB") else x[1]
  out = a.get("alpha", 1.0) * (left @ right)
  return out if len(x) < 3 or x[2] is None else out + a.get("beta", 1.0) * x[2]


def softmax(x: Inputs, a: Attributes, opset: int, log: bool = False) -> Tensor:
  f = F.log_softmax if log else F.softmax
  if opset >= 13:
    return f(x[0], dim=a.get("axis", -1))
  axis = a.get("axis", 1) % x[0].dim()  # flattened from `axis` on
  return f(x[0].flatten(axis), dim=-1).reshape(x[0].shape) if axis else f(x[0].flatten(), dim=0).reshape(x[0].shape)


def reshape(x: Inputs, a: Attributes, opset: int) -> Tensor:
  shape = ints(x[1])
  if not a.get("allowzero"):
    shape = [x[0].shape[i] if s == 0 else s for i, s in enumerate(shape)]
  # a graph that was exported for one example is given several: they stay the first axis (OnnxModule checks that this is
  # right)
  if -1 not in shape and shape and math.prod(shape) != x[0].numel() and x[0].numel() % max(1, math.prod(shape)) == 0:
    shape[0] *= x[0].numel() // math.prod(shape)
  elif -1 in shape and shape[0] == 1 and a.get("batch", 1) > 1 and x[0].dim() and x[0].shape[0] % a["batch"] == 0:
    shape[0] = a["batch"]
  return x[0].reshape(shape)


def slice_(x: Inputs, a: Attributes, opset: int) -> Tensor:
  given = [None if len(x) <= i or x[i] is None else ints(x[i]) for i in range(1, 5)]
  starts, ends = (
    given[0] if given[0] is not None else ints(a["starts"]),
    given[1] if given[1] is not None else ints(a["ends"]),
  )
  axes = given[2] or a.get("axes") or list(range(len(starts)))
  out = x[0]
  for start, end, axis, step in zip(starts, ends, axes, given[3] or [1] * len(starts), strict=True):
    n = out.shape[axis]
    if step < 0:
      backwards = list(range(n))[slice(max(start, -n - 1), None if end < -n else end, step)]
      out = out.index_select(axis, torch.tensor(backwards, dtype=torch.int64, device=out.device))
    else:
      index: list[slice] = [slice(None)] * out.dim()
      index[axis] = slice(start, min(end, n), step)
      out = out[tuple(index)]
  return out


def split(x: Inputs, a: Attributes, opset: int) -> tuple[Tensor, ...]:
  axis = a.get("axis", 0)
  if len(x) > 1 and x[1] is not None:
    return torch.split(x[0], ints(x[1]), axis)
  if "split" in a:
    return torch.split(x[0], ints(a["split"]), axis)
  n = a.get("num_outputs", a["outputs"])
  return torch.split(x[0], -(-x[0].shape[axis] // n), axis)


def gather(x: Inputs, a: Attributes, opset: int) -> Tensor:
  axis = a.get("axis", 0) % x[0].dim()
  index = x[1].long()
  index = torch.where(index < 0, index + x[0].shape[axis], index)
  return x[0].index_select(axis, index.flatten()).reshape((*x[0].shape[:axis], *index.shape, *x[0].shape[axis + 1 :]))


def concat(x: Inputs, a: Attributes, opset: int) -> Tensor:
  axis = a["axis"] % x[0].dim()
  batch = max(t.shape[0] for t in x)
  if axis and batch > 1:  # a constant of one example beside several
    x = [t.expand(batch, *t.shape[1:]) if t.shape[0] == 1 else t for t in x]
  return torch.cat(list(x), axis)


def unsqueeze(x: Inputs, a: Attributes, opset: int) -> Tensor:
  axes = axes_of(x, a) or []
  out, n = x[0], x[0].dim() + len(axes)
  for axis in sorted(i % n for i in axes):
    out = out.unsqueeze(axis)
  return out


def squeeze(x: Inputs, a: Attributes, opset: int) -> Tensor:
  axes = axes_of(x, a)
  return x[0].squeeze() if axes is None else x[0].squeeze(tuple(axes))


def clip(x: Inputs, a: Attributes, opset: int) -> Tensor:
  lo = x[1] if len(x) > 1 else a.get("min")
  hi = x[2] if len(x) > 2 else a.get("max")
  return (
    x[0]
    if lo is None and hi is None
    else torch.clamp(x[0], *(v.item() if isinstance(v, Tensor) else v for v in (lo, hi)))
  )


def pad(x: Inputs, a: Attributes, opset: int) -> Tensor:
  pads = ints(x[1]) if len(x) > 1 and x[1] is not None else ints(a["pads"])
  value = float(x[2]) if len(x) > 2 and x[2] is not None else a.get("value", 0.0)
  mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}[a.get("mode", "constant")]
  p = torch_pads(pads, len(pads) // 2)
  if mode == "constant":
    return F.pad(x[0], p, value=value)
  while p and p[-2:] == [0, 0]:
    p = p[:-2]
  return F.pad(x[0], p, mode=mode) if p else x[0]


def pool(x: Inputs, a: Attributes, opset: int, average: bool = False) -> Tensor:
  k = a["kernel_shape"]
  dims = len(k)
  stride, dilation, ceil = a.get("strides", [1] * dims), a.get("dilations", [1] * dims), bool(a.get("ceil_mode"))
  pads = symmetric(a, dims)
  if average:
    f = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1]
    if pads is None:
      raise NotImplementedError("AveragePool with other pads on one side than on the other")
    return f(x[0], k, stride, pads, ceil, bool(a.get("count_include_pad")))
  g = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]
  if pads is None:
    return g(F.pad(x[0], torch_pads(a["pads"], dims), value=-math.inf), k, stride, 0, dilation, ceil)
  return g(x[0], k, stride, pads, dilation, ceil)


def reduce(f: Callable[..., Tensor]) -> Op:
  def run(x: Inputs, a: Attributes, opset: int) -> Tensor:
    axes = axes_of(x, a)
    if axes is None or not axes:
      if a.get("noop_with_empty_axes"):
        return x[0]
      axes = list(range(x[0].dim()))
    return f(x[0], axes, bool(a.get("keepdims", 1)))

  return run


def layer_norm(x: Inputs, a: Attributes, opset: int) -> Tensor:
  axis = a.get("axis", -1) % x[0].dim()
  shape = list(x[0].shape[axis:])
  return F.layer_norm(
    x[0], shape, x[1].expand(shape), None if len(x) < 3 or x[2] is None else x[2].expand(shape), a.get("epsilon", 1e-5)
  )


def expand(x: Inputs, a: Attributes, opset: int) -> Tensor:
  return x[0].expand(torch.broadcast_shapes(x[0].shape, tuple(ints(x[1]))))


def div(x: Inputs, a: Attributes, opset: int) -> Tensor:
  return x[0] / x[1] if x[0].dtype.is_floating_point else torch.div(x[0], x[1], rounding_mode="trunc")


def resize(x: Inputs, a: Attributes, opset: int) -> Tensor:
  mode, how = (
    a.get("mode", "nearest"),
    a.get("coordinate_transformation_mode", "half_pixel" if opset > 10 else "asymmetric"),
  )
  sizes = ints(x[3]) if len(x) > 3 and x[3] is not None and x[3].numel() else None
  scales = None if sizes else [float(s) for s in (x[2] if opset > 10 else x[1]).tolist()]
  new = sizes[2:] if sizes else [int(n * s) for n, s in zip(x[0].shape[2:], (scales or [])[2:], strict=True)]
  if mode == "nearest" and all(b % n == 0 for n, b in zip(x[0].shape[2:], new, strict=True)):
    return F.interpolate(x[0], size=new, mode="nearest")
  if mode == "linear" and how in ("half_pixel", "pytorch_half_pixel", "align_corners") and x[0].dim() == 4:
    return F.interpolate(x[0], size=new, mode="bilinear", align_corners=how == "align_corners")
  raise NotImplementedError(f"Resize {mode} {how} from {list(x[0].shape[2:])} to {new}")


def gelu(x: Inputs, a: Attributes, opset: int) -> Tensor:
  return F.gelu(x[0], approximate=a.get("approximate", "none"))


def hard_sigmoid(x: Inputs, a: Attributes, opset: int) -> Tensor:
  return torch.clamp(a.get("alpha", 0.2) * x[0] + a.get("beta", 0.5), 0, 1)


def folded(f: Callable[[Tensor, Tensor], Tensor]) -> Op:
  def run(x: Inputs, a: Attributes, opset: int) -> Tensor:
    out = x[0]
    for t in x[1:]:
      out = f(out, t)
    return out

  return run


def arange(x: Inputs, a: Attributes, opset: int) -> Tensor:
  return torch.arange(x[0].item(), x[1].item(), x[2].item(), dtype=x[0].dtype, device=x[0].device)


def unary(f: Any) -> Op:
  return lambda x, a, opset: f(x[0])


def binary(f: Any) -> Op:
  return lambda x, a, opset: f(x[0], x[1])


OPS: dict[str, Op] = {
  **{
    k: unary(f)
    for k, f in {
      "Relu": F.relu,
      "Sigmoid": torch.sigmoid,
      "Tanh": torch.tanh,
      "Sqrt": torch.sqrt,
      "Exp": torch.exp,
      "Log": torch.log,
      "Erf": torch.erf,
      "Neg": torch.neg,
      "Abs": torch.abs,
      "Floor": torch.floor,
      "Ceil": torch.ceil,
      "Round": torch.round,
      "Reciprocal": torch.reciprocal,
      "Sin": torch.sin,
      "Cos": torch.cos,
      "Softplus": F.softplus,
      "Mish": F.mish,
      "HardSwish": F.hardswish,
      "Not": torch.logical_not,
      "Sign": torch.sign,
      "Identity": lambda x: x,
      "Dropout": lambda x: x,  # a network that is tuned is not regularised again
      "GlobalAveragePool": lambda x: x.mean(dim=tuple(range(2, x.dim())), keepdim=True),
      "GlobalMaxPool": lambda x: x.amax(dim=tuple(range(2, x.dim())), keepdim=True),
      "Shape": lambda x: torch.tensor(x.shape, dtype=torch.int64),
      "Size": lambda x: torch.tensor(x.numel(), dtype=torch.int64),
    }.items()
  },
  **{
    k: binary(f)
    for k, f in {
      "Add": torch.add,
      "Sub": torch.sub,
      "Mul": torch.mul,
      "Pow": torch.pow,
      "MatMul": torch.matmul,
      "Equal": torch.eq,
      "Less": torch.lt,
      "Greater": torch.gt,
      "LessOrEqual": torch.le,
      "GreaterOrEqual": torch.ge,
      "And": torch.logical_and,
      "Or": torch.logical_or,
      "PRelu": lambda x, w: torch.where(x < 0, x * w, x),
    }.items()
  },
  **{
    k: reduce(f)
    for k, f in {
      "ReduceMean": lambda x, d, k: x.mean(d, k),
      "ReduceSum": lambda x, d, k: x.sum(d, k),
      "ReduceMax": lambda x, d, k: x.amax(d, k),
      "ReduceMin": lambda x, d, k: x.amin(d, k),
      "ReduceL2": lambda x, d, k: torch.linalg.vector_norm(x, 2, d, k),
      "ReduceSumSquare": lambda x, d, k: x.square().sum(d, k),
    }.items()
  },
  "Max": folded(torch.maximum),
  "Min": folded(torch.minimum),
  "Sum": folded(torch.add),
  "Div": div,
  "Gemm": gemm,
  "Cast": cast,
  "Softmax": softmax,
  "LogSoftmax": lambda x, a, o: softmax(x, a, o, log=True),
  "Elu": lambda x, a, o: F.elu(x[0], a.get("alpha", 1.0)),
  "LeakyRelu": lambda x, a, o: F.leaky_relu(x[0], a.get("alpha", 0.01)),
  "Gelu": gelu,
  "HardSigmoid": hard_sigmoid,
  "Reshape": reshape,
  "Slice": slice_,
  "Split": split,
  "Gather": gather,
  "Concat": concat,
  "Transpose": lambda x, a, o: x[0].permute(a.get("perm", list(reversed(range(x[0].dim()))))),
  "Unsqueeze": unsqueeze,
  "Squeeze": squeeze,
  "Flatten": lambda x, a, o: x[0].reshape(math.prod(x[0].shape[: a.get("axis", 1)]), -1),
  "Clip": clip,
  "Pad": pad,
  "MaxPool": pool,
  "AveragePool": lambda x, a, o: pool(x, a, o, average=True),
  "LayerNormalization": layer_norm,
  "Expand": expand,
  "Resize": resize,
  "Range": arange,
  "Where": lambda x, a, o: torch.where(x[0], x[1], x[2]),
  "Tile": lambda x, a, o: x[0].repeat(ints(x[1])),
  "ConstantOfShape": lambda x, a, o: (
    a["value"].reshape(()).expand(ints(x[0])).clone() if "value" in a else torch.zeros(ints(x[0]))
  ),
}

"""The flat vector that a driving model puts out, cut and parsed as openpilot does it; in numpy and, differentiable, in
torch."""

import base64
import binascii
import io
import pickle
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import torch

from openpilot.tools.dgx.training.constants import (
  ACTION_WIDTH,
  DESIRE_LEN,
  DESIRE_PRED_STEPS,
  LEAD_HYPOTHESES,
  LEAD_STEPS,
  LEAD_WIDTH,
  LEADS,
  PARSED_SHAPES,
  PLAN_HYPOTHESES,
  PLAN_SIZE,
)
from openpilot.tools.lib.errors import UserError

A = TypeVar("A", np.ndarray, torch.Tensor)

EXP_MAX = 11.0  # float16 overflows above
SLICES_KEY = "output_slices"


class SliceUnpickler(pickle.Unpickler):
  """A pickle of a dict of slices needs one global, `slice`; a pickle that asks for anything else may run code, and is
  refused."""

  def find_class(self, module: str, name: str) -> Any:
    if module in ("builtins", "__builtin__") and name == "slice":
      return slice
    raise pickle.UnpicklingError(f"it asks for {module}.{name}")

  def persistent_load(self, pid: Any) -> Any:
    raise pickle.UnpicklingError("it asks for a persistent object")


def decode_slices(text: str, where: str = "output_slices") -> dict[str, slice]:
  """base64 pickle -> {name: slice}. Raises UserError for anything but a dict of slices of plain ints."""
  try:
    found = SliceUnpickler(io.BytesIO(base64.b64decode("".join(text.split()), validate=True))).load()
  except binascii.Error as e:
    raise UserError(
      f"{where}: the output_slices are not base64 ({e}); take the model file from openpilot again"
    ) from None
  except Exception as e:  # a broken pickle raises nearly anything
    raise UserError(
      f"{where}: the output_slices are refused: {e}; only a dict of slices is read, take the model file from a source "
      "you trust"
    ) from None

  def plain(s: Any) -> bool:
    return (
      type(s) is slice
      and type(s.start) is int
      and type(s.stop) is int
      and s.step in (None, 1)
      and 0 <= s.start < s.stop
    )

  if type(found) is not dict or not found or not all(type(k) is str and plain(v) for k, v in found.items()):
    raise UserError(
      f"{where}: the output_slices are not a dict of names and slices; take the model file from openpilot again"
    )
  return found


def encode_slices(slices: dict[str, slice]) -> str:
  """As openpilot writes it into the ONNX file's metadata."""
  return base64.encodebytes(pickle.dumps(slices)).decode()


def model_slices(model: onnx.ModelProto, where: str) -> dict[str, slice]:
  """The slices of a loaded file, checked against its output's size. Raises UserError where there are none."""
  text = next((p.value for p in model.metadata_props if p.key == SLICES_KEY), None)
  if text is None:
    raise UserError(f"{where} has no output_slices in its metadata; it is not one of openpilot's driving models")
  slices = decode_slices(text, where)
  size = model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value
  last = max(s.stop for s in slices.values())
  if size and last > size:
    raise UserError(
      f"{where}: output_slices reach {last}, its output has {size} numbers; file and metadata are of different models"
    )
  return slices


def read_slices(path: str | Path) -> dict[str, slice]:
  """{output's name: its slice of the flat vector} of an ONNX file. Raises UserError where the file or its metadata is
  none of openpilot's."""
  try:
    model = onnx.load(str(path), load_external_data=False)
  except FileNotFoundError:
    raise UserError(f"there is no {path}") from None
  except Exception as e:  # protobuf's errors have no common base
    raise UserError(
      f"{path} is not an ONNX file: {str(e).splitlines()[0][:120]}; a git-lfs pointer must be pulled first"
    ) from None
  return model_slices(model, str(path))


def _exp(x: A) -> A:
  if isinstance(x, torch.Tensor):
    return torch.exp(torch.clamp(x, max=EXP_MAX))
  return np.exp(np.minimum(x, np.asarray(EXP_MAX, x.dtype)))


def sigmoid(x: A) -> A:
  return 1.0 / (1.0 + _exp(-x))


def softmax(x: A, axis: int = -1) -> A:
  if isinstance(x, torch.Tensor):
    return torch.softmax(x, axis)
  e = _exp(x - x.max(axis=axis, keepdims=True))
  return e / e.sum(axis=axis, keepdims=True)


def _best_first(weights: A) -> A:
  """(B, N, ...) -> indices along axis 1, the largest first; of equal ones the last, as numpy's argsort reversed."""
  if isinstance(weights, torch.Tensor):
    return torch.flip(torch.argsort(weights.detach(), dim=1, stable=True), (1,))
  return np.flip(np.argsort(weights, axis=1, kind="stable"), 1)


def _take(x: A, index: A) -> A:
  """x (B, N, V), index (B, K) -> (B, K, V)."""
  if isinstance(x, torch.Tensor):
    return torch.take_along_dim(x, index[:, :, None], 1)
  return np.take_along_axis(x, index[:, :, None], 1)


def parse_mdn(name: str, raw: A, shape: tuple[int, ...], hypotheses: int = 0, selections: int = 0) -> dict[str, A]:
  """raw (B, W) -> mean and scale, `name` and `name`_stds (B, [selections,] *shape). With several hypotheses also
  `name`_weights (B, N, selections), `name`_hypotheses and `name`_stds_hypotheses (B, N, *shape), the likeliest first
  where there is one selection."""
  batch = raw.shape[0]
  raw = raw.reshape((batch, max(hypotheses, 1), -1))
  n = (raw.shape[2] - selections) // 2
  mean, std = raw[:, :, :n], _exp(raw[:, :, n : 2 * n])
  if hypotheses <= 1:
    return {name: mean.reshape((batch, *shape)), f"{name}_stds": std.reshape((batch, *shape))}
  weights = softmax(raw[:, :, 2 * n :], axis=1)
  order = _best_first(weights)
  if selections == 1:
    first = order[:, :, 0]
    weights, mean, std = _take(weights, first), _take(mean, first), _take(std, first)
    order = order * 0
  out = {
    f"{name}_weights": weights,
    f"{name}_hypotheses": mean.reshape((batch, hypotheses, *shape)),
    f"{name}_stds_hypotheses": std.reshape((batch, hypotheses, *shape)),
  }
  final = (batch, *((selections,) if selections > 1 else ()), *shape)
  best = order[:, 0, :]
  return {**out, name: _take(mean, best).reshape(final), f"{name}_stds": _take(std, best).reshape(final)}


def parse_outputs(vector: A, slices: dict[str, slice]) -> dict[str, A]:
  """(B, N) float -> physical quantities, as openpilot's parser gives them: pose, lane_lines, plan, ... with *_stds;
  probabilities through sigmoid or softmax. Whatever the model does not have is left out; outputs that openpilot does
  not parse come raw. Raises UserError where a slice's width fits no known layout."""
  out: dict[str, A] = {}
  for name, s in slices.items():
    raw = vector[:, s]
    width = s.stop - s.start
    if name == "plan" and width == PLAN_HYPOTHESES * (2 * PLAN_SIZE + 1):
      out.update(parse_mdn(name, raw, PARSED_SHAPES[name], PLAN_HYPOTHESES, 1))
    elif name == "lead" and width == LEAD_HYPOTHESES * (2 * LEAD_STEPS * LEAD_WIDTH + LEADS):
      out.update(parse_mdn(name, raw, (LEAD_STEPS, LEAD_WIDTH), LEAD_HYPOTHESES, LEADS))
    elif name == "action" and width == ACTION_WIDTH:
      out[name] = raw
    elif name in PARSED_SHAPES or name == "desired_curvature":
      shape = PARSED_SHAPES.get(name, (1,))
      if width != 2 * int(np.prod(shape)):
        more = f", or {LEAD_HYPOTHESES} hypotheses" if name == "lead" else ", or 5 hypotheses" if name == "plan" else ""
        raise UserError(
          f"output '{name}' has {width} numbers, openpilot's has mean and scale of {shape}{more}; this model is of "
          "another openpilot version"
        )
      out.update(parse_mdn(name, raw, shape))
    elif name in ("lane_lines_prob", "lead_prob", "meta"):
      out[name] = sigmoid(raw)
    elif name == "desire_pred":
      out[name] = softmax(raw.reshape((raw.shape[0], DESIRE_PRED_STEPS, DESIRE_LEN)))
    elif name == "desire_state":
      out[name] = softmax(raw)
    else:
      out[name] = raw
  return out

"""Quantization-aware training: which calls of a student's forward make the tensors that its graph will have in 8 bits,
and where their ranges start. What it learned comes into the graph that PTQ makes by learned.py."""

import copy
import tempfile
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
import torch.nn.functional as F

from openpilot.tools.fair.bundle.export import real_inputs
from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.optimize.bias import shifts
from openpilot.tools.fair.optimize.quantize import (
  ACTIVATIONS,
  LAYERS,
  TARGETS,
  Calibrated,
  Target,
  calibrate,
  last_layers,
  prepare,
  quantize,
  trunk,
)
from openpilot.tools.fair.optimize.sensitivity import channel_axis, run_all
from openpilot.tools.fair.students.fake_quant import AXIS, Calls, Rounding
from openpilot.tools.fair.students.onnx_export import export_onnx
from openpilot.tools.fair.students.student import Student
from openpilot.tools.fair.students.widths import BatchNorm
from openpilot.tools.fair.tasks import TASKS
from openpilot.tools.lib.errors import UserError

NEAR = 1e-3  # of a tensor's largest value: how far torch and ONNX Runtime may be from each other


def outputs_of(config: Config) -> tuple[tuple[str, ...], set[str]]:
  """As export_onnx() takes them: how the names of those begin that are exported, and which of them are not."""
  return tuple(o for t in config.tasks for o in TASKS[t].outputs), config.untaught


def rounding_of(student: Student, config: Config) -> Rounding:
  """What of a student that learns in 8 bits is rounded. Raises UserError where a tensor of its graph is not found in
  it."""
  target = TARGETS[config.qat]
  plan = make_plan(student, *outputs_of(config), target)
  if plan.absent:
    raise UserError(
      f"--qat: {config.student} on {config.backbone_name} has tensors in its graph that no call makes, "
      f"{len(plan.absent)} of {len(plan.tensors) + len(plan.absent)}, the first is {plan.absent[0]}"
    )
  return Rounding(plan.tensors, plan.values, plan.layers, plan.nodes, target.symmetric, target.limit, target.whole)


@dataclass
class Plan:
  """tensors: of the graph -> its range's name, that of the first call that makes it. made: the same -> all calls that
  do. values, layers: see Rounding.
  nodes: layer of the graph -> its call. absent: tensors that are rounded in the graph and that no call makes."""

  tensors: dict[str, str]
  made: dict[str, list[str]]
  values: dict[str, str]
  layers: dict[str, str]
  nodes: dict[str, str]
  absent: list[str]


def told_apart(student: Student) -> tuple[Student, Tensor]:
  """-> a copy with weights of which no two layers say the same, and a frame to see."""
  twin = copy.deepcopy(student).cpu().float()
  r = torch.Generator().manual_seed(0)
  frame = torch.randint(0, 256, (2, *twin.spec.input.shape), dtype=torch.uint8, generator=r)
  with torch.no_grad():
    for m in twin.modules():
      if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
        m.weight.normal_(0, m.weight[0].numel() ** -0.5, generator=r)
        if m.bias is not None:
          m.bias.uniform_(-0.1, 0.1, generator=r)
      elif isinstance(m, BatchNorm) and m.affine:
        m.weight.uniform_(0.5, 1.5, generator=r)
        m.bias.uniform_(-0.5, 0.5, generator=r)
        m.momentum = None
        m.reset_running_stats()
    twin.train()
    twin.encode(frame)
  return twin.eval(), frame[:1]


class Record(Calls):
  """values: of each call that makes maps these. layers: of each convolution its weights, and its norm's name."""

  def __init__(self, student: nn.Module):
    super().__init__(student)
    self.values: dict[str, Tensor] = {}
    self.weights: dict[str, tuple[Tensor, int]] = {}
    self.norms: dict[str, str] = {}
    self.said: list[tuple[str, Tensor]] = []

  def called(self, place: str, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    before = args[0] if func is F.batch_norm else None
    self.norms |= {conv: place.partition(":")[0] for conv, y in self.said if y is before}
    out = func(*args, **kwargs)
    if func in AXIS:
      self.weights[place] = args[1].detach().clone(), AXIS[func]
      self.said.append((place, out))
    if torch.is_tensor(out) and out.dim() == 4 and out.is_floating_point():
      self.values[place] = out.detach().clone()
    return out


def rounded_in(model: onnx.ModelProto, target: Target, inputs: dict[str, np.ndarray]) -> list[str]:
  """Tensors of a prepared graph whose values are rounded where all of it is in 8 bits that may be, each with a range of
  its own: what ONNX Runtime's quantizer makes of it says so."""
  made = onnx.load_from_string(quantize(calibrate(model, [inputs], target.symmetric), target, last_layers(model), None))
  constants = {i.name for i in made.graph.initializer}
  out: dict[str, str] = {}  # a scale -> the first tensor that has it: a copy of the others are as they are
  for n in made.graph.node:
    if n.op_type == "QuantizeLinear" and n.input[0] not in constants:
      out.setdefault(n.input[1], n.input[0])
  return list(out.values())


def alike(a: np.ndarray, b: np.ndarray) -> bool:
  return a.shape == b.shape and bool(np.abs(a - b).max() <= NEAR * max(np.abs(b).max(), 1e-12))


def by_channel(w: np.ndarray, axis: int) -> np.ndarray:
  """Weights as they are but for a norm's gain."""
  return w / np.maximum(np.abs(w).max(axis=tuple(d for d in range(w.ndim) if d != axis), keepdims=True), 1e-12)


def make_plan(student: Student, keep: tuple[str, ...], leave: Container[str], target: Target) -> Plan:
  """keep, leave: outputs, as export_onnx() takes them: the graph's tensors are called as in that export. Calls and
  tensors are matched by what they say where all weights are other numbers."""
  twin, frame = told_apart(student)
  with tempfile.TemporaryDirectory() as tmp:
    path = Path(tmp) / "twin.onnx"
    export_onnx(twin, path, keep, leave)
    model = prepare(path.read_bytes())
  inputs = inputs_with(twin, model, [frame[0].numpy()])[0]
  with torch.no_grad(), Record(twin) as record:
    twin.encode(frame)
  wanted = rounded_in(model, target, inputs)
  said = dict(zip(wanted, values_of(model, wanted, inputs), strict=True))
  plan = Plan({}, {}, {}, {}, {}, [])
  for tensor, want in said.items():
    calls = [place for place, got in record.values.items() if alike(got.numpy(), want)]
    if not calls:
      plan.absent.append(tensor)
      continue
    plan.made[tensor] = calls
    plan.tensors[tensor] = plan.values.get(calls[0], calls[0])
    plan.values |= dict.fromkeys(calls, plan.tensors[tensor])
  for node in model.graph.node:  # where what goes into an activation is rounded, too, it is so by the same range
    ends = node.input[0], node.output[0]
    if node.op_type in ACTIVATIONS and all(t in plan.tensors for t in ends):
      before, own = (plan.tensors[t] for t in ends)
      plan.tensors[ends[0]] = own
      plan.values = {place: own if name == before else name for place, name in plan.values.items()}
  constants = {i.name: i for i in model.graph.initializer}
  inside = set(trunk(model, last_layers(model)))
  for node in model.graph.node:
    if node.name in inside and node.op_type in LAYERS:
      axis = channel_axis(node)
      w = by_channel(numpy_helper.to_array(constants[node.input[1]]), axis)
      found = [p for p, (own, a) in record.weights.items() if a == axis and alike(by_channel(own.numpy(), axis), w)]
      if not found:
        raise UserError(f"{student.name}: the graph has a layer {node.name} that no convolution of the student is")
      plan.layers |= {place: record.norms.get(place, "") for place in found}
      plan.nodes[node.name] = found[0]
  return plan


def inputs_with(student: Student, model: onnx.ModelProto, frames: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
  """Of the graph, with these frames; those of the tracker, on which nothing depends that is in 8 bits, are made up."""
  made_up = real_inputs(student, None, 0)
  names = [i.name for i in model.graph.input]
  found = [{**made_up[k % len(made_up)], "frame": torch.from_numpy(f)[None]} for k, f in enumerate(frames)]
  return [{n: x[n].numpy() for n in names} for x in found]


def values_of(model: onnx.ModelProto, tensors: Sequence[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
  """Of tensors within the graph."""
  open_one = onnx.ModelProto()
  open_one.CopyFrom(model)
  there = {o.name for o in model.graph.output}
  open_one.graph.output.extend(
    onnx.helper.make_tensor_value_info(t, onnx.TensorProto.FLOAT, None) for t in tensors if t not in there
  )
  out = run_all(open_one.SerializeToString(), [inputs])[0]
  return [out[t] for t in tensors]


def observed(
  student: Student, rounding: Rounding, config: Config, frames: Sequence[np.ndarray]
) -> tuple[dict[str, tuple[float, float]], dict[str, Tensor]]:
  """What PTQ takes from these frames, (*its input) uint8: where each range starts, and what is added to biases, see
  Rounding.shift()."""
  with tempfile.TemporaryDirectory() as tmp:
    path = Path(tmp) / "student.onnx"
    export_onnx(copy.deepcopy(student).cpu(), path, *outputs_of(config))
    model = prepare(path.read_bytes())
  inputs = inputs_with(student, model, frames)
  found = calibrate(model, inputs, rounding.symmetric)
  more = shifts(found, TARGETS[config.qat], inputs, list(rounding.nodes))
  ranges = {name: range_of(found, tensor) for tensor, name in rounding.tensors.items()}
  return ranges, {k: torch.from_numpy(v) for k, v in more.items()}


def range_of(calibrated: Calibrated, tensor: str) -> tuple[float, float]:
  low, high = (float(np.asarray(v).reshape(-1)[0]) for v in calibrated.ranges[tensor].range_value)
  return low, high

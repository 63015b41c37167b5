"""Post-training quantization of one graph by ONNX Runtime's quantizer: QuantizeLinear and DequantizeLinear around what
is computed in 8 bits, in the form that each target wants.

What breaks otherwise, and why the settings are these: docs/optimize.md."""

import contextlib
import io
import logging
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

import openpilot.selfdrive.modeld.fair.ort  # noqa: F401  (before ONNX Runtime's quantizer: its telemetry is off)
from openpilot.tools.fair.students.onnx_export import store_half
from openpilot.tools.fair.students.onnx_pads import drop_unused, fold_pads
from openpilot.tools.lib.errors import UserError

PERCENTILE = 99.999  # of a tensor's values that its 8 bits cover
AT_ONCE = 4  # frames whose activations are held at a time
LAYERS = ("Conv", "ConvTranspose")  # with weights: what the search decides on
# what is quantized between layers, so that values stay in 8 bits from one to the next
BETWEEN = (
  "Add",
  "AveragePool",
  "Clip",
  "Concat",
  "GlobalAveragePool",
  "HardSigmoid",
  "LeakyRelu",
  "MaxPool",
  "Mul",
  "Pad",
  "Relu",
  "Resize",
  "Sigmoid",
)
ACTIVATIONS = ("Clip", "Relu")  # that a layer's kernel computes, too
NEVER = ("MatMul", "Gemm")  # products of attention and of coordinates: 8 bits move boxes and points
QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger", "MatMulInteger", "QLinearMatMul")


@dataclass(frozen=True)
class Target:
  """activations: uint8 or int8; symmetric: with their zero in the middle; narrow: weights of 7 bits; whole: one scale
  for all weights of a layer, in place of one for each channel."""

  says: str
  activations: str = "uint8"
  symmetric: bool = False
  narrow: bool = False
  whole: bool = False

  @property
  def limit(self) -> int:
    """The most steps of a weight from 0."""
    return 64 if self.narrow else 127


TARGETS = {
  "x86-vnni": Target("x86-64 with AVX512-VNNI or AVX-VNNI, ONNX Runtime"),
  "x86": Target("x86-64 without: weights of 7 bits, since sums of two products saturate int16 in silence", narrow=True),
  "aarch64": Target("64-bit ARM, ONNX Runtime", "int8"),
  "tensorrt": Target("NVIDIA's GPUs, TensorRT: all zero points are 0", "int8", True),
  "tinygrad": Target("tinygrad: the operators of ONNX alone"),
}


ROUNDED = "x86-vnni"  # what students learn in 8 bits for, where none is said: aarch64's and tinygrad's are the same


def prepare(blob: bytes) -> onnx.ModelProto:
  """A graph's file -> the graph with weights of float32, batch norms folded, every tensor's shape known, every node
  named. Raises UserError where it is quantized already, or ONNX Runtime cannot prepare it."""
  from onnxruntime.quantization.shape_inference import quant_pre_process

  try:
    model = onnx.load_from_string(blob)
  except Exception as e:  # protobuf's own
    raise UserError(f"it is no ONNX graph: {str(e).splitlines()[0][:120]}") from None
  if found := next((n.op_type for n in model.graph.node if n.op_type in QUANTIZED), None):
    raise UserError(f"the graph is quantized already: it has {found}; give the bundle that it was made of")
  with tempfile.TemporaryDirectory() as tmp:
    source, out = Path(tmp) / "in.onnx", Path(tmp) / "out.onnx"
    source.write_bytes(blob)
    try:
      # symbolic shape inference is of sympy, and our shapes are constants
      quant_pre_process(source, out, skip_symbolic_shape=True)
      model = onnx.load(str(out))
    except Exception as e:  # ONNX Runtime's have no common base
      raise UserError(f"ONNX Runtime cannot prepare it: {str(e).splitlines()[0][:160]}") from None
  taken: set[str] = set()
  for n, node in enumerate(model.graph.node):
    if not node.name or node.name in taken:
      node.name = f"{node.op_type}_{n}"
    taken.add(node.name)
  fold_pads(model)  # of bundles from before export did so; there is no Pad of 8 bits between Q and DQ
  return model


def trunk(model: onnx.ModelProto, leave: Iterable[str] = ()) -> list[str]:
  """Nodes that are quantized: LAYERS but those that are left float, their activations, and what lies BETWEEN them. What
  takes a value of anything else, or leads to no such layer, computes with coordinates, scores or attention, and stays
  float; so does what lies between layers that stay float."""
  left = set(leave)
  constants = {i.name for i in model.graph.initializer}
  constants |= {o for n in model.graph.node if n.op_type == "Constant" for o in n.output}
  inside: dict[str, bool] = {}  # tensor -> whether it comes of the trunk
  nodes = []
  for node in model.graph.node:  # in order: what goes in was there before
    values = [i for i in node.input if i and i not in constants]
    mine = (node.op_type in LAYERS and node.name not in left) or (
      node.op_type in BETWEEN and bool(values) and all(inside.get(i, False) for i in values)
    )
    inside |= dict.fromkeys(node.output, mine)
    if mine:
      nodes.append(node)
  wanted: set[str] = set()  # tensors that lead to a layer
  kept = []
  layers = {n.output[0] for n in nodes if n.op_type in LAYERS}
  for node in reversed(nodes):
    activation = node.op_type in ACTIVATIONS and node.input[0] in layers  # computed with it, and half of its range
    if node.op_type in LAYERS or activation or wanted & set(node.output):
      wanted |= set(node.input)
      kept.append(node.name)
  return kept[::-1]


def last_layers(model: onnx.ModelProto) -> list[str]:
  """Nodes of LAYERS between which and some output of the graph is no other one: what they say is the answer itself."""
  by_output = {o: n for n in model.graph.node for o in n.output}
  found, seen = [], set()
  todo = [o.name for o in model.graph.output]
  while todo:
    node = by_output.get(todo.pop())
    if node is None or node.name in seen:
      continue
    seen.add(node.name)
    if node.op_type in LAYERS:
      found.append(node.name)
    elif node.op_type not in NEVER:
      todo += node.input
  return sorted(found)


class Frames:
  """What ONNX Runtime's calibrators read: an iterator of inputs."""

  def __init__(self, inputs: Iterable[dict[str, np.ndarray]]):
    self.left: Iterator[dict[str, np.ndarray]] = iter(inputs)

  def get_next(self) -> dict[str, np.ndarray] | None:
    return next(self.left, None)


@dataclass
class Calibrated:
  """A prepared graph, and the range of each of its tensors over the calibration frames. One of both for all targets
  whose activations are symmetric, or are not."""

  model: onnx.ModelProto
  ranges: Any
  symmetric: bool

  def with_ranges(self, of: Mapping[str, tuple[float, float]]) -> "Calibrated":
    """With other ranges of some tensors: low, high. Raises UserError where the graph has no such tensor."""
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData

    data: dict[str, Any] = dict(self.ranges.data)
    if lacks := [t for t in of if t not in data]:
      raise UserError(f"the graph has no tensor {lacks[0]}, whose range was learned; distill --qat again")
    for tensor, (low, high) in of.items():
      data[tensor] = TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
    return Calibrated(self.model, TensorsData(CalibrationMethod.Percentile, data), self.symmetric)


def calibrate(model: onnx.ModelProto, inputs: Sequence[dict[str, np.ndarray]], symmetric: bool = False) -> Calibrated:
  """inputs: of the graph, one dict a frame. Raises UserError where a tensor is not finite."""
  from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

  with tempfile.TemporaryDirectory() as tmp:
    path = Path(tmp) / "model.onnx"
    onnx.save(model, str(path))
    calibrator = create_calibrator(
      path,
      sorted({*LAYERS, *BETWEEN} & {n.op_type for n in model.graph.node}),
      augmented_model_path=str(Path(tmp) / "augmented.onnx"),
      calibrate_method=CalibrationMethod.Percentile,
      extra_options={"percentile": PERCENTILE, "symmetric": symmetric},
    )
    try:
      with contextlib.redirect_stdout(io.StringIO()):  # it prints what it is about to do
        for at in range(0, len(inputs), AT_ONCE):
          calibrator.collect_data(Frames(inputs[at : at + AT_ONCE]))
        ranges = calibrator.compute_data()
    except ValueError as e:
      raise UserError(
        f"the graph cannot be calibrated: {str(e).splitlines()[0][:160]}; is a tensor not finite?"
      ) from None
  return Calibrated(model, ranges, symmetric)


def shift_biases(model: onnx.ModelProto, shifts: Mapping[str, np.ndarray]) -> None:
  """Adds to the biases of nodes, by name (channels,)."""
  weights = {i.name: i for i in model.graph.initializer}
  for node in model.graph.node:
    if node.name in shifts:
      own = f"{node.name}.bias"
      bias = numpy_helper.to_array(weights[node.input[2]]) if len(node.input) > 2 else np.zeros((), np.float32)
      model.graph.initializer.append(numpy_helper.from_array((bias + shifts[node.name]).astype(np.float32), own))
      del node.input[2:]
      node.input.append(own)


def quantize(
  calibrated: Calibrated, target: Target, leave: Iterable[str] = (), shifts: Mapping[str, np.ndarray] | None = None
) -> bytes:
  """-> the file of the graph with its trunk() in 8 bits. leave: nodes of it that stay float. Weights are of each
  channel, symmetric, int8. shifts: what is added to the biases of layers of 8 bits, see bias.py."""
  from onnxruntime.quantization import QuantType
  from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

  model, nodes = onnx.ModelProto(), trunk(calibrated.model, leave)
  model.CopyFrom(calibrated.model)
  if not nodes:  # to the quantizer no name at all means every node
    return plain(model)
  shift_biases(model, {k: v for k, v in (shifts or {}).items() if k in nodes})
  drop_unused(model)
  kind = QuantType.QUInt8 if target.activations == "uint8" else QuantType.QInt8
  quiet = logging.getLogger().level
  logging.getLogger().setLevel(logging.ERROR)  # it speaks to the root logger of what it leaves
  try:
    quantizer = QDQQuantizer(
      model,
      not target.whole,
      target.narrow,
      QuantType.QInt8,
      kind,
      calibrated.ranges,
      nodes,
      [],
      [*LAYERS, *BETWEEN],
      {"ActivationSymmetric": target.symmetric, "WeightSymmetric": True},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    read_unrounded(quantizer.model.model, set(nodes))
  finally:
    logging.getLogger().setLevel(quiet)
  return plain(quantizer.model.model)


def read_unrounded(model: onnx.ModelProto, nodes: Collection[str]) -> None:
  """nodes: of 8 bits. Float nodes that read what another float node says read it as it is: the quantizer has them read
  what 8-bit nodes beside them do, rounded, and back in float for nothing."""
  by = {o: n.name for n in model.graph.node for o in n.output}
  whole = {
    n.output[0]: n.input[0]
    for n in model.graph.node
    if n.op_type == "QuantizeLinear" and n.input[0] in by and by[n.input[0]] not in nodes
  }
  back = {
    n.output[0]: whole[n.input[0]] for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in whole
  }
  for node in model.graph.node:
    if node.name not in nodes:
      for k, i in enumerate(node.input):
        if i in back:
          node.input[k] = back[i]
  drop_unused(model)


def plain(model: onnx.ModelProto) -> bytes:
  """Without the domains that no node uses, which tinygrad refuses, and with large weights that stay float as float16,
  as those of a bundle are."""
  used = {n.domain for n in model.graph.node} | {""}
  kept = [x for x in model.opset_import if x.domain in used]
  del model.opset_import[:]
  model.opset_import.extend(kept)
  del model.metadata_props[:]
  with tempfile.TemporaryDirectory() as tmp:
    path = Path(tmp) / "model.onnx"
    onnx.save(model, str(path))
    store_half(path)
    return path.read_bytes()

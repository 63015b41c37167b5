"""A float TFLite file whose biases are shifted by what its rounded weights will add to each channel's mean: what
optimize/bias.py does for ONNX, and why."""

import copy
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.tools.fair.optimize.quantize import Target
from openpilot.tools.fair.optimize.sensitivity import rounded

LAYERS = ("CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D_TRANSPOSE")
WEIGHTS, BIAS = 1, -1  # of their inputs
NO_ACTIVATION = 0
TARGET = Target("LiteRT: values int8, weights int8 of each channel", "int8")
Shifts = dict[str, np.ndarray]  # a layer's name -> what is added to its bias


def packed(model: Any) -> bytes:
  from ai_edge_quantizer.utils import tfl_flatbuffer_utils as tfl

  with tempfile.TemporaryDirectory() as tmp:
    tfl.write_model(model, str(path := Path(tmp) / "net.tflite"))
    return path.read_bytes()


def bytes_of(x: np.ndarray) -> np.ndarray:
  """As a buffer holds them."""
  return np.frombuffer(x.astype(np.float32).tobytes(), np.uint8)


def shifts(blob: bytes, names: Collection[str], frames: Sequence[Mapping[str, np.ndarray]]) -> Shifts:
  """blob: the float file. names: its layers that may be 8 bits. frames: what goes into it, by the signature's names.
  -> the mean, over frames and picture, of what float weights give more than rounded ones."""
  from ai_edge_litert.interpreter import Interpreter, OpResolverType
  from ai_edge_quantizer.utils import tfl_flatbuffer_utils as tfl

  model = tfl.read_model(blob)
  graph = model.subgraphs[0]

  def add(like: int, data: np.ndarray | None) -> int:
    """A tensor as that one, with a buffer of its own -> its place."""
    buffer = copy.copy(model.buffers[0])
    buffer.data = None if data is None else bytes_of(data)
    model.buffers.append(buffer)
    tensor = copy.copy(graph.tensors[like])
    tensor.buffer, tensor.name = len(model.buffers) - 1, f"twin_{len(graph.tensors)}".encode()
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1

  places: dict[str, int] = {}  # a layer's name -> its twin's output
  operators = []
  for op in graph.operators:
    operators.append(op)
    kind = tfl.TFL_OP_CODE_TO_NAME.get(model.operatorCodes[op.opcodeIndex].builtinCode)
    if kind is None or kind.value not in LAYERS or (name := tfl.get_op_scope(op, graph.tensors)) not in names:
      continue
    w = tfl.get_tensor_data(graph.tensors[op.inputs[WEIGHTS]], model.buffers)
    axis = tfl.TFL_OP_TO_WEIGHT_QUANTIZED_DIM[kind]
    twin: Any = copy.deepcopy(op)
    twin.inputs[WEIGHTS] = add(op.inputs[WEIGHTS], w - rounded(w, axis, TARGET))
    twin.inputs[BIAS] = add(op.inputs[BIAS], np.zeros(w.shape[axis]))
    twin.outputs = [add(op.outputs[0], None)]
    twin.builtinOptions.fusedActivationFunction = NO_ACTIVATION
    operators.append(twin)
    places[name] = twin.outputs[0]
  graph.operators = operators
  net = Interpreter(
    model_content=packed(model),
    num_threads=1,
    experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    experimental_preserve_all_tensors=True,
  )
  net.allocate_tensors()
  run = net.get_signature_runner()
  means: dict[str, Any] = dict.fromkeys(places, 0.0)
  for x in frames:
    run(**x)
    for name, place in places.items():
      out = net.get_tensor(place)
      means[name] = means[name] + out.reshape(-1, out.shape[-1]).mean(0) / len(frames)
  return means


def shift_biases(blob: bytes, shift: Shifts) -> bytes:
  """The float file with these layers' biases shifted."""
  from ai_edge_quantizer.utils import tfl_flatbuffer_utils as tfl

  model = tfl.read_model(blob)
  graph = model.subgraphs[0]
  readers = Counter(i for op in graph.operators for i in op.inputs)
  owners = Counter(t.buffer for t in graph.tensors)
  for n, op in enumerate(graph.operators):
    if (more := shift.get(tfl.get_op_scope(op, graph.tensors))) is None:
      continue
    tensor = graph.tensors[op.inputs[BIAS]]
    data = tfl.get_tensor_data(tensor, model.buffers) + more
    buffer = model.buffers[tensor.buffer]
    if readers[op.inputs[BIAS]] > 1 or owners[tensor.buffer] > 1:  # of layers whose biases were equal
      tensor, buffer = copy.copy(tensor), copy.copy(buffer)
      model.buffers.append(buffer)
      graph.tensors.append(tensor)
      tensor.buffer, tensor.name = len(model.buffers) - 1, f"shifted_{n}".encode()
      op.inputs[BIAS] = len(graph.tensors) - 1
    buffer.data = bytes_of(data)
  return packed(model)

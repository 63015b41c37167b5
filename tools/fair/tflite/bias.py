"""A float TFLite file whose biases are shifted by what its rounded weights will add to each channel's mean: what
optimize/bias.py does for ONNX, and why."""

import copy
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 127  # of a weight from 0, on either side
LAYERS = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 0, "CONV_2D_TRANSPOSE": 2}  # operator -> which input is the picture
WEIGHTS, BIAS = 1, 2  # inputs; the transposed one's bias is the last, too
NO_ACTIVATION = 0


def rounded(w: np.ndarray, axis: int) -> np.ndarray:
  """As ai-edge-quantizer rounds weights: symmetric, a scale for each place along `axis`."""
  others = tuple(a for a in range(w.ndim) if a != axis)
  scale = np.abs(w).max(others, keepdims=True) / STEPS
  return np.round(w / np.where(scale > 0, scale, 1)) * scale


def shift_biases(blob: bytes, names: Collection[str], frames: Sequence[Mapping[str, np.ndarray]]) -> bytes:
  """blob: the float file. names: its layers that will be 8 bits. frames: what goes into it, by the signature's names.
  -> the file with each layer's bias less the mean, over frames and picture, of what its rounded weights give more than
  its float ones."""
  from ai_edge_litert.interpreter import Interpreter, OpResolverType
  from ai_edge_quantizer.utils import tfl_flatbuffer_utils as tfl

  model = tfl.read_model(blob)
  graph = model.subgraphs[0]
  asked = copy.deepcopy(model)
  twins = asked.subgraphs[0]

  def add(like: int, data: np.ndarray | None) -> int:
    """A tensor as that one, with a buffer of its own -> its place."""
    buffer = copy.copy(asked.buffers[0])
    buffer.data = None if data is None else np.frombuffer(data.astype(np.float32).tobytes(), np.uint8)
    asked.buffers.append(buffer)
    tensor = copy.copy(twins.tensors[like])
    tensor.buffer, tensor.name = len(asked.buffers) - 1, f"twin_{len(twins.tensors)}".encode()
    twins.tensors.append(tensor)
    return len(twins.tensors) - 1

  places: dict[int, int] = {}  # the bias's input of each layer's operator -> the twin's output
  for n, op in enumerate(list(twins.operators)):
    kind = tfl.TFL_OP_CODE_TO_NAME.get(asked.operatorCodes[op.opcodeIndex].builtinCode)
    if kind is None or kind.value not in LAYERS or tfl.get_op_scope(op, twins.tensors) not in names:
      continue
    at = op.inputs[WEIGHTS]
    w = tfl.get_tensor_data(twins.tensors[at], asked.buffers)
    axis = tfl.TFL_OP_TO_WEIGHT_QUANTIZED_DIM[kind]
    twin: Any = copy.deepcopy(op)
    twin.inputs[WEIGHTS] = add(at, w - rounded(w, axis))
    twin.inputs[-1] = add(op.inputs[-1], np.zeros(w.shape[axis]))
    twin.outputs = [add(op.outputs[0], None)]
    twin.builtinOptions.fusedActivationFunction = NO_ACTIVATION
    twins.operators.insert(twins.operators.index(op) + 1, twin)
    places[n] = twin.outputs[0]
  with tempfile.TemporaryDirectory() as tmp:
    tfl.write_model(asked, str(path := Path(tmp) / "twins.tflite"))
    net = Interpreter(
      model_path=str(path),
      num_threads=1,
      experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
      experimental_preserve_all_tensors=True,
    )
  net.allocate_tensors()
  run = net.get_signature_runner()
  means: dict[int, Any] = dict.fromkeys(places, 0.0)
  for x in frames:
    run(**x)
    for n, place in places.items():
      out = net.get_tensor(place)
      means[n] = means[n] + out.reshape(-1, out.shape[-1]).mean(0) / len(frames)
  readers = Counter(i for op in graph.operators for i in op.inputs)
  owners = Counter(t.buffer for t in graph.tensors)
  for n, mean in means.items():
    op = graph.operators[n]
    tensor = graph.tensors[op.inputs[-1]]
    data = tfl.get_tensor_data(tensor, model.buffers) + mean
    buffer = model.buffers[tensor.buffer]
    if readers[op.inputs[-1]] > 1 or owners[tensor.buffer] > 1:  # of layers whose biases were equal
      tensor, buffer = copy.copy(tensor), copy.copy(buffer)
      model.buffers.append(buffer)
      graph.tensors.append(tensor)
      tensor.buffer, tensor.name = len(model.buffers) - 1, f"shifted_{n}".encode()
      op.inputs[-1] = len(graph.tensors) - 1
    buffer.data = np.frombuffer(data.astype(np.float32).tobytes(), np.uint8)
  with tempfile.TemporaryDirectory() as tmp:
    tfl.write_model(model, str(path := Path(tmp) / "shifted.tflite"))
    return path.read_bytes()

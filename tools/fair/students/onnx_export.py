"""A student as one ONNX graph (opset 17, fixed shapes, uint8 frame in), and what a bundle's manifest says of it."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openpilot.tools.fair.spec import ClassSet
from openpilot.tools.fair.students.families import Family
from openpilot.tools.fair.students.lanes import POINTS
from openpilot.tools.fair.students.student import Student
from openpilot.tools.fair.tasks import TASKS
from openpilot.tools.lib.errors import UserError

OPSET, NEWER = 17, 18  # of the tracing exporter, and the least of the other one
# elements: less would save nothing, and for an Adreno tinygrad does not compile a product with three rows of half
# precision
HALF_FROM = 1024
STATE = {"lanes_template": "lanes_template_out", "lanes_hidden": "lanes_hidden_out"}


class Graph(nn.Module):
  """The student with inputs and outputs by position, as the exporter wants them."""

  def __init__(self, student: Student, inputs: list[str], outputs: list[str]):
    super().__init__()
    self.student, self.names, self.outputs = student, inputs, outputs

  def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
    out = self.student(**dict(zip(self.names, inputs, strict=True)))
    return tuple(out[k] for k in self.outputs)


def export_onnx(
  student: Student, path: str | Path, keep: tuple[str, ...] = ("",), leave: Container[str] = ()
) -> dict[str, Any]:
  """Writes the student, as it is now, to `path` (an .onnx file) and returns the manifest's entry of the graph
  (bundle.schema.json).

  keep: how the names of the outputs begin that are exported: a head that nobody taught has nothing to say; leave: names
  that are left out all the same. The student is left in eval mode. Raises UserError where a weight is not finite, or
  torch lacks its exporter's packages."""
  path = Path(path)
  student.eval()
  for name, tensor in student.state_dict().items():
    if not torch.isfinite(tensor).all():
      raise UserError(f"{student.name} has NaN or Inf in {name}; export an earlier checkpoint")
  device = next(student.parameters()).device
  inputs = student.inputs(device)
  with torch.no_grad():
    outputs = {k: v for k, v in student(**inputs).items() if k.startswith(keep) and k not in leave}
  if not tracks(outputs):
    inputs = {"frame": inputs["frame"]}
  with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
    warnings.simplefilter("ignore")  # of the tracer: shapes are constants here, and meant to be
    graph = Graph(student, list(inputs), list(outputs)).eval()
    try:
      write_graph(graph, path, inputs, getattr(student, "family", None))
    except ImportError as e:
      raise UserError(f"{student.name} cannot be exported ({e}); install the package onnx") from None
    without_pads(path)
  return graph_entry(student, path.name, inputs, outputs)


def write_graph(graph: Graph, path: Path, inputs: dict[str, Tensor], family: Family | None) -> None:
  """family: None of ours."""
  names: dict[str, Any] = {"input_names": list(inputs), "output_names": graph.outputs}
  if family is not None:
    graph = copy.deepcopy(graph)  # the tracing exporter leaves some of transformers' classes changed
  if family is None or not family.dynamo:
    # the tracing exporter: its graphs are plain opset 17, which the newer one reaches only by converting down
    torch.onnx.export(
      graph, tuple(inputs.values()), str(path), opset_version=OPSET, dynamo=False, do_constant_folding=True, **names
    )
    return
  logger = logging.getLogger("torch.onnx")
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    torch.onnx.export(
      graph,
      tuple(inputs.values()),
      str(path),
      opset_version=NEWER,
      dynamo=True,
      external_data=False,
      verbose=False,
      **names,
    )
  finally:
    logger.setLevel(level)


def without_pads(path: Path) -> None:
  """See fold_pads()."""
  import onnx

  from openpilot.tools.fair.students.onnx_pads import fold_pads

  model = onnx.load(str(path))
  if fold_pads(model):
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def store_half(path: str | Path) -> int:
  """Rewrites the ONNX file so that its weights are stored as float16 and cast to float32 where they are used: half the
  file, the same arithmetic; ONNX Runtime casts once, on load, and tinygrad in the kernel that reads them. -> how many
  tensors. Values beyond float16 stay as they are."""
  import onnx
  from onnx import numpy_helper

  model = onnx.load(str(path))
  casts = []
  for tensor in model.graph.initializer:
    x = numpy_helper.to_array(tensor)
    if x.dtype != np.float32 or x.size < HALF_FROM or not np.abs(x).max() < np.finfo(np.float16).max:
      continue
    name = tensor.name
    tensor.CopyFrom(numpy_helper.from_array(x.astype(np.float16), f"{name}.half"))
    casts.append(
      onnx.helper.make_node("Cast", [f"{name}.half"], [name], name=f"{name}.cast", to=onnx.TensorProto.FLOAT)
    )
  nodes = [*casts, *model.graph.node]
  del model.graph.node[:]
  model.graph.node.extend(nodes)
  onnx.checker.check_model(model)
  onnx.save(model, str(path))
  return len(casts)


def tracks(outputs: Container[str]) -> bool:
  """Whether the tracker's are among the outputs: without them a unified graph has no use for points and state."""
  return any(k in outputs for k in STATE.values())


def graph_entry(student: Student, file: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> dict[str, Any]:
  entry: dict[str, Any] = {
    "name": student.name,
    "file": file,
    "period": 1,
    "inputs": [specify(k, v) for k, v in inputs.items()],
    "state": [],
  }
  entry["inputs"][0].update(frames=[0], spacing_ms=50, gap="ignore")
  if tracks(outputs):
    # a gap does not reset: templates outlive one, and the host moves or renews the points
    entry["state"] = [{"input": k, "output": v, "initial": 0, "reset": "stream"} for k, v in STATE.items()]
    entry["point_slots"] = {"count": POINTS, "mask": "lanes_mask"}
  entry["outputs"] = [{**specify(k, v), **decoded(k, student.spec.classes)} for k, v in outputs.items()]
  return entry


def decoded(output: str, classes: ClassSet) -> dict[str, Any]:
  """What the manifest says of an output beside its shape: the head that decodes it, its parameters, its classes and
  what they are on a road."""
  said = next((t.decode[output] for t in TASKS.values() if output in t.decode), None)
  if said is None:
    return {}
  out: dict[str, Any] = {"head": said["head"], "parameters": dict(said["parameters"])}
  if kind := said.get("classes"):
    names: tuple[str, ...] = getattr(classes, kind)
    out["classes"] = list(names)
    if roles := classes.roles(names):
      out["roles"] = roles
  return out


def specify(name: str, tensor: Tensor) -> dict[str, Any]:
  return {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}

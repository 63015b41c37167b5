"""The weights of a student out of its exported ONNX graph, so that a bundle can be trained on: the way back of
onnx_export.py.

An exported graph has no BatchNorm, and few of its constants bear a parameter's name or shape: some are folded, turned,
scaled or joined. Where each number of a parameter went is found by exporting the same student with numbers that tell
their place."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openpilot.selfdrive.modeld.fair.bundle import Bundle, load_bundle
from openpilot.tools.fair.labels.placement import place_input, rgb_of
from openpilot.tools.fair.spec import Class, ClassSet, InputSpec, road_classes
from openpilot.tools.fair.students.onnx_export import export_onnx
from openpilot.tools.fair.students.student import Student, build, spec_of, student_names
from openpilot.tools.lib.errors import UserError

BatchNorm = nn.modules.batchnorm._BatchNorm
OTHER = "it is of another student, or was exported by another version of this code"


def constants(model: Any) -> list[tuple[str, list[np.ndarray | None]]]:
  """onnx.ModelProto -> of each node that computes, in order: its operator and its inputs, those that are constant as
  arrays."""
  from onnx import numpy_helper

  known = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
  nodes = []
  for node in model.graph.node:
    if node.op_type == "Constant":
      known[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    elif node.op_type == "Cast" and node.input[0] in known:  # store_half()
      known[node.output[0]] = known[node.input[0]].astype(np.float32)
    elif node.op_type == "Identity" and node.input[0] in known:  # of constants that are equal the exporter keeps one
      known[node.output[0]] = known[node.input[0]]
    else:
      nodes.append((node.op_type, [known.get(i) for i in node.input]))
  return nodes


def plain_norms(student: Student) -> None:
  """Every BatchNorm adds its bias and does nothing else, in eval mode."""
  for m in student.modules():
    if isinstance(m, BatchNorm):
      for tensor, value in ((m.weight, 1.0), (m.bias, 0.0), (m.running_mean, 0.0), (m.running_var, 1.0 - m.eps)):
        assert tensor is not None
        tensor.data.fill_(value)


def tagged(student: Student, keep: tuple[str, ...]) -> list[list[tuple[str, list[np.ndarray | None]]]]:
  """constants() of three exports, in which number i of parameter t is a number of t's own times 1, i + 2 and t + 2: a
  factor that the export puts to it drops out of their ratios, which are 1 for what is no parameter."""
  import onnx

  student = copy.deepcopy(student)
  plain_norms(student)
  norms = {f"{n}.weight" for n, m in student.named_modules() if isinstance(m, BatchNorm)}
  out = []
  with tempfile.TemporaryDirectory() as tmp:
    for k in range(3):
      for t, (name, p) in enumerate(student.named_parameters()):
        if name not in norms:
          place = torch.ones(p.numel()), torch.arange(p.numel()) + 2.0, torch.full((p.numel(),), t + 2.0)
          p.data.copy_((place[k] * own(t)).reshape(p.shape))
      export_onnx(student, Path(tmp) / "tagged.onnx", keep)
      out.append(constants(onnx.load(str(Path(tmp) / "tagged.onnx"))))
  return out


def own(t: int) -> float:
  """A number of parameter t's own: the exporter shares constants that are equal. It is small, since the exporter runs
  the network, which must not overflow."""
  return 1e-12 * (1.0 + (t * 0.6180339887) % 1.0)


def import_onnx(student: Student, path: str | Path, blob: bytes | None = None) -> dict[str, Tensor]:
  """path: an ONNX file that export_onnx() wrote of a student of the same name, its weights stored in float32 or
  float16; blob: its bytes, where they were read already. -> the state dict of all that is in it: loaded over
  plain_norms() of the student, it computes what the file does. What the graph does not use, as heads that were not
  exported, is missing.

  Raises UserError where the file is no such graph."""
  import onnx

  from openpilot.tools.fair.students.onnx_pads import fold_pads

  try:
    model = onnx.load(str(path)) if blob is None else onnx.load_from_string(blob)
    onnx.checker.check_model(model)
  except Exception as e:  # protobuf's, the checker's and the file system's have no common base
    raise UserError(f"{path} is no ONNX file: {' '.join(str(e).split())[:120]}") from None
  fold_pads(model)  # of a bundle from before export did so
  keep = tuple(o.name for o in model.graph.output)
  with torch.no_grad():
    able = student.eval()(**student.inputs())
  lacks = [k for k in keep if k not in able]
  if lacks:
    raise UserError(f"{path} puts out '{lacks[0]}', which {student.name} does not; {OTHER}")
  there, tags = constants(model), tagged(student, keep)
  if [op for op, _ in there] != [op for op, _ in tags[0]]:
    raise UserError(f"{path} is not the graph of {student.name}; {OTHER}")
  params = list(student.named_parameters())
  values = [np.full(p.numel(), np.nan, np.float64) for _, p in params]
  for (_, got), *marks in zip(there, *tags, strict=True):
    for x, one, place, number in zip(got, *(inputs for _, inputs in marks), strict=True):
      if x is None or one is None or place is None or number is None or one.dtype != np.float32:
        continue
      if x.shape != one.shape:
        raise UserError(f"{path} has a constant {list(x.shape)} where {student.name} has {list(one.shape)}; {OTHER}")
      read(x, one, place, number, values)
  out = {
    n: torch.from_numpy(v.astype(np.float32)).reshape(p.shape)
    for (n, p), v in zip(params, values, strict=True)
    if not np.isnan(v).any()
  }
  for name, m in student.named_modules():
    if isinstance(m, BatchNorm) and f"{name}.bias" in out:
      out[f"{name}.weight"], out[f"{name}.running_mean"] = torch.ones_like(m.weight), torch.zeros_like(m.weight)
      out[f"{name}.running_var"], out[f"{name}.num_batches_tracked"] = (
        torch.full_like(m.weight, 1.0 - m.eps),
        torch.tensor(0),
      )
  return out


def read(x: np.ndarray, one: np.ndarray, place: np.ndarray, number: np.ndarray, values: list[np.ndarray]) -> None:
  """Puts the numbers of constant x where its tags say; one that is no parameter, or mixes several, is left out."""
  with np.errstate(divide="ignore", invalid="ignore"):
    i, t = (np.nan_to_num(a.astype(np.float64).ravel() / one.astype(np.float64).ravel()) - 2 for a in (place, number))
  which, at = np.rint(t).astype(int), np.rint(i).astype(int)
  if (
    not len(which)
    or (np.abs(t - which) > 0.01).any()
    or (np.abs(i - at) > 0.3).any()
    or which.min() < 0
    or which.max() >= len(values)
  ):
    return
  for k in np.unique(which):
    here = which == k
    if at[here].min() >= 0 and at[here].max() < len(values[k]):
      values[k][at[here]] = x.ravel()[here] * own(int(k)) / one.ravel()[here]


def student_of(bundle: Bundle, graph: dict[str, Any]) -> tuple[Student, dict[str, Tensor]]:
  """-> the student that computes what a graph of the bundle does, its norms plain, and what of its weights is the
  graph's: heads that were not exported are not. Raises BundleError on a damaged file, UserError where the graph is none
  of our students as they are now."""
  if graph["name"] not in student_names():
    raise UserError(
      f"{bundle.path}: its graph '{graph['name']}' is none of the students ({', '.join(student_names())}), and cannot "
      "be trained on"
    )
  picture, classes = InputSpec.from_dict(bundle.manifest.get("input")), classes_of(graph)
  blob = bundle.onnx(graph)
  # a kind of classes that it does not put out: the student has it, and nobody taught it, or has none
  road = {"maps": list(road_classes().maps), "boxes": list(road_classes().boxes)}
  for names in ({k: v or road[k] for k, v in classes.items()}, classes):
    own = {"backbone": bundle.manifest.get("backbone"), "widths": bundle.manifest.get("widths", {})}
    spec = spec_of(graph["name"], input=picture, classes=class_set(names), **own)
    try:
      student = build(spec)
      plain_norms(student)
      as_exported(student, graph)
      weights = import_onnx(student, bundle.path / graph["file"], blob)
      break
    except UserError:
      if names == classes:
        raise
  student.load_state_dict(weights, strict=False)
  return student, weights


def bundle_state(folder: str | Path, frames: Tensor) -> dict[str, Any]:
  """A bundle's folder -> what a training run's checkpoint holds of its student: "ema" (names begin with student.),
  "provenance" (its teachers), "step", and where the bundle says it "history": what it was shown.

  frames: (B, *shape of an input) uint8, such as it will be trained on: see settle_norms(); of another input than its
  own they are placed into that. "input": its own, as InputSpec.to_dict(). "classes": names of its 'maps' and 'boxes'.
  Raises BundleError on a damaged bundle, UserError where its graph is none of our students as they are now.
  "per_height": its depth is in heights of the camera. "backbone": its name. "widths": of a pruned one."""
  bundle = load_bundle(Path(folder))
  graph = bundle.graphs[0]
  student, weights = student_of(bundle, graph)
  picture = student.spec.input
  if frames.shape[1:] != picture.shape:  # the trunk and the heads see what they know, in another size or color
    frames = torch.from_numpy(np.stack([place_input(rgb_of(f), picture) for f in frames.numpy()]))
  settle_norms(student, frames)
  mine = student.state_dict()
  return {
    "ema": {f"student.{k}": mine[k].clone() for k in weights},
    "provenance": teachers_of(bundle),
    "classes": classes_of(graph),
    "input": picture.to_dict(),
    "backbone": student.backbone.name,
    "widths": student.spec.widths,
    "per_height": is_per_height(graph),
    "step": 0,
    **history_of(bundle),
  }


def history_of(bundle: Bundle) -> dict[str, Any]:
  """What it was shown, as checkpoints have it; {} of a bundle that does not say it."""
  said = bundle.manifest["provenance"].get("history")
  return {} if said is None else {"history": [{"sources": None, **run} for run in said]}


def teachers_of(bundle: Bundle) -> list[dict[str, str]]:
  """As checkpoints name them, which keep a former spelling."""
  said = bundle.manifest["provenance"]["teachers"]
  return [{("licence" if k == "license" else k): v for k, v in t.items()} for t in said]


def is_per_height(graph: dict[str, Any]) -> bool:
  """Whether a graph of a manifest says depth in heights of the camera."""
  return any(o.get("parameters", {}).get("per_height", False) for o in graph["outputs"])


def as_exported(student: Student, graph: dict[str, Any]) -> None:
  """A graph of which each point's state is one number shorter is of a tracker that knew nothing of the road: then
  `student` computes what that did. graph: its entry in the manifest."""
  width = next((i["shape"][-1] for i in graph["inputs"] if i["name"] == "lanes_hidden"), None)
  if student.lanes is not None and width is not None and width < student.lanes.hidden_size:
    student.lanes.road = None


def classes_of(graph: dict[str, Any]) -> dict[str, list[str]]:
  """Names of the classes that a graph puts out, of class maps and of objects."""
  said = {o["name"]: o["classes"] for o in graph["outputs"] if "classes" in o}
  boxes = said.get("objects_heat") or said.get("detector_logits")
  return {"maps": said.get("segmentation") or [], "boxes": boxes or []}


def class_set(names: dict[str, list[str]]) -> ClassSet:
  """As many classes of each kind: what a student's graph depends on."""
  every = dict.fromkeys([*names["maps"], *names["boxes"]]) or {"nothing": None}
  return ClassSet("bundle", tuple(Class(n, maps=n in names["maps"], boxes=n in names["boxes"]) for n in every))


def settle_norms(student: Student, frames: Tensor) -> None:
  """After import_onnx(): gives every BatchNorm the statistics of what it sees over frames (B, *its input) uint8, and
  the weight and bias with which it computes the same as before. Without it, the first step of training would normalize
  what is normalized already."""
  seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

  def watch(m: nn.Module, args: tuple[Tensor, ...]) -> None:
    x = args[0].detach()
    dims = [d for d in range(x.dim()) if d != 1]
    seen[m] = x.mean(dims), x.var(dims, unbiased=False)

  hooks = [m.register_forward_pre_hook(watch) for m in student.modules() if isinstance(m, BatchNorm)]
  with torch.no_grad():
    student.eval().encode(frames)
    for h in hooks:
      h.remove()
    for m, (mean, var) in seen.items():
      assert isinstance(m, BatchNorm) and m.running_mean is not None and m.running_var is not None
      gain = m.weight / torch.sqrt(m.running_var + m.eps)
      m.bias.add_(gain * (mean - m.running_mean))
      m.weight.copy_(gain * torch.sqrt(var + m.eps))
      m.running_mean.copy_(mean)
      m.running_var.copy_(var)

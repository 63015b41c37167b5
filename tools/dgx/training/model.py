"""openpilot's ONNX files as trainable torch modules, and back into the same file.

Our own converter and not a package: the graph's layers become nn.Linear, nn.Conv2d, nn.GRU under the names that the
file gives them, for adapters to find, and `OnnxModule.to_onnx` writes changed parameters back into the base's own
graph: names, shapes, dtypes, operators and metadata stay what modeld knows."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn as nn
from onnx import numpy_helper
from torch import Tensor

from openpilot.tools.dgx.training import layers
from openpilot.tools.dgx.training.onnx_ops import DTYPES, OPS
from openpilot.tools.lib.errors import UserError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Shapes stay on the CPU: reading them back from a GPU would stop it at every node
SHAPE_OPS = {
  "Reshape",
  "Slice",
  "Split",
  "Squeeze",
  "Unsqueeze",
  "Pad",
  "Expand",
  "Tile",
  "Resize",
  "ConstantOfShape",
  "Range",
}


@dataclass
class Step:
  """One node: an operator, or the layer at `path`."""

  op: str
  inputs: list[str]
  outputs: list[str]
  attributes: dict[str, Any]
  node: int  # its number in the base's graph
  path: str = ""


@dataclass
class Value:
  """A graph's input or output."""

  name: str
  shape: list[int | str]
  dtype: torch.dtype


def hash_file(path: str | Path) -> str:
  """sha256 of a file: adapters carry their base's."""
  try:
    with open(path, "rb") as f:
      return hashlib.file_digest(f, "sha256").hexdigest()
  except OSError as e:
    raise UserError(f"{path} cannot be read: {e.strerror}; give the base model's ONNX file") from None


def tensor(proto: onnx.TensorProto, base: str = "") -> Tensor:
  array = numpy_helper.to_array(proto, base_dir=base)
  if proto.data_type == onnx.TensorProto.BFLOAT16:
    return torch.from_numpy(array.astype(np.float32))
  return torch.from_numpy(np.array(array))


def values(infos: Any) -> list[Value]:
  out = []
  for v in infos:
    t = v.type.tensor_type
    out.append(
      Value(
        v.name,
        [d.dim_param or (d.dim_value if d.HasField("dim_value") else "?") for d in t.shape.dim],
        DTYPES.get(t.elem_type, torch.float32),
      )
    )
  return out


def module_name(weight: str, node: onnx.NodeProto, number: int) -> str:
  """`_vision._backbone._conv_stem.weight` -> `_vision._backbone._conv_stem`; a nameless weight takes its node's
  name."""
  name = re.sub(r"\.(weight|bias|weight_ih_l0|[WR])$", "", weight)
  if "::" in name or (name == weight and not re.search(r"[a-zA-Z_]{2}", name)):
    name = node.name or f"{node.op_type}_{number}"
  name = re.sub(r"[/.]+", ".", name).strip(".")
  return re.sub(r"[^\w.]", "_", name) or f"{node.op_type}_{number}"


class OnnxModule(nn.Module):
  """A graph, run node by node. `net` holds its layers, `values_` the constants that are no layer's (a bias that is
  added, positions): parameters all."""

  def __init__(self, model: onnx.ModelProto, where: str, dtype: torch.dtype = torch.float32, folder: str = ""):
    super().__init__()
    self.base, self.where, self.dtype = model, where, dtype
    self.opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    graph = model.graph
    standard = ("", "ai.onnx")
    unknown = sorted(
      {
        n.op_type if n.domain in standard else f"{n.domain}.{n.op_type}"
        for n in graph.node
        if n.domain not in standard or n.op_type not in {*OPS, *layers.MAKERS, "Constant"}
      }
    )
    if unknown:
      raise UserError(
        f"{where} uses operators that are not known here: {', '.join(unknown)}; "
        "simplify the file (onnxsim), or add them to tools/dgx/training/onnx_ops.py"
      )
    initializers = {i.name for i in graph.initializer}
    self.inputs = values(v for v in graph.input if v.name not in initializers)
    self.outputs = values(graph.output)
    self.net, self.values_ = nn.Module(), nn.ParameterDict()
    self.steps: list[Step] = []
    self.constants: dict[str, Tensor] = {}  # integers, and floats of one number: neither moved nor trained
    self._known = {i.name: self._widen(tensor(i, folder)) for i in graph.initializer}
    self._params: dict[str, str] = {}  # constant's name -> key in values_
    self._made: dict[tuple[Any, ...], str] = {}
    self._batches: bool | None = None
    self._moved: dict[tuple[str, torch.device], Tensor] = {}
    for number, node in enumerate(graph.node):
      try:
        self._add(number, node, initializers)
      except NotImplementedError as e:
        raise UserError(f"{where}, node {node.name or number}: {e} is not known here") from None
    last = {name: i for i, s in enumerate(self.steps) for name in s.inputs}
    kept = {o.name for o in self.outputs}
    self._free = [[n for n in set(s.inputs) if last[n] == i and n not in kept] for i, s in enumerate(self.steps)]

  def _widen(self, t: Tensor) -> Tensor:
    return t.to(self.dtype) if t.dtype in FLOATS else t

  def _attribute(self, v: Any) -> Any:
    if isinstance(v, onnx.TensorProto):
      return self._widen(tensor(v))
    if isinstance(v, (bytes, int, float)):
      return v.decode() if isinstance(v, bytes) else v
    if isinstance(v, (onnx.GraphProto, onnx.SparseTensorProto)):
      raise NotImplementedError(f"a {type(v).__name__} as attribute")
    return [s.decode() if isinstance(s, bytes) else s for s in v]

  def _add(self, number: int, node: onnx.NodeProto, initializers: set[str]) -> None:
    a: dict[str, Any] = {"outputs": len([o for o in node.output if o]), "float": self.dtype}
    for x in node.attribute:
      a[x.name] = self._attribute(onnx.helper.get_attribute_value(x))
    if node.op_type == "Constant":
      value = next((a[k] for k in ("value", "value_float", "value_int", "value_floats", "value_ints") if k in a), None)
      if value is None:
        raise NotImplementedError("a Constant that is no number")
      self._known[node.output[0]] = value if isinstance(value, Tensor) else self._widen(torch.tensor(value))
      return
    names = list(node.input)
    while names and not names[-1]:
      names.pop()
    known = [self._known.get(n) if n else None for n in names]
    step = Step(node.op_type, names, list(node.output), a, number)
    if (
      node.op_type in layers.MAKERS
      and len(known) > 1
      and known[1] is not None
      and (known[0] is None or node.op_type in ("GRU", "LSTM"))
    ):
      key = (node.op_type, *names[1:], *sorted((k, str(v)) for k, v in a.items()))
      made = layers.MAKERS[node.op_type][1](known, a) if key not in self._made else None
      if made is not None:
        self._made[key] = self._place(module_name(names[1], node, number), made.to(self.dtype))
      if key in self._made:
        step.path = self._made[key]
        states = names[5:7] if node.op_type in ("GRU", "LSTM") else []
        self._use([n for n in (names[0], *states) if n in self._known], initializers)
        step.inputs = [names[0]] if not states else [names[0], "", "", "", "", *states]
        self.steps.append(step)
        return
    if node.op_type not in OPS:
      raise NotImplementedError(f"{node.op_type} without constant weights")
    if names and all(n in self._known for n in names if n):
      with torch.no_grad():
        out = OPS[node.op_type](known, a, self.opset)
      self._known.update(zip(node.output, out if isinstance(out, tuple) else (out,), strict=False))
      return
    self._use([n for n in names if n in self._known], initializers)
    self.steps.append(step)

  def _place(self, name: str, m: nn.Module) -> str:
    """Puts a layer into `net`, in a tree along the dots. Gives its path."""
    parts = name.split(".")
    for i in range(1, len(parts)):
      try:
        if (
          not isinstance(self.net.get_submodule(".".join(parts[:i])), nn.Module)
          or type(self.net.get_submodule(".".join(parts[:i]))) is not nn.Module
        ):
          parts = ["_".join(parts)]
          break
      except AttributeError:
        break
    parent = self.net
    for part in parts[:-1]:
      if not hasattr(parent, part):
        parent.add_module(part, nn.Module())
      parent = parent.get_submodule(part)
    leaf, k = parts[-1], 2
    while hasattr(parent, leaf):
      leaf, k = f"{parts[-1]}_{k}", k + 1
    parent.add_module(leaf, m)
    return ".".join(("net", *parts[:-1], leaf))

  def _use(self, names: list[str], initializers: set[str]) -> None:
    for name in names:
      t = self._known[name]
      if t.dtype in FLOATS and t.numel() > 1 and name in initializers:
        plain = re.sub(r"\W", "_", name)
        key, k = plain, 2
        while name not in self._params and key in self.values_:
          key, k = f"{plain}_{k}", k + 1
        if name not in self._params:
          self._params[name] = key
          self.values_[key] = nn.Parameter(t.clone())
      else:
        self.constants[name] = t

  def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
    """Inputs by the file's names and of its shapes, float16 ones in any float dtype -> outputs by name, in the module's
    dtype.

    A file that was exported for one example takes several: at once where that gives what each gives alone (tried out
    once), else one after the other."""
    missing = [v.name for v in self.inputs if v.name not in inputs]
    if missing:
      raise UserError(
        f"{self.where} wants the inputs {', '.join(v.name for v in self.inputs)}; {', '.join(missing)} not given"
      )
    x = {v.name: inputs[v.name].to(self.dtype) if v.dtype in FLOATS else inputs[v.name] for v in self.inputs}
    fixed = all(v.shape and v.shape[0] == 1 for v in self.inputs)
    n = max((t.shape[0] for t in x.values() if t.dim()), default=1)
    if not fixed or n == 1:
      return self._run(x, n)
    x = {k: t.expand(n, *t.shape[1:]) if t.shape[0] == 1 else t for k, t in x.items()}
    if self._batches is None:
      self._batches = self._try_batch(x)
    if self._batches:
      return self._run(x, n)
    each = [self._run({k: t[i : i + 1] for k, t in x.items()}, 1) for i in range(n)]
    return {k: torch.cat([e[k] for e in each]) for k in each[0]}

  @torch.no_grad()
  def _try_batch(self, x: dict[str, Tensor]) -> bool:
    g = torch.Generator().manual_seed(0)
    noise = {
      k: (torch.rand(2, *t.shape[1:], generator=g) * (255 if not t.dtype.is_floating_point else 1)).to(
        t.device, t.dtype
      )
      for k, t in x.items()
    }
    training = {m: m.training for m in self.modules()}
    self.eval()
    try:
      both = self._run(noise, 2)
      alone = [self._run({k: t[i : i + 1] for k, t in noise.items()}, 1) for i in range(2)]
      return all(
        len(v) == 2 and torch.allclose(v[i], alone[i][k][0], atol=1e-3, rtol=1e-2)
        for k, v in both.items()
        for i in range(2)
      )
    except (RuntimeError, IndexError, ValueError):  # a graph whose inner shapes hold for one example
      return False
    finally:
      for m, t in training.items():
        m.training = t

  def _run(self, x: dict[str, Tensor], batch: int) -> dict[str, Tensor]:
    env: dict[str, Tensor] = {**self.constants, **{name: self.values_[key] for name, key in self._params.items()}, **x}
    for step, free in zip(self.steps, self._free, strict=True):
      args: list[Any] = [env[n] if n else None for n in step.inputs]
      if step.path:
        m = self.get_submodule(step.path)
        if step.op in ("GRU", "LSTM"):
          out: Any = layers.run_recurrent(step.op, m, args, step.attributes)
        else:
          out = m(layers.conv_pads(args[0], m, step.attributes) if step.op == "Conv" else args[0])
      else:
        device = next((t.device for t in args if t is not None and t.device.type != "cpu"), None)
        if device is not None and step.op not in SHAPE_OPS:
          args = [
            t if t is None or t.device == device else self._on(device, n, t)
            for n, t in zip(step.inputs, args, strict=True)
          ]
        out = OPS[step.op](args, {**step.attributes, "batch": batch}, self.opset)
      env.update(zip(step.outputs, out if isinstance(out, tuple) else (out,), strict=False))
      for name in free:
        env.pop(name, None)
    return {o.name: env[o.name].to(self.dtype) if env[o.name].dtype in FLOATS else env[o.name] for o in self.outputs}

  def _on(self, device: torch.device, name: str, t: Tensor) -> Tensor:
    """A tensor of the CPU on a GPU; constants are brought there once."""
    if name not in self.constants:
      return t.to(device)
    key = (name, device)
    if key not in self._moved:
      self._moved[key] = t.to(device)
    return self._moved[key]

  @torch.no_grad()
  def to_onnx(self) -> onnx.ModelProto:
    """The base's file with this module's parameters, in the base's dtypes. What did not change stays bit for bit.
    Adapters must be merged first."""
    out = onnx.ModelProto()
    out.CopyFrom(self.base)
    graph = out.graph
    dtypes = {i.name: i.data_type for i in graph.initializer}
    new: dict[str, Tensor] = {}
    for step in self.steps:
      if not step.path:
        continue
      m = self.get_submodule(step.path)
      if type(m) not in layers.PLAIN:
        raise UserError(f"{step.path} is still a {type(m).__name__}; merge the adapter before writing ONNX")
      node = graph.node[step.node]
      for i, value in layers.dump(step.op, m, step.attributes, len(node.input)).items():
        name, value = node.input[i], value.detach().cpu().reshape(self._known[node.input[i]].shape)
        if torch.equal(value, self._known[name]):
          continue
        if name in new and not torch.equal(new[name], value):  # one constant of two layers that have gone apart
          dtypes[f"{name}_{step.node}"] = dtypes.get(name, onnx.TensorProto.FLOAT)
          name = node.input[i] = f"{name}_{step.node}"
        new[name] = value
    for name, key in self._params.items():
      value = self.values_[key].detach().cpu()
      if not torch.equal(value, self._known[name]):
        new[name] = value
    # what was computed from a constant that has changed since, and stayed: exporters share equal constants by Identity
    for n in graph.node:
      moved = [i for i in n.input if i in new and i in self._known]
      if moved and all(i in self._known for i in n.input if i) and all(o in self._known for o in n.output):
        kind = next((a.i for a in n.attribute if a.name == "to"), dtypes.get(moved[0], onnx.TensorProto.FLOAT))
        for o in n.output:
          if o not in new and self._known[o].dtype in FLOATS:
            new[o], dtypes[o] = self._known[o], kind
    folded = [n for n in graph.node if set(n.output) & set(new)]
    for n in folded:  # a constant that the graph computes from others is now one of its own
      graph.node.remove(n)
    kept = [i for i in graph.initializer if i.name not in new]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for name, value in new.items():
      dtype = dtypes.get(name, onnx.TensorProto.FLOAT)
      graph.initializer.append(
        numpy_helper.from_array(value.float().numpy().astype(onnx.helper.tensor_dtype_to_np_dtype(dtype)), name)
      )
    return out


def load_onnx(path: str | Path, dtype: torch.dtype = torch.float32) -> OnnxModule:
  """An ONNX file -> a module in `dtype`: float16 constants are widened, and narrowed again by to_onnx; a Cast to
  float16 inside becomes one to `dtype`. Raises UserError where it is no ONNX file, or uses operators that are not known
  (all are named)."""
  path = Path(path)
  try:
    model = onnx.load(str(path))
    onnx.checker.check_model(model)
  except FileNotFoundError:
    raise UserError(f"there is no {path} (or of its external data)") from None
  except Exception as e:  # protobuf's errors have no common base
    if "opset" not in str(e):
      raise UserError(
        f"{path} is not a sound ONNX file: {str(e).splitlines()[0][:160]}; a git-lfs pointer must be pulled first"
      ) from None
  return OnnxModule(model, str(path), dtype, str(path.parent))

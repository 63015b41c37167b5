#!/usr/bin/env python3
"""A trained checkpoint -> an ONNX file that openpilot's modeld loads as it loads the base: the adapter merged into the
base's graph, with its names, shapes, dtypes and metadata. The file is checked against torch in ONNX Runtime and
tinygrad, and what it says is compared with what the base says.

python tools/dgx/training/export.py --checkpoint best_model.pt --output custom_driving_policy.onnx"""

import copy
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the modules beside it must not be found under their bare names
  sys.path[: not sys.flags.safe_path] = [str(Path(__file__).resolve().parents[3])]

import numpy as np
import onnx
import torch
from onnx import version_converter
from torch import Tensor, nn

from openpilot.selfdrive.modeld.fair.parity import difference, worst
from openpilot.selfdrive.modeld.fair.runners.tinygrad import find_clang
from openpilot.tools.dgx.training.constants import T_IDXS
from openpilot.tools.dgx.training.model import OnnxModule, hash_file, load_onnx
from openpilot.tools.dgx.training.outputs import SLICES_KEY, model_slices, parse_outputs
from openpilot.tools.dgx.training.reference import save_reference
from openpilot.tools.dgx.training.runners import OrtRunner
from openpilot.tools.dgx.training.shards import DrivingClips, read_dataset
from openpilot.tools.dgx.training.teacher import NAMES, DrivingTeacher
from openpilot.tools.learn.adapters.apply import apply_dora, unload
from openpilot.tools.learn.adapters.files import base_hash
from openpilot.tools.learn.checkpoint import load_checkpoint
from openpilot.tools.lib import python
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.files import atomic_path
from openpilot.tools.lib.options import option, parse

OPSET = 14
# Of ONNX Runtime's outputs beside torch's, in parts of the largest: kernels sum in another order, and half precision
# keeps 11 bits
TOLERANCE = {"float32": 1e-4, "float16": 2e-2}
SAMPLES = 8
CLIP = 8  # steps at 5 Hz
TINYGRAD_LIMIT = 900  # s
TINYGRAD = """
import sys
import numpy as np
from tinygrad import Tensor
from tinygrad.nn.onnx import OnnxRunner
x = {k: Tensor(v) for k, v in np.load(sys.argv[2]).items()}
np.save(sys.argv[3], next(iter(OnnxRunner(sys.argv[1])(x).values())).numpy())
"""


def read_checkpoint(path: Path) -> dict[str, Any]:
  """{"base", "base_hash", "adapter", "dora", "epoch", "step", "config", "val"} of train.py: tensors and plain values, a
  file with code is refused."""
  return load_checkpoint(
    path, "train.py writes best_model.pt beside last.pt", ("base", "base_hash", "adapter", "dora"), "train.py"
  )


def load_student(state: dict[str, Any], base: Path) -> OnnxModule:
  """The base with the checkpoint's adapter on it, not merged. Raises UserError where the adapter is another base's."""
  model = load_onnx(base).eval()
  if state["base_hash"] not in (hash_file(base), base_hash(model)):
    raise UserError(
      f"the checkpoint was trained on another base than {base} (hash {str(state['base_hash'])[:12]}); give that one "
      "with --base"
    )
  settings = state["dora"]
  if settings:
    apply_dora(model, int(settings["rank"]), settings.get("alpha"), settings.get("targets"))
  learned = (
    {n for n, p in model.named_parameters() if p.requires_grad}
    if settings
    else {n for n, _ in model.named_parameters()}
  )
  adapter: dict[str, Tensor] = state["adapter"]
  own = model.state_dict()
  wrong = [n for n, t in adapter.items() if n not in own or own[n].shape != t.shape]
  lacking = learned - set(adapter) if settings else set()
  if wrong or lacking:
    raise UserError(
      f"the checkpoint does not fit {base}: {', '.join(sorted([*wrong, *lacking])[:4])}; it was trained with other "
      "targets or another rank"
    )
  model.load_state_dict(adapter, strict=False)
  return model


def merged(student: OnnxModule) -> OnnxModule:
  """A copy with the adapter in the weights and plain layers in place."""
  out = copy.deepcopy(student).eval()
  merge_dora_weights(out)
  return out


def merge_dora_weights(model: nn.Module) -> None:
  """In place: the active adapter into the weights, and plain layers where the adapted ones were."""
  unload(model)


def export_to_onnx(model: nn.Module, path: str | Path) -> None:
  """A driving network as openpilot loads it, in opset 14 where it can be said in it, adapters merged; `model` stays as
  it is. One of load_onnx() keeps the names, shapes and metadata of its file; any other is a module of the inputs and
  the output of constants.py. Nothing is compared: export() does that of a checkpoint."""
  plain = copy.deepcopy(model).eval()
  merge_dora_weights(plain)
  if not isinstance(plain, OnnxModule):
    save_reference(path, plain)
    return
  with atomic_path(Path(path)) as tmp:
    onnx.save(to_opset(plain.to_onnx(), OPSET), str(tmp))


def to_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
  """The same graph in `opset` where it can be said in it; a newer graph stays in its own, and that is said."""
  have = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
  if have == opset:
    return model
  try:
    out = version_converter.convert_version(model, opset)
    onnx.checker.check_model(out)
  except Exception as e:  # the converter's errors have no common base
    print(
      f"warning: the base is in opset {have}, which does not convert to {opset} ({str(e).splitlines()[0][:100]}); it "
      f"stays in {have}",
      file=sys.stderr,
    )
    return model
  del out.metadata_props[:]
  out.metadata_props.extend(model.metadata_props)
  for now, was in zip((*out.graph.input, *out.graph.output), (*model.graph.input, *model.graph.output), strict=False):
    now.CopyFrom(was)
  out.producer_name, out.producer_version, out.graph.name = (
    model.producer_name,
    model.producer_version,
    model.graph.name,
  )
  return out


def interface(model: onnx.ModelProto) -> dict[str, Any]:
  """All that modeld reads: names, shapes, dtypes in order, and the metadata."""
  constants = {i.name for i in model.graph.initializer}
  return {
    "inputs": [v.SerializeToString() for v in model.graph.input if v.name not in constants],
    "outputs": [v.SerializeToString() for v in model.graph.output],
    "metadata": {p.key: p.value for p in model.metadata_props},
  }


def samples(model: OnnxModule, count: int) -> list[dict[str, Tensor]]:
  """Noise in the range that each input has."""
  g = torch.Generator().manual_seed(0)
  out = []
  for _ in range(count):
    x = {}
    for v in model.inputs:
      shape = [d if isinstance(d, int) and d > 0 else 1 for d in v.shape]
      x[v.name] = (
        torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
        if v.dtype == torch.uint8
        else torch.rand(shape, generator=g)
      )
    out.append(x)
  return out


@torch.no_grad()
def worst_difference(a: list[Tensor], b: list[Tensor], slices: dict[str, slice]) -> float:
  """The largest difference in parts of the largest value, of each output by itself: meters must not hide curvatures."""
  whole = [torch.cat([x.reshape(1, -1) for x in t]) for t in (a, b)]
  parts = slices or {"all": slice(None)}
  return worst(difference(whole[1][:, s].float().numpy(), whole[0][:, s].float().numpy()) for s in parts.values())


def slices_of(model: OnnxModule) -> dict[str, slice]:
  """Empty where the file has none, as the driver-monitoring network."""
  return model_slices(model.base, model.where) if any(p.key == SLICES_KEY for p in model.base.metadata_props) else {}


def in_tinygrad(path: Path, x: dict[str, Tensor], want: Tensor, slices: dict[str, slice], limit: float) -> str:
  """The file run by tinygrad, which runs it on the device; in a process of its own, as tinygrad reads its settings on
  import. Its CPU device and plain loops unless DEV is set: operators are checked, not speed. -> what to say. Raises
  UserError where it computes something else."""
  if importlib.util.find_spec("tinygrad") is None:
    return "not checked: tinygrad is not installed"
  with tempfile.TemporaryDirectory() as folder:
    env = python.environment(**({} if "DEV" in os.environ else {"DEV": "CPU", "NOOPT": "1"}))
    if (cc := find_clang()) is None:
      return "not checked: its CPU device needs clang, or the ziglang package"
    env["CC"] = cc
    given, got = Path(folder) / "in.npz", Path(folder) / "out.npy"
    np.savez(given, **{k: v.numpy() for k, v in x.items()})  # type: ignore[arg-type]
    try:
      done = subprocess.run(
        python.command("-c", TINYGRAD, path, given, got),
        env=env,
        capture_output=True,
        text=True,
        timeout=TINYGRAD_LIMIT,
      )
    except subprocess.TimeoutExpired:
      return f"not checked: not done in {TINYGRAD_LIMIT} s"
    if done.returncode:
      raise UserError(
        f"tinygrad does not run {path}: {python.why_failed(done)}; modeld could not load it. --no-tinygrad writes it "
        "anyway"
      )
    d = worst_difference([want], [torch.from_numpy(np.load(got).astype(np.float32)).reshape(want.shape)], slices)
  if not d < limit:
    raise UserError(
      f"tinygrad computes something else from {path} than torch: {d:.2g} of the largest. --no-tinygrad writes it anyway"
    )
  return f"differs from torch by {d:.1e} of an output's largest value"


@torch.no_grad()
def moved(base: OnnxModule, new: OnnxModule, inputs: list[dict[str, Tensor]]) -> list[tuple[str, float, float]]:
  """(output, mean |new - base|, mean |base|) over `inputs`, in the outputs' own units."""
  name = base.outputs[0].name
  a, b = (torch.cat([m(**x)[name].reshape(1, -1) for x in inputs]) for m in (base, new))
  slices = slices_of(base)
  if not slices:
    return [(name, float((a - b).abs().mean()), float(a.abs().mean()))]
  return table(parse_outputs(a, slices), parse_outputs(b, slices))


def table(was: dict[str, Tensor], now: dict[str, Tensor]) -> list[tuple[str, float, float]]:
  """(output, mean |now - was|, mean |was|), and of the plan its position's distance in meters at 1, 2 and 3 s."""
  rows = [
    (k, float((now[k] - was[k]).abs().mean()), float(was[k].abs().mean()))
    for k in was
    if not k.endswith(("_hypotheses", "_weights"))
  ]
  if "plan" in was:
    for second in (1, 2, 3):
      k = int(np.abs(np.array(T_IDXS) - second).argmin())
      d = torch.linalg.vector_norm(now["plan"][..., k, :2] - was["plan"][..., k, :2], dim=-1)
      rows.append(
        (
          f"plan at {T_IDXS[k]:.1f} s, m",
          float(d.mean()),
          float(torch.linalg.vector_norm(was["plan"][..., k, :2], dim=-1).mean()),
        )
      )
  return rows


def moved_along(data: Path, base: Path, new: Path) -> list[tuple[str, float, float]]:
  """The same over a route's clips, each file with its own memory. Raises UserError where there are no clips."""
  clips = DrivingClips(read_dataset(data)[1], CLIP)
  if not len(clips):
    raise UserError(
      f"{data} has no {CLIP} frames in a row that were kept; give another folder of dataloader.py, or none"
    )
  chosen = [clips[int(i)] for i in np.unique(np.linspace(0, len(clips) - 1, SAMPLES).astype(int))]
  was, now = (
    [teacher.label(c) for c in chosen] for teacher in (DrivingTeacher(p, "onnxruntime", "cpu") for p in (base, new))
  )
  a, b = ({k: torch.cat([x[k] for x in labels]) for k in labels[0]} for labels in (was, now))
  return table(a, b)


def export(
  checkpoint: Path,
  output: Path,
  base: Path | None = None,
  opset: int = OPSET,
  data: Path | None = None,
  tinygrad: bool = True,
) -> dict[str, Any]:
  """Writes `output`. -> what was measured: torch_merge (merged beside unmerged), onnxruntime, tinygrad, moved. Raises
  UserError; then nothing is written."""
  state = read_checkpoint(checkpoint)
  path = base or Path(state["base"])
  if not path.is_file():
    raise UserError(f"the base model {path} is not there; give it with --base")
  student = load_student(state, path)
  new, old = merged(student), load_onnx(path).eval()
  inputs, slices = samples(old, SAMPLES), slices_of(old)
  name = old.outputs[0].name
  with torch.no_grad():
    want, plain = [student(**x)[name] for x in inputs], [new(**x)[name] for x in inputs]
  found: dict[str, Any] = {"torch_merge": worst_difference(want, plain, slices)}
  model = to_opset(new.to_onnx(), opset)
  if interface(model) != interface(old.base):
    raise UserError(f"the merged graph's interface is not {path}'s: a fault of export.py; please report it")
  half = any(i.data_type == onnx.TensorProto.FLOAT16 for i in model.graph.initializer)
  with atomic_path(output) as tmp:
    onnx.save(model, str(tmp))
    runner = OrtRunner(tmp, "cpu")
    found["onnxruntime"] = worst_difference(
      plain, [runner.run(x).reshape(p.shape) for x, p in zip(inputs, plain, strict=True)], slices
    )
    limit = TOLERANCE["float16" if half else "float32"]
    if not found["onnxruntime"] < limit:  # then as far as the base's own file is from torch
      base_runner = OrtRunner(path, "cpu")
      with torch.no_grad():
        own = [old(**x)[name] for x in inputs]
      limit = max(
        limit,
        3
        * worst_difference(
          own, [base_runner.run(x).reshape(p.shape) for x, p in zip(inputs, own, strict=True)], slices
        ),
      )
    if not found["onnxruntime"] < limit:
      raise UserError(
        f"ONNX Runtime computes something else than torch from the merged graph: {found['onnxruntime']:.2g} of an "
        "output's largest"
      )
    found["tinygrad"] = (
      in_tinygrad(tmp, inputs[0], plain[0], slices, max(limit, TOLERANCE["float16"]))
      if tinygrad
      else "not checked: --no-tinygrad"
    )
    whole = {NAMES.get(v.name, v.name) for v in old.inputs} >= {"img", "features_buffer"}
    found["along"] = data is not None and whole
    found["moved"] = moved_along(data, path, tmp) if data is not None and whole else moved(old, new, inputs)
  found["opset"] = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
  return found


@dataclass(frozen=True)
class Options:
  checkpoint: Path = option(help="best_model.pt of train.py")
  output: Path = option(aliases=("--out",), help="the ONNX file to write")
  base: Path | None = option(None, help="the base model's ONNX file, where it is not where the checkpoint says")
  data: Path | None = option(
    None, help="a folder of dataloader.py: a supercombo's outputs are compared along its clips instead of on noise"
  )
  opset: int = option(OPSET, help="of the file, where the base's operators can be said in it")
  tinygrad: bool = option(True, help="do not check the file in tinygrad")


@cli
def main(argv: Sequence[str] | None = None) -> int:
  args = parse(Options, __doc__, "export", argv)
  found = export(args.checkpoint, args.output, args.base, args.opset, args.data, args.tinygrad)
  print(f"{args.output}: opset {found['opset']}, interface and metadata as the base's")
  print(
    f"merged beside unmerged in torch: {found['torch_merge']:.1e} of an output's largest value; ONNX Runtime beside "
    f"torch: {found['onnxruntime']:.1e}"
  )
  print(f"tinygrad: {found['tinygrad']}")
  where = (
    f"clips of {args.data}"
    if found["along"]
    else "samples of noise, which is no drive" + ("" if args.data else ": give --data")
  )
  print(f"\nmoved from the base on {SAMPLES} {where}\n{'output':32} {'mean |change|':>14} {'mean |base|':>12}")
  for name, change, size in found["moved"]:
    print(f"{name:32} {change:14.4g} {size:12.4g}")
  return 0


if __name__ == "__main__":
  sys.exit(main())

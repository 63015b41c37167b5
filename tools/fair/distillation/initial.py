"""What a run starts from: another run's student or a bundle, in the classes, units, backbone and input that are learned
now."""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.tools.fair.distillation import history
from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.distillation.options import Options
from openpilot.tools.fair.distillation.trained import load_student_checkpoint, trained_on, union
from openpilot.tools.fair.distillation.trainer import RESUMED
from openpilot.tools.fair.labels.fetching import run_folder
from openpilot.tools.fair.spec import ClassSet, InputSpec, street_classes
from openpilot.tools.fair.students.backbone import other_stem
from openpilot.tools.fair.students.onnx_import import bundle_state
from openpilot.tools.learn.checkpoint import load_checkpoint
from openpilot.tools.learn.processes import is_first
from openpilot.tools.lib.errors import UserError, printable, warn

CLASS_LAYERS = {
  "maps": ("student.objects.segmentation.",),
  "boxes": ("student.objects.heat.", "student.detector.logits.", "student.oriented.heat."),
}  # a channel for each class
DEPTH_BIAS = "student.depth.depth.1.bias"  # added to the logarithm of depth
LEARNED_HEIGHT = 1.275  # m: the mean of the simulator's cameras, from which students learned depth in meters


def begins_as(name: str, before: Sequence[str], now: ClassSet) -> int | None:
  """Which of the classes that were told apart `before` a class of `now` is: of its name or alias, else by what streets'
  classes call both. None where it is none of them."""
  for known in (now, street_classes()):
    own = known.find(name)
    if own is not None and (same := [i for i, b in enumerate(before) if known.find(b) == own]):
      return same[0]
  return None


def channels_of(layer: torch.Tensor, rows: Sequence[int | None]) -> torch.Tensor:
  """A weight or bias of CLASS_LAYERS with those of its channels; NaN, which warm_start() leaves to the student, where
  there is none."""
  dim = 1 if layer.dim() == 4 and layer.shape[2] > 1 else 0  # a transposed convolution's outputs come second
  none = torch.full_like(layer.select(dim, 0), math.nan)
  return torch.stack([none if i is None else layer.select(dim, i) for i in rows], dim)


def in_classes(state: dict[str, Any], now: ClassSet, where: str) -> dict[str, Any]:
  """The checkpoint, or what bundle_state() gives, with the channels that stand for classes in the order that is learned
  now, and without such layers where none is known; new classes behind the old ones change nothing."""
  ema = dict(state["ema"])
  before: dict[str, list[str]] | None = state.get("classes")
  if before is None:
    learned = Config.from_dict(state["config"]).classes
    before = {"maps": list(learned.maps), "boxes": list(learned.boxes)}
  for kind, layers in CLASS_LAYERS.items():
    mine, there = list(getattr(now, kind)), before[kind]
    found = [k for k in ema if k.startswith(layers)]
    if there == mine[: len(there)] or not found:
      continue
    rows = [begins_as(n, there, now) for n in mine]
    known = any(i is not None for i in rows)
    for k in found:
      layer = ema.pop(k)
      if known:
        ema[k] = channels_of(layer, rows)
    if is_first():
      new = [n for n, i in zip(mine, rows, strict=True) if i is None]
      starts = [f"{n} starts as {there[i]}" for n, i in zip(mine, rows, strict=True) if i is not None and there[i] != n]
      told = [*starts, *([f"{', '.join(new)} {'start' if len(new) > 1 else 'starts'} anew"] if new else [])]
      warn(
        f"{where}: it tells the {kind} {printable(', '.join(there), 200)} apart, and "
        f"{printable(', '.join(mine), 200) or 'none'} are learned now"
        + (f": {printable('; '.join(told), 400)}" if told else "")
      )
  return {**state, "ema": ema}


def in_unit(state: dict[str, Any], per_height: bool, where: str) -> dict[str, Any]:
  """The checkpoint, or what bundle_state() gives, with depth in heights of the camera or in meters: its logarithms
  differ by a constant, as far as one height was learned."""
  said = state.get("per_height")
  before = Config.from_dict(state["config"]).per_height if said is None else bool(said)
  if before == per_height or DEPTH_BIAS not in state["ema"]:
    return state
  shift = math.log(LEARNED_HEIGHT) * (-1 if per_height else 1)
  if is_first():
    to = "heights of the camera" if per_height else "meters"
    warn(
      f"{where}: its depth is in {'meters' if per_height else 'heights of the camera'}, and {to} are learned now: "
      f"{LEARNED_HEIGHT} m is taken as the height that it knew"
    )
  return {**state, "ema": {**state["ema"], DEPTH_BIAS: state["ema"][DEPTH_BIAS] + shift}}


def of_trunk(state: dict[str, Any], backbone: str, where: str) -> dict[str, Any]:
  """The checkpoint, or what bundle_state() gives, without the trunk where that has another backbone: layers that are
  called alike are others."""
  before = state.get("backbone") or Config.from_dict(state["config"]).backbone_name
  trunk = ("student.backbone.", "student.neck.")
  if before == backbone or not any(k.startswith(trunk) for k in state["ema"]):
    return state
  if is_first():
    warn(f"{where}: its backbone is {before}, and {backbone} is learned now: backbone and neck start anew")
  return {**state, "ema": {k: v for k, v in state["ema"].items() if not k.startswith(trunk)}}


def of_input(state: dict[str, Any], now: InputSpec, where: str) -> dict[str, Any]:
  """What is taken of a checkpoint, or of what bundle_state() gives, with a trunk that sees what is seen now: packed
  frames or RGB. Says so: what joins maps of another size does not fit, and is left out when it is loaded."""
  before = InputSpec.from_dict(state.get("input")) if "input" in state else Config.from_dict(state["config"]).input
  if before.kind == now.kind:
    return state
  planes, trunk = before.shape[0], "student.backbone.net."
  stems = [k for k, v in state["ema"].items() if k.startswith(trunk) and v.dim() == 4 and v.shape[1] == planes][:1]
  if is_first():
    first = "its first layer is translated, and " if stems else ""
    warn(
      f"{where}: it sees {before.kind}, and {now.kind} is learned now: {first}what joins maps of another size starts "
      "anew"
    )
  return {**state, "ema": {**state["ema"], **{k: other_stem(state["ema"][k]) for k in stems}}}


def place(run: str) -> tuple[Path, str]:
  """--init -> the run, its best checkpoint or the bundle, and the part that is meant, '' where all is. Raises
  UserError."""
  if found := re.fullmatch(r"(\w+://?[^:]+)(?::(\w+))?", run):
    return run_folder(found[1]), found[2] or ""
  if Path(run).exists():
    return Path(run), ""
  path, _, part = run.rpartition(":")
  return Path(path or run), part


def pruned_as(args: Options, config: Config) -> Config:
  """The configuration, with the widths of the student that is gone on from: RUN's own, else the first of --init.
  Raises UserError where that is pruned, and another one."""
  last = args.output / "last.pt"
  if last.exists():
    where, said = str(args.output), load_checkpoint(last, keys=RESUMED)["config"]
  else:
    path, part = place(args.init[0]) if args.init else (Path(), "part")
    if part:
      return config
    where = f"--init {path}"
    if (path / "manifest.json").exists():
      manifest = load_bundle(path).manifest
      own = {k: manifest[k] for k in ("backbone", "widths") if k in manifest}
      said = {"student": manifest["graphs"][0]["name"], "tasks": [], **own}
    else:
      said = load_student_checkpoint(path / "best.pt" if path.is_dir() else path)["config"]
  if not said.get("widths"):
    return config
  before = Config.from_dict(said)
  if (before.student, before.backbone_name) != (config.student, config.backbone_name):
    raise UserError(
      f"{where}: it is pruned, and its widths are of {before.student} on {before.backbone_name}, not of "
      f"{config.student} on {config.backbone_name}; give --student and --backbone as it has them"
    )
  return dataclasses.replace(config, widths=before.widths)


def initial(runs: Sequence[str], train: Clips, backbone: str | None = None) -> dict[str, Any] | None:
  """The checkpoint of the first of `runs` (runs or bundles), with what the later ones have of the averaged student in
  its place; None of none. backbone: its name, of what is learned now; None: the same. Raises UserError where one is
  missing or has no such part."""
  before: dict[str, Any] | None = None
  for run in runs:
    path, part = place(run)
    if (path / "manifest.json").exists():
      some = np.linspace(0, len(train) - 1, min(32, len(train))).astype(int)
      state = bundle_state(path, torch.from_numpy(np.stack([train.read(int(i)).frames[0] for i in some])))
    else:
      state = load_student_checkpoint(path / "best.pt" if path.is_dir() else path)
    state = in_unit(in_classes(state, train.classes, f"--init {run}"), train.per_height, f"--init {run}")
    if not part and backbone is not None:
      state = of_trunk(state, backbone, f"--init {run}")
    learned = trained_on(state, path)
    prefix = f"student.{part}." if part else "student."
    taken = {k: v for k, v in state["ema"].items() if k.startswith(prefix)}
    if not taken:
      parts = sorted({k.split(".")[1] for k in state["ema"] if k.startswith("student.")})
      raise UserError(f"--init {run}: the student there has no part '{part}'; it has {', '.join(parts)}")
    state = of_input({**state, "ema": taken}, train.picture, f"--init {run}")
    if before is None:
      before = {**state, "trained": learned, "history": history.earlier(state)}
    else:
      before["ema"] = {**before["ema"], **state["ema"]}
      before["provenance"] = before["provenance"] + state["provenance"]
      before["trained"] = union(before["trained"], learned)
      before["history"] = history.joined(before["history"], history.earlier(state))
  return before

"""What a run of `distill --qat` learned, for the bundle that it started from: its weights, and its ranges in place of
those that PTQ takes from calibration frames."""

import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from openpilot.selfdrive.modeld.fair.bundle import Bundle
from openpilot.tools.fair.bundle.export import load_student, read_environment
from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.optimize.qat import make_plan, outputs_of
from openpilot.tools.fair.optimize.quantize import TARGETS, Target, prepare
from openpilot.tools.fair.students.onnx_export import export_onnx
from openpilot.tools.fair.teacher import check_license, license_of
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.said import public


@dataclass
class Learned:
  """target: whose 8 bits were learned. model: the run's float graph, prepared; ranges: of its tensors. teachers: as
  manifests name them. data: what was learned from, in words."""

  target: str
  steps: int
  graph: str
  model: onnx.ModelProto
  ranges: dict[str, tuple[float, float]]
  teachers: list[dict[str, str]]
  data: str
  taught_by: str = ""  # in words, where it was a float student

  @property
  def method(self) -> str:
    how = f"ranges and weights learned in {self.steps} steps of quantization-aware training"
    return how + (f", {self.taught_by}" if self.taught_by else "")

  def fits(self, target: Target) -> bool:
    own = TARGETS[self.target]
    return (own.symmetric, own.limit, own.whole) == (target.symmetric, target.limit, target.whole)

  def join(self, manifest: dict[str, Any]) -> None:
    """Puts who taught it, and what it learned from, into a manifest as it is read."""
    said = manifest["provenance"]
    said["teachers"] += [t for t in self.teachers if t not in said["teachers"]]
    said["license"] = license_of(said["teachers"])
    said["data"].append(self.data)


def learned_by_itself(run: Path) -> bool:
  """Whether a run's student has learned in 8 bits: its float graph is not what was learned."""
  return bool(load_student(run)[1].qat)


def ranges_of(state: dict[str, Any]) -> dict[str, tuple[float, float]]:
  """Of a checkpoint: a range's name -> low, high."""
  ema, names = state["ema"], state["ranges"]
  first = ema["rounding.first"].double()
  ends = zip(ema["rounding.low"].double() * first[:, 0], ema["rounding.high"].double() * first[:, 1], strict=True)
  return {name: (float(low), float(high)) for name, (low, high) in zip(names, ends, strict=True)}


def learned(run: Path, base: Bundle, targets: Collection[str], accept_license: Collection[str]) -> Learned:
  """Raises UserError where the run is not finished, did not learn in 8 bits or in those of other targets, or is of
  another student than the bundle's."""
  student, config, state = load_student(run)
  if not config.qat or "ranges" not in state:
    raise UserError(f"--qat {run}: it has not learned in 8 bits; make it with `tools/op.sh distill --qat --init`")
  for t in state["provenance"]:
    check_license(t["model"], t["licence"], accept_license)
  environment = read_environment(run)
  keep, leave = outputs_of(config)
  with tempfile.TemporaryDirectory() as tmp:
    path = Path(tmp) / "student.onnx"
    graph = export_onnx(student, path, keep, leave)
    check_same(run, config, graph, base)
    model = prepare(path.read_bytes())
  said, plan = ranges_of(state), make_plan(student, keep, leave, TARGETS[config.qat])
  if sorted(set(plan.tensors.values())) != sorted(said):
    raise UserError(f"--qat {run}: its ranges are of another version of this code; distill --qat again")
  found = Learned(
    config.qat,
    state["step"],
    config.student,
    model,
    {tensor: said[name] for tensor, name in plan.tensors.items()},
    [
      {"model": public(t["model"]), "checkpoint_hash": t["checkpoint_hash"], "license": t["licence"]}
      for t in state["provenance"]
    ],
    f"8 bits: {state['step']} steps on {environment['clips']} clips, label store {environment['labels']}",
    config.taught_by,
  )
  if wrong := [t for t in targets if not found.fits(TARGETS[t])]:
    fit = ", ".join(t for t in TARGETS if found.fits(TARGETS[t]))
    raise UserError(f"--qat {run}: it learned the 8 bits of {fit}, not of {wrong[0]}; distill with --qat {wrong[0]}")
  return found


def check_same(run: Path, config: Config, graph: dict[str, Any], base: Bundle) -> None:
  """Raises UserError where the run's graph does not take and say what the bundle's does."""

  def faces(entry: dict[str, Any]) -> dict[str, Any]:
    sides = [*entry["inputs"], *entry["outputs"]]
    return {x["name"]: (x["shape"], x["dtype"], x.get("classes")) for x in sides}

  mine = next((g for g in base.graphs if g["name"] == graph["name"]), None)
  if mine is None or len(base.graphs) != 1:
    there = ", ".join(g["name"] for g in base.graphs)
    raise UserError(f"--qat {run}: it is {config.student}, and {base.path} is {there}")
  own, its = faces(graph), faces(mine)
  if differ := [n for n in {**its, **own} if own.get(n) != its.get(n)]:
    raise UserError(f"--qat {run}: its {differ[0]} is another than that of {base.path}; it is of another student")
  if any(
    o.get("head") == "depth" and bool(o.get("parameters", {}).get("per_height")) != config.per_height
    for o in mine["outputs"]
  ):
    raise UserError(f"--qat {run}: one of it and {base.path} says depth in meters, the other in heights of the camera")

"""`tools/op.sh optimize --prune`: a student with fewer channels, as a run from which `tools/op.sh distill --init` goes
on. What goes is chosen by what it is worth to the student's own losses, on frames of a label store."""

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openpilot.selfdrive.modeld.fair.bundle import given_or_shipped, load_bundle
from openpilot.tools.fair.bundle.export import load_student, read_environment
from openpilot.tools.fair.distillation import history
from openpilot.tools.fair.distillation.batch import Batch, Batches
from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.distillation.distiller import Distiller
from openpilot.tools.fair.distillation.look import Look
from openpilot.tools.fair.distillation.made import check_new, write_run
from openpilot.tools.fair.distillation.options import can_learn, clip_length
from openpilot.tools.fair.distillation.plan import clips_of
from openpilot.tools.fair.distillation.trained import trained_on
from openpilot.tools.fair.evaluation.compared import class_set, classes_of
from openpilot.tools.fair.labels.dataset import LabelDataset
from openpilot.tools.fair.optimize.measure import frame_of, milliseconds_in_turns
from openpilot.tools.fair.optimize.pruning import Kept, Plan, apply, choose, make_plan, silence, values
from openpilot.tools.fair.spec import ClassSet, InputSpec, road_classes, street_classes
from openpilot.tools.fair.students.families import FAMILIES
from openpilot.tools.fair.students.list_students import macs
from openpilot.tools.fair.students.onnx_import import bundle_state
from openpilot.tools.fair.students.onnx_import import class_set as no_classes
from openpilot.tools.fair.students.student import Student, build, parameters, spec_of
from openpilot.tools.fair.students.widths import BatchNorm, sides, widths_of
from openpilot.tools.fair.tasks import TASKS, task_of
from openpilot.tools.fair.teacher import check_license
from openpilot.tools.lib.errors import UserError, warn
from openpilot.tools.lib.said import command

ROUNDS = 4  # in which channels go: what the rest is worth is measured anew in each
STEPS = 16  # of all that can go, where a time is to be met: it is taken after each
BATCH = 8  # frames at once
SAME = 1e-4  # of an output's largest value: sums of as many zeros fewer, in float32


@dataclass
class Source:
  """A student that is pruned. state: its checkpoint's, or bundle_state()'s."""

  student: Student
  config: Config
  state: dict[str, Any]
  environment: dict[str, Any]


def named(name: str, names: dict[str, list[str]], roles: dict[str, str]) -> ClassSet:
  """The class set of a bundle: what it knows of the road's or the street's classes, aliases of all of them included,
  where these are its names, else one of its own names."""
  for whole in (road_classes(), street_classes()):
    kept = [replace(c, maps=c.name in names["maps"], boxes=c.name in names["boxes"]) for c in whole.classes]
    known = replace(whole, classes=tuple(kept))
    if {k: list(getattr(known, k)) for k in names} == names:
      return known
  return class_set(name, names["maps"], names["boxes"], roles)


def of_bundle(folder: Path, data: Path) -> Source:
  """Raises UserError, BundleError."""
  look, bundle = Look(data), load_bundle(folder)
  name = bundle.graphs[0]["name"]
  names, roles = classes_of(bundle)
  # of a student of depth alone nothing is told apart
  known = no_classes(names) if not any(names.values()) else named(bundle.name, names, roles)
  said = bundle.manifest
  picture, widths = InputSpec.from_dict(said.get("input") or {"view": said["view"]}), said.get("widths", {})
  spec = spec_of(name, backbone=said.get("backbone"), input=picture, classes=known, widths=widths)
  outputs = [o["name"] for o in bundle.graphs[0]["outputs"]]
  tasks = [t for t in can_learn(spec) if any(o.startswith(TASKS[t].outputs) for o in outputs)]
  frames = LabelDataset(data, ["frames/frame"], stale_labels=True)  # any will do
  which = np.unique(np.linspace(0, len(frames) - 1, 32).astype(int))
  state = bundle_state(folder, torch.from_numpy(np.stack([frames[int(i)]["frames/frame"] for i in which])))
  config = Config(
    name,
    tasks,
    backbone=said.get("backbone"),
    clip=clip_length(tasks, look),
    input=picture,
    classes=known,
    per_height=state["per_height"],
    widths=dict(widths),
  )
  student = build(config.spec)
  student.load_state_dict({k.removeprefix("student."): v for k, v in state["ema"].items()}, strict=False)
  told = {"clips": 0, "segments": [], "labels": "", "commit": said["provenance"].get("git_commit", ""), "command": ""}
  return Source(student.eval(), config, {**state, "trained": trained_on(state, folder)}, told)


def open_source(path: Path, data: Path) -> Source:
  """A finished run of distill, or a bundle, or the name of one that ships. Raises UserError, BundleError."""
  path = given_or_shipped(path)
  if not (path / "best.pt").is_file():
    return of_bundle(path, data)
  student, config, state = load_student(path)
  return Source(student, config, {**state, "trained": trained_on(state, path)}, read_environment(path))


class Calibration:
  """Frames of a label store with what the student is taught of them."""

  def __init__(self, source: Source, data: Path, frames: int, prefer: list[str], stale: bool, ignore: bool):
    """Raises UserError where nothing there teaches any of its tasks, or the pictures are others than its own."""
    look, config = Look(data), source.config
    if (picture := look.picture()) != config.input:
      raise UserError(f"--data {data} holds {picture}, and the student sees {config.input}; label what it sees")
    if prefer and prefer[0] not in (there := sorted({g.teacher for g in look.groups} - {"frames"})):
      raise UserError(f"--truth {prefer[0]}: {data} has labels by {', '.join(there) or 'nobody'}")
    # a student's features are taught through a layer that is not kept
    asked = [t for t in config.tasks if TASKS[t].aids is None]
    self.tasks = [t for t in asked if any(t in task_of(x, config.classes) for x in look.labels)]
    if absent := [t for t in config.tasks if t not in self.tasks]:
      warn(f"--data {data}: {', '.join(absent)} is not asked what channels are worth: nothing there teaches it")
    if not self.tasks:
      raise UserError(f"--data {data} teaches nothing that the student does ({', '.join(config.tasks)})")
    config = replace(config, tasks=self.tasks, ignore_classes=config.ignore_classes or ignore)
    self.clips = clips_of(look, config, prefer, None, stale)
    count = min(len(self.clips), max(1, frames // config.clip))
    self.which = np.unique(np.linspace(0, len(self.clips) - 1, count).astype(int))
    self.config = config

  @property
  def frames(self) -> int:
    return len(self.which) * self.config.clip

  def batches(self) -> Iterator[Batch]:
    data, n = Batches(self.clips, 0, False), max(1, BATCH // self.config.clip)
    for a in range(0, len(self.which), n):
      yield data[(0, [int(i) for i in self.which[a : a + n]], False)]

  def losses(self, student: Student) -> Iterator[Tensor]:
    config = self.config
    distiller = Distiller(student, self.tasks, config.weights, parts=config.parts).eval()
    for batch in self.batches():
      parts = distiller(batch)
      if len(parts) > 1:
        yield parts["total"]

  def mean(self, student: Student) -> float:
    with torch.no_grad():
      return float(np.mean([float(x) for x in self.losses(student)]))

  def settle(self, student: Student) -> None:
    """Gives every norm the statistics of what it sees now."""
    norms = [m for m in student.modules() if isinstance(m, BatchNorm)]
    before = [m.momentum for m in norms]
    for m in norms:
      m.reset_running_stats()
      m.momentum = None  # the mean of all batches
      m.train()
    with torch.no_grad():
      for batch in self.batches():
        student.apart(batch["frame"])
    for m, momentum in zip(norms, before, strict=True):
      m.momentum = momentum
      m.eval()


def goal(student: Student, share: float | None, millions: float | None) -> int:
  """Multiply-adds to remove. Raises UserError."""
  now = macs(student)
  if share is not None:
    if not 0 < share < 1:
      raise UserError(f"--prune {share:g}: it is the share of the multiply-adds that goes, between 0 and 1, as .4")
    return math.ceil(share * now)
  assert millions is not None
  if not 0 < millions * 1e6 < now:
    raise UserError(f"--prune-macs {millions:g}: the student has {now / 1e6:.0f} million; name fewer")
  return math.ceil(now - millions * 1e6)


def check(student: Student, plan: Plan, kept: Kept, pruned: Student) -> None:
  """Raises UserError where the pruned student is not what the whole one is without these channels."""
  quiet, frame = copy.deepcopy(student).eval(), student.inputs()["frame"]
  silence(quiet, plan, kept)
  frame = torch.from_numpy(np.random.default_rng(0).integers(0, 256, frame.shape, dtype=np.uint8))
  with torch.no_grad(), contextlib.suppress(RuntimeError):  # torch's, of shapes that do not fit
    pairs = list(zip(quiet.apart(frame), pruned.eval().apart(frame), strict=True))
    if all(
      a.shape == b.shape and float((a - b).abs().max()) <= SAME * max(1.0, float(a.abs().max())) for a, b in pairs
    ):
      return
  raise UserError(
    f"{student.name} on {student.backbone.name} cannot be pruned: without its channels it computes something else; "
    "take another --backbone"
  )


class Clock:
  """Whether a student is as fast as it shall be, on this machine now."""

  def __init__(self, whole: Student, goal: float):
    """goal: ms a frame. Raises UserError where the whole one is."""
    self.whole, self.goal = frame_of(whole), goal
    (self.before,) = (self.last,) = milliseconds_in_turns([self.whole])
    if self.before <= goal:
      raise UserError(f"--prune-ms {goal:g}: the student takes {self.before:.2f} ms a frame here; name less")

  def fast(self, student: Student) -> bool:
    """Beside the whole one in turns: a machine that has become slower since is not the student's fault."""
    whole, now = milliseconds_in_turns([self.whole, frame_of(student)])
    self.last = now * self.before / whole
    print(f"time         {macs(student) / 1e6:.0f} million multiply-adds: {self.last:.2f} ms a frame", flush=True)
    return self.last <= self.goal


def reduce(
  source: Source, calibration: Calibration, remove: int | None, clock: Clock | None = None
) -> tuple[Student, Plan]:
  """remove: multiply-adds; None: until clock says that it is fast -> the pruned student, and what may lose channels and
  what not. Raises UserError where that cannot be met."""
  student = source.student
  plan = make_plan(student)
  whole: Kept = {g.name: torch.arange(g.channels) for g in plan.groups}
  first = values(student, plan.groups, calibration.losses(student))
  if idle := [g.name for g in plan.groups if not first[g.name].any()]:
    plan.left["not taught by --data"] = idle
    plan.groups = [g for g in plan.groups if g.name not in idle]
  now = macs(student)
  _, most = choose(student, plan, whole, {g.name: torch.ones(g.channels) for g in plan.groups}, now)
  why = "; ".join(f"{reason}: {len(names)} layers" for reason, names in plan.left.items())
  whole_says = f"what stays whole is {why or 'a quarter of each layer'}"
  if remove is not None and most < remove:
    raise UserError(
      f"{remove / now:.3f} of the multiply-adds cannot go: at most {most / now:.3f} can, to {(now - most) / 1e6:.0f} "
      f"million; {whole_says}"
    )
  aim, rounds = (most, STEPS) if remove is None else (remove, ROUNDS)
  kept, saved, worth = {g.name: whole[g.name] for g in plan.groups}, 0, first
  for k in range(1, rounds + 1):
    kept, more = choose(student, plan, kept, worth, math.ceil(aim * k / rounds) - saved)
    saved += more
    pruned = copy.deepcopy(student)
    apply(pruned, plan, kept)
    check(student, plan, kept, pruned)
    calibration.settle(pruned)
    if k == rounds or (clock is not None and clock.fast(pruned)):
      break
    worth = values(pruned, plan.groups, calibration.losses(pruned), kept)
  if clock is not None and clock.last > clock.goal and not clock.fast(pruned):
    raise UserError(
      f"--prune-ms {clock.goal:g} cannot be met: of {clock.before:.2f} ms a frame {clock.last:.2f} are left where "
      f"{saved / now:.3f} of the multiply-adds are gone, and no more can go; {whole_says}"
    )
  return pruned, plan


def prune(args: Any) -> dict[str, Any]:
  """args: optimize's Options. -> what is in the run's log. Raises UserError, BundleError."""
  if args.int8 or args.fp16 or args.apply or args.format != ("onnx",):
    raise UserError(
      "--prune gives a run that is to be distilled on; then --int8 or --fp16 on that, in a command of its own"
    )
  if sum(x is not None for x in (args.prune, args.prune_macs, args.prune_ms)) > 1:
    raise UserError("--prune, --prune-macs and --prune-ms each say how much goes; give one")
  if args.classes is not None:
    raise UserError("--classes is not for --prune: the student keeps its classes; --ignore-classes leaves others out")
  check_new(args.output)
  source = open_source(args.bundle, args.data)
  if source.config.student in FAMILIES:
    raise UserError(f"{source.config.student} is of a family, whose widths are its own; prune one of ours")
  clock = Clock(source.student, args.prune_ms) if args.prune_ms is not None else None
  remove = goal(source.student, args.prune, args.prune_macs) if clock is None else None
  prefer = [args.truth] if args.truth else []
  calibration = Calibration(source, args.data, args.frames, prefer, args.stale_labels, args.ignore_classes)
  teachers = [*source.state["provenance"], *calibration.clips.provenance()]
  for t in teachers:
    check_license(t["model"], t["licence"], args.accept_license)
  pruned, plan = reduce(source, calibration, remove, clock)
  spec = replace(source.config.spec, widths={})
  config = replace(source.config, widths=widths_of(pruned, build(spec)))
  before, now = macs(source.student), macs(pruned)
  said: dict[str, Any] = {
    "macs": [before, now],
    "parameters": [parameters(source.student), parameters(pruned)],
    "losses": [calibration.mean(source.student), calibration.mean(pruned)],
    "frames": calibration.frames,
    **({"milliseconds": [clock.before, clock.last]} if clock is not None else {}),
    "channels": {g.name: [g.channels, sides(pruned.get_submodule(g.name))[1]] for g in plan.groups},
    "whole": plan.left,
  }
  shown, log = history.earlier(source.state), {"pruned": said}
  write_run(
    args,
    config,
    pruned.state_dict(),
    teachers,
    source.state["trained"],
    shown,
    {**source.environment, "pruned": True},
    log,
  )
  print(
    f"{source.config.student}: {before / 1e6:.0f} -> {now / 1e6:.0f} million multiply-adds ({1 - now / before:.1%} "
    f"fewer), {said['parameters'][0] / 1e6:.2f} -> {said['parameters'][1] / 1e6:.2f}M parameters; mean loss on "
    f"{calibration.frames} frames {said['losses'][0]:.3f} -> {said['losses'][1]:.3f}"
  )
  for reason, names in plan.left.items():
    print(f"whole        {reason}: {', '.join(names)}")
  print(f"wrote        {args.output}; go on from it: {onward(args, source.config)}")
  return said


def onward(args: Any, config: Config) -> str:
  backbone = ["--backbone", config.backbone] if config.backbone else []
  tasks = ["--tasks", ",".join(config.tasks)]
  words = ["--labels", args.data, "--student", config.student, *backbone, *tasks, "--init", args.output]
  return command("tools/op.sh", "distill", *words, "--output", args.output.with_name(args.output.name + "-on"))

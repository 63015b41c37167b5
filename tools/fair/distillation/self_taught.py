"""A student that is taught by a float copy of itself, as it was before it learned on, or by the one that it was pruned
from: on every frame each of its outputs is pulled to what the frozen teacher says there. No label is needed.

All measures are squares of small differences, 0 where the two say the same, and in units that outputs have in common:
chances by their divergence, boxes in parts of their own sides, all else in parts of its own variance."""

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.distillation.losses import wide
from openpilot.tools.fair.distillation.trained import Trained, trained_on
from openpilot.tools.fair.spec import InputSpec, StudentSpec
from openpilot.tools.fair.students.onnx_import import classes_of, is_per_height, student_of, teachers_of
from openpilot.tools.fair.students.student import Student, build
from openpilot.tools.fair.tasks import TASKS
from openpilot.tools.learn.one_batch import gathered_outputs
from openpilot.tools.lib.errors import UserError

MAPS = {"lanes": ("tracker_",)}  # what the tracker sees; its steps behind that stay in float, and as they are
# output -> that of the chances by which its places count: where nothing is, nobody asks how large it would be
SURE = {
  "objects_box": "objects_heat",
  "objects_coef": "objects_heat",
  "objects_embed": "objects_heat",
  "oriented_box": "oriented_heat",
  "detector_boxes": "detector_logits",
}
LAST = ("detector_logits", "detector_boxes", "tracker_coarse", "tracker_fine")  # whose channels are the last dimension
LEAST = 1e-9  # of a variance


def chances(logits: Tensor, want: Tensor) -> Tensor:
  """Logits of any shape, each by itself -> divergence of what they say from what `want` says (Kullback and Leibler),
  the sum over how many things `want` sees: scalar."""
  p = torch.sigmoid(want)
  apart = F.binary_cross_entropy_with_logits(logits, p, reduction="sum")
  return (apart - F.binary_cross_entropy_with_logits(want, p, reduction="sum")) / p.sum().clamp(min=1)


def classes(logits: Tensor, want: Tensor) -> Tensor:
  """(B, C, H, W) logits -> the same divergence of distributions over C classes, mean over pixels: scalar."""
  return F.kl_div(F.log_softmax(logits, 1), F.log_softmax(want, 1), reduction="none", log_target=True).sum(1).mean()


def values(x: Tensor, want: Tensor, weight: Tensor) -> Tensor:
  """(B, C, ...), weight (B, 1, ...) -> squared error over variance, both summed over channels and places: scalar."""
  rest = [d for d in range(x.dim()) if d != 1]
  mean = (weight * want).sum(rest, keepdim=True) / weight.sum().clamp(min=LEAST)
  return (weight * (x - want) ** 2).sum() / (weight * (want - mean) ** 2).sum().clamp(min=LEAST)


def boxes(x: Tensor, want: Tensor, weight: Tensor, sides: Tensor) -> Tensor:
  """(B, 4, ...), weight (B, 1, ...), sides (B, 4, ...) of each box in the unit of x -> mean squared error in parts of
  them: scalar."""
  return (weight * ((x - want) / sides) ** 2).sum() / (4 * weight.sum()).clamp(min=LEAST)


def sides_of(name: str, want: Tensor) -> Tensor:
  """Boxes (B, 4, ...) as that output has them -> for each number the side that it lies along."""
  if name == "objects_box":  # left, top, right, bottom of the cell, view pixels
    width, height = want[:, 0] + want[:, 2], want[:, 1] + want[:, 3]
    return torch.stack([width, height, width, height], 1).clamp(min=1.0)
  return want[:, [2, 3, 2, 3]].clamp(min=1e-3)  # cx, cy, w, h in parts of the view


def difference(name: str, out: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> Tensor:
  """How far an output of a student is from its teacher's: scalar, 0 where they are the same."""

  def read(side: Mapping[str, Tensor], k: str) -> Tensor:
    x = wide(side[k])
    return x.movedim(-1, 1) if k in LAST else x

  x, y = read(out, name), read(want, name)
  if name == "segmentation":
    return classes(x, y)
  if name.endswith(("_heat", "_logits")):
    return chances(x, y)
  sure = SURE.get(name)
  weight = torch.ones_like(y[:, :1]) if sure is None else torch.sigmoid(read(want, sure)).amax(1, keepdim=True)
  return boxes(x, y, weight, sides_of(name, y)) if name in ("objects_box", "detector_boxes") else values(x, y, weight)


class Teacher:
  """No module, so that it is in no checkpoint as a part of its student, and no optimizer sees it. student: frozen.
  tasks: that it teaches; leave: outputs of theirs that it does not."""

  def __init__(self, student: Student, tasks: Sequence[str], leave: Collection[str] = ()):
    self.student = copy.deepcopy(student).eval().requires_grad_(False)
    self.student.maps_too = True
    self.tasks, self.leave = list(tasks), leave

  def asked(self, out: Mapping[str, Any]) -> dict[str, str]:
    """Of outputs by name those that it teaches -> the loss's part."""
    starts = {t: MAPS.get(t, TASKS[t].outputs) for t in self.tasks}
    return {
      name: f"{t}/self_{name.removeprefix(f'{t}_')}"
      for t, start in starts.items()
      for name in out
      if start and name.startswith(start) and name not in self.leave
    }

  def parts(
    self, out: Mapping[str, Tensor], frame: Tensor, shares: tuple[list[int], list[int]] | None = None
  ) -> dict[str, Tensor]:
    """out: the student's, of frame (B, *its input) uint8, encode()'s with maps_too -> {"task/self_output": scalar}.
    shares: of several processes, with `out` of all their frames and `frame` of its own: frames and clips of each."""
    with torch.no_grad():
      want = self.student.encode(frame)[0]
      if shares is not None:
        want = gathered_outputs(want, *shares)
    return {part: difference(name, out, want) for name, part in self.asked(want).items()}

  def state(self) -> dict[str, Any]:
    return {"spec": self.student.spec.to_dict(), "weights": self.student.state_dict()}

  @classmethod
  def of_state(cls, state: Mapping[str, Any], tasks: Sequence[str], leave: Collection[str]) -> "Teacher":
    student = build(StudentSpec.from_dict(state["spec"]))
    student.load_state_dict(state["weights"])
    return cls(student, tasks, leave)


def of_an_empty_frame(student: Student) -> tuple[Student, dict[str, Tensor]]:
  """-> a copy on the CPU that learns, and encode()'s outputs with maps_too."""
  twin = copy.deepcopy(student).cpu().eval().requires_grad_(True)
  twin.maps_too = True
  return twin, twin.encode(torch.zeros(1, *twin.spec.input.shape, dtype=torch.uint8))[0]


def check_known(teacher: Teacher, known: Mapping[str, Tensor]) -> None:
  """known: weights that --init gave, by the student's names; NaN: it has none. Raises UserError where the student began
  any anew, or wider, that its outputs depend on: then it was not that student."""
  twin, out = of_an_empty_frame(teacher.student)
  torch.stack([out[name].sum() for name in teacher.asked(out)]).sum().backward()
  own = [n for n, p in twin.named_parameters() if p.grad is not None]
  shapes = {n: p.shape for n, p in twin.named_parameters()}
  if new := [n for n in own if n not in known or known[n].shape != shapes[n] or known[n].isnan().any()]:
    raise UserError(
      f"--self-taught: {len(new)} of {len(own)} tensors of {twin.name} are not those of --init, the first is {new[0]}; "
      "name the student that it is, with its classes, and with --tasks what it has learned"
    )


def check_alike(teacher: Teacher, student: Student) -> None:
  """Raises UserError where they have outputs of other shapes."""
  (_, its), (_, own) = map(of_an_empty_frame, (teacher.student, student))
  for name in teacher.asked(its):
    if name not in own or own[name].shape != its[name].shape:
      there = tuple(own[name].shape) if name in own else "none"
      raise UserError(
        f"--self-taught: {name} of {teacher.student.name} is {tuple(its[name].shape)}, and {there} of {student.name}; "
        "it teaches students of its own form, as a pruned one"
      )


def open_teacher(path: Path, config: Config) -> tuple[Student, list[dict[str, str]], Trained]:
  """A finished run, or a bundle, that can teach a student of `config` -> the student, its teachers, what it learned
  from. Raises UserError, BundleError."""
  from openpilot.tools.fair.bundle.export import load_student

  where = f"--self-taught {path}"
  bundle = load_bundle(path) if (path / "manifest.json").exists() else None
  if bundle is None:
    student, its, state = load_student(path)
    names, picture = {"maps": list(its.classes.maps), "boxes": list(its.classes.boxes)}, its.input
    per_height, tasks, teachers, trained = its.per_height, its.tasks, state["provenance"], trained_on(state, path)
  else:
    graph = bundle.graphs[0]
    outputs = [o["name"] for o in graph["outputs"]]
    tasks = [t for t in TASKS if TASKS[t].outputs and any(o.startswith(TASKS[t].outputs) for o in outputs)]
    names, picture = classes_of(graph), InputSpec.from_dict(bundle.manifest.get("input"))
    per_height, teachers, trained = is_per_height(graph), teachers_of(bundle), trained_on({}, path)
  if lacks := [t for t in config.tasks if t not in tasks]:
    raise UserError(f"{where}: it has not learned {', '.join(lacks)}; name with --tasks what it teaches")
  if picture != config.input:
    raise UserError(f"{where}: it sees {picture}, and {config.input} is learned on")
  for kind, own in names.items():
    if any(TASKS[t].kind == kind for t in config.tasks) and own != list(getattr(config.classes, kind)):
      raise UserError(f"{where}: it tells the {kind} {', '.join(own)} apart, not those of --classes")
  if "depth" in config.tasks and per_height != config.per_height:
    what = "heights of the camera" if per_height else "meters"
    raise UserError(f"{where}: its depth is in {what}, and that is not learned here; see --no-per-height")
  return student if bundle is None else student_of(bundle, graph)[0], teachers, trained

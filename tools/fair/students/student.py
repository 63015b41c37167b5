"""Students: one backbone, one neck, and the heads of its tasks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from openpilot.tools.fair.spec import StudentSpec
from openpilot.tools.fair.students.backbone import BACKBONES, Backbone
from openpilot.tools.fair.students.dense import DepthHead, ObjectsHead
from openpilot.tools.fair.students.detector import DetectorHead
from openpilot.tools.fair.students.families import FAMILIES, split_name
from openpilot.tools.fair.students.lanes import POINTS, LanesHead
from openpilot.tools.fair.students.layers import Neck
from openpilot.tools.fair.students.oriented import OrientedHead
from openpilot.tools.fair.students.sizes import SIZES, Size
from openpilot.tools.fair.students.widths import LAYERS, narrow
from openpilot.tools.lib.errors import UserError

UNIFIED = ("depth", "objects", "detector", "lanes")  # the heads of a unified student, in order


@dataclass(frozen=True)
class Head:
  """A line of the registry of heads.

  make: (what the student is, its size) -> the head: a module that makes outputs by ONNX name of the pyramid's maps
  {8, 16, 32: (B, size.neck, height / stride, width / stride)}. budget: parameters that a student of this head alone may
  have. needs: 'maps', 'boxes': the kinds of classes of which it wants one at least; any of them where several."""

  make: Callable[[StudentSpec, Size], nn.Module]
  budget: int | None = None
  needs: tuple[str, ...] = ()


HEADS: dict[str, Head] = {}


def register_head(name: str, head: Head) -> None:
  """Each size then has a student of this head alone. Raises UserError where the name is taken."""
  if name in HEADS or name in ("unified", "backbone", "neck"):
    raise UserError(f"there is a head '{name}' already; give yours another name")
  HEADS[name] = head


register_head("depth", Head(lambda spec, size: DepthHead(size.neck, size.dense, size.features), 5_000_000))
register_head(
  "objects",
  Head(
    lambda spec, size: ObjectsHead(size.neck, size.tower, len(spec.classes.boxes), len(spec.classes.maps)),
    10_000_000,
    ("boxes", "maps"),
  ),
)
register_head(
  "detector",
  Head(
    lambda spec, size: DetectorHead(size.neck, len(spec.classes.boxes), size.tokens, picture=spec.input),
    8_000_000,
    ("boxes",),
  ),
)
register_head(
  "oriented",
  Head(lambda spec, size: OrientedHead(size.neck, size.tower, len(spec.classes.boxes)), 10_000_000, ("boxes",)),
)
register_head(
  "lanes",
  Head(lambda spec, size: LanesHead(size.neck, size.branch, size.template, size.tracker, spec.input), 3_000_000),
)


def student_names() -> list[str]:
  return [f"{task}-{size}" for task in (*HEADS, "unified") for size in SIZES]


def spec_of(name: str, **more: Any) -> StudentSpec:
  """Of a student by its registered name, "unified-small", or a family's, "d-fine-nano". more: fields of StudentSpec.
  Raises UserError."""
  if name in FAMILIES:
    return StudentSpec(*split_name(name), **more)
  for task in (*HEADS, "unified"):
    if name.startswith(f"{task}-") and (size := name.removeprefix(f"{task}-")) in SIZES:
      return StudentSpec(task, size, **more)
  raise UserError(f"no student '{name}'; there are {', '.join(student_names())}")


def heads_of(spec: StudentSpec) -> tuple[str, ...]:
  """Names of its heads, in order: of a unified student those for which there are classes. Raises UserError where a
  student of one head has none."""
  if spec.name in FAMILIES:
    return ("detector",)
  if spec.task != "unified" and spec.task not in HEADS:
    raise UserError(f"no head '{spec.task}'; there are {', '.join(HEADS)}, unified")
  wanted = UNIFIED if spec.task == "unified" else (spec.task,)
  able = tuple(n for n in wanted if not HEADS[n].needs or any(getattr(spec.classes, k) for k in HEADS[n].needs))
  if not able:
    what = " or ".join(HEADS[spec.task].needs)
    raise UserError(f"{spec.name} tells classes of {what} apart, and the class set '{spec.classes.name}' has none")
  return able


class Student(nn.Module):
  """(B, *spec.input.shape) uint8 frame, by default the (6, 128, 256) model frame -> the outputs of its tasks, by ONNX
  name; see the heads for each one's meaning and shape."""

  def __init__(
    self, spec: StudentSpec, size: Size, backbone: str, pretrained: bool | str = False, deepest: int | None = None
  ):
    super().__init__()
    self.spec, self.name, self.task, self.size = spec, spec.name, spec.task, size
    self.tasks = heads_of(spec)
    self.hint = False  # whether the pyramid's map of stride 16 comes out as 'features' too, where no head makes them
    self.maps_too = False  # whether the tracker's maps come out, too, as 'tracker_coarse' and 'tracker_fine'
    self.backbone = Backbone(backbone, pretrained, deepest, spec.input)
    channels = self.backbone.channels
    self.neck = Neck(channels, size.neck)
    self.lanes: LanesHead | None = None  # the tracker, which alone has a state
    for name in self.tasks:
      setattr(self, name, HEADS[name].make(spec, size))

  def encode(self, frame: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """frame (B, *spec.input.shape) uint8 -> all outputs but those of the tracker, and the tracker's maps (none where
    the student does not track)."""
    maps = self.neck(self.backbone(frame))
    out: dict[str, Tensor] = {}
    for name in self.tasks:
      if name != "lanes":
        out.update(self.get_submodule(name)(maps))
    if self.hint:
      out.setdefault("features", maps[16])
    tracked = [] if self.lanes is None else self.lanes.encode(self.backbone.normalize(frame), maps)
    if self.maps_too:
      out.update(zip(("tracker_coarse", "tracker_fine"), tracked, strict=False))
    return out, tracked

  def forward(
    self,
    frame: Tensor,
    lanes_points: Tensor | None = None,
    lanes_mask: Tensor | None = None,
    lanes_fresh: Tensor | None = None,
    lanes_template: Tensor | None = None,
    lanes_hidden: Tensor | None = None,
  ) -> dict[str, Tensor]:
    """Outputs by ONNX name (and detector_aux, a list, in training). Without lanes_points the tracker's are left out;
    without a state it starts with zeros; mask is then all ones, and so is fresh where there is no state. Shapes: see
    LanesHead.step."""
    out, maps = self.encode(frame)
    if self.lanes is not None and lanes_points is not None:
      b, n, _ = lanes_points.shape
      mask = lanes_points.new_ones(b, n) if lanes_mask is None else lanes_mask
      fresh = (
        (torch.ones_like(mask) if lanes_template is None else torch.zeros_like(mask))
        if lanes_fresh is None
        else lanes_fresh
      )
      template, hidden = self.lanes.zeros(b, n, lanes_points)
      template, hidden = (
        template if lanes_template is None else lanes_template,
        hidden if lanes_hidden is None else lanes_hidden,
      )
      names = ("lanes_points_out", "lanes_visible", "lanes_template_out", "lanes_hidden_out")
      out.update(zip(names, self.lanes.step(maps, lanes_points, mask, fresh, template, hidden), strict=True))
    return out

  def forward_clips(
    self, frame: Tensor, points: Tensor, mask: Tensor, fresh: Tensor | None = None, view: Tensor | None = None
  ) -> dict[str, Any]:
    """For training: every frame is encoded once, then the tracker runs over each clip. frame (clips * T,
    *spec.input.shape) uint8, clip-major; points (clips, T, N, 2), mask, fresh (clips, T, N), view (clips, 3, 3): see
    LanesHead.track. -> outputs of each frame, lanes_points_out (clips, T, N, 2), lanes_visible (clips, T, N),
    lanes_looks and lanes_votes."""
    encoded, maps = self.encode(frame)
    out: dict[str, Any] = {**encoded}
    if self.lanes is not None:
      names = ("lanes_points_out", "lanes_visible", "lanes_looks", "lanes_votes")
      out.update(zip(names, self.lanes.track(maps, points, mask, fresh, view), strict=True))
    return out

  def apart(self, frame: Tensor, every: bool = False) -> list[Tensor]:
    """What pruning follows: encode(), as far as it is convolutions, each of which is a module that is called. The
    outputs are the layers' that fixed() names. every: also the pyramid's maps, which may be what no head reads."""
    maps = self.neck(self.backbone(frame))
    out: list[Tensor] = []
    for name in self.tasks:
      head: Any = self.get_submodule(name)
      if name == "lanes":
        out += head.encode(self.backbone.normalize(frame), maps)
      else:
        out += head.apart(maps) if hasattr(head, "apart") else head(maps).values()
    return [*out, *maps.values()] if every else out

  def fixed(self) -> list[str]:
    """Layers whose outputs are what others count on: the graph's outputs, the tracker's state, the detector's tokens;
    of a head that does not say so all."""
    found = []
    for name in self.tasks:
      head = self.get_submodule(name)
      layers = getattr(head, "fixed", [n for n, m in head.named_modules() if isinstance(m, LAYERS)])
      found += [f"{name}.{layer}" for layer in layers]
    return found

  def inputs(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """One frame's inputs of the exported graph, all zeros: names, shapes, types, in order."""
    out = {"frame": torch.zeros(1, *self.spec.input.shape, dtype=torch.uint8, device=device)}
    if self.lanes is not None:
      like = torch.zeros(1, device=device)
      template, hidden = self.lanes.zeros(1, POINTS, like)
      out["lanes_points"], mask = like.new_zeros(1, POINTS, 2), like.new_zeros(1, POINTS)
      out.update(lanes_mask=mask, lanes_fresh=mask.clone(), lanes_template=template, lanes_hidden=hidden)
    return out


def build(what: str | StudentSpec, backbone: str | None = None, pretrained: bool | str = False) -> Student:
  """A student by what it is, or by its registered name, "unified-small", with the road's classes on the model frame; on
  its own backbone or another of timm's. pretrained: start from the hub's weights where they can be had
  (student.backbone.pretrained says whether), or from a file of them. Raises UserError on an unknown name, without timm,
  or over a task's parameter budget."""
  spec = spec_of(what) if isinstance(what, str) else what
  if spec.name in FAMILIES:  # these stand for a Student wherever one is asked for
    if FAMILIES[spec.name].package == "ultralytics":
      from openpilot.tools.fair.students.yolo import YoloStudent

      return cast(Any, YoloStudent(spec, pretrained))
    from openpilot.tools.fair.students.family import FamilyStudent

    return cast(Any, FamilyStudent(spec, pretrained))
  if spec.size not in SIZES:
    raise UserError(f"no size '{spec.size}' of students; there are {', '.join(SIZES)}")
  size = SIZES[spec.size]
  backbone = backbone or spec.backbone or size.backbone
  student = Student(spec, size, backbone, pretrained)
  if spec.widths:
    narrow(student, spec.widths)
    try:
      with torch.no_grad():
        student.eval()(**student.inputs())
    except RuntimeError as e:
      raise UserError(f"widths do not fit each other: {' '.join(str(e).split())[:120]}; prune again") from None
    student.train()
  budget = HEADS[spec.task].budget if spec.task in HEADS else None
  count = parameters(student)
  if budget is not None and count > budget:
    raise UserError(
      f"{spec.name} on {backbone} has {count / 1e6:.2f}M parameters, over its budget of {budget / 1e6:.0f}M; take one "
      f"of {', '.join(BACKBONES)}"
    )
  return student


def parameters(model: nn.Module) -> int:
  return sum(p.numel() for p in model.parameters())

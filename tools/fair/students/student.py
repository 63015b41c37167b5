"""Students: one backbone, one neck, and the heads of its tasks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openpilot.tools.fair.students.backbone import BACKBONES, Backbone
from openpilot.tools.fair.students.dense import DepthHead, ObjectsHead
from openpilot.tools.fair.students.detector import DetectorHead
from openpilot.tools.fair.students.lanes import POINTS, LanesHead
from openpilot.tools.fair.students.layers import Neck
from openpilot.tools.lib.errors import UserError


@dataclass(frozen=True)
class Size:
  backbone: str
  neck: int  # channels of the pyramid
  dense: int  # of the depth head
  branch: int  # of the tracker's stride-4 map
  features: int  # of the map that DINO's features are distilled into
  tower: int  # of the object head
  tokens: int  # of the detector
  template: int  # of the tracker's stride-8 map
  tracker: int  # of the tracker's memory


SIZES: dict[str, Size] = {
  "nano": Size(
    "mobilenetv4_conv_small_050",
    neck=56,
    dense=32,
    branch=16,
    features=64,
    tower=48,
    tokens=128,
    template=24,
    tracker=48,
  ),
  "small": Size(
    "mobilenetv4_conv_small", neck=96, dense=48, branch=16, features=128, tower=64, tokens=128, template=32, tracker=64
  ),
  "base": Size(
    "mobilenetv4_conv_medium",
    neck=144,
    dense=64,
    branch=32,
    features=192,
    tower=96,
    tokens=128,
    template=48,
    tracker=96,
  ),
}
TASKS: dict[str, tuple[str, ...]] = {
  "depth": ("depth",),
  "objects": ("objects",),
  "detector": ("detector",),
  "lanes": ("lanes",),
  "unified": ("depth", "objects", "detector", "lanes"),
}
BUDGETS = {
  "depth": 5_000_000,
  "objects": 10_000_000,
  "detector": 8_000_000,
  "lanes": 3_000_000,
}  # parameters, for every size
STUDENTS: dict[str, tuple[str, str]] = {f"{task}-{size}": (task, size) for task in TASKS for size in SIZES}


class Student(nn.Module):
  """(B, 6, 128, 256) uint8 model frame -> the outputs of its tasks, by ONNX name; see the heads for each one's meaning
  and shape."""

  def __init__(
    self, name: str, task: str, size: Size, backbone: str, pretrained: bool = False, deepest: int | None = None
  ):
    super().__init__()
    self.name, self.task, self.tasks, self.size = name, task, TASKS[task], size
    self.backbone = Backbone(backbone, pretrained, deepest)
    channels = self.backbone.channels
    self.neck = Neck(channels, size.neck)
    self.depth = DepthHead(size.neck, size.dense, size.features) if "depth" in self.tasks else None
    self.objects = ObjectsHead(size.neck, size.tower) if "objects" in self.tasks else None
    self.detector = DetectorHead(size.neck, size.tokens) if "detector" in self.tasks else None
    self.lanes = LanesHead(size.neck, size.branch, size.template, size.tracker) if "lanes" in self.tasks else None

  def encode(self, frame: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """frame (B, 6, 128, 256) uint8 -> all outputs but those of the tracker, and the tracker's maps (none where the
    student does not track)."""
    maps = self.neck(self.backbone(frame))
    out: dict[str, Tensor] = {}
    if self.depth is not None:
      out.update(self.depth(maps))
    if self.objects is not None:
      out.update(self.objects(maps))
    if self.detector is not None:
      out.update(self.detector(maps))
    return out, [] if self.lanes is None else self.lanes.encode(self.backbone.normalize(frame), maps)

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

  def forward_clips(self, frame: Tensor, points: Tensor, mask: Tensor, fresh: Tensor | None = None) -> dict[str, Any]:
    """For training: every frame is encoded once, then the tracker runs over each clip. frame (clips * T, 6, 128, 256)
    uint8, clip-major; points (clips, T, N, 2), mask, fresh (clips, T, N): see LanesHead.track. -> outputs of each
    frame, lanes_points_out (clips, T, N, 2), lanes_visible (clips, T, N) and lanes_looks."""
    encoded, maps = self.encode(frame)
    out: dict[str, Any] = {**encoded}
    if self.lanes is not None:
      out["lanes_points_out"], out["lanes_visible"], out["lanes_looks"] = self.lanes.track(maps, points, mask, fresh)
    return out

  def inputs(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """One frame's inputs of the exported graph, all zeros: names, shapes, types, in order."""
    out = {"frame": torch.zeros(1, 6, 128, 256, dtype=torch.uint8, device=device)}
    if self.lanes is not None:
      like = torch.zeros(1, device=device)
      template, hidden = self.lanes.zeros(1, POINTS, like)
      out["lanes_points"], mask = like.new_zeros(1, POINTS, 2), like.new_zeros(1, POINTS)
      out.update(lanes_mask=mask, lanes_fresh=mask.clone(), lanes_template=template, lanes_hidden=hidden)
    return out


def build(name: str, backbone: str | None = None, pretrained: bool = False) -> Student:
  """A student by its registered name, "unified-small", on its own backbone or another of timm's. pretrained: start from
  the hub's weights where they can be had (student.backbone.pretrained says whether). Raises UserError on an unknown
  name, without timm, or over a task's parameter budget."""
  if name not in STUDENTS:
    raise UserError(f"no student '{name}'; there are {', '.join(STUDENTS)}")
  task, size = STUDENTS[name]
  backbone = backbone or SIZES[size].backbone
  student = Student(name, task, SIZES[size], backbone, pretrained)
  count, budget = parameters(student), BUDGETS.get(task)
  if budget is not None and count > budget:
    raise UserError(
      f"{name} on {backbone} has {count / 1e6:.2f}M parameters, over its budget of {budget / 1e6:.0f}M; take one of "
      f"{', '.join(BACKBONES)}"
    )
  return student


def parameters(model: nn.Module) -> int:
  return sum(p.numel() for p in model.parameters())

"""All that decides a distillation run, beside the labels: as its config.json and its checkpoints keep it."""

from dataclasses import dataclass, field
from typing import Any

from openpilot.tools.fair.spec import ClassSet, InputSpec, StudentSpec, road_classes
from openpilot.tools.fair.students.families import FAMILIES
from openpilot.tools.fair.students.student import spec_of
from openpilot.tools.fair.students.sizes import SIZES
from openpilot.tools.fair.tasks import TASKS, task_name
from openpilot.tools.lib.errors import UserError


@dataclass
class Stage:
  """A part of the run. tasks: those that count, all where empty; freeze: parameters whose names start so stay as they
  are; lr: a factor."""

  steps: int
  tasks: list[str] = field(default_factory=list)
  freeze: list[str] = field(default_factory=list)
  lr: float = 1.0


@dataclass
class Config:
  student: str
  tasks: list[str]
  backbone: str | None = None
  pretrained: bool | str = False  # True: the hub's weights; or a file of them
  steps: int = 4000
  batch: int = 16  # frames
  clip: int = 1  # frames of a clip
  lr: float = 1.5e-3
  weight_decay: float = 0.02
  warmup: int = 200  # steps
  clip_norm: float = 5.0
  ema: float = 0.998
  seed: int = 0
  weights: dict[str, float] = field(default_factory=dict)  # of tasks; 1 where not named
  parts: dict[str, float] = field(default_factory=dict)  # of parts of a task's loss, "objects/mask"; 1 where not named
  learned_weights: bool = False  # by uncertainty
  hard: float = 0.2  # share of an epoch that goes to the clips of the highest loss
  sample: list[str] = field(default_factory=list)  # GLOB=W: how often segments are drawn, see sampling.py
  mirror: bool = True
  augment: bool = True
  light: float = 1.0  # strength of what augmentation does to light and sharpness
  night: float = 0.0  # share of clips by day that are made clips by night
  overfit: int = 0  # clips that are all there is to learn; 0: all clips
  eval_every: int = 500
  eval_clips: int = 64
  precision: str = "no"  # accelerate's mixed precision: no, bf16, fp16
  stages: list[Stage] = field(default_factory=list)
  input: InputSpec = field(default_factory=InputSpec)
  classes: ClassSet = field(default_factory=road_classes)
  zoom: tuple[float, float] | None = None  # by which pictures are scaled at random; None: as a road camera's
  pixels: list[tuple[str, float, float]] = field(default_factory=list)  # changes of pixels.py: name, share, strength
  turn: float = 0.0  # degrees by which pictures are turned at random, to both sides: those from above have no up
  ignore_classes: bool = False  # names of labels that `classes` does not know are left out
  network: str = ""  # of a family: its configuration, JSON
  per_height: bool = True  # depth is learned in heights of the camera, not in meters
  widths: dict[str, list[int]] = field(default_factory=dict)  # of a pruned student: see students/widths.py
  qat: str = ""  # the target whose 8 bits are learned with: see optimize/qat.py; "": none
  self_taught: str = ""  # the frozen float student that teaches it: "init", its own start, or another's name; "": none
  label_weight: float = 1.0  # of the labels' losses beside that; 0: labels are not read

  def stage(self, step: int) -> Stage:
    for s in self.stages:
      if step < s.steps:
        return s
      step -= s.steps
    return Stage(self.steps)

  @property
  def backbone_name(self) -> str:
    """Of timm: the one asked for, or the size's own; a family is its own."""
    if self.student in FAMILIES:
      return self.student
    return self.backbone or SIZES[self.spec.size].backbone

  @property
  def untaught(self) -> set[str]:
    """Outputs whose losses all have the weight 0."""
    return {
      out
      for t in self.tasks
      for out, parts in TASKS[t].taught_by.items()
      if all(self.parts.get(f"{t}/{p}", 1.0) == 0 for p in parts)
    }

  @property
  def labeled(self) -> list[str]:
    """Tasks that labels teach."""
    return self.tasks if self.label_weight else []

  @property
  def taught_by(self) -> str:
    """In words, where it is a float student."""
    if not self.self_taught:
      return ""
    who = "its own float copy" if self.self_taught == "init" else f"the student {self.self_taught}"
    return f"taught by {who}" + (f", and by labels with a weight of {self.label_weight:g}" if self.label_weight else "")

  @property
  def spec(self) -> StudentSpec:
    """What the student is. Raises UserError where there is none of its name."""
    more = {"backbone": self.backbone, "network": self.network, "widths": self.widths}
    return spec_of(self.student, input=self.input, classes=self.classes, **more)

  @classmethod
  def from_dict(cls, d: dict[str, Any]) -> "Config":
    """Raises UserError where it is of another version of this code."""
    try:
      d = {"per_height": False, **d, "tasks": [task_name(t) for t in d["tasks"]]}  # False: as once everything
      d["weights"] = {task_name(t): w for t, w in d.get("weights", {}).items()}
      stages = [Stage(**s) for s in d.get("stages", [])]
      d["stages"] = [Stage(s.steps, [task_name(t) for t in s.tasks], s.freeze, s.lr) for s in stages]
      d["input"] = InputSpec.from_dict(d.get("input"))
      d["classes"] = ClassSet.from_dict(d["classes"]) if d.get("classes") else road_classes()
      d["zoom"] = tuple(d["zoom"]) if d.get("zoom") else None
      d["pixels"] = [tuple(x) for x in d.get("pixels", [])]
      return cls(**d)
    except (TypeError, KeyError, AttributeError) as e:
      raise UserError(f"a checkpoint's configuration is of another version of this code: {e}; train again") from None

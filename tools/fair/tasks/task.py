"""What a task is: from a teacher's labels to a loss, and to what of a student is published. Nothing here imports torch
before a loss is asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openpilot.tools.fair.distillation.augment import Augmentation
from openpilot.tools.fair.spec import ClassSet, InputSpec, StudentSpec, road_classes
from openpilot.tools.fair.teacher import Label


@dataclass
class Said:
  """What one teacher says of a task in a clip of T frames.

  labels: one; of a teacher that gives a probability map for each class, all of them. values: T arrays or tables as
  stored, None where a frame is not labeled. index: of each of names_of(labels) its place among the classes that the
  student tells apart, -1: left out. height: of the camera above the road, m, where depth is learned per meter of it.
  known: (K,) bool, of which of the student's classes of boxes it says where they are, and so where they are not; None:
  of all."""

  labels: list[Label]
  values: list[Any]
  index: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
  classes: ClassSet = field(default_factory=road_classes)
  picture: InputSpec = field(default_factory=InputSpec)
  height: float | None = None
  known: np.ndarray | None = None

  def tells(self) -> np.ndarray:
    """known, (K,) bool."""
    return np.ones(len(self.classes.boxes), bool) if self.known is None else self.known

  @property
  def label(self) -> Label:
    return self.labels[0]


Targets = dict[str, Any]  # key of the batch -> array of T rows (of one, where Task.per_clip), or a list of T
Batch = dict[str, Any]
Outputs = dict[str, Any]
Sketch = Callable[[np.ndarray, int, Batch, dict[str, np.ndarray], StudentSpec], list[np.ndarray]]


@dataclass(frozen=True)
class Task:
  """A line of the registry.

  name; head: of the student that learns it. wanted: what to say where no label teaches it.
  teaches(label, classes): whether a label is of its kind, and of any class of the set. kind: 'maps' or 'boxes' where
  its labels' names are classes.
  targets(said, augmentation, random generator) -> its part of the batch. fills: what stands for each of its keys where
  a clip has no such label; None: a list of None. per_clip: one row a clip, not a frame. loss(distiller, the student's
  outputs, batch) -> {part: scalar}, weighted; {} where the batch has no labels of it. forward: how the student runs
  where labels of this task are in the batch, if not on its frames alone. aids(student, shape of the label) -> modules
  that are needed only while learning, by attribute of the distiller. outputs: how the names of the ONNX outputs begin
  that it makes worth publishing. taught_by: output -> the parts of the loss that alone teach it. decode: such an output
  -> 'head' of the runtime that decodes it, 'parameters', and 'classes': 'maps' or 'boxes' where it tells them apart.
  optional: not missed where there are no labels. clip: frames of a clip that it wants. mirror: whether its labels of a
  mirrored picture are the mirrored labels. sketch(rgb, i, batch, outputs, spec) -> pictures of frame i: what is said,
  what is true. metric: 'module:function' that gives the groups of metrics by which it is evaluated, with their
  drawings: see evaluation/groups.py."""

  name: str
  head: str
  wanted: str
  teaches: Callable[[Label, ClassSet], bool]
  targets: Callable[[Said, Augmentation, np.random.Generator], Targets]
  loss: Callable[[Any, Outputs, Batch], dict[str, Any]]
  fills: Mapping[str, float | None]
  outputs: tuple[str, ...]
  decode: Mapping[str, Mapping[str, Any]]
  taught_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
  kind: str = ""
  per_clip: bool = False
  forward: Callable[[Any, Batch], Outputs] | None = None
  aids: Callable[[Any, tuple[int, ...] | None], dict[str, Any]] | None = None
  optional: bool = False
  clip: int = 1
  mirror: bool = True
  sketch: Sketch | None = None
  metric: str = ""


def names_of(labels: list[Label], classes: ClassSet, kind: str) -> tuple[str, ...]:
  """The class names that labels of one teacher use, in their order: of a map for each class its name; boxes that name
  none are of the student's classes."""
  if not labels or not kind:
    return ()
  if labels[0].unit == "probability":
    return tuple(x.name for x in labels)
  return labels[0].classes or (classes.boxes if kind == "boxes" else ())


def speaks(names: tuple[str, ...], classes: ClassSet, kind: str) -> bool:
  """Whether any name is of a class that is learned, or is not known: then whoever learns from it is told."""
  mine = classes.maps if kind == "maps" else classes.boxes
  found = [(classes.find(n), n) for n in names]
  return any(c.name in mine if c is not None else not classes.is_ignored(n) for c, n in found)


def say(
  labels: list[Label], values: list[Any], task: Task, classes: ClassSet | None = None, picture: InputSpec | None = None
) -> Said:
  """Said, with the names of its classes resolved. Raises UserError where one is not known."""
  classes = classes or road_classes()
  names = names_of(labels, classes, task.kind)
  return Said(labels, values, classes.resolve(names, task.kind, labels[0].name, False), classes, picture or InputSpec())

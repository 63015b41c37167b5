"""What a student sees and tells apart, as data: its input, its classes, its tasks. Nothing here imports torch.

A run's config, its checkpoint, the bundle's manifest and the label store each keep these (`to_dict`), and whoever reads
one makes them again (`from_dict`). No other file lists classes or a picture's size.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.roles import ROLES, folded as plain
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import read_yaml

ROAD = Path(__file__).with_name("road.yaml")
STREET = ROAD.with_name("street.yaml")
KINDS = ("model_frame", "rgb")
VIEWS = ("medmodel", "sbigmodel")
UNKNOWN = ("unknown", "ignore", "void", "unlabeled", "unlabelled")  # names of ids whose pixels count nowhere


@dataclass(frozen=True)
class InputSpec:
  """The picture that a student is given.

  kind: 'model_frame', openpilot's packed YUV 4:2:0 of a view, uint8 (6, height / 2, width / 2); or 'rgb', uint8
  (3, height, width). height, width: of the picture, pixels. view: of a model frame, 'medmodel' or 'sbigmodel'.
  letterbox: a picture of other proportions is scaled to fit and padded with `pad`, right and below, never cut;
  without it, it is stretched.
  """

  kind: str = "model_frame"
  height: int = 256
  width: int = 512
  view: str = "medmodel"
  letterbox: bool = True
  pad: int = 114

  def __post_init__(self) -> None:
    if self.kind not in KINDS:
      raise UserError(f"input kind '{self.kind}'; there are {', '.join(KINDS)}")
    if any(type(side) is not int or side < 32 or side % 32 or side > 8192 for side in (self.height, self.width)):
      raise UserError(f"input of {self.width}x{self.height}; both sides are multiples of 32, from 32 to 8192")
    if self.view not in VIEWS:
      raise UserError(f"input of the view '{self.view}'; there are {', '.join(VIEWS)}")
    if type(self.pad) is not int or not 0 <= self.pad <= 255:
      raise UserError(f"input padded with {self.pad}; a gray from 0 to 255")

  @property
  def shape(self) -> tuple[int, int, int]:
    """Of one frame, without the batch."""
    if self.kind == "rgb":
      return 3, self.height, self.width
    return 6, self.height // 2, self.width // 2

  @property
  def map_shape(self) -> tuple[int, int]:
    """(height, width) of a student's dense outputs: a quarter of the picture's sides."""
    return self.height // 4, self.width // 4

  def fit(self, width: int, height: int) -> np.ndarray:
    """(3, 3) float64 from the pixels of a picture of this size to the input's, both counted at pixel centers."""
    sx, sy = self.width / width, self.height / height
    if self.letterbox:
      sx = sy = min(sx, sy)
    return np.array([[sx, 0, 0.5 * sx - 0.5], [0, sy, 0.5 * sy - 0.5], [0, 0, 1]])

  def covered(self, width: int, height: int) -> np.ndarray:
    """(height, width) bool of the input: pixels whose center a picture of this size covers; the rest is padding."""
    m, out = self.fit(width, height), np.zeros((self.height, self.width), bool)
    out[: shown_pixels(m[1, 1], height, self.height), : shown_pixels(m[0, 0], width, self.width)] = True
    return out

  def to_dict(self) -> dict[str, Any]:
    return asdict(self)

  @classmethod
  def from_dict(cls, said: Mapping[str, Any] | None) -> "InputSpec":
    """None, as in files from before there was a choice, is openpilot's medmodel frame. Raises UserError."""
    return cls(**checked(cls, said or {}, "input"))


def shown_pixels(scale: float, source: int, target: int) -> int:
  """How many of a side's `target` pixels have their center within a picture of `source` pixels; one at least, of a
  picture that is long and thin."""
  return max(1, min(target, int(np.ceil(scale * source - 0.5 - 1e-9))))


@dataclass(frozen=True)
class Class:
  """One class. role: what it is on a road, where it is anything: see ROLES. weight: of its pixels in a loss. aliases:
  other names of it, teachers' and data sets'. maps, boxes: whether it is told apart in class maps, and as objects."""

  name: str
  role: str | None = None
  weight: float = 1.0
  aliases: tuple[str, ...] = ()
  maps: bool = True
  boxes: bool = False

  def __post_init__(self) -> None:
    if self.role is not None and self.role not in ROLES:
      raise UserError(f"class '{self.name}' has the role '{self.role}'; there are {', '.join(ROLES)}")


@dataclass(frozen=True)
class ClassSet:
  """Classes in the order of the outputs' channels. ignored: names that teachers use and that are knowingly not learned;
  a name that is neither here nor in `classes` is an error (`resolve`)."""

  name: str
  classes: tuple[Class, ...]
  ignored: tuple[str, ...] = field(default=())

  def __post_init__(self) -> None:
    owner: dict[str, str] = {}
    for c in self.classes:
      for n in {plain(c.name), *map(plain, c.aliases)}:
        if n in owner:
          raise UserError(f"class set '{self.name}': '{n}' is a name of both {owner[n]} and {c.name}")
        owner[n] = c.name
    if twice := sorted(owner.keys() & {plain(n) for n in self.ignored}):
      raise UserError(f"class set '{self.name}': '{twice[0]}' is both learned and ignored")
    if not self.classes:
      raise UserError(f"class set '{self.name}' has no class")

  @property
  def maps(self) -> tuple[str, ...]:
    """Names of the classes of dense class maps, in order."""
    return tuple(c.name for c in self.classes if c.maps)

  @property
  def boxes(self) -> tuple[str, ...]:
    """Names of the classes of objects, in order."""
    return tuple(c.name for c in self.classes if c.boxes)

  @property
  def map_weights(self) -> tuple[float, ...]:
    return tuple(c.weight for c in self.classes if c.maps)

  def roles(self, names: Iterable[str]) -> dict[str, str]:
    """name -> role, of those that have one."""
    return {n: r for n in names if (c := self.find(n)) is not None and (r := c.role) is not None}

  def with_role(self, *roles: str) -> tuple[str, ...]:
    return tuple(c.name for c in self.classes if c.role in roles)

  def find(self, name: str) -> Class | None:
    """The class that goes by that name or alias; letters' case, '_', '-' and blanks do not matter."""
    return index(self).get(plain(name))

  def is_ignored(self, name: str) -> bool:
    return plain(name) in {plain(n) for n in (*self.ignored, *UNKNOWN)}

  def resolve(self, names: Sequence[str], kind: str, where: str, ignore: bool = False) -> np.ndarray:
    """Names, in a teacher's or data set's order -> (N,) int64 index into `maps` or `boxes`, -1: not learned.

    kind: 'maps' or 'boxes'. A class that has no channel of that kind, and one that is ignored on purpose, is -1.
    ignore: so is any other name. Raises UserError where a name is not known, with the mapping; `where` says whose."""
    mine = self.maps if kind == "maps" else self.boxes
    unknown = [n for n in names if self.find(n) is None and not self.is_ignored(n)]
    if unknown and not ignore:
      raise UserError(
        f"{where}: {', '.join(repr(n) for n in unknown[:5])}{' and more' if len(unknown) > 5 else ''} "
        f"{'is' if len(unknown) == 1 else 'are'} no class of '{self.name}'. It knows {self.mapping()}; "
        "add an alias or a class (--classes FILE.yaml), or leave them out with --ignore-classes"
      )
    found = [self.find(n) for n in names]
    return np.array([mine.index(c.name) if c is not None and c.name in mine else -1 for c in found], np.int64)

  def mapping(self) -> str:
    """'vehicle: car, truck; ...', and what is ignored."""
    known = "; ".join(f"{c.name}: {', '.join(c.aliases)}" if c.aliases else c.name for c in self.classes)
    return known + (f"; ignored: {', '.join(self.ignored)}" if self.ignored else "")

  def to_dict(self) -> dict[str, Any]:
    return {
      "name": self.name,
      "classes": [{**asdict(c), "aliases": list(c.aliases)} for c in self.classes],
      "ignored": list(self.ignored),
    }

  @classmethod
  def from_dict(cls, said: Mapping[str, Any]) -> "ClassSet":
    """Of to_dict(), or a YAML file's contents. Raises UserError."""
    read = checked(cls, said, "class set")
    try:
      classes = tuple(
        Class(**{**checked(Class, c, "class"), "aliases": tuple(c.get("aliases", ()))}) for c in read["classes"]
      )
      return cls(str(read["name"]), classes, tuple(read.get("ignored", ())))
    except (KeyError, TypeError, AttributeError) as e:
      raise UserError(f"a class set is {{name, classes: [{{name, role, aliases}}], ignored}}; {e} is wrong") from None


@dataclass(frozen=True)
class StudentSpec:
  """All that decides a student's graph: name of its head, 'unified' or a family; size ("": the name says it); backbone
  (None: the size's own); network: of a family its configuration, JSON; widths: of a pruned one, see
  students/widths.py."""

  task: str
  size: str
  backbone: str | None = None
  input: InputSpec = field(default_factory=InputSpec)
  classes: ClassSet = field(default_factory=lambda: read_classes(ROAD))
  network: str = ""
  widths: Mapping[str, Sequence[int]] = field(default_factory=dict)

  @property
  def name(self) -> str:
    return f"{self.task}-{self.size}" if self.size else self.task

  def to_dict(self) -> dict[str, Any]:
    own: dict[str, Any] = {"task": self.task, "size": self.size, "backbone": self.backbone}
    own |= {"network": self.network} if self.network else {}
    own |= {"widths": {k: list(v) for k, v in self.widths.items()}} if self.widths else {}
    return {**own, "input": self.input.to_dict(), "classes": self.classes.to_dict()}

  @classmethod
  def from_dict(cls, said: Mapping[str, Any]) -> "StudentSpec":
    read = checked(cls, said, "student")
    read["input"] = InputSpec.from_dict(read.get("input"))
    read["classes"] = ClassSet.from_dict(read["classes"]) if read.get("classes") else road_classes()
    return cls(**read)


def checked(cls: Any, said: Mapping[str, Any], what: str) -> dict[str, Any]:
  """What was read, where its keys are fields of `cls`. Raises UserError."""
  if not isinstance(said, Mapping):
    raise UserError(f"{what}: {str(said)[:60]} is no mapping")
  if wrong := [k for k in said if k not in cls.__dataclass_fields__]:
    raise UserError(f"{what}: '{wrong[0]}' is not known; there are {', '.join(cls.__dataclass_fields__)}")
  return dict(said)


@cache
def index(classes: ClassSet) -> dict[str, Class]:
  return {plain(n): c for c in classes.classes for n in (c.name, *c.aliases)}


def read_classes(path: str | Path) -> ClassSet:
  """A class set's YAML file: see road.yaml. Raises UserError."""
  try:
    return ClassSet.from_dict(read_yaml(path))
  except (OSError, ValueError) as e:
    raise UserError(f"cannot read the class set {path}: {' '.join(str(e).split())[:160]}") from None


@cache
def street_classes() -> ClassSet:
  """What streets are made of: street.yaml."""
  return read_classes(STREET)


@cache
def road_classes() -> ClassSet:
  """The road's classes, which students learn by default."""
  return read_classes(ROAD)

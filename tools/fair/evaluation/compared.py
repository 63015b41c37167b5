"""What is compared: the classes to which the names of students, truth and teachers are mapped, and the picture that all
of it is in. What is left out is counted, and said on the page."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from openpilot.selfdrive.modeld.fair.bundle import Bundle
from openpilot.selfdrive.modeld.fair.heads import HEADS, part_of
from openpilot.selfdrive.modeld.fair.roles import roles_of
from openpilot.tools.fair.spec import (
  UNKNOWN,
  Class,
  ClassSet,
  InputSpec,
  plain,
  read_classes,
  road_classes,
  street_classes,
)
from openpilot.tools.lib.errors import UserError

# of the classes that a head names
KINDS = {"segmentation": "maps", "objects": "boxes", "detector": "boxes", "oriented": "boxes"}


@dataclass
class Compared:
  """ignore: names that are no class of `classes` are left out; else they are an error."""

  classes: ClassSet = field(default_factory=road_classes)
  input: InputSpec = field(default_factory=InputSpec)
  ignore: bool = False
  left_out: dict[str, Counter[str]] = field(default_factory=dict)  # who says it -> 'name, unit' -> how many

  def names(self, kind: str) -> tuple[str, ...]:
    return self.classes.maps if kind == "maps" else self.classes.boxes

  @property
  def roles(self) -> dict[str, str]:
    return self.classes.roles([c.name for c in self.classes.classes])

  @property
  def map_shape(self) -> tuple[int, int]:
    return self.input.map_shape

  @property
  def view(self) -> tuple[int, int]:
    """(height, width) of the picture, whose pixels boxes and points are in."""
    return self.input.height, self.input.width

  def with_role(self, role: str, kind: str) -> tuple[int, ...]:
    """Indices among names(kind)."""
    return tuple(k for k, n in enumerate(self.names(kind)) if self.roles.get(n) == role)

  @property
  def background(self) -> int | None:
    """Among the classes of maps, what all is that nobody names; None where not exactly one has that role."""
    found = self.with_role("background", "maps")
    return found[0] if len(found) == 1 else None

  def resolve(self, names: Sequence[str], kind: str, where: str) -> np.ndarray:
    """Names as somebody spells them -> (N,) int64 index into names(kind), -1: not compared. Raises UserError on a name
    that is no class, unless those are left out."""
    return self.classes.resolve(names, kind, where, self.ignore)

  def unknown(self, names: Sequence[str]) -> bool:
    """Whether some of the names are no class and are not ignored on purpose: what they say is left out."""
    return any(self.classes.find(n) is None and not self.classes.is_ignored(n) for n in names)

  def leave_out(self, who: str, name: str, unit: str, count: int) -> None:
    """What stands for the unknown is not counted: it says nothing."""
    if count and plain(name) not in UNKNOWN:
      self.left_out.setdefault(who, Counter())[f"{name}, {unit}"] += count


def classes_of(bundle: Bundle) -> tuple[dict[str, list[str]], dict[str, str]]:
  """-> names of the classes of its maps and boxes, in order, and their roles."""
  names: dict[str, list[str]] = {"maps": [], "boxes": []}
  roles: dict[str, str] = {}
  for graph in bundle.graphs:
    for out in graph["outputs"]:
      kind = KINDS.get(out.get("head", ""))
      if kind is not None and part_of(out) == HEADS[out["head"]].classes:
        names[kind] += [n for n in out.get("classes", []) if n not in names[kind]]
        roles |= roles_of(out)
  return names, roles


def is_of(classes: ClassSet, names: Sequence[str]) -> bool:
  """Whether each name is one of the classes, no two the same, and none lost in a background."""
  known = set()
  for n in names:
    c = classes.find(n)
    if c is not None and (c.role != "background" or plain(c.name) == plain(n)):
      known.add(c.name)
  return len(known) == len(names)


def set_of(bundles: Sequence[Bundle]) -> ClassSet:
  """The road's or the street's class set where that is what the bundles tell apart, else one of their own names: with
  the road's aliases of those that are called as its classes are."""
  said = [classes_of(b) for b in bundles]
  for known in (road_classes(), street_classes()):
    if all(is_of(known, names[kind]) for names, _ in said for kind in names):
      return known
  return class_set(
    " and ".join(b.name for b in bundles),
    [n for names, _ in said for n in names["maps"]],
    [n for names, _ in said for n in names["boxes"]],
    {n: role for _, roles in said for n, role in roles.items()},
  )


def class_set(name: str, maps: Sequence[str], boxes: Sequence[str], roles: dict[str, str]) -> ClassSet:
  road, taken = road_classes(), {plain(n) for n in (*maps, *boxes)}
  out: dict[str, Class] = {}
  of_maps, of_boxes = ({plain(n) for n in x} for x in (maps, boxes))
  for n in (*maps, *boxes):
    known = road.find(n)
    same = known if known is not None and plain(known.name) == plain(n) else None
    aliases = tuple(a for a in same.aliases if plain(a) not in taken) if same is not None else ()
    role = roles.get(n, same.role if same is not None else None)
    out.setdefault(plain(n), Class(n, role, 1.0, aliases, plain(n) in of_maps, plain(n) in of_boxes))
  return ClassSet(name, tuple(out.values()), tuple(n for n in road.ignored if plain(n) not in taken))


def classes_said(text: str) -> ClassSet:
  """--classes: a class set's file, or names of classes, separated by commas. Raises UserError."""
  if Path(text).suffix in (".yaml", ".yml", ".json"):
    return read_classes(text)
  names = [n.strip() for n in text.split(",") if n.strip()]
  return class_set("--classes", names, names, {})


def input_of(bundles: Sequence[Bundle]) -> InputSpec:
  """Of all bundles. Raises UserError where they take different pictures."""
  found = [InputSpec.from_dict(b.manifest.get("input") or {"view": b.manifest["view"]}) for b in bundles]
  for b, one in zip(bundles, found, strict=True):
    if size(one) != size(found[0]):
      raise UserError(
        f"{bundles[0].path} takes {size(found[0])} and {b.path} {size(one)}; evaluate them one by one, each on its own "
        "store"
      )
  return found[0]


def size(x: InputSpec) -> str:
  return f"{'RGB pictures' if x.kind == 'rgb' else 'model frames'} of {x.width}x{x.height}"

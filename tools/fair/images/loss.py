"""The four parts of a student's loss: which there are, which can be, and their weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from openpilot.tools.fair.students.families import FAMILIES
from openpilot.tools.lib.errors import UserError

# part -> the parts of tasks' losses that it is
PARTS: dict[str, tuple[str, ...]] = {
  "detection": (
    "objects/heat",
    "objects/box",
    "objects/giou",
    "detector/class",
    "detector/box",
    "detector/giou",
    "detector/aux",
  ),
  "segmentation": ("objects/mask", "objects/dice"),
  "logit": ("logits/cells", "logits/queries"),
  "feature": ("features/features", "features/gram"),
}
# the same of a family of transformers, which learns by a loss of its own
FAMILY_PARTS = {**PARTS, "detection": ("detector/own",), "segmentation": ("detector/masks",)}
WEIGHTS = {"detection": 0.3, "segmentation": 0.3, "logit": 0.2, "feature": 0.2}  # the note's


def read_weights(items: Sequence[str]) -> dict[str, float]:
  """Raises UserError."""
  out = dict(WEIGHTS)
  for item in items:
    part, equals, text = item.partition("=")
    try:
      value = float(text)
    except ValueError:
      value = -1.0
    if part not in PARTS or not equals or not 0 <= value < 1e6:
      raise UserError(f"--weight {item}: write PART=NUMBER, of {', '.join(PARTS)}, as logit=0.4")
    out[part] = value
  return out


def parts_of(student: str) -> dict[str, tuple[str, ...]]:
  """As PARTS, of a student by its name."""
  return FAMILY_PARTS if student in FAMILIES else PARTS


def balance(args: Any, said: Any, student: str) -> tuple[dict[str, float], dict[str, str]]:
  """-> weights of the parts that are learned, which sum to 1, and why each of the others is not. Raises UserError where
  none is left."""
  off: dict[str, str] = {}
  weights = read_weights(args.weight)
  masks = said.info.get("has_masks")
  family = FAMILIES.get(student)
  makes_masks = student.startswith("objects-") if family is None else family.masks
  maps = "" if family is None or family.features else f"{student} shows no feature map"
  cannot = {
    "detection": "" if said.info.get("has_boxes") or masks else "nothing has boxes",
    "segmentation": "no masks in the data or from a teacher"
    if not masks
    else ""
    if makes_masks
    else f"{student} makes no masks",
    "logit": "" if said.scores else "no teacher that scores classes" if said.teachers else "no teacher",
    "feature": maps if said.features else "no teacher that gives a feature map" if said.teachers else "no teacher",
  }
  for part, why in cannot.items():
    if not getattr(args, part):
      off[part] = f"--no-{part}"
    elif why:
      off[part] = why
    elif not weights[part]:
      off[part] = f"--weight {part}=0"
  left = {k: weights[k] for k in PARTS if k not in off}
  if not left:
    raise UserError("no part of the loss is left: " + "; ".join(f"{k}: {v}" for k, v in off.items()))
  total = sum(left.values())
  return {k: v / total for k, v in left.items()}, off


def say_balance(weights: Mapping[str, float], off: Mapping[str, str]) -> list[str]:
  lines = ["loss         " + ", ".join(f"{k} {v:.2f}" for k, v in weights.items())]
  return [*lines, *(f"             without {k}: {why}" for k, why in off.items())]

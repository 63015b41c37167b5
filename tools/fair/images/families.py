"""Which student learns from which data, and students of others by name."""

import importlib.util
from collections.abc import Collection, Mapping
from typing import Any

from openpilot.tools.fair.students.families import AGPL, FAMILIES, OF_TRANSFORMERS
from openpilot.tools.fair.students.sizes import SIZES
from openpilot.tools.lib.errors import UserError

LETTERS = {"n": "nano", "s": "small", "b": "base", "m": "base", "l": "base", "x": "base"}  # as others name sizes


def heads_by_data(info: Mapping[str, Any]) -> str:
  """info: of inspect_dataset(). Masks want the head that makes them, which has boxes too. Raises UserError."""
  if info.get("has_masks"):
    return "objects"
  if info.get("has_boxes"):
    return "detector"
  raise UserError("the data has neither boxes nor masks; nothing can be learned from it")


def select_student_model(dataset_info: Mapping[str, Any], size: str = "s") -> str:
  """The student for a data set, as `--student` takes it: by what inspect_dataset() says of it. size: nano, small, base,
  or the letter that others have for it. Raises UserError."""
  size = LETTERS.get(size, size)
  if size not in SIZES:
    raise UserError(f"no size '{size}' of students; there are {', '.join(SIZES)}")
  return f"{heads_by_data(dataset_info)}-{size}"


def check_family(name: str, accepted: Collection[str] = ()) -> None:
  """Raises UserError where the student of that name is another project's that cannot be had, and says why."""
  plain = name.lower().replace("_", "-")
  family = FAMILIES.get(plain)
  if family is not None and family.license == AGPL:
    there = importlib.util.find_spec(family.package) is not None
    if not there or AGPL not in accepted:
      do = "" if there else f"it is not installed (`pip install {family.package}`), and "
      raise UserError(
        f"--student {name}: it is {family.package}', under {AGPL}, which binds whatever is made of it; {do}it is used "
        f"only with --accept-license {AGPL}. The students here are free of it: leave --student out, with --size "
        f"{family.like}"
      )
  if plain == "mobilesam":
    raise UserError(f"--student {name}: it needs a prompt, and no class that transformers has; leave --student out")
  if plain in FAMILIES and plain != name:
    raise UserError(f"--student {name}: it is written {plain}")
  if name in OF_TRANSFORMERS and importlib.util.find_spec("transformers") is None:
    raise UserError(f"--student {name}: it is transformers' class; `pip install -e .[train]`")

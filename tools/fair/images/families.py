"""Which student learns from which data, and students of others by name."""

import importlib.util
from collections.abc import Collection, Mapping
from typing import Any

from openpilot.tools.fair.students.families import FAMILIES
from openpilot.tools.fair.students.sizes import SIZES
from openpilot.tools.lib.errors import UserError

# the note's names of students under AGPL-3.0: name -> what is taken here in its place
AGPL = {
  **{f"yolov8{s}": size for s, size in zip("nsmlx", ("nano", "small", "base", "base", "base"), strict=True)},
  **{f"yolov8{s}-seg": size for s, size in zip("nsmlx", ("nano", "small", "base", "base", "base"), strict=True)},
  "fastsam-s": "small",
  "fastsam-x": "base",
}
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
  if plain in AGPL:
    there = importlib.util.find_spec("ultralytics") is not None
    why = f"'{name}' is ultralytics', under AGPL-3.0, which binds whatever is made of it"
    if not there or "AGPL-3.0" not in accepted:
      do = "" if there else "it is not installed, and "
      raise UserError(
        f"--student {name}: {why}; {do}it is used only with --accept-license AGPL-3.0. The students here are free of "
        f"it: leave --student out, with --size {AGPL[plain]}"
      )
    raise UserError(
      f"--student {name}: {why}; to train it is not built here: use its own program, or leave --student out"
    )
  if plain == "mobilesam":
    raise UserError(f"--student {name}: it needs a prompt, and no class that transformers has; leave --student out")
  if plain in FAMILIES and plain != name:
    raise UserError(f"--student {name}: it is written {plain}")
  if name in FAMILIES and importlib.util.find_spec("transformers") is None:
    raise UserError(f"--student {name}: it is transformers' class; `pip install -e .[train]`")

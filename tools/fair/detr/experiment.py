"""What `images train-detr` leaves: a folder that transformers loads, with detr.json beside, which makes it a teacher.

detr.json            classes, license, backbone, data, sizes, numbers of the best weights
config.json, model.safetensors, preprocessor_config.json   the detector, backbone and all, as transformers reads it
evaluation.html, evaluation.json   COCO's numbers, curves, classes, crowds, worst pictures
options.yaml         the command's; runs/: checkpoints and logs of the training; not needed afterwards
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openpilot.tools.fair.labels.sources.pictures import plain_name
from openpilot.tools.fair.teacher import LICENSES, Entry, hash_weights
from openpilot.tools.lib import files
from openpilot.tools.lib.errors import UserError, printable
from openpilot.tools.lib.files import LONG, MB, write_json

FILE, FORMAT = "detr.json", 1
PREFIX = "detr:"  # of a teacher's name, before its folder
MOST_CLASSES = 10_000


def is_detr(folder: Path) -> bool:
  return (folder / FILE).is_file()


def read_detr(folder: Path) -> dict[str, Any]:
  """detr.json. Raises UserError where there is none, or it is none."""
  if not is_detr(folder):
    raise UserError(f"no detector in {folder}: it has no {FILE}; make one: `tools/op.sh images train-detr`")
  try:
    read = files.read_json(folder / FILE, 16 * MB)
    if read["format"] != FORMAT:
      raise ValueError(f"format {printable(read['format'], 20)}, this version reads {FORMAT}")
    names = read["classes"]
    if not (isinstance(names, list) and 0 < len(names) <= MOST_CLASSES and all(isinstance(n, str) for n in names)):
      raise ValueError("its classes are none")
    if not isinstance(read["license"], str) or not isinstance(read["backbone"]["name"], str):
      raise ValueError("it names no license or backbone")
  except (ValueError, KeyError, TypeError) as e:
    raise UserError(f"{folder / FILE} is of no detector: {printable(e, LONG)}; copy the folder again") from None
  return read


def write_detr(folder: Path, said: Mapping[str, Any]) -> None:
  write_json(folder / FILE, {"format": FORMAT, **said})


def hash_of(folder: Path) -> str:
  """sha256 of what transformers loads: checkpoints of the training beside it do not count."""
  names = sorted(p for p in folder.glob("*.*") if p.suffix == ".safetensors" or p.name.endswith("config.json"))
  return hashlib.sha256("".join(f"{p.name} {hash_weights(p)}\n" for p in names).encode()).hexdigest()


def joint(backbone: str, data: Mapping[str, int]) -> str:
  """What restricts use of the result: licenses of the backbone and the data, "Apache-2.0" where none does."""
  restricts = sorted({x for x in (backbone, *data) if not LICENSES.get(x, False)})
  return printable(" and ".join(restricts), LONG) or "Apache-2.0"


def describe(folder: Path) -> tuple[str, Entry]:
  """A folder -> the teacher's name and entry, as a line of the registry."""
  read = read_detr(folder)
  if not (folder / "model.safetensors").is_file() and not any(folder.glob("model*.safetensors")):
    raise UserError(f"{folder} has no weights yet: the training has not ended; go on with --resume")
  says = f"boxes of {printable(', '.join(read['classes']), 60)}, learned from your pictures"
  name = f"detr-{plain_name(folder.resolve().name)}"
  return name, Entry("detr.teacher:DetrTeacher", str(folder.resolve()), read["license"], "", says)

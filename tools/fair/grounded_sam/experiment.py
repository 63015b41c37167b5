"""An experiment's folder: what train-teacher leaves and train-student, label and infer read.

metadata.json        classes, prompts, data, licenses, versions; of each teacher its base, sizes, and metrics before and
                     after
teacher_config.yaml  all options with what the data filled in; options.yaml: the command's own
teachers/grounding_dino_lora, sam_lora   adapters (`--full`: grounding_dino, sam: whole Hugging Face folders)
runs/, logs/         checkpoints and logs of the training; not needed afterwards
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openpilot.tools.fair.labels.sources.pictures import plain_name
from openpilot.tools.fair.teacher import Entry, find_weights, hash_weights
from openpilot.tools.lib import files
from openpilot.tools.lib.errors import UserError, printable
from openpilot.tools.lib.files import LONG, MB, atomic_path, read_yaml
from openpilot.tools.lib.options import FILE

METADATA, CONFIG = "metadata.json", "teacher_config.yaml"
FORMAT = 1
KEYS = {"grounding_dino": "Grounding DINO", "sam": "SAM"}
MOST_CLASSES = 10_000


@dataclass(frozen=True)
class Tuned:
  """One teacher. folder: its adapter, or the whole model; base: as it was named, without its folder."""

  key: str
  folder: Path
  whole: bool
  base: str
  base_hash: str
  size: int | None  # the shorter side of its pictures, where it is not its own
  base_path: str  # where it was, on the machine that tuned it: of options.yaml, which need not be there


@dataclass(frozen=True)
class Experiment:
  folder: Path
  classes: tuple[str, ...]
  class_mapping: dict[int, str]
  prompts: dict[str, str]
  negatives: tuple[str, ...]
  each: bool
  licenses: dict[str, int]
  teachers: dict[str, Tuned]
  metadata: dict[str, Any]

  @property
  def license(self) -> str:
    """What restricts use of what it says; "Apache-2.0", as the bases are, where nothing does."""
    from openpilot.tools.fair.grounded_sam.data import joint_license

    return joint_license(self.licenses) or "Apache-2.0"


def is_experiment(path: Path) -> bool:
  return path.is_dir() and (path / METADATA).is_file() and (path / CONFIG).is_file()


def read_experiment(folder: Path) -> Experiment:
  """Raises UserError where it is none, or is not whole."""
  if not folder.is_dir() or not (folder / METADATA).is_file():
    raise UserError(f"no experiment in {folder}: it has no {METADATA}; make one: `tools/op.sh images train-teacher`")
  try:
    read = files.read_json(folder / METADATA, 16 * MB)
    if read["format"] != FORMAT:
      raise ValueError(f"format {printable(read['format'], 20)}, this version reads {FORMAT}")
    classes = [(int(c["id"]), str(c["name"])) for c in read["classes"]]
    if not 0 < len(classes) <= MOST_CLASSES or len(dict(classes)) != len(classes):
      raise ValueError("its classes are none, or have one id twice")
    kept = load_config(folder / FILE) if (folder / FILE).is_file() else {}
    teachers = {}
    for key, said in read["teachers"].items():
      if key not in KEYS:
        raise ValueError(f"a teacher '{printable(key, 40)}', which is none of {', '.join(KEYS)}")
      whole = bool(said.get("full"))
      place = folder / "teachers" / (key if whole else f"{key}_lora")
      if not place.is_dir():
        raise UserError(f"{folder} is not whole: no {place.relative_to(folder)}; copy the folder again")
      base_path = str(kept.get(key) or "")
      size = None if said.get("size") is None else int(said["size"])
      teachers[key] = Tuned(key, place, whole, str(said["base"]), str(said["base_hash"]), size, base_path)
    prompts = {str(k): str(v) for k, v in read["prompts"].items()}
    negatives = tuple(map(str, read["negatives"]))
    licenses = {str(k): int(v) for k, v in read["licenses"].items()}
    each = read["each"] is True
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise UserError(f"{folder / METADATA} is of no experiment: {printable(e, LONG)}; copy the folder again") from None
  names = tuple(n for _, n in classes)
  return Experiment(folder, names, dict(classes), prompts, negatives, each, licenses, teachers, read)


def write_metadata(folder: Path, said: Mapping[str, Any]) -> None:
  with atomic_path(folder / METADATA) as tmp:
    tmp.write_text(json.dumps({"format": FORMAT, **said}, indent=1) + "\n")


def check_classes(experiment: Experiment, names: Mapping[int, str] | list[str], where: object) -> None:
  """Raises UserError where data has classes that the experiment has not."""
  own = set(experiment.classes)
  theirs = list(names.values()) if isinstance(names, Mapping) else list(names)
  if other := [n for n in theirs if n not in own]:
    raise UserError(
      f"{where} has classes that {experiment.folder} was not tuned for: {printable(', '.join(other[:5]), LONG)}; it "
      f"has {printable(', '.join(experiment.classes[:8]), LONG)}"
    )


def generate_config(
  default_config_path: str | Path, dataset_info: Mapping[str, Any], cli_overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """The values of a YAML file, filled with what inspect_dataset found: num_classes, class_names, class_mapping; then
  the overrides, of which a dotted one, "lora.r", is set within its part. Raises UserError."""
  config = load_config(default_config_path)
  mapping = dict(dataset_info["class_mapping"])
  config |= {"num_classes": len(mapping), "class_names": list(mapping.values()), "class_mapping": mapping}
  for key, value in (cli_overrides or {}).items():
    at, names = config, str(key).split(".")
    for name in names[:-1]:
      at[name] = dict(at[name]) if isinstance(at.get(name), dict) else {}
      at = at[name]
    at[names[-1]] = value
  return config


def load_config(path: str | Path) -> dict[str, Any]:
  """A YAML file of an experiment. Raises UserError."""
  try:
    read = read_yaml(path)
  except (OSError, ValueError) as e:
    raise UserError(f"{path}: {printable(e, LONG)}") from None
  if not isinstance(read, dict):
    raise UserError(f"{path} is no mapping of options to values")
  return read


def find_base(tuned: Tuned, given: str | Path | None = None) -> Path:
  """The base that an adapter was made for. Looked for: `given`, a file or folder, or a folder of bases; where it was;
  where all weights are. Raises UserError where it is not found, or another one is."""
  places = [Path(given), Path(given) / tuned.base] if given is not None else [Path(tuned.base_path or os.devnull)]
  found = next((p for p in places if (p.is_file() and p.suffix) or (p / "config.json").is_file()), None)
  if found is None:
    try:
      found = find_weights(tuned.base)
    except UserError as e:
      was = given or tuned.base_path
      raise UserError(
        f"{tuned.folder} needs its base {tuned.base}; {f'it is not at {was}, and ' if was else ''}{e}"
      ) from None
  if hash_weights(found) != tuned.base_hash:
    raise UserError(
      f"{found} is another {KEYS[tuned.key]} than {tuned.folder} was tuned on ({tuned.base}, hash "
      f"{tuned.base_hash[:12]}); name that one, or the folder that holds it"
    )
  return found


def describe(folder: Path) -> tuple[str, Entry]:
  """An experiment's folder -> the teacher's name and entry, as a line of the registry."""
  e = read_experiment(folder)
  says = " and ".join({"grounding_dino": "boxes", "sam": "masks"}[k] for k in e.teachers) + ", tuned on your pictures"
  name = f"grounded-sam-{plain_name(folder.resolve().name)}"
  return name, Entry("grounded_sam.teacher:GroundedSamTeacher", str(folder.resolve()), e.license, "", says)

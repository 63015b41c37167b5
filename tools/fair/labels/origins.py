"""Where the segments of a label store come from: what kind of recordings they are, whose, under which license, and in
which conditions. It is known of simulated drives and of imported pictures; of the rest LABELS/sources.yaml says it, a
list that people write:

- segments: "wet_motorway*"          # where several entries fit, what the last one says
  name: Wet motorway, example.org/roads
  license: BSD-3-Clause
  kind: real clips                   # one of KINDS, where it is not what the store takes it for
  conditions: [day, rain]
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from openpilot.tools.fair.labels.store import Group
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import read_yaml

FILE = "sources.yaml"
KINDS = ("simulated drives", "real clips", "stills", "pictures")
SAID = ("segments", "name", "license", "kind", "conditions")
CONDITIONS = ("time_of_day", "weather")  # as a simulated route's truth has them
UNSTATED = "not stated"


@dataclass(frozen=True)
class Origin:
  """name: for people, '' where it is not said: that of a drive is nobody's business."""

  kind: str
  name: str = ""
  license: str = UNSTATED
  conditions: tuple[str, ...] = ()


def read_origins(root: str | Path) -> list[dict[str, Any]]:
  """What people wrote into the store's sources.yaml, checked; [] where there is none. Raises UserError."""
  path = Path(root) / FILE
  if not path.exists():
    return []
  try:
    said = read_yaml(path)
    if not isinstance(said, list):
      raise TypeError("it is no list")
    for n, x in enumerate(said, 1):
      if not isinstance(x, dict) or not isinstance(x.get("segments"), str):
        raise TypeError(f"entry {n} does not say which segments")
      if strange := [k for k in x if k not in SAID]:
        raise TypeError(f"entry {n} says '{strange[0]}'; known are {', '.join(SAID)}")
      if bad := [k for k in ("name", "license", "kind") if not isinstance(x.get(k, ""), str)]:
        raise TypeError(f"entry {n}: {bad[0]} is no text")
      if x.get("kind", KINDS[0]) not in KINDS:
        raise TypeError(f"entry {n}: kind '{x['kind']}' is none of {', '.join(KINDS)}")
      conditions = x.get("conditions", [])
      if not isinstance(conditions, list) or not all(isinstance(c, str) and c for c in conditions):
        raise TypeError(f"entry {n}: conditions is no list of words")
  except (OSError, TypeError, ValueError) as e:
    what = " ".join(str(e).split())[:160]
    raise UserError(f"{path}: {what}; write a list of {{segments: 'GLOB', name, license, conditions}}") from None
  return said


def origin_of(segment: str, groups: Mapping[str, Group], said: list[dict[str, Any]]) -> Origin:
  """groups: those of the segment, by teacher, 'frames' too. said: of read_origins()."""
  frames = groups["frames"].meta if "frames" in groups else {}
  stream = frames.get("camera", {}).get("stream", "")
  sources = (g.meta.get("source") for g in groups.values())
  told = (x for x in sources if isinstance(x, dict) and any(k in x for k in CONDITIONS))  # others say other things
  truth: dict[str, Any] = next(told, {})
  conditions = tuple(str(truth[k]) for k in CONDITIONS if truth.get(k))
  if "simulator" in groups:
    found = Origin(KINDS[0], "this project's simulator", "MIT", conditions)
  elif stream in ("images", "video"):
    license = frames["teacher"]["license"]
    found = Origin(KINDS[3] if stream == "images" else KINDS[1], license=license if license != "unstated" else UNSTATED)
  else:
    found = Origin(KINDS[2] if stream == "still" else KINDS[1], conditions=conditions)
  for x in said:
    if fnmatchcase(segment, x["segments"]):
      texts = {k: x[k] for k in ("name", "license", "kind") if x.get(k)}
      found = replace(found, **texts, conditions=tuple(x.get("conditions", found.conditions)))
  return found

"""Rules by which labels are made, that were mended once: each has a version, which is part of the key of the labels
that it decides. Labels of an older version are stale: `op labels` lists them, distill and evaluate refuse them without
--stale-labels, and the same `op label` command makes them anew.

To mend a rule, raise its version here, or add it with version 2: what has no version of a rule was made by version 1.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from openpilot.tools.fair.labels.views import shrink_of, view_intrinsics
from openpilot.tools.lib.errors import UserError

NO_PICTURE = ("frames", "openpilot", "simulator")  # what stands under these names is made of no RGB view
LOG_READERS = (
  "openpilot",
  "raft-tracker",
  "cotracker",
)  # teachers, by the beginning of their names, that read the log's driving model


@dataclass(frozen=True)
class Rule:
  version: int
  applies: Callable[[dict[str, Any]], bool]  # to a group.json
  mended: str  # what the newest version does, for people


SINGLE = ("images", "video")  # streams of single pictures, whose camera is not known


def stream_of(meta: dict[str, Any]) -> str:
  return str(meta.get("camera", {}).get("stream", ""))


def is_shrunk(meta: dict[str, Any]) -> bool:
  """Labels of RGB views of a camera that sees finer than the view."""
  view, camera = meta["view"], meta["camera"]
  if meta["teacher"]["name"] in NO_PICTURE or stream_of(meta) in SINGLE:
    return False
  return shrink_of(camera["intrinsics"][0][0], view_intrinsics(view["name"], view["width"], view["height"])[0, 0]) > 1


def is_uncalibrated(meta: dict[str, Any]) -> bool:
  """Labels of a segment whose log had no mounting, or none that was taken."""
  return not meta["camera"].get("calibrated", True) and stream_of(meta) not in (*SINGLE, "still")


RULES: dict[str, Rule] = {
  "smaller": Rule(2, is_shrunk, "views of 1928x1208 cameras lie where openpilot's do, .35 and .48 pixels from before"),
  "pictures": Rule(
    2, lambda m: stream_of(m) == "images", "imported pictures are turned as their EXIF says, and of 16 bits scaled"
  ),
  # what its readers take of the log is where it was in every version
  "log": Rule(1, lambda m: str(m["teacher"]["name"]).startswith(LOG_READERS), ""),
  "calibration": Rule(
    2,
    is_uncalibrated,
    "a mounting is taken in every calibration state and from logs of openpilot 0.8, as modeld takes it",
  ),
  "qcamera": Rule(
    2,
    lambda m: stream_of(m) == "qcamera",
    "the qcamera's center is where scaling puts it, half a pixel of the road camera's from before",
  ),
}


def rules_of(meta: dict[str, Any]) -> dict[str, int]:
  """Versions above 1 of the rules by which these labels are made now: what goes into their group.json as 'rules', and
  so into the key."""
  return {name: rule.version for name, rule in RULES.items() if rule.version > 1 and rule.applies(meta)}


def stale_rules(meta: dict[str, Any]) -> list[str]:
  """Of a group.json: the rules that have been mended since."""
  made, now = meta.get("rules", {}), rules_of(meta)
  return [name for name in now if made.get(name, 1) != now[name]]


def check_stale(metas: Iterable[tuple[str, dict[str, Any]]], allowed: bool) -> None:
  """metas: (path, group.json) of the labels that are used. Raises UserError where some are stale and that is not
  allowed, else says so once."""
  found = [(path, stale) for path, meta in metas if (stale := stale_rules(meta))]
  if not found:
    return
  names = dict.fromkeys(name for _, stale in found for name in stale)
  since = "; ".join(RULES[n].mended for n in names)
  what = f"{len(found)} groups of labels are stale, the first is {found[0][0]}: since then {since}"
  if not allowed:
    raise UserError(
      f"{what}; run their `tools/op.sh label` (or import-images) command again with --prune, or use them as they are "
      "with --stale-labels"
    )
  print(f"warning: {what}", file=sys.stderr)

#!/usr/bin/env python3
"""Depth from the road plane: `tools/op.sh plane LABELS`. Where a class map of the store says road or marking, the road
lies as far off as the calibrated view and the height of the camera say; what may move by itself stands where its box
meets the road. A teacher `road-plane` of depth joins the store, so that pictures of any camera teach depth: in heights
of the camera, which is what a student learns, nothing but the horizon has to be known."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.selfdrive.modeld.fair.frames import VIEW_H
from openpilot.selfdrive.modeld.fair.heads.depth import map_centers
from openpilot.selfdrive.modeld.fair.heads.ground import DEFAULT_HEIGHT
from openpilot.tools.fair.globs import numbers_of
from openpilot.tools.fair.labels.agree import Boxes, read_boxes
from openpilot.tools.fair.labels.dataset import Reader
from openpilot.tools.fair.labels.derived import derived_group, to_derive
from openpilot.tools.fair.labels.store import Group, LabelStore
from openpilot.tools.fair.maps import classes_to_map
from openpilot.tools.fair.spec import STREET, ClassSet, read_classes
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.errors import UserError, cli, warn
from openpilot.tools.lib.options import option, parse
from openpilot.tools.lib.said import command
from openpilot.tools.sim.truth import MAP_H, MAP_W

BELOW = 30.0  # view pixels under the horizon, at least: three pixels of pitch are a tenth of the distance there
MOST = 15  # degrees of tilt
CUT = 2.0  # view pixels: a box that ends nearer to the view's lower edge is cut off there


def plane_depth(y: np.ndarray | float, height: float, tilt: float = 0.0) -> np.ndarray:
  """Rows of the view, pixels -> meters along the optical axis to the road plane, nan where that is not sure. tilt: by
  how much the axis looks down on the road, radians; 0 as of a calibration that is right."""
  f, cy = medmodel_intrinsics[1, 1:]
  below = (np.asarray(y, np.float64) - cy) * np.cos(tilt) + f * np.sin(tilt)
  return np.where(below >= BELOW, height * f / np.maximum(below, BELOW), np.nan)


def plane_map(classes: ClassSet, class_map: np.ndarray, boxes: Boxes, height: float, tilt: float = 0.0) -> np.ndarray:
  """class_map: (MAP_H, MAP_W) ids of classes.maps at the map's pixels; boxes: view pixels, cls of classes.boxes;
  height: of the camera above the road, m; tilt: see plane_depth() -> (MAP_H, MAP_W) float16 meters along the optical
  axis, nan: not known."""
  x, y = map_centers(MAP_H, MAP_W)
  out = np.full((MAP_H, MAP_W), np.nan)
  ground = [k for k, c in enumerate(classes.maps) if c in (*classes.with_role("ground"), *classes.with_role("marking"))]
  on = np.isin(class_map, ground)
  out[on] = np.broadcast_to(plane_depth(y, height, tilt)[:, None], out.shape)[on]
  standing = boxes.xyxy[:, 3]
  for i in np.argsort(standing, kind="stable"):  # the nearer one hides the other
    x0, y0, x1, y1 = boxes.xyxy[i]
    name = classes.boxes[boxes.cls[i]]
    inside = ((x >= x0) & (x <= x1))[None] & ((y >= y0) & (y <= y1))[:, None]
    if name in classes.maps:
      inside &= class_map == classes.maps.index(name)
    out[inside] = np.nan if y1 > VIEW_H - CUT else plane_depth(y1, height, tilt)
  return out.astype(np.float16)


def write_segment(
  store: LabelStore, frames: Group, source: Group, classes: ClassSet, name: str, tilt: float = 0.0
) -> Group:
  """Depth of all frames that `source` has labeled whole; nothing is done twice. tilt: radians."""
  dense = next((x for x in source.labels if x.kind == "dense" and x.unit == "class"), None)
  if dense is None or not any(x.kind == "boxes" for x in source.labels):
    raise UserError(f"{source.path}: a class map and boxes are wanted, as `tools/op.sh agree` makes them")
  height = frames.camera_height or DEFAULT_HEIGHT
  label = Label("depth", "dense", "float16", (MAP_H, MAP_W), "m")
  settings = {"of": source.teacher, "height": height, "classes": classes.to_dict(), "rule": [BELOW, CUT]}
  more = {"tilt": tilt} if tilt else None
  group = derived_group(store, frames, name, [source], [label], settings, "the road plane under {}", more)
  lut = np.full(256, -1, np.int64)
  lut[: len(dense.classes)] = classes.resolve(dense.classes, "maps", f"{source.teacher}'s classes")
  reader = Reader()
  for k, chunk in to_derive(group, [source]):
    maps = []
    for row in (rows[source.teacher] for rows in chunk):
      cls: Any = classes_to_map(source.row(dense.name, row), len(dense.classes), (MAP_H, MAP_W))
      maps.append(plane_map(classes, lut[cls], read_boxes(reader, source, row, classes), height, tilt))
    group.write_chunk(k, {"depth": np.stack(maps)})
  return group


@dataclass(frozen=True)
class Options:
  labels: Path = option(positional=True, help="the label store, which the depth goes into too")
  of: str = option("agreed", metavar="TEACHER", help="whose class maps and boxes say where the road is")
  classes: Path = option(STREET, metavar="FILE.yaml", help="class set that their names are of")
  name: str = option("road-plane", help="of the teacher that this makes")
  tilt: tuple[str, ...] = option(
    (),
    metavar="SEGMENTS=DEGREES",
    help="segments that were labeled with a horizon so far below the real one, as 'low*=5'; the last that fits counts",
  )


def tilts_of(items: Sequence[str], names: Sequence[str]) -> dict[str, float]:
  """-> of each segment that one of `items` fits radians. Raises UserError."""
  out: dict[str, float] = {}
  for glob, degrees in numbers_of("--tilt", items, "SEGMENTS=DEGREES, as 'low*=5'", -MOST, MOST):
    if not (fits := [n for n in names if fnmatchcase(n, glob)]):
      raise UserError(f"--tilt {glob}={degrees:g} fits none of the store's {len(names)} segments")
    out |= dict.fromkeys(fits, math.radians(degrees))
  return out


def main() -> None:
  args = parse(Options, __doc__, "plane")
  classes, store, groups, guessed = read_classes(args.classes), LabelStore(args.labels, writes=True), [], 0
  segments = store.by_segment({"frames", args.of})
  tilts = tilts_of(args.tilt, list(segments))
  for segment, there in tqdm(segments.items(), desc=args.name, unit="segment"):
    if args.of not in there or "frames" not in there:
      continue
    guessed += there["frames"].camera_height is None
    groups.append(write_segment(store, there["frames"], there[args.of], classes, args.name, tilts.get(segment, 0.0)))
  if not groups:
    again = command("tools/op.sh", "agree", store.place)
    raise UserError(f"{store.place} has no segment that {args.of} has labeled; run `{again}`")
  if guessed:
    warn(
      f"of {guessed} of {len(groups)} segments the camera's height is not known: {DEFAULT_HEIGHT} m is taken, so that "
      "their depth is right in heights of the camera alone"
    )
  print(f"{args.name}: {len(groups)} segments, {sum(g.row_count for g in groups)} frames")


if __name__ == "__main__":
  raise SystemExit(cli(main)())

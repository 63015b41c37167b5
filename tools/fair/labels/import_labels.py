#!/usr/bin/env python3
"""Puts labeled pictures into a label store: COCO JSON, YOLO and DOTA folders, pictures with class maps.

Pictures are shown whole, letterboxed, turned by their EXIF; 16 bits are scaled. Classes keep the data's own names. What
cannot be read is left out by name. The same --name again replaces what was imported before."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openpilot.tools.fair.labels.carried import CarriedLabels
from openpilot.tools.fair.labels.label_options import SIZE, picture_spec
from openpilot.tools.fair.labels.labeling import FrameTeacher, run_teacher
from openpilot.tools.fair.labels.rules import NO_PICTURE
from openpilot.tools.fair.labels.sources import SourceOptions, open_sources
from openpilot.tools.fair.labels.sources.class_maps import read_palette
from openpilot.tools.fair.labels.sources.pictures import Pictures, plain_name
from openpilot.tools.fair.labels.store import Group, LabelStore
from openpilot.tools.fair.spec import KINDS, InputSpec
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.options import option, parse

LISTED = 12  # classes


@dataclass(frozen=True)
class Options:
  data: tuple[str, ...] = option(
    positional=True, help="a COCO JSON, a YOLO or DOTA folder, or a folder of pictures with --annotations"
  )
  name: str = option(help="of the data set; evaluate's --truth takes it")
  output: Path = option(aliases=("--out",), help="the label store")
  source: str = option("", help="coco, yolo, dota or class_maps, where it is not recognized")
  images: Path | None = option(None, help="the pictures' folder, where annotations lie elsewhere")
  annotations: Path | None = option(None, help="the class maps' folder")
  classes: str = option("", help="names of the class maps' ids 0, 1, ..., comma-separated; 'unknown' is ignored")
  palette: str = option(
    "", metavar="RRGGBB=NAME,...", help="of class maps in colors; or a file of lines 'R G B NAME', as CamVid has it"
  )
  suffix: str = option("", help="of class maps' file names, as _L; common ones are found")
  license: str = option("", aliases=("--licence",), help="of the data, where the data does not name it")
  input: str = option("rgb", choices=KINDS, help="as students see the pictures; model_frame: as those of a road camera")
  size: str = option(SIZE, metavar="WxH", help="of an rgb input")
  oriented: bool = option(False, help="oriented boxes: of polygons and masks the rectangles of least area")
  batch_size: int = option(8, aliases=("--batch",), help="pictures in a batch")


def check_name(name: str) -> str:
  """Raises UserError."""
  if plain_name(name) != name or name in NO_PICTURE:
    raise UserError(
      f"--name {name}: letters, digits, '_', '-' and '.', not at its beginning, and not {', '.join(NO_PICTURE)}; it "
      "names folders"
    )
  return name


def import_parts(
  store: LabelStore, parts: Sequence[Pictures], name: str, spec: InputSpec, batch: int = 8
) -> list[tuple[Group, Group]]:
  """-> of each part the groups of its frames and of its labels. What is there of other pictures, or was imported in
  another way, is removed, which is said."""
  out = []
  for part in parts:
    (frames,) = run_teacher(FrameTeacher(spec), [part], store, batch=batch, spec=spec)
    (said,) = run_teacher(CarriedLabels(name, part, spec), [part], store, batch=batch, spec=spec)
    former = {g.path: g for g in store.stale([frames, said])}
    former |= {
      g.path: g for g in store.groups(segment=part.name) if g.meta["camera"]["video"] != frames.meta["camera"]["video"]
    }
    for g in former.values():
      store.remove(g)
      print(f"replaced: {g.path} (of '{part.name}' as it was before, from other files or in another way)")
    out.append((frames, said))
  return out


def describe(frames: Group, said: Group) -> str:
  """One line about what was imported."""
  parts = [f"{frames.segment}: {frames.row_count} pictures"]
  for label in said.labels:
    if label.kind == "dense":
      parts.append(f"class maps of {', '.join(label.classes)}")
      continue
    cls = said.table(label.name)["cls"].to_numpy()
    counts = np.bincount(cls, minlength=len(label.classes))
    order = np.argsort(-counts, kind="stable")[:LISTED]
    listed = ", ".join(f"{label.classes[i]} {counts[i]}" for i in order if counts[i])
    more = np.count_nonzero(counts) - LISTED
    kind = "boxes with masks" if label.shape else "boxes"
    parts.append(f"{len(cls)} {kind} ({listed}{f', {more} more' if more > 0 else ''})")
  return f"{'; '.join(parts)}; {(frames.size + said.size) / 1e6:.1f} MB, license {said.meta['teacher']['license']}"


def main() -> None:
  args = parse(Options, __doc__, "import")
  spec, name = picture_spec(args.input, args.size), check_name(args.name)
  told = SourceOptions(
    images=args.images,
    annotations=args.annotations,
    classes=tuple(c.strip() for c in args.classes.split(",") if c.strip()),
    palette=tuple(read_palette(args.palette)) if args.palette else (),
    suffix=args.suffix,
    name=name,
    license=args.license,
  )
  parts = open_sources(list(args.data), told, args.source)
  for part in parts:
    if not isinstance(part, Pictures) or (part.carries.boxes, part.carries.maps) == (None, None):
      raise UserError(
        f"{part.segment.dir} carries no labels; give a COCO JSON, a YOLO folder, or --annotations with class maps"
      )
    if part.license == "unstated":
      raise UserError(f"{part.segment.dir} does not say under which license it is; say it with --license")
  pictures = [p for p in parts if isinstance(p, Pictures)]
  if args.oriented:
    from openpilot.tools.fair.images.oriented import orient

    pictures = orient(pictures)
  store = LabelStore(args.output, create=True)
  groups = import_parts(store, pictures, name, spec, args.batch_size)
  for frames, said in groups:
    print(f"{args.output}: {describe(frames, said)}")


if __name__ == "__main__":
  raise SystemExit(cli(main)())

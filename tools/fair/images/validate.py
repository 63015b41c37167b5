#!/usr/bin/env python3
"""Checks labeled pictures, a COCO JSON, a YOLO or DOTA folder, before anything learns from them: what there is, what is
wrong with it, which teachers and which student fit, and what to type next.

--fix writes a mended copy of the annotations, --split train, val and test parts of the mended ones, as COCO JSON;
pictures are never changed."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.tools.fair.images.check import Check, Checked
from openpilot.tools.fair.images.dataset import Dataset, open_dataset
from openpilot.tools.fair.images.problems import KEPT, KINDS
from openpilot.tools.fair.images.report import lines_of, next_commands, report, settle_licenses
from openpilot.tools.fair.images.split import Part, has_classes, read_split, split, table_lines
from openpilot.tools.fair.images.twins import groups_of
from openpilot.tools.lib.errors import UserError, cli, warn
from openpilot.tools.lib.files import atomic_path, write_json
from openpilot.tools.lib.options import option, parse


@dataclass(frozen=True)
class Options:
  data: Path = option(help="a COCO JSON, a YOLO folder or its data.yaml, a DOTA folder")
  images: Path | None = option(None, help="the pictures' folder, where it is not beside")
  check_format: bool = option(
    False, help="end with exit code 2 where something is wrong that a mended copy would change"
  )
  fix: bool = option(
    False, help="write a mended copy, NAME_fixed.json; file names that lead out of the folder are left out"
  )
  split: str = option("", metavar="NAME:SHARE,...", help="write parts, as train:0.7,val:0.15,test:0.15")
  stratify: bool = option(False, help="give each class in its share to each part")
  videos: bool = option(True, help="pictures whose names differ by a running number alone may come into several parts")
  seed: int = option(42, aliases=("--random-seed",), help="of the split")
  license: str = option("", aliases=("--licence",), help="of the pictures for which the data names none")
  output: Path | None = option(None, aliases=("--output-dir", "--out"), help="where files go; default: beside the data")
  show: Path | None = option(None, metavar="FILE.png", help="draw some pictures with their labels")
  json: Path | None = option(None, metavar="FILE", help="write the report as JSON")


def coco_of(found: Checked, pictures: np.ndarray | None = None) -> dict[str, Any]:
  """A COCO JSON of the pictures chosen, (N,) bool, or of all."""
  chosen = [p for i, p in enumerate(found.pictures) if pictures is None or pictures[i]]
  ids = {p.entry["id"] for p in chosen}
  return {
    "info": found.info,
    "licenses": found.licenses,
    "images": [p.entry for p in chosen],
    "annotations": [a for a in found.annotations if a["image_id"] in ids],
    "categories": found.categories,
  }


def write_all(files: Mapping[Path, dict[str, Any]], data: Dataset) -> None:
  """All or, where one cannot be written, none that is half-written. Raises UserError where one would replace the
  data."""
  for path in files:
    if path.resolve() == data.path.resolve():
      raise UserError(f"{path} is the data itself; name another folder with --output")
  with contextlib.ExitStack() as stack:
    for path, coco in files.items():
      stack.enter_context(atomic_path(path)).write_text(json.dumps(coco))


def split_all(found: Checked, parts: tuple[Part, ...], args: Options) -> np.ndarray:
  """-> (N,) index of each picture's part; prints the table."""
  if len(found.pictures) < len(parts):
    raise UserError(f"--split: {len(found.pictures)} pictures are too few for {len(parts)} parts")
  names = [p.name for p in found.pictures]
  index = {c["id"]: k for k, c in enumerate(found.categories)}
  by_picture = found.by_picture()
  classes = has_classes(
    [{index[a["category_id"]] for a in by_picture[p.entry["id"]]} for p in found.pictures], len(index)
  )
  largest = max(p.share for p in parts) * len(names)
  groups, said = groups_of(names, [p.bits for p in found.pictures], found.alike, max(1, int(largest)), args.videos)
  part = split(groups, names, classes, parts, args.seed, args.stratify)
  used = np.flatnonzero(classes.any(0))
  title = [found.categories[k]["name"] for k in used]
  rows, more = table_lines(parts, part, classes[:, used], title)
  together = sum(len(g) > 1 for g in groups)
  print(f"split        {len(names)} pictures; {together} groups of several stay together")
  print("\n".join(f"  {r}" for r in rows))
  for line in [*said, *more]:
    warn(f"--split: {line}")
  return part


def run(args: Options) -> dict[str, Any]:
  parts = read_split(args.split) if args.split else ()
  data = open_dataset(args.data, args.images)
  found = Check(data, args.fix).run()
  licenses = settle_licenses(found, args.license.strip())
  r = report(data, found, licenses)
  print("\n".join(lines_of(r, data.problems.lines(args.fix or bool(parts)))))
  beside = data.path if data.path.is_dir() else data.path.parent
  folder = args.output if args.output is not None else beside
  files: dict[Path, dict[str, Any]] = {}
  if args.fix:
    files[folder / f"{data.path.stem}_fixed.json"] = coco_of(found)
  written = {"": next(iter(files), args.data)}
  if parts:
    part = split_all(found, parts, args)
    written = {p.name: folder / f"{p.name}.json" for p in parts if (part == parts.index(p)).any()}
    files |= {written[p.name]: coco_of(found, part == k) for k, p in enumerate(parts) if p.name in written}
    r["split"] = {p.name: [q.name for i, q in enumerate(found.pictures) if part[i] == k] for k, p in enumerate(parts)}
  write_all(files, data)
  for path, coco in files.items():
    print(f"wrote        {path}: {len(coco['images'])} pictures, {len(coco['annotations'])} annotations")
  if args.show is not None:
    from openpilot.tools.fair.images.sheet import write_sheet

    print(f"wrote        {args.show}: {write_sheet(found, args.show)} pictures with their labels")
  r["next"] = next_commands(r, written)
  if args.json is not None:
    write_json(args.json, r)
  print("next")
  print("\n".join(f"  {line}" for line in r["next"]))
  return r


def main() -> None:
  args = parse(Options, __doc__, "images validate")
  problems = run(args)["problems"]
  wrong = [k for k in problems if not KINDS[k][1].startswith(KEPT)]
  if args.check_format and wrong:
    raise UserError(
      f"{args.data} has {len(wrong)} kinds of problems, the first: {problems[wrong[0]]['what']}; see above"
    )


if __name__ == "__main__":
  raise SystemExit(cli(main)())

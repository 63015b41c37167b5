#!/usr/bin/env python3
"""Puts a folder of pictures with class maps (CamVid's layout: one PNG of class ids for each picture, of the same name)
into a label store.

Pictures are turned as their EXIF says, scaled to the view's width and cut to its height, which is said; their camera is
not known, so that a student learns classes from them, not distances. What cannot be read is left out by name."""

import argparse
import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.selfdrive.modeld.fair.frames import FRAME_SHAPE, VIEW_H, VIEW_W, pack_rgb
from openpilot.tools.fair.labels.rules import NO_PICTURE, rules_of
from openpilot.tools.fair.labels.store import CHUNK, VERSION, Group, LabelStore
from openpilot.tools.fair.maps import classes_to_map
from openpilot.tools.fair.students.classes import NAMES, SEGMENTATION
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.encode_index import EncodeEntry
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.flags import add_flag
from openpilot.tools.sim.truth import IGNORE, MAP_H, MAP_W

SUFFIXES = (".png", ".jpg", ".jpeg")
FRAME_NS = 50_000_000


MODES_16 = ("I;16", "I;16L", "I;16B", "I;16N", "I")
UNKNOWN = ("unknown", "ignore", "void", "unlabeled", "unlabeled")  # names of ids that are to count nowhere
PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
SHOWN = 5  # of what is left out, by name


@dataclass
class Pair:
  """A picture and its class map that can be read, as they are after turning; width and height of the picture."""

  picture: Path
  annotation: Path
  width: int
  height: int


def check_classes(text: str) -> tuple[str, ...]:
  """Raises UserError where a name is of no class that students know, and prints which there are: it would be learned as
  nothing, in silence."""
  names = NAMES["segmentation_names"]
  classes = tuple(c.strip().lower() for c in text.split(","))
  if wrong := [c for c in classes if c not in names and c not in UNKNOWN]:
    known = "; ".join(
      f"{k}: {', '.join(n for n, to in names.items() if to == k)}" for k in SEGMENTATION if k in names.values()
    )
    what = f"--classes: '{wrong[0]}' is no class that students learn; the names of each that there is are {known}"
    raise UserError(f"{what}; give it one of these names, or {' or '.join(UNKNOWN[:2])}, to leave its pixels out")
  return classes


def check_name(name: str) -> str:
  if not PLAIN.fullmatch(name) or name in NO_PICTURE:
    raise UserError(
      f"--name {name}: letters, digits, '_', '-' and '.', not at its beginning, and not {', '.join(NO_PICTURE)}; it "
      "names folders"
    )
  return name


def open_picture(path: Path) -> Image.Image:
  """RGB, turned as its EXIF says, of 16 bits a channel scaled to 8."""
  image = ImageOps.exif_transpose(Image.open(path))
  if image.mode in MODES_16:
    gray = np.asarray(image, np.int64)
    if image.mode != "I" or gray.max(initial=0) > 255:
      gray = (gray.clip(0, 65535) + 128) // 257  # 65535 is white
    image = Image.fromarray(gray.clip(0, 255).astype(np.uint8))
  elif image.mode == "F":
    raise ValueError("a picture of floats, whose white is not known")
  return image.convert("RGB")


def open_ids(path: Path) -> Image.Image:
  """Class ids, one byte a pixel; those of 255 and more are unknown. Raises UserError where its pixels are colors."""
  image = ImageOps.exif_transpose(Image.open(path))
  if image.mode not in ("L", "P", "1", *MODES_16):
    raise UserError(f"{path} is a picture of mode {image.mode}; class ids are one number a pixel")
  return Image.fromarray(np.asarray(image).astype(np.int64).clip(0, IGNORE).astype(np.uint8))


def view_height(width: int, height: int) -> int:
  """Rows of a picture that is scaled to the view's width."""
  return round(height * VIEW_W / width)


def to_view(image: Image.Image, cut: float, resample: Image.Resampling) -> np.ndarray:
  """Scaled to 512 wide, then 256 rows of it: cut 0 takes the uppermost, 1 the lowest."""
  height = view_height(image.width, image.height)
  top = round((height - VIEW_H) * cut)
  return np.asarray(image.resize((VIEW_W, height), resample).crop((0, top, VIEW_W, top + VIEW_H)))


def pairs(images: Path, annotations: Path) -> list[tuple[Path, Path]]:
  """Raises UserError where a picture has no class map, two have the same, or there are none."""
  found = sorted(p for p in images.iterdir() if p.suffix.lower() in SUFFIXES) if images.is_dir() else []
  if not found:
    raise UserError(f"no pictures in {images}; PNG or JPEG")
  stems: dict[str, Path] = {}
  for p in found:
    if (other := stems.setdefault(p.stem, p)) is not p:
      raise UserError(
        f"{other} and {p.name} would both have the class map {p.stem}.png; give each picture a name of its own"
      )
  out = [(p, annotations / f"{p.stem}.png") for p in found]
  missing = [a for _, a in out if not a.is_file()]
  if missing:
    raise UserError(
      f"{len(missing)} of {len(out)} pictures have no class map, the first is {missing[0]}; annotations have the "
      "pictures' names"
    )
  return out


def check(picture: Path, annotation: Path) -> tuple[Pair | None, str]:
  """Reads both whole. -> what can be imported, or why not."""
  at = picture
  try:
    rgb = open_picture(picture)
    at = annotation
    ids = open_ids(annotation)
  except UserError:
    raise
  except Exception as e:  # Pillow's ways to fail have no common base
    return None, f"{at} cannot be read ({' '.join(str(e).split())[:80]})"
  height = view_height(*rgb.size)
  if abs(height - view_height(*ids.size)) > 1:
    return (
      None,
      f"{picture.name} is {rgb.width}x{rgb.height}, its class map {ids.width}x{ids.height}: other proportions",
    )
  if height < VIEW_H:
    return None, f"{picture.name} of {rgb.width}x{rgb.height} is wider than 2:1"
  return Pair(picture, annotation, *rgb.size), ""


def check_all(files: list[tuple[Path, Path]]) -> list[Pair]:
  """Those that can be imported; the others are named and counted. Raises UserError where none is left."""
  good, bad = [], []
  for picture, annotation in tqdm(files, desc="check", unit="picture", leave=False):
    pair, why = check(picture, annotation)
    if pair is not None:
      good.append(pair)
    else:
      bad.append(why)
  if not good:
    raise UserError(
      f"{bad[0]}{f', and {len(bad) - 1} more' if len(bad) > 1 else ''}; no picture is left: mend them, or cut them to "
      "the same part"
    )
  if bad:
    more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    print(f"warning: {len(bad)} of {len(files)} pictures are left out: {'; '.join(bad[:SHOWN])}{more}", file=sys.stderr)
  return good


def say_cut(files: list[Pair], cut: float) -> str:
  """What of the pictures is not in the view."""
  heights = np.array([view_height(f.width, f.height) for f in files])
  gone = 1 - VIEW_H / heights
  top = gone.mean() * cut
  return f"cut: {top:.0%} of the height above, {gone.mean() - top:.0%} below (--cut {cut:g}); of single pictures {gone.min():.0%} to {gone.max():.0%} in all"  # noqa: E501


def read(files: list[Pair], count: int, cut: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  for f in files:
    try:
      rgb, ids = (
        to_view(open_picture(f.picture), cut, Image.Resampling.BILINEAR),
        to_view(open_ids(f.annotation), cut, Image.Resampling.NEAREST),
      )
    except OSError as e:
      raise UserError(f"{f.picture} or {f.annotation} cannot be read any more: {e}; run the command again") from None
    yield pack_rgb(rgb), classes_to_map(ids, count)


def import_images(
  store: LabelStore, files: list[Pair], name: str, classes: tuple[str, ...], license: str, cut: float
) -> tuple[Group, Group]:
  """-> the groups of the frames and of the classes. Nothing is done twice; what was imported before under this name, of
  other files, is replaced."""
  h = hashlib.sha256()
  for f in files:
    for p in (f.picture, f.annotation):
      h.update(p.read_bytes())
  camera = {
    "stream": "images",
    "width": VIEW_W,
    "height": VIEW_H,
    "intrinsics": medmodel_intrinsics.tolist(),
    "rpy": [0.0, 0.0, 0.0],
    "calibrated": False,
    "video": h.hexdigest(),
  }
  entries = [EncodeEntry(i, 0, i, i * FRAME_NS, i * FRAME_NS) for i in range(len(files))]
  groups = []
  for teacher, label in (
    ("frames", Label("frame", "dense", "uint8", FRAME_SHAPE, "YUV 4:2:0")),
    (name, Label("segmentation", "dense", "uint8", (MAP_H, MAP_W), "class", classes)),
  ):
    meta = {
      "version": VERSION,
      "segment": f"{name}--0",
      "teacher": {"name": teacher, "model_id": "", "checkpoint": "", "licence": license, "settings": {"cut": cut}},
      "labels": [{**vars(label), "shape": list(label.shape), "classes": list(label.classes)}],
      "view": {"name": "medmodel", "width": VIEW_W, "height": VIEW_H},
      "camera": camera,
      "every": 1,
      "chunk": CHUNK,
    }
    meta["rules"] = rules_of(meta)
    groups.append(store.group(meta, entries))
  frames, said = groups
  todo = [k for k in range(frames.chunk_count) if k not in frames.done() & said.done()]
  for k in tqdm(todo, desc=name, unit="chunk"):
    both = list(read(files[frames.rows(k).start : frames.rows(k).stop], len(classes), cut))
    frames.write_chunk(k, {"frame": np.stack([f for f, _ in both])})
    said.write_chunk(k, {"segmentation": np.stack([c for _, c in both])})
  for g in store.stale([frames, said]):
    store.remove(g)
    print(f"replaced: {g.path} (imported before as '{name}', from other files or in another way)")
  return frames, said


def main() -> None:
  p = argparse.ArgumentParser(
    prog="import-images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  p.add_argument("images", type=Path)
  p.add_argument("annotations", type=Path)
  p.add_argument(
    "--classes",
    required=True,
    help="names of the ids 0, 1, ..., comma-separated: of a student's classes, or 'unknown', as ids beyond are",
  )
  p.add_argument("--name", required=True, help="of the data set: what evaluate calls --truth")
  add_flag(
    p,
    "--license",
    "--licence",
    required=True,
    help="of the data: MIT, Apache-2.0, BSD-3-Clause, or another, which then must be accepted to learn from it",
  )
  p.add_argument("--out", type=Path, required=True, help="the label store")
  p.add_argument(
    "--cut", type=float, default=0.5, help="which part of a picture's height is taken: 0 the uppermost, 1 the lowest"
  )
  args = p.parse_args()
  if not 0 <= args.cut <= 1:
    raise UserError("--cut is from 0 to 1")
  classes, name = check_classes(args.classes), check_name(args.name)
  files = check_all(pairs(args.images, args.annotations))
  store = LabelStore(args.out, create=True)
  with store.writing():
    frames, said = import_images(store, files, name, classes, args.license, args.cut)
  print(f"{args.out}: {frames.row_count} pictures, {(frames.size + said.size) / 1e6:.1f} MB, license {args.license}")
  print(say_cut(files, args.cut))


if __name__ == "__main__":
  raise SystemExit(cli(main)())

#!/usr/bin/env python3
"""Puts a folder of pictures with class maps (CamVid's layout: one PNG of class ids for each picture, of the same name)
into a label store, as frames of a road camera: `import --input model_frame`, and by the command that was before it.

Pictures are turned as their EXIF says and shown whole, letterboxed; with --cut they are scaled to the view's width and
cut to its height, as if a road camera had taken them. Their camera is not known, so that a student learns classes from
them, not distances. What cannot be read is left out by name."""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.selfdrive.modeld.fair.frames import FRAME_SHAPE, VIEW_H, VIEW_W, pack_rgb
from openpilot.tools.fair.labels.import_labels import check_name, describe, import_parts
from openpilot.tools.fair.labels.rules import rules_of
from openpilot.tools.fair.labels.sources.class_maps import ClassMapPart, read_ids, same_proportions
from openpilot.tools.fair.labels.sources.pictures import SHOWN, Still
from openpilot.tools.fair.labels.meta import CHUNK, VERSION
from openpilot.tools.fair.labels.store import Group, LabelStore
from openpilot.tools.fair.maps import classes_to_map
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.encode_index import EncodeEntry
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.options import option, parse
from openpilot.tools.lib.pictures import PictureError, is_picture, open_rgb
from openpilot.tools.sim.truth import MAP_H, MAP_W

FRAME_NS = 50_000_000


@dataclass
class Pair:
  """A picture and its class map that can be read, as they are after turning; width and height of the picture."""

  picture: Path
  annotation: Path
  width: int
  height: int


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
  found = sorted(p for p in images.iterdir() if is_picture(p)) if images.is_dir() else []
  if not found:
    raise UserError(f"no pictures in {images}")
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
  try:
    width, height = open_rgb(picture).size
    shape = read_ids(annotation).shape
  except PictureError as e:
    return None, str(e)
  pair = Pair(picture, annotation, width, height)
  if not same_proportions(Still(picture, picture.name, width, height), shape):
    return None, f"{picture.name} is {width}x{height}, its class map {shape[1]}x{shape[0]}: other proportions"
  return pair, ""


def check_all(files: list[tuple[Path, Path]], cut: bool) -> list[Pair]:
  """Those that can be imported, and where they are to be cut are high enough; the others are named and counted. Raises
  UserError where none is left."""
  good, bad = [], []
  for picture, annotation in tqdm(files, desc="check", unit="picture", leave=False):
    pair, why = check(picture, annotation)
    if pair is not None and cut and view_height(pair.width, pair.height) < VIEW_H:
      why = f"{picture.name} of {pair.width}x{pair.height} is wider than 2:1"
      pair = None
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
  both = f"{top:.0%} of the height above, {gone.mean() - top:.0%} below (--cut {cut:g})"
  return f"cut: {both}; of single pictures {gone.min():.0%} to {gone.max():.0%} in all"


def read(files: list[Pair], count: int, cut: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  for f in files:
    try:
      rgb, ids = (
        to_view(open_rgb(f.picture), cut, Image.Resampling.BILINEAR),
        to_view(Image.fromarray(read_ids(f.annotation)), cut, Image.Resampling.NEAREST),
      )
    except PictureError as e:
      raise UserError(f"{e}; it could be read before: run the command again") from None
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


@dataclass(frozen=True)
class Options:
  images: Path = option(positional=True, help="the pictures' folder")
  annotations: Path = option(positional=True, help="the class maps' folder")
  classes: str = option(
    help="names of the ids 0, 1, ..., comma-separated; 'unknown', as ids beyond are, counts nowhere"
  )
  name: str = option(help="of the data set: what evaluate calls --truth")
  license: str = option(
    aliases=("--licence",),
    help="of the data: MIT, Apache-2.0, BSD-3-Clause, or another, which then must be accepted to learn from it",
  )
  output: Path = option(aliases=("--out",), help="the label store")
  cut: float | None = option(
    None, help="scale to the view's width, and take that part of the height: 0 the uppermost, 1 the lowest"
  )


def say_padding(files: list[Pair]) -> str:
  """What of the frames the pictures do not fill."""
  spec = InputSpec()
  shares = [f.width * f.height * spec.fit(f.width, f.height)[0, 0] ** 2 / (VIEW_W * VIEW_H) for f in files]
  return (
    f"letterboxed: pictures are whole, and fill {np.mean(shares):.0%} of the frames; --cut 0.5 cuts them to the view's "
    "proportions instead, as this command did before"
  )


def main() -> None:
  args = parse(Options, __doc__, "import-images")
  if args.cut is not None and not 0 <= args.cut <= 1:
    raise UserError("--cut is from 0 to 1")
  classes, name = tuple(c.strip().lower() for c in args.classes.split(",")), check_name(args.name)
  files = check_all(pairs(args.images, args.annotations), args.cut is not None)
  fits = all(view_height(f.width, f.height) == VIEW_H for f in files)  # nothing of them is beside the view
  store = LabelStore(args.output, create=True)
  if fits or args.cut is not None:
    cut = 0.5 if args.cut is None else args.cut
    frames, said = import_images(store, files, name, classes, args.license, cut)
    print(say_cut(files, cut))
  else:
    stills = [Still(f.picture, f.picture.name, f.width, f.height, f.annotation) for f in files]
    part = ClassMapPart(name, args.images, stills, args.license, classes, ())
    ((frames, said),) = import_parts(store, [part], name, InputSpec())
    print(say_padding(files))
  print(f"{args.output}: {describe(frames, said)}")


if __name__ == "__main__":
  raise SystemExit(cli(main)())

#!/usr/bin/env python3
"""Puts a folder of pictures with class maps (CamVid's layout: one PNG of class ids for each picture, of the same name) into a label store.

Pictures are scaled to the view's width and cut to its height; their camera is not known, so that a student learns classes from them, not distances.
"""

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.selfdrive.modeld.fair.frames import FRAME_SHAPE, VIEW_H, VIEW_W, pack_rgb
from openpilot.tools.fair.labels.store import CHUNK, VERSION, Group, LabelStore
from openpilot.tools.fair.maps import classes_to_map
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.encode_index import EncodeEntry
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.sim.truth import MAP_H, MAP_W

SUFFIXES = (".png", ".jpg", ".jpeg")
FRAME_NS = 50_000_000


def to_view(image: Image.Image, cut: float, resample: Image.Resampling) -> np.ndarray:
  """Scaled to 512 wide, then 256 rows of it: cut 0 takes the uppermost, 1 the lowest."""
  height = round(image.height * VIEW_W / image.width)
  if height < VIEW_H:
    raise UserError(f"a picture of {image.width}x{image.height} is wider than 2:1; cut it first")
  top = round((height - VIEW_H) * cut)
  return np.asarray(image.resize((VIEW_W, height), resample).crop((0, top, VIEW_W, top + VIEW_H)))


def pairs(images: Path, annotations: Path) -> list[tuple[Path, Path]]:
  """Raises UserError where a picture has no class map, or there are none."""
  found = sorted(p for p in images.iterdir() if p.suffix.lower() in SUFFIXES) if images.is_dir() else []
  if not found:
    raise UserError(f"no pictures in {images}; PNG or JPEG")
  out = [(p, annotations / f"{p.stem}.png") for p in found]
  missing = [a for _, a in out if not a.is_file()]
  if missing:
    raise UserError(f"{len(missing)} of {len(out)} pictures have no class map, the first is {missing[0]}; annotations have the pictures' names")
  return out


def read(files: list[tuple[Path, Path]], count: int, cut: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  for picture, annotation in files:
    try:
      rgb = to_view(Image.open(picture).convert("RGB"), cut, Image.Resampling.BILINEAR)
      ids = Image.open(annotation)
      if ids.mode not in ("L", "P"):
        raise UserError(f"{annotation} is a picture of mode {ids.mode}; class ids are one byte a pixel")
      yield pack_rgb(rgb), classes_to_map(to_view(Image.fromarray(np.asarray(ids)), cut, Image.Resampling.NEAREST), count)
    except OSError as e:
      raise UserError(f"{picture} or {annotation} cannot be read: {e}") from None


def import_images(store: LabelStore, files: list[tuple[Path, Path]], name: str, classes: tuple[str, ...], licence: str, cut: float) -> tuple[Group, Group]:
  """-> the groups of the frames and of the classes. Nothing is done twice."""
  h = hashlib.sha256()
  for pair in files:
    for p in pair:
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
      "teacher": {"name": teacher, "model_id": "", "checkpoint": "", "licence": licence, "settings": {"cut": cut}},
      "labels": [{**vars(label), "shape": list(label.shape), "classes": list(label.classes)}],
      "view": {"name": "medmodel", "width": VIEW_W, "height": VIEW_H},
      "camera": camera,
      "every": 1,
      "chunk": CHUNK,
    }
    groups.append(store.group(meta, entries))
  frames, said = groups
  todo = [k for k in range(frames.chunk_count) if k not in frames.done() & said.done()]
  for k in tqdm(todo, desc=name, unit="chunk"):
    both = list(read(files[frames.rows(k).start : frames.rows(k).stop], len(classes), cut))
    frames.write_chunk(k, {"frame": np.stack([f for f, _ in both])})
    said.write_chunk(k, {"segmentation": np.stack([c for _, c in both])})
  return frames, said


def main() -> None:
  p = argparse.ArgumentParser(prog="import-images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("images", type=Path)
  p.add_argument("annotations", type=Path)
  p.add_argument("--classes", required=True, help="names of the ids 0, 1, ..., comma-separated; ids beyond are unknown")
  p.add_argument("--name", required=True, help="of the data set: what evaluate calls --truth")
  p.add_argument("--licence", required=True, help="of the data: MIT, Apache-2.0, BSD-3-Clause, or another, which then must be accepted to learn from it")
  p.add_argument("--out", type=Path, required=True, help="the label store")
  p.add_argument("--cut", type=float, default=0.5, help="which part of a picture's height is taken: 0 the uppermost, 1 the lowest")
  args = p.parse_args()
  if not 0 <= args.cut <= 1:
    raise UserError("--cut is from 0 to 1")
  classes = tuple(c.strip() for c in args.classes.split(","))
  files = pairs(args.images, args.annotations)
  store = LabelStore(args.out, create=True)
  with store.writing():
    frames, said = import_images(store, files, args.name, classes, args.licence, args.cut)
  print(f"{args.out}: {frames.row_count} pictures, {(frames.size + said.size) / 1e6:.1f} MB, licence {args.licence}")


if __name__ == "__main__":
  raise SystemExit(cli(main)())

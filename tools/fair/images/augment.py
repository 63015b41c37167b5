#!/usr/bin/env python3
"""Varies labeled pictures by what is known of them: `--what object=small,thin light=low`, or guessed from the data.
With --output it writes a copy with new pictures beside the old ones, as COCO JSON; --show draws some."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from openpilot.tools.fair.distillation.pixels import apply
from openpilot.tools.fair.images import geometry
from openpilot.tools.fair.images.characteristics import (
  CHARACTERISTICS,
  GEOMETRY,
  INTENSITY,
  Step,
  check,
  guess,
  look,
  plan,
  read,
  spread,
  to_dict,
)
from openpilot.tools.fair.images.check import Check, Checked, Picture
from openpilot.tools.fair.images.dataset import open_dataset
from openpilot.tools.fair.images.geometry import Move, Sample, moved
from openpilot.tools.fair.labels import rle
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.files import atomic_path, read_yaml, write_json
from openpilot.tools.lib.options import option, parse
from openpilot.tools.lib.pictures import read_rgb

LOOKED_AT = 100  # pictures, to guess by
SHOWN = 6, 3  # pictures on a sheet, and how often each is varied
FILE = "augmentation.yaml"


@dataclass(frozen=True)
class Pipeline:
  """pipeline(sample, random generator) -> the varied sample: geometry first, then pixels."""

  steps: tuple[Step, ...]

  def __call__(self, sample: Sample, r: np.random.Generator) -> Sample:
    h, w = sample.rgb.shape[:2]
    drawn = [(s, r.uniform(0.3, 1) * s.strength) for s in self.steps if r.uniform() < s.share]
    out = moved(sample, [move_of(s.name, w, h, k, r) for s, k in drawn if s.name in GEOMETRY])
    rgb = out.rgb
    for s, k in drawn:
      if s.name not in GEOMETRY:
        rgb = apply(s.name, rgb, int(r.integers(1 << 31)), k)
    return Sample(rgb, out.boxes, out.masks, out.polygons, out.rows)


def move_of(name: str, w: int, h: int, s: float, r: np.random.Generator) -> Move:
  """A change of place of the strength s, 0..1."""
  if name == "flip":
    return geometry.flip(w, h)
  if name == "rotate":
    return geometry.affine(w, h, angle=float(r.uniform(-45, 45) * s))
  if name == "shear":
    return geometry.affine(w, h, shear=(float(r.uniform(-20, 20) * s), float(r.uniform(-10, 10) * s)))
  if name == "scale":
    return geometry.affine(w, h, scale=float(np.exp(r.uniform(-0.9, 0.7) * s)))
  if name == "shift":
    return geometry.affine(w, h, shift=(float(r.uniform(-0.2, 0.2) * s * w), float(r.uniform(-0.2, 0.2) * s * h)))
  if name == "perspective":
    to = np.array([[0, 0], [w, 0], [w, h], [0, h]], np.float64)
    return geometry.perspective(w, h, to + r.uniform(-0.18, 0.18, (4, 2)) * s * [w, h])
  if name == "elastic":
    size = max(w, h)
    return geometry.elastic(w, h, 0.02 * s * size, 0.15 * size, r)
  if name == "lens":
    return geometry.lens(w, h, float(r.uniform(0.1, 0.45) * s))
  if name == "rolling":
    return geometry.rolling(
      w,
      h,
      float(r.uniform(-0.12, 0.12) * s * w),
      float(0.006 * s * w),
      float(r.uniform(1, 3)),
      float(r.uniform(0, 6.3)),
    )
  raise UserError(f"no change of place '{name}'; there are {', '.join(GEOMETRY)}")


class Registry:
  """Characteristics by group, and pipelines of them."""

  def characteristics(self) -> dict[str, tuple[str, ...]]:
    return {k: tuple(v) for k, v in CHARACTERISTICS.items()}

  def register(self, group: str, name: str, steps: Sequence[Step]) -> None:
    """Another characteristic. Raises UserError where the name is taken."""
    if name in CHARACTERISTICS.setdefault(group, {}):
      raise UserError(f"{group} '{name}' is there already; give yours another name")
    CHARACTERISTICS[group][name] = tuple(steps)

  def pipeline(self, said: Mapping[str, Sequence[str]], intensity: str = "medium") -> Pipeline:
    """said: {group: names}, as {"object": ["small"], "light": ["low"]}. Raises UserError."""
    return Pipeline(tuple(plan(said, intensity)))

  def guess(
    self, pictures: Sequence[np.ndarray], boxes: Sequence[np.ndarray], classes: Sequence[np.ndarray]
  ) -> tuple[dict[str, list[str]], list[str]]:
    """-> what is seen in the data, and why."""
    return guess(look(pictures, boxes, classes))


@cache
def get_augmentation_registry() -> Registry:
  """The one of this process."""
  return Registry()


def sample_of(picture: Picture, rows: Sequence[Mapping[str, Any]]) -> Sample:
  """A picture with its annotations, crowds too."""
  boxes = np.array(
    [[a["bbox"][0], a["bbox"][1], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]] for a in rows]
  )
  masks: list[np.ndarray | None] = []
  polygons: list[list[np.ndarray] | None] = []
  for a in rows:
    s = a.get("segmentation")
    masks.append(rle.decode(s["counts"], *s["size"]) if isinstance(s, dict) else None)
    polygons.append([np.reshape(x, (-1, 2)).astype(np.float64) for x in s] if isinstance(s, list) else None)
  return Sample(read_rgb(picture.path), boxes.reshape(-1, 4), masks, polygons)


def entries_of(sample: Sample, rows: Sequence[Mapping[str, Any]], image: int, first: int) -> list[dict[str, Any]]:
  """COCO's annotations of a sample. rows: those of the picture that it was made of."""
  out = []
  for k, i in enumerate(sample.rows.tolist()):
    x0, y0, x1, y1 = sample.boxes[k].tolist()
    a = {**rows[i], "id": first + k, "image_id": image, "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)]}
    mask, polygons = sample.masks[k], sample.polygons[k]
    if polygons is not None:
      a["segmentation"] = [np.round(p, 2).ravel().tolist() for p in polygons]
      a["area"] = round(sum(geometry.area(p) for p in polygons), 2)
    elif mask is not None:
      a["segmentation"] = {"size": list(mask.shape), "counts": rle.encode(mask[None])[0]}
      a["area"] = int(mask.sum())
    else:
      a["area"] = round((x1 - x0) * (y1 - y0), 2)
    out.append(a)
  return out


@dataclass(frozen=True)
class Options:
  data: Path = option(help="a COCO JSON, a YOLO folder, or its data.yaml")
  images: Path | None = option(None, help="the pictures' folder, where it is not beside")
  what: tuple[str, ...] = option(
    (), nargs="+", metavar="GROUP=NAME,...", help=f"of {', '.join(CHARACTERISTICS)}; default: guessed from the data"
  )
  intensity: str = option("medium", choices=tuple(INTENSITY), help="how much is varied")
  recipe: Path | None = option(None, metavar="FILE.yaml", help=f"what an earlier run saved, {FILE}, in place of --what")
  show: Path | None = option(None, metavar="FILE.png", help="draw some pictures, as they are and varied")
  output: Path | None = option(None, aliases=("--out",), help="a folder for new pictures and annotations.json")
  copies: int = option(1, help="how often each picture is varied")
  seed: int = option(0, help="of all that is random")


def read_recipe(path: Path) -> tuple[dict[str, list[str]], str]:
  """Characteristics and intensity that were saved. Raises UserError."""
  try:
    told = read_yaml(path)
    said = {str(k): [str(n) for n in v] for k, v in told["characteristics"].items()}
    intensity = str(told["intensity"])
    for group, names in said.items():
      for name in names:
        check(group, name)
    if intensity not in INTENSITY:
      raise UserError(f"intensity '{intensity}'; there are {', '.join(INTENSITY)}")
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise UserError(f"{path} is no recipe of `tools/op.sh images augment`: {' '.join(str(e).split())[:120]}") from None
  return said, intensity


def guessed(found: Checked) -> tuple[dict[str, list[str]], list[str]]:
  """Of some of a data set's pictures."""
  some, labels = [found.pictures[i] for i in spread(len(found.pictures), LOOKED_AT)], found.by_picture()
  rows = [labels[p.entry["id"]] for p in some]
  samples = [sample_of(p, own) for p, own in zip(some, rows, strict=True)]
  kinds = [np.array([a["category_id"] for a in own]) for own in rows]
  return get_augmentation_registry().guess([s.rgb for s in samples], [s.boxes for s in samples], kinds)


def say(said: Mapping[str, Sequence[str]], why: Sequence[str], steps: Sequence[Step], intensity: str) -> list[str]:
  lines = ["varied for   " + (", ".join(f"{k} {n}" for k, v in said.items() for n in v) or "nothing in particular")]
  lines += [f"             {w}" for w in why]
  changes = ", ".join(f"{s.name} {s.share:.0%}" for s in steps)
  return [*lines, f"{intensity:12} {changes}"]


def write_copies(found: Checked, pipeline: Pipeline, args: Options) -> tuple[int, int]:
  """-> how many pictures and labels are new. The old ones stand in the same JSON, by the path from it."""
  assert args.output is not None
  labels = found.by_picture()
  images: list[dict[str, Any]] = []
  rows: list[dict[str, Any]] = []
  lost = 0
  for i, p in enumerate(tqdm(found.pictures, desc="augment", unit="picture")):
    own = labels[p.entry["id"]]
    sample = sample_of(p, own)
    for c in range(args.copies + 1):
      varied = pipeline(sample, np.random.default_rng([args.seed, i, c])) if c else sample
      lost += len(own) - len(varied.rows)
      name = f"{i:06d}_{c}.png"
      with atomic_path(args.output / "images" / name) as tmp:
        Image.fromarray(varied.rgb).save(tmp)
      h, w = varied.rgb.shape[:2]
      images.append({**p.entry, "id": len(images) + 1, "file_name": name, "width": w, "height": h})
      rows += entries_of(varied, own, len(images), len(rows) + 1)
  coco = {"info": found.info, "licenses": found.licenses, "images": images, "annotations": rows}
  write_json(args.output / "annotations.json", {**coco, "categories": found.categories})
  return len(images), lost


def write_sheet(found: Checked, pipeline: Pipeline, args: Options) -> None:
  assert args.show is not None
  from openpilot.tools.fair.images.draw import draw
  from openpilot.tools.fair.labels.video import sheet

  labels = found.by_picture()
  names = {c["id"]: c["name"] for c in found.categories}
  tiles = []
  for i in spread(len(found.pictures), SHOWN[0]):
    own = labels[found.pictures[i].entry["id"]]
    sample = sample_of(found.pictures[i], own)
    for c in range(SHOWN[1] + 1):
      varied = pipeline(sample, np.random.default_rng([args.seed, i, c])) if c else sample
      tiles.append(draw(varied.rgb, entries_of(varied, own, 0, 1), names, 400))
  with atomic_path(args.show) as tmp:
    Image.fromarray(sheet(tiles)).save(tmp)


def run(args: Options) -> dict[str, Any]:
  if args.copies < 1:
    raise UserError(f"--copies {args.copies}: it is at least 1")
  if args.what and args.recipe is not None:
    raise UserError("--what and --recipe: give one of them")
  found = Check(open_dataset(args.data, args.images), True).run()
  why: list[str] = []
  intensity = args.intensity
  if args.recipe is not None:
    said, intensity = read_recipe(args.recipe)
  elif args.what:
    said = read(args.what)
  else:
    said, why = guessed(found)
  pipeline = get_augmentation_registry().pipeline(said, intensity)
  print("\n".join(say(said, why, pipeline.steps, intensity)))
  recipe = to_dict(said, intensity, pipeline.steps)
  if args.show is not None:
    write_sheet(found, pipeline, args)
    print(f"wrote        {args.show}: each picture as it is, and varied {SHOWN[1]} times")
  if args.output is not None:
    pictures, lost = write_copies(found, pipeline, args)
    save_recipe(recipe, args.output)
    print(
      f"wrote        {args.output / 'annotations.json'}: {pictures} pictures; {lost} labels have left their pictures"
    )
  return recipe


def save_recipe(recipe: Mapping[str, Any], folder: Path) -> None:
  import yaml

  with atomic_path(folder / FILE) as tmp:
    tmp.write_text(yaml.safe_dump(dict(recipe), sort_keys=False))


def main() -> None:
  run(parse(Options, __doc__, "images augment"))


if __name__ == "__main__":
  raise SystemExit(cli(main)())

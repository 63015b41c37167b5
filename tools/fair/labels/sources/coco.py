"""COCO JSON: images, annotations (boxes, polygons, run lengths), categories of any names."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.labels.sources.pictures import Carries, Pictures, Still, look_at, name_of, say_left_out
from openpilot.tools.fair.labels.sources.source import Said, SourceOptions
from openpilot.tools.fair.spec import UNKNOWN, plain
from openpilot.tools.lib.errors import UserError, printable, warn
from openpilot.tools.lib.files import LONG, MANY, ordinary, read_json
from openpilot.tools.lib.pictures import MAX_PIXELS

BESIDE = "_annotations.coco.json"  # as some programs name it, in the pictures' folder
JSON_LIMIT = 1 << 30
LARGEST = 1e15  # of numbers: whole ones may be too large for a float


@dataclass
class Annotation:
  cls: int
  box: tuple[float, float, float, float] | None  # x0 y0 x1 y1, pixels counted from the corner
  shape: Any = None  # polygons, or {'size', 'counts'}
  crowd: bool = False  # a region of many, of which each is not known


@dataclass
class Image:
  width: int
  height: int
  license: str
  said: list[Annotation] = field(default_factory=list)


def number(x: Any) -> float:
  """Raises ValueError."""
  if isinstance(x, bool) or not isinstance(x, (int, float)) or not abs(x) < LARGEST:  # nan neither
    raise ValueError(f"{printable(repr(x), 40)} is no number that can be used")
  return float(x)


def polygons_of(segmentation: list[Any]) -> list[np.ndarray]:
  """Those of at least three points; one may stand without a list around it. Raises ValueError, TypeError."""
  out = []
  for p in [segmentation] if segmentation and isinstance(segmentation[0], (int, float)) else segmentation:
    flat = [number(v) for v in p]
    if len(flat) >= 6 and len(flat) % 2 == 0:
      out.append(np.array(flat).reshape(-1, 2))
  return out


def runs_of(said: dict[str, Any], width: int, height: int) -> dict[str, Any]:
  """Run lengths that cover the picture, compressed. Raises ValueError, TypeError, KeyError."""
  h, w = (int(number(v)) for v in said["size"])
  counts = said["counts"]
  if (w, h) != (width, height) or not 0 < w * h <= MAX_PIXELS:
    raise ValueError
  if isinstance(counts, list):
    runs = [int(number(c)) for c in counts]
    if min(runs, default=0) < 0 or sum(runs) != w * h:
      raise ValueError
    made = coco_mask.frPyObjects({"size": [h, w], "counts": runs}, h, w)
    return {"size": [h, w], "counts": made["counts"].decode("ascii")}
  if rle.total(str(counts)) != w * h:
    raise ValueError
  return {"size": [h, w], "counts": str(counts)}


def is_crowd(a: Mapping[str, Any]) -> bool:
  """Whether an annotation is of a crowd; some programs write "0" as a text."""
  return str(a.get("iscrowd")).strip().lower() not in ("0", "0.0", "false", "none", "")


def read_annotation(a: dict[str, Any], classes: dict[Any, int], image: Image) -> Annotation | str:
  """-> what is wrong with it, where something is."""
  if a.get("category_id") not in classes:
    return "of no category"
  shape: Any = None
  try:
    segmentation = a.get("segmentation")
    if isinstance(segmentation, dict):
      shape = runs_of(segmentation, image.width, image.height)
    elif segmentation:
      shape = polygons_of(segmentation) or None
      if shape is None and not a.get("bbox"):
        return "with polygons of fewer than three points"
  except (ValueError, TypeError, KeyError, AttributeError):
    return "with a mask that is none, or of another size"
  try:
    if a.get("bbox"):
      x, y, w, h = (number(v) for v in a["bbox"])
      box = (x, y, x + w, y + h)
    elif isinstance(shape, list):
      points = np.concatenate(shape)
      box = (*points.min(0).tolist(), *points.max(0).tolist())
    elif shape is not None:
      x, y, w, h = coco_mask.toBbox({**shape, "counts": shape["counts"].encode("ascii", "replace")}).tolist()
      box = (x, y, x + w, y + h)
    else:
      return "without box or mask"
  except (ValueError, TypeError):
    return "with a box that is none"
  if min(box[2], image.width) <= max(box[0], 0) or min(box[3], image.height) <= max(box[1], 0):
    return "with a box that is empty, or outside the picture"
  return Annotation(classes[a["category_id"]], box, shape, is_crowd(a))


def read_tables(path: Path) -> dict[str, Any]:
  """A COCO JSON's lists; their entries are not looked at. Raises UserError where it is none."""
  try:
    read = read_json(path, JSON_LIMIT)
  except (OSError, ValueError) as e:
    raise UserError(f"cannot read {path}: {printable(e, LONG)}") from None
  if not isinstance(read, dict) or not all(isinstance(read.get(k), list) for k in ("images", "categories")):
    raise UserError(f"{path} is no COCO JSON: it needs the lists images, annotations and categories")
  return read


def read_coco(path: Path) -> tuple[dict[str, Image], tuple[str, ...], Counter[str]]:
  """-> file name -> image, class names in the file's order, and how many annotations are left out, by reason. Regions
  of crowds are of a class 'unknown', behind the file's own where none of these is one: what lies there counts nowhere.
  Raises UserError where it is no COCO JSON."""
  read = read_tables(path)
  left_out: Counter[str] = Counter()
  images: dict[str, Image] = {}
  by_id: dict[Any, Image] = {}
  try:
    licenses = {x.get("id"): str(x.get("name") or x.get("url") or "") for x in read.get("licenses") or []}
    names = list(dict.fromkeys(str(c["name"]) for c in read["categories"]))
    classes = {c["id"]: names.index(str(c["name"])) for c in read["categories"]}
    for i in read["images"]:
      name = str(i["file_name"])
      if name in images or i["id"] in by_id:
        left_out["pictures that are there twice"] += 1
        continue
      width, height = (int(number(i.get(k) or 0)) for k in ("width", "height"))
      image = Image(width, height, licenses.get(i.get("license"), ""))
      images[name] = by_id[i["id"]] = image
    for a in read.get("annotations") or []:
      on = by_id.get(a["image_id"])
      found = "of no picture" if on is None else read_annotation(a, classes, on)
      if on is None or isinstance(found, str):
        left_out[f"annotations {found}"] += 1
        continue
      if found.crowd:
        if not any(plain(n) in UNKNOWN for n in names):
          names.append(UNKNOWN[0])
        found.cls = next(k for k, n in enumerate(names) if plain(n) in UNKNOWN)
      on.said.append(found)
  except (KeyError, TypeError, AttributeError, ValueError) as e:
    what = "an entry lacks" if isinstance(e, KeyError) else "an entry is wrong:"
    raise UserError(
      f"{path} is no COCO JSON: {what} {printable(e, 80)}; `tools/op.sh images validate --fix` writes a mended copy"
    ) from None
  if not names or len(names) > MANY:
    raise UserError(f"{path} has no categories")
  return images, tuple(names), left_out


def inside(folder: Path, name: str) -> Path | None:
  """The file of that name in a folder, None where it would lead out of it."""
  path = Path(os.path.normpath(folder / name))
  return path if path.is_relative_to(os.path.normpath(folder)) else None


def find_images(path: Path, names: list[str], given: Path | None) -> Path:
  """The folder in which the pictures lie. Raises UserError."""
  if given is not None:
    if not given.is_dir():
      raise UserError(f"--images {given}: there is no such folder")
    return given
  near = [path.parent, path.parent / "images", path.parent.parent / "images", path.parent.parent]
  near += [folder / path.stem.removeprefix("instances_") for folder in list(near)]
  for folder in near:
    if any((p := inside(folder, n)) is not None and p.is_file() for n in names[:20]):
      return folder
  raise UserError(f"the pictures of {path} are not beside it; name their folder with --images")


class CocoPart(Pictures):
  def said(self, row: int) -> Said:
    still = self.stills[row]
    image: Image = still.more
    # annotated at another size
    sx, sy = still.width / (image.width or still.width), still.height / (image.height or still.height)
    return said_of(image.said, still, sx, sy)


def said_of(annotations: list[Annotation], still: Still, sx: float = 1, sy: float = 1) -> Said:
  """Annotations counted from the corner of a picture that is smaller by sx, sy."""
  boxes = np.array([a.box for a in annotations], np.float64).reshape(-1, 4) * [sx, sy, sx, sy]
  boxes = np.clip(boxes, 0, [still.width, still.height] * 2) - 0.5
  masks: list[Any] = []
  reach = np.array([[still.width, still.height]])
  for a in annotations:
    if isinstance(a.shape, dict):
      masks.append(a.shape)
    else:  # what lies far outside is not drawn, which would take its length in memory
      masks.append(a.shape and [np.clip(p * [sx, sy], -reach, 2 * reach) for p in a.shape])
  return Said(boxes, np.array([a.cls for a in annotations], np.int64), masks)


def same_size(width: int, height: int, still: Still) -> bool:
  """Whether annotations of a picture of this size fit it, at most scaled; 0: not said."""
  if not width or not height:
    return True
  return abs(still.height * width / still.width - height) <= max(1, width / still.width)


class Coco:
  says = "a COCO JSON (--images: its pictures' folder)"

  def accepts(self, path: str, options: SourceOptions) -> bool:
    p = Path(path)
    return (p.suffix.lower() == ".json" and p.is_file()) or (p / BESIDE).is_file()

  def open(self, paths: list[str], options: SourceOptions) -> list[Pictures]:
    return [self._open(Path(p), options) for p in paths]

  def _open(self, path: Path, options: SourceOptions) -> Pictures:
    path = ordinary(path / BESIDE if path.is_dir() else path)
    images, classes, left_out = read_coco(path)
    if not images:
      raise UserError(f"{path} names no pictures")
    folder = find_images(path, list(images), options.images)
    found, bad = [], []
    for name, image in images.items():
      at = inside(folder, name)
      if at is None or not at.is_file():
        bad.append(f"{printable(name, LONG)} {'leads out of' if at is None else 'is not in'} {folder}")
      else:
        found.append((at, printable(name, LONG), image))
    say_left_out(bad, len(images), str(path))
    if not found:
      raise UserError(
        f"none of the {len(images)} pictures that {path} names is in {folder}; name their folder: --images"
      )
    stills = look_at(found, str(path))
    wrong = [
      f"{s.name} is {s.width}x{s.height}, its annotations are of {s.more.width}x{s.more.height}"
      for s in stills
      if not same_size(s.more.width, s.more.height, s)
    ]
    say_left_out(wrong, len(stills), str(path))
    stills = [s for s in stills if same_size(s.more.width, s.more.height, s)]
    if not stills:
      raise UserError(f"{path}: {wrong[0]}; no picture is left")
    say_counts(path, left_out)
    if crowds := sum(a.crowd for s in stills for a in s.more.said):
      warn(f"{path}: {crowds} regions of crowds are kept as '{UNKNOWN[0]}': what lies in them counts nowhere")
    license = options.license or " and ".join(sorted({s.more.license for s in stills} - {""}))
    masks = any(a.shape is not None for s in stills for a in s.more.said)
    name = options.name or f"{name_of(folder)}-{path.stem}"
    return CocoPart(name, folder, stills, license, Carries(boxes=classes, masks=masks))


def say_counts(path: Path, left_out: Counter[str]) -> None:
  if left_out:
    warn(f"{path}: left out are {', '.join(f'{n} {why}' for why, n in left_out.most_common())}")

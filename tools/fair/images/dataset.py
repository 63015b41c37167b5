"""Labeled pictures as COCO's lists, from a COCO JSON, a YOLO or DOTA folder, as they are: check.py looks at the
entries."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openpilot.tools.fair.images.problems import Problems
from openpilot.tools.fair.labels.sources import dota, yolo
from openpilot.tools.fair.labels.sources.coco import BESIDE, Annotation, find_images, read_tables
from openpilot.tools.lib.errors import UserError, printable, warn
from openpilot.tools.lib.files import LONG, ordinary
from openpilot.tools.lib.pictures import PictureError, picture_size


@dataclass
class Dataset:
  """images, annotations, categories, licenses: entries as COCO has them, of which nothing is known yet.
  folder: what file names are relative to."""

  path: Path
  folder: Path
  images: list[Any]
  annotations: list[Any]
  categories: list[Any]
  licenses: list[Any] = field(default_factory=list)
  info: Any = None
  kind: str = "COCO JSON"
  problems: Problems = field(default_factory=Problems)


def open_dataset(path: Path, images: Path | None = None, judge: bool = False) -> Dataset:
  """images: the pictures' folder, where it is not beside. judge: of a folder with parts of its own only the one to
  judge by, test, or else val. Raises UserError where it is none of these, or holds no annotations."""
  if path.is_dir() and not (path / BESIDE).is_file() and yolo.find_yaml(path) is None and not dota.is_dota(path):
    some = sum(1 for _ in zip(path.glob("*.json"), range(1000), strict=False))
    if some > 1:
      raise UserError(
        f"{path} holds {some} JSON files, perhaps one a picture; one COCO JSON names all pictures: export the data so"
      )
    raise UserError(
      f"{path} holds neither {BESIDE} nor {', '.join(yolo.NAMES)}, nor DOTA's labelTxt; name a COCO JSON, a YOLO or a "
      "DOTA folder"
    )
  if not path.exists():
    raise UserError(f"there is no {path}")
  if yolo.find_yaml(path) is not None:
    found = read_yolo(path, images, judge)
  else:
    found = read_dota(path, images, judge) if dota.is_dota(path) else read_coco(path, images)
  if not found.images or not found.annotations:
    raise UserError(f"{path} has no {'annotations' if found.images else 'pictures'}")
  return found


def read_coco(path: Path, images: Path | None) -> Dataset:
  path = ordinary(path / BESIDE if path.is_dir() else path)
  read = read_tables(path)
  tables = {k: read.get(k) or [] for k in ("annotations", "licenses")}
  if not all(isinstance(t, list) for t in tables.values()):
    raise UserError(f"{path} is no COCO JSON: annotations and licenses are lists")
  names = [i["file_name"] for i in read["images"] if isinstance(i, dict) and isinstance(i.get("file_name"), str)]
  if not names:
    raise UserError(f"{path} names no pictures")
  folder = find_images(path, names, images)
  return Dataset(
    path, folder, read["images"], tables["annotations"], read["categories"], tables["licenses"], read.get("info")
  )


def say_judged(path: Path, part: str) -> None:
  warn(
    f"{path}: judged by its part '{part}' alone; `tools/op.sh images validate --fix` puts all parts into one COCO JSON"
  )


def read_yolo(path: Path, images: Path | None, judge: bool = False) -> Dataset:
  """Every part that data.yaml names, each picture once; or the one to judge by."""
  at = yolo.find_yaml(path)
  assert at is not None
  read = yolo.read_data(at)
  ids = yolo.class_ids(read["names"], at)
  root = yolo.root_of(at, read)
  license = yolo.license_of(read)
  out = Dataset(at, root if images is None else images, [], [], [{"id": k, "name": v} for k, v in ids.items()])
  out.kind = "YOLO folder"
  if license:
    out.licenses.append({"id": 1, "name": license})
  points = yolo.key_points(read)
  splits = yolo.judged_by(at, root, read, images) if judge else ()
  if splits:
    say_judged(path, splits[0])
  labels = yolo.all_files(at, root, read, images, splits)
  for entry, text, size, left_out in with_labels(out, labels, "yolo", {"license": 1} if license else {}):
    for a in yolo.read_labels(text, {k: k for k in ids}, *size, left_out, points):
      out.annotations.append(entry_of(a, len(out.annotations) + 1, entry["id"], bool(points)))
  return out


def with_labels(
  out: Dataset, labels: Mapping[Path, Path], kind: str, more: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], Path, tuple[int, int], Counter[str]]]:
  """Adds pictures, with `more` in each entry. -> of those that can be read and have labels: the entry, the file of
  labels, width and height, and where to count its lines that are left out. What has none, and those lines, become
  problems."""
  for f, text in labels.items():
    name = str(f.relative_to(out.folder)) if f.is_relative_to(out.folder) else str(f)
    entry: dict[str, Any] = {"id": len(out.images) + 1, "file_name": name, **more}
    out.images.append(entry)
    try:
      entry["width"], entry["height"] = size = picture_size(f)
    except PictureError:
      continue  # check.py says it
    if not text.is_file():
      out.problems.add(f"{kind}_no_labels", name)
      continue
    left_out: Counter[str] = Counter()
    yield entry, text, size, left_out
    for why, n in left_out.items():
      out.problems.add(f"{kind}_lines", f"{name} ({why})", n)


def read_dota(path: Path, images: Path | None, judge: bool = False) -> Dataset:
  """Every part's pictures, or those of the one to judge by. What is difficult is a crowd: nothing learns from it, and
  it need not be found."""
  out = Dataset(path, path if images is None else images, [], [], [], kind="DOTA folder")
  labels: dict[Path, Path] = {}
  folders = dota.folders_of(path, images)
  if judge and (part := next((s for s in yolo.JUDGING if s in folders and len(folders) > 1), "")):
    say_judged(path, part)
    folders = {part: folders[part]}
  for folder in folders.values():
    labels |= dota.files_of(folder, images)[0]
  found: list[tuple[int, str, Annotation]] = []
  for entry, text, size, left_out in with_labels(out, labels, "dota", {}):
    for category, corners, difficult in dota.read_labels(text, *size, left_out):
      found.append((entry["id"], category, Annotation(0, None, [corners], difficult)))
  ids = {n: k for k, n in enumerate(sorted({category for _, category, _ in found}), 1)}
  out.categories += [{"id": k, "name": n} for n, k in ids.items()]
  for image, category, a in found:
    a.cls = ids[category]
    out.annotations.append(entry_of(a, len(out.annotations) + 1, image, False))
  return out


def entry_of(a: Annotation, number: int, image: int, points: bool) -> dict[str, Any]:
  """COCO's entry of a YOLO label: a polygon has no box of its own."""
  entry: dict[str, Any] = {"id": number, "image_id": image, "category_id": a.cls, "iscrowd": int(a.crowd)}
  if a.shape is not None:
    entry["segmentation"] = [p.round(3).ravel().tolist() for p in a.shape]
  elif a.box is not None:
    x0, y0, x1, y1 = a.box
    entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]
  if points:
    entry["keypoints"] = []
  return entry


def inspect_dataset(coco: dict[str, Any]) -> dict[str, Any]:
  """What a COCO JSON, read, holds: has_boxes, has_masks, has_keypoints, num_classes, class_mapping {id: name},
  num_images, num_annotations. Raises UserError where it is none."""
  try:
    annotations, categories = coco["annotations"], coco["categories"]
    return {
      "has_boxes": any(bool(a.get("bbox")) for a in annotations),
      "has_masks": any(bool(a.get("segmentation")) for a in annotations),
      "has_keypoints": any("keypoints" in a for a in annotations),
      "num_classes": len(categories),
      "class_mapping": {c["id"]: c["name"] for c in categories},
      "num_images": len(coco["images"]),
      "num_annotations": len(annotations),
    }
  except (KeyError, TypeError, AttributeError) as e:
    raise UserError(f"that is no COCO JSON: {printable(e, LONG)}; it needs images, annotations, categories") from None

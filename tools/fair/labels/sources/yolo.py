"""YOLO folders: data.yaml with names and splits, pictures in images/, and a text file for each in labels/, with boxes
or polygons."""

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.tools.fair.labels.sources.coco import Annotation, inside, said_of, say_counts
from openpilot.tools.fair.labels.sources.pictures import (
  SHOWN,
  Carries,
  Pictures,
  below,
  look_at,
  plain_name,
  say_left_out,
)
from openpilot.tools.fair.labels.sources.source import Said, SourceOptions
from openpilot.tools.lib.errors import UserError, printable, warn
from openpilot.tools.lib.files import LONG, MB, read_bytes, read_yaml
from openpilot.tools.lib.pictures import find_pictures, is_picture

NAMES = ("data.yaml", "data.yml", "dataset.yaml", "config.yaml")
SPLITS = ("train", "val", "valid", "test")
JUDGING = ("test", "val", "valid")  # the first that is there
LABELS_LIMIT = 16 * MB  # bytes of one picture's text


def find_yaml(path: Path) -> Path | None:
  if path.is_dir():
    return next((path / n for n in NAMES if (path / n).is_file()), None)
  return path if path.suffix.lower() in (".yaml", ".yml") and path.is_file() else None


def read_data(path: Path) -> dict[str, Any]:
  """Raises UserError where it does not describe a YOLO folder."""
  try:
    read = read_yaml(path)
  except (OSError, ValueError) as e:
    raise UserError(f"cannot read {path}: {printable(e, LONG)}") from None
  if not isinstance(read, dict) or not isinstance(read.get("names"), (list, dict)) or not read["names"]:
    raise UserError(f"{path} describes no YOLO folder: it needs names, and train or val")
  return read


def class_ids(names: list[Any] | dict[Any, Any], path: Path) -> dict[int, str]:
  """Raises UserError."""
  pairs = list(names.items() if isinstance(names, dict) else enumerate(names))
  for _, name in pairs:
    if not isinstance(name, (str, int)) or isinstance(name, bool):  # of yes, no, 1.10 another text would be left
      raise UserError(f"{path}: YAML takes a name for {printable(repr(name), 60)}; put names into quotes")
  try:
    return {int(k): str(v) for k, v in pairs}
  except (ValueError, TypeError):
    raise UserError(f"{path}: names are a list, or numbers with names") from None


def read_labels(path: Path, index: dict[int, int], width: int, height: int, left_out: Counter[str], points: int) -> Any:
  """One picture's text -> annotations, counted from the corner of a picture of this size. points: numbers of key points
  behind each box. What is no label is counted."""
  out: list[Annotation] = []
  for line in read_bytes(path, LABELS_LIMIT).decode("utf-8", "replace").splitlines():
    words = line.split()
    if not words:
      continue
    try:
      values = [float(w) for w in words]
    except ValueError:
      values = []
    if not values or not all(map(math.isfinite, values)) or (len(values) < 7 and len(values) not in (5, 6)):
      left_out["lines that are no box or polygon"] += 1
      continue
    if values[0] not in index:
      left_out["labels of a class that names does not have"] += 1
      continue
    cls, rest = index[int(values[0])], values[1:]
    if len(rest) > 5 and not points:
      if len(rest) % 2:
        left_out["lines that are no box or polygon"] += 1
        continue
      polygon = np.array(rest).reshape(-1, 2) * [width, height]
      low, high = polygon.min(0).tolist(), polygon.max(0).tolist()
      box, shape = (*low, *high), [polygon]
    else:
      x, y, w, h = rest[:4]
      box = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
      shape = None
    if min(box[2], width) <= max(box[0], 0) or min(box[3], height) <= max(box[1], 0):
      left_out["boxes that are empty, or outside the picture"] += 1
      continue
    out.append(Annotation(cls, box, shape))
  return out


class YoloPart(Pictures):
  def said(self, row: int) -> Said:
    still = self.stills[row]
    return said_of(still.more, still)


def labels_folder(images: Path) -> Path:
  """images/train -> labels/train: the last 'images' of the path, as YOLO trainers have it."""
  parts = list(images.parts)
  if "images" not in parts:
    return images.parent / "labels"
  last = len(parts) - 1 - parts[::-1].index("images")
  return Path(*parts[:last], "labels", *parts[last + 1 :])


def below_root(root: Path, name: str) -> Path | None:
  """What data.yaml names, None where it leads out of `root`."""
  at = inside(root, name)
  while name.startswith("../") and (at is None or not at.exists()):  # as one exporter writes what lies beside it
    name = name[3:]
    at = inside(root, name)
  return at


def pictures_of(root: Path, said: Any, where: str) -> tuple[list[Path], Path]:
  """A split as data.yaml names it, a folder, a list of folders or a text file of paths -> pictures and the folder they
  lie below. Raises UserError where it leads out of `root`, or is not there."""
  found: list[Path] = []
  for s in said if isinstance(said, list) else [said]:
    at = below_root(root, str(s))
    if at is None:
      raise UserError(f"{where} names {printable(s, LONG)}, which is not below {root}; move it there")
    if not at.exists():
      raise UserError(f"{where} names {printable(s, LONG)}, and there is no {at}")
    if at.suffix == ".txt":
      listed = read_bytes(at, LABELS_LIMIT).decode("utf-8", "replace").split("\n")
      lines = [inside(root, os.path.normpath(x.strip())) for x in listed if x.strip()]
      found += [p for p in lines if p is not None and is_picture(p)]
    else:
      found += find_pictures(at)
  return found, root


def root_of(at: Path, read: dict[str, Any]) -> Path:
  """The folder that data.yaml's paths are of."""
  said = read.get("path")
  below_it = inside(at.parent, said) if isinstance(said, str) else None
  if below_it is not None and below_it.is_dir():
    return below_it
  if said:
    warn(f"{at}: path {printable(said, LONG)} is no folder below {at.parent}, where pictures are looked for instead")
  return at.parent


def license_of(read: dict[str, Any]) -> str:
  about = read.get("roboflow")
  return str(read.get("license") or (about.get("license") if isinstance(about, dict) else "") or "")


def key_points(read: dict[str, Any]) -> int:
  """Numbers of key points behind each box."""
  shape = read.get("kpt_shape")
  return math.prod(int(v) for v in shape) if isinstance(shape, list) else 0


def label_of(f: Path, root: Path, read: dict[str, Any], split: str, images: Path | None) -> Path:
  """A picture's file of labels, which may not be there."""
  if images is None:
    return (labels_folder(f.parent) / f.name).with_suffix(".txt")
  said = read[split] if isinstance(read[split], list) else [read[split]]
  folders = [labels_folder(below_root(root, str(s)) or root / str(s)) for s in said]
  files = [(folder / f.relative_to(images)).with_suffix(".txt") for folder in folders]
  return next((t for t in files if t.is_file()), files[0])


def split_files(
  at: Path, root: Path, read: dict[str, Any], split: str, images: Path | None
) -> tuple[dict[Path, Path], Path]:
  """A split's pictures with their files of labels, and the folder that they lie below. images: where they lie
  elsewhere. Raises UserError where there are none."""
  where = f"{at}: {split}"
  if images is None:
    files, folder = pictures_of(root, read[split], where)
  else:
    files, folder = find_pictures(images), images
    if sum(bool(read.get(s)) for s in SPLITS) > 1:  # those of this split have their labels there
      files = [f for f in files if label_of(f, root, read, split, images).is_file()]
  if not files:
    raise UserError(f"{where}: no pictures in {read[split]}")
  return {f: label_of(f, root, read, split, images) for f in files}, folder


def all_files(
  at: Path, root: Path, read: dict[str, Any], images: Path | None, splits: tuple[str, ...] = ()
) -> dict[Path, Path]:
  """Pictures with their files of labels, each once, of `splits`, or of all that data.yaml names; those of which there
  are none are said. Raises UserError where nothing is left."""
  labels: dict[Path, Path] = {}
  wrong: list[str] = []
  for split in splits or tuple(s for s in SPLITS if read.get(s)):
    try:
      labels |= split_files(at, root, read, split, images)[0]
    except UserError as e:
      wrong.append(str(e))
  if not labels:
    raise UserError(wrong[0] if wrong else f"{at} names neither train nor val")
  for w in wrong:
    warn(f"{w}; it is left out")
  say_strays(labels, str(at))
  say_unlabeled(at, root, read, images)
  if read.get("skip_if_label_file_missing"):
    without = [f for f, text in labels.items() if not text.is_file()]
    say_left_out([f"{below(f, images or root)} has no labels" for f in without], len(labels), str(at))
    labels = {f: text for f, text in labels.items() if text.is_file()}
  return labels


def judged_by(at: Path, root: Path, read: dict[str, Any], images: Path | None) -> tuple[str, ...]:
  """The split to judge by: test, or else val, where there are others and it has labels; else all, ()."""
  named = [s for s in SPLITS if read.get(s)]
  for split in (s for s in JUDGING if s in named and len(named) > 1):
    try:
      labels = split_files(at, root, read, split, images)[0]
    except UserError:
      continue  # all_files says it
    if any(t.is_file() for t in labels.values()):
      return (split,)
  return ()


def say_unlabeled(at: Path, root: Path, read: dict[str, Any], images: Path | None) -> None:
  """Of pictures that lie elsewhere, and may be of any of several splits, those that have labels in none."""
  named = [s for s in SPLITS if read.get(s)]
  if images is None or len(named) < 2:
    return
  files = find_pictures(images)
  without = [f for f in files if not any(label_of(f, root, read, s, images).is_file() for s in named)]
  say_left_out([f"{below(f, images)} has labels in no part" for f in without], len(files), str(at))


def say_strays(labels: dict[Path, Path], where: str) -> None:
  """Files of labels without a picture."""
  used = set(labels.values())
  strays = sorted(p.name for d in {p.parent for p in used} for p in d.glob("*.txt") if p not in used)
  strays = [s for s in strays if s not in ("classes.txt", "notes.txt")]
  if strays:
    some = f"{', '.join(printable(s, 60) for s in strays[:SHOWN])}{' ...' if len(strays) > SHOWN else ''}"
    warn(f"{where}: {len(strays)} files of labels have no picture: {some}")


class Yolo:
  says = "a YOLO folder: data.yaml with names, images/, labels/ (--images: pictures that lie elsewhere)"

  def accepts(self, path: str, options: SourceOptions) -> bool:
    at = find_yaml(Path(path))
    try:
      return at is not None and bool(read_data(at))
    except UserError:
      return False

  def open(self, paths: list[str], options: SourceOptions) -> list[Pictures]:
    return [part for p in paths for part in self._open(Path(p), options)]

  def _open(self, path: Path, options: SourceOptions) -> list[Pictures]:
    at = find_yaml(path)
    if at is None:
      raise UserError(f"{path} holds none of {', '.join(NAMES)}, which says the classes' names")
    read = read_data(at)
    ids = class_ids(read["names"], at)
    root = root_of(at, read)
    name = options.name or plain_name(path.resolve().stem if path.is_dir() else at.resolve().parent.name)
    parts: list[Pictures] = []
    problems: list[str] = []
    seen: set[tuple[Path, ...]] = set()
    for split in (s for s in SPLITS if read.get(s)):
      try:
        part = self._split(
          at, root, read, split, ids, f"{name}-{split}", options, options.license or license_of(read), seen
        )
      except UserError as e:
        problems.append(str(e))
        continue
      if part is not None:
        parts.append(part)
    if not parts:
      raise UserError(problems[0] if problems else f"{at} names neither train nor val")
    for problem in problems:
      warn(f"{problem}; it is left out")
    say_unlabeled(at, root, read, options.images)
    return parts

  def _split(
    self,
    at: Path,
    root: Path,
    read: dict[str, Any],
    split: str,
    ids: dict[int, str],
    name: str,
    options: SourceOptions,
    license: str,
    seen: set[tuple[Path, ...]],
  ) -> Pictures | None:
    where = f"{at}: {split}"
    labels, folder = split_files(at, root, read, split, options.images)
    files = list(labels)
    if tuple(files) in seen:
      warn(f"{where} has the same pictures as another split; it is left out")
      return None
    seen.add(tuple(files))
    without = [f for f in files if not labels[f].is_file()]
    if len(without) == len(files):
      raise UserError(f"{where}: none of {len(files)} pictures has its labels, as {labels[files[0]]}")
    if without and read.get("skip_if_label_file_missing"):
      say_left_out([f"{below(f, folder)} has no labels" for f in without], len(files), where)
      files = [f for f in files if labels[f].is_file()]
    elif without:
      warn(f"{where}: {len(without)} of {len(files)} pictures have no file of labels: nothing is on them")
    say_strays(labels, where)
    stills = look_at([(f, below(f, folder), None) for f in files], where)
    index = {k: i for i, k in enumerate(ids)}
    points = key_points(read)
    left_out: Counter[str] = Counter()
    for s in stills:
      text = labels[s.path]
      s.more = read_labels(text, index, s.width, s.height, left_out, points) if text.is_file() else []
    say_counts(at, left_out)
    if points:
      warn(f"{where}: key points are not read")
    masks = any(a.shape is not None for s in stills for a in s.more)
    return YoloPart(name, root, stills, license, Carries(boxes=tuple(ids.values()), masks=masks))

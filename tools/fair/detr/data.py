"""Labeled pictures as a detection transformer learns them: boxes in arrays, millions of them in some hundred megabytes.
COCO's annotations are made when a picture is asked for; no files are written."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from openpilot.tools.fair.images.check import Check
from openpilot.tools.fair.images.dataset import open_dataset
from openpilot.tools.fair.images.problems import Problems
from openpilot.tools.fair.images.report import NOT_STATED, settle_licenses
from openpilot.tools.fair.labels.sources import yolo
from openpilot.tools.lib.errors import UserError, printable, warn
from openpilot.tools.lib.files import LONG, read_bytes
from openpilot.tools.lib.pictures import PictureError, picture_size

HELD_OUT = 0.1  # of the pictures, where nothing else is there to judge by
EDGE = 1.0  # pixels that a box may reach beyond its picture: rounding


@dataclass
class Labeled:
  """names: classes, in the order of their indices. paths, files: of each picture, and what it is called. sizes: (N, 2)
  int32 width, height as shown. boxes: (M, 4) float32 x, y, width, height, pixels from the picture's corner; classes
  (M,) int64; crowd (M,) bool; those of picture i are offsets[i] to offsets[i + 1]. ids: COCO's, of the pictures.
  licenses: {name: pictures}."""

  path: Path
  names: tuple[str, ...]
  paths: list[Path]
  files: list[str]
  sizes: np.ndarray
  offsets: np.ndarray
  boxes: np.ndarray
  classes: np.ndarray
  crowd: np.ndarray
  licenses: dict[str, int] = field(default_factory=dict)

  def __len__(self) -> int:
    return len(self.paths)

  @property
  def counts(self) -> np.ndarray:
    """(N,) boxes of each picture."""
    return np.diff(self.offsets)

  def of(self, i: int) -> slice:
    return slice(int(self.offsets[i]), int(self.offsets[i + 1]))

  def annotations(self, i: int) -> list[dict[str, Any]]:
    """COCO's, of one picture; ids count from 1 over all pictures."""
    at = self.of(i)
    rows = zip(self.boxes[at].astype(float).tolist(), self.classes[at].tolist(), self.crowd[at].tolist(), strict=True)
    return [
      {"id": at.start + k + 1, "image_id": i, "bbox": b, "area": b[2] * b[3], "category_id": c, "iscrowd": int(crowd)}
      for k, (b, c, crowd) in enumerate(rows)
    ]

  def truth(self) -> dict[str, Any]:
    """COCO's lists of all pictures, whose ids are their places."""
    images = [
      {"id": i, "file_name": f, "width": int(w), "height": int(h)}
      for i, (f, (w, h)) in enumerate(zip(self.files, self.sizes.tolist(), strict=True))
    ]
    rows = [a for i in range(len(self)) for a in self.annotations(i)]
    return {
      "images": images,
      "annotations": rows,
      "categories": [{"id": k, "name": n} for k, n in enumerate(self.names)],
    }

  def some(self, rows: Sequence[int]) -> "Labeled":
    at = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in rows]
    pick = np.concatenate(at) if at else np.zeros(0, np.int64)
    offsets = np.r_[0, np.cumsum(self.counts[list(rows)])].astype(np.int64)
    paths, files = [self.paths[i] for i in rows], [self.files[i] for i in rows]
    arrays = (self.sizes[list(rows)], offsets, self.boxes[pick], self.classes[pick], self.crowd[pick])
    return Labeled(self.path, self.names, paths, files, *arrays, self.licenses)


def read_training(
  path: Path, val: Path | None, images: Path | None, val_images: Path | None, seed: int
) -> tuple[Labeled, Labeled]:
  """-> what is learned, and what is judged by: `val`, or a YOLO folder's own split, or a tenth held out. Raises
  UserError."""
  at = yolo.find_yaml(path) if path.exists() else None
  own = None
  if at is not None:
    read = yolo.read_data(at)
    own = next((s for s in ("val", "valid") if read.get(s)), None) if val is None and read.get("train") else None
  train = read_index(path, images, ("train",) if own else ())
  held = None
  if val is not None:
    held = read_index(val, val_images or images)
  elif own is not None:
    try:
      held = read_index(path, images, (own,))
    except UserError as e:
      warn(f"{e}; it is left out")
  if held is None:
    train, held = hold_out(train, seed)
  elif n := len(set(held.paths) & set(train.paths)):
    warn(f"{n} of {len(held)} pictures to judge by are also learned from: what is said of them is not of new pictures")
  held = by_names(held, train)
  if not len(train.boxes) or train.crowd.all():
    raise UserError(f"{path} has no box that can be learned from")
  if not len(held.boxes) or held.crowd.all():
    raise UserError(f"{held.path} has no box to judge by")
  return train, held


def hold_out(whole: Labeled, seed: int) -> tuple[Labeled, Labeled]:
  """-> what is left, and a tenth. Raises UserError."""
  if len(whole) < 2:
    raise UserError(f"{whole.path} has a single picture, and none to judge by; add --val")
  n = max(1, round(HELD_OUT * len(whole)))
  out = np.sort(np.random.default_rng([seed, len(whole)]).permutation(len(whole))[:n])
  warn(
    f"no --val: {n} pictures are held out at random; `tools/op.sh images validate --split` keeps alike ones together"
  )
  return whole.some(np.setdiff1d(np.arange(len(whole)), out).tolist()), whole.some(out.tolist())


def by_names(data: Labeled, like: Labeled) -> Labeled:
  """Its classes numbered as those of `like`. Raises UserError where it uses others."""
  known = {n: k for k, n in enumerate(like.names)}
  used = {data.names[k] for k in np.unique(data.classes).tolist()}
  if other := sorted(used - set(known)):
    raise UserError(
      f"{data.path} has classes that {like.path} has not: {printable(', '.join(other[:5]), LONG)}; give both the same"
    )
  to = np.array([known.get(n, 0) for n in data.names], np.int64)
  data.classes, data.names = to[data.classes], like.names
  return data


def read_index(path: Path, images: Path | None, splits: tuple[str, ...] = ()) -> Labeled:
  """A COCO JSON, looked at as `images validate` does, or a YOLO folder. splits: of data.yaml; by default all. Raises
  UserError."""
  if path.exists() and yolo.find_yaml(path) is not None:
    return index_yolo(path, images, splits)
  return index_coco(path, images)


def say(path: Path, problems: Problems) -> None:
  if lines := problems.lines(True):
    first = f"{path}: {len(lines)} kinds of problems, the first: {lines[0]}"
    warn(f"{first}; `tools/op.sh images validate` lists them")


def index_coco(path: Path, images: Path | None) -> Labeled:
  data = open_dataset(path, images)
  found = Check(data).run()
  licenses = {k: n for k, n in settle_licenses(found, "").items() if k != NOT_STATED}
  say(path, data.problems)
  index = {c["id"]: k for k, c in enumerate(found.categories)}
  by_picture = found.by_picture()
  rows = [by_picture[p.entry["id"]] for p in found.pictures]
  flat = [a for r in rows for a in r]
  return Labeled(
    data.path,
    tuple(str(c["name"]) for c in found.categories),
    [p.path for p in found.pictures],
    [p.name for p in found.pictures],
    np.array([(p.entry["width"], p.entry["height"]) for p in found.pictures], np.int32).reshape(-1, 2),
    np.r_[0, np.cumsum([len(r) for r in rows])].astype(np.int64),
    np.array([a["bbox"] for a in flat], np.float32).reshape(-1, 4),
    np.array([index[a["category_id"]] for a in flat], np.int64),
    np.array([bool(a["iscrowd"]) for a in flat], bool),
    licenses,
  )


def index_yolo(path: Path, images: Path | None, splits: tuple[str, ...]) -> Labeled:
  """Every line is looked at, and every picture's header; that a picture can be decoded shows when it is read."""
  at = yolo.find_yaml(path)
  assert at is not None
  read = yolo.read_data(at)
  ids = yolo.class_ids(read["names"], at)
  index = {k: i for i, k in enumerate(ids)}
  root, points = yolo.root_of(at, read), yolo.key_points(read)
  labels = yolo.all_files(at, root, read, images, splits)
  folder, problems = root if images is None else images, Problems()
  paths: list[Path] = []
  files: list[str] = []
  sizes, boxes, classes, counts = list[tuple[int, int]](), list[np.ndarray](), list[np.ndarray](), list[int]()
  for f, text in tqdm(labels.items(), desc="index", unit="picture", leave=False):
    name = str(f).removeprefix(f"{folder}/")
    try:
      size = picture_size(f)
    except PictureError as e:
      problems.add("image_unreadable", f"{name} ({e})")
      continue
    if text.is_file():
      b, c = read_lines(text, index, size, points, problems, name)
    else:
      problems.add("yolo_no_labels", name)
      b, c = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    paths.append(f)
    files.append(name)
    sizes.append(size)
    boxes.append(b)
    classes.append(c)
    counts.append(len(b))
  say(path, problems)
  if not paths:
    raise UserError(f"{at} has no picture that can be read")
  license = yolo.license_of(read)
  every = np.concatenate(boxes)
  return Labeled(
    at,
    tuple(ids.values()),
    paths,
    files,
    np.array(sizes, np.int32),
    np.r_[0, np.cumsum(counts)].astype(np.int64),
    every,
    np.concatenate(classes),
    np.zeros(len(every), bool),
    {license: len(paths)} if license else {},
  )


def read_lines(
  text: Path, index: dict[int, int], size: tuple[int, int], points: int, problems: Problems, name: str
) -> tuple[np.ndarray, np.ndarray]:
  """One picture's boxes (K, 4) float32 x, y, width, height, cut at its edge, and classes (K,) int64. What cannot be
  used is counted."""
  rows = [x for x in (line.split() for line in read_bytes(text, yolo.LABELS_LIMIT).splitlines()) if x]
  try:
    if points or any(len(r) != 5 for r in rows):
      raise ValueError
    values = np.array([[float(w) for w in r] for r in rows], np.float64).reshape(-1, 5)
    if not np.isfinite(values).all() or not index.keys() >= set(values[:, 0].tolist()):
      raise ValueError
    half = values[:, 3:] / 2
    corners = np.concatenate([values[:, 1:3] - half, values[:, 1:3] + half], 1) * [*size, *size]
    classes = np.array([index[int(k)] for k in values[:, 0].tolist()], np.int64)
  except ValueError:  # polygons, scores, or something wrong: line by line
    left_out: Counter[str] = Counter()
    found = yolo.read_labels(text, index, *size, left_out, points)
    for why, n in left_out.items():
      problems.add("yolo_lines", f"{name} ({why})", n)
    corners = np.array([a.box for a in found], np.float64).reshape(-1, 4)
    classes = np.array([a.cls for a in found], np.int64)
  inner = np.clip(corners, 0, [*size, *size])
  whole = (inner[:, 2:] > inner[:, :2]).all(1)
  if n := int((~whole).sum()):
    problems.add("yolo_lines", f"{name} (boxes that are empty, or outside the picture)", n)
  if n := int((np.abs(inner - corners).max(1, initial=0) > EDGE)[whole].sum()):
    problems.add("box_beyond", name, n)
  inner, classes = inner[whole], classes[whole]
  boxes = np.concatenate([inner[:, :2], inner[:, 2:] - inner[:, :2]], 1).astype(np.float32)
  if len(set(zip(classes.tolist(), *boxes.T.tolist(), strict=True))) < len(boxes):  # rarely: unique() is slow
    _, first = np.unique(np.concatenate([boxes, classes[:, None]], 1), axis=0, return_index=True)
    problems.add("annotation_twice", name, len(boxes) - len(first))
    boxes, classes = boxes[np.sort(first)], classes[np.sort(first)]
  return boxes, classes

"""Looks at every picture and every label of a data set: what is wrong is counted (problems.py), and a mended copy is
made, which `import` and COCO's own tools read."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from openpilot.tools.fair.images.dataset import Dataset
from openpilot.tools.fair.images.problems import Problems
from openpilot.tools.fair.images.shapes import TURNS, Place, Shape, area_of, cut, perimeter, tight_box
from openpilot.tools.fair.images.twins import alike, bits_of
from openpilot.tools.fair.labels.sources.coco import inside, is_crowd, number, polygons_of, runs_of, same_size
from openpilot.tools.fair.labels.sources.pictures import Still
from openpilot.tools.fair.spec import plain
from openpilot.tools.lib.errors import UserError, printable
from openpilot.tools.lib.files import LONG, ordinary
from openpilot.tools.lib.pictures import PictureError, open_rgb, orientation

EDGE = 1.0  # pixels that a box may reach beyond its picture: rounding
SLACK = 2.0, 0.02  # pixels, or share of a box's side, by which a mask may reach beyond its box
LONGEST = 4e6  # pixels around a mask's polygons: drawing takes memory in proportion
DIGITS = 18  # of an id that is a whole number


def ident(x: Any) -> str | None:
  """An id as text, so that 7, 7.0 and "7" are one; None where it can be none."""
  if isinstance(x, bool) or not isinstance(x, (int, float, str)):
    return None
  if isinstance(x, float):
    return str(int(x)) if abs(x) < 10**DIGITS and x == int(x) else None
  text = str(x).strip() if isinstance(x, str) else str(x) if abs(x) < 10**DIGITS else ""
  return text if 0 < len(text) <= LONG else None


def whole(text: str) -> int | None:
  return int(text) if text.removeprefix("-").isascii() and text.removeprefix("-").isdigit() else None


class Numbers:
  """Ids as whole numbers: those that are keep theirs, text gets one above all."""

  def __init__(self, idents: list[str]):
    taken = {n for t in idents if (n := whole(t)) is not None}
    self.next = max(taken, default=0) + 1
    self.known: dict[str, int] = {}

  def of(self, text: str) -> int:
    n = whole(text)
    if n is not None:
      return n
    if text not in self.known:
      self.known[text] = self.next
      self.next += 1
    return self.known[text]


@dataclass
class Picture:
  """One that can be used. entry: its mended entry."""

  entry: dict[str, Any]
  path: Path
  place: Place
  digest: bytes
  bits: np.ndarray | None  # of how it looks, (32,) uint8; None: all of one color

  @property
  def name(self) -> str:
    return str(self.entry["file_name"])


@dataclass
class Checked:
  """A data set's pictures and labels after mending. boxes, masks, both, keypoints: annotations that had them, and could
  be used."""

  pictures: list[Picture] = field(default_factory=list)
  annotations: list[dict[str, Any]] = field(default_factory=list)
  categories: list[dict[str, Any]] = field(default_factory=list)
  licenses: list[Any] = field(default_factory=list)
  info: dict[str, Any] = field(default_factory=dict)
  listed: int = 0  # pictures
  boxes: int = 0
  masks: int = 0
  both: int = 0
  keypoints: int = 0
  crowds: int = 0
  made_boxes: int = 0
  alike: list[tuple[int, int]] = field(default_factory=list)  # indices of pictures

  def by_picture(self) -> dict[int, list[dict[str, Any]]]:
    out: dict[int, list[dict[str, Any]]] = {p.entry["id"]: [] for p in self.pictures}
    for a in self.annotations:
      out[a["image_id"]].append(a)
    return out


class Check:
  """One run over a data set. Raises UserError where nothing is left, and where file names lead out of the folder unless
  they may be left out."""

  def __init__(self, data: Dataset, fix: bool = False):
    self.data, self.fix = data, fix
    self.problems: Problems = data.problems
    self.out = Checked(info=data.info if isinstance(data.info, dict) else {})
    self.out.licenses = [x for x in data.licenses if isinstance(x, dict)]

  def run(self) -> Checked:
    self.categories()
    self.images()
    self.annotations()
    self.same_pictures()
    used = {a["category_id"] for a in self.out.annotations}
    for c in self.out.categories:
      if c["id"] not in used:
        self.problems.add("category_unused", c["name"])
    return self.out

  # *** categories ***

  def categories(self) -> None:
    entries = [c for c in self.data.categories if isinstance(c, dict)]
    keys = [ident(c.get("id")) for c in entries]
    numbers = Numbers([k for k in keys if k is not None])
    self.category: dict[str, int] = {}
    by_name: dict[str, int] = {}
    as_learned: dict[str, str] = {}  # as the student's classes are told apart
    self.problems_of(len(self.data.categories) - len(entries), "category_id")
    for c, key in zip(entries, keys, strict=True):
      name = c.get("name")
      if key is None or not isinstance(name, (str, int)) or isinstance(name, bool) or not str(name).strip():
        self.problems.add("category_id", c.get("name") or c.get("id") or "")
        continue
      if key in self.category:
        self.problems.add("category_id_twice", f"{key} ({name})")
        continue
      self.say_kind(c["id"])
      if str(name) in by_name:
        self.problems.add("category_name_twice", name)
        self.category[key] = by_name[str(name)]
        continue
      if (first := as_learned.setdefault(plain(str(name)), str(name))) != str(name):
        self.problems.add("category_name_alike", f"{name} and {first}")
      self.category[key] = by_name[str(name)] = numbers.of(key)
      self.out.categories.append({**c, "id": numbers.of(key), "name": str(name)})
    ids = sorted(c["id"] for c in self.out.categories)
    if not ids:
      raise UserError(f"{self.data.path} has no categories that have a name and an id")
    gaps = ids[-1] - ids[0] + 1 - len(set(by_name.values()) | set(self.category.values()))
    if gaps > 0:
      self.problems.add("category_gap", f"{len(ids)} categories, ids {ids[0]} to {ids[-1]}", gaps)

  def problems_of(self, n: int, key: str) -> None:
    if n:
      self.problems.add(key, count=n)

  def say_kind(self, x: Any) -> None:
    if not isinstance(x, int):
      self.problems.add("id_kind", x)

  # *** pictures ***

  def images(self) -> None:
    entries = [i for i in self.data.images if isinstance(i, dict)]
    self.problems_of(len(self.data.images) - len(entries), "image_id")
    self.out.listed = len(self.data.images)
    folder = self.data.folder
    named = [i for i in entries if isinstance(i.get("file_name"), str) and i["file_name"].strip("\0 ")]
    outside = [i["file_name"] for i in named if "\0" in i["file_name"] or inside(folder, i["file_name"]) is None]
    if outside and not self.fix:
      raise UserError(
        f"{self.data.path}: {len(outside)} file names lead out of {folder}, as {printable(outside[0], LONG)}; name the "
        "folder that holds all pictures with --images, or leave these out with --fix"
      )
    self.picture: dict[str, Picture | None] = {}
    numbers = Numbers([k for i in entries if (k := ident(i.get("id"))) is not None])
    by_name: dict[str, Picture | None] = {}
    by_digest: dict[bytes, Picture] = {}
    for i in tqdm(entries, desc="check", unit="picture", leave=False):
      key, name = ident(i.get("id")), i.get("file_name")
      if key is None:
        self.problems.add("image_id", name or "")
        continue
      if key in self.picture:
        self.problems.add("image_id_twice", f"{key} ({name})")
        continue
      self.say_kind(i["id"])
      self.picture[key] = None
      if not isinstance(name, str) or not name.strip("\0 "):
        self.problems.add("image_name", key)
        continue
      if name in by_name:
        self.problems.add("image_name_twice", name)
        self.picture[key] = by_name[name]
        continue
      found = by_name[name] = self.look_at(name, {**i, "id": numbers.of(key)})
      if found is None:
        continue
      if (first := by_digest.setdefault(found.digest, found)) is not found:
        self.problems.add("image_same", f"{name} is {first.name}")
        by_name[name] = None
        continue
      self.picture[key] = found
      self.out.pictures.append(found)
    if not self.out.pictures:
      lines = self.problems.lines(True)
      raise UserError(f"{self.data.path}: no picture can be used; {'; '.join(lines[:3])}")

  def look_at(self, name: str, entry: dict[str, Any]) -> Picture | None:
    path = None if "\0" in name else inside(self.data.folder, name)
    if path is None:
      self.problems.add("image_outside", name)
      return None
    try:
      there = path.is_file()
    except OSError:  # too long a name
      there = False
    if not there:
      self.problems.add("image_missing", name)
      return None
    try:
      image = open_rgb(path)
      with open(ordinary(path), "rb") as f:
        digest = hashlib.file_digest(f, "sha256").digest()
    except (PictureError, OSError) as e:
      self.problems.add("image_unreadable", f"{name} ({e})")
      return None
    place = self.place(name, entry, path, image.width, image.height)
    if place is None:
      return None
    entry["width"], entry["height"] = image.size
    return Picture(entry, path, place, digest, bits_of(image))

  def place(self, name: str, entry: dict[str, Any], path: Path, w: int, h: int) -> Place | None:
    """How labels lie on the picture; None where that cannot be known."""
    try:
      width, height = (int(number(entry.get(k) or 0)) for k in ("width", "height"))
    except ValueError:
      width = height = 0
    if width <= 0 or height <= 0:
      self.problems.add("size_missing", name)
      return Place(w, h, w, h)
    said = f"{name}: {width}x{height}, the file {w}x{h}"
    if (width, height) == (w, h):
      return Place(w, h, w, h)
    if (width, height) == (h, w) and (turn := orientation(path)) in TURNS:
      self.problems.add("size_turned", said)
      return Place(width, height, w, h, turn)
    if same_size(width, height, Still(path, name, w, h)):
      self.problems.add("size_scaled", said)
      return Place(width, height, w, h)
    self.problems.add("size_wrong", said)
    return None

  # *** annotations ***

  def annotations(self) -> None:
    seen: set[bytes] = set()
    ids: set[int] = set()
    free = 1 + max(
      (n for a in self.data.annotations if isinstance(a, dict) and (n := own_id(a)) is not None), default=0
    )
    for a in tqdm(self.data.annotations, desc="labels", unit="label", leave=False):
      if not isinstance(a, dict):
        self.problems.add("annotation_other")
        continue
      known = ident(a.get("image_id"))
      if known is None or known not in self.picture:
        self.problems.add("annotation_no_picture", a.get("id", ""))
        continue
      picture = self.picture[known]
      if picture is None:
        self.problems.add("annotation_left_picture", a.get("id", ""))
        continue
      category = self.category.get(ident(a.get("category_id")) or "")
      if category is None:
        self.problems.add("annotation_no_category", f"{a.get('id', '')} ({a.get('category_id')})")
        continue
      # the same label, whatever its own id
      what = json.dumps([picture.entry["id"], category, a.get("bbox"), a.get("segmentation")]).encode()
      digest = hashlib.blake2b(what, digest_size=16).digest()
      if digest in seen:
        self.problems.add("annotation_twice", a.get("id", ""))
        continue
      seen.add(digest)
      made = self.mend(a, picture)
      if made is None:
        continue
      number_ = own_id(a)
      if number_ is None or number_ in ids or number_ == 0:
        self.problems.add("annotation_id_zero" if number_ == 0 else "annotation_id", printable(a.get("id"), 40))
        number_, free = free, free + 1
      ids.add(number_)
      self.out.annotations.append(made | {"id": number_, "image_id": picture.entry["id"], "category_id": category})
    if not self.out.annotations:
      lines = self.problems.lines(True)
      raise UserError(f"{self.data.path}: no annotation can be used; {'; '.join(lines[:3])}")

  def mend(self, a: dict[str, Any], picture: Picture) -> dict[str, Any] | None:
    """-> the annotation in the picture as it is shown, with box and area; None where nothing of it can be used."""
    where = f"{a.get('id', '')} on {picture.name}"
    place, crowd = picture.place, is_crowd(a)
    shape = self.shape(a.get("segmentation"), place, where)
    given = self.box(a.get("bbox"), place, where)
    if shape is not None and not (area := area_of(shape, place.w, place.h)):
      self.problems.add("mask_empty", where)
      shape = None
    if crowd:
      self.problems.add("crowd", where)
    if shape is None and given is None:
      self.problems.add("annotation_empty", where)
      return None
    tight = tight_box(shape) if shape is not None else None
    box = given
    if tight is not None and given is None:
      box = tight
    elif tight is not None and given is not None and not contains(given, tight):
      self.problems.add("box_not_around_mask", where)
      box = tight
    assert box is not None
    out = {k: v for k, v in a.items() if k not in ("segmentation", "bbox", "area")}
    if not place.same:  # they are not turned or scaled
      for k in ("keypoints", "num_keypoints"):
        out.pop(k, None)
    x0, y0, x1, y1 = box
    out["bbox"] = [round(v, 3) for v in (x0, y0, x1 - x0, y1 - y0)]
    out["iscrowd"] = int(crowd)
    if isinstance(shape, dict):
      out["segmentation"] = shape
    elif shape is not None:
      out["segmentation"] = [p.round(3).ravel().tolist() for p in shape]
    out["area"] = round(area if shape is not None else (x1 - x0) * (y1 - y0), 3)
    self.count(a, given, shape, crowd)
    return out

  def count(self, a: dict[str, Any], given: Any, shape: Shape | None, crowd: bool) -> None:
    o = self.out
    o.crowds += crowd
    o.keypoints += "keypoints" in a
    o.boxes += given is not None
    o.masks += shape is not None
    o.both += given is not None and shape is not None
    o.made_boxes += given is None

  def shape(self, said: Any, place: Place, where: str) -> Shape | None:
    if not said:
      return None
    try:
      if isinstance(said, dict):
        return place.runs(runs_of(said, place.width, place.height))
      if isinstance(said, list) and all(isinstance(v, (int, float)) for v in said):
        self.problems.add("polygon_flat", where)
        said = [said]
      found = polygons_of(said)
    except (ValueError, TypeError, KeyError, AttributeError, UserError):
      self.problems.add("mask_wrong", where)
      return None
    if short := len(said) - len(found):
      self.problems.add("polygon_short", where, short)
    placed = [place.points(p) for p in found]
    inner = [cut(p, place.w, place.h) for p in placed]
    if any(np.abs(p - q).max() > EDGE for p, q in zip(placed, inner, strict=True)):
      self.problems.add("polygon_beyond", where)
    if perimeter(inner) > LONGEST:
      self.problems.add("mask_wrong", where)
      return None
    return inner or None

  def box(self, said: Any, place: Place, where: str) -> tuple[float, float, float, float] | None:
    """x0 y0 x1 y1 in the picture, cut at its edge."""
    if said is None or said == []:
      return None
    try:
      x, y, w, h = (number(v) for v in said)
    except (ValueError, TypeError):
      self.problems.add("box_wrong", where)
      return None
    if w <= 0 or h <= 0:
      self.problems.add("box_empty", where)
      return None
    x0, y0, x1, y1 = placed = place.box((x, y, x + w, y + h))
    cut_ = max(x0, 0.0), max(y0, 0.0), min(x1, float(place.w)), min(y1, float(place.h))
    if cut_[2] <= cut_[0] or cut_[3] <= cut_[1]:
      self.problems.add("box_outside", where)
      return None
    if max(abs(p - q) for p, q in zip(placed, cut_, strict=True)) > EDGE:
      self.problems.add("box_beyond", where)
    return cut_

  def same_pictures(self) -> None:
    found = self.out.pictures
    self.out.alike = alike([p.bits for p in found])
    for i, j in self.out.alike:
      self.problems.add("image_alike", f"{found[j].name} and {found[i].name}")


def own_id(a: dict[str, Any]) -> int | None:
  text = ident(a.get("id"))
  return None if text is None else whole(text)


def contains(box: tuple[float, ...], mask: tuple[float, ...]) -> bool:
  """Both x0 y0 x1 y1; a box that is a little too small counts as around its mask."""
  dx, dy = (max(SLACK[0], SLACK[1] * (box[i + 2] - box[i])) for i in (0, 1))
  return box[0] - dx <= mask[0] and box[1] - dy <= mask[1] and mask[2] <= box[2] + dx and mask[3] <= box[3] + dy

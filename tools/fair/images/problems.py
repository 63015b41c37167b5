"""What labeled pictures have wrong: each kind is counted, and the first few are named."""

from dataclasses import dataclass, field
from typing import Any

from openpilot.tools.lib.errors import printable

SHOWN = 5
LEFT_OUT, KEPT = "left out", "kept"

# key -> what it is, and what a mended copy does with it
KINDS: dict[str, tuple[str, str]] = {
  "image_id": ("pictures without an id, or with one that is neither a number nor text", LEFT_OUT),
  "image_id_twice": ("pictures whose id another one has", LEFT_OUT),
  "image_name": ("pictures without a file name", LEFT_OUT),
  "image_name_twice": ("pictures listed twice under one file name", "put together"),
  "image_outside": ("file names that lead out of the pictures' folder", LEFT_OUT),
  "image_missing": ("pictures whose file is missing", LEFT_OUT),
  "image_unreadable": ("pictures whose file cannot be read", LEFT_OUT),
  "image_same": ("pictures that are the same file as another, byte for byte", LEFT_OUT),
  "image_alike": ("pictures that look like another", "kept, in one part of a split"),
  "size_missing": ("pictures without width and height", "taken from the file"),
  "size_turned": ("pictures labeled as they were before EXIF turns them", "labels turned with them"),
  "size_scaled": ("pictures labeled at another size", "labels scaled"),
  "size_wrong": ("pictures labeled at a size of other proportions", LEFT_OUT),
  "category_id": ("categories without a name, or without an id that is a number or text", LEFT_OUT),
  "category_id_twice": ("categories whose id another one has", LEFT_OUT),
  "category_name_twice": ("categories of the same name", "put together"),
  "category_name_alike": ("categories that case, '_', '-' or blanks alone tell apart, which no student can", KEPT),
  "category_gap": ("numbers that category ids skip", KEPT),
  "category_unused": ("categories without a label", KEPT),
  "id_kind": ("ids that are text or fractions", "made whole numbers"),
  "annotation_id": ("annotations without an id of their own that is a whole number", "numbered anew"),
  "annotation_id_zero": ("annotations with the id 0, which COCO's evaluation takes for no match", "numbered anew"),
  "annotation_no_picture": ("annotations of no picture", LEFT_OUT),
  "annotation_left_picture": ("annotations of pictures that are left out", LEFT_OUT),
  "annotation_no_category": ("annotations of no category", LEFT_OUT),
  "annotation_twice": ("annotations that are there twice", LEFT_OUT),
  "annotation_empty": ("annotations without a box or mask that can be used", LEFT_OUT),
  "annotation_other": ("entries that are no annotation", LEFT_OUT),
  "box_wrong": ("boxes that are not four numbers", "made from the mask, or left out"),
  "box_empty": ("boxes without width or height", "made from the mask, or left out"),
  "box_outside": ("boxes outside their picture", "made from the mask, or left out"),
  "box_beyond": ("boxes that reach beyond their picture", "cut at its edge"),
  "box_not_around_mask": ("boxes that do not contain their mask", "made from the mask"),
  "polygon_short": ("polygons of fewer than three points", LEFT_OUT),
  "polygon_flat": ("polygons that are not in a list", "put into one"),
  "polygon_beyond": ("masks with points beyond their picture", "cut at its edge"),
  "mask_wrong": ("masks that are none, or of another size than their picture", LEFT_OUT),
  "mask_empty": ("masks that cover no pixel", LEFT_OUT),
  "crowd": ("crowds, which nothing learns from", KEPT),
  "yolo_lines": ("lines of YOLO labels that cannot be used", LEFT_OUT),
  "dota_lines": ("lines of DOTA labels that cannot be used", LEFT_OUT),
  "dota_no_labels": ("pictures without a DOTA file of labels, taken as empty", KEPT),
  "yolo_no_labels": ("pictures without a YOLO file of labels, taken as empty", KEPT),
}


@dataclass
class Problem:
  count: int = 0
  examples: list[str] = field(default_factory=list)  # the first few


class Problems:
  def __init__(self) -> None:
    self.found: dict[str, Problem] = {}

  def add(self, key: str, example: Any = "", count: int = 1) -> None:
    assert key in KINDS
    p = self.found.setdefault(key, Problem())
    p.count += count
    if len(p.examples) < SHOWN and example != "":
      p.examples.append(printable(example, 80))

  def count(self, key: str) -> int:
    return self.found[key].count if key in self.found else 0

  def lines(self, mended: bool) -> list[str]:
    """One of each kind, in KINDS' order. mended: what was done, else what --fix does."""
    out = []
    for key, (what, mend) in KINDS.items():
      if (p := self.found.get(key)) is None:
        continue
      names = f": {', '.join(p.examples)}{', ...' if p.count > len(p.examples) else ''}" if p.examples else ""
      out.append(f"{p.count} {what}{names} [{'' if mended or mend.startswith(KEPT) else '--fix: '}{mend}]")
    return out

  def to_dict(self) -> dict[str, Any]:
    return {
      k: {"count": self.found[k].count, "what": what, "mend": mend, "first": self.found[k].examples}
      for k, (what, mend) in KINDS.items()
      if k in self.found
    }

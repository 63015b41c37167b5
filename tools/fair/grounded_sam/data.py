"""Labeled pictures for tuning: what is there, checked afresh every time, and the pictures of each step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from openpilot.tools.fair.images.check import Check, Picture
from openpilot.tools.fair.images.dataset import inspect_dataset, open_dataset
from openpilot.tools.fair.images.report import NOT_STATED, settle_licenses
from openpilot.tools.fair.images.shapes import runs_bytes
from openpilot.tools.fair.teacher import hash_weights
from openpilot.tools.lib.errors import UserError, printable, warn
from openpilot.tools.lib.pictures import read_rgb


@dataclass
class Example:
  """One picture. rgb: (3, H, W) uint8; boxes (K, 4) float64 x0 y0 x1 y1 in pixels from its corner; classes (K,) int64;
  masks (K, H, W) bool, where they were asked for."""

  name: str
  rgb: np.ndarray
  boxes: np.ndarray
  classes: np.ndarray
  masks: np.ndarray | None = None


@dataclass
class LabeledPictures:
  """path: of the annotations. info: as inspect_dataset has it, of what can be used. licenses: {name: pictures}."""

  path: Path
  names: tuple[str, ...]
  mapping: dict[int, str]
  pictures: list[Picture]
  labels: list[list[dict[str, Any]]]  # of each picture, mended; without crowds
  info: dict[str, Any]
  licenses: dict[str, int]
  crowds: int = 0

  def __len__(self) -> int:
    return len(self.pictures)

  def summary(self) -> dict[str, Any]:
    """For metadata.json: no folder of this machine."""
    count = sum(map(len, self.labels))
    return {"file": self.path.name, "sha256": hash_weights(self.path), "pictures": len(self), "annotations": count}

  def example(
    self, i: int, masks: bool = False, most: int | None = None, pick: np.random.Generator | None = None
  ) -> Example:
    """most: labels; of more, `pick` draws some. masks: those that have one alone are drawn."""
    picture, labels = self.pictures[i], self.labels[i]
    rgb = np.ascontiguousarray(read_rgb(picture.path).transpose(2, 0, 1))
    if masks:
      labels = [a for a in labels if a.get("segmentation")]
    if most is not None and len(labels) > most:
      rows = np.arange(most) if pick is None else np.sort(pick.choice(len(labels), most, replace=False))
      labels = [labels[k] for k in rows]
    box = np.array([a["bbox"] for a in labels], np.float64).reshape(-1, 4)
    boxes = np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], 1)
    index = {c: k for k, c in enumerate(self.mapping)}
    classes = np.array([index[a["category_id"]] for a in labels], np.int64)
    found = Example(picture.name, rgb, boxes, classes)
    if masks:
      found.masks = (
        np.stack([mask_of(a, *rgb.shape[1:]) for a in labels]) if labels else np.zeros((0, *rgb.shape[1:]), bool)
      )
    return found


def mask_of(a: dict[str, Any], height: int, width: int) -> np.ndarray:
  said = a["segmentation"]
  shape = said if isinstance(said, dict) else [np.array(p).reshape(-1, 2) for p in said]
  return coco_mask.decode(runs_bytes(shape, width, height)).astype(bool)


def read_pictures(path: Path, images: Path | None, like: "LabeledPictures | None" = None) -> LabeledPictures:
  """like: the pictures that are learned from; those here must have no class besides. Raises UserError, also where masks
  are of another size than their picture."""
  data = open_dataset(path, images)
  found = Check(data).run()
  licenses = settle_licenses(found, "")
  problems = data.problems
  if n := problems.count("mask_wrong"):
    raise UserError(
      f"{path}: {n} masks are none, or of another size than their picture, as "
      f"{problems.found['mask_wrong'].examples[0]}; mend them: `tools/op.sh images validate --fix`"
    )
  if lines := problems.lines(True):
    warn(f"{path}: {len(lines)} kinds of problems, the first: {lines[0]}; `tools/op.sh images validate` lists them")
  used = {a["category_id"] for a in found.annotations if not a["iscrowd"]}
  mapping = {c["id"]: c["name"] for c in found.categories}
  if like is None:
    if unused := [n for k, n in mapping.items() if k not in used]:
      warn(f"{path}: no label of {', '.join(unused[:8])}, which Grounding DINO is asked for all the same")
  else:
    known = {n: k for k, n in like.mapping.items()}
    if other := sorted({mapping[k] for k in used} - set(known)):
      raise UserError(
        f"{path} has classes that {like.path} has not: {', '.join(map(str, other[:5]))}; give both the same"
      )
    for a in found.annotations:
      a["category_id"] = known.get(mapping[a["category_id"]], -1)
    mapping = like.mapping
  by_picture = found.by_picture()
  labels = [[a for a in by_picture[p.entry["id"]] if not a["iscrowd"]] for p in found.pictures]
  if not any(labels):
    raise UserError(f"{path}: no annotation can be learned from; all are of crowds")
  info = inspect_dataset({"images": found.pictures, "annotations": found.annotations, "categories": found.categories})
  info |= {"has_boxes": found.boxes > 0, "has_masks": found.masks > 0, "has_keypoints": found.keypoints > 0}
  info |= {"class_mapping": dict(mapping), "num_classes": len(mapping)}
  if found.crowds:
    warn(f"{path}: {found.crowds} annotations are of crowds, which nothing learns from")
  stated = {k: n for k, n in licenses.items() if k != NOT_STATED}
  return LabeledPictures(
    data.path, tuple(mapping.values()), mapping, found.pictures, labels, info, stated, found.crowds
  )


def flipped(e: Example) -> Example:
  """Left and right exchanged."""
  w = e.rgb.shape[2]
  boxes = e.boxes[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [w, 0, w, 0]
  masks = None if e.masks is None else np.ascontiguousarray(e.masks[:, :, ::-1])
  return Example(e.name, np.ascontiguousarray(e.rgb[:, :, ::-1]), boxes, e.classes, masks)


def jittered(boxes: np.ndarray, share: float, size: Sequence[int], random: np.random.Generator) -> np.ndarray:
  """Boxes as a detector would give them: each edge moved by a normal of `share` of the side, at most twice that, within
  the picture (height, width)."""
  side = np.concatenate([boxes[:, 2:] - boxes[:, :2]] * 2, 1)
  move = np.clip(random.normal(0, share, boxes.shape), -2 * share, 2 * share) * side
  low, high = boxes + move, np.array([size[1], size[0]] * 2, np.float64)
  out = np.clip(low, 0, high)
  whole = (out[:, 2] - out[:, 0] >= 1) & (out[:, 3] - out[:, 1] >= 1)
  return np.where(whole[:, None], out, boxes)


def steps_of(count: int, size: int, first: int, stop: int, seed: int) -> Iterator[np.ndarray]:
  """Steps first to stop: `size` of `count` pictures each, all once an epoch in an order of its own; the last of an
  epoch may be fewer."""
  per = -(-count // size)
  for step in range(first, stop):
    epoch, at = divmod(step, per)
    order = np.random.default_rng([seed, epoch]).permutation(count)
    yield order[at * size : (at + 1) * size]


def joint_license(licenses: dict[str, int]) -> str:
  """Of what learns from the pictures: those of their licenses that restrict use, as `import` joins them."""
  from openpilot.tools.fair.teacher import LICENSES

  restricts = sorted(k for k in licenses if not LICENSES.get(k, False))
  return printable(" and ".join(restricts), 200)

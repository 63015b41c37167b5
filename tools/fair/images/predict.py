"""A student at work on pictures of any size: letterboxed, run, decoded by the device's own code, and put back into the
picture's pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from openpilot.selfdrive.modeld.fair.bundle import Bundle, load_bundle
from openpilot.selfdrive.modeld.fair.heads import HEADS
from openpilot.selfdrive.modeld.fair.plan import plan_heads
from openpilot.selfdrive.modeld.fair.heads.ground import DEFAULT_HEIGHT
from openpilot.selfdrive.modeld.fair.heads.oriented import upright
from openpilot.tools.replay.runner import named_runner
from openpilot.tools.fair.detr.experiment import is_detr
from openpilot.tools.fair.grounded_sam.experiment import is_experiment
from openpilot.tools.fair.images.tiles import OVERLAP, check_tiles, merged, windows
from openpilot.tools.fair.labels.placement import place_input
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.rotated import outline
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.lib.errors import UserError

FINDERS = ("objects", "detector", "oriented")  # heads that find objects, the first that is there is asked
LOW = 0.01  # score that average precision wants


@dataclass
class Found:
  """Of one picture. boxes (N, 4) float32 x0 y0 x1 y1, pixels counted from the picture's corner; scores (N,) falling;
  classes (N,) int64; masks: COCO run lengths of the whole picture, or None where the student makes none; oriented
  (N, 5) cx, cy, w, h, angle counted from the corner too, where the student makes these: boxes are then around them, cut
  at the picture's edge."""

  boxes: np.ndarray
  scores: np.ndarray
  classes: np.ndarray
  size: tuple[int, int]  # width, height
  masks: list[str] | None = None
  oriented: np.ndarray | None = None


def find_bundle(path: Path) -> Path:
  """A bundle's folder, one of its files, or a student's folder that holds one bundle. Raises UserError."""
  if path.is_file():
    path = path.parent
  if (path / "manifest.json").is_file():
    return path
  if not path.is_dir():
    raise UserError(f"there is no {path}; give a bundle's folder, or what `images train-student` wrote")
  inside = sorted(p.parent for p in path.glob("*/manifest.json"))
  if len(inside) != 1:
    more = f"{len(inside)} bundles: {', '.join(p.name for p in inside)}; name one" if inside else "no bundle"
    hint = "" if inside else ": make one with `tools/op.sh export`"
    if is_detr(path) or is_experiment(path):
      hint = ": it is a teacher, for `label --teachers` and `images train-student --teacher-dir`"
    raise UserError(f"{path} holds {more}{hint}")
  return inside[0]


class Predictor:
  """predictor(pictures) -> Found of each. Raises BundleError where the bundle cannot be run, UserError where nothing in
  it finds objects. runner: one of RUNNERS. score: below which nothing is told. tile: side of the overlapping tiles that
  large pictures are shown in, of oriented boxes; 0: pictures are shown whole."""

  def __init__(
    self, path: Path, score: float = LOW, threads: int = 1, runner: str = "onnx", tile: int = 0, overlap: int = OVERLAP
  ):
    check_tiles(tile, overlap)
    self.tile, self.overlap = tile, overlap
    self.path, self.score = find_bundle(path), score
    self.bundle: Bundle = load_bundle(self.path)
    self.spec = InputSpec.from_dict(self.bundle.manifest.get("input"))
    self.graph, self.head, self.parts = self._choose()
    if tile and self.head != "oriented":
      raise UserError(f"--tile is of oriented boxes, and {self.path} makes none")
    specs = dict(self.parts)
    first = HEADS[self.head].classes
    self.names: list[str] = list(specs[first]["classes"])
    specs[first] = {**specs[first], "parameters": {**specs[first].get("parameters", {}), "threshold": score}}
    self.specs = specs
    self.mask_part = next((p for p in ("proto", "masks") if p in specs), None)
    self.has_masks = self.mask_part is not None
    if path.suffix == ".tflite" and runner == "onnx":  # named itself, not its bundle
      runner = next((v["target"] for v in self.graph.get("variants", []) if v["file"] == path.name), runner)
    self.runner = named_runner(runner, self.bundle, self.graph, threads)
    self.rest = {
      i["name"]: np.zeros(i["shape"], i["dtype"]) for i in self.graph["inputs"] if i["name"] != "frame"
    }  # of a unified student's tracker, which is not asked

  def _choose(self) -> tuple[dict[str, Any], str, dict[str, dict[str, Any]]]:
    for head in FINDERS:
      for graph in self.bundle.graphs:
        heads = plan_heads(f"{self.path}: graph '{graph['name']}'", graph)
        if head in heads:
          return graph, head, heads[head]
    raise UserError(f"{self.path} finds no objects: it has no output of the heads {', '.join(FINDERS)}")

  def frame(self, rgb: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 -> what the graph takes, without the batch."""
    return place_input(rgb, self.spec)

  def run(self, frame: np.ndarray) -> dict[str, np.ndarray]:
    """One frame -> the graph's outputs, which the next call overwrites."""
    return self.runner.run({**self.rest, "frame": np.ascontiguousarray(frame)[None]})

  def __call__(self, pictures: Sequence[np.ndarray]) -> list[Found]:
    return [self.in_tiles(p) if self.tile else self.whole(p) for p in pictures]

  def whole(self, rgb: np.ndarray) -> Found:
    return self.decode(self.run(self.frame(rgb)), (rgb.shape[1], rgb.shape[0]))

  def in_tiles(self, rgb: np.ndarray) -> Found:
    """What is found in the tiles, each thing once."""
    size = (rgb.shape[1], rgb.shape[0])
    places = windows(*size, self.tile, self.overlap)
    each = [self.whole(np.ascontiguousarray(rgb[y : y + h, x : x + w])) for x, y, w, h in places]
    boxes = zip([f.oriented for f in each if f.oriented is not None], places, strict=True)
    turned = np.concatenate([b + [x, y, 0, 0, 0] for b, (x, y, _, _) in boxes])
    scores, classes = (np.concatenate([getattr(f, k) for f in each]) for k in ("scores", "classes"))
    keep = merged(turned, scores, classes)
    return Found(around(turned[keep], size), scores[keep], classes[keep], size, oriented=turned[keep])

  def decode(self, out: dict[str, np.ndarray], size: tuple[int, int]) -> Found:
    """size: (width, height) of the picture."""
    raw = {part: out[spec["name"]] for part, spec in self.specs.items()}
    if bad := [k for k, v in raw.items() if v.dtype.kind == "f" and not np.isfinite(v).all()]:
      raise UserError(f"{self.path} puts out NaN or Inf in {', '.join(bad)}; export a checkpoint that is sound")
    if self.mask_part is not None:  # finer: a mask's edge then is of the input's pixels, not of four
      raw[self.mask_part] = enlarged(raw[self.mask_part][0], self.spec.width, self.spec.height)[None]
    valid = self.spec.covered(*size)
    found = HEADS[self.head].decode(raw, self.specs, valid, DEFAULT_HEIGHT)
    matrix = self.spec.fit(*size)
    scale, shift = np.diag(matrix)[:2], matrix[:2, 2]
    if self.head == "oriented":
      turned = found.boxes.astype(np.float64)
      turned[:, :2] = (turned[:, :2] - shift) / scale + 0.5
      turned[:, 2:4] /= scale  # alike in both directions: pictures are letterboxed
      return Found(around(turned, size), found.scores, found.class_ids, size, oriented=turned)
    boxes = ((found.boxes.reshape(-1, 2, 2) - shift) / scale).reshape(-1, 4) + 0.5
    boxes = np.clip(boxes, 0, [size[0], size[1]] * 2).astype(np.float32)
    masks = None
    if found.masks is not None:
      masks = [self.to_picture(m, size, scale) for m in found.masks]
    return Found(boxes, found.scores, found.class_ids, size, masks)

  def to_picture(self, mask: np.ndarray, size: tuple[int, int], scale: np.ndarray) -> str:
    """(height, width) bool of the input -> run lengths of the picture."""
    w, h = size
    m = np.array([[1 / scale[0], 0, 0.5 / scale[0] - 0.5], [0, 1 / scale[1], 0.5 / scale[1] - 0.5]])
    moved = cv2.warpAffine(mask.astype(np.float32), m, (w, h), flags=cv2.INTER_LINEAR)
    return rle.encode((moved >= 0.5)[None])[0]

  @property
  def hash(self) -> str:
    return self.bundle.manifest_hash


def around(turned: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """(N, 5) -> (N, 4) float32 upright boxes, cut at the picture's edge."""
  return np.clip(upright(turned), 0, [size[0], size[1]] * 2).astype(np.float32)


def enlarged(proto: np.ndarray, width: int, height: int) -> np.ndarray:
  """(P, h, w) -> (P, height, width), bilinear between pixels' centers."""
  return np.stack([cv2.resize(p, (width, height), interpolation=cv2.INTER_LINEAR) for p in proto])


def coco_rows(found: Found, image: int, categories: Sequence[int], first: int = 1) -> list[dict[str, Any]]:
  """COCO's results of one picture. categories: id of each of the student's classes."""
  w, h = found.size
  out: list[dict[str, Any]] = []
  for i in range(len(found.scores)):
    x0, y0, x1, y1 = (float(v) for v in found.boxes[i])
    row = {
      "id": first + i,
      "image_id": image,
      "category_id": categories[int(found.classes[i])],
      "bbox": [round(v, 3) for v in (x0, y0, x1 - x0, y1 - y0)],
      "score": round(float(found.scores[i]), 5),
    }
    if found.oriented is not None:  # segmentation is what COCO's own tools draw
      row["obb"] = [round(float(v), 5) for v in found.oriented[i]]
      row["segmentation"] = [[round(v, 3) for v in outline(found.oriented[i : i + 1])[0]]]
    if found.masks is not None:
      row["segmentation"] = {"size": [h, w], "counts": found.masks[i]}
    out.append(row)
  return out

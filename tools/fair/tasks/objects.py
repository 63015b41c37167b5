"""Objects at their centers: boxes, masks, identities.

Batch, shared with the detector: objects, a list of B dicts: boxes (M, 4) x0 y0 x1 y1, cls, track (M,) int64, score (M,)
float32, mask (M, H / 4, W / 4) float32 or None, ignore (N, 4) boxes of which nobody knows what they are, known (K,)
bool: classes of which it is known where they are not; or None: not labeled."""

from typing import Any

import cv2
import numpy as np

from openpilot.selfdrive.modeld.fair.heads.objects import box_iou
from openpilot.tools.fair.distillation.augment import Augmentation, warp_boxes, warp_grid
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.spec import UNKNOWN, ClassSet, StudentSpec, plain
from openpilot.tools.fair.tasks.task import Batch, Outputs, Said, Targets, Task, names_of, speaks
from openpilot.tools.fair.teacher import Label

MIN_SIDE = 3.0  # view pixels: smaller boxes teach nothing
MIN_INSIDE = 0.3  # of a box's area that the augmented view must still hold
SAME = 0.8  # intersection over union
SCORES = "score"  # unit of boxes that are no objects, but all that a teacher scored: see logits.py


def teaches(label: Label, classes: ClassSet) -> bool:
  return (
    label.kind == "boxes" and label.unit != SCORES and speaks(names_of([label], classes, "boxes"), classes, "boxes")
  )


def doubles(boxes: np.ndarray, cls: np.ndarray, score: np.ndarray) -> np.ndarray:
  """(N,) bool: boxes of the same thing under two of the teacher's names, of which only one is left here, say car and
  truck: all but the best."""
  same = (box_iou(boxes, boxes) > SAME) & (cls[:, None] == cls)
  better = (score[None] > score[:, None]) | (
    (score[None] == score[:, None]) & (np.arange(len(score))[None] < np.arange(len(score))[:, None])
  )
  return (same & better).any(axis=1)


def moved_boxes(a: Augmentation, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(N, 4) -> (N, 4) of the augmented picture, cut at its border, and (N,) bool: whether enough is left to teach."""
  moved = warp_boxes(a, boxes) if a.is_geometric else boxes
  low, high = np.array([-0.5, -0.5]), np.array([a.picture.width - 0.5, a.picture.height - 0.5])
  cut = np.concatenate([np.clip(moved[:, :2], low, high), np.clip(moved[:, 2:], low, high)], axis=1)
  side = cut[:, 2:] - cut[:, :2]
  area = np.prod(np.maximum(moved[:, 2:] - moved[:, :2], 1e-6), axis=1)
  return cut, (side >= MIN_SIDE).all(axis=1) & (np.prod(side, axis=1) >= MIN_INSIDE * area)


def object_list(a: Augmentation, said: Said, table: dict[str, np.ndarray]) -> dict[str, Any]:
  """One frame's table of boxes -> what the losses take."""
  label, (h, w) = said.label, a.picture.map_shape
  cls = np.append(said.index, -1)[table["cls"].astype(int)]  # -1, of what the teacher has no name for, stays
  boxes = np.stack([table[k].astype(np.float64) for k in ("x0", "y0", "x1", "y1")], axis=1)
  cut, large = moved_boxes(a, boxes)
  side = cut[:, 2:] - cut[:, :2]
  unknown = [i for i, name in enumerate(label.classes) if plain(name) in UNKNOWN]
  ignore = np.isin(table["cls"].astype(int), unknown) & (side > 0).all(axis=1)
  keep = np.flatnonzero((cls >= 0) & large & ~doubles(boxes, cls, table["score"]))
  n = len(keep)
  track = table["track"][keep].astype(np.int64) if "track" in table else np.full(n, -1, np.int64)
  mask = None
  if "rle" in table and label.shape:
    mask = np.zeros((n, h, w), np.float32)
    for j, i in enumerate(keep):
      if table["rle"][i]:
        small = cv2.resize(
          rle.decode(str(table["rle"][i]), *label.shape[-2:]).astype(np.float32), (w, h), interpolation=cv2.INTER_AREA
        )
        mask[j] = warp_grid(a, small, True) > 0.4
  return {
    "boxes": cut[keep].astype(np.float32),
    "cls": cls[keep].astype(np.int64),
    "track": track,
    "score": table["score"][keep].astype(np.float32),
    "mask": mask,
    "ignore": cut[ignore].astype(np.float32),
    "known": said.tells(),
  }


def targets(said: Said, a: Augmentation, r: np.random.Generator) -> Targets:
  return {"objects": [None if x is None else object_list(a, said, x) for x in said.values]}


def labeled(batch: Batch) -> list[int]:
  """Frames of the batch of which it is known what is there."""
  return [i for i, o in enumerate(batch.get("objects", ())) if o is not None]


def counted(valid: Any, objects: list[Any]) -> Any:
  """valid (B, H / 4, W / 4) bool, a copy: not where a frame is not labeled, nor inside a box of which nobody knows what
  it is, but for what lies in a known one."""
  out = valid.clone()
  for i, o in enumerate(objects):
    if o is None:
      out[i] = False
      continue
    for key in ("ignore", "boxes"):
      for x0, y0, x1, y1 in ((o.get(key, o["boxes"][:0]) + 0.5) / 4).round().int().tolist():
        out[i, y0:y1, x0:x1] = valid[i, y0:y1, x0:x1] if key == "boxes" else False
  return out


def loss(model: Any, out: Outputs, batch: Batch) -> dict[str, Any]:
  from openpilot.tools.fair.distillation.matching import objects_loss

  some, objects = labeled(batch), batch.get("objects", ())
  if not some:
    return {}
  nothing = {k: (None if v is None else v[:0]) for k, v in objects[some[0]].items()}
  counts = counted(batch["valid"], objects)
  return objects_loss(out, [nothing if o is None else o for o in objects], counts, batch["clip"])


def sketch_boxes(
  rgb: np.ndarray, i: int, batch: Batch, out: dict[str, np.ndarray], spec: StudentSpec, head: str
) -> list[np.ndarray]:
  """What a head finds in frame i, by the code of the device."""
  from openpilot.selfdrive.modeld.fair.heads import HEADS
  from openpilot.selfdrive.modeld.fair.heads.ground import DEFAULT_HEIGHT
  from openpilot.tools.fair.distillation.sketches import boxes_on

  everywhere = np.ones((spec.input.height, spec.input.width), bool)
  first = HEADS[head].classes
  parts = {k.removeprefix(f"{head}_"): v[i : i + 1] for k, v in out.items() if k.startswith(f"{head}_")}
  raw = {k: v for k, v in parts.items() if k in ("heat", "box", "logits", "boxes")}
  # boxes in pixels: the camera's height does not matter
  found = HEADS[head].decode(raw, {first: {"classes": list(spec.classes.boxes)}}, everywhere, DEFAULT_HEIGHT)
  return [boxes_on(rgb, found.boxes, found.class_ids, spec.classes)]


def sketch_truth(rgb: np.ndarray, i: int, batch: Batch, spec: StudentSpec) -> list[np.ndarray]:
  from openpilot.tools.fair.distillation.sketches import boxes_on

  truth = batch["objects"][i] if batch.get("objects") else None
  if truth is None:
    return []
  return [boxes_on(rgb, truth["boxes"].numpy(), truth["cls"].numpy(), spec.classes)]


def sketch(rgb: np.ndarray, i: int, batch: Batch, out: dict[str, np.ndarray], spec: StudentSpec) -> list[np.ndarray]:
  return sketch_boxes(rgb, i, batch, out, spec, "objects") + sketch_truth(rgb, i, batch, spec)


TASK = Task(
  name="objects",
  head="objects",
  wanted="a teacher of boxes: yolox-nano, rtdetr-v2-r50, sam2.1-small, or simulator on simulated routes",
  kind="boxes",
  teaches=teaches,
  targets=targets,
  loss=loss,
  fills={"objects": None},
  outputs=("objects_",),
  taught_by={"objects_coef": ("mask", "dice"), "objects_proto": ("mask", "dice"), "objects_embed": ("embed",)},
  decode={
    f"objects_{part}": {
      "head": "objects",
      "parameters": {"part": part},
      **({"classes": "boxes"} if part == "heat" else {}),
    }
    for part in ("heat", "box", "coef", "proto", "embed")
  },
  clip=4,
  sketch=sketch,
  metric="openpilot.tools.fair.evaluation.groups:objects",
)

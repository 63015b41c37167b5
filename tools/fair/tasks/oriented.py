"""Oriented boxes at their centers.

Batch: oriented, a list of B dicts: boxes (M, 5) cx, cy, w, h, angle in pixels of the picture, cls (M,) int64, score
(M,) float32, upright (M, 4) the boxes around them, ignore (N, 4) upright boxes of which nobody knows what they are,
known as in tasks/objects.py; or None: not labeled."""

from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.heads.oriented import corners, le90, upright
from openpilot.tools.fair.distillation.augment import Augmentation, warp_points
from openpilot.tools.fair.labels.carried import ORIENTED
from openpilot.tools.fair.spec import UNKNOWN, ClassSet, StudentSpec, plain
from openpilot.tools.fair.tasks.objects import counted
from openpilot.tools.fair.tasks.task import Batch, Outputs, Said, Targets, Task, names_of, speaks
from openpilot.tools.fair.teacher import Label

MIN_SIDE = 2.0  # pixels of the shorter side: smaller ones teach nothing
LINE = 2  # pixels that are drawn


def teaches(label: Label, classes: ClassSet) -> bool:
  return (
    label.kind == "boxes" and label.name == "oriented" and speaks(names_of([label], classes, "boxes"), classes, "boxes")
  )


def moved(a: Augmentation, boxes: np.ndarray) -> np.ndarray:
  """(N, 5) -> of the augmented picture, which is turned, mirrored and scaled alike in both directions."""
  p = warp_points(a, corners(boxes)) if a.is_geometric else corners(boxes)
  along, across = p[:, 1] - p[:, 0], p[:, 3] - p[:, 0]
  sides = np.stack([np.hypot(*along.T), np.hypot(*across.T)], 1)
  return le90(np.column_stack([p.mean(1), sides, np.arctan2(along[:, 1], along[:, 0])]))


def oriented_list(a: Augmentation, said: Said, table: dict[str, np.ndarray]) -> dict[str, Any]:
  """One frame's table -> what the losses take. What lies partly outside with its center, or is too small, is neither
  there nor not."""
  number = table["cls"].astype(int)
  cls = np.append(said.index, -1)[number]
  boxes = moved(a, np.stack([table[k].astype(np.float64) for k in ORIENTED], axis=1))
  size = np.array([a.picture.width, a.picture.height])
  around = upright(boxes)
  cut = np.clip(around, -0.5, np.tile(size, 2) - 0.5)
  seen = (cut[:, 2:] > cut[:, :2]).all(1)
  inside = ((boxes[:, :2] > -0.5) & (boxes[:, :2] < size - 0.5)).all(1)
  unknown = np.isin(number, [i for i, name in enumerate(said.label.classes) if plain(name) in UNKNOWN])
  keep = (cls >= 0) & inside & (boxes[:, 3] >= MIN_SIDE)
  ignore = seen & ~keep & ((cls >= 0) | unknown)
  return {
    "boxes": boxes[keep].astype(np.float32),
    "cls": cls[keep].astype(np.int64),
    "score": table["score"][keep].astype(np.float32),
    "upright": cut[keep].astype(np.float32),
    "ignore": cut[ignore].astype(np.float32),
    "known": said.tells(),
  }


def targets(said: Said, a: Augmentation, r: np.random.Generator) -> Targets:
  return {"oriented": [None if x is None else oriented_list(a, said, x) for x in said.values]}


def loss(model: Any, out: Outputs, batch: Batch) -> dict[str, Any]:
  from openpilot.tools.fair.distillation.oriented import oriented_loss

  objects = batch.get("oriented", ())
  first = next((o for o in objects if o is not None), None)
  if first is None:
    return {}
  nothing = {k: v[:0] for k, v in first.items()}
  regions = [None if o is None else {"boxes": o["upright"], "ignore": o["ignore"]} for o in objects]
  return oriented_loss(out, [nothing if o is None else o for o in objects], counted(batch["valid"], regions))


def drawn(rgb: np.ndarray, boxes: np.ndarray, cls: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
  from PIL import Image, ImageDraw

  from openpilot.tools.lib.colors import name_color

  image = Image.fromarray(np.ascontiguousarray(rgb))
  d = ImageDraw.Draw(image)
  for p, k in zip(corners(boxes), cls.tolist(), strict=True):
    d.line([*map(tuple, p.tolist()), tuple(p[0].tolist())], fill=name_color(names[k]), width=LINE)
  return np.asarray(image)


def sketch(rgb: np.ndarray, i: int, batch: Batch, out: dict[str, np.ndarray], spec: StudentSpec) -> list[np.ndarray]:
  """What is found in frame i, by the code of the device, and what is there."""
  from openpilot.selfdrive.modeld.fair.heads import oriented

  names = spec.classes.boxes
  raw = {k: out[f"oriented_{k}"][i : i + 1] for k in ("heat", "box")}
  everywhere = np.ones((spec.input.height, spec.input.width), bool)
  found = oriented.decode(raw, {"heat": {"classes": list(names)}}, everywhere)
  pictures = [drawn(rgb, found.boxes, found.class_ids, names)]
  truth = batch["oriented"][i] if batch.get("oriented") else None
  if truth is not None:
    pictures.append(drawn(rgb, truth["boxes"].numpy(), truth["cls"].numpy(), names))
  return pictures


TASK = Task(
  name="oriented",
  head="oriented",
  wanted="oriented boxes: tools/op.sh images train-obb",
  kind="boxes",
  teaches=teaches,
  targets=targets,
  loss=loss,
  fills={"oriented": None},
  outputs=("oriented_",),
  decode={
    "oriented_heat": {"head": "oriented", "parameters": {"part": "heat"}, "classes": "boxes"},
    "oriented_box": {"head": "oriented", "parameters": {"part": "box"}},
  },
  metric="openpilot.tools.fair.evaluation.groups:oriented",
  sketch=sketch,
)

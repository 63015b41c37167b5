"""Clips to batches: labels as they are stored become what losses are given, after one augmentation of each clip.

A batch, with T consecutive frames of each clip, B = clips x T, clip-major; maps are (64, 128), their pixel i centered
on view pixel 4i + 1.5:
  frame          (B, 6, 128, 256) uint8
  clip           (B,) int64            which of the batch's clips a frame is of
  valid          (B, 64, 128) bool     inside the camera's image and the augmented picture
  depth          (B, 64, 128) float32  meters, or where `metric` (B,) is False inverse depth up to scale and shift; nan:
                 unknown
  segmentation   (B, 5, 64, 128) float32, segmentation_rest (B, 64, 128): probability of the classes that the teacher
                 does not name; all zero: unknown; segmentation_named (B, 5) bool: those that it names;
                 segmentation_soft (B,) bool: it says how sure it is
  features       (B, C, h, w) float32, nan: unknown
  objects        list of B dicts: boxes (M, 4) x0 y0 x1 y1, cls, track (M,) int64, score (M,) float32, mask (M, 64, 128)
                 float32 or None; or None: not labeled
  points         (clips, T, N, 2) float32, points_visible (clips, T, N) float32, points_known (clips, T, N) bool, of
                 tracks that start in the first frame
"""

from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch

from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W
from openpilot.selfdrive.modeld.fair.heads.objects import box_iou
from openpilot.tools.fair.distillation.augment import (
  NONE,
  Augmentation,
  draw,
  warp_boxes,
  warp_frame,
  warp_grid,
  warp_points,
)
from openpilot.tools.fair.distillation.data import NAMES, Clips, RawClip
from openpilot.tools.learn.handover import Collate, begin, handed_over
from openpilot.tools.fair.maps import classes_to_map, depth_of, depth_to_map, inverse_of
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.students.classes import OBJECTS, SEGMENTATION
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.errors import UserError
from openpilot.tools.sim.truth import MAP_H, MAP_W

Batch = dict[str, Any]
MIN_SIDE = 3.0  # view pixels: smaller boxes teach nothing
MIN_INSIDE = 0.3  # of a box's area that the augmented view must still hold
SLOTS = 128  # tracked points of a clip
# by so much inverse depth changes within half a cell where a surface ends; the road's own by less, to 140 m
EDGE = 0.25
SAME = 0.8  # intersection over union


def depth_map(a: Augmentation, label: Label, z: np.ndarray) -> np.ndarray:
  """-> (64, 128) float32 at the centers of the augmented view's cells, nan: unknown. Where a surface ends the nearer
  pixel's is taken, nothing in between."""
  if not a.is_geometric:
    return depth_to_map(z, label.unit)
  size, parts = (MAP_W, MAP_H), inverse_of(z, label.unit)
  (inverse, known), (nearest, sure) = ([warp_grid(a, x, linear, size=size) for x in parts] for linear in (True, False))
  ends = (sure > 0) & (np.abs(inverse - nearest * known) > EDGE * np.maximum(inverse, nearest * known))
  return depth_of(np.where(ends, nearest, inverse), np.where(ends, 1, known), label.unit) / (
    a.zoom if label.unit == "m" else 1.0
  )


def class_maps(a: Augmentation, labels: list[Label], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """-> (5, 64, 128), (64, 128) float32."""
  out, rest = np.zeros((len(SEGMENTATION), MAP_H, MAP_W), np.float32), np.zeros((MAP_H, MAP_W), np.float32)
  names = NAMES["segmentation_names"]
  if labels[0].unit == "class":
    x = warp_grid(a, classes_to_map(x, len(labels[0].classes)), False, 255)
    for k, name in enumerate(labels[0].classes):
      if name in names:
        out[SEGMENTATION.index(names[name])] += x == k
    return out, rest
  # one map for each class, made by a teacher that asks of each by itself: what is said later in the class list lies on
  # top of what is said earlier
  known = np.ones((MAP_H, MAP_W), np.float32)
  if a.is_geometric:
    known = warp_grid(a, known, True)
  at = sorted(range(len(labels)), key=lambda i: -SEGMENTATION.index(names[labels[i].name]))
  free = np.ones((MAP_H, MAP_W), np.float32)
  for i in at:
    p = cv2.resize(x[i].astype(np.float32), (MAP_W, MAP_H), interpolation=cv2.INTER_AREA)
    if not np.isfinite(p).all():  # a teacher says NaN: not known
      known = known * warp_grid(a, np.isfinite(p).astype(np.float32), True)
      p = np.nan_to_num(p, nan=0.0, posinf=0.0, neginf=0.0)
    p = warp_grid(a, p, True)
    out[SEGMENTATION.index(names[labels[i].name])] += p * free
    free = free * (1 - p)
  sure = known > 0.99
  return out * sure, free * sure


def doubles(boxes: np.ndarray, cls: np.ndarray, score: np.ndarray) -> np.ndarray:
  """(N,) bool: boxes of the same thing under two of the teacher's names, of which only one is left here, say car and
  truck: all but the best."""
  same = (box_iou(boxes, boxes) > SAME) & (cls[:, None] == cls)
  better = (score[None] > score[:, None]) | (
    (score[None] == score[:, None]) & (np.arange(len(score))[None] < np.arange(len(score))[:, None])
  )
  return (same & better).any(axis=1)


def named_classes(labels: list[Label]) -> np.ndarray:
  """(5,) bool: the classes of which a teacher speaks."""
  said = labels[0].classes if labels[0].unit == "class" else [x.name for x in labels]
  return np.isin(SEGMENTATION, [NAMES["segmentation_names"].get(n, "") for n in said])


def object_list(a: Augmentation, label: Label, table: dict[str, np.ndarray]) -> dict[str, Any]:
  names = NAMES["object_names"]
  to_class = np.array([OBJECTS.index(names[c]) if c in names else -1 for c in label.classes] or range(len(OBJECTS)))
  cls = to_class[table["cls"].astype(int)] if len(table["cls"]) else np.zeros(0, int)
  boxes = np.stack([table[k].astype(np.float64) for k in ("x0", "y0", "x1", "y1")], axis=1)
  moved = warp_boxes(a, boxes) if a.is_geometric else boxes
  low, high = np.array([-0.5, -0.5]), np.array([VIEW_W - 0.5, VIEW_H - 0.5])
  cut = np.concatenate([np.clip(moved[:, :2], low, high), np.clip(moved[:, 2:], low, high)], axis=1)
  side = cut[:, 2:] - cut[:, :2]
  area = np.prod(np.maximum(moved[:, 2:] - moved[:, :2], 1e-6), axis=1)
  good = (cls >= 0) & (side >= MIN_SIDE).all(axis=1) & (np.prod(side, axis=1) >= MIN_INSIDE * area)
  keep = np.flatnonzero(good & ~doubles(boxes, cls, table["score"]))
  n = len(keep)
  track = table["track"][keep].astype(np.int64) if "track" in table else np.full(n, -1, np.int64)
  mask = None
  if "rle" in table and label.shape:
    mask = np.zeros((n, MAP_H, MAP_W), np.float32)
    for j, i in enumerate(keep):
      if table["rle"][i]:
        small = cv2.resize(
          rle.decode(str(table["rle"][i]), *label.shape[-2:]).astype(np.float32),
          (MAP_W, MAP_H),
          interpolation=cv2.INTER_AREA,
        )
        mask[j] = warp_grid(a, small, True) > 0.4
  return {
    "boxes": torch.from_numpy(cut[keep].astype(np.float32)),
    "cls": torch.from_numpy(cls[keep].astype(np.int64)),
    "track": torch.from_numpy(track),
    "score": torch.from_numpy(table["score"][keep].astype(np.float32)),
    "mask": None if mask is None else torch.from_numpy(mask),
  }


def point_tracks(
  a: Augmentation, tables: list[dict[str, np.ndarray] | None], r: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Tracks that are visible in the first frame -> xy (T, SLOTS, 2), visible (T, SLOTS), known (T, SLOTS)."""
  steps = len(tables)
  xy, visible, known = (
    np.zeros((steps, SLOTS, 2), np.float32),
    np.zeros((steps, SLOTS), np.float32),
    np.zeros((steps, SLOTS), bool),
  )
  first = tables[0]
  if first is None:
    return xy, visible, known
  start = warp_points(a, np.stack([first["x"], first["y"]], axis=1).astype(np.float64))
  inside = (start >= 0).all(axis=1) & (start <= [VIEW_W - 1, VIEW_H - 1]).all(axis=1) & first["visible"].astype(bool)
  ids = first["track"][inside]
  ids = r.permutation(ids)[:SLOTS]
  slot = {int(t): k for k, t in enumerate(ids)}
  for t, table in enumerate(tables):
    if table is None:
      continue
    at = np.array([slot.get(int(k), -1) for k in table["track"]], int)
    rows = np.flatnonzero(at >= 0)
    p = warp_points(a, np.stack([table["x"][rows], table["y"][rows]], axis=1).astype(np.float64))
    xy[t, at[rows]] = p
    there = (p >= -0.5).all(axis=1) & (p <= [VIEW_W - 0.5, VIEW_H - 0.5]).all(axis=1)
    visible[t, at[rows]] = table["visible"][rows].astype(bool) & there
    known[t, at[rows]] = True
  return xy, visible, known


def convert(clip: RawClip, a: Augmentation, r: np.random.Generator) -> Batch:
  """One clip's part of a batch."""
  steps = len(clip.frames)
  whole = warp_grid(a, clip.valid[1::4, 1::4].astype(np.uint8), False).astype(bool)
  out: Batch = {
    "frame": torch.from_numpy(
      np.stack([warp_frame(a, f, t) for t, f in enumerate(clip.frames)]) if a is not NONE else clip.frames
    ),
    "valid": torch.from_numpy(np.repeat(whole[None], steps, 0)),
  }
  for task, said in clip.labels.items():
    labels = clip.meta[task]
    if task == "depth":
      maps = [np.full((MAP_H, MAP_W), np.nan, np.float32) if x is None else depth_map(a, labels[0], x) for x in said]
      out["depth"], out["metric"] = (
        torch.from_numpy(np.stack(maps).astype(np.float32)),
        torch.full((steps,), labels[0].unit == "m"),
      )
    elif task == "segmentation":
      nothing = np.zeros((len(SEGMENTATION), MAP_H, MAP_W), np.float32), np.zeros((MAP_H, MAP_W), np.float32)
      pairs = [nothing if x is None else class_maps(a, labels, x) for x in said]
      out["segmentation"], out["segmentation_rest"] = (torch.from_numpy(np.stack(x)) for x in zip(*pairs, strict=True))
      out["segmentation_soft"] = torch.full((steps,), labels[0].unit == "probability")
      out["segmentation_named"] = torch.from_numpy(np.repeat(named_classes(labels)[None], steps, 0))
    elif task == "features":
      shape = labels[0].shape[-3:]
      grids = [np.full(shape, np.nan, np.float32) if x is None else x.astype(np.float32).reshape(shape) for x in said]
      warped = [
        warp_grid(a, np.ascontiguousarray(g.transpose(1, 2, 0)), True, np.nan).transpose(2, 0, 1) for g in grids
      ]
      out["features"] = torch.from_numpy(np.stack(warped))
    elif task in ("objects", "detector"):
      out["objects"] = [None if x is None else object_list(a, labels[0], x) for x in said]
    elif task == "points":
      out["points"], out["points_visible"], out["points_known"] = (
        torch.from_numpy(x)[None] for x in point_tracks(a, said, r)
      )
  return out


def empty(task_key: str, like: Batch, steps: int, shape: Sequence[int] = ()) -> Any:
  """What stands for a label that a clip does not have."""
  if task_key == "objects":
    return [None] * steps
  x = like[task_key]
  n = 1 if task_key.startswith("points") else steps
  fill = torch.nan if task_key in ("depth", "features") else 0
  return torch.full((n, *x.shape[1:]), fill, dtype=x.dtype)


def collate(parts: list[Batch]) -> Batch:
  """Clips to a batch; what some of them lack is filled as unknown."""
  out: Batch = {}
  for key in dict.fromkeys(k for p in parts for k in p):
    like = next(p for p in parts if key in p)
    got = [p[key] if key in p else empty(key, like, len(p["frame"])) for p in parts]
    out[key] = [x for g in got for x in g] if key == "objects" else torch.cat(got)
  out["clip"] = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(p["frame"]) for p in parts]))
  return out


class Batches(torch.utils.data.Dataset):
  """For a DataLoader with batch_size=None, fed (step, clips, augmented) by the trainer's sampler: the same triple gives
  the same batch in any worker."""

  def __init__(self, clips: Clips, seed: int, mirror: bool):
    self.clips, self.seed, self.mirror = clips, seed, mirror

  def __getitem__(self, what: tuple[int, list[int], bool]) -> Batch:
    step, indices, augmented = what
    cv2.setNumThreads(1)  # its threads would fight the student's
    parts, names = [], []
    for j, i in enumerate(indices):
      r = np.random.default_rng([self.seed, step, j])
      clip = self.clips.read(int(i))
      parts.append(convert(clip, draw(r, self.mirror) if augmented else NONE, r))
      names.append(clip.name)
    return {**collate(parts), "step": step, "clips": list(map(int, indices)), "names": names}


class Carried(torch.utils.data.Dataset):
  """What is wrong comes out of a DataLoader's worker as a value: torch would put the worker's traceback into the
  message."""

  def __init__(self, data: Batches):
    self.data = data

  def __getitem__(self, what: tuple[int, list[int], bool]) -> Batch:
    try:
      return self.data[what]
    except UserError as e:
      return {"error": str(e)}


def load(data: Batches, what: list[tuple[int, list[int], bool]], workers: int) -> Iterator[Batch]:
  """data[w] for each of `what`, in order, by `workers` processes. Raises UserError as data does."""
  loader = torch.utils.data.DataLoader(
    Carried(data),
    batch_size=None,
    sampler=what,
    num_workers=workers,
    prefetch_factor=3 if workers else None,
    collate_fn=Collate(torch.utils.data.default_convert),
    worker_init_fn=begin,
  )
  for batch in handed_over(loader):
    if "error" in batch:
      raise UserError(batch["error"])
    yield batch

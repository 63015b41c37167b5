"""Objects: boxes, classes, masks and identity embeddings from a center-based student."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.heads.depth import map_centers, map_valid

MAX_OBJECTS = 50
THRESHOLD = 0.3  # where the manifest has none
NEAR = np.array([[-1], [0], [1]])
SAME_IOU, SAME_CELLS = 0.7, 2


@dataclass
class Detections:
  classes: list[str]
  boxes: np.ndarray  # (M, 4) float32 x0, y0, x1, y1, view pixels
  scores: np.ndarray  # (M,) float32, falling
  class_ids: np.ndarray  # (M,) int64, index into classes
  masks: np.ndarray | None  # (M, h, w) bool over the whole view
  embed: np.ndarray | None  # (M, E) float32 of length 1


def intersection(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """(N, 4), (M, 4) boxes -> (N, M) square pixels that they share."""
  a, b = a.T[:, :, None], b.T[:, None]
  sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])  # width and height at once
  np.maximum(sides, 0, out=sides)
  return sides[0] * sides[1]


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """(N, 4), (M, 4) boxes -> (N, M) intersection over union."""
  inter, sides_a, sides_b = intersection(a, b), a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2]
  return inter / np.maximum((sides_a[:, 0] * sides_a[:, 1])[:, None] + sides_b[:, 0] * sides_b[:, 1] - inter, 1e-6)


def sigmoid(x: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-np.minimum(np.maximum(x, -60), 60)))


@cache
def logit(p: float) -> float:
  p = min(max(p, 1e-6), 1 - 1e-6)
  return float(np.log(p / (1 - p)))


def peaks(heat: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """(K, h, w) logits -> class, row, column and logit of every cell over `floor` that none of its eight neighbors of the
  same class exceeds; best first."""
  _, h, w = heat.shape
  at = (heat.reshape(-1) >= floor).nonzero()[0]  # few: the neighbors are looked up for these only
  own = heat.reshape(-1)[at]
  k, i = np.divmod(at, h * w)
  i, j = np.divmod(i, w)
  rows, columns = (np.minimum(np.maximum(x + NEAR, 0), most - 1) for x, most in ((i, h), (j, w)))  # (3, n)
  near = heat.reshape(-1).take(((k * h + rows) * w)[:, None] + columns).reshape(9, -1)
  at = (own >= near.max(0)).nonzero()[0]
  at = at[(-own[at]).argsort(kind="stable")]
  return k[at], i[at], j[at], own[at]


def at_cells(maps: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
  """(1, C, h, w) maps at N rows i and columns j -> (N, C), a copy."""
  _, c, h, w = maps.shape
  return maps.reshape(c, h * w).take(i * w + j, axis=1).T


def decode(raw: dict[str, np.ndarray], specs: dict[str, dict[str, Any]], valid: np.ndarray) -> Detections:
  """raw: heat (1, K, h, w) logits, box (1, 4, h, w) left, top, right, bottom >= 0 from the cell's center, view pixels;
  and where the bundle has them coef (1, P, h, w), proto (1, P, H, W), embed (1, E, h, w). specs['heat']: classes,
  parameters threshold.
  valid: (256, 512) bool; centers outside the camera image do not count."""
  heat = raw["heat"][0]
  _, h, w = heat.shape
  view_h, view_w = valid.shape
  c, i, j, score = peaks(heat, logit(specs["heat"].get("parameters", {}).get("threshold", THRESHOLD)))
  ok = map_valid(valid, h, w)[i, j]
  c, i, j, score = (a[ok][:MAX_OBJECTS] for a in (c, i, j, score))
  x, y = map_centers(h, w, (view_h, view_w))
  center = np.empty((len(c), 2), np.float32)
  center[:, 0], center[:, 1] = x[j], y[i]
  reach = np.maximum(at_cells(raw["box"], i, j), 0)
  boxes = np.empty((len(c), 4), np.float32)
  boxes[:, :2], boxes[:, 2:] = center - reach[:, :2], center + reach[:, 2:]
  np.maximum(boxes, -0.5, out=boxes)
  np.minimum(boxes, np.array([view_w - 0.5, view_h - 0.5] * 2, np.float32), out=boxes)
  # A large object may peak twice, two cells apart, and one that could be of two classes peaks in both maps. Only
  # neighbors with nearly the same box are such
  # twins: cars one behind the other overlap as much, but their centers are further apart, and a suppression by overlap
  # alone would lose the occluded one.
  twin = (np.abs(i[:, None] - i) <= SAME_CELLS) & (np.abs(j[:, None] - j) <= SAME_CELLS)
  if np.count_nonzero(twin) > len(c):
    twin &= box_iou(boxes, boxes) > SAME_IOU
    keep = np.ones(len(c), bool)
    for a in (twin.sum(1) > 1).nonzero()[0].tolist():
      if keep[a]:
        keep[a + 1 :] &= ~twin[a, a + 1 :]
    if not keep.all():
      c, i, j, score, boxes = (a[keep] for a in (c, i, j, score, boxes))
  masks = embed = None
  if "coef" in raw:
    masks = decode_masks(at_cells(raw["coef"], i, j), raw["proto"][0], boxes, (view_h, view_w))
  if "embed" in raw:
    embed = at_cells(raw["embed"], i, j).astype(np.float32, copy=False)
    embed = embed / np.maximum(np.sqrt((embed * embed).sum(1, keepdims=True)), 1e-6)
  return Detections(list(specs["heat"]["classes"]), boxes, sigmoid(score).astype(np.float32), c, masks, embed)


def decode_masks(coef: np.ndarray, proto: np.ndarray, boxes: np.ndarray, view: tuple[int, int]) -> np.ndarray:
  """coef (M, P), proto (P, H, W), boxes (M, 4) pixels of the view, whose height and width `view` is -> (M, H, W) bool:
  sum of coef times proto over 0, at map pixels whose center lies in the box."""
  p, h, w = proto.shape
  masks = np.zeros((len(coef), h, w), bool)
  x, y = map_centers(h, w, view)
  high = (y >= boxes[:, 1:2]) & (y <= boxes[:, 3:4])
  rows = np.flatnonzero(high.any(0))
  if len(rows):  # from the highest box's upper edge to the lowest one's lower edge: often half of the map
    a, b = int(rows[0]), int(rows[-1]) + 1
    part = masks[:, a:b]
    np.greater(
      (np.ascontiguousarray(coef) @ proto.reshape(p, h * w)[:, a * w : b * w]).reshape(part.shape), 0, out=part
    )
    part &= ((x >= boxes[:, 0:1]) & (x <= boxes[:, 2:3]))[:, None, :]
    part &= high[:, a:b, None]
  return masks

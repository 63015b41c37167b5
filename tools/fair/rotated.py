"""Oriented boxes: the smallest one around points, and how much two overlap. Convention and corners:
selfdrive/modeld/fair/heads/oriented.py."""

import cv2
import numpy as np

from openpilot.selfdrive.modeld.fair.heads.objects import intersection
from openpilot.selfdrive.modeld.fair.heads.oriented import corners, le90, upright

PAIRS = 10_000  # that are clipped at once
EPS = 1e-9  # of a box's size: points so close to an edge lie on it
EDGES = 512  # of a hull, along which a side may lie; of finer hulls some
CELLS = 1 << 20  # numbers at once
LEAST = 1e-6  # pixels: thinner ones are no boxes


def cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """(..., 2), (..., 2) -> (...)."""
  return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def min_area_rectangle(points: np.ndarray) -> np.ndarray | None:
  """(K, 2) -> (5,) the oriented box of least area that holds all points; None where they lie on a line. One of its
  sides lies on an edge of the hull (Freeman and Shapira 1975). Of several as small the one that is turned least."""
  p = np.asarray(points, np.float64).reshape(-1, 2)
  if len(p) < 3:
    return None
  middle = p.mean(0)
  near = p - middle
  hull = near[cv2.convexHull(near.astype(np.float32), returnPoints=False)[:, 0]]
  edges = (np.roll(hull, -1, axis=0) - hull)[:: -(-len(hull) // EDGES)]
  length = np.hypot(*edges.T)
  if len(hull) < 3 or not (length > 0).any():
    return None
  along = edges[length > 0] / length[length > 0, None]
  across = np.stack([-along[:, 1], along[:, 0]], 1)
  low, high = np.empty_like(along), np.empty_like(along)
  step = max(1, CELLS // len(hull))
  for k in range(0, len(along), step):
    for axis, to in enumerate((along, across)):
      reach = hull @ to[k : k + step].T
      low[k : k + step, axis], high[k : k + step, axis] = reach.min(0), reach.max(0)
  size, center = high - low, (low + high) / 2
  area = size.prod(1)
  angle = np.arctan2(along[:, 1], along[:, 0])
  boxes = le90(np.column_stack([center[:, :1] * along + center[:, 1:] * across + middle, size, angle]))
  boxes = boxes[area <= area.min() * (1 + 1e-6)]
  best = boxes[np.abs(boxes[:, 4]).argmin()]
  return best if best[3] > LEAST else None


def edge_points(mask: np.ndarray) -> np.ndarray:
  """(h, w) bool -> (K, 2) corners of the first and last pixel of each row, counted from the mask's corner: their hull
  is that of all pixels."""
  rows = np.flatnonzero(mask.any(1))
  first, last = mask[rows].argmax(1), mask.shape[1] - mask[rows, ::-1].argmax(1)
  return np.concatenate([np.stack([x, rows + y], 1) for x in (first, last) for y in (0, 1)]).astype(np.float64)


def overlap(p: np.ndarray, q: np.ndarray) -> np.ndarray:
  """(N, 4, 2), (N, 4, 2) corners of convex quadrilaterals, clockwise as seen -> (N,) area that each two share.

  Its corners are the corners of each that lie in the other, and where edges cross; put in order around their middle.
  What is found twice, as where edges lie upon each other, changes nothing."""
  middle = p.mean(1, keepdims=True)
  size = np.maximum(np.abs(p - middle).max((1, 2), keepdims=True), 1e-12)
  p, q = (p - middle) / size, (q - middle) / size
  dp, dq = np.roll(p, -1, 1) - p, np.roll(q, -1, 1) - q
  found, good = [p, q], [inside(p, q, dq), inside(q, p, dp)]
  between = q[:, None] - p[:, :, None]  # (N, 4 of p, 4 of q, 2)
  across = cross(dp[:, :, None], dq[:, None])
  far = np.abs(across) > 1e-14
  with np.errstate(divide="ignore", invalid="ignore"):
    t = np.where(far, cross(between, dq[:, None]) / across, np.nan)
    u = np.where(far, cross(between, dp[:, :, None]) / across, np.nan)
  good.append(((t >= -EPS) & (t <= 1 + EPS) & (u >= -EPS) & (u <= 1 + EPS)).reshape(-1, 16))
  found.append((p[:, :, None] + np.clip(np.nan_to_num(t), 0, 1)[..., None] * dp[:, :, None]).reshape(-1, 16, 2))
  points, valid = np.concatenate(found, 1), np.concatenate(good, 1)
  count = valid.sum(1)
  center = (points * valid[..., None]).sum(1) / np.maximum(count, 1)[:, None]
  points = points - center[:, None]
  order = np.where(valid, np.arctan2(points[..., 1], points[..., 0]), np.inf).argsort(1, kind="stable")
  points = np.take_along_axis(points, order[..., None], 1)
  there = np.take_along_axis(valid, order, 1)
  points = np.where(there[..., None], points, points[:, :1])  # the rest repeats the first
  area = cross(points, np.roll(points, -1, 1)).sum(1) / 2
  return np.where(count >= 3, np.maximum(area, 0), 0) * size[:, 0, 0] ** 2


def inside(points: np.ndarray, quad: np.ndarray, edges: np.ndarray) -> np.ndarray:
  """(N, K, 2) points, (N, 4, 2) corners and edges of quadrilaterals -> (N, K) bool, the border included."""
  far = cross(edges[:, None], points[:, :, None] - quad[:, None])
  return (far >= -EPS * np.maximum(np.hypot(edges[..., 0], edges[..., 1]), 1)[:, None]).all(2)


def pair_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """(N, 5), (N, 5) -> (N,) intersection over union of each two, 0 where both are empty."""
  a, b = (np.asarray(x, np.float64).reshape(-1, 5) for x in (a, b))
  areas = [np.maximum(x[:, 2:4], 0).prod(1) for x in (a, b)]
  pieces = [overlap(corners(a[k : k + PAIRS]), corners(b[k : k + PAIRS])) for k in range(0, len(a), PAIRS)]
  shared = np.minimum(np.concatenate(pieces), np.minimum(*areas)) if pieces else np.zeros(0)
  union = areas[0] + areas[1] - shared
  return np.where(union > 0, shared / np.where(union > 0, union, 1), 0)


def rotated_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """(N, 5), (M, 5) -> (N, M) intersection over union. Only those whose upright boxes meet are clipped."""
  out = np.zeros((len(a), len(b)))
  if out.size:
    i, j = np.nonzero(intersection(upright(a), upright(b)) > 0)
    out[i, j] = pair_iou(np.asarray(a)[i], np.asarray(b)[j])
  return out


def outline(boxes: np.ndarray) -> list[list[float]]:
  """(N, 5) -> of each x1 y1 ... x4 y4."""
  return corners(boxes).reshape(-1, 8).tolist()

"""Oriented boxes of a center-based student: center, sides and angle, without a jump where sides or turns meet.

A box is (cx, cy, w, h, angle): pixels, w >= h; angle of the longer side, radians from the x axis towards the y axis,
which points down, so clockwise as it is seen, -pi/2 <= angle < pi/2 ("le90"). Its corners go clockwise as seen."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.heads.depth import map_centers, map_valid
from openpilot.selfdrive.modeld.fair.heads.objects import THRESHOLD, at_cells, logit, peaks, sigmoid

MAX_OBJECTS = 500  # in one picture: a car park from above has hundreds
CELL = 8  # pixels, of a student's maps
CHANNELS = 7
LOG_SIDE = -1.0, 8.5  # natural logarithm of the mean side, pixels
MOST_LOG_RATIO = 5.0  # of the longer side to the shorter one
SAME = 0.65  # ProbIoU from which on two peaks are one thing
AROUND = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) / 2


@dataclass
class OrientedDetections:
  classes: list[str]
  boxes: np.ndarray  # (M, 5) float32 cx, cy, w, h, angle: pixels of the input, integers at pixel centers
  scores: np.ndarray  # (M,) float32, falling
  class_ids: np.ndarray  # (M,) int64, index into classes


def le90(boxes: np.ndarray) -> np.ndarray:
  """(N, 5) of any angles and order of sides -> the same rectangles with w >= h and -pi/2 <= angle < pi/2."""
  out = np.array(boxes, np.float64).reshape(-1, 5)
  swap = out[:, 3] > out[:, 2]
  out[swap, 2:4] = out[swap, 3:1:-1]
  turn = (out[:, 4] + swap * (np.pi / 2) + np.pi / 2) % np.pi
  out[:, 4] = np.where(turn >= np.pi, 0.0, turn) - np.pi / 2  # % may round up to what it divides by
  return out


def corners(boxes: np.ndarray) -> np.ndarray:
  """(N, 5) -> (N, 4, 2) x, y."""
  b = np.asarray(boxes).reshape(-1, 5)
  c, s = np.cos(b[:, 4]), np.sin(b[:, 4])
  turn = np.stack([np.stack([c, s], -1), np.stack([-s, c], -1)], 1)  # rows: along w, along h
  return b[:, None, :2] + (AROUND * b[:, None, 2:4]) @ turn


def upright(boxes: np.ndarray) -> np.ndarray:
  """(N, 5) -> (N, 4) x0 y0 x1 y1 of the upright boxes around them."""
  p = corners(boxes)
  return np.concatenate([p.min(1), p.max(1)], 1)


def covariance(boxes: np.ndarray) -> np.ndarray:
  """(N, 5) -> (N, 3) xx, yy, xy of a uniform density on each box: sides squared over 12, turned."""
  b = np.asarray(boxes, np.float64).reshape(-1, 5)
  long, short = b[:, 2] ** 2 / 12, b[:, 3] ** 2 / 12
  c, s = np.cos(b[:, 4]), np.sin(b[:, 4])
  return np.stack([long * c * c + short * s * s, long * s * s + short * c * c, (long - short) * c * s], 1)


def prob_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """(N, 5), (M, 5) -> (N, M) ProbIoU, 0 to 1: 1 less the Hellinger distance of the boxes' Gaussians (Llerena et al.
  2021, arXiv:2106.06072)."""
  p, q = covariance(a)[:, None], covariance(b)[None]
  s = p + q
  d = np.asarray(a, np.float64)[:, None, :2] - np.asarray(b, np.float64)[None, :, :2]
  det = np.maximum(s[..., 0] * s[..., 1] - s[..., 2] ** 2, 1e-12)
  own = np.maximum([x[..., 0] * x[..., 1] - x[..., 2] ** 2 for x in np.broadcast_arrays(p, q)], 1e-12)
  far = (s[..., 1] * d[..., 0] ** 2 + s[..., 0] * d[..., 1] ** 2 - 2 * s[..., 2] * d[..., 0] * d[..., 1]) / (4 * det)
  bhattacharyya = far + 0.5 * np.log(det / (4 * np.sqrt(own[0] * own[1])))
  return 1 - np.sqrt(-np.expm1(-np.maximum(bhattacharyya, 0)))


def boxes_of(raw: np.ndarray, center: np.ndarray) -> np.ndarray:
  """raw (N, 7) at cells whose centers are (N, 2) pixels -> (N, 5) boxes.

  raw: the center's offset x, y in cells; the logarithm of the mean side sqrt(w h); log(w / h) times the cosine and
  sine of twice the angle; and, up to one factor, the cosine and sine of four times the angle, which a square has too.
  The first three say the box's Gaussian in the logarithm of its covariance (Arsigny et al. 2006), the last two which
  way a square is turned; two frequencies of the angle: Yu and Da, arXiv:2211.06444."""
  raw = np.asarray(raw, np.float64)
  out = np.empty((len(raw), 5))
  out[:, :2] = center + CELL * raw[:, :2]
  side = np.clip(raw[:, 2], *LOG_SIDE)
  half = np.minimum(np.hypot(raw[:, 3], raw[:, 4]), MOST_LOG_RATIO) / 2
  out[:, 2], out[:, 3] = np.exp(side + half), np.exp(side - half)
  coarse, fine = np.arctan2(raw[:, 4], raw[:, 3]) / 2, np.arctan2(raw[:, 6], raw[:, 5]) / 4
  out[:, 4] = fine + np.round((coarse - fine) / (np.pi / 2)) * (np.pi / 2)
  return le90(out)


def raw_of(boxes: np.ndarray, center: np.ndarray) -> np.ndarray:
  """What boxes_of() makes boxes (N, 5) of."""
  b = np.asarray(boxes, np.float64).reshape(-1, 5)
  ratio = np.log(b[:, 2] / b[:, 3])
  return np.stack(
    [
      *((b[:, :2] - center) / CELL).T,
      np.log(b[:, 2] * b[:, 3]) / 2,
      ratio * np.cos(2 * b[:, 4]),
      ratio * np.sin(2 * b[:, 4]),
      np.cos(4 * b[:, 4]),
      np.sin(4 * b[:, 4]),
    ],
    1,
  )


def without_twins(boxes: np.ndarray) -> np.ndarray:
  """(N, 5), best first -> indices of those that are not nearly the same box as a better one, of whatever class: a large
  object may peak twice, and one that could be of two classes peaks in both maps."""
  same = prob_iou(boxes, boxes) > SAME
  keep = np.ones(len(boxes), bool)
  for i in range(len(boxes)):
    if keep[i]:
      keep[i + 1 :] &= ~same[i, i + 1 :]
  return keep.nonzero()[0]


def decode(raw: dict[str, np.ndarray], specs: dict[str, dict[str, Any]], valid: np.ndarray) -> OrientedDetections:
  """raw: heat (1, K, h, w) logits, box (1, 7, h, w): see boxes_of(). specs['heat']: classes, parameters threshold.
  valid: (height, width) bool of the input; centers of cells outside the picture do not count."""
  heat = raw["heat"][0]
  _, h, w = heat.shape
  c, i, j, score = peaks(heat, logit(specs["heat"].get("parameters", {}).get("threshold", THRESHOLD)))
  ok = map_valid(valid, h, w)[i, j]
  c, i, j, score = (a[ok][: 2 * MAX_OBJECTS] for a in (c, i, j, score))
  x, y = map_centers(h, w, (valid.shape[0], valid.shape[1]))
  boxes = boxes_of(at_cells(raw["box"], i, j), np.stack([x[j], y[i]], 1))
  keep = without_twins(boxes)[:MAX_OBJECTS]
  scores = sigmoid(score[keep]).astype(np.float32)
  return OrientedDetections(list(specs["heat"]["classes"]), boxes[keep].astype(np.float32), scores, c[keep])

"""Lanes: points on lane lines as a student tracks them, where such lines are to begin with, and the curve through a
line's points."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.heads.depth import in_image
from openpilot.selfdrive.modeld.fair.heads.ground import Ground
from openpilot.selfdrive.modeld.fair.heads.objects import sigmoid

SCALE = 50.0  # m; the fit is made in x / SCALE
PRIOR = np.array(
  [20.0, 15.0, 10.0, 5.0]
)  # m; standard deviations of the four coefficients in x / SCALE: what few or near points leave open stays straight
PRECISION, SCALES = np.diag(PRIOR**-2.0), SCALE ** np.arange(4)
SIDE_STD, SIDE_PIXELS = 0.05, 1.5  # of a point across the road: m, and pixels
MIN_LINE_PROB = 0.3  # of modelV2's lane lines
SEED_FAR = 60.0  # m
ROW_REACH, COLUMN_REACH, MIN_ROWS, MAX_WIDTH = (
  3,
  4,
  6,
  24,
)  # map pixels: a line goes on over so many rows, within so many columns of where it points


@dataclass
class LanePoints:
  points: np.ndarray  # (N, 2) float32 view pixels
  visibility: np.ndarray  # (N,) float32, 0 outside the camera image


def decode(raw: dict[str, np.ndarray], specs: dict[str, dict[str, Any]], valid: np.ndarray) -> LanePoints:
  """raw: points (1, N, 2) view pixels, visible (1, N) logits; valid: (256, 512) bool."""
  points = raw["points"][0].astype(np.float32)
  inside = in_image(points, valid)
  visibility = np.zeros(len(points), np.float32)
  visibility[inside] = sigmoid(raw["visible"][0][inside])
  return LanePoints(points, visibility)


def model_lines(model: Any, ground: Ground) -> list[np.ndarray]:
  """A modelV2 reader -> per lane line that it believes in (P, 2) view pixels, from far to near, within SEED_FAR."""
  found = []
  for line, prob in zip(model.laneLines, model.laneLineProbs, strict=False):
    if not prob >= MIN_LINE_PROB:  # nan too
      continue
    x, y, z = list(line.x), list(line.y), list(line.z)
    if not len(x) == len(y) == len(z):
      continue
    points = np.array([x, y, z]).T[::-1]  # modelV2 counts from the car
    # its first points are meters apart and the view begins at 5 m: between them the line is straight, as openpilot
    # draws it
    points = points[np.isfinite(points).all(1) & (points[:, 0] > 1) & (points[:, 0] <= SEED_FAR)]
    px = ground.view(points)
    if len(px) > 1 and (np.diff(px[:, 1]) > 0).all():  # else it climbs out of sight, or is no line
      found.append(px)
  return found


def map_lines(class_map: np.ndarray, markings: Sequence[int], ground: Ground, most: int) -> list[np.ndarray]:
  """A class map (h, w) over the whole view -> up to `most` longest lines of the classes `markings`, each (P, 2) view
  pixels, from far to near.

  Row by row from the bottom: the middle of each run of them joins the line that points at it, or begins one."""
  h, w = class_map.shape
  s = 2 * ground.cx / w  # view pixels a map pixel, across and down
  horizon = (ground.cy + ground.f * ground.height / SEED_FAR + 0.5) / s - 0.5
  top = min(h, max(0, ceil(horizon)))
  there = np.zeros((h - top, w + 2), bool)  # with a column of nothing on either side: runs do not go on in the next row
  there[:, 1:-1] = class_map[top:] == markings[0]
  for k in markings[1:]:
    there[:, 1:-1] |= class_map[top:] == k
  edges = (there.ravel()[1:] != there.ravel()[:-1]).nonzero()[0]
  rows, columns = np.divmod(edges[::2], w + 2)
  wide = edges[1::2] - edges[::2]
  runs = (-rows).argsort(kind="stable")
  runs = runs[wide[runs] <= MAX_WIDTH]  # more is a stop line, a crossing
  lines: list[tuple[list[int], list[float]]] = []  # rows and columns
  ends: list[
    tuple[int, float, int, float, float]
  ] = []  # of each line its last row and column, rows it may go on, columns a row, weight of being off
  for i, j in zip((rows[runs] + top).tolist(), (columns[runs] + (wide[runs] - 1) / 2).tolist(), strict=True):
    best, nearest = -1, float(COLUMN_REACH)
    for k, (row, column, reach, slope, weight) in enumerate(ends):
      if 0 < row - i <= reach:
        off = abs(column + slope * (row - i) - j) * weight
        if off < nearest:
          best, nearest = k, off
    if best < 0:
      lines.append(([i], [j]))
      ends.append((i, j, ROW_REACH, 0.0, 0.5))  # one point does not say where it goes
    else:
      of_rows, of_columns = lines[best]
      of_rows.append(i)
      of_columns.append(j)
      back = -min(len(of_rows), 5)
      # over the gap of a dashed line, once it has a direction
      ends[best] = (
        i,
        j,
        ROW_REACH * (4 if len(of_rows) >= MIN_ROWS else 1),
        (j - of_columns[back]) / (of_rows[back] - i),
        1.0,
      )
  found = sorted((line for line in lines if len(line[0]) >= MIN_ROWS), key=lambda line: len(line[0]), reverse=True)[
    :most
  ]
  return [(np.array([of_columns[::-1], of_rows[::-1]], float).T + 0.5) * s - 0.5 for of_rows, of_columns in found]


def fit_lines(
  x: np.ndarray, y: np.ndarray, weight: np.ndarray, f: float, start: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Points of L lines on the road, x, y (L, P) meters, weight (L, P) >= 0, 0 for none; f: focal length, pixels ->
  coefficients (L, 4) of y = sum c_i x^i, and how far the points lie from it in standard deviations of a point (L, P).

  Weighted least squares with a prior, reweighted twice so that strays count little; from `start` (L, 4), e.g. the frame
  before's, once."""
  there = weight > 0
  t = np.where(there, x, 0) * (1 / SCALE)
  y = np.where(there, y, 0)
  rows = np.empty(
    (len(t), 5, t.shape[1])
  )  # 1, t, t^2, t^3, y: one product of these gives both sides of the normal equations
  rows[:, 0], rows[:, 1], rows[:, 4] = 1, t, y
  np.multiply(t, t, out=rows[:, 2])
  np.multiply(rows[:, 2], t, out=rows[:, 3])
  basis, columns = rows[:, :4], rows.swapaxes(1, 2)
  sigma = np.hypot(SIDE_STD, t * (SCALE * SIDE_PIXELS / f))
  w = weight / (sigma * sigma)
  coef = None if start is None else (start * SCALES)[:, None]  # (L, 1, 4)
  for _ in range(2 + (coef is None)):
    if coef is None:
      k = w
    else:
      off = ((coef @ basis)[:, 0] - y) / sigma
      k = w / (1 + off * off / 9)
    normal = (basis * k[:, None]) @ columns  # (L, 4, 5)
    coef = np.linalg.solve(normal[..., :4] + PRECISION, normal[..., 4:]).swapaxes(1, 2)
  assert coef is not None
  off = ((coef @ basis)[:, 0] - y) / sigma
  return coef[:, 0] / SCALES, np.where(there, np.abs(off), 0)


def on_line(coef: np.ndarray, x: np.ndarray) -> np.ndarray:
  """(4,) coefficients, (P,) meters ahead -> (P,) meters to the right."""
  return ((coef[3] * x + coef[2]) * x + coef[1]) * x + coef[0]

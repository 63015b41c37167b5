"""Lane lines as people judge them: TuSimple's accuracy (its benchmark's evaluate/lane.py) of the lines that fairLanes
publishes.

A line is one x for each of a picture's rows, nan where it is not."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.bundle import Bundle
from openpilot.selfdrive.modeld.fair.heads.ground import Ground
from openpilot.selfdrive.modeld.fair.heads.lanes import on_line
from openpilot.selfdrive.modeld.fair.lanes import MAX_LINES
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.tools.fair.evaluation.metrics import Sums, known, ratio

NEAR = 20.0  # pixels, across a line that stands upright
MATCHED = 0.85  # share of the rows from which a true line is found
MOST = 4  # true lines that count: of more, the worst is forgiven
TOO_MANY = 2  # lines more than the truth has: then nothing counts
ROWS = np.arange(160.0, 711.0, 10.0)  # of TuSimple's 1280x720 pictures
PROB = 0.3  # of a published line that counts


def leaning(line: np.ndarray, rows: np.ndarray) -> float:
  """Radians from upright of the straight line through it; 0 of fewer than two rows."""
  there = np.isfinite(line)
  return float(np.arctan(np.polyfit(rows[there], line[there], 1)[0])) if there.sum() > 1 else 0.0


def line_accuracy(found: np.ndarray, truth: np.ndarray, near: float) -> float:
  """Share of the rows in which both are within `near` pixels, or neither is."""
  a, b = np.where(found >= 0, found, -100.0), np.where(truth >= 0, truth, -100.0)  # nan is not
  return float((np.abs(a - b) < near).mean())


def tusimple(
  found: Sequence[np.ndarray], truth: Sequence[np.ndarray], rows: np.ndarray, near: float = NEAR
) -> tuple[float, float, float]:
  """found, truth: lines (len(rows),) each -> accuracy, false positives of those found, false negatives of those true.

  Of every true line the accuracy of the found one that fits it best counts, matched or not. Raises ValueError on lines
  of other rows."""
  if any(len(x) != len(rows) for x in (*found, *truth)):
    raise ValueError(f"lines are of {len(rows)} rows")
  if len(truth) + TOO_MANY < len(found):
    return 0.0, 0.0, 1.0
  best = []
  for line in truth:
    of_line = near / np.cos(leaning(line, rows))
    best.append(max((line_accuracy(x, line, of_line) for x in found), default=0.0))
  missed = sum(x < MATCHED for x in best)
  wrong = len(found) - (len(truth) - missed)
  total, count = sum(best), max(min(len(truth), MOST), 1)
  if len(truth) > MOST:
    missed -= missed > 0
    total -= min(best)
  return total / count, wrong / len(found) if found else 0.0, missed / count


class LaneLines(Sums):
  """TuSimple's, the mean over pictures that have true lines."""

  def __init__(self) -> None:
    self.sums = np.zeros(4)  # pictures, accuracy, false positives, false negatives

  def add(
    self, found: Sequence[np.ndarray], truth: Sequence[np.ndarray], rows: np.ndarray, near: float = NEAR
  ) -> float:
    """-> 1 - accuracy, nan without true lines."""
    if not len(truth):
      return float("nan")
    score = tusimple(found, truth, rows, near)
    self.sums += [1, *score]
    return 1 - score[0]

  def result(self) -> dict[str, float]:
    n, *sums = self.sums
    names = ("lines_accuracy", "lines_false_positive", "lines_false_negative")
    return known({k: ratio(v, n) for k, v in zip(names, sums, strict=True)})


def at_rows(points: np.ndarray, rows: np.ndarray, width: float) -> np.ndarray:
  """points (P, 2) pixels along a line, in any order -> its x in the rows between them, nan beyond, and outside of a
  picture of that width."""
  points = points[np.isfinite(points).all(axis=1)]
  if len(points) < 2:
    return np.full(len(rows), np.nan)
  points = points[np.argsort(points[:, 1], kind="stable")]
  x = np.interp(rows, points[:, 1], points[:, 0], left=np.nan, right=np.nan)
  with np.errstate(invalid="ignore"):
    return np.where((x >= 0) & (x <= width - 1), x, np.nan)


def instance_lines(mask: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
  """mask (H, W): 0, or a line's number -> the lines, each in the middle of its pixels of a row."""
  out = []
  for k in np.unique(mask[mask > 0]):
    line = np.full(len(rows), np.nan)
    for i, row in enumerate(rows.astype(int)):
      columns = np.flatnonzero(mask[row] == k)
      if len(columns):
        line[i] = columns.mean()
    if np.isfinite(line).any():
      out.append(line)
  return out


def published(message: Any, ground: Ground, nearest: float = 2.0) -> list[np.ndarray]:
  """A fairLanes -> of each line that is likely (P, 2) view pixels: its curve on the road, from `nearest` meters, below
  the view's edge, to the farthest point that is seen."""
  out = []
  for line in message.lines:
    ahead, seen = np.array(line.roadX), np.array(line.visibility) > 0.5
    if line.prob < PROB or not seen.any():
      continue
    x = np.geomspace(nearest, max(float(ahead[seen].max()), nearest + 1), 60)
    out.append(ground.view(np.stack([x, on_line(np.array(line.fit), x), np.full(len(x), ground.height)], axis=1)))
  return out


class Still:
  """In the place of a camera's warp: frames that are model frames already."""

  def __init__(self, valid: np.ndarray):
    self.valid = valid

  def warp(self, frame: np.ndarray) -> np.ndarray:
    return frame


class Lines:
  """A bundle's published lines on stored model frames, begun on what it segments itself, by the device's own code."""

  def __init__(self, bundle: Bundle):
    self.bundle = bundle
    self.begin(None)

  def begin(self, height: float | None) -> None:
    """Before each drive. height: of its camera over the road, m."""
    self.model = FairModel(self.bundle)
    self.model.set_calibration(np.zeros(3), height)

  def step(self, frame: np.ndarray, frame_id: int, valid: np.ndarray) -> list[np.ndarray]:
    """-> the lines, as published() gives them; [] of a bundle that tracks no points."""
    self.model.warp = Still(valid)  # type: ignore[assignment]
    for service, message in self.model.process(frame, frame_id, 0, 0):
      if service == "fairLanes":
        return published(message.fairLanes, self.model.ground)
    return []


def nearest_lines(lines: Sequence[np.ndarray], count: int = MAX_LINES) -> list[np.ndarray]:
  """lines (P, 3) on the road, meters -> those that pass nearest to the car, by where they are 10 m ahead."""
  return sorted(lines, key=lambda x: abs(float(x[np.abs(x[:, 0] - 10).argmin(), 1])))[:count]

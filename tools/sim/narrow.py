"""A narrow street in place of the open road: a lane or two without lines, cars parked along both sides, and walls,
hedges and houses that stand a step beside them. What stands near the road is then near in the picture too, as in the
streets of old towns; on the open road it is 10 m away and more."""

import numpy as np

from openpilot.tools.sim.pieces import BUILDING, FOLIAGE, PLAIN

LANE, PARKED, WALK, SETBACK = (2.5, 3.3), 2.2, (0.6, 2.2), (0.1, 2.0)  # m
SPEED = (4.0, 11.0)  # m/s


def parked(r: np.random.Generator, window: float) -> list[float]:
  """-> places along the road, from 0 to `window` m, of cars that stand at its side."""
  out, s0 = [], r.uniform(0, 20)
  while s0 < window - 10:
    out.append(float(s0))
    s0 += 6.0 + r.exponential(6)
  return out


def narrow_scenery(r: np.random.Generator, left: float, right: float, length: float, night: float) -> np.ndarray:
  """Rows as Layout._background has them: both sides are closed but for gaps of some meters. left, right: m from the
  centerline to where the pavements end, both positive; length: m; night: 1 at night, 0 else."""
  rows: list[list[float]] = []
  for side, edge in ((-1, left), (1, right)):
    houses = r.uniform(0.2, 0.9)  # of this side
    s = -40.0
    while s < length:
      kind, half, near = r.uniform(), r.uniform(3, 10), edge + r.uniform(*SETBACK)
      gray = r.uniform(0.12, 0.6) * np.array([1, r.uniform(0.8, 1), r.uniform(0.6, 1)])
      green = np.array([0.06, 0.13, 0.04]) * r.uniform(0.5, 1.8)
      at, turned = s + half, r.uniform(-0.02, 0.02)
      if kind < houses:
        deep, high = r.uniform(4, 8), r.uniform(3, 14)
        rows.append([at, side * (near + deep), turned, half, deep, 0, high, *gray, BUILDING, 0.5 * night])
      elif kind < houses + 0.6 * (1 - houses):
        deep, high = r.uniform(0.3, 1.2), r.uniform(0.9, 3.5)
        rows.append([at, side * (near + deep), turned, half, deep, 0, high, *green, FOLIAGE, 0.0])
      else:
        rows.append([at, side * (near + 0.15), turned, half, 0.15, 0, r.uniform(0.7, 2.6), *gray, PLAIN, 0.0])
      if kind >= houses and r.uniform() < 0.7:  # what is behind: a house, or a tree
        deep, high = r.uniform(3, 6), r.uniform(4, 12)
        d = side * (near + r.uniform(2, 8) + deep)
        rows.append([at, d, 0.0, half, deep, 0, high, *gray[::-1], BUILDING, 0.5 * night])
      if r.uniform() < 0.35:
        d, high, wide = side * (edge - 0.3), r.uniform(3, 8), r.uniform(0.7, 2.0)
        rows.append([s, d, 0.0, 0.13, 0.13, 0, high * 0.5, 0.12, 0.08, 0.05, PLAIN, 0.0])
        rows.append([s, d, r.uniform(0, 1.5), wide, wide, high * 0.4, high, *green, FOLIAGE, 0.0])
      elif r.uniform() < 0.3:
        rows.append([s, side * (edge - 0.3), 0.0, 0.08, 0.08, 0, r.uniform(4, 8), 0.25, 0.25, 0.25, PLAIN, 0.0])
      s += 2 * half + float(r.choice([0.0, r.uniform(0.5, 6)], p=[0.6, 0.4]))
  return np.array(rows)

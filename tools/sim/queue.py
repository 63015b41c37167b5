"""Dense traffic in a city street: every lane is full, bumper to bumper, and creeps. Of the road little more is seen
than what lies between the cars, and those ahead are large in the picture, which on the open road they are not."""

from collections.abc import Iterator

import numpy as np

SPEED, WALK, FIRST, GAP = (2.0, 6.0), (1.5, 3.5), (5.5, 13.0), (1.3, 6.0)  # m/s, m
SHAPES = (0.62, 0.2, 0.18)  # cars, vans, lorries and buses
LENGTHS = (5.0, 5.8, 10.5)  # m, of the longest of each
OFTEN = 0.85  # of the places in a lane that somebody stands at
SWING = 0.3  # m, by which a gap changes


def queued(r: np.random.Generator, first: float, window: float) -> Iterator[tuple[float, int]]:
  """-> center along the lane, m, and shape of each vehicle, from `first`, where the nearest one's rear may be."""
  rear = first
  while True:
    shape = int(r.choice(3, p=SHAPES))
    center = rear + LENGTHS[shape] / 2
    rear = center + LENGTHS[shape] / 2 + float(r.uniform(*GAP))
    if rear > window:
      return
    if r.uniform() < OFTEN:
      yield center, shape


def gray_sky(r: np.random.Generator, time_of_day: str) -> dict[str, tuple[float, ...]]:
  """Light of a street under clouds: at dusk they are far brighter than what is below. Linear RGB, of Layout.look."""
  sky = {"day": r.uniform(0.5, 0.75), "dusk": r.uniform(0.2, 0.5), "night": r.uniform(0.004, 0.02)}[time_of_day]
  below = {"day": r.uniform(0.35, 0.6), "dusk": r.uniform(0.1, 0.35), "night": 1.2}[time_of_day] * sky
  tint = np.array([0.97, 1.0, 1.03])
  return {
    "sun": tuple(0.1 * below * tint),
    "ambient": tuple(below * tint),
    "sky_low": tuple(sky * tint),
    "sky_top": tuple(r.uniform(0.5, 1.0) * sky * tint),
  }

"""What a seed decides about a stretch of road: its course, paint, light, traffic and surroundings.

Coordinates: see world.py."""

from typing import Any

import numpy as np

from openpilot.tools.sim import queue
from openpilot.tools.sim.narrow import LANE, PARKED, SPEED, WALK, narrow_scenery, parked
from openpilot.tools.sim.pieces import BUILDING, DASHED, DOUBLE, FOLIAGE, PEDESTRIAN, PLAIN, SOLID, VEHICLE, Actor, Line

TABLE_STEP = 0.5  # meters of x between entries of the centerline table
TABLE_REACH = 260.0  # meters ahead
BEHIND, AHEAD = 40.0, 200.0  # traffic lives in this window around the ego
TIMES = ("day", "dusk", "night")
WEATHERS = ("clear", "rain")
SURROUNDINGS = ("open", "narrow", "queue")


class Layout:
  """`Layout(seed, time_of_day)`; time_of_day in TIMES, weather in WEATHERS. The road is long enough for `seconds` of
  driving.

  Rain changes only the picture: the same seed in clear weather has the same truth. camera_height: least and most, m,
  between which the seed draws it; by default from 1.15 to 1.4. surroundings: narrow is a street between walls, hedges
  and houses; queue one that is full of creeping cars."""

  def __init__(
    self,
    seed: int,
    time_of_day: str = "day",
    seconds: float = 60.0,
    weather: str = "clear",
    camera_height: tuple[float, float] | None = None,
    surroundings: str = "open",
  ):
    if time_of_day not in TIMES:
      raise ValueError(f"time of day '{time_of_day}' is not known; one of {', '.join(TIMES)}")
    if weather not in WEATHERS:
      raise ValueError(f"weather '{weather}' is not known; one of {', '.join(WEATHERS)}")
    if surroundings not in SURROUNDINGS:
      raise ValueError(f"surroundings '{surroundings}' are not known; one of {', '.join(SURROUNDINGS)}")
    self.seed, self.time_of_day, self.weather, self.surroundings = seed, time_of_day, weather, surroundings
    close = None if surroundings == "open" else np.random.default_rng([seed, 23])
    self.swing = queue.SWING if surroundings == "queue" else 6.0  # m, of the gaps in the ego's lane
    r = self._rng = np.random.default_rng([seed, 7])
    self.speed = float(r.uniform(6, 31))
    if close is not None:
      self.speed = float(close.uniform(*(queue.SPEED if surroundings == "queue" else SPEED)))
    self.speed_swing = float(r.uniform(0, 0.25))
    self.length = self.speed * (1 + self.speed_swing) * seconds + 2 * TABLE_REACH + 100
    self.camera_height = float(r.uniform(1.15, 1.4))
    if camera_height is not None:  # drawn by a generator of its own, so that all else stays the same
      self.camera_height = float(np.random.default_rng([seed, 19]).uniform(*camera_height))
    self.rpy = np.array(
      [r.uniform(-0.01, 0.01), r.uniform(-0.02, 0.03), r.uniform(-0.03, 0.03)]
    )  # how the device is mounted
    self._road(r)
    self._paint(r)
    if surroundings == "narrow" and close is not None:
      self._narrow(close)
    if surroundings == "queue" and close is not None:
      self.city, self.walk = True, float(close.uniform(*queue.WALK))
    self._look(r)
    if surroundings == "queue" and close is not None and close.uniform() < 0.6:
      self.look.update(queue.gray_sky(close, time_of_day))
    if weather == "rain":
      self._wet(np.random.default_rng([seed, 13]))  # a generator of its own, so that the traffic stays the same
    self._traffic(r, close)
    if close is None:
      self._background(r)
    else:
      beside = self.shoulder + self.walk
      self.scenery = narrow_scenery(
        close, beside - self.d_left, beside + self.d_right, self.length, float(time_of_day == "night")
      )

  def _road(self, r: np.random.Generator) -> None:
    s = np.arange(-60.0, self.length, TABLE_STEP)
    curvature = np.zeros_like(s)
    sharp = r.uniform(0, 1) ** 2 * min(
      0.012, 2.5 / self.speed**2 + 0.001
    )  # lateral acceleration stays below about 3 m/s^2
    for wavelength in (180.0, 330.0, 610.0):
      curvature += (
        sharp * r.uniform(0.2, 0.8) * np.sin(2 * np.pi * s / (wavelength * r.uniform(0.7, 1.4)) + r.uniform(0, 6.28))
      )
    heading = np.cumsum(curvature) * TABLE_STEP
    self.s, self.curvature, self.heading = s, curvature, heading
    self.px, self.py = np.cumsum(np.cos(heading)) * TABLE_STEP, np.cumsum(np.sin(heading)) * TABLE_STEP

  def _paint(self, r: np.random.Generator) -> None:
    self.lane_width = float(r.uniform(2.9, 3.8))
    self.n_same, self.n_oncoming = (
      int(r.choice([1, 2, 3], p=[0.4, 0.4, 0.2])),
      int(r.choice([0, 1, 2], p=[0.25, 0.6, 0.15])),
    )
    self.ego_lane = int(r.integers(self.n_same))
    white, yellow = (0.62, 0.62, 0.6), (0.6, 0.42, 0.08)
    fresh = float(r.uniform(0.6, 1.2))
    white = (white[0] * fresh, white[1] * fresh, white[2] * fresh)
    wear = float(r.choice([0.0, 0.15, 0.35, 0.5], p=[0.45, 0.25, 0.2, 0.1]))
    dash = [(3.0, 12.0), (3.0, 9.0), (6.0, 18.0), (2.0, 6.0)][int(r.integers(4))]
    margin = float(r.uniform(0.15, 0.6))
    middle_kind = int(r.choice([SOLID, DASHED, DOUBLE], p=[0.3, 0.35, 0.35]))
    middle_rgb = yellow if r.uniform() < 0.6 else white
    edge = SOLID if r.uniform() < 0.8 else 0
    w = self.lane_width
    lines = [(-self.n_oncoming * w, edge if self.n_oncoming else SOLID, white)]
    lines += [(-i * w, DASHED, white) for i in range(self.n_oncoming - 1, 0, -1)]
    if self.n_oncoming:
      lines.append((0.0, middle_kind, middle_rgb))
    lines += [(i * w, DASHED, white) for i in range(1, self.n_same)]
    lines.append((self.n_same * w, edge, white))
    self.lines = [Line(d, k, rgb, wear if k != SOLID else wear * 0.6, *dash) for d, k, rgb in lines]
    self.line_width = float(r.uniform(0.1, 0.17))
    self.d_left, self.d_right = -self.n_oncoming * w - margin, self.n_same * w + margin
    self.shoulder = float(r.choice([0.0, r.uniform(0.5, 1.2), r.uniform(2.2, 3.2)]))
    self.city = bool(r.uniform() < 0.5)
    self.walk = float(r.uniform(1.5, 4)) if self.city else 0.0
    self.ego_d = (self.ego_lane + 0.5) * w

  def _narrow(self, r: np.random.Generator) -> None:
    """A lane or two, without lines but for one in the middle of some, and room for cars that stand."""
    w = self.lane_width = float(r.uniform(*LANE))
    self.n_same, self.n_oncoming, self.ego_lane = 1, int(r.integers(2)), 0
    self.lines = []
    if self.n_oncoming and r.uniform() < 0.5:
      self.lines = [Line(0.0, DASHED, (0.6, 0.6, 0.58), float(r.choice([0.0, 0.4])), 2.0, 6.0)]
    self.d_left, self.d_right = -self.n_oncoming * w - 0.2, w + 0.2
    self.shoulder = float(r.choice([0.2, PARKED]))
    self.city, self.walk, self.ego_d = True, float(r.uniform(*WALK)), 0.5 * w

  def _look(self, r: np.random.Generator) -> None:
    gray = r.uniform(0.05, 0.26)
    terrain = [(0.1, 0.17, 0.05), (0.22, 0.19, 0.1), (0.3, 0.24, 0.16), (0.16, 0.16, 0.15), (0.5, 0.52, 0.55)][
      int(r.choice(5, p=[0.4, 0.2, 0.15, 0.2, 0.05]))
    ]
    azimuth, elevation = (
      r.uniform(-np.pi, np.pi),
      {"day": r.uniform(0.35, 1.3), "dusk": r.uniform(0.05, 0.2), "night": 0.9}[self.time_of_day],
    )
    overcast = r.uniform(0, 1) if self.time_of_day == "day" else 0.0
    sun, ambient, top, low = {
      "day": (
        (1.0 - 0.8 * overcast) * np.array([1.0, 0.96, 0.88]),
        (0.45 + 0.35 * overcast) * np.array([0.9, 0.97, 1.1]),
        (1 - overcast) * np.array([0.18, 0.36, 0.75]) + overcast * np.array([0.55, 0.58, 0.62]),
        (1 - overcast) * np.array([0.6, 0.72, 0.85]) + overcast * np.array([0.7, 0.72, 0.74]),
      ),
      "dusk": (
        np.array([0.5, 0.3, 0.15]),
        np.array([0.2, 0.2, 0.27]),
        np.array([0.1, 0.13, 0.3]),
        np.array([0.55, 0.33, 0.22]),
      ),
      "night": (
        np.zeros(3),
        np.full(3, r.uniform(0.008, 0.03)),
        np.array([0.002, 0.003, 0.008]),
        np.array([0.008, 0.008, 0.012]) * r.uniform(0.5, 3),
      ),
    }[self.time_of_day]
    lit = self.time_of_day == "night"
    self.look: dict[str, Any] = {
      "asphalt": tuple(gray * np.array([1.0, 1.0, 1.02])),
      "terrain": tuple(np.array(terrain) * r.uniform(0.6, 1.3)),
      "walk_rgb": tuple(np.array([0.38, 0.36, 0.34]) * r.uniform(0.6, 1.2)),
      "sun": tuple(sun),
      "ambient": tuple(ambient),
      "sky_top": tuple(top),
      "sky_low": tuple(low),
      "sun_dir": (np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), -np.sin(elevation)),
      "headlight": float(r.uniform(0.5, 1.1)) if lit else (0.25 if self.time_of_day == "dusk" else 0.0),
      "street_light": float(r.uniform(0.15, 0.6)) if lit and self.city else 0.0,
      "haze": float(r.choice([0.0, r.uniform(0, 0.004), r.uniform(0.004, 0.012)], p=[0.5, 0.35, 0.15])),
      "texture": float(r.uniform(0.1, 0.6)),
      "wet": float(r.choice([0.0, r.uniform(0.2, 1)], p=[0.75, 0.25])),
      "exposure": float(r.uniform(0.75, 1.35) * (1.6 if lit else 1.0)),
      "noise": float(r.uniform(0.002, 0.012) * (2.5 if lit else 1.0)),
      "mirror": 0.0,
      "rain": 0.0,
    }

  def _wet(self, r: np.random.Generator) -> None:
    """Rain: no sun, a low gray sky, a dark road that mirrors, haze, lights on, drops."""
    look, strength = self.look, float(r.uniform(0.4, 1.0))
    bright = float(np.mean(look["ambient"]) + 0.35 * np.mean(look["sun"]))
    gray = {
      "day": r.uniform(0.45, 0.62),
      "dusk": r.uniform(0.16, 0.24),
      "night": float(np.mean(look["sky_low"])) * 1.5,
    }[self.time_of_day]
    look["sun"], look["ambient"] = tuple(0.1 * np.array(look["sun"])), tuple(0.8 * bright * np.array([0.95, 1.0, 1.05]))
    look["sky_low"], look["sky_top"] = (
      tuple(gray * np.array([0.97, 1.0, 1.03])),
      tuple(0.8 * gray * np.array([0.95, 1.0, 1.06])),
    )
    look["asphalt"] = tuple(0.6 * np.array(look["asphalt"]))
    look["headlight"] = max(look["headlight"], 0.1)
    look["haze"], look["wet"], look["noise"] = 0.003 + 0.010 * strength, float(r.uniform(0.5, 1.0)), look["noise"] * 1.3
    look["mirror"], look["rain"] = float(r.uniform(0.35, 0.8)), strength

  def _traffic(self, r: np.random.Generator, close: np.random.Generator | None) -> None:
    actors: list[Actor] = []
    w, window = self.lane_width, BEHIND + AHEAD

    def color() -> tuple[float, float, float]:
      base = r.uniform(0.02, 0.75) * np.ones(3) if r.uniform() < 0.65 else r.uniform(0.03, 0.6, 3)
      return (float(base[0]), float(base[1]), float(base[2]))

    def vehicle(s0: float, v: float, d: float, sway: float = 0.15, shape: int | None = None) -> Actor:
      shape = int(r.choice(3, p=[0.7, 0.18, 0.12])) if shape is None else shape
      size = [(4.5, 1.82, 1.48), (5.2, 2.0, 2.1), (9.5, 2.45, 3.4)][shape]
      k = r.uniform(0.92, 1.1)
      return Actor(
        VEHICLE, float(s0), float(v), float(d), sway, (size[0] * k, size[1] * k, size[2] * k), color(), shape, 0.0
      )

    if close is not None and self.surroundings == "queue":
      for lane in range(-self.n_oncoming, self.n_same):
        own, d = lane == self.ego_lane, (lane + 0.5) * w
        first, end = (close.uniform(*queue.FIRST), AHEAD) if own else (0.0, window)
        v = self.speed if own else (1 if lane >= 0 else -1) * float(self.speed + close.uniform(-1, 1))
        actors += [vehicle(s0, v, d, 0.1, shape) for s0, shape in queue.queued(close, first, end)]
    else:
      for lane in range(self.n_same):
        rel = 0.0 if lane == self.ego_lane else float(r.uniform(-5, 6))
        gap = r.uniform(25, 110)
        s0 = r.uniform(12, 55) if lane == self.ego_lane else r.uniform(0, 40)
        while s0 < window - BEHIND - 15:
          actors.append(vehicle(s0, self.speed + rel, (lane + 0.5) * w))
          s0 += 14 + r.exponential(gap)
      for lane in range(self.n_oncoming):
        v, s0, gap = -float(r.uniform(0.7, 1.1) * self.speed), r.uniform(0, 60), r.uniform(20, 90)
        while s0 < window - 15:
          actors.append(vehicle(s0, v, -(lane + 0.5) * w))
          s0 += 14 + r.exponential(gap)
    if self.shoulder > 2 and self.city:
      s0 = r.uniform(0, 30)
      while s0 < window - 10:
        actors.append(vehicle(s0, 0.0, self.d_right + 1.1, 0.0))
        s0 += 6.5 + r.exponential(12)
    if close is not None and self.surroundings == "narrow":
      room = window if self.shoulder > 2 else 0.0
      actors += [vehicle(s0, 0.0, self.d_left - 1.1, 0.0) for s0 in parked(close, room)]
    for _ in range(int(r.integers(3, 22)) if self.city else int(r.integers(0, 3))):
      right = r.uniform() < 0.65
      d = (
        self.d_right + self.shoulder + r.uniform(0.4, 2.5)
        if right
        else self.d_left - self.shoulder - r.uniform(0.4, 2.5)
      )
      cross = float(r.uniform(0.8, 1.6)) if r.uniform() < 0.25 else 0.0
      actors.append(
        Actor(
          PEDESTRIAN,
          float(r.uniform(0, window)),
          float(r.uniform(-1.5, 1.5)),
          float(d),
          0.1,
          (0.4, 0.5, float(r.uniform(1.45, 1.9))),
          color(),
          0,
          cross,
        )
      )
    self.actors = actors

  def _background(self, r: np.random.Generator) -> None:
    """Buildings, trees and poles beside the road: rows of (s, d, yaw, half length, half width, z low, z high, r, g, b,
    paint, emission)."""
    rows: list[list[float]] = []
    night = 1.0 if self.time_of_day == "night" else 0.0
    for side in (-1, 1):
      edge = (self.d_right if side > 0 else -self.d_left) + self.shoulder + self.walk
      s = -40.0
      while s < self.length:
        kind = r.uniform()
        if kind < (0.45 if self.city else 0.05):
          half, deep, high = r.uniform(5, 14), r.uniform(4, 8), r.uniform(4, 22)
          c = r.uniform(0.12, 0.55) * np.array([1, r.uniform(0.85, 1), r.uniform(0.7, 1)])
          rows.append(
            [
              s + half,
              side * (edge + r.uniform(0.5, 9) + deep),
              r.uniform(-0.05, 0.05),
              half,
              deep,
              0,
              high,
              *c,
              BUILDING,
              0.5 * night,
            ]
          )
          s += 2 * half + r.uniform(0, 12)
        elif kind < 0.85:
          d, high, wide = side * (edge + r.uniform(1.2, 14)), r.uniform(3, 9), r.uniform(0.9, 2.4)
          rows.append([s, d, 0.0, 0.16, 0.16, 0, high * 0.5, 0.12, 0.08, 0.05, PLAIN, 0.0])
          green = np.array([0.06, 0.13, 0.04]) * r.uniform(0.5, 1.6)
          rows.append([s, d, r.uniform(0, 1.5), wide, wide, high * 0.3, high, *green, FOLIAGE, 0.0])
          rows.append([s, d, r.uniform(0, 1.5), wide * 0.7, wide * 0.7, high * 0.8, high * 1.2, *green, FOLIAGE, 0.0])
          s += r.uniform(3, 25)
        else:
          d, high = side * (edge + 0.3), r.uniform(5, 9)
          rows.append([s, d, 0.0, 0.08, 0.08, 0, high, 0.25, 0.25, 0.25, PLAIN, 0.0])
          rows.append([s, d - side * 0.8, 0.0, 0.2, 0.8, high, high + 0.15, 0.7, 0.65, 0.5, PLAIN, 1.2 * night])
          s += r.uniform(8, 35)
    self.scenery = np.array(rows)

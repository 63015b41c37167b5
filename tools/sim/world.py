"""A seeded stretch of road with traffic: where everything is at any time, in the calibrated frame of the ego's camera.

Road coordinates: s is arc length along the centerline, d the lateral offset, positive to the right. Everything else is
openpilot's calibrated
frame: x forward, y right, z down, meters, origin at the camera. Nothing here depends on the order of calls: the state
at t is a function of t."""

from functools import lru_cache
from typing import Any

import numpy as np

from openpilot.common.transformations.camera import CameraConfig, DEVICE_CAMERAS
from openpilot.tools.sim.layout import AHEAD, BEHIND, TABLE_REACH, TABLE_STEP, Layout
from openpilot.tools.sim.pieces import BODY, CABIN, KINDS, PEDESTRIAN, PLAIN, VEHICLE, WHEEL

CAMERAS: dict[str, tuple[CameraConfig, str]] = {  # name -> narrow road camera, sensor
  "mici": (DEVICE_CAMERAS[("mici", "os04c10")].narrow_road, "os04c10"),
  "tizi": (DEVICE_CAMERAS[("tizi", "ox03c10")].narrow_road, "ox03c10"),
}


class World(Layout):
  """`World(seed, time_of_day)`: see Layout."""

  def pose(self, t: float) -> tuple[float, float, float]:
    """x, y meters and heading, radians, clockwise from above, of the calibrated frame in one fixed to the ground."""
    e = self.ego(t)
    x, y, h = self._path(e["s"], e["d"])
    return float(x), float(y), float(h + e["heading_error"])

  def motion(self, t: float) -> tuple[np.ndarray, np.ndarray]:
    """Velocity m/s and turn rates rad/s at t, (3,) each, of the calibrated frame and in it: the derivative of
    pose()."""
    h = 1e-3
    (x0, y0, a0), (x1, y1, a1) = self.pose(t - h), self.pose(t + h)
    a, vx, vy = (a0 + a1) / 2, (x1 - x0) / (2 * h), (y1 - y0) / (2 * h)
    return np.array([np.cos(a) * vx + np.sin(a) * vy, np.cos(a) * vy - np.sin(a) * vx, 0.0]), np.array(
      [0.0, 0.0, (a1 - a0) / (2 * h)]
    )

  def ego(self, t: float) -> dict[str, float]:
    """s, d: road coordinates; s_dot: along the centerline, m/s; heading_error rad from the road's direction. And of the
    car itself, which drives beside the centerline and weaves: v_ego m/s forward, a_ego m/s^2 its change, yaw_rate rad/s
    and curvature 1/m of its path, positive to the right."""
    h = 1e-3
    s, d, s_dot, heading_error, v, yaw_rate = self._car(t)
    return {
      "s": s,
      "d": d,
      "s_dot": s_dot,
      "v_ego": v,
      "a_ego": (self._car(t + h)[4] - self._car(t - h)[4]) / (2 * h),
      "curvature": yaw_rate / v,
      "yaw_rate": yaw_rate,
      "heading_error": heading_error,
    }

  def _car(self, t: float) -> tuple[float, float, float, float, float, float]:
    """s, d, s_dot, heading_error, v_ego, yaw_rate of ego()."""
    w = 2 * np.pi / 23.0
    s = self.speed * (t + self.speed_swing / w * (1 - np.cos(w * t))) + 5.0
    v, a = self.speed * (1 + self.speed_swing * np.sin(w * t)), self.speed * self.speed_swing * w * np.cos(w * t)
    wander, wd = 0.22, 2 * np.pi / 11.0
    phase = wd * t + self.seed
    d, d_dot, d_ddot = (
      self.ego_d + wander * np.sin(phase),
      wander * wd * np.cos(phase),
      -wander * wd * wd * np.sin(phase),
    )
    error = np.arctan2(d_dot, v)  # of the heading
    curvature = np.interp(
      s, self.s, self.curvature
    )  # of the centerline, positive to the right, as d is: beside it the way is shorter
    forward = v * (1 - curvature * d) * np.cos(error) + d_dot * np.sin(error)
    yaw_rate = curvature * v + (d_ddot * v - d_dot * a) / (v * v + d_dot * d_dot)
    return float(s), float(d), float(v), float(error), float(forward), float(yaw_rate)

  def to_ego(self, t: float, s, d) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Road coordinates -> x, y in the calibrated frame at t and the road's heading there, radians, clockwise from
    above."""
    e = self.ego(t)
    ex, ey, eh = self._path(e["s"], e["d"])
    x, y, h = self._path(np.asarray(s, dtype=np.float64), np.asarray(d, dtype=np.float64))
    eh = eh + e["heading_error"]
    c, sn = np.cos(eh), np.sin(eh)
    return c * (x - ex) + sn * (y - ey), -sn * (x - ex) + c * (y - ey), h - eh

  def _path(self, s, d):
    h = np.interp(s, self.s, self.heading)
    return np.interp(s, self.s, self.px) - np.sin(h) * d, np.interp(s, self.s, self.py) + np.cos(h) * d, h

  def objects(self, t: float) -> list[dict[str, Any]]:
    """Traffic near the ego at t: id (unique for all time), cls, x, y (center), yaw, size, speed along the road minus
    the ego's (v_rel)."""
    e = self.ego(t)
    out = []
    for i, a in enumerate(self.actors):
      # vehicles of the ego's lane keep their distance to it, so that none collide
      own = a.cls == VEHICLE and abs(a.d - self.ego_d) < 0.1
      rel = (
        a.s0
        + (self.swing * np.sin(2 * np.pi * t / 19.0 + i) * (a.s0 > 20) if own else a.s0 * 0 + a.v * t - (e["s"] - 5.0))
        + (0 if own else BEHIND)
      )
      lap = 0 if own else int(np.floor(rel / (BEHIND + AHEAD)))
      rel = rel if own else rel - lap * (BEHIND + AHEAD) - BEHIND
      d = a.d + a.sway * np.sin(t * 0.5 + i)
      yaw_extra = np.pi if a.v < 0 else 0.0
      if a.cross:
        # walks across and back, seen from its pavement
        span = (self.d_right - self.d_left) + 4
        d = a.d - np.sign(a.d - self.ego_d) * span * (0.5 - 0.5 * np.cos(np.pi * a.cross * t / span + i))
        yaw_extra = np.pi / 2
      x, y, h = self.to_ego(t, e["s"] + rel, d)
      if -30 < x < AHEAD:
        out.append(
          {
            "id": 1 + i + (lap % 400) * len(self.actors),
            "cls": a.cls,
            "x": float(x),
            "y": float(y),
            "yaw": float(h + yaw_extra),
            "size": a.size,
            "rgb": a.rgb,
            "shape": a.shape,
            "v_rel": 0.0 if own else float(a.v - e["s_dot"]),
            "lane_d": float(d - e["d"]),
          }
        )
    return out

  @lru_cache(maxsize=4)  # noqa: B019 - worlds are few and live as long as their frames are rendered
  def view(self, t: float) -> dict[str, Any]:
    """The ray-caster's input at t: the centerline table, lines and boxes in the calibrated frame."""
    e = self.ego(t)
    s = np.arange(e["s"] - 2.0, e["s"] + TABLE_REACH + 40, TABLE_STEP)
    x, y, h = self.to_ego(t, s, np.zeros_like(s))
    bent = (np.abs(h) > 1.2) | (np.diff(x, prepend=x[0] - 1) <= 0)
    n = int(np.argmax(bent)) if bent.any() else len(x)
    grid = np.arange(0.0, min(TABLE_REACH, x[n - 1]), TABLE_STEP)
    night = 1.2 if self.time_of_day != "day" else 0.8 if self.weather == "rain" else 0.0  # lamps of cars
    boxes = [b for o in self.objects(t) for b in actor_boxes(o, night)]
    near = self.scenery[(self.scenery[:, 0] > e["s"] - 25) & (self.scenery[:, 0] < e["s"] + AHEAD)]
    bx, by, bh = self.to_ego(t, near[:, 0], near[:, 1])
    boxes += [[x0, y0, h0 + r[2], *r[3:10], 0, 0, r[10], r[11]] for x0, y0, h0, r in zip(bx, by, bh, near, strict=True)]
    lines = [
      [ln.d, ln.kind, self.line_width, *ln.rgb, ln.wear, ln.dash, ln.period, 0.0] for ln in self.lines if ln.kind
    ]
    return {
      "s0": e["s"],
      "table_step": TABLE_STEP,
      "table_y": np.interp(grid, x[:n], y[:n]),
      "table_s": np.interp(grid, x[:n], s[:n] - e["s"]),
      "table_heading": np.interp(grid, x[:n], h[:n]),
      "lines": np.array(lines, dtype=np.float32).reshape(-1, 10),
      "boxes": np.array(boxes, dtype=np.float32).reshape(-1, 14),
    }

  def lane_lines(self, t: float, x: np.ndarray) -> list[dict[str, Any]]:
    """Every painted line at distances x, meters: id, kind, d, y (nan beyond the road's table), in the calibrated
    frame."""
    return [
      {"id": i, "kind": KINDS[ln.kind], "d": ln.d, "y": self.lateral(t, x, ln.d)}
      for i, ln in enumerate(self.lines)
      if ln.kind
    ]

  def lateral(self, t: float, x: np.ndarray, d: float) -> np.ndarray:
    """(N,) x ahead, meters -> (N,) y of the line at lateral offset d: where the ray-caster paints it."""
    v = self.view(t)
    grid = np.arange(len(v["table_y"])) * TABLE_STEP
    y = np.interp(x, grid, v["table_y"], right=np.nan) + d / np.cos(np.interp(x, grid, v["table_heading"]))
    return np.where(x > grid[-1], np.nan, y)


def actor_boxes(o: dict[str, Any], night: float) -> list[list[float]]:
  """An actor's boxes, as rows for the ray-caster."""
  length, width, height = o["size"]
  c, s = np.cos(o["yaw"]), np.sin(o["yaw"])

  def box(along, across, half_l, half_w, z0, z1, rgb, paint, emission=0.0):
    return [
      o["x"] + c * along - s * across,
      o["y"] + s * along + c * across,
      o["yaw"],
      half_l,
      half_w,
      z0,
      z1,
      *rgb,
      o["cls"],
      o["id"],
      paint,
      emission,
    ]

  if o["cls"] == PEDESTRIAN:
    dark = tuple(k * 0.5 for k in o["rgb"])
    return [
      box(0, -0.1, 0.1, 0.09, 0, height * 0.5, dark, PLAIN),
      box(0, 0.1, 0.1, 0.09, 0, height * 0.5, dark, PLAIN),
      box(0, 0, 0.13, 0.25, height * 0.48, height * 0.84, o["rgb"], PLAIN),
      box(0, 0, 0.11, 0.1, height * 0.86, height, (0.35, 0.24, 0.18), PLAIN),
    ]
  l2, w2 = length / 2, width / 2
  wheels = [
    box(a, b, 0.33, 0.12, 0, 0.62, (0.02, 0.02, 0.02), WHEEL)
    for a in (-0.6 * l2, 0.6 * l2)
    for b in (-0.88 * w2, 0.88 * w2)
  ]
  if o["shape"] == 0:
    return [
      *wheels,
      box(0, 0, l2, w2, 0.28, height * 0.62, o["rgb"], BODY, night),
      box(-0.08 * l2, 0, 0.55 * l2, w2 * 0.88, height * 0.6, height, o["rgb"], CABIN),
    ]
  if o["shape"] == 1:
    return [
      *wheels,
      box(0, 0, l2, w2, 0.3, height * 0.55, o["rgb"], BODY, night),
      box(-0.05 * l2, 0, 0.93 * l2, w2 * 0.95, height * 0.55, height, o["rgb"], CABIN),
    ]
  return [
    *wheels,
    box(-0.12 * l2, 0, 0.85 * l2, w2, 0.7, height, o["rgb"], PLAIN),
    box(0, 0, l2, w2 * 0.95, 0.4, 1.15, (0.1, 0.1, 0.1), BODY, night),
    box(0.86 * l2, 0, 0.14 * l2, w2 * 0.95, 1.1, height * 0.8, o["rgb"], CABIN),
  ]

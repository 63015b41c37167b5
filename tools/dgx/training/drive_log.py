"""What a segment's log says of the drive, as arrays over time: the car, the driver's desire, GPS, and how the device
moved."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openpilot.common.transformations.orientation import rot_from_euler
from openpilot.tools.dgx.training.constants import DESIRE_LEN
from openpilot.tools.lib.log_fields import (
  DESIRES,
  GPS,
  MOTION,
  TRAFFIC_SIDE,
  desire,
  device_velocity,
  gps_fix,
  left_hand,
  speaking,
)
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.route import Segment

SERVICES = [
  "carState",
  "selfdriveState",
  "carControl",
  "carParams",
  "cameraOdometry",
  "lateralDelay",
  *MOTION,
  *DESIRES,
  *GPS,
  *TRAFFIC_SIDE,
]
TURN_LEFT, TURN_RIGHT, CHANGE_LEFT, CHANGE_RIGHT = 1, 2, 3, 4  # log.Desire
LANE_CHANGE_SPEED = 8.94  # m/s, 20 mph: openpilot changes lanes only above
MODEL_DELAY = 0.075  # s, of frame and action: modeld adds it to the car's delays
STALE = 2.0  # s, after which the last value no longer holds

Rows = list[tuple[float, ...]]


@dataclass
class DriveLog:
  """Rows begin with the time in seconds since the device started. Empty where the log has no such messages."""

  car: Rows = field(default_factory=list)  # speed, acceleration, steering angle in degrees, left and right blinker
  engaged: Rows = field(default_factory=list)
  motion: Rows = field(default_factory=list)  # velocity, turn rates in the device's frame
  old_motion: Rows = field(default_factory=list)  # the same of liveLocationKalman
  motion_source: str = MOTION[0]
  odometry: Rows = field(default_factory=list)  # the same in the calibrated frame, from the model
  desire: dict[str, Rows] = field(default_factory=dict)  # source -> log.Desire
  gps: dict[str, Rows] = field(default_factory=dict)  # source -> latitude, longitude, altitude
  left_hand: bool | None = None  # traffic keeps to the left
  lateral_delay: float | None = None  # s
  longitudinal_delay: float = 0.0
  truncated: list[str] = field(default_factory=list)

  def add(self, event: Any) -> None:
    which, t = event.which(), event.logMonoTime * 1e-9
    m = getattr(event, which)
    if which == "carState":
      self.car.append((t, m.vEgo, m.aEgo, m.steeringAngleDeg, m.leftBlinker, m.rightBlinker))
    elif which in MOTION:
      if (row := device_velocity(event)) is not None:
        (self.motion if which == MOTION[0] else self.old_motion).append(row)
    elif which == "cameraOdometry":
      if event.valid and len(m.trans) == 3 and len(m.rot) == 3:
        self.odometry.append((m.timestampEof * 1e-9, *m.trans, *m.rot))
    elif which in DESIRES:
      self.desire.setdefault(which, []).append((t, desire(event) or 0))
    elif which in GPS:
      if gps_fix(m):
        self.gps.setdefault(which, []).append((t, m.latitude, m.longitude, m.altitude))
    elif which == "selfdriveState":
      self.engaged.append((t, m.enabled))
    elif which == "carControl":
      if not self.engaged:  # logs older than selfdriveState
        self.desire.setdefault("carControl", []).append((t, m.enabled))
    elif which in TRAFFIC_SIDE:
      self.left_hand = left_hand(event)
    elif which == "lateralDelay":
      self.lateral_delay = m.lateralDelay
    elif which == "carParams":
      self.longitudinal_delay = m.longitudinalActuatorDelay
      if self.lateral_delay is None:
        self.lateral_delay = m.steerActuatorDelay + 0.2

  def desires(self) -> tuple[np.ndarray, str]:
    """(N, 2) time and log.Desire, and which messages say so: the lane-change state of the version that wrote the log,
    else what the blinkers ask for."""
    source = speaking(self.desire)
    if source is not None:
      field_name = "desire" if source == "lateralPlanDEPRECATED" else "meta.laneChangeState"
      return np.array(self.desire[source], np.float64), f"{source}.{field_name}"
    if not self.car:
      return np.zeros((0, 2)), "none"
    car = np.array(self.car, np.float64)
    left, right = (car[:, 4] > 0) & (car[:, 5] == 0), (car[:, 5] > 0) & (car[:, 4] == 0)
    fast = car[:, 1] >= LANE_CHANGE_SPEED
    code = np.where(
      left, np.where(fast, CHANGE_LEFT, TURN_LEFT), np.where(right, np.where(fast, CHANGE_RIGHT, TURN_RIGHT), 0)
    )
    return np.stack([car[:, 0], code], 1), "carState blinkers"

  def action_t(self) -> tuple[float, float]:
    return (self.lateral_delay or 0.2) + MODEL_DELAY, self.longitudinal_delay + MODEL_DELAY


def read_log(segment: Segment) -> DriveLog:
  """Raises UserError where the log cannot be read. A damaged end is said in `truncated`."""
  assert segment.log_path is not None
  out = DriveLog()
  reader = LogReader([segment.log_path], services=SERVICES)
  for event in reader:
    with reader.guard(event):
      out.add(event)
  if not out.engaged:
    out.engaged = out.desire.get("carControl", [])
  out.desire.pop("carControl", None)
  if not out.motion:
    out.motion, out.motion_source = out.old_motion, MOTION[1]
  out.truncated = reader.truncated
  return out


def motion_of(logs: Iterable[DriveLog], rpy: np.ndarray) -> tuple[np.ndarray, str, float]:
  """-> (N, 7) time, velocity and turn rates in the calibrated frame, over all `logs`; their source; its rate in Hz.
  rpy: of the segment that looks ahead."""
  logs = list(logs)
  device = [r for g in logs for r in g.motion]
  odometry = [r for g in logs for r in g.odometry]
  source, rows = (
    (next(g.motion_source for g in logs if g.motion), device) if len(device) >= 2 else ("cameraOdometry", odometry)
  )
  if len(rows) < 2:
    return np.zeros((0, 7)), "none", 0.0
  m = np.array(sorted(rows), np.float64)
  if source != "cameraOdometry":
    device_from_calib = rot_from_euler(rpy)
    m[:, 1:4], m[:, 4:7] = m[:, 1:4] @ device_from_calib, m[:, 4:7] @ device_from_calib  # by the transposed, as rows
  return m, source, float(1 / np.median(np.diff(m[:, 0])))


def held(t: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """rows (N, 1 + C) -> (len(t), C): the last value before each t; NaN before the first, and where it is stale."""
  out = np.full((len(t), rows.shape[1] - 1), np.nan)
  if len(rows):
    i = np.searchsorted(rows[:, 0], t, side="right") - 1
    good = (i >= 0) & (t - rows[np.maximum(i, 0), 0] <= STALE)
    out[good] = rows[i[good], 1:]
  return out


def between(t: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """As held(), but linear between samples; NaN further than STALE from the nearest."""
  out = np.full((len(t), rows.shape[1] - 1), np.nan)
  if len(rows):
    i = np.clip(np.searchsorted(rows[:, 0], t), 1, max(1, len(rows) - 1))
    near = np.minimum(np.abs(t - rows[i - 1, 0]), np.abs(t - rows[np.minimum(i, len(rows) - 1), 0])) <= STALE
    values = np.stack([np.interp(t, rows[:, 0], rows[:, k]) for k in range(1, rows.shape[1])], -1)
    out[near] = values[near]
  return out


def pulses(t: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """rows (N, 2) of time and log.Desire -> (len(t), 8) uint8, one at the frame at which a desire begins, as modeld makes
  them; index 0, none, stays clear."""
  out = np.zeros((len(t), DESIRE_LEN), np.uint8)
  code = np.nan_to_num(held(t, rows)[:, 0]).astype(int) if len(rows) else np.zeros(len(t), int)
  before = np.concatenate([code[:1], code[:-1]])
  rise = (code != before) & (code > 0)
  out[rise, code[rise]] = 1
  return out

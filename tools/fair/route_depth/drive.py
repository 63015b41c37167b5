"""What a log says of the camera's own way in meters: cameraOdometry's turn and direction, else livePose's, at the speed
of the wheels where carState has it; the camera's height; and radar's leads."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from openpilot.common.transformations.camera import view_frame_from_device_frame
from openpilot.common.transformations.orientation import rot_from_euler
from openpilot.selfdrive.modeld.fair.calibration import mounting
from openpilot.selfdrive.modeld.fair.heads.ground import DEFAULT_HEIGHT, MAX_HEIGHT, MIN_HEIGHT
from openpilot.tools.fair.route_depth.geometry import Move
from openpilot.tools.lib.log_fields import MOTION, device_velocity
from openpilot.tools.lib.logreader import LogReader

MAX_GAP = 1.0  # s between two messages, and before and after them
MAX_RATE, MAX_SPEED = 1.0, 100.0  # rad/s, m/s; more is no drive
STEP = 0.025  # s, in which velocities are summed up
LEAD_GAP = 0.1  # s between a frame and radar's word
RADAR_TO_CAMERA = 1.52  # m: distances of radarState are from the bumper


class Drive:
  """One log. source: whose turns are taken, '' where there are none. height: of the camera, m, known: whether the log
  says it. Raises UserError where the log cannot be read."""

  def __init__(self, path: str | Path):
    odometry: list[tuple[float, ...]] = []
    pose: list[tuple[float, ...]] = []
    speed: list[tuple[float, float]] = []
    self.leads: list[tuple[float, float, float]] = []  # time s, x m ahead of the camera, y m to the right
    self.height, self.known = DEFAULT_HEIGHT, False
    reader = LogReader([path], services=["cameraOdometry", *MOTION, "carState", "extrinsicsCalibration", "radarState"])
    for event in reader:
      with reader.guard(event):
        which = event.which()
        if which == "cameraOdometry":
          m = event.cameraOdometry
          if len(m.trans) == 3 and len(m.rot) == 3:
            odometry.append((m.timestampEof * 1e-9, *m.trans, *m.rot))
        elif which in MOTION:
          if (row := device_velocity(event)) is not None:
            pose.append(row)
        elif which == "carState":
          speed.append((event.logMonoTime * 1e-9, abs(event.carState.vEgo)))
        elif which == "extrinsicsCalibration":
          height = mounting(event.extrinsicsCalibration)[1]
          if height is not None and MIN_HEIGHT <= height <= MAX_HEIGHT:
            self.height, self.known = height, True
        else:
          self._lead(event)
    self.source, rows = ("cameraOdometry", odometry) if len(odometry) >= 2 else ("deviceMotion", pose)
    self.motion = sound(rows, 7)
    if not len(self.motion):
      self.source = ""
    self.speed = sound(speed, 2)
    self.leads.sort()
    parts = (self.motion, self.speed, np.array(self.leads, np.float64), np.array(self.height))
    self.hash = hashlib.sha256(b" ".join(np.ascontiguousarray(x).tobytes() for x in parts)).hexdigest()

  def _lead(self, event: Any) -> None:
    """Of the nearest one that radar itself sees: the driving model's guess is no measurement."""
    lead = event.radarState.leadOne
    if lead.present and lead.radar and 0 < lead.dRel < 200:
      self.leads.append((event.logMonoTime * 1e-9, lead.dRel + RADAR_TO_CAMERA, -lead.yRel))

  def move(self, now: int, before: int, rpy: np.ndarray, whole: bool) -> Move | None:
    """Times of two frames, ns -> how a point of the frame `now` lies in the camera of `before`; None where the log does
    not say. rpy: (3,) rad of the mounting. whole: the camera's own picture is meant, not the view that looks along the
    car."""
    a, b = before * 1e-9, now * 1e-9
    if not (covers(self.motion, a) and covers(self.motion, b)):
      return None
    n = max(1, round((b - a) / STEP))
    times = a + (np.arange(n) + 0.5) * ((b - a) / n)
    rows = at(self.motion, times)
    device_from_calib = rot_from_euler(rpy)
    if self.source == "deviceMotion":
      rows = np.concatenate([rows[:, :3] @ device_from_calib, rows[:, 3:] @ device_from_calib], axis=1)
    if covers(self.speed, a) and covers(self.speed, b):
      wheels = at(self.speed, times)
      rows[:, :3] *= wheels / np.maximum(np.linalg.norm(rows[:, :3], axis=1, keepdims=True), 1e-3)
    turn, way = np.eye(3), np.zeros(3)
    for row in rows:
      half = cv2.Rodrigues(row[3:] * (b - a) / n / 2)[0]
      way += turn @ half @ row[:3] * (b - a) / n
      turn = turn @ half @ half
    to_camera = camera_from_calib(rpy, whole)
    return Move(to_camera @ turn @ to_camera.T, to_camera @ way)

  def way(self, now: int, before: int) -> float:
    """m driven between two frames; nan where the log does not say."""
    rows = self.speed if covers(self.speed, now * 1e-9) else self.motion[:, :4]
    if not (covers(rows, now * 1e-9) and covers(rows, before * 1e-9)):
      return float("nan")
    times = np.linspace(before * 1e-9, now * 1e-9, 9)
    return float(np.linalg.norm(at(rows, times), axis=1).mean() * (now - before) * 1e-9)

  def lead(self, now: int) -> tuple[float, float] | None:
    """x m ahead of the camera and y m to the right of what radar sees ahead in a frame, None for nothing."""
    near = min(self.leads, key=lambda x: abs(x[0] - now * 1e-9), default=None)
    return None if near is None or abs(near[0] - now * 1e-9) > LEAD_GAP else near[1:]


def sound(rows: Sequence[tuple[float, ...]], width: int) -> np.ndarray:
  """Rows of time and numbers, in order of time, without those that are no drive's."""
  table = np.array(sorted(rows), np.float64).reshape(-1, width)
  good = np.isfinite(table).all(axis=1) & (np.abs(table[:, 1:]) < MAX_SPEED).all(axis=1)
  good &= (np.abs(table[:, 4:]) < MAX_RATE).all(axis=1)
  return table[good]


def covers(rows: np.ndarray, t: float) -> bool:
  """Whether rows of time and numbers say anything of t, s."""
  if len(rows) < 2:
    return False
  k = min(max(int(np.searchsorted(rows[:, 0], t)), 1), len(rows) - 1)
  near = rows[k - 1 : k + 1, 0]
  return bool(near[1] - near[0] <= MAX_GAP and near[0] - MAX_GAP / 4 <= t <= near[1] + MAX_GAP / 4)


def at(rows: np.ndarray, times: np.ndarray) -> np.ndarray:
  return np.stack([np.interp(times, rows[:, 0], x) for x in rows[:, 1:].T], axis=1)


def camera_from_calib(rpy: np.ndarray, whole: bool) -> np.ndarray:
  """(3, 3) to the camera's frame, or to the view's, which looks along the car."""
  return view_frame_from_device_frame @ (rot_from_euler(rpy) if whole else np.eye(3))


@lru_cache(4)
def read_drive(path: Path) -> Drive:
  return Drive(path)

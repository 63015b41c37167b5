"""What fairmodeld listens to: the newest messages of openpilot's. What cannot be read is reported and left out: whoever
sent it must not stop this process."""

import contextlib
from collections.abc import Callable
from typing import Any

from openpilot.selfdrive.modeld.fair.calibration import mounting, turn_rate
from openpilot.selfdrive.modeld.fair.ipc import messaging, service
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.selfdrive.modeld.fair.schedule import ModelPace
from openpilot.selfdrive.modeld.fair.state import first_line

EXTRINSICS, CAMERA_STATE = service("extrinsicsCalibration"), service("narrowRoadCameraState")
MAX_SPEED = 100.0  # m/s


class Inbox:
  """report: told what could not be read. replay: openpilot's process_replay, in which what was there once counts as
  alive."""

  def __init__(self, replay: bool, report: Callable[[str], None]):
    self.replay, self.report = replay, report
    services = [EXTRINSICS, CAMERA_STATE, "deviceState", "modelV2", "carState", "cameraOdometry"]
    self.sm = messaging.SubMaster(services, ignore_avg_freq=services)
    self.taken: dict[str, int] = {}  # service -> SubMaster's number of the update whose message was taken last
    self.pace = ModelPace()

  def update(self, timeout_ms: int) -> None:
    """Takes the newest messages. Bytes that are no message are left out and counted."""
    try:
      self.sm.update(timeout_ms)
    except Exception as e:  # capnp's exceptions come from its C++ side
      self.report(f"bytes came that are no message: {first_line(e)}")
    if self.is_new("modelV2"):
      with contextlib.suppress(Exception):  # model_behind() tells
        self.pace.hear(self.sm["modelV2"].frameId)

  def is_new(self, service: str) -> bool:
    """Whether a message came since the last time this was asked."""
    before, self.taken[service] = self.taken.get(service), self.sm.recv_frame[service]
    return self.sm.seen[service] and self.taken[service] != before

  def alive(self, service: str) -> bool:
    """Whether it comes. By the machine's clock: in process_replay what was there once counts."""
    return self.sm.seen[service] and (self.replay or self.sm.alive[service])

  def heat(self, model: FairModel) -> None:
    """The device's heat, where it is told anew."""
    if self.is_new("deviceState"):
      try:
        model.schedule.heat(str(self.sm["deviceState"].thermalStatus))
      except Exception as e:
        self.report(f"deviceState cannot be read: {first_line(e)}")

  def camera(self) -> tuple[str | None, str | None]:
    """The device's word on its type and its camera's sensor, None where it says nothing."""
    device = sensor = None
    try:
      device = str(self.sm["deviceState"].deviceType) if self.sm.seen["deviceState"] else None
      sensor = str(self.sm[CAMERA_STATE].sensor) if self.sm.seen[CAMERA_STATE] else None
    except Exception as e:
      self.report(f"deviceState or {CAMERA_STATE} cannot be read: {first_line(e)}")
    return device, sensor

  def calibrate(self, model: FairModel) -> None:
    """The camera's mounting, where it is told anew. What is not one is refused."""
    if not self.is_new(EXTRINSICS):
      return
    try:
      calibration = self.sm[EXTRINSICS]
      rpy, height = mounting(calibration)
      if rpy is not None:
        model.set_calibration(rpy, height)
      elif model.rpy is None:
        model.report(f"calibration {list(calibration.rpyCalib)[:3]} is not one; the default mounting is used")
    except Exception as e:
      self.report(f"{EXTRINSICS} cannot be read: {first_line(e)}")

  def model_behind(self, frame_id: int) -> int | None:
    """Frames that the newest modelV2 is behind this one; None where modelV2 is not alive or says nothing."""
    if not self.alive("modelV2"):
      return None
    try:
      return frame_id - self.sm["modelV2"].frameId
    except Exception as e:
      self.report(f"modelV2 cannot be read: {first_line(e)}")
      return None

  def model_of(self, frame_id: int) -> Any:
    """The modelV2 of this frame, or of the one before where this one's is late; None without."""
    behind = self.model_behind(frame_id)
    return self.sm["modelV2"] if behind is not None and self.sm.valid["modelV2"] and 0 <= behind <= 1 else None

  def speed(self) -> float | None:
    """m/s, None where nobody tells it or no car goes so fast: by it relative depth finds its scale."""
    try:
      v = self.sm["carState"].vEgo if self.alive("carState") else None
      return v if v is not None and abs(v) <= MAX_SPEED else None  # False for nan
    except Exception as e:
      self.report(f"carState cannot be read: {first_line(e)}")
      return None

  def yaw_rate(self) -> float | None:
    """Of turn_rate(), None where nobody tells it: by it and the speed what is out of sight is looked for."""
    try:
      return turn_rate(self.sm["cameraOdometry"]) if self.alive("cameraOdometry") else None
    except Exception as e:
      self.report(f"cameraOdometry cannot be read: {first_line(e)}")
      return None

"""Fields that openpilot moved over the years, read from a log of any age. All functions take a reader of an event, or
of its message."""

from collections.abc import Iterable
from typing import Any

# services that have held a field, newest first
TRAFFIC_SIDE = ("driverMonitoringState", "driverMonitoringStateDEPRECATED")  # the second until August 2026
DESIRES = ("modelV2", "drivingModelData", "lateralPlanDEPRECATED")  # the third until openpilot 0.9.4, the others after
GPS = ("gpsLocationExternal", "gpsLocation")  # u-blox, and the modem's
MOTION = ("deviceMotion", "liveLocationKalmanDEPRECATED")  # livePose; the second until openpilot 0.9.7

CHANGES = {"left": 3, "right": 4}  # log.Desire of a lane change
OLD_STATUS = {0: "uncalibrated", 1: "calibrated", 2: "invalid"}
FIX = 1  # bit of the flags of u-blox and Android


def left_hand(event: Any) -> bool | None:
  """Traffic keeps to the left, and the driver sits on the right; None where this event does not hold it."""
  return bool(getattr(event, event.which()).isRHD) if event.which() in TRAFFIC_SIDE else None


def desire(event: Any) -> int | None:
  """modeld's input log.Desire; None where this event does not hold it. A lane change counts from its start to its end,
  not while it is being prepared."""
  which = event.which()
  if which not in DESIRES:
    return None
  m = getattr(event, which)
  if which == "lateralPlanDEPRECATED" and m.desire.raw:
    return int(m.desire.raw)
  m = m if which == "lateralPlanDEPRECATED" else m.meta
  changing = str(m.laneChangeState) in ("laneChangeStarting", "laneChangeFinishing")
  return CHANGES.get(str(m.laneChangeDirection), 0) if changing else 0


def speaking(sources: dict[str, list[Any]], order: Iterable[str] = DESIRES) -> str | None:
  """sources: source -> rows that end with a log.Desire. Returns the source that the log's version writes. Those of
  other versions may be there too, but are always 0; where all are 0, the first of `order`."""
  there = [s for s in order if sources.get(s)]
  return max(there, key=lambda s: sum(row[-1] > 0 for row in sources[s]), default=None)


def gps_fix(m: Any) -> bool:
  """m: a gpsLocation or gpsLocationExternal. hasFix is not written before openpilot 0.9.5; until then a flag holds
  it."""
  return bool(m.hasFix or m.flags & FIX)


def calibration_status(m: Any) -> str:
  """m: an extrinsicsCalibration -> uncalibrated, calibrated, invalid or recalibrating; a number before openpilot
  0.9."""
  status = str(m.calStatus)
  return OLD_STATUS.get(m.calStatusDEPRECATED, status) if status == "uncalibrated" else status


def device_velocity(event: Any) -> tuple[float, ...] | None:
  """Time in seconds, velocity in m/s and turn rates in rad/s of the device's frame; None where this event has no valid
  one."""
  which, t = event.which(), event.logMonoTime * 1e-9
  if which not in MOTION:
    return None
  m = getattr(event, which)
  v, w = m.velocityDevice, m.angularVelocityDevice
  if not (v.valid and w.valid and m.inputsOK):
    return None
  if which == "deviceMotion":
    return (m.timestamp * 1e-9 or t, v.x, v.y, v.z, w.x, w.y, w.z)
  return (t, *v.value, *w.value) if len(v.value) == len(w.value) == 3 else None

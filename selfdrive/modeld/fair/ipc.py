"""The one place where this folder meets openpilot: its messaging, VisionIPC, params and cameras.

In every upstream tree since March 2025, of both layouts, and in this repository; where they differ, the difference ends
here. Dates are upstream's."""

import importlib.util
from typing import Any

import numpy as np

if importlib.util.find_spec("openpilot.cereal") is not None:
  from openpilot.cereal import messaging
  from openpilot.cereal.services import SERVICE_LIST
else:  # before June 2026 cereal was a package of its own
  from cereal import messaging  # type: ignore[no-redef]
  from cereal.services import SERVICE_LIST  # type: ignore[assignment]

try:
  from openpilot.cereal.visionipc import VisionIpcClient as Client, VisionStreamType
except ImportError:  # upstream VisionIPC is msgq's
  from msgq.visionipc import VisionIpcClient as Client  # type: ignore[no-redef]

  try:
    from openpilot.cereal.visionipc import VisionStreamType
  except ImportError:  # before August 2026 the streams' names were, too
    from msgq.visionipc import VisionStreamType  # type: ignore[no-redef]

from openpilot.common.params import Params, UnknownKeyName
from openpilot.common.realtime import config_realtime_process
from openpilot.common.transformations.camera import DEVICE_CAMERAS

__all__ = [
  "DEVICE_CAMERAS",
  "SERVICE_LIST",
  "Params",
  "VisionIpcClient",
  "config_realtime_process",
  "messaging",
  "queue_size",
  "read_flag",
  "read_param",
  "road_camera",
  "service",
  "stream_type",
]

# the spelling since August 2026 -> the one before
OLD_NAMES = {"narrowRoadCameraState": "roadCameraState", "extrinsicsCalibration": "liveCalibration"}
OLD_QUEUE = 10 * 1024 * 1024  # bytes; of every service before December 2025


def service(name: str) -> str:
  """A service's name in this checkout's spelling."""
  return name if name in SERVICE_LIST else OLD_NAMES.get(name, name)


def queue_size(name: str) -> int:
  """Bytes of a service's queue: msgq aborts the process over a message that takes more than a third of it."""
  return int(getattr(SERVICE_LIST[name], "queue_size", OLD_QUEUE))


def stream_type(stream: str) -> int:
  """'narrowRoad' or 'wideRoad' -> the checkout's VisionStreamType."""
  if stream == "wideRoad":
    return VisionStreamType.VISION_STREAM_WIDE_ROAD
  name = "VISION_STREAM_NARROW_ROAD" if hasattr(VisionStreamType, "VISION_STREAM_NARROW_ROAD") else "VISION_STREAM_ROAD"
  return getattr(VisionStreamType, name)


def road_camera(cameras: Any, wide: bool) -> Any:
  """The narrow road camera (wide: the wide one) of a DeviceCameraConfig; before August 2026 they were fcam and ecam."""
  new, old = ("wide_road", "ecam") if wide else ("narrow_road", "fcam")
  return getattr(cameras, new if hasattr(cameras, new) else old)


def read_param(params: Params, key: str) -> str | None:
  """A param's text; None where it has none or the fork did not add the key. Before 0.10 params were bytes."""
  try:
    value = params.get(key)
  except UnknownKeyName:
    return None
  return value.decode(errors="replace") if isinstance(value, bytes) else value


def read_flag(params: Params, key: str) -> bool:
  """A param's truth; False where it is not set or the fork did not add the key."""
  try:
    return bool(params.get_bool(key))
  except UnknownKeyName:
    return False


class VisionIpcClient(Client):
  """openpilot's, whose frames are numpy everywhere."""

  def recv(self, timeout_ms: int = 100) -> np.ndarray | None:  # type: ignore[override]
    """The next frame's bytes: uint8, 1-D, a view of the camera's memory until the next recv(), connect() or close().
    msgq's VisionBuf.data was an array until May 2026, a memoryview since."""
    buf = super().recv(timeout_ms)
    return None if buf is None else np.frombuffer(buf.data, dtype=np.uint8)

  def close(self) -> None:
    """msgq's client has no close(): it lets go when the last reference does."""
    if hasattr(Client, "close"):
      super().close()

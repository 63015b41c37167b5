"""The one place where this folder meets openpilot: its messaging, VisionIPC and params, in a checkout of any age and in this repository."""
try:
  from openpilot.cereal import log, messaging
  from openpilot.cereal.services import SERVICE_LIST
except ImportError:   # openpilot before June 2026: cereal was a package of its own
  from cereal import log, messaging  # type: ignore[no-redef]
  from cereal.services import SERVICE_LIST  # type: ignore[assignment]

try:
  from openpilot.cereal.visionipc import VisionIpcClient, VisionStreamType
except ImportError:   # an openpilot checkout: VisionIPC is msgq's
  from msgq.visionipc import VisionIpcClient  # type: ignore[no-redef]
  try:
    from openpilot.cereal.visionipc import VisionStreamType
  except ImportError:
    from msgq.visionipc import VisionStreamType  # type: ignore[no-redef]

from openpilot.common.params import Params, UnknownKeyName
from openpilot.common.realtime import config_realtime_process

__all__ = ["SERVICE_LIST", "Params", "UnknownKeyName", "VisionIpcClient", "config_realtime_process", "log", "messaging", "service", "stream_type"]

# the spelling since August 2026 -> the one before
OLD_NAMES = {"narrowRoadCameraState": "roadCameraState", "extrinsicsCalibration": "liveCalibration"}


def service(name: str) -> str:
  """A service's name in this checkout's spelling."""
  return name if name in SERVICE_LIST else OLD_NAMES.get(name, name)


def stream_type(stream: str) -> int:
  """'narrowRoad' or 'wideRoad' -> the checkout's VisionStreamType."""
  if stream == "wideRoad":
    return VisionStreamType.VISION_STREAM_WIDE_ROAD
  name = "VISION_STREAM_NARROW_ROAD" if hasattr(VisionStreamType, "VISION_STREAM_NARROW_ROAD") else "VISION_STREAM_ROAD"
  return getattr(VisionStreamType, name)

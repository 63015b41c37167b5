"""Physical quantities to fair* messages, and back."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.heads.depth import Depth
from openpilot.selfdrive.modeld.fair.heads.segmentation import Segmentation, decode_runs, encode_runs
from openpilot.selfdrive.modeld.fair.ipc import messaging


@dataclass(frozen=True)
class Stamp:
  """What every message carries: the camera frame it is about, and who made it."""
  frame_id: int
  timestamp_eof: int       # ns
  bundle: str
  execution_time: float    # s, of the graph
  valid: bool


def _message(service: str, stamp: Stamp) -> tuple[Any, Any]:
  msg = messaging.new_message(service, valid=stamp.valid)
  m = getattr(msg, service)
  m.frameId, m.timestampEof, m.bundle, m.modelExecutionTime = stamp.frame_id, stamp.timestamp_eof, stamp.bundle, stamp.execution_time
  return msg, m


def depth_message(depth: Depth, stamp: Stamp) -> tuple[str, Any]:
  msg, m = _message("fairDepth", stamp)
  m.height, m.width = depth.z.shape
  m.data, m.metric = depth.z.astype("<f2").tobytes(), depth.metric
  return "fairDepth", msg


def segmentation_message(seg: Segmentation, stamp: Stamp) -> tuple[str, Any]:
  msg, m = _message("fairSegmentation", stamp)
  m.height, m.width = seg.class_map.shape
  values, lengths = encode_runs(seg.class_map)
  m.classes, m.runClass, m.runLength, m.classProb = seg.classes, values.tobytes(), lengths.tolist(), seg.class_prob.tolist()
  return "fairSegmentation", msg


PUBLISH: dict[str, Callable[[Any, Stamp], tuple[str, Any]]] = {"depth": depth_message, "segmentation": segmentation_message}
SERVICES = ("fairDepth", "fairSegmentation", "fairState")


def depth_from_message(m: Any) -> np.ndarray:
  """A fairDepth reader -> (H, W) float32, nan outside the camera image."""
  return np.frombuffer(m.data, dtype="<f2").reshape(m.height, m.width).astype(np.float32)


def class_map_from_message(m: Any) -> np.ndarray:
  """A fairSegmentation reader -> (H, W) uint8, index into m.classes, 255 outside the camera image."""
  return decode_runs(np.frombuffer(m.runClass, dtype=np.uint8), np.array(list(m.runLength)), m.height, m.width)

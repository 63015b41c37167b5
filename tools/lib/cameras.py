"""The cameras that a route may have, and their names in openpilot's logs, files and streams."""

import numpy as np

from openpilot.cereal.visionipc import VisionStreamType

VIDEOS = {"road": "fcamera", "wide": "ecamera", "qcamera": "qcamera"}  # camera -> attribute of route.Segment
CAMERAS = tuple(VIDEOS)
INDEX_SERVICES = {"road": "narrowRoadEncodeIdx", "wide": "wideRoadEncodeIdx", "qcamera": "qNarrowRoadEncodeIdx"}
# the qcamera shows what the road camera sees
STATE_SERVICES = {"road": "narrowRoadCameraState", "qcamera": "narrowRoadCameraState", "wide": "wideRoadCameraState"}
STREAMS = {
  "road": VisionStreamType.VISION_STREAM_NARROW_ROAD,
  "qcamera": VisionStreamType.VISION_STREAM_NARROW_ROAD,
  "wide": VisionStreamType.VISION_STREAM_WIDE_ROAD,
}
STREAM_NAMES = {c: s.removesuffix("CameraState") for c, s in STATE_SERVICES.items()}  # of manifests and fairState


def pinhole(focal: float, width: int, height: int) -> np.ndarray:
  """(3, 3) float64 of a camera whose optical axis goes through the picture's middle; focal length and size, pixels."""
  return np.array([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])

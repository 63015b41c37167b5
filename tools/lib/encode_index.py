"""Which frame of a video is which camera frame: joined by frameId and segmentId, as openpilot does, never by counting."""
from dataclasses import dataclass

from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.route import Segment

SERVICES = {"road": "narrowRoadEncodeIdx", "wide": "wideRoadEncodeIdx", "qcamera": "qNarrowRoadEncodeIdx"}
VIDEOS = {"road": "fcamera", "wide": "ecamera", "qcamera": "qcamera"}


@dataclass(frozen=True)
class EncodeEntry:
  frame_id: int        # CameraState.frameId
  segment_num: int
  segment_id: int      # number of the frame in the segment's video
  timestamp_sof: int   # ns
  timestamp_eof: int


def encode_index(segment: Segment, camera: str = "road") -> list[EncodeEntry]:
  """The frames of a segment's video in order. Logs before the qcamera had an index of its own: the road camera's, whose frames it shows.

  Raises UserError where the log has neither, or the segment no log.
  """
  if segment.log_path is None:
    raise UserError(f"segment {segment.name} has no log, so its frames have no times; play the video file by itself")
  services = [SERVICES[camera]] + (["narrowRoadEncodeIdx"] if camera == "qcamera" else [])
  entries: dict[str, list[EncodeEntry]] = {s: [] for s in services}
  for event in LogReader([segment.log_path], services=services):
    idx = getattr(event, event.which())
    entries[event.which()].append(EncodeEntry(idx.frameId, idx.segmentNum, idx.segmentId, idx.timestampSof, idx.timestampEof))
  for s in services:
    if entries[s]:
      return sorted(entries[s], key=lambda e: e.segment_id)
  raise UserError(f"the log of segment {segment.name} has no {services[0]}: its {VIDEOS[camera]} cannot be joined to it; choose another --camera")


def synthetic_index(frame_count: int, fps: float, segment_num: int = 0, start: int = 1_000_000_000, first_id: int = 0) -> list[EncodeEntry]:
  """For a video without log: frames at its own rate from `start` ns on."""
  step = 1e9 / fps
  return [EncodeEntry(first_id + i, segment_num, i, start + round(i * step), start + round((i + .6) * step)) for i in range(frame_count)]

"""Which frame of a video is which camera frame: joined by frameId and segmentId, as openpilot does, never by
counting."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from openpilot.tools.lib.cameras import INDEX_SERVICES, VIDEOS
from openpilot.tools.lib.errors import UserError, warn
from openpilot.tools.lib.framereader import FrameReader
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.route import Segment

SECOND = 1_000_000_000  # ns
TS_WRAP = 2**33 / 90_000  # s, after which an MPEG-TS counts from 0 again
LATEST = 2**62  # ns; times beyond are damaged


@dataclass(frozen=True)
class EncodeEntry:
  frame_id: int  # CameraState.frameId
  segment_num: int
  segment_id: int  # number of the frame in the segment's video, as it was written
  timestamp_sof: int  # ns
  timestamp_eof: int
  place: int = -1  # of the picture in the video's file; equals segment_id unless pictures were lost

  @property
  def position(self) -> int:
    return self.place if self.place >= 0 else self.segment_id


def encode_index(segment: Segment, camera: str = "road") -> list[EncodeEntry]:
  """The frames of a segment's video in order. Logs before the qcamera had an index of its own: the road camera's, whose
  frames it shows.

  Where the log has no exposure times, as before 2020, a frame's time is its message's. Raises UserError where the log
  has no index of this segment, or the segment no log."""
  if segment.log_path is None:
    raise UserError(f"segment {segment.name} has no log, so its frames have no times; play the video file alone")
  services = [INDEX_SERVICES[camera]] + (["narrowRoadEncodeIdx"] if camera == "qcamera" else [])
  rows: dict[str, list[tuple[EncodeEntry, int]]] = {s: [] for s in services}
  reader = LogReader([segment.log_path], services=services)
  for event in reader:
    with reader.guard(event):
      which = event.which()
      idx = getattr(event, which)
      times = (min(t, LATEST) for t in (idx.timestampSof, idx.timestampEof))
      rows[which].append(
        (EncodeEntry(idx.frameId, idx.segmentNum, idx.segmentId, *times), min(event.logMonoTime, LATEST))
      )
  for s in services:
    if rows[s]:
      return in_order(segment, rows[s])
  raise UserError(
    f"the log of segment {segment.name} has no {services[0]}: its {VIDEOS[camera]} cannot be joined to it; choose "
    "another --camera"
  )


def in_order(segment: Segment, rows: list[tuple[EncodeEntry, int]]) -> list[EncodeEntry]:
  """Entries and their messages' times -> this segment's entries by segment_id, each once, with times that fit. Warns of
  what was left out or corrected."""
  nums = Counter(e.segment_num for e, _ in rows)
  num = segment.num if segment.num in nums or segment.numbered else nums.most_common(1)[0][0]
  if num not in nums:
    raise UserError(
      f"the log of segment {segment.name} is of segment {nums.most_common(1)[0][0]}: its video cannot be joined to it; "
      "copy the log again"
    )
  by_id: dict[int, tuple[EncodeEntry, int]] = {}
  for e, t in rows:
    if e.segment_num == num and e.segment_id < 2 * len(rows) + 1200:
      by_id.setdefault(e.segment_id, (e, t))
  if not by_id:
    raise UserError(
      f"the log of segment {segment.name} has a damaged index of its video: it cannot be joined to it; copy the "
      "log again"
    )
  if len(by_id) < len(rows):
    warn(
      f"{segment.log_path}: {len(rows) - len(by_id)} of {len(rows)} entries of its index are another segment's, or "
      "twice there; they were left out"
    )
  kept = [by_id[k] for k in sorted(by_id)]
  entries = [e for e, _ in kept]
  sof, eof, odd = exposure_times(entries, np.array([t for _, t in kept], np.int64))
  if odd:
    warn(f"{segment.log_path}: {odd} frames have times that do not fit their neighbors'; the neighbors' are used")
  return [replace(e, timestamp_sof=int(s), timestamp_eof=int(t)) for e, s, t in zip(entries, sof, eof, strict=True)]


def exposure_times(entries: list[EncodeEntry], logged: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
  """-> beginnings and ends of the exposures in ns, and how many times did not fit. logged: (N,) ns, of the index's
  messages."""
  ids = np.array([e.segment_id for e in entries], np.int64)
  sof, eof = (np.array([getattr(e, k) for e in entries], np.int64) for k in ("timestamp_sof", "timestamp_eof"))
  lag = float(np.median(logged - eof))
  if np.median(eof) == 0 or abs(lag) > 60 * SECOND:  # none, or on another clock than the messages
    return logged, logged, 0
  odd = np.abs(logged - eof - lag) > 2 * SECOND
  replaced = 0
  if odd.any() and not odd.all():
    good = np.flatnonzero(~odd)
    period = float(np.median(np.diff(eof[good]) / np.diff(ids[good]))) if len(good) > 1 else 0.05 * SECOND
    for i in np.flatnonzero(odd):
      near = good[np.argmin(np.abs(good - i))]
      expected = max(0, int(eof[near] + (ids[i] - ids[near]) * period))
      if abs(int(eof[i]) - expected) > SECOND:
        replaced += 1
        eof[i] = sof[i] = expected
  sof = np.where(np.abs(eof - sof) > SECOND, eof, sof)
  return sof, eof, replaced


def join(entries: list[EncodeEntry], reader: FrameReader) -> list[EncodeEntry]:
  """Entries that have a picture in the video, each with its place in the file.

  As many pictures as entries: they match one by one. Else some pictures are lost. Then a picture is found by its
  presentation time, which loggerd sets to the exposure's; or by its number in the stream, where the number of entries
  shows how many whole groups are lost."""
  count = entries[-1].segment_id + 1
  if at := elsewhere(entries, reader):
    warn(
      f"{reader.path}: its pictures begin at {at[0]:.2f} s, those of the log's index at {at[1]:.2f} s; is it the video "
      "of another segment?"
    )
  numbers = np.arange(reader.frame_count) if reader.frame_count == count else by_time(entries, reader)
  if numbers is None:
    if rates := other_rate(entries, reader):
      raise UserError(
        f"{reader.path}: its pictures are {rates[0]:.3f} s apart, those of the log's index {rates[1]:.3f} s: it was "
        "encoded again at another rate and cannot be joined to its log; copy the video that the device wrote"
      )
    numbers = by_number(count, reader)
  if reader.frame_count < count and not reader.raw:  # libav does not notice missing pictures
    reader.broken |= {int(i) + 1 for i in np.flatnonzero(np.diff(numbers) > 1)}
  place = {int(n): i for i, n in reversed(list(enumerate(numbers)))}
  return [
    e if place[e.segment_id] == e.segment_id else replace(e, place=place[e.segment_id])
    for e in entries
    if e.segment_id in place
  ]


def elsewhere(entries: list[EncodeEntry], reader: FrameReader) -> tuple[float, float] | None:
  """Where no picture is of the index's time: when pictures and index begin, s since the device's start. None also where
  the video does not tell: it counts from 0, or whole frames from the recording's beginning."""
  if reader.seconds is None:
    return None
  first, last = entries[0].timestamp_eof * 1e-9, entries[-1].timestamp_eof * 1e-9
  shown = on_clock(reader, first)
  whole = abs(reader.seconds[0] * reader.fps - round(reader.seconds[0] * reader.fps)) < 0.01
  if reader.seconds[0] < 10 or whole or (shown[0] < last + 0.02 and shown[-1] > first - 0.02):
    return None
  return float(shown[0]), first


def other_rate(entries: list[EncodeEntry], reader: FrameReader) -> tuple[float, float] | None:
  """Where pictures follow each other at another rate than the index's frames: both, s from one to the next."""
  if reader.seconds is None or len(reader.seconds) < 3 or len(entries) < 3:
    return None
  ids, ends = (np.array([getattr(e, k) for e in entries], np.float64) for k in ("segment_id", "timestamp_eof"))
  mine, its = float(np.median(np.diff(reader.seconds))), float(np.median(np.diff(ends) / np.diff(ids))) * 1e-9
  return (mine, its) if its > 0 and not 0.9 < mine / its < 1.1 else None


def on_clock(reader: FrameReader, first: float) -> np.ndarray:
  """(frames,) s, presentation times; those of an MPEG-TS, which begin anew after a day, as near to `first` s as can
  be."""
  assert reader.seconds is not None
  wrap = TS_WRAP if reader.path.suffix.lower() == ".ts" else 1e9
  return reader.seconds + np.round((first - reader.seconds[0]) / wrap) * wrap


def by_time(entries: list[EncodeEntry], reader: FrameReader) -> np.ndarray | None:
  """(frames,) segment_id of each picture, -1 for none, where presentation times are times of exposures."""
  if reader.seconds is None:
    return None
  for times in ([e.timestamp_eof for e in entries], [e.timestamp_sof for e in entries]):
    t = np.array(times, np.float64) * 1e-9
    shown = on_clock(reader, t[0])
    near = np.clip(np.searchsorted(t, shown), 1, max(1, len(t) - 1)) if len(t) > 1 else np.zeros(len(shown), np.int64)
    if len(t) > 1:
      near -= np.abs(t[near - 1] - shown) < np.abs(t[near] - shown)
    off = np.abs(t[near] - shown)
    if np.mean(off < 0.002) > 0.9:
      ids = np.array([e.segment_id for e in entries], np.int64)
      return np.where(off < 0.02, ids[near], -1)
  return None


def by_number(count: int, reader: FrameReader) -> np.ndarray:
  """(frames,) segment_id of each picture, from its number in the stream."""
  numbers = reader.numbers.copy()
  missing = count - 1 - int(numbers[-1])
  if missing > 0:
    first_key = int(numbers[reader.keys[0]])
    if (
      reader.seconds is not None and round(reader.seconds[0] * reader.fps) == missing
    ):  # counted from the recording's beginning, which is lost
      return numbers + missing
    if len(reader.breaks) == 1 and reader.gop and missing % reader.gop == 0:
      numbers[reader.breaks[0] :] += missing
    elif reader.keys[0] > 0 and numbers[0] == 0:  # it begins within a group: its beginning is lost
      numbers += (
        missing if not reader.gop or (first_key + missing) % reader.gop == 0 else min(missing, -first_key % reader.gop)
      )
  return numbers


def synthetic_index(
  frame_count: int,
  fps: float,
  segment_num: int = 0,
  start: int = 1_000_000_000,
  first_id: int = 0,
  seconds: np.ndarray | None = None,
) -> list[EncodeEntry]:
  """For a video without log: entries from `start` ns on, at the video's own times (frames,) or, without any, at its
  rate."""
  times = np.arange(frame_count) / fps if seconds is None else seconds - seconds[0]
  return [
    EncodeEntry(first_id + i, segment_num, i, start + round(t * 1e9), start + round((t + 0.6 / fps) * 1e9))
    for i, t in enumerate(times.tolist())
  ]

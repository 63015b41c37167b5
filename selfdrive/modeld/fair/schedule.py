"""Which camera frames are taken: the bundle's rate, less when the device is hot; what comes twice, too late or too
often is told apart. No clock of its own."""

from collections import deque
from enum import Enum
from itertools import pairwise
from typing import Any

CAMERA_RATE = 20.0  # Hz
HEAT = {
  "overheated": 0.5,
  "critical": 0.25,
}  # deviceState.thermalStatus -> of the bundle's rate; every other status: all of it
# frames; a number that falls by less, with an earlier time, is an old frame, else a camera that began anew
REORDERED = 20
MODEL_GAPS = 8  # between modelV2s
JUMPED = 1000  # frames; a number further ahead is one too


class Verdict(Enum):
  TAKE = "take"
  NOT_DUE = "not due"  # at this rate
  AGAIN = "again"  # the frame before, once more
  OLD = "old"  # a newer one was there already


class FrameSchedule:
  """Counts and judges the frames of one stream. Frames are told by their numbers: a clock that jumps changes
  nothing."""

  def __init__(self, manifest: dict[str, Any]):
    self.rate = float(manifest.get("rate", CAMERA_RATE))
    self.budget = float(manifest.get("budget_ms", 1000 / self.rate)) / 1000  # s
    self.factor = 1.0
    self.received = self.dropped = self.not_due = 0
    self.last: tuple[int, int] | None = None  # frame id and end of exposure, ns, of the newest frame

  def heat(self, status: str) -> None:
    """status: deviceState.thermalStatus."""
    self.factor = HEAT.get(status, 1.0)

  @property
  def rate_now(self) -> float:
    return self.rate * self.factor

  @property
  def step(self) -> float:
    """Camera frames between two that are taken."""
    return CAMERA_RATE / self.rate_now

  def follow(self, other: "FrameSchedule") -> None:
    """Goes on with the frames and the heat of another bundle's."""
    self.factor, self.last = other.factor, other.last
    self.received, self.dropped, self.not_due = other.received, other.dropped, other.not_due

  def begin(self) -> None:
    """Another stream, or another camera: the next frame is its first."""
    self.last = None

  def look(self, frame_id: int, timestamp_eof: int) -> tuple[Verdict, int]:
    """The verdict on a frame, and how many that were due are missing before it. Frames that come are counted here;
    those that are dropped, too."""
    if self.last is None:
      behind = JUMPED
    else:
      if frame_id == self.last[0]:
        return Verdict.AGAIN, 0
      behind = self.last[0] - frame_id
      if 0 < behind < REORDERED and timestamp_eof < self.last[1]:
        return Verdict.OLD, 0  # it was counted as dropped when the newer one came
    before = self.last[0] if self.last is not None else frame_id
    self.last = (frame_id, timestamp_eof)
    if behind > 0 or behind <= -JUMPED:  # a new stream
      self.received += 1
      return Verdict.TAKE, 0
    due = int(frame_id / self.step) - int(before / self.step)
    self.received += -behind
    self.not_due += -behind - due
    if due == 0:
      return Verdict.NOT_DUE, 0
    self.dropped += due - 1
    return Verdict.TAKE, due - 1


class ModelPace:
  """How often modelV2 comes, counted in its own frame numbers: with every frame where modeld runs, with one in 40 from
  a qlog."""

  def __init__(self) -> None:
    self.frames: deque[int] = deque(maxlen=MODEL_GAPS + 1)

  def hear(self, frame_id: int) -> None:
    """frame_id: of the modelV2 that came."""
    if self.frames and frame_id < self.frames[-1]:  # another log, or another camera
      self.frames.clear()
    if not self.frames or frame_id > self.frames[-1]:
      self.frames.append(frame_id)

  @property
  def period(self) -> int | None:
    """Frames from one modelV2 to the next: the least of the newest gaps, since some go by unseen. None before there
    were two."""
    return min((b - a for a, b in pairwise(self.frames)), default=None)


def due(turn: int, entry: dict[str, Any]) -> bool:
  """Whether an entry of the manifest with `period` and `phase`, a graph or an output, has its turn."""
  return turn % entry.get("period", 1) == entry.get("phase", 0)

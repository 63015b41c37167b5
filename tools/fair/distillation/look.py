"""One look at a label store: it is opened and listed once, and what is there is passed on."""

import hashlib
from collections.abc import Collection
from functools import cached_property
from pathlib import Path

import numpy as np

from openpilot.tools.fair.labels.store import Group, LabelStore
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.errors import UserError

HELD_OUT = 0.1


def picture_of(frames: Group) -> InputSpec:
  """What the frames of a segment are drawn into; where they do not say it, openpilot's model frame of their view."""
  said = frames.meta.get("input")
  return InputSpec.from_dict(said) if said else InputSpec(view=frames.meta["view"]["name"])


class Look:
  """Raises UserError where there is no label store, or a teacher has two sets of labels for one segment."""

  def __init__(self, root: str | Path):
    self.store = LabelStore(root)
    self.root, self.place = self.store.root, self.store.place
    self.groups = self.store.groups()
    # segment -> teacher -> group
    self.segments = self.store.by_segment({g.teacher for g in self.groups}, self.groups)

  @property
  def labels(self) -> list[Label]:
    """All that teachers say anywhere."""
    return [x for g in self.groups if g.teacher != "frames" for x in g.labels]

  @cached_property
  def digest(self) -> str:
    """Of all that the store says: another teacher, view, calibration or frame changes it."""
    h = hashlib.sha256()
    for g in self.groups:
      height = "" if g.camera_height is None else f" {g.camera_height}"
      h.update(f"{g.segment} {g.path.name} {sorted(g.done())}{height}\n".encode())
    return h.hexdigest()[:16]

  @cached_property
  def longest(self) -> int:
    """Frames of the longest run of consecutive ones; 1 where all are single pictures."""
    most = 0
    for groups in self.segments.values():
      if "frames" in groups:
        frames = groups["frames"]
        ids = frames.frames["frame_id"].to_numpy()
        ends = np.flatnonzero(np.diff(ids) != int(frames.meta["every"])) + 1
        most = max(most, int(np.diff([0, *ends, len(ids)]).max(initial=0)))
    return most

  def picture(self, segments: Collection[str] = ()) -> InputSpec:
    """Of the frames of these segments, by default of all. Raises UserError where they differ."""
    found: dict[InputSpec, str] = {}
    for name, groups in self.segments.items():
      if "frames" in groups and (not segments or name in segments):
        found.setdefault(picture_of(groups["frames"]), name)
    if len(found) > 1:
      what = " and ".join(f"{p.kind} {p.width}x{p.height} of {p.view} ({name})" for p, name in list(found.items())[:2])
      raise UserError(f"{self.place} holds frames of several kinds: {what}; label each kind into a store of its own")
    return next(iter(found), InputSpec())


def look_at(what: str | Path | Look) -> Look:
  return what if isinstance(what, Look) else Look(what)

"""What is known of one frame, in one form, whoever says it: truth, teacher, student, or rival; and the segments that
are evaluated."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.tools.fair.distillation.data import picture_of, sizes_of, valid_of
from openpilot.tools.fair.evaluation.compared import size
from openpilot.tools.fair.evaluation.detections import Objects
from openpilot.tools.fair.labels.dataset import rows_by_frame
from openpilot.tools.fair.labels.origins import CONDITIONS, origin_of, read_origins
from openpilot.tools.fair.labels.store import Group, LabelStore
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import read_json

SLOTS = 128  # points that are followed at a time
NO_POINTS = {"track": np.zeros(0, np.int64), "x": np.zeros(0), "y": np.zeros(0), "visible": np.zeros(0, bool)}


@dataclass
class Scene:
  """One frame; (h, w) of maps is a quarter of the picture's sides. None: nothing is said of it."""

  depth: np.ndarray | None = None  # (h, w) float32 meters, nan unknown
  depth_kind: str = "metric"  # see metrics.Depth
  classes: np.ndarray | None = None  # (h, w) uint8, index into the classes of maps that are compared, 255 unknown
  named: tuple[int, ...] = ()  # those of them that whoever says it knows
  lossy: bool = False  # whether it names others, which are left out
  objects: Objects | None = None
  detector: Objects | None = None
  tracked: Objects | None = None  # with identities
  unknown: np.ndarray | None = None  # (N, 4) boxes of which whoever says it does not know what they are
  points: dict[str, np.ndarray] | None = None  # track, x, y, visible: of a label
  # points (N, 2) and visible (N,), of the queries that everyone is given
  followed: tuple[np.ndarray, np.ndarray] | None = None
  more: dict[str, Any] = field(default_factory=dict)  # group -> what is said, of groups from elsewhere


@dataclass
class Segment:
  """One route segment of a store, with its stored model frames."""

  name: str
  groups: dict[str, Group]
  rows: list[int]  # of the frames, in order
  ids: list[int]
  valid: np.ndarray  # (height, width) bool, pixels of the picture that a camera saw
  conditions: list[str] = field(default_factory=list)
  sizes: np.ndarray | None = None  # (rows of the frames, 2) width, height, of pictures that each have their own

  @property
  def route(self) -> str:
    return self.name.rsplit("--", 1)[0]

  @property
  def frames(self) -> Group:
    return self.groups["frames"]

  @property
  def map_valid(self) -> np.ndarray:
    """(h, w), at the center of each cell of 4x4 pixels."""
    return self.valid[1::4, 1::4]

  @cached_property
  def row_of(self) -> dict[int, int]:
    return dict(zip(self.ids, self.rows, strict=True))

  def valid_at(self, frame_id: int) -> np.ndarray:
    """`valid` of one frame: of pictures what each fills of the frame."""
    if self.sizes is None:
      return self.valid
    width, height = self.sizes[self.row_of[frame_id]].tolist()
    return picture_of(self.frames).covered(width, height)

  def map_valid_at(self, frame_id: int) -> np.ndarray:
    return self.valid_at(frame_id)[1::4, 1::4]


def open_segments(
  root: Path,
  teachers: set[str],
  routes: list[Path],
  only: str | None = None,
  limit: int | None = None,
  stale: bool = False,
  wanted: InputSpec | None = None,
) -> list[Segment]:
  """All segments with stored frames; the first `limit` frames of each. routes: folders in which the routes themselves
  may lie. wanted: what the frames must be, openpilot's model frames by default. Raises UserError where no segment has
  frames, or other ones, one has two sets of them or of labels by one of `teachers`, or some are stale (labels/rules.py)
  and `stale` does not take them."""
  store = LabelStore(root)
  by_segment, said = store.by_segment({"frames", *teachers}), read_origins(store.root)
  out = []
  for name, groups in sorted(by_segment.items()):
    if only not in (None, name) or "frames" not in groups or not groups["frames"].done():
      continue
    frames = groups["frames"]
    stored = picture_of(frames)
    if size(stored) != size(wanted or InputSpec()):
      raise UserError(
        f"{frames.path} holds {size(stored)}, and {size(wanted or InputSpec())} are what the bundle takes; label with "
        "that input into another store, or choose another bundle"
      )
    bad = frames.bad()
    rows = [r for r in sorted(rows_by_frame(frames).values()) if r not in bad][:limit]
    ids = frames.frames["frame_id"].to_numpy()[rows].tolist()
    out.append(
      Segment(name, groups, rows, ids, valid_of(frames), conditions_of(name, groups, routes, said), sizes_of(frames))
    )
  store.check_stale((s.groups[t] for s in out for t in ("frames", *sorted(teachers)) if t in s.groups), stale)
  if not out:
    raise UserError(
      f"{root} holds no model frames{f' of {only}' if only else ''} to run a student on; label its routes without "
      "--no-frames"
    )
  return out


def conditions_of(
  name: str, groups: dict[str, Group], routes: list[Path], origins: list[dict[str, Any]] | None = None
) -> list[str]:
  """'night', 'rain', ... as the store's sources.yaml says (origins.py), or the simulator in the route's truth.json,
  which its labels remember; [] where none of them is at hand."""
  if known := origin_of(name, groups, origins or []).conditions:
    return list(known)
  for folder in routes:
    for path in (folder / name, *folder.glob(f"*/{name}")):
      info = path / "truth" / "truth.json"
      if info.exists():
        try:
          said = read_json(info)
        except ValueError:
          raise UserError(f"{info} is not JSON; write the route again, or leave out --routes") from None
        return [str(said[k]) for k in CONDITIONS if said.get(k)]
  return []


@dataclass
class Queries:
  """Points of one frame that every student is to follow, in N fixed slots, and the truth of them."""

  xy: np.ndarray  # (N, 2) where a fresh point is
  used: np.ndarray  # (N,) bool
  fresh: np.ndarray  # (N,) bool
  known: np.ndarray  # (N,) bool: the truth says where it is now, and it is not fresh
  truth: np.ndarray  # (N, 2)
  visible: np.ndarray  # (N,) bool
  hidden_before: np.ndarray  # (N,) bool


class QueryMaker:
  """Slots for the true tracks of one segment: a track takes a free slot in the first frame in which it is seen, and
  gives it back behind its last. Tracks that find no slot are left out, for all alike."""

  def __init__(self, tables: list[dict[str, np.ndarray] | None], slots: int = SLOTS):
    self.tables, self.slots = tables, slots
    self.last = {int(k): t for t, table in enumerate(tables) if table is not None for k in table["track"]}
    self.slot: dict[int, int] = {}
    self.hidden: set[int] = set()
    self.refused: set[int] = set()

  def step(self, t: int) -> Queries:
    table = self.tables[t] or NO_POINTS
    self.slot = {k: s for k, s in self.slot.items() if self.last[k] >= t}
    n = self.slots
    used, fresh, known, visible, hidden_before = (np.zeros(n, bool) for _ in range(5))
    q = Queries(np.zeros((n, 2)), used, fresh, known, np.zeros((n, 2)), visible, hidden_before)
    free = sorted(set(range(n)) - set(self.slot.values()), reverse=True)
    for k, x, y, seen in zip(*(table[c] for c in ("track", "x", "y", "visible")), strict=True):
      k = int(k)
      if k not in self.slot:
        if not seen or k in self.refused:
          continue
        if not free:
          self.refused.add(k)
          continue
        s = self.slot[k] = free.pop()
        q.fresh[s] = True
        q.xy[s] = x, y
        self.hidden.discard(k)
      s = self.slot[k]
      q.known[s] = not q.fresh[s]
      q.truth[s], q.visible[s], q.hidden_before[s] = (x, y), seen, k in self.hidden
      if not seen:
        self.hidden.add(k)
    q.used[list(self.slot.values())] = True
    return q


def check_label(segments: list[Segment], name: str, root: Path) -> list[Segment]:
  """The segments that `name` has labeled. Raises UserError where there is none."""
  there = [s for s in segments if name in s.groups and s.groups[name].done()]
  if not there:
    teachers: set[str] = {t for s in segments for t in s.groups if t != "frames"}
    raise UserError(
      f"{root} has no labels by '{name}' of segments with frames; there are "
      f"{', '.join(sorted(teachers)) or 'none at all'}"
    )
  return there


def info_of(group: Group) -> dict[str, Any]:
  t = group.meta["teacher"]
  return {"name": t["name"], "model_id": t["model_id"], "checkpoint": t["checkpoint"][:12], "license": t["license"]}

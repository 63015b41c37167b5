"""Identity through occlusion without SAM: what a detector sees, where things were going, and what colors they had. The
permissive stand-in.

How they are followed is in motion.py. Lucas-Kanade's flow may be added."""

from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from openpilot.tools.fair.sam.motion import LOOKS, ObjectTracker, Tracks, to_boxes
from openpilot.tools.fair.sam.turn import TurnLog, turned
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Clip, Entry, Label, Labels, State, Teacher, check_least
from openpilot.tools.lib.errors import UserError

# detectors take one for the other
ALIKE = (("car", "truck", "bus", "train", "vehicle"), ("bicycle", "motorcycle"))
COLUMNS = {
  "frame": np.int32,
  **dict.fromkeys(("x0", "y0", "x1", "y1", "score"), np.float32),
  "cls": np.int16,
  "track": np.int64,
}


def flow_of(before: np.ndarray, after: np.ndarray, t: Tracks) -> tuple[np.ndarray, np.ndarray]:
  """Gray pictures (H, W) uint8 -> (N, 2) how far each track that was seen before has moved, the median of
  Lucas-Kanade's points in its middle, and (N,) the variance, inf where none was followed there and back."""
  moved, variance = np.zeros((len(t.ids), 2)), np.full(len(t.ids), np.inf)
  seen = np.flatnonzero(t.missed == 0)
  if not len(seen):
    return moved, variance
  boxes = to_boxes(t.mean[seen, :, 0])
  grid = np.stack(np.meshgrid(np.linspace(0.2, 0.8, 5), np.linspace(0.2, 0.8, 5)), axis=-1).reshape(1, 25, 2)
  points = (boxes[:, None, :2] + grid * (boxes[:, 2:] - boxes[:, :2])[:, None]).astype(np.float32)
  follow: Any = partial(cv2.calcOpticalFlowPyrLK, nextPts=None, winSize=(13, 13), maxLevel=3)
  there, ok, _ = follow(before, after, points.reshape(-1, 1, 2))
  back, ok_back, _ = follow(after, before, there)
  missed = np.linalg.norm(back.reshape(-1, 25, 2) - points, axis=-1)
  good = (ok.reshape(-1, 25) > 0) & (ok_back.reshape(-1, 25) > 0) & (missed < 0.5)
  for i, k in enumerate(seen):
    if good[i].sum() >= 5:
      d = (there.reshape(-1, 25, 2)[i] - points[i])[good[i]].astype(np.float64)
      moved[k] = np.median(d, axis=0)
      variance[k] = (1 + 1.5 * np.abs(d - moved[k]).mean()) ** 2
  return moved, variance


def looks_of(rgb: np.ndarray, boxes: np.ndarray) -> np.ndarray:
  """(3, H, W) uint8 and boxes (N, 4) -> (N, 64) roots of the colors' shares in each box's middle, 4 steps a channel:
  their products add up to 1 where two are the same."""
  height, width = rgb.shape[1:]
  out = np.zeros((len(boxes), LOOKS))
  code = (rgb[0] >> 6).astype(np.int64) * 16 + (rgb[1] >> 6) * 4 + (rgb[2] >> 6)
  inner = boxes + (boxes[:, 2:] - boxes[:, :2])[:, [0, 1, 0, 1]] * [0.1, 0.1, -0.1, -0.1]
  corners = np.clip(np.round(inner), 0, [width - 1, height - 1] * 2).astype(int)
  for i, (x0, y0, x1, y1) in enumerate(corners):
    share = np.bincount(code[y0 : y1 + 1, x0 : x1 + 1].ravel(), minlength=LOOKS)
    out[i] = np.sqrt(share / max(1, share.sum()))
  return out


class TrackerTeacher:
  """Boxes with identity: those of another teacher, `detector`, followed from frame to frame. detector_options: the
  detector's;
  tracker: of ObjectTracker. flow: with Lucas-Kanade, several times slower, and in the simulator no more identities
  survive with it (tests/bench/bench_object_tracker.py). turn: the camera's turns are read from the route's log and
  taken out. Boxes that are not followed are left out.

  The detector is asked frame by frame, so that the labels do not depend on how a video is cut into clips. Raises
  UserError where it gives no boxes."""

  stateful = True
  sees = "picture"
  whole = False
  FIXED, PASSES_ON = ("detector",), ObjectTracker  # the registry's weights are the detector's

  def __init__(
    self,
    name: str,
    entry: Entry,
    path: Path | None,
    device: str | None = None,
    precision: str | None = None,
    detector: str = "yolox-nano",
    detector_options: dict[str, Any] | None = None,
    flow: bool = False,
    turn: bool = True,
    **tracker: Any,
  ):
    check_least(name, 0, **{k: v for k, v in tracker.items() if isinstance(v, int | float)})
    chosen: dict[str, Any] = {k: v for k, v in (("device", device), ("precision", precision)) if v is not None}
    # who has accepted this teacher's license, which is its detector's, has accepted that
    self.detector: Teacher = load_teacher(detector, path, (entry.license,), **chosen, **(detector_options or {}))
    self.name, self.license, self.model_id = name, self.detector.license, self.detector.model_id
    self.checkpoint_hash, self.flow, self.turn = self.detector.checkpoint_hash, flow, turn
    self.log: tuple[Path, TurnLog] | None = None
    try:
      self.tracker = ObjectTracker(**tracker)
    except TypeError as e:
      raise UserError(
        f"teacher '{name}': {str(e).split('.')[-1]}; it has flow, turn, {', '.join(ObjectTracker().settings())}"
      ) from None
    self.labels: list[Label] = []
    self.size = [0, 0]

  def prepare(self, height: int, width: int) -> None:
    self.detector.prepare(height, width)
    found = [b for b in self.detector.labels if b.kind == "boxes"]
    if not found:
      raise UserError(f"teacher '{self.detector.name}' gives no boxes; choose another detector for '{self.name}'")
    self.found, self.size, classes = found[0].name, [height, width], found[0].classes
    self.tracker.groups = np.array(
      [next((g for g, names in enumerate(ALIKE) if c in names), len(ALIKE) + i) for i, c in enumerate(classes)],
      np.int64,
    )
    self.labels = [Label("boxes", "boxes", unit="px", classes=classes)]

  def picture_size(self, width: int, height: int) -> tuple[int, int]:
    """(width, height) at which the detector likes a picture of this size."""
    own: Any = getattr(self.detector, "picture_size", None)
    return (width, height) if own is None else own(width, height)

  def settings(self) -> dict[str, Any]:
    detector = self.detector.settings()
    if self.whole:  # its picture's size is each segment's own
      detector = {k: v for k, v in detector.items() if k != "size"}
    return {
      "detector": {"name": self.detector.name, "settings": detector},
      "flow": self.flow,
      "turn": self.turn,
      "tracker": self.tracker.settings(),
      "size": self.size,
    }

  def turn_between(self, clip: Clip, before: int | None, after: int | None) -> np.ndarray | None:
    """Times of two frames, ns -> (3, 3) of `turned`; None where the log does not say."""
    if not self.turn or clip.log_path is None or clip.intrinsics is None or before is None or after is None:
      return None
    if self.log is None or self.log[0] != clip.log_path:
      self.log = (clip.log_path, TurnLog(clip.log_path))
    rotation = self.log[1].between(before, after)
    return None if rotation is None else turned(rotation, clip.intrinsics, clip.rpy if self.whole else None)

  def label(self, clip: Clip, state: State | None = None) -> tuple[Labels, State | None]:
    """'boxes': the detector's, with the column track: identity, never used twice in a video."""
    height, width = clip.rgb.shape[-2:]
    if self.size != [height, width]:
      self.prepare(height, width)
    if state is not None and "size" in state and state["size"].tolist() != [height, width]:
      raise UserError(
        f"the frames are {width}x{height}, those before were {state['size'][1]}x{state['size'][0]}; begin again with "
        "these frames"
      )
    t, parts = Tracks.of_state(state), []
    before = None if state is None else state.get("gray", state.get("grey"))  # spelled so in stores from before
    last = int(state["time"]) if state is not None and "time" in state else None
    for n, rgb in enumerate(clip.rgb):
      table = self.detector.label(Clip(rgb[None]))[0][self.found]
      boxes = np.stack([np.asarray(table[k], np.float64) for k in ("x0", "y0", "x1", "y1")], axis=1)
      gray = cv2.cvtColor(np.ascontiguousarray(rgb.transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY) if self.flow else None
      moved = None if gray is None or before is None else flow_of(before, gray, t)
      now = clip.times[n] if clip.times else None
      turn = self.turn_between(clip, last, now)
      ids = self.tracker.update(
        t,
        boxes,
        np.asarray(table["score"]),
        np.asarray(table["cls"]),
        (height, width),
        moved,
        looks_of(rgb, boxes),
        turn,
      )
      good, before, last = ids >= 0, gray, now
      parts.append(
        {
          **{k: np.asarray(table[k])[good] for k in COLUMNS if k in table},
          "frame": np.full(int(good.sum()), n),
          "track": ids[good],
        }
      )
    labels = {
      k: np.concatenate([np.zeros(0, dtype), *[np.asarray(p[k], dtype) for p in parts]]) for k, dtype in COLUMNS.items()
    }
    more = (
      {"size": np.array([height, width])}
      | ({} if before is None else {"gray": before})
      | ({} if last is None else {"time": np.array(last)})
    )
    return {"boxes": labels}, t.state() | more

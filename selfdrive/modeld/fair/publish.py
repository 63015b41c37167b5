"""Physical quantities to fair* messages, and back."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.heads.depth import Depth, shrink
from openpilot.selfdrive.modeld.fair.heads.rle import decode_mask, encode_masks
from openpilot.selfdrive.modeld.fair.heads.segmentation import Segmentation, decode_runs, encode_runs
from openpilot.selfdrive.modeld.fair.ipc import SERVICE_LIST, messaging, queue_size
from openpilot.selfdrive.modeld.fair.lanes import Line
from openpilot.selfdrive.modeld.fair.tracked import Tracked


CAMERA_RATE = 20.0  # Hz
MAX_DEPTH_BYTES = 38_000  # of a map; with all else fairDepth stays under 40 kB
MAX_DEPTH = 65504.0  # float16's largest
COARSE = 16 * 32  # pixels of a map in fairState, at most
MAX_STATE_BYTES = 60_000  # of both maps in fairState where they are whole
NEAREST = 8  # objects in the small form
LINE_POINTS = 4  # of a line in the small form


@dataclass(frozen=True)
class Stamp:
  """What every message carries: the camera frame it is about, and who made it."""

  frame_id: int
  timestamp_eof: int  # ns
  bundle: str
  execution_time: float  # s, of the graph
  valid: bool


def _message(service: str, stamp: Stamp) -> tuple[Any, Any]:
  msg = messaging.new_message(None, valid=stamp.valid)
  m = msg.init(service)
  m.frameId, m.timestampEof, m.bundle, m.modelExecutionTime = (
    stamp.frame_id,
    stamp.timestamp_eof,
    stamp.bundle,
    stamp.execution_time,
  )
  return msg, m


def _steps(a: np.ndarray, step: float) -> np.ndarray:
  """To whole steps, a power of two: the bits below are zero, and the log's compression makes little of them."""
  return np.round(a / step) * step


def _nearest(tracked: Tracked) -> np.ndarray:
  """Of the small form: indices of what is seen, the nearest, oldest first. The lower a box ends, the nearer it is where
  no place and no depth is known."""
  ahead = np.where(np.isfinite(tracked.position[:, 0]), tracked.position[:, 0], tracked.depth)
  order = np.lexsort((-tracked.boxes[:, 3], np.where(np.isfinite(ahead), ahead, np.inf)))
  return np.sort(order[~tracked.occluded[order]][:NEAREST])


def depth_message(depth: Depth, stamp: Stamp) -> tuple[str, Any]:
  """In float16: a step is at most a thousandth. A map over MAX_DEPTH_BYTES is halved until it fits."""
  msg, m = _message("fairDepth", stamp)
  z = depth.z
  while z.size * 2 > MAX_DEPTH_BYTES:
    z = shrink(z)
  m.height, m.width = z.shape
  m.data, m.metric, m.scale, m.scaleStd = (
    np.minimum(z, MAX_DEPTH).astype("<f2").tobytes(),
    depth.metric,
    depth.scale,
    depth.scale_std,
  )
  return "fairDepth", msg


def segmentation_message(seg: Segmentation, stamp: Stamp) -> tuple[str, Any]:
  msg, m = _message("fairSegmentation", stamp)
  m.height, m.width = seg.class_map.shape
  values, lengths = encode_runs(seg.class_map) if seg.runs is None else seg.runs
  m.classes, m.runClass, m.runLength, m.classProb = (
    seg.classes,
    values.tobytes(),
    lengths.tolist(),
    seg.class_prob.tolist(),
  )
  return "fairSegmentation", msg


def features_message(features: np.ndarray | None, stamp: Stamp) -> tuple[str, Any] | None:
  if features is None:
    return None
  msg = messaging.new_message("fairFeatures", valid=stamp.valid)
  m = msg.fairFeatures  # it alone has no time of its graph
  m.frameId, m.timestampEof, m.bundle = stamp.frame_id, stamp.timestamp_eof, stamp.bundle
  m.channels, m.height, m.width = features.shape
  m.data = features.astype("<f2").tobytes()
  return "fairFeatures", msg


def objects_message(tracked: Tracked | None, stamp: Stamp, dense: bool = True) -> tuple[str, Any]:
  """None: there is nothing to say, as of a frame that is not valid. dense: with masks, and what is hidden; else the
  NEAREST that are seen, in steps of 1/4 pixel, 1/32 of a probability and 1/8 m."""
  msg, m = _message("fairObjects", stamp)
  if tracked is None:
    return "fairObjects", msg
  m.classes = tracked.classes
  if not dense:
    keep = _nearest(tracked)
    kept = {f.name: getattr(tracked, f.name)[keep] for f in fields(tracked) if f.name not in ("classes", "masks")}
    for names, step in (
      (("boxes",), 1 / 4),
      (("scores", "visibility"), 1 / 32),
      (("position", "position_std", "depth"), 1 / 8),
    ):
      kept |= {name: _steps(kept[name], step) for name in names}
    tracked = replace(tracked, masks=None, **kept)
  texts = [""] * len(tracked.ids)
  h = w = 0
  if tracked.masks is not None and len(tracked.masks):
    h, w = tracked.masks.shape[1:]
    some = np.asarray(tracked.masks.reshape(-1, h * w).any(1))  # what only the detector saw has an empty one
    with_mask = ((tracked.mask_of >= 0) & some[tracked.mask_of]).nonzero()[0]
    room = size_limit("fairObjects") // 2  # the rest of 96 objects is 20 kB; masks are the first to go
    for i, text in zip(with_mask.tolist(), encode_masks(tracked.masks[tracked.mask_of[with_mask]]), strict=True):
      if len(text) <= room:
        texts[i], room = text, room - len(text)
  known = np.isfinite(tracked.position).all(1).tolist()
  columns = (
    tracked.ids,
    tracked.class_ids,
    tracked.scores,
    tracked.boxes,
    tracked.ages,
    tracked.occluded,
    tracked.visibility,
    tracked.position,
    tracked.position_std,
    np.where(tracked.depth == tracked.depth, tracked.depth, 0),
  )
  rows = zip(m.init("objects", len(texts)), texts, known, *(c.tolist() for c in columns), strict=True)
  for o, text, where, track, cls, score, box, age, occluded, visibility, position, std, depth in rows:
    o.trackId, o.classId, o.prob, o.box, o.age, o.occluded, o.visibility, o.depth = (
      track,
      cls,
      score,
      box,
      age,
      occluded,
      visibility,
      depth,
    )
    if text:
      o.mask, o.maskWidth, o.maskHeight = text, w, h
    if where:
      o.position, o.positionStd = position, std
  return "fairObjects", msg


def _short(line: Line) -> Line:
  """The small form of a line: its curve, and LINE_POINTS of its points from the nearest to the furthest."""
  at = (
    np.unique(np.linspace(0, len(line.points) - 1, LINE_POINTS).round().astype(int))
    if len(line.points)
    else np.zeros(0, int)
  )
  depth = None if line.depth is None else _steps(line.depth[at], 1 / 8)
  return replace(
    line,
    prob=float(_steps(np.array(line.prob), 1 / 32)),
    points=_steps(line.points[at], 1 / 4),
    visibility=_steps(line.visibility[at], 1 / 32),
    road=_steps(line.road[at], 1 / 64),
    depth=depth,
  )


def lanes_message(lines: list[Line], stamp: Stamp, dense: bool = True) -> tuple[str, Any]:
  """dense: all points of a line; else a few, in coarser steps."""
  msg, m = _message("fairLanes", stamp)
  lines = lines if dense else [_short(line) for line in lines]
  for entry, line in zip(m.init("lines", len(lines)), lines, strict=True):
    entry.lineId, entry.prob, entry.kind, entry.fit = line.line_id, line.prob, line.kind, line.fit.tolist()
    (entry.x, entry.y), entry.visibility = line.points.T.tolist(), line.visibility.tolist()
    entry.roadX, entry.roadY, entry.roadZ = line.road.T.tolist()
    if line.depth is not None:
      entry.depth = line.depth.tolist()
  return "fairLanes", msg


def coarse_depth(m: Any, reader: Any) -> None:
  """Fills m with the map of a fairDepth, halved until it has at most COARSE pixels."""
  z = depth_from_message(reader)
  while z.size > COARSE and not any(side % 2 for side in z.shape):
    z = shrink(z)
  m.height, m.width, m.data = *z.shape, z.astype("<f2").tobytes()
  for key in ("frameId", "timestampEof", "bundle", "metric", "scale", "scaleStd"):
    setattr(m, key, getattr(reader, key))


def coarse_classes(m: Any, reader: Any) -> None:
  """Fills m with the class map of a fairSegmentation, every so many pixels so that at most COARSE are left."""
  class_map = class_map_from_message(reader)
  step = 1
  while class_map[step // 2 :: step, step // 2 :: step].size > COARSE:
    step *= 2
  class_map = class_map[step // 2 :: step, step // 2 :: step]
  values, lengths = encode_runs(class_map)
  m.height, m.width, m.classes, m.runClass, m.runLength = (
    *class_map.shape,
    list(reader.classes),
    values.tobytes(),
    lengths.tolist(),
  )
  m.frameId, m.timestampEof, m.bundle = reader.frameId, reader.timestampEof, reader.bundle


def add_maps(state: Any, newest: dict[str, Any], dense: bool) -> None:
  """Puts the newest valid maps into a fairState: coarse, or whole where they fit. newest: service -> message as it was
  published."""
  whole = dense and sum(msg.total_size.word_count * 8 for msg in newest.values()) <= MAX_STATE_BYTES
  for service, name, fill in (
    ("fairDepth", "depth", coarse_depth),
    ("fairSegmentation", "segmentation", coarse_classes),
  ):
    if service in newest:
      reader = getattr(newest[service].as_reader(), service)
      if whole:
        setattr(state, name, reader)
      else:
        fill(state.init(name), reader)


# of the heads whose quantities go out as they are; objects, detector and lanes are tracked first
PUBLISH: dict[str, Callable[[Any, Stamp], tuple[str, Any] | None]] = {
  "depth": depth_message,
  "segmentation": segmentation_message,
  "features": features_message,
}
SERVICES = ("fairState", "fairDepth", "fairObjects", "fairSegmentation", "fairLanes", "fairFeatures")


@cache
def period(service: str) -> int:
  """Frames between two messages of a service; fewer come where the manifest gives a head fewer turns."""
  return max(1, round(CAMERA_RATE / SERVICE_LIST[service].frequency))


def size_limit(service: str) -> int:
  """Bytes that a message may have: msgq takes a third of a queue."""
  return queue_size(service) // 3


def serialize(service: str, msg: Any) -> bytes:
  """The message's bytes. Raises ValueError where msgq would end the process over their number."""
  data = msg.to_bytes()
  if len(data) > size_limit(service):
    raise ValueError(f"{service} of {len(data)} bytes was not sent, at most {size_limit(service)} fit its queue")
  return data


def depth_from_message(m: Any) -> np.ndarray:
  """A fairDepth reader -> (H, W) float32, nan outside the camera image."""
  return np.frombuffer(m.data, dtype="<f2").reshape(m.height, m.width).astype(np.float32)


def class_map_from_message(m: Any) -> np.ndarray:
  """A fairSegmentation reader -> (H, W) uint8, index into m.classes, 255 outside the camera image."""
  return decode_runs(np.frombuffer(m.runClass, dtype=np.uint8), np.array(list(m.runLength)), m.height, m.width)


def mask_from_message(o: Any) -> np.ndarray | None:
  """A reader of one object of fairObjects -> (H, W) bool over the whole view, None where it has no mask."""
  return decode_mask(o.mask, o.maskHeight, o.maskWidth) if len(o.mask) else None

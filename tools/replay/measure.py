"""Statistics of a log with fair messages: frames, times, faults, detections, and quality where there is truth."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.publish import class_map_from_message, depth_from_message
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.route import Segment
from openpilot.tools.sim.truth import IGNORE, MAX_DEPTH, Truth, map_labels

FAIR = ["fairState", "fairDepth", "fairSegmentation", "fairObjects", "fairLanes"]
COMPARE_AT = 15.0  # m ahead, where lines are compared with modelV2's


def measure(
  log: Path, segments: list[Segment], live: bool = True, names: Mapping[str, str] | None = None
) -> dict[str, Any]:
  """Statistics of a log with fair messages: frames, drops, times in ms, faults, and quality where the segments have
  truth. names: what the truth calls classes that the messages call otherwise."""
  execution: list[float] = []
  latency: list[float] = []
  ids: list[int] = []
  seen: set[int] = set()
  states: list[Any] = []
  quality, counts = Quality(segments, names), Counts()
  reader = LogReader([log], services=[*FAIR, "modelV2"])
  for event in reader.whole():
    with reader.guard(event):
      m = getattr(event, event.which())
      if event.which() == "fairState":
        states.append(m)
        continue
      counts.add(event.which(), m, event.valid)
      if event.which() == "modelV2":
        continue
      if m.frameId not in seen:  # one latency per frame, however many messages it has
        seen.add(m.frameId)
        ids.append(m.frameId)
        execution.append(m.modelExecutionTime * 1e3)
        latency.append((event.logMonoTime - m.timestampEof) * 1e-6)
      if event.valid and event.which() in ("fairDepth", "fairSegmentation"):
        quality.add(event.which(), m)
  ids.sort()
  last = states[-1] if states else None

  def pct(values: list[float]) -> dict[str, float]:
    return (
      {k: round(float(np.percentile(values, q)), 2) for k, q in (("p50", 50), ("p99", 99), ("max", 100))}
      if values
      else {}
    )

  out: dict[str, Any] = {
    "frames": len(ids),
    "frames_span": ids[-1] - ids[0] + 1 if ids else 0,
    "gaps": (ids[-1] - ids[0] + 1 - len(ids)) if ids else 0,
    "execution_ms": pct(execution),
    "times_ms": execution if live else [],
    "latency_ms": pct(latency) if live else {},
    "faults": sorted({s.fault for s in states if s.fault}),
    "quality": quality.result(),
    **counts.result(),
  }
  if last is not None:
    out |= {
      "received": last.framesReceived,
      "dropped": last.framesDropped,
      "invalid": last.framesInvalid,
      "memory_mb": round(max(s.memoryMB for s in states), 1),
      "calibrated": last.calibrated,
      "camera": f"{last.cameraWidth}x{last.cameraHeight}",
      "view_filled": round(last.viewFilled, 4),
      "warp_ms": mean_ms(states, "warpTime"),
      "decode_ms": mean_ms(states, "decodeTime"),
      "publish_ms": mean_ms(states, "publishTime"),
    }
  return out


def mean_ms(states: list[Any], field: str) -> float:
  values = [getattr(s, field) for s in states if getattr(s, field) > 0]
  return round(float(np.mean(values)) * 1e3, 2) if values else 0.0


class Counts:
  """Counts of objects and lanes, and the distance of lines from openpilot's own."""

  def __init__(self) -> None:
    self.objects: list[
      tuple[int, int, int, int]
    ] = []  # of a message: all, out of sight, with a mask, with a place on the road
    self.tracks: dict[int, int] = {}  # identity -> messages
    self.lines: list[tuple[int, int, int]] = []  # of a message: lines, points, visible points
    self.line_ids: set[int] = set()
    self.depth: list[tuple[int, bool, float, int]] = []  # frame, metric, scale, bytes
    self.probs: list[float] = []  # of lines
    self.model: dict[int, list[float]] = {}  # frame -> modelV2's lines at COMPARE_AT, meters to the right
    self.fits: list[tuple[int, float]] = []  # frame, ours

  def add(self, which: str, m: Any, valid: bool) -> None:
    if not valid:
      return
    if which == "fairDepth":
      self.depth.append((m.frameId, m.metric, m.scale, len(m.data)))
    elif which == "fairObjects":
      hidden, masks, placed = (
        sum(o.occluded for o in m.objects),
        sum(len(o.mask) > 0 for o in m.objects),
        sum(len(o.position) > 0 for o in m.objects),
      )
      self.objects.append((len(m.objects), hidden, masks, placed))
      for o in m.objects:
        self.tracks[o.trackId] = self.tracks.get(o.trackId, 0) + 1
    elif which == "fairLanes":
      visibility = [v for line in m.lines for v in line.visibility]
      self.lines.append((len(m.lines), len(visibility), sum(v >= 0.5 for v in visibility)))
      for line in m.lines:
        self.line_ids.add(line.lineId)
        self.probs.append(line.prob)
        if len(line.roadX) and min(line.roadX) < COMPARE_AT < max(line.roadX) and len(line.fit) == 4:
          self.fits.append((m.frameId, sum(c * COMPARE_AT**i for i, c in enumerate(line.fit))))
    elif which == "modelV2":
      lines = [e for e, prob in zip(m.laneLines, m.laneLineProbs, strict=False) if prob > 0.5 and len(e.x) > 1]
      self.model[m.frameId] = [float(np.interp(COMPARE_AT, list(e.x), list(e.y))) for e in lines]

  def result(self) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if self.depth:
      frames, metric, scales, sizes = zip(*self.depth, strict=True)
      out["depth"] = {
        "messages": len(frames),
        "frames_between_two": float(np.median(np.diff(frames))) if len(frames) > 1 else 0.0,
        "metric_share": float(np.mean(metric)),
        "median_scale": round(float(np.median(scales)), 3),
        "largest_map_kB": max(sizes) / 1000,
      }
    if self.objects:
      there, hidden, masks, placed = np.array(self.objects).mean(0).round(2).tolist()
      out["objects"] = {
        "messages": len(self.objects),
        "each": there,
        "occluded_each": hidden,
        "masks_each": masks,
        "on_the_road_each": placed,
        "identities": len(self.tracks),
        "median_life_frames": float(np.median(list(self.tracks.values()))) if self.tracks else 0.0,
      }
    if self.lines:
      lines, points, visible = np.array(self.lines).mean(0).round(2).tolist()
      out["lanes"] = {
        "messages": len(self.lines),
        "lines_each": lines,
        "points_each": points,
        "visible_points_each": visible,
        "identities": len(self.line_ids),
      }
      out["lanes"]["mean_confidence"] = round(float(np.mean(self.probs)), 3) if self.probs else 0.0
      off = [min(abs(y - other) for other in self.model[frame]) for frame, y in self.fits if self.model.get(frame)]
      if off:
        out["lanes"][f"median_from_modelV2_at_{COMPARE_AT:.0f}_m"] = round(float(np.median(off)), 3)
    return out


class Quality:
  """Depth and classes against exact truth. Truth is sampled at the map's own pixels (tools/sim/truth.py); nothing is
  aligned. Classes are known by their names, or by what `names` says: `strange` are those of messages that the truth
  has not."""

  def __init__(self, segments: list[Segment], names: Mapping[str, str] | None = None):
    self.truths = [Truth(s.dir) for s in segments if (s.dir / "truth").is_dir()]
    self.classes = self.truths[0].classes if self.truths else []
    self.names = names or {}
    self.confusion = np.zeros((len(self.classes), len(self.classes)))
    self.sums = np.zeros(5)
    self.strange: set[str] = set()

  def truth_of(self, frame_id: int) -> tuple[np.ndarray, np.ndarray] | None:
    for t in self.truths:
      i = frame_id - t.info["frame_id_offset"]
      if 0 <= i < t.frame_count:
        frame = t.frame(i)
        return map_labels(frame.depth, frame.semantic)
    return None

  def add(self, which: str, m: Any) -> None:
    truth = self.truth_of(m.frameId)
    if truth is None or (m.height, m.width) != truth[0].shape:
      return
    depth, classes = truth
    if which == "fairDepth" and m.metric:
      pred, wanted = depth_from_message(m), depth.astype(np.float32)
      ok = np.isfinite(pred) & np.isfinite(wanted) & (wanted < MAX_DEPTH) & (wanted > 0)
      g = np.log(pred[ok] / wanted[ok]).astype(np.float64)
      self.sums += [
        ok.sum(),
        np.abs(pred[ok] / wanted[ok] - 1).sum(),
        (np.abs(g) < np.log(1.25)).sum(),
        g.sum(),
        (g * g).sum(),
      ]
    elif which == "fairSegmentation":
      named = list(m.classes)
      called = [self.names.get(k, k) for k in named]
      self.strange |= {k for k, name in zip(named, called, strict=True) if name not in self.classes}
      table = np.full(256, IGNORE, np.uint8)
      table[: len(named)] = [self.classes.index(k) if k in self.classes else IGNORE for k in called]
      pred = table[class_map_from_message(m)]
      ok = pred != IGNORE
      n = len(self.classes)
      self.confusion += np.bincount(classes[ok].astype(int) * n + pred[ok], minlength=n * n).reshape(n, n)

  def result(self) -> dict[str, Any]:
    out: dict[str, Any] = {}
    n = self.sums[0]
    if n:
      out |= {
        "abs_rel": self.sums[1] / n,
        "delta1": self.sums[2] / n,
        "silog": np.sqrt(max(0.0, self.sums[4] / n - (self.sums[3] / n) ** 2)),
      }
    if self.confusion.sum():
      c = self.confusion
      union = c.sum(0) + c.sum(1) - np.diag(c)
      iou = {k: np.diag(c)[i] / union[i] for i, k in enumerate(self.classes) if c.sum(1)[i]}  # classes that occur
      out |= {"miou": np.mean(list(iou.values())), **{f"iou_{k}": v for k, v in iou.items()}}
    out = {k: round(float(v), 4) for k, v in out.items()}
    return {**out, **({"not_compared": sorted(self.strange)} if self.strange else {})}

"""The page that a run leaves: what matters first, the video, quality where there is truth, what was found, times, and
where the bundle comes from."""

import base64
import io
import json
import os
import platform
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from PIL import Image

from openpilot.selfdrive.modeld.fair.bundle import Bundle
from openpilot.selfdrive.modeld.fair.publish import class_map_from_message, depth_from_message
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.files import atomic_path
from openpilot.tools.lib.route import Segment
from openpilot.tools.sim.truth import IGNORE, MAX_DEPTH, Truth, map_labels

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FAIR = ["fairState", "fairDepth", "fairSegmentation", "fairObjects", "fairLanes"]
COMPARE_AT = 15.0  # m ahead, where lines are held against modelV2's


def measure(log: Path, segments: list[Segment], live: bool = True) -> dict[str, Any]:
  """Numbers of a log with fair messages: frames, drops, times in ms, faults, and quality where the segments have
  truth."""
  execution: list[float] = []
  latency: list[float] = []
  ids: list[int] = []
  seen: set[int] = set()
  states: list[Any] = []
  quality, counts = Quality(segments), Counts()
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
      if m.frameId not in seen:  # one time a frame, however many messages it has
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
  """How much there is of objects and lanes, and how far lines lie from openpilot's own."""

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
  aligned."""

  def __init__(self, segments: list[Segment]):
    self.truths = [Truth(s.dir) for s in segments if (s.dir / "truth").is_dir()]
    self.classes = self.truths[0].classes if self.truths else []
    self.confusion = np.zeros((len(self.classes), len(self.classes)))
    self.sums = np.zeros(5)

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
    elif which == "fairSegmentation" and list(m.classes) == self.classes:
      pred = class_map_from_message(m)
      ok = pred != IGNORE
      n = len(self.classes)
      self.confusion += np.bincount(classes[ok].astype(int) * n + pred[ok], minlength=n * n).reshape(n, n)

  def result(self) -> dict[str, float]:
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
    return {k: round(float(v), 4) for k, v in out.items()}


def png(image: np.ndarray) -> str:
  data = io.BytesIO()
  Image.fromarray(image).save(data, "JPEG", quality=88)
  return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def latency_plot(times: list[float]) -> str:
  fig, (left, right) = plt.subplots(1, 2, figsize=(11, 2.8), width_ratios=(3, 1), layout="constrained")
  left.plot(times, lw=0.8)
  left.axhline(10, color="tab:red", lw=0.8, ls="--", label="a comma four's budget")
  left.legend(loc="upper right", frameon=False)
  left.set(xlabel="frame", ylabel="network, ms", ylim=(0, max(12, np.percentile(times, 99.5) * 1.2)))
  right.hist(times, bins=40, orientation="vertical")
  right.set(xlabel="ms", ylabel="frames")
  data = io.StringIO()
  fig.savefig(data, format="svg")
  plt.close(fig)
  return data.getvalue()[data.getvalue().index("<svg") :]


# what the page calls the numbers of a section: name with its unit, how it is written
SECTIONS: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
  "depth": (
    "Depth",
    {
      "messages": ("depth maps", "{:d}"),
      "frames_between_two": ("frames between two maps", "{:.0f}"),
      "metric_share": ("maps in meters", "{:.0%}"),
      "median_scale": ("factor that made them meters, median", "{:.3g}"),
      "largest_map_kB": ("largest map, kB", "{:.0f}"),
    },
  ),
  "objects": (
    "Objects",
    {
      "each": ("objects per frame", "{:.1f}"),
      "occluded_each": ("of those out of sight", "{:.1f}"),
      "masks_each": ("of those with a mask", "{:.1f}"),
      "on_the_road_each": ("of those with a place on the road", "{:.1f}"),
      "identities": ("different objects (track ids)", "{:d}"),
      "median_life_frames": ("frames that an object is followed, median", "{:.0f}"),
      "messages": ("messages", "{:d}"),
    },
  ),
  "lanes": (
    "Lane lines",
    {
      "lines_each": ("lines per frame", "{:.1f}"),
      "points_each": ("points on them", "{:.1f}"),
      "visible_points_each": ("of those in sight", "{:.1f}"),
      "identities": ("different lines", "{:d}"),
      "mean_confidence": ("probability of a line, mean", "{:.0%}"),
      f"median_from_modelV2_at_{COMPARE_AT:.0f}_m": (
        f"distance from openpilot's nearest line {COMPARE_AT:.0f} m ahead, median, m",
        "{:.2f}",
      ),
      "messages": ("messages", "{:d}"),
    },
  ),
}
QUALITY = {
  "abs_rel": ("depth: mean relative error (AbsRel)", "{:.1%}", "mean of |d - d*| / d*; lower is better"),
  "delta1": ("depth: within 25% of the truth (delta1)", "{:.1%}", "higher is better"),
  "silog": (
    "depth: error but for one scale (SILog)",
    "{:.3f}",
    "standard deviation of log d - log d*; lower is better",
  ),
  "miou": ("classes: mean IoU", "{:.3f}", "over the classes that occur; 1 is perfect"),
}
VIDEO_INSIDE = 12_000_000  # bytes of a video that the page still carries in itself; a longer one stays beside it


def rows(numbers: dict[str, Any], names: dict[str, tuple[str, str]]) -> list[dict[str, str]]:
  """The known numbers in their order, then whatever else is there by its own name."""
  named = [{"name": name, "value": form.format(numbers[k])} for k, (name, form) in names.items() if k in numbers]
  return named + [{"name": k.replace("_", " "), "value": str(v)} for k, v in numbers.items() if k not in names]


def quality_rows(quality: dict[str, float]) -> list[dict[str, str]]:
  known = [
    {"name": name, "value": form.format(quality[k]), "note": note}
    for k, (name, form, note) in QUALITY.items()
    if k in quality
  ]
  return known + [
    {"name": f"classes: IoU of {k.removeprefix('iou_')}", "value": f"{v:.3f}", "note": ""}
    for k, v in quality.items()
    if k not in QUALITY
  ]


def tiles(r: dict[str, Any]) -> list[dict[str, Any]]:
  """What matters first: frames, time, faults, errors."""
  # how many came is known from fairState only where it was counted by the process: a replay without clock has none
  out = [
    {
      "name": f"of {r['frames_span']} frames processed" if r["frames_span"] else "frames processed",
      "value": r["frames"],
      "bad": r["frames"] < 0.98 * r["frames_span"] or not r["frames"],
    }
  ]
  if r["execution_ms"].get("p50"):
    out.append(
      {"name": "for the network on a frame, median", "value": f"{r['execution_ms']['p50']:.1f} ms", "bad": False}
    )
  out.append(
    {
      "name": "different faults" if len(r["faults"]) != 1 else "fault",
      "value": len(r["faults"]),
      "bad": bool(r["faults"]),
    }
  )
  if r.get("invalid"):
    out.append({"name": "frames without a valid answer", "value": r["invalid"], "bad": True})
  if "abs_rel" in r["quality"]:
    out.append({"name": "mean error of depth", "value": f"{r['quality']['abs_rel']:.1%}", "bad": False})
  if "miou" in r["quality"]:
    out.append({"name": "mean IoU of classes", "value": f"{r['quality']['miou']:.2f}", "bad": False})
  return out


def video_source(video: Path | None, folder: Path) -> str:
  """The video for the page: in itself where it is small, by its name where it lies beside the page and is not."""
  if video is None or not video.is_file():
    return ""
  if video.stat().st_size <= VIDEO_INSIDE:
    return "data:video/mp4;base64," + base64.b64encode(video.read_bytes()).decode()
  return os.path.relpath(video, folder)


def write_report(
  folder: Path,
  title: str,
  numbers: dict[str, Any],
  bundle: Bundle,
  pictures: list[np.ndarray],
  video: Path | None = None,
) -> None:
  """report.html, with the video in it or beside it, and report.json."""
  r = {
    **numbers,
    "machine": f"{platform.system()} {platform.machine()}, {cpu_name()}, Python {platform.python_version()}",
    "bundle": bundle.name,
    "bundle_hash": bundle.manifest_hash,
  }
  cells = ("p50", "p99", "max")
  times = [
    {"name": name, "cells": [f"{r[k][c]:.1f}" for c in cells]}
    for k, name in (
      ("execution_ms", "network"),
      ("latency_ms", "from the camera to the message, over the fastest of this run"),
    )
    if r[k].get("p50")
  ]
  process = [{"name": "machine", "value": f"{r['machine']}; replay and fairmodeld share it"}]
  if "received" in r:
    process = [
      {
        "name": "around the network, mean: warp, decode, publish",
        "value": f"{r['warp_ms']:.1f} + {r['decode_ms']:.1f} + {r['publish_ms']:.1f} ms",
      },
      {
        "name": "frames received, dropped, without a valid answer",
        "value": f"{r['received']}, {r['dropped']}, {r['invalid']}",
      },
      {"name": "memory of fairmodeld", "value": f"{r['memory_mb']:.0f} MB"},
      {"name": "share of its view that the camera fills", "value": f"{r['view_filled']:.0%}"},
      *process,
    ]
  env = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
  page = env.from_string(Path(__file__).with_name("report.html.j2").read_text()).render(
    title=title,
    r=r,
    bundle=bundle,
    tiles=tiles(r),
    quality=quality_rows(r["quality"]),
    max_depth=f"{MAX_DEPTH:.0f}",
    times=times,
    process=process,
    sections=[{"title": name, "rows": rows(r[k], names)} for k, (name, names) in SECTIONS.items() if k in r],
    plot=jinja2.utils.markupsafe.Markup(latency_plot(r["times_ms"])) if r["times_ms"] else "",
    pictures=[png(p) for p in pictures],
    video=video_source(video, folder),
  )
  with atomic_path(folder / "report.html") as tmp:
    tmp.write_text(page)
  with atomic_path(folder / "report.json") as tmp:
    tmp.write_text(json.dumps({k: v for k, v in r.items() if k != "times_ms"}, indent=1) + "\n")


def cpu_name() -> str:
  try:
    return next(
      line.split(":", 1)[1].strip()
      for line in Path("/proc/cpuinfo").read_text().splitlines()
      if line.startswith("model name")
    )
  except (OSError, StopIteration):
    return platform.processor() or "unknown CPU"

"""The report page of a run: headline numbers, video, quality where there is truth, detections, times, and the bundle's
origin."""

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
from openpilot.tools.lib.files import atomic_path
from openpilot.tools.replay.measure import COMPARE_AT
from openpilot.tools.sim.truth import MAX_DEPTH

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def png(image: np.ndarray) -> str:
  data = io.BytesIO()
  Image.fromarray(image).save(data, "JPEG", quality=88)
  return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def load_template(path: Path) -> jinja2.Template:
  """Of a page, what is filled in escaped."""
  return jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(path.read_text())


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


# a section's numbers: name with its unit, format
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
VIDEO_INSIDE = 12_000_000  # bytes of a video that is embedded in the page; a larger one stays a file beside it


def rows(numbers: dict[str, Any], names: dict[str, tuple[str, str]]) -> list[dict[str, str]]:
  """The known numbers in their order, then any others by their own names."""
  named = [{"name": name, "value": form.format(numbers[k])} for k, (name, form) in names.items() if k in numbers]
  return named + [{"name": k.replace("_", " "), "value": str(v)} for k, v in numbers.items() if k not in names]


def quality_rows(quality: dict[str, Any]) -> list[dict[str, str]]:
  known = [
    {"name": name, "value": form.format(quality[k]), "note": note}
    for k, (name, form, note) in QUALITY.items()
    if k in quality
  ]
  if strange := quality.get("not_compared"):
    note = "classes that the truth does not have; their pixels count nowhere"
    known.append({"name": "classes: not compared", "value": ", ".join(strange), "note": note})
  return known + [
    {"name": f"classes: IoU of {k.removeprefix('iou_')}", "value": f"{v:.3f}", "note": ""}
    for k, v in quality.items()
    if k.startswith("iou_")
  ]


def tiles(r: dict[str, Any]) -> list[dict[str, Any]]:
  """The headline numbers: frames, time, faults, errors."""
  # only a running process counts received frames in fairState; a replay without clock does not
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
  """The video for the page: embedded where it is small, else by the name of the file beside the page."""
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
  page = load_template(Path(__file__).with_name("report.html.j2")).render(
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

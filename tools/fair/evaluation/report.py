"""The page of an evaluation: tables of every task, what exceeds its limit in red, differences, conditions, latency, and
the worst frames as pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image, ImageDraw

from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W, unpack_rgb
from openpilot.selfdrive.modeld.fair.roles import FORMER
from openpilot.tools.fair.evaluation.detections import MAP, Detections, Objects
from openpilot.tools.fair.evaluation.logged import Logged
from openpilot.tools.fair.evaluation.metrics import (
  Classes,
  Depth,
  Tracks,
  align_least_squares,
  depth_errors,
  lower_is_better,
)
from openpilot.tools.fair.evaluation.scenes import MIN_SIDE, MIN_VISIBLE, Scene
from openpilot.tools.fair.evaluation.video import Identities, IouTracker, VideoMasks
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.students.classes import OBJECTS, SEGMENTATION
from openpilot.tools.lib.colors import TINT, class_colors, depth_picture, track_color
from openpilot.tools.replay.report import png
from openpilot.tools.sim.truth import IGNORE

NAMES = {
  "depth": "Depth",
  "segmentation": "Segmentation",
  "objects": "Objects, boxes",
  "masks": "Objects, masks",
  "video": "Objects over the video, J&F",
  "identity": "Identities",
  "detector": "Detector",
  "lanes": "Tracks of points",
  "log": "Lane lines and leads",
}
COUNTS = f"True objects of which less than {MIN_VISIBLE:.0%} is seen, or with a side under {MIN_SIDE:.0f} view pixels, count nowhere."  # noqa: E501

HEADLINE = {  # the metric that stands for a task
  "depth": "abs_rel",
  "segmentation": "miou",
  "objects": "ap",
  "masks": "mask_iou",
  "video": "j_and_f",
  "identity": "idf1",
  "detector": "ap",
  "lanes": "average_jaccard",
  "log": "log_lane_recall",
}


def text(*parts: Any) -> str:
  """Docstrings, in which the definitions stand, as one paragraph."""
  return " ".join(" ".join((p if isinstance(p, str) else p.__doc__ or "").split()) for p in parts)


DEFINITIONS = {
  "depth": text(
    depth_errors,
    "Truth beyond 200 m and outside the camera's image counts nowhere.",
    Depth,
    "_lsq:",
    align_least_squares,
  ),
  "segmentation": text(Classes, "A class that a teacher does not know is background on both sides."),
  "objects": text(Detections, COUNTS),
  "masks": text("As of boxes, by the IoU of masks at the size of the student's maps.", COUNTS),
  "video": text(VideoMasks),
  "identity": text(Identities, "Students' identities are those of fairmodeld's tracker; 'IoU only':", IouTracker),
  "detector": text("As of objects.", COUNTS),
  "lanes": text(Tracks, "The rival 'hold still' says that every point stays where it was first, and is seen."),
  "log": text(Logged),
}


def number(v: float) -> str:
  return f"{v:.3f}" if abs(v) < 10 else f"{v:.1f}"


def metrics(columns: dict[str, dict[str, Any]]) -> list[str]:
  """All that any column has, in the order in which the accumulators give them."""
  return list(dict.fromkeys(k for cells in columns.values() for k in cells))


def summary(results: dict[str, Any]) -> str:
  """Lines for the terminal: the headline metric of every task and column."""
  lines = []
  for reference, tasks in results["tables"].items():
    for task, columns in tasks.items():
      metric = HEADLINE.get(task)
      found = {c: cells[metric]["value"] for c, cells in columns.items() if metric in cells}
      if found:
        lines.append(
          f"{NAMES[task]}, {metric} by {reference}: " + ", ".join(f"{c} {number(v)}" for c, v in found.items())
        )
  return "\n".join(lines)


# *** pictures ***


def tinted(rgb: np.ndarray, classes: np.ndarray) -> np.ndarray:
  """rgb (256, 512, 3), classes (64, 128) -> the picture with its classes."""
  colors = np.zeros((256, 3), np.float32)
  on = np.zeros(256, bool)
  shown = class_colors(SEGMENTATION, FORMER)
  for k, name in enumerate(SEGMENTATION):
    colors[k], on[k] = shown.get(name, (0, 0, 0)), name in shown
  big = classes.repeat(4, 0).repeat(4, 1)
  out = rgb.copy()
  at = on[big]
  out[at] = (rgb[at] * (1 - TINT) + colors[big[at]] * TINT).astype(np.uint8)
  out[big == IGNORE] //= 3
  return out


def drawn_objects(rgb: np.ndarray, o: Objects, score: float = 0.3) -> np.ndarray:
  image = Image.fromarray(rgb)
  masks = rle.decode(o.rle, *MAP) if o.rle is not None else None
  for i in np.flatnonzero(o.score >= score):
    track = int(o.track[i])
    color = track_color(track if track >= 0 else int(o.cls[i]) + 7)
    if masks is not None:
      mask = Image.fromarray(masks[i].repeat(4, 0).repeat(4, 1).astype(np.uint8) * 110)
      image.paste(Image.new("RGB", image.size, color), (0, 0), mask)
    draw = ImageDraw.Draw(image)
    box = [float(v) + 0.5 for v in o.boxes[i]]
    draw.rectangle(box, outline=(128, 128, 128) if o.ignore[i] else color)
    draw.text(
      (box[0] + 1, max(0, box[1] - 11)),
      f"{OBJECTS[int(o.cls[i])]}{f' #{track}' if track >= 0 else ''} {o.score[i]:.2f}",
      fill=color,
    )
  return np.asarray(image)


def dots(rgb: np.ndarray, xy: np.ndarray, visible: np.ndarray, show: np.ndarray) -> np.ndarray:
  image = Image.fromarray(rgb)
  draw = ImageDraw.Draw(image)
  for k in np.flatnonzero(show):
    x, y = float(xy[k, 0]) + 0.5, float(xy[k, 1]) + 0.5
    draw.ellipse(
      [x - 3, y - 3, x + 3, y + 3], outline=track_color(int(k)), fill=track_color(int(k)) if visible[k] else None
    )
  return np.asarray(image)


def side(task: str, rgb: np.ndarray, s: Scene, frame: dict[str, Any], is_truth: bool) -> np.ndarray:
  """(256, 512, 3) uint8: what `s` says of the task."""
  if task == "depth" and s.depth is not None:
    return depth_picture(s.depth).repeat(4, 0).repeat(4, 1)
  if task == "segmentation" and s.classes is not None:
    return tinted(rgb, s.classes)
  q = frame["queries"]
  if task == "lanes" and q is not None:
    xy, visible = (q.truth, q.visible) if is_truth or s.followed is None else s.followed
    return dots(rgb, xy, visible, q.known)
  objects = (
    s.detector if task == "detector" else (s.tracked if s.tracked is not None and task == "masks" else s.objects)
  )
  return drawn_objects(rgb, objects) if objects is not None else rgb


def picture(task: str, frame: dict[str, Any]) -> np.ndarray:
  """Input, prediction, truth side by side."""
  rgb = unpack_rgb(frame["frame"])
  out = np.full((VIEW_H, 3 * VIEW_W + 8, 3), 255, np.uint8)
  for k, part in enumerate(
    (rgb, side(task, rgb, frame["found"], frame, False), side(task, rgb, frame["ref"], frame, True))
  ):
    out[:, k * (VIEW_W + 4) : k * (VIEW_W + 4) + VIEW_W] = part
  return out


def page(results: dict[str, Any], worst: dict[tuple[str, str], Any]) -> str:
  """-> HTML, with its pictures in it. worst: (student, task) -> its worst frames."""
  env = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
  template = env.from_string(Path(__file__).with_name("page.html.j2").read_text())
  shown = []
  for (student, task), w in worst.items():
    frames: Sequence[dict[str, Any]] = [f for _, _, f in sorted(w.frames, key=lambda f: -f[0])]
    if frames:
      pictures = [{"data": png(picture(task, f)), **{k: f[k] for k in ("title", "error", "reference")}} for f in frames]
      shown.append({"student": student, "task": task, "pictures": pictures})
  by_condition: dict[str, Any] = {}
  for condition, said in results["conditions"].items():
    for ref, tasks in said["tables"].items():
      for task, columns in tasks.items():
        for column, values in columns.items():
          if HEADLINE.get(task) in values:
            by_condition.setdefault(ref, {}).setdefault(task, {}).setdefault(column, {})[condition] = values[
              HEADLINE[task]
            ]
  return template.render(
    title=f"Evaluation of {', '.join(results['bundles'])}",
    r=results,
    names=NAMES,
    definitions=DEFINITIONS,
    headline=HEADLINE,
    metrics=metrics,
    number=number,
    by_condition=by_condition,
    worst=shown,
    lower_is_better=lower_is_better,
  )

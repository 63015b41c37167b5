"""Pictures of a batch: what the student says beside what it is told, a row for each frame."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W, unpack_rgb
from openpilot.selfdrive.modeld.fair.heads import detector, objects
from openpilot.selfdrive.modeld.fair.roles import FORMER
from openpilot.tools.fair.students.classes import OBJECTS, SEGMENTATION
from openpilot.tools.lib.colors import class_colors, depth_picture, track_color
from openpilot.tools.lib.files import atomic_path

ROWS = 6
EVERYWHERE = np.ones((VIEW_H, VIEW_W), bool)
COLORS = class_colors(SEGMENTATION, FORMER), class_colors(OBJECTS, FORMER)
TINTS = np.array([COLORS[0].get(c, (0, 0, 0)) for c in SEGMENTATION], np.float32)


def classes_on(rgb: np.ndarray, classes: np.ndarray) -> np.ndarray:
  """classes (64, 128), 255 where nothing is known."""
  big = np.repeat(np.repeat(classes, VIEW_H // len(classes), 0), VIEW_W // classes.shape[1], 1)
  tint = np.where((big > 0) & (big < len(SEGMENTATION)), 0.5, 0.0)[..., None]
  return (rgb * (1 - tint) + TINTS[np.minimum(big, len(SEGMENTATION) - 1)] * tint).astype(np.uint8)


def boxes_on(rgb: np.ndarray, boxes: np.ndarray, cls: np.ndarray) -> np.ndarray:
  image = Image.fromarray(rgb)
  draw = ImageDraw.Draw(image)
  for box, c in zip(boxes, cls, strict=True):
    draw.rectangle([float(v) for v in box], outline=COLORS[1].get(OBJECTS[int(c)], (255, 255, 255)), width=2)
  return np.asarray(image)


def points_on(rgb: np.ndarray, points: np.ndarray, visible: np.ndarray) -> np.ndarray:
  image = Image.fromarray(rgb)
  draw = ImageDraw.Draw(image)
  for k, ((x, y), seen) in enumerate(zip(points, visible, strict=True)):
    if seen:
      draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=track_color(k))
  return np.asarray(image)


def draw_samples(path: Path, batch: dict[str, Any], out: dict[str, torch.Tensor]) -> None:
  host = {k: v.detach().float().cpu().numpy() for k, v in out.items()}
  rows = []
  n = len(batch["frame"])
  for i in np.unique(np.linspace(0, n - 1, min(n, ROWS)).astype(int)):
    rgb = unpack_rgb(batch["frame"][i].numpy())
    row = [rgb]
    if "depth" in host:
      row.append(depth_picture(np.exp(host["depth"][i, 0])))
      if "depth" in batch:
        row.append(depth_picture(batch["depth"][i].numpy()))
    if "segmentation" in host:
      row.append(classes_on(rgb, host["segmentation"][i].argmax(0)))
      if "segmentation" in batch:
        p = batch["segmentation"][i].numpy()
        row.append(classes_on(rgb, np.where(p.sum(0) > 0, p.argmax(0), 255)))
    truth = batch["objects"][i] if batch.get("objects") else None
    for head, decode, parts in (
      ("objects", objects.decode, ("heat", "box")),
      ("detector", detector.decode, ("logits", "boxes")),
    ):
      if f"{head}_{parts[0]}" in host:
        raw = {part: host[f"{head}_{part}"][i : i + 1] for part in parts}
        found = decode(raw, {parts[0]: {"classes": OBJECTS}}, EVERYWHERE)
        row.append(boxes_on(rgb, found.boxes, found.class_ids))
    if truth is not None:
      row.append(boxes_on(rgb, truth["boxes"].numpy(), truth["cls"].numpy()))
    if "lanes_points_out" in host and "points" in batch:
      steps = batch["points"].shape[1]
      c, t = divmod(int(i), steps)
      used = batch["points_known"][c, 0].numpy()
      row.append(points_on(rgb, host["lanes_points_out"][c, t][used], host["lanes_visible"][c, t][used] > 0))
      row.append(points_on(rgb, batch["points"][c, t].numpy()[used], batch["points_visible"][c, t].numpy()[used] > 0))
    small = [np.asarray(Image.fromarray(np.ascontiguousarray(p)).resize((VIEW_W // 2, VIEW_H // 2))) for p in row]
    rows.append(np.concatenate(small, axis=1))
  width = max(r.shape[1] for r in rows)
  picture = np.concatenate([np.pad(r, ((0, 0), (0, width - r.shape[1]), (0, 0))) for r in rows])
  with atomic_path(path) as tmp:
    Image.fromarray(picture).save(tmp)

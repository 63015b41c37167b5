"""Objects drawn on a picture: masks tinted, boxes, oriented or not, class and score."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from openpilot.selfdrive.modeld.fair.heads.oriented import corners
from openpilot.tools.fair.images.shapes import as_runs
from openpilot.tools.fair.labels import rle
from openpilot.tools.lib.colors import Color, name_color
from openpilot.tools.lib.errors import printable
from openpilot.tools.lib.said import drawn

WIDE = 640  # pixels of a picture that is drawn on for a page
TINT = 110  # of 255
GAP = 6


def draw(
  rgb: np.ndarray, rows: Sequence[Mapping[str, Any]], names: Mapping[int, str], wide: int | None = WIDE
) -> np.ndarray:
  """(h, w, 3) uint8 and COCO's annotations or results -> the same, at most `wide` pixels on its longer side."""
  h, w = rgb.shape[:2]
  scale = 1.0 if wide is None else min(1.0, wide / max(h, w))
  size = max(1, round(w * scale)), max(1, round(h * scale))
  image = Image.fromarray(rgb).resize(size, Image.Resampling.LANCZOS) if scale < 1 else Image.fromarray(rgb)
  font = ImageFont.load_default(size=max(12, round(max(size) / 60)))
  for r in rows:
    if (mask := r.get("segmentation")) and "obb" not in r:
      alpha = Image.fromarray(rle.decode(as_runs(mask, w, h)["counts"], h, w).astype(np.uint8) * TINT).resize(size)
      image.paste(Image.new("RGB", size, name_color(names[r["category_id"]])), mask=alpha)
  d = ImageDraw.Draw(image)
  for r in rows:
    color = name_color(names[r["category_id"]])
    text = printable(names[r["category_id"]], 30) + (f" {r['score']:.2f}" if "score" in r else "")
    text += " (crowd)" if r.get("iscrowd") else ""
    line = max(2, round(max(size) / 400))
    if "obb" in r:
      p = corners(np.array(r["obb"]))[0] * scale
      d.line([tuple(v) for v in (*p.tolist(), *p[:2].tolist())], fill=color, width=line)
      name_at(d, float(p[:, 0].min()), float(p[:, 1].min()), text, color, font)
      continue
    named_box(d, [v * scale for v in r["bbox"]], text, color, font, line)
  return np.asarray(image)


def named_box(d: Any, box: Sequence[float], text: str, color: Color, font: Any, line: int = 2) -> None:
  """box: x, y, width, height in d's pixels; the text above its upper left corner."""
  x, y, w, h = box
  d.rectangle((x, y, x + w, y + h), outline=color, width=line)
  name_at(d, x, y, text, color, font)


def name_at(d: Any, x: float, y: float, text: str, color: Color, font: Any) -> None:
  """The text above a corner."""
  at, text = (x + 2, max(0.0, y - 14)), drawn(text)
  d.rectangle(d.textbbox(at, text, font=font), fill=color)
  d.text(at, text, fill=(0, 0, 0) if sum(color) > 330 else (255, 255, 255), font=font)


def beside(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Two pictures of one size, with a gap."""
  return np.concatenate([a, np.full((len(a), GAP, 3), 255, np.uint8), b], axis=1)

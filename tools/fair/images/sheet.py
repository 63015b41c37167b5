"""A sheet of pictures with their labels."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from openpilot.tools.fair.images.check import Checked
from openpilot.tools.fair.images.draw import TINT, named_box
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.labels.video import SHEET, TILE, sheet
from openpilot.tools.lib.colors import Color, name_color
from openpilot.tools.lib.errors import printable
from openpilot.tools.lib.files import atomic_path
from openpilot.tools.lib.pictures import open_rgb
from openpilot.tools.lib.said import drawn

MOST = 300  # labels drawn on one picture


def chosen(found: Checked) -> list[int]:
  """Indices of pictures: some of each class first, the rarest class first; the rest spread over the data."""
  by_picture = found.by_picture()
  has = [{a["category_id"] for a in by_picture[p.entry["id"]]} for p in found.pictures]
  count = {c["id"]: sum(c["id"] in h for h in has) for c in found.categories}
  out: list[int] = []
  for c in sorted((c for c in count if count[c]), key=lambda c: count[c]):
    if len(out) < SHEET[1] and not any(c in has[i] for i in out):
      out.append(next(i for i, h in enumerate(has) if c in h))
  spread = np.linspace(0, len(has) - 1, SHEET[1]).round().astype(int).tolist()
  return sorted(dict.fromkeys([*out, *spread, *range(len(has))]), key=lambda i: i not in out)[: SHEET[1]]


def draw(found: Checked, index: int) -> np.ndarray:
  """(h, w, 3) uint8 with its masks tinted, boxes and class names; about TILE wide."""
  picture = found.pictures[index]
  names = {c["id"]: c["name"] for c in found.categories}
  image = open_rgb(picture.path)
  scale = min(1.0, TILE / max(image.size))
  size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
  image = image.resize(size, Image.Resampling.LANCZOS).convert("RGBA")
  font = ImageFont.load_default(size=12)
  labels = [a for a in found.annotations if a["image_id"] == picture.entry["id"]][:MOST]
  layer = Image.new("RGBA", size)
  d = ImageDraw.Draw(layer)
  for a in labels:
    color = name_color(names[a["category_id"]])
    mask = a.get("segmentation")
    if isinstance(mask, dict):
      paste(layer, mask, color)
    for p in mask if isinstance(mask, list) else ():
      d.polygon([v * scale for v in p], fill=(*color, TINT), outline=(*color, 255))
  image = Image.alpha_composite(image, layer).convert("RGB")
  d = ImageDraw.Draw(image)
  for a in labels:
    color = name_color(names[a["category_id"]])
    text = printable(names[a["category_id"]], 30) + (" (crowd)" if a["iscrowd"] else "")
    named_box(d, [v * scale for v in a["bbox"]], text, color, font)
  name = drawn(printable(picture.name, 50))
  d.text((3, size[1] - 15), name, fill=(255, 255, 255), font=font, stroke_width=1, stroke_fill=0)
  return np.asarray(image)


def paste(layer: Image.Image, mask: dict, color: Color) -> None:
  h, w = mask["size"]
  alpha = Image.fromarray(rle.decode(mask["counts"], h, w).astype(np.uint8) * TINT).resize(layer.size)
  layer.paste(Image.new("RGBA", layer.size, (*color, TINT)), mask=alpha.point(lambda v: 255 * (v > TINT // 2)))


def write_sheet(found: Checked, out: Path) -> int:
  """-> how many pictures are on it."""
  drawn = [draw(found, i) for i in chosen(found)]
  with atomic_path(out) as tmp:
    Image.fromarray(sheet(drawn)).save(tmp)
  return len(drawn)

"""Draws a store's labels over its frames: classes tinted, masks and boxes with identities, tracks with their tails,
depth and features beside."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from openpilot.selfdrive.modeld.fair.heads.oriented import corners
from openpilot.tools.fair.labels.carried import ORIENTED
from openpilot.tools.fair.labels.store import Group
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.labels.placement import rgb_of
from openpilot.tools.fair.teacher import Label
from openpilot.tools.fair.spec import InputSpec, road_classes
from openpilot.tools.lib.colors import TURBO, class_colors, depth_picture, track_color
from openpilot.tools.lib.errors import UserError, printable
from openpilot.tools.lib.said import drawn

WIDTH = 1024  # of what is drawn, about
SHEET = 5, 12  # pictures in a row of a sheet, and in all
TILE = 384
INSET = (256, 128)
TAIL = 12  # frames of a track that are drawn
TINTS = ((70, 110, 255), (255, 220, 0), (255, 60, 60), (60, 230, 90))


def pca_basis(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """features (N, C, h, w) -> mean (C,), first three components (3, C), and the 2nd and 98th percentile of each,
  (3,)."""
  x = features.astype(np.float32).transpose(0, 2, 3, 1).reshape(-1, features.shape[1])
  x = x[np.random.default_rng(0).permutation(len(x))[:4096]]
  mean = x.mean(axis=0)
  _, _, v = np.linalg.svd(x - mean, full_matrices=False)
  y = (x - mean) @ v[:3].T
  return mean, v[:3], np.percentile(y, 2, axis=0), np.percentile(y, 98, axis=0)


def pca_picture(features: np.ndarray, basis: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
  """(C, h, w) -> (h, w, 3) uint8: like features have like colors."""
  mean, v, low, high = basis
  y = (features.astype(np.float32).transpose(1, 2, 0) - mean) @ v.T
  return (np.clip((y - low) / np.maximum(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)


def relative_picture(d: np.ndarray) -> np.ndarray:
  """(h, w) relative inverse depth, larger is nearer -> (h, w, 3) uint8."""
  low, high = np.percentile(d, [2, 98])
  return TURBO[(np.clip((high - d) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)]


def scale_of(spec: InputSpec) -> int:
  """By how much frames are enlarged to be drawn on."""
  return max(1, round(WIDTH / spec.width))


class Painter:
  """Draws one group's labels on enlarged frames; insets come back apart."""

  def __init__(self, group: Group):
    self.group, spec = group, group.input
    self.scale = scale_of(spec)
    self.size = spec.width * self.scale, spec.height * self.scale
    self.font = ImageFont.load_default(size=13)
    self.tables: dict[str, tuple[dict[str, Any], np.ndarray]] = {}
    self.bases: dict[str, Any] = {}
    for label in group.labels:
      if label.kind != "dense":
        table = group.table(label.name)
        row = table["row"].to_numpy()
        order = np.argsort(row, kind="stable")
        columns = {c: table[c].to_numpy(zero_copy_only=False)[order] for c in table.column_names}
        self.tables[label.name] = columns, np.searchsorted(row[order], np.arange(group.n + 1))
      elif label.unit == "features":
        rows = np.unique(np.linspace(0, group.n - 1, 16).astype(int))
        self.bases[label.name] = pca_basis(np.stack([group.row(label.name, int(r)) for r in rows]))

  def paint(self, picture: np.ndarray, row: int) -> tuple[np.ndarray, list[tuple[str, np.ndarray]]]:
    insets: list[tuple[str, np.ndarray]] = []
    tint = 0
    for label in self.group.labels:
      if label.kind == "dense" and label.unit == "features":
        insets.append(
          (f"{self.group.teacher} features", pca_picture(self.group.row(label.name, row), self.bases[label.name]))
        )
      elif label.kind == "dense" and label.unit in ("m", "relative"):
        d = self.group.row(label.name, row).astype(np.float32).reshape(label.shape[-2:])
        insets.append(
          (
            f"{self.group.teacher} {label.name}, {label.unit}",
            depth_picture(d) if label.unit == "m" else relative_picture(d),
          )
        )
      elif label.kind == "dense" and label.unit == "class":
        picture = self._classes(picture, self.group.row(label.name, row), label)
      elif label.kind == "dense" and label.unit == "probability":
        p = Image.fromarray((self.group.row(label.name, row).astype(np.float32) * 255).astype(np.uint8)).resize(
          self.size
        )
        a = np.asarray(p)[..., None] / 255 * 0.45
        picture = (picture * (1 - a) + np.array(TINTS[tint % len(TINTS)]) * a).astype(np.uint8)
        tint += 1
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    for label in self.group.labels:
      if label.kind == "boxes":
        image, draw = self._boxes(image, draw, label, row)
      elif label.kind == "points":
        self._points(draw, label, row)
    return np.asarray(image), insets

  def _classes(self, picture: np.ndarray, ids: np.ndarray, label: Label) -> np.ndarray:
    """All classes but background tinted, and in the corner which is which."""
    colors = class_colors(label.classes, road_classes().roles(label.classes))
    table = np.zeros((256, 3), np.float32)
    tint = np.zeros(256, np.float32)
    for k, name in enumerate(label.classes):
      if name in colors:
        table[k], tint[k] = colors[name], 0.5
    big = np.asarray(Image.fromarray(ids.reshape(ids.shape[-2:])).resize(self.size, Image.Resampling.NEAREST))
    a = tint[big][..., None]
    image = Image.fromarray((picture * (1 - a) + table[big] * a).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    there = [n for k, n in enumerate(label.classes) if n in colors and (big == k).any()]
    for i, name in enumerate(there):
      at = 8, self.size[1] - 18 * (len(there) - i)
      draw.text(at, drawn(name), fill=colors[name], font=self.font, stroke_width=2, stroke_fill=(0, 0, 0))
    return np.asarray(image)

  def _boxes(
    self, image: Image.Image, draw: ImageDraw.ImageDraw, label: Label, row: int
  ) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    columns, starts = self.tables[label.name]
    for i in range(starts[row], starts[row + 1]):
      track = int(columns["track"][i]) if "track" in columns else -1
      color = track_color(track if track >= 0 else int(columns["cls"][i]) + 7)
      if "rle" in columns and columns["rle"][i]:
        mask = Image.fromarray(rle.decode(columns["rle"][i], *label.shape).astype(np.uint8) * 110)
        image.paste(Image.new("RGB", image.size, color), (0, 0), mask.resize(image.size, Image.Resampling.NEAREST))
        draw = ImageDraw.Draw(image)
      box = [(float(columns[c][i]) + 0.5) * self.scale for c in ("x0", "y0", "x1", "y1")]
      if "angle" in columns:
        turned = corners(np.array([columns[c][i] for c in ORIENTED], np.float64))[0]
        draw.polygon([tuple(p) for p in ((turned + 0.5) * self.scale).tolist()], outline=color, width=2)
      else:
        draw.rectangle(box, outline=color, width=2)
      name = drawn(label.classes[int(columns["cls"][i])]) if label.classes else ""
      text = f"{name} {columns['score'][i]:.2f}" + (f" #{track}" if track >= 0 else "")
      draw.text(
        (box[0] + 2, max(0, box[1] - 15)), text, fill=color, font=self.font, stroke_width=1, stroke_fill=(0, 0, 0)
      )
    return image, draw

  def _points(self, draw: ImageDraw.ImageDraw, label: Label, row: int) -> None:
    columns, starts = self.tables[label.name]
    line = "road_x" in columns
    a, b = starts[row], starts[row + 1]
    if line:
      tracks = np.unique(columns["track"][a:b])
      for t in tracks:
        i = a + np.flatnonzero((columns["track"][a:b] == t) & columns["visible"][a:b])
        p = [((columns["x"][j] + 0.5) * self.scale, (columns["y"][j] + 0.5) * self.scale) for j in i]
        color = track_color(int(t))
        if len(p) > 1:
          draw.line(p, fill=color, width=2)
        for x, y in p if len(p) == 1 else ():
          draw.ellipse([x - 6, y - 6, x + 6, y + 6], outline=color, width=2)
      return
    first = starts[max(0, row - TAIL)]
    where: dict[int, list[tuple[float, float]]] = {}
    for i in range(first, b):
      where.setdefault(int(columns["track"][i]), []).append(
        (float(columns["x"][i] + 0.5) * self.scale, float(columns["y"][i] + 0.5) * self.scale)
      )
    for i in range(a, b):
      track = int(columns["track"][i])
      p, color = where[track], track_color(track)
      if len(p) > 1:
        draw.line(p, fill=color, width=1)
      x, y = p[-1]
      if columns["visible"][i]:
        draw.ellipse([x - 2.5, y - 2.5, x + 2.5, y + 2.5], fill=color)
      else:
        draw.ellipse([x - 2.5, y - 2.5, x + 2.5, y + 2.5], outline=(128, 128, 128))


def pictures(frames: Group, groups: list[Group], limit: int | None = None) -> Iterator[np.ndarray]:
  """(H, W, 3) uint8 of every stored frame that at least one of `groups` has labeled. Raises UserError where none is."""
  painters = [Painter(g) for g in groups]
  spec = frames.input
  size = spec.width * scale_of(spec), spec.height * scale_of(spec)
  names = frames.frames["name"].to_pylist() if "name" in frames.frames.column_names else None
  rows = [{int(f): r for k in g.done() for r in g.rows(k) for f in [g.frames["frame_id"][r].as_py()]} for g in groups]
  ids, segment_ids = frames.frames["frame_id"].to_pylist(), frames.frames["segment_id"].to_pylist()
  n = 0
  for k in sorted(frames.done()):
    span = frames.rows(k)
    block = frames.read("frame", span.start, span.stop)
    for r, packed in zip(span, block, strict=True):
      if not any(ids[r] in m for m in rows):
        continue
      base = np.asarray(Image.fromarray(rgb_of(packed)).resize(size, Image.Resampling.BILINEAR))
      insets: list[tuple[str, np.ndarray]] = []
      for painter, m in zip(painters, rows, strict=True):
        if ids[r] in m:
          base, more = painter.paint(base, m[ids[r]])
          insets += more
      what = f"frame {segment_ids[r]}" if names is None else printable(names[r], 60)
      yield compose(base, insets, f"{frames.segment}  {what}")
      n += 1
      if limit is not None and n >= limit:
        return
  if not n:
    raise UserError(f"no stored frame of {frames.segment} is labeled; label it without --no-frames")


def compose(base: np.ndarray, insets: list[tuple[str, np.ndarray]], title: str) -> np.ndarray:
  """The picture, and below it as many insets as there are."""
  (height, width), strip = base.shape[:2], INSET[1] if insets else 0
  image = Image.new("RGB", (width, height + strip))
  image.paste(Image.fromarray(base), (0, 0))
  draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
  draw.text((8, 4), drawn(title), fill=(255, 255, 255), font=font, stroke_width=1, stroke_fill=(0, 0, 0))
  for k, (name, picture) in enumerate(insets[: width // INSET[0]]):
    image.paste(Image.fromarray(picture).resize(INSET), (k * INSET[0], height))
    draw.text(
      (k * INSET[0] + 4, height + 2), name, fill=(255, 255, 255), font=font, stroke_width=1, stroke_fill=(0, 0, 0)
    )
  return np.asarray(image)


def sheet(pictures: list[np.ndarray]) -> np.ndarray:
  """Pictures of any sizes -> (H, W, 3) uint8: one beside the other, made smaller."""
  columns = min(SHEET[0], len(pictures))
  rows = -(-len(pictures) // columns)
  out = Image.new("RGB", (columns * TILE, rows * TILE))
  for i, picture in enumerate(pictures):
    small = Image.fromarray(picture)
    small.thumbnail((TILE, TILE))
    out.paste(small, (i % columns * TILE, i // columns * TILE))
  return np.asarray(out)

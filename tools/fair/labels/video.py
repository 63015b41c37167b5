"""Renders a store's labels over the model frames: classes tinted, masks and boxes with identities, tracks with their
tails, depth and features beside."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W, unpack_rgb
from openpilot.tools.fair.labels.store import Group
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.colors import TURBO, depth_picture, track_color
from openpilot.tools.lib.errors import UserError

SCALE = 2
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


class Painter:
  """Draws one group's labels on pictures of SCALE times the view; insets come back apart."""

  def __init__(self, group: Group):
    self.group = group
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
      elif label.kind == "dense" and label.unit == "probability":
        p = Image.fromarray((self.group.row(label.name, row).astype(np.float32) * 255).astype(np.uint8)).resize(
          (VIEW_W * SCALE, VIEW_H * SCALE)
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
      box = [(float(columns[c][i]) + 0.5) * SCALE for c in ("x0", "y0", "x1", "y1")]
      draw.rectangle(box, outline=color, width=2)
      name = label.classes[int(columns["cls"][i])] if label.classes else ""
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
        p = [((columns["x"][j] + 0.5) * SCALE, (columns["y"][j] + 0.5) * SCALE) for j in i]
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
        (float(columns["x"][i] + 0.5) * SCALE, float(columns["y"][i] + 0.5) * SCALE)
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
  rows = [{int(f): r for k in g.done() for r in g.rows(k) for f in [g.frames["frame_id"][r].as_py()]} for g in groups]
  ids, segment_ids = frames.frames["frame_id"].to_pylist(), frames.frames["segment_id"].to_pylist()
  n = 0
  for k in sorted(frames.done()):
    span = frames.rows(k)
    block = frames.read("frame", span.start, span.stop)
    for r, packed in zip(span, block, strict=True):
      if not any(ids[r] in m for m in rows):
        continue
      base = np.asarray(
        Image.fromarray(unpack_rgb(packed)).resize((VIEW_W * SCALE, VIEW_H * SCALE), Image.Resampling.BILINEAR)
      )
      insets: list[tuple[str, np.ndarray]] = []
      for painter, m in zip(painters, rows, strict=True):
        if ids[r] in m:
          base, more = painter.paint(base, m[ids[r]])
          insets += more
      yield compose(base, insets, f"{frames.segment}  frame {segment_ids[r]}")
      n += 1
      if limit is not None and n >= limit:
        return
  if not n:
    raise UserError(f"no stored frame of {frames.segment} is labeled; label it without --no-frames")


def compose(base: np.ndarray, insets: list[tuple[str, np.ndarray]], title: str) -> np.ndarray:
  """The picture, and below it as many insets as there are."""
  strip = INSET[1] if insets else 0
  image = Image.new("RGB", (VIEW_W * SCALE, VIEW_H * SCALE + strip))
  image.paste(Image.fromarray(base), (0, 0))
  draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
  draw.text((8, 4), title, fill=(255, 255, 255), font=font, stroke_width=1, stroke_fill=(0, 0, 0))
  for k, (name, picture) in enumerate(insets[: VIEW_W * SCALE // INSET[0]]):
    image.paste(Image.fromarray(picture).resize(INSET), (k * INSET[0], VIEW_H * SCALE))
    draw.text(
      (k * INSET[0] + 4, VIEW_H * SCALE + 2),
      name,
      fill=(255, 255, 255),
      font=font,
      stroke_width=1,
      stroke_fill=(0, 0, 0),
    )
  return np.asarray(image)

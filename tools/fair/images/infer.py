#!/usr/bin/env python3
"""What a student finds in pictures, folders of them, and videos: as COCO JSON, YOLO's files, CSV, and drawn."""

import contextlib
import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from openpilot.selfdrive.modeld.fair.bundle import BundleError
from openpilot.selfdrive.modeld.fair.runners import RUNNERS
from openpilot.selfdrive.modeld.fair.heads.oriented import corners
from openpilot.tools.fair.images.predict import Found, Predictor, coco_rows
from openpilot.tools.fair.images.tiles import OVERLAP
from openpilot.tools.fair.labels.sources import SourceOptions, open_sources
from openpilot.tools.fair.labels.sources.pictures import Pictures, Video
from openpilot.tools.fair.rotated import outline
from openpilot.tools.lib.errors import UserError, cli, printable
from openpilot.tools.lib.files import LONG, atomic_path, write_json
from openpilot.tools.lib.options import option, parse

FORMATS = ("coco", "yolo", "csv")
CSV = ("picture", "class", "score", "x0", "y0", "x1", "y1")
CORNERS = (*CSV[:3], *(f"{a}{k}" for k in range(1, 5) for a in "xy"))  # of oriented boxes
FPS = 20  # of a video that is drawn


@dataclass(frozen=True)
class Options:
  model: Path = option(positional=True, help="a bundle's folder, or what `images train-student` wrote")
  paths: tuple[str, ...] = option(positional=True, metavar="PATH", help="pictures, folders of pictures, videos")
  output: Path = option(aliases=("--out",), help="a folder")
  format: tuple[str, ...] = option(("coco",), nargs="+", choices=FORMATS, help="what is written")
  visualize: bool = option(False, help="draw what is found, too")
  score: float = option(0.3, help="from which on a detection is told")
  batch_size: int = option(8, aliases=("--batch",), help="pictures that are read at once")
  every: int = option(1, metavar="N", help="of videos each Nth frame")
  tile: int = option(0, metavar="PIXELS", help="show large pictures in tiles of this side (oriented boxes)")
  overlap: int = option(OVERLAP, metavar="PIXELS", help="of tiles")
  runner: str = option("onnx", help=f"what runs the graph: {', '.join(RUNNERS)}")
  threads: int = option(1, help="of the runner")


def found_in(part: Pictures, predictor: Predictor, size: int) -> Iterator[tuple[int, np.ndarray, Found]]:
  """Row, picture, and what is in it; `size` pictures in memory at once."""
  rows = range(len(part.entries))
  chunks = [list(rows)] if isinstance(part, Video) else [list(rows[a : a + size]) for a in rows[::size]]
  for chunk in chunks:
    read = iter(part.read(chunk))
    while some := list(islice(read, size)):
      yield from ((r, rgb, f) for (r, rgb), f in zip(some, predictor([p for _, p in some]), strict=True))


def name_of(part: Pictures, row: int) -> str:
  """Of a picture, below its folder, to the letter; of a video's frame with its number, as a picture's file would be
  called."""
  if isinstance(part, Video):
    return f"{part.path.stem}_{part.entries[row].segment_id:06d}.jpg"
  return str(part.stills[row].path.relative_to(part.segment.dir))


def check_names(parts: Sequence[Pictures], in_files: bool) -> None:
  """Raises UserError where two pictures would be told under one name, or, in_files, in one file, which has no suffix of
  its picture's."""
  seen: dict[Path, Path] = {}
  for part in parts:
    for row in range(len(part.entries)):
      name = Path(name_of(part, row))
      name = name.with_suffix("") if in_files else name
      at = part.path if isinstance(part, Video) else part.stills[row].path
      if seen.get(name) == at:
        raise UserError(f"{printable(at, LONG)} is named twice; name it once")
      if name in seen:
        raise UserError(
          f"{printable(seen[name], LONG)} and {printable(at, LONG)} would both be told as {printable(name, LONG)}; "
          "search them one after the other, each with an --output of its own"
        )
      seen[name] = at


def yolo_lines(found: Found) -> list[str]:
  """Class, center and size relative to the picture, of oriented boxes their four corners, score: as YOLO's programs
  write what they find."""
  w, h = found.size
  out = []
  if found.oriented is not None:
    for p, score, k in zip(corners(found.oriented) / [w, h], found.scores, found.classes, strict=True):
      out.append(f"{k} " + " ".join(f"{v:.6f}" for v in p.ravel()) + f" {score:.5f}")
    return out
  for (x0, y0, x1, y1), score, k in zip(found.boxes.tolist(), found.scores, found.classes, strict=True):
    box = (x0 + x1) / 2 / w, (y0 + y1) / 2 / h, (x1 - x0) / w, (y1 - y0) / h
    out.append(f"{k} " + " ".join(f"{v:.6f}" for v in box) + f" {score:.5f}")
  return out


def row_area(row: dict[str, Any]) -> float:
  w, h = row["obb"][2:4] if "obb" in row else row["bbox"][2:]
  return round(w * h, 2)


class Writer:
  """What is found, in all formats that are asked for."""

  def __init__(self, args: Options, names: list[str]):
    self.args, self.names = args, names
    self.images: list[dict[str, Any]] = []
    self.rows: list[dict[str, Any]] = []
    self.lines: list[tuple[Any, ...]] = []
    self.video: Any = None
    self.columns: tuple[str, ...] = CSV

  def add(self, name: str, rgb: np.ndarray, found: Found) -> None:
    out = self.args.output
    number = len(self.images) + 1
    self.images.append({"id": number, "file_name": name, "width": found.size[0], "height": found.size[1]})
    mine = coco_rows(found, number, range(1, len(self.names) + 1), len(self.rows) + 1)
    self.rows += mine
    if "yolo" in self.args.format:
      with atomic_path((out / "labels" / name).with_suffix(".txt")) as tmp:
        tmp.write_text("".join(f"{line}\n" for line in yolo_lines(found)))
    places = found.boxes.tolist()
    if found.oriented is not None:
      self.columns, places = CORNERS, outline(found.oriented)
    for box, score, k in zip(places, found.scores, found.classes, strict=True):
      self.lines.append((name, self.names[int(k)], f"{score:.5f}", *(f"{v:.2f}" for v in box)))
    if not self.args.visualize:
      return
    from PIL import Image

    from openpilot.tools.fair.images.draw import draw

    drawn = draw(rgb, mine, dict(enumerate(self.names, 1)), None)
    if self.video is not None:
      self.video.write(drawn)
      return
    with atomic_path((out / "pictures" / name).with_suffix(".jpg")) as tmp:
      Image.fromarray(drawn).save(tmp, quality=90)

  @contextlib.contextmanager
  def drawing(self, part: Pictures) -> Iterator[None]:
    """Frames of a video are drawn into one."""
    if not self.args.visualize or not isinstance(part, Video):
      yield
      return
    from openpilot.tools.lib.videowriter import VideoWriter

    w, h = part.pixels
    with atomic_path(self.args.output / f"{part.path.stem}.mp4") as tmp, VideoWriter(tmp, w // 2 * 2, h // 2 * 2) as v:
      self.video = v
      try:
        yield
      finally:
        self.video = None

  def close(self) -> list[Path]:
    out, written = self.args.output, []
    if "coco" in self.args.format:
      categories = [{"id": k, "name": n} for k, n in enumerate(self.names, 1)]
      annotations = [{**r, "iscrowd": 0, "area": row_area(r)} for r in self.rows]
      write_json(
        out / "predictions.json", {"images": self.images, "annotations": annotations, "categories": categories}
      )
      written.append(out / "predictions.json")
    if "csv" in self.args.format:
      with atomic_path(out / "predictions.csv") as tmp, open(tmp, "w", newline="") as f:
        csv.writer(f).writerows([self.columns, *self.lines])
      written.append(out / "predictions.csv")
    if "yolo" in self.args.format:
      with atomic_path(out / "labels" / "classes.txt") as tmp:
        tmp.write_text("".join(f"{printable(n)}\n" for n in self.names))
      written.append(out / "labels")
    return written


def run(args: Options) -> Path:
  """-> the folder. Raises UserError."""
  if not 0 < args.score < 1:
    raise UserError(f"--score {args.score:g}: a score is between 0 and 1")
  for name in ("batch_size", "every", "threads"):
    if getattr(args, name) < 1:
      raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: it is at least 1")
  predictor = Predictor(args.model, args.score, args.threads, args.runner, args.tile, args.overlap)
  parts: list[Pictures] = []
  for path in args.paths:
    parts += [p for p in open_sources([path], SourceOptions(every=args.every), "pictures") if isinstance(p, Pictures)]
  check_names(parts, "yolo" in args.format or args.visualize)
  writer = Writer(args, predictor.names)
  with tqdm(total=sum(len(p.entries) for p in parts), desc="infer", unit="picture") as bar:
    for part in parts:
      with writer.drawing(part):
        for row, rgb, found in found_in(part, predictor, args.batch_size):
          writer.add(name_of(part, row), rgb, found)
          bar.update()
  written = writer.close()
  print(f"{len(writer.images)} pictures, {len(writer.rows)} objects of at least {args.score:g}")
  print(f"wrote        {', '.join(map(str, written))}" + (f"; drawn in {args.output}" if args.visualize else ""))
  return args.output


def main() -> None:
  run(parse(Options, __doc__, "images infer"))


if __name__ == "__main__":
  raise SystemExit(cli(main, (BundleError,))())

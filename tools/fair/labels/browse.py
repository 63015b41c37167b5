#!/usr/bin/env python3
"""Lists a label store: its groups, whether they are complete, their size, and their labels' statistics. With --video or
--sheet it draws them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from openpilot.tools.fair.labels.rules import RULES
from openpilot.tools.fair.labels.store import Group, LabelStore
from openpilot.tools.fair.labels.video import SHEET, pictures, sheet
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.files import atomic_path
from openpilot.tools.lib.options import option, parse
from openpilot.tools.lib.videowriter import VideoWriter

SAMPLE = 16  # rows of a dense label that its statistics are taken of


def statistics(group: Group, label: Label) -> str:
  done = group.done()
  if not done:
    return "nothing yet"
  if label.kind == "dense":
    rows = [r for k in sorted(done) for r in group.rows(k)]
    some = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, SAMPLE).astype(int))]
    x = np.stack([group.row(label.name, r) for r in some]).astype(np.float32)
    finite = np.isfinite(x)
    rest = "" if finite.all() else f", of the {finite.mean():.0%} that are finite"  # a sky's depth is not
    x = x[finite] if finite.any() else np.zeros(1, np.float32)
    values = f"min {x.min():.3g}, mean {x.mean():.3g}, max {x.max():.3g}, std {x.std():.3g}{rest}"
    return f"{label.dtype}{list(label.shape)} {label.unit}: {values}"
  table = group.table(label.name)
  counts = (
    np.bincount(table["cls"].to_numpy().astype(int), minlength=len(label.classes))
    if "cls" in table.column_names
    else np.zeros(0, int)
  )
  classes = ", ".join(f"{label.classes[i]} {n}" for i, n in enumerate(counts) if n and i < len(label.classes))
  tracks = f", {len(np.unique(table['track'].to_numpy()))} tracks" if "track" in table.column_names else ""
  a_frame = table.num_rows / max(1, group.row_count)
  return f"{table.num_rows} {label.kind}, {a_frame:.2f} a frame{tracks}{': ' + classes if classes else ''}"


def check(groups: list[Group]) -> dict[Path, int]:
  """Prints what is damaged. -> how many chunks of which groups."""
  bad: dict[Path, int] = {}
  for g in tqdm(groups, desc="check", unit="group", leave=False):
    for k, problem in g.problems():
      tqdm.write(
        f"damaged: chunk {k} of {g.segment} by {g.teacher}: {problem}; run its labeling command again with --repair"
      )
      bad[g.path] = bad.get(g.path, 0) + 1
  return bad


def drawn(
  store: LabelStore, teachers: list[str] | None, segment: str | None, limit: int | None
) -> Iterator[tuple[Group, np.ndarray]]:
  """(group of frames, picture) of every frame with labels. Raises UserError where there is none."""
  frames = store.groups("frames", segment)
  if not frames:
    raise UserError(
      f"{store.place} holds no frames{f' of {segment}' if segment else ''} to draw on; label again without --no-frames"
    )
  if len({g.segment for g in frames}) < len(frames):
    raise UserError(f"{store.place} holds frames of one segment made with several settings; label again with --prune")
  for f in frames:
    groups = [
      g
      for g in store.groups(segment=f.segment)
      if g.teacher != "frames" and (teachers is None or g.teacher in teachers) and g.done()
    ]
    if not groups:
      by = f" by {', '.join(teachers)}" if teachers else ""
      raise UserError(f"{f.segment} has no labels{by} in {store.place}; label it first")
    for picture in tqdm(pictures(f, groups, limit), desc=f.segment, unit="frame", total=limit or f.n):
      yield f, picture


def render(store: LabelStore, teachers: list[str] | None, segment: str | None, out: Path, limit: int | None) -> int:
  """A video of every frame. -> how many."""
  n = 0
  with atomic_path(out) as tmp:
    video: VideoWriter | None = None
    try:
      for f, picture in drawn(store, teachers, segment, limit):
        if video is None:
          height, width = (side // 2 * 2 for side in picture.shape[:2])
          video = VideoWriter(tmp, width, height, fps=max(1, 20 // f.meta["every"]))
        video.write(fitted(picture, width, height))
        n += 1
    finally:
      if video is not None:
        video.close()
  return n


def fitted(picture: np.ndarray, width: int, height: int) -> np.ndarray:
  """Cut or filled to a video's size: insets come and go, and segments may differ."""
  if picture.shape[:2] == (height, width):
    return picture
  out = np.zeros((height, width, 3), np.uint8)
  part = picture[:height, :width]
  out[: part.shape[0], : part.shape[1]] = part
  return out


def render_sheet(
  store: LabelStore, teachers: list[str] | None, segment: str | None, out: Path, limit: int | None
) -> int:
  """One picture of some frames of each segment. -> how many."""
  segments = len(store.groups("frames", segment)) or 1
  found = [p for _, p in drawn(store, teachers, segment, limit or max(1, SHEET[1] // segments))]
  with atomic_path(out) as tmp:
    Image.fromarray(sheet(found)).save(tmp)
  return len(found)


@dataclass(frozen=True)
class Options:
  store: Path = option(positional=True, help="the label store")
  video: Path | None = option(None, metavar="OUT.mp4", help="draw the labels over the frames")
  sheet: Path | None = option(None, metavar="OUT.png", help="draw some frames on one picture")
  teachers: str | None = option(None, help="only these teachers, comma-separated")
  segment: str | None = option(None, help="only this segment, as ROUTE--N")
  frames: int | None = option(None, help="at most so many frames of each segment")


def main() -> int:
  args = parse(Options, __doc__, "labels")
  teachers = args.teachers.replace(" ", "").split(",") if args.teachers else None
  store = LabelStore(args.store)
  if args.video is not None:
    print(f"{args.video}: {render(store, teachers, args.segment, args.video, args.frames)} frames")
  if args.sheet is not None:
    print(f"{args.sheet}: {render_sheet(store, teachers, args.segment, args.sheet, args.frames)} frames")
  if args.video is not None or args.sheet is not None:
    return 0
  groups = [g for g in store.groups(segment=args.segment) if teachers is None or g.teacher in teachers]
  if not groups:
    raise UserError(
      f"{args.store} holds no such labels; it has {', '.join(sorted({g.teacher for g in store.groups()})) or 'nothing'}"
    )
  bad = check(groups)
  segment, stale = None, 0
  for g in groups:
    if g.segment != segment:
      segment = g.segment
      print(segment)
    t = g.meta["teacher"]
    stale += bool(g.stale)
    print(
      f"  {g.teacher:<22} {g.row_count:>6}/{g.n} frames {g.size / 1e6:>9.1f} MB  {t['license']}  {t['model_id']} "
      f"{t['checkpoint'][:12]}"
    )
    for name in g.stale:
      print(f"    stale: since then {RULES[name].mended}; label again with --prune")
    for label in g.labels:
      print(f"    {label.name}: {statistics(g, label) if g.path not in bad else f'{bad[g.path]} damaged chunks'}")
  said = [
    "all whole" if not bad else f"{sum(bad.values())} damaged chunks",
    *([f"{stale} groups stale"] if stale else []),
  ]
  print(f"{len(groups)} groups, {sum(g.size for g in groups) / 1e6:.1f} MB, {', '.join(said)}")
  return 1 if bad else 0


if __name__ == "__main__":
  raise SystemExit(cli(main)())

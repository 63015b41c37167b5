#!/usr/bin/env python3
"""Bundles on real frames that nobody labeled, beside what the roads' teacher and two detectors say of whole pictures.
By night those do not see much, either: the boxes that a bundle has are counted, to be looked at.

python tests/bench/bench_unlabeled.py --weights FOLDER --data DRIVE PICTURES --every 15 models/fair_unified_small ...
PICTURES is a folder with an aim.yaml in it, focal length and horizon of each as `label --aim` has them."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

import cv2
import numpy as np
from tqdm import tqdm

from openpilot.tools.fair.labels.agree import agreed_boxes
from openpilot.tools.fair.labels.sources.source import SourceOptions
from openpilot.tools.fair.labels.sources.stills import Stills
from openpilot.tools.fair.labels.views import SegmentView, segment_view
from openpilot.tools.lib.errors import cli
from openpilot.tools.lib.framereader import FrameReader
from openpilot.tools.lib.pictures import read_rgb
from openpilot.tools.lib.route import Route
from tests.bench.bench_streets import Runner, Sums, Teachers, frame_of, judge_each_other, judge_seen, tell


def frames_of(folder: Path, every: int) -> Iterator[tuple[np.ndarray, SegmentView]]:
  """A drive's qcamera, every so many frames; or all pictures that lie beside an aim.yaml."""
  if (aim := folder / "aim.yaml").exists():
    for still in Stills().open([str(folder)], SourceOptions(aim=aim)):
      yield read_rgb(still.path)[: still.height, : still.width], still
    return
  for segment in Route(folder).segments:
    view = segment_view(segment, "qcamera")
    reader = FrameReader(view.path, "rgb24")
    for e in view.entries[::every]:
      yield reader.get(e.segment_id)[: view.height // 2 * 2, : view.width // 2 * 2], view


def judge(sums: Sums, runners: dict[str, Runner], teachers: Teachers, folder: Path, every: int) -> None:
  name = folder.name
  for rgb, view in tqdm(frames_of(folder, every), desc=name, unit="frame"):
    rgb = np.ascontiguousarray(rgb)
    frame, valid = frame_of(rgb, view)
    known = valid[1::4, 1::4]
    road, parts = teachers.road(rgb, view), teachers.vehicles(rgb, view)
    both, alone = agreed_boxes(parts)
    judge_each_other(sums, name, parts)
    sums.add(f"{name}: boxes a frame on which both detectors agree", len(both.xyxy), 1)
    for who, runner in runners.items():
      seen = runner(frame, valid)
      judge_seen(sums, f"{name}, {who}", seen, road, known, (both.xyxy, alone))
      if seen.boxes is not None:
        sums.add(f"{name}, {who}: boxes a frame", len(seen.boxes), 1)


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("bundles", nargs="+", type=Path)
  p.add_argument("--data", nargs="+", type=Path, required=True, metavar="FOLDER", help="drives, or pictures")
  p.add_argument("--every", type=int, default=15, metavar="N", help="of a drive's frames")
  p.add_argument("--weights", type=Path, required=True, help="the folder with the teachers' weights")
  p.add_argument("--output", type=Path, help="a JSON of all figures")
  args = p.parse_args()
  os.environ.setdefault("FAIR_WEIGHTS", str(args.weights))
  cv2.setNumThreads(1)
  runners, teachers, sums = {str(b): Runner(b) for b in args.bundles}, Teachers(), Sums()
  for folder in args.data:
    judge(sums, runners, teachers, folder, args.every)
  tell(sums.ratios(), args.output)


if __name__ == "__main__":
  raise SystemExit(cli(main)())

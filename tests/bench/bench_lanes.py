#!/usr/bin/env python3
"""Lane lines as people judge them: TuSimple's accuracy of the lines that fairmodeld would publish, without modelV2 to
begin on.

python tests/bench/bench_lanes.py BUNDLE... [--tusimple FOLDER] [--simulated LABELS --routes DIR] [--logged LABELS]
TuSimple's pictures (their masks are the truth) are shown for a few frames each, their camera guessed as that of an
unknown video; simulated drives have true lines; a log's are its own model's, own lane only, of which neither is
truth."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

import cv2
import numpy as np
from tqdm import tqdm

from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.selfdrive.modeld.fair.bundle import Bundle, BundleError, load_bundle
from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W, ModelFrame
from openpilot.tools.fair.evaluation.lane_lines import ROWS, LaneLines, Lines, at_rows, instance_lines, nearest_lines
from openpilot.tools.fair.evaluation.logged import OWN, SURE
from openpilot.tools.fair.evaluation.scenes import Segment, check_label, open_segments
from openpilot.tools.fair.labels.aim import mounting_of
from openpilot.tools.fair.labels.dataset import Reader, rows_by_frame
from openpilot.tools.fair.labels.picture import PictureWarp
from openpilot.tools.fair.labels.views import FOCAL_OF_WIDTH, SegmentView
from openpilot.tools.lib import route
from openpilot.tools.lib.cameras import pinhole
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.sim.truth import Truth

VIEW_ROWS = np.arange(60.0, 251.0, 10.0)  # of the view: 88 to 5.5 m ahead
FOCAL = 0.85 * 1280  # of TuSimple's pictures, as guessed; the view's is 910, and distances in it are scaled by that
SHOWN = 6  # frames of a still picture: lines begin on the first one's segmentation
HORIZON = 250 / 720  # of the height of TuSimple's pictures, where their lines meet
Picture = tuple[np.ndarray, np.ndarray, list[np.ndarray], np.ndarray]  # frame, valid, true lines, picture from view


def tusimple(folder: Path) -> Iterator[Picture]:
  for path in sorted((folder / "image").glob("*.png")):
    rgb = np.ascontiguousarray(cv2.imread(str(path))[..., ::-1])
    mask = cv2.imread(str(folder / "gt_instance_image" / path.name), cv2.IMREAD_GRAYSCALE)
    h, w = rgb.shape[:2]
    k = pinhole(FOCAL_OF_WIDTH * w, w, h)
    view = SegmentView(
      route.Segment("a", 0, Path(), {}), "road", w, h, k, mounting_of((w / 2, HORIZON * h), k), True, [], ""
    )
    planar = cv2.cvtColor(rgb, cv2.COLOR_RGB2YUV_I420)
    u, v = planar[h:].reshape(2, h // 2 * w // 2)
    model = ModelFrame(w, h, w, w * h)
    model.set_calibration(view.rpy, view.intrinsics)
    frame = model.warp(np.concatenate([planar[:h].ravel(), np.stack([u, v], 1).ravel()])).copy()
    yield frame, model.valid.copy(), instance_lines(mask, ROWS), PictureWarp(view, "medmodel", w, h).picture_from_view


def through(m: np.ndarray, points: np.ndarray) -> np.ndarray:
  """(3, 3), (P, 2) -> (P, 2)."""
  p = points @ m[:, :2].T + m[:, 2]
  return p[:, :2] / p[:, 2:]


def judge_tusimple(bundle: Bundle, folder: Path) -> LaneLines:
  sums, lines = LaneLines(), Lines(bundle)
  for frame, valid, truth, to_picture in tusimple(folder):
    lines.begin(None)
    found: list[np.ndarray] = []
    for i in range(SHOWN):
      found = lines.step(frame, i, valid)
    sums.add([at_rows(through(to_picture, x), ROWS, 1280) for x in found], truth, ROWS)
  return sums


def in_view(points: Sequence[np.ndarray]) -> list[np.ndarray]:
  rows = [at_rows(x, VIEW_ROWS, VIEW_W) for x in points]
  return [x for x in rows if np.isfinite(x).sum() > 1]


def judge_simulated(bundle: Bundle, segments: list[Segment], routes: Path) -> LaneLines:
  sums, lines, reader = LaneLines(), Lines(bundle), Reader(window=1)
  reader.labels = 1
  for segment in tqdm(segments, desc="simulated", disable=None):
    truth = Truth(find(routes, segment.name))
    lines.begin(truth.info["camera_height"])
    for i, (row, frame_id) in enumerate(zip(segment.rows, segment.ids, strict=True)):
      found = lines.step(reader.dense(segment.frames, "frame", [row])[0].copy(), frame_id, segment.valid_at(frame_id))
      if i >= SHOWN:
        said = truth.lanes(frame_id - truth.info["frame_id_offset"])
        road = [np.array(x["road"], float) for x in said if any(x["visible"])]
        to_view = [r[:, 1:] / np.maximum(r[:, :1], 0.1) * medmodel_intrinsics[0, 0] for r in nearest_lines(road)]
        true = [p[r[:, 0] > 1] + medmodel_intrinsics[:2, 2] for p, r in zip(to_view, nearest_lines(road), strict=True)]
        sums.add(in_view(found), in_view(true), VIEW_ROWS, near())
  return sums


def find(routes: Path, name: str) -> Path:
  found = [p for p in (routes / name, *routes.glob(f"*/{name}")) if p.is_dir()]
  if not found:
    raise UserError(f"{routes} has no segment {name}; give the folder of the simulated routes")
  return found[0]


def near() -> float:
  """TuSimple's 20 pixels, in the view."""
  return 20.0 * float(medmodel_intrinsics[0, 0]) / FOCAL


def judge_logged(bundle: Bundle, segments: list[Segment]) -> LaneLines:
  """Where the log has lines; only the found lines that are nearest to one of its own lane count."""
  sums, lines, reader = LaneLines(), Lines(bundle), Reader(window=1)
  reader.labels = 2
  for segment in tqdm(segments, desc="logged", disable=None):
    lines.begin(None)
    logged = rows_by_frame(segment.groups["openpilot"])
    for row, frame_id in zip(segment.rows, segment.ids, strict=True):
      found = lines.step(reader.dense(segment.frames, "frame", [row])[0].copy(), frame_id, segment.valid_at(frame_id))
      if frame_id not in logged:
        continue
      table = reader.table(segment.groups["openpilot"], "lines", logged[frame_id])
      sure = table["visible"].astype(bool) & (table["score"] >= SURE)
      mine = [sure & (table["cls"] == k) for k in OWN]
      true = in_view([np.stack([table["x"][m], table["y"][m]], axis=1).astype(float) for m in mine])
      if true:
        mine_found = [min(seen, key=lambda x, t=t: apart(x, t)) for t in true] if (seen := in_view(found)) else []
        sums.add(mine_found, true, VIEW_ROWS, near())
  return sums


def apart(a: np.ndarray, b: np.ndarray) -> float:
  """Mean distance in the rows that both have, inf where there is none."""
  off = np.abs(a - b)
  return float(np.nanmean(off)) if np.isfinite(off).any() else float("inf")


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("bundles", nargs="+", type=Path)
  p.add_argument("--tusimple", type=Path, help="a folder with image and gt_instance_image")
  p.add_argument("--simulated", type=Path, help="a label store with frames of simulated drives")
  p.add_argument("--routes", type=Path, help="the folder of these drives")
  p.add_argument("--logged", type=Path, help="a label store with frames and labels by openpilot")
  p.add_argument("--frames", type=int, default=100, help="of each segment")
  args = p.parse_args()
  if args.simulated and not args.routes:
    raise UserError("--simulated wants --routes, where the true lines are")
  cv2.setNumThreads(1)
  for path in args.bundles:
    bundle = load_bundle(path)
    judged: dict[str, LaneLines] = {}
    if args.tusimple:
      judged["TuSimple"] = judge_tusimple(bundle, args.tusimple)
    if args.simulated:
      judged["simulated"] = judge_simulated(
        bundle, open_segments(args.simulated, set(), [], None, args.frames), args.routes
      )
    if args.logged:
      segments = check_label(open_segments(args.logged, {"openpilot"}, [], None, args.frames), "openpilot", args.logged)
      judged["logged"] = judge_logged(bundle, segments)
    for what, sums in judged.items():
      r = sums.result()
      n = int(sums.sums[0])
      said = ", ".join(f"{k.removeprefix('lines_')} {v:.3f}" for k, v in r.items())
      print(f"{path}: {what}, {n} pictures of {VIEW_W}x{VIEW_H}: {said or 'no lines to compare with'}")


if __name__ == "__main__":
  raise SystemExit(cli(main, (BundleError,))())

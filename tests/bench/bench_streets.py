#!/usr/bin/env python3
"""Bundles on real streets that nothing here was trained on: CamVid's road, free road that is called a vehicle, vehicles
that two detectors see, KITTI's lidar; and a simulated store beside them.

python tests/bench/bench_streets.py --data FOLDER models/fair_unified_small ...    FOLDER with camvid, camvid_more,
    kitti_object and weights in it
CamVid's camera is not known: its focal length is taken as 0.85 of its width, its horizon is read off the pictures."""

import argparse
import json
import os
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
  import from_root  # noqa: F401

import cv2
import numpy as np
from tqdm import tqdm

from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W, ModelFrame
from openpilot.selfdrive.modeld.fair.heads import HEADS
from openpilot.selfdrive.modeld.fair.heads.ground import DEFAULT_HEIGHT
from openpilot.selfdrive.modeld.fair.heads.objects import box_iou
from openpilot.selfdrive.modeld.fair.plan import plan_heads, plan_inputs, Plan
from openpilot.selfdrive.modeld.fair.runners.onnx import OnnxRunner
from openpilot.tools.fair.distillation.data import camera_height
from openpilot.tools.fair.distillation.night import Night, Scene, called
from openpilot.tools.fair.labels.agree import Boxes, agreed_boxes
from openpilot.tools.fair.labels.aim import mounting_of
from openpilot.tools.fair.labels.picture import PictureWarp, size_of_picture
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.labels.views import FOCAL_OF_WIDTH, SegmentView
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.spec import InputSpec, road_classes, street_classes
from openpilot.tools.fair.teacher import Clip
from openpilot.tools.lib.cameras import pinhole
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.route import Segment
from openpilot.tools.sim.render import CLASSES

CAMVID = {"SKY": 0, "ROAD": 3, "UNKNOWN": 11}
# of the height, by the vanishing point of the lines on the road; at dusk the camera was mounted otherwise
CAMVID_HORIZON = {"0001TP": 234 / 360, "0016E5": 178 / 360}
FAR = 80.0  # m
# m: of KITTI's camera, and the mean of the simulator's, from which students in meters learned
KITTI_HEIGHT, TAUGHT_HEIGHT = 1.65, 1.275
MIN_SIDE = 8.0  # view pixels of a vehicle's height
SAME = 0.5  # intersection over union
ROAD_TEACHER, BOX_TEACHERS = "road-segmentation-adas", ("yolox-nano", "deimv2-atto")
STREETS = street_classes()


@dataclass
class Sums:
  """Numbers that are added up, and ratios of them."""

  of: dict[str, np.ndarray] = field(default_factory=lambda: defaultdict(lambda: np.zeros(2)))

  def add(self, name: str, part: float, whole: float) -> None:
    self.of[name] += [part, whole]

  def ratios(self) -> dict[str, float]:
    out = {k: float(a / b) if b else float("nan") for k, (a, b) in self.of.items()}
    for k in [k for k in out if k.endswith("recall")]:
      p, r = out[k.replace("recall", "precision")], out[k]
      out[k.replace("recall", "F1")] = 2 * p * r / (p + r) if p + r else 0.0
    return out


@dataclass
class Seen:
  """What is said of one view. Maps are (64, 128)."""

  road: np.ndarray | None = None  # bool, road and marking
  vehicle: np.ndarray | None = None  # bool
  classes: np.ndarray | None = None  # index into the simulator's CLASSES
  depth: np.ndarray | None = None  # m
  per_height: bool = False  # whether the camera's height is in it
  boxes: np.ndarray | None = None  # (N, 4) vehicles


class Runner:
  """A bundle on model frames, decoded by the code of the device."""

  def __init__(self, path: Path):
    self.bundle = load_bundle(path)
    self.graphs = [(g, OnnxRunner(self.bundle, g)) for g in self.bundle.graphs]
    self.plans = []
    for g, _ in self.graphs:
      plan = Plan(g, plan_heads(str(path), g))
      plan_inputs(str(path), plan)
      self.plans.append(plan)

  def __call__(self, frame: np.ndarray, valid: np.ndarray, height: float = DEFAULT_HEIGHT) -> Seen:
    """height: of the camera, m."""
    seen = Seen()
    for plan, (_, runner) in zip(self.plans, self.graphs, strict=True):
      out = runner.run({**plan.inputs, "frame": frame[None]})
      for head, specs in plan.heads.items():
        if head not in ("segmentation", "objects", "depth"):
          continue
        found = HEADS[head].decode({part: out[s["name"]].copy() for part, s in specs.items()}, specs, valid, height)
        if head == "depth":
          seen.depth = found.z
          seen.per_height = bool(specs["depth"].get("parameters", {}).get("per_height", False))
        elif head == "segmentation":
          role = {k: c.role for k, n in enumerate(found.classes) if (c := STREETS.find(n)) is not None}
          seen.road = np.isin(found.class_map, [k for k, r in role.items() if r in ("ground", "marking")])
          seen.vehicle = np.isin(found.class_map, called("vehicle", found.classes))
          road = [road_classes().find(n) for n in found.classes]
          to = np.zeros(256, np.int64)  # 255 is outside the camera's image
          to[: len(road)] = [CLASSES.index(c.name) if c is not None and c.name in CLASSES else 0 for c in road]
          seen.classes = to[found.class_map]
        else:
          seen.boxes = found.boxes[np.isin(found.class_ids, called("vehicle", found.classes))]
    return seen


def view_of(width: int, height: int, k: np.ndarray, rpy: np.ndarray) -> SegmentView:
  return SegmentView(Segment("a", 0, Path(), {}), "road", width, height, k, rpy, True, [], "")


def frame_of(rgb: np.ndarray, view: SegmentView) -> tuple[np.ndarray, np.ndarray]:
  """(H, W, 3) uint8 of even sides -> model frame, valid."""
  h, w = rgb.shape[:2]
  planar = cv2.cvtColor(rgb, cv2.COLOR_RGB2YUV_I420)
  u, v = planar[h:].reshape(2, h // 2 * w // 2)
  nv12 = np.concatenate([planar[:h].ravel(), np.stack([u, v], 1).ravel()])
  model = ModelFrame(w, h, w, w * h)
  model.set_calibration(view.rpy, view.intrinsics)
  return model.warp(nv12, np.empty((6, VIEW_H // 2, VIEW_W // 2), np.uint8)), model.valid.copy()


class Teachers:
  """The roads' teacher and two detectors, shown whole pictures."""

  def __init__(self, names: Sequence[str] = (ROAD_TEACHER, *BOX_TEACHERS)) -> None:
    self.by_name: dict[str, Any] = {n: load_teacher(n, None, []) for n in names}
    for t in self.by_name.values():
      t.whole = True

  def ask(self, name: str, rgb: np.ndarray, view: SegmentView) -> dict[str, Any]:
    """-> its labels, in the view."""
    teacher = self.by_name[name]
    w, h = size_of_picture(teacher, view)
    teacher.prepare(h, w)
    small = cv2.resize(rgb, (w, h), interpolation=cv2.INTER_AREA if w < rgb.shape[1] else cv2.INTER_LINEAR)
    said, _ = teacher.label(Clip(np.ascontiguousarray(small.transpose(2, 0, 1))[None]))
    warp = PictureWarp(view, "medmodel", w, h)
    return {
      x.name: warp.dense(x, said[x.name])[0] if x.kind == "dense" else warp.table(x, said[x.name])
      for x in teacher.labels
    }

  def road(self, rgb: np.ndarray, view: SegmentView) -> np.ndarray:
    said = self.ask(ROAD_TEACHER, rgb, view)
    return cv2.resize(said["road"] + said["marking"], (128, 64), interpolation=cv2.INTER_AREA) > 0.5

  def vehicles(self, rgb: np.ndarray, view: SegmentView) -> list[Boxes]:
    parts = []
    for name in BOX_TEACHERS:
      table, teacher = self.ask(name, rgb, view)["boxes"], self.by_name[name]
      to = STREETS.resolve(teacher.classes, "boxes", name)[np.asarray(table["cls"], int)]
      mine = to == STREETS.boxes.index("vehicle")
      xyxy = np.stack([table[k] for k in ("x0", "y0", "x1", "y1")], axis=1)[mine].astype(np.float32)
      parts.append(Boxes(xyxy, to[mine], np.asarray(table["score"], np.float32)[mine]))
    return parts


def matched(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """(len(a),) bool: has a partner of its own among b, greedily by overlap."""
  iou, out = box_iou(a, b), np.zeros(len(a), bool)
  while iou.size and iou.max() >= SAME:
    i, j = np.unravel_index(iou.argmax(), iou.shape)
    out[i], iou[i], iou[:, j] = True, -1, -1
  return out


def judge_boxes(sums: Sums, who: str, found: np.ndarray, both: np.ndarray, alone: np.ndarray) -> None:
  """Recall and precision where two detectors agree; what one alone sees, or is lower than MIN_SIDE, counts nowhere."""
  tall = both[:, 3] - both[:, 1] >= MIN_SIDE
  hit = matched(both, found)
  sums.add(f"{who}: vehicles, recall", hit[tall].sum(), tall.sum())
  right = matched(found, both)
  ignored = np.concatenate([alone, both[~tall]])
  cx, cy = (found[:, 0] + found[:, 2]) / 2, (found[:, 1] + found[:, 3]) / 2
  inside = (
    (ignored[None, :, 0] <= cx[:, None])
    & (cx[:, None] <= ignored[None, :, 2])
    & (ignored[None, :, 1] <= cy[:, None])
    & (cy[:, None] <= ignored[None, :, 3])
  ).any(axis=1)
  counts = (found[:, 3] - found[:, 1] >= MIN_SIDE) & (right | ~inside)
  sums.add(f"{who}: vehicles, precision", right[counts].sum(), counts.sum())


def judge_each_other(sums: Sums, name: str, parts: list[Boxes]) -> None:
  """How far two detectors have the same vehicles: the second's recall of the first's, and its precision."""
  of_one, of_other = parts[0].xyxy, parts[1].xyxy
  tall = [b[b[:, 3] - b[:, 1] >= MIN_SIDE] for b in (of_one, of_other)]
  sums.add(f"{name}, the two detectors: vehicles, recall", matched(tall[0], of_other).sum(), len(tall[0]))
  sums.add(f"{name}, the two detectors: vehicles, precision", matched(tall[1], of_one).sum(), len(tall[1]))


def judge_seen(
  sums: Sums, who: str, seen: Seen, road: np.ndarray, known: np.ndarray, vehicles: tuple[np.ndarray, np.ndarray] | None
) -> None:
  """Beside the road where it is known, (64, 128) bool each, and boxes of vehicles as judge_boxes() has them."""
  road = road & known
  if seen.road is not None:
    a = seen.road & known
    sums.add(f"{who}: road IoU", (a & road).sum(), (a | road).sum())
  if seen.vehicle is not None:
    sums.add(f"{who}: free road called vehicle", (seen.vehicle & road).sum(), road.sum())
  if seen.boxes is not None and vehicles is not None:
    judge_boxes(sums, who, seen.boxes, *vehicles)


def tell(figures: dict[str, float], output: Path | None) -> None:
  for what, value in figures.items():
    print(f"{value:8.3f}  {what}")
  if output:
    output.write_text(json.dumps(figures, indent=1))


def camvid(data: Path, every: int) -> dict[str, list[tuple[Path, Path]]]:
  """Drive -> pictures with class maps."""
  pairs = [
    (p, data / a / f"{p.stem}.png")
    for f, a in (("camvid/val", "camvid/valannot"), ("camvid_more/images", "camvid_more/annot"))
    for p in sorted((data / f).glob("*"))
  ]
  out: dict[str, dict[str, tuple[Path, Path]]] = defaultdict(dict)
  for picture, annotation in pairs:
    if annotation.exists():
      out[picture.stem.split("_")[0]][picture.stem] = picture, annotation
  return {drive: [found[k] for k in sorted(found)][::every] for drive, found in out.items()}


def judge_camvid(
  runners: dict[str, Runner], teachers: Teachers, data: Path, every: int, tilt: float = 0.0, night: bool = False
) -> dict[str, float]:
  """tilt: degrees by which the horizon is taken to be lower in the picture than it is; then of road and vehicles in the
  maps of `runners` alone. night: `runners` see each picture once more, as `distill --night` makes it."""
  sums = Sums()
  for drive, pairs in camvid(data, every).items():
    for picture, annotation in tqdm(pairs, desc=f"CamVid {drive}", unit="frame"):
      bgr, truth = cv2.imread(str(picture)), cv2.imread(str(annotation), 0)
      rgb = np.ascontiguousarray(bgr[..., ::-1])
      h, w = rgb.shape[:2]
      k = pinhole(FOCAL_OF_WIDTH * w, w, h)
      row = CAMVID_HORIZON[drive] * h + np.tan(np.radians(tilt)) * k[1, 1]
      view = view_of(w, h, k, mounting_of((w / 2, row), k))
      frame, valid = frame_of(rgb, view)
      at = PictureWarp(view, "medmodel", w, h).maps((h, w), (64, 128))
      true = cv2.remap(truth, *at, cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=255)
      known = valid[1::4, 1::4] & (true != CAMVID["UNKNOWN"]) & (true != 255)
      road = true == CAMVID["ROAD"]
      name, vehicles = f"CamVid {drive}" + (f", tilted by {tilt:+g} degrees" if tilt else ""), None
      if not tilt:
        both, alone = agreed_boxes(parts := teachers.vehicles(rgb, view))
        vehicles = both.xyxy, alone
        judge_each_other(sums, name, parts)
        judge_seen(sums, f"{name}, {ROAD_TEACHER}", Seen(road=teachers.road(rgb, view)), road, known, None)
      for who, runner in runners.items():
        judge_seen(sums, f"{name}, {who}", runner(frame, valid), road, known, vehicles)
      if night and vehicles is not None:
        scene = Scene(np.full((64, 128), np.nan, np.float32), true == CAMVID["SKY"], vehicles[0])
        dark = Night(np.random.default_rng(zlib.crc32(picture.stem.encode())), InputSpec()).frame(frame, scene, 0)
        for who, runner in runners.items():
          judge_seen(sums, f"{name} by night, {who}", runner(dark, valid), road, known, vehicles)
  return sums.ratios()


def kitti_points(folder: Path, stem: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """-> picture, (3, 3) intrinsics, (N, 3) lidar points in the camera's frame: x right, y down, z ahead, m."""
  rgb = np.ascontiguousarray(cv2.imread(str(folder / "image_2" / f"{stem}.png"))[..., ::-1])
  said = dict(line.split(":", 1) for line in (folder / "calib" / f"{stem}.txt").read_text().splitlines() if ":" in line)
  p2, rect, velo = (
    np.array(said[k].split(), float).reshape(s)
    for k, s in (("P2", (3, 4)), ("R0_rect", (3, 3)), ("Tr_velo_to_cam", (3, 4)))
  )
  points = np.fromfile(folder / "velodyne" / f"{stem}.bin", np.float32).reshape(-1, 4)[:, :3]
  in_camera = (points @ velo[:, :3].T + velo[:, 3]) @ rect.T + np.linalg.inv(p2[:, :3]) @ p2[:, 3]
  return rgb[: rgb.shape[0] // 2 * 2, : rgb.shape[1] // 2 * 2], p2[:, :3], in_camera


def judge_kitti(runners: dict[str, Runner], teachers: Teachers, data: Path) -> dict[str, float]:
  sums, folder = Sums(), data / "kitti_object"
  for path in sorted((folder / "image_2").glob("*.png")):
    rgb, k, points = kitti_points(folder, path.stem)
    view = view_of(rgb.shape[1], rgb.shape[0], k, np.zeros(3))
    frame, valid = frame_of(rgb, view)
    ahead = points[(points[:, 2] > 1) & (points[:, 2] < FAR)]
    pixels = (ahead[:, :2] / ahead[:, 2:]) * np.diag(k)[:2] + k[:2, 2]
    uv = PictureWarp(view, "medmodel", rgb.shape[1], rgb.shape[0]).points(pixels)
    cell = np.round((uv + 0.5) / 4 - 0.5).astype(int)
    good = ((cell >= 0) & (cell < [128, 64])).all(axis=1)
    nearest = np.full((64, 128), np.inf)
    np.minimum.at(nearest, (cell[good, 1], cell[good, 0]), ahead[good, 2])
    known = np.isfinite(nearest)
    truth = nearest[known]
    sums.add("KITTI, a constant at the frame's median: AbsRel", (np.abs(np.median(truth) - truth) / truth).mean(), 1)
    parts = teachers.vehicles(rgb, view)
    both, alone = agreed_boxes(parts)
    for who, runner in runners.items():
      seen = runner(frame, valid, KITTI_HEIGHT)
      if seen.depth is not None:
        z = seen.depth[known]
        sure = np.isfinite(z)
        for what, scale in (
          ("AbsRel", 1.0),
          ("AbsRel, by the camera's height", 1.0 if seen.per_height else KITTI_HEIGHT / TAUGHT_HEIGHT),
          ("AbsRel, median-aligned", float(np.median(truth[sure]) / np.median(z[sure]))),
        ):
          sums.add(f"KITTI, {who}: {what}", (np.abs(z * scale - truth) / truth)[sure].mean(), 1)
        sums.add(f"KITTI, {who}: points with depth", sure.sum(), len(sure))
      if seen.boxes is not None:
        judge_boxes(sums, f"KITTI, {who}", seen.boxes, both.xyxy, alone)
  return sums.ratios()


def judge_simulated(runners: dict[str, Runner], root: Path, every: int) -> dict[str, float]:
  """AbsRel, the mean of frames' means, and mIoU of the simulator's classes over all frames."""
  sums, confusion = Sums(), {n: np.zeros((len(CLASSES), len(CLASSES))) for n in runners}
  for segment, groups in tqdm(LabelStore(root).by_segment({"frames", "simulator"}).items(), desc="simulated"):
    if "simulator" not in groups or "frames" not in groups:
      raise UserError(f"{root}: segment {segment} has no frames and labels by simulator")
    truth, frames = groups["simulator"], groups["frames"]
    for row in range(0, frames.n, every):
      frame, valid = frames.row("frame", row), np.ones((VIEW_H, VIEW_W), bool)
      z = truth.row("depth", row).astype(np.float32).reshape(64, 128)
      cls = truth.row("segmentation", row).reshape(64, 128)
      for who, runner in runners.items():
        seen = runner(frame, valid, camera_height(groups) or DEFAULT_HEIGHT)
        if seen.depth is not None:
          known = np.isfinite(z) & (z > 0) & np.isfinite(seen.depth)
          sums.add(f"simulated, {who}: AbsRel", (np.abs(seen.depth - z)[known] / z[known]).mean(), 1)
        if seen.classes is not None:
          good = cls < len(CLASSES)
          np.add.at(confusion[who], (cls[good], seen.classes[good]), 1)
  out = sums.ratios()
  for who, c in confusion.items():
    whole = c.sum(0) + c.sum(1) - np.diag(c)
    out[f"simulated, {who}: mIoU"] = float((np.diag(c)[c.sum(1) > 0] / whole[c.sum(1) > 0]).mean())
  return out


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("bundles", nargs="+", type=Path)
  p.add_argument("--data", type=Path, required=True, help="a folder with camvid, camvid_more, kitti_object, weights")
  p.add_argument("--simulated", type=Path, help="a label store of simulated drives that were not trained on")
  p.add_argument("--every", type=int, default=1, help="of CamVid's frames")
  p.add_argument(
    "--tilt", type=float, nargs="+", metavar="DEGREES", help="only CamVid's road, by a calibration so far off"
  )
  p.add_argument("--night", action="store_true", help="CamVid made night, too")
  p.add_argument("--simulated-every", type=int, default=10, metavar="N", help="of the simulated frames")
  p.add_argument("--output", type=Path, help="a JSON of all figures")
  args = p.parse_args()
  os.environ.setdefault("FAIR_WEIGHTS", str(args.data / "weights"))
  cv2.setNumThreads(1)
  runners, teachers = {str(b): Runner(b) for b in args.bundles}, Teachers()
  if args.tilt:
    figures = {}
    for tilt in args.tilt:
      figures |= judge_camvid(runners, teachers, args.data, args.every, tilt)
  else:
    figures = judge_camvid(runners, teachers, args.data, args.every, night=args.night)
    figures |= judge_kitti(runners, teachers, args.data)
  if args.simulated:
    figures |= judge_simulated(runners, args.simulated, args.simulated_every)
  tell(figures, args.output)


if __name__ == "__main__":
  raise SystemExit(cli(main)())

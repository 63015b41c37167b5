#!/usr/bin/env python3
"""How far the small real teachers agree with ground truth: YOLOX-nano with COCO128's and KITTI's boxes, TwinLiteNet
with CamVid's road.

python tests/bench/bench_teacher_truth.py --data FOLDER

FOLDER holds coco128, kitti_object, camvid and the weights. What students agree with them about is worth no more than
this."""

import argparse
import os
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

import cv2
import numpy as np
from tqdm import tqdm

from openpilot.tools.fair.evaluation.detections import Detections, make_objects
from openpilot.tools.fair.evaluation.metrics import bootstrap
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Clip

SCORE = 0.3
COCO_NAMES = {
  0: "person",
  1: "bicycle",
  2: "car",
  3: "motorcycle",
  5: "bus",
  6: "train",
  7: "truck",
  9: "traffic light",
  11: "stop sign",
}
KITTI_NAMES = {"Car": "car", "Van": "car", "Truck": "truck", "Pedestrian": "person", "Cyclist": "bicycle"}
CAMVID_ROAD, CAMVID_UNLABELED = 3, 11


def rgb_of(path: Path) -> np.ndarray:
  """(1, 3, H, W) uint8."""
  image = cv2.imread(str(path))
  assert image is not None, path
  return np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1))[None]


def coco_truth(path: Path, width: int, height: int, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
  """YOLO's text -> boxes x0 y0 x1 y1, classes."""
  rows = np.loadtxt(path, ndmin=2) if path.exists() and path.stat().st_size else np.zeros((0, 5))
  rows = rows[[int(r[0]) in COCO_NAMES for r in rows]] if len(rows) else rows
  x, y, w, h = (rows[:, k] * s for k, s in ((1, width), (2, height), (3, width), (4, height)))
  return np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], axis=1), np.array(
    [names.index(COCO_NAMES[int(c)]) for c in rows[:, 0]], int
  )


def kitti_truth(path: Path, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
  rows = [line.split() for line in path.read_text().splitlines()]
  rows = [r for r in rows if r[0] in KITTI_NAMES]
  return np.array([r[4:8] for r in rows], float).reshape(-1, 4), np.array(
    [names.index(KITTI_NAMES[r[0]]) for r in rows], int
  )


def detector(pictures: list[Path], truths: list[Path], kind: str) -> dict[str, tuple[float, tuple[float, float]]]:
  teacher = load_teacher("yolox-nano", None, [])
  parts = []
  for picture, truth in tqdm(list(zip(pictures, truths, strict=True)), desc=f"yolox-nano on {kind}", unit="image"):
    rgb = rgb_of(picture)
    height, width = rgb.shape[2:]
    teacher.prepare(height, width)
    names = list(teacher.labels[0].classes)
    said, _ = teacher.label(Clip(rgb))
    table = {k: np.asarray(v) for k, v in said["boxes"].items()}
    boxes, cls = coco_truth(truth, width, height, names) if kind == "COCO128" else kitti_truth(truth, names)
    part = Detections(names, "bbox", SCORE)
    part.add(
      make_objects(np.stack([table[k] for k in ("x0", "y0", "x1", "y1")], axis=1), table["cls"], table["score"]),
      make_objects(boxes, cls),
    )
    parts.append(part)
  found, ranges = {**Detections.pooled(parts).result(), **Detections.pooled(parts).coco()}, bootstrap(parts, 200)
  return {k: (found[k], ranges.get(k, (np.nan, np.nan))) for k in ("ap", "ap50", "recall", "precision")}


def road(pictures: list[Path], annotations: list[Path]) -> np.ndarray:
  """(N, 2): intersection and union of what TwinLiteNet calls drivable with the road, unlabeled pixels aside."""
  teacher = load_teacher("twinlitenet", None, [])
  out = []
  for picture, annotation in tqdm(
    list(zip(pictures, annotations, strict=True)), desc="twinlitenet on CamVid", unit="image"
  ):
    rgb, truth = rgb_of(picture), cv2.imread(str(annotation), cv2.IMREAD_GRAYSCALE)
    assert truth is not None
    teacher.prepare(*rgb.shape[2:])
    said, _ = teacher.label(Clip(rgb))
    drivable = (
      cv2.resize(np.asarray(said["drivable"], np.float32).reshape(said["drivable"].shape[-2:]), truth.shape[::-1]) > 0.5
    )
    is_road, known = truth == CAMVID_ROAD, truth != CAMVID_UNLABELED
    out.append([(drivable & is_road & known).sum(), ((drivable | is_road) & known).sum()])
  return np.array(out, float)


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--data", type=Path, required=True)
  args = p.parse_args()
  os.environ.setdefault("FAIR_WEIGHTS", str(args.data / "weights"))
  coco = args.data / "coco128" / "object_detection"
  pictures = sorted((coco / "images" / "train2017").glob("*.jpg"))
  kitti = sorted((args.data / "kitti_object" / "image_2").glob("*.png"))
  sets = {
    "COCO128": (pictures, [coco / "labels" / "train2017" / f"{x.stem}.txt" for x in pictures]),
    "KITTI": (kitti, [args.data / "kitti_object" / "label_2" / f"{x.stem}.txt" for x in kitti]),
  }
  for kind, (images, truths) in sets.items():
    said = ", ".join(
      f"{k} {v:.3f} [{low:.3f}, {high:.3f}]" for k, (v, (low, high)) in detector(images, truths, kind).items()
    )
    print(
      f"YOLOX-nano, {kind}'s road classes, {len(images)} pictures: {said} (recall and precision at IoU .5, score "
      f"{SCORE})"
    )
  camvid = sorted((args.data / "camvid" / "val").glob("*.png"))
  counts = road(camvid, [args.data / "camvid" / "valannot" / x.name for x in camvid])
  r = np.random.default_rng(0)
  draws = [np.divide(*counts[r.integers(0, len(counts), len(counts))].sum(axis=0)) for _ in range(1000)]
  low, high = np.percentile(draws, [2.5, 97.5])
  iou = np.divide(*counts.sum(axis=0))
  print(
    f"TwinLiteNet, CamVid val, drivable area beside 'road', {len(camvid)} pictures of one drive: IoU {iou:.3f} "
    f"[{low:.3f}, {high:.3f}]"
  )


if __name__ == "__main__":
  main()

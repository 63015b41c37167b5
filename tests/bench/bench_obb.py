#!/usr/bin/env python3
"""What `images train-obb` learns, on rendered pictures of cars and trucks from above: the mAP50 by DOTA's rules on
pictures that it has not seen, from labels alone and beside a teacher's feature map, several seeds; and a few pictures
overfitted.

python tests/bench/bench_obb.py --output out/obb [--data SHARED_DATA] [--teachers none mobilenetv2 random xfeat]
  [--seeds 3] [--pictures 24] [--steps 300] [--overfit]

The teachers are those of feature_teachers.py. All arms see the same pictures, turned and mirrored alike. A run that is
in the table of --output is not made again."""

import argparse
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if not __package__:  # run as a file
  import from_root  # noqa: F401
  from feature_teachers import WEIGHTS
else:
  from tests.bench.feature_teachers import WEIGHTS

import cv2
import numpy as np
import torch
from PIL import Image

from openpilot.selfdrive.modeld.fair.heads.oriented import corners, le90
from openpilot.tools.fair.images import train_obb
from openpilot.tools.fair.images.evaluate_oriented import evaluate_oriented
from openpilot.tools.fair.images.predict import LOW, Predictor
from openpilot.tools.fair.rotated import rotated_iou
from openpilot.tools.lib.files import write_json

NAMES = ("car", "truck")
SIDE = 160  # pixels of a picture
SIZES = {"car": ((20, 26), (9, 12)), "truck": ((34, 46), (11, 14))}  # long, short


# *** pictures ***


def fill(rgb: np.ndarray, box: np.ndarray, color: Any) -> None:
  points = np.round((corners(box)[0] - 0.5) * 256).astype(np.int32)
  cv2.fillPoly(rgb, [points], tuple(int(c) for c in color), lineType=cv2.LINE_AA, shift=8)


def part(box: np.ndarray, along: float, length: float, width: float) -> np.ndarray:
  """Of a vehicle: its middle so far along, and sides, all in parts of its own."""
  cx, cy, w, h, a = box[0]
  return np.array([[cx + along * w * np.cos(a), cy + along * w * np.sin(a), length * w, width * h, a]])


def ground(r: np.random.Generator) -> np.ndarray:
  """Patches of asphalt, grass and soil, roads with marks, and things that are no vehicles in vehicles' colors."""
  noise = cv2.resize(r.uniform(0, 1, (6, 6)).astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
  base = np.array([[110, 110, 112], [86, 104, 70], [126, 112, 92]], np.float32)[np.digitize(noise, [0.45, 0.7])]
  rgb = np.clip(base + r.normal(0, 9, (SIDE, SIDE, 1)), 0, 255).astype(np.uint8)
  for _ in range(int(r.integers(0, 3))):
    a = r.uniform(0, np.pi)
    middle = r.uniform(0, SIDE, 2)
    fill(rgb, np.array([[*middle, 2.5 * SIDE, 30, a]]), (92, 92, 95))
    for k in range(-8, 9):
      fill(rgb, np.array([[*(middle + 20 * k * np.array([np.cos(a), np.sin(a)])), 9, 1.5, a]]), (205, 205, 200))
  for _ in range(int(r.integers(2, 7))):
    center = tuple(int(v) for v in r.uniform(0, SIDE, 2))
    cv2.circle(rgb, center, int(r.integers(4, 9)), tuple(int(c) for c in r.uniform(20, 240, 3)), -1, cv2.LINE_AA)
  return rgb


def scene(r: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """-> (SIDE, SIDE, 3) uint8, (N, 5) boxes counted from the corner, (N,) classes."""
  rgb, boxes, cls = ground(r), np.zeros((0, 5)), []
  for _ in range(int(r.integers(3, 9))):
    k = int(r.uniform() < 0.4)
    long, short = (r.uniform(*s) for s in SIZES[NAMES[k]])
    box = le90(np.array([[*r.uniform(14, SIDE - 14, 2), long, short, r.uniform(-4, 4)]]))
    if len(boxes) and rotated_iou(box + [0, 0, 3, 3, 0], boxes).max() > 0:
      continue
    boxes, cls = np.concatenate([boxes, box]), [*cls, k]
    color, way = r.uniform(15, 240, 3), r.choice([-1.0, 1.0])
    fill(rgb, box + [2, 3, 0, 0, 0], (45, 45, 48))  # its shadow
    fill(rgb, box, color)
    if k:
      fill(rgb, part(box, -0.12 * way, 0.7, 0.86), np.clip(color * 0.5 + 110, 0, 255))
      fill(rgb, part(box, 0.36 * way, 0.07, 0.8), (30, 35, 45))
    else:
      fill(rgb, part(box, 0.16 * way, 0.16, 0.8), (30, 35, 45))
      fill(rgb, part(box, -0.33 * way, 0.1, 0.72), (30, 35, 45))
  return cv2.GaussianBlur(rgb, (0, 0), 0.7), boxes, np.array(cls, int)


def write(folder: Path, count: int, seed: int) -> Path:
  """A YOLO-OBB folder. -> it."""
  (folder / "images").mkdir(parents=True, exist_ok=True)
  (folder / "labels").mkdir(exist_ok=True)
  r = np.random.default_rng(seed)
  for i in range(count):
    rgb, boxes, cls = scene(r)
    Image.fromarray(rgb).save(folder / "images" / f"{i}.png")
    lines = [
      f"{k} {' '.join(f'{v:.6f}' for v in p)}\n" for k, p in zip(cls, corners(boxes).reshape(-1, 8) / SIDE, strict=True)
    ]
    (folder / "labels" / f"{i}.txt").write_text("".join(lines))
  (folder / "data.yaml").write_text(f"names: [{', '.join(NAMES)}]\ntrain: images\nlicense: MIT\n")
  return folder


# *** runs ***


def judge(folder: Path, data: Path) -> dict[str, Any]:
  predictor = Predictor(folder, LOW)
  told = SimpleNamespace(data=data, images=None, alias=(), ignore_classes=False, metrics=("mAP",), worst=0)
  told.score, told.output = 0.3, folder / "evaluation"
  return evaluate_oriented(predictor, told)["oriented"]["stats"]


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--output", type=Path, required=True)
  p.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[3] / "shared" / "data")
  p.add_argument("--teachers", nargs="+", default=["none", "mobilenetv2"], choices=("none", *WEIGHTS))
  p.add_argument("--seeds", type=int, default=3)
  p.add_argument("--pictures", type=int, default=24)
  p.add_argument("--val", type=int, default=64)
  p.add_argument("--steps", type=int, default=300)
  p.add_argument("--size", default="nano")
  p.add_argument("--feature-weight", type=float, default=1.0)
  p.add_argument("--feature-mask", default="all")
  p.add_argument("--overfit", action="store_true", help="six pictures, not varied, judged by themselves")
  args = p.parse_args()
  torch.set_num_threads(1)
  os.environ.setdefault("FAIR_WEIGHTS", str(args.data / "weights"))
  table_file = args.output / "table.json"
  table: dict[str, Any] = json.loads(table_file.read_text()) if table_file.is_file() else {}
  val = write(args.output / "val", args.val, 1000)
  for seed in range(args.seeds):
    few = write(args.output / f"few-{seed}", 6, 500 + seed)
    train = few if args.overfit else write(args.output / f"train-{args.pictures}-{seed}", args.pictures, seed)
    for teacher in args.teachers:
      key = f"{'overfit' if args.overfit else args.pictures}, {args.steps} steps, {teacher}, seed {seed}"
      if teacher != "none":
        key += f", weight {args.feature_weight:g} {args.feature_mask}"
      if key in table:
        continue
      folder = args.output / key.replace(", ", "-").replace(" ", "_")
      options = train_obb.Options(
        data=train,
        val=few if args.overfit else val,
        output=folder,
        teacher="" if teacher == "none" else teacher,
        feature_weight=args.feature_weight,
        feature_mask=args.feature_mask,
        size=args.size,
        picture_size=SIDE,
        turn=0.0 if args.overfit else 180.0,
        steps=args.steps,
        batch_size=6 if args.overfit else 8,
        lr=2e-3,
        augment="none" if args.overfit else "plain",
        seed=seed,
        workers=0,
      )
      train_obb.run(options)
      table[key] = judge(folder, few if args.overfit else val)
      write_json(table_file, table)
      print(f"{key}: {table[key]}", flush=True)
  for teacher in args.teachers:
    found = [v["ap50"] for k, v in table.items() if f", {teacher}, seed" in k]
    if found:
      print(f"{teacher}: mAP50 {np.mean(found):.3f}, {min(found):.3f} to {max(found):.3f} of {len(found)} runs")


if __name__ == "__main__":
  main()

"""Rendered pictures from above with turned boxes in two colors, written as YOLO-OBB, DOTA or COCO."""

import json

import cv2
import numpy as np
from PIL import Image

from openpilot.selfdrive.modeld.fair.heads.oriented import corners, le90
from openpilot.tools.fair.rotated import rotated_iou

NAMES = ("flurb", "zott")
COLORS = {"flurb": (230, 60, 40), "zott": (40, 70, 230)}
W, H = 128, 96


def picture(r, count=3, w=W, h=H, sides=((18, 30), (9, 14))):
  """-> (h, w, 3) uint8, (N, 5) boxes counted from the picture's corner, (N,) classes. None overlap. Each has a light
  end, so that it is no mere rectangle."""
  rgb = r.integers(90, 130, (h, w, 3), np.uint8)
  boxes, cls = np.zeros((0, 5)), []
  for _ in range(200):
    if len(boxes) == count:
      break
    b = le90([[*r.uniform([20, 20], [w - 20, h - 20]), r.uniform(*sides[0]), r.uniform(*sides[1]), r.uniform(-4, 4)]])
    wide = b + [0, 0, 4, 4, 0]
    if len(boxes) and rotated_iou(wide, boxes).max() > 0:
      continue
    boxes, cls = np.concatenate([boxes, b]), [*cls, int(r.integers(0, 2))]
    fill(rgb, corners(b)[0], COLORS[NAMES[cls[-1]]])
    c, s = np.cos(b[0, 4]), np.sin(b[0, 4])
    end = [[b[0, 0] + 0.3 * b[0, 2] * c, b[0, 1] + 0.3 * b[0, 2] * s, 0.2 * b[0, 2], 0.7 * b[0, 3], b[0, 4]]]
    fill(rgb, corners(end)[0], (240, 240, 240))
  return rgb, boxes, np.array(cls, int)


def fill(rgb, points, color):
  """Corners are counted from the picture's corner: pixel 0 is centered on 0.5."""
  cv2.fillPoly(rgb, [np.round((points - 0.5) * 256).astype(np.int32)], color, lineType=cv2.LINE_8, shift=8)


def render(folder, n, seed=0, **more):
  """Writes n pictures. -> [(path, boxes, classes)]."""
  folder.mkdir(parents=True, exist_ok=True)
  out, r = [], np.random.default_rng(seed)
  for i in range(n):
    rgb, boxes, cls = picture(r, **more)
    path = folder / f"{seed}_{i}.png"
    Image.fromarray(rgb).save(path)
    out.append((path, boxes, cls))
  return out


def yolo(root, splits, **more):
  """splits: {"train": (number, seed)}. -> the folder."""
  for split, (n, seed) in splits.items():
    for path, boxes, cls in render(root / "images" / split, n, seed, **more):
      w, h = Image.open(path).size
      text = root / "labels" / split / f"{path.stem}.txt"
      text.parent.mkdir(parents=True, exist_ok=True)
      points = (corners(boxes) / [w, h]).reshape(-1, 8)
      text.write_text("".join(f"{k} {' '.join(f'{v:.7f}' for v in p)}\n" for k, p in zip(cls, points, strict=True)))
  listed = "".join(f"{s}: images/{s}\n" for s in splits)
  (root / "data.yaml").write_text(f"path: .\n{listed}names: [{', '.join(NAMES)}]\nlicense: MIT\n")
  return root


def dota(root, n, seed=0, difficult=()):
  """difficult: numbers of objects, counted over all pictures. -> the folder."""
  k = 0
  for path, boxes, cls in render(root / "images", n, seed):
    lines = ["imagesource:GoogleEarth", "gsd:0.14"]
    for p, c in zip(corners(boxes).reshape(-1, 8), cls, strict=True):
      lines.append(f"{' '.join(f'{v:.4f}' for v in p)} {NAMES[c]} {int(k in difficult)}")
      k += 1
    text = root / "labelTxt" / f"{path.stem}.txt"
    text.parent.mkdir(exist_ok=True)
    text.write_text("\n".join(lines) + "\n")
  return root


def coco(root, n, seed=0, masks=False):
  """masks: as run lengths of the pixels, else polygons. -> the JSON's path."""
  from openpilot.tools.fair.labels import rle

  made = {"images": [], "annotations": [], "categories": [{"id": 4, "name": "zott"}, {"id": 2, "name": "flurb"}]}
  for i, (path, boxes, cls) in enumerate(render(root / "images", n, seed)):
    made["images"].append({"id": i, "file_name": path.name, "width": W, "height": H})
    y, x = np.mgrid[:H, :W] + 0.5
    for p, b, c in zip(corners(boxes), boxes, cls, strict=True):
      shape = [p.ravel().tolist()]
      if masks:
        u, v = (
          (x - b[0]) * np.cos(b[4]) + (y - b[1]) * np.sin(b[4]),
          (y - b[1]) * np.cos(b[4]) - (x - b[0]) * np.sin(b[4]),
        )
        on = (np.abs(u) <= b[2] / 2) & (np.abs(v) <= b[3] / 2)
        shape = {"size": [H, W], "counts": rle.encode(on[None])[0]}
      a = {"id": len(made["annotations"]) + 1, "image_id": i, "category_id": (2, 4)[c], "segmentation": shape}
      made["annotations"].append({**a, "bbox": [*p.min(0), *np.ptp(p, 0)], "iscrowd": 0})
  (root / "annotations.json").write_text(json.dumps(made))
  return root / "annotations.json"

"""A small COCO data set on disk, to be made wrong in one way."""

import copy
import json

import numpy as np
from PIL import Image

from openpilot.tools.fair.images.check import Check
from openpilot.tools.fair.images.dataset import open_dataset

W, H = 64, 48
NAMES = ("bag", "dent", "label")


def picture(seed, w=W, h=H):
  """Of smooth blocks of its own: no two look alike."""
  blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
  return Image.fromarray(blocks).resize((w, h), Image.Resampling.NEAREST)


def square(x, y, side):
  return [x, y, x + side, y, x + side, y + side, x, y + side]


def make(folder, names=("a.png", "b.png", "c.png", "d.png")):
  """Pictures of noise in folder/images; two labels on each: a box with a mask, and a box."""
  (folder / "images").mkdir(parents=True, exist_ok=True)
  coco = {"info": {"year": 2026}, "licenses": [{"id": 1, "name": "MIT"}], "images": [], "annotations": []}
  coco["categories"] = [{"id": k + 1, "name": n} for k, n in enumerate(NAMES)]
  for k, name in enumerate(names):
    path = folder / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(k).save(path)
    coco["images"].append({"id": k + 1, "file_name": name, "width": W, "height": H, "license": 1})
    for i in range(2):
      a = {"id": 2 * k + i + 1, "image_id": k + 1, "category_id": (2 * k + i) % 3 + 1, "iscrowd": 0}
      a |= {"bbox": [10, 8, 20, 20], "area": 400} if i else {"bbox": [4, 6, 12, 12], "area": 144}
      if not i:
        a["segmentation"] = [square(4, 6, 12)]
      coco["annotations"].append(a)
  return coco


def write(folder, coco):
  path = folder / "annotations.json"
  path.write_text(json.dumps(coco))
  return path


def check(folder, coco, fix=False):
  """-> Checked, {problem: count}."""
  data = open_dataset(write(folder, copy.deepcopy(coco)), folder / "images")
  found = Check(data, fix).run()
  return found, {k: p.count for k, p in data.problems.found.items()}

"""Labeled pictures of colored squares, with made-up classes, and a teacher that sees colors."""

import json

import numpy as np
from PIL import Image

from openpilot.tools.fair.registry import TEACHERS
from openpilot.tools.fair.teacher import Entry, Label

COLORS = {"flurb": (230, 30, 30), "zott": (30, 60, 230)}
W, H = 96, 80


def picture(r, count=3):
  """-> (H, W, 3) uint8, [(name, x, y, side)], none of which touch."""
  rgb = r.integers(90, 130, (H, W, 3), np.uint8)
  found = []
  for k in range(count):
    side = int(r.integers(12, 24))
    x, y = 4 + 30 * k + int(r.integers(0, 28 - side + 1)), int(r.integers(2, H - side - 2))
    name = list(COLORS)[int(r.integers(0, 2))]
    rgb[y : y + side, x : x + side] = COLORS[name]
    found.append((name, x, y, side))
  return rgb, found


def write(folder, n, seed=0, masks=True, boxes=True, labels=True, license="MIT"):
  """n pictures in folder/images and folder/annotations.json. -> the JSON's path."""
  (folder / "images").mkdir(parents=True)
  r = np.random.default_rng(seed)
  coco = {"images": [], "annotations": [], "licenses": [{"id": 1, "name": license}]}
  coco["categories"] = [{"id": 7, "name": "zott"}, {"id": 3, "name": "flurb"}, {"id": 9, "name": "never seen"}]
  ids = {"flurb": 3, "zott": 7}
  for i in range(n):
    rgb, found = picture(r)
    Image.fromarray(rgb).save(folder / "images" / f"{seed}_{i}.png")
    coco["images"].append({"id": i, "file_name": f"{seed}_{i}.png", "width": W, "height": H, "license": 1})
    for name, x, y, side in found:
      a = {"id": len(coco["annotations"]) + 1, "image_id": i, "category_id": ids[name], "iscrowd": 0}
      a |= {"bbox": [x, y, side, side], "area": side * side} if boxes else {}
      if masks:
        a["segmentation"] = [[x, y, x + side, y, x + side, y + side, x, y + side]]
      coco["annotations"].append(a)
  path = folder / "annotations.json"
  if labels:
    path.write_text(json.dumps(coco))
  return path


class ColorTeacher:
  """Finds squares by their color, scores both classes, and has a map of the mean colors of 16 x 16 pixels."""

  stateful, checkpoint_hash, model_id = False, "1", "colors"

  def __init__(self, name, entry, path, score: float = 0.3, device=None):
    self.name, self.license, self.score = name, entry.license, score

  def prepare(self, height, width):
    self.labels = [
      Label("boxes", "boxes", unit="px", classes=("red", "blue", "green")),
      Label("features", "dense", "float16", (4, height // 16, width // 16)),
    ]

  def settings(self):
    return {"score": self.score}

  def label(self, clip, state=None):
    rows = []
    for t, image in enumerate(clip.rgb.astype(int)):
      for k, c in enumerate(((0, 2), (2, 0))):
        on = image[c[0]] - image[c[1]] > 100
        columns = np.flatnonzero(np.diff(np.r_[0, on.any(0), 0]))
        for x0, x1 in columns.reshape(-1, 2):
          ys = np.flatnonzero(on[:, x0:x1].any(1))
          box = x0 - 0.5, ys[0] - 0.5, x1 - 0.5, ys[-1] + 0.5
          rows += [(t, *box, s, j) for s, j in ((0.9, k), (0.1, 1 - k)) if s >= self.score]
    table = np.array(rows, np.float32).reshape(-1, 7).T
    names = ("frame", "x0", "y0", "x1", "y1", "score", "cls")
    out = {
      n: v.astype({"frame": np.int32, "cls": np.int16}.get(n, np.float32)) for n, v in zip(names, table, strict=True)
    }
    t, _, h, w = clip.rgb.shape
    colors = clip.rgb.reshape(t, 3, h // 16, 16, w // 16, 16).mean((3, 5)) / 255
    return {"boxes": out, "features": np.concatenate([colors, colors[:, :1] ** 2], 1).astype(np.float16)}, None


def register(monkeypatch):
  monkeypatch.setitem(TEACHERS, "colors", Entry(ColorTeacher, "", "MIT", "", "squares"))

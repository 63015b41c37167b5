"""Public data sets checked and split: as many pictures and labels as there are, and nothing wrong that is not."""

import json

import numpy as np
import pytest
from PIL import Image

from openpilot.tools.fair.images import validate
from openpilot.tools.fair.images.twins import bits_of, is_video
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.labels.sources.coco import read_coco


def run(monkeypatch, *words):
  monkeypatch.setattr("sys.argv", ["validate", *map(str, words)])
  validate.main()


def parts_of(folder):
  return {p.stem: json.loads(p.read_text()) for p in folder.glob("*.json")}


def pennfudan(shared_data, out):
  """Its masks as COCO run lengths. -> path, (N, 4) boxes x y w h that are computed here."""
  coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "pedestrian"}]}
  boxes = []
  for p in sorted((shared_data / "pennfudan/PNGImages").glob("*.png")):
    ids = np.asarray(Image.open(shared_data / "pennfudan/PedMasks" / f"{p.stem}_mask.png"))
    h, w = ids.shape
    coco["images"].append({"id": len(coco["images"]) + 1, "file_name": p.name, "width": w, "height": h})
    for k in range(1, ids.max() + 1):
      ys, xs = np.nonzero(ids == k)
      boxes.append((xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1, len(xs)))
      mask = {"size": [h, w], "counts": rle.encode((ids == k)[None])[0]}
      coco["annotations"].append(
        {"id": len(boxes), "image_id": len(coco["images"]), "category_id": 1, "segmentation": mask}
      )
  out.write_text(json.dumps(coco))
  return out, np.array(boxes)


@pytest.mark.slow
def test_pennfudan(shared_data, tmp_path, monkeypatch, capsys):
  path, boxes = pennfudan(shared_data, tmp_path / "penn.json")
  words = [
    "--data",
    path,
    "--images",
    shared_data / "pennfudan/PNGImages",
    "--fix",
    "--stratify",
    "--show",
    tmp_path / "s.png",
  ]
  run(monkeypatch, *words, "--split", "train:0.7,val:0.15,test:0.15", "--output", tmp_path / "out")
  out = capsys.readouterr().out
  assert "74 of 74 can be used" in out and "160 of 160 can be used: boxes 0 (0%), masks 160 (100%)" in out
  assert "problems     none" in out and "SAM (masks)" in out and "objects-small" in out
  mended = json.loads((tmp_path / "out/penn_fixed.json").read_text())["annotations"]
  np.testing.assert_array_equal([[*a["bbox"], a["area"]] for a in mended], boxes)
  assert {k: len(v["images"]) for k, v in parts_of(tmp_path / "out").items() if k != "penn_fixed"} == {
    "train": 52,
    "val": 11,
    "test": 11,
  }
  images, classes, left_out = read_coco(tmp_path / "out/train.json")
  assert len(images) == 52 and classes == ("pedestrian",) and not left_out


@pytest.mark.slow
def test_coco128(shared_data, tmp_path, monkeypatch, capsys):
  data = shared_data / "coco128" / "object_detection"
  run(monkeypatch, "--data", data, "--split", "train:0.7,val:0.15,test:0.15", "--stratify", "--output", tmp_path)
  out = capsys.readouterr().out
  assert "128 of 128 can be used" in out and "929 of 929 can be used: boxes 929 (100%), masks 0 (0%)" in out
  assert "2 pictures without a YOLO file of labels" in out and "9 categories without a label" in out
  parts = parts_of(tmp_path)
  has = {k: {a["category_id"] for a in p["annotations"]} for k, p in parts.items()}
  texts = [
    p.read_text().splitlines()
    for p in (data / "labels/train2017").iterdir()
    if (data / "images/train2017" / f"{p.stem}.jpg").is_file()
  ]
  on = np.bincount([c for t in texts for c in {int(x.split()[0]) for x in t}], minlength=80)
  often = set(np.flatnonzero(on >= 3).tolist())
  assert all(often <= h for h in has.values()) and len(often) > 40
  assert 70 <= len(parts["train"]["images"]) <= 90
  run(monkeypatch, "--data", shared_data / "coco128/instance_segmentation", "--images", data / "images/train2017")
  assert "746 of 746 can be used: boxes 0 (0%), masks 746 (100%)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
  "folder, video",
  [
    ("camvid/train", True),
    ("camvid/val", True),
    ("pennfudan/PNGImages", False),
    ("coco128/object_detection/images/train2017", False),
  ],
)
def test_videos_and_photographs(shared_data, folder, video):
  files = sorted((shared_data / folder).iterdir())[:80]
  assert is_video([bits_of(Image.open(f).convert("RGB")) for f in files]) is video

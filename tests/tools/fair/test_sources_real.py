"""Labeled pictures of public data sets, imported and labeled: as many pictures and boxes as there are, each where it
belongs."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from openpilot.selfdrive.modeld.fair.heads.objects import box_iou
from openpilot.tools.fair.labels import import_labels, label, rle
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.pictures import read_rgb

SIDE = 640


def run(monkeypatch, *words):
  monkeypatch.setattr("sys.argv", ["import", *map(str, words)])
  import_labels.main()


def boxes(group, row=None):
  """(N, 4) and (N,) classes."""
  t = group.table("objects")
  xyxy = np.stack([t[k].to_numpy() for k in ("x0", "y0", "x1", "y1")], axis=1)
  here = slice(None) if row is None else t["row"].to_numpy() == row
  return xyxy[here], t["cls"].to_numpy()[here]


def small(folder, n, to):
  """A few pictures, linked."""
  to.mkdir(parents=True)
  for p in sorted(folder.iterdir())[:n]:
    (to / p.name).symlink_to(p)
  return to


@pytest.mark.slow
def test_coco128_boxes(shared_data, tmp_path, monkeypatch, capsys):
  """929 boxes of 128 pictures; two have none. Each as its text says, computed here once more."""
  data = shared_data / "coco128" / "object_detection"
  if not data.is_dir():
    pytest.skip(f"no {data}")
  run(monkeypatch, data, "--name", "coco128", "--license", "COCO", "--output", tmp_path / "s", "--size", "320x320")
  said = capsys.readouterr()
  assert "coco128-train--0: 128 pictures; 929 boxes (person 254, car 46, cup 36," in said.out
  assert "2 of 128 pictures have no file of labels" in said.err and "2 files of labels have no picture" in said.err
  (group,) = LabelStore(tmp_path / "s").groups("coco128")
  classes = group.label("objects").classes
  assert len(classes) == 80 and (classes[0], classes[9], classes[79]) == ("person", "traffic light", "toothbrush")
  names = group.frames["name"].to_pylist()
  for row in range(0, 128, 7):
    w, h = group.picture_size(row)
    assert (w, h) == Image.open(data / names[row]).size
    text = (data / names[row].replace("images/", "labels/")).with_suffix(".txt")
    said = text.read_text().splitlines() if text.is_file() else []
    lines = np.array([list(map(float, x.split())) for x in said]).reshape(-1, 5)
    scale = 320 / max(w, h)
    center, side = lines[:, 1:3] * [w, h], lines[:, 3:] * [w, h]
    corners = np.concatenate([center - side / 2, center + side / 2], axis=1)
    want = np.clip(corners, 0, [w, h, w, h]) * scale - 0.5
    got, cls = boxes(group, row)
    np.testing.assert_allclose(got, want, atol=1e-3)
    assert [classes[c] for c in cls] == [classes[int(c)] for c in lines[:, 0]]


@pytest.mark.slow
def test_coco128_polygons(shared_data, tmp_path, monkeypatch, capsys):
  """Polygons of pictures that lie elsewhere: 746 of 100 pictures; each box is its mask's, to a pixel of the input."""
  data = shared_data / "coco128"
  if not data.is_dir():
    pytest.skip(f"no {data}")
  images = data / "object_detection" / "images" / "train2017"
  words = (data / "instance_segmentation", "--images", images, "--name", "seg", "--license", "COCO")
  run(monkeypatch, *words, "--output", tmp_path / "s", "--size", "320x320")
  assert "seg-train--0: 100 pictures; 746 boxes with masks (person 209, cup 33," in capsys.readouterr().out
  (group,) = LabelStore(tmp_path / "s").groups("seg")
  counts = group.table("objects")["rle"].to_pylist()[:60]
  seen = rle.boxes_of(rle.decode(counts, 320, 320))
  off = np.abs(seen - boxes(group)[0][:60])
  assert np.nanpercentile(off, 95) < 1.5 and np.nanmean(off) < 0.4  # a spike of less than a pixel is drawn by none


def test_pennfudan_as_coco(shared_data, tmp_path, monkeypatch):
  """Its pixel masks as run lengths, without a box: the box that comes out is the one that its authors wrote down."""
  data = shared_data / "pennfudan"
  if not data.is_dir():
    pytest.skip(f"no {data}")
  images, annotations, want = [], [], []
  for i, path in enumerate(sorted((data / "PNGImages").iterdir())[:6]):
    mask = np.asarray(Image.open(data / "PedMasks" / f"{path.stem}_mask.png"))
    h, w = mask.shape
    images.append({"id": i, "file_name": path.name, "width": w, "height": h})
    text = (data / "Annotation" / f"{path.stem}.txt").read_text()
    for k, m in enumerate(re.findall(r"Bounding box .*: \((\d+), (\d+)\) - \((\d+), (\d+)\)", text), 1):
      flat = (mask == k).T.ravel()
      runs = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]])).tolist()
      rle_said = {"size": [h, w], "counts": [0, *runs] if flat[0] else runs}
      annotations.append({"image_id": i, "category_id": 1, "segmentation": rle_said})
      x0, y0, x1, y1 = map(int, m)  # counted from 1, both ends inside
      want.append(np.array([x0 - 1, y0 - 1, x1, y1]) * SIDE / max(w, h) - 0.5)
  said = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "PASpersonWalking"}]}
  (tmp_path / "ped.json").write_text(json.dumps(said))
  words = (tmp_path / "ped.json", "--images", data / "PNGImages", "--name", "ped", "--license", "research")
  run(monkeypatch, *words, "--output", tmp_path / "s")
  (group,) = LabelStore(tmp_path / "s").groups("ped")
  assert group.label("objects").classes == ("PASpersonWalking",)
  # what the authors wrote is the mask's own box, but for a pixel here and there
  off = np.abs(boxes(group)[0] - np.array(want))
  assert np.median(off) < 1e-3 and off.max() < 3 * SIDE / 500
  masks = rle.decode(group.table("objects")["rle"].to_pylist(), SIDE, SIDE)
  assert np.abs(rle.boxes_of(masks) - boxes(group)[0]).max() < 1.5


def test_camvid_and_tusimple(shared_data, tmp_path, monkeypatch, capsys):
  """Class ids; and lanes in black and white by a palette. Shares of the picture are those of the maps themselves."""
  names = "sky,building,pole,road,pavement,tree,sign,fence,car,pedestrian,bicyclist,unlabelled"
  for data, annotations, more, n in (
    ("camvid/val", "camvid/valannot", ("--classes", names), 101),
    ("tusimple/image", "tusimple/gt_binary_image", ("--palette", "000000=background,ffffff=lane"), 3),
  ):
    if not (shared_data / data).is_dir():
      pytest.skip(f"no {shared_data / data}")
    folder = small(shared_data / data, 5, tmp_path / data)
    words = (folder, "--annotations", shared_data / annotations, "--name", "x", "--license", "research")
    run(monkeypatch, *words, *more, "--output", tmp_path / "s")
    (frames,), (group,) = LabelStore(tmp_path / "s").groups("frames"), LabelStore(tmp_path / "s").groups("x")
    assert group.n == min(n, 5) == frames.n
    for row, name in enumerate(frames.frames["name"].to_pylist()):
      raw = np.asarray(Image.open((shared_data / annotations / name).with_suffix(".png")))
      ids = raw if "classes" in more[0] else raw // 255
      got, inside = group.row("segmentation", row), group.input.covered(*frames.picture_size(row))
      assert (got[~inside] == 255).all() and set(np.unique(got[inside])) <= set(range(12))
      for k in np.unique(ids):
        assert abs((got[inside] == k).mean() - (ids == k).mean()) < 0.002
      picture = read_rgb(shared_data / data / name)
      shown = frames.row("frame", row).transpose(1, 2, 0)[inside]
      np.testing.assert_allclose(shown.mean(0), picture.reshape(-1, 3).mean(0), atol=1)
  capsys.readouterr()


def test_a_palette_of_other_colors_is_refused(shared_data, tmp_path, monkeypatch):
  data = shared_data / "stills" / "comma10k"
  if not data.is_dir():
    pytest.skip(f"no {data}")
  words = (
    data / "imgs",
    "--annotations",
    data / "masks",
    "--name",
    "c",
    "--license",
    "MIT",
    "--output",
    tmp_path / "s",
  )
  with pytest.raises(UserError, match="no pixel of its class maps has a color of --palette"):
    run(monkeypatch, *words, "--palette", "402020=road,808060=undrivable")


@pytest.mark.slow
def test_a_teacher_sees_coco128_whole(shared_data, tmp_path, monkeypatch, capsys):
  """YOLOX-nano finds of the first pictures' persons and cars what it finds by its own letterbox: of all 128 pictures it
  has a recall of .48 at a score of .3."""
  data, weights = shared_data / "coco128" / "object_detection", shared_data / "weights" / "yolox_nano.onnx"
  if not data.is_dir() or not weights.is_file():
    pytest.skip(f"no {data} or {weights}")
  folder = small(data / "images" / "train2017", 24, tmp_path / "y" / "images" / "train2017")
  (tmp_path / "y" / "labels").symlink_to(data / "labels")
  (tmp_path / "y" / "data.yaml").write_text((data / "config.yaml").read_text())
  words = ["label", tmp_path / "y", "--teachers", "yolox-nano", "--weights", f"yolox-nano={weights}", "--name", "t"]
  monkeypatch.setattr("sys.argv", [*map(str, words), "--output", str(tmp_path / "s")])
  label.main()
  run(monkeypatch, tmp_path / "y", "--name", "t", "--license", "COCO", "--output", tmp_path / "s")
  store = LabelStore(tmp_path / "s")
  (found,), (true,) = store.groups("yolox-nano"), store.groups("t")
  assert len(store.groups("frames")) == 1 and len(list(folder.iterdir())) == found.n == 24
  t = found.table("boxes")
  hit = total = 0
  for row in range(found.n):
    here = t["row"].to_numpy() == row
    seen = np.stack([t[k].to_numpy()[here] for k in ("x0", "y0", "x1", "y1")], axis=1)
    names = np.array(found.label("boxes").classes)[t["cls"].to_numpy()[here]]
    truth, cls = boxes(true, row)
    for box, c in zip(truth, cls, strict=True):
      name = true.label("objects").classes[c]
      if name in ("person", "car") and min(box[2] - box[0], box[3] - box[1]) > 48:
        total += 1
        same = seen[names == name]
        hit += bool(len(same)) and box_iou(box[None], same).max() > 0.5
  assert total > 15 and hit / total > 0.75, (hit, total)

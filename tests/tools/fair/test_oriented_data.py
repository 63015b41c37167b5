"""YOLO-OBB, DOTA and COCO as oriented boxes: read, counted, put into a store; what is wrong is left out or one line."""

import json

import numpy as np
import oriented_fixture as made
import pytest
from PIL import Image

from openpilot.selfdrive.modeld.fair.heads.oriented import corners, upright
from openpilot.tools.fair.images import validate
from openpilot.tools.fair.images.oriented import Oriented, orient
from openpilot.tools.fair.labels.import_labels import import_parts
from openpilot.tools.fair.labels.sources import SourceOptions, open_sources
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.rotated import pair_iou
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.lib.errors import UserError


def opened(path, **more):
  return orient(open_sources([str(path)], SourceOptions(**more)))


def same(said, boxes, names, cls, least=1 - 1e-4):
  """said: of pictures whose pixels count from their centers."""
  assert [names[k] for k in said.cls] == [made.NAMES[k] for k in cls]
  if len(boxes):
    assert pair_iou(said.oriented + [0.5, 0.5, 0, 0, 0], boxes).min() > least
    np.testing.assert_allclose(said.boxes, upright(said.oriented))
    assert (said.oriented[:, 2] >= said.oriented[:, 3]).all() and (np.abs(said.oriented[:, 4]) <= np.pi / 2).all()


@pytest.mark.parametrize("kind", ["yolo", "dota", "coco", "masks"])
def test_all_formats_say_the_same_boxes(tmp_path, kind):
  write = {
    "yolo": lambda: made.yolo(tmp_path / "d", {"train": (4, 3)}),
    "dota": lambda: made.dota(tmp_path / "d", 4, 3),
    "coco": lambda: made.coco(tmp_path / "d", 4, 3),
    "masks": lambda: made.coco(tmp_path / "d", 4, 3, masks=True),
  }
  (part,) = opened(write[kind]())
  truth = {path.name: (boxes, cls) for path, boxes, cls in made.render(tmp_path / "again", 4, 3)}
  assert len(part.stills) == 4 and part.carries.oriented and not part.carries.masks
  for row, still in enumerate(part.stills):
    boxes, cls = truth[still.path.name]
    said = part.said(row)
    same(said, boxes, part.carries.boxes, cls, 0.75 if kind == "masks" else 1 - 1e-4)  # of whole pixels
    assert not said.difficult.any() and said.masks == []


def test_difficult_objects_keep_their_class_and_are_told(tmp_path, capsys):
  (part,) = opened(made.dota(tmp_path / "d", 3, difficult=(0, 4)))
  assert np.flatnonzero(np.concatenate([part.said(i).difficult for i in range(3)])).tolist() == [0, 4]
  assert "2 objects are marked difficult" in capsys.readouterr().err


def test_parts_of_dota_have_the_same_classes(tmp_path):
  made.dota(tmp_path / "d/train", 2, 1)
  made.dota(tmp_path / "d/val", 1, 2)
  text = next((tmp_path / "d/val/labelTxt").iterdir())
  text.write_text(text.read_text() + "1 1 9 1 9 5 1 5 aardvark 0\n")
  train, val = opened(tmp_path / "d")
  assert train.carries.boxes == val.carries.boxes == ("aardvark", "flurb", "zott")
  assert (train.segment.route, val.segment.route) == ("d-train", "d-val") and val.said(0).cls[-1] == 0


def test_dota_is_validated(tmp_path, capsys):
  """Both parts at once; what is difficult is a crowd; the mended copy says the same boxes to train-obb."""
  folder = tmp_path / "d"
  made.dota(folder / "train", 3, 1, difficult=(0,))
  made.dota(folder / "val", 2, 2)
  text = sorted((folder / "train/labelTxt").iterdir())[1]
  text.write_text(text.read_text() + "1 1 9 1 9 5 1 nan ship 0\n500 500 510 500 510 510 500 510 zott 0\n")
  sorted((folder / "val/labelTxt").iterdir())[0].unlink()
  r = validate.run(validate.Options(data=folder, fix=True))
  said = capsys.readouterr().out
  assert "5 of 5 can be used" in said and "1 crowds" in said
  assert {k: v["count"] for k, v in r["problems"].items() if k.startswith("dota")} == {
    "dota_lines": 2,
    "dota_no_labels": 1,
  }
  assert r["next"][0].startswith("tools/op.sh images train-obb --data ") and len(r["next"]) == 2
  coco = json.loads((folder / "d_fixed.json").read_text())
  assert [c["name"] for c in coco["categories"]] == ["flurb", "zott"] and len(coco["annotations"]) == 12
  (part,) = opened(folder / "d_fixed.json", images=folder)
  truth = {p.name: (b, c) for seed, n in ((1, 3), (2, 2)) for p, b, c in made.render(tmp_path / "again", n, seed)}
  difficult = 0
  for row, still in enumerate(part.stills):
    boxes, cls = truth[still.path.name]
    said = part.said(row)
    if len(said.cls):  # what is difficult is of no class there, as crowds are
      assert pair_iou(said.oriented + [0.5, 0.5, 0, 0, 0], boxes).min() > 0.999
      kept = [part.carries.boxes[k] for k in said.cls[~said.difficult]]
      assert kept == [made.NAMES[k] for k in cls[~said.difficult]]
    difficult += int(said.difficult.sum())
  assert difficult == 1
  capsys.readouterr()
  with pytest.raises(UserError, match="nor DOTA's labelTxt"):
    validate.run(validate.Options(data=tmp_path / "again"))


def test_lines_of_dota_that_are_none_are_counted(tmp_path, capsys):
  folder = made.dota(tmp_path / "d", 1)
  text = next((folder / "labelTxt").iterdir())
  n = len(text.read_text().splitlines()) - 2
  wrong = ["1 2 3 flurb 0", "a b c d e f g h flurb 0", "nan 1 9 1 9 5 1 5 flurb 0", "inf 1 9 1 9 5 1 5 flurb 0"]
  wrong += ["1 1 9 1 9 5 1 5 flurb x", "1 1 9 1 9 5 1 5 two words 0", "1e300 1 9 1 9 5 1 5 flurb 0"]
  outside = ["900 900 910 900 910 910 900 910 flurb 0", "-9 -9 -1 -9 -1 -1 -9 -1 flurb 0"]
  flat = ["5 5 9 9 13 13 7 7 flurb 0"]
  text.write_text(text.read_text() + "\n".join([*wrong, *outside, *flat, "1 1 9 1 9 5 1 5 flurb"]) + "\n")
  (part,) = opened(folder)
  said = capsys.readouterr().err
  assert len(part.said(0).cls) == n + 1  # a line without its last word is one
  assert f"{len(wrong)} lines that are no object of DOTA's" in said
  assert "2 objects that are empty, or outside" in said and "1 outlines without an area are left out" in said


def test_boxes_without_an_outline_are_upright(tmp_path, capsys):
  folder = made.yolo(tmp_path / "d", {"train": (1, 0)})
  text = next((folder / "labels/train").iterdir())
  text.write_text("0 0.5 0.5 0.25 0.5\n")
  (part,) = opened(folder)
  np.testing.assert_allclose(part.said(0).oriented, [[63.5, 47.5, 48, 32, -np.pi / 2]])
  assert "1 labels have no outline: their upright boxes are taken" in capsys.readouterr().err


def test_crowds_of_coco_are_difficult(tmp_path):
  path = made.coco(tmp_path / "d", 1)
  data = json.loads(path.read_text())
  data["annotations"][0]["iscrowd"] = 1
  path.write_text(json.dumps(data))
  (part,) = opened(path)
  said = part.said(0)
  assert said.difficult.tolist() == [True] + [False] * (len(said.cls) - 1)
  assert part.carries.boxes[said.cls[0]] == "unknown"


def test_a_mask_of_another_size_than_its_picture(tmp_path):
  """Annotated at twice the size."""
  from openpilot.tools.fair.labels import rle

  path = made.coco(tmp_path / "d", 1)
  data = json.loads(path.read_text())
  mask = np.zeros((2 * made.H, 2 * made.W), bool)
  mask[40:60, 100:180] = True
  data["images"][0] |= {"width": 2 * made.W, "height": 2 * made.H}
  shape = {"size": list(mask.shape), "counts": rle.encode(mask[None])[0]}
  data["annotations"] = [data["annotations"][0] | {"segmentation": shape, "bbox": [100, 40, 80, 20]}]
  path.write_text(json.dumps(data))
  (part,) = opened(path)
  np.testing.assert_allclose(part.said(0).oriented, [[69.5, 24.5, 40, 10, 0]], atol=1e-4)


def test_the_store_keeps_them_in_the_inputs_pixels(tmp_path):
  """Letterboxed into a square of 64: all is halved. What is difficult is unknown there."""
  parts = opened(made.dota(tmp_path / "d", 2, difficult=(1,)))
  ((frames, said),) = import_parts(LabelStore(tmp_path / "s", create=True), parts, "labeled", InputSpec("rgb", 64, 64))
  (label,) = said.labels
  assert (label.name, label.classes) == ("oriented", ("flurb", "zott", "unknown"))
  t = {c: said.table("oriented")[c].to_numpy() for c in said.table("oriented").column_names}
  want = [parts[0].said(i) for i in range(2)]
  boxes = np.concatenate([s.oriented for s in want])
  got = np.stack([t[k] for k in ("cx", "cy", "w", "h", "angle")], 1)
  np.testing.assert_allclose(got[:, :2] + 0.5, (boxes[:, :2] + 0.5) / 2, atol=1e-4)
  np.testing.assert_allclose(got[:, 2:], boxes[:, 2:] / [2, 2, 1], atol=1e-4)
  cls = np.concatenate([s.cls for s in want])
  assert t["cls"].tolist() == [2 if k == 1 else c for k, c in enumerate(cls)]
  np.testing.assert_allclose(
    np.stack([t[k] for k in ("x0", "y0", "x1", "y1")], 1), np.clip(upright(got), -0.5, 63.5), atol=1e-4
  )
  assert frames.picture_size(0) == (made.W, made.H)


def test_changed_labels_are_another_part(tmp_path):
  folder = made.dota(tmp_path / "d", 1)
  store, spec = LabelStore(tmp_path / "s", create=True), InputSpec("rgb", 64, 64)
  first = import_parts(store, opened(folder), "labeled", spec)[0][1]
  text = next((folder / "labelTxt").iterdir())
  text.write_text(text.read_text().replace(" 0\n", " 1\n"))
  second = import_parts(store, opened(folder), "labeled", spec)[0][1]
  assert first.path != second.path and not first.path.exists()


@pytest.mark.parametrize(
  "spoil, says",
  [
    (lambda d: [p.unlink() for p in (d / "images").iterdir()], "no pictures in"),
    (lambda d: [p.unlink() for p in (d / "labelTxt").iterdir()], "none of 1 pictures has its labels"),
    (lambda d: [p.write_text("gsd:1\n") for p in (d / "labelTxt").iterdir()], "no object can be used"),
    (lambda d: [p.write_bytes(b"no picture") for p in (d / "images").iterdir()], "no picture of"),
  ],
)
def test_what_is_wrong_with_a_folder_is_one_line(tmp_path, spoil, says):
  folder = made.dota(tmp_path / "d", 1)
  spoil(folder)
  with pytest.raises(UserError, match=says) as e:
    open_sources([str(folder)], SourceOptions())
  assert "\n" not in str(e.value)


def test_pictures_elsewhere(tmp_path):
  folder = made.dota(tmp_path / "d", 2)
  (folder / "images").rename(tmp_path / "p")
  with pytest.raises(UserError, match="name their folder with --images"):
    open_sources([str(folder)], SourceOptions())
  (part,) = opened(folder, images=tmp_path / "p")
  assert isinstance(part, Oriented) and len(part.stills) == 2
  made.dota(tmp_path / "e/train", 1)
  made.dota(tmp_path / "e/val", 1)
  with pytest.raises(UserError, match="name the parts one by one"):
    open_sources([str(tmp_path / "e")], SourceOptions(images=tmp_path / "p"))


def test_the_rendered_boxes_are_where_they_say(tmp_path):
  """Of the fixture: the color's pixels lie in the box."""
  ((path, boxes, cls),) = made.render(tmp_path, 1, 5, count=1)
  rgb = np.asarray(Image.open(path)).astype(int)
  on = np.abs(rgb - made.COLORS[made.NAMES[cls[0]]]).sum(2) < 5
  y, x = np.nonzero(on)
  c, s = np.cos(boxes[0, 4]), np.sin(boxes[0, 4])
  local = (np.stack([x + 0.5, y + 0.5], 1) - boxes[0, :2]) @ np.array([[c, -s], [s, c]])
  assert (np.abs(local) <= boxes[0, 2:4] / 2 + 1.0).all() and len(corners(boxes)) == 1


def test_what_is_unknown_is_no_class_to_learn(tmp_path):
  """Crowds of COCO are read as a class of that name."""
  from collections import Counter

  from openpilot.tools.fair.images.store import class_set, count

  assert class_set(["flurb", "unknown"], Counter(flurb=1, unknown=2), ()).boxes == ("flurb",)
  parts = opened(made.dota(tmp_path / "d", 2, difficult=(0, 1)))
  used, boxes, _ = count(parts)
  assert sum(used.values()) == boxes - 2  # what is difficult makes no class

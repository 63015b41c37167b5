"""Labeled pictures checked and mended: every way to be wrong is found, counted, and gone from the mended copy."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from images_fixture import H, NAMES, W, check, make, picture, square, write
from PIL import Image

pytest.importorskip("pycocotools")

from openpilot.tools.fair.grounded_sam import validate_dataset
from openpilot.tools.fair.images import evaluate, train_student, validate
from openpilot.tools.fair.images.train_teacher import Options as TeacherOptions
from openpilot.tools.fair.images.check import ident
from openpilot.tools.fair.images.dataset import inspect_dataset, open_dataset
from openpilot.tools.fair.images.problems import KEPT, KINDS
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.labels.sources.coco import read_coco
from openpilot.tools.lib.colors import name_color
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.options import parse
from openpilot.tools.lib.pictures import read_rgb


def run(monkeypatch, *words):
  monkeypatch.setattr("sys.argv", ["validate", *map(str, words)])
  validate.main()


def change(coco, table, index, **values):
  for k, v in values.items():
    if v is None:
      coco[table][index].pop(k)
    else:
      coco[table][index][k] = v


def box(*said):
  return lambda c, d: change(c, "annotations", 1, bbox=list(said))


def mask(said):
  return lambda c, d: change(c, "annotations", 0, segmentation=said)


def runs(counts, size=(H, W)):
  return {"size": list(size), "counts": counts}


def saved_as(name, image, **options):
  return lambda c, d: image.save(d / "images" / name, **options)


FULL = W * H
# what is made wrong -> {problem: count}, pictures left of 4, annotations left of 8
CASES = {
  "no image id": (lambda c, d: change(c, "images", 0, id=None), {"image_id": 1, "annotation_no_picture": 2}, 3, 6),
  "image id is a list": (
    lambda c, d: change(c, "images", 0, id=[1]),
    {"image_id": 1, "annotation_no_picture": 2},
    3,
    6,
  ),
  "image id is true": (lambda c, d: change(c, "images", 0, id=True), {"image_id": 1, "annotation_no_picture": 2}, 3, 6),
  "image id is huge": (
    lambda c, d: change(c, "images", 0, id=10**400),
    {"image_id": 1, "annotation_no_picture": 2},
    3,
    6,
  ),
  "image id twice": (
    lambda c, d: change(c, "images", 1, id=1),
    {"image_id_twice": 1, "annotation_no_picture": 2},
    3,
    6,
  ),
  "image is no entry": (lambda c, d: c["images"].append("e.png"), {"image_id": 1}, 4, 8),
  "no name": (
    lambda c, d: change(c, "images", 2, file_name=None),
    {"image_name": 1, "annotation_left_picture": 2},
    3,
    6,
  ),
  "name twice": (
    lambda c, d: change(c, "images", 3, file_name="a.png"),
    {"image_name_twice": 1, "annotation_twice": 2},
    3,
    6,
  ),
  "missing": (lambda c, d: (d / "images/b.png").unlink(), {"image_missing": 1, "annotation_left_picture": 2}, 3, 6),
  "name too long": (
    lambda c, d: change(c, "images", 3, file_name="x" * 5000),
    {"image_missing": 1, "annotation_left_picture": 2},
    3,
    6,
  ),
  "no picture": (
    lambda c, d: (d / "images/b.png").write_bytes(b"\x89PNG broken"),
    {"image_unreadable": 1, "annotation_left_picture": 2},
    3,
    6,
  ),
  "cut off": (
    lambda c, d: (d / "images/b.png").write_bytes((d / "images/a.png").read_bytes()[:90]),
    {"image_unreadable": 1, "annotation_left_picture": 2},
    3,
    6,
  ),
  "same file": (saved_as("b.png", picture(0)), {"image_same": 1, "annotation_left_picture": 2}, 3, 6),
  "looks alike": (saved_as("b.png", picture(0).resize((W * 2, H * 2))), {"image_alike": 1, "size_scaled": 1}, 4, 8),
  "no size": (lambda c, d: change(c, "images", 0, width=None), {"size_missing": 1}, 4, 8),
  "size is text": (lambda c, d: change(c, "images", 0, width="64"), {"size_missing": 1}, 4, 8),
  "size is infinite": (lambda c, d: change(c, "images", 0, width=float("inf")), {"size_missing": 1}, 4, 8),
  "scaled": (lambda c, d: change(c, "images", 0, width=W * 2, height=H * 2), {"size_scaled": 1}, 4, 8),
  "other proportions": (
    lambda c, d: change(c, "images", 0, width=H, height=W),
    {"size_wrong": 1, "annotation_left_picture": 2},
    3,
    6,
  ),
  "category without name": (
    lambda c, d: change(c, "categories", 2, name=None),
    {"category_id": 1, "annotation_no_category": 2},
    4,
    6,
  ),
  "category id twice": (
    lambda c, d: change(c, "categories", 2, id=1),
    {"category_id_twice": 1, "annotation_no_category": 2},
    4,
    6,
  ),
  "category name twice": (lambda c, d: change(c, "categories", 2, name="bag"), {"category_name_twice": 1}, 4, 8),
  "category name alike": (lambda c, d: change(c, "categories", 2, name="Bag "), {"category_name_alike": 1}, 4, 8),
  "category gap": (
    lambda c, d: (c["categories"].append({"id": 9, "name": "x"}), change(c, "annotations", 0, category_id=9)),
    {"category_gap": 5},
    4,
    8,
  ),
  "category unused": (lambda c, d: c["categories"].append({"id": 4, "name": "x"}), {"category_unused": 1}, 4, 8),
  "ids are text": (lambda c, d: [change(c, "images", i, id=str(i + 1)) for i in range(4)], {"id_kind": 4}, 4, 8),
  "annotation id twice": (lambda c, d: change(c, "annotations", 1, id=1), {"annotation_id": 1}, 4, 8),
  "annotation id missing": (lambda c, d: change(c, "annotations", 1, id=None), {"annotation_id": 1}, 4, 8),
  "annotation id zero": (lambda c, d: change(c, "annotations", 1, id=0), {"annotation_id_zero": 1}, 4, 8),
  "of no picture": (lambda c, d: change(c, "annotations", 1, image_id=77), {"annotation_no_picture": 1}, 4, 7),
  "of no category": (lambda c, d: change(c, "annotations", 1, category_id={}), {"annotation_no_category": 1}, 4, 7),
  "annotation twice": (
    lambda c, d: c["annotations"].append(c["annotations"][0] | {"id": 99}),
    {"annotation_twice": 1},
    4,
    8,
  ),
  "no entry": (lambda c, d: c["annotations"].append(7), {"annotation_other": 1}, 4, 8),
  "neither box nor mask": (lambda c, d: change(c, "annotations", 1, bbox=None), {"annotation_empty": 1}, 4, 7),
  "box is text": (box("a", 1, 2, 3), {"box_wrong": 1, "annotation_empty": 1}, 4, 7),
  "box of three": (box(1, 2, 3), {"box_wrong": 1, "annotation_empty": 1}, 4, 7),
  "box is nan": (box(1, 2, float("nan"), 3), {"box_wrong": 1, "annotation_empty": 1}, 4, 7),
  "box is huge": (box(1, 2, 10**400, 3), {"box_wrong": 1, "annotation_empty": 1}, 4, 7),
  "box empty": (box(1, 2, 0, 3), {"box_empty": 1, "annotation_empty": 1}, 4, 7),
  "box negative": (box(9, 9, -4, 3), {"box_empty": 1, "annotation_empty": 1}, 4, 7),
  "box outside": (box(W + 5, 2, 9, 3), {"box_outside": 1, "annotation_empty": 1}, 4, 7),
  "box beyond": (box(W - 9, 2, 19, 3), {"box_beyond": 1}, 4, 8),
  "box beyond by rounding": (box(W - 9, 2, 9.6, 3), {}, 4, 8),
  "box beside its mask": (
    lambda c, d: change(c, "annotations", 0, bbox=[30, 6, 12, 12]),
    {"box_not_around_mask": 1},
    4,
    8,
  ),
  "box a little small": (lambda c, d: change(c, "annotations", 0, bbox=[5, 7, 10, 10]), {}, 4, 8),
  "polygon of two points": (mask([[1, 2, 3, 4]]), {"polygon_short": 1}, 4, 8),
  "one of two polygons": (mask([square(4, 6, 12), [1, 2, 3, 4]]), {"polygon_short": 1}, 4, 8),
  "polygon of an odd count": (mask([[*square(4, 6, 12), 5]]), {"polygon_short": 1}, 4, 8),
  "polygon in no list": (mask(square(4, 6, 12)), {"polygon_flat": 1}, 4, 8),
  "polygon beyond": (mask([square(-8, 6, 24)]), {"polygon_beyond": 1, "box_not_around_mask": 1}, 4, 8),
  "polygon of no area": (mask([[4, 6, 4, 6, 4, 6]]), {"mask_empty": 1}, 4, 8),
  "mask is text": (mask("here"), {"mask_wrong": 1}, 4, 8),
  "polygon of text": (mask([["a"] * 6]), {"mask_wrong": 1}, 4, 8),
  "runs of another size": (mask(runs([FULL], (H, W + 1))), {"mask_wrong": 1}, 4, 8),
  "huge runs": (mask(runs([10**12], (10**6, 10**6))), {"mask_wrong": 1}, 4, 8),
  "runs beyond the picture": (mask(runs([0, FULL + 1])), {"mask_wrong": 1}, 4, 8),
  "negative runs": (mask(runs([-1, FULL + 1])), {"mask_wrong": 1}, 4, 8),
  "runs of an infinite size": (mask(runs([FULL], (float("inf"), W))), {"mask_wrong": 1}, 4, 8),
  "runs of a number without end": (mask(runs("o" * 300_000)), {"mask_wrong": 1}, 4, 8),
  "runs of nothing": (mask(runs([FULL])), {"mask_empty": 1}, 4, 8),
  "polygon to and fro": (mask([[0, 0, W, H] * 40_000]), {"mask_wrong": 1}, 4, 8),
  "crowd": (
    lambda c, d: change(
      c, "annotations", 0, iscrowd=1, segmentation=runs([4 * H, 12 * H, FULL - 16 * H]), bbox=[4, 0, 12, H]
    ),
    {"crowd": 1},
    4,
    8,
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_wrong_is_found_counted_and_mended(case, tmp_path):
  spoil, problems, pictures, annotations = CASES[case]
  coco = make(tmp_path)
  assert check(tmp_path, coco)[1] == {}
  spoil(coco, tmp_path)
  found, said = check(tmp_path, coco)
  assert said == problems
  assert (len(found.pictures), len(found.annotations)) == (pictures, annotations)
  # the mended copy is right, and stays as it is
  again, left = check(tmp_path, validate.coco_of(found))
  assert all(KINDS[k][1].startswith(KEPT) for k in left), left
  assert validate.coco_of(again) == validate.coco_of(found)
  images, _, left_out = read_coco(write(tmp_path, validate.coco_of(found)))
  assert len(images) == pictures and not left_out
  for a in found.annotations:
    assert type(a["id"]) is int and a["id"] > 0 and a["area"] > 0
    x, y, w, h = a["bbox"]
    assert w > 0 and h > 0 and x >= 0 and y >= 0 and x + w <= W * 2 and y + h <= H * 2
  assert len({a["id"] for a in found.annotations}) == annotations


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["polygon", "runs"])
def test_labels_of_a_picture_that_exif_turns(tmp_path, orientation, kind):
  """A dark rectangle, labeled in the file's pixels: after mending box and mask are where it is on the picture shown."""
  coco = make(tmp_path)
  pixels = np.full((H, W), 255, np.uint8)
  pixels[6:16, 30:50] = 0
  image = Image.fromarray(pixels)
  exif = image.getexif()
  exif[0x0112] = orientation
  image.save(tmp_path / "images/a.png", exif=exif)
  shape = [[30, 6, 50, 6, 50, 16, 30, 16]] if kind == "polygon" else runs(rle.encode((pixels == 0)[None])[0])
  change(coco, "annotations", 0, bbox=[30, 6, 20, 10], segmentation=shape)
  found, said = check(tmp_path, coco)
  assert said == {"size_turned": 1}
  (a,) = (a for a in found.annotations if a["id"] == 1)
  entry = found.pictures[0].entry
  assert (entry["width"], entry["height"]) == (H, W)
  dark = read_rgb(tmp_path / "images/a.png")[..., 0] == 0
  x, y, w, h = a["bbox"]
  ys, xs = np.nonzero(dark)
  assert (x, y, x + w, y + h) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
  assert a["area"] == 200
  if kind == "runs":
    np.testing.assert_array_equal(rle.decode(a["segmentation"]["counts"], W, H), dark)
  else:
    p = np.array(a["segmentation"][0]).reshape(-1, 2)
    assert [*p.min(0), *p.max(0)] == [x, y, x + w, y + h]


def test_boxes_and_areas_come_from_masks(tmp_path):
  """One tight box of each mask; the area of two polygons that overlap is that of their union."""
  coco = make(tmp_path)
  change(coco, "annotations", 0, bbox=None, area=None, segmentation=[square(4, 6, 10), square(9, 6, 10)])
  pixels = np.zeros((H, W), bool)
  pixels[20:30, 40:60] = pixels[22:24, 2:5] = True
  change(coco, "annotations", 2, bbox=None, segmentation=runs(rle.encode(pixels[None])[0]))
  found, said = check(tmp_path, coco)
  first, _, third = found.annotations[:3]
  assert (first["bbox"], first["area"]) == ([4, 6, 15, 10], 150)
  assert (third["bbox"], third["area"]) == ([2, 20, 58, 10], pixels.sum())
  assert said == {} and (found.boxes, found.masks, found.both, found.made_boxes) == (6, 4, 2, 2)


def test_scaled_labels(tmp_path):
  coco = make(tmp_path)
  change(coco, "images", 0, width=W * 2, height=H * 2)
  wide = np.zeros((H * 2, W * 2), bool)
  wide[20:40, 60:100] = True
  change(coco, "annotations", 1, bbox=[60, 20, 40, 20], segmentation=runs(rle.encode(wide[None])[0], wide.shape))
  found, _ = check(tmp_path, coco)
  assert found.annotations[0]["bbox"] == [2, 3, 6, 6] and found.annotations[0]["area"] == 36
  assert found.annotations[1]["bbox"] == [30, 10, 20, 10] and found.annotations[1]["area"] == 200


def test_paths_out_of_the_folder(tmp_path, monkeypatch, capsys):
  """Nothing outside is opened; without --fix it is one line."""
  coco = make(tmp_path)
  picture(9).save(tmp_path / "secret.png")
  for name in ("../secret.png", str(tmp_path / "secret.png"), "x/../../secret.png"):
    change(coco, "images", 1, file_name=name)
    with pytest.raises(UserError, match=r"1 file names lead out of .*; name the folder"):
      check(tmp_path, coco)
    found, said = check(tmp_path, coco, fix=True)
    assert said == {"image_outside": 1, "annotation_left_picture": 2} and len(found.pictures) == 3


@pytest.mark.parametrize(
  "text, says",
  [
    ("[]", "is no COCO JSON"),
    ("{", "cannot read"),
    ("[" * 100_000, "nested too deeply"),
    ('{"images": [], "categories": []}', "names no pictures"),
    ('{"images": [{"id": 1, "file_name": "a.png"}], "categories": [], "annotations": {}}', "has no annotations"),
    ('{"images": [{"id": 1, "file_name": "a.png"}], "categories": [], "annotations": [1]}', "no categories"),
    ('{"images": [{"id": 1, "file_name": "a.png"}], "categories": [], "annotations": {"1": 2}}', "are lists"),
    (
      '{"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 1, "name": "x"}], "annotations": [{}]}',
      "no annotation can be used",
    ),
  ],
)
def test_no_coco_json_is_one_line(tmp_path, text, says):
  make(tmp_path)
  (tmp_path / "annotations.json").write_text(text)
  with pytest.raises(UserError, match=says) as e:
    validate.run(validate.Options(tmp_path / "annotations.json"))
  assert "\n" not in str(e.value)


def test_a_json_per_picture_is_one_line(tmp_path):
  for k in range(3):
    (tmp_path / f"{k}.json").write_text("{}")
  with pytest.raises(UserError, match="3 JSON files, perhaps one a picture"):
    open_dataset(tmp_path)


def test_the_command(tmp_path, monkeypatch, capsys):
  """Report, mended copy, sheet, JSON; what it says to type next can be typed."""
  coco = make(tmp_path)
  change(coco, "annotations", 1, bbox=[50, 8, 30, 20])
  coco["annotations"][3]["keypoints"] = [1, 1, 2]
  out = tmp_path / "out"
  words = ["--data", write(tmp_path, coco), "--output", out, "--show", out / "s.png", "--json", out / "r.json", "--fix"]
  run(monkeypatch, *words)
  text = capsys.readouterr().out
  assert "pictures     4 of 4 can be used" in text and "boxes 8 (100%), masks 4 (50%)" in text
  assert "key points of 1 are ignored" in text and "licenses     MIT: 4 pictures" in text
  assert "1 boxes that reach beyond their picture: 2 on a.png [cut at its edge]" in text
  assert "Grounding DINO (boxes) and SAM (masks); `images train-teacher` tunes them on your data" in text
  mended = json.loads((out / "annotations_fixed.json").read_text())
  assert mended["annotations"][1]["bbox"] == [50, 8, 14, 20] and mended["licenses"] == coco["licenses"]
  report = json.loads((out / "r.json").read_text())
  assert report["problems"]["box_beyond"] == {
    "count": 1,
    "what": "boxes that reach beyond their picture",
    "mend": "cut at its edge",
    "first": ["2 on a.png"],
  }
  assert [(c["name"], c["instances"], c["images"]) for c in report["classes"]] == [
    ("bag", 3, 3),
    ("dent", 3, 3),
    ("label", 2, 2),
  ]
  sheet = Image.open(out / "s.png")
  assert sheet.width == 4 * 384  # one beside the other
  colors = sheet.convert("RGB").getcolors(1 << 24)
  assert all(any(c == name_color(n) for _, c in colors) for n in NAMES)
  # typed as printed
  trained, judged, tuned, taught = (shlex.split(c)[2:] for c in report["next"])
  assert [w[0] for w in (trained, judged, tuned, taught)] == [
    "train-student",
    "evaluate",
    "train-teacher",
    "train-student",
  ]
  student, with_teachers = (parse(train_student.Options, "", "x", w[1:]) for w in (trained, taught))
  teachers = parse(TeacherOptions, "", "train-teacher", tuned[1:])
  assert student.data == teachers.data == with_teachers.data == out / "annotations_fixed.json"
  assert teachers.images == tmp_path / "images" and with_teachers.teacher_dir == teachers.output
  assert parse(evaluate.Options, "", "x", judged[1:]).model == student.output != with_teachers.output


def test_check_format_ends_with_an_error(tmp_path, monkeypatch, capsys):
  coco = make(tmp_path)
  run(monkeypatch, "--data", write(tmp_path, coco), "--check-format")
  change(coco, "annotations", 1, bbox=[50, 8, 30, 20])
  with pytest.raises(UserError, match="1 kinds of problems"):
    run(monkeypatch, "--data", write(tmp_path, coco), "--check-format")


def test_nothing_replaces_the_data(tmp_path, monkeypatch):
  coco = make(tmp_path)
  path = write(tmp_path, coco).rename(tmp_path / "train.json")
  before = path.read_bytes()
  with pytest.raises(UserError, match="is the data itself"):
    run(monkeypatch, "--data", path, "--split", "train:.5,val:.5")
  assert path.read_bytes() == before and not (tmp_path / "val.json").exists()


def test_a_license_for_those_without(tmp_path, monkeypatch, capsys):
  coco = make(tmp_path)
  change(coco, "images", 0, license=None)
  change(coco, "images", 1, license=[7])
  run(monkeypatch, "--data", write(tmp_path, coco), "--license", "CC-BY-4.0", "--split", "a:.5,b:.5")
  assert "licenses     CC-BY-4.0: 2 pictures, MIT: 2 pictures" in capsys.readouterr().out
  for part in "ab":
    read = json.loads((tmp_path / f"{part}.json").read_text())
    assert [x["name"] for x in read["licenses"]] == ["MIT", "CC-BY-4.0"]
    known = {x["id"]: x["name"] for x in read["licenses"]}
    assert all(known[i["license"]] == ("CC-BY-4.0" if i["id"] < 3 else "MIT") for i in read["images"])
  monkeypatch.chdir(tmp_path)
  run(monkeypatch, "--data", "annotations.json")
  assert "not stated: 2 pictures, MIT: 2 pictures" in capsys.readouterr().out


def make_yolo(folder):
  for k, lines in enumerate(
    (["0 .5 .5 .25 .5", "1 .1 .1 .1 .1"], ["1 .1 .1 .5 .1 .5 .5", "7 .5 .5 .1 .1", "bad"], None)
  ):
    (folder / "images/train").mkdir(parents=True, exist_ok=True)
    (folder / "labels/train").mkdir(parents=True, exist_ok=True)
    picture(k).save(folder / f"images/train/p{'xyz'[k]}.png")
    if lines is not None:
      (folder / f"labels/train/p{'xyz'[k]}.txt").write_text("\n".join(lines))
  (folder / "data.yaml").write_text("names: [bag, dent]\ntrain: images/train\nlicense: MIT\n")
  return folder


@pytest.mark.parametrize("name", ["", "data.yaml"])
def test_a_yolo_folder(tmp_path, monkeypatch, capsys, name):
  folder = make_yolo(tmp_path)
  run(monkeypatch, "--data", folder / name, "--fix", "--output", tmp_path / "out")
  out = capsys.readouterr().out
  assert "YOLO folder" in out and "3 of 3 can be used" in out and "boxes 2 (67%), masks 1 (33%)" in out
  assert "2 lines of YOLO labels that cannot be used" in out and "1 pictures without a YOLO file of labels" in out
  mended = json.loads((tmp_path / "out/data_fixed.json").read_text())
  assert [a["bbox"] for a in mended["annotations"]] == [[24, 12, 16, 24], [3.2, 2.4, 6.4, 4.8], [6.4, 4.8, 25.6, 19.2]]
  assert mended["images"][0]["file_name"] == "images/train/px.png" and mended["licenses"][0]["name"] == "MIT"


def test_inspect_dataset(tmp_path):
  said = inspect_dataset(make(tmp_path))
  assert said == {
    "has_boxes": True,
    "has_masks": True,
    "has_keypoints": False,
    "num_classes": 3,
    "class_mapping": {1: "bag", 2: "dent", 3: "label"},
    "num_images": 4,
    "num_annotations": 8,
  }
  with pytest.raises(UserError, match="no COCO JSON"):
    inspect_dataset({"annotations": []})


def test_ids():
  assert [ident(x) for x in (7, 7.0, "7", " a ", 7.5, True, None, [], {}, "", float("nan"), 10**30)] == [
    "7",
    "7",
    "7",
    "a",
    None,
    None,
    None,
    None,
    None,
    None,
    None,
    None,
  ]


def test_the_notes_command_has_the_notes_flags(tmp_path, monkeypatch, capsys):
  coco = make(tmp_path)
  words = ["--images", tmp_path / "images", "--check-format", "--split", "train:0.5,val:0.25,test:0.25", "--stratify"]
  words += ["--random-seed", "42", "--output-dir", tmp_path / "o"]
  script = Path(validate_dataset.__file__)
  command = [sys.executable, script, "--data", write(tmp_path, coco), *words]
  done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["test.json", "train.json", "val.json"]
  monkeypatch.setattr("sys.argv", ["validate_dataset", "--data", str(tmp_path / "no.json")])
  assert cli(validate_dataset.main)() == 2
  said = capsys.readouterr().err
  assert said.count("\n") == 1 and said.startswith("error: there is no")

"""Labeled pictures as people have them: masks on some objects alone, folders with parts, names that are there twice."""

import json
import shlex
from types import SimpleNamespace

import images_fixture as made
import images_student_fixture as squares
import numpy as np
import pytest

from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.evaluation.detections import Detections, by_masks, make_objects
from openpilot.tools.fair.images import evaluate, infer, store, train_detr, train_student
from openpilot.tools.fair.images.check import Check
from openpilot.tools.fair.images.dataset import open_dataset
from openpilot.tools.fair.images.soft import load_soft
from openpilot.tools.fair.images.predict import Found
from openpilot.tools.fair.images.score import confusion
from openpilot.tools.fair.images.evaluate import each_once, judge, match_classes, truth_of, with_masks
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.labels.placement import place_ids, place_picture
from openpilot.tools.fair.labels.sources import SourceOptions, open_sources
from openpilot.tools.fair.labels.sources.coco import is_crowd
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.options import parse
from openpilot.tools.lib.videowriter import VideoWriter

SPEC = InputSpec("rgb", 96, 96)


def parts_of(*paths, every=1):
  return [p for path in paths for p in open_sources([str(path)], SourceOptions(every=every), "pictures")]


def yolo_folder(folder, **splits):
  """splits: of each the seeds of its pictures, with a label each."""
  for split, seeds in splits.items():
    for k in seeds:
      for sub in ("images", "labels"):
        (folder / split / sub).mkdir(parents=True, exist_ok=True)
      made.picture(k).save(folder / split / f"images/{k}.png")
      (folder / split / f"labels/{k}.txt").write_text("0 .5 .5 .25 .5\n")
  lines = "".join(f"{s}: ../{s}/images\n" for s in splits)
  (folder / "data.yaml").write_text(f"names: [bag]\n{lines}")  # as Roboflow writes it
  return folder


def test_what_would_be_told_under_one_name_is_not_searched(tmp_path):
  for name in ("a/1.png", "a/1.jpg", "b/1.png", "b/2.png"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    made.picture(1).save(tmp_path / name)
  infer.check_names(parts_of(tmp_path / "a"), False)  # 1.png and 1.jpg are two names, and one name of a text file
  infer.check_names(parts_of(tmp_path / "b"), True)
  with pytest.raises(UserError, match=r"1\.jpg and .*1\.png would both be told as 1;"):
    infer.check_names(parts_of(tmp_path / "a"), True)
  with pytest.raises(UserError, match=r"a/1\.png and .*b/1\.png would both be told as 1\.png"):
    infer.check_names(parts_of(tmp_path / "a", tmp_path / "b"), False)
  with pytest.raises(UserError, match=r"b/2\.png is named twice"):
    infer.check_names(parts_of(tmp_path / "b", tmp_path / "b/2.png"), False)


@pytest.mark.parametrize("size", [(9000, 7), (7, 9000), (600, 1)])
def test_a_picture_that_is_thinner_than_half_a_pixel_is_one_pixel_thin(size):
  w, h = size
  rgb = np.full((h, w, 3), 200, np.uint8)
  matrix = SPEC.fit(w, h)
  placed, ids = place_picture(rgb, matrix, 96, 96, 0), place_ids(rgb[..., 0], matrix, 96, 96, 0)
  want = np.zeros((96, 96), bool)
  want[: 96 if h > w else 1, : 96 if w > h else 1] = True
  assert (SPEC.covered(w, h) == want).all()
  assert ((placed == 200).all(2) == want).all() and ((ids == 200) == want).all()


def half_masked(folder):
  """-> a data set of which one label of two has a mask, and the same with all masks, both checked."""
  coco = made.make(folder)
  some = Check(open_dataset(made.write(folder, coco), folder / "images"), True).run()
  for a in coco["annotations"]:
    x, y, w, h = a["bbox"]
    a["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
  return some, Check(open_dataset(made.write(folder, coco), folder / "images"), True).run()


def test_masks_are_judged_where_the_truth_has_them(tmp_path):
  some, whole = half_masked(tmp_path)
  args = evaluate.Options(model=tmp_path, data=tmp_path)
  truth, every = (match_classes(truth_of(x), list(made.NAMES), args) for x in (some, whole))
  found = [
    {k: a[k] for k in ("id", "image_id", "category_id", "bbox", "segmentation")} | {"score": 0.5 + 0.01 * a["id"]}
    for a in every["annotations"]
  ]
  masked = with_masks(truth)
  assert sum(not a["iscrowd"] for a in masked["annotations"]) == 4 and len(masked["annotations"]) == 8
  got = judge(masked, found, "segm", args)  # all is right: none of it is found where nothing is
  assert got["stats"]["ap"] == got["stats"]["ap50"] == 1 and got["mean_iou"] == 1
  assert {k: c["truths"] for k, c in got["classes"].items()} == {"bag": 2, "dent": 1, "label": 1}
  r = {
    "model": "m",
    "pictures": 4,
    "objects": 8,
    "classes": [],
    "score": 0.3,
    "at_score": dict.fromkeys(("precision", "recall", "f1")),
  }
  lines = evaluate.lines_of(r | {"bbox": {}, "segm": {"objects": 4, **got}})
  assert any("of 4 objects; 4 have no mask" in x for x in lines)


def test_a_store_judges_masks_where_the_truth_has_them():
  boxes = np.array([[-0.5, -0.5, 39.5, 39.5], [79.5, 39.5, 119.5, 79.5]], np.float32)
  drawn = np.zeros((2, 64, 128), bool)
  drawn[0, :10, :10], drawn[1, 10:20, 20:30] = True, True
  found = make_objects(boxes, [0, 0], [0.6, 0.9], rle=rle.encode(drawn))
  nothing = rle.encode(np.zeros((1, 64, 128), bool))
  truth = make_objects(boxes, [0, 0], rle=[rle.encode(drawn)[0], *nothing], boxed=np.array([False, True]))
  acc = Detections(["vehicle"], "segm")
  acc.add(found, by_masks(truth))
  assert acc.result()["ap"] == 1 and acc.result()["mask_iou"] == 1 and acc.coco()["ap"] == 1
  assert by_masks(truth).ignore.tolist() == [False, True] and not truth.ignore.any()
  assert by_masks(truth.take(np.array([0]))).ignore.tolist() == [False]


def test_a_folder_with_parts_is_judged_by_one_of_them(tmp_path, capsys):
  folder = yolo_folder(tmp_path / "y", train=(1, 2, 3), valid=(4, 5))
  assert [i["file_name"] for i in open_dataset(folder, judge=True).images] == [
    "valid/images/4.png",
    "valid/images/5.png",
  ]
  assert "judged by its part 'valid' alone" in capsys.readouterr().err
  assert len(open_dataset(folder).images) == 5
  folder = yolo_folder(tmp_path / "t", train=(1,), val=(2,), test=(3,))
  assert [i["file_name"] for i in open_dataset(folder, judge=True).images] == ["test/images/3.png"]
  (folder / "test/labels/3.txt").unlink()  # as of a test whose labels others keep
  assert [i["file_name"] for i in open_dataset(folder, judge=True).images] == ["val/images/2.png"]
  assert len(open_dataset(yolo_folder(tmp_path / "one", train=(1, 2)), judge=True).images) == 2


def learned(tmp_path, **more):
  said = store.fill(train_student.Options(output=tmp_path / "out", augment="plain", **more), SPEC, [])
  return said.labeled, said.held_out


def test_a_json_that_is_called_val_is_learned_from_where_it_is_all_there_is(tmp_path):
  squares.write(tmp_path / "a", 3)
  data = (tmp_path / "a/annotations.json").rename(tmp_path / "a/instances-val.json")
  assert learned(tmp_path, data=data) == (2, 1)


def test_pictures_to_judge_by_that_are_learned_from_are_said(tmp_path, capsys):
  folder = yolo_folder(tmp_path / "y", train=(1, 2, 3), valid=(4, 5))
  assert learned(tmp_path, data=folder) == (3, 2) and "also learned from" not in capsys.readouterr().err
  val = tmp_path / "y/only.yaml"
  val.write_text("names: [bag]\nval: valid/images\n")
  assert learned(tmp_path, data=folder, val=val) == (5, 2)
  assert "2 of 2 pictures to judge by are also learned from" in capsys.readouterr().err


def test_pictures_without_labels_are_left_out_where_data_yaml_says_so(tmp_path, capsys):
  folder = yolo_folder(tmp_path, train=(1, 2, 3))
  (folder / "train/labels/2.txt").unlink()
  assert len(open_dataset(folder).images) == 3  # as empty
  with open(folder / "data.yaml", "a") as f:
    f.write("skip_if_label_file_missing: true\n")
  assert len(open_dataset(folder).images) == 2
  assert "1 of 3 pictures are left out: train/images/2.png has no labels" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["check", "learn"])
def test_pictures_that_are_of_no_part_are_said(tmp_path, capsys, to):
  folder, every = yolo_folder(tmp_path / "y", train=(1,), val=(2,)), tmp_path / "all"
  every.mkdir()
  for k in (1, 2, 3):
    made.picture(k).save(every / f"{k}.png")
  if to == "check":
    assert len(open_dataset(folder, every).images) == 2
  else:
    assert sum(len(p.stills) for p in open_sources([str(folder)], SourceOptions(images=every))) == 2
  assert "1 of 3 pictures are left out: 3.png has labels in no part" in capsys.readouterr().err


def test_a_polygon_without_a_list_around_it_is_learned_from(tmp_path):
  data = squares.write(tmp_path / "a", 1)
  coco = json.loads(data.read_text())
  for a in coco["annotations"]:
    (a["segmentation"],) = a["segmentation"]
  data.write_text(json.dumps(coco))
  (part,) = open_sources([str(data)], SourceOptions())
  assert [m[0].ravel().tolist() for m in part.said(0).masks] == [a["segmentation"] for a in coco["annotations"]]


@pytest.mark.parametrize(
  "names, said",
  [
    ("[yes, no]", "takes a name for True; put names into quotes"),
    ("[a, 1.10]", "for 1.1;"),
    ("{0: a, 1: }", "for None;"),
  ],
)
def test_names_that_yaml_reads_as_something_else_are_not_renamed(tmp_path, names, said):
  folder = yolo_folder(tmp_path, train=(1, 2))
  (folder / "data.yaml").write_text(f"names: {names}\ntrain: train/images\n")
  for read in (open_dataset, lambda path: store.open_labeled(path, None, "")):
    with pytest.raises(UserError, match=said):
      read(folder)


@pytest.mark.parametrize("at", ["", "data.yaml"])
def test_a_data_yaml_without_names_is_said(tmp_path, at):
  folder = yolo_folder(tmp_path, train=(1, 2))
  (folder / "data.yaml").write_text("nc: 1\ntrain: train/images\n")
  with pytest.raises(UserError, match="describes no YOLO folder: it needs names"):
    store.open_labeled(folder / at, None, "")


@pytest.mark.parametrize("path, said", [("../elsewhere", True), ("/nowhere/else", True), (".", False), ("", False)])
def test_a_path_that_is_not_followed_is_said(tmp_path, capsys, path, said):
  folder = yolo_folder(tmp_path / "y", train=(1, 2))
  (tmp_path / "elsewhere").mkdir()
  (folder / "data.yaml").write_text(f"path: {path}\nnames: [bag]\ntrain: train/images\n")
  assert len(open_dataset(folder).images) == 2
  assert ("where pictures are looked for instead" in capsys.readouterr().err) == said


def test_a_number_that_is_text_is_said(tmp_path):
  data = squares.write(tmp_path / "a", 1)
  coco = json.loads(data.read_text())
  coco["images"][0]["height"] = "80"
  data.write_text(json.dumps(coco))
  with pytest.raises(UserError, match=r"an entry is wrong: '80' is no number.*images validate --fix"):
    open_sources([str(data)], SourceOptions())


@pytest.mark.parametrize("aliases, unknown", [(("red=flurb",), "zott"), (("red=flurb", "blue=zott"), "")])
def test_classes_that_the_teacher_of_unlabeled_pictures_does_not_know(tmp_path, monkeypatch, capsys, aliases, unknown):
  data, val = squares.write(tmp_path / "a", 4), squares.write(tmp_path / "b", 2, seed=1)
  squares.write(tmp_path / "c", 2, seed=2, labels=False)
  squares.register(monkeypatch)
  teacher = load_soft("colors", None, 0.4, ())
  args = {"data": data, "val": val, "unlabeled": tmp_path / "c/images", "alias": aliases, "augment": "plain"}
  family = train_student.Options(output=tmp_path / "f", student="d-fine-nano", **args)  # learns by its own loss
  store.fill(family, SPEC, [teacher])
  what = "'colors' has no name for 1 of 2 classes, and pictures that it alone labels teach that none of these is there"
  err = capsys.readouterr().err
  assert (f"{what}: {unknown}" in err) == bool(unknown) and ("has no name for" in err) == bool(unknown)
  said = store.fill(train_student.Options(output=tmp_path / "out", **args), SPEC, [teacher])
  assert "has no name for" not in capsys.readouterr().err
  # scores of the teacher say themselves of which classes they are
  clips = Clips(said.train, ["objects", "logits"], 1, said.prefer, classes=said.classes, ignore=True)
  told = {c.name.split(" frames")[0]: c.said["objects"].tells().tolist() for c in map(clips.read, range(len(clips)))}
  free = [known for name, known in told.items() if name.startswith("unlabeled")]
  assert len(told) == 2 and free == [[not unknown or n != unknown for n in said.classes.boxes]]
  assert all(known == [True, True] for name, known in told.items() if not name.startswith("unlabeled"))
  assert [unknown in line and "colors has no name" in line for line in clips.not_told()] == ([True] if unknown else [])


def test_what_is_left_out_of_an_evaluation_is_counted(tmp_path, monkeypatch, capsys):
  coco = made.make(tmp_path)
  coco["images"][0]["file_name"] = "gone.png"
  path = made.write(tmp_path, coco)
  nothing = Found(np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0, np.int64), (made.W, made.H))
  monkeypatch.setattr(evaluate, "Predictor", lambda *args: Nothing(nothing))
  r = evaluate.run(evaluate.Options(model=tmp_path, data=path, images=tmp_path / "images", output=tmp_path / "out"))
  assert r["pictures"] == 3 and r["objects"] == 6
  assert "mended here; left out are 1 of 4 pictures, 2 of 8 labels;" in capsys.readouterr().err


class Nothing:
  """A student that finds nothing."""

  head, names, has_masks, hash, bundle, path = "objects", list(made.NAMES), False, "", SimpleNamespace(name="m"), None

  def __init__(self, found):
    self.found = found

  def __call__(self, pictures):
    return [self.found for _ in pictures]


def test_the_command_after_a_transformer_starts_a_student(tmp_path):
  args = train_detr.Options(
    data=tmp_path / "a b.json",
    val=tmp_path / "v.json",
    images=tmp_path,
    val_images=tmp_path / "v",
    output=tmp_path / "exp",
    accept_license=("DINOv3",),
  )
  words = shlex.split(train_detr.next_command(args))
  assert words[:2] == ["images", "train-student"]
  told = parse(train_student.Options, None, "x", words[2:])
  assert (told.data, told.val, told.images, told.val_images) == (args.data, args.val, args.images, args.val_images)
  assert told.teacher_dir == args.output and told.accept_license == ("DINOv3",) and told.output != args.output


def test_a_class_that_is_a_crowd_alone_need_not_be_known(tmp_path):
  coco = made.make(tmp_path)
  for a in coco["annotations"]:
    a["iscrowd"] = int(a["category_id"] == 3)  # so that nothing is learned of it
  truth = truth_of(Check(open_dataset(made.write(tmp_path, coco), tmp_path / "images"), True).run())
  found = match_classes(truth, ["bag", "dent"], evaluate.Options(model=tmp_path, data=tmp_path))
  assert len(found["annotations"]) == 6 and not any(a["iscrowd"] for a in found["annotations"])


def test_what_is_called_unknown_counts_nowhere_in_an_evaluation(tmp_path):
  coco = made.make(tmp_path)
  coco["categories"][2]["name"] = "Ignore"
  checked = Check(open_dataset(made.write(tmp_path, coco), tmp_path / "images"), True).run()
  args = evaluate.Options(model=tmp_path, data=tmp_path)
  truth = match_classes(truth_of(checked), ["bag", "dent"], args)
  every = checked.annotations  # what is found: all that is there, what is unknown as a dent
  found = [
    {
      "id": k,
      "image_id": a["image_id"],
      "bbox": a["bbox"],
      "category_id": [0, 1, 1][a["category_id"] - 1],
      "score": 0.5,
    }
    for k, a in enumerate(every, 1)
  ]
  got = judge(truth, found, "bbox", args)
  assert got["stats"]["ap"] == 1 and {k: c["truths"] for k, c in got["classes"].items()} == {"bag": 3, "dent": 3}
  m = confusion(truth, found, 0.3)
  assert m.tolist() == [[3, 0, 0], [0, 3, 0], [0, 0, 0]]
  shown = each_once(truth["annotations"])
  assert len(shown) == 8 and sum(a["iscrowd"] for a in shown) == 2
  assert [a["category_id"] for a in shown if a["iscrowd"]] == [-1, -1]
  assert len({a["id"] for a in truth["annotations"]}) == len(truth["annotations"]) == 6 + 2 * 2


def test_a_pictures_name_is_told_to_the_letter(tmp_path):
  names = ["a  b.png", f"{'long' * 55}.png", "sub  dir/c.png"]
  for k, name in enumerate(names):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    made.picture(k).save(tmp_path / name)
  (part,) = parts_of(tmp_path)
  assert [infer.name_of(part, row) for row in range(3)] == names
  (alone,) = parts_of(tmp_path / names[0])
  assert infer.name_of(alone, 0) == names[0]


@pytest.mark.parametrize(
  "said, crowd",
  [(0, False), (1, True), (False, False), (True, True), (None, False), ("0", False), ("1", True), ("false", False)],
)
def test_a_crowd_may_be_written_as_a_text(said, crowd):
  assert is_crowd({"iscrowd": said}) is crowd and not is_crowd({})


def test_one_broken_video_of_a_folder_is_left_out(tmp_path, capsys):
  with VideoWriter(tmp_path / "a.mp4", 64, 48) as v:
    for _ in range(3):
      v.write(np.zeros((48, 64, 3), np.uint8))
  (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:200])
  (part,) = open_sources([str(tmp_path)], SourceOptions(), "pictures")
  assert part.path.name == "a.mp4" and "1 of 2 videos are left out" in capsys.readouterr().err
  (tmp_path / "a.mp4").unlink()
  with pytest.raises(UserError, match="no video of"):
    open_sources([str(tmp_path)], SourceOptions(), "pictures")

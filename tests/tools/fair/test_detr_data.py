"""What a detection transformer is fed with: labels, preprocessing, augmentation, batches, COCO's numbers."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from detr_models import options, write_yolo
from PIL import Image
from transformers.models.deformable_detr.image_processing_pil_deformable_detr import DeformableDetrImageProcessorPil
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

from openpilot.tools.fair.detr.augment import TINY, Changes, change, matrix, moved
from openpilot.tools.fair.detr.data import read_index, read_training
from openpilot.tools.fair.detr.found import metrics, numbered, rows_of
from openpilot.tools.fair.detr.pictures import Frame, to_pixels, to_relative
from openpilot.tools.fair.detr.samples import ByShape, Collate, Samples
from openpilot.tools.fair.images.check import Check
from openpilot.tools.fair.images.dataset import open_dataset
from openpilot.tools.fair.images.predict import find_bundle
from openpilot.tools.lib.errors import UserError

GOOD = ["0 0.5 0.5 0.2 0.4", "1 0.25 0.3 0.1 0.2"]
ODD = [
  "0 0.9 0.5 0.4 0.2",  # beyond the edge
  "1 0.1 0.1 0.3 0.1 0.2 0.4",  # a polygon
  "7 0.5 0.5 0.1 0.1",  # of no class
  "0 0.5 nan 0.1 0.1",
  "0 1.5 0.5 0.1 0.1",  # outside
  "0 0.5 0.5 0.0 0.1",  # empty
]


def test_yolo_is_read_as_the_check_reads_it(tmp_path):
  """The same boxes, and the same lines left out, as `images validate` has; pictures without labels stay."""
  folder = write_yolo(tmp_path, {"a": GOOD, "bb": [*GOOD, GOOD[0]], "ccc": ODD, "dddd": None, "eeeee": []})
  mine = read_index(folder, None)
  data = open_dataset(folder)
  theirs = Check(data).run()
  assert mine.names == ("person", "head") and mine.files == [p.name for p in theirs.pictures] and len(mine) == 5
  assert mine.counts.tolist() == [2, 2, 2, 0, 0]
  of = theirs.by_picture()
  for i, p in enumerate(theirs.pictures):
    want = sorted((a["category_id"], *a["bbox"]) for a in of[p.entry["id"]])
    got = sorted((a["category_id"], *a["bbox"]) for a in mine.annotations(i))
    np.testing.assert_allclose(np.array(got).reshape(-1, 5), np.array(want).reshape(-1, 5), atol=2e-3)
  a = mine.annotations(0)[0]
  assert a["bbox"] == pytest.approx([16, 9, 8, 12], abs=1e-5) and a["area"] == pytest.approx(96, abs=1e-3)
  assert a["iscrowd"] == 0 and set(a) == {"id", "image_id", "bbox", "area", "category_id", "iscrowd"}


def test_what_is_wrong_in_yolo_is_counted(tmp_path, capsys):
  folder = write_yolo(tmp_path, {"a": GOOD, "ccc": ODD, "dup": [GOOD[0], GOOD[0]]})
  (folder / "images" / "train" / "bad.png").write_bytes(b"no picture")
  mine = read_index(folder, None)
  assert len(mine) == 3 and mine.counts.tolist() == [2, 2, 1]
  assert "4 kinds of problems" in capsys.readouterr().err  # unreadable, lines, beyond, twice


def test_a_folder_s_own_val_is_held_out_and_coco_s_tenth(tmp_path):
  write_yolo(tmp_path / "y", {"a": GOOD, "b": GOOD}, split="train")
  write_yolo(tmp_path / "y", {"c": GOOD}, split="val")
  train, val = read_training(tmp_path / "y", None, None, None, 0)
  assert (train.files, val.files) == (["images/train/a.png", "images/train/b.png"], ["images/val/c.png"])
  o = options(tmp_path)
  whole = read_index(o.data, None)
  train, val = read_training(o.data, None, None, None, 3)
  assert len(train) + len(val) == len(whole) == 6 and len(val) == 1 and not set(train.files) & set(val.files)
  again = read_training(o.data, None, None, None, 3)[1]
  assert again.files == val.files


def test_a_val_that_is_not_there_is_said_and_one_that_is_learned_too(tmp_path, capsys):
  """As COCO128 comes: data.yaml names a val that is not beside it, or train again."""
  folder = write_yolo(tmp_path / "y", {"a": GOOD, "b": GOOD, "c": GOOD})
  said = "names: [person, head]\ntrain: images/train\n"
  (folder / "data.yaml").write_text(f"{said}val: images/val2017\n")
  train, val = read_training(folder, None, None, None, 0)
  err = capsys.readouterr().err
  assert "val names images/val2017, and there is no" in err and "it is left out" in err and "1 pictures are held" in err
  assert (len(train), len(val)) == (2, 1) and not set(train.files) & set(val.files)
  assert len(read_index(folder, None)) == 3
  (folder / "data.yaml").write_text(f"{said}val: images/train\n")
  train, val = read_training(folder, None, None, None, 0)
  assert train.files == val.files and "3 of 3 pictures to judge by are also learned" in capsys.readouterr().err


def test_val_of_other_classes_is_refused_and_of_another_order_numbered_anew(tmp_path):
  write_yolo(tmp_path / "a", {"a": GOOD})
  write_yolo(tmp_path / "b", {"b": GOOD}, names=("head", "person"))
  write_yolo(tmp_path / "c", {"c": GOOD}, names=("head", "cat"))
  train, val = read_training(tmp_path / "a", tmp_path / "b", None, None, 0)
  assert val.names == train.names and val.classes.tolist() == [1, 0]
  with pytest.raises(UserError, match=r"has classes that .* has not: cat"):
    read_training(tmp_path / "a", tmp_path / "c", None, None, 0)


@pytest.mark.parametrize("shape", [(1208, 1928), (1928, 1208), (100, 100), (200, 3000), (961, 960), (50, 120)])
def test_pictures_are_the_official_processor_s_and_boxes_come_back(shape, rng):
  """Landscape, portrait, square, panorama: resized as officially, boxes through padding and back to 1e-3 pixels."""
  h, w = shape
  frame = Frame(960, 1536) if max(shape) < 1500 else Frame(96, 154)
  official = DetrImageProcessorPil(size={"shortest_edge": frame.short, "longest_edge": frame.long})
  rgb = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((w, h)))
  low = rng.uniform(0, 0.7, (9, 2)) * [w, h]
  boxes = np.concatenate([low, rng.uniform(0.01, 0.3, (9, 2)) * [w, h]], 1)
  rows = [{"bbox": b.tolist(), "area": 1.0, "category_id": k % 2, "iscrowd": 0} for k, b in enumerate(boxes)]
  said = official(images=[rgb], annotations=[{"image_id": 0, "annotations": rows}], return_tensors="pt")
  want = said["pixel_values"][0]
  x = frame.resize(rgb)
  assert x.shape == want.shape == (3, *frame.fit(h, w))
  assert (x - want).abs().max() <= 1.6 / 255 / 0.224 and (x - want).abs().mean() < 0.3 / 255 / 0.224
  relative = to_relative(boxes, w, h)
  np.testing.assert_allclose(relative, said["labels"][0]["boxes"], atol=1e-6)
  np.testing.assert_allclose(to_pixels(relative, w, h), boxes, atol=1e-3)
  canvas = frame.canvas(*x.shape[1:])
  assert canvas[0] % 32 == canvas[1] % 32 == 0 and canvas[0] >= x.shape[1] and canvas[1] >= x.shape[2]
  # whatever the padding: what the network says is put back by the picture's size alone, as officially
  logits = torch.full((1, 9, 3), -9.0)
  logits[0, torch.arange(9), torch.arange(9) % 2] = torch.linspace(3, 6, 9)
  outputs = type("O", (), {"logits": logits, "pred_boxes": torch.from_numpy(relative)[None]})
  labels = [{"image_id": torch.tensor([4]), "orig_size": torch.tensor([h, w])}]
  for head, processor in (("detr", official), ("deformable", DeformableDetrImageProcessorPil())):
    post = processor.post_process_object_detection(outputs, 0.5, [(h, w)])[0]
    mine = [r for r in rows_of(logits, outputs.pred_boxes, labels, head)[0] if r["score"] > 0.5]
    order = np.argsort(-post["scores"].numpy())
    xyxy = post["boxes"].numpy()[order]
    got = np.array([r["bbox"] for r in mine])
    np.testing.assert_allclose(got[:, :2], np.clip(xyxy[:, :2], 0, [w, h]), atol=2e-3)
    assert [r["category_id"] for r in mine] == post["labels"][order].tolist() and mine[0]["image_id"] == 4
    np.testing.assert_allclose(sorted(map(tuple, got)), sorted(map(tuple, boxes)), atol=2e-3)


def test_batches_are_padded_at_the_right_and_below(tmp_path, rng):
  rows = {"a": GOOD, "bb": GOOD}
  write_yolo(tmp_path, rows, size=(80, 50))
  write_yolo(tmp_path, {"tall": GOOD}, size=(50, 80))
  data = read_index(tmp_path, None)
  for pad, canvas, large in (("orientation", [(64, 96), (96, 64)], 96), ("batch", [(64, 64), (64, 64)], 64)):
    frame = Frame(40, 96, pad, 32)
    samples, join = Samples(data, frame), Collate(frame)
    wide, tall = join([samples[0], samples[1]]), join([samples[2]])
    assert wide["pixel_values"].shape[2:] == canvas[0] and tall["pixel_values"].shape[2:] == canvas[1]
    both = join([samples[0], samples[2]])
    assert both["pixel_values"].shape[2:] == (large, large)
    for k, i in enumerate((0, 2)):
      h, w = samples[i]["size"]
      assert both["pixel_mask"][k, :h, :w].all() and both["pixel_mask"][k].sum() == h * w
      torch.testing.assert_close(both["pixel_values"][k, :, :h, :w], samples[i]["pixels"])
      assert not both["pixel_values"][k][:, ~both["pixel_mask"][k]].any()
      torch.testing.assert_close(both["labels"][k]["boxes"], samples[i]["labels"]["boxes"])  # padding moves none
  order = list(ByShape(samples, 2, 5))
  assert sorted(order) == [0, 1, 2] and set(order[:2]) == {0, 1}


def test_each_epoch_has_batches_of_one_orientation_in_another_order(rng):
  class Data:
    sizes = np.where(rng.random((41, 1)) < 0.4, [[9, 5]], [[5, 9]])

    def __len__(self):
      return 41

  sampler = ByShape(Samples(Data(), Frame()), 4, 1)
  first = list(sampler)
  sampler.set_epoch(1)
  assert sorted(first) == list(range(41)) and list(sampler) != first and sampler.samples.epoch == 1
  kinds = [{bool(Data.sizes[i, 0] > Data.sizes[i, 1]) for i in first[k : k + 4]} for k in range(0, 41, 4)]
  assert sum(len(k) == 2 for k in kinds) <= 2


def test_affine_moves_boxes_with_the_picture(rng):
  """A white box on black: after the change the pixels are where the box is said to be."""
  c = Changes(flip=0.5, affine=1.0, color=0.0)
  for _ in range(5):
    rgb = np.zeros((120, 160, 3), np.uint8)
    box = np.array([[60.0, 40.0, 30.0, 20.0]])
    rgb[40:60, 60:90] = 255
    out = change(rgb, box, c, rng)
    on = (out.rgb.astype(int) - 128).min(2) > 0
    ys, xs = np.flatnonzero(on.any(1)), np.flatnonzero(on.any(0))
    x, y, w, h = out.boxes[0]
    np.testing.assert_allclose([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], [x, y, x + w, y + h], atol=1.6)


def test_tiny_boxes_are_never_lost_and_redraws_are_counted(rng):
  """Heads at the very edge, which a plain draw loses often: with redraws none is, and each redraw is counted."""
  c, (w, h) = Changes(flip=0.0, affine=1.0, color=0.0), (200, 150)
  rgb, redrawn, lost_plainly = np.zeros((h, w, 3), np.uint8), 0, 0
  corners = [[0, 0, 3, 4], [w - 3, h - 4, 3, 4], [0, 70, 3, 3], [100, 60, 80, 60]]
  for _ in range(60):
    seed = int(rng.integers(2**31))
    plain = np.random.default_rng(seed)
    plain.random(2)  # flip and affine
    _, share = moved(np.array(corners, float), matrix(c, w, h, plain), w, h)
    lost = bool((share[:3] < 0.5).any())
    out = change(rgb, np.array(corners, float), c, np.random.default_rng(seed))
    assert set(out.kept.tolist()) >= {0, 1, 2} and (out.boxes[:, 2:] > 0).all()
    assert bool(out.redrawn) == lost and (out.still <= (out.redrawn == 10))
    redrawn, lost_plainly = redrawn + out.redrawn, lost_plainly + lost
  assert redrawn >= lost_plainly > 10 and TINY == 32


def test_evaluation_is_not_random_and_epochs_are(tmp_path):
  data = read_index(options(tmp_path).data, None)
  frame = Frame(64, 96)
  plain = Samples(data, frame)
  first = plain[0]["pixels"]
  plain.set_epoch(3)
  assert torch.equal(plain[0]["pixels"], first)
  varied = Samples(data, frame, Changes(affine=1.0), seed=1)
  one = varied[0]
  assert torch.equal(varied[0]["pixels"], one["pixels"])
  varied.set_epoch(1)
  assert not torch.equal(varied[0]["pixels"], one["pixels"])


def test_numbers_are_pycocotools(rng):
  images = [{"id": i, "file_name": str(i), "width": 400, "height": 300} for i in range(6)]
  truth = {"images": images, "annotations": [], "categories": [{"id": 0, "name": "person"}, {"id": 1, "name": "a b"}]}
  by_picture = {i: [] for i in range(6)}
  for i in range(6):
    for _ in range(30):
      side = float(rng.choice([10, 50, 120]))
      box = [*rng.uniform(0, [400 - side, 300 - side]), side, side]
      k = int(rng.integers(2))
      row = {"image_id": i, "category_id": k, "bbox": box, "area": side * side, "iscrowd": 0}
      truth["annotations"].append({"id": len(truth["annotations"]) + 1, **row})
      moved_ = (np.array(box) + rng.normal(0, side / 12, 4)).clip(0.5).tolist()
      by_picture[i].append({"image_id": i, "category_id": k, "bbox": moved_, "score": float(rng.random())})
  a, b = (metrics(truth, numbered(by_picture), x) for x in ("faster_coco_eval", "pycocotools"))
  plan = {"map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_1", "mar_10", "mar_100"}
  assert set(a) >= plan | {"mar_small", "mar_medium", "mar_large", "map_person", "mar_100_a_b"}
  assert a.keys() == b.keys() and 0.1 < a["map"] < 0.9
  for k in a:
    assert a[k] == pytest.approx(b[k], abs=1e-12), k
  assert json.dumps(a)


def test_a_class_that_is_called_as_one_of_cocos_numbers(tmp_path):
  """The AP of the class "small" was logged as that of small objects, and that of "50" as AP50."""
  names = ("50", "small", "a b", "a_b")
  boxes = [[10.0, 10.0, 50.0, 40.0], [100.0, 10.0, 60.0, 40.0], [10.0, 100.0, 50.0, 40.0], [100.0, 100.0, 60.0, 40.0]]
  images = [{"id": 0, "file_name": "x.png", "width": 320, "height": 320}]
  rows = [{"id": k + 1, "image_id": 0, "category_id": k, "bbox": b, "area": b[2] * b[3]} for k, b in enumerate(boxes)]
  truth = {
    "images": images,
    "annotations": [{**r, "iscrowd": 0} for r in rows],
    "categories": [{"id": k, "name": n} for k, n in enumerate(names)],
  }
  found = [{**r, "score": 0.9} for r in rows if r["category_id"] in (1, 3)]
  said = metrics(truth, found)
  assert said["map"] == said["map_50"] == pytest.approx(0.5) and said["map_small"] == -1
  assert said["map_medium"] == pytest.approx(0.5) and said["mar_100"] == pytest.approx(0.5)
  assert [said[f"map_{k}"] for k in ("50_", "small_", "a_b", "a_b_")] == pytest.approx([0, 1, 0, 1])


@pytest.mark.parametrize("files", [("detr.json",), ("metadata.json", "teacher_config.yaml")])
def test_a_teachers_folder_is_no_bundle_that_export_could_make(tmp_path, files):
  for name in files:
    (tmp_path / name).touch()
  with pytest.raises(
    UserError, match=r"holds no bundle: it is a teacher, for `label --teachers` and .*--teacher-dir`$"
  ):
    find_bundle(tmp_path)

"""Students of labeled pictures: what they learn from, what the run keeps, and the bundle that comes out."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import images_student_fixture as squares
import numpy as np
import pytest
import torch
import yaml

from openpilot.selfdrive.modeld.fair.bundle import DEFAULT, MODELS_DIR, load_bundle
from openpilot.tools.fair.bundle.replace import check_out
from openpilot.tools.fair.distillation.initial import of_input
from openpilot.tools.fair.distillation.look import Look
from openpilot.tools.fair.distillation.sampling import shares
from openpilot.tools.fair.images import learning, train_student
from openpilot.tools.fair.images.aimed import Aimed, window
from openpilot.tools.fair.images.learning import begun, bundle_of
from openpilot.tools.fair.images.predict import Predictor
from openpilot.tools.fair.images.train_student import Options
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.labels.sources import SourceOptions, open_sources
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.fair.students.backbone import other_stem
from openpilot.tools.fair.students.onnx_import import bundle_state
from openpilot.tools.lib.errors import UserError

SMALL = {"size": "nano", "picture_size": 96, "batch_size": 3, "steps": 2, "workers": 0}


def logged(folder):
  lines = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
  return {k for k in lines[-1]["val"] if "/" in k}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """From labels with masks and from a teacher, on labeled and unlabeled pictures: all four parts. -> folder."""
  root = tmp_path_factory.mktemp("squares")
  data, val = squares.write(root / "a", 4), squares.write(root / "b", 2, seed=1)
  squares.write(root / "c", 3, seed=2, labels=False)
  with pytest.MonkeyPatch.context() as m:
    squares.register(m)
    more = {"teachers": "colors", "untuned": True, "alias": ("red=flurb", "blue=zott")}
    args = Options(data=data, val=val, output=root / "made", unlabeled=root / "c/images", **more, **SMALL)
    torch.set_num_threads(1)
    bundle = train_student.run(args)
  assert bundle == root / "made/made"
  return root / "made"


def test_all_four_parts_are_learned_and_the_config_says_them(trained):
  parts = {"objects/heat", "objects/box", "objects/giou", "objects/mask", "objects/dice"}
  assert logged(trained) == parts  # nobody scores what is held out
  told = yaml.safe_load((trained / "distillation_config.yaml").read_text())
  assert told["class_mapping"] == {0: "zott", 1: "flurb"} and told["teachers"] == ["colors"]
  weights = {"detection": 0.3, "segmentation": 0.3, "logit": 0.2, "feature": 0.2}
  assert told["distillation"]["loss_weights"] == weights
  assert told["data"] == {"pictures": 4, "unlabeled": 3, "val": 2, "license": "MIT"}
  config = json.loads((trained / "config.json").read_text())
  assert config["tasks"] == ["objects", "logits", "features"]
  assert config["parts"]["objects/heat"] == 0.3 and config["parts"]["features/gram"] == 0.2
  state = torch.load(trained / "last.pt", weights_only=True)
  assert state["model"]["projector.layers.0.weight"].shape == (4, 56, 1, 1) and state["model"]["standardiser.scale"] > 0


@pytest.mark.parametrize(
  "share, free, weights",
  [(0.5, 400, (1, 60 / 400)), (0.5, 30, (1, 1)), (0.75, 400, (1, 3 * 60 / 400)), (0.5, 0, (1, 1)), (1.0, 400, (0, 1))],
)
def test_unlabeled_pictures_are_a_share_of_what_is_seen(share, free, weights):
  said = SimpleNamespace(labeled=60, unlabeled=free)
  labeled, more = learning.picture_weights(said, share)
  assert (labeled, more) == pytest.approx(weights)
  assert more * free / (60 * labeled + more * free) <= share + 1e-9


def test_an_epoch_holds_as_many_of_them(trained, tmp_path):
  data = Look(trained / "labels/train")
  names = sorted(data.segments)
  (said,) = shares(names, np.array([4, 3]), ["unlabeled*=0.444444"])
  assert names == ["train--0", "unlabeled--0"] and said["share"] == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize(
  "more, said",
  [
    ({}, "images evaluate out/a/a --data train.json"),
    ({"images": Path("a b")}, "images evaluate out/a/a --data train.json --images 'a b'"),
    ({"images": Path("p"), "val": Path("val.json")}, "images evaluate out/a/a --data val.json --images p"),
    ({"val": Path("v.json"), "val_images": Path("w")}, "images evaluate out/a/a --data v.json --images w"),
    ({"export": False}, "export out/a --output out/a/a"),
  ],
)
def test_the_command_to_type_next_finds_the_pictures(more, said, capsys):
  args = Options(data=Path("train.json"), output=Path("out/a"), **more)
  learning.say_next(args, Path("out/a/a" if args.export else "out/a"))
  assert capsys.readouterr().out == f"next\n  tools/op.sh {said}\n"


def test_the_store_holds_the_teachers_answers_once(trained):
  look = Look(trained / "labels/train")
  assert {k: set(v) for k, v in look.segments.items()} == {
    "train--0": {"frames", "labeled", "colors"},
    "unlabeled--0": {"frames", "colors"},
  }
  colors = look.segments["train--0"]["colors"]
  sure, every = colors.table("boxes"), colors.table("boxes_scores")
  assert len(sure) == 12 and len(every) == 24 and min(every["score"].to_numpy()) < 0.2
  own = look.segments["train--0"]["labeled"].table("objects")
  a, b = (np.sort(np.stack([t[k].to_numpy() for k in ("x0", "y0", "x1", "y1")], 1), 0) for t in (sure, own))
  np.testing.assert_allclose(a, b, atol=0.01)


def test_the_bundle_tells_the_datas_classes_and_has_one_input(trained):
  bundle = load_bundle(trained / "made")
  (graph,) = bundle.graphs
  assert [i["name"] for i in graph["inputs"]] == ["frame"] and graph["inputs"][0]["shape"] == [1, 3, 96, 96]
  outputs = {o["name"]: o for o in graph["outputs"]}
  assert set(outputs) == {"objects_heat", "objects_box", "objects_coef", "objects_proto"}  # no identity was taught
  assert outputs["objects_heat"]["classes"] == ["zott", "flurb"]
  card = (trained / "made/README.md").read_text()
  assert "not tuned on this data: colors" in card
  assert "\n`tools/op.sh images train-student --output " in card and "routes" not in card
  found = Predictor(trained, score=0.01)([np.zeros((50, 70, 3), np.uint8)])[0]
  assert found.boxes.shape == (len(found.scores), 4) and found.size == (70, 50)


def test_what_comes_out_lies_where_it_is_in_the_picture(trained):
  """A picture of 192 x 144 is halved into 96 x 72 of the input; one object of the second class."""
  p = Predictor(trained, score=0.3)
  out = {k: np.zeros_like(v) for k, v in p.run(p.frame(np.zeros((144, 192, 3), np.uint8))).items()}
  out["objects_heat"][:] = -9
  out["objects_heat"][0, 1, 4, 6] = 3  # its cell's center is at the input's pixel 51.5, 35.5
  out["objects_box"][0, :, 4, 6] = 20, 10, 12, 24  # left, top, right, bottom
  out["objects_coef"][0, 0, 4, 6] = 1
  out["objects_proto"][0, 0] = np.where(np.arange(24) < 12, 1, -1)  # the left half of the picture
  (found,) = [p.decode(out, (192, 144))]
  assert found.classes.tolist() == [1] and p.names == ["zott", "flurb"]
  assert found.scores[0] == pytest.approx(1 / (1 + np.exp(-3)))
  np.testing.assert_allclose(found.boxes, [[64, 52, 128, 120]])
  mask = rle.decode(found.masks[0], 144, 192)
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  assert (rows.min(), rows.max() + 1) == (52, 120) and (columns.min(), columns.max() + 1) == (64, 96)
  assert mask[52:120, 64:96].all()


def told(path, out, **more):
  from openpilot.tools.fair.images import infer

  return infer.run(infer.Options(model=path, paths=(str(path.parent / "c/images"),), output=out, score=0.005, **more))


def test_inference_writes_the_same_in_all_formats(trained, tmp_path):
  out = told(trained, tmp_path / "a", format=("coco", "yolo", "csv"), visualize=True, batch_size=2)
  coco = json.loads((out / "predictions.json").read_text())
  assert coco == json.loads((told(trained, tmp_path / "b", batch_size=1) / "predictions.json").read_text())
  assert [i["file_name"] for i in coco["images"]] == ["2_0.png", "2_1.png", "2_2.png"] and coco["annotations"]
  assert coco["categories"] == [{"id": 1, "name": "zott"}, {"id": 2, "name": "flurb"}]
  lines = (out / "predictions.csv").read_text().splitlines()
  assert lines[0] == "picture,class,score,x0,y0,x1,y1" and len(lines) == 1 + len(coco["annotations"])
  yolo = [x.split() for i in range(3) for x in (out / f"labels/2_{i}.txt").read_text().splitlines()]
  for a, line, y in zip(coco["annotations"], lines[1:], yolo, strict=True):
    x0, y0, w, h = a["bbox"]
    name, cls, score, *box = line.split(",")
    assert name == f"2_{a['image_id'] - 1}.png" and cls == ("zott", "flurb")[a["category_id"] - 1]
    np.testing.assert_allclose([float(v) for v in box], [x0, y0, x0 + w, y0 + h], atol=0.01)
    assert int(y[0]) == a["category_id"] - 1 and float(score) == pytest.approx(a["score"], abs=1e-5)
    want = [(x0 + w / 2) / squares.W, (y0 + h / 2) / squares.H, w / squares.W, h / squares.H]
    np.testing.assert_allclose([float(v) for v in y[1:5]], want, atol=1e-4)
    assert rle.decode(a["segmentation"]["counts"], squares.H, squares.W).shape == (squares.H, squares.W)
  assert sorted(p.name for p in (out / "pictures").iterdir()) == ["2_0.jpg", "2_1.jpg", "2_2.jpg"]


def test_a_video_is_read_frame_by_frame(trained, tmp_path):
  from openpilot.tools.fair.images import infer
  from openpilot.tools.lib.videowriter import VideoWriter

  with VideoWriter(tmp_path / "v.mp4", 96, 80) as v:
    for i in range(5):
      v.write(squares.picture(np.random.default_rng(i))[0])
  out = infer.run(
    infer.Options(model=trained, paths=(str(tmp_path / "v.mp4"),), output=tmp_path / "o", every=2, visualize=True)
  )
  images = json.loads((out / "predictions.json").read_text())["images"]
  assert [i["file_name"] for i in images] == ["v_000000.jpg", "v_000002.jpg", "v_000004.jpg"]
  assert (out / "v.mp4").stat().st_size > 0


def test_evaluation_of_a_trained_student(trained, capsys):
  from openpilot.tools.fair.images import evaluate

  r = evaluate.run(evaluate.Options(model=trained, data=trained.parent / "b/annotations.json", score=0.05))
  assert r["pictures"] == 2 and r["objects"] == 6 and r["classes"] == ["zott", "flurb"]
  assert {"bbox", "segm"} <= r.keys() and 0 <= r["bbox"]["stats"]["ap50"] <= 1
  assert sum(map(sum, r["confusion"][:2])) == 6
  assert json.loads((trained / "evaluation/evaluation.json").read_text()) == json.loads(json.dumps(r))
  assert "AP50" in capsys.readouterr().out
  other = json.loads((trained.parent / "b/annotations.json").read_text())
  other["categories"][0]["name"] = "cat"
  (trained.parent / "b/other.json").write_text(json.dumps(other))
  args = {"model": trained, "data": trained.parent / "b/other.json"}
  with pytest.raises(UserError, match=r"labels cat, and the student tells zott, flurb apart"):
    evaluate.run(evaluate.Options(**args))
  same = evaluate.run(evaluate.Options(**args, alias=("cat=zott",), score=0.05, output=trained / "other"))
  assert same["bbox"] == r["bbox"] and same["confusion"] == r["confusion"]


def test_students_take_turns_in_a_benchmark(trained, tmp_path, capsys):
  from openpilot.tools.fair.images import benchmark

  rows = benchmark.run(benchmark.Options(models=(trained, trained), rounds=2, json=tmp_path / "b.json"))
  assert [r["model"] for r in rows] == ["made", "made"] and rows == json.loads((tmp_path / "b.json").read_text())
  assert all(0 < r["network_ms"]["p50"] <= r["whole_ms"]["p50"] for r in rows) and "96x96" in capsys.readouterr().out


def test_the_run_starts_again_from_its_folder(trained):
  from openpilot.tools.lib.options import parse

  again = parse(Options, None, "x", ["--config", str(trained)])
  assert again.teachers == "colors" and again.steps == 2 and again.unlabeled.name == "images"


def test_a_part_of_weight_0_is_not_computed_and_a_half_counts_half():
  from openpilot.tools.fair.distillation.distiller import Distiller

  class Fixed(torch.nn.Module):
    def forward(self, frame):
      return {"detector_logits": torch.zeros(1, 2, 1), "detector_boxes": torch.full((1, 2, 4), 0.5)}

  objects = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "cls": torch.tensor([0]), "score": torch.ones(1)}]
  batch = {"frame": torch.zeros(1), "valid": torch.ones(1, 16, 16, dtype=torch.bool), "objects": objects}

  def parts(weights):
    return Distiller(Fixed(), ["detector"], {}, classes=squares_classes(), parts=weights)(batch)

  full, less = parts({}), parts({"detector/box": 0.0, "detector/class": 0.5})
  assert set(full) - set(less) == {"detector/box"}
  assert less["detector/class"] == full["detector/class"] / 2 and less["detector/giou"] == full["detector/giou"]
  assert less["total"] == less["detector/class"] + less["detector/giou"]


def squares_classes():
  from openpilot.tools.fair.spec import Class, ClassSet

  return ClassSet("pictures", (Class("zott", maps=False, boxes=True),))


@pytest.mark.parametrize(
  "more, says",
  [
    ({"teachers": "yolox-nano"}, "--untuned"),
    ({"teachers": "a", "teacher_dir": Path("x")}, "give one of them"),
    ({"unlabeled": Path("x")}, "by a teacher alone"),
    ({"focal": 900.0}, "--input model-frame"),
    ({"picture_size": 100}, "multiple of 32"),
    ({"student": "yolov8n-seg"}, "AGPL-3.0"),
    ({"student": "lanes-nano"}, "finds no objects"),
    ({"epochs": 0}, "at least 1"),
    ({"unlabeled_share": 1.5}, "1 at most"),
    ({"unlabeled_share": 1.0}, "--unlabeled"),
    ({"lr": float("nan")}, "above 0"),
    ({"teacher_dir": Path("nowhere")}, "train-teacher"),
    ({"alias": ("red",)}, "NAME=CLASS"),
    ({"alias": ("red=cat",)}, "zott, flurb"),
    ({"weight": ("x=1",)}, "PART=NUMBER"),
  ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(more, says, tmp_path):
  data = squares.write(tmp_path / "a", 2)
  with pytest.raises(UserError, match=says) as e:
    train_student.run(Options(data=data, output=tmp_path / "out", **{**SMALL, **more}))
  assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_a_teacher_that_knows_none_of_the_classes(tmp_path, monkeypatch):
  squares.register(monkeypatch)
  data = squares.write(tmp_path / "a", 2)
  with pytest.raises(UserError, match=r"says blue, green, red, and the data's classes are zott, flurb; .*--alias"):
    train_student.run(Options(data=data, output=tmp_path / "out", teachers="colors", untuned=True, **SMALL))


def part_of(path):
  return open_sources([str(path)], SourceOptions())[0]


def test_pictures_of_a_known_focal_length_show_things_as_large_as_the_view_does(tmp_path):
  """A square of side s at distance d is f s / d pixels; in the view of focal length 910 it is 910 / f of that."""
  part = part_of(squares.write(tmp_path / "a", 3))
  spec, focal = InputSpec(), 400.0
  aimed = Aimed(part, spec, focal)
  _, _, w, h = window(squares.W, squares.H, focal, spec)
  assert (w, h) == (round(512 * 400 / 910), round(256 * 400 / 910))
  for row, rgb in aimed.read([0, 1, 2]):
    before, said = part.said(row), aimed.said(row)
    assert rgb.shape == (h, w, 3) and aimed.size(row) == (w, h)
    assert len(said.boxes) <= len(before.boxes) and len(said.masks) == len(said.boxes)
    for box, cls, mask in zip(said.boxes, said.cls, said.masks, strict=True):
      color = np.array(squares.COLORS[part.carries.boxes[int(cls)]])
      x0, y0, x1, y1 = np.round(box + 0.5).astype(int)
      assert (rgb[y0:y1, x0:x1] == color).all()
      own = np.concatenate(mask)
      assert own.min(0).tolist() <= [x0, y0] and (own.max(0) >= [x1, y1]).all()
  scale = spec.fit(*aimed.size(0))[0, 0]
  assert scale == pytest.approx(910 / 400, rel=0.01)


def test_run_lengths_move_with_the_window(tmp_path):
  aimed = Aimed(part_of(squares.write(tmp_path / "a", 1)), InputSpec(), 400.0)
  mask = np.zeros((squares.H, squares.W), bool)
  mask[30:50, 5:60] = True
  x, y, w, h = window(squares.W, squares.H, 400.0, InputSpec())
  said = {"size": [squares.H, squares.W], "counts": rle.encode(mask[None])[0]}
  moved = aimed.moved(said, x, y, w, h)
  for row in range(h):
    for column in range(w):
      inside = 0 <= row + y < squares.H and 0 <= column + x < squares.W
      assert moved[row, column] == (inside and mask[row + y, column + x])


@pytest.mark.slow
def test_a_student_of_model_frames_runs_in_fairmodeld(tmp_path):
  """Its bundle is taken by the runtime as any other; scale is varied, since nobody says the camera's focal length."""
  from openpilot.selfdrive.modeld.fair.model import FairModel

  data = squares.write(tmp_path / "a", 3)
  more = {**SMALL, "steps": 1, "batch_size": 1}
  bundle = train_student.run(
    Options(data=data, output=tmp_path / "signs", input="model-frame", augment="plain", **more)
  )
  config = json.loads((tmp_path / "signs/config.json").read_text())
  assert config["zoom"] == [0.4, 2.2] and config["input"]["kind"] == "model_frame"
  assert FairModel(load_bundle(bundle), runner="onnx").bundle.name == "signs"
  (found,) = Predictor(bundle, score=0.001)([squares.picture(np.random.default_rng(0))[0]])
  assert found.size == (squares.W, squares.H) and len(found.masks) == len(found.scores)


@pytest.mark.slow
def test_a_student_of_pictures_starts_from_a_bundle_of_model_frames(tmp_path, capsys):
  """All but the layers that do not fit, and that is said; a learning rate of nearly nothing leaves them as they are."""
  data = squares.write(tmp_path / "a", 3)
  more = {**SMALL, "steps": 1, "batch_size": 1, "augment": "plain", "lr": 1e-12}
  frames = train_student.run(Options(data=data, output=tmp_path / "frames", input="model-frame", **more))
  capsys.readouterr()
  train_student.run(Options(data=data, output=tmp_path / "rgb", init=(str(frames),), export=False, **more))
  said = capsys.readouterr()
  assert "it sees model_frame, and rgb is learned now" in said.err and "tensors start anew" in said.out
  before, now = (torch.load(tmp_path / k / "best.pt", weights_only=True)["ema"] for k in ("frames", "rgb"))
  for k in (f"student.objects.{part}.weight" for part in ("heat", "box", "coef", "proto")):
    torch.testing.assert_close(now[k], before[k], rtol=2e-3, atol=1e-4)  # halves of the file
  stem = "student.backbone.net.conv_stem.weight"
  seen = bundle_state(frames, torch.zeros(2, 6, 128, 256, dtype=torch.uint8))["ema"][stem]
  torch.testing.assert_close(now[stem], other_stem(seen), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "said, student, start",
  [
    ({}, "objects-small", DEFAULT),
    ({}, "detector-small", DEFAULT),
    ({}, "objects-nano", "random"),  # another size than the one that ships
    ({"init": ("none",)}, "objects-small", "random"),
    ({"init": ("none",), "pretrained": True}, "objects-small", ""),
    ({"init": ("out/other",)}, "objects-small", ""),
    ({"backbone": "mobilenetv4_conv_small"}, "objects-small", "random"),
    ({"pretrained": True}, "objects-small", ""),
    ({}, "d-fine-small", ""),
  ],
)
def test_what_a_student_starts_from_where_nobody_says_it(said, student, start, tmp_path, capsys):
  args = Options(data=tmp_path, output=tmp_path, **said)
  now, out = begun(args, student), capsys.readouterr().out
  if start == DEFAULT:
    assert now == replace(args, init=(str(MODELS_DIR / DEFAULT),), backbone="mobilenetv2_100_same")
  else:
    assert now == replace(args, init=() if args.init == ("none",) else args.init)
  assert out.startswith(f"start        {start}") if start else not out


def test_a_first_layer_is_said_to_be_translated_where_it_is(capsys):
  """Not that of a part alone, nor of another backbone, which is not taken."""
  frames, stem = InputSpec().to_dict(), "student.backbone.net.conv_stem.weight"
  taken = {stem: torch.ones(4, 6, 3, 3), "student.objects.heat.weight": torch.ones(1, 4, 1, 1)}
  seen = of_input({"input": frames, "ema": taken}, InputSpec("rgb", 96, 96), "--init a")["ema"]
  assert seen[stem].shape == (4, 3, 3, 3) and seen.keys() == taken.keys()
  assert "its first layer is translated" in capsys.readouterr().err
  head = {k: v for k, v in taken.items() if k != stem}
  assert of_input({"input": frames, "ema": head}, InputSpec("rgb", 96, 96), "--init b")["ema"] == head
  said = capsys.readouterr().err
  assert "it sees model_frame, and rgb is learned now" in said and "translated" not in said


def test_a_run_that_goes_on_keeps_its_backbone(tmp_path):
  args = Options(data=tmp_path, output=tmp_path, resume=True)
  assert begun(args, "objects-small") == args
  (tmp_path / "config.json").write_text('{"backbone": "mobilenetv2_100_same"}')
  assert begun(args, "objects-small") == replace(args, backbone="mobilenetv2_100_same")
  (tmp_path / "config.json").write_text("[")
  assert begun(args, "objects-small") == args


def test_other_labels_go_on_from_the_student_that_is_there(tmp_path, capsys):
  args = Options(data=tmp_path, output=tmp_path)
  (tmp_path / "config.json").write_text('{"backbone": null}')
  (tmp_path / "last.pt").touch()
  assert begun(args, "objects-small") == args == begun(replace(args, init=("none",)), "objects-small")
  assert not capsys.readouterr().out


def test_without_the_bundle_that_ships_it_starts_from_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(learning, "MODELS_DIR", tmp_path / "models")
  args = Options(data=tmp_path, output=tmp_path)
  assert begun(args, "objects-small") == args


@pytest.mark.parametrize(
  "typed, ours",
  [
    (["--model", "m", "--images", "a", "b", "--output", "o"], ["m", "a", "b", "--output", "o"]),
    (["--output", "o", "--images=a", "--model=m", "--visualize"], ["m", "a", "--output", "o", "--visualize"]),
    (["--data", "d", "--metrics", "mAP", "IoU", "--model", "m"], ["m", "--data", "d", "--metrics", "mAP", "IoU"]),
  ],
)
def test_the_notes_flags(typed, ours):
  from openpilot.tools.fair.grounded_sam.words import in_our_words

  assert in_our_words(typed, ("--model", "--images")) == ours


def test_the_notes_gpu_is_cudas(monkeypatch):
  from openpilot.tools.fair.grounded_sam.words import in_our_words

  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
  assert in_our_words(["--data", "d", "--gpu", "1", "--epochs", "3"]) == ["--data", "d", "--epochs", "3"]
  assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.parametrize(
  ("folder", "name"),
  [
    ("pedestrian", "pedestrian"),
    ("Pedestrians v2", "pedestrians-v2"),
    ("mein Schüler", "mein-sch-ler"),
    ("_run", "run"),
    ("___", "student"),
    ("x" * 80, "x" * 64),
  ],
)
def test_a_student_in_a_folder_of_any_name_has_a_name_that_a_bundle_may_have(tmp_path, folder, name):
  made = bundle_of(tmp_path / folder)
  assert made == tmp_path / folder / name
  check_out(made, tmp_path / folder)

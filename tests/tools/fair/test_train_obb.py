"""images train-obb from data to bundle, what infer and evaluate make of it, and DINOv3 as its teacher."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oriented_fixture as made
import pytest
import torch

from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.selfdrive.modeld.fair.heads.oriented import raw_of, upright
from openpilot.tools.fair.images import evaluate, infer, train_obb
from openpilot.tools.fair.images.predict import Predictor
from openpilot.tools.fair.images.train_obb import Options
from openpilot.tools.fair.registry import TEACHERS
from openpilot.tools.fair.rotated import outline, pair_iou
from openpilot.tools.fair.teacher import Entry, Label
from openpilot.tools.lib.errors import UserError

SMALL = {"size": "nano", "picture_size": 96, "batch_size": 3, "steps": 2, "workers": 0}


class Colors:
  """Of dense features the mean colors of 16 x 16 pixels."""

  stateful, checkpoint_hash, model_id = False, "1", "colors"

  def __init__(self, name, entry, path, device=None):
    self.name, self.license = name, entry.license

  def prepare(self, height, width):
    self.labels = [Label("features", "dense", "float16", (4, height // 16, width // 16))]

  def settings(self):
    return {}

  def label(self, clip, state=None):
    n, _, h, w = clip.rgb.shape
    colors = clip.rgb.reshape(n, 3, h // 16, 16, w // 16, 16).mean((3, 5)) / 255
    return {"features": np.concatenate([colors, colors[:, :1] ** 2], 1).astype(np.float16)}, None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """From labels and a teacher's features, also of pictures without labels. -> the student's folder."""
  root = tmp_path_factory.mktemp("turned")
  data = made.yolo(root / "data", {"train": (4, 0), "val": (2, 1)})
  made.render(root / "free", 2, 2)
  torch.set_num_threads(1)
  with pytest.MonkeyPatch.context() as m:
    m.setitem(TEACHERS, "colors", Entry(Colors, "", "MIT", "", "colors"))
    bundle = train_obb.run(Options(data=data, output=root / "made", teacher="colors", unlabeled=root / "free", **SMALL))
  assert bundle == root / "made/made"
  return root / "made"


def test_what_was_learned(trained):
  config = json.loads((trained / "config.json").read_text())
  assert config["tasks"] == ["oriented", "patches"] and config["student"] == "oriented-nano"
  assert config["parts"] == {"patches/all": 1.0, "patches/objects": 0.0} and config["turn"] == 0
  last = [json.loads(x) for x in (trained / "log.jsonl").read_text().splitlines()][-1]
  assert {k for k in last["val"] if "/" in k} == {f"oriented/{k}" for k in ("heat", "probiou", "code", "angle")}
  state = torch.load(trained / "last.pt", weights_only=True)
  assert state["model"]["projector.layers.0.weight"].shape == (4, 56, 1, 1) and state["model"]["standardiser.scale"] > 0
  assert [p.suffix for p in (trained / "samples").iterdir()] and (trained / "distillation_config.yaml").is_file()


def test_the_bundle_has_one_input_and_says_its_classes(trained):
  (graph,) = load_bundle(trained / "made").graphs
  assert [i["name"] for i in graph["inputs"]] == ["frame"] and graph["inputs"][0]["shape"] == [1, 3, 96, 96]
  outputs = {o["name"]: o for o in graph["outputs"]}
  assert set(outputs) == {"oriented_heat", "oriented_box"} and outputs["oriented_heat"]["classes"] == list(made.NAMES)
  assert "MIT" in (trained / "made/README.md").read_text()


def planted(trained, score=0.3):
  """A predictor whose network says two boxes of a picture of 192 x 144, which is halved into 96 x 72."""
  p = Predictor(trained, score=score)
  assert p.head == "oriented"
  out = {k: np.zeros_like(v) for k, v in p.run(p.frame(np.zeros((144, 192, 3), np.uint8))).items()}
  out["oriented_heat"][:] = -9
  boxes = np.array([[51.0, 35.0, 22.0, 10.0, 0.6], [20.0, 60.0, 18.0, 8.0, -1.2]])
  for b, k, s in zip(boxes, (1, 0), (3.0, 1.0), strict=True):
    j, i = ((b[:2] + 0.5) // 8).astype(int)
    out["oriented_heat"][0, k, i, j] = s
    out["oriented_box"][0, :, i, j] = raw_of(b, 8 * np.array([j, i]) + 3.5)[0]
  return p, out, boxes


def test_what_comes_out_lies_where_it_is_in_the_picture(trained):
  p, out, boxes = planted(trained)
  found = p.decode(out, (192, 144))
  want = np.concatenate([2 * (boxes[:, :2] + 0.5), 2 * boxes[:, 2:4], boxes[:, 4:]], 1)
  np.testing.assert_allclose(found.oriented, want, atol=1e-4)
  np.testing.assert_allclose(found.boxes, np.clip(upright(want), 0, [192, 144] * 2), atol=1e-3)
  assert found.classes.tolist() == [1, 0] and found.masks is None and p.names == list(made.NAMES)


def test_all_formats_say_the_same(trained, tmp_path, monkeypatch):
  _, out, _ = planted(trained)
  monkeypatch.setattr(Predictor, "run", lambda self, frame: out)
  made.render(tmp_path / "p", 2, 7, w=192, h=144)
  args = infer.Options(model=trained, paths=(str(tmp_path / "p"),), output=tmp_path / "o", visualize=True)
  infer.run(SimpleNamespace(**{**vars(args), "format": ("coco", "yolo", "csv")}))
  coco = json.loads((tmp_path / "o/predictions.json").read_text())
  assert [a["category_id"] for a in coco["annotations"]] == [2, 1] * 2 and "obb" in coco["annotations"][0]
  corners = np.array(outline(np.array([a["obb"] for a in coco["annotations"]])))
  np.testing.assert_allclose([a["segmentation"][0] for a in coco["annotations"]], corners, atol=0.01)
  assert coco["annotations"][0]["area"] == pytest.approx(44 * 20, rel=1e-3)
  rows = [x.split(",") for x in (tmp_path / "o/predictions.csv").read_text().splitlines()]
  assert rows[0] == ["picture", "class", "score", "x1", "y1", "x2", "y2", "x3", "y3", "x4", "y4"] and len(rows) == 5
  np.testing.assert_allclose([[float(v) for v in r[3:]] for r in rows[1:]], corners, atol=0.01)
  yolo = [x.split() for i in range(2) for x in (tmp_path / f"o/labels/7_{i}.txt").read_text().splitlines()]
  assert [int(y[0]) for y in yolo] == [1, 0] * 2 and all(len(y) == 10 for y in yolo)
  np.testing.assert_allclose([[float(v) for v in y[1:9]] for y in yolo], corners / ([192, 144] * 4), atol=1e-4)
  from PIL import Image

  drawn = np.asarray(Image.open(tmp_path / "o/pictures/7_0.jpg")).astype(int)
  plain = np.asarray(Image.open(tmp_path / "p/7_0.png")).astype(int)
  x, y = np.round(corners[0].reshape(4, 2)[[0, 1]].mean(0)).astype(int)  # the middle of a side that is turned
  assert np.abs(drawn[y - 1 : y + 2, x - 1 : x + 2] - plain[y - 1 : y + 2, x - 1 : x + 2]).max() > 60


def test_its_yolo_files_are_read_again(trained, tmp_path, monkeypatch):
  """What infer writes, less the score, is data."""
  _, out, _ = planted(trained)
  monkeypatch.setattr(Predictor, "run", lambda self, frame: out)
  made.render(tmp_path / "images", 1, 7, w=192, h=144)
  args = infer.Options(model=trained, paths=(str(tmp_path / "images"),), output=tmp_path, format=("yolo",))
  infer.run(args)
  text = tmp_path / "labels/7_0.txt"
  text.write_text("".join(" ".join(x.split()[:-1]) + "\n" for x in text.read_text().splitlines()))
  (tmp_path / "data.yaml").write_text(f"names: [{', '.join(made.NAMES)}]\ntrain: images\n")
  from openpilot.tools.fair.images.oriented import orient
  from openpilot.tools.fair.labels.sources import SourceOptions, open_sources

  (part,) = orient(open_sources([str(tmp_path)], SourceOptions()))
  want = Predictor(trained, score=0.3).decode(out, (192, 144)).oriented
  assert pair_iou(part.said(0).oriented + [0.5, 0.5, 0, 0, 0], want).min() > 0.999


def test_evaluation(trained, capsys, tmp_path):
  data = trained.parent / "data"
  r = evaluate.run(evaluate.Options(model=trained, data=data, score=0.05))
  assert r["pictures"] == 2 and r["objects"] == 6 and r["classes"] == list(made.NAMES)
  assert set(r["oriented"]["stats"]) == {"ap", "ap50", "ap50_area", "ap75_area"}
  said = capsys.readouterr()
  assert "DOTA's rules" in said.out and "judged by its part data-val alone" in said.err
  assert json.loads((trained / "evaluation/evaluation.json").read_text()) == json.loads(json.dumps(r))
  page = (trained / "evaluation/evaluation.html").read_text()
  assert "oriented boxes" in page and "11 recalls" in page and "mean IoU" not in page
  other = made.dota(tmp_path / "d", 2, 1, difficult=(0,))
  again = evaluate.run(evaluate.Options(model=trained, data=other, score=0.05, metrics=("mAP",), output=tmp_path / "e"))
  assert again["objects"] == 5 and again["crowds"] == 1 and "curves" not in again["oriented"]
  text = next((other / "labelTxt").iterdir())
  text.write_text(text.read_text() + "1 1 19 1 19 15 1 15 tram 0\n")
  with pytest.raises(UserError, match=r"labels tram, and the student tells flurb, zott apart"):
    evaluate.run(evaluate.Options(model=trained, data=other))
  more = {"model": trained, "data": other, "output": tmp_path / "e"}
  assert evaluate.run(evaluate.Options(**more, ignore_classes=True))["objects"] == 5
  assert evaluate.run(evaluate.Options(**more, alias=("tram=zott",)))["objects"] == 6


def test_a_perfect_student_has_a_map_of_1(trained, monkeypatch):
  """What is there, said by the network."""
  truth = {b.tobytes(): (b, c) for _, b, c in made.render(trained.parent / "again", 2, 1)}
  order = iter(truth.values())

  def said(self, frame):
    boxes, cls = next(order)
    out = {"oriented_heat": np.full((1, 2, 12, 12), -9.0), "oriented_box": np.zeros((1, 7, 12, 12))}
    scaled = (boxes - [0.5, 0.5, 0, 0, 0]) * [0.75, 0.75, 0.75, 0.75, 1] - [0.125, 0.125, 0, 0, 0]  # 128 to 96 pixels
    for b, k in zip(scaled, cls, strict=True):
      j, i = ((b[:2] + 0.5) // 8).astype(int)
      out["oriented_heat"][0, k, i, j] = 4
      out["oriented_box"][0, :, i, j] = raw_of(b, 8 * np.array([j, i]) + 3.5)[0]
    return out

  monkeypatch.setattr(Predictor, "run", said)
  r = evaluate.run(evaluate.Options(model=trained, data=trained.parent / "data"))
  assert r["oriented"]["stats"] == pytest.approx({"ap": 1, "ap50": 1, "ap50_area": 1, "ap75_area": 1})
  assert r["at_score"]["f1"] == 1 and r["worst"] == []


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(trained, tmp_path, monkeypatch):
  """Stopped in the third step, it goes on from the second: the same student, bit for bit."""
  from openpilot.tools.fair.distillation.trainer import Run

  data = trained.parent / "data"
  more = {"data": data, "augment": "plain", "export": False, **SMALL, "steps": 4}
  train_obb.run(Options(output=tmp_path / "whole", **more))
  step, moved = Run.moved, []

  def stop(self):
    step(self)
    moved.append(1)
    if len(moved) == 3:
      raise KeyboardInterrupt

  with monkeypatch.context() as m:
    m.setattr(Run, "moved", stop)
    with pytest.raises(KeyboardInterrupt):
      train_obb.run(Options(output=tmp_path / "two", **more))
  assert torch.load(tmp_path / "two/last.pt", weights_only=True)["step"] == 2
  train_obb.run(Options(output=tmp_path / "two", resume=True, **more))
  a, b = (torch.load(tmp_path / d / "last.pt", weights_only=True)["model"] for d in ("whole", "two"))
  assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_a_few_pictures_are_learned_by_heart(tmp_path):
  """By the bundle, through the device's decoder and DOTA's rules."""
  data = made.yolo(tmp_path / "d", {"train": (3, 4)})
  more = {**SMALL, "steps": 120, "augment": "none", "lr": 2e-3}
  bundle = train_obb.run(Options(data=data, val=data, output=tmp_path / "out", **more))
  r = evaluate.run(evaluate.Options(model=bundle, data=data, metrics=("mAP",)))
  assert r["oriented"]["stats"]["ap50"] > 0.95 and r["oriented"]["stats"]["ap75_area"] > 0.8


@pytest.mark.parametrize(
  "more, says",
  [
    ({"teacher": "nobody"}, "nobody"),
    ({"teacher": "yolox-nano"}, "no dense features|no weights"),
    ({"unlabeled": Path("x")}, "by a teacher alone"),
    ({"epochs": 0}, "at least 1"),
    ({"steps": 0}, "at least 1"),
    ({"lr": float("nan")}, "above 0"),
    ({"picture_size": 100}, "multiple of 32"),
    ({"turn": 200.0}, "from 0 to 180"),
    ({"feature_weight": -1.0}, "at least 0"),
    ({"val": Path("none")}, "there is no none"),
  ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(more, says, tmp_path):
  data = made.dota(tmp_path / "d", 2)
  with pytest.raises(UserError, match=says) as e:
    train_obb.run(Options(data=data, output=tmp_path / "out", **{**SMALL, **more}))
  assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


# DINOv3


def save(folder, kind):
  import transformers
  from dino_models import save_folder

  torch.manual_seed(0)
  if kind == "vit":
    config = transformers.DINOv3ViTConfig(
      hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=16
    )
    model = transformers.DINOv3ViTModel(config)
  else:
    model = transformers.DINOv3ConvNextModel(
      transformers.DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    )
  more = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 2}
  return save_folder(model, folder, **more, size={"height": 224, "width": 224})


@pytest.fixture(params=["vit", "convnext"])
def dino(request, tmp_path):
  return save(tmp_path / "dino", request.param)


def test_a_folder_of_dinov3_teaches(dino, tmp_path):
  """What is stored of it is what it says, and the distance in the run that of DinoOBBTrainer: one interface."""
  from openpilot.tools.fair.distillation.batch import Batches
  from openpilot.tools.fair.distillation.data import Clips
  from openpilot.tools.fair.images.obb_trainer import DinoOBBTrainer
  from openpilot.tools.fair.students.student import build, spec_of
  from openpilot.tools.fair.spec import InputSpec
  from openpilot.tools.fair.tasks import TASKS

  data = made.yolo(tmp_path / "data", {"train": (3, 0), "val": (1, 1)})
  told = {"data": data, "teacher": str(dino), "export": False, "augment": "none", **SMALL, "steps": 1}
  with pytest.raises(UserError, match="--accept-license DINOv3"):
    train_obb.run(Options(output=tmp_path / "refused", **told))
  assert not (tmp_path / "refused").exists()
  out = train_obb.run(Options(output=tmp_path / "out", accept_license=("DINOv3",), **told))
  state = torch.load(out / "last.pt", weights_only=True)
  assert "DINOv3" in {t["licence"] for t in state["provenance"]}
  clips = Clips(out / "labels/train", ["oriented", "patches"], 1, classes=squares())
  batch = Batches(clips, 0, False)[(0, [0, 1, 2], False)]
  trainer = DinoOBBTrainer(SimpleNamespace(dino_root=dino), "cpu")
  seen = trainer.teacher.extract_feature_map(batch["frame"])
  want = batch["features"]
  assert seen.shape == want.shape
  if "convnext" not in trainer.teacher.cfg.model_type:
    torch.testing.assert_close(seen, want, rtol=2e-2, atol=2e-2)  # stored as float16
  student = build(spec_of("oriented-nano", input=InputSpec("rgb", 96, 96), classes=squares())).eval()
  aids = TASKS["patches"].aids(student, tuple(seen.shape[1:]))
  model = SimpleNamespace(projector=aids["projector"], standardiser=lambda x: x)
  said = student(batch["frame"])
  trainer.projector = aids["projector"]
  mine = trainer.compute_distillation_loss(batch["frame"], said["features"], batch["valid"])
  stored = TASKS["patches"].loss(model, said, {**batch, "features": seen})["all"]
  assert float(mine.detach()) == pytest.approx(float(stored.detach()), abs=1e-6)
  mine.backward()
  assert all(p.grad is not None for p in aids["projector"].parameters())
  assert all(p.grad is None for p in trainer.teacher.parameters()) and not trainer.train().teacher.training


def squares():
  from openpilot.tools.fair.spec import Class, ClassSet

  return ClassSet("pictures", tuple(Class(n, maps=False, boxes=True) for n in made.NAMES))


def test_dino_obb_trainer_learns_a_picture(tmp_path):
  """A few steps on one picture: all its losses fall, and the teacher stays as it was."""
  from openpilot.tools.fair.images.obb_trainer import DinoOBBTrainer
  from openpilot.tools.fair.spec import InputSpec
  from openpilot.tools.fair.students.student import build, spec_of

  torch.manual_seed(0)
  student = build(spec_of("oriented-nano", input=InputSpec("rgb", 96, 128), classes=squares()))
  trainer = DinoOBBTrainer(SimpleNamespace(dino_root=save(tmp_path / "dino", "vit")), "cpu", student)
  rgb, boxes, cls = made.picture(np.random.default_rng(0))
  images = torch.from_numpy(np.stack([rgb, rgb[::-1].copy()])).permute(0, 3, 1, 2)
  one = {"boxes": torch.tensor(boxes - [0.5, 0.5, 0, 0, 0]).float(), "cls": torch.tensor(cls), "score": torch.ones(3)}
  flipped = {**one, "boxes": one["boxes"] * torch.tensor([1, -1, 1, 1, -1]) + torch.tensor([0, 95.0, 0, 0, 0])}
  optimizer = torch.optim.AdamW(trainer.parameters_to_learn(), lr=2e-3)
  before = {k: v.clone() for k, v in trainer.teacher.state_dict().items()}
  history = [trainer.train_step(images, [one, flipped], optimizer) for _ in range(12)]
  assert set(history[0]) == {"heat", "probiou", "code", "angle", "features"}
  assert all(history[-1][k] < 0.9 * history[0][k] for k in ("heat", "probiou", "features"))
  assert all(torch.equal(v, before[k]) for k, v in trainer.teacher.state_dict().items())

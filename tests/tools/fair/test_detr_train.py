"""`images train-detr` whole, on small random backbones: what Trainer does to such models, and what comes out."""

import argparse
import contextlib
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("faster_coco_eval")

import transformers
import yaml
from detr_models import options, save_backbone, write_yolo
from PIL import Image
from torchrun import torchrun
from transformers import TrainerState

from openpilot.tools.fair.detr.backbone import load_backbone
from openpilot.tools.fair.detr.data import read_index
from openpilot.tools.fair.detr.experiment import read_detr, write_detr
from openpilot.tools.fair.detr.model import check_queries, features, is_frozen, levels_for, make_model, prepare
from openpilot.tools.fair.detr.trainer import Clock, Lines
from openpilot.tools.fair.detr.training import PER_STEP, Fit, check_same, fitted, key_of, run, trainer_of
from openpilot.tools.fair.images import train_student
from openpilot.tools.fair.images.soft import load_experiment
from openpilot.tools.fair.images.train_detr import check
from openpilot.tools.fair.labels import label
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Clip
from openpilot.tools.learn.memory import OutOfMemory
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.options import command_line
from openpilot.tools.lib.pictures import read_rgb

HEADS = ("detr", "deformable")
LABELS = [
  {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])},
  {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)},
]
KIND = {"detr": "DetrForObjectDetection", "deformable": "DeformableDetrForObjectDetection"}


def load(head, folder):
  return getattr(transformers, KIND[head]).from_pretrained(folder, local_files_only=True).eval()


def same(a, b) -> list[str]:
  """Names of tensors that differ."""
  return [k for k in a if not torch.equal(a[k], b[k])]


@pytest.fixture(scope="module", params=HEADS)
def trained(request, tmp_path_factory):
  """-> head, folder of data, backbone and `out`, which two epochs made."""
  folder = tmp_path_factory.mktemp(request.param)
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  backbone = save_backbone(folder / "dinov3-small")
  said = run(options(folder, backbone=str(backbone), head=request.param, epochs=2, lr=1e-3))
  torch.set_num_threads(threads)
  return request.param, folder, said


def test_weights_at_the_end_are_bit_for_bit_the_best_s(trained):
  head, folder, said = trained
  out, runs = folder / "out", folder / "out" / "runs"
  names = sorted((p.name for p in runs.glob("checkpoint-*")), key=lambda n: int(n.split("-")[1]))
  assert len(names) == 2 and said["best"] in names
  final, best = load(head, out).state_dict(), load(head, runs / said["best"]).state_dict()
  other = load(head, runs / next(n for n in names if n != said["best"])).state_dict()
  assert final.keys() == best.keys() and not same(final, best)
  changed = same(final, other)
  assert len(changed) > 50 and not [k for k in changed if ".backbone." in k]
  source = load_backbone(str(folder / "dinov3-small")).net.state_dict()
  assert not [k for k, v in source.items() if not torch.equal(final[f"model.backbone.model.{k}"], v)]
  said = json.loads((runs / names[-1] / "trainer_state.json").read_text())
  assert [x["epoch"] for x in said["log_history"] if "eval_map" in x] == [1, 2]


@pytest.mark.slow
def test_it_goes_on_as_if_it_had_not_been_stopped(trained):
  head, folder, _ = trained
  out, again = folder / "out", folder / "again"
  first, last = sorted((out / "runs").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
  shutil.copytree(first, again / "runs" / first.name)
  shutil.copy(out / "detr.json", again)
  o = options(folder, output=again, backbone=str(folder / "dinov3-small"), head=head, epochs=2, lr=1e-3, resume=True)
  check(o)
  run(o)
  assert not same(load(head, last).state_dict(), load(head, again / "runs" / last.name).state_dict())
  with pytest.raises(UserError, match="another training: queries 12 then, 9 now"):
    run(options(folder, output=again, backbone=str(folder / "dinov3-small"), head=head, queries=9, resume=True))
  said = json.loads((folder / "train" / "annotations.json").read_text())
  said["categories"][0]["name"] = "zitt"
  shutil.copytree(folder / "train", folder / "renamed", dirs_exist_ok=True)
  (folder / "renamed" / "annotations.json").write_text(json.dumps(said))
  with pytest.raises(UserError, match=r"has classes that|classes .*zott.* then, .*zitt.* now"):
    run(
      options(
        folder, output=again, backbone=str(folder / "dinov3-small"), head=head, resume=True, val=None,
        data=folder / "renamed" / "annotations.json",
      )
    )  # fmt: skip


def test_transformers_pipeline_runs_it_and_the_teacher_says_the_same(trained):
  _, folder, _ = trained
  out = folder / "out"
  found = transformers.pipeline("object-detection", str(out), device="cpu")
  path = folder / "val" / "images" / "1_0.png"
  rgb = read_rgb(path)
  want = found(Image.fromarray(rgb), threshold=0.02)
  teacher = load_teacher(f"detr:{out}", accepted=("DINOv3",), device="cpu", score=0.02)
  assert teacher.classes == ("zott", "flurb", "never seen") and teacher.name == "detr-out"
  ((boxes, scores, classes),) = teacher.detect(np.ascontiguousarray(rgb.transpose(2, 0, 1))[None])
  order = np.argsort(-scores, kind="stable")[:100]
  assert len(want) > 3
  want = sorted(want, key=lambda w: -w["score"])
  # its own resizing rounds pixels otherwise, by 1 of 255 at most
  np.testing.assert_allclose([w["score"] for w in want], scores[order][: len(want)], atol=1e-2)
  got = {(teacher.classes[c], *np.trunc(b).astype(int)) for b, c in zip(boxes, classes, strict=True)}
  told = [(w["label"], *(w["box"][k] for k in ("xmin", "ymin", "xmax", "ymax"))) for w in want]
  near = [
    any(t[0] == g[0] and max(abs(a - b) for a, b in zip(t[1:], g[1:], strict=True)) <= 1 for g in got) for t in told
  ]
  assert all(near)
  table = teacher.label(Clip(np.ascontiguousarray(rgb.transpose(2, 0, 1))[None]))[0]["boxes"]
  assert len(table["cls"]) > 3 and set(table["cls"].tolist()) <= {0, 1, 2}


def test_it_is_a_teacher_under_the_backbone_s_license(trained):
  _, folder, said = trained
  assert said["license"] == "DINOv3" == read_detr(folder / "out")["backbone"]["license"]
  with pytest.raises(UserError, match="--accept-license DINOv3"):
    load_teacher(f"detr:{folder / 'out'}")
  soft = load_experiment(folder / "out", 0.4, ("DINOv3",), "cpu")
  soft.prepare(80, 96)
  assert soft.license == "DINOv3" and [x.name for x in soft.labels] == ["boxes", "boxes_scores"]
  with pytest.raises(UserError, match=r"no detector in .*train-detr"):
    load_teacher(f"detr:{folder}")


@pytest.mark.slow
def test_it_labels_pictures_and_teaches_a_student(trained, tmp_path, monkeypatch):
  _, folder, _ = trained
  out, labels = folder / "out", tmp_path / "labels"
  words = [folder / "val" / "images", "--teachers", f"detr:{out}", "--option", f"detr:{out}.score=0.02"]
  words += ["--accept-license", "DINOv3", "--license", "MIT", "--size", "96x96", "--output", labels]
  monkeypatch.setattr("sys.argv", ["label", *map(str, words)])
  label.main()
  (group,) = LabelStore(labels).groups(teacher="detr-out")
  assert tuple(group.label("boxes").classes) == ("zott", "flurb", "never seen") and group.row_count == 3
  assert group.table("boxes").num_rows > 3
  told = {"size": "nano", "picture_size": 96, "batch_size": 3, "steps": 1, "workers": 0, "teacher_score": 0.3}
  data = {k: folder / n / "annotations.json" for k, n in (("data", "train"), ("val", "val"))}
  more = {"teacher_dir": out, "accept_license": ("DINOv3",)}
  bundle = train_student.run(train_student.Options(**data, output=tmp_path / "student", **more, **told))
  config = yaml.safe_load((tmp_path / "student" / "distillation_config.yaml").read_text())
  assert config["teachers"] == ["detr-out"] and config["distillation"]["loss_weights"]["logit"] > 0
  assert "DINOv3" in (bundle / "README.md").read_text()


def test_a_number_of_processes_by_which_epochs_would_be_counted_otherwise_is_refused(tmp_path, monkeypatch):
  said = {"classes": ["a"], "license": "MIT", "backbone": {"name": "x"}}
  backbone = argparse.Namespace(weights="w")

  def key(processes, **more):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    return key_of(options(tmp_path, batch_size=2, **more), backbone, ("a",))

  write_detr(tmp_path, {**said, "run": key(2, accumulate=4)})
  check_same(tmp_path, key(4, accumulate=2))
  check_same(tmp_path, key(1, accumulate=8))
  with pytest.raises(UserError, match=r"pictures a step 16 then, 8 now; they are --batch-size x --accumulate x proc"):
    check_same(tmp_path, key(1, accumulate=4))
  write_detr(tmp_path, {**said, "run": {k: v for k, v in key(2).items() if k != PER_STEP}})
  check_same(tmp_path, key(1))  # of before it was told


@pytest.mark.slow
def test_two_processes_make_one_detector(trained):
  """Each picture is judged once, and one process writes."""
  head, folder, _ = trained
  if head != "detr":
    pytest.skip("once is enough")
  out = folder / "two"
  o = options(folder, output=out, backbone=str(folder / "dinov3-small"), batch_size=1)
  words = shlex.split(command_line(o))
  done = torchrun(2, "-m", "openpilot.tools.fair.images.train_detr", *words)
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.count("wrote        ") == 1
  said, told = read_detr(out), json.loads((out / "evaluation.json").read_text())
  assert said["steps"] == 3 and told["pictures"] == 3
  assert said["metrics"]["map"] == pytest.approx(told["bbox"]["stats"]["ap"], abs=1e-12)


def test_the_page_and_its_numbers(trained):
  _, folder, said = trained
  page = (folder / "out" / "evaluation.html").read_text()
  told = json.loads((folder / "out" / "evaluation.json").read_text())
  assert "By number of objects in a picture" in page and "Worst pictures" in page and "http" not in page
  assert told["pictures"] == 3 and told["objects"] == 9 and told["crowding"][0]["pictures"] == 3
  assert said["metrics"]["map"] == pytest.approx(told["bbox"]["stats"]["ap"], abs=1e-12)
  assert {"map_50", "mar_100", "map_zott", "loss", "queries_used"} <= said["metrics"].keys()
  assert "/" not in read_detr(folder / "out")["data"]["name"]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["convnext", "dinov2", "mobilenetv2_100"])
def test_every_kind_of_backbone(head, kind, tmp_path):
  """Frozen, in eval mode, saved and loaded the same; features in place of pictures give the same loss."""
  torch.manual_seed(3)
  if kind == "mobilenetv2_100":
    backbone = load_backbone(kind, "none")
  else:
    backbone = load_backbone(str(save_backbone(tmp_path / kind, kind)))
  model = make_model(head, backbone, ["a", "b"], int(head == "detr"), 2, 20, 32)
  x, mask = torch.randn(2, 3, 96, 160), torch.ones(2, 96, 160, dtype=torch.bool)
  mask[0, :, 120:] = False
  model.train()
  assert is_frozen(model) and model.training
  loss = model(pixel_values=x, pixel_mask=mask, labels=LABELS).loss
  loss.backward()
  assert all(
    (p.grad is None) == (".backbone." in n) for n, p in model.named_parameters() if p.requires_grad or "back" in n
  )
  model.eval()
  with torch.no_grad():
    one = model(pixel_values=x, pixel_mask=mask, labels=LABELS)
    two = model(pixel_values=features(model, x), pixel_mask=mask, labels=LABELS)
    net = backbone.net(x).feature_maps[-1]
    torch.testing.assert_close(features(model, x), net, rtol=1e-4, atol=1e-4)  # timm's activations are there, too
    torch.testing.assert_close(one.loss, two.loss, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "saved")
    again = load(head, tmp_path / "saved")
    prepare(again)
    torch.testing.assert_close(again(pixel_values=x, pixel_mask=mask).logits, one.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_random_weights_are_the_authors(head):
  """transformers' own: queries of a deviation of .02, and a score of .5 for each class of each query."""
  torch.manual_seed(0)
  model = make_model(head, load_backbone("mobilenetv2_100", "none"), ["a", "b"], 1, 3, 20, 32, levels=2).eval()
  assert 0.9 < float(model.model.query_position_embeddings.weight.std()) < 1.1
  # Xavier's uniform: of a linear layer of 32 by 32 up to sqrt(6 / 64)
  weight = model.model.decoder.layers[1].self_attn.q_proj.weight
  assert 0.3 < float(weight.abs().max()) < 0.3062 and not model.model.decoder.layers[1].self_attn.q_proj.bias.any()
  x, mask = torch.rand(1, 3, 96, 160), torch.ones(1, 96, 160, dtype=torch.bool)
  with torch.no_grad():
    out = model(pixel_values=x, pixel_mask=mask)
  if head == "deformable":
    assert 0.001 < float(out.logits.sigmoid().median()) < 0.1
    # each query begins at its own place, with a side of sigmoid(-2), which later layers do not change yet
    torch.testing.assert_close(out.pred_boxes[..., 2:], torch.full((1, 20, 2), 0.119203), rtol=0, atol=1e-5)
    centers = model.model.reference_points(model.model.query_position_embeddings.weight[:, :32]).sigmoid()
    torch.testing.assert_close(out.pred_boxes[0, :, :2], centers, rtol=0, atol=1e-5)


def test_the_wait_for_pictures_is_told(capsys):
  """Of a second's step half is waited for; an evaluation between does not count."""
  clock = Clock()
  clock.steps, clock.waited = [0.25, 0.25], 0.5
  assert clock.wait_share() == 0.5
  clock.steps, clock.waited = [*clock.steps, 3.0], 1.5
  assert clock.wait_share() == 0.25 and clock.wait_share() == 0
  logs = {"loss": 2.5, "learning_rate": 1e-4, "data_wait": 0.25, "epoch": 1.5}
  state = TrainerState(is_world_process_zero=True)
  Lines().on_log(None, state, None, logs)
  assert capsys.readouterr().out == (
    "epoch 1.5    loss 2.500, learning rate 1.0e-04, 25% of the time waits for pictures\n"
  )


@pytest.mark.slow
def test_pictures_without_boxes_and_a_configuration_alone(tmp_path, capsys):
  """YOLO with its own val, an empty picture, random weights: two epochs of both kinds of padding."""
  row = "0 0.5 0.5 0.4 0.4"
  write_yolo(tmp_path / "y", {"a": [row], "b": None, "c": [row]})
  write_yolo(tmp_path / "y", {"d": [row]}, split="val")
  config = save_backbone(tmp_path / "vit") / "config.json"
  told = {"data": tmp_path / "y", "val": None, "backbone": str(config), "accept_license": ()}
  said = run(options(tmp_path, **told, pad="batch", pilot=True, accumulate=2))
  assert said["license"] == "Apache-2.0" and said["backbone"]["weights"] == "" and said["pilot"]["hours_for_all"] >= 0
  assert said["pilot"]["read_pictures_per_second"] > 0 and 0 <= said["data_wait"] < 1
  assert said["pilot"]["memory_gib"] > 0 and (tmp_path / "out" / "pilot").is_dir()
  text = capsys.readouterr()
  assert "pilot        " in text.out and "its weights are random" in text.err


def test_accumulated_batches_are_averaged(tmp_path):
  """Trainer takes forward's **kwargs for a sign that the loss is already over all batches of a step."""
  backbone = load_backbone(str(save_backbone(tmp_path / "vit")))
  o = options(tmp_path)
  data = read_index(o.data, None)
  made = trainer_of(o, Fit(64, 96, 2, 4), backbone, data, data, tmp_path / "runs", 1)
  batch = made.data_collator([made.train_dataset[0]])
  made.current_gradient_accumulation_steps = 4
  torch.manual_seed(1)
  scaled = made.training_step(made.model, dict(batch), torch.tensor(3))
  batch.pop("counts")
  torch.manual_seed(1)
  assert 4 * scaled.item() == pytest.approx(made.model(**batch).loss.item(), rel=1e-4)


def test_memory_that_is_too_small(capsys, monkeypatch):
  monkeypatch.setattr("gc.collect", lambda: 0)
  tried = []

  def attempt(fit):
    tried.append((fit.short, fit.long, fit.batch, fit.accumulate))
    if fit.batch > 1:
      raise OutOfMemory("no room")
    return "done"

  assert fitted(Fit(960, 1536, 4, 4), attempt)[0] == "done"
  assert tried == [(960, 1536, 4, 4), (800, 1333, 4, 4), (800, 1333, 2, 8), (800, 1333, 1, 16)]
  assert capsys.readouterr().err.count("out of memory") == 3
  with pytest.raises(UserError, match="smaller --short"):
    fitted(Fit(800, 1333, 1, 4), lambda fit: (_ for _ in ()).throw(OutOfMemory("no room")))


def test_the_deformable_head_has_as_many_maps_as_the_picture_has_room_for(tmp_path):
  vit = load_backbone(str(save_backbone(tmp_path / "vit")))  # of stride 16
  assert [levels_for(vit, side) for side in (16, 64, 100, 160, 960)] == [1, 2, 3, 4, 4]


def test_more_boxes_than_queries():
  assert check_queries(300, 300, 80) is None and "--queries 400" in str(check_queries(300, 301, 80))


def test_bad_input_is_one_line(tmp_path):
  def refuse(match, **changes):
    with pytest.raises(UserError, match=match) as e:
      o = options(tmp_path, **changes)
      check(o)
      run(o)
    assert "\n" not in str(e.value)

  vit = save_backbone(tmp_path / "vit")
  refuse("restricts use", backbone=str(vit), accept_license=())
  refuse("no such network", backbone="nonsense_net")
  refuse("--backbone-weights FILE", backbone="mobilenetv2_100")
  refuse("there is no", backbone="mobilenetv2_100", backbone_weights=str(tmp_path / "no.pth"))
  (tmp_path / "no.pth").write_bytes(b"nothing")
  refuse("no weights for this backbone", backbone="mobilenetv2_100", backbone_weights=str(tmp_path / "no.pth"))
  refuse("no weights 'facebook/dinov3-nowhere'", backbone="facebook/dinov3-nowhere")
  refuse("--level 9", backbone=str(vit), level=9)
  shutil.copytree(vit, tmp_path / "bert")
  (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
  refuse("AutoBackbone does not know", backbone=str(tmp_path / "bert"))
  refuse("--precision fp16 wants a GPU", backbone=str(vit), precision="fp16")
  refuse("a multiple of 32", width=40)
  refuse("the longer edge", short=900, long=800)
  refuse("at least 2", decoder_layers=1)
  refuse("--resume: no training in", backbone=str(vit), resume=True)
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "x").touch()
  refuse("is not empty", backbone=str(vit))
  assert [p.name for p in (tmp_path / "out").iterdir()] == ["x"]  # nothing half-written
  for text in ("{", "[]", '{"format": 1, "classes": [], "license": "MIT"}', '{"format": 9}'):
    (tmp_path / "out" / "detr.json").write_text(text)
    with contextlib.suppress(FileNotFoundError), pytest.raises(UserError, match="is of no detector"):
      read_detr(Path(tmp_path / "out"))

"""From an experiment's two teachers to a student, end to end on small models: what the store keeps, that it is computed
once, and that each part of the loss is there."""

import json
import shutil

import images_student_fixture as squares
import numpy as np
import pytest
from whole_pictures import turned_view

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

import grounded_models as small

from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.tools.fair.distillation.batch import Batches
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.distillation.distiller import Distiller
from openpilot.tools.fair.distillation.look import Look
from openpilot.tools.fair.grounded_sam.two_stage import GroundedSAM
from openpilot.tools.fair.images import infer, store, train_student, train_teacher
from openpilot.tools.fair.images.loss import PARTS
from openpilot.tools.fair.images.train_student import Options
from openpilot.tools.fair.labels import label
from openpilot.tools.fair.labels.labeling import run_teacher
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.students.student import build
from openpilot.tools.lib.options import parse

SMALL = {"size": "nano", "picture_size": 96, "batch_size": 2, "steps": 2, "workers": 0, "device": "cpu"}
# random teachers are sure of nothing: what they are a little sure of counts as an object
TOLD = {"teacher_score": 0.02, "option": ("score=0.02",)}


def tune(root, name, teachers):
  words = ["--data", root / "a/annotations.json", "--output", root / name, "--epochs", "1", "--lora.r", "4"]
  words += ["--grounding-dino", root / "dino", "--sam", root / "sam", "--device", "cpu", "--trackers", ""]
  words += ["--teachers", teachers, "--lr", "1e-2", "--warmup", "0"]
  train_teacher.run(parse(train_teacher.Options, None, "x", [str(w) for w in words]))
  return root / name


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """Pictures, an experiment of both teachers, and what a student made of it."""
  root = tmp_path_factory.mktemp("pipeline")
  torch.set_num_threads(1)
  small.save_dino(root / "dino")
  small.save_sam(root / "sam")
  squares.write(root / "a", 4)
  squares.write(root / "c", 2, seed=2, labels=False)
  tune(root, "exp", "grounding-dino,sam")
  return root


def options(place, out, **more):
  told = {"data": place / "a/annotations.json", "teacher_dir": place / "exp", "unlabeled": place / "c/images"}
  return Options(**{**told, **SMALL, **TOLD, "output": out, **more})


def filled(args):
  """What train-student does before it learns. -> Said, distillation's Config."""
  said = store.fill(args, train_student.check_options(args), train_student.teachers_of(args))
  return said, train_student.config_of(
    args, said, args.student or train_student.select_student_model(said.info, "nano")
  )


@pytest.fixture(scope="module")
def taught(place):
  return filled(options(place, place / "student"))


def groups_of(said):
  segments = Look(said.train).segments
  assert set(segments) == {"train--0", "unlabeled--0"}
  return [g for s in segments.values() for n, g in s.items() if n.startswith("grounded-sam")]


@pytest.mark.slow
def test_from_two_teachers_to_a_student_that_finds_things(place, tmp_path):
  """The bundle of one input, and what it says of pictures that it has not seen."""
  trained = tmp_path / "student"
  train_student.run(options(place, trained))
  (graph,) = load_bundle(trained / "student").graphs
  assert [i["name"] for i in graph["inputs"]] == ["frame"]  # no prompt
  card = (trained / "student/README.md").read_text()
  assert "\n- exp (Apache-2.0" in card and "not tuned" not in card
  out = infer.run(infer.Options(model=trained, paths=(str(place / "c/images"),), output=tmp_path / "o", score=0.001))
  said = json.loads((out / "predictions.json").read_text())
  assert len(said["images"]) == 2 and said["annotations"] and all("segmentation" in a for a in said["annotations"])
  assert {c["name"] for c in said["categories"]} == {"zott", "flurb"}


def test_the_store_keeps_what_the_two_stages_said(taught):
  said, config = taught
  assert config.tasks == ["objects", "logits", "features"] and said.labeled == 4 - said.held_out
  groups = groups_of(said)
  assert len(groups) == 2
  for group in groups:
    assert [x.name for x in group.labels] == ["objects", "class_scores", "features"]
    found, scores = group.table("objects"), group.table("class_scores")
    assert len(found["score"]) and all(found["rle"].to_pylist()) and len(scores["score"]) >= len(found["score"])
    maps = [group.row("features", i) for i in range(group.row_count)]
    assert all(np.isfinite(m).all() and np.std(m) > 0 for m in maps)


class NotAgain(Exception):
  pass


def not_again(*_, **__):
  raise NotAgain


def test_a_second_student_computes_nothing_again(place, taught, tmp_path, monkeypatch):
  """Another question is asked."""
  before = [(g.path, g.row_count) for g in groups_of(taught[0])]
  shutil.copytree(place / "student", tmp_path / "other")
  monkeypatch.setattr(GroundedSAM, "detect", not_again)
  monkeypatch.setattr(GroundedSAM, "segment", not_again)
  said, _ = filled(options(place, place / "student"))
  assert [(g.path, g.row_count) for g in groups_of(said)] == before
  with pytest.raises(NotAgain):
    filled(options(place, tmp_path / "other", option=("score=0.03",)))


def test_each_part_of_the_loss_moves_the_student(taught):
  """With one left out the backbone's gradient is another, by exactly that part's own."""
  said, config = taught
  groups = groups_of(said)
  clips = Clips(said.train, config.tasks, 1, prefer=said.prefer, classes=config.classes, ignore=True)
  batch = Batches(clips, 0, False)[(0, [0, 1], False)]
  torch.manual_seed(0)
  student = build(config.spec)
  model = Distiller(student, config.tasks, config.weights, False, groups[0].label("features").shape)
  model.fit_features([batch])
  weights = dict(student.backbone.named_parameters())

  def gradient(names):
    """Of the parts of the loss that are named."""
    model.parts = {**config.parts, **{k: 0.0 for part in PARTS.values() for k in part if k not in names}}
    model.zero_grad()
    parts = model(batch)
    parts["total"].backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in weights.items()}, set(parts)

  every = [k for names in PARTS.values() for k in names]
  whole, parts = gradient(every)
  assert {k.split("/")[0] for k in parts if "/" in k} == {"objects", "logits", "features"}
  largest = max(float(g.abs().max()) for g in whole.values())
  for names in PARTS.values():
    without, less = gradient([k for k in every if k not in names])
    alone, own = gradient(names)
    assert own - {"total"} == parts - less != set()
    assert max(float((whole[n] - without[n]).abs().max()) for n in weights) > 1e-4 * largest, names
    for n in weights:
      torch.testing.assert_close(without[n] + alone[n], whole[n], rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize(
  "teachers, data, weights, said",
  [
    (
      "grounding-dino",
      {"masks": False},
      {"detection": 3 / 7, "logit": 2 / 7, "feature": 2 / 7},
      {"segmentation": "no masks in the data or from a teacher"},
    ),
    pytest.param(
      "sam", {}, {"detection": 0.3, "segmentation": 0.3, "logit": 0.2, "feature": 0.2}, {}, marks=pytest.mark.slow
    ),
  ],
)
def test_what_one_stage_cannot_teach_is_off_and_said(
  place, tmp_path, capsys, monkeypatch, teachers, data, weights, said
):
  """Grounding DINO alone makes no masks. SAM alone finds nothing: it is given another detector's boxes and scores."""
  squares.register(monkeypatch)
  name = f"exp-{teachers}"
  exp = place / name if (place / name).exists() else tune(place, name, teachers)
  told = ("score=0.02",) if teachers == "grounding-dino" else ("detector=colors",)
  path = squares.write(tmp_path / "d", 3, **data)
  more = {"alias": ("red=flurb", "blue=zott")} if teachers == "sam" else {}
  _, config = filled(options(place, tmp_path / "s", data=path, teacher_dir=exp, unlabeled=None, option=told, **more))
  out = capsys.readouterr().out
  for part, names in PARTS.items():
    assert all(config.parts[n] == pytest.approx(weights.get(part, 0.0)) for n in names)
  for part, why in said.items():
    assert f"without {part}: {why}" in out


@pytest.mark.slow
def test_the_experiment_labels_pictures_and_a_route(place, monkeypatch, tmp_path):
  """By the command, through the store: the second time nothing is computed."""
  (tmp_path / "drive").mkdir()
  view = turned_view(tmp_path / "drive")
  exp = str(place / "exp")

  def by_command(paths, *more):
    words = [*paths, "--teachers", exp, "--output", tmp_path / "labels", "--option", f"{exp}.score=0.02", *more]
    monkeypatch.setattr("sys.argv", ["label", *map(str, words)])
    label.main()

  by_command([place / "c/images"], "--size", "96x96")
  teacher = load_teacher(exp, device="cpu", score=0.02)
  route = LabelStore(tmp_path / "route", create=True)
  (group,) = run_teacher(teacher, [view], route, progress=False)
  table = group.table("objects")
  assert group.row_count == 2 and len(table["score"]) and group.meta["view"]["name"] == "medmodel"
  assert min(table["x0"].to_pylist()) >= -0.5 and max(table["x1"].to_pylist()) <= 511.5  # of the view
  pictures = Look(tmp_path / "labels").segments
  (found,) = [g for s in pictures.values() for n, g in s.items() if n.startswith("grounded-sam")]
  assert found.row_count == 2 and len(found.table("objects")["score"])

  monkeypatch.setattr(GroundedSAM, "detect", not_again)
  by_command([place / "c/images"], "--size", "96x96")
  run_teacher(teacher, [view], route, progress=False)

"""Students taught by a float copy of themselves: the measures against SciPy's and by hand, what is taught and what not,
the command."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from label_fixture import interrupted, same, taught, write_store
from scipy.special import expit, rel_entr, softmax

from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.selfdrive.modeld.fair.runners.onnx import OnnxRunner
from openpilot.tools.fair.bundle import export
from openpilot.tools.fair.bundle.card import card
from openpilot.tools.fair.distillation import distill
from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.distillation.distiller import Distiller
from openpilot.tools.fair.distillation.options import Options, float_teacher
from openpilot.tools.fair.distillation.self_taught import Teacher, check_alike, check_known, difference, open_teacher
from openpilot.tools.fair.spec import Class, ClassSet, InputSpec
from openpilot.tools.fair.students.fake_quant import Rounding
from openpilot.tools.fair.students.student import build, spec_of
from openpilot.tools.learn.checkpoint import load_checkpoint
from openpilot.tools.lib.errors import UserError

TASKS = ["depth", "segmentation", "objects", "detector", "lanes"]
PARTS = {
  "depth/self_depth",
  "segmentation/self_segmentation",
  *(f"objects/self_{x}" for x in ("heat", "box", "coef", "proto", "embed")),
  *(f"detector/self_{x}" for x in ("logits", "boxes")),
  *(f"lanes/self_tracker_{x}" for x in ("coarse", "fine")),
}


# *** how far two students are from each other ***


def tensors(**arrays):
  return {k: torch.from_numpy(v).float() for k, v in arrays.items()}


def test_chances_and_classes_by_their_divergence(rng):
  a, b = rng.normal(0, 2, (2, 2, 5, 6, 7))
  got = float(difference("segmentation", *(tensors(segmentation=x) for x in (a, b))))
  assert got == pytest.approx(rel_entr(softmax(b, 1), softmax(a, 1)).sum(1).mean(), rel=1e-4)
  p, q = expit(b), expit(a)
  want = (rel_entr(p, q) + rel_entr(1 - p, 1 - q)).sum() / max(p.sum(), 1)
  for name in ("objects_heat", "detector_logits", "oriented_heat"):
    assert float(difference(name, *(tensors(**{name: x}) for x in (a, b)))) == pytest.approx(want, rel=1e-4)


def test_numbers_in_parts_of_their_variance(rng):
  """A change of the unit, or a channel's offset, changes nothing; where the teacher sees nothing nothing counts."""
  a, b = rng.normal(0, 1, (2, 3, 4, 5, 6))
  apart = ((a - b) ** 2).sum() / ((b - b.mean((0, 2, 3), keepdims=True)) ** 2).sum()
  offset = rng.normal(0, 9, (1, 4, 1, 1))
  for x, y in ((a, b), (7 * a + offset, 7 * b + offset)):
    assert float(difference("depth", *(tensors(depth=z) for z in (x, y)))) == pytest.approx(apart, rel=1e-3)
  moved = (np.moveaxis(z, 1, -1).copy() for z in (a, b))  # whose channels come last
  assert float(difference("tracker_fine", *(tensors(tracker_fine=z) for z in moved))) == pytest.approx(apart, rel=1e-3)
  heat = np.full((3, 2, 5, 6), -30.0)
  heat[:, 1, :2] = 30.0
  sides = tensors(objects_coef=a, objects_heat=-heat), tensors(objects_coef=b, objects_heat=heat)
  a, b = a[:, :, :2], b[:, :, :2]
  apart = ((a - b) ** 2).sum() / ((b - b.mean((0, 2, 3), keepdims=True)) ** 2).sum()
  assert float(difference("objects_coef", *sides)) == pytest.approx(apart, rel=1e-3)


def test_boxes_in_parts_of_their_sides():
  """One of two objects counts; its left side is off by a tenth of its width, in both forms."""
  heat = np.array([[[[20.0, -40.0]]]])
  want = np.array([8.0, 4.0, 12.0, 6.0])[None, :, None, None].repeat(2, 3)  # 20 x 10
  off = want.copy()
  off[0, 0] += 2.0
  off[0, :, 0, 1] *= 3
  sides = (tensors(objects_box=x, objects_heat=heat) for x in (off, want))
  assert float(difference("objects_box", *sides)) == pytest.approx(0.1**2 / 4, rel=1e-4)
  logits, want = np.array([[[20.0], [-40.0]]]), np.array([[[0.5, 0.5, 0.2, 0.1], [0.5, 0.5, 0.2, 0.1]]])
  off = want + [[[0.02, 0, 0, 0], [0.3, 0.3, 0.3, 0.3]]]
  sides = (tensors(detector_boxes=x, detector_logits=logits) for x in (off, want))
  assert float(difference("detector_boxes", *sides)) == pytest.approx(0.1**2 / 4, rel=1e-4)


# *** what is taught ***


@pytest.fixture(scope="module")
def student():
  torch.manual_seed(0)
  made = build("unified-nano").eval()
  with torch.no_grad():
    for m in made.detector.boxes:
      m[2].weight.normal_(0, 0.1)  # a fresh one says the same of all pictures
  return made


def lesson(student, teacher, rounding=None):
  """-> the losses' parts of two frames, and the gradients of all."""
  model = Distiller(student, TASKS, {}, label_weight=0.0).eval()
  model.teacher, model.rounding = teacher, rounding
  student.maps_too = True
  student.zero_grad()
  frame = torch.randint(0, 256, (2, *student.spec.input.shape), dtype=torch.uint8)
  parts = model({"frame": frame})
  parts.pop("total").backward()
  return {k: float(v.detach()) for k, v in parts.items()}, {
    k: p.grad for k, p in student.named_parameters() if p.grad is not None
  }


def test_nothing_is_taught_where_nothing_is_rounded(student):
  """And of a student that is, all that is in 8 bits; what the tracker does with its maps is float, and stays."""
  teacher = Teacher(student, TASKS)
  nothing, still = lesson(student, teacher)
  assert nothing.keys() == PARTS and max(map(abs, nothing.values())) < 1e-6
  place = "backbone:relu:0"
  layers = {f"{n}:conv2d:0": "" for n, m in student.named_modules() if isinstance(m, torch.nn.Conv2d)}
  rounds = Rounding({"t": place}, {}, layers, {}, limit=7)  # 4 bits, which cannot be missed
  parts, grads = lesson(student, teacher, rounds)
  assert parts.keys() == PARTS and min(parts.values()) > 1e-6
  assert grads.keys() == still.keys()
  most = {
    k: max(float(g.abs().max()) for n, g in x.items() if n.startswith("backbone"))
    for k, x in (("still", still), ("rounded", grads))
  }
  assert most["still"] < 1e-3 * most["rounded"]
  assert not any(k.startswith(("lanes.stages", "lanes.votes", "lanes.visible")) for k in grads)
  assert any(k.startswith("lanes.fine") for k in grads) and all(
    not p.requires_grad for p in teacher.student.parameters()
  )


def test_a_student_that_begins_anew_does_not_teach_itself(student):
  teacher, known = Teacher(student, TASKS), student.state_dict()
  check_known(teacher, known)
  check_known(teacher, {k: v for k, v in known.items() if not k.startswith(("lanes.stages", "depth.features"))})
  with pytest.raises(UserError, match=r"1 of .* the first is depth\.depth\.1\.bias"):
    check_known(teacher, {k: v for k, v in known.items() if k != "depth.depth.1.bias"})
  with pytest.raises(UserError, match=r"objects\.heat\.weight"):
    check_known(teacher, {**known, "objects.heat.weight": known["objects.heat.weight"][:2]})
  check_known(Teacher(student, ["depth"]), {k: v for k, v in known.items() if not k.startswith("objects")})


def test_a_teacher_is_of_its_student_s_form(student):
  spec = spec_of("depth-nano")
  widths = {"depth.depth.0.1.0": [0, 8], "depth.depth.0.1.1": [8, 8], "depth.depth.1": [8, 0]}
  whole, pruned = build(spec), build(replace(spec, widths=widths))
  teacher = Teacher(whole, ["depth"])
  check_alike(teacher, pruned)
  again = Teacher.of_state(Teacher(pruned, ["depth"]).state(), ["depth"], ())
  assert same(again.student.state_dict(), pruned.state_dict()) and again.student.spec == pruned.spec
  two = ClassSet("two", (Class("car", maps=False, boxes=True), Class("dog", maps=False, boxes=True)))
  other = build(spec_of("objects-nano", classes=two))
  with pytest.raises(UserError, match=r"objects_heat of unified-nano is \(1, 3, 32, 64\), and \(1, 2, 32, 64\) of obj"):
    check_alike(Teacher(student, ["objects"]), other)


SHIPPED = Path(__file__).resolve().parents[3] / "models"


@pytest.mark.parametrize(
  "bundle, more, says",
  [
    ("depth", {"tasks": ["depth", "lanes"]}, "it has not learned lanes; name with --tasks"),
    ("depth", {"input": InputSpec(view="sbigmodel")}, "it sees .*medmodel.*, and .*sbigmodel.* is learned on"),
    ("depth", {"per_height": False}, "its depth is in heights of the camera"),
    (
      "objects",
      {"tasks": ["objects"]},
      "it tells the boxes vehicle, person, two-wheeler apart, not those of --classes",
    ),
  ],
)
def test_a_bundle_that_says_something_else(bundle, more, says):
  config = replace(Config(f"{bundle}-small", ["depth"]), **more)
  with pytest.raises(UserError, match=says):
    open_teacher(SHIPPED / f"fair_{bundle}_small", config)


@pytest.mark.slow
def test_a_bundle_teaches(rng):
  bundle = load_bundle(SHIPPED / "fair_depth_small")
  config = Config("depth-small", ["depth"], backbone=bundle.manifest["backbone"])
  student, teachers, trained = open_teacher(bundle.path, config)
  frame = rng.integers(0, 256, (1, 6, 128, 256), dtype=np.uint8)
  want = OnnxRunner(bundle, bundle.graphs[0]).run({"frame": frame})["depth"]
  out = Teacher.of_state(Teacher(student, ["depth"]).state(), ["depth"], ()).student.encode(torch.from_numpy(frame))[0]
  assert np.abs(out["depth"].numpy() - want).max() < 1e-3 * np.abs(want).max()
  assert len(teachers) == len(bundle.manifest["provenance"]["teachers"]) and "licence" in teachers[0]
  assert trained["unknown"] == ["fair_depth_small"]


# *** the command ***


@pytest.mark.parametrize(
  "more, says",
  [
    ({"init": ()}, "--self-taught: it goes on from a student that has learned; name it with --init"),
    ({"student": "d-fine-nano"}, "only our own students are"),
    ({"label_weight": -1.0}, "--label-weight -1: a weight"),
    ({"self_taught": "off", "label_weight": 1.0}, "--label-weight weighs labels beside --self-taught"),
    ({"live_teacher": "sky"}, "give --label-weight"),
  ],
)
def test_what_cannot_be_self_taught(more, says, tmp_path):
  said = {"labels": tmp_path, "output": tmp_path, "student": "depth-nano", "init": ("x",), "self_taught": "init"} | more
  with pytest.raises(UserError, match=says):
    float_teacher(Options(**said))


def test_8_bits_are_self_taught_unless_it_is_switched_off(tmp_path):
  said = {"labels": tmp_path, "output": tmp_path, "student": "depth-nano", "init": ("x",), "qat": True}
  assert float_teacher(Options(**said)) == ("init", 0.0)
  assert float_teacher(Options(**said, label_weight=0.5)) == ("init", 0.5)
  assert float_teacher(Options(**said, self_taught="off")) == ("", 1.0)
  assert float_teacher(Options(**said | {"qat": False})) == ("", 1.0)
  assert float_teacher(Options(**said, self_taught="runs/whole")) == ("whole", 0.0)
  before = Config.from_dict({"student": "depth-nano", "tasks": ["depth"]})
  assert (before.self_taught, before.label_weight, before.taught_by, before.labeled) == ("", 1.0, "", ["depth"])


def teach(store, out, *more):
  return taught(store, out, "--batch-size", 2, "--eval-every", 1, "--lr", "0.001", *more)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
  """-> a folder with frames that nobody labeled, and a student in `run` that has learned from others."""
  root = tmp_path_factory.mktemp("self")
  write_store(root / "labeled", n=3)
  write_store(root / "frames", n=3, labels=[])
  teach(root / "labeled", root / "run", "--steps", 1)
  return root


@pytest.mark.slow
def test_frames_alone_teach_and_a_run_goes_on_bit_for_bit(first, tmp_path, capsys):
  run = tmp_path / "whole_one"
  shutil.copytree(first / "run", run)
  args = ["--init", run, "--self-taught", run, "--steps", 2]
  whole = teach(first / "frames", tmp_path / "a", *args)
  assert "learns depth, taught by the student whole_one; " in capsys.readouterr().out
  with interrupted(1):
    teach(first / "frames", tmp_path / "b", *args)
  parts = load_checkpoint(tmp_path / "b" / "last.pt")
  shutil.rmtree(run)  # it is in the checkpoint
  again = teach(first / "frames", tmp_path / "b", *args, "--resume")
  assert all(same(again[k], whole[k]) for k in ("model", "ema", "optimizer", "teacher"))
  assert not same(again["model"], parts["model"])
  before = load_checkpoint(first / "run" / "best.pt")["ema"]
  assert same(
    whole["teacher"]["weights"], {k.removeprefix("student."): v for k, v in before.items() if k.startswith("student.")}
  )
  assert whole["config"]["self_taught"] == "whole_one" and str(tmp_path) not in str(whole["config"])
  assert "teacher" not in load_checkpoint(tmp_path / "a" / "best.pt")
  student, config, state = export.load_student(tmp_path / "a")
  said = card("x", student, config, state, {}, [], [], [], "", whole["trained"])
  assert "steps of 2 frames, taught by the student whole_one." in said


def test_labels_may_teach_beside_it(first, tmp_path):
  args = ["--init", first / "run", "--steps", 1, "--self-taught", "--label-weight", "0.5"]
  teach(first / "labeled", tmp_path / "both", *args)
  log = (tmp_path / "both" / "log.jsonl").read_text()
  assert "depth/self_depth" in log and "depth/metric" in log
  with pytest.raises(UserError, match="nothing that teaches 'depth'"):
    teach(first / "frames", tmp_path / "none", *args)


def test_who_has_not_learned_it_does_not_teach_it(first, tmp_path):
  words = ["--labels", first / "frames", "--student", "unified-nano", "--tasks", "depth,objects", "--output"]
  words += [tmp_path / "x", "--init", first / "run", "--steps", 1, "--batch-size", 2, "--workers", 0]
  for more, says in (
    (["--self-taught"], "are not those of --init"),
    (["--self-taught", first / "run"], "it has not learned objects"),
  ):
    with pytest.MonkeyPatch.context() as m, pytest.raises(UserError, match=says):
      m.setattr(sys, "argv", ["distill", *map(str, words + more)])
      distill.main()

"""Of a class that a teacher has no name for, its labels teach nothing: neither where it is nor where it is not."""

import numpy as np
import pytest
import torch
from label_fixture import LABELS, write_store

from openpilot.tools.fair.distillation.augment import NONE
from openpilot.tools.fair.distillation.batch import convert
from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.distillation.matching import objects_loss, set_loss
from openpilot.tools.fair.distillation.oriented import oriented_loss
from openpilot.tools.fair.distillation.plan import split
from openpilot.tools.fair.spec import Class, ClassSet
from openpilot.tools.fair.teacher import Label

EVERY, PART = torch.tensor([True, True, True]), torch.tensor([True, False, True])
ROUTES = ("00000001--aaaaaaaaaa", "00000002--bbbbbbbbbb")


def objects(known, cls=(0, 2)):
  boxes = torch.tensor([[20.0, 30, 60, 90], [200, 100, 280, 180]])[: len(cls)]
  upright = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2], torch.zeros(len(cls), 1)], 1)
  o = {"boxes": boxes, "cls": torch.tensor(cls), "score": torch.ones(len(cls)), "known": known}
  return {**o, "track": torch.full((len(cls),), -1), "mask": None}, {**o, "boxes": upright}


def scores_gradient(head, known, cls=(0, 2)):
  """Of two pictures' scores, (2, K, ...); the second picture's teacher has a name for every class."""
  g = torch.Generator().manual_seed(5)
  some = [objects(known, cls), objects(EVERY)]
  if head == "detector":
    scores = torch.randn(2, 7, 3, generator=g).requires_grad_()
    out = {"detector_logits": scores, "detector_boxes": torch.rand(2, 7, 4, generator=g) * 0.4 + 0.2}
    loss = set_loss(out, [upright for upright, _ in some])["class"]
  else:
    scores = torch.randn(2, 3, 32, 64, generator=g).requires_grad_()
    valid = torch.ones(2, 64, 128, dtype=torch.bool)
    shapes = {"box": (4, 32, 64), "coef": (6, 32, 64), "proto": (6, 64, 128), "embed": (5, 32, 64)}
    out = {f"objects_{k}": torch.rand(2, *s, generator=g) for k, s in shapes.items()} | {"objects_heat": scores}
    if head == "objects":
      loss = objects_loss(out, [upright for upright, _ in some], valid)["heat"]
    else:
      turned = {"oriented_heat": scores, "oriented_box": torch.rand(2, 7, 32, 64, generator=g)}
      loss = oriented_loss(turned, [o for _, o in some], valid)["heat"]
  (gradient,) = torch.autograd.grad(loss, scores)
  return gradient.transpose(1, 2) if head == "detector" else gradient


@pytest.mark.parametrize("head", ["objects", "detector", "oriented"])
def test_a_class_without_a_name_is_not_learned_to_be_nowhere(head):
  whole, part = scores_gradient(head, EVERY), scores_gradient(head, PART)
  assert whole.abs().amax(tuple(range(2, whole.dim()))).gt(0).all()
  assert (part[0, 1] == 0).all()
  assert torch.equal(part[0, [0, 2]], whole[0, [0, 2]]) and torch.equal(part[1], whole[1])


@pytest.mark.parametrize("head", ["objects", "detector", "oriented"])
def test_where_it_is_said_to_be_it_is_learned(head):
  """As of labels by two, of which only one looked everywhere."""
  gradient = scores_gradient(head, PART, (0, 1))[0, 1]
  assert (gradient < 0).sum() == 1 and (gradient != 0).sum() == 1  # only upward, where the object is


def store_of(root, teachers):
  for route, (teacher, names) in zip(ROUTES, teachers.items(), strict=True):
    boxes = [Label("objects", "boxes", shape=(256, 512), unit="px", classes=names)]
    write_store(root, (route,), 4, teacher, boxes if teacher != "simulator" else [*LABELS[:2], *boxes])
  classes = ClassSet("own", tuple(Class(n, boxes=True, maps=False) for n in ("vehicle", "deer", "elk")))
  return Clips(root, ["objects", "detector"], 1, classes=classes)


def known(clips):
  """By segment, what reaches the losses."""
  read = [clips.read(i) for i in range(len(clips))]
  found = {c.name.split(" ")[0]: convert(c, NONE, np.random.default_rng(0))["objects"] for c in read}
  return [found[f"{route}--0"][0]["known"].tolist() for route in ROUTES]


def test_a_teacher_teaches_the_classes_that_it_has_names_for(tmp_path):
  clips = store_of(tmp_path, {"cars": ("vehicle",), "zoo": ("vehicle", "deer")})
  assert known(clips) == [[True, False, True], [True, True, True]]  # nobody knows elks: those are nowhere
  assert clips.not_told() == [
    "cars has no name for deer: in the 1 segment that it labels nothing of that is taught",
    "nothing here has a name for elk: taught as being nowhere",
  ]
  one = clips.part([f"{ROUTES[0]}--0"])  # what is held out is judged by the same
  read = convert(one.read(0), NONE, np.random.default_rng(0))
  assert read["objects"][0]["known"].tolist() == [True, False, True]


def test_a_store_that_judges_does_not_deny_what_it_has_no_name_for(tmp_path, capsys):
  """Held out in a store of its own, without a name for deer: one that is found there was counted as an error."""
  learned = store_of(tmp_path / "learned", {"cars": ("vehicle",), "zoo": ("vehicle", "deer")})
  store_of(tmp_path / "val", {"cars": ("vehicle",), "other": ("vehicle",)})
  config = Config("objects-nano", ["objects"], classes=learned.classes)
  train, val = split(tmp_path / "learned", tmp_path / "val", config, (), None)
  assert known(train) == [[True, False, True], [True, True, True]]
  assert known(val) == [[True, False, True]] * 2  # nobody knows elks: those are nowhere, here too
  err = capsys.readouterr().err
  assert "other has no name for deer: in the 1 segment that it labels nothing of that is judged" in err
  assert "nothing here has a name for elk: judged as being nowhere" in err and "for deer, elk" not in err


def test_the_simulator_knows_all_that_is_there(tmp_path):
  clips = store_of(tmp_path, {"simulator": ("vehicle",), "zoo": ("vehicle", "deer", "elk")})
  assert known(clips) == [[True] * 3, [True] * 3] and clips.not_told() == []


@pytest.mark.parametrize(
  ("teachers", "said"), [(("cars",), "one segment only"), (("cars", "zoo"), "no two of the 2 segments")]
)
def test_why_nothing_better_is_held_out_than_the_end(tmp_path, capsys, teachers, said):
  """Two segments were called one."""
  boxes = [Label("objects", "boxes", shape=(256, 512), unit="px", classes=("vehicle",))]
  for route, teacher in zip(ROUTES, teachers, strict=False):
    write_store(tmp_path, (route,), 16, teacher, boxes)
  classes = ClassSet("own", (Class("vehicle", boxes=True, maps=False),))
  train, val = split(tmp_path, None, Config("objects-nano", ["objects"], classes=classes, clip=1), (), None)
  assert (len(train), len(val)) == (14 * len(teachers) - 2, 2 * len(teachers))
  assert f"warning: {said}" in capsys.readouterr().err

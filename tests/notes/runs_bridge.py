"""dinov3_bridge.md: a DINOv3 of one block, of ViT-L's width, in the working folder."""

from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from note_blocks import Block, fails, runs, same_call
from torch import Tensor

from dinov3_bridge.config import DinoV3Config
from dinov3_bridge.model import DinoV3Teacher
from openpilot.tools.fair.dinov3.losses import masked_cosine_loss
from openpilot.tools.fair.hf import preprocess
from openpilot.tools.fair.images.obb_trainer import DinoOBBTrainer

NOTE = "dinov3_bridge.md"
COMMON = {"Path": Path, "torch": torch, "Tensor": Tensor}


def teacher() -> DinoV3Teacher:
  return DinoV3Teacher(DinoV3Config(root=Path("dinov3")), "cpu")


def pictures(n: int = 1) -> Tensor:
  return torch.rand(n, 3, 64, 96)


@runs(NOTE, 1)
def global_features(block: Block) -> None:
  names = block.run(images=pictures(), **COMMON)
  assert names["features"].shape == (1, 1024) and not names["features"].requires_grad
  assert names["cfg"].how.mean == (0.485, 0.456, 0.406) and names["cfg"].how.std == (0.229, 0.224, 0.225)
  assert names["cfg"].how.size == (518, 518) and names["cfg"].patch == 16 and names["cfg"].prefix == 5


@runs(NOTE, 2)
def feature_map(block: Block) -> None:
  names = block.run(images=pictures(), teacher=teacher())
  assert names["feature_map"].shape == (1, 1024, 32, 32)  # 518 over 16, as the note's own table of models has it


@runs(NOTE, 3)
def frozen(block: Block) -> None:
  ours, x = teacher(), pictures()
  method = block.run(**COMMON)["extract_features"]
  ready = preprocess(x, ours.cfg.how, ours.cfg.input_size(64, 96), ours.where)
  torch.testing.assert_close(ours.extract_features(x), method(SimpleNamespace(model=ours.model), ready))
  same_call(DinoV3Teacher.extract_features, method)
  assert not ours.train().training and not any(p.requires_grad for p in ours.parameters())


@runs(NOTE, 4)
def config(block: Block) -> None:
  theirs = block.run(dataclass=dataclass, **COMMON)["DinoV3Config"]
  same_call(DinoV3Config, theirs)
  assert {f.name for f in fields(theirs)} <= {f.name for f in fields(DinoV3Config)}


@runs(NOTE, 5)
def interface(block: Block) -> None:
  theirs = block.run(DinoV3Config=DinoV3Config, **COMMON)["DinoV3Teacher"]
  for name in ("__init__", "extract_features", "extract_feature_map"):
    same_call(getattr(DinoV3Teacher, name), getattr(theirs, name))


@runs(NOTE, 6)
def usage(block: Block) -> None:
  names = block.run()
  assert names["cls_features"].shape == (4, 1024) and names["feature_map"].shape == (4, 1024, 32, 32)


@fails(NOTE, 7)
def oriented_boxes(block: Block) -> None:
  """Its teacher works; its loss does not, and neither would it with a target. Ours takes the same words."""
  theirs = block.run(DinoV3Config=DinoV3Config, F=F, **COMMON)["DinoOBBTrainer"]
  said = SimpleNamespace(dino_root=Path("dinov3")), torch.device("cpu")
  made, ours = theirs(*said), DinoOBBTrainer(*said)
  for name in ("__init__", "compute_distillation_loss"):
    same_call(getattr(DinoOBBTrainer, name), getattr(theirs, name))
  student = torch.nn.Conv2d(3, 8, 8, 8)
  loss = ours.compute_distillation_loss(pictures(), student(pictures()))
  loss.backward()
  assert loss.shape == () and student.weight.grad is not None and not ours.teacher.training
  x = pictures()
  seen = made.teacher.extract_feature_map(x)
  with pytest.raises(TypeError):
    made.compute_distillation_loss(x, seen)
  tokens = seen.flatten(2).transpose(1, 2)
  with pytest.raises(RuntimeError):
    F.cosine_embedding_loss(tokens, tokens, torch.ones(tokens.shape[:2]))
  assert float(masked_cosine_loss(seen, seen)) == pytest.approx(0, abs=1e-5)


@runs(NOTE, 8)
def in_a_detectors_training(block: Block) -> None:
  student = torch.nn.Conv2d(3, 1024, 16, 16)
  x = pictures(3)
  names = block.run(
    teacher=teacher(),
    images=x,
    student=SimpleNamespace(backneck=lambda *_: student(x)),
    mask=torch.tensor([True, False, True]),
    cosine_distance=lambda said, seen: masked_cosine_loss(seen, said),
  )
  loss = names["loss_distill"]
  assert loss.shape == () and 0 <= float(loss.detach()) <= 2
  loss.backward()
  assert student.weight.grad is not None

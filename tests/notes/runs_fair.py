"""fair_integration.md: its classes beside ours, and ours on small checkpoints of the names that it gives."""

import sys
from types import ModuleType

import numpy as np
import pytest
import sam2_models
import torch
import torch.nn.functional as F
from cotracker_models import known_video
from dino_models import images
from note_blocks import Block, runs, same_call
from torch import nn

from openpilot.tools.dgx.dense.dora_distillation import DoRADistillation
from openpilot.tools.fair.cotracker.inference import LaneTracker
from openpilot.tools.fair.dinov2.inference import DINOv2Wrapper
from openpilot.tools.fair.distillation.trainer import DistillationTrainer
from openpilot.tools.fair.sam.inference import SAM2VideoWrapper
from openpilot.tools.fair.students.dinov2_student import DINOv2Student
from openpilot.tools.fair.students.student import parameters

NOTE = "fair_integration.md"
COMMON = {"torch": torch, "nn": nn, "F": F}


def with_package(block: Block, module: str, name: str) -> dict:
  """The block where a package that it imports is not installed: only its signatures are looked at."""
  package, inner = ModuleType(module.split(".")[0]), ModuleType(module)
  setattr(inner, name, None)
  with pytest.MonkeyPatch.context() as m:
    m.setitem(sys.modules, package.__name__, package)
    m.setitem(sys.modules, module, inner)
    return block.run(**COMMON)


@runs(NOTE, 1)
def dinov2(block: Block) -> None:
  theirs = with_package(block, "dinov2.models", "build_model")["DINOv2Wrapper"]
  for name in ("__init__", "extract_features", "estimate_depth"):
    same_call(getattr(DINOv2Wrapper, name), getattr(theirs, name))
  ours, x = DINOv2Wrapper(), images(56, 84)
  assert ours.extract_features(x).shape == (2, 768, 4, 6) and ours.estimate_depth(x).shape == (2, 1, 56, 84)


@runs(NOTE, 2)
def dinov2_student(block: Block) -> None:
  same_call(DINOv2Student, lambda: None)
  block.run(**COMMON)
  ours = DINOv2Student().eval()
  with torch.no_grad():
    out = ours(torch.zeros(1, 6, 128, 256, dtype=torch.uint8))
  assert isinstance(ours, nn.Module) and set(out) == {"features", "depth"} and out["depth"].shape[1] == 1
  assert parameters(ours) < 5_000_000


@runs(NOTE, 3)
def sam2(block: Block) -> None:
  theirs = with_package(block, "sam2.build_sam", "build_sam2_video_predictor")["SAM2VideoWrapper"]
  same_call(SAM2VideoWrapper.track_objects, theirs.track_objects)
  rgb = sam2_models.frames(3)
  masks = SAM2VideoWrapper().track_objects(rgb, sam2_models.BOXES)
  assert len(masks) == len(rgb) and all(m.shape == (2, *rgb.shape[2:]) for m in masks)


@runs(NOTE, 4)
def cotracker(block: Block) -> None:
  theirs = block.run(**COMMON)["LaneTracker"]
  same_call(LaneTracker.track_lane_points, theirs.track_lane_points)
  video, points = torch.from_numpy(known_video(9, 2, 1)), torch.tensor([[10.0, 10.0], [30.0, 40.0]])
  tracks, visibility = LaneTracker().track_lane_points(video[None].float(), points)
  assert tracks.shape == (9, 2, 2) and visibility.shape == (9, 2)
  np.testing.assert_allclose(tracks, points + torch.arange(9)[:, None, None] * torch.tensor([2.0, 1.0]), atol=1e-3)


@runs(NOTE, 5)
def soft_labels(block: Block) -> None:
  theirs = block.run(**COMMON)["DistillationTrainer"]
  for name in ("__init__", "distillation_loss", "feature_distillation_loss"):
    same_call(getattr(DistillationTrainer, name), getattr(theirs, name))
  a, b = (kind(nn.Linear(3, 5), nn.Linear(3, 5)) for kind in (DistillationTrainer, theirs))
  said, taught, true = torch.randn(6, 5), torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
  torch.testing.assert_close(a.distillation_loss(said, taught, true), b.distillation_loss(said, taught, true))
  seen, wanted = torch.randn(2, 4, 3, 3), torch.randn(2, 8, 3, 3)
  loss = a.feature_distillation_loss(seen, wanted)
  b.projector = a.projector
  torch.testing.assert_close(loss, b.feature_distillation_loss(seen, wanted))


@runs(NOTE, 6)
def dora_distillation(block: Block) -> None:
  theirs = block.run(**COMMON)["DoRADistillation"]
  for name in ("__init__", "train_step"):
    same_call(getattr(DoRADistillation, name), getattr(theirs, name))
  teacher = DINOv2Wrapper(weights="narrow", depth_head="narrow_head.pth")
  ours = DoRADistillation(DINOv2Student("nano"), teacher)
  loss = ours.train_step(images(256, 512, 1), {"depth": torch.full((1, 64, 128), 20.0)})
  loss.backward()
  learned = [p for p in ours.network.parameters() if p.requires_grad]
  assert loss.shape == () and loss > 0 and learned and any(p.grad is not None and p.grad.any() for p in learned)

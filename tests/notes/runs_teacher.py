"""grounded_sam_platform.md: its blocks of the teachers, on small Grounding DINO and SAM of the official classes. Where
it writes the file of a published checkpoint, the folder of a small one lies."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import grounded_models as small
import numpy as np
import peft
import torch
from note_blocks import Block, runs, same_call
from torch import nn

from openpilot.tools.fair.grounded_sam.detector import load_detector
from openpilot.tools.fair.grounded_sam.experiment import generate_config, load_config
from openpilot.tools.fair.grounded_sam.lora import LoRATrainer, lora_config, save_lora, trainable
from openpilot.tools.fair.grounded_sam.prompts import make_prompts
from openpilot.tools.fair.grounded_sam.segmenter import load_segmenter
from openpilot.tools.fair.grounded_sam.two_stage import (
  GroundedSAM,
  load_grounding_dino_with_lora,
  load_sam_with_lora,
  load_teachers,
)
from openpilot.tools.fair.teacher import hash_weights
from openpilot.tools.learn.device import choose_device

NOTE = "grounded_sam_platform.md"
NAMES = ("ear of bag", "dent", "label")
FILES = {"grounding_dino": "groundingdino_swint_ogc.pth", "sam": "sam_vit_h_4b8939.pth"}


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
  return tempfile.TemporaryDirectory()


@functools.cache
def made() -> Path:
  """A folder of both bases under the published files' names, and of adapters for them."""
  root = Path(folder().name)
  cpu = choose_device("cpu", "float32")
  small.save_dino(root / FILES["grounding_dino"])
  small.save_sam(root / FILES["sam"])
  for key, name in FILES.items():
    teacher: Any = load_detector(root / name, cpu) if key == "grounding_dino" else load_segmenter(root / name, cpu)
    tuned = LoRATrainer(teacher.model, lora_config(teacher.model, teacher.family, 4))
    with torch.no_grad():
      for p in trainable(tuned.model).values():
        p.add_(0.3)
    save_lora(root / f"{key}_lora", tuned.model, name, hash_weights(root / name), teacher.family)
  return root


def lay(where: str, *what: str) -> None:
  Path(where).mkdir(parents=True, exist_ok=True)
  for name in what:
    (Path(where) / name).symlink_to(made() / name)


def image() -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)


@runs(NOTE, 1)
def two_stages(block: Block) -> None:
  """Boxes of one phrase, and their masks: what both together say of a class alone."""
  dino = load_grounding_dino_with_lora(made() / FILES["grounding_dino"], device="cpu")
  sam = load_sam_with_lora(made() / FILES["sam"], device="cpu")
  names = block.run(
    config={"class_mapping": dict(enumerate(NAMES))},
    class_id=0,
    input_image=image(),
    grounding_dino=functools.partial(dino, score=0.0),  # of random weights no score is high
    sam=sam,
  )
  want = dino.detect([image()], make_prompts(dino.tokenizer, NAMES[:1]), score=0.0)[0]
  assert len(want.boxes) and np.array_equal(names["boxes"], want.boxes)
  assert names["masks"].shape == (len(want.boxes), 64, 64) and np.array_equal(
    names["masks"], sam.segment(image(), want.boxes)
  )


@runs(NOTE, 3)
def untuned_and_tuned(block: Block) -> None:
  lay("pretrained", *FILES.values())
  lay("data/models/pretrained", *FILES.values())
  lay("experiments/exp1/teachers", "grounding_dino_lora", "sam_lora")
  kept = []

  def make(*args: Any, **more: Any) -> GroundedSAM:
    kept.append(GroundedSAM(*args, **more, classes=NAMES, device="cpu"))
    return kept[-1]

  names = block.run(GroundedSAM=make)
  plain, tuned = kept
  assert names["teacher"] is tuned
  x = [image()]
  assert not any("lora_" in n for m in (tuned.detector, tuned.segmenter) if m for n, _ in m.model.named_parameters())
  a, b = plain.detect(x, 0.0)[0], tuned.detect(x, 0.0)[0]
  assert not np.allclose(np.sort(a.scores), np.sort(b.scores), atol=1e-4)
  box = [np.array([[5.0, 6, 50, 45]])]
  assert plain.segment(x, box)[0].shape == tuned.segment(x, box)[0].shape == (1, 64, 64)


class Attention(nn.Module):
  def __init__(self):
    super().__init__()
    self.q_proj, self.v_proj, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)


@runs(NOTE, 8)
def trainer_of_adapters(block: Block) -> None:
  """Theirs asserts what ours raises; both let the same learn."""
  names = block.run(get_peft_model=peft.get_peft_model)
  same_call(LoRATrainer, names["LoRATrainer"])
  config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
  both = [kind(Attention(), config) for kind in (LoRATrainer, names["LoRATrainer"])]
  ours, theirs = (set(trainable(m.model)) for m in both)
  assert ours == theirs and len(ours) == 4
  assert both[0].counts == (2 * 4 * (8 + 8), 2 * 72 + 36)


@runs(NOTE, 20)
def configurations(block: Block) -> None:
  Path("default.yaml").write_text("epochs: 3\nlora: {r: 8}\n")
  names = block.run(load_yaml=load_config)
  same_call(generate_config, names["generate_config"])
  info = {"num_classes": 3, "class_mapping": dict(enumerate(NAMES))}
  for more in (None, {"epochs": 9}):
    assert generate_config("default.yaml", info, more) == names["generate_config"]("default.yaml", info, more)


@runs(NOTE, 21)
def teachers_by_the_data(block: Block) -> None:
  names = block.run(load_grounding_dino_with_lora=load_grounding_dino_with_lora, load_sam_with_lora=load_sam_with_lora)
  same_call(load_teachers, names["load_teachers"])
  info = {"has_boxes": True, "has_masks": True}
  ours, theirs = (f(info, made(), made()) for f in (load_teachers, names["load_teachers"]))
  assert ours.keys() == theirs.keys() == {"grounding_dino", "sam"}
  for key in ours:
    for (n, a), (m, b) in zip(ours[key].model.named_parameters(), theirs[key].model.named_parameters(), strict=True):
      assert n == m and torch.equal(a, b)
  for missing in info:
    assert len(load_teachers({**info, missing: False}, made(), made())) == 1

"""grounded_sam_platform.md: its blocks of PEFT, with adapters as save_adapter() writes them. The loaders that it names
are the reader's own; a small network stands for what they load."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from note_blocks import Block, fails, runs
from torch import nn

from openpilot.tools.dgx.training.dora import DoRALayer, apply_dora, save_adapter
from openpilot.tools.fair.students.student import build, student_names

NOTE = "grounded_sam_platform.md"


class Attention(nn.Module):
  def __init__(self):
    super().__init__()
    self.backbone = nn.Module()
    self.backbone.layer4 = nn.Linear(8, 8)
    self.q_proj, self.v_proj, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = self.backbone.layer4(x)
    return self.out(self.q_proj(x) * self.v_proj(x))


def base() -> Attention:
  """The same every time."""
  torch.manual_seed(4)
  return Attention()


def save_tuned(folder: str) -> nn.Module:
  """An adapter of base() in `folder`. -> the tuned network."""
  model = base()
  apply_dora(model, 4, targets=["q_proj", "v_proj"])
  with torch.no_grad():
    for adapter in [layer.adapter() for layer in model.modules() if isinstance(layer, DoRALayer)]:
      assert adapter is not None
      adapter.b.normal_(std=0.3)
      adapter.m.mul_(1.2)
  Path(folder).mkdir(parents=True, exist_ok=True)
  save_adapter(model, folder, "0" * 64)  # PEFT does not read the base's hash
  return model


def alike(a: nn.Module, b: nn.Module) -> None:
  x = torch.randn(5, 8)
  with torch.no_grad():
    torch.testing.assert_close(a.eval()(x), b.eval()(x), rtol=1e-4, atol=1e-5)


def learned(model: nn.Module) -> set[str]:
  return {n for n, p in model.named_parameters() if p.requires_grad}


@runs(NOTE, 4)
def load_and_merge(block: Block) -> None:
  tuned = save_tuned("experiments/exp1/teachers/model_lora/")
  names = block.run(PeftModel=peft.PeftModel, load_pretrained_model=lambda path: base())
  alike(names["merged_model"], tuned)
  assert type(names["merged_model"].q_proj) is nn.Linear


@runs(NOTE, 5)
def base_and_adapter(block: Block) -> None:
  tuned = save_tuned("teachers/grounding_dino_lora/")
  alike(block.run(load_grounding_dino=lambda path: base())["merged_dino"], tuned)


@runs(NOTE, 6)
def only_adapters_learn(block: Block) -> None:
  names = block.run(load_grounding_dino=lambda path: base())
  assert learned(names["model"]) and all("lora_" in n for n in learned(names["model"]))
  assert {n.split(".lora_")[0].split(".")[-1] for n in learned(names["model"])} == {"q_proj", "v_proj"}


@fails(NOTE, 7)
def formulas(block: Block) -> None:
  with pytest.raises(SyntaxError):
    block.run()
  for number in (768 * 768, 16 * 768, 2 * 16 * 768):
    assert f"{number:,}" in block.source  # what it counts is right


@runs(NOTE, 9)
def freezing_is_pefts(block: Block) -> None:
  made = []

  def wrap(model: nn.Module, config: peft.LoraConfig) -> nn.Module:
    made.append(peft.get_peft_model(copy.deepcopy(model), config))
    return made[-1]

  block.run(
    get_peft_model=wrap, base_model=base(), lora_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
  )
  wrong, right = (learned(m) for m in made)
  assert any("layer4" in n for n in wrong) and right and all("lora_" in n for n in right)


class Sam(nn.Module):
  def __init__(self, checkpoint: str):
    super().__init__()
    self.image_encoder, self.prompt_encoder, self.mask_decoder = Attention(), Attention(), Attention()


@fails(NOTE, 10)
def a_list_is_of_names(block: Block) -> None:
  common = {"SAM": Sam, "LoraConfig": peft.LoraConfig, "inject_adapter_in_model": peft.inject_adapter_in_model}
  with pytest.raises(ValueError, match="not found in the base model"):
    block.run(**common)
  tuned = peft.inject_adapter_in_model(peft.LoraConfig(r=8, target_modules=r".*mask_decoder.*proj"), Sam(""))
  assert learned(tuned) and all("mask_decoder" in n and "lora_" in n for n in learned(tuned))


@runs(NOTE, 11)
def load_for_distillation(block: Block) -> None:
  sam, dino = save_tuned("teachers/sam_lora/"), save_tuned("experiments/exp1/teachers/dino_lora/")
  names = block.run(load_sam=lambda path: base(), load_grounding_dino=lambda path: base())
  alike(names["teacher_sam"], sam)
  alike(names["teacher_dino"], dino)


@runs(NOTE, 12)
def students_take_no_prompt(block: Block) -> None:
  names = block.run(nn=nn, boxes=1, masks=2, class_ids=3)
  assert names["CorrectStudentModel"](2).forward(None) == (1, 2, 3)
  for name in student_names():
    if name.endswith("-nano") and "lanes" not in build(name).tasks:
      assert set(build(name).inputs()) == {"frame"}

"""Small Grounding DINO, SAM and SAM 2 of the official classes, random weights, in folders as the hub has them, with a
tokenizer of a small vocabulary."""

import json
from pathlib import Path

import torch
import transformers as t

import sam2_models
from sam2_models import IMAGENET

WORDS = ("car", "traffic", "light", "cone", "of", "a", "bag", "ear", "dent", "label", "person", "glorp", "snark")
SIDE = sam2_models.S  # of SAM's pictures


def vocabulary() -> list[str]:
  """BERT's marks at their places, some words, letters."""
  words = [f"[unused{i}]" for i in range(1100)]
  words[0], words[100], words[101], words[102], words[103] = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
  words[1012], words[1029] = ".", "?"
  for i, w in enumerate((*WORDS, *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"))):
    if w not in words:
      words[200 + i] = w
  return words


def save_tokenizer(folder: Path) -> Path:
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
  return folder


def stir(model: torch.nn.Module, seed: int = 1, scale: float = 0.05) -> None:
  """Draws what begins as 0 or 1, too, so that leaving it out would show."""
  g = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for p in model.parameters():
      p.add_(torch.randn(p.shape, generator=g) * scale)


def dino_config(queries: int = 12, kind: type = t.GroundingDinoConfig) -> t.PreTrainedConfig:
  swin = t.SwinConfig(
    embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2], window_size=4, image_size=64, out_indices=[2, 3, 4]
  )
  bert = t.BertConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=len(vocabulary())
  )
  return kind(
    backbone_config=swin,
    text_config=bert,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    num_queries=queries,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    auxiliary_loss=True,
  )


def save_dino(folder: Path, edge: int = 96, mm: bool = False) -> Path:
  """mm: MM Grounding DINO."""
  torch.manual_seed(0)
  if mm:
    model = t.MMGroundingDinoForObjectDetection(dino_config(kind=t.MMGroundingDinoConfig))
  else:
    model = t.GroundingDinoForObjectDetection(dino_config())
  stir(model)
  model.eval().save_pretrained(folder)
  save_tokenizer(folder)
  pictures = {**IMAGENET, "size": {"shortest_edge": edge, "longest_edge": 2 * edge}}
  (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
  return folder


def save_sam(folder: Path) -> Path:
  torch.manual_seed(0)
  vision = {
    "hidden_size": 32,
    "output_channels": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_dim": 64,
    "image_size": SIDE,
    "patch_size": 8,
    "window_size": 3,
    "global_attn_indexes": [1],
    "num_pos_feats": 16,
  }
  prompt = {"hidden_size": 32, "image_size": SIDE, "patch_size": 8, "mask_input_channels": 4}
  decoder = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
  model = t.SamModel(t.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))
  stir(model)
  model.eval().save_pretrained(folder)
  (folder / "preprocessor_config.json").write_text(json.dumps({**IMAGENET, "size": {"longest_edge": SIDE}}))
  return folder


def save_sam2(folder: Path) -> Path:
  torch.manual_seed(0)
  model = t.Sam2Model(t.Sam2Config(**sam2_models.parts()))
  stir(model)
  model.eval().save_pretrained(folder)
  (folder / "preprocessor_config.json").write_text(json.dumps(sam2_models.PICTURES))
  return folder

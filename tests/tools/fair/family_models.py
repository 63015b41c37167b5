"""Small models of the official classes of families of students, random weights, in folders as the hub has them."""

import json
from pathlib import Path

import torch
import transformers as t
from grounded_models import stir
from test_detr import SMALL, SMALL_RT

SIDE = 96
NAMES = ("d-fine-nano", "d-fine-small", "rtdetr-v2-r18", "rf-detr-nano", "rf-detr-seg-nano")


def config_of(name: str) -> t.PreTrainedConfig:
  few = {k: v for k, v in SMALL.items() if k.startswith(("d_", "decoder_ffn", "decoder_layers"))}
  if name.startswith("rf-detr"):
    vit = {
      "model_type": "rf_detr_dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
      "out_features": ["stage1", "stage2"], "patch_size": 12 if "seg" in name else 16,
      "num_windows": 1 if "seg" in name else 2, "image_size": SIDE,
    }  # fmt: skip
    more = {"group_detr": 3, "decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2, "num_labels": 5}
    return t.RfDetrConfig(backbone_config=vit, num_queries=12, decoder_n_points=2, intermediate_size=48, **few, **more)
  small = {**SMALL_RT, "num_denoising": 4, "initializer_range": 0.1}
  if name == "rtdetr-v2-r18":
    back = t.RTDetrResNetConfig(
      embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic", out_indices=[2, 3, 4]
    )
    return t.RTDetrV2Config(backbone_config=back, **small)
  back = t.HGNetV2Config(
    embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_indices=[2, 3, 4],
    stem_channels=[3, 8, 8], stage_in_channels=[8, 8, 16, 24], stage_mid_channels=[8, 8, 8, 8],
    stage_out_channels=[8, 16, 24, 32], stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[2, 2, 2, 2],
  )  # fmt: skip
  return t.DFineConfig(backbone_config=back, **small)


def save(name: str, folder: Path) -> Path:
  from openpilot.tools.fair.students.families import FAMILIES

  torch.manual_seed(0)
  model = getattr(t, FAMILIES[name].kind)(config_of(name))
  stir(model, scale=0.02)
  model.eval().save_pretrained(folder)
  pictures = {"do_normalize": FAMILIES[name].normalized, "image_mean": [0.485, 0.456, 0.406]}
  (folder / "preprocessor_config.json").write_text(json.dumps({**pictures, "image_std": [0.229, 0.224, 0.225]}))
  return folder

"""Checkpoints of the sam2 package under transformers' names."""

import re

import numpy as np
import pytest
import torch
import transformers as t

from openpilot.tools.learn.device import choose_device
from openpilot.tools.fair.sam.checkpoint import config_of, load_pt, rename
from openpilot.tools.lib.errors import UserError
from sam2_models import BOXES, frames, official, save

# names and shapes of sam2's Hiera-T video predictor (facebookresearch/sam2, configs/sam2.1/sam2.1_hiera_t.yaml), and
# what transformers calls them
NAMES = {
  "maskmem_tpos_enc": ("memory_temporal_positional_encoding", (7, 1, 1, 64)),
  "no_mem_embed": ("no_memory_embedding", (1, 1, 256)),
  "no_mem_pos_enc": ("no_memory_positional_encoding", (1, 1, 256)),
  "no_obj_ptr": ("no_object_pointer", (1, 256)),
  "no_obj_embed_spatial": ("occlusion_spatial_embedding_parameter", (1, 64)),
  "image_encoder.trunk.pos_embed": ("vision_encoder.backbone.pos_embed", (1, 96, 7, 7)),
  "image_encoder.trunk.pos_embed_window": ("vision_encoder.backbone.pos_embed_window", (1, 96, 8, 8)),
  "image_encoder.trunk.patch_embed.proj.weight": (
    "vision_encoder.backbone.patch_embed.projection.weight",
    (96, 3, 7, 7),
  ),
  "image_encoder.trunk.blocks.1.norm1.weight": ("vision_encoder.backbone.blocks.1.layer_norm1.weight", (96,)),
  "image_encoder.trunk.blocks.1.attn.qkv.weight": ("vision_encoder.backbone.blocks.1.attn.qkv.weight", (576, 96)),
  "image_encoder.trunk.blocks.1.attn.proj.bias": ("vision_encoder.backbone.blocks.1.attn.proj.bias", (192,)),
  "image_encoder.trunk.blocks.1.mlp.layers.0.weight": (
    "vision_encoder.backbone.blocks.1.mlp.proj_in.weight",
    (768, 192),
  ),
  "image_encoder.trunk.blocks.1.mlp.layers.1.weight": (
    "vision_encoder.backbone.blocks.1.mlp.proj_out.weight",
    (192, 768),
  ),
  "image_encoder.trunk.blocks.1.proj.weight": ("vision_encoder.backbone.blocks.1.proj.weight", (192, 96)),
  "image_encoder.neck.convs.0.conv.weight": ("vision_encoder.neck.convs.0.weight", (256, 768, 1, 1)),
  "mask_downsample.weight": ("mask_downsample.weight", (1, 1, 4, 4)),
  "memory_attention.layers.3.self_attn.out_proj.bias": ("memory_attention.layers.3.self_attn.o_proj.bias", (256,)),
  "memory_attention.layers.3.cross_attn_image.k_proj.weight": (
    "memory_attention.layers.3.cross_attn_image.k_proj.weight",
    (256, 64),
  ),
  "memory_attention.layers.3.linear1.weight": ("memory_attention.layers.3.linear1.weight", (2048, 256)),
  "memory_attention.norm.weight": ("memory_attention.layer_norm.weight", (256,)),
  "memory_encoder.mask_downsampler.encoder.9.weight": (
    "memory_encoder.mask_downsampler.layers.3.conv.weight",
    (256, 64, 3, 3),
  ),
  "memory_encoder.mask_downsampler.encoder.10.weight": (
    "memory_encoder.mask_downsampler.layers.3.layer_norm.weight",
    (256,),
  ),
  "memory_encoder.mask_downsampler.encoder.12.weight": (
    "memory_encoder.mask_downsampler.final_conv.weight",
    (256, 256, 1, 1),
  ),
  "memory_encoder.pix_feat_proj.weight": ("memory_encoder.feature_projection.weight", (256, 256, 1, 1)),
  "memory_encoder.fuser.layers.1.gamma": ("memory_encoder.memory_fuser.layers.1.scale", (256,)),
  "memory_encoder.fuser.layers.1.dwconv.weight": (
    "memory_encoder.memory_fuser.layers.1.depthwise_conv.weight",
    (256, 1, 7, 7),
  ),
  "memory_encoder.fuser.layers.1.norm.bias": ("memory_encoder.memory_fuser.layers.1.layer_norm.bias", (256,)),
  "memory_encoder.fuser.layers.1.pwconv2.weight": (
    "memory_encoder.memory_fuser.layers.1.pointwise_conv2.weight",
    (256, 1024),
  ),
  "memory_encoder.out_proj.weight": ("memory_encoder.projection.weight", (64, 256, 1, 1)),
  "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (
    "prompt_encoder.shared_embedding.positional_embedding",
    (2, 128),
  ),
  "sam_prompt_encoder.not_a_point_embed.weight": ("prompt_encoder.not_a_point_embed.weight", (1, 256)),
  "sam_prompt_encoder.mask_downscaling.3.weight": ("prompt_encoder.mask_embed.conv2.weight", (16, 4, 2, 2)),
  "sam_prompt_encoder.mask_downscaling.4.weight": ("prompt_encoder.mask_embed.layer_norm2.weight", (16,)),
  "sam_prompt_encoder.mask_downscaling.6.weight": ("prompt_encoder.mask_embed.conv3.weight", (256, 16, 1, 1)),
  "sam_prompt_encoder.no_mask_embed.weight": ("prompt_encoder.no_mask_embed.weight", (1, 256)),
  "sam_mask_decoder.transformer.layers.0.mlp.layers.1.weight": (
    "mask_decoder.transformer.layers.0.mlp.proj_out.weight",
    (256, 2048),
  ),
  "sam_mask_decoder.transformer.layers.0.cross_attn_image_to_token.out_proj.weight": (
    "mask_decoder.transformer.layers.0.cross_attn_image_to_token.o_proj.weight",
    (256, 128),
  ),
  "sam_mask_decoder.transformer.norm_final_attn.weight": (
    "mask_decoder.transformer.layer_norm_final_attn.weight",
    (256,),
  ),
  "sam_mask_decoder.iou_token.weight": ("mask_decoder.iou_token.weight", (1, 256)),
  "sam_mask_decoder.output_upscaling.0.weight": ("mask_decoder.upscale_conv1.weight", (256, 64, 2, 2)),
  "sam_mask_decoder.output_upscaling.1.weight": ("mask_decoder.upscale_layer_norm.weight", (64,)),
  "sam_mask_decoder.output_upscaling.3.weight": ("mask_decoder.upscale_conv2.weight", (64, 32, 2, 2)),
  "sam_mask_decoder.conv_s1.weight": ("mask_decoder.conv_s1.weight", (64, 256, 1, 1)),
  "sam_mask_decoder.output_hypernetworks_mlps.3.layers.0.weight": (
    "mask_decoder.output_hypernetworks_mlps.3.proj_in.weight",
    (256, 256),
  ),
  "sam_mask_decoder.output_hypernetworks_mlps.3.layers.2.weight": (
    "mask_decoder.output_hypernetworks_mlps.3.proj_out.weight",
    (32, 256),
  ),
  "sam_mask_decoder.iou_prediction_head.layers.1.weight": (
    "mask_decoder.iou_prediction_head.layers.0.weight",
    (256, 256),
  ),
  "sam_mask_decoder.pred_obj_score_head.layers.2.bias": ("mask_decoder.pred_obj_score_head.proj_out.bias", (1,)),
  "obj_ptr_proj.layers.1.weight": ("object_pointer_proj.layers.0.weight", (256, 256)),
  "obj_ptr_tpos_proj.weight": ("temporal_positional_encoding_projection_layer.weight", (64, 256)),
}
# transformers' -> sam2's, written the other way round from tools/fair/sam/checkpoint.py, on purpose: two mistakes would
# have to agree
BACK = (
  (r"\bobject_pointer_proj\b", "obj_ptr_proj"),
  (r"\btemporal_positional_encoding_projection_layer\b", "obj_ptr_tpos_proj"),
  (r"^memory_temporal_positional_encoding$", "maskmem_tpos_enc"),
  (r"^no_memory_embedding$", "no_mem_embed"),
  (r"^no_memory_positional_encoding$", "no_mem_pos_enc"),
  (r"^no_object_pointer$", "no_obj_ptr"),
  (r"^occlusion_spatial_embedding_parameter$", "no_obj_embed_spatial"),
  (r"backbone\.blocks\.(\d+)\.mlp\.proj_in", r"backbone.blocks.\1.mlp.layers.0"),
  (r"backbone\.blocks\.(\d+)\.mlp\.proj_out", r"backbone.blocks.\1.mlp.layers.1"),
  (r"transformer\.layers\.(\d+)\.mlp\.proj_in", r"transformer.layers.\1.mlp.layers.0"),
  (r"transformer\.layers\.(\d+)\.mlp\.proj_out", r"transformer.layers.\1.mlp.layers.1"),
  (r"(mlps\.\d|head|obj_ptr_proj)\.layers\.0", r"\1.layers.1"),
  (r"(mlps\.\d|head|obj_ptr_proj)\.proj_in", r"\1.layers.0"),
  (r"(mlps\.\d|head|obj_ptr_proj)\.proj_out", r"\1.layers.2"),
  (r"^vision_encoder\.backbone", "image_encoder.trunk"),
  (r"^vision_encoder\.neck\.convs\.(\d)", r"image_encoder.neck.convs.\1.conv"),
  (r"patch_embed\.projection", "patch_embed.proj"),
  (r"memory_encoder\.projection", "memory_encoder.out_proj"),
  (r"feature_projection", "pix_feat_proj"),
  (r"memory_fuser", "fuser"),
  (r"\.scale$", ".gamma"),
  (r"depthwise_conv", "dwconv"),
  (r"pointwise_conv", "pwconv"),
  (r"final_conv", "encoder.12"),
  (r"downsampler\.layers\.0\.conv", "downsampler.encoder.0"),
  (r"downsampler\.layers\.0\.layer_norm", "downsampler.encoder.1"),
  (r"downsampler\.layers\.1\.conv", "downsampler.encoder.3"),
  (r"downsampler\.layers\.1\.layer_norm", "downsampler.encoder.4"),
  (r"downsampler\.layers\.2\.conv", "downsampler.encoder.6"),
  (r"downsampler\.layers\.2\.layer_norm", "downsampler.encoder.7"),
  (r"downsampler\.layers\.3\.conv", "downsampler.encoder.9"),
  (r"downsampler\.layers\.3\.layer_norm", "downsampler.encoder.10"),
  (r"mask_embed\.conv1", "mask_downscaling.0"),
  (r"mask_embed\.layer_norm1", "mask_downscaling.1"),
  (r"mask_embed\.conv2", "mask_downscaling.3"),
  (r"mask_embed\.layer_norm2", "mask_downscaling.4"),
  (r"mask_embed\.conv3", "mask_downscaling.6"),
  (r"upscale_conv1", "output_upscaling.0"),
  (r"upscale_layer_norm", "output_upscaling.1"),
  (r"upscale_conv2", "output_upscaling.3"),
  (r"\blayer_norm", "norm"),
  (r"\bo_proj", "out_proj"),
  (
    r"^prompt_encoder\.shared_embedding\.positional_embedding",
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
  ),
  (r"^(prompt_encoder|mask_decoder)", r"sam_\1"),
)


def as_sam2(model):
  """The state of transformers' model under the names of the sam2 package."""
  out = {}
  for name, value in model.state_dict().items():
    if name == "prompt_encoder.point_embed.weight":
      out |= {f"sam_prompt_encoder.point_embeddings.{i}.weight": value[i : i + 1].clone() for i in range(4)}
    elif name != "shared_image_embedding.positional_embedding":
      for pattern, to in BACK:
        name = re.sub(pattern, to, name)
      out[name] = value
  return out


def test_checkpoints_of_the_sam2_package(tmp_path):
  model, rgb = save("sam2_video", tmp_path), frames(10)
  model.shared_image_embedding.load_state_dict(
    model.prompt_encoder.shared_embedding.state_dict()
  )  # in sam2 they are one
  state = as_sam2(model)
  assert len(state) == len(model.state_dict()) - 1 + 3
  torch.save({"model": state}, tmp_path / "small.pt")
  loaded = load_pt(tmp_path / "small.pt", choose_device("cpu"), model.config)
  want, got = model.state_dict(), loaded.state_dict()
  assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)
  with torch.inference_mode():
    (a, b), (c, d) = official(model, rgb, BOXES), official(loaded, rgb, BOXES)
  # equal weights that lie elsewhere in memory: some processors' kernels round by how they are aligned, and a last bit
  # may grow to 1e-3 where memory is kept in bfloat16
  assert (a != c).mean() < 1e-2
  np.testing.assert_allclose(b, d, atol=2e-3)
  for what, change in {
    "lacks": lambda s: s.pop("obj_ptr_proj.layers.2.bias"),
    "has more": lambda s: s.update(other=torch.zeros(1)),
  }.items():
    broken = dict(state)
    change(broken)
    torch.save({"model": broken}, tmp_path / "broken.pt")
    with pytest.raises(UserError, match="object_pointer_proj.proj_out.bias" if what == "lacks" else '"other"'):
      load_pt(tmp_path / "broken.pt", choose_device("cpu"), model.config)


def test_published_sizes_of_the_sam2_package():
  renamed = rename({k: torch.empty(shape, device="meta") for k, (_, shape) in NAMES.items()})
  renamed.pop("shared_image_embedding.positional_embedding")
  assert {k: tuple(v.shape) for k, v in renamed.items()} == dict(NAMES.values())
  # names, count and parameters as the package builds them of its four configurations
  for width, window, heads, stages, weights, count in (
    (96, 7, 1, (1, 2, 7, 2), 471, 38_962_498),
    (96, 7, 1, (1, 2, 11, 2), 519, 46_060_354),
    (112, 14, 2, (2, 3, 16, 3), 615, 80_850_178),
    (144, 7, 2, (2, 6, 36, 4), 903, 224_446_642),
  ):
    hint = {f"vision_encoder.backbone.blocks.{i}.layer_norm1.weight": torch.empty(0) for i in range(sum(stages))}
    hint |= {
      "vision_encoder.backbone.patch_embed.projection.weight": torch.empty(width, 3, 7, 7, device="meta"),
      "vision_encoder.backbone.pos_embed": torch.empty(1, width, window, window, device="meta"),
      "occlusion_spatial_embedding_parameter": torch.empty(0),
      "temporal_positional_encoding_projection_layer.weight": torch.empty(0),
    }
    config = config_of(hint)
    hiera = config.vision_config.backbone_config
    assert tuple(hiera.blocks_per_stage) == stages and hiera.num_attention_heads_per_stage[0] == heads
    with torch.device("meta"):
      model = t.Sam2VideoModel(config)
    state = as_sam2(model)
    assert len(state) == weights
    if sum(stages) == 12:
      assert {k: tuple(state[k].shape) for k in NAMES} == {k: shape for k, (_, shape) in NAMES.items()}
    assert sum(p.numel() for p in model.parameters()) == count

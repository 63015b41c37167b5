"""The sam2 package's own checkpoints, sam2.1_hiera_*.pt and sam2_hiera_*.pt, as transformers' Sam2VideoModel: other
names, the same network."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpilot.tools.learn.device import Device
from openpilot.tools.fair.dinov2.pth import read_state
from openpilot.tools.lib.errors import UserError

Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
SHARED = "prompt_encoder.shared_embedding.positional_embedding"
# of the prompt encoder and the mask decoder, which SAM has, too
MASKS: Rules = (
  (r"\.mask_downscaling\.([036])\.", lambda m: f".mask_embed.conv{int(m[1]) // 3 + 1}."),
  (r"\.mask_downscaling\.([14])\.", lambda m: f".mask_embed.layer_norm{int(m[1]) // 3 + 1}."),
  (r"\.output_upscaling\.([03])\.", lambda m: f".upscale_conv{int(m[1]) // 3 + 1}."),
  (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
)
# of sam2's names, part by part, applied in this order -> transformers'
RENAMES: Rules = (
  (r"^sam_prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", SHARED),
  (r"^sam_", ""),
  (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
  (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
  (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
  *MASKS,
  (r"\.mask_downsampler\.encoder\.12\.", ".mask_downsampler.final_conv."),
  (r"\.mask_downsampler\.encoder\.(0|3|6|9)\.", lambda m: f".mask_downsampler.layers.{int(m[1]) // 3}.conv."),
  (r"\.mask_downsampler\.encoder\.(1|4|7|10)\.", lambda m: f".mask_downsampler.layers.{int(m[1]) // 3}.layer_norm."),
  # perceptrons: of three layers, but for two in the blocks
  (r"\.mlp\.layers\.0\.", ".mlp.proj_in."),
  (r"\.mlp\.layers\.1\.", ".mlp.proj_out."),
  (r"(_mlps\.\d+|_head|obj_ptr_proj)\.layers\.0\.", r"\1.proj_in."),
  (r"(_mlps\.\d+|_head|obj_ptr_proj)\.layers\.1\.", r"\1.layers.0."),
  (r"(_mlps\.\d+|_head|obj_ptr_proj)\.layers\.2\.", r"\1.proj_out."),
  (r"^memory_encoder\.out_proj\.", "memory_encoder.projection."),
  (r"^memory_encoder\.pix_feat_proj\.", "memory_encoder.feature_projection."),
  (r"^memory_encoder\.fuser\.", "memory_encoder.memory_fuser."),
  (r"\.gamma$", ".scale"),
  (r"\.dwconv\.", ".depthwise_conv."),
  (r"\.pwconv", ".pointwise_conv"),
  (r"\.out_proj\.", ".o_proj."),
  (r"\.norm", ".layer_norm"),
  (r"^obj_ptr_proj\.", "object_pointer_proj."),
  (r"^obj_ptr_tpos_proj\.", "temporal_positional_encoding_projection_layer."),
  (r"^maskmem_tpos_enc$", "memory_temporal_positional_encoding"),
  (r"^no_mem_embed$", "no_memory_embedding"),
  (r"^no_mem_pos_enc$", "no_memory_positional_encoding"),
  (r"^no_obj_ptr$", "no_object_pointer"),
  (r"^no_obj_embed_spatial$", "occlusion_spatial_embedding_parameter"),
)
POINT = re.compile(r"prompt_encoder\.point_embeddings\.(\d+)\.weight")
# (width, blocks) of the image encoder -> what the checkpoint does not say of it
SIZES: dict[tuple[int, int], dict[str, Any]] = {
  (96, 12): {"blocks_per_stage": [1, 2, 7, 2], "global_attention_blocks": [5, 7, 9]},
  (96, 16): {"blocks_per_stage": [1, 2, 11, 2], "global_attention_blocks": [7, 10, 13]},
  (112, 24): {
    "blocks_per_stage": [2, 3, 16, 3],
    "global_attention_blocks": [12, 16, 20],
    "num_attention_heads_per_stage": [2, 4, 8, 16],
  },
  (144, 48): {
    "blocks_per_stage": [2, 6, 36, 4],
    "global_attention_blocks": [23, 33, 43],
    "num_attention_heads_per_stage": [2, 4, 8, 16],
    "window_size_per_stage": [8, 4, 16, 8],
  },
}
# what the preprocessor_config.json of facebook/sam2.1-hiera-* says
PICTURES: dict[str, Any] = {
  "image_mean": [0.485, 0.456, 0.406],
  "image_std": [0.229, 0.224, 0.225],
  "do_resize": True,
  "resample": 2,
}


def renamed(name: str, rules: Rules) -> str:
  for pattern, to in rules:
    name = re.sub(pattern, to, name)
  return name


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
  """sam2's names -> transformers'. Its four point embeddings are rows of one there, and its random frequencies are held
  twice."""
  out: dict[str, Tensor] = {}
  points: dict[int, Tensor] = {}
  for name, value in state.items():
    name = renamed(name, RENAMES)
    point = POINT.fullmatch(name)
    if point:
      points[int(point[1])] = value
    else:
      out[name] = value
  if points:
    out["prompt_encoder.point_embed.weight"] = torch.cat([points[i] for i in sorted(points)])
  if SHARED in out:
    out["shared_image_embedding.positional_embedding"] = out[SHARED]
  return out


def config_of(state: dict[str, Tensor]) -> Any:
  """The Sam2VideoConfig of a checkpoint with transformers' names. Raises KeyError where it is none of the published
  sizes."""
  from transformers import Sam2HieraDetConfig, Sam2VideoConfig, Sam2VisionConfig

  width = state["vision_encoder.backbone.patch_embed.projection.weight"].shape[0]
  blocks = {k.split(".")[3] for k in state if k.startswith("vision_encoder.backbone.blocks.")}
  widths = [width * 2**i for i in range(4)]
  window = list(state["vision_encoder.backbone.pos_embed"].shape[2:])
  hiera = Sam2HieraDetConfig(
    hidden_size=width,
    embed_dim_per_stage=widths,
    window_positional_embedding_background_size=window,
    **SIZES[width, len(blocks)],
  )
  # SAM 2 lacks what 2.1 added
  return Sam2VideoConfig(
    vision_config=Sam2VisionConfig(backbone_config=hiera, backbone_channel_list=widths[::-1]),
    enable_occlusion_spatial_embedding="occlusion_spatial_embedding_parameter" in state,
    enable_temporal_pos_encoding_for_object_pointers="temporal_positional_encoding_projection_layer.weight" in state,
  )


def load_pt(path: Path, device: Device, config: Any = None) -> Any:
  """A checkpoint of the sam2 package -> Sam2VideoModel: frozen, in eval mode, on the device in its precision. config:
  of a size that was not published.

  Raises UserError where it is no such checkpoint, or lacks weights, or has some that the model does not."""
  from transformers import Sam2VideoModel

  read: Any = read_state(path, "checkpoint of the sam2 package")
  read = read.get("model", read)
  try:
    state = rename({k: v for k, v in read.items() if isinstance(v, Tensor)})
    config = config or config_of(state)
  except (KeyError, AttributeError, IndexError, TypeError):
    raise UserError(
      f"{path} is no checkpoint of the sam2 package; give a sam2.1_hiera_*.pt or a Hugging Face folder"
    ) from None
  model: Any = Sam2VideoModel(config)
  try:
    model.load_state_dict(state)
  except RuntimeError as e:
    why = " ".join(str(e).split("\n\t")[1:])[:200]
    raise UserError(f"{path} is not a whole checkpoint of SAM 2: {why}; copy it again") from None
  model.eval().requires_grad_(False).to(device.device, device.dtype)
  return model.to(memory_format=torch.channels_last) if device.device.type == "cuda" else model

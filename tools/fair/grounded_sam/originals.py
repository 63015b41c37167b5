"""The original projects' own checkpoints under transformers' names: groundingdino_swin*.pth of GroundingDINO,
sam_vit_*.pth of segment-anything, sam2.1_hiera_*.pt of sam2. The same networks, key for key.

A .pth is a pickle: it is read without running what is in it."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpilot.tools.fair.dinov2.pth import WRAPPERS, read_state
from openpilot.tools.fair.sam import checkpoint as sam2
from openpilot.tools.lib.errors import UserError, printable

SWIN = "model.backbone.conv_encoder.model."
# of GroundingDINO's names, part by part, applied in this order -> those that Hugging Face folders of it have, which
# every version of transformers reads
DINO: sam2.Rules = (
  (r"^bert\.", "model.text_backbone."),
  (r"^feat_map\.", "model.text_projection."),
  (r"^input_proj\.", "model.input_proj_vision."),
  (r"^backbone\.0\.patch_embed\.proj\.", f"{SWIN}embeddings.patch_embeddings.projection."),
  (r"^backbone\.0\.patch_embed\.norm\.", f"{SWIN}embeddings.norm."),
  (r"^backbone\.0\.norm(\d)\.", lambda m: f"{SWIN}hidden_states_norms.stage{int(m[1]) + 1}."),
  (r"^backbone\.0\.layers\.", f"{SWIN}encoder.layers."),
  (r"(\.blocks\.\d+)\.norm1\.", r"\1.layernorm_before."),
  (r"(\.blocks\.\d+)\.norm2\.", r"\1.layernorm_after."),
  (r"\.attn\.relative_position_bias_table$", ".attention.self.relative_position_bias_table"),
  (r"(\.blocks\.\d+)\.attn\.proj\.", r"\1.attention.output.dense."),
  (r"(\.blocks\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
  (r"(\.blocks\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
  (r"^transformer\.tgt_embed\.", "model.query_position_embeddings."),
  (r"^transformer\.enc_out_bbox_embed\.", "model.encoder_output_bbox_embed."),
  (r"^transformer\.", "model."),
  (r"^model\.encoder\.layers\.(\d+)\.", r"model.encoder.layers.\1.deformable_layer."),
  (r"\.deformable_layer\.norm1\.", ".deformable_layer.self_attn_layer_norm."),
  (r"\.deformable_layer\.norm2\.", ".deformable_layer.final_layer_norm."),
  (r"^model\.encoder\.text_layers\.(\d+)\.", r"model.encoder.layers.\1.text_enhancer_layer."),
  (r"\.text_enhancer_layer\.norm1\.", ".text_enhancer_layer.layer_norm_before."),
  (r"\.text_enhancer_layer\.norm2\.", ".text_enhancer_layer.layer_norm_after."),
  (r"^model\.encoder\.fusion_layers\.(\d+)\.", r"model.encoder.layers.\1.fusion_layer."),
  (r"\.gamma_v$", ".vision_param"),
  (r"\.gamma_l$", ".text_param"),
  (r"\.fusion_layer\.layer_norm_v\.", ".fusion_layer.layer_norm_vision."),
  (r"\.fusion_layer\.layer_norm_l\.", ".fusion_layer.layer_norm_text."),
  (r"\.attn\.(values_|out_)?v_proj\.", lambda m: f".attn.{m[1] or ''}vision_proj."),
  (r"\.attn\.(values_|out_)?l_proj\.", lambda m: f".attn.{m[1] or ''}text_proj."),
  (r"^(model\.decoder\.layers\.\d+)\.norm1\.", r"\1.encoder_attn_layer_norm."),
  (r"^(model\.decoder\.layers\.\d+)\.norm2\.", r"\1.self_attn_layer_norm."),
  (r"^(model\.decoder\.layers\.\d+)\.norm3\.", r"\1.final_layer_norm."),
  (r"\.catext_norm\.", ".encoder_attn_text_layer_norm."),
  (r"\.ca_text\.", ".encoder_attn_text."),
  (r"\.cross_attn\.", ".encoder_attn."),
  (r"^model\.decoder\.norm\.", "model.decoder.layer_norm."),
  (r"^model\.decoder\.ref_point_head\.", "model.decoder.reference_points_head."),
  (r"(?<!attn)\.linear([12])\.", r".fc\1."),
)
# what the files hold beside the network: of its training, of BERT's unused end, tables that are computed
DINO_UNUSED = re.compile(r"^label_enc\.|^bert\.pooler\.|\.position_ids$|\.relative_position_index$|\.attn_mask$")
DINO_NO_FORWARD = re.compile(r"\.layernorm\.(weight|bias)$")  # of Swin's last map, which is not read
THREE = re.compile(r"(.*)\.(attn\.qkv|(?:self_attn|ca_text)\.in_proj)[._](weight|bias)")

SAM: sam2.Rules = (
  (r"^image_encoder\.blocks\.", "vision_encoder.layers."),
  (r"^image_encoder\.neck\.0\.", "vision_encoder.neck.conv1."),
  (r"^image_encoder\.neck\.1\.", "vision_encoder.neck.layer_norm1."),
  (r"^image_encoder\.neck\.2\.", "vision_encoder.neck.conv2."),
  (r"^image_encoder\.neck\.3\.", "vision_encoder.neck.layer_norm2."),
  (r"^image_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
  (r"^image_encoder\.", "vision_encoder."),
  (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", sam2.SHARED),
  (r"^prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embed."),
  *sam2.MASKS,
  (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
  (r"\.norm(\d)\.", r".layer_norm\1."),
)
MLP_LAYER = re.compile(r"(.*(?:_mlps\.\d+|_head))\.layers\.(\d+)\.(weight|bias)")
SAM_UNUSED = re.compile(r"^pixel_(mean|std)$")  # of the pictures: the same in all
# what the preprocessors of facebook/sam-vit-* and of IDEA-Research/grounding-dino-* say
SAM_PICTURES: dict[str, Any] = {**sam2.PICTURES, "size": {"longest_edge": 1024}}
DINO_PICTURES: dict[str, Any] = {**sam2.PICTURES, "size": {"shortest_edge": 800, "longest_edge": 1333}}

# a checkpoint's family -> a key that only it has, and what people call it
FAMILIES = {
  "grounding_dino": ("transformer.tgt_embed.weight", "GroundingDINO"),
  "sam": ("image_encoder.neck.0.weight", "segment-anything (SAM)"),
  "sam2": ("image_encoder.trunk.patch_embed.proj.weight", "sam2"),
}


def read_original(path: Path) -> dict[str, Tensor]:
  """A project's checkpoint: its tensors by their own names, without what wrapped them in training. Raises UserError."""
  state: Any = read_state(path, "checkpoint of GroundingDINO, segment-anything or sam2")
  for key in ("model", "model_state"):
    if isinstance(state.get(key), dict):
      state = state[key]
  return {WRAPPERS.sub("", k): v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}


def family_of(state: dict[str, Tensor]) -> str | None:
  return next((name for name, (key, _) in FAMILIES.items() if key in state), None)


def rename_dino(state: dict[str, Tensor]) -> dict[str, Tensor]:
  """GroundingDINO's names -> those of its Hugging Face folders. One matrix of q, k and v becomes three."""
  out: dict[str, Tensor] = {}
  for name, value in state.items():
    if DINO_UNUSED.search(name):
      continue
    if (fused := THREE.fullmatch(name)) is None:
      out[sam2.renamed(name, DINO)] = value
      continue
    before, part, kind = fused.groups()
    swin = part == "attn.qkv"
    for q, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
      one = f"{before}.attention.self.{q}" if swin else f"{before}.{part.removesuffix('.in_proj')}.{q}"
      out[sam2.renamed(f"{one}.{kind}", DINO)] = piece
  return out


def rename_sam(state: dict[str, Tensor]) -> dict[str, Tensor]:
  """segment-anything's names -> SamModel's. Its random frequencies are held twice there."""
  depth: Counter[str] = Counter()
  for name in state:
    if (found := MLP_LAYER.fullmatch(name)) is not None:
      depth[found[1]] = max(depth[found[1]], int(found[2]))
  out: dict[str, Tensor] = {}
  for name, value in state.items():
    if SAM_UNUSED.search(name):
      continue
    found = MLP_LAYER.fullmatch(name)
    if found is not None:
      n = int(found[2])
      part = "proj_in" if not n else "proj_out" if n == depth[found[1]] else f"layers.{n - 1}"
      name = f"{found[1]}.{part}.{found[3]}"
    out[sam2.renamed(name, SAM)] = value
  if sam2.SHARED in out:
    out["shared_image_embedding.positional_embedding"] = out[sam2.SHARED]
  return out


def layers(state: dict[str, Tensor], pattern: str) -> int:
  """1 + the highest number that the pattern finds."""
  return 1 + max((int(m[1]) for k in state if (m := re.match(pattern, k))), default=-1)


def dino_config(state: dict[str, Tensor]) -> Any:
  """The GroundingDinoConfig of GroundingDINO's own state; what the numbers do not say is as in both published sizes.
  Raises KeyError, ValueError."""
  from transformers import BertConfig, GroundingDinoConfig, SwinConfig

  heads = 8
  stages = layers(state, r"backbone\.0\.layers\.(\d+)\.")
  tables = [state[f"backbone.0.layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in range(stages)]
  width = state["bert.embeddings.word_embeddings.weight"].shape[1]
  levels, d_model = state["transformer.level_embed"].shape
  offsets = state["transformer.encoder.layers.0.self_attn.sampling_offsets.bias"].shape[0]
  wide = state["transformer.encoder.layers.0.linear1.weight"].shape[0]
  more: Any = {"out_indices": [1 + i for i in range(stages) if f"backbone.0.norm{i}.weight" in state]}
  swin = SwinConfig(
    embed_dim=state["backbone.0.patch_embed.proj.weight"].shape[0],
    patch_size=state["backbone.0.patch_embed.proj.weight"].shape[-1],
    depths=[layers(state, rf"backbone\.0\.layers\.{i}\.blocks\.(\d+)\.") for i in range(stages)],
    num_heads=[t.shape[1] for t in tables],
    window_size=(int(tables[0].shape[0] ** 0.5) + 1) // 2,
    **more,
  )
  bert = BertConfig(
    hidden_size=width,
    num_attention_heads=max(1, width // 64),
    num_hidden_layers=layers(state, r"bert\.encoder\.layer\.(\d+)\."),
    intermediate_size=state["bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
    vocab_size=state["bert.embeddings.word_embeddings.weight"].shape[0],
    max_position_embeddings=state["bert.embeddings.position_embeddings.weight"].shape[0],
  )
  return GroundingDinoConfig(
    backbone_config=swin,
    text_config=bert,
    d_model=d_model,
    num_feature_levels=levels,
    num_queries=state["transformer.tgt_embed.weight"].shape[0],
    encoder_layers=layers(state, r"transformer\.encoder\.layers\.(\d+)\."),
    decoder_layers=layers(state, r"transformer\.decoder\.layers\.(\d+)\."),
    encoder_ffn_dim=wide,
    decoder_ffn_dim=state["transformer.decoder.layers.0.linear1.weight"].shape[0],
    encoder_attention_heads=heads,
    decoder_attention_heads=heads,
    encoder_n_points=offsets // (2 * heads * levels),
    decoder_n_points=state["transformer.decoder.layers.0.cross_attn.sampling_offsets.bias"].shape[0]
    // (2 * heads * levels),
  )


def sam_config(state: dict[str, Tensor]) -> Any:
  """The SamConfig of segment-anything's own state. Raises KeyError, ValueError."""
  from transformers import SamConfig

  width, _, _, patch = state["image_encoder.patch_embed.proj.weight"].shape
  side = state["image_encoder.pos_embed"].shape[1]
  depth = layers(state, r"image_encoder\.blocks\.(\d+)\.")
  reach = [(state[f"image_encoder.blocks.{i}.attn.rel_pos_h"].shape[0] + 1) // 2 for i in range(depth)]
  hidden = state["image_encoder.neck.0.weight"].shape[0]
  decoder = "mask_decoder."
  return SamConfig(
    vision_config={
      "hidden_size": width,
      "output_channels": hidden,
      "num_hidden_layers": depth,
      "num_attention_heads": width // state["image_encoder.blocks.0.attn.rel_pos_h"].shape[1],
      "mlp_dim": state["image_encoder.blocks.0.mlp.lin1.weight"].shape[0],
      "image_size": side * patch,
      "patch_size": patch,
      "window_size": min(reach),
      "global_attn_indexes": [i for i, r in enumerate(reach) if r == side],
      "num_pos_feats": hidden // 2,
    },
    prompt_encoder_config={
      "hidden_size": hidden,
      "image_size": side * patch,
      "patch_size": patch,
      "mask_input_channels": state["prompt_encoder.mask_downscaling.3.weight"].shape[0],
    },
    mask_decoder_config={
      "hidden_size": hidden,
      "mlp_dim": state[f"{decoder}transformer.layers.0.mlp.lin1.weight"].shape[0],
      "num_hidden_layers": layers(state, r"mask_decoder\.transformer\.layers\.(\d+)\."),
      "num_multimask_outputs": state[f"{decoder}mask_tokens.weight"].shape[0] - 1,
      "iou_head_depth": layers(state, r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\."),
      "iou_head_hidden_dim": state[f"{decoder}iou_prediction_head.layers.0.weight"].shape[0],
    },
  )


def sam2_parts(state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
  """sam2's own state -> the Sam2Config of its image model, and its weights under Sam2Model's names: without the memory,
  which single pictures do not have."""
  from transformers import Sam2Config

  new = sam2.rename(state)
  video = sam2.config_of(new)
  config = Sam2Config(
    vision_config=video.vision_config,
    prompt_encoder_config=video.prompt_encoder_config,
    mask_decoder_config=video.mask_decoder_config,
  )
  kept = ("vision_encoder.", "prompt_encoder.", "mask_decoder.", "shared_image_embedding.", "no_memory_embedding")
  return config, {k: v for k, v in new.items() if k.startswith(kept)}


def load_original(path: Path, families: tuple[str, ...], config: Any = None) -> tuple[str, Any]:
  """-> the family, one of `families`, and the model of transformers' class in fp32 on the CPU. config: of a size that
  was not published. Raises UserError where it is a checkpoint of another family, or lacks weights, or holds some that
  the model does not."""
  import transformers

  transformers.utils.logging.disable_progress_bar()  # the command that loads it has its own
  state = read_original(path)
  family, wanted = family_of(state), " or ".join(FAMILIES[f][1] for f in families)
  if family is None:
    raise UserError(f"{path} is no checkpoint of {wanted}, nor a Hugging Face folder")
  if family not in families:
    raise UserError(f"{path} is a checkpoint of {FAMILIES[family][1]}, not of {wanted}")
  kind: Any
  try:
    if family == "grounding_dino":
      kind, config, new = transformers.GroundingDinoForObjectDetection, config or dino_config(state), rename_dino(state)
    elif family == "sam":
      kind, config, new = transformers.SamModel, config or sam_config(state), rename_sam(state)
    else:
      kind, (found, new) = transformers.Sam2Model, sam2_parts(state)
      config = config or found
    model, info = kind.from_pretrained(
      None, config=config, state_dict=new, dtype=torch.float32, output_loading_info=True
    )
  except Exception as e:  # transformers has no class of its own for any of this
    raise UserError(
      f"{path} is no whole checkpoint of {FAMILIES[family][1]}: {printable(repr(e), 160)}; copy it again"
    ) from None
  lacks = [k for k in info["missing_keys"] if not DINO_NO_FORWARD.search(k)]
  other = [*lacks, *info["unexpected_keys"], *(str(k[0]) for k in info.get("mismatched_keys", ()))]
  if other:
    raise UserError(
      f"{path} is no whole checkpoint of {FAMILIES[family][1]}: it {'lacks' if lacks else 'has besides'} "
      f"{printable(other[0], 80)}; copy it again"
    )
  return family, model.eval().requires_grad_(False)

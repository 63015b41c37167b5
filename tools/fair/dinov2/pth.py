"""DINOv2's own checkpoints, dinov2_vit*14_pretrain.pth and dinov2_vit*14_reg4_pretrain.pth, as transformers' model.

The outputs are DINOv2's own to 2e-6, but for one thing: without registers its code stretches the position table by a
tenth of a patch more than images of another size than 518x518 need, transformers does not (features of deviation 1
differ by up to 0.05)."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpilot.tools.learn.device import Device
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import ordinary

HEAD_WIDTH = 64  # of every published size
EMBEDDINGS = {
  "cls_token": "cls_token",
  "mask_token": "mask_token",
  "register_tokens": "register_tokens",
  "pos_embed": "position_embeddings",
  "patch_embed.proj.weight": "patch_embeddings.projection.weight",
  "patch_embed.proj.bias": "patch_embeddings.projection.bias",
}
BLOCK = {
  "norm1": "norm1",
  "attn.proj": "attention.o_proj",
  "ls1": "layer_scale1",
  "norm2": "norm2",
  "mlp.fc1": "mlp.fc1",
  "mlp.fc2": "mlp.fc2",
  "mlp.w3": "mlp.down_proj",
  "ls2": "layer_scale2",
}
WRAPPERS = re.compile(
  r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)  # a whole part of a name
FUSED = {
  "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
  "mlp.w12": ("mlp.gate_proj", "mlp.up_proj"),
}  # stacked along axis 0


def read_state(path: Path, what: str) -> dict[str, Any]:
  """A .pth without code in it, or .safetensors; what lies under 'state_dict' where there is such. Raises UserError."""
  try:
    if path.suffix == ".safetensors":
      from safetensors.torch import load_file

      return load_file(ordinary(path))
    read: dict[str, Any] = torch.load(ordinary(path), map_location="cpu", weights_only=True)
    return dict(read.get("state_dict", read))
  except Exception as e:  # unpickling raises anything
    raise UserError(
      f"{path} is no {what}: {(str(e) or repr(e)).strip().splitlines()[0][:160]}; copy it again"
    ) from None


def backbone_of(state: dict[str, Any]) -> dict[str, Tensor]:
  """The ViT's weights under the published names: of a published backbone as it is; of a training of DINOv2's own code,
  teacher_checkpoint.pth or a whole model's, the (teacher's) backbone, without what wraps it (DDP, FSDP, torch.compile)
  and without its blocks' cut into chunks."""
  for key in ("teacher", "model"):
    if isinstance(state.get(key), dict):
      state = state[key]
  plain = {WRAPPERS.sub("", name): value for name, value in state.items()}
  for prefix in ("teacher.backbone.", "backbone."):
    if any(k.startswith(prefix) for k in plain):
      plain = {k.removeprefix(prefix): v for k, v in plain.items() if k.startswith(prefix)}
      break
  return {
    re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", k): v for k, v in plain.items()
  }  # the block's own number is the second: BlockChunk fills up in front


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
  """The official names -> transformers'. Raises ValueError on a name that DINOv2 does not have."""
  out = {}
  for name, value in state.items():
    if name in EMBEDDINGS:
      out[f"embeddings.{EMBEDDINGS[name]}"] = value
    elif name.startswith("norm."):
      out[f"layer{name}"] = value
    else:
      found = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias|gamma)", name)
      if found is None or found[2] not in {**BLOCK, **FUSED}:
        raise ValueError(f"it holds '{name}', which DINOv2 has not")
      block, part, kind = found.groups()
      kind = "lambda1" if kind == "gamma" else kind
      targets = FUSED.get(part) or (BLOCK[part],)
      for target, piece in zip(targets, value.chunk(len(targets)), strict=True):
        out[f"encoder.layer.{block}.{target}.{kind}"] = piece
  return out


def load_pth(path: Path, device: Device) -> Any:
  """A published backbone, or one of your own training (backbone_of) -> Dinov2Model or Dinov2WithRegistersModel: frozen,
  in eval mode, on the device. Raises UserError."""
  from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

  state = read_state(path, "DINOv2 checkpoint")
  try:
    state = backbone_of(state)
    if lacks := [
      k
      for k in ("patch_embed.proj.weight", "pos_embed", "cls_token", "norm.weight", "blocks.0.norm1.weight")
      if k not in state
    ]:
      raise ValueError(f"it lacks '{lacks[0]}' and holds {', '.join(list(map(str, state))[:3])}")
    width, patch = state["patch_embed.proj.weight"].shape[0], state["patch_embed.proj.weight"].shape[-1]
    side = int((state["pos_embed"].shape[1] - 1) ** 0.5) * patch
    shape: dict[str, Any] = {
      "hidden_size": width,
      "num_attention_heads": max(1, width // HEAD_WIDTH),
      "image_size": side,
      "patch_size": patch,
      "num_hidden_layers": 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
      "use_swiglu_ffn": "blocks.0.mlp.w12.weight" in state,
    }
    model: Any
    if "register_tokens" in state:
      model = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(num_register_tokens=state["register_tokens"].shape[1], **shape)
      )
    else:
      model = Dinov2Model(Dinov2Config(**shape))
    model.load_state_dict(rename(state))
  except (KeyError, ValueError, IndexError, AttributeError, RuntimeError, TypeError) as e:
    why = " ".join(str(e).split())[:200]
    raise UserError(
      f"{path} is no DINOv2 checkpoint: {why}; give a dinov2_vit*14_pretrain.pth, a teacher_checkpoint.pth or a "
      "Hugging Face folder"
    ) from None
  model.eval().requires_grad_(False).to(device.device, device.dtype)
  return model.to(memory_format=torch.channels_last) if device.device.type == "cuda" else model

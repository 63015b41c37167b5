"""LoRA adapters of teachers, by PEFT: which layers, what learns, what is saved, and for which base it is.

A folder holds adapter_config.json and adapter_model.safetensors, as PEFT reads and writes them. The header of the
latter says of which base and versions the adapter is."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openpilot.tools.lib import files
from openpilot.tools.lib.errors import UserError, printable, warn
from openpilot.tools.lib.files import LONG, MB, atomic_path, ordinary

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MOST_RANK = 4096
DECODER = r"model\.decoder\.layers\.\d+"
# family -> how much -> the names of layers that are adapted, whole. Grounding DINO's bbox_embed is one layer under many
# names, and merged once for each of them: it is in none
TARGETS = {
  "grounding_dino": {
    "decoder": rf"{DECODER}\.((self_attn|encoder_attn_text)\.(query|value)|encoder_attn\.value_proj)",
    "attention": rf"{DECODER}\.(self_attn|encoder_attn_text)\.(query|key|value|out_proj)"
    rf"|{DECODER}\.encoder_attn\.(value_proj|output_proj)|model\.encoder\.layers\.\d+\.fusion_layer\.attn\.\w+_proj",
    "everywhere": r"model\..*\.(query|value|q_proj|v_proj|value_proj)|model\.encoder\..*fusion_layer\.attn\.\w+_proj",
  },
  "sam": {
    "decoder": r"mask_decoder\..*\.(q_proj|v_proj)",
    "attention": r"mask_decoder\..*\.(q_proj|k_proj|v_proj|out_proj|o_proj)",
    "everywhere": r"mask_decoder\..*\.(q_proj|k_proj|v_proj|out_proj|o_proj)|vision_encoder\..*attn\.qkv",
  },
}
TARGETS["sam2"], TARGETS["mm_grounding_dino"] = TARGETS["sam"], TARGETS["grounding_dino"]
TIED = "bbox_embed"
# of a PEFT configuration: what would change what is computed, and is not written here
NOT_READ = (
  "modules_to_save",
  "rank_pattern",
  "alpha_pattern",
  "layers_to_transform",
  "fan_in_fan_out",
  "lora_bias",
  "target_parameters",
  "layer_replication",
)


def import_peft() -> Any:
  try:
    import peft
  except ModuleNotFoundError as e:
    raise UserError(f"tuning teachers needs the package {e.name}: `pip install -e .[train]`") from None
  return peft


def versions() -> dict[str, str]:
  import transformers

  return {"transformers": transformers.__version__, "peft": import_peft().__version__, "torch": str(torch.__version__)}


def lora_config(
  model: nn.Module, family: str, rank: int = 16, alpha: float = 32.0, dropout: float = 0.0, targets: str = "attention"
) -> Any:
  """PEFT's LoraConfig. targets: one of TARGETS, or an expression for whole names of layers. Raises UserError."""
  if not 1 <= rank <= MOST_RANK:
    raise UserError(f"--lora-r {rank}: a rank is 1 to {MOST_RANK}")
  if not 0 <= dropout < 1:
    raise UserError(f"--lora-dropout {dropout}: it is at least 0 and below 1")
  pattern = TARGETS[family].get(targets, targets)
  try:
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(pattern, n)]
  except re.error as e:
    raise UserError(
      f"--lora-targets {printable(targets, 60)}: neither {', '.join(TARGETS[family])}, nor an expression: {e}"
    ) from None
  names = [n for n in names if TIED not in n.split(".")]
  if not names:
    raise UserError(f"--lora-targets {printable(targets, 60)}: no dense layer has such a name")
  return import_peft().LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, bias="none")


class LoRATrainer:
  """A model with adapters that learn, and nothing else that does. model: PEFT's; the one that was given is changed in
  place."""

  def __init__(self, model: nn.Module, lora_config: Any):
    self.base = model
    self.model = import_peft().get_peft_model(model, lora_config)
    self._verify_freezing()

  def _verify_freezing(self) -> None:
    wrong = [n for n, p in self.model.named_parameters() if p.requires_grad != ("lora_" in n)]
    if wrong:
      raise UserError(f"{len(wrong)} parameters learn that should not, or the other way round, as {wrong[0]}")

  @property
  def counts(self) -> tuple[int, int]:
    """Parameters that learn, and those of the base."""
    parameters = list(self.model.parameters())
    learn = sum(p.numel() for p in parameters if p.requires_grad)
    return learn, sum(p.numel() for p in parameters) - learn

  def report(self) -> str:
    learn, base = self.counts
    layers = sum(n.endswith("lora_A.default") for n, _ in self.model.named_modules())
    return f"{learn:,} parameters of {layers} layers learn beside {base:,} frozen ones ({learn / base:.2%})"


def trainable(model: nn.Module) -> dict[str, Tensor]:
  return {n: p for n, p in model.named_parameters() if p.requires_grad}


def save_lora(folder: Path, model: Any, base: str, base_hash: str, family: str) -> float:
  """model: PEFT's. base: what people call the base; no path. -> megabytes of the adapter."""
  peft = import_peft()
  from safetensors.torch import save_file

  state = {
    k: v.detach().cpu().contiguous().clone()
    for k, v in peft.get_peft_model_state_dict(model, save_embedding_layers=False).items()
  }
  header = {"format": "pt", "base": base, "base_hash": base_hash, "family": family, **versions()}
  folder.mkdir(parents=True, exist_ok=True)
  with atomic_path(folder / TENSORS) as tmp:
    save_file(state, tmp, metadata=header)
  said = model.peft_config["default"].to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
  said["target_modules"] = sorted(said["target_modules"])
  with atomic_path(folder / CONFIG) as tmp:
    tmp.write_text(json.dumps(said, indent=1, sort_keys=True, default=str) + "\n")
  return (folder / TENSORS).stat().st_size / 1e6


def read_lora(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
  """-> tensors by PEFT's names without its prefix, the configuration, the header. Raises UserError."""
  from safetensors import SafetensorError, safe_open

  tensors: dict[str, Tensor] = {}
  try:
    said = files.read_json(folder / CONFIG, MB)
    with safe_open(ordinary(folder / TENSORS), "pt") as f:
      header = f.metadata() or {}
      for key in f.keys():
        tensors[key.removeprefix(PREFIX)] = f.get_tensor(key)
  except (OSError, ValueError, SafetensorError) as e:
    raise UserError(f"no adapter in {folder}: {printable(e, 120)}; name a folder with {CONFIG} and {TENSORS}") from None
  if not isinstance(said, dict) or said.get("peft_type") != "LORA":
    raise UserError(f"{folder / CONFIG} is of no LoRA adapter")
  used = [k for k in NOT_READ if said.get(k)] + (["bias"] if said.get("bias", "none") != "none" else [])
  if used:
    raise UserError(f"{folder / CONFIG} uses {', '.join(used)}, which is not read; save the adapter without it")
  return tensors, said, header


def check_base(folder: Path, header: dict[str, str], family: str, base_hash: str | None) -> None:
  """Raises UserError where the adapter is of another family or base; what PEFT wrote by itself does not say."""
  if (other := header.get("family", family)) != family:
    raise UserError(f"{folder} is an adapter of {printable(other, 40)}, not of {family}")
  if base_hash is not None and (said := header.get("base_hash", base_hash)) != base_hash:
    raise UserError(
      f"{folder} is an adapter of another base: of {printable(header.get('base', '?'), LONG)} with the hash "
      f"{printable(said, 12)}, this one has {base_hash[:12]}; name the base that it was tuned on"
    )


def apply_lora(model: nn.Module, folder: Path, family: str, base_hash: str | None = None) -> Any:
  """Puts a saved adapter onto its base, in place. -> PEFT's model. Its layers are those of its tensors: the
  configuration's expressions are not used. Raises UserError where it is of another base, family or version of
  transformers, whose layers have other names."""
  peft = import_peft()
  tensors, said, header = read_lora(folder)
  check_base(folder, header, family, base_hash)
  here, there = versions()["transformers"], header.get("transformers", "an unknown version")
  layers: dict[str, int] = {}
  for key, value in tensors.items():
    name, _, part = key.rpartition(".lora_")
    if not name or value.ndim != 2:
      raise UserError(f"{folder / TENSORS}: {printable(key, 80)} is no part of an adapter of dense layers")
    if part.startswith("A"):
      layers[name] = value.shape[0]
  known = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
  lacking = [n for n in layers if n not in known]
  ranks = set(layers.values())
  if lacking or len(ranks) != 1:
    what = f"{len(lacking)} layers of it are not there, as {lacking[0]}" if lacking else f"it has ranks {sorted(ranks)}"
    raise UserError(
      f"{folder} does not fit: {printable(what, 160)}; it was made with transformers {there}, here is {here}"
    )
  if there != here:
    warn(f"{folder} was made with transformers {there}, here is {here}; its layers have the same names")
  try:
    config = peft.LoraConfig(
      r=ranks.pop(),
      lora_alpha=float(said.get("lora_alpha", 8)),
      lora_dropout=0.0,
      target_modules=list(layers),
      use_rslora=bool(said.get("use_rslora")),
      use_dora=bool(said.get("use_dora")),
      bias="none",
    )
    out = peft.get_peft_model(model, config)
    wanted = {
      k.removeprefix(PREFIX): v for k, v in peft.get_peft_model_state_dict(out, save_embedding_layers=False).items()
    }
    other = list(wanted.keys() ^ tensors.keys()) + [
      k for k, v in wanted.items() if k in tensors and tensors[k].shape != v.shape
    ]
    if other:
      raise ValueError(f"{other[0]} is not in both, or of another shape")
    if not all(v.isfinite().all() for v in tensors.values()):
      raise ValueError("it holds numbers that are not finite")
    peft.set_peft_model_state_dict(out, {PREFIX + k: v for k, v in tensors.items()})
  except (ValueError, TypeError, RuntimeError, KeyError) as e:
    raise UserError(
      f"{folder} does not fit its base: {printable(e, 160)}; it was made with transformers {there}, here is {here}"
    ) from None
  return out.eval().requires_grad_(False)


def merged(model: Any) -> nn.Module:
  """PEFT's model -> the base with the adapter in its weights, plain layers again."""
  return model.merge_and_unload().eval().requires_grad_(False)


def with_lora(found: Any, folder: Path, base_hash: str | None, use_merged: bool = True) -> Any:
  """found: a detector or segmenter, of its base; it gets the saved adapter."""
  tuned = apply_lora(found.model, folder, found.family, base_hash)
  if use_merged:
    found.model = merged(tuned)
  return found

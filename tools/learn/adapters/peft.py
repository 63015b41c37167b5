"""DoRA adapters on disk, in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors, which holds
A, B and m of each adapted weight and nothing of the base, but in its header the hash of the base that it was trained
on.

PEFT reads what holds dense layers and convolutions (one group, no dilation). A GRU's matrices stand under their own
names, which PEFT does not know."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import atomic_path

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
KEY = re.compile(
  r"(?P<module>.+?)(?:\.(?P<weight>weight_[ih]h_l\d+(?:_reverse)?))?\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)"
)
# PEFT's variants that compute something else from the same tensors.
NOT_READ = (
  "fan_in_fan_out",
  "lora_bias",
  "modules_to_save",
  "layer_replication",
  "megatron_config",
  "target_parameters",
  "trainable_token_indices",
  "use_qalora",
  "use_bdlora",
  "alora_invocation_tokens",
  "arrow_config",
  "monteclora_config",
  "velora_config",
)


@dataclass
class Matrix:
  """The adapter of one weight: a (r, in) or (groups*r, in/groups, kh, kw), b (out, r) or (out, r, 1, 1), m (out,); W' =
  m * (W + scaling * B A) / norm."""

  module: str
  weight: str
  a: Tensor
  b: Tensor
  m: Tensor
  scaling: float


def write_adapter(folder: Path, matrices: list[Matrix], base_hash: str, dropout: float = 0.0) -> None:
  """Writes both files, each whole or not at all. Raises UserError where the disk is full."""
  tensors: dict[str, Tensor] = {}
  for x in matrices:
    name = PREFIX + x.module + ("" if x.weight == "weight" else f".{x.weight}")
    m = x.m.reshape(1, -1, 1, 1) if x.a.ndim == 4 else x.m
    for part, t in zip(PARTS, (x.a, x.b, m), strict=True):
      tensors[f"{name}.{part}"] = t.detach().cpu().contiguous().clone()
  modules = sorted({x.module for x in matrices})
  # The pattern of a rank takes one per module, as PEFT has it; a GRU's matrices are read by their shapes.
  ranks = {x.module: x.b.shape[1] for x in matrices}
  alphas = {x.module: x.scaling * x.b.shape[1] for x in matrices}
  rank, alpha = max(ranks.values()), max(alphas.values())
  config = {
    "peft_type": "LORA",
    "use_dora": True,
    "r": rank,
    "lora_alpha": _plain(alpha),
    "lora_dropout": dropout,
    "bias": "none",
    "inference_mode": True,
    "init_lora_weights": True,
    "task_type": None,
    "base_model_name_or_path": None,
    "fan_in_fan_out": False,
    "use_rslora": False,
    "target_modules": "|".join(re.escape(n) for n in modules),
    "rank_pattern": {f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
    "alpha_pattern": {f"^{re.escape(n)}": _plain(v) for n, v in alphas.items() if v != alpha},
  }
  extra = {"scaling": json.dumps({f"{x.module}.{x.weight}": x.scaling for x in matrices})}  # exact, and per matrix
  with atomic_path(folder / TENSORS) as tmp:
    save_file(tensors, tmp, metadata={"format": "pt", "base_hash": base_hash, **extra})
  with atomic_path(folder / CONFIG) as tmp:
    tmp.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_adapter(folder: Path) -> tuple[list[Matrix], str | None, float]:
  """The adapter of a folder written here or by PEFT: its matrices, the hash of its base (None in PEFT's, which keep
  none) and its dropout. Raises UserError."""
  config = _config(folder / CONFIG)
  found: dict[tuple[str, str], dict[str, Tensor]] = {}
  try:
    with safe_open(folder / TENSORS, "pt") as f:
      header = f.metadata() or {}
      for key in f.keys():
        match = KEY.fullmatch(key.removeprefix(PREFIX))
        if match is None or not key.startswith(PREFIX):
          raise UserError(
            f"{folder / TENSORS}: {key} is no part of a DoRA adapter; give a folder with A, B and magnitudes only"
          )
        found.setdefault((match["module"], match["weight"] or "weight"), {})[match["part"]] = f.get_tensor(key)
  except (OSError, SafetensorError) as e:
    raise UserError(f"{folder / TENSORS} cannot be read: {e}; give a folder that holds a saved adapter") from e
  if not found:
    raise UserError(f"{folder / TENSORS} holds no adapter; give a folder that holds a saved adapter")
  try:
    scalings = {k: float(v) for k, v in json.loads(header.get("scaling", "{}")).items()}
  except (AttributeError, TypeError, ValueError) as e:
    raise UserError(f"{folder / TENSORS}: the header's scaling is damaged: {e}; save the adapter again") from e
  out = []
  for (module, weight), parts in found.items():
    lacking = [p for p in PARTS if p not in parts]
    if lacking:
      raise UserError(f"{folder / TENSORS}: {module} lacks {', '.join(lacking)}; the file is not whole, save it again")
    a, b, m = (parts[p] for p in PARTS)
    if not all(t.isfinite().all() for t in (a, b, m)):
      raise UserError(f"{folder / TENSORS}: {module} holds numbers that are not finite; take an earlier checkpoint")
    if a.ndim not in (2, 4) or b.ndim != a.ndim:
      raise UserError(
        f"{folder / TENSORS}: {module} is {a.ndim}-dimensional; only adapters of dense layers, 2-D convolutions and "
        "GRUs are read"
      )
    scaling = scalings.get(f"{module}.{weight}")
    out.append(
      Matrix(module, weight, a, b, m.reshape(-1), _scaling(config, module, b.shape[1]) if scaling is None else scaling)
    )
  return out, header.get("base_hash"), float(config.get("lora_dropout") or 0.0)


def _config(path: Path) -> dict[str, Any]:
  try:
    config = json.loads(path.read_text())
    if not isinstance(config, dict):
      raise ValueError("not a JSON object")
  except (OSError, ValueError) as e:
    raise UserError(f"{path} cannot be read: {e}; give a folder that holds a saved adapter") from e
  if config.get("peft_type") != "LORA" or not config.get("use_dora"):
    raise UserError(
      f"{path} is of {config.get('peft_type', 'an unknown kind')} with use_dora={config.get('use_dora', False)}; only "
      "DoRA adapters are read"
    )
  used = [k for k in NOT_READ if config.get(k)]
  if used or config.get("bias", "none") != "none":
    raise UserError(f"{path} uses {', '.join(used or ['bias'])}, which is not read; save the adapter without it")
  return config


def _scaling(config: dict[str, Any], module: str, rank: int) -> float:
  """PEFT's: alpha / r, or alpha / sqrt(r) where use_rslora; the first pattern that the end of the module's name matches
  gives its alpha."""
  alpha = next(
    (v for k, v in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({k})$", module)),
    config.get("lora_alpha", 8),
  )
  return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _plain(x: float) -> int | float:
  """PEFT's alphas are whole numbers where they can be."""
  return int(x) if float(x).is_integer() else x


def fits(x: Matrix, shape: torch.Size, groups: int) -> bool:
  """Whether the adapter is one for a weight of this shape and number of groups."""
  rank = x.b.shape[1]
  return (
    x.a.shape == (groups * rank, *shape[1:])
    and x.b.shape == (shape[0], rank, *(1,) * (len(shape) - 2))
    and x.m.shape == (shape[0],)
  )

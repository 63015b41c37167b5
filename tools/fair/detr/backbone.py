"""The frozen network under a detection transformer: a Hugging Face folder, a hub id, a name of timm, or a configuration
alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openpilot.tools.fair.hf import check_numbers, read_json, read_values
from openpilot.tools.fair.registry import TEACHERS
from openpilot.tools.fair.students.backbone import RGB_MEAN, RGB_STD
from openpilot.tools.fair.teacher import find_weights, hash_weights
from openpilot.tools.lib.errors import UserError, printable, warn
from openpilot.tools.lib.files import LONG

NO_WEIGHTS = "none"  # --backbone-weights
UNSTATED = "unstated"
FAMILIES = {
  "dinov3_vit": "DINOv3",
  "dinov3_convnext": "DINOv3",
  "dinov2": "Apache-2.0",
  "dinov2_with_registers": "Apache-2.0",
}


@dataclass
class Backbone:
  """net: of AutoBackbone, with one feature map. name: as people know it, no folder of this machine. license: of its
  weights. multiple: sides of pictures that it takes without a rest. weights: their hash, '' where they are random."""

  net: Any
  name: str
  license: str
  multiple: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  weights: str

  @property
  def config(self) -> Any:
    return self.net.config


def reason(e: Exception) -> str:
  return printable((str(e) or repr(e)).strip().splitlines()[0], LONG)


def load_backbone(
  name: str, weights: str | None = None, level: int = -1, download: bool = False, license: str | None = None
) -> Backbone:
  """weights: a state dict of timm, or 'none'. level: which of the network's maps, counted from the last. Raises
  UserError."""
  import transformers
  from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

  transformers.utils.logging.disable_progress_bar()
  path = Path(name).expanduser()
  hub = name.count("/") == 1 and not name.startswith(("/", ".", "~"))
  if not path.exists() and not hub:
    return load_timm(name, weights, level, download, license)
  if weights not in (None, NO_WEIGHTS):
    raise UserError(f"--backbone-weights {weights}: those are of a name of timm; {name} brings its own")
  if not path.exists():
    path = find_weights(name, None, download)
  said = path.resolve().parent.name if path.name == "config.json" else path.resolve().stem if path.is_file() else name
  called = name if hub and not Path(name).exists() else Path(said).name
  config, held = read_backbone(path, level)
  alone = path.is_file() or not held or weights == NO_WEIGHTS
  try:
    if alone:
      warn(f"--backbone {name}: a configuration alone; its weights are random, and frozen so they teach little")
      net = transformers.AutoBackbone.from_config(config)
    else:
      # AutoBackbone.from_pretrained itself asks the hub for a folder of that name
      kind: Any = MODEL_FOR_BACKBONE_MAPPING[type(config)]
      net, info = kind.from_pretrained(
        path, config=config, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
      )
      absent = sorted(k for k in info["missing_keys"] if "mask_token" not in k)
      if absent:
        raise UserError(f"{path} lacks {len(absent)} of its weights ({absent[0]}); copy the whole folder")
  except UserError:
    raise
  except Exception as e:  # transformers has no class of its own for any of this
    raise UserError(f"--backbone {name}: transformers' AutoBackbone does not take it: {reason(e)}") from None
  patch = getattr(config, "patch_size", 32)
  multiple = 32 if not isinstance(patch, int) or 32 % patch == 0 else patch
  mean, std = folder_values(path)
  own = license or ("Apache-2.0" if alone else license_of(name, path, config.model_type))
  return Backbone(net, called, own, multiple, mean, std, "" if alone else hash_weights(path))


def read_backbone(path: Path, level: int) -> tuple[Any, bool]:
  """-> its configuration, told which map to give, and whether there are weights. Raises UserError."""
  import transformers
  from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES as KNOWN

  file = path if path.is_file() else path / "config.json"
  raw = read_json(file, "a backbone")
  check_numbers(raw, file)
  kind = raw.get("model_type")
  if not isinstance(kind, str) or kind not in KNOWN or kind == "timm_backbone":
    raise UserError(
      f"{file} is of a '{printable(kind, 40)}', which transformers' AutoBackbone does not know; it knows dinov3_vit, "
      "dinov3_convnext, dinov2, resnet, swin, convnextv2 and others, and names of timm"
    )
  raw = {k: v for k, v in raw.items() if k not in ("out_features", "out_indices", "_out_features", "_out_indices")}
  try:
    config = transformers.AutoConfig.for_model(**raw)
    stages = list(config.stage_names)
    config.set_output_features_output_indices(out_features=[stages[level]], out_indices=None)
  except IndexError:
    raise UserError(f"--level {level}: the backbone has {len(stages)} maps") from None
  except Exception as e:  # strict configurations raise many kinds
    raise UserError(f"{file}: {reason(e)}; copy it again") from None
  return config, path.is_dir() and any(path.glob("model*.safetensors"))


def folder_values(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and deviation of the folder's preprocessor_config.json, ImageNet's without one."""
  file = (path if path.is_dir() else path.parent) / "preprocessor_config.json"
  if not file.is_file():
    return RGB_MEAN, RGB_STD
  mean, std, white = read_values(read_json(file, "a backbone"), file)
  return tuple(m / white for m in mean), tuple(s / white for s in std)


def license_of(name: str, path: Path, kind: str) -> str:
  """Of a registered teacher's weights, of the family, or 'unstated'."""
  folder = path.resolve().name
  for entry in TEACHERS.values():
    if entry.weights == name or ("/" in entry.weights and entry.weights.split("/")[-1] == folder):
      return entry.license
  return FAMILIES.get(kind, UNSTATED)


def load_timm(name: str, weights: str | None, level: int, download: bool, license: str | None) -> Backbone:
  """transformers puts DETR's frozen norm in place of timm's, whose activation is then lost: timm's own frozen norm is
  taken."""
  import timm
  from transformers import TimmBackbone, TimmBackboneConfig

  if not timm.is_model(name):
    raise UserError(
      f"--backbone {printable(name, 80)}: no folder, no hub id 'owner/name', and timm has no such network"
    )
  if weights is None and not download:
    raise UserError(
      f"--backbone {name}: give its weights with --backbone-weights FILE, let them be downloaded with --download, or "
      f"say --backbone-weights {NO_WEIGHTS} for random ones"
    )
  hubs = weights is None
  try:
    told: dict[str, Any] = {"out_indices": [level], "freeze_batch_norm_2d": True}
    config = TimmBackboneConfig(backbone=name, **told)
    net = TimmBackbone(config, pretrained=hubs)
  except Exception as e:
    raise UserError(f"--backbone {name}: it gives no feature maps here: {reason(e)}") from None
  data = timm.get_pretrained_cfg(name)
  mean, std = (tuple(v) if v else d for v, d in ((data and data.mean, RGB_MEAN), (data and data.std, RGB_STD)))
  if weights == NO_WEIGHTS:
    warn(f"--backbone {name}: its weights are random, and frozen so they teach little")
    return Backbone(net, name, license or "Apache-2.0", 32, mean, std, "")
  if hubs:
    known = str(getattr(data, "license", "") or "")
    own = {"apache-2.0": "Apache-2.0", "mit": "MIT", "bsd-3-clause": "BSD-3-Clause"}.get(known, known or UNSTATED)
    return Backbone(net, name, license or own, 32, mean, std, f"hub:{name}")
  path = Path(str(weights)).expanduser()
  if not path.is_file():
    raise UserError(f"--backbone-weights: there is no {path}")
  load_file(net, path)
  return Backbone(net, name, license or UNSTATED, 32, mean, std, hash_weights(path))


def load_file(net: Any, path: Path) -> None:
  """A state dict of timm's whole network into TimmBackbone. Raises UserError."""
  try:
    state = torch.load(path, map_location="cpu", weights_only=True)
    own = net._backbone.state_dict()
    absent = [k for k, v in own.items() if k not in state or state[k].shape != v.shape]
    if absent:
      raise ValueError(f"{len(absent)} tensors of the backbone are not in it, the first is {absent[0]}")
    net._backbone.load_state_dict({k: state[k].to(v.dtype) for k, v in own.items()})
  except Exception as e:  # torch's ways to fail at a file have no common base
    raise UserError(f"--backbone-weights {path}: no weights for this backbone: {reason(e)}") from None

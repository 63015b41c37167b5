"""Hugging Face folders (config.json, preprocessor_config.json, model.safetensors): checked, loaded from the disk only,
fed as their preprocessor says.

transformers' own image processors are not used: several need torchvision, and none runs on the GPU in the batch that it
is given."""

import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpilot.tools.learn.device import Device, choose_device
from openpilot.tools.learn.memory import halve_on_oom, is_out_of_memory
from openpilot.tools.fair.teacher import Clip, Label, Labels, State
from openpilot.tools.lib import files
from openpilot.tools.lib.errors import UserError, printable

FILES = "config.json, preprocessor_config.json and model.safetensors"
MODES = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
MOST_NUMBER, MOST_PARTS, MOST_PIXELS = 1 << 20, 256, 4096
PARTS = re.compile(r"layers|blocks$|blocks_|depths|_stages")  # of a network: there are so many
COMPILE_BACKEND = "inductor"
UNUSED = (
  "mask_token",
  "fusion_stage.layers.0.residual_layer1",
)  # in the classes, but no forward of ours reads them, and some checkpoints leave them out


@dataclass(frozen=True)
class Preprocess:
  """preprocessor_config.json, as far as it is needed here. Never a crop: what is cut off would have no labels."""

  mean: tuple[float, ...]
  std: tuple[float, ...]
  mode: str = "bilinear"
  size: tuple[int, int] | int | None = None  # (height, width), the shorter edge, or none: as the image comes
  white: float = 1.0  # what 255 becomes before mean and std: 255 rescale_factor

  def settings(self) -> dict[str, Any]:
    said = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}  # as JSON gives it back
    if self.white == 1:
      del said["white"]  # as it was before there was such a thing: the key of labels stays
    return said


def read_json(path: Path, what: str) -> dict[str, Any]:
  """Raises UserError where the file is not there or no JSON object."""
  if not path.is_file():
    raise UserError(
      f"no {path.name} in {path.parent}; {what} is a Hugging Face folder with {FILES}: copy the whole folder"
    )
  try:
    value = files.read_json(path)
  except ValueError as e:
    raise UserError(f"{path} is not JSON: {e}; copy it again") from None
  if not isinstance(value, dict):
    raise UserError(f"{path} holds no JSON object; copy it again")
  return value


def check_numbers(value: Any, path: Path, key: str = "") -> None:
  """Raises UserError where config.json has a number that no network has: it would be built before it is looked at."""
  if isinstance(value, dict):
    for k, v in value.items():
      check_numbers(v, path, str(k))
  elif isinstance(value, list):
    if len(value) > MOST_NUMBER:
      raise UserError(f"{path} has a list '{printable(key, 40)}' of {len(value)}; copy it again")
    for v in value:
      check_numbers(v, path, key)
  elif isinstance(value, (int, float)) and not isinstance(value, bool):
    most = MOST_PARTS if PARTS.search(key) else MOST_NUMBER
    if not abs(value) <= most:  # nan too
      raise UserError(f"{path} has {printable(value, 40)} as '{printable(key, 40)}'; at most {most} is read")


def check_demand(kind: Any, folder: Path) -> None:
  """Raises UserError where config.json asks for more numbers than the folder's weights hold: they would take memory
  before it is seen that they are missing. kind: the transformers class."""
  import transformers
  from safetensors import safe_open

  held = 0
  for path in sorted(folder.glob("model*.safetensors")):
    with safe_open(path, "pt") as f:
      held += sum(math.prod(f.get_slice(k).get_shape()) for k in f.keys())
  config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
  with torch.device("meta"):
    wanted = sum(p.numel() for p in (getattr(kind, "from_config", None) or kind._from_config)(config).parameters())
  if wanted > 1.1 * held + 2**20:
    raise ValueError(f"config.json asks for {wanted} numbers, the weights hold {held}")


def check_size(height: float, width: float, where: object) -> None:
  """Raises UserError on the size of a picture that is none, or takes all memory."""
  if not (1 <= height <= MOST_PIXELS and 1 <= width <= MOST_PIXELS):
    raise UserError(
      f"{where}: pictures of {printable(width, 40)}x{printable(height, 40)} pixels; 1 to {MOST_PIXELS} are possible"
    )


def read_config(folder: Path, model_types: tuple[str, ...], what: str) -> dict[str, Any]:
  """config.json of a folder whose model_type must be one of these, its weights there. what: for people, 'DINOv2'.
  Raises UserError."""
  if not folder.is_dir():
    raise UserError(f"{folder} is no folder; {what} is a Hugging Face folder with {FILES}")
  config = read_json(folder / "config.json", what)
  if config.get("model_type") not in model_types:
    kinds = ", ".join(model_types)
    kind = printable(config.get("model_type"), 40)
    raise UserError(
      f"{folder / 'config.json'} is of a '{kind}', not of {what} ({kinds}); name another folder or another teacher"
    )
  if not any((folder / f"model.safetensors{s}").is_file() for s in ("", ".index.json")):
    raise UserError(f"no model.safetensors in {folder}; copy it there (weights in pickles are not opened)")
  return config


def read_values(raw: dict[str, Any], path: Path) -> tuple[tuple[float, ...], tuple[float, ...], float]:
  """-> mean, std, white, as Preprocess has them, of what preprocessor_config.json says; transformers' rules where it
  does not. Raises UserError."""
  mean, std = raw.get("image_mean"), raw.get("image_std")
  if not raw.get("do_normalize", True):
    mean, std = [0.0] * 3, [1.0] * 3
  if not all(
    isinstance(x, list) and len(x) == 3 and all(isinstance(v, (int, float)) for v in x) for x in (mean, std)
  ) or not all(std or ()):
    raise UserError(
      f"{path} has no image_mean and image_std of three channels; take the file that came with the checkpoint"
    )
  factor = raw.get("rescale_factor", 1 / 255) if raw.get("do_rescale", True) else 1.0
  if not isinstance(factor, (int, float)) or not factor > 0:
    raise UserError(f"{path} has the rescale_factor {factor}; take the file that came with the checkpoint")
  white = 255 * float(factor)
  assert mean is not None and std is not None
  return tuple(map(float, mean)), tuple(map(float, std)), 1.0 if abs(white - 1) < 1e-6 else white


def read_preprocess(folder: Path, what: str) -> Preprocess:
  """preprocessor_config.json of a folder. Raises UserError where it is missing or does not say what is needed."""
  path = folder / "preprocessor_config.json"
  raw = read_json(path, what)
  mean, std, white = read_values(raw, path)
  size, resample = raw.get("size"), raw.get("resample", 2)
  if resample not in MODES:
    raise UserError(f"{path} resamples by {resample}; only bilinear (2) and bicubic (3) are known")
  edges: tuple[int, int] | int | None = None
  if raw.get("do_resize", True) and size is not None:
    if isinstance(size, int):
      edges = size
    elif "height" in size and "width" in size:
      edges = int(size["height"]), int(size["width"])
    elif "shortest_edge" in size:
      edges = int(size["shortest_edge"])
    else:
      raise UserError(
        f"{path} has a size of {printable(', '.join(map(str, size)), 80)}; height and width, or shortest_edge, are "
        "known"
      )
  return Preprocess(mean, std, MODES[resample], edges, white)


def load_model(folder: Path, device: Device, kind: str = "AutoModel") -> Any:
  """The official transformers model: frozen, in eval mode, on the device in its precision. kind: the transformers
  class. Raises UserError."""
  import transformers

  transformers.utils.logging.disable_progress_bar()  # the command that loads it has its own
  check_numbers(read_json(folder / "config.json", "this teacher"), folder / "config.json")
  try:
    check_demand(getattr(transformers, kind), folder)
    model, info = getattr(transformers, kind).from_pretrained(
      folder, local_files_only=True, use_safetensors=True, dtype=device.dtype, output_loading_info=True
    )
  except Exception as e:  # transformers has no class of its own for any of this
    why = printable((str(e) or repr(e)).strip().splitlines()[0], 200)
    raise UserError(
      f"the checkpoint in {folder} does not load: {why}; config.json and model.safetensors must be of one model"
    ) from None
  missing = sorted(k for k in info["missing_keys"] if not any(u in k for u in UNUSED))
  if missing:
    raise UserError(
      f"the checkpoint in {folder} lacks {len(missing)} of the weights that its config.json asks for ({missing[0]}); "
      "both must be of one model"
    )
  if dropped := dropped_blocks(info["unexpected_keys"], set(model.state_dict())):
    raise UserError(
      f"the checkpoint in {folder} holds {len(dropped)} weights of blocks that its config.json does not name "
      f"({dropped[0]}); both must be of one model"
    )
  model.eval().requires_grad_(False).to(device.device)
  return model.to(memory_format=torch.channels_last) if device.device.type == "cuda" else model


def dropped_blocks(unexpected: Iterable[str], known: set[str]) -> list[str]:
  """Weights that would have a place in the model if one of its lists of blocks were longer. Others, as of heads that
  are not wanted, are none of these."""

  def numberless(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".#", name)

  places = {p for p in map(numberless, known) if "#" in p}
  # also of a model within another, as dinov2.encoder.layer.4
  return sorted(
    k
    for k in unexpected
    for parts in [numberless(k).split(".")]
    if any(".".join(parts[i:]) in places for i in range(len(parts)))
  )


def compile_blocks(name: str, blocks: Iterable[nn.Module]) -> None:
  """Has the forward of each of a ViT's blocks compiled when it first runs, for static shapes; equal blocks share one
  program. name: of the teacher. Where compiling fails, they run as they are, which is said once. Hooks stay outside:
  transformers collects hidden states by some that cannot be compiled."""
  failed: list[bool] = []

  def compiled(plain: Callable[..., Any]) -> Callable[..., Any]:
    fast = torch.compile(plain, backend=COMPILE_BACKEND, dynamic=False)

    def forward(*args: Any, **kwargs: Any) -> Any:
      if not failed:
        try:
          return fast(*args, **kwargs)
        except Exception as e:  # whatever the compiler, or the compiler that it calls, comes to
          if is_out_of_memory(e):
            raise
          failed.append(True)
          print(
            f"warning: torch.compile fails for teacher '{name}' ({' '.join(str(e).split())[:160]}); it runs without",
            file=sys.stderr,
          )
      return plain(*args, **kwargs)

    return forward

  for block in blocks:
    block.forward = compiled(block.forward)


def to_multiple(height: int, width: int, multiple: int) -> tuple[int, int]:
  """The nearest size, at least one `multiple`, that both edges' patches fill."""
  return max(1, round(height / multiple)) * multiple, max(1, round(width / multiple)) * multiple


def preprocess(images: Tensor, how: Preprocess, size: tuple[int, int], device: Device) -> Tensor:
  """(B, 3, H, W) RGB, uint8 or float of 0 to 1 -> (B, 3, *size) in the device's precision, scaled, resized
  (antialiased), normalized. Raises UserError."""
  check_size(*size, "preprocessor_config.json")
  if images.ndim != 4 or images.shape[1] != 3 or not (images.dtype == torch.uint8 or images.is_floating_point()):
    raise UserError(
      f"images are {tuple(images.shape)} {images.dtype}; they must be (B, 3, H, W) RGB, uint8 or float of 0 to 1"
    )
  x = images.to(device.device, non_blocking=True)
  x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
  if x.shape[2:] != size:
    x = F.interpolate(x, size, mode=how.mode, antialias=True, align_corners=False)
    if how.mode == "bicubic":
      x = x.clamp(0, 1)  # it overshoots; images of bytes, which the networks have learned from, cannot
  if how.white != 1:
    x = x * how.white
  mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (how.mean, how.std))
  x = ((x - mean) / std).to(device.dtype)
  return x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x


class DenseTeacher(nn.Module):
  """A teacher without state whose labels are images: what DINOv2 and DINOv3 share. One says in `input_size` and
  `encode` what it is."""

  stateful = False
  sees = "picture"
  whole = False
  letterboxed = True

  def __init__(
    self,
    name: str,
    model_id: str,
    checkpoint_hash: str,
    license: str,
    device: str | torch.device | None,
    precision: str | None,
  ):
    super().__init__()
    self.name, self.model_id, self.checkpoint_hash, self.license = name, model_id, checkpoint_hash, license
    self.where = choose_device(None if device is None else str(device), precision)
    self.labels: list[Label] = []
    self.view: tuple[int, int] | None = None

  def train(self, mode: bool = True) -> "DenseTeacher":
    """Stays in eval mode, also where a student that holds it is trained."""
    return super().train(False)

  def input_size(self, height: int, width: int) -> tuple[int, int]:
    """-> (height, width) that frames of this size are resized to for the network."""
    raise NotImplementedError

  def describe(self, height: int, width: int) -> list[Label]:
    """The labels of frames of this size."""
    raise NotImplementedError

  def encode(self, frames: Tensor) -> dict[str, Tensor]:
    """(T, 3, H, W) uint8 -> each label's (T, ...)."""
    raise NotImplementedError

  def prepare(self, height: int, width: int) -> None:
    self.labels, self.view = self.describe(height, width), (height, width)

  def label(self, clip: Clip, state: State | None = None) -> tuple[Labels, State | None]:
    """Every label as (T, ...) float16. Halves the batch where the GPU's memory is too small. Raises UserError on frames
    of another size than prepared."""
    if self.view is None:
      self.prepare(*clip.rgb.shape[2:])
    if clip.rgb.shape[2:] != self.view:
      raise UserError(
        f"teacher '{self.name}' was prepared for frames of {self.view}, height and width, and got "
        f"{clip.rgb.shape[2:]}; label one view at a time"
      )
    parts = halve_on_oom(self._run, clip.rgb)
    return {label.name: np.concatenate([part[label.name] for part in parts]) for label in self.labels}, None

  @torch.inference_mode()
  def _run(self, rgb: np.ndarray) -> list[dict[str, np.ndarray]]:
    frames = torch.from_numpy(np.ascontiguousarray(rgb))
    out = self.encode(frames.pin_memory() if self.where.device.type == "cuda" else frames)
    return [{name: value.to(torch.float16).cpu().numpy() for name, value in out.items()}]

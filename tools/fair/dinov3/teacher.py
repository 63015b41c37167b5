"""DINOv3 (Simeoni et al. 2025), ViT and ConvNeXt: dense features from a local Hugging Face folder."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpilot.tools.fair.dinov3.config import DinoV3Config
from openpilot.tools.fair.hf import DenseTeacher, compile_blocks, load_model, preprocess, to_multiple
from openpilot.tools.fair.teacher import Entry, Label, check_least, hash_weights
from openpilot.tools.lib.errors import UserError


class DinoV3Teacher(DenseTeacher):
  """Frozen and in eval mode, whatever holds it. Images are (B, 3, H, W) RGB, uint8 or float of 0 to 1, of any size:
  resized as the config says, normalized."""

  def __init__(
    self,
    config: DinoV3Config,
    device: str | torch.device | None = None,
    precision: str | None = None,
    name: str = "",
    license: str = "DINOv3",
    compile: bool = False,  # noqa: A002
  ):
    """compile: with torch.compile, for a GPU. Raises UserError."""
    super().__init__(name or config.root.name, config.root.name, hash_weights(config.root), license, device, precision)
    self.cfg = config
    self.model = load_model(config.root, self.where)
    self.compiled = compile
    if compile:
      if config.model_type != "dinov3_vit":
        raise UserError(
          f"teacher '{self.name}': compile is for ViTs, whose blocks are all equal, and this is a ConvNeXt; leave "
          "it out"
        )
      compile_blocks(self.name, self.model.model.layer)

  def _tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """-> (B, prefix + h w, C) after the final norm, and (h, w)."""
    size = self.input_size(*images.shape[-2:])
    tokens = self.model(preprocess(images, self.cfg.how, size, self.where)).last_hidden_state
    return tokens, (size[0] // self.cfg.patch, size[1] // self.cfg.patch)

  def _map(self, images: Tensor) -> Tensor:
    tokens, grid = self._tokens(images)
    return tokens[:, self.cfg.prefix :].transpose(1, 2).unflatten(2, grid)

  @torch.no_grad()
  def extract_features(self, images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, C) float32, the CLS token after the final norm; of a ConvNeXt the normed mean, which stands
    for it."""
    return self._tokens(images)[0][:, 0].float()

  @torch.no_grad()
  def extract_feature_map(self, images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, C, h/patch, w/patch) float32, the patches after the final norm; h, w: the size after
    resizing, cfg.input_size(H, W)."""
    return self._map(images).float()

  # as a teacher

  @property
  def as_fine(self) -> float:
    """Of a whole picture, beside the view."""
    return self.cfg.scale

  @property
  def patch(self) -> int:
    return self.cfg.patch

  def input_size(self, height: int, width: int) -> tuple[int, int]:
    if self.whole and self.cfg.resize == "multiple":  # it has its size already
      return to_multiple(height, width, self.cfg.patch)
    return self.cfg.input_size(height, width)

  def describe(self, height: int, width: int) -> list[Label]:
    h, w = self.input_size(height, width)
    return [Label("features", "dense", "float16", (self.cfg.channels, h // self.cfg.patch, w // self.cfg.patch))]

  def settings(self) -> dict[str, Any]:
    size = None if self.view is None or self.whole else self.input_size(*self.view)  # a whole picture's is each its own
    return {
      "model": self.cfg.model_type,
      "layer": "last, after the final norm",
      "patch": self.cfg.patch,
      "tokens_dropped": self.cfg.prefix,
      "resize": self.cfg.resize,
      "scale": self.cfg.scale,
      "input": size and list(size),
      "preprocess": self.cfg.how.settings(),
      "precision": self.where.precision,
      **({"compiled": True} if self.compiled else {}),
    }

  def encode(self, frames: Tensor) -> dict[str, Tensor]:
    return {"features": self._map(frames)}


def make(
  name: str, entry: Entry, path: Path | None, resize: str = "multiple", scale: float = 1.0, **options: Any
) -> DinoV3Teacher:
  """The registry's way to a teacher."""
  assert path is not None
  check_least(name, 0.1, scale=scale)
  teacher = DinoV3Teacher(DinoV3Config(path, resize, scale), name=name, license=entry.license, **options)
  teacher.model_id = entry.weights
  return teacher

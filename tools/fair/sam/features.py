"""SAM 2.1's image encoder as a teacher of dense features: what its decoder and its memory read of a frame, without any
prompt."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpilot.tools.fair.detr.teacher import read_folder
from openpilot.tools.fair.hf import MODES, DenseTeacher, Preprocess, load_model, preprocess, read_values
from openpilot.tools.fair.sam.checkpoint import PICTURES, load_pt
from openpilot.tools.fair.teacher import Entry, Label, hash_weights


class Sam2FeatureTeacher(DenseTeacher):
  """The coarsest map of its pyramid, stride 16: 256 channels of 64x64 for the published checkpoints, which see every
  frame as 1024x1024, stretched.

  path: a Hugging Face folder, or a checkpoint of the sam2 package. Raises UserError where it is no SAM 2 model."""

  def __init__(
    self, name: str, entry: Entry, path: Path | None, device: str | None = None, precision: str | None = None
  ):
    assert path is not None
    super().__init__(name, entry.weights or path.name, hash_weights(path), entry.license, device, precision)
    pictures: dict[str, Any] = PICTURES
    if path.suffix in (".pt", ".pth"):
      model: Any = load_pt(path, self.where)
    else:
      _, pictures = read_folder(path, ("sam2_video",), "a SAM 2 video model")
      model = load_model(path, self.where, "Sam2VideoModel")
    self.model, self.size = model.vision_encoder, int(model.config.image_size)
    mean, std, white = read_values(pictures, path)
    self.how = Preprocess(mean, std, MODES[pictures.get("resample", 2)], white=white)
    self.channels, self.stride = int(self.model.config.fpn_hidden_size), 16

  @torch.no_grad()
  def extract_feature_map(self, images: Tensor) -> Tensor:
    """(B, 3, H, W) RGB, uint8 or float of 0 to 1, of any size -> (B, C, size/16, size/16) float32."""
    return self._map(images).float()

  def _map(self, images: Tensor) -> Tensor:
    return self.model(preprocess(images, self.how, (self.size, self.size), self.where)).fpn_hidden_states[-1]

  # as a teacher

  def input_size(self, height: int, width: int) -> tuple[int, int]:
    return self.size, self.size

  def describe(self, height: int, width: int) -> list[Label]:
    return [Label("features", "dense", "float16", (self.channels, self.size // self.stride, self.size // self.stride))]

  def settings(self) -> dict[str, Any]:
    return {
      "model": "sam2 image encoder",
      "layer": "coarsest of the pyramid",
      "patch": self.stride,
      "resize": "stretched, antialiased",
      "input": [self.size, self.size],
      "preprocess": self.how.settings(),
      "precision": self.where.precision,
    }

  def encode(self, frames: Tensor) -> dict[str, Tensor]:
    return {"features": self._map(frames)}

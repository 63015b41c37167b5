"""SAM and SAM 2.1 on single pictures: a mask for each box."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openpilot.tools.fair.detr.teacher import Pictures, read_folder
from openpilot.tools.fair.grounded_sam.originals import SAM_PICTURES, load_original
from openpilot.tools.fair.hf import load_model, read_values
from openpilot.tools.fair.sam.checkpoint import PICTURES as SAM2_PICTURES
from openpilot.tools.learn.device import Device

MODEL_TYPES = {"sam": "SamModel", "sam2": "Sam2Model", "sam2_video": "Sam2Model"}
BOXES_AT_ONCE = 32


class Segmenter:
  """A SAM. model: transformers' class, which adapters may have changed in place."""

  def __init__(self, model: Any, pictures: dict[str, Any], device: Device):
    self.model, self.device = model, device
    self.family = "sam" if type(model).__name__ == "SamModel" else "sam2"
    config = model.config
    self.side = int(
      config.vision_config.image_size if self.family == "sam" else config.prompt_encoder_config.image_size
    )
    self.said = pictures

  def fit(self, height: int, width: int) -> tuple[int, int]:
    """A picture's size -> that of it in the square input: SAM's longer side fills it, SAM 2 stretches both. It is a
    pixel thin at least."""
    if self.family == "sam2":
      return self.side, self.side
    scale = self.side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

  def pixels(self, rgb: np.ndarray) -> Tensor:
    """(3, H, W) uint8 RGB -> (1, 3, side, side), as the official processor has it."""
    h, w = self.fit(*rgb.shape[-2:])
    x = Pictures({**self.said, "do_resize": True, "size": {"height": h, "width": w}})(rgb[None], self.device)
    return F.pad(x, (0, self.side - w, 0, self.side - h))

  def boxes(self, boxes: np.ndarray, height: int, width: int) -> Tensor:
    """(N, 4) x0 y0 x1 y1 in pixels of the picture -> (1, N, 4) of the input."""
    h, w = self.fit(height, width)
    scale = np.array([w / width, h / height] * 2)
    return torch.as_tensor(boxes * scale, dtype=torch.float32, device=self.device.device)[None]

  def embed(self, pixels: Tensor) -> Any:
    """(B, 3, side, side) -> what the mask decoder reads, without gradients: a map, of SAM 2 a list of three."""
    return self.model.get_image_embeddings(pixels)

  def forward(self, boxes: Tensor, pixels: Tensor | None = None, embeddings: Any = None) -> tuple[Tensor, Tensor]:
    """(1, N, 4) boxes of the input, on its pixels or its embeddings -> (N, s, s) logits over the whole input, (N,) the
    IoU that it expects, float32."""
    given = {"pixel_values": pixels} if embeddings is None else {"image_embeddings": embeddings}
    # a list: SAM 2's own is changed
    given = {k: list(v) if isinstance(v, (list, tuple)) else v for k, v in given.items()}
    out = self.model(**given, input_boxes=boxes.to(self.device.dtype), multimask_output=False)
    return out.pred_masks[0, :, 0].float(), out.iou_scores[0, :, 0].float()

  def to_picture(self, logits: Tensor, height: int, width: int) -> Tensor:
    """(N, s, s) -> (N, H, W), as the official processor has it."""
    x = logits[:, None]
    if self.family == "sam":
      h, w = self.fit(height, width)
      x = F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=False)[..., :h, :w]
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=False)[:, 0]

  def from_picture(self, masks: np.ndarray, size: int) -> Tensor:
    """(N, H, W) bool -> (N, size, size) float 0 or 1, over the whole input: what a mask of its resolution would be."""
    x = torch.as_tensor(masks, dtype=torch.float32, device=self.device.device)[:, None]
    h, w = self.fit(*masks.shape[-2:])
    x = F.interpolate(x, (h, w), mode="bilinear", align_corners=False, antialias=True)
    x = F.pad(x, (0, self.side - w, 0, self.side - h))
    return (F.interpolate(x, (size, size), mode="area")[:, 0] > 0.5).float()

  @torch.inference_mode()
  def segment(self, rgb: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(3, H, W) uint8 RGB, (N, 4) boxes -> (N, H, W) bool."""
    h, w = rgb.shape[-2:]
    if not len(boxes):
      return np.zeros((0, h, w), bool)
    embeddings, out = self.embed(self.pixels(rgb)), []
    for i in range(0, len(boxes), BOXES_AT_ONCE):
      logits, _ = self.forward(self.boxes(boxes[i : i + BOXES_AT_ONCE], h, w), embeddings=embeddings)
      out.append((self.to_picture(logits, h, w) > 0).cpu().numpy())
    return np.concatenate(out)

  @torch.inference_mode()
  def features(self, rgbs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The image encoder's map of each picture, without the padding: (D, h, w) float32."""
    out = []
    for x in rgbs:
      e = self.embed(self.pixels(x))
      e = (e if torch.is_tensor(e) else e[-1])[0].float()
      h, w = (-(-n * e.shape[-1] // self.side) for n in self.fit(*x.shape[-2:]))
      out.append(e[:, :h, :w].cpu().numpy())
    return out

  def __call__(self, image: np.ndarray, box_prompts: np.ndarray) -> np.ndarray:
    """As segment()."""
    return self.segment(image, np.asarray(box_prompts, np.float32).reshape(-1, 4))


def load_segmenter(path: Path, device: Device) -> Segmenter:
  """A Hugging Face folder of SAM or SAM 2.1, or an original .pth or .pt. Raises UserError."""
  if path.is_file():
    family, model = load_original(path, ("sam", "sam2"))
    pictures = SAM_PICTURES if family == "sam" else SAM2_PICTURES
    return Segmenter(model.to(device.device, device.dtype), pictures, device)
  config, pictures = read_folder(path, tuple(MODEL_TYPES), "SAM or SAM 2")
  if pictures.get("do_normalize", True):
    read_values(pictures, path / "preprocessor_config.json")
  return Segmenter(load_model(path, device, MODEL_TYPES[config["model_type"]]), pictures, device)

"""A DINOv3 folder, read and checked."""

from dataclasses import dataclass, field
from pathlib import Path

from openpilot.tools.fair.hf import Preprocess, read_config, read_preprocess, to_multiple
from openpilot.tools.lib.errors import UserError

MODEL_TYPES = ("dinov3_vit", "dinov3_convnext")
RESIZES = ("preprocessor", "multiple")


@dataclass
class DinoV3Config:
  """A local Hugging Face folder: config.json, preprocessor_config.json, model.safetensors.

  resize: 'preprocessor', to the size of preprocessor_config.json, cut down to a multiple of the patch, 518 to 512 with
  a patch of 16, which is 32x32 tokens, so that the tokens cover the whole image; or 'multiple', to the nearest multiple
  of the patch, which keeps size and aspect (a teacher of frames takes this).
  Stretched, never cropped. scale: enlarges the images before 'multiple'. Raises UserError."""

  root: Path
  resize: str = "preprocessor"
  scale: float = 1.0
  model_type: str = field(init=False)
  channels: int = field(init=False)  # C of the tokens
  patch: int = field(init=False)  # image pixels a token; a ConvNeXt's stride
  prefix: int = field(init=False)  # tokens before the patches': CLS and registers
  how: Preprocess = field(init=False)

  def __post_init__(self) -> None:
    self.root = Path(self.root)
    if self.resize not in RESIZES:
      raise UserError(f"resize '{self.resize}' is not known; {' or '.join(RESIZES)}")
    config = read_config(self.root, MODEL_TYPES, "DINOv3")
    self.how = read_preprocess(self.root, "DINOv3")
    self.model_type = config["model_type"]
    try:
      if self.model_type == "dinov3_vit":
        self.channels, self.patch, self.prefix = (
          int(config["hidden_size"]),
          int(config["patch_size"]),
          1 + int(config["num_register_tokens"]),
        )
      else:
        sizes = config["hidden_sizes"]
        self.channels, self.patch, self.prefix = (
          int(sizes[-1]),
          2 ** (len(sizes) + 1),
          1,
        )  # the stem's stride is 4, every later stage's 2
    except (KeyError, TypeError, ValueError) as e:
      raise UserError(
        f"{self.root / 'config.json'} lacks or garbles {e}; take the file that came with the checkpoint"
      ) from None

  def input_size(self, height: int, width: int) -> tuple[int, int]:
    """Size of an image -> (height, width) that the network sees."""
    if self.resize == "multiple" or self.how.size is None:
      return to_multiple(round(height * self.scale), round(width * self.scale), self.patch)
    if isinstance(self.how.size, int):
      ratio = self.how.size / min(height, width)
      h, w = round(height * ratio), round(width * ratio)
    else:
      h, w = self.how.size
    return max(1, h // self.patch) * self.patch, max(1, w // self.patch) * self.patch

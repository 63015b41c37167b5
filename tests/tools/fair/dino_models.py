"""Folders of small DINO models with random weights, and pictures: for the tests of both versions."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers


def save_folder(model: transformers.PreTrainedModel, folder: Path, **preprocessor) -> Path:
  """A folder as the hub has it. Norms, layer scales and registers are drawn too, so that leaving one out would show."""
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for p in model.parameters():
      p.add_(torch.randn(p.shape, generator=generator) * 0.1)
  model.eval().save_pretrained(folder)
  (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
  return folder


def save_dinov2(folder: Path, width: int = 32, layers: int = 2, heads: int = 2, side: int = 70) -> Path:
  """A DINOv2 as the hub's folders are, small or of a published size; for pictures of `side` pixels."""
  config = transformers.Dinov2Config(
    hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, image_size=side, patch_size=14
  )
  transformers.Dinov2Model(config).save_pretrained(folder)
  preprocessing = {
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": {"shortest_edge": 256},
  }
  (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
  return folder


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
  """fp32 on one machine: only the order of sums differs (ours scales and normalizes in two steps), which the layers
  enlarge from 1e-7 to 3e-5; how much, hangs on the processor."""
  torch.testing.assert_close(actual, expected, rtol=3e-4, atol=3e-4)


def images(height: int, width: int, n: int = 2, seed: int = 0) -> torch.Tensor:
  return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, height, width), dtype=np.uint8))


def normalize(rgb: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
  """What torch's users write: (x / 255 - mean) / std."""
  return torch.stack([(rgb[:, c].double() / 255 - mean[c]) / std[c] for c in range(3)], 1).float()

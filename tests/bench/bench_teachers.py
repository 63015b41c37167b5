#!/usr/bin/env python3
"""What tuning Grounding DINO and SAM costs, of the published sizes: parameters, adapters, and what one picture's
forward keeps for its gradients. Networks of the real configurations without weights; SAM's on the meta device, which
computes nothing, Grounding DINO's with --dino on the CPU, since it asks its own values where to look.

python tests/bench/bench_teachers.py [--dino]"""

import argparse
import time
from typing import Any

if not __package__:  # run as a file
  import from_root  # noqa: F401

import torch
from torch import Tensor, nn

from openpilot.tools.fair.grounded_sam.lora import TARGETS, LoRATrainer, lora_config

RANK, BOXES = 16, 8
SWIN_B = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12}


def dino(size: str) -> nn.Module:
  import transformers as t

  if size == "tiny":
    return t.GroundingDinoForObjectDetection(t.GroundingDinoConfig())
  more: dict[str, Any] = {**SWIN_B, "out_indices": [2, 3, 4]}
  return t.GroundingDinoForObjectDetection(t.GroundingDinoConfig(backbone_config=t.SwinConfig(**more)))


def sam(size: str) -> nn.Module:
  import transformers as t

  width, depth, heads, reach = {
    "b": (768, 12, 12, [2, 5, 8, 11]),
    "l": (1024, 24, 16, [5, 11, 17, 23]),
    "h": (1280, 32, 16, [7, 15, 23, 31]),
  }[size]
  vision = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "mlp_dim": 4 * width}
  return t.SamModel(t.SamConfig(vision_config={**vision, "global_attn_indexes": reach}))


def sam2(size: str) -> nn.Module:
  import transformers as t

  from openpilot.tools.fair.sam.checkpoint import SIZES

  width, blocks = {"tiny": (96, 12), "small": (96, 16), "base+": (112, 24), "large": (144, 48)}[size]
  widths = [width * 2**i for i in range(4)]
  window = [14, 14] if size == "base+" else [7, 7]
  more: dict[str, Any] = {"embed_dim_per_stage": widths, "window_positional_embedding_background_size": window}
  hiera = t.Sam2HieraDetConfig(hidden_size=width, **more, **SIZES[width, blocks])
  vision = t.Sam2VisionConfig(backbone_config=hiera, backbone_channel_list=widths[::-1])
  return t.Sam2Model(t.Sam2Config(vision_config=vision))


MODELS: dict[str, tuple[Any, str, str]] = {
  **{f"grounding-dino-{s}": (dino, s, "grounding_dino") for s in ("tiny", "base")},
  **{f"sam-vit-{s}": (sam, s, "sam") for s in ("b", "l", "h")},
  **{f"sam2.1-{s}": (sam2, s, "sam2") for s in ("tiny", "small", "base+", "large")},
}


def adapted(name: str, targets: str, device: str = "meta") -> tuple[nn.Module, LoRATrainer]:
  make, size, family = MODELS[name]
  with torch.device(device):
    model = make(size).eval()
    if family == "grounding_dino":  # as Detector does it
      model.model.get_input_embeddings = lambda: model.model.text_backbone.get_input_embeddings()
    tuned = LoRATrainer(model, lora_config(model, family, RANK, targets=targets))
  return model, tuned


def kept(model: nn.Module, **inputs: Any) -> int:
  """Bytes that a forward keeps for its gradients, without weights: of each storage once."""
  held: dict[int, Tensor] = {}
  weights = {p.untyped_storage()._cdata for p in model.parameters()}

  def pack(x: Tensor) -> Tensor:
    if x.untyped_storage()._cdata not in weights:
      held[x.untyped_storage()._cdata] = x
    return x

  with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
    out = model(**inputs)
  total = sum(x.untyped_storage().nbytes() for x in held.values())
  del out
  return total


def sam_picture() -> dict[str, Any]:
  boxes = torch.zeros(1, BOXES, 4, device="meta")
  return {"pixel_values": torch.zeros(1, 3, 1024, 1024, device="meta"), "input_boxes": boxes, "multimask_output": False}


def dino_picture(height: int = 480, width: int = 800) -> dict[str, Any]:
  ids = torch.tensor([[101, 2482, 1012, 4026, 2422, 1012, 102]])
  return {"pixel_values": torch.randn(1, 3, height, width), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--dino", action="store_true", help="run Grounding DINO's forward on the CPU: minutes, 6 GB")
  args = p.parse_args()
  print(
    "| model | parameters, M | targets | layers | adapter's parameters, k | file, MB | share | a picture keeps, GiB |"
  )
  print("|---|---|---|---|---|---|---|---|")
  for name, (_, _, family) in MODELS.items():
    for targets in TARGETS[family]:
      model, tuned = adapted(name, targets)
      learn, base = tuned.counts
      layers = sum(n.endswith("lora_A.default") for n, _ in model.named_modules())
      memory = f"{kept(model, **sam_picture()) / 2**30:.2f}" if family != "grounding_dino" else "-"
      row = [
        name,
        f"{base / 1e6:.1f}",
        targets,
        layers,
        f"{learn / 1e3:.0f}",
        f"{learn * 4 / 1e6:.2f}",
        f"{learn / base:.2%}",
      ]
      print("| " + " | ".join(map(str, [*row, memory])) + " |", flush=True)
  if args.dino:
    for targets in TARGETS["grounding_dino"]:
      model, _ = adapted("grounding-dino-tiny", targets, "cpu")
      begun = time.perf_counter()
      memory = kept(model, **dino_picture()) / 2**30
      print(
        f"grounding-dino-tiny, {targets}, 480x800: keeps {memory:.2f} GiB, forward {time.perf_counter() - begun:.0f} s"
      )


if __name__ == "__main__":
  main()

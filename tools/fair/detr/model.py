"""transformers' DETR and Deformable DETR on a frozen backbone, which may also be left out: its features come in place
of pictures then."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpilot.tools.fair.detr.backbone import Backbone
from openpilot.tools.lib.errors import UserError

HEADS = ("detr", "deformable")
LEVELS = 4  # maps of the deformable head at most: the backbone's, and three more by convolutions of stride 2


def make_model(
  head: str,
  backbone: Backbone,
  names: Sequence[str],
  encoder_layers: int = 6,
  decoder_layers: int = 6,
  queries: int = 300,
  width: int = 256,
  levels: int = LEVELS,
  **config: Any,
) -> Any:
  """Trained are input projection, encoder, decoder and heads. width: of their tokens. levels: maps of the deformable
  head. config: further values of transformers' configuration. Raises UserError."""
  import transformers

  told: dict[str, Any] = {
    "backbone_config": backbone.config,
    "encoder_layers": encoder_layers,
    "decoder_layers": decoder_layers,
    "num_queries": queries,
    "d_model": width,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "auxiliary_loss": True,
    "id2label": dict(enumerate(names)),
    "label2id": {n: k for k, n in enumerate(names)},
    **config,
  }
  try:
    if head == "deformable":
      more: dict[str, Any] = {"num_feature_levels": levels, "with_box_refine": True}
      model: Any = transformers.DeformableDetrForObjectDetection(transformers.DeformableDetrConfig(**told, **more))
    else:
      model = transformers.DetrForObjectDetection(transformers.DetrConfig(**told))
  except ValueError as e:
    raise UserError(f"--head {head}: {str(e).splitlines()[0]}") from None
  encoder = model.model.backbone
  source = getattr(backbone.net, "_backbone", backbone.net)  # of timm
  start(model)
  encoder.model.load_state_dict(source.state_dict())
  prepare(model)
  if head == "deformable" and not encoder_layers:
    model.model.level_embed.requires_grad_(False)  # only the encoder is told of it: it would never have a gradient
  return model


@torch.no_grad()
def start(model: Any) -> None:
  """Random weights as the authors have them (facebookresearch/detr; fundamentalvision/Deformable-DETR, their
  models/*detr*.py and *transformer.py). transformers draws all with a deviation of .02: queries are hardly told apart
  then, attention sees no places, and of every class each query says .5."""
  inner = model.model
  for part in (inner.encoder, inner.decoder):
    for name, p in part.named_parameters():
      if p.dim() > 1 and not any(k in name for k in ("sampling_offsets", "attention_weights", "_embed.")):
        nn.init.xavier_uniform_(p)
  nn.init.normal_(inner.query_position_embeddings.weight)
  if hasattr(model, "class_embed"):  # deformable
    for conv in (m for m in inner.input_proj.modules() if isinstance(m, nn.Conv2d)):
      nn.init.xavier_uniform_(conv.weight)
    for linear in model.class_embed:
      linear.reset_parameters()
      nn.init.constant_(linear.bias, -math.log(99))  # each class has a chance of .01
    for k, mlp in enumerate(model.bbox_embed):
      for linear in mlp.layers:
        linear.reset_parameters()
      nn.init.zeros_(mlp.layers[-1].weight)
      nn.init.zeros_(mlp.layers[-1].bias)
      nn.init.constant_(mlp.layers[-1].bias[2:], 0.0 if k else -2.0)  # later layers refine the first one's
  else:
    inner.input_projection.reset_parameters()
    model.class_labels_classifier.reset_parameters()
    for linear in model.bbox_predictor.layers:
      linear.reset_parameters()


@torch.no_grad()
def levels_for(backbone: Backbone, side: int) -> int:
  """Maps of the deformable head for pictures of at least `side` pixels: the coarsest must have more than one place,
  over which a picture's features are normalized."""
  one = backbone.multiple * 4
  places = side * backbone.net(torch.zeros(1, 3, one, one)).feature_maps[-1].shape[-1] // one
  levels = 1
  while levels < LEVELS and -(-places // 2) > 1:
    places, levels = -(-places // 2), levels + 1
  return levels


def prepare(model: Any) -> None:
  """Freezes the backbone, keeps it in eval mode, and lets it take its own features in place of pictures."""
  model.model.freeze_backbone()
  encoder = model.model.backbone
  net = encoder.model
  net.train = lambda mode=True: nn.Module.train(net, False)
  net.train()
  plain = type(encoder).forward

  def forward(pixel_values: Tensor, pixel_mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    if pixel_values.shape[1] == 3:
      return plain(encoder, pixel_values, pixel_mask)
    mask = F.interpolate(pixel_mask[None].float(), size=pixel_values.shape[-2:]).bool()[0]
    return [(pixel_values, mask)]

  encoder.forward = forward


def features(model: Any, pictures: Tensor) -> Tensor:
  """(B, 3, H, W), normalized -> the frozen backbone's map, (B, C, h, w)."""
  found: Any = model.model.backbone.model(pictures)
  maps = getattr(found, "feature_maps", found)
  return maps[-1]


def is_frozen(model: Any) -> bool:
  net = model.model.backbone.model
  return not net.training and not any(p.requires_grad for p in net.parameters())


def check_queries(queries: int, most: int, median: float) -> str | None:
  """What is to be said where pictures have more boxes than there are queries."""
  if most <= queries:
    return None
  return (
    f"pictures have up to {most} boxes (half of them {median:g} or more), and there are {queries} queries: boxes "
    f"beyond are never found; more with --queries {-(-most // 100) * 100}"
  )

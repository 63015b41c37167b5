"""DINOv2 (Oquab et al. 2023): dense features, and depth through a linear head, a DPT head or Depth Anything, all on its
ViT."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpilot.tools.fair.dinov2.pth import load_pth, read_state
from openpilot.tools.fair.hf import (
  DenseTeacher,
  Preprocess,
  compile_blocks,
  load_model,
  preprocess,
  read_config,
  read_preprocess,
  to_multiple,
)
from openpilot.tools.fair.teacher import Entry, Label, check_least, find_weights, hash_weights
from openpilot.tools.lib.errors import UserError

SIZES = {"vit_small": "small", "vit_base": "base", "vit_large": "large", "vit_giant": "giant"}
BACKBONES = ("dinov2", "dinov2_with_registers")
DEPTH_MODELS = {"depth_anything": "DepthAnythingForDepthEstimation", "dpt": "DPTForDepthEstimation"}
# the blocks that DINOv2's linear heads of four layers read, by the number of blocks
HEAD_LAYERS = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}
OUTPUTS = ("features", "depth")
IMAGENET = Preprocess(
  (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
)  # of the published .pth, which have no preprocessor file


class LinearDepthHead(nn.Module):
  """DINOv2's linear depth head: one linear layer on each patch and its image's CLS token chooses among depths, `bins`
  of them evenly from 1 mm to max_depth.

  Tokens of blocks before the final norm, as the published heads want them."""

  def __init__(self, channels: int, layers: int = 4, max_depth: float = 80.0, bins: int = 256):
    super().__init__()
    self.layers, self.max_depth = layers, max_depth
    self.conv_depth = nn.Conv2d(channels * 2 * layers, bins, 1)

  def forward(self, maps: list[Tensor], cls: list[Tensor], size: tuple[int, int]) -> Tensor:
    """maps: (B, C, h, w) of each layer; cls: (B, C) -> (B, 1, *size) meters."""
    x = torch.cat([t for m, c in zip(maps, cls, strict=True) for t in (m, c[:, :, None, None].expand_as(m))], dim=1)
    # the published head enlarges its input four times, then applies the layer; both are linear, so the other order is
    # the same for a sixteenth of the work
    logits = F.interpolate(self.conv_depth(x), scale_factor=4.0, mode="bilinear", align_corners=False)
    weight = F.relu(logits) + 0.1
    depths = torch.linspace(1e-3, self.max_depth, weight.shape[1], device=x.device, dtype=x.dtype)
    depth = torch.einsum("bkhw,k->bhw", weight / weight.sum(1, keepdim=True), depths)[:, None]
    return F.interpolate(depth, size, mode="bilinear", align_corners=False)

  @classmethod
  def load(cls, path: Path, channels: int, max_depth: float) -> "LinearDepthHead":
    """A published dinov2_*_linear_head.pth or *_linear4_head.pth, or the state of a head trained here (.pth or
    .safetensors). Raises UserError."""
    state = {k.removeprefix("decode_head."): v for k, v in read_state(path, "linear depth head").items()}
    if not {"conv_depth.weight", "conv_depth.bias"} <= set(state):
      raise UserError(
        f"{path} is no linear depth head: it holds {', '.join(list(state)[:3])}; give a dinov2_*_linear_head.pth"
      )
    weight, bias = state["conv_depth.weight"], state["conv_depth.bias"]
    layers, rest = divmod(weight.shape[1], 2 * channels)
    if rest or not layers or weight.shape[2:] != (1, 1):
      raise UserError(
        f"the head {path} reads {weight.shape[1]} channels, this DINOv2 gives {channels} twice for each layer; take "
        "the head of the same size"
      )
    head = cls(channels, layers, max_depth, len(weight))
    head.load_state_dict({"conv_depth.weight": weight, "conv_depth.bias": bias})
    return head


class DINOv2Wrapper(DenseTeacher):
  """A frozen DINOv2 of any size, with or without registers; or a depth checkpoint that stands on one: Depth Anything
  (relative, metric), DPT.

  Images are (B, 3, H, W) RGB, uint8 or float of 0 to 1, H and W divisible by the patch, 14; they are normalized here
  and never resized. As a teacher it resizes frames to the nearest multiple of the patch: 512x256 to 518x252."""

  def __init__(
    self,
    model_size: str = "vit_base",
    weights: str | Path | None = None,
    registers: bool = False,
    layers: tuple[int, ...] = (-1,),
    depth_head: str | Path | None = None,
    max_depth: float = 80.0,
    unit: str | None = None,
    outputs: tuple[str, ...] | None = None,
    scale: float = 1.0,
    device: str | torch.device | None = None,
    precision: str | None = None,
    name: str = "",
    license: str = "Apache-2.0",
    compile: bool = False,  # noqa: A002
  ):
    """model_size: vit_small, vit_base, vit_large or vit_giant, from where weights are kept; or weights, a folder, hub
      id or published .pth, instead.
    layers: blocks whose features are given, counted from 0, or from the end as -1; several are stacked along C.
    depth_head: file of a linear head for this size; max_depth: what it was trained to, 80 m on KITTI, 10 m on NYU.
    unit: 'm' or 'relative', for a DPT, whose config does not say.  outputs: labels as a teacher, 'features' and
        'depth'.
    scale: frames are enlarged so much before a teacher sees them. compile: with torch.compile, for a GPU. Raises
      UserError."""
    if model_size not in SIZES:
      raise UserError(f"no DINOv2 of size '{model_size}'; there are {', '.join(SIZES)}")
    hub_id = (
      f"facebook/dinov2-{'with-registers-' if registers else ''}{SIZES[model_size]}"
      if weights is None
      else str(weights)
    )
    is_path = weights is not None and (Path(weights).exists() or isinstance(weights, Path) or weights.count("/") != 1)
    path = find_weights(hub_id, weights if is_path else None)
    checkpoint_hash = hash_weights(path)
    super().__init__(name or hub_id, hub_id, checkpoint_hash, license, device, precision)
    if path.is_file():
      self.how, self.model = IMAGENET, load_pth(path, self.where)
    else:
      config = read_config(path, BACKBONES + tuple(DEPTH_MODELS), "DINOv2")
      vit = config if config["model_type"] in BACKBONES else (config.get("backbone_config") or {})
      if vit.get("model_type") not in BACKBONES:
        raise UserError(
          f"the {config['model_type']} in {path} stands on a '{vit.get('model_type')}', not on DINOv2; name another "
          "folder"
        )
      self.how, self.model = (
        read_preprocess(path, "DINOv2"),
        load_model(path, self.where, DEPTH_MODELS.get(config["model_type"], "AutoModel")),
      )
    kind = self.model.config.model_type
    check_least(self.name, 0.1, scale=scale, max_depth=max_depth)
    self.scale, self.max_depth = scale, max_depth
    self.vit = self.model.backbone if kind in DEPTH_MODELS else self.model
    self.patch, self.channels, self.blocks = (
      self.vit.config.patch_size,
      self.vit.config.hidden_size,
      self.vit.config.num_hidden_layers,
    )
    self.prefix = 1 + getattr(self.vit.config, "num_register_tokens", 0)  # CLS, registers, then the patches
    self.layers = self._count(layers)
    self.compiled = compile
    if compile:
      compile_blocks(self.name, self.vit.encoder.layer)
    self.depth_head: LinearDepthHead | None = None
    self.depth_unit: str | None = None  # 'm', or 'relative': inverse depth of unknown scale and shift, larger is nearer
    if kind in DEPTH_MODELS:
      if depth_head is not None:
        raise UserError(f"{path} has a depth head of its own; leave out {depth_head}")
      # bf16 would round 80 m to half a meter
      self.model.neck.float().register_forward_pre_hook(lambda _, args: ([t.float() for t in args[0]], *args[1:]))
      self.model.head.float()
      self.depth_unit = (
        {"metric": "m", "relative": "relative"}[self.model.config.depth_estimation_type]
        if kind == "depth_anything"
        else unit
      )
      if self.depth_unit not in ("m", "relative"):
        raise UserError(
          f"the config of the DPT in {path} does not say whether it gives meters; give unit='m' or unit='relative'"
        )
    elif depth_head is not None:
      self.depth_head = self._read_head(Path(depth_head))
      self.depth_unit = "m"
    self.outputs = outputs or (("depth",) if kind in DEPTH_MODELS else ("features",) if depth_head is None else OUTPUTS)
    unknown = [o for o in self.outputs if o not in OUTPUTS]
    if unknown or ("depth" in self.outputs and self.depth_unit is None):
      what = ", ".join(unknown) or "depth: it has no depth head"
      raise UserError(
        f"this DINOv2 cannot give {what}; outputs are {', '.join(OUTPUTS)}, depth with depth_head or a depth checkpoint"
      )

  def _read_head(self, path: Path) -> LinearDepthHead:
    if not path.is_file():
      raise UserError(f"no depth head at {path}; give the file of a linear head")
    self.checkpoint_hash += "+" + hash_weights(path)
    head = LinearDepthHead.load(path, self.channels, self.max_depth).to(self.where.device).eval().requires_grad_(False)
    if head.layers not in (1, 4) or (head.layers == 4 and self.blocks not in HEAD_LAYERS):
      raise UserError(
        f"the head {path} reads {head.layers} layers of {self.blocks}; heads of one layer, or of four of 12, 24 or 40 "
        "blocks, are known"
      )
    return head

  def _count(self, layers: tuple[int, ...]) -> tuple[int, ...]:
    """-> as counted from 0."""
    if not layers or not all(-self.blocks <= i < self.blocks for i in layers):
      raise UserError(
        f"layers {tuple(layers)} of a DINOv2 with {self.blocks} blocks; they are 0 to {self.blocks - 1}, or -1 for "
        "the last"
      )
    return tuple(i % self.blocks for i in layers)

  def _prepare(self, images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    if height % self.patch or width % self.patch:
      near = to_multiple(height, width, self.patch)
      raise UserError(
        f"images of {height}x{width}, height and width, are no multiple of the patch, {self.patch}; resize them, for "
        f"example to {near}"
      )
    return preprocess(images, self.how, (height, width), self.where)

  def _tokens(self, x: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
    """Normalized images -> (B, prefix + h w, C) after each of these blocks, before the final norm."""
    out = self.vit.encoder(self.vit.embeddings(x), output_hidden_states=True)
    return [out.hidden_states[i + 1] for i in layers]

  def _maps(self, tokens: list[Tensor], size: tuple[int, ...]) -> list[Tensor]:
    """Tokens -> (B, C, h, w), without CLS and registers."""
    h, w = size[-2] // self.patch, size[-1] // self.patch
    return [t[:, self.prefix :].transpose(1, 2).unflatten(2, (h, w)) for t in tokens]

  def _encode(self, x: Tensor, layers: tuple[int, ...], outputs: tuple[str, ...]) -> dict[str, Tensor]:
    """Normalized images -> features (B, C len(layers), h, w), depth (B, 1, H, W), of one pass through the network."""
    depth: Tensor | None = None
    if "depth" not in outputs:
      tokens = self._tokens(x, layers)
    elif self.depth_head is not None:
      reads = (self.blocks - 1,) if self.depth_head.layers == 1 else HEAD_LAYERS[self.blocks]
      every = self._tokens(x, reads + layers)
      tokens, read = every[len(reads) :], [t.float() for t in every[: len(reads)]]
      depth = self.depth_head(self._maps(read, x.shape), [t[:, 0] for t in read], tuple(x.shape[2:]))
    else:
      out = self.model(x, output_hidden_states=True)
      tokens = [out.hidden_states[i + 1] for i in layers]
      depth = out.predicted_depth[:, None]
      if depth.shape[2:] != x.shape[2:]:  # a DPT's comes in multiples of its own
        depth = F.interpolate(depth, x.shape[2:], mode="bilinear", align_corners=False)
    result = {} if depth is None else {"depth": depth}
    if "features" in outputs:
      result["features"] = torch.cat(self._maps([self.vit.layernorm(t) for t in tokens], x.shape), dim=1)
    return result

  @torch.no_grad()
  def extract_features(self, images: Tensor, layers: tuple[int, ...] | None = None) -> Tensor:
    """(B, 3, H, W) -> patch tokens after the final norm, (B, C len(layers), H/14, W/14) float32; layers: as in
    __init__."""
    return self._encode(self._prepare(images), self.layers if layers is None else self._count(layers), ("features",))[
      "features"
    ].float()

  @torch.no_grad()
  def extract_cls(self, images: Tensor) -> Tensor:
    """(B, 3, H, W) -> the CLS token after the final norm, (B, C) float32."""
    return self.vit.layernorm(self._tokens(self._prepare(images), (self.blocks - 1,))[0][:, 0]).float()

  @torch.no_grad()
  def estimate_depth(self, images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W) float32 in `depth_unit`: 'm' along the optical axis, for the camera that the head
    was trained with; 'relative': inverse depth, larger is nearer. Raises UserError where there is no depth head: a
    random one would say nothing."""
    if self.depth_unit is None:
      raise UserError(
        "this DINOv2 has no depth head; give depth_head, the file of a linear head, or weights of a DPT or Depth "
        "Anything"
      )
    return self._encode(self._prepare(images), self.layers, ("depth",))["depth"].float()

  # as a teacher

  @property
  def as_fine(self) -> float:
    """Of a whole picture, beside the view."""
    return self.scale

  @property
  def short_side(self) -> int | None:
    """Of a whole picture, pixels: of a depth checkpoint what it has learned from, where its preprocessor says it."""
    edges = self.how.size
    if edges is None or self.model.config.model_type not in DEPTH_MODELS:
      return None
    return round(self.scale * (edges if isinstance(edges, int) else min(edges)))

  def input_size(self, height: int, width: int) -> tuple[int, int]:
    if self.whole:  # it has its size already
      return to_multiple(height, width, self.patch)
    return to_multiple(round(height * self.scale), round(width * self.scale), self.patch)

  def describe(self, height: int, width: int) -> list[Label]:
    h, w = (n // self.patch for n in self.input_size(height, width))
    every = {
      "features": Label("features", "dense", "float16", (self.channels * len(self.layers), h, w)),
      "depth": Label("depth", "dense", "float16", (1, height, width), self.depth_unit or ""),
    }
    return [every[o] for o in self.outputs]

  def settings(self) -> dict[str, Any]:
    size = None if self.view is None or self.whole else self.input_size(*self.view)  # a whole picture's is each its own
    kind = self.model.config.model_type
    depth = {"unit": self.depth_unit, "relative": "inverse, larger is nearer", "head": kind}
    if self.depth_head is not None:
      depth |= {"head": "linear", "max_depth": self.max_depth}
    return {
      "model": kind,
      "outputs": list(self.outputs),
      "layers": list(self.layers),
      "patch": self.patch,
      "tokens_dropped": self.prefix,
      "resize": "stretched to the nearest multiple of the patch, antialiased; depth back to the frame's size, bilinear",
      "input": size and list(size),
      "scale": self.scale,
      "preprocess": self.how.settings(),
      "precision": self.where.precision,
      "depth": depth if "depth" in self.outputs else None,
      **({"compiled": True} if self.compiled else {}),
    }

  def encode(self, frames: Tensor) -> dict[str, Tensor]:
    size = tuple(frames.shape[2:])
    out = self._encode(preprocess(frames, self.how, self.input_size(*size), self.where), self.layers, self.outputs)
    if "depth" in out:
      out["depth"] = F.interpolate(out["depth"], size, mode="bilinear", align_corners=False)
    return out


def make(name: str, entry: Entry, path: Path | None, **options: Any) -> DINOv2Wrapper:
  """The registry's way to a teacher."""
  teacher = DINOv2Wrapper(weights=path, name=name, license=entry.license, **options)
  teacher.model_id = entry.weights
  return teacher

"""A DETR without its slowness: learned queries with reference boxes that every decoder layer refines, looking around
where the box is. No NMS."""

from typing import cast

import torch
from torch import Tensor, nn

from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.fair.students.layers import Attention, feed_forward, merge_heads, split_heads
from openpilot.tools.fair.students.layers import up

QUERIES = 60
SMALLEST = 0.1  # of the view: the least extent that a query looks over


def grid(h: int, w: int) -> Tensor:
  """(h * w, 2) float32: x, y of the cells' centers in 0..1 of the view, row-major."""
  y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
  return torch.stack([x, y], dim=-1).reshape(-1, 2)


def sine(places: Tensor, d: int) -> Tensor:
  """(L, 2) in 0..1 -> (L, d): sines and cosines of x, then of y, at d / 4 frequencies each."""
  angles = places[..., None] * 2 * torch.pi * 2.0 ** torch.linspace(-1, 5, d // 4)
  return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class SharedAttention(nn.Module):
  """Attention to tokens whose keys and values all layers share, and whose keys hold [x^2, y^2, x, y] of their place
  beside what they are."""

  def __init__(self, d: int, heads: int):
    super().__init__()
    self.heads, self.scale = heads, (d // heads) ** -0.5
    self.q, self.out = nn.Linear(d, d), nn.Linear(d, d)

  def forward(self, query: Tensor, key: Tensor, value: Tensor, looks: Tensor) -> Tensor:
    """query (..., Q, d), key (..., heads, d / heads + 4, L), value (..., heads, L, d / heads), looks (..., heads, Q, 4)
    -> (..., Q, d)."""
    q = torch.cat([split_heads(self.q(query) * self.scale, self.heads), looks], dim=-1)
    return self.out(merge_heads(torch.softmax(q @ key, dim=-1) @ value))


class EncoderLayer(nn.Module):
  def __init__(self, d: int, hidden: int):
    super().__init__()
    self.attention, self.ffn, self.norm1, self.norm2 = (
      Attention(d),
      feed_forward(d, hidden),
      nn.LayerNorm(d),
      nn.LayerNorm(d),
    )

  def forward(self, x: Tensor, pos: Tensor) -> Tensor:
    place = x + pos
    x = self.norm1(x + self.attention(place, place, x))
    return self.norm2(x + self.ffn(x))


class DecoderLayer(nn.Module):
  """Queries look at each other, then at the tokens, by what they hold and, as in SMCA, by a learned Gaussian around
  their box."""

  def __init__(self, d: int, hidden: int, heads: int):
    super().__init__()
    self.heads = heads
    self.self_attention, self.cross = Attention(d, heads), SharedAttention(d, heads)
    self.ffn, self.norm1, self.norm2, self.norm3 = (
      feed_forward(d, hidden),
      nn.LayerNorm(d),
      nn.LayerNorm(d),
      nn.LayerNorm(d),
    )
    self.where = nn.Linear(d, 4 * heads)  # per head the Gaussian's offset and sharpness, both relative to the box
    self.place = nn.Linear(4, d)
    nn.init.zeros_(self.where.weight)
    nn.init.zeros_(self.where.bias)

  def forward(self, x: Tensor, query: Tensor, box: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """x, query (..., Q, d); box (..., Q, 4) cx cy w h in 0..1; key (..., heads, d / heads + 4, L), value (..., heads,
    L, d / heads), of the cells of view stride 16
    -> (..., Q, d)."""
    pos = query + self.place(box)
    place = x + pos
    x = self.norm1(x + self.self_attention(place, place, x))
    where = split_heads(self.where(x), self.heads)  # (..., heads, Q, 4)
    box = box.unsqueeze(-3)
    extent = box[..., 2:] + SMALLEST
    center = box[..., :2] - 0.5 + where[..., :2] * extent
    sharp = ((1.0 + where[..., 2:]) / extent) ** 2
    # -sharp x (place - center)^2 but for what is the same at all places, which a softmax ignores: as a product, it
    # costs the attention next to nothing
    looks = torch.cat([-sharp, 2.0 * sharp * center], dim=-1)
    x = self.norm2(x + self.cross(x + pos, key, value, looks))
    return self.norm3(x + self.ffn(x))


class DetectorHead(nn.Module):
  """detector_logits (B, Q, K), for a sigmoid; detector_boxes (B, Q, 4) cx cy w h in 0..1 of the view. In training also
  detector_aux, one (logits, boxes) for each earlier decoder layer.

  Tokens are the neck's cells of view stride 16 (512 of a picture of 512x256), to which those of stride 8 are added, for
  what is small, and those of stride 32 after they have looked at each other (one encoder layer)."""

  fixed = ("project16.0", "project32.0")  # to tokens

  def __init__(
    self,
    neck: int,
    classes: int,
    d: int = 128,
    hidden: int = 256,
    layers: int = 2,
    heads: int = 4,
    picture: InputSpec | None = None,
  ):
    super().__init__()
    self.heads = heads
    picture = picture or InputSpec()
    fine, coarse = ((picture.height // s, picture.width // s) for s in (16, 32))  # rows and columns of cells
    self.project16, self.project32 = (
      nn.Sequential(nn.Conv2d(neck, d, 1, bias=False), nn.BatchNorm2d(d)) for _ in range(2)
    )
    self.detail = nn.Sequential(nn.Conv2d(neck, neck, 3, 2, 1, groups=neck, bias=False), nn.BatchNorm2d(neck))
    self.encoder = EncoderLayer(d, hidden)
    self.key, self.value = nn.Linear(d, d), nn.Linear(d, d)  # of the tokens, for all layers: they look at the same ones
    self.decoder = nn.ModuleList(DecoderLayer(d, hidden, heads) for _ in range(layers))
    self.content, self.query = (
      nn.Parameter(torch.randn(1, QUERIES, d) * 0.02),
      nn.Parameter(torch.randn(1, QUERIES, d) * 0.02),
    )
    self.logits = nn.ModuleList(nn.Linear(d, classes) for _ in range(layers))
    self.boxes = nn.ModuleList(
      nn.Sequential(nn.Linear(d, d), nn.ReLU(inplace=True), nn.Linear(d, 4)) for _ in range(layers)
    )
    places = grid(6, 10)
    assert len(places) == QUERIES
    self.reference = nn.Parameter(
      torch.cat([torch.logit(places), torch.full((QUERIES, 2), -2.0)], dim=1)[None]
    )  # (1, Q, 4) logits of boxes
    for linear, box in zip(self.logits, self.boxes, strict=True):
      last = cast(nn.Sequential, box)[2]
      nn.init.constant_(cast(nn.Linear, linear).bias, -4.0)
      nn.init.zeros_(cast(nn.Linear, last).weight)
      nn.init.zeros_(cast(nn.Linear, last).bias)
    self.pos: Tensor
    self.coarse_pos: Tensor
    cells = grid(*fine)
    self.places: Tensor
    self.register_buffer("places", torch.cat([(cells - 0.5) ** 2, cells - 0.5], dim=1), persistent=False)
    self.register_buffer("pos", sine(cells, d), persistent=False)
    self.register_buffer("coarse_pos", sine(grid(*coarse), d), persistent=False)

  def apart(self, maps: dict[int, Tensor]) -> list[Tensor]:
    """-> (B, d, H / 32, W / 32), (B, d, H / 16, W / 16): what becomes tokens."""
    return [self.project32(maps[32]), self.project16(maps[16] + self.detail(maps[8]))]

  def forward(self, maps: dict[int, Tensor]) -> dict[str, Tensor | list[tuple[Tensor, Tensor]]]:
    coarse, fine = self.apart(maps)
    single = len(coarse) == 1  # then without the batch: see layers.py
    tokens = coarse.flatten(2).transpose(1, 2)
    tokens = self.encoder(tokens[0] if single else tokens, self.coarse_pos)
    fine = fine + up(tokens.transpose(-2, -1).reshape(coarse.shape))
    tokens = fine.flatten(2).transpose(1, 2)
    tokens = tokens[0] if single else tokens  # (..., L, d)
    batch = tokens.shape[:-2]
    key = torch.cat(
      [split_heads(self.key(tokens + self.pos), self.heads), self.places.expand(*batch, self.heads, -1, -1)], dim=-1
    )
    key, value = key.transpose(-2, -1), split_heads(self.value(tokens), self.heads)  # once, for all layers
    x, query, reference = (p[0].expand(*batch, -1, -1) for p in (self.content, self.query, self.reference))
    out: list[tuple[Tensor, Tensor]] = []
    for layer, logits, boxes in zip(self.decoder, self.logits, self.boxes, strict=True):
      x = layer(x, query, reference.sigmoid(), key, value)
      refined = reference + boxes(x)
      out.append((logits(x), refined.sigmoid()))
      reference = refined.detach()  # a layer answers for its own step
    if single:
      out = [(l[None], b[None]) for l, b in out]
    result: dict[str, Tensor | list[tuple[Tensor, Tensor]]] = {
      "detector_logits": out[-1][0],
      "detector_boxes": out[-1][1],
    }
    if self.training:
      result["detector_aux"] = out[:-1]
    return result

"""A causal point tracker by local correlation, coarse to fine: LocoTrack's idea at a hundredth of its size. One frame and a state in, points out.

The state holds each point's appearance as the earlier frames showed it, so no frame is ever encoded twice.
"""

import torch
from torch import Tensor, nn

from openpilot.tools.fair.students.layers import Attention, conv, separable, up

POINTS = 128
PATCH = 3  # a template is a patch of 3 x 3 cells around the point
RADIUS = 4  # cells: a window of 9 x 9 places is looked at in each map
STRIDES = (8, 4)  # the maps, coarse first: the tracker reaches 32 view pixels a frame from where the host thinks the point is
WINDOW = 2 * RADIUS + 1


def view_to_cell(points: Tensor, stride: int) -> Tensor:
  """View pixels -> cells of a map of that stride: cell j is centred on view pixel stride * j + (stride - 1) / 2."""
  return (points - (stride - 1) / 2) / stride


def gather(m: Tensor, corner: Tensor, size: int) -> Tensor:
  """m (B, C, h, w), corner (B, N, 2) int64 x, y of a cell -> (B, N, size * size, C): the cells of the square that starts there, zero outside the map.

  An integer gather of whole feature vectors: GridSample is not in tinygrad.
  """
  b, c, h, w = (int(s) for s in m.shape)
  step = torch.arange(size, device=m.device)
  x = corner[..., 0, None, None] + step  # (B, N, 1, size)
  y = corner[..., 1, None, None] + step[:, None]  # (B, N, size, 1)
  inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
  index = y.clamp(0, h - 1) * w + x.clamp(0, w - 1) + torch.arange(b, device=m.device).view(b, 1, 1, 1) * (h * w)
  rows = m.permute(0, 2, 3, 1).reshape(b * h * w, c).index_select(0, index.reshape(-1))
  return rows.reshape(b, -1, size * size, c) * inside.reshape(b, -1, size * size, 1).to(m.dtype)


def blend(values: Tensor, fraction: Tensor) -> Tensor:
  """Bilinear: values (B, N, size, size, C) at whole cells, fraction (B, N, 2) of x, y in 0..1 -> (B, N, size - 1, size - 1, C)."""
  fx, fy = fraction[..., 0, None, None, None], fraction[..., 1, None, None, None]
  values = values[..., :-1, :] * (1 - fx) + values[..., 1:, :] * fx
  return values[..., :-1, :, :] * (1 - fy) + values[..., 1:, :, :] * fy


def sample(m: Tensor, cells: Tensor, size: int) -> Tensor:
  """m (B, C, h, w), cells (B, N, 2) float -> (B, N, size, size, C): bilinear samples at the size x size (odd) places a cell apart around each point."""
  low = torch.floor(cells)
  values = gather(m, low.long() - size // 2, size + 1)
  return blend(values.reshape(*values.shape[:2], size + 1, size + 1, -1), cells - low)


def correlate(m: Tensor, template: Tensor, cells: Tensor) -> Tensor:
  """m (B, C, h, w), template (B, N, PATCH * PATCH * C), cells (B, N, 2) -> (B, N, 9, WINDOW, WINDOW): each template cell's product with the map.

  Entry [k, j, i] belongs to the point being at cells + (i - RADIUS, j - RADIUS), template cell k laid on the map accordingly.
  """
  b, n = int(m.shape[0]), int(cells.shape[1])
  size = WINDOW + PATCH - 1
  low = torch.floor(cells)
  rows = gather(m, low.long() - size // 2, size + 1)  # (B, N, 12 * 12, C)
  products = rows @ template.reshape(b, n, PATCH * PATCH, -1).transpose(2, 3)  # (B, N, 144, 9)
  # interpolating the products is interpolating the features, at a fraction of the work
  products = blend(products.reshape(b, n, size + 1, size + 1, PATCH * PATCH), cells - low)
  aligned = [products[:, :, k // PATCH : k // PATCH + WINDOW, k % PATCH : k % PATCH + WINDOW, k] for k in range(PATCH * PATCH)]
  return torch.stack(aligned, dim=2)


class Stage(nn.Module):
  """One map's step: correlation, what the point remembers and what the other points see give a movement in cells."""

  def __init__(self, d: int, hidden: int, together: bool):
    super().__init__()
    self.look, self.remember, self.place = nn.Linear(PATCH * PATCH * WINDOW * WINDOW, d), nn.Linear(hidden, d, bias=False), nn.Linear(2, d, bias=False)
    self.attention = Attention(d) if together else None
    self.norm = nn.LayerNorm(d) if together else None
    self.gate, self.candidate = nn.Linear(2 * d, d), nn.Linear(2 * d, d)
    self.move = nn.Linear(d, 3)  # trust in the correlation's peak, and a movement beside it
    self.sharpness = nn.Parameter(torch.tensor(20.0))
    nn.init.zeros_(self.move.weight)
    self.move.bias.data.copy_(torch.tensor([3.0, 0.0, 0.0]))  # a fresh network follows the peak
    steps = torch.arange(WINDOW, dtype=torch.float32) - RADIUS
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    self.window: Tensor
    self.register_buffer("window", torch.stack([x, y], dim=-1).reshape(-1, 2), persistent=False)

  def forward(self, correlation: Tensor, place: Tensor, hidden: Tensor, memory: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """correlation (B, N, 9, WINDOW, WINDOW), place (B, N, 2) in -1..1, hidden (B, N, H), memory (B, N, d), bias (B, 1, 1, N) -> movement in cells, memory."""
    score = correlation.mean(dim=2).flatten(2) * self.sharpness
    peak = torch.softmax(score, dim=-1) @ self.window
    x = torch.relu(self.look(correlation.flatten(2)) + self.remember(hidden) + self.place(place))
    if self.attention is not None and self.norm is not None:
      x = self.norm(x + self.attention(x, x, x, bias))
    both = torch.cat([x, memory], dim=-1)
    memory = memory + torch.sigmoid(self.gate(both)) * (torch.tanh(self.candidate(both)) - memory)
    move = self.move(memory)
    return torch.sigmoid(move[..., :1]) * peak + move[..., 1:], memory


class LanesHead(nn.Module):
  """Point tracker on a stride-4 branch of its own.

  encode: (frame, neck maps) -> the two maps, unit vectors: [(B, C, 32, 64), (B, C, 64, 128)].
  step: one frame of tracking. C is `channels`; a template has 2 * 9 * C entries, the hidden state d of memory and the last movement.
  """

  def __init__(self, neck: int, channels: int, d: int, branch: int):
    super().__init__()
    self.stem, self.context, self.mix = conv(6, branch, 3, 2), nn.Conv2d(neck, branch, 1), separable(branch, branch)
    self.fine, self.coarse, self.pooled = nn.Conv2d(branch, channels, 1), nn.Conv2d(neck, channels, 1), nn.AvgPool2d(2)
    self.d, self.channels = d, channels
    self.template_size, self.hidden_size = len(STRIDES) * PATCH * PATCH * channels, d + 2
    self.stages = nn.ModuleList(Stage(d, self.hidden_size, together=i == 0) for i in range(len(STRIDES)))  # coarse: where do the points go together
    self.visible, self.renew = nn.Linear(d, 1), nn.Linear(d, 1)
    nn.init.zeros_(self.renew.weight)
    nn.init.constant_(self.renew.bias, -3.0)  # a template follows slowly at first: it must not drift

  def encode(self, normalised: Tensor, maps: dict[int, Tensor]) -> list[Tensor]:
    fine = self.fine(self.mix(self.stem(normalised) + up(self.context(maps[8]))))
    coarse = self.coarse(maps[8]) + self.pooled(fine)
    return [x * torch.rsqrt((x * x).sum(dim=1, keepdim=True) + 1e-6) for x in (coarse, fine)]

  def template(self, maps: list[Tensor], points: Tensor) -> Tensor:
    """What the frame shows at points (B, N, 2) view pixels -> (B, N, template_size)."""
    return torch.cat([sample(m, view_to_cell(points, s), PATCH).flatten(2) for m, s in zip(maps, STRIDES, strict=True)], dim=-1)

  def step(
    self, maps: list[Tensor], points: Tensor, mask: Tensor, fresh: Tensor, template: Tensor, hidden: Tensor
  ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """points (B, N, 2) view pixels, where each is thought to be; mask, fresh (B, N) 1 or 0; template, hidden: the state, zeros at start.

    -> points (B, N, 2), visible (B, N) logits, template, hidden. A fresh point gets its template here and stays; the state of unused slots is zero. Where the
    correlation looks is taken as given, as RAFT does: gradients flow through the movements, the templates and the memory.
    """
    new, kept = (fresh * mask)[..., None], (mask - fresh * mask)[..., None]
    template = new * self.template(maps, points.detach()) + kept * template
    hidden = kept * hidden
    memory, position = hidden[..., : self.d], points
    bias = (mask[:, None, None, :] - 1.0) * 1e4
    for stage, m, stride, part in zip(self.stages, maps, STRIDES, template.chunk(len(STRIDES), dim=-1), strict=True):
      at = position.detach()
      correlation = correlate(m, part, view_to_cell(at, stride))
      place = at / at.new_tensor([256.0, 128.0]) - 1.0
      move, memory = stage(correlation, place, hidden, memory, bias)
      position = position + move * stride
    position = kept * position + (1.0 - kept) * points
    visible = self.visible(memory)[..., 0]
    rate = kept * torch.sigmoid(self.renew(memory)) * torch.sigmoid(visible)[..., None]
    template = template + rate * (self.template(maps, position.detach()) - template)
    hidden = torch.cat([memory, (position - points) / 16.0], dim=-1) * mask[..., None]
    return position, visible * mask + (mask - 1.0) * 20.0, template * mask[..., None], hidden

  def zeros(self, b: int, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The state at start."""
    return like.new_zeros(b, n, self.template_size), like.new_zeros(b, n, self.hidden_size)

  def track(self, maps: list[Tensor], points: Tensor, mask: Tensor, fresh: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tracks over clips, frame by frame, for training. maps: of all frames, B = clips x T, clip-major; points (clips, T, N, 2) view pixels, read only where a
    point is fresh; mask (clips, T, N) 1 = slot in use; fresh (clips, T, N), by default all of frame 0.

    -> points (clips, T, N, 2), visible logits (clips, T, N). Each frame starts from the tracker's own last position, without a gradient into it: every frame
    answers for its own step, and learns to find back from its own errors.
    """
    clips, t, n, _ = points.shape
    if fresh is None:
      fresh = torch.zeros_like(mask)
      fresh[:, 0] = 1.0
    by_frame = [m.reshape(clips, t, *m.shape[1:]) for m in maps]
    template, hidden = self.zeros(clips, n, maps[0])
    at = points[:, 0]
    tracked, visible = [], []
    for i in range(t):
      at = torch.where(fresh[:, i, :, None] > 0, points[:, i], at.detach())
      at, seen, template, hidden = self.step([m[:, i] for m in by_frame], at, mask[:, i], fresh[:, i], template, hidden)
      tracked.append(at)
      visible.append(seen)
    return torch.stack(tracked, dim=1), torch.stack(visible, dim=1)

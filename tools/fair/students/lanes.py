"""A causal point tracker by local correlation, coarse to fine: LocoTrack's idea at a hundredth of its size. One frame and a state in, points out.

The state holds each point's appearance as the earlier frames showed it, so no frame is ever encoded twice.
"""

import torch
from torch import Tensor, nn

from openpilot.tools.fair.students.layers import Attention, separable
from openpilot.tools.fair.students.scene import conv, up

POINTS = 128
STRIDES = (8, 4)  # the maps, coarse first: the tracker reaches 32 view pixels a frame from where the host thinks the point is
RADIUS = 4  # cells: a window of 9 x 9 places is looked at in each map
WINDOW = 2 * RADIUS + 1
BORDER = WINDOW + 1  # cells of zeros around a map: the side of the largest square that is ever gathered


def view_to_cell(points: Tensor, stride: int) -> Tensor:
  """View pixels -> cells of a map of that stride: cell j is centred on view pixel stride * j + (stride - 1) / 2."""
  return points * (1.0 / stride) - (stride - 1) / (2.0 * stride)


def unit(padded: Tensor) -> Tensor:
  """(B, C, h + 2 * BORDER, w + 2 * BORDER), zeros around the map -> the same as unit vectors in rows, (B, h + 2 * BORDER, w + 2 * BORDER, C).

  With the border no sample needs a mask. It comes out of the convolution and not out of a Pad, which tinygrad would fuse into each gather and so make it
  search all rows.
  """
  # the sum as a convolution: the map then stays in one memory layout until the end, where ONNX Runtime would turn it twice for a ReduceSum
  length2 = nn.functional.conv2d(padded * padded, padded.new_ones(1, padded.shape[1], 1, 1))
  return (padded * torch.rsqrt(length2 + 1e-6)).permute(0, 2, 3, 1)


def gather(padded: Tensor, corner: Tensor, size: int) -> Tensor:
  """padded: as unit() gives it; corner (B, N, 2) whole cells x, y of the map -> (B, N, size * size, C): the square that starts there, zero outside the map.

  An integer gather of whole feature vectors: GridSample is not in tinygrad.
  """
  b, h, w, c = (int(s) for s in padded.shape)
  corner = torch.minimum((corner + BORDER).clamp(min=0), corner.new_tensor([w - BORDER, h - BORDER]))
  first = (corner @ corner.new_tensor([[1.0], [w]])).long()  # (B, N, 1); float32 counts that far exactly
  step = torch.arange(size, device=padded.device)
  square = (step[:, None] * w + step).flatten() + torch.arange(b, device=padded.device).view(b, 1, 1) * (h * w)  # (B, 1, size * size)
  return padded.reshape(b * h * w, c).index_select(0, (first + square).reshape(-1)).reshape(b, -1, size * size, c)


def sample(padded: Tensor, cells: Tensor) -> Tensor:
  """cells (B, N, 2) float -> (B, N, C): bilinear samples, zero outside the map."""
  low = torch.floor(cells)
  f = (cells - low)[..., None]  # (B, N, 2, 1)
  f = torch.cat([1 - f, f], dim=-1)
  weights = f[:, :, 1, :, None] * f[:, :, 0, None, :]  # (B, N, 2, 2) rows y, columns x
  return (weights.flatten(2)[:, :, None] @ gather(padded, low, 2))[:, :, 0]


def correlate(padded: Tensor, template: Tensor, cells: Tensor) -> Tensor:
  """padded map, template (B, N, C), cells (B, N, 2) -> (B, N, WINDOW, WINDOW): the template's product with the map, entry [.., j, i] for the point being at
  cells + (i - RADIUS, j - RADIUS).
  """
  low = torch.floor(cells)
  fx, fy = (cells - low)[..., None, None].unbind(dim=2)  # (B, N, 1, 1)
  rows = gather(padded, low - RADIUS, WINDOW + 1)
  x = (template[:, :, None] @ rows.transpose(2, 3)).reshape(*cells.shape[:2], WINDOW + 1, WINDOW + 1)
  # interpolating the products is interpolating the features, at a fraction of the work
  x = x[..., :-1] + (x[..., 1:] - x[..., :-1]) * fx
  return x[..., :-1, :] + (x[..., 1:, :] - x[..., :-1, :]) * fy


class Stage(nn.Module):
  """One map's step: correlation, what the point remembers and what the other points see give a movement in cells."""

  def __init__(self, d: int, hidden: int, together: bool):
    super().__init__()
    self.look, self.remember = nn.Linear(WINDOW * WINDOW, d), nn.Linear(hidden + 2, d)
    self.attention = Attention(d, heads=2) if together else None
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

  def forward(self, padded: Tensor, template: Tensor, cells: Tensor, known: Tensor, memory: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """padded map, template (B, N, C), cells (B, N, 2): where to look; known (B, N, H + 2): hidden state and place in the view; memory (B, N, d); bias
    (B, 1, 1, N) of the attention between points -> movement (B, N, 2) in cells, memory.
    """
    correlation = correlate(padded, template, cells).flatten(2)
    peak = torch.softmax(correlation * self.sharpness, dim=-1) @ self.window
    x = torch.relu(self.look(correlation) + self.remember(known))
    if self.attention is not None and self.norm is not None:
      x = self.norm(x + self.attention(x, x, x, bias))
    both = torch.cat([x, memory], dim=-1)
    memory = memory + torch.sigmoid(self.gate(both)) * (torch.tanh(self.candidate(both)) - memory)
    move = self.move(memory)
    return torch.sigmoid(move[..., :1]) * peak + move[..., 1:], memory


class LanesHead(nn.Module):
  """Point tracker on a stride-4 branch of its own.

  encode: (normalised frame, neck maps) -> the two maps of unit vectors, of view stride 8 and 4, as unit() gives them.
  step: one frame of tracking. A template holds a vector of each map, the hidden state d of memory and the last movement.
  """

  def __init__(self, neck: int, channels: int, d: int, branch: int):
    super().__init__()
    self.stem, self.context, self.mix = conv(6, branch, 3, 2), nn.Conv2d(neck, branch, 1), separable(branch, branch)
    self.fine, self.coarse = (nn.Conv2d(c, channels, 1, padding=BORDER, bias=False) for c in (branch, neck))
    self.d, self.template_size, self.hidden_size = d, len(STRIDES) * channels, d + 2
    self.stages = nn.ModuleList(Stage(d, self.hidden_size, together=i == 0) for i in range(len(STRIDES)))  # coarse: where do the points go together
    self.report = nn.Linear(d, 2)  # visible; how far the template follows what the point looks like now
    nn.init.zeros_(self.report.weight)
    self.report.bias.data.copy_(torch.tensor([0.0, -3.0]))  # slowly at first: it must not drift

  def encode(self, normalised: Tensor, maps: dict[int, Tensor]) -> list[Tensor]:
    fine = self.fine(self.mix(self.stem(normalised) + up(self.context(maps[8]))))
    return [unit(x) for x in (self.coarse(maps[8]), fine)]

  def template(self, maps: list[Tensor], points: Tensor) -> Tensor:
    """What the frame shows at points (B, N, 2) view pixels -> (B, N, template_size)."""
    return torch.cat([sample(m, view_to_cell(points, s)) for m, s in zip(maps, STRIDES, strict=True)], dim=-1)

  def step(
    self, maps: list[Tensor], points: Tensor, mask: Tensor, fresh: Tensor, template: Tensor, hidden: Tensor
  ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """points (B, N, 2) view pixels, where each is thought to be; mask, fresh (B, N) 1 or 0; template, hidden: the state, zeros at start.

    -> points (B, N, 2), visible (B, N) logits, template, hidden. A fresh point gets its template here and stays; an unused slot stays too, its state is zero
    and it is never visible. Where the correlation looks is taken as given, as RAFT does: gradients flow through movements, templates and memory.
    """
    used = mask[..., None]
    new = fresh[..., None] * used
    kept = used - new
    template, hidden = kept * template, kept * hidden
    memory, position = hidden[..., : self.d], points
    bias = (mask[:, None, None, :] - 1.0) * 1e4
    for stage, m, stride, part in zip(self.stages, maps, STRIDES, template.chunk(len(STRIDES), dim=-1), strict=True):
      at = position.detach()
      known = torch.cat([hidden, at * (1.0 / 256.0) - 1.0], dim=-1)
      move, memory = stage(m, part, view_to_cell(at, stride), known, memory, bias)
      position = position + move * stride
    moved = kept * (position - points)
    position = points + moved
    visible, renew = self.report(memory).split(1, dim=-1)
    rate = new + kept * torch.sigmoid(renew) * torch.sigmoid(visible)  # a new point takes all of its template from here
    template = template + rate * (self.template(maps, position.detach()) - template)
    hidden = torch.cat([memory * used, moved * (1.0 / 16.0)], dim=-1)
    return position, (visible * used + (used - 1.0) * 20.0)[..., 0], template, hidden

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

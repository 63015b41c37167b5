"""A causal point tracker by local correlation, coarse to fine: LocoTrack's idea at a hundredth of its size. One frame and a state in, points out.

The state holds each point's appearance as the earlier frames showed it, so no frame is ever encoded twice.
"""

import functools

import numpy as np
import torch
from torch import Tensor, nn

from openpilot.tools.fair.students.layers import Attention, separable
from openpilot.tools.fair.students.scene import conv, up

POINTS = 128
STRIDES = (8, 4)  # the maps, coarse first: the tracker reaches 32 view pixels a frame from where the host thinks the point is
RADIUS = 4  # cells: a window of 9 x 9 places is looked at in each map
WINDOW = 2 * RADIUS + 1


def view_to_cell(points: Tensor, stride: int) -> Tensor:
  """View pixels -> cells of a map of that stride: cell j is centred on view pixel stride * j + (stride - 1) / 2."""
  return points * (1.0 / stride) - (stride - 1) / (2.0 * stride)


def unit(cells: Tensor, weight: Tensor | None = None) -> Tensor:
  """cells (B, h, w, C) -> the same, each divided by its length; with weight (T, C), by the length of weight @ cell."""
  x = cells.flatten(0, 2)
  x2 = x * x if weight is None else x * (x @ (weight.T @ weight))
  c = x.shape[1]
  # the sum as a product with ones, which comes out as wide as the cells: ONNX Runtime's ReduceSum, and what it does to broadcast, take several times as long
  return (x / torch.sqrt(nn.functional.linear(x2, x.new_ones(c, c), x.new_full((c,), 1e-6)))).reshape(cells.shape)


@functools.cache
def square(size: int) -> dict[str, Tensor]:
  """What two numbers or two rows of numbers per point are multiplied with to fill a square of cells, (.., size * size) row-major, as products do it without
  broadcasting, which ONNX Runtime does cell by cell. corner: x, y -> the columns' x, then the rows' y, less `steps`. column, row: repeat `size` of those in
  the square. weights: fractions of x, y -> bilinear weights of a square of 2 in x and in y, with `weights0`."""
  one, count, eye = np.ones(size), np.arange(size), np.eye(size)
  zero = 0 * one
  out = {"corner": [[*one, *zero], [*zero, *one]], "steps": [*count, *count], "column": np.kron(one, eye), "row": np.kron(eye, one),
         "weights": [[-1, 1, -1, 1, 0, 0, 0, 0], [0, 0, 0, 0, -1, -1, 1, 1]], "weights0": [1, 0, 1, 0, 1, 1, 0, 0]}
  return {k: torch.from_numpy(np.array(v, np.float32)) for k, v in out.items()}


def gather(m: Tensor, corner: Tensor, size: int) -> tuple[Tensor, Tensor]:
  """m (B, h, w, C), h and w up to 256; corner (B * N, 2) whole cells x, y -> the square that starts there: (B * N, size * size, C), and (B * N, size * size)
  1 or 0: it is on the map; where it is not, the nearest cell stands.

  An integer gather of whole feature vectors: GridSample is not in tinygrad. Indices are clamped and no border of zeros is put around the map: that border
  would be half as many cells again.
  """
  b, h, w, c = (int(s) for s in m.shape)
  fill = {k: v.to(corner) for k, v in square(size).items()}
  at = corner @ fill["corner"] + fill["steps"]  # (B * N, 2 * size)
  near = torch.minimum(torch.relu(at), at.new_tensor([w - 1] * size + [h - 1] * size))
  column, row = near.split(size, dim=1)
  # counts to 256, which all kinds of floats hold, are multiplied; float32 then counts as far as the map goes
  index = ((row @ fill["row"]).to(corner.dtype) * w + (column @ fill["column"]).to(corner.dtype)).long()
  both = (near == at).to(m.dtype) @ torch.cat([fill["column"], fill["row"]]).to(m.dtype)  # 2 where row and column are on the map
  if b > 1:
    index = index + (torch.arange(b, device=m.device) * (h * w)).repeat_interleave(len(corner) // b)[:, None]
  return m.reshape(b * h * w, c).index_select(0, index.reshape(-1)).reshape(-1, size * size, c), torch.relu(both - 1.0)


def sample(m: Tensor, cells: Tensor) -> Tensor:
  """m (B, h, w, C), cells (B * N, 2) float -> (B * N, C): bilinear samples, zero outside the map."""
  low = torch.floor(cells)
  found, inside = gather(m, low, 2)
  x, y = ((cells - low) @ square(2)["weights"].to(cells) + square(2)["weights0"].to(cells)).split(4, dim=1)
  return ((x * y * inside)[:, None] @ found).flatten(1)


def correlate(m: Tensor, template: Tensor, cells: Tensor) -> Tensor:
  """m (B, h, w, C), template (B * N, C), cells (B * N, 2) -> (B * N, WINDOW, WINDOW): the template's product with the map, entry [.., j, i] for the point
  being at cells + (i - RADIUS, j - RADIUS).
  """
  low = torch.floor(cells)
  fx, fy = (cells - low)[..., None].split(1, dim=1)  # (B * N, 1, 1)
  found, inside = gather(m, low - RADIUS, WINDOW + 1)
  x = ((template[:, None] @ found.transpose(1, 2)).flatten(1) * inside).reshape(-1, WINDOW + 1, WINDOW + 1)
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

  def forward(self, m: Tensor, template: Tensor, cells: Tensor, known: Tensor, memory: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """m (B, h, w, C), template (B * N, C), cells (B * N, 2): where to look; known (B * N, H + 2): hidden state and place in the view; memory (B * N, d); bias
    of the attention between points (B, 1, 1, N), or (1, 1, N) of a single frame -> movement (B * N, 2) in cells, memory.
    """
    correlation = correlate(m, template, cells).flatten(1)
    peak = torch.softmax(correlation * self.sharpness, dim=-1) @ self.window
    x = torch.relu(self.look(correlation) + self.remember(known))
    if self.attention is not None and self.norm is not None:
      together = x if bias.dim() == 3 else x.reshape(bias.shape[0], -1, x.shape[-1])
      x = self.norm(x + self.attention(together, together, together, bias).reshape(x.shape))
    both = torch.cat([x, memory], dim=-1)
    memory = memory + torch.sigmoid(self.gate(both)) * (torch.tanh(self.candidate(both)) - memory)
    move = self.move(memory)
    return torch.sigmoid(move[..., :1]) * peak + move[..., 1:], memory


class LanesHead(nn.Module):
  """Point tracker on a stride-4 branch of its own.

  encode: (normalised frame, neck maps) -> the two maps, of view stride 8 and 4: (B, h, w, C). What a cell looks like is a unit vector: the coarse map's itself;
  the fine one's, of more channels than the branch has, is `fine` of it, which is only ever applied to templates and samples.
  step: one frame of tracking. A template holds a vector of each map, the hidden state d of memory and the last movement.
  """

  def __init__(self, neck: int, channels: int, d: int, branch: int):
    super().__init__()
    self.stem, self.context, self.mix = conv(6, branch, 3, 2), nn.Conv2d(neck, branch, 1), separable(branch, branch)
    self.fine, self.coarse = (nn.Conv2d(c, channels, 1, bias=False) for c in (branch, neck))
    self.d, self.template_size, self.hidden_size = d, len(STRIDES) * channels, d + 2
    self.stages = nn.ModuleList(Stage(d, self.hidden_size, together=i == 0) for i in range(len(STRIDES)))  # coarse: where do the points go together
    self.report = nn.Linear(d, 2)  # visible; how far the template follows what the point looks like now
    nn.init.zeros_(self.report.weight)
    self.report.bias.data.copy_(torch.tensor([0.0, -3.0]))  # slowly at first: it must not drift

  def encode(self, normalised: Tensor, maps: dict[int, Tensor]) -> list[Tensor]:
    fine = self.mix(self.stem(normalised) + up(self.context(maps[8]))).permute(0, 2, 3, 1)
    return [unit(self.coarse(maps[8]).permute(0, 2, 3, 1)), unit(fine, self.widen)]

  @property
  def widen(self) -> Tensor:
    """(channels, branch) of `fine`."""
    return self.fine.weight[:, :, 0, 0]

  def template(self, maps: list[Tensor], points: Tensor) -> Tensor:
    """What the frame shows at points (B * N, 2) view pixels -> (B * N, template_size)."""
    coarse, fine = (sample(m, view_to_cell(points, s)) for m, s in zip(maps, STRIDES, strict=True))
    return torch.cat([coarse, fine @ self.widen.T], dim=-1)

  def step(
    self, maps: list[Tensor], points: Tensor, mask: Tensor, fresh: Tensor, template: Tensor, hidden: Tensor
  ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """points (B, N, 2) view pixels, where each is thought to be; mask, fresh (B, N) 1 or 0; template, hidden: the state, zeros at start.

    -> points (B, N, 2), visible (B, N) logits, template, hidden. A fresh point gets its template here and stays; an unused slot stays too, its state is zero
    and it is never visible. Where the correlation looks is taken as given, as RAFT does: gradients flow through movements, templates and memory.
    """
    b, n = mask.shape
    bias = (mask[:, None, None, :] - 1.0) * 1e4
    if b == 1:
      bias = bias[0]  # one dimension less: see layers.py
    points, template, hidden = (x.flatten(0, 1) for x in (points, template, hidden))
    used = mask.reshape(-1, 1)
    new = fresh.reshape(-1, 1) * used
    kept = used - new
    template, hidden = kept * template, kept * hidden
    memory, position = hidden[..., : self.d], points
    coarse, fine = template.chunk(len(STRIDES), dim=-1)
    for stage, m, stride, part in zip(self.stages, maps, STRIDES, (coarse, fine @ self.widen), strict=True):
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
    visible = visible * used + (used - 1.0) * 20.0
    return position.reshape(b, n, 2), visible.reshape(b, n), template.reshape(b, n, -1), hidden.reshape(b, n, -1)

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

"""A causal point tracker by local correlation, coarse to fine: LocoTrack's idea at a hundredth of its size. One frame
and a state in, points out.

The state holds each point's appearance as the frame that it was given in showed it, so no frame is ever encoded twice.
And it holds how the car moves, which all points of a road share: bare asphalt shows nothing to follow, but the ends of
dashes do, and each point has a vote (plane.py).
"""

import functools
from collections.abc import Iterable
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.fair.students.layers import Attention, conv, depthwise, up
from openpilot.tools.fair.students.plane import FINER, SPEEDS, Drive, Vote, read_window, road_of
from openpilot.tools.lib.errors import UserError

POINTS = 128
STRIDES = (
  8,
  4,
)  # the maps, coarse first: the tracker reaches 32 view pixels a frame from where the host thinks the point is
RADII = (4, 3)  # cells: windows of 9 x 9 and 7 x 7 are looked at


def view_to_cell(points: Tensor, stride: int) -> Tensor:
  """View pixels -> cells of a map of that stride: cell j is centered on view pixel stride * j + (stride - 1) / 2."""
  return points * (1.0 / stride) - (stride - 1) / (2.0 * stride)


def unit(cells: Tensor) -> Tensor:
  """cells (B, h, w, C) -> the same, each divided by its length."""
  x = cells.flatten(0, 2)
  c = x.shape[1]
  # the sum as a product with ones, which comes out as wide as the cells: ONNX Runtime's ReduceSum, and what it does to
  # broadcast, take several times as long
  return (x / torch.sqrt(nn.functional.linear(x * x, x.new_ones(c, c), x.new_full((c,), 1e-6)))).reshape(cells.shape)


@functools.cache
def square(size: int) -> dict[str, Tensor]:
  """What two numbers or two rows of numbers per point are multiplied with to fill a square of cells, (.., size * size)
  row-major, as products do it without broadcasting, which ONNX Runtime does cell by cell. corner: x, y -> the columns'
  x, then the rows' y, less `steps`. column, row: repeat `size` of those in the square. weights: fractions of x, y ->
  bilinear weights of a square of 2 in x and in y, with `weights0`."""
  one, count, eye = np.ones(size), np.arange(size), np.eye(size)
  zero = 0 * one
  out = {
    "corner": [[*one, *zero], [*zero, *one]],
    "steps": [*count, *count],
    "column": np.kron(one, eye),
    "row": np.kron(eye, one),
    "weights": [[-1, 1, -1, 1, 0, 0, 0, 0], [0, 0, 0, 0, -1, -1, 1, 1]],
    "weights0": [1, 0, 1, 0, 1, 1, 0, 0],
  }
  return {k: torch.from_numpy(np.array(v, np.float32)) for k, v in out.items()}


def places(m: Tensor, corner: Tensor, size: int) -> tuple[Tensor, Tensor]:
  """m (B, h, w, C), h and w up to 256; corner (B * N, 2) whole cells x, y -> of the columns, then the rows, of the
  square that starts there, the nearest on the map; and whether they are on it, 1 or 0: both (B * N, 2 * size)."""
  h, w = int(m.shape[1]), int(m.shape[2])
  fill = square(size)
  at = corner @ fill["corner"].to(corner) + fill["steps"].to(corner)
  near = torch.minimum(torch.relu(at), at.new_tensor([w - 1] * size + [h - 1] * size))
  return near, (near == at).to(m.dtype)


def gather(m: Tensor, near: Tensor, size: int) -> Tensor:
  """m (B, h, w, C), near: of places() -> (B * N, size * size, C).

  An integer gather of whole feature vectors: GridSample is not in tinygrad. Indices are clamped and no border of zeros
  is put around the map: that border would be half as many cells again."""
  b, h, w, c = (int(s) for s in m.shape)
  column, row = near.split(size, dim=1)
  fill = square(size)
  # counts to 256, which all kinds of floats hold, are multiplied; float32 then counts as far as the map goes
  index = ((row @ fill["row"].to(row)).to(near.dtype) * w + (column @ fill["column"].to(row)).to(near.dtype)).long()
  if b > 1:
    index = index + (torch.arange(b, device=m.device) * (h * w)).repeat_interleave(len(near) // b)[:, None]
  return m.reshape(b * h * w, c).index_select(0, index.reshape(-1)).reshape(-1, size * size, c)


def sample(m: Tensor, cells: Tensor) -> Tensor:
  """m (B, h, w, C), cells (B * N, 2) float -> (B * N, C): bilinear samples; outside the map, of its border."""
  low = torch.floor(cells)
  x, y = ((cells - low) @ square(2)["weights"].to(cells) + square(2)["weights0"].to(cells)).split(4, dim=1)
  return ((x * y)[:, None] @ gather(m, places(m, low, 2)[0], 2)).flatten(1)


def correlate(m: Tensor, template: Tensor, center: Tensor, radius: int) -> Tensor:
  """m (B, h, w, C), template (B * N, C), center (B * N, 2) whole cells -> (B * N, (2 * radius + 1)^2): the template's
  product with the map, row-major; zero outside it."""
  size = 2 * radius + 1
  near, inside = places(m, center - radius, size)
  both = inside @ torch.cat([square(size)["column"], square(size)["row"]]).to(
    m
  )  # 2 where row and column are on the map
  return (template[:, None] @ gather(m, near, size).transpose(1, 2)).flatten(1) * torch.relu(both - 1.0)


class Stage(nn.Module):
  """One map's step: correlation, what the point remembers and what the other points see give a movement in cells."""

  def __init__(self, d: int, hidden: int, radius: int, together: bool):
    super().__init__()
    self.radius = radius
    self.look, self.remember = nn.Linear((2 * radius + 1) ** 2, d), nn.Linear(hidden + 4, d)
    self.attention = Attention(d, heads=2) if together else None
    self.norm = nn.LayerNorm(d) if together else None
    self.gate, self.candidate = nn.Linear(2 * d, d), nn.Linear(2 * d, d)
    self.move = nn.Linear(d, 3)  # trust in the correlation's peak, and a movement beside it
    # how much the point says of the car's speed, and of its turning; how much it moves as it sees itself, not as the
    # road does
    self.vote = nn.Linear(d, 3)
    self.sharpness = nn.Parameter(torch.tensor(20.0))
    nn.init.zeros_(self.move.weight)
    nn.init.zeros_(self.vote.weight)
    self.vote.bias.data.copy_(torch.tensor([0.0, 0.0, -2.0]))
    self.move.bias.data.copy_(torch.tensor([3.0, 0.0, 0.0]))  # a fresh network follows the peak
    steps = torch.arange(2 * radius + 1, dtype=torch.float32) - radius
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    self.window: Tensor
    self.register_buffer("window", torch.stack([x, y], dim=-1).reshape(-1, 2), persistent=False)

  def forward(
    self, m: Tensor, template: Tensor, cells: Tensor, known: Tensor, memory: Tensor, bias: Tensor
  ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
    """m (B, h, w, C), template (B * N, C), cells (B * N, 2): where to look; known (B * N, H + 2): hidden state and
    place in the view; memory (B * N, d); bias of the attention between points (B, 1, 1, N), or (1, 1, N) of a single
    frame -> movement (B * N, 2) in cells, memory, and the look: its middle (B * N, 2) in whole cells and the logits of
    its places (B * N, W), row-major; the correlations behind these (B * N, W).

    It looks at whole cells, and is told how far from their middle the point is: between them there is nothing that the
    products do not say."""
    center = torch.floor(cells + 0.5)
    off = cells - center
    correlation = correlate(m, template, center, self.radius)
    logits = correlation * self.sharpness
    peak = torch.softmax(logits, dim=-1) @ self.window - off
    x = torch.relu(self.look(correlation) + self.remember(torch.cat([known, off], dim=-1)))
    if self.attention is not None and self.norm is not None:
      together = x if bias.dim() == 3 else x.reshape(bias.shape[0], -1, x.shape[-1])
      x = self.norm(x + self.attention(together, together, together, bias).reshape(x.shape))
    both = torch.cat([x, memory], dim=-1)
    memory = memory + torch.sigmoid(self.gate(both)) * (torch.tanh(self.candidate(both)) - memory)
    move = self.move(memory)
    return torch.sigmoid(move[..., :1]) * peak + move[..., 1:], memory, (center, logits), correlation


def by_clip(frames: Iterable[Tensor], clips: int) -> Tensor:
  """Of T frames (clips * N, W) -> (clips, T, N, W)."""
  return torch.stack([x.unflatten(0, (clips, -1)) for x in frames], dim=1)


class LanesHead(nn.Module):
  """Point tracker on a stride-4 branch of its own.

  encode: (normalized frame, neck maps) -> the two maps, of view stride 8 and 4: (B, h, w, C). What a cell looks like is
  a unit vector. Both see the frame itself through the branch's stem: what other heads need of a road is what all of it
  has in common, and here two places of it are to be told apart.
  step: one frame of tracking. A template holds a vector of each map, the hidden state d of memory and the last
  movement."""

  fixed = ("coarse", "fine", "down")  # to the maps that templates are of

  def __init__(self, neck: int, branch: int, channels: int, d: int, picture: InputSpec | None = None):
    super().__init__()
    picture = picture or InputSpec()
    if max(picture.map_shape) > 256:  # see gather()
      raise UserError(
        f"points are followed in pictures of up to 1024 pixels a side, not in {picture.width}x{picture.height}"
      )
    self.half_width = picture.width / 2
    stem = conv(picture.shape[0], branch, 3, 2)  # to view stride 4: the model frame's planes have stride 2 already
    if picture.kind == "rgb":
      stem = nn.Sequential(stem, conv(branch, branch, 3, 2))
    self.stem, self.context, self.mix = stem, nn.Conv2d(neck, branch, 1), depthwise(branch)
    self.fine, self.coarse = (nn.Conv2d(c, to, 1, bias=False) for c, to in ((branch, branch), (neck, channels)))
    self.down = nn.Conv2d(branch, channels, 2, 2, bias=False)
    self.road = road_of(picture)
    self.votes = nn.ModuleList(Vote(spread) for spread in (0.15, 0.05))
    self.d, self.template_size = d, channels + branch
    self.channels = (channels, branch)
    # coarse: where do the points go together
    self.stages = nn.ModuleList(Stage(d, d + 2, radius, together=i == 0) for i, radius in enumerate(RADII))
    self.visible = nn.Linear(d, 1)
    nn.init.zeros_(self.visible.weight)
    nn.init.zeros_(self.visible.bias)

  @property
  def hidden_size(self) -> int:
    """Of a point: memory, and how the car moves; where no road is known, how the point last moved."""
    return self.d + (2 if self.road is None else 3)

  def encode(self, normalized: Tensor, maps: dict[int, Tensor]) -> list[Tensor]:
    x = self.mix(self.stem(normalized) + up(self.context(maps[8])))
    return [unit(m.permute(0, 2, 3, 1)) for m in (self.coarse(maps[8]) + self.down(x), self.fine(x))]

  def template(self, maps: list[Tensor], points: Tensor) -> Tensor:
    """What the frame shows at points (B * N, 2) view pixels -> (B * N, template_size)."""
    return torch.cat([sample(m, view_to_cell(points, s)) for m, s in zip(maps, STRIDES, strict=True)], dim=-1)

  def step(
    self,
    maps: list[Tensor],
    points: Tensor,
    mask: Tensor,
    fresh: Tensor,
    template: Tensor,
    hidden: Tensor,
    looks: list[tuple[Tensor, Tensor]] | None = None,
    votes: list[tuple[Tensor, Tensor]] | None = None,
    view: Tensor | None = None,
  ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """points (B, N, 2) view pixels, where each was last; mask, fresh (B, N) 1 or 0; template, hidden: the
    state, zeros at start.

    -> points (B, N, 2), visible (B, N) logits, template, hidden. A fresh point gets its template here, once and for
    all, and stays: one that followed what the point looks like now was closer in clips of eight frames, and drifted off
    in fifty. An unused slot stays too, its state is zero and it is never visible. Where the correlation looks is taken
    as given, as RAFT does: gradients flow through movements, templates and memory. looks, votes: take each stage's
    look, and its candidates of the car's speed with their logits (B, K), for training. view: see track()."""
    b, n = mask.shape
    bias = (mask[:, None, None, :] - 1.0) * 1e4
    if b == 1:
      bias = bias[0]  # one dimension less: see layers.py
    points, template, hidden = (x.flatten(0, 1) for x in (points, template, hidden))
    used = mask.reshape(-1, 1)
    new = fresh.reshape(-1, 1) * used
    kept = used - new
    template, hidden = kept * template + new * self.template(maps, points), kept * hidden
    memory, position = hidden[..., : self.d], points
    drive: Drive | None = None
    if self.road is not None:
      drive = Drive.of_state(hidden[..., self.d :].reshape(b, n, 3), kept.reshape(b, n))
      position = points + kept * (self.together(points, drive, b, view) - points)
    own = hidden if self.road is None else hidden[..., : self.d + 2]
    for i, (stage, m, stride, part) in enumerate(
      zip(self.stages, maps, STRIDES, template.split(self.channels, dim=-1), strict=True)
    ):
      at = position.detach()
      known = torch.cat([own, at * (1.0 / self.half_width) - 1.0], dim=-1)
      move, memory, look, seen = stage(m, part, view_to_cell(at, stride), known, memory, bias)
      if looks is not None:
        looks.append(look)
      position = at + move * stride
      if drive is not None:
        weight = torch.sigmoid(cast(Stage, stage).vote(memory))
        said = (weight * kept).reshape(b, n, 3)
        drive, vote = self.ask(i, drive, points, position, look[0], seen, said, view)
        if votes is not None:
          votes.append(vote)
        road = self.together(points, drive, b, view)
        position = road + weight[:, 2:] * (position - road)
    moved = kept * (position - points)
    position = points + moved
    visible = self.visible(memory)
    if drive is None:
      last = moved * (1.0 / 16.0)
    else:
      last = (drive.state(kept.reshape(b, n))[:, None] * mask[..., None]).flatten(0, 1)
    hidden = torch.cat([memory * used, last], dim=-1)
    visible = visible * used + (used - 1.0) * 20.0
    return position.reshape(b, n, 2), visible.reshape(b, n), template.reshape(b, n, -1), hidden.reshape(b, n, -1)

  def together(self, points: Tensor, drive: Drive, b: int, view: Tensor | None) -> Tensor:
    """points (B * N, 2) -> where they are a frame later if they lie on the road."""
    assert self.road is not None
    return self.road.move(points.unflatten(0, (b, -1)), drive.speed, drive.turn, view).flatten(0, 1)

  def ask(
    self,
    i: int,
    before: Drive,
    points: Tensor,
    own: Tensor,
    center: Tensor,
    seen: Tensor,
    weight: Tensor,
    view: Tensor | None,
  ) -> tuple[Drive, tuple[Tensor, Tensor]]:
    """The car's movement by what the points see in stage i. before: as was thought before this stage; points: where
    they were, own: where each sees itself now (B * N, 2); center, seen: of the stage; weight (B, N, 3) -> and the
    candidates (B, K) with their logits."""
    assert self.road is not None
    b, n, _ = weight.shape
    speeds = before.speed.detach() + before.speed.new_tensor(FINER) if i else before.speed.new_tensor(SPEEDS)[None]
    at = self.road.move(points.reshape(b, n, 1, 2), speeds[:, None], before.turn.detach()[:, None], view)
    cells = view_to_cell(at.flatten(0, 1), STRIDES[i]) - center[:, None]
    seen = read_window(seen - seen.mean(-1, keepdim=True), cells).reshape(b, n, -1)
    sure = torch.ones_like(before.sure) if i else before.sure
    speed, said = self.votes[i](seen, weight[..., 0], speeds, before.speed.detach(), sure)
    off = own.reshape(b, n, 2) - self.road.move(points.reshape(b, n, 2), speed, before.turn, view)
    share = weight[..., 1]
    turn = before.turn + (share * self.road.aside(off, view)).sum(1, keepdim=True) / (share.sum(1, keepdim=True) + 1.0)
    return Drive(speed, turn, before.sure), (speeds.expand_as(said), said)

  def zeros(self, b: int, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The state at start."""
    return like.new_zeros(b, n, self.template_size), like.new_zeros(b, n, self.hidden_size)

  def track(
    self, maps: list[Tensor], points: Tensor, mask: Tensor, fresh: Tensor | None = None, view: Tensor | None = None
  ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Tracks over clips, frame by frame, for training. maps: of all frames, B = clips x T, clip-major; points (clips,
    T, N, 2) view pixels, read only where a point is fresh; mask (clips, T, N) 1 = slot in use; fresh (clips, T, N), by
    default all of frame 0. view (clips, 3, 3): from the camera's view to the points' pixels, where these are of an
    augmented picture.

    -> points (clips, T, N, 2), visible logits (clips, T, N), and of each stage where it looked: middles (clips, T, N,
    2) in whole cells, logits (clips, T, N, W) of the places around them: see match_loss(); and its candidates of the
    car's speed, with their logits (clips, T, K): see vote_loss(), [] where no road is known. Each frame starts from the
    tracker's own last position, without a gradient into it: every frame answers for its own step, and learns to find
    back from its own errors."""
    clips, t, n, _ = points.shape
    if fresh is None:
      fresh = torch.zeros_like(mask)
      fresh[:, 0] = 1.0
    by_frame = [m.reshape(clips, t, *m.shape[1:]) for m in maps]
    template, hidden = self.zeros(clips, n, maps[0])
    at = points[:, 0]
    tracked, visible = [], []
    looks: list[tuple[Tensor, Tensor]] = []
    votes: list[tuple[Tensor, Tensor]] = []
    for i in range(t):
      at = torch.where(fresh[:, i, :, None] > 0, points[:, i], at.detach())
      at, seen, template, hidden = self.step(
        [m[:, i] for m in by_frame], at, mask[:, i], fresh[:, i], template, hidden, looks, votes, view
      )
      tracked.append(at)
      visible.append(seen)
    by_stage = [looks[i :: len(STRIDES)] for i in range(len(STRIDES))]
    where = [(by_clip((c for c, _ in s), clips), by_clip((x for _, x in s), clips)) for s in by_stage]
    said = [
      tuple(torch.stack(x, dim=1) for x in zip(*votes[i :: len(STRIDES)], strict=True)) for i in range(len(STRIDES))
    ]
    return torch.stack(tracked, dim=1), torch.stack(visible, dim=1), where, [(s[0], s[1]) for s in said if s]

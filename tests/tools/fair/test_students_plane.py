"""What all points of a road have in common: against a plane in space, and a drive that is known."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm", reason="students are built on timm")

import torch.nn.functional as F

from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.tools.fair.distillation.losses import vote_loss
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.fair.students.lanes import LanesHead, unit
from openpilot.tools.fair.students.plane import SPEEDS, Drive, Vote, affine, read_window, road_of
from openpilot.tools.sim.points import from_still, ground_depth, lift, to_still

ROAD = road_of(InputSpec())
HEIGHT, STEP = 1.22, 1.1  # m: of the camera, driven in a frame
SPEED = 1e3 * STEP / (910 * HEIGHT)
VIEW = torch.tensor([[[-1.1, 0.02, 500.0], [0.02, 1.1, -8.0], [0, 0, 1]]], dtype=torch.float64)


def points_of_a_road(n=40, turn=0.0):
  """Pixels before and after a frame's drive, by the simulator's geometry."""
  g = np.random.default_rng(0)
  before = np.stack([g.uniform(0, 511, n), g.uniform(70, 200, n)], axis=1)
  at = to_still(lift(before, ground_depth(before, HEIGHT)), (0.0, 0.0, 0.0))
  place = from_still(at, (STEP, 0.0, turn))
  after = place[:, 1:] / place[:, :1] * 910 + medmodel_intrinsics[:2, 2]
  return torch.from_numpy(before)[None], torch.from_numpy(after)[None]


def test_points_move_as_a_flat_road_does():
  before, after = points_of_a_road()
  speed, turn = torch.full((1, 1), SPEED, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
  assert torch.allclose(ROAD.move(before, speed, turn), after, atol=1e-9)
  turned = points_of_a_road(turn=-0.003)[1]  # to the left: all goes to the right by 910 pixels a radian
  off = (ROAD.move(before, speed, turn + 910 * 0.003) - turned).norm(dim=-1)
  assert off.max() < 0.4 and off.median() < 0.1  # less than a tenth of the turn: it is no plain shift at the border
  many = ROAD.move(before[:, :, None], torch.stack([speed * 0, speed], -1)[:, 0], turn[:, None])  # candidates
  assert torch.allclose(many[:, :, 0], before) and torch.allclose(many[:, :, 1], after)


def test_the_speed_is_read_off_points_and_an_augmented_picture_changes_nothing():
  before, after = points_of_a_road()
  known = torch.ones(1, 40, dtype=torch.float64)
  known[0, 30:] = 0
  lost = after.clone()
  lost[0, 30:] = 7.0
  assert abs(float(ROAD.speed(before, lost, known)) - SPEED) < 1e-9
  assert float(ROAD.speed(before, lost, 0 * known)) == 0
  speed, turn = torch.full((1, 1), SPEED, dtype=torch.float64), torch.full((1, 1), 2.0, dtype=torch.float64)
  there, back = affine(VIEW, before), affine(VIEW, ROAD.move(before, speed, turn))
  assert torch.allclose(ROAD.move(there, speed, turn, VIEW), back)
  assert abs(float(ROAD.speed(there, affine(VIEW, after), known * 0 + 1, VIEW)) - SPEED) < 1e-9
  assert torch.allclose(ROAD.aside(back - there, VIEW), (ROAD.move(before, speed, turn) - before)[..., 0])


def test_at_and_above_the_horizon_points_stay_about_where_they_are():
  points = torch.tensor([[[300.0, 47.0], [300.0, 10.0], [256.0, 255.0]]])
  moved = ROAD.move(points, torch.full((1, 1), 2.4), torch.zeros(1, 1))
  assert torch.allclose(moved[:, :2], points[:, :2], atol=0.3) and moved.isfinite().all()


def test_pictures_of_any_camera_have_no_road():
  picture = InputSpec(kind="rgb", height=128, width=256)
  assert road_of(picture) is None
  head = LanesHead(neck=8, branch=8, channels=8, d=16, picture=picture)
  assert head.hidden_size == 18
  wide = road_of(InputSpec(view="sbigmodel"))
  assert (wide.x, wide.y) == (256.0, 151.8)


def test_a_window_is_read_as_grid_sample_reads_it():
  g = torch.Generator().manual_seed(0)
  window = torch.randn(3, 49, generator=g, dtype=torch.float64)
  at = torch.rand(3, 20, 2, generator=g, dtype=torch.float64) * 9 - 4.5
  at[:, 0] = 50.0
  want = F.grid_sample(window.reshape(3, 1, 7, 7), at[:, None] / 3, align_corners=True)[:, 0, 0]
  assert torch.allclose(read_window(window, at), want)


@torch.no_grad()
def test_votes_add_up_and_the_frame_before_counts():
  vote, speeds = Vote(0.15), torch.from_numpy(SPEEDS).float()[None]
  seen = torch.zeros(1, 6, len(SPEEDS))
  seen[0, :3, 8], seen[0, 3, 20] = 1.0, 2.0  # three agree on 0.8, one shouts 2.0
  weight = torch.tensor([[1.0, 1, 1, 0, 1, 1]])
  none, one = torch.zeros(1, 1), torch.ones(1, 1)
  free, _ = vote(seen * 3, weight, speeds, none, none)
  assert abs(float(free) - 0.8) < 0.05
  assert abs(float(vote(0 * seen, weight, speeds, one * 1.6, one)[0]) - 1.6) < 0.01  # nothing seen: as before
  assert abs(float(vote(0 * seen, weight, speeds, none, none)[0]) - 0.7) < 0.1  # nor known: as is usual


def test_the_state_is_the_same_for_all_points_and_fades_in():
  shared = torch.tensor([0.9, 0.25, 0.5])
  kept = torch.tensor([[0.0, 1, 1, 0]])
  state = torch.where(kept[..., None] > 0, shared, torch.tensor(7.0))
  drive = Drive.of_state(state, kept)
  assert [round(float(x), 4) for x in (drive.speed, drive.turn, drive.sure)] == [0.9, 4.0, 0.5]
  assert torch.allclose(drive.state(kept), torch.tensor([[0.9, 0.25, 0.65]]))
  assert float(drive.state(0 * kept)[0, 2]) == 0  # nobody was followed: nothing is known


@torch.no_grad()
def test_a_road_of_bare_asphalt_moves_with_what_is_seen_beside_it():
  """Half of the points lie on a texture that is the same everywhere and say nothing: they go as the others do."""
  torch.manual_seed(0)
  head = LanesHead(neck=8, branch=16, channels=16, d=16).eval()
  for stage in head.stages:
    torch.nn.init.zeros_(stage.move.bias)
    stage.move.bias.data[0] = 20.0
    stage.vote.bias.data.copy_(torch.tensor([10.0, -20.0, -20.0]))  # all vote, none goes its own way
  before, after = (x.float() for x in points_of_a_road(60))
  keep = (after[0, :, 1] < 210) & (after[0, :, 0] > 0) & (after[0, :, 0] < 511)
  before, after = before[:, keep], after[:, keep]
  n = before.shape[1]
  marked = torch.arange(n) % 2 == 0
  maps = []
  for points in (before, after):
    pair = []
    for stride, c in ((8, 16), (4, 16)):
      m = torch.ones(1, c, 256 // stride, 512 // stride)
      ij = ((points[0, marked] - (stride - 1) / 2) / stride).round().long()
      m[0, :, ij[:, 1], ij[:, 0]] = torch.randn(c, len(ij), generator=torch.Generator().manual_seed(stride))
      pair.append(unit(m.permute(0, 2, 3, 1)))
    maps.append(pair)
  ones = torch.ones(1, n)
  _, _, template, hidden = head.step(maps[0], before, ones, ones, *head.zeros(1, n, before))
  found, _, _, hidden = head.step(maps[1], before, ones, 0 * ones, template, hidden)
  assert abs(float(hidden[0, 0, -3]) - SPEED) < 0.05
  assert (found - after)[0, ~marked].norm(dim=-1).median() < 0.1 * (after - before)[0, ~marked].norm(dim=-1).median()


def test_vote_loss_against_a_plain_loop():
  g = torch.Generator().manual_seed(0)
  speeds = torch.arange(5.0).expand(2, 3, 5) * 0.5
  logits, speed = torch.randn(2, 3, 5, generator=g), torch.tensor([[0.6, 2.0, 9.0], [0.0, 1.4, 1.0]])
  known = torch.tensor([[True, True, True], [True, False, True]])
  total, n = 0.0, 0
  for c in range(2):
    for t in range(3):
      if not known[c, t] or speed[c, t] > 2.0:
        continue
      log = logits[c, t] - logits[c, t].exp().sum().log()
      at = float(speed[c, t]) / 0.5
      low = min(int(at), 3)
      total -= float((1 - (at - low)) * log[low] + (at - low) * log[low + 1])
      n += 1
  got = vote_loss([(speeds, logits), (speeds, logits)], speed, known, weight=1.0)
  assert n == 4 and abs(float(got) - 2 * total / n) < 1e-5
  assert float(vote_loss([(speeds, logits)], speed, 0 * known > 0)) == 0

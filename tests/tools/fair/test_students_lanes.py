"""The students' point tracker: its arithmetic against float64 references, its state, clips frame by frame."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm", reason="students are built on timm")

import torch.nn.functional as F
from student_inputs import randomise, some_inputs

from openpilot.tools.fair.students.lanes import RADII, STRIDES, LanesHead, Stage, correlate, sample, unit, view_to_cell
from openpilot.tools.fair.students.student import build


def rows(m: torch.Tensor) -> torch.Tensor:
  return unit(m.permute(0, 2, 3, 1))


def reference_samples(m: torch.Tensor, cells: torch.Tensor, outside: str) -> torch.Tensor:
  """Bilinear samples of unit vectors at cells (B, N, 2): (B, N, C), by torch's own grid_sample; outside: its
  padding_mode."""
  h, w = m.shape[2:]
  unit = m / torch.sqrt((m * m).sum(1, keepdim=True) + 1e-6)
  at = 2 * cells / torch.tensor([w - 1, h - 1], dtype=m.dtype) - 1
  return F.grid_sample(unit, at[:, :, None], mode="bilinear", padding_mode=outside, align_corners=True)[
    ..., 0
  ].transpose(1, 2)


@pytest.mark.parametrize("radius", RADII)
def test_correlation_against_grid_sample(radius):
  g = torch.Generator().manual_seed(0)
  m = torch.randn(2, 8, 32, 64, generator=g, dtype=torch.float64)
  # outside too
  cells = torch.rand(2, 40, 2, generator=g, dtype=torch.float64) * torch.tensor([80.0, 50.0], dtype=torch.float64) - 8
  cells[:, :4] = torch.tensor(
    [[0.0, 0.0], [63.0, 31.0], [-500.0, 10.0], [20.0, 9000.0]], dtype=torch.float64
  )  # corners, whole cells, far outside
  template = torch.randn(2, 40, 8, generator=g, dtype=torch.float64)
  assert torch.allclose(
    sample(rows(m), cells.flatten(0, 1)), reference_samples(m, cells, "border").flatten(0, 1), atol=1e-10
  )
  size, center = 2 * radius + 1, cells.round()
  got = correlate(rows(m), template.flatten(0, 1), center.flatten(0, 1), radius).reshape(2, 40, size, size)
  for j in range(size):
    for i in range(size):
      step = torch.tensor([i - radius, j - radius], dtype=torch.float64)
      want = (template * reference_samples(m, center + step, "zeros")).sum(-1)
      assert torch.allclose(got[:, :, j, i], want, atol=1e-10)


@pytest.mark.parametrize("stride", STRIDES)
def test_cells_are_centered_as_the_maps_are(stride):
  assert torch.equal(
    view_to_cell(torch.tensor([[stride * 5 + (stride - 1) / 2, (stride - 1) / 2]]), stride), torch.tensor([[5.0, 0.0]])
  )


@pytest.mark.parametrize("radius", RADII)
def test_a_moved_picture_moves_the_peak(radius):
  g = torch.Generator().manual_seed(0)
  m = torch.randn(1, 16, 64, 128, generator=g)
  cells = (torch.rand(30, 2, generator=g) * torch.tensor([80.0, 30.0])).floor() + torch.tensor([20.0, 15.0])
  template = sample(rows(m), cells)
  for dx, dy in ((0, 0), (3, -2), (-radius, radius)):
    peak = correlate(rows(m.roll((dy, dx), dims=(2, 3))), template, cells, radius).argmax(-1)
    assert (peak == (dy + radius) * (2 * radius + 1) + dx + radius).all()


def test_between_cells_a_stage_moves_from_where_the_point_is():
  """It looks at whole cells: a point at a fraction of one is moved to the same place as its neighbors, not beside
  it."""
  g = torch.Generator().manual_seed(1)
  stage = Stage(8, 10, 3, together=False).eval()
  stage.move.bias.data[0] = 20.0  # all trust in the peak
  stage.sharpness.data.fill_(200.0)
  m, target = rows(torch.randn(1, 16, 64, 128, generator=g)), torch.tensor([30.0, 20.0])
  cells = target + torch.tensor([[0.0, 0.0], [0.4, -0.3], [-1.7, 2.2], [2.49, 0.5]])
  template = sample(m, target[None]).expand(4, -1)
  move, _, _, _ = stage(m, template, cells, torch.zeros(4, 12), torch.zeros(4, 8), torch.zeros(1, 1, 4))
  assert torch.allclose(cells + move, target.expand(4, 2), atol=1e-3)


def test_a_fresh_network_follows_exact_motion():
  """Both maps moved by whole cells, 16 view pixels: the untrained tracker's peak finds it to within a pixel and a half
  (its gate opens to 95% at first), where it knows of no road that its points would have in common."""
  g = torch.Generator().manual_seed(0)
  head = LanesHead(neck=8, branch=32, channels=32, d=16).eval()
  head.road = None
  coarse, fine = torch.randn(1, 32, 32, 64, generator=g), torch.randn(1, 32, 64, 128, generator=g)
  points = torch.rand(1, 20, 2, generator=g) * torch.tensor([300.0, 120.0]) + torch.tensor([80.0, 60.0])
  ones = torch.ones(1, 20)
  at, _, template, hidden = head.step([rows(coarse), rows(fine)], points, ones, ones, *head.zeros(1, 20, points))
  assert torch.equal(at, points)
  moved = [rows(coarse.roll(2, dims=3)), rows(fine.roll(4, dims=3))]
  at, _, _, _ = head.step(moved, at, ones, 0 * ones, template, hidden)
  error = (at - points - torch.tensor([16.0, 0.0])).norm(dim=-1)
  assert error.median() < 1.5


def test_state():
  student = randomise(build("lanes-nano"))
  inputs = some_inputs(student)
  mask, fresh, points = inputs["lanes_mask"], inputs["lanes_fresh"], inputs["lanes_points"]
  out = student(**inputs)
  new, old, unused = (mask * fresh) > 0, (mask * (1 - fresh)) > 0, mask == 0
  assert new.any() and old.any() and unused.any()
  assert torch.equal(out["lanes_points_out"][new], points[new]) and torch.equal(
    out["lanes_points_out"][unused], points[unused]
  )
  assert (out["lanes_points_out"][old] != points[old]).any(-1).all()
  assert (
    not out["lanes_template_out"][unused].any()
    and not out["lanes_hidden_out"][unused].any()
    and (out["lanes_visible"][unused] == -20).all()
  )
  # a new point owes nothing to what its slot held before; an unused one is as if it were not there
  again = student(
    **{
      **inputs,
      "lanes_template": torch.where((old)[..., None], inputs["lanes_template"], 9.0),
      "lanes_hidden": torch.where((old)[..., None], inputs["lanes_hidden"], 9.0),
      "lanes_points": torch.where(unused[..., None], 7.0, points),
    }
  )
  used = ~unused
  for name in ("lanes_points_out", "lanes_visible", "lanes_template_out", "lanes_hidden_out"):
    assert torch.equal(again[name][used], out[name][used]), name


def test_a_new_point_takes_its_template_here():
  student = build("lanes-nano").eval()
  inputs = some_inputs(student)
  ones = torch.ones_like(inputs["lanes_mask"])
  out = student(inputs["frame"], inputs["lanes_points"], ones, ones)
  _, maps = student.encode(inputs["frame"])
  assert torch.allclose(
    out["lanes_template_out"][0], student.lanes.template(maps, inputs["lanes_points"][0]), atol=1e-6
  )


def test_clips_are_tracked_frame_by_frame():
  """forward_clips against the exported graph's way: one frame and the state in, again and again."""
  student = randomise(build("lanes-nano"))
  g = torch.Generator().manual_seed(5)
  t, n = 3, 12
  frame = torch.randint(0, 256, (2 * t, 6, 128, 256), generator=g, dtype=torch.uint8)
  points = torch.rand(2, t, n, 2, generator=g) * torch.tensor([500.0, 250.0])
  fresh, mask = torch.zeros(2, t, n), torch.ones(2, t, n)
  fresh[:, 0], fresh[:, 0, 3:6], fresh[:, 1, 3:6], mask[:, 0, 3:6] = 1, 0, 1, 0  # three points come in frame 1
  out = student.forward_clips(frame, points, mask, fresh)
  clips = frame.reshape(2, t, 6, 128, 256)
  at, state = points[:, 0], {}
  for i in range(t):
    at = torch.where(fresh[:, i, :, None] > 0, points[:, i], at)
    one = student(clips[:, i], at, mask[:, i], fresh[:, i], **state)
    at, state = (
      one["lanes_points_out"],
      {"lanes_template": one["lanes_template_out"], "lanes_hidden": one["lanes_hidden_out"]},
    )
    # pixels; the same sums in batches of another size
    assert torch.allclose(out["lanes_points_out"][:, i], at, atol=1e-2) and torch.allclose(
      out["lanes_visible"][:, i], one["lanes_visible"], atol=1e-3
    )


def test_default_clips_start_fresh_and_learn_through_time():
  head = LanesHead(neck=8, branch=8, channels=8, d=16)
  maps = [torch.randn(3, 8, 32, 64, requires_grad=True), torch.randn(3, 8, 64, 128, requires_grad=True)]
  points = torch.rand(1, 3, 10, 2) * torch.tensor([400.0, 200.0]) + 20
  tracked, _, _, _ = head.track([rows(m) for m in maps], points, torch.ones(1, 3, 10))
  assert torch.equal(tracked[:, 0], points[:, 0])
  tracked[:, 2].square().mean().backward()
  assert all(
    m.grad[0].any() for m in maps
  )  # the last frame's error reaches the first frame's features, through the templates

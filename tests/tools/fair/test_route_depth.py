"""Depth from the drive itself: the triangulation against exact flow, what moves and what contradicts itself, the log's
way, and the whole of it on a simulated drive."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from openpilot.cereal import messaging
from openpilot.common.transformations.camera import view_frame_from_device_frame
from openpilot.common.transformations.orientation import rot_from_euler
from openpilot.tools.fair.labels.labeling import FrameTeacher, run_teacher
from openpilot.tools.fair.labels.meters import Fit, refit
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.labels.views import segment_view
from openpilot.tools.fair.maps import depth_to_map
from openpilot.tools.fair.registry import TEACHERS, load_teacher
from openpilot.tools.fair.route_depth import fuse
from openpilot.tools.fair.route_depth import teacher as teaching
from openpilot.tools.fair.route_depth.drive import Drive, camera_from_calib
from openpilot.tools.fair.route_depth.fuse import Inverse, from_flow, from_plane, make_grid, put_lead, together
from openpilot.tools.fair.route_depth.geometry import Move, away, motion_per_rho, moved, off_line, refine, triangulate
from openpilot.tools.fair.route_depth.teacher import RouteDepthTeacher
from openpilot.tools.fair.teacher import Clip
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.logwriter import write_log
from openpilot.tools.lib.route import Route, Segment
from openpilot.tools.sim.render import CLASSES
from openpilot.tools.sim.truth import MAP_H, MAP_W
from openpilot.tools.sim.write_route import Drive as SimDrive
from openpilot.tools.sim.write_route import write_whole

K = np.array([[722.0, 0, 263], [0, 722, 165], [0, 0, 1]])
H, W, HEIGHT = 330, 526, 1.4
DOWN = np.array([0.0, 1.0, 0.0])
# 4 m ahead, a little to the side, with a turn: of an earlier camera, which is behind
MOVE = Move(cv2.Rodrigues(np.array([0.004, -0.02, 0.003]))[0], np.array([0.05, -0.02, 4.0]))


def grid_of(height=HEIGHT):
  return make_grid(H, W, 4, K, DOWN, height)


def scene(grid):
  """(h, w) inverse depth of a road, and of a wall 30 m ahead of all that is not below it."""
  return np.maximum(grid.rays[..., 1] / HEIGHT, 1 / 30)


def rough(grid):
  """texture() of a picture that flow finds its way in."""
  return np.broadcast_to(100 * np.eye(2), (*grid.shape, 2, 2))


def exact(grid, rho, move):
  """(h, w, 2) flow to the earlier picture: points in space, moved, and projected by their own lines of code."""
  space = np.concatenate([grid.rays / rho[..., None], np.ones((*rho.shape, 1))], axis=-1)
  matrix = np.concatenate([move.R, move.t[:, None]], axis=1)
  p = np.einsum("ij,hwj->hwi", K @ matrix, space)
  return p[..., :2] / p[..., 2:] - grid.px


def seen_at(rays, rho, move):
  """(N, 3) rays with z = 1 at inverse depth rho (N,) -> (N, 3), with z = 1, where the earlier camera saw them."""
  x = rays @ move.R.T + rho[:, None] * move.t
  return x / x[:, 2:]


@pytest.mark.parametrize("turn", [0.0, 0.05])
def test_triangulation_of_exact_flow_is_exact(rng, turn):
  n = 4000
  rays = np.concatenate([rng.uniform(-0.4, 0.4, (n, 2)), np.ones((n, 1))], axis=1)
  z = rng.uniform(2, 80, n)
  move = Move(cv2.Rodrigues(turn * rng.normal(0, 1, 3))[0], np.array([0.1, 0.05, 3.0]) + rng.normal(0, 0.05, 3))
  space = rays * z[:, None] @ move.R.T + move.t
  there = space / space[:, 2:]
  np.testing.assert_allclose(1 / triangulate(rays, there, move), z, rtol=1e-9)
  np.testing.assert_allclose(seen_at(rays, 1 / z, move), there, rtol=1e-12, atol=1e-12)
  assert np.abs(off_line(rays, there, move)).max() < 1e-12
  # how much of a pixel a change of inverse depth is, by differences
  h = 1e-7
  step = np.linalg.norm(seen_at(rays, 1 / z + h, move) - seen_at(rays, 1 / z - h, move), axis=1) / (2 * h)
  np.testing.assert_allclose(motion_per_rho(rays, 1 / z, move), step, rtol=1e-5)
  # it lies on its line for every depth, and there alone: put one part in a thousand across, it is so far off
  a, b = seen_at(rays, np.full(n, 0.02), move), seen_at(rays, np.full(n, 0.3), move)
  across = np.stack([a[:, 1] - b[:, 1], b[:, 0] - a[:, 0]], axis=1)
  across /= np.linalg.norm(across, axis=1, keepdims=True)
  there[:, :2] += 1e-3 * across
  far = np.linalg.norm(rays[:, :2], axis=1) > 0.1
  error = np.abs(off_line(rays, there, move))[far]  # Sampson's: shared between the two pictures
  assert (error < 1.001e-3).all() and np.median(error) == pytest.approx(1e-3 / np.sqrt(2), rel=0.2)
  # and in the labeled picture that line is the one towards which all points move
  wider = rays + 1e-4 * np.concatenate([away(rays, move), np.zeros((n, 1))], axis=1)
  assert np.abs(off_line(wider, seen_at(rays, 1 / z, move), move)).max() < 1e-9


def test_the_variance_is_the_errors(rng):
  """Flow with noise of a known size: the error of inverse depth is as large as its standard deviation says."""
  n, noise = 20000, 0.5
  rays = np.concatenate([rng.uniform(-0.35, 0.35, (n, 2)), np.ones((n, 1))], axis=1)
  rho = 1 / rng.uniform(4, 40, n)
  far = np.linalg.norm(rays[:, :2], axis=1) > 0.05  # near the middle nothing is told
  there = seen_at(rays, rho, MOVE)
  there[:, :2] += rng.normal(0, noise / K[0, 0], (n, 2))
  std = noise / K[0, 0] / motion_per_rho(rays, rho, MOVE)
  z = ((triangulate(rays, there, MOVE) - rho) / std)[far]
  assert abs(np.median(z)) < 0.05 and 1.4826 * np.median(np.abs(z)) == pytest.approx(1, abs=0.05)


def test_the_logs_move_is_put_right_by_the_picture(rng):
  """A turn and a direction that the log has wrong by a third of a degree come back; a fifth of the points move by
  themselves; the length of the way stays."""
  grid = grid_of()
  rays = grid.rays[::3, ::3].reshape(-1, 3)
  rho = scene(grid)[::3, ::3].ravel()
  there = seen_at(rays, rho, MOVE)
  some = rng.uniform(size=len(rho)) < 0.2
  there[some, :2] += rng.uniform(0.01, 0.05, (some.sum(), 2))
  there[:, :2] += rng.normal(0, 0.2 / 722, (len(rho), 2))
  wrong = moved(MOVE, np.array([0.005, -0.004, 0.003, 0.006, -0.006]))
  found, spread = refine(rays, there, wrong, 722.0)
  before, after = (cv2.Rodrigues(m.R @ MOVE.R.T)[0].ravel() for m in (wrong, found))
  assert np.abs(before).max() > 0.004 and np.abs(after).max() < 0.0007
  assert np.linalg.norm(found.t) == pytest.approx(np.linalg.norm(MOVE.t)) and spread < 0.6
  errors = np.abs(triangulate(rays, there, found)[~some] / rho[~some] - 1)
  assert np.median(errors) < 0.02 < np.median(np.abs(triangulate(rays, there, wrong)[~some] / rho[~some] - 1))


def test_only_what_stands_still_and_is_sure_is_told():
  grid = grid_of()
  rho = scene(grid)
  flow = exact(grid, rho, MOVE)
  missed, still = np.zeros(grid.shape), np.ones(grid.shape, bool)
  found, move = from_flow(grid, flow, missed, MOVE, still, rough(grid))
  sure = found.std < 0.1 * found.rho
  assert sure.mean() > 0.6 and np.abs(found.rho[sure] / rho[sure] - 1).max() < 0.03
  np.testing.assert_allclose(move.t, MOVE.t, atol=0.02)
  # nothing near the point driven to, where a picture does not tell depth
  foe = np.round((K @ (MOVE.R.T @ -MOVE.t / -MOVE.t[2])).astype(float))[:2] / 4
  assert not sure[int(foe[1]) - 3 : int(foe[1]) + 3, int(foe[0]) - 3 : int(foe[0]) + 3].any()
  # a block that slides sideways is off its lines; one that drives along at the car's own speed hardly moves in the
  # picture: both are no depth, nor is what flow does not find again, or a detector knows
  slides, along, lost, known = (np.zeros(grid.shape, bool) for _ in range(4))
  slides[20:26, 20:28], along[50:56, 70:80], lost[60:64, 20:30], known[60:64, 100:110] = True, True, True, True
  flow[slides, 1] += 4.0
  flow[along] = exact(grid, np.full(grid.shape, 1e-6), MOVE)[along]
  missed[lost] = 5.0
  # and what has texture only across the line of its depth could have slid along it
  tensor, blank = rough(grid).copy(), np.zeros(grid.shape, bool)
  blank[60:64, 69:71], tensor[60:64, 69:71] = True, np.diag([100, 1e-3])
  found, _ = from_flow(grid, flow, missed, MOVE, still & ~known, tensor)
  assert (found.std[blank] > 0.15 * found.rho[blank]).all() and (found.std[60:64, 40:50] < 0.1).all()
  for block in (slides, along, lost, known):
    assert not np.isfinite(found.std[block]).any()


def test_texture_is_the_gradients(rng):
  grid = grid_of()
  x = np.mgrid[0:H, 0:W][1]
  stripes = (127 + 100 * np.sin(x / 3)).astype(np.uint8)
  tensor = fuse.texture(stripes, grid)[5:-5, 5:-5]
  assert (np.abs(tensor[..., 1, 1]) < 1e-3).all() and (np.abs(tensor[..., 0, 1]) < 1e-2).all()
  # a sine's gradient is 100 / 3 at most, half of its square in the mean, less what the blur of one pixel takes
  assert np.median(tensor[..., 0, 0]) == pytest.approx((100 / 3) ** 2 / 2 * np.exp(-1 / 9), rel=0.1)
  assert np.abs(fuse.texture(np.full((H, W), 90, np.uint8), grid)).max() < 1e-6


def test_a_surfaces_end_is_not_told():
  """Flow is smeared over a step: what lies within some cells of it is left out; a plane, however steep, has no end."""
  grid = grid_of()
  road = Inverse(np.maximum(grid.rays[..., 1] / HEIGHT, 1e-3), np.full(grid.shape, 1e-4))
  assert not fuse.ends(road)[45:].any()
  step = Inverse(np.where(np.arange(grid.shape[1]) < 60, 0.1, 0.03) * np.ones(grid.shape), np.full(grid.shape, 1e-4))
  out = fuse.ends(step)
  assert out[4:-4, 58:62].all() and not out[:, :56].any() and not out[:, 64:].any()


@pytest.mark.parametrize("height", [1.0, 1.5, 2.0])
def test_the_road_plane_tells_its_own_pitch(height):
  """The road is half a degree steeper than the calibration says, and flow has seen it: the plane is put right, and
  reaches where flow does not."""
  grid = grid_of(height)
  pitch = 0.008
  true = (grid.rays[..., 1] + pitch) / height
  road = true > 1 / 60
  flow = Inverse(true.copy(), np.where(road & (true > 1 / 20), 0.05 * true, np.inf))
  told, found = from_plane(grid, road, flow)
  assert found == pytest.approx(pitch, abs=1e-6) and np.isfinite(told.std[road]).mean() > 0.8
  np.testing.assert_allclose(told.rho[road], true[road], rtol=1e-6)
  level, none = from_plane(grid, road, Inverse.nothing(grid.shape))
  assert none == 0 and (level.std[road] >= told.std[road]).all() and not np.isfinite(told.std[~road]).any()


def test_two_witnesses():
  a, b = (
    Inverse(np.array([[r] * 3]), np.array([s])) for r, s in ((0.1, [0.01, 0.01, np.inf]), (0.12, [0.02, np.inf, 0.02]))
  )
  both = together(a, b)
  np.testing.assert_allclose(both.rho, [[0.104, 0.1, 0.12]])
  np.testing.assert_allclose(both.std, [[0.01 / np.sqrt(1.25), 0.01, 0.02]])
  far = together(Inverse(np.array([[0.1]]), np.array([[0.01]])), Inverse(np.array([[0.2]]), np.array([[0.02]])))
  assert far.std == np.inf  # they contradict each other: neither is believed


def test_radars_lead_is_in_the_middle_of_its_box():
  grid, camera = grid_of(), camera_from_calib(np.zeros(3), True)
  x = Inverse.nothing(grid.shape)
  boxes = np.array([[230.0, 140, 300, 190], [0, 100, 100, 200]])
  assert put_lead(x, grid, boxes, 30.0, 0.1, camera)
  told = np.isfinite(x.std)
  assert np.allclose(1 / x.rho[told], 30.0) and np.allclose(x.std[told] / x.rho[told], 0.05)
  ys, xs = np.nonzero(told)
  px = grid.px[ys, xs]
  assert (np.abs(px[:, 0] - 265) <= 17.5).all() and (np.abs(px[:, 1] - 165) <= 12.5).all() and len(px) > 30
  assert not put_lead(Inverse.nothing(grid.shape), grid, boxes[1:], 30.0, 0.1, camera)


def log_of(path, odometry=True, pose=True, wheels=True, height=1.5, rpy=(0.0, 0.0, 0.0), radar=True):
  """4 s at 20 m/s in a bend of 0.1 rad/s to the right, as several messages say it; the network that odometry comes from
  holds the car for 10% slower than it is."""
  said = []
  device_from_calib = rot_from_euler(np.array(rpy))
  for k in range(81):
    t = k * 50_000_000
    if odometry:
      m = messaging.new_message("cameraOdometry", valid=True, logMonoTime=t + 9)
      m.cameraOdometry.timestampEof, m.cameraOdometry.trans, m.cameraOdometry.rot = t, [18.0, 0, 0], [0, 0, 0.1]
      said.append(m)
    if pose:
      m = messaging.new_message("deviceMotion", valid=True, logMonoTime=t)
      for field, value in (("velocityDevice", [18.0, 0, 0]), ("angularVelocityDevice", [0, 0, 0.1])):
        to = getattr(m.deviceMotion, field)
        (to.x, to.y, to.z), to.valid = (device_from_calib @ value).tolist(), True
      m.deviceMotion.timestamp, m.deviceMotion.inputsOK = t, True
      said.append(m)
    if wheels:
      m = messaging.new_message("carState", valid=True, logMonoTime=t)
      m.carState.vEgo = 20.0
      said.append(m)
    m = messaging.new_message("radarState", valid=True, logMonoTime=t)
    lead = m.radarState.leadOne
    lead.present, lead.radar, lead.dRel, lead.yRel = True, radar, 40.0, 1.0
    said.append(m)
  m = messaging.new_message("extrinsicsCalibration", valid=True, logMonoTime=1)
  m.extrinsicsCalibration.height = [height]
  write_log(path, [x.to_bytes() for x in [*said, m]])
  return Drive(path)


@pytest.mark.parametrize("source", ["cameraOdometry", "deviceMotion"])
def test_the_way_of_a_bend(tmp_path, source):
  """Against the circle itself, in the view that looks along the car, and in the picture of a camera that does not."""
  rpy = np.array([0.01, -0.03, 0.04])
  drive = log_of(tmp_path / "rlog", odometry=source == "cameraOdometry", rpy=rpy)
  assert drive.source == source and drive.height == 1.5 and drive.known
  now, before = 2_000_000_000, 1_600_000_000
  assert drive.way(now, before) == pytest.approx(8.0)
  angle, radius = 0.04, 200.0
  turn = rot_from_euler(np.array([0, 0, angle]))
  way = np.array([radius * np.sin(angle), radius * (1 - np.cos(angle)), 0])
  for whole in (False, True):
    c = view_frame_from_device_frame @ (rot_from_euler(rpy) if whole else np.eye(3))
    move = drive.move(now, before, rpy, whole)
    np.testing.assert_allclose(move.R, c @ turn @ c.T, atol=1e-9)
    np.testing.assert_allclose(move.t, c @ way, atol=1e-4)
  assert drive.move(9_000_000_000, 8_600_000_000, rpy, True) is None  # the log has ended
  assert drive.lead(now) == pytest.approx((41.52, -1.0)) and drive.lead(9_000_000_000) is None


def test_what_a_log_does_not_say(tmp_path):
  drive = log_of(tmp_path / "a", wheels=False, height=9.0, radar=False)
  assert drive.way(2_000_000_000, 1_000_000_000) == pytest.approx(18.0) and drive.height == 1.22 and not drive.known
  assert drive.lead(2_000_000_000) is None  # the driving model's guess is no measurement
  silent = log_of(tmp_path / "b", odometry=False, pose=False)
  assert silent.source == "" and silent.move(2_000_000_000, 1_000_000_000, np.zeros(3), True) is None
  assert drive.hash != silent.hash and drive.hash == log_of(tmp_path / "c", wheels=False, height=9.0, radar=False).hash


def test_an_earlier_frame_is_turned_back():
  """Of what is endlessly far both cameras, turned alike, see the same picture; what the earlier one did not see is
  known to be missing."""
  grid = make_grid(H, W, 1, K, DOWN, HEIGHT)
  move = Move(cv2.Rodrigues(np.array([0.02, -0.08, 0.03]))[0], np.array([0.3, 0, 4.0]))

  def seen(rays):  # brightness by direction
    d = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
    return np.stack([127 + 100 * np.sin(20 * d[..., k]) for k in (0, 1, 0)]).astype(np.uint8)

  now, earlier = seen(grid.rays), seen(grid.rays @ move.R)  # whose rays, in the labeled frame's axes
  turned, left, back = fuse.turned_back(earlier, grid, move)
  out = fuse.outside(grid.px, back, H, W)
  assert 0.05 < out.mean() < 0.5 and not fuse.outside(grid.px, np.eye(3), H, W).any()
  assert np.abs(turned.astype(int) - now)[:, ~out].max() <= 3 < np.abs(earlier.astype(int) - now).mean()
  np.testing.assert_allclose(left.R, np.eye(3))
  space = np.array([[1.0, 2, 20], [-3, 1, 40]])
  whole, rest = (space @ m.R.T + m.t for m in (move, left))
  np.testing.assert_allclose(rest @ move.R.T, whole)  # the same place, by axes that are turned


class ExactFlow:
  """Stands in for RAFT: knows the scene, and tells frames by their first pixel."""

  def __init__(self, path, device=None, precision=None, iters=12):
    self.iters, self.model, self.asked = iters, self, []

  def encode(self, frame):
    return int(frame[0, 0, 0])

  def flow_both(self, a, b, iters):
    self.asked.append((a, b))
    move = Move(np.eye(3), np.array([0, 0, 1.0 * (a - b)]))  # 20 m/s, 20 frames a second
    whole = make_grid(H, W, 1, K, DOWN, HEIGHT)
    there, back = exact(whole, scene(whole), move), np.full((H, W, 2), np.nan)
    # the way back, from where each pixel came to: by its nearest
    at = np.rint(whole.px + there).astype(int)
    good = (at >= 0).all(-1) & (at[..., 0] < W) & (at[..., 1] < H)
    back[at[good][:, 1], at[good][:, 0]] = -there[good]
    back = np.where(np.isnan(back), -exact(whole, scene(whole), move), back)
    return tuple(torch.from_numpy(x.transpose(2, 0, 1).astype(np.float32)) for x in (there, back))


@pytest.fixture
def teacher(tmp_path, monkeypatch):
  monkeypatch.setattr(teaching, "LaneTracker", ExactFlow)
  (tmp_path / "raft.pth").write_bytes(b"x")

  def make(**options):
    t = RouteDepthTeacher(
      "route-depth", TEACHERS["route-depth"], tmp_path / "raft.pth", **{"detector": "none", "roads": "none", **options}
    )
    t.whole = True
    t.prepare(H, W)
    return t

  return make


def clip_of(log, first, n, rpy=(0.0, 0.0, 0.0)):
  rgb = np.random.default_rng(0).integers(0, 255, (n, 3, H, W), dtype=np.uint8)
  rgb[:, 0, 0, 0] = first + np.arange(n)
  return Clip(rgb, K, np.array(rpy), list(range(first, first + n)), [50_000_000 * (first + i) for i in range(n)], log)


def test_a_drive_is_labeled(tmp_path, teacher):
  """20 m/s straight on: from the fourth frame on, depth is the scene's to a hundredth; the state is all that is needed
  to go on; what is farther than all is told as that."""
  straight(tmp_path / "rlog")
  t = teacher()
  whole, state = t.label(clip_of(tmp_path / "rlog", 8, 8))
  assert t.flow.asked == [(9, 8), (10, 8), (11, 8), (12, 9), (13, 10), (14, 11), (15, 12)]  # 3 m back, where there is
  assert whole["depth"].shape == whole["depth_std"].shape == (8, *t.labels[0].shape) == (8, 82, 131)
  grid = grid_of()
  for i in range(3, 8):
    z, std = (whole[k][i].astype(float) for k in ("depth", "depth_std"))
    told = (z > 0) & np.isfinite(z)
    assert told.mean() > 0.6 and (std[told] > 0).all() and (std[~told] == 0).all() and std.max() < 0.1501  # float16
    np.testing.assert_allclose(z[told], 1 / scene(grid)[told], rtol=0.02)
  assert (whole["depth"][0] == 0).all()  # there is no earlier frame
  clip = clip_of(tmp_path / "rlog", 8, 8)
  first, state = teacher().label(part_of(clip, 0, 5))
  rest, end = teacher().label(part_of(clip, 5, 8), state)
  for k in ("depth", "depth_std"):
    np.testing.assert_array_equal(np.concatenate([first[k], rest[k]]), whole[k])
  assert end["frames"].shape == (8, 3, H, W) and end["times"].tolist() == [50_000_000 * k for k in range(8, 16)]
  (line,) = t.report()
  assert line.startswith("of 8 frames, 7 with flow, ")


def part_of(clip, a, b):
  return replace(clip, rgb=clip.rgb[a:b], frame_ids=clip.frame_ids[a:b], times=clip.times[a:b])


def test_where_nothing_is_sure_nothing_is_told(tmp_path, teacher):
  straight(tmp_path / "rlog")
  t = teacher()
  still = clip_of(tmp_path / "rlog", 8, 6)
  still.rgb[:] = still.rgb[:1]  # one picture again and again, as of a video that cannot be decoded
  assert not t.label(still)[0]["depth"].any()
  late = clip_of(tmp_path / "rlog", 200, 3)  # behind the log's end
  late.rgb[:, 0, 0, 0] = [1, 2, 3]
  assert not t.label(late)[0]["depth"].any() and t.report()[0].startswith("of 9 frames, 0 with flow, 0.0%")
  blank = clip_of(tmp_path / "rlog", 8, 6)
  blank.rgb[:, :, 1:] = 90
  told = t.label(blank)[0]["depth"]
  assert (told[:, 8:] == 0).all()


def test_what_a_log_lacks_is_said(tmp_path, teacher):
  t = teacher()
  with pytest.raises(UserError, match="has none; leave this teacher out"):
    t.check(Segment("a", 0, tmp_path, {}))
  log_of(tmp_path / "rlog", odometry=False, pose=False)
  with pytest.raises(UserError, match="neither cameraOdometry nor livePose"):
    t.check(Segment("a", 0, tmp_path, {"rlog": tmp_path / "rlog"}))
  with pytest.raises(UserError, match="too few for flow"):
    t.prepare(60, 60)
  straight(tmp_path / "other")
  a, b = (t.source(Segment("a", 0, tmp_path, {"rlog": tmp_path / n})) for n in ("rlog", "other"))
  assert a != b and b == {"motion": "cameraOdometry", "height": pytest.approx(HEIGHT), "drive": b["drive"]}
  assert json.loads(json.dumps(t.settings()))["rules"] == teaching.VERSION


def straight(path):
  said = []
  for k in range(60):
    m = messaging.new_message("cameraOdometry", valid=True, logMonoTime=k * 50_000_000)
    m.cameraOdometry.timestampEof, m.cameraOdometry.trans, m.cameraOdometry.rot = (
      k * 50_000_000,
      [20.0, 0, 0],
      [0, 0, 0],
    )
    said.append(m.to_bytes())
  m = messaging.new_message("extrinsicsCalibration", valid=True, logMonoTime=1)
  m.extrinsicsCalibration.height = [HEIGHT]
  write_log(path, [*said, m.to_bytes()])


@pytest.mark.slow
def test_a_simulated_drive(tmp_path, shared_data, monkeypatch):
  """With RAFT, YOLOX and the roads' network, against the simulator's exact depth: 8 frames, 5 a second. And a relative
  teacher made of the truth, put to meters by it. Equal runs are equal to the byte."""
  monkeypatch.setenv("FAIR_WEIGHTS", str(shared_data / "weights"))
  write_whole((tmp_path / "route", SimDrive(7, 1.6, "mici", "day", "clear", True), 60.0))
  views = [segment_view(s, "qcamera", 4) for s in Route(tmp_path / "route").segments]
  store = LabelStore(tmp_path / "s", create=True)
  run_teacher(FrameTeacher(), views, store, every=4, progress=False)
  (truth,) = run_teacher(load_teacher("simulator"), views, store, every=4, progress=False)
  (group,) = run_teacher(load_teacher("route-depth"), views, store, every=4, progress=False)
  other = LabelStore(tmp_path / "again", create=True)
  (again,) = run_teacher(load_teacher("route-depth"), views, other, every=4, progress=False)
  assert again.path.name == group.path.name
  for p in group.path.rglob("*"):
    assert p.is_dir() or p.read_bytes() == (again.path / p.relative_to(group.path)).read_bytes()
  stored, share = (group.read(k, 0, group.n).astype(np.float32) for k in ("depth", "depth_std"))
  z, std = np.stack([depth_to_map(x, "m") for x in stored]), share[:, ::2, ::2]
  true = truth.read("depth", 0, truth.n).astype(float).reshape(-1, MAP_H, MAP_W)
  # drawn people and cars are not always what a detector takes for some: what stands still is judged
  still = truth.read("segmentation", 0, truth.n).reshape(-1, MAP_H, MAP_W) < CLASSES.index("vehicle")
  told = np.isfinite(z) & np.isfinite(true) & still & (std > 0)
  assert told.mean() > 0.3
  error = np.abs(z[told] / true[told] - 1)
  assert error.mean() < 0.03 and (error > 0.2).mean() < 0.02 and np.median(error / std[told]) < 0.5
  for low, high, most, least in ((2, 10, 0.02, 0.6), (10, 20, 0.03, 0.3), (20, 40, 0.1, 0.0), (40, 80, 0.2, 0.0)):
    band = (true >= low) & (true < high)
    assert np.abs(z[told & band] / true[told & band] - 1).mean() < most and told[band].mean() > least
  beyond = np.isinf(stored[:, ::2, ::2])
  assert (true[beyond] < 60).sum() < 0.001 * true.size
  # a relative teacher: the truth's inverse depth, scaled, shifted, and off by a twentieth
  r = np.random.default_rng(0)
  inverse = (40 / true + 3) * (1 + 0.03 * r.normal(0, 1, true.shape))
  for i in range(group.n):
    out, found = refit(inverse[i], stored[i], share[i], 80.0)
    if isinstance(found, Fit):
      near = (true[i] < 60) & (out > 0)
      assert np.median(np.abs(out[near] / true[i][near] - 1)) < 0.1 and near.sum() > 0.9 * (true[i] < 60).sum()
    else:
      assert i == 0 or "about as far" in found

from types import SimpleNamespace

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from openpilot.common.transformations.camera import project
from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.tools.fair.cotracker.lane_points import (
  PATH_T,
  LaneLog,
  inside,
  likely,
  mask_points,
  project_lines,
  road_grid,
)
from openpilot.tools.fair.cotracker.tracker import LANE, ROAD, LaneTracker, Points, RaftTeacher, sample
from openpilot.tools.fair.openpilot.lines import driving_lines
from openpilot.tools.fair.openpilot.teacher import LINES
from openpilot.tools.fair.registry import TEACHERS
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Clip, Label
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.logwriter import write_log
from openpilot.tools.sim.messages import FRAME_ID_OFFSET, segment_messages
from openpilot.tools.sim.render import render
from openpilot.tools.sim.world import CAMERAS, World

H, W = 96, 128


@pytest.fixture
def weights(shared_data):
  return shared_data / "weights" / "raft-small.pth"


def texture(height, width, seed=0):
  """Blobs of several sizes, (3, height, width) float."""
  r = np.random.default_rng(seed)
  out = np.zeros((3, height, width))
  for cell in (4, 8, 16):
    coarse = torch.from_numpy(r.uniform(0, 85, (1, 3, height // cell + 2, width // cell + 2)))
    out += torch.nn.functional.interpolate(coarse, scale_factor=cell, mode="bilinear", align_corners=False)[
      0, :, :height, :width
    ].numpy()
  return out


def panning_video(n, dx, dy):
  """A texture that moves by (dx, dy) whole pixels a frame."""
  big = texture(H + 200, W + 200)
  return np.stack([big[:, 100 - i * dy : 100 - i * dy + H, 100 - i * dx : 100 - i * dx + W] for i in range(n)]).astype(
    np.uint8
  )


# *** where points start ***


def test_mask_points():
  mask = np.zeros((40, 60), np.uint8)
  mask[:, 10:13] = 1  # its middle: 11
  mask[:, 30:34] = 1  # 31.5
  mask[:, 58:60] = 1  # at the border: 58.5
  got = mask_points(mask, spacing=10)
  assert sorted(set(got[:, 0])) == [11.0, 31.5, 58.5] and list(got[::3, 1]) == [34.0, 24.0, 14.0, 4.0]
  assert not len(mask_points(np.zeros((40, 60), bool)))
  assert set(mask_points(mask, 10, max_width=3)[:, 0]) == {11.0, 58.5}


def test_projected_lines_lie_on_the_line_and_in_the_view():
  x = np.linspace(0, 100, 33)
  lines = [
    np.stack([x, np.full(33, -1.8), np.full(33, 1.2)], 1),
    np.stack([x, 1.8 + 0.002 * x**2, np.full(33, 1.2)], 1),
  ]
  points = project_lines(lines, medmodel_intrinsics, 256, 512, spacing=10)
  assert len(points) > 20 and inside(points, 256, 512).all()
  left = project_lines(lines[:1], medmodel_intrinsics, 256, 512, spacing=10)
  # a straight line on a flat road: x - cx = (y / height) * (v - cy)
  np.testing.assert_allclose(left[:, 0] - 256, -1.8 / 1.2 * (left[:, 1] - 47.6), atol=1e-6)
  np.testing.assert_allclose(np.hypot(*np.diff(left, axis=0).T), 10, atol=1e-6)
  # rpy is for pictures that calibration has not warped
  turned = project_lines(lines[:1], medmodel_intrinsics, 256, 512, 10, rpy=np.array([0.0, 0.02, 0.0]))
  assert abs(np.median(turned[:, 1] - left[: len(turned), 1])) > 5 or len(turned) != len(left)
  assert project_lines([], medmodel_intrinsics, 256, 512).shape == (0, 2)
  assert project_lines([np.full((3, 3), np.nan)], medmodel_intrinsics, 256, 512).shape == (0, 2)


def test_driving_model_lines_follow_its_path():
  path = SimpleNamespace(xCoefficients=[0.5, 12.0], yCoefficients=[0.1, 0.0], zCoefficients=[0.0])
  meta = SimpleNamespace(leftY=-1.5, rightY=1.7, leftProb=0.9, rightProb=0.2)
  (line,) = likely(driving_lines(SimpleNamespace(path=path, laneLineMeta=meta), 1.3, PATH_T))
  np.testing.assert_allclose(line[:, 1], -1.5, atol=1e-9)
  np.testing.assert_allclose(line[:, 2], 1.3)
  assert line[0, 0] == 0.5 and line[-1, 0] == 72.5
  # a path that bends right: the left line keeps its distance to it, sideways
  path.yCoefficients = [0.1, 0.0, 0.4]
  (line,) = likely(driving_lines(SimpleNamespace(path=path, laneLineMeta=meta), 1.22, PATH_T))
  t = np.linspace(0, 6, 601)
  dense = np.stack([0.5 + 12 * t, 0.1 + 0.4 * t**2], 1)
  gap = np.sqrt(((line[20:40, None, :2] - dense[None]) ** 2).sum(-1)).min(1)
  np.testing.assert_allclose(gap, 1.6, atol=0.02)
  (standing,) = driving_lines(
    SimpleNamespace(path=SimpleNamespace(**{**vars(path), "xCoefficients": [0.5, 0.01]}), laneLineMeta=meta),
    1.22,
    PATH_T,
  )
  assert standing.name == "path"  # without a direction there is no aside
  path.xCoefficients = []
  assert driving_lines(SimpleNamespace(path=path, laneLineMeta=meta), 1.22, PATH_T) == []


def test_lane_log_of_a_simulated_drive(tmp_path):
  """modelV2's lines, projected, fall on the rendered paint."""
  world = World(5, "day", 3.0)
  path = tmp_path / "rlog.zst"
  config, sensor = CAMERAS["mici"]
  write_log(path, [dat for _, dat in segment_messages(world, 0, 0, 20, config, "mici", sensor, True)])
  lanes = LaneLog(path)
  assert len(lanes.ids) == 20 and lanes.at(FRAME_ID_OFFSET - 20) == [] and len(lanes.at(FRAME_ID_OFFSET + 25)) > 0
  view = render(world, 10 / 20, medmodel_intrinsics, 512, 256)
  points = project_lines(lanes.at(FRAME_ID_OFFSET + 10), medmodel_intrinsics, 256, 512, spacing=8)
  ij = points.astype(int)
  paint = view.semantic == 2
  near = np.array(
    [paint[max(0, y - 6) : y + 7, max(0, x - 12) : x + 13].any() for x, y in ij]
  )  # the model's noise: 0.03 m, 12 px at the bottom
  assert len(points) > 20 and near.mean() > 0.5  # dashed lines have gaps, cars stand before them


def test_lane_log_of_a_real_drive(shared_data):
  lanes = LaneLog(shared_data / "realdata" / "0000002c--d68dde99ca--1" / "qlog.zst")
  assert len(lanes.ids) == 120 and np.median(np.diff(lanes.ids)) == 10
  found = [lanes.at(i) for i in lanes.ids]
  points = [project_lines(lines, medmodel_intrinsics, 256, 512) for lines in found if lines]
  assert len(points) > 30 and np.median([len(p) for p in points]) >= 5
  assert all((p[:, 1] > 40).all() for p in points)  # below the horizon, up to a hill


def test_trackers_and_the_openpilot_teacher_read_the_same_lines(shared_data):
  log = shared_data / "realdata" / "0000002c--d68dde99ca--1" / "qlog.zst"
  lanes, teacher = LaneLog(log), load_teacher("openpilot")
  compared = 0
  for frame_id in lanes.ids[::10]:
    table = teacher.label(Clip(np.zeros((1, 0), np.uint8), frame_ids=[frame_id], times=[0], log_path=log))[0]["lines"]
    sure = (table["cls"] != LINES.index("path")) & (table["score"] >= 0.5)
    at = np.stack([table[k][sure] for k in ("road_x", "road_y", "road_z")], 1)
    for line in lanes.at(frame_id):
      near = line[(line[:, 0] > 1) & (line[:, 0] < 60)]
      mine = [
        np.interp(near[:, 0], p[:, 0], p[:, 1])
        for c in np.unique(table["cls"][sure])
        for p in [at[table["cls"][sure] == c]]
        if len(p) > 1
      ]
      if len(near) > 5:
        assert (
          min(np.abs(m - near[:, 1])[near[:, 0] < 40].max() for m in mine) < 0.1
        )  # 33 points over 10 s, 61 over 6 s
        compared += 1
  assert compared > 5


def test_road_grid_is_road():
  grid = road_grid(256, 512, medmodel_intrinsics, 16)
  depth = 910 * 1.22 / (grid[:, 1] - 47.6)
  assert (
    len(grid) > 200
    and (depth <= 60).all()
    and (depth > 0).all()
    and (np.abs((grid[:, 0] - 256) / 910 * depth) <= 8).all()
  )
  ground = np.stack([depth, (grid[:, 0] - 256) / 910 * depth, np.full(len(grid), 1.22)], 1)
  np.testing.assert_allclose(project(ground, medmodel_intrinsics)[0], grid, atol=1e-9)
  assert (road_grid(100, 100)[:, 1] > 40).all()


# *** following them ***


def test_sample():
  field = np.stack(
    np.meshgrid(np.arange(7.0), np.arange(5.0))
  )  # its own coordinates: bilinear sampling gives them back
  points = np.array([[0, 0], [6, 4], [2.25, 3.5], [5.999, 0.001], [-3, 9]])
  np.testing.assert_allclose(sample(field, points), np.clip(points, 0, [6, 4]))


@pytest.mark.parametrize("scale", [1, 2])
def test_tracks_a_pan_and_loses_what_leaves(weights, scale):
  video = panning_video(6, dx=7, dy=-3)
  points = np.array([[30.0, 60.0], [60.5, 50.25], [110.0, 40.0], [64.0, 88.0]])
  tracks, visible = LaneTracker(weights, device="cpu", scale=scale).track_lane_points(video, points)
  assert tracks.shape == (6, 4, 2) and tracks.dtype == np.float32 and visible.shape == (6, 4) and visible.dtype == bool
  true = points[None] + np.arange(6)[:, None, None] * np.array([7, -3])
  there = np.array([inside(t, H, W) for t in true])
  assert not there[3:, 2].any() and there[:, [0, 1]].all()
  assert (visible[:, :2] == there[:, :2]).all() and not visible[3:, 2].any() and visible[0].all()
  assert np.linalg.norm(tracks - true, axis=2)[visible].max() < 1.0
  assert (tracks[3:, 2] == tracks[2, 2]).all()  # stays where it was seen last


def test_covered_points_are_not_visible(weights):
  """A textured square slides over half of the points."""
  video = panning_video(5, dx=2, dy=0)
  square = texture(60, 60, seed=9).astype(np.uint8)
  for i in range(1, 5):
    video[i, :, 20:80, 8 * i : 8 * i + 60] = square
  points = np.array([[40.0, 40.0], [50.0, 60.0], [105.0, 30.0], [110.0, 85.0]])
  _, visible = LaneTracker(weights, device="cpu").track_lane_points(video, points)
  assert visible[:, 2:].all() and not visible[-1, :2].any()


def test_tensors_for_tensors_and_bad_input(weights):
  tracker = LaneTracker(weights, device="cpu", iters=2)
  tracks, visible = tracker.track_lane_points(torch.from_numpy(panning_video(2, 1, 1)), torch.tensor([[50.0, 50.0]]))
  assert torch.is_tensor(tracks) and tracks.shape == (2, 1, 2) and visible.dtype == torch.bool
  tracks, visible = tracker.track_lane_points(panning_video(3, 1, 1), np.zeros((0, 2)))
  assert tracks.shape == (3, 0, 2) and visible.shape == (3, 0)
  with pytest.raises(UserError, match="uint8"):
    tracker.track_lane_points(np.zeros((2, 3, 64, 64)), np.zeros((1, 2)))
  with pytest.raises(UserError, match=r"\(N, 2\)"):
    tracker.track_lane_points(np.zeros((2, 3, 64, 64), np.uint8), np.zeros((1, 3)))


# *** the teacher ***


def raft_teacher(weights, **options):
  return load_teacher("raft-tracker", weights, device="cpu", iters=3, **options)


def label_in_clips(teacher, video, cuts, through_disk=None):
  tables, state, start = [], None, 0
  for n in cuts:
    labels, state = teacher.label(Clip(video[start : start + n]), state)
    table = labels["points"]
    table["frame"] = table["frame"] + start
    tables.append(table)
    start += n
    if through_disk is not None:
      np.savez(through_disk, **state)
      with np.load(through_disk) as z:
        state = dict(z)
  assert start == len(video)
  return {k: np.concatenate([t[k] for t in tables]) for k in tables[0]}, state


def test_clips_cut_anyhow_give_identical_labels(weights, tmp_path):
  video = panning_video(9, dx=6, dy=4)
  teacher = raft_teacher(weights, max_age=5)
  teacher.prepare(H, W)
  whole, end = label_in_clips(teacher, video, [9])
  assert len(whole["frame"]) > 50 and teacher.stateful
  for cuts in ([1] * 9, [4, 5], [2, 0, 6, 1]):
    parts, end_parts = label_in_clips(raft_teacher(weights, max_age=5), video, cuts, tmp_path / "state.npz")
    for k in whole:
      assert whole[k].dtype == parts[k].dtype and (whole[k] == parts[k]).all(), (cuts, k)
    assert end.keys() == end_parts.keys() and all((end[k] == end_parts[k]).all() for k in end)


def test_table_of_tracks(weights):
  video = panning_video(8, dx=6, dy=4)
  table, state = label_in_clips(raft_teacher(weights, max_age=6, spacing=16), video, [8])
  assert set(table) == {"frame", "track", "x", "y", "visible", "cls"} and len({len(v) for v in table.values()}) == 1
  first_frames = []
  for track in np.unique(table["track"]):
    rows = table["track"] == track
    frames, visible = table["frame"][rows], table["visible"][rows]
    assert (
      (np.diff(frames) == 1).all() and len(frames) <= 6 and visible[:-1].all()
    )  # unbroken, and lost at most once, at its end
    first_frames.append(frames[0])
    step = np.diff(np.stack([table["x"][rows], table["y"][rows]], 1)[visible], axis=0)
    assert (np.abs(step - [6, 4]) < 1.5).all()
  assert max(first_frames) > 0  # new ones came where old ones went
  assert len(np.unique(table["track"])) == state["next_track"] and state["age"].max() < 5
  xy = np.stack([table["x"], table["y"]], 1)
  assert inside(xy[table["visible"]], H, W).all()


def test_own_seeds_and_settings(weights):
  def seeds(clip, i):
    return np.array([[40.0, 40.0], [41.0, 41.0], [500.0, 1.0]]), np.array([LANE, LANE, ROAD])

  teacher = raft_teacher(weights, seeds=seeds)
  labels, _ = teacher.label(Clip(panning_video(2, 0, 0)), None)
  table = labels["points"]
  assert table["cls"].tolist() == [LANE, LANE] and table["frame"].tolist() == [
    0,
    1,
  ]  # the second is too near, the third outside
  settings = teacher.settings()
  assert (
    settings["points"].endswith("seeds")
    and settings["iters"] == 3
    and settings["precision"] == "float32"
    and settings["scale"] == 1
  )
  assert raft_teacher(weights).settings() != settings
  with pytest.raises(UserError, match="not known"):
    raft_teacher(weights, points="everywhere")
  with pytest.raises(UserError, match="at least 64x64"):
    teacher.prepare(40, 200)


def test_lanes_of_the_log_come_first(weights, tmp_path):
  world = World(5, "day", 3.0)
  config, sensor = CAMERAS["mici"]
  path = tmp_path / "rlog.zst"
  write_log(path, [dat for _, dat in segment_messages(world, 0, 0, 20, config, "mici", sensor, True)])
  clip = Clip(np.zeros((1, 3, 256, 512), np.uint8), medmodel_intrinsics, np.zeros(3), [FRAME_ID_OFFSET + 3], [0], path)
  labels, _ = raft_teacher(weights).label(clip, None)
  cls = labels["points"]["cls"]
  assert (cls == LANE).sum() > 10 and (cls == ROAD).sum() > 10 and (np.diff(cls) <= 0).all()
  assert (raft_teacher(weights, points="grid").label(clip, None)[0]["points"]["cls"] == ROAD).all()
  assert (raft_teacher(weights, points="lanes").label(clip, None)[0]["points"]["cls"] == LANE).all()


class Stripes:
  """A segmenter whose markings stand at given columns of its own 64x128 map, and move with the first pixel of the
  frame."""

  name, model_id, checkpoint_hash, license, stateful = "stripes", "stripes.onnx", "2" * 64, "DINOv3", False

  def __init__(self, maps=("drivable", "lanes")):
    self.maps, self.labels, self.asked = maps, [], 0

  def prepare(self, height, width):
    self.size, self.labels = (
      [height, width],
      [Label(m, "dense", "float16", (64, 128), "probability") for m in self.maps],
    )

  def settings(self):
    return {"size": self.size}

  def label(self, clip, state=None):
    assert list(clip.rgb.shape) == [1, 3, *self.size]
    self.asked += 1
    p = np.zeros((1, 64, 128), np.float16)
    start = 20 + int(clip.rgb[0, 0, 0, 0])
    p[:, :, start : start + 2] = p[:, :, 80:82] = 0.9
    p[:, :, 100:110] = 0.4  # not sure
    return {m: p if m == self.maps[-1] else np.ones_like(p) for m in self.maps}, None


def test_lanes_of_a_segmentation(weights):
  """Its own map's pixels -> the frame's, for every frame at which points start; provenance and key know who saw the
  markings."""
  stripes, asked = Stripes(), []

  def load(name, path=None, **options):
    asked.append((name, path, options))
    return stripes

  def teacher(**options):
    return raft_teacher(
      weights,
      load=load,
      segmenter="stripes",
      segmenter_weights="w",
      **{"points": "segmentation", "spacing": 16, **options},
    )

  video = panning_video(4, 0, 0)
  video[:, :, 0, 0] = 0
  video[1:, 0, 0, 0] = 10
  raft = teacher()
  assert asked == [("stripes", "w", {"device": "cpu"})]
  raft.prepare(H, W)
  seen = [raft.start_points(Clip(video), i) for i in range(2)]
  assert set(seen[0][0][:, 0]) == {20.5, 80.5} and set(seen[1][0][:, 0]) == {
    30.5,
    80.5,
  }  # the map is as wide as the frame
  assert (seen[0][1] == LANE).all() and np.ptp(seen[0][0][:, 1]) > 0.8 * H
  big = teacher().start_points(Clip(np.zeros((1, 3, 2 * H, 2 * W), np.uint8)), 0)[0]
  assert np.abs(big[:, :1] - [41.5, 161.5]).min(1).max() <= 0.5  # pixel centers: 2 (x + 0.5) - 0.5
  whole, _ = label_in_clips(teacher(), video, [4])
  parts, _ = label_in_clips(teacher(), video, [1, 2, 1])
  assert len(whole["frame"]) > 10 and all((whole[k] == parts[k]).all() for k in whole)
  assert (np.abs(whole["x"][whole["frame"] == 1] - 30.5) < 0.1).any()
  both = teacher(points="segmentation+grid")
  cls = both.label(Clip(video))[0]["points"]["cls"]
  assert (cls == LANE).any() and (cls == ROAD).any()
  plain = raft_teacher(weights)
  assert raft.license == "DINOv3" and raft.checkpoint_hash not in (plain.checkpoint_hash, stripes.checkpoint_hash)
  assert raft.model_id == "raft-small.pth + stripes.onnx"
  settings = raft.settings()
  assert (
    settings["segmenter"] == {"name": "stripes", "checkpoint": "2" * 64, "settings": {"size": [H, W]}}
    and settings["points"] == "segmentation"
  )
  assert "segmenter" not in plain.settings() and plain.license == "BSD-3-Clause"
  stripes.maps = ("one", "two")
  with pytest.raises(UserError, match="no map of lane markings"):
    teacher().prepare(H, W)


def test_lanes_that_twinlitenet_sees_on_real_roads(shared_data, weights):
  """TuSimple's frames and their labeled lanes. Where nobody painted between two dashes, labelers drew on; and they
  label four or five lanes, not all."""
  net, folder = shared_data / "weights" / "twinlitenet.onnx", shared_data / "tusimple"
  if not net.exists() or not folder.is_dir():
    pytest.skip(f"no {net.name} or no tusimple in {shared_data}")
  raft = raft_teacher(weights, points="segmentation", segmenter_weights=str(net))
  raft.prepare(256, 512)
  assert raft.settings()["segmenter"]["name"] == "twinlitenet" and raft.license == "BSD-3-Clause"
  for path in sorted((folder / "image").glob("*.png")):
    rgb = cv2.resize(cv2.imread(str(path))[..., ::-1], (512, 256), interpolation=cv2.INTER_AREA)
    truth = (
      cv2.resize(
        cv2.imread(str(folder / "gt_binary_image" / path.name), cv2.IMREAD_GRAYSCALE),
        (512, 256),
        interpolation=cv2.INTER_AREA,
      )
      > 0
    )
    near = cv2.dilate(truth.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
    points, cls = raft.start_points(Clip(rgb.transpose(2, 0, 1)[None]), 0)
    ij = np.round(points).astype(int)
    print(path.name, len(points), near[ij[:, 1], ij[:, 0]].mean(), near.mean())
    assert len(points) >= 10 and (cls == LANE).all() and near[ij[:, 1], ij[:, 0]].mean() > 0.9 > 6 * near.mean()


def test_seeding_respects_spacing_and_limit():
  points = Points()
  candidates = np.random.default_rng(0).uniform(0, 100, (300, 2))
  points.seed(candidates, np.zeros(300, np.int64), 10, 20)
  assert len(points.xy) == 20 == points.next_track
  gaps = np.sqrt(((points.xy[:, None] - points.xy[None]) ** 2).sum(-1)) + np.eye(20) * 99
  assert gaps.min() >= 10
  points.keep(np.arange(20) % 2 == 0)
  assert points.seed(candidates, np.zeros(300, np.int64), 10, 20) == 10 and points.track.tolist() == [
    *range(0, 20, 2),
    *range(20, 30),
  ]


def test_registry_entry():
  entry = TEACHERS["raft-tracker"]
  assert entry.license == "BSD-3-Clause" and entry.weights == "raft-small.pth"
  assert RaftTeacher.stateful

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from openpilot.common.transformations.camera import project
from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.common.transformations.orientation import rot_from_euler
from openpilot.selfdrive.modeld.fair.heads.objects import box_iou
from openpilot.tools.fair.sam.motion import U, ObjectTracker, Tracks, covered_edges, to_boxes, to_measure
from openpilot.tools.fair.sam.track import TrackerTeacher, flow_of, looks_of
from openpilot.tools.fair.sam.turn import TurnLog, turned
from openpilot.tools.fair.teacher import Clip, Entry, Label
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.logwriter import write_log
from openpilot.tools.sim.messages import segment_messages
from openpilot.tools.sim.points import from_still
from openpilot.tools.sim.world import CAMERAS, World
from tests.bench.bench_object_tracker import Figures, follow, make_scene, without_memory

ENTRY = Entry("sam.track:TrackerTeacher", "", "MIT", "", "")
H, W = 256, 512


def run(frames, **options):
  """frames: of each the boxes -> identities of each."""
  tracker, t = ObjectTracker(**options), Tracks()
  return [
    tracker.update(t, np.reshape(b, (-1, 4)), np.ones(len(b)), np.zeros(len(b), np.int64), (H, W)).tolist()
    for b in frames
  ]


def in_space(n, x=-2.0, vx=0.0, z=30.0, vz=0.0, width=2.0, f=400.0):
  """The box of a thing of constant velocity in space, meters and meters a frame, as a pinhole camera sees it."""
  x, z = x + vx * n, z + vz * n
  u, v, w, h = W / 2 + f * x / z, 100 + f * 1.0 / z, f * width / z, f * 1.5 / z
  return [u - w / 2, v - h / 2, u + w / 2, v + h / 2]


def test_measures_and_iou():
  boxes = np.array([[1, 2, 11, 7], [3.5, 4, 5, 9]])
  np.testing.assert_allclose(to_boxes(to_measure(boxes)), boxes)
  # by hand: 5x5 of 50 and 25 in common; nothing in common
  np.testing.assert_allclose(box_iou(boxes[:1], np.array([[6, 2, 11, 7], [20, 20, 21, 21]])), [[0.5, 0.0]])


@pytest.mark.parametrize(
  "motion", [{"vx": 0.05}, {"vz": -0.4}, {"vx": 0.04, "vz": 0.6}, {"x": 4.0, "vx": -0.1, "vz": -0.2}]
)
def test_prediction_is_of_constant_velocity_in_space(motion):
  tracker, t, hidden = ObjectTracker(calm=1.0), Tracks(), 15
  for n in range(40):
    tracker.update(t, np.array([in_space(n, **motion)]), np.ones(1), np.zeros(1, np.int64))
  for _ in range(hidden):
    tracker.predict(t)
  want = to_measure(np.array([in_space(39 + hidden, **motion)]))[0]
  # of exact boxes: the rest is what the filter has not yet learned; a line in the picture would be off by more, see
  # below
  off = np.abs(t.mean[0, :3, 0] - want[:3])
  assert (off[:2] < 3).all() and off[2] < 0.08, off
  if motion == {"vz": -0.4}:
    before = [to_measure(np.array([in_space(n, **motion)]))[0] for n in (38, 39)]
    straight = before[1] + hidden * (before[1] - before[0])
    assert np.abs(straight - want)[0] > 3 * off[0]


@pytest.mark.parametrize("hidden", [5, 15, 40])
def test_identity_survives(hidden):
  gap = range(30, 30 + hidden)
  frames = [
    [b for n_hidden, b in ((gap, in_space(n, vx=0.03)), ((), in_space(n, x=5, vx=-0.02))) if n not in n_hidden]
    for n in range(50 + hidden)
  ]
  ids = run(frames)
  assert ids[0] == [0, 1] and ids[29] == [0, 1] and ids[30] == [1] and ids[30 + hidden :] == [[0, 1]] * 20


def test_identities_are_never_used_twice():
  here = [in_space(0)]
  ids = run([here] * 5 + [[]] * 61 + [here] * 5)
  assert ids[:5] == [[0]] * 5 and ids[-5:] == [[1]] * 5  # 61 frames unseen are one too many
  ids = run([here] * 5 + [[]] * 60 + [here] * 5)
  assert ids[-1] == [0]
  assert run([here] + [[]] * 2 + [here] * 2) == [[0], [], [], [1], [1]]  # a false alarm does not wait for 60 frames


def test_classes_and_scores():
  tracker, t, box = ObjectTracker(groups=np.array([0, 0, 1])), Tracks(), np.array([in_space(0)])

  def see(cls, score=1.0):
    return tracker.update(t, box, np.array([score]), np.array([cls]), (H, W)).tolist()

  assert see(0, 0.2) == [-1]  # too weak to begin
  assert [see(0), see(1), see(0, 0.2)] == [[0]] * 3  # but not to go on; and a detector may take a car for a truck
  assert see(2) == [1]


def test_looks_tell_who_comes_back():
  red, green = (np.eye(64)[[i]] for i in (5, 9))
  for then, want in ((red, 0), (green, 1)):
    tracker, t, box = ObjectTracker(), Tracks(), np.array([in_space(0)])
    for looks in (red,) * 5 + (None,) * 10 + (then,):
      boxes = box[: looks is not None]
      ids = tracker.update(
        t,
        boxes,
        np.ones(len(boxes)),
        np.zeros(len(boxes), np.int64),
        (H, W),
        None,
        np.zeros((0, 64)) if looks is None else looks,
      )
    assert ids.tolist() == [want]


def test_a_box_cut_by_something_before_it_stays_the_same():
  whole = np.array(in_space(0))
  cut = [
    [whole[0], whole[1], whole[0] + share * (whole[2] - whole[0]), whole[3]] for share in (1, 1, 1, 1, 1, 0.8, 0.6, 0.4)
  ]
  ids = run([[c] for c in cut] + [[]] * 10 + [[c] for c in reversed(cut)])
  assert {i for frame in ids for i in frame} == {0}


def test_what_comes_before_a_thing_does_not_push_it():
  """A tall box comes from the left at 6 px a frame, and a detector sees less and less of what stands behind: that does
  not flee to the right."""
  thing = np.array([200.0, 100, 260, 140])
  ends = []
  for told in (True, False):
    tracker, t = ObjectTracker(), Tracks()
    for n in range(28):
      edge = 100 + 6.0 * n
      seen = np.array([max(thing[0], edge), thing[1], thing[2], thing[3]])
      tall = [[edge - 200, 40, edge, 200]] if told else []
      boxes = np.array([*([seen] if seen[2] - seen[0] > 25 else []), *tall]).reshape(-1, 4)
      tracker.update(t, boxes, np.ones(len(boxes)), np.zeros(len(boxes), np.int64), (H, W))
    ends.append(t.mean[t.ids == 0][0, U, 1])
  assert abs(ends[0]) < 0.1 < ends[1]  # px a frame
  there, lorry = thing[None], np.array([[20.0, 40, 195, 200], [270, 40, 400, 200], [220, 40, 240, 90]])
  nearer = np.ones((1, 3), bool)
  # slack 2 + 5% of sqrt(175 * 160) = 10.4 px and of sqrt(130 * 160) = 9.2 px; the third stands above, over less than a
  # third of its height
  assert covered_edges(there, lorry, nearer).tolist() == [[True, False]]
  assert covered_edges(there, lorry - [[0, 0, 0, 0], [2, 0, 2, 0], [0, 0, 0, 0]], nearer).tolist() == [[True, True]]
  assert covered_edges(there, lorry, ~nearer).tolist() == [[False, False]]


@pytest.mark.parametrize(
  ("aside", "down", "taller", "want"), [(0, 0, 1, 0), (35, 0, 1, 0), (140, 0, 1, 1), (35, 35, 1, 1), (35, 0, 3, 1)]
)
def test_who_comes_back_elsewhere_is_known_by_height_and_place(aside, down, taller, want):
  """Unseen for 10 frames: 35 px to the side of where it was it is the same; not 140, nor lower on the road, nor three
  times as tall."""
  here = np.array([200.0, 100, 240, 130])
  x, y, h = here[0] + aside, here[1] + down, 30 * taller
  ids = run([[here]] * 20 + [[]] * 10 + [[[x, y + 30 - h, x + 40, y + 30]]])
  assert ids[-1] == [want]


def test_flow_and_looks():
  r = np.random.default_rng(0)
  picture = np.kron(r.integers(0, 255, (H // 4, W // 4)), np.ones((4, 4))).astype(np.uint8)
  tracker, t = ObjectTracker(), Tracks()
  tracker.update(t, np.array([[100, 60, 160, 110], [300, 100, 340, 130]]), np.ones(2), np.zeros(2, np.int64))
  moved, variance = flow_of(picture, np.roll(picture, (2, -3), (0, 1)), t)
  np.testing.assert_allclose(moved, [[-3, 2], [-3, 2]], atol=0.1)
  assert (variance < 4).all()
  moved, variance = flow_of(picture, r.integers(0, 255, (H, W), np.uint8), t)
  assert np.isinf(variance).all()  # nothing found again
  rgb = np.zeros((3, H, W), np.uint8)
  rgb[0, :, 256:] = 200
  looks = looks_of(rgb, np.array([[10, 10, 50, 50], [300, 10, 340, 50], [20, 90, 70, 120]], np.float64))
  np.testing.assert_allclose(looks @ looks.T, [[1, 0, 1], [0, 1, 0], [1, 0, 1]])


class Detector:
  """Of moving bright squares what a detector would say."""

  name, model_id, checkpoint_hash, license, stateful = "squares", "squares", "0" * 64, "MIT", False
  labels = [Label("found", "boxes", unit="px", classes=("car", "truck", "person"))]

  def prepare(self, height, width):
    pass

  def settings(self):
    return {"threshold": 128}

  def label(self, clip, state=None):
    rows = []
    for t, rgb in enumerate(clip.rgb):
      for k, cls in ((0, 0), (1, 2)):
        ys, xs = np.nonzero(rgb[k] > 128)
        if len(xs):
          rows.append((t, xs.min() - 0.5, ys.min() - 0.5, xs.max() + 0.5, ys.max() + 0.5, 0.9, cls))
    columns = np.array(rows, np.float32).reshape(-1, 7).T
    return {"found": dict(zip(("frame", "x0", "y0", "x1", "y1", "score", "cls"), columns, strict=True))}, None


def video(n=40):
  rgb = np.zeros((n, 3, 64, 96), np.uint8)
  rgb[:, 2] = np.random.default_rng(1).integers(0, 100, (64, 96))
  for t in range(n):
    if not 12 <= t < 20:
      rgb[t, 0, 20:34, 5 + t : 20 + t] = 200
    rgb[t, 1, 40:50, 80 - t : 90 - t] = 220
  return rgb


def teacher(monkeypatch, **options):
  monkeypatch.setattr("openpilot.tools.fair.sam.track.load_teacher", lambda *a, **k: Detector())
  return TrackerTeacher("t", ENTRY, Path("x"), **options)


@pytest.mark.parametrize("flow", [True, False])
def test_labels_in_pieces_are_those_of_an_unbroken_run(flow, monkeypatch):
  rgb, tracker = video(), teacher(monkeypatch, flow=flow)
  tracker.prepare(64, 96)
  want = tracker.label(Clip(rgb))[0]["boxes"]
  assert np.unique(want["track"]).tolist() == [0, 1] and len(want["frame"]) == 40 + 32
  assert want["track"].dtype == np.int64 and want["cls"].dtype == np.int16 and want["x0"].dtype == np.float32
  for size in (1, 7, 13):
    other, state, parts = teacher(monkeypatch, flow=flow), None, []
    for start in range(0, 40, size):
      labels, state = other.label(Clip(rgb[start : start + size]), state)
      assert all(isinstance(v, np.ndarray) for v in state.values())
      parts.append({k: v + start if k == "frame" else v for k, v in labels["boxes"].items()})
    for k, v in want.items():
      np.testing.assert_array_equal(np.concatenate([p[k] for p in parts]), v)


def test_settings_and_bad_input(monkeypatch):
  tracker = teacher(monkeypatch, lost_after=20)
  tracker.prepare(64, 96)
  settings = json.loads(json.dumps(tracker.settings()))
  assert (
    settings["tracker"]["lost_after"] == 20
    and settings["detector"]["settings"] == {"threshold": 128}
    and settings["size"] == [64, 96]
  )
  assert (
    settings["tracker"]["groups"][0] == settings["tracker"]["groups"][1] != settings["tracker"]["groups"][2]
  )  # cars are taken for trucks
  _, state = tracker.label(Clip(video(2)))
  with pytest.raises(UserError, match="begin again"):
    tracker.label(Clip(np.zeros((1, 3, 32, 96), np.uint8)), state)
  with pytest.raises(UserError, match="memory"):
    teacher(monkeypatch, memory=3)
  monkeypatch.setattr(Detector, "labels", [Label("depth", "dense")])
  with pytest.raises(UserError, match="gives no boxes"):
    teacher(monkeypatch).prepare(64, 96)


@pytest.mark.slow
def test_identity_behind_a_lorry_in_the_simulator():
  """A world in which the constants were chosen, so this shows that nothing broke; how good it is
  tests/bench/bench_object_tracker.py says, on others."""
  for hidden, seed, least in ((5, 2, 0.8), (15, 2, 0.6), (40, 2, 0.5)):
    scene, figures = make_scene(seed, hidden), {}
    for name, way in (("tracker", lambda s: follow(s, False, True)), ("no memory", without_memory)):
      figures[name] = Figures()
      figures[name].add(scene, way(scene), hidden)
    ours, other = figures["tracker"], figures["no memory"]
    assert ours.hidden >= 3 and ours.kept >= least * ours.hidden and other.kept == 0
    assert ours.idf1[0] > other.idf1[0] + 0.1 and ours.switches < other.switches


def test_turns_of_the_camera_are_taken_out():
  """A still thing, hidden while the camera turns into a bend: 0.25 rad/s come on within half a second, at 20 Hz."""
  k = np.array([[400.0, 0, W / 2], [0, 400.0, 100], [0, 0, 1]])
  rates = np.interp(np.arange(45), [25, 35], [0, 0.25]) / 20
  heading = np.cumsum(rates)

  def seen(n):  # a thing 60 m ahead, 2 m wide, 1.5 m high
    angle = 0.1 - heading[n]
    x, z = 60 * np.sin(angle), 60 * np.cos(angle)
    u, w, h = W / 2 + 400 * x / z, 800 / z, 600 / z
    return [u - w / 2, 110 - h / 2, u + w / 2, 110 + h / 2]

  ends = []
  for told in (True, False):
    tracker, t = ObjectTracker(), Tracks()
    for n in range(45):
      boxes = np.array([seen(n)] if not 26 <= n < 44 else np.zeros((0, 4)))
      way = turned(np.array([0, 0, rates[n]]), k) if told else None
      ids = tracker.update(t, boxes, np.ones(len(boxes)), np.zeros(len(boxes), np.int64), (H, W), turn=way)
    ends.append(ids.tolist())
  assert ends == [[0], [1]]
  assert seen(25)[0] - seen(44)[0] > 60  # pixels, against a box of 13


def test_turned_is_the_geometry_of_the_simulator():
  """Directions of places far away, in the frames of two poses that differ by a turn only."""
  places = np.array([[3000.0, 400, -50], [5000, -900, 20], [2000, 10, 300]])
  pixels = [project(from_still(places, (0.0, 0.0, h)), medmodel_intrinsics)[0] for h in (0.02, 0.05)]
  p = np.c_[pixels[0], np.ones(3)] @ turned(np.array([0, 0, 0.03]), medmodel_intrinsics).T
  np.testing.assert_allclose(p[:, :2] / p[:, 2:], pixels[1], atol=1e-6)


def test_turned_of_the_cameras_own_picture():
  """The same of a camera that looks down and aside, whose pixels no calibration has warped."""
  places = np.array([[3000.0, 400, -50], [5000, -900, 20], [2000, 10, 300]])
  rpy = np.array([0.01, -0.06, 0.08])
  pixels = [
    project(from_still(places, (0.0, 0.0, h)) @ rot_from_euler(rpy).T, medmodel_intrinsics)[0] for h in (0.02, 0.05)
  ]
  p = np.c_[pixels[0], np.ones(3)] @ turned(np.array([0, 0, 0.03]), medmodel_intrinsics, rpy).T
  np.testing.assert_allclose(p[:, :2] / p[:, 2:], pixels[1], atol=1e-6)


def test_turn_log_of_a_simulated_drive(tmp_path):
  world = World(5, "day", 3.0)
  config, sensor = CAMERAS["mici"]
  write_log(tmp_path / "rlog.zst", [dat for _, dat in segment_messages(world, 0, 0, 40, config, "mici", sensor, True)])
  log = TurnLog(tmp_path / "rlog.zst")
  assert len(log.times) == 40
  first, last = int(log.times[0]), int(log.times[-1])
  steps = [log.between(a, b) for a, b in pairwise(np.linspace(first, last, 40).astype(np.int64).tolist())]
  true = np.trapezoid([world.motion(k / 20)[1][2] for k in range(40)], dx=1 / 20)
  assert abs(np.sum(steps, axis=0)[2] - true) < 4 * 0.001 / 20 * np.sqrt(40)  # the message's noise, 0.001 rad/s
  assert log.between(last + 3_000_000_000, last + 3_050_000_000) is None

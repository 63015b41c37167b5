"""The simulator's truth as labels: what is stored is what was rendered, and points move as geometry says."""

import json
import shutil

import numpy as np
import pytest

from openpilot.tools.fair.labels.dataset import LabelDataset
from openpilot.tools.fair.labels.labeling import FrameTeacher, run_teacher
from openpilot.tools.fair.labels.sources.routes import find_views
from openpilot.tools.fair.labels.browse import statistics
from openpilot.tools.fair.labels.meta import CHUNK
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.simulator.teacher import CLEARANCE, LEAST, LIFE, MOST, POINTS, SimulatorTeacher
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Clip
from openpilot.tools.lib.errors import UserError
from openpilot.tools.sim.messages import FRAME_ID_OFFSET
from openpilot.tools.sim.render import CLASSES
from openpilot.tools.sim.truth import Truth, map_labels
from openpilot.tools.sim.world import World
from openpilot.tools.sim.write_route import Drive, write_routes

pytestmark = pytest.mark.slow  # 78 frames are rendered first
FRAMES = CHUNK + 6  # two chunks
LONG = Drive(5, FRAMES / 20, "mici", "day", "clear", True)
SHORT = Drive(24, 0.4, "mici", "day", "rain", True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  out = tmp_path_factory.mktemp("sim")
  write_routes(out, [LONG, SHORT], jobs=2)
  return [out / f"{d.name}--0" for d in (LONG, SHORT)]


@pytest.fixture(scope="module")
def views(folders):
  return find_views([str(f) for f in folders], None, "qcamera", 1, None)


@pytest.fixture(scope="module")
def groups(views, tmp_path_factory):
  store = LabelStore(tmp_path_factory.mktemp("labels") / "store", create=True)
  run_teacher(FrameTeacher(), views, store, progress=False)
  return run_teacher(load_teacher("simulator"), views, store, progress=False)


def rows(group, name):
  """Per row of the group, that row's columns."""
  table = group.table(name).to_pydict()
  at = np.array(table["row"])
  return [{k: [v[i] for i in np.flatnonzero(at == r)] for k, v in table.items()} for r in range(group.n)]


def test_maps_are_those_of_the_truth(groups, folders):
  for group, folder in zip(groups, folders, strict=True):
    truth = Truth(folder)
    assert group.frames["frame_id"].to_pylist() == list(range(FRAME_ID_OFFSET, FRAME_ID_OFFSET + truth.frame_count))
    assert group.row_count == truth.frame_count and group.label("segmentation").classes == CLASSES
    for i in range(0, truth.frame_count, 7):
      f = truth.frame(i)
      depth, classes = map_labels(f.depth, f.semantic)
      assert (group.dense("depth")[i] == depth).all() and (group.dense("segmentation")[i] == classes).all()
    assert np.isinf(group.dense("depth")[0]).any() and group.dense("depth")[0].min() > 1  # the sky is infinitely far
    said = statistics(group, group.label("depth"))
    assert "that are finite" in said and "nan" not in said and "inf," not in said
    assert group.meta["source"]["weather"] == truth.info["weather"] and group.meta["teacher"]["licence"] == "MIT"


def test_boxes_masks_and_identities_are_those_of_the_truth(groups, folders):
  hidden = 0
  for group, folder in zip(groups, folders, strict=True):
    truth, table = Truth(folder), rows(group, "objects")
    for i in range(0, truth.frame_count, 5):
      r, f = table[i], truth.frame(i)
      assert set(r["track"]) == set(np.unique(f.instance)) - {0}
      masks = rle.decode(r["rle"], 256, 512)
      np.testing.assert_array_equal(
        rle.boxes_of(masks), np.array([r[c] for c in ("x0", "y0", "x1", "y1")], np.float32).T.reshape(-1, 4)
      )
      known = {o["id"]: o for o in truth.objects(i)}
      for k, track in enumerate(r["track"]):
        assert (masks[k] == (f.instance == track)).all()
        o = known[track]
        assert ("vehicle", "pedestrian")[r["cls"][k]] == o["cls"] and r["score"][k] == 1.0
        assert r["visible_fraction"][k] == pytest.approx(o["visible_fraction"]) and r["occluded"][k] == o["occluded"]
        assert [r[c][k] for c in ("road_x", "road_y", "road_z")] == pytest.approx(o["position"], abs=1e-4)
        hidden += o["visible_fraction"] < 0.8
  assert hidden


def test_points_move_as_geometry_says(groups):
  """Against the road's coordinates at both moments (World.to_ego), and the ray through the first pixel meeting a plane:
  nothing of the teacher's."""
  for group, drive in zip(groups, (LONG, SHORT), strict=True):
    world, table = World(drive.seed, drive.time_of_day, drive.seconds), rows(group, "points")
    tracks: dict[int, list[tuple[int, float, float]]] = {}
    for i, r in enumerate(table):
      for track, x, y in zip(r["track"], r["x"], r["y"], strict=True):
        tracks.setdefault(track, []).append((i, x, y))
    anchors = []
    s = 25.0
    for i in range(group.n):
      x, y, h = (float(v) for v in world.to_ego(i / 20, world.ego(0.0)["s"] + s, 0.0))
      anchors.append((np.array([x, y]), np.array([[np.cos(h), -np.sin(h)], [np.sin(h), np.cos(h)]])))
    assert len(tracks) > 50
    for seen in tracks.values():
      i0, u, v = seen[0]
      assert (u, v) == (round(u), round(v))  # they begin at a pixel's center
      z = world.camera_height * 910 / (v - 47.6)
      in_road = anchors[i0][1].T @ (np.array([z, (u - 256) / 910 * z]) - anchors[i0][0])
      assert [i for i, _, _ in seen] == list(range(i0, i0 + len(seen))) and min(LEAST + 1, group.n - i0) <= len(
        seen
      ) <= LIFE[1]
      for i, x, y in seen:
        p = anchors[i][0] + anchors[i][1] @ in_road
        # float32 pixels
        assert np.hypot(x - (256 + 910 * p[1] / p[0]), y - (47.6 + 910 * world.camera_height / p[0])) < 1e-3
    assert max(len(t) for t in tracks.values()) > min(LIFE[0], group.n - 1)


def test_points_lie_on_what_they_say_and_keep_apart(groups, folders):
  on_lane = lanes = unseen = 0
  for group, folder in zip(groups, folders, strict=True):
    truth, known = Truth(folder), set()
    for i, r in enumerate(rows(group, "points")):
      f = truth.frame(i)
      assert 20 < len(r["track"]) <= MOST and len(set(r["track"])) == len(r["track"])
      x, y = np.round(r["x"]).astype(int), np.round(r["y"]).astype(int)
      visible, cls, p = np.array(r["visible"]), np.array(r["cls"]), np.stack([r["x"], r["y"]], 1)
      assert not f.instance[y[visible], x[visible]].any()  # nobody stands before them
      ground = truth.info["camera_height"] * 910 / (y - 47.6)
      assert ((np.abs(f.depth[y, x] / ground - 1) >= 0.01) | (f.instance[y, x] > 0))[~visible].all()
      unseen += (~visible).sum()
      new = np.array([t not in known for t in r["track"]])
      names = np.array([CLASSES[k] for k in f.semantic[y, x]])
      assert visible[new].all() and (names[new] == np.array(POINTS)[cls[new]]).all()
      for k in np.flatnonzero(new):
        others = (cls == cls[k]) & (np.arange(len(cls)) != k)
        assert np.hypot(*(p[others] - p[k]).T).min() >= CLEARANCE - 1e-3
      old = visible & ~new & (cls == POINTS.index("lane"))
      near = [
        (f.semantic[max(0, b - 1) : b + 2, max(0, a - 1) : a + 2] == CLASSES.index("lane")).any()
        for a, b in zip(x[old], y[old], strict=True)
      ]
      on_lane, lanes = on_lane + sum(near), lanes + len(near)
      known |= set(r["track"])
  # paint that the ray-caster draws stays below points found on paint frames ago; what is left is worn paint thinner
  # than a pixel
  assert lanes > 200 and on_lane / lanes > 0.97 and unseen


def test_a_stopped_run_goes_on_as_if_unbroken(views, groups, tmp_path):
  class Stops(SimulatorTeacher):
    calls = 0

    def label(self, clip, state=None):
      self.calls += 1
      if self.calls > CHUNK // 8:
        raise KeyboardInterrupt
      return super().label(clip, state)

  store, whole = LabelStore(tmp_path / "s", create=True), load_teacher("simulator")
  from openpilot.tools.fair.registry import TEACHERS

  with pytest.raises(KeyboardInterrupt):
    run_teacher(Stops("simulator", TEACHERS["simulator"], None), views, store, progress=False)
  assert store.groups()[0].done() == {0}
  again = run_teacher(whole, views, store, batch=3, progress=False)
  for a, b in zip(again, groups, strict=True):
    assert a.path.name == b.path.name and a.row_count == b.n
    for name in ("objects", "points"):
      assert a.table(name).equals(b.table(name))
    for name in ("depth", "segmentation"):
      assert (a.dense(name)[:] == b.dense(name)[:]).all()


def test_labels_read_back_beside_the_frames(groups):
  data = LabelDataset(
    groups[0].path.parent.parent,
    ["frames/frame", "simulator/depth", "simulator/segmentation", "simulator/objects", "simulator/points"],
  )
  assert len(data) == FRAMES + 8
  item = data[3]
  assert item["simulator/depth"].shape == (64, 128) and item["simulator/segmentation"].dtype == np.uint8
  assert {"x0", "track", "rle", "visible_fraction", "road_x"} <= item["simulator/objects"].keys() and len(
    item["simulator/points"]["x"]
  ) > 20


def test_other_truth_is_another_key_and_bad_truth_is_said(folders, tmp_path):
  copy = tmp_path / folders[1].name
  shutil.copytree(folders[1], copy)
  (view,) = find_views([str(copy)], None, "qcamera", 1, None)
  teacher = load_teacher("simulator")
  assert (
    teacher.source(view.segment)["truth"]
    == teacher.source(find_views([str(folders[1])], None, "qcamera", 1, None)[0].segment)["truth"]
  )

  def fresh(name, change):
    folder = tmp_path / name / folders[1].name
    shutil.copytree(folders[1], folder)
    path = folder / "truth" / "truth.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))
    return find_views([str(folder)], None, "qcamera", 1, None)

  store = LabelStore(tmp_path / "store", create=True)
  run_teacher(teacher, [view], store, progress=False)
  run_teacher(
    teacher, fresh("other", lambda i: i.update(camera_height=i["camera_height"] + 0.1)), store, progress=False
  )
  assert len(store.groups()) == 2
  with pytest.raises(UserError, match="earlier version, without poses"):
    run_teacher(teacher, fresh("old", lambda i: i.pop("pose")), store, progress=False)
  with pytest.raises(UserError, match="log and truth differ"):
    run_teacher(teacher, fresh("shifted", lambda i: i.update(frame_id_offset=5000)), store, progress=False)
  with pytest.raises(UserError, match="classes"):
    run_teacher(teacher, fresh("classes", lambda i: i.update(classes=["road"])), store, progress=False)
  bare = tmp_path / "bare" / folders[1].name
  shutil.copytree(folders[1], bare, ignore=shutil.ignore_patterns("truth"))
  with pytest.raises(UserError, match="only simulated routes have it"):
    run_teacher(teacher, find_views([str(bare)], None, "qcamera", 1, None), store, progress=False)
  with pytest.raises(UserError, match="leave this teacher out"):
    teacher.label(Clip(np.zeros((1, 0), np.uint8), frame_ids=[137]))

import filecmp
import json

import numpy as np
import pytest

from openpilot.cereal import log
from openpilot.cereal.visionipc import nv12_info
from openpilot.common.transformations.camera import project
from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.selfdrive.modeld.fair.frames import ModelFrame, camera_intrinsics
from openpilot.tools.lib.encode_index import encode_index
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.framereader import FrameReader
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.route import Route
from openpilot.tools.sim.layout import SURROUNDINGS
from openpilot.tools.sim.messages import START_NS, segment_messages
from openpilot.tools.sim.render import CLASSES, render
from openpilot.tools.sim.truth import Truth, map_labels
from openpilot.tools.sim.world import CAMERAS, World, actor_boxes
from openpilot.tools.sim.write_route import Drive, parse_height, write_route

ROAD, LANE, VEHICLE = CLASSES.index("road"), CLASSES.index("lane"), CLASSES.index("vehicle")


def view(world, t, **kw):
  return render(world, t, medmodel_intrinsics, 512, 256, **kw)


@pytest.mark.parametrize("rpy", [(0.0, 0.0, 0.0), (0.02, -0.03, 0.04)])
def test_depth_of_the_ground_is_exact(rpy):
  """Against float64 ray and plane; the ray-caster divides in float32, so 1e-5 relative beyond the horizon's immediate
  neighborhood."""
  from openpilot.common.transformations.orientation import rot_from_euler

  world = World(5, "day", 10.0)
  f = view(world, 2.0, rpy=rpy)
  u, v = np.meshgrid(np.arange(512), np.arange(256))
  ray = np.stack([(u - 256) / 910, (v - 47.6) / 910, np.ones(u.shape)], -1)
  calib = ray @ (rot_from_euler(rpy).T @ np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0.0]])).T
  with np.errstate(divide="ignore"):
    want = world.camera_height / calib[..., 2]
  on_road = np.isin(f.semantic, [ROAD, LANE]) & (want < 150)
  assert on_road.sum() > 20_000
  np.testing.assert_allclose(f.depth[on_road], want[on_road], rtol=2e-5)


@pytest.mark.parametrize("surroundings", ["open", "narrow", "queue"])
def test_depth_of_boxes_is_exact(surroundings):
  """Every vehicle pixel against an independent float64 slab test over that vehicle's boxes."""
  checked = 0
  for seed in range(3, 9):
    world = World(seed, "day", 10.0, surroundings=surroundings)
    f = view(world, 1.0)
    for o in world.objects(1.0):
      ys, xs = np.nonzero((f.instance == o["id"]) & (f.semantic == VEHICLE))
      if len(ys) < 50:
        continue
      pick = np.random.default_rng(0).choice(len(ys), 40, replace=False)
      for x, y in zip(xs[pick], ys[pick], strict=True):
        d = np.array([1.0, (x - 256) / 910, (y - 47.6) / 910])
        best = np.inf
        for b in actor_boxes(o, 0.0):
          c, s = np.cos(b[2]), np.sin(b[2])
          to_box = np.array([[c, s, 0], [-s, c, 0], [0, 0, -1]])
          origin, ray = to_box @ np.array([-b[0], -b[1], -world.camera_height]), to_box @ d
          with np.errstate(divide="ignore"):
            t = np.sort(
              np.stack(
                [(np.array([-b[3], -b[4], b[5]]) - origin) / ray, (np.array([b[3], b[4], b[6]]) - origin) / ray]
              ),
              axis=0,
            )
          if t[0].max() <= t[1].min() and t[0].max() > 0.3:
            best = min(best, t[0].max())
        assert f.depth[y, x] == pytest.approx(best, rel=1e-4)
        checked += 1
  assert checked > 200


def test_a_narrow_street_has_walls_near_the_road():
  """What stands beside the road, between 10 and 30 m ahead and as high as a car: near, and on both sides. No row of
  scenery stands on the road."""
  beside: dict[str, list[float]] = {"open": [], "narrow": []}
  for surroundings, found in beside.items():
    for seed in range(12):
      world = World(seed, "day", 10.0, surroundings=surroundings)
      f = view(world, 1.0, rgb=False)
      x = (np.arange(512) - 256) / 910 * f.depth
      y = world.camera_height - (np.arange(256)[:, None] - 47.6) / 910 * f.depth  # above the ground
      stands = (f.depth > 10) & (f.depth < 30) & (y > 0.3) & (y < 1.5)
      found += [float((stands & side).sum()) for side in (x < 0, x > 0)]
      edge = [world.d_right + world.shoulder, world.d_left - world.shoulder]
      d, half = world.scenery[:, 1], world.scenery[:, 4]
      trunk = world.scenery[:, 5] < 0.1  # crowns and lamps may hang above it
      assert ((d - half)[trunk & (d > 0)] > edge[0]).all() and ((d + half)[trunk & (d < 0)] < edge[1]).all()
  assert np.median(beside["narrow"]) > 2 * np.median(beside["open"])


def test_a_queue_fills_every_lane_and_nobody_drives_into_another():
  """A car's rear is mostly near ahead, vehicles take twice the share of the picture that they do on the open road, and
  no two boxes of a lane overlap at any time."""
  share: dict[str, list[float]] = {"open": [], "queue": []}
  for surroundings, found in share.items():
    for seed in range(12):
      world = World(seed, "day", 10.0, surroundings=surroundings)
      found.append(float((view(world, 1.0, rgb=False).semantic == VEHICLE).mean()))
  assert np.mean(share["queue"]) > 2 * np.mean(share["open"])
  ahead = []
  for seed in range(12):
    world = World(seed, "day", 10.0, surroundings="queue")
    for t in (0.0, 3.0, 8.0):
      lanes: dict[int, list[tuple[float, float]]] = {}
      for a, o in ((world.actors[(o["id"] - 1) % len(world.actors)], o) for o in world.objects(t)):
        if a.cls == VEHICLE and -world.n_oncoming * world.lane_width < a.d < world.n_same * world.lane_width:
          half = a.size[0] / 2
          lanes.setdefault(int(a.d // world.lane_width), []).append((o["x"] - half, o["x"] + half))
      own = [b for b in sorted(lanes[world.ego_lane]) if b[1] > 0]
      ahead.append(own[0][0])
      for boxes in lanes.values():
        ends = np.array(sorted(boxes))
        assert (ends[1:, 0] > ends[:-1, 1]).all()
  assert min(ahead) > 4.5 and np.median(ahead) < 14


def test_surroundings_are_part_of_the_name_and_of_the_truth(tmp_path):
  assert len({Drive(1, surroundings=s).name for s in SURROUNDINGS}) == len(SURROUNDINGS)
  write_route(tmp_path, 5, 0.1, qcamera_only=True, surroundings="narrow")
  (segment,) = tmp_path.iterdir()
  truth = json.loads((segment / "truth/truth.json").read_text())
  assert truth["surroundings"] == "narrow" and segment.name.startswith(Drive(5, 0.1, surroundings="narrow").name)
  with pytest.raises(ValueError, match="open, narrow, queue"):
    World(1, surroundings="wide")


def test_the_car_is_told_its_own_motion():
  """Speed, acceleration, yaw rate and curvature of carState and gps are the derivatives of where the car is, not of the
  centerline beside it."""
  h, apart = 0.02, []
  for seed in (3, 8, 21, 26, 46, 52):
    world = World(seed, "day", 12.0)
    config, sensor = CAMERAS["mici"]
    # far from the start, on whatever curve there is
    said = list(
      log.Event.read_multiple_bytes(
        b"".join(dat for _, dat in segment_messages(world, 0, 100, 8, config, "mici", sensor, True))
      )
    )
    states, places = ([e for e in said if e.which() == k] for k in ("carState", "gpsLocationExternal"))
    assert len(states) == 40 and len(places) == 4
    for e in states[::5]:
      t, cs = (e.logMonoTime - START_NS) * 1e-9, e.carState
      p = np.array([world.pose(t + k * h) for k in (-2, -1, 0, 1, 2)])
      ahead = np.diff(p[:, :2], axis=0) / h
      speed, yaw_rate = np.linalg.norm(ahead, axis=1), np.diff(p[:, 2]) / h
      assert cs.vEgo == pytest.approx(speed.mean(), rel=1e-3)
      assert cs.aEgo == pytest.approx(
        (speed[2:].mean() - speed[:2].mean()) / (2 * h), abs=0.15
      )  # the road is a table of chords
      assert -cs.yawRate == pytest.approx(yaw_rate.mean(), abs=2e-3)
      assert -np.radians(cs.steeringAngleDeg) / 15 / 2.7 * cs.vEgo == pytest.approx(-cs.yawRate, rel=1e-5)
      apart.append(abs(world.ego(t)["s_dot"] / cs.vEgo - 1))
    for e in places:
      (x, y, a), g = world.pose((e.logMonoTime - START_NS) * 1e-9), e.gpsLocationExternal
      assert (g.latitude * 111_111, g.longitude * 111_111) == pytest.approx((x, y)) and g.bearingDeg == pytest.approx(
        np.degrees(a) % 360
      )
  assert max(apart) > 0.01  # of the centerline's


def test_equal_seeds_equal_frames_whatever_was_rendered_before():
  a, b, c = World(1, "night", 5.0), World(1, "night", 5.0), World(2, "night", 5.0)
  view(b, 3.0)
  x, y, z = view(a, 1.0), view(b, 1.0), view(c, 1.0)
  assert (x.rgb == y.rgb).all() and (x.depth == y.depth).all() and (x.instance == y.instance).all()
  assert not (x.rgb == z.rgb).all()


def test_the_cameras_height_is_drawn_and_nothing_else_changes():
  worlds = [World(s, "day", 5.0, "clear", h) for s in (1, 2, 3) for h in (None, (1.0, 2.0), (1.6, 1.6))]
  heights = np.array([w.camera_height for w in worlds]).reshape(3, 3)
  assert len(set(heights[:, 1])) == 3 and (heights[:, 1] >= 1).all() and (heights[:, 1] <= 2).all()
  assert (heights[:, 0] >= 1.15).all() and (heights[:, 0] <= 1.4).all() and (heights[:, 2] == 1.6).all()
  assert heights[0, 0] == pytest.approx(1.3111953166170953, rel=1e-12)  # of a seed without a range: as ever
  for a, b in ((worlds[0], worlds[1]), (worlds[6], worlds[8])):
    mine, other = ({k: v for k, v in vars(w).items() if k not in ("camera_height", "_rng")} for w in (a, b))
    assert repr(mine) == repr(other) and a.pose(2.0) == b.pose(2.0) and a.objects(2.0) == b.objects(2.0)
  f, z = view(worlds[2], 1.0), 1.6 * 910 / (200 - 47.6)
  assert (f.depth[200] <= z * 1.001).all() and f.depth[200, 256] == pytest.approx(z, rel=1e-3)
  names = {Drive(1, camera_height=h).name for h in (None, (1.0, 2.0), (1.0, 1.5), (1.5, 1.5))}
  assert len(names) == 4 and Drive(1).name in names
  for text in ("low", "2:1", "1:2:3", "0.1", "nan", "1:9"):
    with pytest.raises(UserError, match="--camera-height"):
      parse_height(text)
  assert parse_height("1.0:2.0") == (1.0, 2.0) and parse_height("1.65") == (1.65, 1.65)


def test_lane_lines_lie_on_lane_pixels():
  hits = total = 0
  for seed in range(20, 26):
    world = World(seed, "day", 10.0)
    f = view(world, 1.0)
    xs = np.arange(8.0, 30.0, 0.5)
    for line, spec in zip(world.lane_lines(1.0, xs), [ln for ln in world.lines if ln.kind], strict=True):
      if line["kind"] != "solid" or spec.wear > 0:
        continue
      px, z = project(np.stack([xs, line["y"], np.full_like(xs, world.camera_height)], 1), medmodel_intrinsics)
      for (x, y), depth in zip(np.round(px).astype(int), z, strict=True):
        if 0 <= x < 512 and 0 <= y < 256 and f.depth[y, x] > depth * 0.98:
          hits += f.semantic[y, x] == LANE
          total += 1
  assert total > 100 and hits / total > 0.97  # the rest: rounding at a marking's rim


def test_identity_survives_full_occlusion():
  """Some vehicle disappears wholly behind another and comes back with the same identity."""
  found = 0
  for seed in range(60):
    world = World(seed, "day", 20.0)
    seen: dict[int, list[bool]] = {}
    for t in np.arange(0, 14, 0.5):
      ids = set(np.unique(view(world, float(t), rgb=False).instance)) - {0}
      inside = set()
      for o in world.objects(float(t)):
        px, z = project(np.array([[o["x"], o["y"], world.camera_height - 0.7]]), medmodel_intrinsics)
        if o["cls"] == 3 and 5 < z[0] < 100 and 20 < px[0, 0] < 492:
          inside.add(o["id"])
      for i in inside:
        seen.setdefault(i, []).append(i in ids)
    for history in seen.values():
      text = "".join("1" if s else "0" for s in history)
      found += "101" in text or "1001" in text or "10001" in text
    if found:
      return
  raise AssertionError("no full occlusion in 60 worlds")


def test_map_labels_are_exact_on_a_plane():
  """1/z is linear in the image of a plane, so the center's depth comes out to float16."""
  v, u = np.mgrid[0:256, 0:512]
  inverse = 0.02 + 0.0004 * v + 0.0001 * u
  depth, classes = map_labels((1 / inverse).astype(np.float32), np.full((256, 512), 3, np.uint8))
  vc, uc = 4 * np.arange(64)[:, None] + 1.5, 4 * np.arange(128)[None] + 1.5
  np.testing.assert_allclose(depth.astype(float), 1 / (0.02 + 0.0004 * vc + 0.0001 * uc), rtol=1e-3)
  assert (classes == 3).all()


@pytest.fixture(scope="module")
def route(tmp_path_factory):
  return write_route(tmp_path_factory.mktemp("sim"), seed=4, seconds=1.5, segment_seconds=1.0)


def test_route_is_an_ordinary_one(route):
  r = Route(route)
  assert [s.num for s in r.segments] == [0, 1]
  ids = []
  for s, count in zip(r.segments, (20, 10), strict=True):
    for camera, path, size in (("road", s.fcamera, (1344, 760)), ("qcamera", s.qcamera, (526, 330))):
      entries, video = encode_index(s, camera), FrameReader(path)
      assert len(entries) == video.frame_count == count and (video.w, video.h) == size
      assert [e.segment_id for e in entries] == list(range(count)) and entries[0].frame_id != 0
    ids += [e.frame_id for e in entries]
    counts = {}
    for e in LogReader([s.rlog]):
      counts[e.which()] = counts.get(e.which(), 0) + 1
    assert counts["carState"] == 5 * count and counts["modelV2"] == counts["narrowRoadCameraState"] == count
    assert {
      "initData",
      "carParams",
      "extrinsicsCalibration",
      "deviceState",
      "radarState",
      "cameraOdometry",
      "sentinel",
    } <= counts.keys()
    assert sum(1 for e in LogReader([s.qlog])) < sum(counts.values()) / 2
  assert ids == list(range(ids[0], ids[0] + 30))


def test_truth_stands_beside_the_frames(route):
  s = Route(route).segments[0]
  truth = Truth(s.dir)
  world = World(4, "day", 1.5)
  f = truth.frame(7)
  want = view(world, 7 / 20)
  assert (f.semantic == want.semantic).all() and (f.instance == want.instance).all()
  finite = np.isfinite(want.depth)
  np.testing.assert_allclose(f.depth[finite], want.depth[finite], rtol=1e-3)  # float16
  boxes = [o for o in truth.objects(7) if o["box_view"]]
  assert boxes
  for o in boxes:
    x0, y0, x1, y1 = o["box_view"]
    ys, xs = np.nonzero(f.instance == o["id"])
    assert (x0, x1, y0, y1) == (xs.min(), xs.max(), ys.min(), ys.max())
  assert any(any(line["visible"]) for line in truth.lanes(7))
  with pytest.raises(UserError, match="no readable truth"):
    Truth(s.dir.parent)


def test_camera_frame_through_the_warp_is_the_view(route):
  """The rendered, encoded, decoded and warped camera frame shows the view's own picture: mounting, calibration and
  intrinsics agree."""
  s = Route(route).segments[0]
  nv12 = FrameReader(s.fcamera, "nv12").get(5)
  stride, y_height, _, size = nv12_info(1344, 760)
  from openpilot.tools.replay.source import fill_nv12

  warp = ModelFrame(1344, 760, stride, stride * y_height)
  rpy = next(list(e.extrinsicsCalibration.rpyCalib) for e in LogReader([s.rlog], services=["liveCalibration"]))
  from openpilot.selfdrive.modeld.fair.frames import pack_rgb

  want = pack_rgb(view(World(4, "day", 1.5), 5 / 20).rgb)[:4].astype(float)

  def error(angles):
    warp.set_calibration(angles, camera_intrinsics(1344, 760))
    return np.abs(
      warp.warp(fill_nv12(nv12, np.zeros(size, np.uint8), stride, stride * y_height))[:4].astype(float) - want
    ).mean()

  right = error(rpy)
  assert right < 6  # of 219: noise and compression
  assert error(np.array(rpy) + [0, 0.01, 0]) > right * 1.3 and error(np.array(rpy) + [0, 0, 0.01]) > right * 1.3


@pytest.mark.slow
def test_two_runs_are_equal(route, tmp_path):
  other = write_route(tmp_path / "again", seed=4, seconds=1.5, segment_seconds=1.0)
  for a, b in zip(Route(route).segments, Route(other).segments, strict=True):
    files = ["rlog.zst", "qlog.zst", "truth/objects.jsonl", "truth/lanes.jsonl", "truth/truth.json"]
    assert filecmp.cmpfiles(a.dir, b.dir, files, shallow=False)[0] == files
    assert (Truth(a.dir).frame(3).depth == Truth(b.dir).frame(3).depth).all()
  third = write_route(tmp_path / "third", seed=5, seconds=0.5)
  assert json.loads((Route(third).segments[0].dir / "truth/truth.json").read_text())["seed"] == 5

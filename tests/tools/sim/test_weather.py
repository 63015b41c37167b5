"""Rain, the qcamera-only routes, and what the ray-caster counts beside the picture."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.selfdrive.modeld.fair.frames import ModelFrame, camera_intrinsics, pack_rgb
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.framereader import FrameReader
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.route import Route
from openpilot.tools.sim.points import follow
from openpilot.tools.sim.render import CLASSES, render
from openpilot.tools.sim.truth import Truth
from openpilot.tools.sim.world import World
from openpilot.tools.sim.write_route import Drive, conditions, parse_seeds, write_routes

ROAD, LANE = CLASSES.index("road"), CLASSES.index("lane")


def view(world, t, **kw):
  return render(world, t, medmodel_intrinsics, 512, 256, **kw)


@pytest.mark.parametrize(("seed", "time", "t"), [(5, "day", 1.5), (8, "dusk", 2.25), (9, "night", 3.0)])
def test_clear_weather_renders_as_before_there_was_rain(seed, time, t):
  """Every 8th pixel of frames kept from then. Another C library's expf may differ in its last bit, which may tip a
  rounding: one level, seldom."""
  with np.load(Path(__file__).with_name("clear_frames.npz")) as z:
    want = z[time].astype(int)
  off = np.abs(view(World(seed, time, 10.0), t).rgb[::8, ::8].astype(int) - want)
  assert off.max() <= 1 and (off > 0).mean() < 0.001
  assert (view(World(seed, time, 10.0, "rain"), t).rgb[::8, ::8] != want).mean() > 0.5


def test_rain_changes_the_picture_and_nothing_else():
  dry, wet = World(11, "day", 10.0), World(11, "day", 10.0, "rain")
  a, b, quick = view(dry, 2.0), view(wet, 2.0), view(wet, 2.0, rgb=False)
  for f in (b, quick):
    assert (a.depth == f.depth).all() and (a.semantic == f.semantic).all() and (a.instance == f.instance).all()
  assert not quick.rgb.any()
  far = np.isfinite(a.depth) & (a.depth > 60)
  assert b.rgb[far].std() < 0.7 * a.rgb[far].std()  # haze and a gray sky
  again = World(11, "day", 10.0, "rain")
  view(again, 3.0)
  assert (view(again, 2.0).rgb == b.rgb).all()  # of the moment, whatever was rendered before


def test_only_the_road_mirrors_and_drops_fall_anywhere():
  changed = {}
  for what in ("mirror", "rain"):
    world = World(8, "night", 10.0, "rain")
    world.look["rain"] = world.look["mirror"] = 0.0
    none = view(world, 2.0)
    world.look[what] = 0.8
    some = view(world, 2.0)
    changed[what] = np.abs(some.rgb.astype(int) - none.rgb.astype(int)).max(axis=2) > 2
  on_road = np.isin(none.semantic, (ROAD, LANE))
  assert changed["mirror"].sum() > 2000 and not changed["mirror"][~on_road].any()
  assert changed["rain"][on_road].mean() > 0.005 and changed["rain"][~on_road].mean() > 0.005


def test_alone_is_what_an_object_would_fill_by_itself(monkeypatch):
  """Against pictures of each object with all other boxes taken away."""
  world = World(4, "day", 10.0)
  whole = view(world, 1.0, rgb=False, alone=True)
  everything = world.view(1.0)
  ids = np.flatnonzero(whole.alone)
  hidden = 0
  for i in ids:
    monkeypatch.setattr(
      world, "view", lambda t, i=i: {**everything, "boxes": everything["boxes"][everything["boxes"][:, 11] == i]}
    )
    only = (view(world, 1.0, rgb=False).instance == i).sum()
    assert whole.alone[i] == only
    hidden += (whole.instance == i).sum() < 0.9 * only
  assert len(ids) > 5 and hidden


def test_followed_points_are_where_the_road_moves_them():
  """Against the road's own coordinates: a stretch ahead, found at both moments through World.to_ego, carries the points
  rigidly."""
  world, start, n = World(6, "day", 10.0), 1.0, 10
  frames = [view(world, start + k / 20, rgb=False) for k in range(n)]
  points = np.array(
    [(x, y) for y in range(80, 250, 15) for x in range(20, 500, 30) if np.isin(frames[0].semantic[y, x], (ROAD, LANE))],
    float,
  )
  tracks, seen = follow(world, frames, start, points)
  z = world.camera_height * 910 / (points[:, 1] - 47.6)
  at = np.stack([z, (points[:, 0] - 256) / 910 * z], 1)
  s = world.ego(start)["s"] + 20.0
  x0, y0, h0 = (float(v) for v in world.to_ego(start, s, 0.0))
  for k in range(n):
    x, y, h = (float(v) for v in world.to_ego(start + k / 20, s, 0.0))
    turn = np.array([[np.cos(h - h0), -np.sin(h - h0)], [np.sin(h - h0), np.cos(h - h0)]])
    p = (at - [x0, y0]) @ turn.T + [x, y]
    want = np.stack([256 + 910 * p[:, 1] / p[:, 0], 47.6 + 910 * world.camera_height / p[:, 0]], 1)
    # the rendered depth is float32: 1e-6 of it, and of the pixels
    np.testing.assert_allclose(tracks[k][seen[k]], want[seen[k]], atol=0.01)
  assert seen[0].mean() > 0.95 and 20 < seen[-1].sum() < len(points)


@pytest.fixture(scope="module")
def routes(tmp_path_factory):
  out = tmp_path_factory.mktemp("many")
  drives = [Drive(s, 0.6, "mici", *conditions(s, "any", "any"), True) for s in (6, 7)]
  assert write_routes(out, drives, jobs=2) == 24
  return out, drives


def test_many_small_routes_go_on_where_they_were_stopped(routes):
  out, drives = routes
  folders = [out / f"{d.name}--0" for d in drives]
  assert sorted(out.iterdir()) == sorted(folders)
  info = [Truth(f).info for f in folders]
  assert [(i["time_of_day"], i["weather"], i["seed"]) for i in info] == [("day", "rain", 6), ("dusk", "rain", 7)]
  (segment,) = Route(folders[0]).segments
  assert (
    segment.fcamera is None and FrameReader(segment.qcamera).frame_count == 12 and FrameReader(segment.qcamera).w == 526
  )
  whole = {p.name: p.read_bytes() for p in (folders[1] / "truth").iterdir()}
  (folders[1] / "rlog.zst").unlink()  # as if it had never been finished
  left = out / f".{drives[1].name}--0.tmp"
  left.mkdir()
  (left / "qcamera.ts").write_bytes(b"x")
  assert write_routes(out, drives, jobs=2) == 12
  assert {p.name: p.read_bytes() for p in (folders[1] / "truth").iterdir()} == whole and not left.exists()
  assert write_routes(out, drives, jobs=2) == 0


def test_the_small_picture_through_the_warp_is_the_view(routes):
  """Rendered at the qcamera's size with the intrinsics that its readers assume, so that nothing is shifted."""
  out, drives = routes
  folder = out / f"{drives[0].name}--0"
  (segment,) = Route(folder).segments
  nv12 = FrameReader(segment.qcamera, "nv12").get(7)
  rpy = np.array(
    next(list(e.extrinsicsCalibration.rpyCalib) for e in LogReader([segment.rlog], services=["extrinsicsCalibration"]))
  )
  want = pack_rgb(view(World(6, "day", 0.6), 7 / 20).rgb)[:4].astype(float)  # dry: drops differ from camera to camera
  warp = ModelFrame(526, 330, 526, 526 * 330)

  def likeness(angles):
    warp.set_calibration(angles, camera_intrinsics(526, 330, "mici", "os04c10"))
    return np.corrcoef(warp.warp(nv12.reshape(-1))[:4].ravel(), want.ravel())[0, 1]

  right = likeness(rpy)
  assert right > 0.5
  for turn in ([0, 0.01, 0], [0, 0, 0.01], [0, -0.01, 0], [0, 0, -0.01]):
    assert likeness(rpy + turn) < right


def test_truth_says_what_is_occluded_and_the_conditions(routes):
  out, drives = routes
  truth = Truth(out / f"{drives[0].name}--0")
  frame = truth.frame(5)
  world = World(6, "day", 0.6, "rain")
  alone = view(world, 5 / 20, rgb=False, alone=True).alone
  rows = truth.objects(5)
  assert {o["id"] for o in rows} == set(np.flatnonzero(alone))
  for o in rows:
    assert o["visible_fraction"] == pytest.approx((frame.instance == o["id"]).sum() / alone[o["id"]], abs=1e-4)
    assert o["occluded"] == (o["visible_fraction"] < 0.5) and (o["box_view"] is None) == (o["visible_fraction"] == 0)
  assert truth.info["camera_size"] == [526, 330] and truth.info["pose"][5] == pytest.approx(world.pose(5 / 20))


def test_conditions_come_in_turn():
  assert {conditions(s, "any", "any") for s in range(9)} == {
    (t, w) for t in ("day", "dusk", "night") for w in ("clear", "rain")
  }
  assert [conditions(s, "any", "any")[1] for s in range(1000, 1090)].count("rain") == 30
  assert conditions(3, "night", "clear") == ("night", "clear") and parse_seeds("7:9") == range(7, 9)


@pytest.mark.parametrize("text", ["7", "9:7", "7:7", "a:b", ":4", "-1:3"])
def test_bad_seeds_are_one_line(text):
  with pytest.raises(UserError, match="names no seeds"):
    parse_seeds(text)


def test_the_command_names_its_faults(tmp_path):
  def run(*args):
    return subprocess.run(
      [sys.executable, "-m", "openpilot.tools.sim.write_route", str(tmp_path / "x"), *args],
      capture_output=True,
      text=True,
      timeout=60,
    )

  r = run("--seeds", "5")
  assert r.returncode == 2 and r.stderr.startswith("error: --seeds 5") and not (tmp_path / "x").exists()
  r = run("--seeds", "5:6", "--seconds", "0.01", "--qcamera-only")
  assert r.returncode == 2 and "hold no frame" in r.stderr and "Traceback" not in r.stderr
  with pytest.raises(ValueError, match="weather 'snow'"):
    World(1, weather="snow")


def test_truth_is_plain_data(routes):
  out, drives = routes
  text = (out / f"{drives[1].name}--0" / "truth" / "truth.json").read_text()
  info = json.loads(text)
  assert len(info["pose"]) == info["frames"] == 12 and info["seconds"] == 0.6

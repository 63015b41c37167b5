"""Relative depth put into meters on scenes that are known exactly, and the message that carries it."""

import dataclasses

import numpy as np
import pytest

from fair_bundle import CLASSES, manifest, write_bundle
from openpilot.cereal.visionipc import nv12_info
from openpilot.selfdrive.modeld.fair.bundle import write_manifest
from openpilot.selfdrive.modeld.fair.heads.depth import Depth, map_centers, shrink
from openpilot.selfdrive.modeld.fair.heads.ground import view_ground
from openpilot.selfdrive.modeld.fair.heads.scale import DepthScale, plane_scale, sample
from openpilot.selfdrive.modeld.fair.heads.segmentation import Segmentation
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.selfdrive.modeld.fair.roles import channels_of
from openpilot.selfdrive.modeld.fair.publish import Stamp, depth_from_message, depth_message, serialize

GROUND = view_ground("medmodel", 1.3)
TRUE = 3.7  # meters of one unit of the student


def scene(wall: float = 60.0) -> np.ndarray:
  """(64, 128) meters: the road to a wall, a car at 12 m half in the lane."""
  x, y = map_centers(64, 128)
  z = np.minimum(np.where(y > GROUND.cy, GROUND.f * GROUND.height / np.maximum(y - GROUND.cy, 1e-6), wall), wall)[
    :, None
  ].repeat(128, 1)
  car = GROUND.view(np.array([[12.0, 0.5, 1.3], [12.0, 2.3, -0.1]]))
  z[(y[:, None] < car[0, 1]) & (y[:, None] > car[1, 1]) & (x > car[0, 0]) & (x < car[1, 0])] = 12.0
  return z.astype(np.float32)


def road(z: np.ndarray) -> Segmentation:
  """What of the scene is on the plane."""
  y = map_centers(64, 128)[1]
  plane = (np.abs(z * (y[:, None] - GROUND.cy) / (GROUND.f * GROUND.height) - 1) < 0.02) & (y[:, None] > GROUND.cy)
  return Segmentation(CLASSES, np.where(plane, CLASSES.index("road"), 0).astype(np.uint8), np.zeros(5, np.float32))


@pytest.mark.parametrize("with_classes", [False, True])
def test_the_road_plane_tells_the_scale(with_classes):
  r = np.random.default_rng(0)
  z, scale = scene(), DepthScale()
  for t in range(20):
    scale.drive(t * 50_000_000, None)
    raw = Depth(z / np.float32(TRUE) * r.normal(1, 0.05, z.shape).astype(np.float32), False)
    out = scale.meters(raw, GROUND, road(z) if with_classes else None)
    assert out.metric and out.scale == pytest.approx(TRUE, rel=0.02) and 0.01 < out.scale_std < 0.1
    np.testing.assert_allclose(out.z, raw.z * out.scale, rtol=1e-5)
  assert not raw.metric  # the student's own stays
  # the camera sits 10 % higher than the calibration said: so much longer is every distance
  scale.reset()
  scale.drive(0, None)
  assert scale.meters(raw, view_ground("medmodel", 1.43), None).scale == pytest.approx(1.1 * TRUE, rel=0.02)


def test_without_a_witness_depth_stays_relative():
  z, scale = np.full((64, 128), 5.0, np.float32), DepthScale()  # a wall is no road
  scale.drive(0, 10.0)
  out = scale.meters(Depth(z, False), GROUND, None)
  assert not out.metric and out.scale == 0 and (out.z == z).all()
  scale.drive(50_000_000, 10.0)
  assert scale.meters(Depth(scene() / 2, False), GROUND, None).metric
  for seconds in range(1, 15):  # known once, it is forgotten as it may have drifted
    scale.drive(50_000_000 + seconds * 1_000_000_000, 10.0)
    out = scale.meters(Depth(z, False), GROUND, None)
    assert out.metric == (out.scale > 0) and (seconds > 3 or out.metric)
  assert not out.metric
  metric = Depth(z, True)
  assert scale.meters(metric, GROUND, None) is metric


def drive(slide: float, speed: float | None = 15.0, frames: int = 80) -> DepthScale:
  """Points on two lines go by; of the road between them nothing is seen. slide: what share of the way a point slides
  along its line with the car."""
  scale, r = DepthScale(), np.random.default_rng(1)
  x = np.linspace(8, 30, 24)
  side = np.where(np.arange(24) % 2, 1.8, -1.8)
  z = scene()
  centers = map_centers(64, 128)
  z[:, :] = np.where(np.abs(centers[0] - GROUND.cx) * z < 1.6 * GROUND.f, np.nan, z)
  for t in range(frames):
    x -= 15 * 0.05 * (1 - slide)
    fresh = x < 6
    x[fresh] += 24
    scale.drive(t * 50_000_000, speed)
    scale.meters(Depth(z / np.float32(TRUE), False), GROUND, None)
    px = GROUND.view(np.stack([x, side, np.full(24, 1.3)], axis=1)) + r.normal(0, 0.1, (24, 2))
    scale.points(px, np.ones(24, bool), fresh, GROUND)
  return scale


def test_the_way_driven_past_points_tells_the_scale():
  scale = drive(0.0)
  assert scale.known and np.exp(scale.log) == pytest.approx(TRUE, rel=0.12)  # map pixels of 4 view pixels
  assert not drive(0.0, None).known and not drive(0.0, float("nan")).known


def test_points_that_slide_along_their_line_are_not_believed():
  assert not drive(0.5).known


def test_the_road_is_looked_at_from_four_meters_to_thirty():
  """By a camera 1.3 m over it, whose picture goes on below the view's: of depth in one row alone, known exactly."""
  ground = dataclasses.replace(GROUND, f=GROUND.f / 2)  # the lowest row is of 2.9 m
  _, y = map_centers(64, 128)
  ahead = ground.f * 1.3 / np.where(y > ground.cy, y - ground.cy, np.nan)
  heard = []
  for row in np.flatnonzero(np.isfinite(ahead)):
    z = np.full((64, 128), np.nan, np.float32)
    z[row] = ahead[row] / TRUE
    log, std = plane_scale(
      z, ground, Segmentation(CLASSES, np.full((64, 128), CLASSES.index("road"), np.uint8), np.zeros(5, np.float32))
    )
    heard.append(np.isfinite(std))
    assert not heard[-1] or np.exp(log) == pytest.approx(TRUE, rel=1e-5)
  ahead = ahead[np.isfinite(ahead)]
  assert ahead.min() < 3 and ahead.max() > 40 and heard == ((ahead >= 4) & (ahead <= 30)).tolist()


@pytest.mark.parametrize("role", ["ground", "marking", "movable", None])
def test_the_plane_is_what_has_the_role_of_ground_or_marking_whatever_it_is_called(role):
  """Of a map in which one class is where the view shows the plane; all else is at another depth."""
  classes = ["road", "asphalt"]  # the first, which the runtime knew by its name, is none here
  channels = channels_of(classes, {} if role is None else {"asphalt": role})
  _, y = map_centers(64, 128)
  ahead = GROUND.f * GROUND.height / np.where(y > GROUND.cy, y - GROUND.cy, np.nan)
  z = np.full((64, 128), 5.0, np.float32)  # a wall
  z[:, :20] = ahead[:, None] / TRUE
  class_map = np.zeros((64, 128), np.uint8)
  class_map[:, :20] = 1
  log, std = plane_scale(z, GROUND, Segmentation(classes, class_map, np.zeros(2, np.float32), channels=channels))
  if role in ("ground", "marking"):
    assert np.isfinite(std) and np.exp(log) == pytest.approx(TRUE, rel=1e-4)
  else:  # looked for straight ahead, where the wall is
    assert not np.isfinite(std) or np.exp(log) != pytest.approx(TRUE, rel=0.05)


@pytest.mark.parametrize(
  ("step", "speed", "kept"),
  [
    (0.05, 20.0, True),
    (1.0, 20.0, True),
    (0.05, None, False),
    (0.05, -1.0, False),
    (0.05, 100.0, False),
    (0.05, np.nan, False),
    (1.1, 20.0, False),
    (-0.05, 20.0, False),
  ],
)
def test_without_a_way_driven_points_begin_anew(step, speed, kept):
  """A gap, a clock that went back, a speed that no car has: nobody knows how far it was."""
  scale = DepthScale()
  scale.drive(10**9, 20.0)
  scale.since = np.zeros(3)
  scale.drive(10**9 + int(step * 1e9), speed)
  assert np.isfinite(scale.since).all() == kept and scale.way == pytest.approx(step * 20 if kept else 0)


def test_centres_of_a_maps_pixels():
  """Of 512x256: a map of half the size has its first center between the view's first two."""
  for w, first, apart in ((512, 0.0, 1.0), (256, 0.5, 2.0), (128, 1.5, 4.0), (64, 3.5, 8.0)):
    x, y = map_centers(w // 2, w)
    assert (x == first + apart * np.arange(w)).all() and (y == first + apart * np.arange(w // 2)).all()


def test_samples_are_of_the_pixel_that_a_point_is_in():
  z = np.arange(64 * 128, dtype=np.float32).reshape(64, 128)
  px = np.array([[0, 0], [3.4, 3.4], [3.6, 0], [511, 255], [-1, 3], [600, 3], [np.nan, 3]])
  np.testing.assert_array_equal(sample(Depth(z, True), px), [0, 0, 1, 64 * 128 - 1, np.nan, np.nan, np.nan])


def test_a_map_is_halved_to_what_is_there():
  r = np.random.default_rng(2)
  z = r.uniform(2, 80, (8, 16)).astype(np.float32)
  fours = z.reshape(4, 2, 8, 2).swapaxes(1, 2).reshape(4, 8, 4)
  np.testing.assert_array_equal(shrink(z), np.sort(fours, axis=2)[:, :, 1])
  z[0, 0] = z[0, 1] = z[1, 0] = np.nan
  z[2:4, 2:4] = np.nan
  assert shrink(z)[0, 0] == z[1, 1] and np.isnan(shrink(z)[1, 1])


@pytest.mark.parametrize("shape", [(64, 128), (128, 256), (256, 512)])
def test_depth_is_under_forty_kilobytes(shape):
  z = np.random.default_rng(3).uniform(1, 120, shape).astype(np.float32)
  z[:, 0] = 1e9
  stamp = Stamp(5, 250, "a-bundle-with-a-rather-long-name" * 4, 0.01, True)
  service, msg = depth_message(Depth(z, True, 2.5, 0.04), stamp)
  assert len(serialize(service, msg)) < 40_000
  m = msg.fairDepth
  out = depth_from_message(m)
  assert (
    out.shape == (64, 128)
    and m.metric
    and m.scale == 2.5
    and m.scaleStd == pytest.approx(0.04)
    and np.isfinite(out).all()
  )
  small = z
  while small.shape[0] > 64:
    small = shrink(small)
  np.testing.assert_allclose(out[:, 1:], small[:, 1:], rtol=1e-3)  # float16


def test_the_model_sends_depth_at_ten_hertz_and_says_what_it_is(tmp_path):
  write_bundle(tmp_path)
  m = manifest()
  m["graphs"][0]["outputs"][0]["parameters"] = {"activation": "exp", "metric": False}
  model = FairModel(write_manifest(tmp_path, m))
  stride, y_height, _, size = nv12_info(1344, 760)
  model.set_camera(1344, 760, stride, stride * y_height)
  model.speed = 12.0
  sent = [dict(model.process(np.full(size, 90, np.uint8), i, 0, i * 50_000_000)) for i in [*range(8), 11, 12, 0, 1]]
  assert ["fairDepth" in s for s in sent] == [True, False] * 4 + [
    True,
    False,
    True,
    False,
  ]  # every second; after a gap, and anew, at once
  assert all("fairSegmentation" in s for s in sent)
  d = sent[0]["fairDepth"].fairDepth
  assert not d.metric and d.scale == 0  # all of one depth: no road


def test_a_fresh_point_forgets_what_its_slot_looked_at():
  """A slot whose point is new in this frame has not come nearer: its old point's depth says nothing."""
  scale = DepthScale()
  z = Depth(np.full((64, 128), 8.0, np.float32), False)
  px = GROUND.view(np.stack([np.full(8, 20.0), np.linspace(-2, 2, 8), np.full(8, 1.3)], axis=1))
  sure, new = np.ones(8, bool), np.arange(8) < 3
  for t, fresh in enumerate((np.zeros(8, bool), new)):
    scale.drive(t * 50_000_000, 20.0)
    scale.relative = z
    scale.points(px, sure, fresh, GROUND)
  np.testing.assert_allclose(scale.since[:3], 1.0)  # m driven when the new points were first looked at
  np.testing.assert_allclose(scale.since[3:], 0.0)

"""What goes into a car's log: the small forms, and that all services together keep the budget of 1 MB a minute."""

import numpy as np
import pytest
from fair_bundle import write_bundle

from openpilot.cereal import messaging
from openpilot.cereal.services import SERVICE_LIST
from openpilot.common.params import Params
from openpilot.selfdrive.modeld.fair.bundle import MODELS_DIR, load_bundle
from openpilot.selfdrive.modeld.fair.heads.depth import Depth
from openpilot.selfdrive.modeld.fair.heads.segmentation import Segmentation
from openpilot.selfdrive.modeld.fair.ipc import read_flag
from openpilot.selfdrive.modeld.fair.lanes import Line
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.selfdrive.modeld.fair.publish import (
  NEAREST,
  SERVICES,
  Stamp,
  add_maps,
  class_map_from_message,
  coarse_classes,
  depth_from_message,
  depth_message,
  features_message,
  lanes_message,
  objects_message,
  segmentation_message,
  serialize,
)
from openpilot.selfdrive.modeld.fair.tracked import Tracked
from openpilot.selfdrive.modeld.fair.worker import FairModeld
from openpilot.tools.lib.logwriter import write_log
from openpilot.tools.lib.route import Route
from openpilot.tools.replay.process_replay import process_replay
from openpilot.tools.replay.measure import measure
from openpilot.tools.replay.show import show
from tests.bench.bench_log_size import BUDGET, FRAME_BYTES, log_sizes

STAMP = Stamp(1000, 50_000_000_000, "a-bundle", 0.01, True)


def tracked(r, n=96, hidden=0.3):
  """A crowd: n objects with masks, a share of them hidden."""
  masks = np.zeros((n, 64, 128), bool)
  for i in range(n):
    y, x = r.integers(0, 40), r.integers(0, 100)
    masks[i, y : y + 20, x : x + r.integers(4, 28)] = r.random((20, 1)) < 0.9
  position = np.stack([r.uniform(4, 80, n), r.normal(0, 4, n), np.full(n, 1.2)], 1)
  position[::7] = np.nan
  lone = r.uniform(0, 100, (n, 4)).astype(np.float32)
  return Tracked(
    ["car", "person"],
    np.arange(n) + 5,
    r.integers(0, 2, n),
    r.random(n).astype(np.float32),
    lone,
    r.integers(0, 999, n),
    r.random(n) < hidden,
    r.random(n).astype(np.float32),
    masks,
    np.arange(n),
    position,
    np.abs(position) / 9,
    r.uniform(2, 90, n).astype(np.float32),
  )


def lines(r, n=8, points=30):
  return [
    Line(
      i,
      r.random(),
      "solid",
      r.uniform(0, 500, (points, 2)).astype(np.float32),
      r.random(points).astype(np.float32),
      r.normal(0, 20, (points, 3)).astype(np.float32),
      r.normal(0, 1, 4),
      r.uniform(1, 80, points).astype(np.float32),
    )
    for i in range(n)
  ]


def test_objects_in_small_are_the_nearest_that_are_seen():
  t = tracked(np.random.default_rng(0))
  dense, small = (objects_message(t, STAMP, form)[1].as_reader().fairObjects for form in (True, False))
  assert (
    len(dense.objects) == 96
    and sum(len(o.mask) > 0 for o in dense.objects) > 90
    and any(o.occluded for o in dense.objects)
  )
  ahead = np.where(np.isfinite(t.position[:, 0]), t.position[:, 0], t.depth)
  ahead[t.occluded] = np.inf
  assert [o.trackId for o in small.objects] == (np.sort(np.argsort(ahead, kind="stable")[:NEAREST]) + 5).tolist()
  whole = {o.trackId: o for o in dense.objects}
  for o in small.objects:
    d = whole[o.trackId]
    assert (
      not o.occluded and not len(o.mask) and (o.classId, o.age, len(o.position)) == (d.classId, d.age, len(d.position))
    )
    assert (
      np.abs(np.array(o.box) - list(d.box)).max() <= 1 / 8
      and abs(o.prob - d.prob) <= 1 / 64
      and abs(o.depth - d.depth) <= 1 / 16
    )
    assert not len(o.position) or np.abs(np.array(o.position) - list(d.position)).max() <= 1 / 16
  empty = objects_message(tracked(np.random.default_rng(0), hidden=2), STAMP, False)[1].as_reader().fairObjects
  assert len(empty.objects) == 0 and list(empty.classes) == ["car", "person"]


def test_lines_in_small_keep_their_curve_and_their_ends():
  given = lines(np.random.default_rng(1))
  small = lanes_message(given, STAMP, False)[1].as_reader().fairLanes
  for entry, line in zip(small.lines, given, strict=True):
    assert (
      np.allclose(list(entry.fit), line.fit)
      and len(entry.x) == len(entry.roadX) == len(entry.depth) == len(entry.visibility) == 4
    )
    assert np.abs(np.array([entry.x[0], entry.y[-1]]) - [line.points[0, 0], line.points[-1, 1]]).max() <= 1 / 8
  short = [
    Line(1, 0.5, "", np.zeros((k, 2), np.float32), np.zeros(k, np.float32), np.zeros((k, 3), np.float32), np.zeros(4))
    for k in (0, 1, 3)
  ]
  assert [len(x.x) for x in lanes_message(short, STAMP, False)[1].as_reader().fairLanes.lines] == [0, 1, 3]


@pytest.mark.parametrize("dense", [False, True])
def test_maps_in_the_state(dense):
  r = np.random.default_rng(2)
  z = np.repeat(np.repeat(r.uniform(2, 80, (8, 16)), 8, 0), 8, 1).astype(np.float32)
  z[:8] = np.nan
  class_map = np.repeat(np.repeat(r.integers(0, 3, (16, 32)), 4, 0), 4, 1).astype(np.uint8)
  newest = dict(
    [
      depth_message(Depth(z, True), STAMP),
      segmentation_message(Segmentation(["a", "b", "c"], class_map, np.ones(3, np.float32)), STAMP),
    ]
  )
  msg = messaging.new_message("fairState")
  add_maps(msg.fairState, newest, dense)
  serialize("fairState", msg)
  s = msg.as_reader().fairState
  assert (s.depth.frameId, s.depth.metric, s.segmentation.frameId, list(s.segmentation.classes)) == (
    1000,
    True,
    1000,
    ["a", "b", "c"],
  )
  got, step = depth_from_message(s.depth), 1 if dense else 4
  assert got.shape == (64 // step, 128 // step) and np.allclose(
    got, z[::step, ::step].astype("f2"), equal_nan=True
  )  # each cell is one
  got, step = class_map_from_message(s.segmentation), 1 if dense else 4
  assert (got == class_map[::step, ::step]).all()


@pytest.mark.parametrize(("h", "w", "step"), [(16, 32, 1), (16, 33, 2), (64, 128, 4), (68, 128, 8), (48, 512, 8)])
def test_a_class_map_is_thinned_until_it_is_small(h, w, step):
  """512 pixels at most: every step-th of both sides from the middle of the first step, by the least power of two."""
  class_map = np.random.default_rng(5).integers(0, 3, (h, w)).astype(np.uint8)
  _, msg = segmentation_message(Segmentation(["a", "b", "c"], class_map, np.ones(3, np.float32)), STAMP)
  small = messaging.new_message("fairState").fairState.segmentation
  coarse_classes(small, msg.as_reader().fairSegmentation)
  got = class_map_from_message(small)
  assert got.size <= 512 and (got == class_map[step // 2 :: step, step // 2 :: step]).all()


def test_features_are_sent_as_they_are():
  assert features_message(None, STAMP) is None
  features = np.random.default_rng(6).normal(0, 9, (3, 2, 4)).astype(np.float16)
  service, msg = features_message(features, STAMP)
  m = msg.as_reader().fairFeatures
  assert (service, m.channels, m.height, m.width, m.frameId, m.timestampEof, m.bundle) == (
    "fairFeatures",
    3,
    2,
    4,
    1000,
    50_000_000_000,
    "a-bundle",
  )
  assert (np.frombuffer(m.data, "<f2").reshape(3, 2, 4) == features).all()


def test_a_crowd_keeps_the_budget():
  """96 objects and 8 lines that are new in every frame, which nothing compresses."""
  r = np.random.default_rng(3)
  out = {True: [], False: []}
  for i in range(100):
    stamp = Stamp(i, 50_000_000 * (i + 1), "a-bundle", 0.01, True)
    t, some = tracked(r), lines(r)
    for dense, messages in out.items():
      for _, msg in (objects_message(t, stamp, dense), lanes_message(some, stamp, dense)):
        msg.logMonoTime = stamp.timestamp_eof
        messages.append(msg.to_bytes())
  small, dense = (log_sizes(out[form])[0]["all"][2] for form in (False, True))
  print(f"{small:.0f} and {dense:.0f} kB a minute")
  assert (
    small < 1.6 * BUDGET < dense / 4
  )  # noise in every bit that is kept; a real crowd moves little from frame to frame


def test_a_real_drive_keeps_the_budget(shared_data, tmp_path):
  folder = shared_data / "realdata" / "0000002c--d68dde99ca--1"
  model = FairModel(load_bundle(MODELS_DIR / "fair_unified_small"), dense=False)
  segments = Route(folder).segments
  messages = list(process_replay(segments, model, "qcamera", 10.0, 3.0, progress=False))
  logged, live = log_sizes(messages)
  assert set(live) == {"fairDepth", "fairSegmentation"} and set(logged) == {
    "fairState",
    "fairObjects",
    "fairLanes",
    "all",
  }
  assert logged["all"][2] < BUDGET / 2
  assert logged["all"][0] * logged["all"][1] / model.frames < FRAME_BYTES
  # the report and the overlay take what loggerd kept, as they take all
  path = tmp_path / "rlog.zst"
  write_log(path, [dat for dat in messages if SERVICE_LIST[messaging.log_from_bytes(dat).which()].should_log])
  numbers = measure(path, segments)
  assert (numbers["frames"], numbers["invalid"], numbers["objects"]["messages"], numbers["lanes"]["messages"]) == (
    60,
    0,
    60,
    60,
  )
  assert show([path], segments, "qcamera", tmp_path / "overlay.mp4", 3)[0] == 3


def test_what_is_dense_is_not_logged():
  assert {s for s in SERVICES if SERVICE_LIST[s].should_log} == {"fairState", "fairObjects", "fairLanes"}
  assert all(SERVICE_LIST[s].decimation is None for s in SERVICES if not SERVICE_LIST[s].should_log)


def test_the_param_says_whether_the_log_is_dense(tmp_path, prefix):
  params = Params()
  assert not read_flag(params, "FairLogDense")
  params.put_bool("FairLogDense", True)
  assert read_flag(params, "FairLogDense") and not read_flag(params, "FairNoSuchParam")  # a fork that did not add it
  bundle = write_bundle(tmp_path / "tiny")
  for dense in (False, True):
    daemon = FairModeld(lambda: bundle.path, None, dense=dense)
    try:
      assert daemon.choice.load(bundle).dense is dense
    finally:
      daemon.pm.close()
      daemon.inbox.sm.close()

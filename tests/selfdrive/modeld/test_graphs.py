"""FairModel over graphs that are known exactly: parts decoded together, state and slots fed back, each graph failing
alone."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest

from fair_bundle import (
  OBJECT_CLASSES,
  SLOTS,
  detector_graph,
  lanes_graph,
  manifest,
  objects_graph,
  write_bundle,
  write_graphs,
)
from openpilot.cereal.visionipc import nv12_info
from openpilot.selfdrive.modeld.fair.bundle import BundleError, write_manifest
from openpilot.selfdrive.modeld.fair.heads import objects as objects_head
from openpilot.selfdrive.modeld.fair.lanes import MAX_HIDDEN
from openpilot.selfdrive.modeld.fair.model import MAX_STEP, FairModel
from openpilot.selfdrive.modeld.fair.publish import mask_from_message, serialize, size_limit

W, H = 1344, 760
STRIDE, Y_HEIGHT, _, SIZE = nv12_info(W, H)
HEIGHT = 1.3


def raw_objects(r=None, peaks=((0, 10, 20), (1, 20, 50))):
  r = r or np.random.default_rng(0)
  raw = {
    "heat": np.full((1, 3, 32, 64), -9, np.float32),
    "box": r.uniform(8, 40, (1, 4, 32, 64)).astype(np.float32),
    "coef": np.tanh(r.normal(0, 1, (1, 16, 32, 64))).astype(np.float32),
    "proto": r.normal(0, 1, (1, 16, 64, 128)).astype(np.float32),
    "embed": r.normal(0, 1, (1, 16, 32, 64)).astype(np.float32),
  }
  for k, i, j in peaks:
    raw["heat"][0, k, i, j] = 1
  return raw


def ready(bundle) -> FairModel:
  model = FairModel(bundle)
  model.set_camera(W, H, STRIDE, STRIDE * Y_HEIGHT)
  model.set_calibration([0.0, 0.0, 0.0], HEIGHT)
  return model


def run(model, frame_id, level=100, lines=None):
  """One frame of constant value -> {service: message}."""
  return dict(model.process(np.full(SIZE, level, np.uint8), frame_id, frame_id * 50, frame_id * 50 + 1, lines))


def lines_at(*ys):
  x = np.linspace(0, 13, 33) ** 2
  return SimpleNamespace(
    laneLines=[SimpleNamespace(x=x.tolist(), y=(y + 0 * x).tolist(), z=[HEIGHT] * 33) for y in ys],
    laneLineProbs=[0.9] * len(ys),
  )


def test_objects_are_decoded_tracked_and_sent(tmp_path):
  raw = raw_objects()
  model = ready(write_graphs(tmp_path, [objects_graph(tmp_path, raw)]))
  for t in range(5):
    sent = run(model, t, 100)
  assert list(sent) == ["fairObjects"] and sent["fairObjects"].valid
  m = sent["fairObjects"].fairObjects
  shifted = {**raw, "heat": raw["heat"] + np.float32(1.0)}
  want = objects_head.decode(shifted, {"heat": {"classes": OBJECT_CLASSES}}, model.warp.valid)
  assert list(m.classes) == OBJECT_CLASSES and len(m.objects) == len(want.boxes) == 2
  for o in m.objects:
    n = int(np.abs(want.boxes - np.array(list(o.box))).sum(1).argmin())
    np.testing.assert_allclose(list(o.box), want.boxes[n], atol=1e-3)  # float32
    assert o.classId == want.class_ids[n] and o.prob == pytest.approx(want.scores[n], rel=1e-5)
    assert (mask_from_message(o) == want.masks[n]).all() and (o.maskHeight, o.maskWidth) == (64, 128)
    assert o.age == 4 and not o.occluded and o.visibility == 1 and o.trackId in (1, 2)
    foot = np.array([(o.box[0] + o.box[2]) / 2, o.box[3]])
    np.testing.assert_allclose(list(o.position), model.ground.road(foot), rtol=1e-4)
    assert len(o.positionStd) == 3 and o.positionStd[0] > 0
  assert m.frameId == 4 and m.timestampEof == 201 and m.bundle == "tiny"


def test_objects_that_vanish_are_told_as_occluded(tmp_path):
  model = ready(write_graphs(tmp_path, [objects_graph(tmp_path, raw_objects())]))
  for t in range(5):
    run(model, t, 100)
  model.bundle.graphs[0]["outputs"][0]["parameters"]["threshold"] = 0.999  # nothing is over it
  o = run(model, 5)["fairObjects"].fairObjects.objects
  assert len(o) == 2 and all(e.occluded and e.visibility == 0 and not e.mask and len(e.position) == 3 for e in o)


def test_detector_and_objects_are_one_message(tmp_path):
  raw = raw_objects()
  boxes = np.zeros((1, 4, 4), np.float32)
  d = objects_head.decode(raw, {"heat": {"classes": OBJECT_CLASSES}}, np.ones((256, 512), bool))
  for q, b in enumerate([d.boxes[0], [300, 30, 340, 60]]):  # the first object again, and something new
    boxes[0, q] = [
      ((b[0] + b[2]) / 2 + 0.5) / 512,
      ((b[1] + b[3]) / 2 + 0.5) / 256,
      (b[2] - b[0]) / 512,
      (b[3] - b[1]) / 256,
    ]
  logits = np.full((1, 4, 3), -5, np.float32)
  logits[0, 0, d.class_ids[0]], logits[0, 1, 2] = 3, 2
  model = ready(write_graphs(tmp_path, [detector_graph(tmp_path, logits, boxes), objects_graph(tmp_path, raw)]))
  run(model, 0, 0)
  m = run(model, 1, 0)["fairObjects"].fairObjects
  assert sorted((OBJECT_CLASSES[o.classId], bool(o.mask)) for o in m.objects) == [
    ("cyclist", False),
    ("pedestrian", True),
    ("vehicle", True),
  ]
  # objects fail: the boxes of the detector still come
  after = run(model, 2, 255)["fairObjects"]
  assert after.valid and len(after.fairObjects.objects) == 3 and "objects" in model.fault
  assert [o.occluded for o in after.fairObjects.objects].count(True) == 1 and model.invalid == 1


def test_a_graph_that_fails_leaves_the_others(tmp_path):
  write_bundle(tmp_path)
  scene = manifest()["graphs"][0]
  model = ready(write_graphs(tmp_path, [objects_graph(tmp_path, raw_objects()), lanes_graph(tmp_path), scene]))
  for t in range(3):
    sent = run(model, t, 100, lines_at(-1.7, 1.7))
  assert all(m.valid for m in sent.values()) and set(sent) == {
    "fairObjects",
    "fairLanes",
    "fairDepth",
    "fairSegmentation",
  }
  ids = [o.trackId for o in sent["fairObjects"].fairObjects.objects]
  sent = run(model, 4, 255, lines_at(-1.7, 1.7))  # NaN in objects and lanes
  assert {k: m.valid for k, m in sent.items()} == {
    "fairObjects": False,
    "fairLanes": False,
    "fairDepth": True,
    "fairSegmentation": True,
  }
  assert len(sent["fairObjects"].fairObjects.objects) == 0 and len(sent["fairLanes"].fairLanes.lines) == 0
  sent = run(model, 5, 100, lines_at(-1.7, 1.7))
  assert all(m.valid for m in sent.values()) and [o.trackId for o in sent["fairObjects"].fairObjects.objects] == ids
  assert len(sent["fairLanes"].fairLanes.lines) == 2
  assert (model.plans[1].inputs["lanes_template"] == 1).all()  # it began anew; NaN did not go round


def state(model, name="lanes_template"):
  return float(model.plans[0].inputs[name].max())


def test_state_goes_round(tmp_path):
  model = ready(write_graphs(tmp_path, [lanes_graph(tmp_path)]))
  hidden = 0.0
  for t in range(10):
    level = 10 * t
    run(model, t, level, lines_at(-1.7, 1.7))
    hidden = hidden / 2 + level
    assert state(model) == t + 1 and state(model, "lanes_hidden") == pytest.approx(hidden, rel=1e-6)


@pytest.mark.parametrize(
  ("reset", "at"),
  [("never", ""), ("stream", "stream"), ("gap", "stream gap"), ("calibration", "stream gap calibration")],
)
def test_state_begins_anew_as_the_manifest_says(tmp_path, reset, at):
  model = ready(write_graphs(tmp_path, [lanes_graph(tmp_path, reset)]))
  for event in ("stream", "gap", "calibration"):
    frame_id = 1000 * len(event)
    model._reset_plan(model.plans[0], (reset,))
    model.plans[0].last_frame = None
    for t in range(3):
      run(model, frame_id + t, 100, lines_at(-1.7, 1.7))
    assert state(model) == 3
    frame_id += 3
    if event == "stream":
      model.set_camera(W, H, STRIDE, STRIDE * Y_HEIGHT, "mici", "os04c10")
      assert state(model) == 3  # the same camera, known by name
      model.set_camera(W, H, STRIDE, STRIDE * Y_HEIGHT, wide=True)
    elif event == "gap":
      frame_id += MAX_STEP
    else:
      assert model.set_calibration([0.0, 0.004, 0.0], HEIGHT) and state(model) == 3  # less than a pixel of a map
      assert model.set_calibration([0.0, 0.02, 0.0], HEIGHT)
    run(model, frame_id, 100, lines_at(-1.7, 1.7))
    assert state(model) == (1 if event in at else 4), event
  small = model.plans[0].last_frame
  run(model, small + MAX_STEP, 100)
  assert state(model) == (2 if "calibration" in at else 5)  # a few dropped frames are no gap
  run(model, small, 100)
  assert (state(model) == 1) == ("gap" in at)  # a number that falls is


@pytest.mark.parametrize("reset", ["never", "stream", "gap", "calibration"])
def test_after_nan_every_state_begins_anew(tmp_path, reset):
  """One that nothing else resets too: it would put out NaN for ever."""
  model = ready(write_graphs(tmp_path, [lanes_graph(tmp_path, reset)]))
  for t in range(3):
    run(model, t, 100, lines_at(-1.7, 1.7))
  assert state(model) == 3
  assert not run(model, 3, 255, lines_at(-1.7, 1.7))["fairLanes"].valid
  assert run(model, 4, 100, lines_at(-1.7, 1.7))["fairLanes"].valid and state(model) == 1


@pytest.mark.parametrize(("step", "kept"), [(5, True), (6, False)])
def test_more_than_five_frames_are_a_gap(tmp_path, step, kept):
  model = ready(write_graphs(tmp_path, [lanes_graph(tmp_path, "gap")]))
  for t in range(3):
    run(model, t, 100, lines_at(-1.7, 1.7))
  run(model, 2 + step, 100, lines_at(-1.7, 1.7))
  assert state(model) == (4 if kept else 1)


def test_points_begin_on_modelV2s_lines_and_are_tracked(tmp_path):
  model = ready(write_graphs(tmp_path, [lanes_graph(tmp_path)]))
  first = run(model, 0, 100, lines_at(-1.7, 1.7))["fairLanes"]
  lines = {e.lineId: e for e in first.fairLanes.lines}
  assert first.valid and sorted(lines) == [1, 2]
  slots = model.plans[0].slots
  for e in lines.values():
    y = np.array(list(e.roadY))
    assert (
      len(y) > 15 and np.abs(np.abs(y) - 1.7).max() < 1e-3 and np.abs(np.array(list(e.roadZ)) - HEIGHT).max() < 1e-6
    )
    px = np.stack([list(e.x), list(e.y)], axis=1)
    np.testing.assert_allclose(model.ground.road(px)[:, 0], list(e.roadX), rtol=1e-4)
    assert (np.diff(px[:, 1]) <= 0).all() and e.kind == "lane" and len(e.fit) == 4
    assert e.prob == pytest.approx(1 / (1 + np.exp(-3)), rel=1e-3) and np.allclose(
      list(e.visibility), 1 / (1 + np.exp(-3))
    )
    assert np.polyval(list(e.fit)[::-1], 15.0) == pytest.approx(y.mean(), abs=0.02)
  assert slots.fresh.sum() == slots.mask.sum() == sum(len(e.x) for e in lines.values()) <= SLOTS
  before = slots.points.copy()
  run(model, 1, 100, lines_at(-1.7, 1.7))
  old = (slots.mask[0] > 0) & (slots.fresh[0] == 0)
  np.testing.assert_allclose(
    slots.points[0, old] - before[0, old], [[0, 2]] * old.sum(), atol=1e-4
  )  # the graph moved them, nobody else
  # what leaves the view below begins again where its line has no point
  fresh = 0
  for t in range(2, 40):
    out = run(model, t, 100, lines_at(-1.7, 1.7))["fairLanes"].fairLanes
    fresh += int(slots.fresh.sum())
    assert (slots.points[0, slots.mask[0] > 0, 1] <= 255).all()
  assert fresh > 20 and {e.lineId for e in out.lines} == {1, 2}
  assert min(len(e.x) for e in out.lines) > 10


def test_lines_live_without_modelV2_and_through_a_lane_change(tmp_path):
  model = ready(write_graphs(tmp_path, [lanes_graph(tmp_path)]))
  slots = model.plans[0].slots
  run(model, 0, 100, lines_at(-1.7, 1.7))
  run(model, 1, 100, None)
  assert (slots.ids > 0).sum() == 2
  # modelV2's indices move on by one: the lines are known by where they are
  names = []
  for t, shift in enumerate(np.linspace(0, 1.6, 33), 2):
    x = np.maximum(model.ground.road(slots.points[0])[:, 0], 1)
    slots.points[0, :, 0] += np.where(slots.mask[0] > 0, model.ground.f * 0.05 / x, 0)  # the road moves too
    out = run(
      model, t, 100, lines_at(*([-5.1 + shift, -1.7 + shift, 1.7 + shift] if t % 2 else [-1.7 + shift, 1.7 + shift]))
    )
    names.append(
      {
        e.lineId
        for e in out["fairLanes"].fairLanes.lines
        if abs(np.polyval(list(e.fit)[::-1], 12.0) - (-1.7 + shift)) < 0.6
      }
    )
  assert all(1 in n or 2 in n for n in names) and len({frozenset(n & {1, 2}) for n in names}) == 1


@pytest.mark.parametrize("named", [True, False])
def test_points_begin_on_the_segmentation_without_modelV2(tmp_path, named):
  """The scene's graph says 'lane' everywhere in a column of the frame: there the line is found. So it is where the
  classes have other names, and the manifest says which one is paint."""
  write_bundle(tmp_path)
  scene = manifest()["graphs"][0]
  if not named:
    scene["outputs"][1] |= {
      "classes": ["a", "b", "stripe", "road", "lane"],
      "roles": {"b": "ground", "stripe": "marking"},
    }
  model = ready(write_graphs(tmp_path, [scene, lanes_graph(tmp_path)]))
  run(model, 0, 100)
  assert model.segmentation is not None and (model.plans[1].slots.ids == 0).all()
  i = np.arange(18, 64)
  x = model.ground.f * HEIGHT / (4 * i + 1.5 - model.ground.cy)
  j = np.round((model.ground.cx + model.ground.f * 1.7 / x - 1.5) / 4).astype(int)
  class_map = np.zeros((64, 128), np.uint8)
  class_map[i[j < 128], j[j < 128]] = 2
  seg = copy.copy(model.segmentation)
  seg.class_map = class_map
  model.segmentation = seg
  model._seed(model.plans[1].slots, None)
  model._seed(model.plans[1].slots, None)
  slots = model.plans[1].slots
  road = model.ground.road(slots.points[0, slots.mask[0] > 0])
  assert (slots.ids > 0).sum() == 1 and len(road) > 10
  assert (np.abs(road[:, 1] - 1.7) < 3 * road[:, 0] / model.ground.f).all()  # 2 pixels of the map's rounding, 1 more


def test_a_line_that_is_not_seen_for_two_seconds_ends(tmp_path):
  graph = lanes_graph(tmp_path)
  model = ready(write_graphs(tmp_path, [graph]))
  slots = model.plans[0].slots
  for t in range(3):
    run(model, t, 100, lines_at(-1.7, 1.7))
  decode = model.plans[0].heads["lanes"]
  assert set(decode) == {"points", "visible"}
  from openpilot.selfdrive.modeld.fair.heads.lanes import LanePoints

  ground = model.ground
  for t in range(MAX_HIDDEN + 3):
    found = LanePoints(slots.points[0].copy(), np.zeros(SLOTS, np.float32))  # glare: nothing is visible
    slots.fresh[:] = 0
    lines = slots.update(found, ground)
    if t < MAX_HIDDEN:
      assert len(lines) == 2 and all(e.prob == 0 for e in lines)
  assert not lines and (slots.ids == 0).all() and slots.mask.sum() == 0
  run(model, 3, 100, lines_at(-1.7, 1.7))
  run(model, 4, 100, lines_at(-1.7, 1.7))
  run(model, 5, 100, lines_at(-1.7, 1.7))
  assert sorted(slots.ids.tolist())[-2:] == [3, 4]  # ids are not used again


def change(graph, path, value):
  node = graph
  for k in path[:-1]:
    node = node[k]
  node[path[-1]] = value


@pytest.mark.parametrize(
  ("kind", "breakage", "message"),
  [
    ("objects", lambda g: g["outputs"].pop(1), "lacks its part box"),
    ("objects", lambda g: g["outputs"].pop(3), "lacks its part proto"),
    ("objects", lambda g: change(g, ("outputs", 1, "parameters", "part"), "heat"), "two outputs are part 'heat'"),
    (
      "objects",
      lambda g: change(g, ("outputs", 1, "parameters", "part"), "nose"),
      "output 'objects_box' is part 'nose'",
    ),
    ("objects", lambda g: change(g, ("outputs", 0, "classes"), ["a"]), "3 channels and 1 classes"),
    ("lanes", lambda g: g.pop("point_slots"), "point slots and the head 'lanes' belong together"),
    (
      "lanes",
      lambda g: change(g, ("point_slots", "count"), 5),
      r"5 point slots need an input 'lanes_points', float32\[1, 5, 2\]",
    ),
    ("lanes", lambda g: change(g, ("point_slots", "mask"), "nose_mask"), "need an input 'nose_points'"),
    ("lanes", lambda g: change(g, ("state", 0, "output"), "nose"), "state goes from output 'nose'"),
    ("lanes", lambda g: change(g, ("state", 0, "output"), "lanes_hidden_out"), "must both exist and be alike"),
    ("lanes", lambda g: g["state"].pop(), "states and point slots, not 'lanes_hidden'"),
    ("objects", lambda g: change(g, ("inputs", 0, "frames"), [-1, 0]), "the newest frame as 'frame'"),
    ("objects", lambda g: change(g, ("inputs", 0, "name"), "picture"), "not 'picture'"),
  ],
)
def test_what_does_not_fit_is_one_line(tmp_path, kind, breakage, message):
  graph = objects_graph(tmp_path, raw_objects()) if kind == "objects" else lanes_graph(tmp_path)
  breakage(graph)
  bundle = write_manifest(tmp_path, {**manifest(), "graphs": [graph]})
  with pytest.raises(BundleError, match=message) as e:
    FairModel(bundle)
  assert "\n" not in str(e.value)


def test_the_largest_messages_fit_and_larger_are_refused(tmp_path):
  """50 objects whose masks are chequered: nothing takes more run lengths."""
  raw = raw_objects(peaks=[(0, 6 * (n // 10) + 1, 6 * (n % 10) + 3) for n in range(50)])
  raw["box"][:] = 600
  raw["proto"][:] = 0
  raw["proto"][0, 0] = (np.indices((64, 128)).sum(0) % 2) * 2 - 1
  raw["coef"][:] = 0.9
  model = ready(write_graphs(tmp_path, [objects_graph(tmp_path, raw)]))
  msg = run(model, 0)["fairObjects"]
  assert len(msg.fairObjects.objects) == 50 and any(len(o.mask) > 8000 for o in msg.fairObjects.objects)
  assert len(serialize("fairObjects", msg)) < size_limit("fairObjects")
  msg = run(model, 1)["fairObjects"]  # pycapnp warns where one message is written twice
  with pytest.raises(ValueError, match=r"fairLanes of \d+ bytes was not sent"):
    serialize("fairLanes", msg)


def test_equal_input_gives_equal_bytes(tmp_path):
  write_bundle(tmp_path)
  bundle = write_graphs(
    tmp_path, [objects_graph(tmp_path, raw_objects()), lanes_graph(tmp_path), manifest()["graphs"][0]]
  )
  runs = []
  for _ in range(2):
    model, out = ready(bundle), []
    for t in range(6):
      for _, m in model.process(np.full(SIZE, 20 * t, np.uint8), t, 0, 1, lines_at(-1.7, 1.7)):
        m.logMonoTime = 5
        out.append(m.to_bytes())
    runs.append(out)
  assert runs[0] == runs[1] and len(runs[0]) == 21  # depth at half the rate

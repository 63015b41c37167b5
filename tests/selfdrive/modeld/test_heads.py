"""Each head against a straightforward reference: loops in float64, or the library whose format it is."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from openpilot.common.transformations.camera import view_frame_from_device_frame
from openpilot.common.transformations.model import medmodel_intrinsics, sbigmodel_intrinsics
from openpilot.selfdrive.modeld.fair.heads import HEADS, detector, features, lanes, objects, part_of
from openpilot.selfdrive.modeld.fair.heads.ground import DEFAULT_HEIGHT, view_ground
from openpilot.selfdrive.modeld.fair.heads.rle import decode_mask, encode_masks

CLASSES = ["vehicle", "pedestrian", "cyclist"]
ALL = np.ones((256, 512), bool)
GROUND = view_ground("medmodel", 1.3)


@settings(max_examples=150, deadline=None)
@given(
  st.integers(1, 40),
  st.integers(1, 40),
  st.integers(1, 6),
  st.integers(0, 2**32 - 1),
  st.sampled_from([0.0, 0.02, 0.3, 0.9, 1.0]),
  st.integers(1, 7),
)
def test_run_lengths_are_pycocotools_bit_for_bit(h, w, m, seed, density, zoom):
  coco = pytest.importorskip("pycocotools.mask")
  masks = np.random.default_rng(seed).random((m, h, w)) < density
  masks = masks.repeat(zoom, 1).repeat(zoom, 2)  # longer runs take more characters
  masks[-1] ^= True
  got = encode_masks(masks)
  for text, want, mask in zip(
    got, coco.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8))), masks, strict=True
  ):
    assert text.encode() == want["counts"]
    assert (decode_mask(text, *mask.shape) == mask).all()
    assert (coco.decode({"size": list(mask.shape), "counts": text.encode()}) == mask).all()


@pytest.mark.parametrize("text", ["", "0", "~~", "\u00e9", "P", "oooooooooooo"])
def test_broken_run_lengths_are_refused(text):
  with pytest.raises(ValueError):
    decode_mask(text, 8, 8)
  assert encode_masks(np.zeros((0, 4, 4), bool)) == []


def raw_objects(r, peaks=40):
  heat = r.normal(-6, 1, (1, 3, 32, 64)).astype(np.float32)
  for _ in range(peaks):
    heat[0, r.integers(3), r.integers(32), r.integers(64)] = r.normal(1, 1.5)
  return {
    "heat": heat,
    "box": r.uniform(-2, 60, (1, 4, 32, 64)).astype(np.float32),
    "coef": np.tanh(r.normal(0, 1, (1, 16, 32, 64))).astype(np.float32),
    "proto": r.normal(0, 1, (1, 16, 64, 128)).astype(np.float32),
    "embed": r.normal(0, 1, (1, 16, 32, 64)).astype(np.float32),
  }


def iou(a, b):
  inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
  return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def reference_objects(raw, valid, threshold):
  """As the contract says it, one cell at a time."""
  heat, found = raw["heat"][0].astype(np.float64), []
  for k in range(3):
    for i in range(32):
      for j in range(64):
        around = heat[k, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
        x, y = 8 * j + 3.5, 8 * i + 3.5
        score = 1 / (1 + np.exp(-heat[k, i, j]))
        if score < threshold or heat[k, i, j] < around.max() or not valid[int(y), int(x)]:
          continue
        left, top, right, bottom = np.maximum(raw["box"][0, :, i, j].astype(np.float64), 0)
        box = [max(x - left, -0.5), max(y - top, -0.5), min(x + right, 511.5), min(y + bottom, 255.5)]
        found.append((score, k, i, j, box))
  found.sort(key=lambda e: -e[0])
  kept = []
  for e in found[:50]:
    if not any(abs(e[2] - o[2]) <= 2 and abs(e[3] - o[3]) <= 2 and iou(e[4], o[4]) > 0.7 for o in kept):
      kept.append(e)
  return kept


@pytest.mark.parametrize("seed", range(6))
def test_objects_against_a_loop(seed):
  r = np.random.default_rng(seed)
  raw, valid, threshold = raw_objects(r, 10 + 25 * seed), r.random((256, 512)) < 0.9, 0.3 + 0.05 * seed
  specs = {"heat": {"classes": CLASSES, "parameters": {"part": "heat", "threshold": threshold}}}
  d = objects.decode(raw, specs, valid)
  want = reference_objects(raw, valid, threshold)
  assert len(d.boxes) == len(want) > 3 and d.classes == CLASSES
  for n, (score, k, i, j, box) in enumerate(want):
    assert d.class_ids[n] == k and d.scores[n] == pytest.approx(score, rel=1e-5)  # float32 exponential
    np.testing.assert_allclose(d.boxes[n], box, atol=1e-4)  # pixels, float32
    logits = np.tensordot(raw["coef"][0, :, i, j].astype(np.float64), raw["proto"][0].astype(np.float64), 1)
    x, y = np.arange(128) * 4 + 1.5, np.arange(64) * 4 + 1.5
    inside = ((x >= box[0]) & (x <= box[2]))[None] & ((y >= box[1]) & (y <= box[3]))[:, None]
    clear = np.abs(logits) > 1e-4  # nearer to the border float32 may round to the other side
    assert (d.masks[n] == ((logits > 0) & inside))[clear].all()
    e = raw["embed"][0, :, i, j].astype(np.float64)
    np.testing.assert_allclose(d.embed[n], e / np.linalg.norm(e), atol=1e-6)


def test_objects_of_pictures_of_any_size():
  """The same cells of a picture that is 1.25 times as wide and twice as high: boxes are in its own pixels."""
  raw = raw_objects(np.random.default_rng(3), 60)
  specs = {"heat": {"classes": CLASSES}}
  small, large = (objects.decode(raw, specs, np.ones(shape, bool)) for shape in ((256, 512), (512, 640)))
  assert len(small.boxes) > 3 and len(large.boxes) > 3
  _, i, j, _ = objects.peaks(raw["heat"][0], objects.logit(objects.THRESHOLD))
  centers = np.stack([j * 10 + 4.5, i * 16 + 7.5], axis=1)
  left_top = np.maximum(centers[0] - np.maximum(raw["box"][0, :2, i[0], j[0]], 0), -0.5)
  np.testing.assert_allclose(large.boxes[0, :2], left_top, atol=1e-3)
  x, y = np.arange(128) * 5 + 2.0, np.arange(64) * 8 + 3.5
  for box, mask in zip(large.boxes, large.masks, strict=True):
    inside = ((x >= box[0]) & (x <= box[2]))[None] & ((y >= box[1]) & (y <= box[3]))[:, None]
    assert not mask[~inside].any()


def blob(cells):
  """One heat map with peaks (class, row, column, logit, half size) and nothing else."""
  raw = {"heat": np.full((1, 3, 32, 64), -9, np.float32), "box": np.zeros((1, 4, 32, 64), np.float32)}
  for k, i, j, v, half in cells:
    raw["heat"][0, k, i, j], raw["box"][0, :, i, j] = v, half
  return objects.decode(raw, {"heat": {"classes": CLASSES}}, ALL)


def test_twins_are_one_and_neighbors_are_two():
  assert len(blob([(0, 10, 20, 2, 60), (0, 10, 22, 1, 60)]).boxes) == 1  # one large vehicle with two peaks
  d = blob([(0, 10, 20, 1, 30), (2, 10, 20, 2, 30)])  # one thing, two classes: the likelier
  assert d.class_ids.tolist() == [2] and d.masks is None and d.embed is None
  assert len(blob([(0, 10, 20, 2, 60), (0, 10, 23, 1, 60)]).boxes) == 2  # as alike, but three cells apart: two cars
  assert len(blob([(0, 10, 20, 2, 60), (0, 10, 22, 1, 20)]).boxes) == 2  # a small one before a large one
  assert len(blob([]).boxes) == 0
  assert len(blob([(0, 2 * (n // 32), 2 * (n % 32), 2, 3) for n in range(70)]).boxes) == 50


@pytest.mark.parametrize("seed", range(3))
def test_detector_against_a_loop(seed):
  r = np.random.default_rng(seed)
  logits, boxes = r.normal(-1.5, 1.5, (1, 120, 3)).astype(np.float32), r.uniform(0, 1, (1, 120, 4)).astype(np.float32)
  boxes[0, 0, 0], logits[0, 0] = 1.5, 5  # center outside the view
  valid = r.random((256, 512)) < 0.9
  specs = {"logits": {"classes": CLASSES, "parameters": {"threshold": 0.4}}}
  d = detector.decode({"logits": logits, "boxes": boxes}, specs, valid)
  assert d.masks is None
  masks = r.normal(size=(1, 120, 8, 16)).astype(np.float32)
  own = detector.decode({"logits": logits, "boxes": boxes, "masks": masks}, specs, valid)
  best = 1 / (1 + np.exp(-logits[0].max(1)))
  queries = [int(np.abs(best - s).argmin()) for s in d.scores]
  assert (own.masks == (masks[0, queries] > 0)).all() and (own.boxes == d.boxes).all()
  want = []
  for q in range(120):
    p = 1 / (1 + np.exp(-logits[0, q].astype(np.float64)))
    cx, cy, w, h = boxes[0, q].astype(np.float64) * [512, 256, 512, 256]
    cx, cy = cx - 0.5, cy - 0.5
    if p.max() >= 0.4 and cx < 511.5 and valid[round(cy), round(cx)]:
      want.append(
        (p.max(), p.argmax(), np.clip([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -0.5, [511.5, 255.5] * 2))
      )
  want = sorted(want, key=lambda e: -e[0])[:50]
  assert len(d.boxes) == len(want) > 10
  np.testing.assert_allclose(d.scores, [e[0] for e in want], rtol=1e-5)
  assert d.class_ids.tolist() == [e[1] for e in want]
  np.testing.assert_allclose(d.boxes, [e[2] for e in want], atol=1e-3)  # pixels, float32


def test_features_are_off_unless_asked_for():
  raw = np.random.default_rng(0).normal(0, 1e5, (1, 8, 16, 32)).astype(np.float32)
  assert features.decode(raw, {}, ALL) is None
  out = features.decode(raw, {"parameters": {"publish": True}}, ALL)
  assert out.dtype == np.float16 and out.shape == (8, 16, 32) and np.isfinite(out).all()
  small = np.abs(raw[0]) < 6e4
  np.testing.assert_allclose(out[small], raw[0][small], rtol=1e-3)  # float16


def test_parts_by_parameter_and_by_name():
  assert (
    part_of({"head": "lanes", "name": "lanes_points_out"}) == "points"
    and part_of({"head": "objects", "name": "objects_heat"}) == "heat"
  )
  assert (
    part_of({"head": "objects", "name": "x", "parameters": {"part": "box"}}) == "box"
    and part_of({"head": "depth", "name": "log_z"}) == "depth"
  )
  assert set(HEADS) == {"depth", "segmentation", "features", "objects", "detector", "oriented", "lanes"}


@pytest.mark.parametrize(("view", "k"), [("medmodel", medmodel_intrinsics), ("sbigmodel", sbigmodel_intrinsics)])
def test_ground_against_the_cameras_matrix(view, k):
  ground = view_ground(view, 1.4)
  r = np.random.default_rng(1)
  points = np.stack([r.uniform(3, 140, 50), r.uniform(-8, 8, 50), np.full(50, 1.4)], axis=1)
  p = points @ (k @ view_frame_from_device_frame).T
  np.testing.assert_allclose(ground.view(points), p[:, :2] / p[:, 2:], rtol=1e-9)
  np.testing.assert_allclose(ground.road(ground.view(points)), points, rtol=1e-9)
  assert np.isnan(
    ground.road(np.array([[256.0, ground.cy], [10, ground.cy - 20], [256, ground.cy + 1]]))
  ).all()  # horizon, sky, beyond 150 m
  assert np.isnan(ground.view(np.array([[-5.0, 0, 1.4]]))).all()
  # the deviation against a hundred thousand draws; the error is nearly linear at 20 m
  row = ground.cy + ground.f * 1.4 / 20 + r.normal(0, 1, 100_000) * np.hypot(2.0, ground.f * 0.005)
  x = ground.f * 1.4 * (1 + r.normal(0, 0.05, 100_000)) / (row - ground.cy)
  assert float(ground.forward_std(np.array(20.0), 2.0)) == pytest.approx(x.std(), rel=0.1)
  assert view_ground(view, np.nan).height == view_ground(view, 9.0).height == view_ground(view).height == DEFAULT_HEIGHT


def model(lines, probs):
  x = np.linspace(0, 13, 33) ** 2
  make = lambda f: SimpleNamespace(x=x.tolist(), y=f(x).tolist(), z=[1.3] * 33)  # noqa: E731
  return SimpleNamespace(laneLines=[make(f) for f in lines], laneLineProbs=probs)


def test_lane_lines_of_the_model_are_projected():
  found = lanes.model_lines(
    model([lambda x: -1.8 + 1e-3 * x**2, lambda x: 1.8 + 0 * x, lambda x: 5 + 0 * x], [0.9, 0.5, 0.1]), GROUND
  )
  assert len(found) == 2
  for px, f in zip(found, (lambda x: -1.8 + 1e-3 * x**2, lambda x: 1.8 + 0 * x), strict=True):
    assert (np.diff(px[:, 1]) > 0).all()
    road = GROUND.road(px)
    np.testing.assert_allclose(road[:, 1], f(road[:, 0]), rtol=1e-6)
    assert road[:, 0].max() <= 60
  bad = model([lambda x: x * np.nan], [0.9])
  assert lanes.model_lines(bad, GROUND) == [] and lanes.model_lines(model([lambda x: x], [np.nan]), GROUND) == []


def test_lines_are_found_in_a_class_map():
  """Two lines, one dashed, and a crossing that is none."""
  class_map = np.zeros((64, 128), np.uint8)
  i = np.arange(18, 64)
  road_x = GROUND.f * GROUND.height / (4 * i + 1.5 - GROUND.cy)
  for y, dashed in ((-1.7, True), (1.7, False)):
    u = GROUND.cx + GROUND.f * (y + 4e-4 * road_x**2) / road_x
    for row, x, col in zip(i, road_x, u, strict=True):
      if 0 < col < 511 and not (dashed and int(x / 3) % 2):
        at = round((col - 1.5) / 4)
        class_map[row, max(0, at - 1) : at + 2] = 2
  class_map[50, 30:90] = 2
  found = lanes.map_lines(class_map, [2], GROUND, 4)
  assert len(found) == 2
  for px, y in zip(sorted(found, key=lambda p: p[-1, 0]), (-1.7, 1.7), strict=True):
    road = GROUND.road(px)
    assert (np.diff(px[:, 1]) > 0).all() and np.nanmax(road[:, 0]) > 25
    # 3 px of the map's rounding
    np.testing.assert_array_less(np.abs(road[:, 1] - (y + 4e-4 * road[:, 0] ** 2)), 3 * road[:, 0] / GROUND.f + 1e-6)
  assert lanes.map_lines(np.zeros((64, 128), np.uint8), [2], GROUND, 4) == []


def plain_lines(class_map, lane, most):
  """map_lines() as its contract says it: row by row, each run looking at every line."""
  h, w = class_map.shape
  s = 2 * GROUND.cx / w
  top = int(np.ceil((GROUND.cy + GROUND.f * GROUND.height / lanes.SEED_FAR + 0.5) / s - 0.5))
  found = []
  for i in range(h - 1, max(0, top) - 1, -1):
    j = 0
    while j < w:
      if class_map[i, j] != lane:
        j += 1
        continue
      a = j
      while j < w and class_map[i, j] == lane:
        j += 1
      if j - a > lanes.MAX_WIDTH:
        continue
      middle, best, nearest = (a + j - 1) / 2, None, lanes.COLUMN_REACH
      for line in found:
        (row, column), back = line[-1], line[-min(len(line), 5)]
        reach = lanes.ROW_REACH * (4 if len(line) >= lanes.MIN_ROWS else 1)
        if 0 < row - i <= reach:
          slope = (column - back[1]) / (back[0] - row) if len(line) > 1 else 0
          off = abs(column + slope * (row - i) - middle) / (1 if len(line) > 1 else 2)
          if off < nearest:
            best, nearest = line, off
      if best is None:
        found.append([])
      (found[-1] if best is None else best).append((i, middle))
  found = sorted((line for line in found if len(line) >= lanes.MIN_ROWS), key=len, reverse=True)[:most]
  return [np.array([[(j + 0.5) * s - 0.5, (i + 0.5) * s - 0.5] for i, j in line[::-1]]) for line in found]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.02, 0.1, 0.2]), st.integers(1, 6), st.booleans())
def test_lines_of_a_map_against_a_loop(seed, noise, count, all_lane):
  r = np.random.default_rng(seed)
  class_map = np.where(r.random((64, 128)) < noise, 2, r.integers(0, 2, (64, 128))).astype(np.uint8)
  rows = np.arange(64)
  for _ in range(count):
    a, b, wide = r.uniform(0, 128), r.uniform(-1.5, 1.5), r.integers(1, 4)
    for row, column in zip(rows, np.round(a + b * (63 - rows)).astype(int), strict=True):
      if 0 <= column < 128 and r.random() < 0.8:
        class_map[row, column : column + wide] = 2
  class_map[r.integers(64)] = 2 if all_lane else 0
  got, want = lanes.map_lines(class_map, [2], GROUND, 4), plain_lines(class_map, 2, 4)
  assert len(got) == len(want) and all((a == b).all() for a, b in zip(got, want, strict=True))


def test_maps_at_cells_and_overlaps_of_boxes_against_loops():
  r = np.random.default_rng(8)
  maps, i, j = r.normal(0, 1, (1, 5, 32, 64)).astype(np.float32), r.integers(0, 32, 20), r.integers(0, 64, 20)
  assert (objects.at_cells(maps, i, j) == [[m[a, b] for m in maps[0]] for a, b in zip(i, j, strict=True)]).all()
  assert objects.at_cells(maps, i[:0], j[:0]).shape == (0, 5)
  low = r.uniform(0, 100, (30, 2))
  boxes = np.concatenate([low, low + r.uniform(1, 80, (30, 2))], axis=1)
  np.testing.assert_allclose(
    objects.box_iou(boxes[:10], boxes[10:]), [[iou(a, b) for b in boxes[10:]] for a in boxes[:10]], rtol=1e-12
  )


def test_fit_is_weighted_least_squares_with_a_prior():
  r = np.random.default_rng(3)
  x = np.sort(r.uniform(6, 60, (2, 24)))
  true = np.array([[1.7, 0.02, 4e-4, -2e-6], [-1.9, -0.01, 1e-4, 1e-6]])
  y = np.stack([np.polyval(c[::-1], x[k]) for k, c in enumerate(true)]) + r.normal(0, 0.02, x.shape)
  weight = r.uniform(0.2, 1, x.shape)
  weight[0, 5] = 0
  x[0, 5] = y[0, 5] = np.nan  # not in use
  y[1, 7] += 6  # a stray
  coef, off = lanes.fit_lines(x, y, weight, 910.0)
  near = np.linspace(8, 55, 20)
  for k in range(2):
    assert np.abs(np.polyval(coef[k][::-1], near) - np.polyval(true[k][::-1], near)).max() < 0.06
    np.testing.assert_allclose(lanes.on_line(coef[k], near), np.polyval(coef[k][::-1], near), rtol=1e-12)
  assert off[1, 7] > 20 and off[0, 5] == 0 and np.delete(off[1], 7).max() < 4
  few, _ = lanes.fit_lines(np.array([[10.0, 12.0]]), np.array([[2.0, 2.0]]), np.ones((1, 2)), 910.0)
  assert abs(np.polyval(few[0][::-1], 40.0) - 2) < 1.0  # two points stay nearly straight
  none, _ = lanes.fit_lines(np.full((1, 3), np.nan), np.full((1, 3), np.nan), np.zeros((1, 3)), 910.0)
  assert (none == 0).all()


def test_lane_points_outside_the_picture_are_not_visible():
  points = np.array([[[10, 10], [-3, 10], [np.nan, 4], [200, 100], [1e9, 3]]], np.float32)
  valid = ALL.copy()
  valid[100, 200] = False
  p = lanes.decode({"points": points, "visible": np.array([[2.0, 2, 2, 2, 2]], np.float32)}, {}, valid)
  np.testing.assert_allclose(p.visibility, [1 / (1 + np.exp(-2)), 0, 0, 0, 0], rtol=1e-6)

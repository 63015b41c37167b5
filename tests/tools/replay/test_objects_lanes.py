"""Objects and lanes in the overlay and in the report, from messages that are known."""

from dataclasses import replace

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from openpilot.cereal import messaging
from openpilot.common.transformations.model import get_warp_matrix
from openpilot.selfdrive.modeld.fair.frames import camera_intrinsics
from openpilot.selfdrive.modeld.fair.heads.ground import view_ground
from openpilot.selfdrive.modeld.fair.lanes import Line
from openpilot.selfdrive.modeld.fair.heads.depth import Depth
from openpilot.selfdrive.modeld.fair.heads.segmentation import Segmentation
from openpilot.selfdrive.modeld.fair.publish import (
  Stamp,
  depth_message,
  lanes_message,
  objects_message,
  segmentation_message,
)
from openpilot.selfdrive.modeld.fair.tracked import Tracked
from openpilot.selfdrive.modeld.fair.heads.segmentation import encode_runs
from openpilot.tools.lib.colors import TURBO, TINT, name_color, track_color
from openpilot.tools.lib.logwriter import write_log
from openpilot.tools.replay import report
from openpilot.tools.replay.overlay import CYAN, HIDDEN, LABELS, Labels, Overlay, lead_of
from openpilot.tools.replay.measure import Counts, Quality, mean_ms, measure
from openpilot.tools.replay.report import write_report

W, H = 1344, 760
GROUND = view_ground("medmodel", 1.22)


def tracked():
  masks = np.zeros((1, 64, 128), bool)
  masks[0, 20:30, 60:80] = True
  boxes = np.array([[240, 80, 320, 120], [100, 60, 160, 100]], np.float32)
  return Tracked(
    ["vehicle"],
    np.array([3, 7]),
    np.zeros(2, int),
    np.array([0.9, 0.8], np.float32),
    boxes,
    np.array([5, 9]),
    np.array([False, True]),
    np.array([1, 0], np.float32),
    masks,
    np.array([0, -1]),
    np.array([[17, 1, 1.22], [np.nan] * 3], np.float32),
    np.ones((2, 3), np.float32),
    np.array([16.5, np.nan], np.float32),
  )


def line():
  x = np.linspace(40, 6, 20)
  road = np.stack([x, np.full(20, 1.7), np.full(20, 1.22)], axis=1)
  return Line(
    4,
    0.9,
    "lane",
    GROUND.view(road).astype(np.float32),
    np.where(np.arange(20) < 15, 0.9, 0.1).astype(np.float32),
    road.astype(np.float32),
    np.array([1.7, 0, 0, 0]),
  )


def events(frame_id, valid=True):
  stamp = Stamp(frame_id, frame_id * 50_000_000, "b", 0.004, valid)
  out = [objects_message(tracked(), stamp)[1], lanes_message([line()], stamp)[1]]
  model = messaging.new_message("modelV2", valid=True)
  model.modelV2.frameId = frame_id
  entry = model.modelV2.init("laneLines", 1)[0]
  entry.x, entry.y, entry.z = [0.0, 50.0], [1.9, 1.9], [1.22, 1.22]
  model.modelV2.laneLineProbs = [0.9]
  for m in [*out, model]:
    m.logMonoTime = frame_id * 50_000_000 + 20_000_000
  return [*out, model]


def test_overlay_draws_masks_boxes_points_and_lines():
  overlay = Overlay(W, H)
  for m in events(5)[:2]:
    overlay.message(messaging.log_from_bytes(m.to_bytes()))
  black = np.zeros((H, W, 3), np.uint8)
  picture = overlay.draw(black, 5).astype(int)
  matrix = get_warp_matrix(np.zeros(3), camera_intrinsics(W, H))

  def at(px):
    p = matrix @ [*px, 1.0]
    x, y = np.round(p[:2] / p[2]).astype(int)
    return picture[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).max(0)

  np.testing.assert_allclose(at((290, 115)), np.array(track_color(3)) * 0.4, atol=2)  # mask: a tint
  assert (at((270, 120)) == track_color(3)).all()  # the box of what is seen
  assert (at((130, 100)) == 0).all()  # out of sight, and nobody knows how far: left out
  for px in GROUND.view(
    np.array([[20.0, 1.7, 1.22], [12.0, 1.7, 1.22], [25.3, 1.7, 1.22]])
  ):  # points and the line between them
    np.testing.assert_allclose(at(px), CYAN, rtol=0.12, atol=12)  # the line as strong as its probability, 0.9
  assert (at((450, 60)) == 0).all() and track_color(3) != track_color(7)
  # what is not valid, or about another frame, is not drawn
  for m in events(6, valid=False)[:2]:
    overlay.message(messaging.log_from_bytes(m.to_bytes()))
  assert (overlay.draw(black, 6)[300:500] == 0).all()


def test_classes_of_ones_own_are_drawn_with_their_names(monkeypatch):
  """Colored by what the manifest says they are on a road, else by their names; an object whose distance nobody knows
  has its name alone."""
  msg = messaging.new_message("fairSegmentation", valid=True)
  m = msg.fairSegmentation
  m.frameId, m.classes, m.height, m.width = 6, ["nothing", "asphalt", "pothole"], 64, 128
  values, lengths = encode_runs(np.repeat(np.array([0, 1, 2], np.uint8), [40, 48, 40])[None].repeat(64, 0))
  m.runClass, m.runLength = values.tobytes(), lengths.tolist()
  legends, texts = [], []
  monkeypatch.setattr(Overlay, "_legend", lambda self, d, labels, legend: legends.append(dict(legend)))
  monkeypatch.setattr(Labels, "beside", lambda self, box, text, color: texts.append(text))
  overlay = Overlay(W, H, roles={"nothing": "background", "asphalt": "ground"})
  for e in (
    msg,
    objects_message(
      replace(
        tracked(), classes=["cone"], position=np.full((2, 3), np.nan, np.float32), depth=np.full(2, np.nan, np.float32)
      ),
      Stamp(6, 1, "b", 0.0, True),
    )[1],
  ):
    overlay.message(messaging.log_from_bytes(e.to_bytes()))
  picture = overlay.draw(np.zeros((H, W, 3), np.uint8), 6)
  assert legends == [{"asphalt": (70, 110, 255), "pothole": name_color("pothole")}] and texts == ["cone"]
  seen = {tuple(c) for c in picture.reshape(-1, 3)[::7].tolist()}
  assert {tuple(int(v * TINT) for v in c) for c in legends[0].values()} <= seen


def crowd(n, hidden):
  """n objects on one spot at the horizon, every one with a place; the first `hidden` are out of sight."""
  m = messaging.new_message("fairObjects", valid=True)
  m.fairObjects.frameId = 5
  m.fairObjects.classes = ["vehicle"]
  for i, o in enumerate(m.fairObjects.init("objects", n)):
    o.trackId, o.prob, o.box = i, 0.9, [250 + i % 7, 40 + i % 5, 262 + i % 7, 52 + i % 5]
    o.position, o.positionStd, o.occluded, o.visibility = (
      [100 - i, 5.0, 1.2],
      [1.0, 1.0, 0.0],
      i < hidden,
      float(i >= hidden),
    )
  return m


def drawn(monkeypatch, messages):
  """The labels of frame 5 that found a place: text -> (x0, y0, x1, y1); and how many boxes were drawn."""
  texts, boxes = [], []
  box, beside = Overlay._box, Labels.beside

  def spy(self, where, text, color):
    found = beside(self, where, text, color)
    texts.append((text, found))
    return found

  monkeypatch.setattr(Labels, "beside", spy)
  monkeypatch.setattr(Overlay, "_box", lambda self, d, o, *rest: (boxes.append(o.trackId), box(self, d, o, *rest))[1])
  places = []
  reserve = Labels.reserve

  def kept(self, *where):
    free = reserve(self, *where)
    if free:
      places.append(where)
    return free

  monkeypatch.setattr(Labels, "reserve", kept)
  overlay = Overlay(W, H)
  for m in messages:
    overlay.message(messaging.log_from_bytes(m.to_bytes()))
  return texts, boxes, places, overlay.draw(np.zeros((H, W, 3), np.uint8), 5)


def test_a_crowd_on_the_horizon_stays_readable(monkeypatch):
  texts, boxes, places, _ = drawn(monkeypatch, [crowd(40, 30)])
  assert (
    len(texts) == LABELS and 1 <= sum(found for _, found in texts) < LABELS
  )  # those that would cover another gave way
  assert texts[0] == ("vehicle 61 m", True)  # the nearest that is seen
  assert len(boxes) == 10 + HIDDEN and {b for b in boxes if b < 30} == {28, 29}  # of what is hidden the nearest
  for i, a in enumerate(places):
    assert all(a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3] for b in places[:i])


def test_what_is_hidden_is_faint_gray_and_without_a_label(monkeypatch):
  texts, boxes, _, picture = drawn(monkeypatch, [crowd(1, 1)])
  assert texts == [] and boxes == [0]
  x, y = Overlay(W, H)._corners(
    crowd(1, 1).fairObjects.objects[0], get_warp_matrix(np.zeros(3), camera_intrinsics(W, H))
  )[0]
  inner = picture[round(y) - 1 : round(y) + 2, round(x) + 5]
  assert 0 < inner.max() < 100 and np.ptp(inner.max(0)) == 0


def test_the_lead_is_the_nearest_on_the_path():
  m = crowd(4, 0).fairObjects
  for o, (x, y) in zip(m.objects, [(60, 0.2), (40, -0.5), (20, 4.0), (30, 9.0)], strict=True):
    o.position = [x, y, 1.2]
  assert lead_of(m.objects).trackId == 1
  m.objects[1].occluded = True
  assert lead_of(m.objects).trackId == 0
  model = messaging.new_message("modelV2").modelV2
  model.position.x, model.position.y = [0.0, 20.0, 40.0], [0.0, 4.0, 16.0]  # a bend to the right
  assert lead_of(m.objects, model).trackId == 2
  assert lead_of([], model) is None


def canvas(overlay):
  image = Image.new("RGB", (W, H))
  d = ImageDraw.Draw(image, "RGBA")
  return image, d, Labels(d, overlay.font, (W, H))


def test_a_label_is_above_its_box_else_below_else_to_its_right():
  overlay = Overlay(W, H)
  image, _, labels = canvas(overlay)
  box = np.array([400, 300, 500, 380])
  for _ in range(3):
    assert labels.beside(box, "HHH", (255, 255, 255))
  assert not labels.beside(box, "HHH", (255, 255, 255))
  above, below, right = labels.taken
  assert above[0] == below[0] == 400 and above[3] == 298 and below[1] == 382 and right[:2] == (502, 300)
  lit = np.argwhere(np.asarray(image).max(2) > 10)
  for x0, y0, x1, y1 in labels.taken:  # the letters stand three pixels below the top, four from the left
    own = lit[(lit[:, 0] >= y0) & (lit[:, 0] < y1) & (lit[:, 1] >= x0) & (lit[:, 1] < x1)]
    assert own[:, 0].min() == y0 + 3 and own[:, 0].max() == y1 - 4 and 0 <= own[:, 1].min() - (x0 + 4) <= 3


def test_depth_is_in_the_upper_right_corner_in_a_frame():
  overlay = Overlay(W, H)
  image, d, labels = canvas(overlay)
  overlay._inset(image, d, labels, np.full((64, 128), 10.0, np.float32), "")
  w, h = W // 5, W // 5 // 2
  left, top = W - w - 8, overlay.font_size + 16
  picture = np.asarray(image).astype(int)
  color = TURBO[int(255 * np.log(10 / 2) / np.log(120 / 2))]
  assert (picture[top + 1 : top + h - 1, left + 1 : left + w - 1] == color).all()
  for y, x in ((top - 1, left + 50), (top + h, left + 50), (top + 50, left - 1), (top + 50, left + w)):
    assert (picture[y, x] == 255).all(), (y, x)
  assert (picture[:, : left - 1] == 0).all() and (picture[: top - 1] == 0).all()
  assert labels.taken == [(left, top, left + w, top + h + 3 * overlay.font_size)]


def test_the_view_covers_what_its_pinhole_sees():
  """512x256 of 910 pixels' focal length about (256, 47.6), in a camera that looks the same way."""
  overlay = Overlay(W, H)
  intrinsics, inside, _ = overlay._geometry()
  x = (np.arange(W) - intrinsics[0, 2]) * 910 / intrinsics[0, 0] + 256
  y = (np.arange(H) - intrinsics[1, 2]) * 910 / intrinsics[1, 1] + 47.6
  want = ((y >= -0.5) & (y < 255.5))[:, None] & ((x >= -0.5) & (x < 511.5))
  assert overlay.size == (W, H) and inside.tolist() == np.flatnonzero(want).tolist()


def test_depth_and_classes_against_truth():
  """Of 4 cells at 4 m three are right, a tenth too far, and twice as far; one is unknown. Of 4 cells two classes."""
  quality = Quality([])
  quality.classes, quality.confusion = ["road", "sky"], np.zeros((2, 2))
  quality.truth_of = lambda frame_id: (np.full((2, 2), 4.0), np.array([[0, 0], [1, 1]], np.uint8))
  stamp = Stamp(5, 250_000_000, "b", 0.004, True)
  for z in ([[4, 4.4], [8, np.nan]], [[4, 4], [4, 4]]):
    quality.add("fairDepth", depth_message(Depth(np.array(z, np.float32), True), stamp)[1].as_reader().fairDepth)
  seg = Segmentation(["road", "sky"], np.array([[0, 1], [1, 1]], np.uint8), np.ones(2, np.float32))
  quality.add("fairSegmentation", segmentation_message(seg, stamp)[1].as_reader().fairSegmentation)
  logs = np.array([0, np.log(1.1), np.log(2), 0, 0, 0, 0])
  want = {"abs_rel": 1.1 / 7, "delta1": 6 / 7, "silog": np.std(logs)}
  want |= {"miou": (1 / 2 + 2 / 3) / 2, "iou_road": 1 / 2, "iou_sky": 2 / 3}
  assert quality.result() == pytest.approx(want, abs=1e-3)


def test_means_and_medians_of_nothing():
  states = [SimpleNamespace(warpTime=t) for t in (0.0, 0.004, 0.006)]  # 0: nothing was measured
  assert mean_ms(states, "warpTime") == 5.0 and mean_ms(states[:1], "warpTime") == 0.0
  counts = Counts()
  counts.add("fairObjects", messaging.new_message("fairObjects").as_reader().fairObjects, True)
  assert counts.result()["objects"] == dict.fromkeys(
    ("each", "occluded_each", "masks_each", "on_the_road_each", "identities", "median_life_frames"), 0
  ) | {"messages": 1}


def test_classes_are_held_against_the_truth_by_their_names(monkeypatch):
  """In another order than the truth's, and one that it does not have: that counts nowhere, and is said."""
  truth = np.zeros((64, 128)), np.repeat(np.array([0, 1, 2], np.uint8), [40, 48, 40])[None].repeat(64, 0)
  monkeypatch.setattr(Quality, "truth_of", lambda self, frame_id: truth)
  q = Quality([])
  q.classes, q.confusion = ["background", "road", "lane"], np.zeros((3, 3))
  m = messaging.new_message("fairSegmentation").fairSegmentation
  m.classes, m.height, m.width = ["lane", "pothole", "road"], 64, 128
  values, lengths = encode_runs(np.repeat(np.array([1, 2, 0, 2], np.uint8), [40, 48, 20, 20])[None].repeat(64, 0))
  m.runClass, m.runLength = values.tobytes(), lengths.tolist()
  q.add("fairSegmentation", m)
  assert q.result() == {"miou": 0.6029, "iou_road": round(48 / 68, 4), "iou_lane": 0.5, "not_compared": ["pothole"]}
  assert [r["value"] for r in report.quality_rows(q.result())] == ["0.603", "pothole", "0.706", "0.500"]
  q = Quality([], {"pothole": "background"})  # called otherwise than by the truth
  q.classes, q.confusion = ["background", "road", "lane"], np.zeros((3, 3))
  q.add("fairSegmentation", m)
  assert q.result() == {"miou": 0.7353, "iou_background": 1.0, "iou_road": round(48 / 68, 4), "iou_lane": 0.5}


def test_report_counts(tmp_path, monkeypatch):
  monkeypatch.setattr(
    Quality, "truth_of", lambda self, frame_id: (np.ones((64, 128)), np.ones((64, 128), np.uint8))
  )  # a route with truth
  log = [m.to_bytes() for t in range(10) for m in events(t, valid=t != 9)]
  write_log(tmp_path / "log.zst", log)
  numbers = measure(tmp_path / "log.zst", [], live=False)
  assert numbers["objects"] == {
    "messages": 9,
    "each": 2.0,
    "occluded_each": 1.0,
    "masks_each": 1.0,
    "on_the_road_each": 1.0,
    "identities": 2,
    "median_life_frames": 9.0,
  }
  lanes = numbers["lanes"]
  assert {k: lanes[k] for k in ("messages", "lines_each", "points_each", "visible_points_each", "identities")} == {
    "messages": 9,
    "lines_each": 1.0,
    "points_each": 20.0,
    "visible_points_each": 15.0,
    "identities": 1,
  }
  assert lanes["median_from_modelV2_at_15_m"] == pytest.approx(0.2, abs=1e-3) and numbers["frames"] == 10
  assert lanes["mean_confidence"] == pytest.approx(0.9, abs=1e-3)
  write_report(tmp_path, "<b>title", {**numbers, "faults": ["<script>fault"]}, bundle(), [])
  page = (tmp_path / "report.html").read_text()
  for text in (
    "objects per frame",
    "lines per frame",
    "nearest line 15 m ahead, median, m</td><td class=\"n\">0.20",
    "&lt;b&gt;title",
    "&lt;script&gt;fault",
    "MIT",
    "10</b>of 10 frames",
  ):
    assert text in page, text
  assert "{%" not in page and "{{" not in page and "<script" not in page and "<video" not in page
  assert "_each" not in page and "median_" not in page  # names of variables


def test_the_video_is_in_the_page_or_beside_it(tmp_path, monkeypatch):
  write_log(tmp_path / "log.zst", [m.to_bytes() for m in events(3)])
  numbers, video = measure(tmp_path / "log.zst", [], live=False), tmp_path / "overlay.mp4"
  video.write_bytes(b"film")
  write_report(tmp_path, "t", numbers, bundle(), [], video)
  assert '<video src="data:video/mp4;base64,ZmlsbQ=="' in (tmp_path / "report.html").read_text()
  monkeypatch.setattr(report, "VIDEO_INSIDE", 3)
  write_report(tmp_path, "t", numbers, bundle(), [], video)
  assert '<video src="overlay.mp4"' in (tmp_path / "report.html").read_text()


def bundle():
  from types import SimpleNamespace

  provenance = SimpleNamespace(license="MIT", teachers=[], data=[])
  return SimpleNamespace(
    name="b", manifest_hash="0", manifest=type("M", (dict,), {"version": "1", "provenance": provenance})(size="s")
  )

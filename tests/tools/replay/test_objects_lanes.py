"""Objects and lanes in the overlay and in the report, from messages that are known."""
import numpy as np
import pytest

from openpilot.cereal import messaging
from openpilot.common.transformations.model import get_warp_matrix
from openpilot.selfdrive.modeld.fair.frames import camera_intrinsics
from openpilot.selfdrive.modeld.fair.heads.ground import view_ground
from openpilot.selfdrive.modeld.fair.lanes import Line
from openpilot.selfdrive.modeld.fair.publish import Stamp, lanes_message, objects_message
from openpilot.selfdrive.modeld.fair.tracking import Tracked
from openpilot.tools.lib.logwriter import write_log
from openpilot.tools.replay.report import PAGE, Quality, measure
from openpilot.tools.replay.show import Overlay, colour_of

W, H = 1344, 760
GROUND = view_ground("medmodel", 1.22)


def tracked():
  masks = np.zeros((1, 64, 128), bool)
  masks[0, 20:30, 60:80] = True
  boxes = np.array([[240, 80, 320, 120], [100, 60, 160, 100]], np.float32)
  return Tracked(["vehicle"], np.array([3, 7]), np.zeros(2, int), np.array([0.9, 0.8], np.float32), boxes, np.array([5, 9]), np.array([False, True]),
                 np.array([1, 0], np.float32), masks, np.array([0, -1]), np.array([[17, 1, 1.22], [np.nan] * 3], np.float32), np.ones((2, 3), np.float32),
                 np.array([16.5, np.nan], np.float32))


def line():
  x = np.linspace(40, 6, 20)
  road = np.stack([x, np.full(20, 1.7), np.full(20, 1.22)], axis=1)
  return Line(4, 0.9, "lane", GROUND.view(road).astype(np.float32), np.where(np.arange(20) < 15, 0.9, 0.1).astype(np.float32), road.astype(np.float32),
              np.array([1.7, 0, 0, 0]))


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
    return picture[y - 1:y + 2, x - 1:x + 2].reshape(-1, 3).max(0)

  np.testing.assert_allclose(at((290, 115)), np.array(colour_of(3)) * 0.4, atol=2)   # mask: a tint
  assert (at((270, 120)) == colour_of(3)).all() and (at((130, 100)) == colour_of(7)).all()   # boxes
  for px in GROUND.view(np.array([[20.0, 1.7, 1.22], [12.0, 1.7, 1.22], [25.3, 1.7, 1.22]])):   # points and the line between them
    assert (at(px) == colour_of(4)).all()
  assert (at((450, 60)) == 0).all() and colour_of(3) != colour_of(7)
  # what is not valid, or about another frame, is not drawn
  for m in events(6, valid=False)[:2]:
    overlay.message(messaging.log_from_bytes(m.to_bytes()))
  assert (overlay.draw(black, 6)[300:500] == 0).all()


def test_report_counts(tmp_path, monkeypatch):
  monkeypatch.setattr(Quality, "truth_of", lambda self, frame_id: (np.ones((64, 128)), np.ones((64, 128), np.uint8)))   # a route with truth
  log = [m.to_bytes() for t in range(10) for m in events(t, valid=t != 9)]
  write_log(tmp_path / "log.zst", log)
  numbers = measure(tmp_path / "log.zst", [], live=False)
  assert numbers["objects"] == {"messages": 9, "each": 2.0, "occluded_each": 1.0, "masks_each": 1.0, "on_the_road_each": 1.0, "identities": 2,
                                "median_life_frames": 9.0}
  lanes = numbers["lanes"]
  assert {k: lanes[k] for k in ("messages", "lines_each", "points_each", "visible_points_each", "identities")} == {
    "messages": 9, "lines_each": 1.0, "points_each": 20.0, "visible_points_each": 15.0, "identities": 1}
  assert lanes["median_from_modelV2_at_15_m"] == pytest.approx(0.2, abs=1e-3) and numbers["frames"] == 10
  assert lanes["mean_confidence"] == pytest.approx(0.9, abs=1e-3)
  assert "{% for name in ('depth', 'objects', 'lanes')" not in PAGE.render(title="t", r={**numbers, "machine": ""}, bundle=None_bundle(), plot="", pictures=[])


def None_bundle():
  from types import SimpleNamespace
  provenance = SimpleNamespace(licence="MIT", teachers=[], data=[])
  return SimpleNamespace(name="b", manifest_hash="0", manifest=type("M", (dict,), {"version": "1", "provenance": provenance})(size="s"))

"""The parts of an evaluation, each on what is made up here; test_evaluate.py has the whole of it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from openpilot.selfdrive.modeld.fair.heads.ground import view_ground
from openpilot.selfdrive.modeld.fair.heads.objects import Detections
from openpilot.tools.fair.evaluation.compared import Compared
from openpilot.tools.fair.evaluation.detections import Detections as Judged
from openpilot.tools.fair.evaluation.detections import beside, make_objects
from openpilot.tools.fair.evaluation.evaluate import Options
from openpilot.tools.fair.evaluation.groups import Card
from openpilot.tools.fair.evaluation.logged import LINES, Logged
from openpilot.tools.fair.evaluation.run import Worst
from openpilot.tools.fair.evaluation.scenes import QueryMaker, Scene, Segment
from openpilot.tools.fair.evaluation.student import Student
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.spec import road_classes
from openpilot.tools.lib.options import parse, save


def test_one_picture_in_forty_frames():
  w = Worst()
  for i, error in enumerate([1, 5, 2, 0, float("nan"), 4] + [0] * 74 + [3, 9]):
    w.add(error, "a", i, dict)
  for i in range(5):
    w.add(10 + i, f"s{i}", 0, dict)
  assert sorted(f[0] for f in w.frames) == [12, 13, 14]
  w = Worst()
  for i, error in enumerate([1, 5, 2] + [0] * 77 + [3, 9]):
    w.add(error, "a", i, dict)
  assert sorted(f[0] for f in w.frames) == [5, 9]


def test_queries_take_slots_and_give_them_back():
  def table(**tracks):
    k = [int(name[1:]) for name in tracks]
    return {
      "track": np.array(k, int),
      "x": np.array(k, float),
      "y": np.zeros(len(k)),
      "visible": np.array(list(tracks.values()), bool),
    }

  tables = [table(t5=False, t7=True), table(t5=True, t7=False, t9=True), None, table(t5=True, t7=True), table(t11=True)]
  maker = QueryMaker(tables, slots=2)
  q = [maker.step(t) for t in range(5)]
  assert q[0].fresh.tolist() == [True, False] and q[0].xy[0, 0] == 7 and not q[0].known.any()
  assert (
    q[1].fresh.tolist() == [False, True] and q[1].known.tolist() == [True, False] and not q[1].visible[0]
  )  # 9 finds no slot
  assert q[2].used.all() and not q[2].known.any()  # nothing is said of this frame
  assert q[3].known.all() and q[3].hidden_before.tolist() == [True, False]
  assert q[4].used.tolist() == [True, False] and q[4].fresh[0] and not q[4].hidden_before[0]
  assert q[0].xy.shape == (2, 2) and q[3].truth.tolist() == [[7, 0], [5, 0]]


def test_a_cell_is_valid_where_its_center_is():
  """The pixel to the left and above of the middle of each four by four."""
  valid = np.random.default_rng(0).random((256, 512)) < 0.5
  got = Segment("a--0", {}, [0], [7], valid).map_valid
  assert got.shape == (64, 128)
  assert all(got[i, j] == valid[4 * i + 1, 4 * j + 1] for i in range(64) for j in range(128))


@pytest.mark.parametrize("masks", [False, True])
def test_identities_of_boxes_and_of_masks(masks):
  """Three frames of one object, found under one identity: all right. Of masks also by J&F."""
  card = Card(Compared(), {})
  for t in range(3):
    mask = np.zeros((1, 64, 128), bool)
    mask[:, 10:20, 10 + t : 30 + t] = True
    found, truth = (make_objects([[40 + 4 * t, 40, 120 + 4 * t, 80]], [0], track=np.array([k])) for k in (3, 8))
    if masks:
      found.rle = truth.rle = rle.encode(mask)
    card.follow(Scene(tracked=found), Scene(tracked=truth))
  card.follow(Scene(), Scene(tracked=truth))  # who says nothing of a frame is not asked there
  card.close()
  assert card.sums["identity"].result()["idf1"] == 1.0
  assert ("video" in card.sums) == masks and (not masks or card.sums["video"].result()["j_and_f"] == 1.0)


@pytest.mark.parametrize("masks", [False, True])
def test_a_students_objects_are_followed_from_their_score_on(masks):
  """One that is sure and one that is not, over frames: the first keeps its identity, its class and its mask."""
  compared, names = Compared(), list(road_classes().boxes)
  who = SimpleNamespace(tracker=None, compared=compared, scores={"objects": 0.5}, ground=view_ground("medmodel"))
  who.table = lambda classes, kind: compared.resolve(classes, kind, "here")
  seen = []
  for t in range(6):
    drawn = np.zeros((2, 64, 128), bool)
    drawn[0, 40:50, 20:40], drawn[1, 5:10, 90:100] = True, True
    boxes = np.array([[79.5, 159.5, 159.5, 199.5], [359.5, 19.5, 399.5, 39.5]], np.float32)
    scores, kinds = np.array([0.9, 0.4], np.float32), np.array([1, 0])
    found = Detections(names, boxes, scores, kinds, drawn if masks else None, None)
    seen.append(Student.track(who, found, 100 + t))
  last = seen[-1]
  assert last.cls.tolist() == [1] and last.track.tolist() == seen[-2].track.tolist()
  np.testing.assert_allclose(last.boxes, boxes[:1], atol=1)
  assert (last.rle is not None) == masks
  assert not masks or (rle.decode(last.rle[0], 64, 128) == drawn[0]).all()


def points(x, y, kind, far=None):
  """A table as teacher 'openpilot' makes them, of points that are seen and sure."""
  n = len(x)
  t = {"x": np.array(x, float), "y": np.array(y, float), "cls": np.full(n, kind), "score": np.ones(n)}
  return {**t, "visible": np.ones(n, bool), "road_x": np.zeros(n) if far is None else np.array(far, float)}


def test_a_line_is_found_up_to_eight_pixels_beside_a_lane():
  """Two cells of the map; the third is too far."""
  maps = road_classes().maps
  classes = np.full((64, 128), maps.index("background"), np.uint8)
  classes[:, 64] = maps.index("lane")
  lines = points([256 + 4 * k + 1.5 for k in range(-4, 5)], [100] * 9, LINES.index("lane1"))
  logged = Logged()
  logged.add(Scene(classes=classes, named=tuple(range(len(maps)))), lines, points([], [], 0))
  got = logged.result()
  assert got["log_lane_recall"] == pytest.approx(5 / 9) and got["log_lane_chance"] == 0


def test_the_depth_of_a_lead_counts_where_there_is_one():
  """Not of a lead outside the picture, nor where no depth is said; by hand: |24 - 20| / 20 and |50 - 40| / 40."""
  depth = np.full((64, 128), 24.0, np.float32)
  depth[30, 60:] = 50.0
  depth[30, 70] = np.nan
  leads = points([200, 242, 282, 900], [122] * 4, 0, [20, 40, 60, 80])
  logged = Logged()
  logged.add(Scene(depth=depth), points([], [], 0), leads)
  assert logged.result()["abs_rel_lead"] == pytest.approx((0.2 + 0.25) / 2)


def test_what_was_asked_for_is_found_again_from_elsewhere(tmp_path, monkeypatch):
  """Folders of bundles are saved as absolute, names of shipped ones as names; nothing is left out unless it is said."""
  (tmp_path / "mine").mkdir()
  (tmp_path / "store").mkdir()
  monkeypatch.chdir(tmp_path)
  asked = parse(Options, None, "evaluate", ["mine", "fair_unified_small", "store"])
  assert asked.ignore_classes is False
  save(asked, tmp_path)
  monkeypatch.chdir("/")
  again = parse(Options, None, "evaluate", ["--config", str(tmp_path)])
  assert again.bundles == (tmp_path / "mine", Path("fair_unified_small")) and again.data == tmp_path / "store"


def test_what_is_found_where_nobody_knows_is_neither_right_nor_wrong():
  """Of two classes: one right, one on empty road, and two in an unknown box, of which one hides behind a true one."""
  truth = make_objects([[10, 10, 50, 50]], [0], rle=rle.encode(np.zeros((1, 64, 128), bool)))
  unknown = np.array([[100, 100, 200, 180]], np.float32)
  boxes = [[10, 10, 50, 50], [300, 100, 340, 140], [110, 110, 150, 150], [150, 120, 190, 170]]
  found = make_objects(boxes, [0, 0, 0, 1], [0.9, 0.8, 0.7, 0.6])
  both = beside(truth, unknown, 2)
  assert both.ignore.tolist() == [False, True, True] and both.cls.tolist() == [0, 0, 1]
  drawn = rle.decode(both.rle[1], 64, 128)
  assert drawn[25:45, 25:50].all() and drawn.sum() == 20 * 25
  judged, plain = Judged(("car", "truck")), Judged(("car", "truck"))
  error = judged.add(found, both)
  plain.add(found, truth)
  # one right, one wrong, none missed: F1 of 2/3
  assert error == pytest.approx(1 - 2 / 3) and judged.result()["precision"] == 0.5 and judged.result()["recall"] == 1
  assert plain.result()["precision"] == 0.25
  for library in ("faster_coco_eval", "pycocotools"):
    assert judged.coco(library)["ap"] == pytest.approx(judged.result()["ap"], abs=1e-6)
  assert beside(truth, None, 2) is truth and beside(truth, unknown[:0], 2) is truth

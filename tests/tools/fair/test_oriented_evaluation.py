"""Oriented boxes in `evaluate` and `optimize`: the same numbers as `images evaluate`, from a label store."""

from types import SimpleNamespace

import numpy as np
import oriented_fixture as made
import pytest

from openpilot.selfdrive.modeld.fair.heads.oriented import OrientedDetections

from openpilot.tools.fair.evaluation.compared import Compared, class_set
from openpilot.tools.fair.evaluation.groups import GROUPS, Card, Pair
from openpilot.tools.fair.evaluation.labels import Labels
from openpilot.tools.fair.evaluation.oriented import OrientedBoxes, decode_oriented, draw_oriented
from openpilot.tools.fair.evaluation.scenes import Scene, open_segments
from openpilot.tools.fair.images.oriented_score import Boxes, oriented_scores
from openpilot.tools.fair.labels import import_labels
from openpilot.tools.fair.labels.dataset import Reader
from openpilot.tools.fair.spec import InputSpec


def scene(r, count):
  """Boxes here and there, and what was found of them: most nearly right, some twice, some of nothing."""
  boxes = np.column_stack([r.uniform(0, 200, (count, 2)), r.uniform(10, 40, (count, 2)), r.uniform(-1.5, 1.5, count)])
  cls, unknown = r.integers(0, 2, count), r.random(count) < 0.2
  truth = Boxes(boxes, np.where(unknown, -1, cls), difficult=np.zeros(count, bool), unknown=unknown)
  some = np.concatenate([r.permutation(count)[: count * 3 // 4], r.integers(0, count, 3)])
  found = boxes[some] + r.normal(0, 1, (len(some), 5)) * [1, 1, 2, 2, 0.05]
  return truth, Boxes(np.abs(found), cls[some], r.random(len(some)).round(3))


def test_segments_together_are_as_all_pictures_at_once(rng):
  made_up = [scene(rng, int(n)) for n in rng.integers(4, 9, 9)]
  parts = [OrientedBoxes(("a", "b"), 0.4) for _ in range(3)]
  for i, (truth, found) in enumerate(made_up):
    parts[i // 3].add(found, truth)
  want = oriented_scores(*zip(*made_up, strict=True), ("a", "b"), 0.4)
  for _ in range(2):  # pooled many times over
    got = OrientedBoxes.pooled(parts).reported()
    for k, v in {**want["stats"], "recall": want["at_score"]["recall"]}.items():
      assert got[k] == pytest.approx(v, abs=1e-12)
    assert got["precision"] == pytest.approx(want["at_score"]["precision"], abs=1e-12)
  assert OrientedBoxes.pooled([OrientedBoxes(("a", "b"), 0.4)]).result() == {}


def test_one_frame_s_error_is_1_less_f1():
  box = np.array([[50.0, 40, 30, 10, 0.3]])
  truth = Boxes(np.repeat(box, 2, 0) + [[0, 0, 0, 0, 0], [60, 0, 0, 0, 0]], np.array([0, 0]))
  truth.difficult = truth.unknown = np.zeros(2, bool)
  found = Boxes(np.concatenate([box, box + [0, 60, 0, 0, 0]]), np.array([0, 0]), np.array([0.9, 0.2]))
  assert OrientedBoxes(("a",), 0.5).add(found, truth) == pytest.approx(1 - 2 / 3)
  assert OrientedBoxes(("a",), 0.1).add(found, truth) == pytest.approx(1 - 2 / 4)
  nothing = Boxes(np.zeros((0, 5)), np.zeros(0, int))
  nothing.difficult = nothing.unknown = np.zeros(0, bool)
  assert np.isnan(OrientedBoxes(("a",), 0.5).add(nothing, nothing))


@pytest.fixture
def store(tmp_path, monkeypatch):
  """Three DOTA pictures of 128x96 in an input of 96x96, the first object difficult."""
  made.dota(tmp_path / "d", 3, 1, difficult=(0,))
  argv = ["import", str(tmp_path / "d"), "--name", "ships", "--oriented", "--size", "96x96", "--license", "MIT"]
  monkeypatch.setattr("sys.argv", [*argv, "--output", str(tmp_path / "s")])
  import_labels.main()
  return tmp_path / "s"


def test_labels_of_a_store_are_the_data_s(store):
  """In pixels of the input: 128x96 is shown at three quarters, from its corner."""
  compared = Compared(class_set("x", (), made.NAMES, {}), InputSpec("rgb", 96, 96))
  (segment,) = open_segments(store, {"ships"}, [], wanted=compared.input)
  labels = Labels(segment, "ships", Reader(), compared)
  assert "oriented" in labels.tasks()
  said = {f: labels.scene(f).more["oriented"] for f in segment.ids}
  drawn = {p.stem: (b, c) for p, b, c in made.render(store.parent / "again", 3, 1)}
  truth = [drawn[k] for k in sorted(drawn)]
  for (boxes, cls), one in zip(truth, said.values(), strict=True):
    want = np.column_stack([boxes[:, 0] * 0.75 - 0.5, boxes[:, 1] * 0.75 - 0.5, boxes[:, 2:4] * 0.75])
    np.testing.assert_allclose(one.boxes[:, :4], want, atol=2e-3)
    assert one.cls[~one.unknown].tolist() == cls[~one.unknown].tolist()
  assert [int(o.unknown.sum()) for o in said.values()] == [1, 0, 0]
  # one class alone is compared: the other's objects are left out, and said
  only = Compared(class_set("x", (), ("zott",), {}), compared.input, ignore=True)
  again = Labels(segment, "ships", Reader(), only).scene(segment.ids[1]).more["oriented"]
  zotts = int((truth[1][1] == 1).sum())
  assert len(again.boxes) == zotts and sum(only.left_out.get("ships", {}).values()) == 3 - zotts


def test_a_student_that_says_the_truth_has_1_and_is_drawn():
  names = ("a", "b")
  compared = Compared(class_set("x", (), names, {}), InputSpec("rgb", 96, 96))
  boxes = np.array([[40, 40, 30, 10, 0.5], [70, 20, 20, 8, -1.0]], np.float32)
  found = OrientedDetections(["b", "a"], boxes, np.array([0.9, 0.2], np.float32), np.array([0, 1]))
  said, ref = Scene(), Scene()
  student = SimpleNamespace(table=lambda n, kind: compared.resolve(n, kind, "here"))
  decode_oriented(student, found, 0, said)
  none = np.zeros(2, bool)
  ref.more["oriented"] = Boxes(boxes.astype(float), np.array([1, 0]), difficult=none, unknown=none)
  card = Card(compared, {"oriented": 0.1})
  assert GROUPS["oriented"].judge(card, Pair(said, ref, None, None)) == 0
  assert set(card.sums["oriented"].result().values()) == {1.0}
  assert GROUPS["oriented"].judge(card, Pair(Scene(), ref, None, None)) is None
  rgb = np.zeros((96, 96, 3), np.uint8)
  on = draw_oriented(rgb, said, compared).any(2)
  assert on[:, :60].any() and not on[10:30, 62:].any()  # the one of .2 is not sure enough
  assert draw_oriented(rgb, ref, compared).any(2)[10:30, 62:].any() and draw_oriented(rgb, Scene(), compared) is None

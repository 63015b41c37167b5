"""What a batch holds of one clip's labels, by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from openpilot.tools.fair.distillation.augment import NONE, Augmentation
from openpilot.tools.fair.distillation.batch import convert
from openpilot.tools.fair.distillation.data import Clips, RawClip
from openpilot.tools.fair.spec import road_classes
from openpilot.tools.fair.tasks import TASKS, say
from openpilot.tools.fair.tasks.depth import depth_map
from openpilot.tools.fair.tasks.objects import object_list
from openpilot.tools.fair.teacher import Label

LABEL = Label("objects", "boxes", shape=(256, 512), unit="px", classes=("vehicle", "pedestrian"))


@pytest.mark.parametrize(
  ("box", "cut"),
  [
    ((480, 100, 530, 140), (480, 100, 511.5, 140)),
    ((-20, 100, 30, 140), (-0.5, 100, 30, 140)),
    ((100, 230, 140, 260), (100, 230, 140, 255.5)),
    ((100, -9, 140, 30), (100, -0.5, 140, 30)),
    ((100, 100, 140, 130), (100, 100, 140, 130)),
  ],
)
def test_boxes_are_cut_at_the_views_border(box, cut):
  """Which is half a pixel outside the outermost pixels' centers."""
  table = {k: np.array([v], np.float32) for k, v in zip(("x0", "y0", "x1", "y1"), box, strict=True)}
  table |= {"score": np.ones(1, np.float32), "cls": np.zeros(1, np.int32)}
  assert object_list(NONE, say([LABEL], [table], TASKS["objects"]), table)["boxes"].tolist() == [list(cut)]


def moved(x, y):
  """By so many view pixels to the right and down."""
  return Augmentation(np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]]), 1.0)


def test_depth_beside_an_unknown_pixel_is_its_known_neighbors():
  """Four tenths of a pixel beside it, in both directions, their shares are 64 of 100."""
  z = np.full((256, 512), 10.0, np.float32)
  z[1::4, 1::4] = 0
  out = depth_map(moved(0.1, 0.1), Label("depth", "dense", "float32", (256, 512), "m"), z)
  np.testing.assert_allclose(out[1:-1, 1:-1], 10.0, rtol=1e-5)


def test_what_is_not_valid_moves_by_whole_cells():
  """To the nearest: a cell of the camera's border is neither lost nor grows."""
  valid = np.ones((256, 512), bool)
  valid[40:44, 80:84] = False
  clip = RawClip("x", np.zeros((2, 6, 128, 256), np.uint8), valid)
  for shift, at in ((1.6, (10, 20)), (2.4, (11, 21)), (-9.0, (8, 18))):
    out = convert(clip, moved(shift, shift), np.random.default_rng(0))["valid"].numpy()
    assert out.shape == (2, 64, 128) and (out[0] == out[1]).all()
    assert np.argwhere(~out[0, 3:-3, 3:-3]).tolist() == [[at[0] - 3, at[1] - 3]]


def test_each_frame_of_a_folder_has_its_own_border():
  """As pictures of different sizes: what is valid is said of each."""
  valid = np.ones((3, 256, 512), bool)
  valid[1, :, 256:] = valid[2, 128:] = False
  clip = RawClip("x", np.zeros((3, 6, 128, 256), np.uint8), valid)
  out = convert(clip, NONE, np.random.default_rng(0))["valid"].numpy()
  assert out.shape == (3, 64, 128) and out[0].all()
  assert out[1, :, :64].all() and not out[1, :, 64:].any() and out[2, :32].all() and not out[2, 32:].any()


def told_live(labels, told, steps=2):
  """What a teacher that labels while the student learns says of each frame."""
  got = {}
  asked = SimpleNamespace(
    live=SimpleNamespace(label=lambda clip, state: (told, state)),
    taught_live={"x": SimpleNamespace(labels=labels)},
    _said=lambda task, source, values, height: values,
  )
  clip = SimpleNamespace(frames=np.zeros((steps, 6, 128, 256), np.uint8), said=got)
  Clips._ask(asked, clip, np.arange(steps), None)
  return got["x"]


def test_a_live_teachers_map_is_its_frames():
  maps = np.arange(2 * 3 * 4).reshape(2, 3, 4) / 2
  found = told_live([Label("z", "dense", "float16", (3, 4), "m")], {"z": maps})
  assert [x.tolist() for x in found] == maps.tolist() and found[0].dtype == np.float16


def test_a_live_teachers_probabilities_are_stacked():
  labels = [Label(n, "dense", "float16", (3, 4), "probability", (n,)) for n in ("road", "lane")]
  told = {"road": np.zeros((2, 3, 4)), "lane": np.ones((2, 3, 4))}
  assert [x.tolist() for x in told_live(labels, told)] == [[np.zeros((3, 4)).tolist(), np.ones((3, 4)).tolist()]] * 2


def test_a_live_teachers_boxes_are_parted_by_frame():
  told = {"objects": {"frame": [1, 0, 1], "x0": [5.5, 6.5, 7.5], "cls": [0, 1, 1]}}
  first, second = told_live([LABEL], told)
  assert {k: v.tolist() for k, v in first.items()} == {"x0": [6.5], "cls": [1]}
  assert {k: v.tolist() for k, v in second.items()} == {"x0": [5.5, 7.5], "cls": [0, 1]}
  assert first["x0"].dtype == np.float32


def test_who_speaks_of_which_classes_is_said_of_every_frame():
  label = Label("segmentation", "dense", "uint8", (64, 128), "class", ("background", "road", "vehicle"))
  clip = RawClip("x", np.zeros((3, 6, 128, 256), np.uint8), np.ones((256, 512), bool))
  clip.said["segmentation"] = say([label], [np.ones((64, 128), np.uint8), None, None], TASKS["segmentation"])
  out = convert(clip, NONE, np.random.default_rng(0))
  classes = road_classes().maps
  named = [c in ("background", "road", "vehicle") for c in classes]
  assert out["segmentation_named"].tolist() == [named] * 3 and out["segmentation_soft"].tolist() == [False] * 3
  told = np.stack([out["segmentation"][0], out["segmentation"][1]])
  assert (told[0, classes.index("road")] == 1).all() and told[0].sum() == 64 * 128 and told[1].sum() == 0


def test_features_are_moved_with_their_picture():
  grid = np.random.default_rng(1).normal(0, 1, (7, 16, 32)).astype(np.float16)
  clip = RawClip("x", np.zeros((2, 6, 128, 256), np.uint8), np.ones((256, 512), bool))
  clip.said["features"] = say([Label("f", "dense", "float16", grid.shape)], [grid, None], TASKS["features"])
  mirror = Augmentation(np.array([[-1.0, 0, 511], [0, 1, 0], [0, 0, 1]]), 1.0)
  for a, want in ((NONE, grid), (mirror, grid[:, :, ::-1])):
    out = convert(clip, a, np.random.default_rng(0))["features"].numpy()
    np.testing.assert_allclose(out[0, :, 1:-1, 1:-1], want[:, 1:-1, 1:-1], atol=1e-3)
    assert out.shape == (2, 7, 16, 32) and np.isnan(out[1]).all()

"""Full labels to a student's maps: what a cell holds is what is at its center, on the simulator's exact road, in
training and in evaluation alike."""

import numpy as np
import pytest
from label_fixture import CAMERA, FRAME, group_of

from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.selfdrive.modeld.fair.frames import FRAME_SHAPE
from openpilot.tools.fair.distillation.augment import NONE, draw
from openpilot.tools.fair.tasks import TASKS, say
from openpilot.tools.fair.tasks.depth import depth_map
from openpilot.tools.fair.tasks.segmentation import class_maps
from openpilot.tools.fair.distillation.data import valid_of
from openpilot.tools.fair.evaluation.metrics import Depth
from openpilot.tools.fair.evaluation.labels import Labels
from openpilot.tools.fair.evaluation.scenes import Segment
from openpilot.tools.fair.labels.dataset import Reader
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.maps import classes_to_map, depth_to_map
from openpilot.tools.fair.teacher import Label
from openpilot.tools.sim.render import CLASSES, render
from openpilot.tools.sim.truth import IGNORE, map_labels
from openpilot.tools.sim.world import World

HEIGHT = 1.22  # meters of the camera over the road
FAR = 100.0
CENTERS = np.stack(np.meshgrid(4 * np.arange(128) + 1.5, 4 * np.arange(64) + 1.5), axis=-1)  # (64, 128, 2) view pixels


def road_depth(y):
  """Meters of the flat road at these rows of the view, inf over the horizon."""
  below = np.asarray(y, float) - medmodel_intrinsics[1, 2]
  with np.errstate(divide="ignore"):
    return np.where(below > 0, HEIGHT * medmodel_intrinsics[1, 1] / below, np.inf)


def road_label(width, height):
  """(height, width) float16, as a teacher of that size would see it."""
  rows = (np.arange(height) + 0.5) * 256 / height - 0.5
  with np.errstate(over="ignore"):
    return np.repeat(road_depth(rows)[:, None], width, 1).astype(np.float16)


def judged(found):
  """AbsRel of a map beside the road at the cells' centers, to FAR."""
  truth = road_depth(CENTERS[..., 1])
  d = Depth()
  d.add(found, np.where(truth < FAR, truth, np.nan))
  assert np.isfinite(found[truth < FAR]).all()
  return d.result()["abs_rel"]


@pytest.mark.parametrize("size", [(512, 256), (1024, 512), (640, 320), (256, 128), (128, 64)])
def test_a_perfect_student_of_the_road_is_perfect(size):
  """Labels are halves of floats, which are right to .0005; pixels at 4i, as they were taken before, err by .0255."""
  label = Label("depth", "dense", "float16", size[::-1], "m")
  z = road_label(*size)
  assert judged(depth_map(NONE, label, z)) < 0.0005
  assert judged(depth_to_map(z[None], "m")) < 0.0005


def test_evaluation_reads_what_is_at_the_center(tmp_path):
  store = LabelStore(tmp_path, create=True)
  labels = [
    Label("depth", "dense", "float16", (256, 512), "m"),
    Label("segmentation", "dense", "uint8", (256, 512), "class", ("background", "road")),
  ]
  group, frames = (group_of(store, "a--0", t, x, 1) for t, x in (("teacher", labels), ("frames", FRAME)))
  ids = np.zeros((1, 256, 512), np.uint8)
  ids[:, 82:] = 1
  group.write_chunk(0, {"depth": road_label(512, 256)[None], "segmentation": ids})
  frames.write_chunk(0, {"frame": np.zeros((1, *FRAME_SHAPE), np.uint8)})
  scene = Labels(
    Segment("a--0", {"teacher": group, "frames": frames}, [0], [100], np.ones((256, 512), bool)), "teacher", Reader()
  ).scene(100)
  assert judged(scene.depth) < 0.0005 and valid_of(frames).any() and CAMERA["width"]
  assert (scene.classes[:20] == 0).all() and (scene.classes[21:] == 1).all()  # row 20 is two rows of either


@pytest.mark.parametrize("seed", range(4))
def test_augmented_depth_is_what_the_augmented_view_sees(seed):
  r = np.random.default_rng(seed)
  a = next(a for a in (draw(r, True) for _ in range(20)) if a.is_geometric)
  before = np.concatenate([CENTERS, np.ones((64, 128, 1))], -1) @ np.linalg.inv(a.matrix).T
  truth = road_depth(before[..., 1]) / a.zoom
  inside = (before[..., 0] > 4) & (before[..., 0] < 507) & (before[..., 1] > 60) & (before[..., 1] < 250)
  for size in ((512, 256), (128, 64)):
    found = depth_map(a, Label("depth", "dense", "float16", size[::-1], "m"), road_label(*size))
    error = np.abs(found / truth - 1)[inside]
    assert error.mean() < 0.002 and error.max() < 0.02  # places are taken to 1/32 of a pixel


def test_no_depth_is_made_up_where_a_surface_ends():
  """A box at 10 m before a wall at 50 m, moved by whole and broken cells: linear alone would put things at 17 m between
  them."""
  z = np.full((64, 128), 50.0, np.float32)
  z[20:50, 40:90] = 10
  label, between = Label("depth", "dense", "float32", (64, 128), "m"), 0
  for seed in range(20):
    a = draw(np.random.default_rng(seed), True)
    if a.is_geometric:
      found = depth_map(a, label, z) * a.zoom
      found = found[np.isfinite(found)]
      between += ((found > 10 * 4 / 3 + 0.01) & (found < 50 * 3 / 4 - 0.01)).sum()
      assert (found < 14).any() and (found > 40).any()
  assert not between


def test_it_is_the_simulators_own_rule():
  f = render(World(5, "day", 10.0), 2.0, medmodel_intrinsics, 512, 256, rgb=False)
  truth, _ = map_labels(f.depth, f.semantic)
  found = depth_to_map(f.depth, "m")
  known = np.isfinite(truth) & (truth > 0)
  assert known.mean() > 0.5 and (np.isfinite(found) == known).all()
  np.testing.assert_allclose(found[known], truth[known].astype(float), rtol=6e-4)


def test_what_is_not_known_does_not_count():
  z = np.full((256, 512), 20.0)
  z[:, :256] = np.nan
  z[4:8, 300:302], z[100:102] = 0, -1
  z[200:, 400:] = np.inf
  found = depth_to_map(z, "m")
  assert np.isnan(found[:, :64]).all() and np.isnan(found[50:, 100:]).all()  # unknown; the sky
  assert found[1, 75] == 20 and found[25, 90] == 20  # half of the center is known
  relative = depth_to_map(np.where(np.isfinite(z), z, np.nan) / 2, "relative")
  assert np.isnan(relative[:, :64]).all() and relative[10, 100] == 10


def test_classes_are_what_most_of_a_cell_is():
  """A stripe of three of four pixels is the cell's class wherever it lies; at 4i it would hang on the first pixel
  alone."""
  for at in (0, 1):
    ids = np.full((256, 512), 7, np.uint8)
    ids[:, np.arange(512) % 4 - at < 3] = 1
    ids[:, np.arange(512) % 4 < at] = 7
    assert (classes_to_map(ids, 3) == 1).all()
    label = Label("segmentation", "dense", "uint8", (256, 512), "class", ("background", "road"))
    assert (class_maps(NONE, say([label], [ids], TASKS["segmentation"]), ids)[0][1] == 1).all()
  assert (classes_to_map(np.full((256, 512), 9, np.uint8), 3) == IGNORE).all()
  # an edge at half of the picture of another size stays there, from either side
  for size in ((640, 320), (256, 128), (1024, 512), (320, 320)):
    ids = np.zeros(size[::-1], np.uint8)
    ids[:, size[0] // 2 :] = CLASSES.index("road")
    for found, turned in ((classes_to_map(ids, 5), False), (classes_to_map(ids[:, ::-1], 5), True)):
      assert ((found == 1) == ((np.arange(128) >= 64) != turned)[None]).all(), size

"""Pictures of a batch, by their pixels."""

import numpy as np
import torch
from PIL import Image

from openpilot.tools.fair.distillation.samples import draw_samples
from openpilot.tools.fair.distillation.sketches import classes_on, points_on
from openpilot.tools.fair.spec import StudentSpec, road_classes
from openpilot.tools.lib.colors import class_colors, track_color


def test_classes_are_a_tint_and_what_is_none_is_left():
  rgb = np.full((256, 512, 3), 100, np.uint8)
  classes = np.zeros((64, 128), np.int64)
  classes[10, 20], classes[11, 20] = 1, 255
  of = road_classes()
  out = classes_on(rgb, classes, of)
  want = rgb.copy()
  want[40:44, 80:84] = (100 + np.array(class_colors(of.maps, of.roles(of.maps))[of.maps[1]])) / 2
  assert (out == want).all() and (out[40, 80] != 100).any()


def test_points_are_round_and_five_wide():
  out = points_on(np.zeros((256, 512, 3), np.uint8), np.array([[30.0, 40], [90, 50]]), np.array([True, False]))
  lit = np.argwhere(out.any(2))
  assert (out[40, 30] == track_color(0)).all() and (lit.min(0) == [38, 28]).all() and (lit.max(0) == [42, 32]).all()


def test_points_are_drawn_where_they_are_likelier_seen_than_not(tmp_path):
  """A logit of 0 is neither. The columns: the frame, the student's points, the teacher's."""
  xy = torch.tensor([[[[100.0, 100], [200, 100], [300, 100]]]])
  batch = {"frame": torch.zeros((1, 6, 128, 256), dtype=torch.uint8), "points": xy}
  batch |= {"points_known": torch.ones((1, 1, 3), dtype=torch.bool), "points_visible": torch.tensor([[[1, 0, 1]]])}
  out = {"lanes_points_out": xy, "lanes_visible": torch.tensor([[[-1.0, 0.0, 1.0]]])}
  draw_samples(tmp_path / "x.png", batch, out, ["lanes"], StudentSpec("lanes", "small"))
  picture = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
  assert picture.shape == (128, 3 * 256, 3)
  plain, ours, theirs = np.split(picture, 3, axis=1)
  for drawn, where in ((ours, [300]), (theirs, [100, 300])):
    assert [x for x in (100, 200, 300) if (drawn[50, x // 2] != plain[50, x // 2]).any()] == where

"""What a batch holds of one clip's labels, by hand."""

import numpy as np
import pytest

from openpilot.tools.fair.distillation.augment import NONE
from openpilot.tools.fair.distillation.batch import object_list
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
  assert object_list(NONE, LABEL, table)["boxes"].tolist() == [list(cut)]

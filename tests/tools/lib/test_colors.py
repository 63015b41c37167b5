"""Colors of depth: logarithmic between its ends."""

import numpy as np
import pytest

from openpilot.tools.lib.colors import FAR, NEAR, TURBO, depth_picture, depth_scale


def test_depth_is_colored_by_its_logarithm():
  assert depth_scale(np.array([0.1, NEAR, (NEAR * FAR) ** 0.5, FAR, 1e6])) == pytest.approx([0, 0, 0.5, 1, 1])
  picture = depth_picture(np.array([[NEAR, FAR, np.nan, np.inf]], np.float32))
  assert (picture[0, 0] == TURBO[0]).all() and (picture[0, 1] == TURBO[255]).all() and (picture[0, 2] == 0).all()

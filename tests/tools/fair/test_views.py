"""Where the teachers' view of a camera's picture lies, to hundredths of a pixel."""

from pathlib import Path

import numpy as np
import pytest

from openpilot.common.transformations.model import get_warp_matrix
from openpilot.selfdrive.modeld.fair.frames import camera_intrinsics
from openpilot.tools.fair.labels.views import SegmentView, ViewWarp, view_to_view
from openpilot.tools.lib.route import Segment

WAVE = 40  # view pixels


def stripes(width, height, axis, period):
  """YUV planes of a picture whose brightness is a wave along one axis."""
  y, x = np.mgrid[:height, :width]
  luma = np.round(125 + 100 * np.cos(2 * np.pi * (x, y)[axis] / period)).astype(np.uint8)
  gray = np.full((height // 2, width // 2), 128, np.uint8)
  return luma, gray, gray


@pytest.mark.parametrize("name", ["medmodel", "sbigmodel"])
@pytest.mark.parametrize("size", [(1928, 1208), (1344, 760), (1164, 874), (526, 330)])
def test_the_view_is_not_displaced(size, name):
  """The phase of a wave says where the view's pixels were taken from: within .02 of a view pixel of openpilot's warp,
  in both directions."""
  k = camera_intrinsics(*size)
  view = SegmentView(Segment("a", 0, Path(), {}), "road", *size, k, np.zeros(3), True, [], "")
  for width, height in ((512, 256), (640, 320)):
    warp = ViewWarp(view, name, width, height)
    period = WAVE * k[0, 0] / warp.intrinsics[0, 0]  # camera pixels
    u, v = np.meshgrid(np.arange(width), np.arange(height))
    p = (
      get_warp_matrix(np.zeros(3), k, name == "sbigmodel")
      @ view_to_view(width, height)
      @ np.stack([u.ravel(), v.ravel(), np.ones(u.size)])
    )
    want = (p[:2] / p[2]).reshape(2, height, width)
    inside = ((want > 8) & (want < np.array(size)[:, None, None] - 9)).all(axis=0)
    assert inside.mean() > 0.2
    for axis in (0, 1):
      warp.rgb_of(stripes(*size, axis, period))
      phase = 2 * np.pi * want[axis][inside] / period
      c, s, _ = np.linalg.lstsq(
        np.stack([np.cos(phase), np.sin(phase), np.ones(len(phase))], 1),
        warp.yuv[:height][inside].astype(float),
        rcond=None,
      )[0]
      off = np.arctan2(-s, c) / (2 * np.pi) * WAVE
      assert abs(off) < 0.02, (size, name, axis, off)


def test_a_pictures_pixels_in_the_views():
  """Centers: of a picture of twice the size the first four pixels lie about the view's first."""
  assert view_to_view(1024, 512).tolist() == [[0.5, 0, -0.25], [0, 0.5, -0.25], [0, 0, 1]]
  assert view_to_view(256, 64).tolist() == [[2, 0, 0.5], [0, 4, 1.5], [0, 0, 1]]

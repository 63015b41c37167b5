"""Where on the road an object is that the view shows in a box."""

import numpy as np

from openpilot.selfdrive.modeld.fair.heads.depth import Depth
from openpilot.selfdrive.modeld.fair.heads.ground import FAR, HEIGHT_STD, PITCH_STD, Ground

PIXEL_STD, EDGE_STD = 2.0, 0.03  # of a box's lower edge: pixels, and share of its height
# of a depth map, as a share of the depth: near, and what each meter adds. On real streets cars at 40 m come out a
# quarter too near, those at 10 m are right to a tenth; and such an error stays from frame to frame (docs/measured.md)
DEPTH_STD, DEPTH_GROWTH = 0.1, 0.02
MIDDLE = np.array([0.35, 0.45, 0.55, 0.65], np.float32)  # where in a box its depth is sampled, across and down


def locate(
  boxes: np.ndarray, edge_std: np.ndarray, clear: np.ndarray, ground: Ground, depth: Depth | None, view: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(N, 4) boxes, standard deviation of their lower edges in pixels (N,), whether nothing hides them (N,) bool ->
  position of the point where each meets the road (N, 3), meters, its standard deviation (N, 3), and what the depth map
  says by itself (N,).

  Two witnesses of the distance: the road plane at the lower edge, unless the view cuts that off, and the median of a
  metric depth map over the middle of the box. They are weighed by their variances; where they contradict each other the
  deviation says so. nan where there is neither."""
  height, width = view
  row, near = boxes[:, 3] - ground.cy, ground.f * ground.height
  ok = (row >= near / FAR) & (boxes[:, 3] <= height - 1.5)
  x = near / np.where(ok, row, near)
  std = ground.forward_std(x, edge_std)
  total = np.where(ok, 1 / (std * std), 0)
  mean = x * total
  spread2: np.ndarray | float = 0.0
  shown = np.full(len(boxes), np.nan, np.float32)
  if depth is not None and depth.metric:
    h, w = depth.z.shape
    corner = boxes[:, :2, None]
    ij = (
      (corner + (boxes[:, 2:, None] - corner) * MIDDLE + 0.5) * np.array([[w / width], [h / height]], boxes.dtype)
    ).astype(np.intp)  # (N, 2, 4)
    ij = np.minimum(np.maximum(ij, 0), np.array([[w - 1], [h - 1]]))
    z = depth.z.ravel().take(ij[:, 1, :, None] * w + ij[:, 0, None]).reshape(len(boxes), MIDDLE.size**2)
    z.sort(axis=1)  # nan comes last
    known = (z == z).sum(1)
    z = z[np.arange(len(z)), np.maximum(known - 1, 0) // 2]
    seen = clear & (known > 0) & (z > 0) & (z < np.inf)  # behind an occluder the map shows that
    shown[seen] = z[seen]
    z = np.where(seen, z, 1)
    share2 = DEPTH_STD * DEPTH_STD + (DEPTH_GROWTH * z) ** 2 + depth.scale_std * depth.scale_std
    more = np.where(seen, 1 / (share2 * z * z), 0)
    both = total + more
    spread2 = np.where(seen & ok, np.maximum(np.abs(z - x) / 2 - np.sqrt(1 / np.maximum(both, 1e-9)), 0), 0) ** 2
    total, mean = both, mean + more * z
  total = np.where(total > 0, total, np.nan)
  x, std_x = mean / total, np.sqrt(1 / total + spread2)
  slope = ((boxes[:, 0] + boxes[:, 2]) / 2 - ground.cx) * (1 / ground.f)
  position, out = np.empty((2, len(x), 3), np.float32)
  position[:, 0], position[:, 1], position[:, 2] = x, x * slope, ground.height + 0 * x
  out[:, 0], out[:, 1], out[:, 2] = (
    std_x,
    np.hypot(std_x * slope, x * (PIXEL_STD / ground.f)),
    ground.height * HEIGHT_STD + x * PITCH_STD,
  )
  return position, out, shown

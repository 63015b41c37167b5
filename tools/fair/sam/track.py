"""Identity through occlusion from boxes alone: what a detector sees, where things were going, and what they looked like."""


import numpy as np



def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Boxes x0 y0 x1 y1, (N, 4) and (M, 4) -> (N, M) intersection over union."""
  wh = np.clip(np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2]), 0, None)
  inter = wh[..., 0] * wh[..., 1]
  area_a, area_b = ((x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (a, b))
  return inter / np.maximum(area_a[:, None] + area_b[None] - inter, 1e-9)

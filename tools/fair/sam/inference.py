"""SAM 2 for a video whose objects are given: masks alone. The teacher, which also finds them, is in sam2.py."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.tools.fair.registry import load_teacher


class SAM2VideoWrapper:
  """model: a SAM 2 or EdgeTAM teacher by its registry name. weights: its folder or the sam2 package's checkpoint, where
  it is not where weights are looked for. options: the teacher's. Raises UserError."""

  def __init__(self, model: str = "sam2.1-large", weights: str | Path | None = None, **options: Any):
    self.predictor: Any = load_teacher(model, weights, **{"detector": None, **options})

  def track_objects(self, video_frames: np.ndarray | Iterable[np.ndarray], initial_boxes: np.ndarray) -> np.ndarray:
    """video_frames (T, 3, H, W) uint8 RGB, or an iterable of (3, H, W). initial_boxes (N, 4): x0 y0 x1 y1 in the first
    frame, pixels, integers at pixel centers. -> (T, N, H, W) bool, the boxes' order; empty once an object is lost.
    predictor.track_objects gives identities and scores, too. Raises UserError."""
    masks, _, _ = self.predictor.track_objects(video_frames, np.asarray(initial_boxes))
    return masks

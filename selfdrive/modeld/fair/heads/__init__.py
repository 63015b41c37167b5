"""Heads: pure numpy functions from a graph's raw output to physical quantities; the manifest names them."""
from collections.abc import Callable
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.heads import depth, segmentation

# decode(raw output, its entry in the manifest, valid (H, W) bool of the model view) -> named quantities
Decode = Callable[[np.ndarray, dict[str, Any], np.ndarray], Any]
HEADS: dict[str, Decode] = {
  "depth": depth.decode,
  "segmentation": segmentation.decode,
}

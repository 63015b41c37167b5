"""Features: a student's own map of features, for what comes after it. Large, so a bundle has to ask for it."""

from typing import Any

import numpy as np


def decode(raw: np.ndarray, spec: dict[str, Any], valid: np.ndarray) -> np.ndarray | None:
  """raw: (1, F, h, w) float -> (F, h, w) float16, or None unless parameters publish is true."""
  if not spec.get("parameters", {}).get("publish", False):
    return None
  return np.clip(raw[0], -65504, 65504).astype(np.float16)

"""Detector: boxes and classes of a DETR-shaped student; its queries do not repeat each other, so nothing is
suppressed."""

from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.heads.depth import in_image
from openpilot.selfdrive.modeld.fair.heads.objects import MAX_OBJECTS, THRESHOLD, Detections, logit, sigmoid


def decode(raw: dict[str, np.ndarray], specs: dict[str, dict[str, Any]], valid: np.ndarray) -> Detections:
  """raw: logits (1, Q, K), one sigmoid a class, and boxes (1, Q, 4), center and size in 0..1 of the view; where the
  bundle has them masks (1, Q, h, w), logits over the view.
  specs['logits']: classes, parameters threshold.
  valid: (256, 512) bool; a box whose center is outside the camera image does not count."""
  logits, boxes = raw["logits"][0], raw["boxes"][0]
  view_h, view_w = valid.shape
  best = logits.argmax(1)
  top = logits.max(1)
  at = (top >= logit(specs["logits"].get("parameters", {}).get("threshold", THRESHOLD))).nonzero()[0]
  size = np.array([view_w, view_h], np.float32)
  center = boxes[at, :2] * size - 0.5
  inside = in_image(center, valid)
  inside = inside[(-top[at[inside]]).argsort(kind="stable")[:MAX_OBJECTS]]
  at, center = at[inside], center[inside]
  half = np.maximum(boxes[at, 2:], 0) * size / 2
  found = np.empty((len(at), 4), np.float32)
  found[:, :2], found[:, 2:] = center - half, center + half
  np.maximum(found, -0.5, out=found)
  np.minimum(found, np.array([view_w - 0.5, view_h - 0.5] * 2, np.float32), out=found)
  masks = raw["masks"][0][at] > 0 if "masks" in raw else None
  return Detections(list(specs["logits"]["classes"]), found, sigmoid(top[at]).astype(np.float32), best[at], masks, None)

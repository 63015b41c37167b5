"""Detector: boxes and classes of a DETR-shaped student; its queries do not repeat each other, so nothing is suppressed."""
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.heads.objects import MAX_OBJECTS, THRESHOLD, Detections, logit, sigmoid


def decode(raw: dict[str, np.ndarray], specs: dict[str, dict[str, Any]], valid: np.ndarray) -> Detections:
  """raw: logits (1, Q, K), one sigmoid a class, and boxes (1, Q, 4), centre and size in 0..1 of the view. specs['logits']: classes, parameters threshold.
  valid: (256, 512) bool; a box whose centre is outside the camera image does not count.
  """
  logits, boxes = raw["logits"][0], raw["boxes"][0]
  view_h, view_w = valid.shape
  best = logits.argmax(1)
  top = logits.max(1)
  at = np.flatnonzero(top >= logit(specs["logits"].get("parameters", {}).get("threshold", THRESHOLD)))
  size = np.array([view_w, view_h], np.float32)
  centre = boxes[at, :2] * size - 0.5
  inside = ((centre > -0.5) & (centre < size - 0.5)).all(1)   # False for nan
  at, centre = at[inside], centre[inside]
  px = np.rint(centre).astype(int)   # in the view, as the centres are
  ok = valid[px[:, 1], px[:, 0]]
  at, centre = at[ok], centre[ok]
  order = np.argsort(-top[at], kind="stable")[:MAX_OBJECTS]
  at, centre = at[order], centre[order]
  half = np.maximum(boxes[at, 2:], 0) * size / 2
  found = np.minimum(np.maximum(np.concatenate([centre - half, centre + half], axis=1), -0.5), np.concatenate([size, size]) - 0.5).astype(np.float32)
  return Detections(list(specs["logits"]["classes"]), found, sigmoid(top[at]).astype(np.float32), best[at], None, None)

"""Segmentation: one class per map pixel, and its run-length form."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.heads.depth import map_valid
from openpilot.selfdrive.modeld.fair.roles import Channels, channels_of

OUTSIDE = 255  # class of pixels outside the camera image
MAX_RUN = 65535  # of the message's UInt16


@dataclass
class Segmentation:
  classes: list[str]
  class_map: np.ndarray  # (H, W) uint8, index into classes, 255 outside the camera image
  # (C,) float32, mean probability of a class over the pixels that it was given to, 0 where it has none
  class_prob: np.ndarray
  runs: tuple[np.ndarray, np.ndarray] | None = None  # encode_runs() of the map, where it was needed already
  channels: Channels | None = None  # role -> classes; None: by their names

  def role(self, *roles: str) -> tuple[int, ...]:
    """The classes that have one of these roles, as indices."""
    if self.channels is None:
      self.channels = channels_of(self.classes)
    return tuple(k for r in roles for k in self.channels[r])


def decode(raw: np.ndarray, spec: dict[str, Any], valid: np.ndarray) -> Segmentation:
  """raw: (1, C, H, W) logits; spec['classes']: C names; spec['channels']: their roles, see plan.py; valid: (256, 512)
  bool."""
  logits = raw[0]
  top = logits.max(0)
  shares = logits - top
  prob = 1.0 / np.exp(shares, out=shares).sum(0)  # softmax at its maximum
  # argmax, the first of equals, by counting the classes before it: numpy's own takes four times as long over the first
  # axis. 0 where no number is the largest
  below = (logits != top).view(np.uint8)
  class_map = below[0].copy()
  for before, this in pairwise(below):
    this &= before
    class_map += this
  class_map *= (class_map < len(logits)).view(np.uint8)
  inside = map_valid(valid, *class_map.shape)
  if not inside.all():  # cameras fill the view, most of the time
    class_map[~inside] = OUTSIDE
  # over runs, which the message wants too: a tenth as many as pixels
  values, lengths = encode_runs(class_map)
  starts, n = lengths.cumsum(dtype=np.intp) - lengths, len(spec["classes"])
  counts = np.bincount(values, weights=lengths, minlength=256)[:n]
  sums = np.bincount(values, weights=np.add.reduceat(prob.T.ravel(), starts, dtype=np.float64), minlength=256)[:n]
  class_prob = (sums / np.maximum(counts, 1)).astype(np.float32)
  return Segmentation(list(spec["classes"]), class_map, class_prob, (values, lengths), spec.get("channels"))


def encode_runs(class_map: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(H, W) uint8 -> the class (R,) uint8 and length (R,) uint16 of each run, down the columns as in COCO's RLE. Runs
  over 65535 pixels are split."""
  flat = class_map.T.ravel()
  inner = (flat[1:] != flat[:-1]).nonzero()[0]
  edges = np.empty(len(inner) + 2, np.intp)
  edges[0], edges[1:-1], edges[-1] = 0, inner + 1, flat.size
  lengths = edges[1:] - edges[:-1]
  values = flat[edges[:-1]]
  if lengths.size and lengths.max() > MAX_RUN:
    parts = -(-lengths // MAX_RUN)
    values = np.repeat(values, parts)
    split = np.full(values.size, MAX_RUN)
    split[np.cumsum(parts) - 1] = lengths - (parts - 1) * MAX_RUN
    lengths = split
  return values, lengths.astype(np.uint16)


def decode_runs(values: np.ndarray, lengths: np.ndarray, h: int, w: int) -> np.ndarray:
  """The inverse of encode_runs -> (h, w) uint8. Raises ValueError where the runs do not fill the map."""
  flat = np.repeat(np.asarray(values, dtype=np.uint8), np.asarray(lengths, dtype=np.int64))
  if flat.size != h * w:
    raise ValueError(f"runs cover {flat.size} pixels, the map has {h * w}")
  return flat.reshape(w, h).T

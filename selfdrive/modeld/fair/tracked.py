"""What goes into the tracker, of several heads, and what comes out of it."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from openpilot.selfdrive.modeld.fair.heads.objects import MAX_OBJECTS, Detections, box_iou

SAME_IOU = 0.5  # a box of the detector and an object with more overlap are one thing


@dataclass
class Tracked:
  """All that is known of N tracks at one frame, oldest first."""

  classes: list[str]
  ids: np.ndarray  # (N,) int64
  class_ids: np.ndarray  # (N,) int64
  scores: np.ndarray  # (N,) float32; of a track out of sight the last
  boxes: np.ndarray  # (N, 4) float32 view pixels: detected, or where it should be
  ages: np.ndarray  # (N,) int64 frames since first seen
  occluded: np.ndarray  # (N,) bool: not seen in this frame, or less than half of it
  visibility: np.ndarray  # (N,) float32
  masks: np.ndarray | None  # (M, h, w) bool
  mask_of: np.ndarray  # (N,) index into masks, -1: none
  position: np.ndarray  # (N, 3) meters, nan unknown
  position_std: np.ndarray  # (N, 3)
  # (N,) float32 meters, of a metric depth map in the middle of the box, nan without or while something hides it
  depth: np.ndarray


TRACK_FIELDS = (
  "ids",
  "class_ids",
  "scores",
  "boxes",
  "ages",
  "occluded",
  "visibility",
  "mask_of",
  "position",
  "position_std",
  "depth",
)  # one row a track


def merge(found: list[Detections], classes: list[str]) -> Detections:
  """Detections of several heads as one, classes renumbered: where two of one class are the same thing, the earlier
  head's stays, with the better score."""
  ids = [renumbering(tuple(d.classes), tuple(classes))[d.class_ids] for d in found]
  if len(found) == 1:
    d = found[0]
    return Detections(classes, d.boxes, d.scores, ids[0], d.masks, d.embed)
  first, scores, keep = found[0], [found[0].scores.copy()], [np.ones(len(found[0].boxes), bool)]
  for d, k in zip(found[1:], ids[1:], strict=True):
    twin = (box_iou(d.boxes, first.boxes) > SAME_IOU) & (k[:, None] == ids[0])
    scores[0] = np.maximum(scores[0], np.where(twin, d.scores[:, None], 0).max(0, initial=0))
    scores.append(d.scores)
    keep.append(~twin.any(1))
  kept = np.concatenate(keep)
  score = np.concatenate(scores)[kept]
  order = (-score).argsort(kind="stable")[:MAX_OBJECTS]
  at = kept.nonzero()[0][order]
  masks = embed = None
  n = len(first.boxes)
  mine = at < n  # what the others found has neither mask nor embedding: empty, zero
  if first.masks is not None:
    masks = first.masks.take(at, 0, mode="clip") if n else np.zeros((len(at), *first.masks.shape[1:]), bool)
    masks[~mine] = False
  if first.embed is not None:
    embed = first.embed.take(at, 0, mode="clip") if n else np.zeros((len(at), first.embed.shape[1]), np.float32)
    embed[~mine] = 0
  return Detections(
    classes, np.concatenate([d.boxes for d in found])[at], score[order], np.concatenate(ids)[at], masks, embed
  )


@cache
def renumbering(theirs: tuple[str, ...], mine: tuple[str, ...]) -> np.ndarray:
  return np.array([mine.index(c) for c in theirs], np.int64)


def pack(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(M, h, w) bool -> (M, words) bits, to count overlaps in a few instructions a pair, and (M,) int32 how many are
  set."""
  bits = np.packbits(masks.reshape(len(masks), masks.shape[1] * masks.shape[2]), axis=1)
  if bits.shape[1] % 8 == 0:
    bits = bits.view(np.uint64)
  return bits, np.bitwise_count(bits).sum(1, dtype=np.int32)

"""Exact truth of a simulated segment, in `<segment>/truth/`.

Dense truth is of the medmodel view (512x256) of a perfectly calibrated camera: the pixels that a student's model frame
shows. Ragged truth is one JSON line a frame."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import read_json

CHUNK = 20  # frames a file
MAP_H, MAP_W = VIEW_H // 4, VIEW_W // 4  # of a student's maps
IGNORE = 255  # class of pixels that are ignored everywhere
MAX_DEPTH = 200.0  # meters; beyond, nothing is learned or measured
# weight of a pixel of each class in the vote of a map pixel's 4x4 block: thin objects would lose every unweighted vote
VOTES = (1, 1, 3, 1, 2)


def map_labels(depth: np.ndarray, semantic: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """depth (256, 512) meters, inf in the sky, and semantic (256, 512) uint8 of the view -> depth (64, 128) float16 at
  the center of each map pixel, classes (64, 128) uint8.

  Depth: the mean of 1/z over the block's four central pixels, which is exact on planes. Class: the block's vote,
  weighted by VOTES."""
  with np.errstate(divide="ignore"):
    inverse = 1.0 / depth.reshape(MAP_H, 4, MAP_W, 4)[:, 1:3, :, 1:3]
    at_center = (1.0 / inverse.mean(axis=(1, 3))).astype(np.float16)
  blocks = semantic.reshape(MAP_H, 4, MAP_W, 4).transpose(0, 2, 1, 3).reshape(MAP_H, MAP_W, 16)
  counts = np.stack([(blocks == k).sum(-1) * v for k, v in enumerate(VOTES)], axis=-1)
  return at_center, counts.argmax(-1).astype(np.uint8)


@dataclass
class TruthFrame:
  depth: np.ndarray  # (256, 512) float32, meters along the optical axis, inf in the sky; stored as float16
  semantic: np.ndarray  # (256, 512) uint8, index into Truth.classes
  instance: np.ndarray  # (256, 512) uint16, identity of the vehicle or pedestrian, 0 elsewhere


class Truth:
  """Truth of one segment. Raises UserError where it is absent or damaged."""

  def __init__(self, segment_dir: str | Path):
    self.dir = Path(segment_dir) / "truth"
    try:
      self.info: dict[str, Any] = read_json(self.dir / "truth.json")
      self._objects, self._lanes = (
        [json.loads(line) for line in (self.dir / name).read_text().splitlines()]
        for name in ("objects.jsonl", "lanes.jsonl")
      )
    except (OSError, ValueError, RecursionError) as e:
      raise UserError(f"no readable truth in {self.dir} ({e}); only simulated routes have it") from None
    self.classes: list[str] = self.info["classes"]
    self.frame_count: int = self.info["frames"]

  @lru_cache(maxsize=2)  # noqa: B019 - a Truth is kept only while its segment is read
  def _chunk(self, n: int) -> dict[str, np.ndarray]:
    try:
      with np.load(self.dir / f"dense-{n:04d}.npz") as z:
        return {k: z[k] for k in z.files}
    except (OSError, ValueError) as e:
      raise UserError(f"{self.dir}: frames {n * CHUNK} on cannot be read ({e}); write the route again") from None

  def frame(self, segment_id: int) -> TruthFrame:
    chunk, i = self._chunk(segment_id // CHUNK), segment_id % CHUNK
    return TruthFrame(chunk["depth"][i].astype(np.float32), chunk["semantic"][i], chunk["instance"][i])

  def objects(self, segment_id: int) -> list[dict[str, Any]]:
    """id, cls, box_view and box_camera of what is visible ([x0, y0, x1, y1] or None), visible_fraction, its visible
    pixels as a share of those that it would fill in the view with nothing in front of it; occluded: less than half;
    position [x, y, z] of its center on the road, size, yaw: in the calibrated frame; v_rel: its speed along the road
    less the car's, m/s."""
    return self._objects[segment_id]

  def lanes(self, segment_id: int) -> list[dict[str, Any]]:
    """id, kind, road [[x, y, z]], view [[x, y]] of the same points in the model view, visible [bool]: inside the view
    and not behind anything."""
    return self._lanes[segment_id]

"""CoTracker for points that are given, by the name of what it is for. The tracker without its package, chained RAFT
flow, is LaneTracker in tracker.py."""

from pathlib import Path
from typing import Any

from openpilot.tools.fair.cotracker.cotracker import CoTracker


class LaneTracker(CoTracker):
  """CoTracker 2 by default; mode 'offline' or 'online' are CoTracker 3's. Package and checkpoints are CC-BY-NC-4.0.
  Raises UserError where they are not there.

  track_lane_points(video, lane_points): video (T, 3, H, W) or CoTracker's own (1, T, 3, H, W), lane_points (N, 2) ->
  tracks (T, N, 2), visible (T, N)."""

  def __init__(self, mode: str = "v2", weights: str | Path | None = None, **options: Any):
    super().__init__(mode, weights, **options)

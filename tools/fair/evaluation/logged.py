"""What openpilot's own model said in a real log, as a baseline: do the lanes, the depth and the vehicles of a Scene
agree with its lane lines and leads?"""

import cv2
import numpy as np

from openpilot.tools.fair.evaluation.compared import Compared
from openpilot.tools.fair.evaluation.metrics import Sums, known, ratio
from openpilot.tools.fair.evaluation.scenes import Scene
from openpilot.tools.fair.openpilot.teacher import LEADS, LINES
from openpilot.tools.sim.truth import IGNORE

OWN = (LINES.index("lane1"), LINES.index("lane2"))  # the lines of the car's own lane
SURE = 0.5  # of a line or lead that counts
NEAR = 8  # view pixels between a line and a lane pixel that still agree
LEAD = "vehicle"  # what a lead is, in openpilot's words


class Logged(Sums):
  """log_lane_recall: share of the points of openpilot's own lane lines (probability >= 0.5, in the view) that have a
  lane pixel within 8 view pixels;
  log_lane_chance: the same of points moved 64 pixels aside, so what drawing lanes everywhere would earn.
  log_lead_recall: share of leads whose foot is in a vehicle's box, made 8 pixels larger. abs_rel_lead: mean |z - x| / x
  of the depth at the lead's foot and openpilot's distance.
  Neither side is truth: openpilot's lines are a model's too."""

  def __init__(self) -> None:
    self.sums = np.zeros(8)

  def add(
    self,
    scene: Scene,
    lines: dict[str, np.ndarray],
    leads: dict[str, np.ndarray],
    score: float = 0.3,
    compared: Compared | None = None,
  ) -> None:
    """lines, leads: one frame of the labels of teacher 'openpilot'."""
    compared = compared or Compared()
    marking = [k for k in compared.with_role("marking", "maps") if k in scene.named]
    if scene.classes is not None and marking:
      lanes = np.isin(scene.classes, marking).astype(np.uint8)
      near = cv2.dilate(lanes, np.ones((2 * NEAR // 4 + 1,) * 2, np.uint8)).astype(bool)
      own = np.isin(lines["cls"], OWN) & (lines["score"] >= SURE) & lines["visible"].astype(bool)
      for k, aside in ((0, 0.0), (2, 64.0), (2, -64.0)):
        i, j, inside = cells(lines["x"][own] + aside, lines["y"][own], compared.map_shape)
        ok = inside & (scene.classes[i, j] != IGNORE)
        self.sums[k : k + 2] += [near[i[ok], j[ok]].sum(), ok.sum()]
    sure = (leads["cls"] == LEADS.index("lead0")) & (leads["score"] >= SURE) & leads["visible"].astype(bool)
    x, y, far = leads["x"][sure], leads["y"][sure], leads["road_x"][sure]
    i, j, inside = cells(x, y, compared.map_shape)
    objects = scene.objects if scene.objects is not None else scene.detector
    vehicle = compared.classes.find(LEAD)
    if objects is not None and vehicle is not None and vehicle.boxes:
      b = objects.boxes[(objects.cls == compared.names("boxes").index(vehicle.name)) & (objects.score >= score)]
      hit = (
        (b[:, 0] - NEAR <= x[:, None])
        & (x[:, None] <= b[:, 2] + NEAR)
        & (b[:, 1] - NEAR <= y[:, None])
        & (y[:, None] <= b[:, 3] + NEAR)
      ).any(axis=1)
      self.sums[4:6] += [hit[inside].sum(), inside.sum()]
    if scene.depth is not None and scene.depth_kind == "metric":
      z = scene.depth[i, j]
      ok = inside & np.isfinite(z)
      self.sums[6:8] += [np.abs(z[ok] / far[ok] - 1).sum(), ok.sum()]

  def result(self) -> dict[str, float]:
    s = self.sums
    names = ("log_lane_recall", "log_lane_chance", "log_lead_recall", "abs_rel_lead")
    return known({n: ratio(s[2 * i], s[2 * i + 1]) for i, n in enumerate(names)})


def cells(x: np.ndarray, y: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """View pixels -> row and column of a map of `shape`, and whether they are in it."""
  i, j = np.floor((y + 0.5) / 4).astype(int), np.floor((x + 0.5) / 4).astype(int)
  inside = (i >= 0) & (i < shape[0]) & (j >= 0) & (j < shape[1])
  return np.clip(i, 0, shape[0] - 1), np.clip(j, 0, shape[1] - 1), inside

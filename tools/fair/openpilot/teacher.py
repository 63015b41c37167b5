"""The route's own driving model as a teacher: the baseline that all is compared with. Nothing runs, the labels come out of the log.

modelV2 of an rlog gives lane lines, road edges and path as the model put them out; drivingModelData of a qlog gives the path as polynomials in time (degree 4,
openpilot's fill_model_msg.py) and the lane lines' offsets beside the car, so its lane lines are the path shifted sideways. Leads are radarState's.
"""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.common.transformations.camera import view_frame_from_device_frame
from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.tools.fair.teacher import Clip, Entry, Label, Labels, State
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.route import Segment

LINES = ("lane0", "lane1", "lane2", "lane3", "edge0", "edge1", "path")  # from left to right; lane1 and lane2 are the car's own
LEADS = ("lead0", "lead1")
HEIGHT = 1.22  # m of the camera over the road, where the log does not say it
POINT_COLUMNS = ("frame", "track", "x", "y", "visible", "cls", "score", "road_x", "road_y", "road_z")
FAR = 100.0  # m
VIEW = (512, 256)


def project(road: np.ndarray, intrinsics: np.ndarray = medmodel_intrinsics) -> np.ndarray:
  """(N, 3) in the calibrated frame, metres -> (N, 2) pixels of the view; NaN behind the camera."""
  p = intrinsics @ view_frame_from_device_frame @ np.asarray(road, np.float64).T
  with np.errstate(divide="ignore", invalid="ignore"):
    return np.where(p[2] > 0.1, p[:2] / p[2], np.nan).T


def model_lines(m: Any, height: float) -> Iterable[tuple[str, float, np.ndarray]]:
  """(line, probability or 1 / std, (N, 3) road) of a modelV2."""
  for i, line in enumerate(m.laneLines):
    yield f"lane{i}", float(m.laneLineProbs[i]), np.stack([line.x, line.y, line.z], axis=1)
  for i, line in enumerate(m.roadEdges):
    yield f"edge{i}", float(np.clip(1 - m.roadEdgeStds[i], 0, 1)), np.stack([line.x, line.y, line.z], axis=1)
  if len(m.position.x):
    yield "path", 1.0, np.stack([m.position.x, m.position.y, np.array(m.position.z) + height], axis=1)


def driving_lines(m: Any, height: float) -> Iterable[tuple[str, float, np.ndarray]]:
  """The same of a drivingModelData."""
  coefficients = [list(m.path.xCoefficients), list(m.path.yCoefficients), list(m.path.zCoefficients)]
  if not all(coefficients):
    return
  t = np.linspace(0, 10, 33)
  path = np.stack([np.polynomial.polynomial.polyval(t, c) for c in coefficients], axis=1) + [0, 0, height]
  yield "path", 1.0, path
  for name, y, probability in (("lane1", m.laneLineMeta.leftY, m.laneLineMeta.leftProb), ("lane2", m.laneLineMeta.rightY, m.laneLineMeta.rightProb)):
    yield name, float(probability), path + [0, y - path[0, 1], 0]


@lru_cache(4)
def read_log(path: Path) -> tuple[dict[int, list[tuple[str, float, np.ndarray]]], list[tuple[int, list[tuple[str, float, np.ndarray]]]]]:
  """-> frame id -> its lines; (time, leads) in order."""
  height = HEIGHT
  full: dict[int, list[tuple[str, float, np.ndarray]]] = {}
  short: dict[int, list[tuple[str, float, np.ndarray]]] = {}
  leads = []
  for event in LogReader([path], services=["modelV2", "drivingModelData", "radarState", "extrinsicsCalibration"]):
    which = event.which()
    m = getattr(event, which)
    if which == "extrinsicsCalibration":
      height = float(m.height[0]) if len(m.height) else height
    elif which == "modelV2":
      full[m.frameId] = list(model_lines(m, height))
    elif which == "drivingModelData":
      short[m.frameId] = list(driving_lines(m, height))
    else:
      there = [(name, x) for name, x in zip(LEADS, (m.leadOne, m.leadTwo), strict=True) if x.present]
      leads.append((event.logMonoTime, [(name, float(x.modelProb), np.array([[x.dRel, -x.yRel, height]])) for name, x in there]))
  return full or short, leads


class OpenpilotTeacher:
  stateful, wants = True, "none"  # stateful: a clip is of one segment, and so of one log

  def __init__(self, name: str, entry: Entry, path: Path | None, device: str | None = None):
    self.name, self.licence, self.model_id, self.checkpoint_hash = name, entry.licence, "the route's own driving model", ""
    self.labels = [Label("lines", "points", unit="px, m", classes=LINES), Label("leads", "points", unit="px, m", classes=LEADS)]

  def prepare(self, height: int, width: int) -> None: ...

  def settings(self) -> dict[str, Any]:
    return {"far": FAR, "camera_height": HEIGHT}

  def check(self, segment: Segment) -> None:
    """Raises UserError where there is no log to read."""
    if segment.log_path is None:
      raise UserError(f"teacher '{self.name}' reads the route's log, and segment {segment.name} in {segment.dir} has none; leave this teacher out")

  def label(self, clip: Clip, state: State | None = None) -> tuple[Labels, State | None]:
    """Rows only for frames that a message is about; leads for frames that a radarState follows within 100 ms."""
    if clip.log_path is None:
      raise UserError("teacher 'openpilot' reads the route's log, and a segment has none; leave this teacher out")
    lines, leads = read_log(clip.log_path)
    times = np.array([t for t, _ in leads], np.int64)
    columns: dict[str, dict[str, list[Any]]] = {k: {c: [] for c in POINT_COLUMNS} for k in ("lines", "leads")}
    for t, (frame_id, eof) in enumerate(zip(clip.frame_ids, clip.times, strict=True)):
      self._add(columns["lines"], t, lines.get(frame_id, []), LINES)
      k = int(np.searchsorted(times, eof))
      if k < len(times) and times[k] - eof < 100_000_000:
        self._add(columns["leads"], t, leads[k][1], LEADS)
    types = {"frame": np.int32, "track": np.int32, "visible": np.bool_, "cls": np.int16}
    return {k: {c: np.array(v, types.get(c, np.float32)) for c, v in table.items()} for k, table in columns.items()}, None

  @staticmethod
  def _add(columns: dict[str, list[Any]], t: int, lines: list[tuple[str, float, np.ndarray]], names: tuple[str, ...]) -> None:
    for name, score, road in lines:
      road = road[(road[:, 0] > 0) & (road[:, 0] < FAR)]
      px = project(road)
      inside = np.isfinite(px).all(axis=1) & (px[:, 0] > -0.5) & (px[:, 0] < VIEW[0] - 0.5) & (px[:, 1] > -0.5) & (px[:, 1] < VIEW[1] - 0.5)
      for p, r, visible in zip(np.nan_to_num(px, nan=-1.0), road, inside, strict=True):
        k = names.index(name)
        for c, v in zip(POINT_COLUMNS, (t, k, p[0], p[1], visible, k, score, *r), strict=True):
          columns[c].append(v)

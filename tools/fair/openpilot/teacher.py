"""The route's own driving model as a teacher: the baseline that all is compared with. Nothing runs, the labels come out
of the log.

Its lines: lines.py. Leads are radarState's. """

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.common.transformations.camera import project
from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.selfdrive.modeld.fair.calibration import mounting
from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W
from openpilot.tools.fair.openpilot.lines import CAMERA_HEIGHT, Line, driving_lines, model_lines
from openpilot.tools.fair.teacher import Clip, Entry, Label, Labels, State
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.route import Segment

# from left to right; lane1 and lane2 are the car's own
LINES = ("lane0", "lane1", "lane2", "lane3", "edge0", "edge1", "path")
LEADS = ("lead0", "lead1")
PATH_T = np.linspace(0, 10, 33)  # seconds along drivingModelData's path
POINT_COLUMNS = ("frame", "track", "x", "y", "visible", "cls", "score", "road_x", "road_y", "road_z")
FAR = 100.0  # m


@lru_cache(4)
def read_log(path: Path) -> tuple[dict[int, list[Line]], list[tuple[int, list[Line]]]]:
  """-> frame id -> its lines; (time, leads) in order."""
  height = CAMERA_HEIGHT
  full: dict[int, list[Line]] = {}
  short: dict[int, list[Line]] = {}
  leads = []
  reader = LogReader([path], services=["modelV2", "drivingModelData", "radarState", "extrinsicsCalibration"])
  for event in reader:
    with reader.guard(event):
      which = event.which()
      m = getattr(event, which)
      if which == "extrinsicsCalibration":
        height = mounting(m)[1] or height
      elif which == "modelV2":
        full[m.frameId] = model_lines(m, height)
      elif which == "drivingModelData":
        short[m.frameId] = driving_lines(m, height, PATH_T)
      else:
        there = [(name, x) for name, x in zip(LEADS, (m.leadOne, m.leadTwo), strict=True) if x.present]
        leads.append((event.logMonoTime, [Line(name, float(x.modelProb), np.array([[x.dRel, -x.yRel, height]])) for name, x in there]))
  return full or short, leads


class OpenpilotTeacher:
  stateful, wants = True, "none"  # stateful: a clip is of one segment, and so of one log

  def __init__(self, name: str, entry: Entry, path: Path | None, device: str | None = None):
    self.name, self.license, self.model_id, self.checkpoint_hash = name, entry.license, "the route's own driving model", ""
    self.labels = [Label("lines", "points", unit="px, m", classes=LINES), Label("leads", "points", unit="px, m", classes=LEADS)]

  def prepare(self, height: int, width: int) -> None: ...

  def settings(self) -> dict[str, Any]:
    return {"far": FAR, "camera_height": CAMERA_HEIGHT, "lanes_of_a_path": "square to it"}

  def check(self, segment: Segment) -> None:
    """Raises UserError where there is no log to read."""
    if segment.log_path is None:
      raise UserError(f"teacher '{self.name}' reads the route's log, and segment {segment.name} in {segment.dir} has "
                      "none; leave this teacher out")

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
  def _add(columns: dict[str, list[Any]], t: int, lines: list[Line], names: tuple[str, ...]) -> None:
    for name, score, road in lines:
      road = road[(road[:, 0] > 0) & (road[:, 0] < FAR)]
      px, depth = project(road, medmodel_intrinsics)
      px[depth <= 0.1] = np.nan
      inside = np.isfinite(px).all(axis=1) & (px[:, 0] > -0.5) & (px[:, 0] < VIEW_W - 0.5) & (px[:, 1] > -0.5) & (px[:, 1] < VIEW_H - 0.5)
      for p, r, visible in zip(np.nan_to_num(px, nan=-1.0), road, inside, strict=True):
        k = names.index(name)
        for c, v in zip(POINT_COLUMNS, (t, k, p[0], p[1], visible, k, score, *r), strict=True):
          columns[c].append(v)

#!/usr/bin/env python3
"""The car ahead, of which a log's radarState knows the distance: is it in a vehicle's box, and how far away is it said
to be? Bundles (their networks alone, and what fairmodeld publishes), and two detectors that see the whole picture.

python tests/bench/bench_leads.py --weights FOLDER --night SEGMENT SEGMENT --day SEGMENT models/fair_unified_small ...

A lead counts at 5 to 60 m (radarState.leadOne.dRel). The camera is 1.52 m behind the radar, as in openpilot's radard;
the point is taken half a meter above the road. A distance is right within 15%. Where a car has no radar the log's
leads are its driving model's: how many are is printed."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

import cv2
import numpy as np
from tqdm import tqdm

from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.selfdrive.modeld.fair.heads.depth import Depth
from openpilot.selfdrive.modeld.fair.heads.ground import DEFAULT_HEIGHT, Ground, view_ground
from openpilot.selfdrive.modeld.fair.calibration import mounting
from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W
from openpilot.selfdrive.modeld.fair.locate import locate
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.tools.fair.labels.views import SegmentView, segment_view
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.framereader import FrameReader
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.route import Route, Segment
from openpilot.tools.replay.process_replay import CameraBuffer
from tests.bench.bench_streets import BOX_TEACHERS, STREETS, Runner, Sums, Teachers, frame_of, tell

RADAR_TO_CAMERA = 1.52  # m, of openpilot's radard
ABOVE_ROAD = 0.5  # m, of the point that must lie in the box
NEAR, FAR, RIGHT = 5.0, 60.0, 0.15  # m, m, share of the distance
LATE = 100_000_000  # ns between the end of a frame's exposure and the radarState that is about it
LEAD_IN = 5  # frames that fairmodeld sees before one that counts


@dataclass
class Lead:
  """Of one frame: where it is in the view, and x ahead of the camera, m."""

  frame_id: int
  segment_id: int
  point: np.ndarray  # (2,) view pixels
  x: float
  radar: bool  # else the driving model said it


def leads_of(view: SegmentView) -> tuple[list[Lead], Ground]:
  """-> frames with a lead, and the road plane. Raises UserError without a log."""
  if view.segment.log_path is None:
    raise UserError(f"{view.segment.dir} has no log: a lead's distance is radarState's")
  said, height = [], DEFAULT_HEIGHT
  reader = LogReader([view.segment.log_path], services=["radarState", "extrinsicsCalibration"])
  for event in reader:
    with reader.guard(event):
      if event.which() == "radarState":
        lead = event.radarState.leadOne
        if lead.present and NEAR <= lead.dRel <= FAR:
          said.append((event.logMonoTime, lead.dRel + RADAR_TO_CAMERA, -lead.yRel, bool(lead.radar)))
      else:
        height = mounting(event.extrinsicsCalibration)[1] or height
  ground, out = view_ground("medmodel", height), []
  ends = np.array([e.timestamp_eof for e in view.entries])
  for t, x, y, radar in said:
    k = int(np.searchsorted(ends, t)) - 1
    if k >= 0 and t - ends[k] <= LATE:
      point = ground.view(np.array([x, y, height - ABOVE_ROAD]))
      if 0 <= point[0] < VIEW_W and 0 <= point[1] < VIEW_H:
        out.append(Lead(view.entries[k].frame_id, view.entries[k].segment_id, point, float(x), radar))
  return out, ground


def judge(sums: Sums, who: str, lead: Lead, boxes: np.ndarray, distance: dict[str, np.ndarray]) -> None:
  """boxes: (N, 4) of vehicles; distance: way of measuring -> (N,) m ahead of the camera, nan unknown."""
  covers = (boxes[:, :2] <= lead.point).all(axis=1) & (lead.point <= boxes[:, 2:]).all(axis=1)
  sums.add(f"{who}: in a vehicle's box", covers.any(), 1)
  for way, x in distance.items():
    sums.add(f"{who}: and within 15% by {way}", (covers & (np.abs(x / lead.x - 1) <= RIGHT)).any(), 1)


def by_edge(boxes: np.ndarray, ground: Ground) -> np.ndarray:
  """(N, 4) -> (N,) m ahead, of the road at each lower edge; nan where the view ends before it."""
  one = np.ones(len(boxes))
  return locate(boxes, one, one > 0, ground, None, (VIEW_H, VIEW_W))[0][:, 0]


def by_depth(boxes: np.ndarray, ground: Ground, z: np.ndarray) -> np.ndarray:
  """The same of a depth map in the middle of each box."""
  one = np.ones(len(boxes))
  return locate(boxes, one, one > 0, ground, Depth(z, True), (VIEW_H, VIEW_W))[2]


class Published:
  """What fairmodeld says of vehicles, frame by frame."""

  def __init__(self, path: Path, view: SegmentView, ground: Ground):
    self.model = FairModel(load_bundle(path))
    self.buffer = CameraBuffer(self.model.set_camera, view.stream)
    self.model.set_calibration(view.rpy, ground.height)

  def __call__(self, frame: np.ndarray, frame_id: int, device: str | None, sensor: str | None) -> np.ndarray:
    """-> (N, 5) boxes and meters ahead, nan unknown."""
    eof = frame_id * 50_000_000
    sent = dict(self.model.process(self.buffer.fill(frame, device, sensor), frame_id, eof, eof))
    said = sent["fairObjects"].as_reader().fairObjects if "fairObjects" in sent else None
    rows = []
    for o in said.objects if said is not None else ():
      c = STREETS.find(said.classes[o.classId])
      if c is not None and c.name == "vehicle":
        rows.append([*o.box, o.position[0] if len(o.position) else np.nan])
    return np.array(rows, np.float32).reshape(-1, 5)


def judge_segment(
  sums: Sums, name: str, segment: Segment, camera: str, bundles: dict[str, Path], teachers: Teachers
) -> None:
  view = segment_view(segment, camera)
  leads, ground = leads_of(view)
  runners = {who: Runner(path) for who, path in bundles.items()}
  published = {who: Published(path, view, ground) for who, path in bundles.items()}
  by_frame = {lead.segment_id: lead for lead in leads}
  wanted = {k for n in by_frame for k in range(n - LEAD_IN, n + 1)}
  ids = {e.segment_id: e.frame_id for e in view.entries}
  nv12, rgb = FrameReader(view.path, "nv12"), FrameReader(view.path, "rgb24")
  for k in tqdm(sorted(wanted & ids.keys()), desc=f"{name} {segment.name}", unit="frame"):
    frame, lead = nv12.get(k), by_frame.get(k)
    said = {who: p(frame, ids[k], "tizi", None) for who, p in published.items()}
    if lead is None:
      continue
    picture = rgb.get(k)[: view.height // 2 * 2, : view.width // 2 * 2]
    model_frame, valid = frame_of(picture, view)
    for who, runner in runners.items():
      seen = runner(model_frame, valid, ground.height)
      boxes = seen.boxes if seen.boxes is not None else np.zeros((0, 4), np.float32)
      ways = {"the lower edge": by_edge(boxes, ground)}
      if seen.depth is not None:
        ways["depth"] = by_depth(boxes, ground, seen.depth)
      judge(sums, f"{name}, {who}, its network", lead, boxes, ways)
      judge(sums, f"{name}, {who}, published", lead, said[who][:, :4], {"its place": said[who][:, 4]})
    for who, found in zip(BOX_TEACHERS, teachers.vehicles(picture, view), strict=True):
      judge(sums, f"{name}, {who}", lead, found.xyxy, {"the lower edge": by_edge(found.xyxy, ground)})
  for lead in leads:
    sums.add(f"{name}: leads that are a radar's", lead.radar, 1)


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("bundles", nargs="+", type=Path)
  p.add_argument("--night", nargs="+", type=Path, default=[], metavar="SEGMENT", help="folders of segments with a log")
  p.add_argument("--day", nargs="+", type=Path, default=[], metavar="SEGMENT", help="the same, by day")
  p.add_argument("--camera", default="qcamera", choices=("road", "qcamera"))
  p.add_argument("--weights", type=Path, required=True, help="the folder with the detectors' weights")
  p.add_argument("--output", type=Path, help="a JSON of all figures")
  args = p.parse_args()
  os.environ.setdefault("FAIR_WEIGHTS", str(args.weights))
  cv2.setNumThreads(1)
  teachers, figures = Teachers(BOX_TEACHERS), {}
  for name, folders in (("night", args.night), ("day", args.day)):
    sums = Sums()
    for folder in folders:
      for segment in Route(folder).segments:
        judge_segment(sums, name, segment, args.camera, {str(b): b for b in args.bundles}, teachers)
    if (radar := sums.of.get(f"{name}: leads that are a radar's")) is not None:
      figures |= {f"{name}: frames with a lead": float(radar[1]), **sums.ratios()}
  tell(figures, args.output)


if __name__ == "__main__":
  raise SystemExit(cli(main)())

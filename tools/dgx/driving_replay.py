#!/usr/bin/env python3
"""Drives a driving model's ONNX file over a route as modeld would, without clock or sockets: route and file in, a log
with modelV2 out, the same every time.

python tools/dgx/driving_replay.py ROUTE MODEL.onnx [POLICY.onnx] --output driven.zst

tools/replay/process_replay.py does this with a bundle. What comes out can be looked at and compared
(tools/replay/compare_logs.py); it asks for no lane change, and has neither action nor disengage predictions: it is not
for driving. One camera feeds both views, as far as it reaches."""

from dataclasses import dataclass
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the modules beside it must not be found under their bare names
  sys.path[: not sys.flags.safe_path] = [str(Path(__file__).resolve().parents[2])]

import numpy as np
import torch
from torch import Tensor

from openpilot.cereal import messaging
from openpilot.selfdrive.modeld.fair.calibration import mounting
from openpilot.selfdrive.modeld.fair.frames import CameraError, ModelFrame, camera_intrinsics
from openpilot.tools.lib.options import option, parse
from openpilot.tools.dgx.training.constants import (
  ACTION_T_LEN,
  DESIRE_LEN,
  FRAME_SKIP,
  LEAD_T_IDXS,
  LEAD_T_OFFSETS,
  T_IDXS,
  X_IDXS,
)
from openpilot.tools.dgx.training.history import History
from openpilot.tools.dgx.training.teacher import LATERAL_DELAY, DrivingTeacher
from openpilot.tools.lib.cameras import VIDEOS
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.log_fields import TRAFFIC_SIDE
from openpilot.tools.lib.logwriter import write_log
from openpilot.tools.lib.route import Segment
from openpilot.tools.replay.process_replay import PROCESSING_NS, CameraBuffer, logged_frames
from openpilot.tools.replay.source import RouteOptions, open_route

PLAN = ("position", "velocity", "acceleration", "orientation", "orientationRate")  # three columns of the plan each


def fill_model(m: Any, out: dict[str, Tensor], frame_id: int, timestamp_eof: int) -> None:
  """m: a modelV2 builder. out: parsed outputs of one frame, (1, ...); as openpilot's fill_model_msg.py, of what the
  model puts out."""
  values = {k: v[0].float().cpu().numpy() for k, v in out.items()}
  m.frameId = m.frameIdExtra = frame_id
  m.timestampEof = timestamp_eof
  plan, stds = values["plan"], values["plan_stds"]
  for i, name in enumerate(PLAN):
    entry = getattr(m, name)
    entry.t = list(T_IDXS)
    for k, axis in enumerate("xyz"):
      setattr(entry, axis, plan[:, 3 * i + k].tolist())
      if name == "position":
        setattr(entry, f"{axis}Std", stds[:, k].tolist())
  for source, field in (("lane_lines", "laneLines"), ("road_edges", "roadEdges")):
    if source not in values:
      continue
    lines = values[source]
    for entry, line in zip(m.init(field, len(lines)), lines, strict=True):
      entry.x, entry.y, entry.z = list(X_IDXS), line[:, 0].tolist(), line[:, 1].tolist()
    setattr(m, "laneLineStds" if source == "lane_lines" else "roadEdgeStds", values[f"{source}_stds"][:, 0, 0].tolist())
  if "lane_lines_prob" in values:
    m.laneLineProbs = values["lane_lines_prob"][1::2].tolist()
  if "lead" in values and "lead_prob" in values:
    for k, entry in enumerate(m.init("leadsV3", len(values["lead"]))):
      entry.prob, entry.probTime, entry.t = float(values["lead_prob"][k]), LEAD_T_OFFSETS[k], list(LEAD_T_IDXS)
      for j, name in enumerate("xyva"):
        setattr(entry, name, values["lead"][k, :, j].tolist())
        setattr(entry, f"{name}Std", values["lead_stds"][k, :, j].tolist())
  if "desire_state" in values:
    m.meta.desireState = values["desire_state"].tolist()
  if "desire_pred" in values:
    m.meta.desirePrediction = values["desire_pred"].flatten().tolist()


class DrivingModel:
  """Frames in, modelV2 out, with modeld's memory. Raises UserError where the files do not make a driving model."""

  def __init__(self, paths: list[Path], provider: str | None = None):
    self.teacher = DrivingTeacher(list(paths), provider)
    self.name = " and ".join(p.stem for p in paths)
    self.history = History(
      self.teacher.shapes, 1, self.teacher.device, every=FRAME_SKIP, includes_present=not self.teacher.single
    )
    self.warps: list[ModelFrame] = []
    self.intrinsics: np.ndarray | None = None
    self.rpy = np.zeros(3)
    self.speed, self.left_hand = 0.0, False  # m/s; the side that traffic keeps to
    self.frames = self.invalid = 0

  def set_camera(
    self, width: int, height: int, stride: int, uv_offset: int, device_type: str | None, sensor: str | None, wide: bool
  ) -> None:
    """Raises CameraError where no camera gives frames of this size."""
    self.intrinsics = camera_intrinsics(width, height, device_type, sensor, wide)
    self.warps = [ModelFrame(width, height, stride, uv_offset, view) for view in ("medmodel", "sbigmodel")]
    self.set_calibration(self.rpy)

  def set_calibration(self, rpy: Any) -> None:
    """rpy: (3,) radians."""
    self.rpy = np.asarray(rpy, np.float64)
    for warp in self.warps:
      assert self.intrinsics is not None
      warp.set_calibration(self.rpy, self.intrinsics)

  def process(self, buf: np.ndarray, frame_id: int, timestamp_eof: int) -> Any:
    """buf: NV12, 1-D uint8 -> a modelV2 message, not valid where an output is not finite."""
    frame, big = (torch.from_numpy(w.warp(buf).copy())[None] for w in self.warps)
    traffic = torch.tensor([[0.0, 1.0] if self.left_hand else [1.0, 0.0]])
    inputs = self.history.see(
      frame, big, torch.zeros(1, DESIRE_LEN), traffic, torch.full((1, ACTION_T_LEN), LATERAL_DELAY)
    )
    if "lateral_control_params" in self.teacher.shapes:
      inputs["lateral_control_params"] = torch.tensor([[self.speed, LATERAL_DELAY]])
    out = self.teacher.step(self.history, inputs)
    if "plan" not in out:
      raise UserError(f"{self.name} puts out no plan; give a driving model, or a vision file and its policy")
    self.frames += 1
    good = all(bool(torch.isfinite(v).all()) for v in out.values())
    self.invalid += not good
    msg = messaging.new_message("modelV2", valid=good)
    fill_model(msg.modelV2, out, frame_id, timestamp_eof)
    return msg


def driving_replay(
  segments: list[Segment],
  model: DrivingModel,
  camera: str,
  start: float = 0.0,
  seconds: float | None = None,
  progress: bool = True,
  focal: float | None = None,
) -> Iterator[bytes]:
  """Serialized modelV2 in order. logMonoTime: the end of the frame's exposure plus PROCESSING_NS, as of
  process_replay."""
  buffer = CameraBuffer(model.set_camera, camera)

  def hear(which: str, m: Any) -> None:
    if which == "extrinsicsCalibration":
      rpy, _ = mounting(m)
      if rpy is not None:
        model.set_calibration(rpy)
    elif which == "carState":
      model.speed = m.vEgo
    elif which in TRAFFIC_SIDE:
      model.left_hand = m.isRHD

  services = ["extrinsicsCalibration", "carState", *TRAFFIC_SIDE]
  for entry, frame, device, sensor in logged_frames(
    segments, camera, services, hear, start, seconds, "driving replay", progress, focal
  ):
    msg = model.process(buffer.fill(frame, device, sensor), entry.frame_id, entry.timestamp_eof)
    msg.logMonoTime = entry.timestamp_eof + PROCESSING_NS
    yield msg.to_bytes()


@dataclass(frozen=True, kw_only=True)
class Options(RouteOptions):
  models: tuple[Path, ...] = option(
    positional=True, metavar="MODEL.onnx", help="a supercombo, or a vision file and its policy"
  )
  output: Path = option(Path("out/driving_replay.zst"), aliases=("--out",), help="the log to write")


def main() -> None:
  args = parse(Options, __doc__, "driving_replay")
  segments, camera = open_route(args.route, args.data_dir, args.camera)
  if not any(getattr(s, VIDEOS[camera]) for s in segments):
    raise UserError(f"{args.route} has no video; a driving model needs camera frames")
  model = DrivingModel(list(args.models))
  n = write_log(args.output, driving_replay(segments, model, camera, args.start, args.seconds, focal=args.focal))
  print(f"{args.output}: {n} modelV2 of {model.frames} frames by {model.name}, {model.invalid} invalid")


if __name__ == "__main__":
  raise SystemExit(cli(main, (CameraError,))())

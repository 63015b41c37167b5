#!/usr/bin/env python3
"""Drives fairmodeld's model over a route without clock or sockets: the same route and bundle give the same bytes every time. Execution times are zero."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from openpilot.cereal.visionipc import nv12_info
from openpilot.selfdrive.modeld.fair.bundle import BundleError, find_bundle, load_bundle
from openpilot.selfdrive.modeld.fair.fairmodeld import MODELS_DIR, STATE_PERIOD
from openpilot.selfdrive.modeld.fair.frames import CameraError
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.selfdrive.modeld.fair.schedule import Verdict
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.logwriter import write_log
from openpilot.tools.lib.route import Route, Segment
from openpilot.tools.replay.replay import STATE_SERVICES, VIDEOS, add_route_arguments, choose_camera, fill_nv12, frames

PROCESSING_NS = 20_000_000  # stands for the time that fairmodeld takes


def process_replay(
  segments: list[Segment], model: FairModel, camera: str, start: float = 0.0, seconds: float | None = None, progress: bool = True
) -> Iterator[bytes]:
  """Serialised fair* messages in order. logMonoTime: the end of the frame's exposure plus PROCESSING_NS."""
  state_service = STATE_SERVICES[camera]
  paths = [s.log_path for s in segments if s.log_path is not None]
  inputs = iter(LogReader(paths, services=["extrinsicsCalibration", "deviceState", "carState", state_service])) if paths else iter(())
  event = next(inputs, None)
  # openpilot's model of a frame comes after it; fairmodeld waits for it, so here it is looked up by the frame's number
  models = iter(LogReader(paths, services=["modelV2"])) if paths else iter(())
  model_event = next(models, None)
  device = sensor = None
  buffer: np.ndarray | None = None
  layout: tuple[object, ...] = ()
  first = last_state = 0
  total = sum(1200 for s in segments if getattr(s, VIDEOS[camera]))
  for entry, frame in tqdm(frames(segments, camera, start), total=total, desc="process replay", unit="frame", disable=not progress):
    eof = entry.timestamp_eof
    first = first or eof
    if seconds is not None and (eof - first) * 1e-9 >= seconds:
      break
    while event is not None and event.logMonoTime <= eof:
      which = event.which()
      if which == "extrinsicsCalibration" and str(event.extrinsicsCalibration.calStatus) == "calibrated":
        height = event.extrinsicsCalibration.height
        model.set_calibration(list(event.extrinsicsCalibration.rpyCalib), height[0] if len(height) else None)
      elif which == "deviceState":
        device = str(event.deviceState.deviceType)
        model.schedule.heat(str(event.deviceState.thermalStatus))
      elif which == "carState":
        model.speed = event.carState.vEgo
      elif which == state_service:
        sensor = str(getattr(event, state_service).sensor)
      event = next(inputs, None)
    if model.schedule.look(entry.frame_id, eof)[0] is not Verdict.TAKE:
      continue
    h, w = frame.shape[0] * 2 // 3, frame.shape[1]
    if (w, h, device, sensor) != layout:
      stride, y_height, _, size = nv12_info(w, h)
      model.set_camera(w, h, stride, stride * y_height, device, sensor, wide=camera == "wide")
      buffer, layout = np.zeros(size, dtype=np.uint8), (w, h, device, sensor)
    assert buffer is not None
    while model_event is not None and model_event.modelV2.frameId < entry.frame_id:
      model_event = next(models, None)
    of_frame = model_event.modelV2 if model_event is not None and model_event.modelV2.frameId == entry.frame_id and model_event.valid else None
    messages = model.process(fill_nv12(frame, buffer, stride, stride * y_height), entry.frame_id, entry.timestamp_sof, eof, of_frame)
    if not last_state or (eof - last_state) * 1e-9 >= STATE_PERIOD:
      messages.append(model.state_message())
      last_state = eof
    for _, msg in messages:
      msg.logMonoTime = eof + PROCESSING_NS
      yield msg.to_bytes()


def main() -> None:
  p = argparse.ArgumentParser(prog="process-replay", description=__doc__)
  add_route_arguments(p)
  p.add_argument("--bundle", type=Path, help="a bundle's folder; default: the first in models/")
  p.add_argument("--out", type=Path, default=Path("out/process_replay.zst"))
  args = p.parse_args()
  segments = Route(args.route, args.data_dir).segments
  camera = choose_camera(segments, args.camera)
  if not any(getattr(s, VIDEOS[camera]) for s in segments):
    raise UserError(f"{args.route} has no video; fairmodeld needs camera frames")
  model = FairModel(load_bundle(args.bundle) if args.bundle else find_bundle(None, MODELS_DIR))
  n = write_log(args.out, process_replay(segments, model, camera, args.start, args.seconds))
  print(f"{args.out}: {n} messages of {model.frames} frames by {model.bundle.name}, {model.invalid} invalid")


if __name__ == "__main__":
  raise SystemExit(cli(main, (BundleError, CameraError))())

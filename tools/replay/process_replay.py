#!/usr/bin/env python3
"""Runs fairmodeld's model over a route without clock or sockets: the same route and bundle give the same bytes every
time. Execution times are zero."""

from dataclasses import dataclass
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from openpilot.cereal.visionipc import nv12_info
from openpilot.selfdrive.modeld.fair.bundle import MODELS_DIR, BundleError, find_bundle, load_bundle
from openpilot.selfdrive.modeld.fair.calibration import mounting, turn_rate
from openpilot.selfdrive.modeld.fair.worker import STATE_PERIOD
from openpilot.selfdrive.modeld.fair.frames import CameraError
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.selfdrive.modeld.fair.runners import RUNNERS
from openpilot.selfdrive.modeld.fair.schedule import Verdict
from openpilot.tools.lib.cameras import STATE_SERVICES, STREAM_NAMES, VIDEOS
from openpilot.tools.lib.options import option, parse
from openpilot.tools.lib.encode_index import EncodeEntry
from openpilot.tools.lib.errors import UserError, cli, warn
from openpilot.tools.lib.guard import read_all
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.logwriter import write_log
from openpilot.tools.lib.route import Segment
from openpilot.tools.replay.runner import named_runner
from openpilot.tools.replay.source import RouteOptions, fill_nv12, frames, open_route

PROCESSING_NS = 20_000_000  # in place of the time that fairmodeld takes


def logged_frames(
  segments: list[Segment],
  camera: str,
  services: list[str],
  hear: Callable[[str, Any], None],
  start: float,
  seconds: float | None,
  what: str,
  progress: bool,
  focal: float | None = None,
) -> Iterator[tuple[EncodeEntry, np.ndarray, str | None, str | None]]:
  """Frames of a route, with the device's type and the sensor as logged until the end of the frame's exposure. Messages
  until then of `services`, deviceState and the camera's state are passed to hear(service, message) first."""
  state_service = STATE_SERVICES[camera]
  paths = [s.log_path for s in segments if s.log_path is not None]
  reader = LogReader(paths, services=[*services, "deviceState", state_service])
  events = iter(reader)
  event = next(events, None)
  device = sensor = None
  first = 0
  total = sum(1200 for s in segments if getattr(s, VIDEOS[camera]))
  bar = tqdm(
    total=total, desc=what, unit="frame", disable=not progress, mininterval=0.1 if sys.stderr.isatty() else 10.0
  )
  for entry, frame in frames(segments, camera, start, focal=focal):
    first = first or entry.timestamp_eof
    if seconds is not None and (entry.timestamp_eof - first) * 1e-9 >= seconds:
      break
    while event is not None and event.logMonoTime <= entry.timestamp_eof:
      with reader.guard(event):
        which = event.which()
        message = getattr(event, which)
        if which == "deviceState":
          device = str(message.deviceType)
        elif which == state_service:
          sensor = str(message.sensor)
        hear(which, message)
      event = next(events, None)
    yield entry, frame, device, sensor
    bar.update()
  bar.close()
  events.close()  # reports damaged messages


class CameraBuffer:
  """Frames as camerad lays them out; set_camera (a model's) is called where size, device or sensor change."""

  def __init__(self, set_camera: Callable[..., None], camera: str):
    self.set_camera, self.wide = set_camera, camera == "wide"
    self.layout: tuple[object, ...] = ()
    self.buffer = np.zeros(0, np.uint8)
    self.stride = self.uv_offset = 0

  def fill(self, frame: np.ndarray, device: str | None, sensor: str | None) -> np.ndarray:
    """frame: NV12 (H * 3 / 2, W) -> a buffer, the same at every call. Raises UserError on what no camera gives."""
    h, w = frame.shape[0] * 2 // 3, frame.shape[1]
    if (w, h, device, sensor) != self.layout:
      self.stride, y_height, _, size = nv12_info(w, h)
      self.uv_offset = self.stride * y_height
      try:
        self.set_camera(w, h, self.stride, self.uv_offset, device, sensor, self.wide)
      except CameraError as e:
        raise UserError(f"{e}; or give its focal length in pixels with --focal") from None
      self.buffer, self.layout = np.zeros(size, dtype=np.uint8), (w, h, device, sensor)
    return fill_nv12(frame, self.buffer, self.stride, self.uv_offset)


def process_replay(
  segments: list[Segment],
  model: FairModel,
  camera: str,
  start: float = 0.0,
  seconds: float | None = None,
  progress: bool = True,
  focal: float | None = None,
) -> Iterator[bytes]:
  """Serialized fair* messages in order. logMonoTime: the end of the frame's exposure plus PROCESSING_NS."""
  numbers = [s.num for s in segments]
  if lacks := sorted({*range(min(numbers, default=0), max(numbers, default=0))} - {*numbers}):
    named = ", ".join(map(str, lacks[:8])) + (", ..." if len(lacks) > 8 else "")
    warn(f"{segments[0].route} lacks segment {named} in its middle: what is tracked starts anew behind it")
  stream, takes = STREAM_NAMES[camera], model.bundle.manifest["streams"]
  if stream not in takes:
    warn(f"bundle '{model.bundle.name}' is made for {' and '.join(takes)}; it is given {stream}")
  # a frame's modelV2 comes after the frame; fairmodeld waits for it, so here it is looked up by the frame's number
  paths = [s.log_path for s in segments if s.log_path is not None]
  reader = LogReader(paths, services=["modelV2"])
  models = models_by_frame(reader)
  of_frame = next(models, None)
  buffer = CameraBuffer(model.set_camera, camera)
  last_state = uncalibrated = 0

  def hear(which: str, m: Any) -> None:
    if which == "extrinsicsCalibration":
      rpy, height = mounting(m)
      if rpy is not None:
        model.set_calibration(rpy, height)
    elif which == "deviceState":
      model.schedule.heat(str(m.thermalStatus))
    elif which == "carState":
      model.speed = m.vEgo
    elif which == "cameraOdometry":
      model.yaw_rate = turn_rate(m)

  services = ["extrinsicsCalibration", "carState", "cameraOdometry"]
  for entry, frame, device, sensor in logged_frames(
    segments, camera, services, hear, start, seconds, "process replay", progress, focal
  ):
    eof = entry.timestamp_eof
    if model.schedule.look(entry.frame_id, eof)[0] is not Verdict.TAKE:
      continue
    buf = buffer.fill(frame, device, sensor)
    while of_frame is not None and of_frame[0] < entry.frame_id:
      of_frame = next(models, None)
    logged = of_frame[1] if of_frame is not None and of_frame[0] == entry.frame_id else None
    uncalibrated += model.rpy is None
    messages = model.process(buf, entry.frame_id, entry.timestamp_sof, eof, logged)
    if not last_state or (eof - last_state) * 1e-9 >= STATE_PERIOD:
      messages.append(model.state_message(stream=stream))
      last_state = eof
    for _, msg in messages:
      msg.logMonoTime = eof + PROCESSING_NS
      yield msg.to_bytes()
  if uncalibrated and paths:
    warn(f"{uncalibrated} of {model.frames} frames were before the log's first calibration: the default one was taken")


def models_by_frame(reader: LogReader) -> Iterator[tuple[int, Any]]:
  """(frame id, modelV2, None where it is invalid or damaged) of a log."""
  for event in reader:
    frame_id, m = -1, None
    with reader.guard(event):
      frame_id = event.modelV2.frameId
      if event.valid:
        read_all(event.modelV2)  # the message is read later, outside of a guard
        m = event.modelV2
    if frame_id >= 0:
      yield frame_id, m


@dataclass(frozen=True)
class Options(RouteOptions):
  bundle: Path | None = option(None, help="a bundle's folder; default: models/fair_unified_small")
  small: bool = option(
    False, help="as a car logs it without the param FairLogDense: no masks, nearest objects, few lane points"
  )
  runner: str | None = option(None, help=f"what runs the graphs: {', '.join(RUNNERS)}; default: as fairmodeld's here")
  output: Path = option(Path("out/process_replay.zst"), aliases=("--out",), help="the log to write")


def main() -> None:
  args = parse(Options, __doc__, "process-replay")
  segments, camera = open_route(args.route, args.data_dir, args.camera)
  if not any(getattr(s, VIDEOS[camera]) for s in segments):
    raise UserError(f"{args.route} has no video; fairmodeld needs camera frames")
  bundle = load_bundle(args.bundle) if args.bundle else find_bundle(None, MODELS_DIR)
  if args.runner is not None:
    for graph in bundle.graphs:
      named_runner(args.runner, bundle, graph)
  model = FairModel(bundle, runner=args.runner, dense=not args.small)
  n = write_log(args.output, process_replay(segments, model, camera, args.start, args.seconds, focal=args.focal))
  print(f"{args.output}: {n} messages of {model.frames} frames by {model.bundle.name}, {model.invalid} invalid")


if __name__ == "__main__":
  raise SystemExit(cli(main, (BundleError,))())

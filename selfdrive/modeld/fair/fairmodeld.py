#!/usr/bin/env python3
"""fairmodeld: camera frames in, fair* messages out. It runs beside modeld, advises, controls nothing, and never waits on anything that waits on it."""

import argparse
import gc
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openpilot.selfdrive.modeld.fair.bundle import Bundle, BundleError, find_bundle, load_bundle
from openpilot.selfdrive.modeld.fair.frames import CameraError
from openpilot.selfdrive.modeld.fair.ipc import Params, UnknownKeyName, VisionIpcClient, config_realtime_process, messaging, service, stream_type
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.selfdrive.modeld.fair.publish import SERVICES, serialise

MODELS_DIR = Path(os.environ.get("FAIR_MODELS_DIR") or Path(__file__).resolve().parents[3] / "models")
STATE_PERIOD = 1.0  # s between two fairState
MODEL_WAIT = 0.05  # s that a frame waits for its modelV2 while modelV2 is alive
BACKOFF, MAX_BACKOFF = 0.5, 10.0  # s between two tries after a fault
CORE, PRIORITY = 7, 50  # modeld's core, below its priority of 54
DROP_FILTER = 0.05  # weight of a frame in frameDropPerc, as modeld's
EXTRINSICS, CAMERA_STATE = service("extrinsicsCalibration"), service("narrowRoadCameraState")


def memory_mb() -> float:
  """Resident set size now, MB; where there is no /proc, its maximum so far."""
  try:
    with open("/proc/self/statm") as f:
      return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
  except OSError:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


class FairModeld:
  """The process around a FairModel: where frames come from, where messages go, and what happens when something is missing."""

  def __init__(self, choose_bundle: Callable[[], Bundle], stream: str | None):
    self.choose_bundle, self.wanted_stream = choose_bundle, stream
    self.pm = messaging.PubMaster(list(SERVICES))
    self.sm = messaging.SubMaster([EXTRINSICS, CAMERA_STATE, "deviceState", "modelV2"], ignore_avg_freq=[EXTRINSICS, CAMERA_STATE, "deviceState", "modelV2"])
    self.model: FairModel | None = None
    self.client: VisionIpcClient | None = None
    self.stream = ""
    self.layout: tuple[Any, ...] = ()
    self.fault, self.faults = "", 0
    self.received = self.dropped = 0
    self.drop_perc = self.publish_time = 0.0
    self.last_id: int | None = None
    self.last_state = 0.0
    self.retry_at, self.backoff = 0.0, BACKOFF

  # *** faults ***

  def fail(self, what: str) -> None:
    """Says what went wrong and waits longer each time before the next try; the process lives on."""
    print(f"fairmodeld: {what}", file=sys.stderr, flush=True)
    self.fault, self.faults = what, self.faults + 1
    self.retry_at, self.backoff = time.monotonic() + self.backoff, min(MAX_BACKOFF, self.backoff * 2)
    self.send_state("fault")

  def send_state(self, status: str) -> None:
    more = {
      "framesReceived": self.received,
      "framesDropped": self.dropped,
      "frameDropPerc": self.drop_perc * 100,
      "stream": self.stream,
      "memoryMB": memory_mb(),
    }
    if self.model is not None:
      runs = max(1, max(g.count for g in self.model.stats.values()))
      _, msg = self.model.state_message(status, **more, publishTime=self.publish_time / runs)
      msg.fairState.fault, msg.fairState.faultCount = self.model.fault or self.fault, self.model.faults + self.faults
    else:
      msg = messaging.new_message("fairState", valid=False)
      msg.fairState.status, msg.fairState.fault, msg.fairState.faultCount = status, self.fault, self.faults
      for k, v in more.items():
        setattr(msg.fairState, k, v)
    self.pm.send("fairState", msg)
    self.publish_time, self.last_state = 0.0, time.monotonic()
    gc.collect(0)  # collection is off: what the builders leave goes here, between frames

  # *** what a frame needs ***

  def ready(self) -> bool:
    """A bundle is loaded and a camera connected, or the next try is not due yet."""
    if time.monotonic() < self.retry_at:
      return False
    if self.model is None:
      try:
        self.model = FairModel(self.choose_bundle(), time.perf_counter)
      except BundleError as e:
        self.fail(str(e))
        return False
    if self.client is None or not self.client.is_connected():
      return self.connect()
    return True

  def connect(self) -> bool:
    assert self.model is not None
    there = VisionIpcClient.available_streams("camerad", block=False)
    wanted = [self.wanted_stream] if self.wanted_stream else self.model.bundle.manifest["streams"]
    for stream in wanted:
      if stream_type(stream) in there:
        if self.client is not None and self.stream != stream:
          self.client.close()
          self.client = None
        if self.client is None:
          self.client = VisionIpcClient("camerad", stream_type(stream), True)
        self.stream, self.last_id = stream, None
        return self.client.connect(False)
    return False

  def update_camera(self) -> bool:
    """Follows the frames' size and the device's word on its camera and mounting."""
    assert self.model is not None and self.client is not None
    device, sensor = str(self.sm["deviceState"].deviceType), str(self.sm[CAMERA_STATE].sensor)
    layout = (
      self.client.width,
      self.client.height,
      self.client.stride,
      self.client.uv_offset,
      device if self.sm.seen["deviceState"] else None,
      sensor if self.sm.seen[CAMERA_STATE] else None,
      self.stream,
    )
    if layout != self.layout:
      try:
        self.model.set_camera(*layout[:-1], wide=self.stream == "wideRoad")
      except CameraError as e:
        self.fail(str(e))
        return False
      self.layout = layout
    if self.sm.updated[EXTRINSICS]:
      calibration = self.sm[EXTRINSICS]
      height = calibration.height[0] if len(calibration.height) else None
      if str(calibration.calStatus) == "calibrated" and not self.model.set_calibration(list(calibration.rpyCalib), height) and self.model.rpy is None:
        self.model.report(f"calibration {list(calibration.rpyCalib)} is not one; the default mounting is used")
    return True

  def await_model(self, frame_id: int) -> None:
    """While modelV2 is alive a frame starts only after its modelV2, so that modeld has had the GPU first."""
    deadline = time.monotonic() + MODEL_WAIT
    while self.sm.alive["modelV2"] and self.sm["modelV2"].frameId < frame_id and (left := deadline - time.monotonic()) > 0:
      self.sm.update(max(1, min(5, int(left * 1000))))

  def model_of(self, frame_id: int) -> Any:
    """The modelV2 of this frame, or of the one before where this one's is late; None without."""
    if not (self.sm.seen["modelV2"] and self.sm.alive["modelV2"] and self.sm.valid["modelV2"]):
      return None
    model = self.sm["modelV2"]
    return model if 0 <= frame_id - model.frameId <= 1 else None

  # *** the loop ***

  def step(self) -> None:
    """At most one frame. Returns within about 0.1 s."""
    if not self.ready():
      time.sleep(0.02)
      self.sm.update(0)
      if time.monotonic() - self.last_state > STATE_PERIOD:
        self.send_state("fault" if time.monotonic() < self.retry_at else "waitingForCamera")
      return
    assert self.model is not None and self.client is not None
    buf = self.client.recv(100)
    self.sm.update(0)
    if buf is not None and self.update_camera():
      frame_id = self.client.frame_id
      # a frame id that jumps back, or far ahead, is a new stream, not a drop
      missed = frame_id - self.last_id - 1 if self.last_id is not None and 0 < frame_id - self.last_id < 1000 else 0
      if self.last_id is None or frame_id != self.last_id:
        self.await_model(frame_id)
        self.received += 1 + missed
        self.dropped += missed
        self.drop_perc += DROP_FILTER * (missed / (1 + missed) - self.drop_perc)
        faults = self.model.faults
        messages = self.model.process(buf.data, frame_id, self.client.timestamp_sof, self.client.timestamp_eof, self.model_of(frame_id))
        t0 = time.perf_counter()
        for name, msg in messages:
          try:
            self.pm.send(name, serialise(name, msg))
          except ValueError as e:
            self.model.report(str(e))
        self.publish_time += time.perf_counter() - t0
        self.last_id, self.backoff, self.fault = frame_id, BACKOFF, ""
        if self.model.faults > faults and (faults == 0 or time.monotonic() - self.last_state > 0.1):  # at once, but not 20 times a second
          self.send_state("fault")
    if time.monotonic() - self.last_state > STATE_PERIOD:
      healthy = buf is not None and all(g.valid for g in self.model.stats.values())
      self.send_state("running" if healthy else "fault" if buf is not None else "waitingForCamera")


def param(params: Params, key: str) -> str | None:
  try:
    value = params.get(key)
  except UnknownKeyName:  # a fork that did not add the key: the first bundle runs
    return None
  return value.decode() if isinstance(value, bytes) else value


def main() -> int:
  p = argparse.ArgumentParser(prog="fairmodeld", description=__doc__)
  p.add_argument("--bundle", type=Path, help="a bundle's folder; default: the one named by the param FairBundle, else the first in models/")
  p.add_argument("--stream", choices=["narrowRoad", "wideRoad"], help="default: the first that the bundle can take and the camera gives")
  args = p.parse_args()
  if args.bundle is not None:  # run by hand: what is wrong is said at once
    try:
      FairModel(load_bundle(args.bundle))
    except BundleError as e:
      print(f"error: {e}", file=sys.stderr)
      return 2
  config_realtime_process(CORE, PRIORITY)
  params = Params()
  try:
    daemon = FairModeld((lambda: load_bundle(args.bundle)) if args.bundle else (lambda: find_bundle(param(params, "FairBundle"), MODELS_DIR)), args.stream)
  except getattr(messaging, "MultiplePublishersError", ()) as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  # a flag looked at between two frames: an exception from the handler could come up anywhere, a destructor included
  stop = False

  def end(*_: object) -> None:
    nonlocal stop
    stop = True

  signal.signal(signal.SIGINT, end)
  signal.signal(signal.SIGTERM, end)
  daemon.send_state("starting")
  while not stop:
    daemon.step()
  daemon.send_state("stopped")
  return 0


if __name__ == "__main__":
  raise SystemExit(main())

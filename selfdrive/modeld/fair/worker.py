#!/usr/bin/env python3
"""The process that works: camera frames in, fair* messages out. It runs beside modeld, advises, controls nothing, and
waits on nothing that waits on it."""

import argparse
import contextlib
import gc
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.bundle import MODELS_DIR, BundleError, bundle_path, load_bundle
from openpilot.selfdrive.modeld.fair.choice import Choice
from openpilot.selfdrive.modeld.fair.frames import CameraError
from openpilot.selfdrive.modeld.fair.inbox import Inbox
from openpilot.selfdrive.modeld.fair.ipc import (
  Params,
  VisionIpcClient,
  config_realtime_process,
  messaging,
  read_flag,
  read_param,
  stream_type,
)
from openpilot.selfdrive.modeld.fair.link import Link, SupervisorGone
from openpilot.selfdrive.modeld.fair.machine import allow_files, at_ease, memory_mb, too_few_files
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.selfdrive.modeld.fair.publish import SERVICES, serialize
from openpilot.selfdrive.modeld.fair.runners import RUNNERS
from openpilot.selfdrive.modeld.fair.schedule import CAMERA_RATE, Verdict
from openpilot.selfdrive.modeld.fair.sender import Sender
from openpilot.selfdrive.modeld.fair.state import first_line, plain

STATE_PERIOD = 1.0  # s between two fairState
# s that a frame waits for its modelV2 while modelV2 is alive: openpilot's came 52 to 64 ms after the exposure in a log
# of its own
MODEL_WAIT = 0.1
OTHER_CAMERA = 20  # frames; a modelV2 further behind is not one of this stream
BACKOFF, MAX_BACKOFF = 0.5, 10.0  # s between two tries after a fault
CORE, PRIORITY = 7, 50  # modeld's core, below its priority of 54
LEAVE = 0.1  # of a frame's time, for which its core is left to others after one that left no time to wait for the next
DROP_FILTER = 0.05  # weight of a frame in frameDropPerc, as modeld's


class FairModeld:
  """The process around a FairModel: where frames come from, where messages go, and what happens when something is
  missing.

  choose: the folder of the bundle that is wanted now; it may raise BundleError. stream: 'narrowRoad', 'wideRoad', or
  None for the first there is.
  runner: one of runners.RUNNERS, or None for what is preferred here. link: to the supervisor; without one a new bundle
  is taken without a trial run."""

  def __init__(
    self,
    choose: Callable[[], Path],
    stream: str | None,
    runner: str | None = None,
    link: Link | None = None,
    dense: bool = False,
  ):
    self.wanted_stream, self.link = stream, link or Link()
    # openpilot's process_replay: the same log gives the same bytes, so nothing may hang on how fast this machine is
    self.replay = "REPLAY" in os.environ
    self.log_time = 0.0  # s, of the newest frame
    self.pm = Sender(SERVICES, self.now, self.say)
    self.inbox = Inbox(self.replay, self.report)
    self.choice = Choice(choose, None if self.replay else time.perf_counter, runner, dense, self.link)
    self.model: FairModel | None = None
    self.client: VisionIpcClient | None = None
    self.stream = ""
    self.passed: list[str] = []  # streams that are there, not taken, and told of
    self.layout: tuple[Any, ...] = ()
    self.fault, self.faults = "", 0
    self.drop_perc = self.publish_time = 0.0
    self.last_state = -math.inf
    self.retry_at, self.backoff = 0.0, BACKOFF

  def now(self) -> float:
    """Seconds of the clock by which things are due: the machine's, in process_replay the log's."""
    return self.log_time if self.replay else time.monotonic()

  # *** faults ***

  def fail(self, what: str) -> None:
    """Says what went wrong and waits longer each time before the next try; the process lives on."""
    self.note(what)
    self.retry_at, self.backoff = self.now() + self.backoff, min(MAX_BACKOFF, self.backoff * 2)

  def note(self, what: str) -> None:
    """A fault that stops nothing: on stderr and at once in fairState."""
    self.say(what)
    self.send_state("fault")

  def say(self, what: str) -> None:
    """A fault on stderr and in the next fairState."""
    self.report(what)
    print(f"fairmodeld: {what.encode(errors='replace').decode()}", file=sys.stderr, flush=True)

  def report(self, what: str) -> None:
    """Counts a fault; the next fairState tells it."""
    if self.model is not None:
      self.model.report(what)
    else:
      self.fault, self.faults = plain(what), self.faults + 1

  def send_state(self, status: str) -> None:
    if self.replay and not self.log_time:  # process_replay takes no message before the first frame
      return
    more = {
      "frameDropPerc": self.drop_perc * 100,
      "stream": self.stream,
      "memoryMB": 0.0 if self.replay else memory_mb(),
    }
    if self.model is not None:
      schedule = self.model.schedule
      more.update(framesReceived=schedule.received, framesDropped=schedule.dropped, framesNotDue=schedule.not_due)
      runs = max(1, max(g.count for g in self.model.stats.values()))
      _, msg = self.model.state_message(status, **more, publishTime=self.publish_time / runs)
    else:
      msg = messaging.new_message("fairState", valid=False)
      msg.fairState.status, msg.fairState.fault, msg.fairState.faultCount = status, self.fault, self.faults
      for k, v in more.items():
        setattr(msg.fairState, k, v)
    self.pm.send("fairState", msg.to_bytes())
    self.publish_time, self.last_state = 0.0, self.now()
    # collection is off: what the builders leave goes here, between frames; what was there at the start is frozen and
    # costs nothing
    gc.collect()

  # *** what a frame needs ***

  def ready(self) -> bool:
    """A bundle is loaded and a camera connected, or the next try is not due yet."""
    if self.model is None:
      if self.now() < self.retry_at:
        return False
      try:
        self.take(self.choice.first())
      except BundleError as e:
        if self.replay:  # a log has no time to wait in before its first frame
          raise
        self.fail(str(e))
        return False
    if self.client is None or not self.client.is_connected():
      try:
        return (self.replay or self.now() >= self.retry_at) and self.connect()
      except OSError as e:  # the camera is there
        self.fail(f"no camera: {e.strerror}{too_few_files(e)}")
        return False
    return True

  def take(self, model: FairModel) -> None:
    """Goes on with this model; where another one ran before, from its calibration, counts and ids on."""
    if self.model is not None:
      model.follow(self.model)
    else:
      model.fault, model.faults = self.fault, self.faults
    self.model, self.layout = model, ()
    gc.unfreeze()
    gc.collect()
    gc.freeze()

  def watch(self) -> None:
    """Between two frames: a bundle that was replaced, or another one that is wanted, takes over; one that cannot run is
    refused and the old one goes on."""
    if self.replay or self.model is None:
      return
    before = self.model.bundle
    try:
      model = self.choice.other(before, self.now())
    except BundleError as e:
      self.note(f"bundle '{before.name}' goes on: {e}")
      return
    if model is not None:
      self.take(model)
      new = model.bundle
      print(
        f"fairmodeld: bundle '{new.name}' ({new.manifest_hash[:12]}) from {new.path} took over",
        file=sys.stderr,
        flush=True,
      )

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
        self.stream = stream
        self.model.schedule.begin()
        return self.client.connect(False)
    others = [s for s in ("narrowRoad", "wideRoad") if stream_type(s) in there]
    if others and others != self.passed:
      self.passed = others
      self.note(f"the camera gives {others[0]}, not {' or '.join(wanted)}; --stream {others[0]} takes it all the same")
    return False

  def listen(self, timeout_ms: int = 0) -> None:
    """Takes the newest messages."""
    self.inbox.update(timeout_ms)
    if self.model is not None:
      self.inbox.heat(self.model)

  def update_camera(self) -> bool:
    """Follows the frames' size and the device's word on its camera and mounting."""
    assert self.model is not None and self.client is not None
    device, sensor = self.inbox.camera()
    layout = (
      self.client.width,
      self.client.height,
      self.client.stride,
      self.client.uv_offset,
      device,
      sensor,
      self.stream,
    )
    if layout != self.layout:
      try:
        self.model.set_camera(*layout[:-1], wide=self.stream == "wideRoad")
      except CameraError as e:
        self.fail(str(e))
        return False
      self.layout = layout
    self.inbox.calibrate(self.model)
    return True

  def await_model(self, frame_id: int) -> bool:
    """While modelV2 is alive a frame starts only after its modelV2, so that modeld has had the GPU first; where modelV2
    comes less often than frames, only one that has one coming waits. False: it did not come, the frame is late. In
    process_replay a frame's modelV2 comes after the frame."""
    period = self.inbox.pace.period
    if self.replay or period is None:
      return True
    deadline = time.monotonic() + MODEL_WAIT
    while (behind := self.inbox.model_behind(frame_id)) is not None and period <= behind < OTHER_CAMERA:
      left = deadline - time.monotonic()
      if left <= 0:
        return False
      self.listen(max(1, min(5, int(left * 1000))))
    return True

  # *** the loop ***

  def step(self) -> None:
    """At most one frame. Returns within about 0.2 s."""
    self.link.beat()
    if not self.ready():
      time.sleep(0.02)
      self.listen()
      self.watch()
      if self.state_is_due():
        self.send_state("fault" if self.now() < self.retry_at else "waitingForCamera")
      return
    assert self.model is not None and self.client is not None
    buf = self.client.recv(100)
    if buf is not None:
      self.log_time = self.client.timestamp_eof * 1e-9 or self.client.frame_id / CAMERA_RATE
    self.listen()
    waits = self.now() < self.retry_at  # for another try at the camera
    if buf is not None and not waits and self.update_camera():
      verdict, missed = self.model.schedule.look(self.client.frame_id, self.client.timestamp_eof)
      if verdict is Verdict.TAKE:
        begun = time.monotonic()
        self.frame(buf, missed)
        self.leave_core(time.monotonic() - begun)
    self.watch()
    if self.state_is_due():
      healthy = buf is not None and not waits and all(g.valid for g in self.model.stats.values())
      self.send_state("running" if healthy else "fault" if buf is not None or waits else "waitingForCamera")

  def leave_core(self, took: float) -> None:
    """After a frame of `took` s. Where that is longer than frames are apart, the next one is there already and recv()
    never waits: at real-time priority all else would starve on this core, and the kernel end this process for it
    (child.RT_LIMIT)."""
    assert self.model is not None
    if not self.replay and took > self.model.schedule.step / CAMERA_RATE:
      time.sleep(LEAVE * took)

  def state_is_due(self) -> bool:
    return not 0 <= self.now() - self.last_state <= STATE_PERIOD  # a log may begin again

  def frame(self, buf: np.ndarray, missed: int) -> None:
    """One camera frame that is due; missed: those that were, and are gone."""
    assert self.model is not None and self.client is not None
    frame_id, sof, eof = self.client.frame_id, self.client.timestamp_sof, self.client.timestamp_eof
    in_time = self.await_model(frame_id)
    missed += not in_time
    self.drop_perc += DROP_FILTER * (missed / (missed + in_time) - self.drop_perc)
    if not in_time:
      self.model.late += 1
      self.model.schedule.dropped += 1
      return
    faults = self.model.faults
    messages = []
    try:
      self.model.speed, self.model.yaw_rate = self.inbox.speed(), self.inbox.yaw_rate()
      messages = self.model.process(buf, frame_id, sof, eof, self.inbox.model_of(frame_id))
      self.backoff = BACKOFF
    except Exception as e:  # one bad frame, e.g. a buffer cut short, must not end the process
      self.model.invalid += 1
      self.model.report(f"frame {frame_id} failed: {first_line(e)}")
    t0 = self.model.clock()
    for name, msg in messages:
      try:
        self.pm.send(name, serialize(name, msg))
      except ValueError as e:
        self.model.report(str(e))
    self.publish_time += self.model.clock() - t0
    if self.model.faults > faults and (
      faults == 0 or self.now() - self.last_state > 0.1
    ):  # at once, but not 20 times a second
      self.send_state("fault")


def main(argv: Sequence[str] = ()) -> int:
  p = argparse.ArgumentParser(prog="fairmodeld", description=__doc__)
  p.add_argument(
    "--bundle",
    type=Path,
    help="a bundle's folder; default: the one named by the param FairBundle, else fair_unified_small",
  )
  p.add_argument(
    "--stream",
    choices=["narrowRoad", "wideRoad"],
    help="default: the first that the bundle can take and the camera gives",
  )
  p.add_argument(
    "--runner",
    choices=RUNNERS,
    help="default: the param FairRunner, else the GPU's where the bundle was compiled for it, else ONNX Runtime",
  )
  p.add_argument(
    "--dense",
    action="store_true",
    help="log masks, hidden objects, all lane points, whole maps; default: the param FairLogDense",
  )
  args = p.parse_args(list(argv))
  link = Link()
  if args.bundle is not None:  # run by hand: what is wrong is said at once
    try:
      bundle = load_bundle(args.bundle)
      link.loading(bundle.manifest_hash)
      with at_ease():
        FairModel(bundle, runner=args.runner)
    except BundleError as e:
      print(f"error: {e}", file=sys.stderr)
      return 2
  with contextlib.suppress(ImportError):  # openpilot's package, by whose names its processes are found in procLog
    from setproctitle import setproctitle

    setproctitle("openpilot.selfdrive.modeld.fair.worker")
  allow_files()
  config_realtime_process(CORE, PRIORITY)
  try:
    params = Params()
  except OSError as e:  # no folder for them
    print(f"error: {e}", file=sys.stderr)
    return 2
  choose = (lambda: args.bundle) if args.bundle else (lambda: bundle_path(read_param(params, "FairBundle"), MODELS_DIR))
  try:
    daemon = FairModeld(
      choose,
      args.stream,
      args.runner or read_param(params, "FairRunner"),
      link,
      args.dense or read_flag(params, "FairLogDense"),
    )
  except Exception as e:
    # another instance runs, the sockets' disk is full, too few open files: ZeroMQ's and msgq's have no common base
    print(f"error: {e}{too_few_files(e)}", file=sys.stderr)
    return 2
  # a flag looked at between two frames: an exception from the handler could come up anywhere, a destructor included
  stop = False

  def end(*_: object) -> None:
    nonlocal stop
    stop = True

  signal.signal(signal.SIGINT, end)
  signal.signal(signal.SIGTERM, end)
  if link.ended:
    daemon.fault, daemon.faults = plain(link.ended), link.ends
  daemon.send_state("starting")
  try:
    with contextlib.suppress(SupervisorGone):
      while not stop:
        daemon.step()
  except BundleError as e:  # of process_replay
    print(f"error: {e}", file=sys.stderr)
    return 2
  daemon.send_state("stopped")
  return 0


if __name__ == "__main__":
  raise SystemExit(main(sys.argv[1:]))

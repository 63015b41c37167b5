#!/usr/bin/env python3
"""Publishes a logged route: its messages on messaging, its video as camera frames on VisionIPC, at the pace at which
they were recorded.

Frames are joined to the log by frameId and segmentId, and sent when their exposure ended by the log. fair* messages and
managerState of the log are left out, since a running fairmodeld and manager publish new ones. A segment without video
plays its messages; a video without log plays at its own rate, uncalibrated."""

import heapq
import math
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from openpilot.cereal import messaging
from openpilot.cereal.services import SERVICE_LIST, service_name
from openpilot.cereal.visionipc import VisionIpcServer
from openpilot.tools.lib.cameras import INDEX_SERVICES, STATE_SERVICES, STREAMS, VIDEOS
from openpilot.tools.lib.options import option, parse
from openpilot.tools.lib.encode_index import EncodeEntry
from openpilot.tools.lib.errors import UserError, above_zero, cli, printable, warn
from openpilot.tools.lib.framereader import picture_size
from openpilot.tools.lib.guard import Guard, is_sound, open_event
from openpilot.tools.lib.logreader import TAG_NAMES, LogReader
from openpilot.tools.lib.route import Segment
from openpilot.tools.replay.source import (
  KnownCamera,
  RouteOptions,
  choose_camera,
  fill_nv12,
  frames,
  is_published,
  open_route,
)

BUFFERS = 20
AHEAD = 8  # frames decoded before they are due
GAP = 1_000_000_000  # ns; longer gaps in the log are skipped, as in openpilot's replay
SAY_EVERY = 10.0  # s between lines where stdout is no terminal
# a running manager publishes it; the log's own is played only where --allow names it
OURS = {"managerState"}
TIME_OFFSET = 8  # of logMonoTime, where the root pointer stands right before it


@dataclass(order=True)
class Item:
  """Something to publish at `time` ns of the log's clock: a message, or a camera frame."""

  time: int
  order: int
  service: str = field(compare=False)
  dat: bytes = field(compare=False, default=b"")
  entry: EncodeEntry | None = field(compare=False, default=None)
  frame: np.ndarray | None = field(compare=False, default=None)  # NV12 (h * 3 // 2, w)


def messages(segments: list[Segment], allow: set[str] | None, block: set[str]) -> Iterator[tuple[int, str, bytes]]:
  """(logMonoTime, service, bytes) of what is to be published, in time order."""
  paths = [s.log_path for s in segments if s.log_path is not None]
  if not paths:
    return
  for t, tag, dat in LogReader(paths).raw():
    service = TAG_NAMES[tag]
    if is_published(service) and service not in block and (allow is None or service in allow):
      yield t, service, dat


def with_time(dat: bytes, t: int) -> bytes:
  """The message with another logMonoTime, which is at a fixed place; a message whose root is elsewhere stays
  unchanged."""
  segment_count = int.from_bytes(dat[:4], "little") + 1
  at = (4 * (segment_count + 1) + 7) // 8 * 8
  if int.from_bytes(dat[at : at + 4], "little") != 0:
    return dat
  return dat[: at + TIME_OFFSET] + t.to_bytes(8, "little") + dat[at + TIME_OFFSET + 8 :]


class Replay:
  def __init__(
    self,
    segments: list[Segment],
    camera: str = "road",
    start: float = 0.0,
    seconds: float | None = None,
    speed: float = 1.0,
    loop: bool = False,
    allow: Iterable[str] | None = None,
    block: Iterable[str] = (),
    vipc: bool = True,
    focal: float | None = None,
  ):
    self.segments, self.start, self.seconds, self.speed, self.loop, self.vipc, self.focal = (
      segments,
      start,
      seconds,
      speed,
      loop,
      vipc,
      focal,
    )
    self.allow = {service_name(s) for s in allow} if allow is not None else None
    self.block = {service_name(s) for s in block} | (OURS - (self.allow or set()))
    unknown = sorted(((self.allow or set()) | self.block) - SERVICE_LIST.keys())
    if unknown:
      raise UserError(f"no service {', '.join(unknown)}; names are those of openpilot's services.py")
    self.camera = choose_camera(segments, camera)
    self.has_video = vipc and any(getattr(s, VIDEOS[self.camera]) for s in segments)
    self.sent_frames = self.sent_messages = self.late_frames = 0
    self.guard = Guard(segments[0].route)
    self._survey()
    self.pm = messaging.PubMaster(sorted(self.services))
    self.server: VisionIpcServer | None = None
    self.stop = threading.Event()

  def _survey(self) -> None:
    """One pass over the logs before the sockets are made: which services will be published, where the log begins, which
    sensor the camera has. deviceState is always published, or nothing would start; so are camera states for every
    frame."""
    self.logged: set[str] = set()
    self.first_time: int | None = None
    self.sensor = "unknown"
    state = STATE_SERVICES[self.camera]
    for t, service, dat in messages(self.segments, None, set()):
      if self.first_time is None:
        self.first_time = t
      if service == state and self.sensor == "unknown":
        with self.guard(None):
          self.sensor = str(getattr(open_event(dat), state).sensor)
      self.logged.add(service)
    self.logged = {s for s in self.logged if s not in self.block and (self.allow is None or s in self.allow)}
    self.services = self.logged | {"deviceState"}
    if self.has_video:
      self.services |= {state, INDEX_SERVICES[self.camera]} - self.block

  def _items(self) -> Iterator[Item]:
    """Messages and frames, merged in time."""
    state = STATE_SERVICES[self.camera]
    video = (
      frames(self.segments, self.camera, self.start, origin=self.first_time, focal=self.focal)
      if self.has_video
      else iter(())
    )

    def logged() -> Iterator[Item]:
      for t, service, dat in messages(self.segments, self.allow, self.block):
        # a qlog has few camera states: all are made from the encoder's index instead
        if service == state and self.has_video:
          continue
        if self.first_time is None or (t - self.first_time) * 1e-9 >= self.start:
          yield Item(t, 0, service, dat)

    def filmed() -> Iterator[Item]:
      for entry, frame in video:
        if state in self.services:
          msg = messaging.new_message(state, valid=True, logMonoTime=entry.timestamp_eof)
          cam = getattr(msg, state)
          cam.frameId, cam.timestampSof, cam.timestampEof = entry.frame_id, entry.timestamp_sof, entry.timestamp_eof
          cam.sensor = self.sensor
          yield Item(entry.timestamp_eof, 1, state, msg.to_bytes())
        yield Item(entry.timestamp_eof, 2, "", b"", entry, frame)

    return heapq.merge(logged(), filmed())

  def _serve(self) -> None:
    """Opens the camera before its first frame, so that clients can connect in time."""
    first = next(p for s in self.segments if (p := getattr(s, VIDEOS[self.camera])) is not None)
    size = (KnownCamera.width, KnownCamera.height) if self.focal is not None else picture_size(first)
    if size is None:
      raise UserError(f"{first} is not a video that can be read; copy it again")
    self.server = VisionIpcServer("camerad")
    self.server.create_buffers(STREAMS[self.camera], BUFFERS, *size)
    self.server.start_listener()

  def send_frame(self, entry: EncodeEntry, frame: np.ndarray, frame_id: int, shift: int) -> None:
    server = self.server
    assert server is not None
    stream = STREAMS[self.camera]
    buf = server.get_buffer(stream)
    w, h = frame.shape[1], frame.shape[0] * 2 // 3
    if (w, h) != (buf.width, buf.height):
      raise UserError(
        f"frames change from {buf.width}x{buf.height} to {w}x{h} within the route; replay the segments one at a time"
      )
    fill_nv12(frame, buf.data, buf.stride, buf.uv_offset)
    server.send_buffer(stream, buf, frame_id, entry.timestamp_sof + shift, entry.timestamp_eof + shift)
    self.sent_frames += 1

  def run(self, progress: bool = True, warm_up: float = 0.3) -> None:
    """Plays to the end, or until stop is set. warm_up: seconds for subscribers to connect; deviceState is published
    meanwhile."""
    self.last_time = self.last_id = 0  # as sent
    name = printable(self.segments[0].route)
    bar = tqdm(
      total=None,
      desc=f"replay {name}",
      disable=not progress or not sys.stderr.isatty(),
      bar_format="{desc}: {n:.1f} s {postfix}",
    )
    # s of the route between lines, in a file or a pipe
    self.say_at = SAY_EVERY if progress and bar.disable else math.inf
    try:
      if self.has_video:
        self._serve()
      self._started(0)
      self.stop.wait(warm_up)
      while not self.stop.is_set():
        before = self.sent_messages + self.sent_frames
        self._round(bar)
        if self.sent_messages + self.sent_frames == before and not self.stop.is_set():
          raise UserError(
            f"nothing of {name} is to be published from second {self.start:g} on; the route is shorter, or "
            "--allow and --block leave nothing"
          )
        if not self.loop:
          break
    finally:
      self.stop.set()
      self.guard.say()
      bar.close()
      self.close()

  def _round(self, bar: tqdm) -> None:
    """Plays the route once. Times and frame ids go on where the last round ended."""
    waiting: queue.Queue[Item | BaseException | None] = queue.Queue(maxsize=64 if not self.has_video else AHEAD * 40)
    threading.Thread(target=self._feed, args=(waiting,), daemon=True).start()
    base: int | None = None
    shift, id_shift = 0, None if self.last_id else 0
    begun, device_due = 0.0, 0.0
    before = skipped = 0  # ns
    while not self.stop.is_set():
      try:
        item = waiting.get(timeout=0.2)
      except queue.Empty:  # the decoder is slow, or this process was suspended
        continue
      if isinstance(item, BaseException):
        raise item
      if item is None:
        return
      if base is None:
        base = before = item.time
        begun = time.monotonic()
        shift = self.last_time + 50_000_000 - base if self.last_time else 0
      if item.time - before > GAP:
        warn(
          f"the log has nothing for {(item.time - before) * 1e-9:.1f} s from second {(before - base) * 1e-9:.1f} on: "
          "replay jumps over them"
        )
        skipped += item.time - before
      before = max(before, item.time)
      at = (item.time - base - skipped) * 1e-9
      if self.seconds is not None and at >= self.seconds:
        self.stop.set()
        return
      lead = begun + at / self.speed - time.monotonic()
      if lead > 0 and self.stop.wait(lead):
        return
      if item.entry is not None and item.frame is not None:
        if id_shift is None:
          id_shift = self.last_id + 1 - item.entry.frame_id
        self.last_id = (item.entry.frame_id + id_shift) & 0xFFFFFFFF
        self.late_frames += lead < -0.02
        self.send_frame(item.entry, item.frame, self.last_id, shift)
        where = f"segment {item.entry.segment_num}, {self.sent_frames} frames, {self.late_frames} late"
        if not bar.disable:
          bar.n = at
          bar.set_postfix_str(where)
        elif at >= self.say_at:
          print(f"replay: {at:.0f} s, {where}", file=sys.stderr)
          self.say_at = at + SAY_EVERY
      else:
        if item.service == "deviceState":
          self._started(item.time + shift, item.dat)
        else:
          self._send(item.service, with_time(item.dat, item.time + shift) if shift else item.dat)
        self.sent_messages += 1
      if time.monotonic() > device_due:
        if "deviceState" not in self.logged:
          self._started(item.time + shift)
        device_due = time.monotonic() + 0.5
      self.last_time = max(self.last_time, item.time + shift)

  def _feed(self, waiting: "queue.Queue[Item | BaseException | None]") -> None:
    try:
      for item in self._items():
        self._put(waiting, item)
        if self.stop.is_set():
          return
      self._put(waiting, None)
    except BaseException as e:  # raised again in the player's thread
      self._put(waiting, e)

  def _put(self, waiting: "queue.Queue[Item | BaseException | None]", item: Item | BaseException | None) -> None:
    while not self.stop.is_set():
      try:
        waiting.put(item, timeout=0.2)
        return
      except queue.Full:
        continue

  def _started(self, t: int, dat: bytes | None = None) -> None:
    """deviceState with started set: the logged one, or a new one where the log has none."""
    if dat is not None and not is_sound(dat):  # as_builder() would abort the process
      self.guard.damaged["deviceState"] += 1
      dat = None
    msg = open_event(dat).as_builder() if dat is not None else messaging.new_message("deviceState")
    msg.logMonoTime, msg.valid, msg.deviceState.started = t or time.monotonic_ns(), True, True
    self._send("deviceState", msg)

  def _send(self, service: str, dat: Any) -> None:
    try:
      self.pm.send(service, dat)
    except messaging.MessageTooLargeError:
      warn(f"the log has messages of {service} that are too large for a socket; they are left out")

  def close(self) -> None:
    self.pm.close()
    if self.server is not None:
      self.server.close()


def names(text: str | None) -> list[str] | None:
  return None if text is None else [s for s in text.replace(" ", "").split(",") if s]


@dataclass(frozen=True)
class Options(RouteOptions):
  speed: float = option(1.0, parse=above_zero, metavar="X", help="playback speed; 2: twice as fast as recorded")
  loop: bool = option(False, help="begin again at the end; times and frame ids go on")
  allow: str | None = option(None, metavar="SERVICES", help="publish only these, comma-separated, in either spelling")
  block: str | None = option(None, metavar="SERVICES", help="do not publish these")
  no_vipc: bool = option(False, help="messages only")
  prefix: str | None = option(None, help="OPENPILOT_PREFIX to publish under")


def main() -> None:
  args = parse(Options, __doc__, "replay")
  if args.prefix is not None:
    os.environ["OPENPILOT_PREFIX"] = args.prefix
  segments, camera = open_route(args.route, args.data_dir, args.camera)
  try:
    replay = Replay(
      segments,
      camera,
      args.start,
      args.seconds,
      args.speed,
      args.loop,
      names(args.allow),
      names(args.block) or (),
      not args.no_vipc,
      args.focal,
    )
  except messaging.MultiplePublishersError as e:
    raise UserError(str(e)) from None
  for sig in (signal.SIGINT, signal.SIGTERM):
    signal.signal(sig, lambda *_: replay.stop.set())
  try:
    replay.run()
  except messaging.MultiplePublishersError as e:
    raise UserError(str(e)) from None
  print(
    f"replay: {replay.sent_messages} messages, {replay.sent_frames} frames, {replay.late_frames} late by more "
    "than 20 ms"
  )


if __name__ == "__main__":
  raise SystemExit(cli(main)())

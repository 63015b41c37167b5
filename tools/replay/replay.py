#!/usr/bin/env python3
"""Publishes a logged route: its messages on messaging, its video as camera frames on VisionIPC, at the pace at which they were recorded.

Frames are joined to the log by frameId and segmentId, and sent when the log says that their exposure ended. fair* messages and managerState in the log are
left out, since fairmodeld and the manager beside this make new ones. A segment without video plays its messages; a video without log plays at its own rate,
uncalibrated.
"""

import argparse
import heapq
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from openpilot.cereal import messaging
from openpilot.cereal.services import SERVICE_LIST, service_name
from openpilot.cereal.visionipc import VisionIpcServer, VisionStreamType
from openpilot.tools.lib.encode_index import SERVICES as INDEX_SERVICES, VIDEOS, EncodeEntry, encode_index, synthetic_index
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.framereader import FrameReader
from openpilot.tools.lib.logreader import TAG_NAMES, LogReader
from openpilot.tools.lib.route import Route, Segment

CAMERAS = tuple(VIDEOS)
BUFFERS = 20
AHEAD = 8  # frames decoded before they are due
STATE_SERVICES = {"road": "narrowRoadCameraState", "qcamera": "narrowRoadCameraState", "wide": "wideRoadCameraState"}
STREAMS = {
  "road": VisionStreamType.VISION_STREAM_NARROW_ROAD,
  "qcamera": VisionStreamType.VISION_STREAM_NARROW_ROAD,
  "wide": VisionStreamType.VISION_STREAM_WIDE_ROAD,
}
OURS = {"managerState"}  # of the manager that may run beside this; a log's own plays where --allow names it
TIME_OFFSET = 8  # of logMonoTime behind a root pointer that stands right before it


@dataclass(order=True)
class Item:
  """Something to publish at `time` ns of the log's clock: a message, or a camera frame."""

  time: int
  order: int
  service: str = field(compare=False)
  dat: bytes = field(compare=False, default=b"")
  entry: EncodeEntry | None = field(compare=False, default=None)
  frame: np.ndarray | None = field(compare=False, default=None)  # NV12 (h * 3 // 2, w)


def choose_camera(segments: list[Segment], camera: str) -> str:
  """The camera asked for; in place of a road camera that is not there, the qcamera, which shows the same. Says so."""
  if any(getattr(s, VIDEOS[camera]) for s in segments):
    return camera
  if camera == "road" and any(s.qcamera for s in segments):
    print("replay: no fcamera in this route, its qcamera plays as road camera", file=sys.stderr)
    return "qcamera"
  if not any(getattr(s, v) for s in segments for v in VIDEOS.values()):
    print("replay: no video in this route, only its messages play", file=sys.stderr)
    return camera
  there = sorted({c for c in CAMERAS for s in segments if getattr(s, VIDEOS[c])})
  raise UserError(f"no {VIDEOS[camera]} in {segments[0].route}; its cameras are {', '.join(there)}: choose one with --camera")


def segment_index(segment: Segment, camera: str, reader: FrameReader, first_id: int, start: int) -> list[EncodeEntry]:
  if segment.log_path is None:
    print(f"replay: segment {segment.name} has no log: its video plays at {reader.fps:g} Hz with the default calibration", file=sys.stderr)
    return synthetic_index(reader.frame_count, reader.fps, segment.num, start, first_id)
  return encode_index(segment, camera)


def frames(
  segments: list[Segment], camera: str, start: float = 0.0, pix_fmt: str = "nv12", origin: int | None = None
) -> Iterator[tuple[EncodeEntry, np.ndarray]]:
  """(entry, frame) of a route's video over all its segments, in order, from `start` seconds after `origin` ns, or the first one, on."""
  next_id, next_time = 0, 1_000_000_000
  for segment in segments:
    path: Path | None = getattr(segment, VIDEOS[camera])
    if path is None:
      continue
    reader = FrameReader(path, pix_fmt)
    entries = segment_index(segment, camera, reader, next_id, next_time)
    origin = entries[0].timestamp_eof if origin is None else origin
    next_id, next_time = entries[-1].frame_id + 1, entries[-1].timestamp_eof + 50_000_000
    wanted = {e.segment_id: e for e in entries if (e.timestamp_eof - origin) * 1e-9 >= start and e.segment_id < reader.frame_count}
    lost = sum(e.segment_id >= reader.frame_count for e in entries)
    if lost:
      print(f"replay: {path} ends {lost} frames before its log", file=sys.stderr)
    if wanted:
      first = min(wanted)
      for i, frame in enumerate(reader.read_from(first), first):
        if i in wanted:
          yield wanted[i], frame
    reader.close()


def messages(segments: list[Segment], allow: set[str] | None, block: set[str]) -> Iterator[tuple[int, str, bytes]]:
  """(logMonoTime, service, bytes) of what is to be published, in time order."""
  paths = [s.log_path for s in segments if s.log_path is not None]
  if not paths:
    return
  for t, tag, dat in LogReader(paths).raw():
    service = TAG_NAMES[tag]
    if service in SERVICE_LIST and not service.startswith("fair") and service not in block and (allow is None or service in allow):
      yield t, service, dat


def with_time(dat: bytes, t: int) -> bytes:
  """The message with another logMonoTime, which stands at a fixed place; one whose root is elsewhere stays as it is."""
  segment_count = int.from_bytes(dat[:4], "little") + 1
  at = (4 * (segment_count + 1) + 7) // 8 * 8
  if int.from_bytes(dat[at : at + 4], "little") != 0:
    return dat
  return dat[: at + TIME_OFFSET] + t.to_bytes(8, "little") + dat[at + TIME_OFFSET + 8 :]


def fill_nv12(frame: np.ndarray, out: np.ndarray, stride: int, uv_offset: int) -> np.ndarray:
  """Tight NV12 (h * 3 // 2, w) -> `out`, 1-D uint8, in the camera's buffer layout, as VisionIPC hands it to fairmodeld."""
  h, w = frame.shape[0] * 2 // 3, frame.shape[1]
  out[: h * stride].reshape(h, stride)[:, :w] = frame[:h]
  out[uv_offset : uv_offset + h // 2 * stride].reshape(h // 2, stride)[:, :w] = frame[h:]
  return out


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
  ):
    self.segments, self.start, self.seconds, self.speed, self.loop, self.vipc = segments, start, seconds, speed, loop, vipc
    self.allow = {service_name(s) for s in allow} if allow is not None else None
    self.block = {service_name(s) for s in block} | (OURS - (self.allow or set()))
    unknown = sorted(((self.allow or set()) | self.block) - SERVICE_LIST.keys())
    if unknown:
      raise UserError(f"no service {', '.join(unknown)}; names are those of openpilot's services.py")
    self.camera = choose_camera(segments, camera)
    self.has_video = vipc and any(getattr(s, VIDEOS[self.camera]) for s in segments)
    self.sent_frames = self.sent_messages = self.late_frames = 0
    self._survey()
    self.pm = messaging.PubMaster(sorted(self.services))
    self.server: VisionIpcServer | None = None
    self.stop = threading.Event()

  def _survey(self) -> None:
    """One pass over the logs, before the sockets are made: what will be published, where the log begins, which sensor films. deviceState goes out always,
    or nothing would start; camera states for every frame."""
    self.logged: set[str] = set()
    self.first_time: int | None = None
    self.sensor = "unknown"
    state = STATE_SERVICES[self.camera]
    for t, service, dat in messages(self.segments, None, set()):
      if self.first_time is None:
        self.first_time = t
      if service == state and self.sensor == "unknown":
        self.sensor = str(getattr(messaging.log_from_bytes(dat), state).sensor)
      self.logged.add(service)
    self.logged = {s for s in self.logged if s not in self.block and (self.allow is None or s in self.allow)}
    self.services = self.logged | {"deviceState"}
    if self.has_video:
      self.services |= {state, INDEX_SERVICES[self.camera]} - self.block

  def _items(self) -> Iterator[Item]:
    """Messages and frames, merged in time."""
    state = STATE_SERVICES[self.camera]
    video = frames(self.segments, self.camera, self.start, origin=self.first_time) if self.has_video else iter(())

    def logged() -> Iterator[Item]:
      for t, service, dat in messages(self.segments, self.allow, self.block):
        # camera states are decimated in a qlog: all are made from the encoder's index instead
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
    """Opens the camera before its first frame, so that clients are there for that one."""
    first = next(p for s in self.segments if (p := getattr(s, VIDEOS[self.camera])) is not None)
    reader = FrameReader(first, "nv12")
    self.server = VisionIpcServer("camerad")
    self.server.create_buffers(STREAMS[self.camera], BUFFERS, reader.w, reader.h)
    self.server.start_listener()

  def send_frame(self, entry: EncodeEntry, frame: np.ndarray, frame_id: int, shift: int) -> None:
    server = self.server
    assert server is not None
    stream = STREAMS[self.camera]
    buf = server.get_buffer(stream)
    w, h = frame.shape[1], frame.shape[0] * 2 // 3
    if (w, h) != (buf.width, buf.height):
      raise UserError(f"frames change from {buf.width}x{buf.height} to {w}x{h} within the route; replay the segments one at a time")
    fill_nv12(frame, buf.data, buf.stride, buf.uv_offset)
    server.send_buffer(stream, buf, frame_id, entry.timestamp_sof + shift, entry.timestamp_eof + shift)
    self.sent_frames += 1

  def run(self, progress: bool = True, warm_up: float = 0.3) -> None:
    """Plays to the end, or until stop is set. warm_up: seconds that subscribers get to connect, deviceState alive meanwhile."""
    self.last_time = self.last_id = 0  # as sent
    bar = tqdm(total=None, unit="s", desc=f"replay {self.segments[0].route}", disable=not progress, bar_format="{desc}: {n:.1f} s {postfix}")
    try:
      if self.has_video:
        self._serve()
      self._started(0)
      self.stop.wait(warm_up)
      while not self.stop.is_set():
        self._round(bar)
        if not self.loop:
          break
    finally:
      self.stop.set()
      bar.close()
      self.close()

  def _round(self, bar: tqdm) -> None:
    """The route once. Times and frame ids go on where the last round ended."""
    waiting: queue.Queue[Item | BaseException | None] = queue.Queue(maxsize=64 if not self.has_video else AHEAD * 40)
    threading.Thread(target=self._feed, args=(waiting,), daemon=True).start()
    base: int | None = None
    shift, id_shift = 0, None if self.last_id else 0
    begun, device_due = 0.0, 0.0
    while not self.stop.is_set():
      try:
        item = waiting.get(timeout=0.2)
      except queue.Empty:  # the decoder is slow, or stopped with us
        continue
      if isinstance(item, BaseException):
        raise item
      if item is None:
        return
      if base is None:
        base, begun = item.time, time.monotonic()
        shift = self.last_time + 50_000_000 - base if self.last_time else 0
      at = (item.time - base) * 1e-9
      if self.seconds is not None and at >= self.seconds:
        self.stop.set()
        return
      lead = begun + at / self.speed - time.monotonic()
      if lead > 0 and self.stop.wait(lead):
        return
      if item.entry is not None and item.frame is not None:
        if id_shift is None:
          id_shift = self.last_id + 1 - item.entry.frame_id
        self.last_id = item.entry.frame_id + id_shift
        self.late_frames += lead < -0.02
        self.send_frame(item.entry, item.frame, self.last_id, shift)
        bar.n = at
        bar.set_postfix_str(f"segment {item.entry.segment_num}, {self.sent_frames} frames, {self.late_frames} late")
      else:
        if item.service == "deviceState":
          self._started(item.time + shift, item.dat)
        else:
          self.pm.send(item.service, with_time(item.dat, item.time + shift) if shift else item.dat)
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
    except BaseException as e:  # the player raises it where the user sees it
      self._put(waiting, e)

  def _put(self, waiting: "queue.Queue[Item | BaseException | None]", item: Item | BaseException | None) -> None:
    while not self.stop.is_set():
      try:
        waiting.put(item, timeout=0.2)
        return
      except queue.Full:
        continue

  def _started(self, t: int, dat: bytes | None = None) -> None:
    """deviceState with started set, as it was logged or, where the log has none, made up."""
    if dat is not None:
      msg = messaging.log_from_bytes(dat).as_builder()
    else:
      msg = messaging.new_message("deviceState")
    msg.logMonoTime, msg.valid, msg.deviceState.started = t or time.monotonic_ns(), True, True
    self.pm.send("deviceState", msg)

  def close(self) -> None:
    self.pm.close()
    if self.server is not None:
      self.server.close()


def names(text: str | None) -> list[str] | None:
  return None if text is None else [s for s in text.replace(" ", "").split(",") if s]


def add_route_arguments(p: argparse.ArgumentParser) -> None:
  p.add_argument(
    "route", help="a folder with segments, one segment's folder, a route's name (with --data-dir), or a video; /2 or /2:5 at its end picks segments"
  )
  p.add_argument("--data-dir", type=Path, help="where routes lie")
  p.add_argument("--camera", choices=CAMERAS, default="road", help="which video plays (qcamera: as road camera)")
  p.add_argument("--start", type=float, default=0.0, metavar="S", help="seconds into the route")
  p.add_argument("--seconds", type=float, help="stop after so many seconds of the route")


def main() -> None:
  p = argparse.ArgumentParser(prog="replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add_route_arguments(p)
  p.add_argument("--speed", type=float, default=1.0, metavar="X")
  p.add_argument("--loop", action="store_true", help="begin again at the end; times and frame ids go on")
  p.add_argument("--allow", metavar="SERVICES", help="publish only these, comma-separated, in either spelling")
  p.add_argument("--block", metavar="SERVICES", help="do not publish these")
  p.add_argument("--no-vipc", action="store_true", help="messages only")
  p.add_argument("--prefix", help="OPENPILOT_PREFIX to publish under")
  args = p.parse_args()
  if args.prefix is not None:
    os.environ["OPENPILOT_PREFIX"] = args.prefix
  if args.speed <= 0 or args.start < 0:
    raise UserError("--speed must be above 0 and --start not below 0")
  try:
    replay = Replay(
      Route(args.route, args.data_dir).segments,
      args.camera,
      args.start,
      args.seconds,
      args.speed,
      args.loop,
      names(args.allow),
      names(args.block) or (),
      not args.no_vipc,
    )
  except messaging.MultiplePublishersError as e:
    raise UserError(str(e)) from None
  for sig in (signal.SIGINT, signal.SIGTERM):
    signal.signal(sig, lambda *_: replay.stop.set())
  try:
    replay.run()
  except messaging.MultiplePublishersError as e:
    raise UserError(str(e)) from None
  print(f"replay: {replay.sent_messages} messages, {replay.sent_frames} frames, {replay.late_frames} late by more than 20 ms")


if __name__ == "__main__":
  raise SystemExit(cli(main)())

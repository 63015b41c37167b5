#!/usr/bin/env python3
"""Makes an overlay video from a log with fair* messages and the route's video; overlay.py draws it."""

from dataclasses import dataclass
import contextlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from openpilot.selfdrive.modeld.fair.bundle import MODELS_DIR, BundleError, find_bundle
from openpilot.selfdrive.modeld.fair.roles import FORMER, roles_of
from openpilot.tools.lib.cameras import CAMERAS, STREAM_NAMES
from openpilot.tools.lib.options import option, parse
from openpilot.tools.lib.errors import UserError, above_zero, cli, warn
from openpilot.tools.lib.guard import Guard
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.files import atomic_path
from openpilot.tools.lib.route import Segment
from openpilot.tools.lib.videowriter import VideoWriter
from openpilot.tools.replay.overlay import ABOUT, Overlay
from openpilot.tools.replay.source import frames, open_route

SAME = 1.0  # s between a frame's times by the log and by the video's index, of one frame
BEHIND = 4  # pictures that may wait for the encoder
LOGGED = [*ABOUT, "fairState", "modelV2", "carState", "extrinsicsCalibration", "deviceState", "narrowRoadCameraState"]


def overlay_frames(
  logs: list[Path], segments: list[Segment], camera: str, start: float = 0.0, focal: float | None = None
) -> Iterator[tuple[int, np.ndarray, bool]]:
  """(frame id, annotated picture, has fair messages) of every frame of the video from the first with fair messages to
  the last. Raises UserError where the log has none, or is of another route."""
  # the logs are of the same time: no stream in sequence
  events = sorted((e for path in logs for e in LogReader([path], services=LOGGED).whole()), key=lambda e: e.logMonoTime)
  about = {getattr(e, e.which()).frameId: getattr(e, e.which()).timestampEof for e in events if e.which() in ABOUT}
  if not about:
    raise UserError(
      f"no fair messages in {', '.join(map(str, logs))}; run fairmodeld beside a replay and record it, or "
      "process-replay the route"
    )
  streams = {e.fairState.stream for e in events if e.which() == "fairState"} - {""}
  if streams and STREAM_NAMES[camera] not in streams:
    warn(
      f"the fair messages are of {' and '.join(sorted(streams))}, the video is of {STREAM_NAMES[camera]}: they are "
      "drawn where the one camera would see what the other saw; choose the video with --camera"
    )
  overlay: Overlay | None = None
  fits = False
  # messages about a frame come after it, so these are all passed on first; the others by time
  timed = [e for e in events if e.which() not in (*ABOUT, "modelV2")]
  guard = Guard("the overlay")
  k = 0
  for entry, rgb in frames(segments, camera, start, "rgb24", focal=focal):
    if entry.frame_id < min(about):
      continue
    if entry.frame_id > max(about):
      return
    if not fits and entry.frame_id in about:  # two routes may count their frames alike
      apart = abs(entry.timestamp_eof - about[entry.frame_id]) * 1e-9
      if apart > SAME:
        raise UserError(
          f"frame {entry.frame_id} of {segments[0].route} was taken {apart:.1f} s from when the fair messages say; "
          "they are of another route"
        )
      fits = True
    if overlay is None:
      overlay = Overlay(rgb.shape[1], rgb.shape[0], camera == "wide", roles_of_bundle(events))
      for e in events:
        if e.which() in (*ABOUT, "modelV2") or (
          e.which() in ("extrinsicsCalibration", "deviceState", "narrowRoadCameraState")
          and e.logMonoTime <= entry.timestamp_eof
        ):
          with guard(e):
            overlay.message(e)
    while k < len(timed) and timed[k].logMonoTime <= entry.timestamp_eof:
      with guard(timed[k]):
        overlay.message(timed[k])
      k += 1
    picture = None
    with guard(None):
      picture = overlay.draw(rgb, entry.frame_id)
    if picture is None:  # the messages' values make no sense; where they are damaged too, the next line reports it
      overlay.by_frame.pop(entry.frame_id, None)
      overlay.latest.clear()
      picture = overlay.draw(rgb, entry.frame_id)
    yield entry.frame_id, picture, entry.frame_id in about
  guard.say()


def roles_of_bundle(events: list[Any]) -> Mapping[str, str]:
  """{class: role} as the manifest of the messages' bundle says, where it is one of models/; else those of the road's
  classes."""
  name = next(getattr(e, e.which()).bundle for e in events if e.which() in ABOUT)
  try:
    graphs = find_bundle(name, MODELS_DIR).graphs if name else []
  except BundleError:
    return FORMER
  return {**FORMER, **{c: role for g in graphs for o in g["outputs"] for c, role in roles_of(o).items()}}


def show(
  logs: list[Path],
  segments: list[Segment],
  camera: str,
  out: Path,
  limit: int | None = None,
  start: float = 0.0,
  keep: int = 0,
  focal: float | None = None,
) -> tuple[int, list[np.ndarray]]:
  """Writes out (.mp4, H.264) atomically. Returns how many frames, and `keep` of them, evenly spread."""
  n, kept = 0, []
  with atomic_path(out) as tmp, contextlib.ExitStack() as stack:
    video: VideoWriter | None = None
    behind: deque[Future[None]] = deque()
    for _, picture, _ in tqdm(
      overlay_frames(logs, segments, camera, start, focal), desc="overlay", unit="frame", total=limit
    ):
      if video is None:
        video = stack.enter_context(VideoWriter(tmp, picture.shape[1], picture.shape[0]))
        encoder = stack.enter_context(ThreadPoolExecutor(1))  # encodes while the next picture is drawn
      behind.append(encoder.submit(video.write, picture))
      if len(behind) > BEHIND:
        behind.popleft().result()
      if keep and n % 10 == 5:
        kept.append(picture)
      n += 1
      if limit is not None and n >= limit:
        break
    if video is None:
      raise UserError(
        f"the video of {segments[0].route} has none of the frames of the log's fair messages; is it the same route?"
      )
    for written in behind:
      written.result()
  step = max(1, len(kept) // keep) if keep else 1
  return n, kept[step // 2 :: step][:keep] if keep else []


@dataclass(frozen=True)
class Options:
  log: tuple[Path, ...] = option(
    positional=True, help="logs with fair messages, from record, process-replay or the demo"
  )
  route: str = option(
    help="the route that was replayed: for its video, and for calibration and speed where the log has none"
  )
  data_dir: Path | None = option(None, help="the folder that holds the routes")
  camera: str = option("road", choices=CAMERAS, help="which video was replayed")
  output: Path = option(Path("out/overlay.mp4"), aliases=("--out",), help="the video to write")
  focal: float | None = option(None, parse=above_zero, metavar="PX", help="the value that the replay was given")
  frames: int | None = option(None, help="at most so many frames")


def main() -> None:
  args = parse(Options, __doc__, "show")
  segments, camera = open_route(args.route, args.data_dir, args.camera)
  logs = list(args.log)
  if not any(
    True for _ in LogReader(logs, services=["carState"])
  ):  # fair messages alone: the rest comes from the route
    logs += [s.log_path for s in segments if s.log_path is not None]
  n, _ = show(logs, segments, camera, args.output, args.frames, focal=args.focal)
  print(f"{args.output}: {n} frames")


if __name__ == "__main__":
  raise SystemExit(cli(main)())

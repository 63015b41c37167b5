#!/usr/bin/env python3
"""Renders an overlay video from a log with fair* messages and the route's video: classes tinted, objects with their identities, lane points and lines,
depth inset, openpilot's lane lines, a line of numbers."""

import argparse
import colorsys
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from openpilot.common.transformations.camera import project
from openpilot.common.transformations.model import get_warp_matrix
from openpilot.common.transformations.orientation import rot_from_euler
from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W, camera_intrinsics
from openpilot.selfdrive.modeld.fair.heads.ground import view_ground
from openpilot.selfdrive.modeld.fair.heads.lanes import on_line
from openpilot.selfdrive.modeld.fair.publish import class_map_from_message, depth_from_message, mask_from_message
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.logwriter import atomic_path
from openpilot.tools.lib.route import Route, Segment
from openpilot.tools.lib.videowriter import VideoWriter
from openpilot.tools.replay.replay import CAMERAS, choose_camera, frames

COLOURS = {"road": (70, 110, 255), "lane": (255, 220, 0), "vehicle": (255, 50, 50), "pedestrian": (40, 230, 90)}
OTHER = (200, 80, 220)  # of classes without a colour
TINT = 0.4
NEAR, FAR = 2.0, 120.0  # metres, ends of the depth colours
HELD = 3  # frames that a map of depth stays in the picture
TURBO = (matplotlib.colormaps["turbo"](np.linspace(1, 0, 256))[:, :3] * 255).astype(np.uint8)  # near is red
ABOUT = ("fairDepth", "fairSegmentation", "fairObjects", "fairLanes")  # each about one frame
LOGGED = [*ABOUT, "fairState", "modelV2", "carState", "extrinsicsCalibration", "deviceState", "narrowRoadCameraState"]


def colour_of(identity: int) -> tuple[int, int, int]:
  """One of a track or line, the same in every frame; neighbours differ."""
  r, g, b = colorsys.hsv_to_rgb(identity * 0.381966 % 1.0, 0.75, 1.0)
  return round(r * 255), round(g * 255), round(b * 255)


def depth_picture(z: np.ndarray) -> np.ndarray:
  """(H, W) metres -> (H, W, 3) uint8, logarithmic from red, near, to blue, far; black where there is none."""
  k = np.log(np.clip(np.nan_to_num(z, nan=NEAR), NEAR, FAR) / NEAR) / np.log(FAR / NEAR)
  picture = TURBO[(k * 255).astype(np.uint8)]
  picture[~np.isfinite(z)] = 0
  return picture


class Overlay:
  """Draws on frames of one size. Messages come first, by message(); then draw() the frame that they are about."""

  def __init__(self, width: int, height: int, wide: bool = False):
    self.width, self.height, self.wide = width, height, wide
    self.scale = 2 if width < 1000 else 1
    self.size = (width * self.scale // 2 * 2, height * self.scale // 2 * 2)
    self.rpy = np.zeros(3)
    self.device: str | None = None
    self.sensor: str | None = None
    self.latest: dict[str, Any] = {}
    self.depth: tuple[int, Any] | None = None  # frame and message of the newest: it comes at half the rate
    self.by_frame: dict[int, dict[str, Any]] = {}
    self.maps: tuple[Any, ...] | None = None
    self.font_size = 15 * self.size[0] // 1344 + 4
    self.font = ImageFont.load_default(size=self.font_size)

  def message(self, event: Any) -> None:
    which = event.which()
    m = getattr(event, which)
    if which in (*ABOUT, "modelV2"):
      self.by_frame.setdefault(m.frameId, {})[which] = event
    elif which == "extrinsicsCalibration":
      if str(m.calStatus) == "calibrated" and len(m.rpyCalib) == 3:
        self.rpy, self.maps = np.array(list(m.rpyCalib)), None
    elif which == "deviceState":
      self.device, self.maps = str(m.deviceType), None if str(m.deviceType) != self.device else self.maps
    elif which == "narrowRoadCameraState":
      self.sensor, self.maps = str(m.sensor), None if str(m.sensor) != self.sensor else self.maps
    else:
      self.latest[which] = event

  def _geometry(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """intrinsics, and for every picture pixel the view pixel that shows it, with a mask of those inside the view."""
    if self.maps is None:
      intrinsics = camera_intrinsics(self.width, self.height, self.device, self.sensor, self.wide)
      inverse = np.linalg.inv(get_warp_matrix(self.rpy, intrinsics))
      u, v = np.meshgrid(np.arange(self.size[0]) / self.scale, np.arange(self.size[1]) / self.scale)
      p = inverse @ np.stack([u.ravel(), v.ravel(), np.ones(u.size)])
      with np.errstate(divide="ignore", invalid="ignore"):
        x, y = (p[:2] / p[2]).reshape(2, *u.shape)
      inside = (p[2].reshape(u.shape) > 0) & (x >= -0.5) & (x < VIEW_W - 0.5) & (y >= -0.5) & (y < VIEW_H - 0.5)
      self.maps = (intrinsics, np.where(inside, np.round(x), 0).astype(int), np.where(inside, np.round(y), 0).astype(int), inside)
    return self.maps

  def draw(self, rgb: np.ndarray, frame_id: int) -> np.ndarray:
    """(height, width, 3) uint8 -> the annotated picture, (size[1], size[0], 3) uint8."""
    intrinsics, x, y, inside = self._geometry()
    found = self.by_frame.get(frame_id, {})
    picture = np.asarray(Image.fromarray(rgb).resize(self.size, Image.Resampling.BILINEAR)).copy()
    seg, depth = found.get("fairSegmentation"), found.get("fairDepth")
    if seg is not None and seg.valid:
      m = seg.fairSegmentation
      class_map = class_map_from_message(m)
      colours = np.zeros((256, 3), np.float32)
      tinted = np.zeros(256, bool)
      for i, name in enumerate(m.classes):
        if name != "background":
          colours[i], tinted[i] = COLOURS.get(name, OTHER), True
      cls = class_map[y * m.height // VIEW_H, x * m.width // VIEW_W]
      at = inside & tinted[cls]
      picture[at] = (picture[at] * (1 - TINT) + colours[cls[at]] * TINT).astype(np.uint8)
    objects, lanes = found.get("fairObjects"), found.get("fairLanes")
    if objects is not None and objects.valid:
      self._masks(picture, objects.fairObjects, x, y, inside)
    image = Image.fromarray(picture)
    d = ImageDraw.Draw(image)
    if "modelV2" in found:
      self._lane_lines(d, found["modelV2"].modelV2, intrinsics)
    to_camera = get_warp_matrix(self.rpy, intrinsics)
    if lanes is not None and lanes.valid:
      self._lanes(d, lanes.fairLanes, to_camera)
    if objects is not None and objects.valid:
      self._objects(d, objects.fairObjects, to_camera)
    if depth is not None:
      self.depth = (frame_id, depth)
    if self.depth is not None and 0 <= frame_id - self.depth[0] <= HELD and self.depth[1].valid:
      m = self.depth[1].fairDepth
      self._inset(image, d, depth_from_message(m), "depth, m" if m.metric else "depth, relative: its scale is not known")
    self._header(d, frame_id, [e for e in (seg, depth, objects, lanes) if e is not None])
    for old in [k for k in self.by_frame if k <= frame_id]:
      del self.by_frame[old]
    return np.asarray(image)

  def _picture(self, px: np.ndarray, to_camera: np.ndarray) -> np.ndarray:
    """(N, 2) view pixels -> (N, 2) picture pixels."""
    p = np.concatenate([px, np.ones((len(px), 1))], axis=1) @ to_camera.T
    return p[:, :2] / p[:, 2:] * self.scale

  def _masks(self, picture: np.ndarray, m: Any, x: np.ndarray, y: np.ndarray, inside: np.ndarray) -> None:
    for o in m.objects:
      mask = mask_from_message(o)
      if mask is not None:
        at = inside & mask[y * mask.shape[0] // VIEW_H, x * mask.shape[1] // VIEW_W]
        picture[at] = (picture[at] * (1 - TINT) + np.array(colour_of(o.trackId)) * TINT).astype(np.uint8)

  def _objects(self, d: ImageDraw.ImageDraw, m: Any, to_camera: np.ndarray) -> None:
    """Boxes, thin where the object is out of sight, with identity, class, distance with its standard deviation, and what is seen of it."""
    for o in m.objects:
      b, colour = list(o.box), colour_of(o.trackId)
      corners = self._picture(np.array([[b[0], b[1]], [b[2], b[1]], [b[2], b[3]], [b[0], b[3]]]), to_camera)
      d.line([tuple(c) for c in [*corners.tolist(), corners[0].tolist()]], fill=colour, width=1 if o.occluded else 3)
      text = f"{o.trackId} {m.classes[o.classId]}" + (f" {o.position[0]:.0f} \u00b1{o.positionStd[0]:.0f} m" if len(o.position) else "")
      if o.visibility == 0:
        text = f"{o.trackId} hidden"   # there are many, far away, on one spot
      elif o.visibility < 1:
        text += f" {100 * o.visibility:.0f} % seen"
      d.text((corners[0, 0], corners[0, 1] - 2), text, fill=colour, font=self.font, anchor="lb", stroke_width=2, stroke_fill=(0, 0, 0))

  def _lanes(self, d: ImageDraw.ImageDraw, m: Any, to_camera: np.ndarray) -> None:
    """Points, hollow where they are not visible, and each line's curve."""
    ground = None
    for line in m.lines:
      colour = colour_of(line.lineId)
      if len(line.roadX) > 1 and len(line.fit) == 4:
        ground = ground or view_ground("medmodel", line.roadZ[0])
        ahead = np.linspace(min(line.roadX), max(line.roadX), 30)
        px = ground.view(np.stack([ahead, on_line(np.array(list(line.fit)), ahead), np.full(30, ground.height)], axis=1))
        d.line([tuple(c) for c in self._picture(px, to_camera).tolist()], fill=colour, width=max(1, round(3 * line.prob)))
        near = self._picture(px[:1], to_camera)[0]
        d.text((min(max(near[0], 4), self.size[0] - 60), min(near[1], self.size[1] - 3 * self.font_size)), f"{line.lineId}: {line.prob:.2f}", fill=colour,
               font=self.font, stroke_width=2, stroke_fill=(0, 0, 0))
      for (u, v), seen in zip(self._picture(np.stack([list(line.x), list(line.y)], axis=1), to_camera).tolist(), line.visibility, strict=True):
        d.ellipse((u - 3, v - 3, u + 3, v + 3), fill=colour if seen >= 0.5 else None, outline=colour)

  def _lane_lines(self, d: ImageDraw.ImageDraw, m: Any, intrinsics: np.ndarray) -> None:
    for line, prob in zip(m.laneLines, m.laneLineProbs, strict=False):
      if prob < 0.3:
        continue
      px, z = project(np.stack([list(line.x), list(line.y), list(line.z)], axis=1), intrinsics, rot_from_euler(self.rpy))
      points = [(float(a * self.scale), float(b * self.scale)) for (a, b), depth in zip(px, z, strict=True) if 2 < depth < 100]
      if len(points) > 1:
        d.line(points, fill=(255, 255, 255), width=max(1, round(2 * prob)))

  def _inset(self, image: Image.Image, d: ImageDraw.ImageDraw, z: np.ndarray, title: str) -> None:
    w = self.size[0] // 4
    h = w * z.shape[0] // z.shape[1]
    at = (self.size[0] - w - 8, self.font_size + 16)
    image.paste(Image.fromarray(depth_picture(z)).resize((w, h), Image.Resampling.NEAREST), at)
    d.rectangle((at[0] - 1, at[1] - 1, at[0] + w, at[1] + h), outline=(255, 255, 255))
    d.text((at[0] + 4, at[1] + 2), title, fill=(255, 255, 255), font=self.font, stroke_width=2, stroke_fill=(0, 0, 0))
    bar = Image.fromarray(TURBO[None].repeat(8, 0)).resize((w, 8))
    image.paste(bar, (at[0], at[1] + h + 3))
    for metres in (2, 5, 10, 20, 50, 120):
      k = np.log(metres / NEAR) / np.log(FAR / NEAR)
      d.text(
        (at[0] + k * (w - 14), at[1] + h + 12),
        f"{metres}",
        fill=(255, 255, 255),
        font=self.font,
        anchor="lt" if metres < 120 else "mt",
        stroke_width=2,
        stroke_fill=(0, 0, 0),
      )

  def _header(self, d: ImageDraw.ImageDraw, frame_id: int, events: list[Any]) -> None:
    parts = [f"frame {frame_id}"]
    if "carState" in self.latest:
      parts.append(f"{self.latest['carState'].carState.vEgo * 3.6:.0f} km/h")
    if events:
      m = getattr(events[0], events[0].which())
      parts += [m.bundle, f"{m.modelExecutionTime * 1e3:.1f} ms", "valid" if all(e.valid for e in events) else "INVALID"]
    else:
      parts.append("no fair message of this frame")
    if "fairState" in self.latest:
      s = self.latest["fairState"].fairState
      parts.append(f"drops {s.framesDropped} of {s.framesReceived}")
      if s.fault:
        parts.append(f"fault: {s.fault[:60]}")
    d.rectangle((0, 0, self.size[0], self.font_size + 10), fill=(0, 0, 0))
    d.text((8, 4), "   ".join(parts), fill=(255, 255, 255), font=self.font)
    names = {**COLOURS, "openpilot's lane lines": (255, 255, 255)}
    for i, (name, colour) in enumerate(names.items()):
      d.text((8 + i * self.font_size * 7, self.size[1] - self.font_size - 8), name, fill=colour, font=self.font, stroke_width=2, stroke_fill=(0, 0, 0))


def overlay_frames(logs: list[Path], segments: list[Segment], camera: str, start: float = 0.0) -> Iterator[tuple[int, np.ndarray, bool]]:
  """(frame id, annotated picture, has fair messages) of every frame of the video from the first with fair messages to the last."""
  events = sorted((e for path in logs for e in LogReader([path], services=LOGGED)), key=lambda e: e.logMonoTime)  # logs of the same time: not one stream
  about = {getattr(e, e.which()).frameId for e in events if e.which() in ABOUT}
  if not about:
    raise UserError(f"no fair messages in {', '.join(map(str, logs))}; run fairmodeld beside a replay and record it, or process-replay the route")
  overlay: Overlay | None = None
  # a message about a frame comes after it, so all of those are handed over first; the others by time
  timed = [e for e in events if e.which() not in (*ABOUT, "modelV2")]
  k = 0
  for entry, rgb in frames(segments, camera, start, "rgb24"):
    if entry.frame_id < min(about):
      continue
    if entry.frame_id > max(about):
      return
    if overlay is None:
      overlay = Overlay(rgb.shape[1], rgb.shape[0], camera == "wide")
      for e in events:
        if (
          e.which() in (*ABOUT, "modelV2")
          or (e.which() in ("extrinsicsCalibration", "deviceState", "narrowRoadCameraState")
          and e.logMonoTime <= entry.timestamp_eof)
        ):
          overlay.message(e)
    while k < len(timed) and timed[k].logMonoTime <= entry.timestamp_eof:
      overlay.message(timed[k])
      k += 1
    yield entry.frame_id, overlay.draw(rgb, entry.frame_id), entry.frame_id in about


def show(
  logs: list[Path], segments: list[Segment], camera: str, out: Path, limit: int | None = None, start: float = 0.0, keep: int = 0
) -> tuple[int, list[np.ndarray]]:
  """Writes out (.mp4, H.264) atomically. Returns how many frames, and `keep` of them, evenly spread."""
  n, kept = 0, []
  with atomic_path(out) as tmp, contextlib.ExitStack() as stack:
    video: VideoWriter | None = None
    for _, picture, _ in tqdm(overlay_frames(logs, segments, camera, start), desc="overlay", unit="frame", total=limit):
      if video is None:
        video = stack.enter_context(VideoWriter(tmp, picture.shape[1], picture.shape[0]))
      video.write(picture)
      if keep and n % 10 == 5:
        kept.append(picture)
      n += 1
      if limit is not None and n >= limit:
        break
    if video is None:
      raise UserError(f"the video of {segments[0].route} shows none of the frames that the log's fair messages are about; is it the same route?")
  step = max(1, len(kept) // keep) if keep else 1
  return n, kept[step // 2 :: step][:keep] if keep else []


def main() -> None:
  p = argparse.ArgumentParser(prog="show", description=__doc__)
  p.add_argument("log", type=Path, nargs="+", help="log with fair messages, from record, process-replay or the demo")
  p.add_argument("--route", required=True, help="the route that was replayed: its video, and where the log has none its calibration and speed")
  p.add_argument("--data-dir", type=Path)
  p.add_argument("--camera", choices=CAMERAS, default="road")
  p.add_argument("--out", type=Path, default=Path("out/overlay.mp4"))
  p.add_argument("--frames", type=int, help="at most so many")
  args = p.parse_args()
  segments = Route(args.route, args.data_dir).segments
  camera = choose_camera(segments, args.camera)
  logs = list(args.log)
  if not any(True for _ in LogReader(logs, services=["carState"])):  # fair messages alone: the rest comes from the route
    logs += [s.log_path for s in segments if s.log_path is not None]
  n, _ = show(logs, segments, camera, args.out, args.frames)
  print(f"{args.out}: {n} frames")


if __name__ == "__main__":
  raise SystemExit(cli(main)())

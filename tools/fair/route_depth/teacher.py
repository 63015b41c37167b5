"""The drive itself as a teacher of metric depth: flow between two frames that the log's own motion puts meters apart,
the road plane at the calibrated height, radar's lead, the sky.

Only what is sure is told; what moves by itself, and what nobody is sure of, is 0. Nothing is learned: the networks it
asks give flow, and say what is road and what may move."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from openpilot.tools.fair.cotracker.tracker import LaneTracker
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.route_depth import fuse
from openpilot.tools.fair.route_depth.drive import Drive, camera_from_calib, read_drive
from openpilot.tools.fair.route_depth.helpers import Helpers
from openpilot.tools.fair.teacher import Clip, Entry, Label, Labels, State, Teacher, check_least, hash_weights
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.route import Segment

STRIDE = 4  # pixels of a cell
WIDTH = 640  # pixels of the picture, at most: of comma's road cameras that is the view's resolution
BACK = 1.0  # s to the earlier frame, at most
TURN = 0.01  # rad: more, and the earlier frame is turned to look where this one looks, before flow is asked
LEAST_WAY = 0.3  # of the way wanted: less, and there is no flow to speak of
VERSION = 1  # of the rules of fuse.py and geometry.py: to be raised with them, as it is in the labels' key


class RouteDepthTeacher:
  """way: meters driven between the two frames, about. near, far: meters, beyond which nothing is told; sure: least, as
  a share: a standard deviation above it is not sure. detector, roads, scenes: teachers that are asked for boxes, for
  road, and for classes of every pixel (sky, what moves); 'none': not asked."""

  stateful, ASKS_OTHERS, sees = True, True, "picture"
  whole = False

  def __init__(
    self,
    name: str,
    entry: Entry,
    path: Path | None,
    way: float = 3.0,
    near: float = 2.0,
    far: float = 80.0,
    sure: float = 0.15,
    iters: int = 12,
    detector: str = "yolox-nano",
    roads: str = "road-segmentation-adas",
    scenes: str = "none",
    device: str | None = None,
    load: Callable[..., Teacher] = load_teacher,
  ):
    assert path is not None
    check_least(name, 0.1, way=way, near=near, far=far - near, sure=10 * sure)
    check_least(name, 1, iters=iters)
    self.name, self.license, self.model_id = name, entry.license, path.name
    self.way, self.near, self.far, self.sure = way, near, far, sure
    self.flow = LaneTracker(path, device, "float32", iters)
    self.helpers = Helpers(name, partial(load, device=device if device == "cpu" else None), detector, roads, scenes)
    self.checkpoint_hash = self.helpers.hash(hash_weights(path))
    self.license = self.helpers.license(entry.license)
    self.model_id = " + ".join([path.name, *(t.model_id for t in self.helpers.all)])
    self.labels: list[Label] = []
    self.encoded: dict[int, Any] = {}  # time -> what flow needs of that frame
    self.told = np.zeros(6, np.int64)  # frames, frames with flow, cells, of which told, as farther than all, put apart

  def settings(self) -> dict[str, Any]:
    own = {k: getattr(self, k) for k in ("way", "near", "far", "sure")}
    return {**own, "iters": self.flow.iters, "rules": VERSION, "asked": self.helpers.settings()}

  def picture_size(self, width: int, height: int) -> tuple[int, int]:
    scale = min(1.0, WIDTH / width)
    return round(width * scale), round(height * scale)

  def prepare(self, height: int, width: int) -> None:
    self.helpers.prepare(height, width, self.whole)
    shape = height // STRIDE, width // STRIDE
    if min(shape) < 16:
      raise UserError(f"teacher '{self.name}': {width}x{height} pixels are too few for flow; give larger pictures")
    self.labels = [Label("depth", "dense", "float16", shape, "m"), Label("depth_std", "dense", "float16", shape, "std")]

  def check(self, segment: Segment) -> None:
    """Raises UserError where there is no log, or none that tells the car's way."""
    if segment.log_path is None:
      raise UserError(
        f"teacher '{self.name}' reads the car's way from the log, and segment {segment.name} in {segment.dir} has "
        "none; leave this teacher out"
      )
    if not read_drive(segment.log_path).source:
      raise UserError(
        f"teacher '{self.name}': the log of segment {segment.name} has neither cameraOdometry nor livePose; leave this "
        "teacher out"
      )

  def source(self, segment: Segment) -> dict[str, Any]:
    """What of a segment's log its labels are made of, for their key."""
    assert segment.log_path is not None
    drive = read_drive(segment.log_path)
    return {"motion": drive.source, "height": drive.height, "drive": drive.hash}

  def label(self, clip: Clip, state: State | None = None) -> tuple[Labels, State | None]:
    """clip.rgb (T, 3, H, W) of one segment, in order -> depth (T, h, w) meters along the camera's axis, inf what is
    farther than all, 0 unknown; depth_std (T, h, w) its standard deviation as a share, 0 unknown."""
    assert clip.log_path is not None and clip.intrinsics is not None and clip.rpy is not None
    drive, asked = read_drive(clip.log_path), self.helpers.ask(clip)
    frames = [] if state is None else list(zip(state["times"].tolist(), state["frames"], strict=True))
    shape = self.labels[0].shape
    depth, std = (np.zeros((len(clip.rgb), *shape), np.float16) for _ in range(2))
    to_camera = camera_from_calib(clip.rpy, self.whole)
    height, width = clip.rgb.shape[2:]
    grid = fuse.make_grid(height, width, STRIDE, clip.intrinsics, to_camera @ [0.0, 0.0, 1.0], drive.height)
    for i, (time, frame) in enumerate(zip(clip.times, clip.rgb, strict=True)):
      frames = [f for f in frames if 0 < time - f[0] <= BACK * 1e9]
      found = self._flow(drive, grid, clip.rpy, frames, time, frame, asked.still(grid, i))
      depth[i], std[i] = self._told(drive, grid, found, asked, i, time, to_camera)
      frames.append((time, np.ascontiguousarray(frame)))
    self.encoded = {t: x for t, x in self.encoded.items() if any(t == f[0] for f in frames)}
    kept = {"times": np.array([t for t, _ in frames], np.int64), "frames": np.stack([f for _, f in frames])}
    return {"depth": depth, "depth_std": std}, kept

  def _encode(self, time: int, frame: np.ndarray) -> Any:
    if time not in self.encoded:
      self.encoded[time] = self.flow.encode(frame)
    return self.encoded[time]

  def _flow(
    self,
    drive: Drive,
    grid: fuse.Grid,
    rpy: np.ndarray,
    frames: list[tuple[int, np.ndarray]],
    time: int,
    frame: np.ndarray,
    still: np.ndarray,
  ) -> fuse.Inverse | None:
    """Inverse depth by flow to the newest of the earlier frames that is `way` meters back, else the farthest."""
    ways = [drive.way(time, t) for t, _ in frames]
    far = [k for k, w in enumerate(ways) if w >= self.way]
    at = max(far) if far else 0
    if not frames or not ways[at] >= LEAST_WAY * self.way or np.array_equal(frames[at][1], frame):
      return None
    move = drive.move(time, frames[at][0], rpy, self.whole)
    if move is None:
      return None
    before, own = self._encode(*frames[at]), np.eye(3)
    if np.linalg.norm(cv2.Rodrigues(move.R)[0]) > TURN:
      turned, move, own = fuse.turned_back(frames[at][1], grid, move)
      before = self.flow.encode(turned)
    with torch.inference_mode():
      both = self.flow.model.flow_both(self._encode(time, frame), before, self.flow.iters)
      forth, back = (f.cpu().numpy() for f in both)
    flow = fuse.sampled(forth, grid.px)
    missed = np.linalg.norm(flow + fuse.sampled(back, grid.px + flow), axis=-1)
    missed[fuse.outside(grid.px + flow, own, *frame.shape[1:])] = np.nan
    gray = cv2.cvtColor(np.ascontiguousarray(frame.transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY)
    return fuse.from_flow(grid, flow, missed, move, still, fuse.texture(gray, grid))[0]

  def _told(
    self, drive: Drive, grid: fuse.Grid, flow: fuse.Inverse | None, asked: Any, i: int, time: int, to_camera: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """One frame's depth and its standard deviation, as they are stored."""
    found = flow if flow is not None else fuse.Inverse.nothing(grid.shape)
    # farther than all, by flow or as a class: above the road's horizon, where nothing drives along
    above = grid.rays @ grid.down < 0
    with np.errstate(invalid="ignore"):
      beyond = above & (found.rho + 2 * found.std < 1 / self.far)
    beyond |= asked.sky(grid, i)
    on_road, _ = fuse.from_plane(grid, asked.road(grid, i), found)
    both = fuse.together(found, on_road)
    apart = np.isfinite(found.std) & np.isfinite(on_road.std) & ~np.isfinite(both.std)
    lead = drive.lead(time)
    if lead is not None:
      fuse.put_lead(both, grid, asked.vehicles(i), *lead, to_camera)
    with np.errstate(divide="ignore", invalid="ignore"):
      z, share = 1 / both.rho, both.std / both.rho
      good = (z >= self.near) & (z <= self.far) & (share <= self.sure) & ~beyond
    depth = np.where(good, z, np.where(beyond, np.inf, 0))
    self.told += [1, flow is not None, depth.size, good.sum(), beyond.sum(), apart.sum()]
    return depth.astype(np.float16), np.where(good, share, 0).astype(np.float16)

  def report(self) -> list[str]:
    """What share of the pixels was told, of the frames of this run."""
    frames, flow, cells, told, beyond, apart = self.told.tolist()
    if not cells:
      return []
    line = f"of {frames} frames, {flow} with flow, {told / cells:.1%} of the pixels are told in meters, "
    line += f"{beyond / cells:.1%} as farther than {self.far:g} m; {apart / cells:.1%} were left out, as flow and the "
    return [line + "road plane contradict each other"]

"""CoTracker 2 and 3 (Karaev et al., 2024) through the project's own package, which its users install: it and its
checkpoints are CC-BY-NC-4.0.

The official predictors do the tracking: pictures of 384x512, six rounds, their thresholds. Around them: windows over
videos of any length. A point is asked for where it was first seen as long as the window holds that frame, and from then
on where it was last seen."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openpilot.tools.fair.cotracker.lane_points import inside
from openpilot.tools.fair.cotracker.tracker import Points, PointTeacher, Rows, check_video
from openpilot.tools.learn.device import choose_device
from openpilot.tools.fair.dinov2.pth import read_state
from openpilot.tools.fair.teacher import Clip, Entry, Labels, State, find_weights
from openpilot.tools.lib.errors import UserError

WEIGHTS = {"offline": "scaled_offline.pth", "online": "scaled_online.pth", "v2": "cotracker2.pth"}
PUBLISHED = {
  60: "offline",
  16: "online",
}  # frames that the published checkpoints of CoTracker 3 have learned from: nothing else tells them apart
INSTALL = "pip install git+https://github.com/facebookresearch/co-tracker"
MIN_WINDOW = 24  # frames; below, a point that was covered for a moment is lost


def carry(
  queries: np.ndarray, tracks: np.ndarray, visible: np.ndarray, first: int, start: int
) -> tuple[np.ndarray, np.ndarray]:
  """queries (N, 3): frame, x, y. tracks (T, N, 2) and visible (T, N) of the frames from `first` on -> queries for a
  window that begins with frame `start`: what lies before it is asked for again where the point was last seen; and (N,)
  bool, whether it was seen since."""
  queries = queries.copy()
  there = queries[:, 0] >= start
  for n in np.flatnonzero(~there):
    seen = np.flatnonzero(visible[:, n] & (first + np.arange(len(tracks)) >= start))
    if len(seen):
      queries[n], there[n] = (first + seen[-1], *tracks[seen[-1], n]), True
  return queries, there


class CoTracker:
  """mode: 'offline', 'online' (CoTracker 3) or 'v2'. weights: its checkpoint, looked for as every teacher's where not
  given. window: at most so many frames are looked at together, where the video is not streamed; as many as the
  checkpoint has learned from, where not given.

  Raises UserError where the package is not installed, or the checkpoint is of another mode."""

  def __init__(
    self,
    mode: str = "offline",
    weights: str | Path | None = None,
    device: str | None = None,
    precision: str | None = None,
    window: int | None = None,
  ):
    if mode not in WEIGHTS:
      raise UserError(f"CoTracker has no mode '{mode}'; {', '.join(WEIGHTS)}")
    try:
      with torch.random.fork_rng(devices=[]):  # the package seeds everybody's random numbers where it is imported
        from cotracker.predictor import CoTrackerOnlinePredictor, CoTrackerPredictor
    except ImportError as e:
      raise UserError(f"CoTracker needs its project's package ({e}); {INSTALL}") from None
    self.mode, self.path = mode, find_weights(WEIGHTS[mode], weights)
    state = read_state(self.path, "CoTracker checkpoint")
    state = state.get("model", state)
    if not isinstance(state, dict) or "time_emb" not in state or ("corr_mlp.fc1.weight" in state) == (mode == "v2"):
      raise UserError(
        f"{self.path} is no checkpoint of CoTracker {'2' if mode == 'v2' else '3'}; give {WEIGHTS[mode]} of its "
        "project, or name another teacher"
      )
    learned = int(state["time_emb"].shape[1])
    if mode != "v2" and PUBLISHED.get(learned, mode) != mode:
      other = PUBLISHED[learned]
      raise UserError(
        f"{self.path} is the {other} checkpoint, this is CoTracker {mode}; take teacher cotracker3-{other} or give "
        "another file"
      )
    with torch.random.fork_rng(devices=[]):
      self.predictor = CoTrackerPredictor(None, offline=mode == "offline", v2=mode == "v2", window_len=learned)
      self.streamer = None if mode == "offline" else CoTrackerOnlinePredictor(None, v2=mode == "v2", window_len=learned)
    model = self.predictor.model
    try:
      model.load_state_dict(state)
    except RuntimeError as e:
      why = str(e).splitlines()[-1].strip()[:160]
      raise UserError(
        f"{self.path} does not fit the package's CoTracker {mode}: {why}; the package and the file must be of one "
        "version"
      ) from None
    self.where = choose_device(device, precision or "float32")
    model.eval().requires_grad_(False).to(self.where.device)
    if self.streamer is not None:
      self.streamer.model = model
    self.learned = learned
    self.window = window or (learned if mode == "offline" else max(MIN_WINDOW, learned))
    if self.window < 3:
      raise UserError(f"a window of {self.window} frames is too short; 3 at least")

  def _tensor(self, frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames)).to(self.where.device).float()[None]

  def _autocast(self) -> torch.autocast:
    return torch.autocast(self.where.device.type, dtype=self.where.dtype, enabled=self.where.dtype != torch.float32)

  @torch.inference_mode()
  def follow(self, frames: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """frames (T, 3, H, W) uint8, all at once. queries (N, 3): frame, x, y -> tracks (T, N, 2) float32, visible (T, N)
    bool: the official predictor's, and nothing outside the picture is visible. What it says of the frames before a
    query is not to be used."""
    count = len(frames)
    if not len(queries):
      return np.zeros((count, 0, 2), np.float32), np.zeros((count, 0), bool)
    if self.mode != "offline" and count < self.learned:  # the official forward then skips windows, and answers zeros
      frames = np.concatenate([frames, np.repeat(frames[-1:], self.learned - count, axis=0)])
    with self._autocast():
      tracks, visible = self.predictor(
        self._tensor(frames), queries=torch.from_numpy(queries).to(self.where.device).float()[None]
      )
    return self._arrays(tracks[:, :count], visible[:, :count], frames)

  @staticmethod
  def _arrays(tracks: torch.Tensor, visible: torch.Tensor, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    xy, seen = tracks[0].float().cpu().numpy(), visible[0].cpu().numpy()
    return xy, seen & inside(xy.reshape(-1, 2), *frames.shape[2:]).reshape(seen.shape)

  @torch.inference_mode()
  def stream(self, frames: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The official online predictor over all frames, a window of them at a time: tracks (T, N, 2) float32, visible (T,
    N) bool."""
    assert self.streamer is not None
    step = self.learned // 2
    queries = torch.from_numpy(np.c_[np.zeros(len(points)), points]).to(self.where.device).float()[None]
    with self._autocast():
      self.streamer(self._tensor(frames[:1]), is_first_step=True, queries=queries)
      for at in range(0, max(len(frames) - step, 1), step):
        tracks, visible = self.streamer(self._tensor(frames[at : at + 2 * step]))
    return self._arrays(tracks, visible, frames)

  def track_lane_points(self, video: Any, lane_points: Any) -> tuple[Any, Any]:
    """video (T, 3, H, W) uint8 RGB and lane_points (N, 2) in its first frame, x and y in pixels -> tracks (T, N, 2)
    float32 and visible (T, N) bool; tensors for a tensor, else arrays. Online and v2: the official streaming, whatever
    the length. Offline: the official predictor up to `window` frames, beyond that windows that overlap by half; a point
    unseen in a whole overlap is lost, and stays invisible at the last place where it was seen. Raises UserError on
    other shapes."""
    frames, points = check_video(video, lane_points)
    if self.streamer is not None and len(points):
      tracks, visible = self.stream(frames, points)
    else:
      tracks, visible = self._windows(frames, points)
    tracks[0], visible[0] = points, inside(points, *frames.shape[2:])
    return (torch.from_numpy(tracks), torch.from_numpy(visible)) if torch.is_tensor(video) else (tracks, visible)

  def _windows(self, frames: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tracks, visible = np.zeros((len(frames), len(points), 2), np.float32), np.zeros((len(frames), len(points)), bool)
    queries, alive = np.c_[np.zeros(len(points)), points], np.arange(len(points))
    done, start, stop = 0, 0, min(self.window, len(frames))
    while True:
      xy, seen = self.follow(frames[start:stop], queries - [start, 0, 0])
      tracks[done:stop, alive], visible[done:stop, alive] = xy[done - start :], seen[done - start :]
      if stop == len(frames):
        return tracks, visible
      done, start, stop = stop, start + self.window // 2, min(stop + self.window // 2, len(frames))
      queries, there = carry(queries, tracks[:done, alive], visible[:done, alive], 0, start)
      for n in alive[~there]:
        last = np.flatnonzero(visible[:done, n])
        tracks[done:, n] = tracks[last[-1] if len(last) else 0, n]
      queries, alive = queries[there], alive[there]


@dataclass
class Queried(Points):
  """Points, and where each is asked for: frame of the video, x, y."""

  queries: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))

  @classmethod
  def of_state(cls, state: State | None) -> "Queried":
    return (
      cls()
      if state is None
      else cls(state["xy"], state["track"], state["age"], state["cls"], int(state["next_track"]), state["queries"])
    )

  def state(self, **more: np.ndarray) -> State:
    return super().state(queries=self.queries, **more)

  def keep(self, which: np.ndarray) -> None:
    super().keep(which)
    self.queries = self.queries[which]


class CoTrackerTeacher(PointTeacher):
  """New points start on the first frame and on the last one of every `hop` frames of the video; after these a window
  ends that holds what went before, too. No label looks further ahead than that.

  A clip that ends at a multiple of `hop` frames makes no difference to any label. One that ends between makes its last
  labels, those behind the last such multiple, from what was there; all that follow are as they would have been. A
  track's rows go on while it is covered (visible says so); they end at `max_age`, with the frame in which the point
  leaves the picture, or where the next window would hold no frame in which it was seen. window, device, precision: of
  CoTracker; the rest: of PointTeacher."""

  FIXED = ("mode",)  # the registry's weights are of one mode

  def __init__(
    self,
    name: str,
    entry: Entry,
    path: Path | None,
    mode: str,
    device: str | None = None,
    precision: str | None = None,
    window: int | None = None,
    hop: int = 8,
    **options: Any,
  ):
    super().__init__(name, entry, path, device=device, **options)
    self.tracker = CoTracker(mode, path, device, precision, window)
    self.hop = hop
    if not 2 <= hop < self.tracker.window:
      raise UserError(
        f"teacher '{name}': hop is {hop}; at least 2, and less than the window of {self.tracker.window} frames"
      )

  def settings(self) -> dict[str, Any]:
    return {
      **super().settings(),
      "mode": self.tracker.mode,
      "window": self.tracker.window,
      "hop": self.hop,
      "precision": self.tracker.where.precision,
    }

  def _start(self, points: Queried, clip: Clip, i: int, frame: int, rows: Rows) -> None:
    added = self.seed(points, clip, i)
    if added:
      points.queries = np.concatenate([points.queries, np.c_[np.full(added, frame), points.xy[-added:]]])
      rows.add(i, points.xy[-added:], points.track[-added:], np.ones(added, bool), points.cls[-added:])

  def label(self, clip: Clip, state: State | None = None) -> tuple[Labels, State | None]:
    """clip.rgb (T, 3, H, W) -> {'points': table}, and the state behind the clip: points as of the last whole `hop`, and
    the frames that are still needed."""
    rows = Rows()
    if not len(clip.rgb):
      return {"points": rows.table()}, state
    points = Queried.of_state(state)
    first, frames = 0, clip.rgb  # number of frames[0] in the video
    if state is not None:
      if state["frames"].shape[1:] != clip.rgb.shape[1:]:
        size, before = clip.rgb.shape[2:], state["frames"].shape[2:]
        raise UserError(
          f"the frames are {size[1]}x{size[0]}, those before were {before[1]}x{before[0]}; begin again with these "
          "frames"
        )
      first, frames = int(state["first"]), np.concatenate([state["frames"], clip.rgb])
    begin, end = first + len(frames) - len(clip.rgb), first + len(frames)
    if begin == 0:
      self._start(points, clip, 0, 0, rows)
    now = begin
    while now < end:
      whole = (now // self.hop + 1) * self.hop
      stop = min(whole, end)
      self._advance(points, frames[: stop - first], first, begin, now, rows)
      if stop == whole:
        self._start(points, clip, stop - 1 - begin, stop - 1, rows)
      now = stop
    keep = self._window_start(now // self.hop)
    return {"points": rows.table()}, points.state(
      frames=np.ascontiguousarray(frames[keep - first :]), first=np.array(keep)
    )

  def _window_start(self, cell: int) -> int:
    return max(0, (cell + 1) * self.hop - self.tracker.window)

  def _advance(self, points: Queried, frames: np.ndarray, first: int, begin: int, now: int, rows: Rows) -> None:
    """Adds the rows of the frames from `now` on, and moves the points on if a whole hop ends with `frames`. Counted in
    the video: first, frames[0]; begin, the clip's first frame."""
    end, cell = first + len(frames), now // self.hop
    start, since = (
      self._window_start(cell),
      max(cell * self.hop - 1, 0),
    )  # since: the frame that the points' xy and age are of
    if not len(points.track) or end - 1 == since:
      return
    xy, seen = self.tracker.follow(frames[start - first :], points.queries - [start, 0, 0])
    out = ~inside(xy[since + 1 - start :].reshape(-1, 2), *frames.shape[2:]).reshape(-1, len(points.track))
    age = points.age + np.arange(1, end - since)[:, None]
    there = (age < self.max_age) & (np.cumsum(out, axis=0) - out == 0)
    for f in range(max(now, since + 1), end):
      on = there[f - since - 1]
      rows.add(f - begin, xy[f - start, on], points.track[on], seen[f - start, on], points.cls[on])
    if end == (cell + 1) * self.hop:
      points.xy, points.age = xy[-1].astype(np.float64), age[-1]
      points.queries, known = carry(points.queries, xy, seen, start, self._window_start(cell + 1))
      points.keep(known & ~out.any(axis=0) & (points.age + 1 < self.max_age))

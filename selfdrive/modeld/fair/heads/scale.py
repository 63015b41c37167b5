"""Meters for a student that knows depth only up to one scale: the road plane under the calibrated camera, and the way
driven past tracked points, say which.

Both witnesses are heard at once, weighed by their variances in a filter of one number, the logarithm of the scale.
Depths are along the view's optical axis, which the warp has laid along the car, so over the way s a point on the road
comes s nearer."""

from dataclasses import replace

import numpy as np

from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W
from openpilot.selfdrive.modeld.fair.heads.depth import Depth, map_centers
from openpilot.selfdrive.modeld.fair.heads.ground import HEIGHT_STD, PITCH_STD, Ground
from openpilot.selfdrive.modeld.fair.heads.segmentation import Segmentation

NEAR, FAR, LANE = (
  4.0,
  30.0,
  1.5,
)  # m; the plane is looked at from here to there, without a segmentation so far to either side
MIN_PIXELS = 20
MAX_SPREAD = 0.3  # of the logarithms: more, and what is looked at is no plane
WAY, MAX_WAY = 5.0, 12.0  # m driven between two looks at a point: least; most, then it is looked at anew
MIN_POINTS = 4
# of the way: a point that comes nearer on the road plane by so much more or less slides along its line, and is not
# believed
SLIP = 0.25
DRIFT = 0.1  # of the scale, per square root of a second
MAX_STD = 0.3  # with a vaguer scale depth stays relative
STRAY = 4.0  # standard deviations; a witness that far off is believed that much less
MAX_STEP = 1.0  # s between two frames; more is a gap


class DepthScale:
  """The scale of one student. Each frame: drive(), then meters() of its depth, then points() of what it tracks."""

  def __init__(self) -> None:
    self.reset()

  def reset(self) -> None:
    """Forgets the scale, e.g. as another camera is another student's picture."""
    self.log, self.var = 0.0, np.inf
    self.way = 0.0  # m driven
    self.last: int | None = None  # ns
    self.relative: Depth | None = None  # of the frame at hand, as the student gave it
    # of each point slot when it was first looked at: its relative depth, its distance on the road plane, and the way
    # driven then; nan before
    self.first, self.ahead, self.since = np.zeros((3, 0))

  @property
  def known(self) -> bool:
    return self.var < MAX_STD**2

  @property
  def listens(self) -> bool:
    """Whether points can say anything of this frame: its depth is there, and not meters already."""
    return self.relative is not None

  def drive(self, timestamp: int, speed: float | None) -> None:
    """A frame of timestamp, ns, with the car's speed, m/s, None where nobody tells it: then points say nothing."""
    dt = 0.0 if self.last is None else (timestamp - self.last) * 1e-9
    self.last, self.relative = timestamp, None
    if speed is None or not 0 <= dt <= MAX_STEP or not 0 <= speed < 100:  # nan too
      self.since[:] = np.nan
    else:
      self.way += speed * dt
    self.var += DRIFT**2 * min(max(dt, 0.0), 60.0)

  def meters(self, depth: Depth, ground: Ground, segmentation: Segmentation | None) -> Depth:
    """This frame's depth, in meters once the scale is known; what is metric already comes back as it is. segmentation:
    the newest there is."""
    if depth.metric:
      return depth
    self.relative = depth
    self._hear(*plane_scale(depth.z, ground, segmentation))
    if not self.known:
      return replace(depth, scale=0.0)
    scale = float(np.exp(self.log))
    return Depth(depth.z * np.float32(scale), True, scale, float(np.sqrt(self.var)))

  def points(self, points: np.ndarray, sure: np.ndarray, fresh: np.ndarray, ground: Ground) -> None:
    """points: (N, 2) view pixels of point slots in this frame; sure: (N,) bool, in use and visible; fresh: (N,) bool,
    not the point of the frame before."""
    if self.relative is None:
      return
    if len(self.first) != len(points):
      self.first, self.ahead, self.since = np.full((3, len(points)), np.nan)
    now, ahead = sample(self.relative, points), ground.road(points)[:, 0]
    self.since[fresh] = np.nan
    way, gone = self.way - self.since, self.first - now
    ready = (
      sure & (way >= WAY) & (self.first < np.inf) & (now < np.inf) & (np.abs(self.ahead - ahead - way) < SLIP * way)
    )  # False for nan
    n, total, less = int(ready.sum()), float(way[ready].sum()), float(gone[ready].sum())
    if (
      n >= MIN_POINTS and less > 0
    ):  # one ratio of sums: each point's own would be far off as often as its depth hardly changed
      scale = total / less
      spread = float(np.std(scale * gone[ready] - way[ready])) * np.sqrt(n) / total
      if spread < MAX_SPREAD / 2:
        self._hear(float(np.log(scale)), float(np.hypot(SLIP / 2, spread)))
      self.since[ready & (way >= (WAY + MAX_WAY) / 2)] = np.nan
    begin = sure & np.isfinite(now) & (now > 0) & ~(self.way - self.since <= MAX_WAY)
    self.first[begin], self.ahead[begin], self.since[begin] = now[begin], ahead[begin], self.way

  def _hear(self, log: float, std: float) -> None:
    """One witness: the logarithm of the scale and its standard deviation, inf for nothing. Errors last over frames, so
    none is believed beyond its own."""
    if not np.isfinite(std):
      return
    var = std * std
    if np.isfinite(self.var):
      var *= max(1.0, (log - self.log) ** 2 / (STRAY**2 * (var + self.var)))
    else:
      self.log = log
    gain = 1 / (1 + var / self.var)
    self.log += gain * (log - self.log)
    self.var = max(1 / (1 / self.var + 1 / var), min(self.var, std * std / 2))


def plane_scale(z: np.ndarray, ground: Ground, segmentation: Segmentation | None) -> tuple[float, float]:
  """(H, W) relative depth -> logarithm of the factor that puts what is road onto the road plane, and its standard
  deviation; (0, inf) where no road is seen."""
  h, w = z.shape
  x, y = map_centers(h, w)
  rows = np.flatnonzero((y - ground.cy) * FAR >= ground.f * ground.height)
  rows = rows[(y[rows] - ground.cy) * NEAR <= ground.f * ground.height]
  if not len(rows):
    return 0.0, np.inf
  plane = (ground.f * ground.height / (y[rows] - ground.cy))[:, None]
  classes = () if segmentation is None else segmentation.role("ground", "marking")
  if segmentation is not None and classes:
    mh, mw = segmentation.class_map.shape
    on = np.isin(segmentation.class_map[(rows * mh // h)[:, None], np.arange(w) * mw // w], classes)
  else:
    on = np.abs(x - ground.cx) * plane < LANE * ground.f
  there = z[rows]
  on &= (there > 0) & (there < np.inf)
  if on.sum() < MIN_PIXELS:
    return 0.0, np.inf
  logs = np.log(np.broadcast_to(plane, there.shape)[on] / there[on])
  middle = float(np.median(logs))
  spread = 1.48 * float(np.median(np.abs(logs - middle)))
  if spread > MAX_SPREAD:
    return 0.0, np.inf
  far = float(np.median(np.broadcast_to(plane, there.shape)[on]))
  return middle, float(np.sqrt(HEIGHT_STD**2 + (far / ground.height * PITCH_STD) ** 2 + spread**2 / len(rows)))


def sample(depth: Depth, px: np.ndarray) -> np.ndarray:
  """(N, 2) view pixels -> (N,) float32 depth of the map pixel that each is in; nan outside the map, and where it has
  none."""
  h, w = depth.z.shape
  out = np.full(len(px), np.nan, np.float32)
  x, y = ((px + 0.5) * np.array([w / VIEW_W, h / VIEW_H])).T
  inside = ((x >= 0) & (x < w) & (y >= 0) & (y < h)).nonzero()[0]
  out[inside] = depth.z[y[inside].astype(np.intp), x[inside].astype(np.intp)]
  return out

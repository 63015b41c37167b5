"""Things out of sight: where on the road they were going, and who of them comes back.

What was seen of a thing for two seconds is fitted, once it is lost, by a box that moves over the road with a constant
acceleration; the car's own way is taken out. Its prediction knows how vague it is, so that of all that come into sight
each is told from the others, and from who is new."""

import numpy as np

from openpilot.selfdrive.modeld.fair.heads.ground import Ground

DT = 0.05  # s, of a frame
KEPT = 40  # frames that are remembered of a thing
LEAST = 1  # frames in which it was seen, below which nothing is fitted
# of a detected edge: share of the box's size, pixels. SLACK: within which an occluder's edge may be another's
NOISE, SLACK = (0.035, 0.6), (2.0, 0.05)
OFTEN = 0.35  # share of the frames in which an edge must be free to be believed: an occluder is overlooked at times
# prior standard deviations, along the car and across: speed m/s, acceleration m/s^2, and what is added to it unseen
SPEED, ACCELERATION, UNSEEN = (30.0, 10.0), (0.7, 1.0), (0.7, 0.35)
WIDTH, HEIGHT = (2.0, 1.5), (1.7, 0.6)  # m, mean and deviation
CURVE_RATE = 0.2  # a frame, of the bend that the car drives
BEND = 3.0  # m/s^2, the most that a thing is expected to be pushed aside by the bend that the car drives
ROUNDS, ROBUST = 6, 2.0  # of Gauss-Newton; deviations beyond which an edge counts less
MIN_AHEAD, MAX_SPEED = 2.0, 45.0  # m, m/s
COVERED = 0.5  # sizes, deviation of an edge that is covered
NEW = 4 * np.log(500.0)  # a new thing may be anywhere, and is rare: as if each edge were spread over so many pixels
GATE = 30.0  # squared deviations of the four edges
LOOKS, ALIKE = 6.0, 0.6  # what an embedding's cosine counts for, and where it speaks neither for nor against

ROWS = ("boxes", "seen", "known", "since", "state", "cov")  # of Recall, one a track
P, V, A = slice(0, 2), slice(2, 4), slice(4, 6)  # of the state: place, speed, acceleration, then width and height


def free_edges(boxes: np.ndarray, others: np.ndarray, view: tuple[int, int]) -> np.ndarray:
  """boxes (..., 4), others (..., M, 4) with the same leading axes, nan where there is none -> (..., 4) bool: edges that
  no nearer box, which is one that reaches lower, and no end of the view may have cut."""
  a = boxes[..., None, :]
  with np.errstate(invalid="ignore"):
    side = others[..., 2:] - others[..., :2]
    slack = SLACK[0] + SLACK[1] * np.sqrt(np.maximum(side[..., 0] * side[..., 1], 0))
    shared = np.minimum(a[..., 2:], others[..., 2:]) - np.maximum(a[..., :2], others[..., :2])
    large = shared > 0.3 * (a[..., 2:] - a[..., :2])  # in width, in height
    nearer = others[..., 3] > a[..., 3]
    low, high = others - slack[..., None], others + slack[..., None]
    tall, wide = nearer & large[..., 1], nearer & large[..., 0]
    cut = [
      tall & (low[..., 0] < a[..., 0]) & (high[..., 2] > a[..., 0]),
      wide & (low[..., 1] < a[..., 1]),
      tall & (low[..., 0] < a[..., 2]) & (high[..., 2] > a[..., 2]),
      wide & (low[..., 1] < a[..., 3]),
    ]
  out = ~np.stack([c.any(-1) for c in cut], axis=-1)
  out[..., :2] &= boxes[..., :2] > 1
  out[..., 2:] &= boxes[..., 2:] < np.array([view[1], view[0]]) - 2
  return out


def box_noise(boxes: np.ndarray) -> np.ndarray:
  """(..., 4) -> (...,) deviation of each edge, pixels."""
  sides = np.maximum(boxes[..., 2:] - boxes[..., :2], 1)
  return NOISE[0] * np.sqrt(sides[..., 0] * sides[..., 1]) + NOISE[1]


def believed(free: np.ndarray, seen: np.ndarray) -> np.ndarray:
  """(B, K, 4) which edges nothing covers, (B, K) whether there is a box -> (B, K, 4) which edges a fit uses: those that
  are free often; if none of two that face each other is, whatever is free; if that is nothing, both."""
  count = free.sum(1)
  often = count >= OFTEN * seen.sum(1)[:, None]
  pair = np.array([2, 3, 0, 1])
  neither = ~(often | often[:, pair])
  out = free & (often | neither)[:, None]
  return out | (seen[..., None] & (neither & (count + count[:, pair] == 0))[:, None])


class Course:
  """When and from where things are looked at: (B, K) s, (B, K, 3) the car's x, y, heading, (B, K) curvature of the road
  that x is measured along, 1/m."""

  def __init__(self, time: np.ndarray, pose: np.ndarray, bend: np.ndarray):
    self.t = np.stack([np.ones_like(time), time, time * time / 2], axis=-1)  # (B, K, 3)
    self.at, self.bend = pose[..., :2], bend
    self.c, self.s = np.cos(pose[..., 2]), np.sin(pose[..., 2])


def project(state: np.ndarray, course: Course, ground: Ground) -> tuple[np.ndarray, np.ndarray]:
  """(B, 8) states -> (B, K, 4) edges of boxes, (B, K, 4, 8) their derivatives. One column after the other: of so few
  numbers each array costs more than what is in it."""
  c, s, bend, t = course.c, course.s, course.bend, course.t
  at = t @ state[:, :6].reshape(-1, 3, 2) - course.at
  x = np.maximum(c * at[..., 0] + s * at[..., 1], MIN_AHEAD)
  y = c * at[..., 1] - s * at[..., 0] + bend * x * x / 2
  k, half, high = ground.f / x, 0.5 * state[:, 6:7], state[:, 7:8]
  edges, out = np.empty((*x.shape, 4)), np.zeros((*x.shape, 4, 8))
  edges[..., 0], edges[..., 2] = k * (y - half), k * (y + half)
  edges[..., 1], edges[..., 3] = k * (ground.height - high), k * ground.height
  ahead = -edges / x[..., None]  # by x
  ahead[..., ::2] += (k * (bend * x))[..., None]
  place = np.empty((*x.shape, 4, 2))
  np.multiply(ahead, c[..., None], out=place[..., 0])
  np.multiply(ahead, s[..., None], out=place[..., 1])
  place[..., ::2, 0] -= (k * s)[..., None]  # by y, along which edges of the foot and the top do not move
  place[..., ::2, 1] += (k * c)[..., None]
  np.multiply(place[..., None, :], t[:, :, None, :, None], out=out[..., :6].reshape(*x.shape, 4, 3, 2))
  out[..., 0, 6], out[..., 2, 6], out[..., 1, 7] = -0.5 * k, 0.5 * k, -k
  edges += (ground.cx, ground.cy, ground.cx, ground.cy)
  return edges, out


def along(heading: np.ndarray, deviations: tuple[float, float]) -> np.ndarray:
  """(B,) -> (B, 2, 2) covariance of what is known so well along each heading and across it."""
  c, s = np.cos(heading), np.sin(heading)
  a, b = deviations[0] ** 2, deviations[1] ** 2
  out = np.empty((len(heading), 2, 2))
  out[:, 0, 0], out[:, 1, 1] = a * c * c + b * s * s, a * s * s + b * c * c
  out[:, 0, 1] = out[:, 1, 0] = (a - b) * c * s
  return out


def median(x: np.ndarray) -> np.ndarray:
  """(B, K) -> (B, 1) medians of each row without its nan, nan where there is nothing else: numpy's own look for nan in
  more ways than there is time for."""
  ordered, count = np.sort(x, axis=1), np.isfinite(x).sum(1, keepdims=True)  # nan comes last
  middle = np.maximum(count - 1, 0)
  two = np.take_along_axis(ordered, np.concatenate([middle // 2, np.maximum(count, 1) // 2], axis=1), 1)
  return (two[:, :1] + two[:, 1:]) / 2


def begin(
  boxes: np.ndarray, free: np.ndarray, time: np.ndarray, pose: np.ndarray, bend: np.ndarray, ground: Ground
) -> np.ndarray:
  """Where fit() starts from: the mean place of the first and of the second half of what was seen."""
  high = median(boxes[..., 3] - boxes[..., 1])
  foot = np.where(free[..., 3] > 0, ground.f * ground.height / np.maximum(boxes[..., 3] - ground.cy, 3.0), np.nan)
  seen = np.asarray(free.any(-1))
  some = np.isfinite(foot).any(1, keepdims=True)
  usual = np.where(some, median(foot), ground.f * HEIGHT[0] / high)
  x = np.where(np.isfinite(foot), foot, usual * high / np.maximum(boxes[..., 3] - boxes[..., 1], 1))
  y = ((boxes[..., 0] + boxes[..., 2]) / 2 - ground.cx) * x / ground.f - bend * x * x / 2
  c, s = np.cos(pose[..., 2]), np.sin(pose[..., 2])
  at = np.stack([pose[..., 0] + c * x - s * y, pose[..., 1] + s * x + c * y, time], axis=-1)
  half = at.shape[1] // 2
  count = np.stack([seen[:, :half].sum(1), seen[:, half:].sum(1)])
  first, second = (
    (at[:, p] * seen[:, p, None]).sum(1) / np.maximum(n, 1)[:, None]
    for p, n in zip((slice(0, half), slice(half, None)), count, strict=True)
  )
  speed = (second - first)[:, :2] / np.maximum(second[:, 2:] - first[:, 2:], 0.2)
  speed *= (count.min(0) > 2)[:, None] * np.minimum(1, MAX_SPEED / np.maximum(np.hypot(*speed.T), 1e-6))[:, None]
  state = np.zeros((len(boxes), 8))
  state[:, P] = np.where(count[1:].T > 0, second[:, :2] - second[:, 2:] * speed, first[:, :2] - first[:, 2:] * speed)
  state[:, V] = speed
  state[:, 6] = median(boxes[..., 2] - boxes[..., 0])[:, 0] * usual[:, 0] / ground.f
  state[:, 7] = high[:, 0] * usual[:, 0] / ground.f
  return state


def fit(
  boxes: np.ndarray,
  free: np.ndarray,
  time: np.ndarray,
  pose: np.ndarray,
  bend: np.ndarray,
  ground: Ground,
  push: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """(B, K, 4) boxes, (B, K, 4) bool which of their edges are believed, (B, K) s before now, poses and curvatures as of
  Course; push: (B,) curvature of a bend that things are expected to follow -> (B, 8) states at time 0 and (B, 8, 8)
  their covariances. Gauss-Newton, as least squares with priors; edges far off count less, as Huber's would."""
  n = len(boxes)
  state, heading = begin(boxes, free, time, pose, bend, ground), pose[:, -1, 2]
  far = np.hypot(*(state[:, P] - pose[:, -1, :2]).T)
  prior, mean = np.zeros((n, 8, 8)), np.zeros((n, 8))
  prior[:, V, V] = along(heading, (1 / SPEED[0], 1 / SPEED[1]))
  prior[:, A, A] = along(heading, (1 / ACCELERATION[0], 1 / ACCELERATION[1]))
  prior[:, 6, 6], prior[:, 7, 7] = WIDTH[1] ** -2, HEIGHT[1] ** -2
  prior[:, range(2), range(2)] = 1e-6
  mean[:, 6], mean[:, 7] = WIDTH[0], HEIGHT[0]
  information = np.zeros((n, 8, 8))
  used = np.flatnonzero(free.any((0, 2)))
  some = slice(*(used[[0, -1]] + [0, 1])) if len(used) else slice(0)
  course, boxes, free = Course(time[:, some], pose[:, some], bend[:, some]), boxes[:, some], free[:, some]
  weight = (free / box_noise(boxes)[..., None] ** 2).reshape(n, -1)
  root = np.sqrt(weight)
  for k in range(ROUNDS):
    aside = np.clip(push * (state[:, V] ** 2).sum(1), -BEND, BEND)
    mean[:, P], mean[:, 4], mean[:, 5] = state[:, P], -np.sin(heading) * aside, np.cos(heading) * aside
    edges, j = project(state, course, ground)
    off, j = np.where(free, boxes - edges, 0).reshape(n, -1), j.reshape(n, -1, 8)
    most = ROBUST if k > 1 else 4 * ROBUST
    w = weight * np.minimum(1, most / np.maximum(np.abs(off) * root, 1e-9))
    jw = (j * w[..., None]).swapaxes(1, 2)
    information = jw @ j + prior
    step = np.linalg.solve(information, jw @ off[..., None] + prior @ (mean - state)[..., None])[..., 0]
    state = state + step * np.minimum(1, 0.3 * far / np.maximum(np.abs(step[:, P]).max(1), 1e-9))[:, None]
  return state, np.linalg.inv(information)


class Recall:
  """The last KEPT frames of every track, in step with the tracker's rows, and a fit of those that are lost."""

  def __init__(self, view: tuple[int, int], most: int):
    """most: boxes of a frame."""
    self.view, self.most = view, most
    self.reset()

  def reset(self) -> None:
    self.slot, self.frame, self.curvature = 0, 0, 0.0
    self.x = self.y = self.heading = self.way = 0.0
    self.poses, self.bends = np.zeros((KEPT, 2, 3)), np.zeros((KEPT, 2))  # straight on, and along the bend
    self.others = np.full((KEPT, self.most, 4), np.nan, np.float32)
    self.boxes, self.seen = np.zeros((0, KEPT, 4), np.float32), np.zeros((0, KEPT), bool)
    self.known, self.since = np.zeros(0, bool), np.zeros(0, np.int64)  # whether it is fitted, at which frame
    self.state, self.cov = np.zeros((0, 2, 8)), np.zeros((0, 2, 8, 8))

  def select(self, at: np.ndarray) -> None:
    for name in ROWS:
      setattr(self, name, getattr(self, name)[at])

  def replace(self, old: np.ndarray, new: np.ndarray) -> None:
    """Rows `old` become what rows `new` are."""
    for name in ROWS:
      a = getattr(self, name)
      a[old] = a[new]

  def start(self, boxes: np.ndarray) -> None:
    """New tracks, seen in this frame."""
    n = len(boxes)
    for name in ROWS:
      a = getattr(self, name)
      setattr(self, name, np.concatenate([a, np.zeros((n, *a.shape[1:]), a.dtype)]))
    self.boxes[-n:, self.slot], self.seen[-n:, self.slot] = boxes, True

  def move(self, frames: int, speed: float | None, yaw_rate: float | None) -> None:
    """The car goes on for so many frames: m/s, and rad/s to the right; None where nobody knows, then all is seen as
    from a car that stands."""
    v, w = speed or 0.0, yaw_rate or 0.0
    self.curvature += CURVE_RATE * (min(max(w / max(v, 3.0), -0.1), 0.1) - self.curvature)
    for _ in range(frames):
      middle = self.heading + w * DT / 2
      self.x, self.y = self.x + v * DT * np.cos(middle), self.y + v * DT * np.sin(middle)
      self.heading += w * DT
      self.way += v * DT
      self.frame += 1
      self.slot = self.frame % KEPT
      self.poses[self.slot] = (self.x, self.y, self.heading), (self.way, 0.0, 0.0)
      self.bends[self.slot] = 0.0, self.curvature
      self.seen[:, self.slot] = False
      self.others[self.slot] = np.nan

  def see(self, rows: np.ndarray, boxes: np.ndarray, every: np.ndarray) -> None:
    """Tracks `rows` are these boxes; every: all boxes of the frame."""
    self.boxes[rows, self.slot], self.seen[rows, self.slot], self.known[rows] = boxes, True, False
    self.others[self.slot, : len(every)] = every[: self.most]

  def lose(self, rows: np.ndarray, ground: Ground) -> None:
    """Fits those tracks of which enough was seen."""
    rows = rows[self.seen[rows].sum(1) >= LEAST]
    if not len(rows):
      return
    order = (self.slot + 1 + np.arange(KEPT)) % KEPT
    boxes, seen = self.boxes[rows][:, order], self.seen[rows][:, order]
    newest = boxes[np.arange(len(rows)), KEPT - 1 - seen[:, ::-1].argmax(1)]
    boxes = np.where(seen[..., None], boxes, newest[:, None])
    some = slice(int(seen.any(0).argmax()), KEPT)  # most that is lost was seen in a few frames
    there = self.others[order[some]]
    most = int((there[..., 0] == there[..., 0]).sum(1).max())
    others = np.broadcast_to(there[:, :most], (len(rows), *there[:, :most].shape))
    free = np.zeros(boxes.shape, bool)
    now = seen[:, some]
    free[:, some] = believed(free_edges(boxes[:, some], others, self.view) & now[..., None], now)
    # both ways at once: straight on, then along the bend
    n, time = len(rows), (np.arange(KEPT) - KEPT + 1) * DT
    pose, bend = self.poses[order].swapaxes(0, 1).repeat(n, 0), self.bends[order].T.repeat(n, 0)
    state, cov = fit(
      np.concatenate([boxes, boxes]),
      np.concatenate([free, free]),
      np.broadcast_to(time, bend.shape),
      pose,
      bend,
      ground,
      np.array([self.curvature, 0.0]).repeat(n),
    )
    self.state[rows], self.cov[rows] = state.reshape(2, n, 8).swapaxes(0, 1), cov.reshape(2, n, 8, 8).swapaxes(0, 1)
    self.known[rows], self.since[rows] = True, self.frame

  def expect(self, ground: Ground) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> rows of the tracks that are fitted, (L, 2, 4) their boxes in this frame by either way, (L, 2, 4, 4) covariance
    of the edges."""
    rows = self.known.nonzero()[0]
    n, t = len(rows), ((self.frame - self.since[rows]) * DT).repeat(2)
    pose, bend = np.tile(self.poses[self.slot], (n, 1)), np.tile(self.bends[self.slot], n)
    course = Course(t[:, None], pose[:, None], bend[:, None])
    edges, j = project(self.state[rows].reshape(2 * n, 8), course, ground)
    cov = self.cov[rows].reshape(2 * n, 8, 8).copy()
    cov[:, P, P] += along(pose[:, 2], UNSEEN) * ((t * t / 2) ** 2)[:, None, None]
    out = j[:, 0] @ cov @ j[:, 0].swapaxes(1, 2)
    return rows, edges[:, 0].reshape(n, 2, 4), out.reshape(n, 2, 4, 4)

  def likelihood(
    self, edges: np.ndarray, cov: np.ndarray, boxes: np.ndarray, every: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Of expect(), and (C, 4) boxes, of `every` one of the frame -> (L, C) log of how much likelier it is that they are
    the same than that the box is new, -inf where they cannot be; (C,) whether nothing covers the box."""
    free = free_edges(boxes, np.broadcast_to(every, (len(boxes), *every.shape)), self.view)
    size = np.sqrt(np.maximum((edges[..., 2] - edges[..., 0]) * (edges[..., 3] - edges[..., 1]), 1))
    variance = (box_noise(boxes) ** 2)[:, None] + np.where(free, 0, (COVERED * size[..., None, None]) ** 2)
    spread = cov[:, :, None] + variance[..., None] * np.eye(4)  # (L, 2, C, 4, 4)
    off = boxes - edges[:, :, None]
    d2 = (off * np.linalg.solve(spread, off[..., None])[..., 0]).sum(-1)
    likely = np.where(d2 < GATE, -(d2 + np.linalg.slogdet(2 * np.pi * spread)[1]) / 2, -np.inf)
    return NEW + likely.max(1), np.asarray(free.all(1))

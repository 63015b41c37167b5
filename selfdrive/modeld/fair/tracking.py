"""Identities: detections of each frame to tracks that live on through occlusion. Equal input gives equal
output."""

import numpy as np

from openpilot.selfdrive.modeld.fair.assignment import assign
from openpilot.selfdrive.modeld.fair.heads.depth import Depth
from openpilot.selfdrive.modeld.fair.heads.ground import Ground
from openpilot.selfdrive.modeld.fair.heads.objects import MAX_OBJECTS, Detections, intersection
from openpilot.selfdrive.modeld.fair.locate import EDGE_STD, PIXEL_STD, locate
from openpilot.selfdrive.modeld.fair.recall import ALIKE, DT, LOOKS, Recall
from openpilot.selfdrive.modeld.fair.tracked import TRACK_FIELDS, Tracked, pack

MAX_LOST = 40  # frames without a detection for which a track is told: 2 s
REMEMBERED = 60  # frames after which it is forgotten
# frames for which it is open who came into sight, where it may be who went out of it: the latter is told meanwhile
UNDECIDED = 6
SURE = 6.0  # of a log-likelihood over the next best: who comes into sight uncovered is known at once
OLD_SHARE = 0.6  # of what the frames before said in what is said of a pair
NEVER = -20.0  # log-likelihood of a pair that cannot be
LOST_FROM = 3  # frames unseen, from which on it is looked for by its way on the road
MAX_TRACKS = 96  # over that the longest unseen go
PROBABLE = 0.5  # a new object of that score is told at once, a weaker one when it is seen a second time
# a pair's value, 0..1, is a weighted mean of what the two have; below MIN_VALUE they stay apart
W_OVERLAP, W_EMBED, W_MOTION, MIN_VALUE = 0.45, 0.35, 0.2, 0.25
MIN_OVERLAP, MAX_SIGMA = (
  0.1,
  3.0,
)  # a pair needs so much overlap, or a center within so many standard deviations of the prediction
MIN_COSINE = 0.3  # once the track was out of sight its looks have to agree
# the filter's noises, in sizes (square root of the area) of the box: a detection, acceleration per frame^2, the speed
# of a new track per frame
R, Q, V0 = 0.04, 0.004, 0.1
UNSEEN = 3.0  # times Q, out of sight: who brakes there brakes on, while the noise of the filter changes every frame
MAX_STD = 1.5  # sizes; a prediction vaguer than that would match anything
COVERED = 0.3  # share of a box behind a nearer one, from which on its edges are the other's
EMBED_RATE, VOTE_RATE = 0.1, 0.1
TO_BOX = np.array(
  [[1, 0, 1, 0], [0, 1, 0, 1], [-0.5, 0, 0.5, 0], [0, -0.5, 0, 0.5]]
)  # center, size @ it: corners, in one product, which rounds once
FROM_BOX = np.array([[0.5, 0, -1, 0], [0, 0.5, 0, -1], [0.5, 0, 1, 0], [0, 0.5, 0, 1]], np.float32)  # and back


IDENTITY = ("ids", "born", "votes", "embed", "has_embed")  # what stays of a thing that comes back


class Tracker:
  """Keeps up to MAX_TRACKS objects. update() once a frame that has detections, found or not."""

  def __init__(self, classes: list[str], view: tuple[int, int]):
    self.classes, self.view = classes, view  # view: height, width, pixels
    self.recall = Recall(view, MAX_OBJECTS)
    self.next_id = 1
    self.last_frame: int | None = None
    self.reset()

  def reset(self) -> None:
    """Forgets all tracks; their ids never come back."""
    n = 0
    self.recall.reset()
    self.guess = 0  # the last provisional id, below 0
    self.said: dict[tuple[int, int], float] = {}  # id of a track out of sight, provisional one -> log-likelihood
    self.ids, self.born, self.hits, self.lost = (np.zeros(n, np.int64) for _ in range(4))
    self.mean, self.speed = np.zeros((n, 4)), np.zeros((n, 4))  # center x, y, width, height, pixels; per frame
    self.p00, self.p01, self.p11 = (
      np.zeros(n),
      np.zeros(n),
      np.zeros(n),
    )  # covariance of any of the four, in squared sizes
    self.scores, self.votes = np.zeros(n, np.float32), np.zeros((n, len(self.classes)), np.float32)
    self.embed: np.ndarray | None = None
    self.bits: np.ndarray | None = None
    self.pixels, self.has_embed = np.zeros(n, np.int32), np.zeros(n, bool)  # of the mask last seen, 0 without one
    self.tracks = [
      "ids",
      "born",
      "hits",
      "lost",
      "mean",
      "speed",
      "p00",
      "p01",
      "p11",
      "scores",
      "votes",
      "embed",
      "bits",
      "pixels",
      "has_embed",
    ]

  def _select(self, at: np.ndarray) -> None:
    for name in self.tracks:
      if (a := getattr(self, name)) is not None:
        setattr(self, name, a[at])
    self.recall.select(at)

  @property
  def boxes(self) -> np.ndarray:
    return self.mean @ TO_BOX

  def predict(self, dt: int, turn: float = 0.0) -> None:
    """Constant velocity in the image, but for the car's own turn, pixels a frame to the right. The size of a track out
    of sight soon stops changing: its last change was the occluder's edge."""
    self.mean += self.speed * dt
    self.mean[:, 0] -= turn * dt
    size = self.mean[:, 2:]
    np.minimum(np.maximum(size, 4, out=size), 2 * max(self.view), out=size)
    q: np.ndarray | float = Q * Q
    if (lost := self.lost > 0).any():
      self.speed[:, 2:] *= np.where(lost, 0.8**dt, 1)[:, None]
      q = np.where(lost, (UNSEEN * Q) ** 2, Q * Q)
    self.p00 += 2 * dt * self.p01 + dt * dt * self.p11 + q * (dt**4 / 4)
    self.p01 += dt * self.p11 + q * (dt**3 / 2)
    self.p11 += q * (dt * dt)

  def _values(
    self,
    d: Detections,
    inter: np.ndarray,
    area: np.ndarray,
    bits: np.ndarray | None,
    pixels: np.ndarray,
    looks: np.ndarray,
  ) -> np.ndarray:
    """(N, M) of assign(): over 0 where track and detection may be the same. inter: (N, M) that predicted boxes share
    with detections, area: (N,) of boxes; bits, pixels: pack() of the detections' masks; looks: (M,) which of them have
    an embedding."""
    middle_x, middle_y, wide, high = (d.boxes @ FROM_BOX).T
    iou = inter / np.maximum(area[:, None] + wide * high - inter, 1e-6)
    x, y, w, h = self.mean.T.astype(np.float32)
    std = np.minimum(np.sqrt(self.p00 + R * R), MAX_STD).astype(np.float32)
    dx, dy = middle_x - x[:, None], middle_y - y[:, None]
    off2 = (dx * dx + dy * dy) * (1 / (std * std * w * h))[:, None]
    alike = self.votes.argmax(1)[:, None] == d.class_ids
    # of the other pairs no more has to be known
    at = ((alike & ((iou > MIN_OVERLAP) | (off2 < MAX_SIGMA**2))) | (iou > 0.5)).ravel().nonzero()[0]
    i = at // len(wide)
    j = at - i * len(wide)
    overlap, away = iou.ravel()[at], off2.ravel()[at]
    motion = np.exp(-0.5 * away)
    # a lost car is not found again in one of half its width
    w0, h0, w1, h1 = w[i], h[i], wide[j], high[j]
    motion *= np.sqrt(np.minimum(w0, w1) * np.minimum(h0, h1) / np.maximum(np.maximum(w0, w1) * np.maximum(h0, h1), 1))
    lost = self.lost[i] > 0
    if bits is not None and self.bits is not None:
      # a mask is compared where it last was: in one frame it hardly moves, and in longer it says less than the
      # predicted box
      mine, theirs = self.pixels[i], pixels[j]
      k = ((overlap > 0) & (mine > 0) & (theirs > 0) & ~lost).nonzero()[0]
      both = np.bitwise_count(self.bits[i[k]] & bits[j[k]]).sum(1, dtype=np.int32)
      overlap[k] = both / (mine[k] + theirs[k] - both)
    if (
      lost.any()
    ):  # out of sight, overlap with a vague prediction says little: motion, which knows how vague, speaks in its place
      overlap += np.where(lost, np.maximum(motion - overlap, 0) * np.minimum(std[i] / MAX_STD, 1), 0)
    value = W_OVERLAP * overlap + W_MOTION * motion
    if self.embed is not None and d.embed is not None:
      known = self.has_embed[i] & looks[j]
      cosine = (self.embed @ d.embed.T).ravel()[at]
      value += np.where(known, W_EMBED * np.maximum(cosine, 0), 0)
      value = value / (W_OVERLAP + W_MOTION + W_EMBED * known) - MIN_VALUE
      value *= ~known | (cosine > MIN_COSINE) | (~lost & (overlap > 0.5))
    else:
      value = value / (W_OVERLAP + W_MOTION) - MIN_VALUE
    out = np.zeros(iou.size)
    out[at] = value
    return out.reshape(iou.shape)

  def update(
    self,
    frame_id: int,
    d: Detections,
    ground: Ground,
    depth: Depth | None = None,
    speed: float | None = None,
    yaw_rate: float | None = None,
  ) -> Tracked:
    """d: what the heads found in this frame, class_ids into this tracker's classes. speed, yaw_rate: of the car, m/s
    and rad/s to the right, None where they are not known. After a jump of the frame's number beyond MAX_LOST, or back,
    all is new."""
    dt = 1 if self.last_frame is None else frame_id - self.last_frame
    if not 0 <= dt <= MAX_LOST + 1:
      self.reset()
      dt = 1
    self.last_frame = frame_id
    self.predict(dt, ground.f * DT * (yaw_rate or 0.0))
    self.recall.move(dt, speed, yaw_rate)
    away, edges, vague = self._away(ground)
    gone = self.ids[away]
    boxes = self.boxes.astype(np.float32)
    bits, pixels = pack(d.masks) if d.masks is not None else (None, np.zeros(len(d.boxes), np.int32))
    looks = np.asarray(d.embed.any(1)) if d.embed is not None else np.zeros(len(d.boxes), bool)
    area, inter = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), intersection(boxes, d.boxes)
    i = j = np.zeros(0, np.intp)
    if inter.size:
      value = self._values(d, inter, area, bits, pixels, looks)
      value[away] = 0
      i, j = assign(value)
    found = np.full(len(self.ids), -1)
    found[i] = j
    cover = np.zeros(
      len(boxes), np.float32
    )  # share of each predicted box behind the box of one nearer detection, nearer being the one that reaches lower
    seen = d.boxes[j]
    if inter.size:
      share = np.where(d.boxes[:, 3] > boxes[:, 3:4], inter, 0)
      share[i, j] = 0
      front = share.argmax(1)
      cover = np.minimum(share[np.arange(len(share)), front] / np.maximum(area, 1), 1)
      seen = self._uncover(seen, boxes[i], d.boxes[front[i]], cover[i])
    self._correct(i, seen, cover[i])
    self.recall.see(i, d.boxes[j], d.boxes)
    self.lost = np.where(found >= 0, 0, self.lost + dt)
    self.hits[i] += 1
    if bits is not None:
      if self.bits is None:
        self.bits = np.zeros((len(self.ids), bits.shape[1]), bits.dtype)
      self.bits[i], self.pixels[i] = bits[j], pixels[j]
    self._remember(i, j, d, looks, cover[i])
    if (lost := (self.lost >= LOST_FROM) & ~self.recall.known & (self.ids > 0)).any():
      self.recall.lose(lost.nonzero()[0], ground)
    # leave: unseen too long, seen once and weakly, or gone out of the view
    inside = (boxes[:, 2] > 0) & (boxes[:, 3] > 0) & (boxes[:, 0] < self.view[1] - 1) & (boxes[:, 1] < self.view[0] - 1)
    stay = (self.lost == 0) | (
      (self.lost <= REMEMBERED) & ((self.hits > 1) | (self.scores >= PROBABLE)) & (inside | self.recall.known)
    )
    unknown = np.ones(len(d.boxes), bool)
    unknown[j] = False
    new = unknown.nonzero()[0]
    over = int(stay.sum()) + len(new) - MAX_TRACKS
    if over > 0:
      stay[np.argsort(-np.where(stay, self.lost, -1), kind="stable")[:over]] = False
    if not stay.all():
      at = np.flatnonzero(stay)
      self._select(at)
      found, cover = found[at], cover[at]
    if new.size:
      self._start(new, d, frame_id, bits, pixels, looks)
      found, cover = np.concatenate([found, new]), np.concatenate([cover, np.zeros(len(new), np.float32)])
    if (self.ids < 0).any():
      same = gone[:, None] == self.ids
      there = same.any(1)
      rows = same.nonzero()[1]
      stay = self._decide(frame_id, rows, edges[there], vague[there], d, looks, found, cover)
      if not stay.all():
        at = np.flatnonzero(stay)
        self._select(at)
        found, cover = found[at], cover[at]
    return self._tracked(frame_id, d, found, cover, ground, depth)

  def _away(self, ground: Ground) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of recall.expect(); what is out of sight is put where it should be by now."""
    if not self.recall.known.any():
      return np.zeros(0, np.intp), np.zeros((0, 2, 4)), np.zeros((0, 2, 4, 4))
    away, edges, vague = self.recall.expect(ground)
    most = 2.0 * max(self.view)
    mean = np.clip(edges, -most, most).mean(1) @ FROM_BOX
    mean[:, 2:] = np.maximum(mean[:, 2:], 4)
    self.mean[away] = mean
    return away, edges, vague

  def _likely(
    self, away: np.ndarray, edges: np.ndarray, vague: np.ndarray, d: Detections, looks: np.ndarray, of: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """(L, C) log-likelihood that who is away is detection `of` (C,), and (C,) whether that is in sight whole."""
    # what the detector overlooks hides others all the same
    missed = self.boxes[(self.lost > 0) & (self.lost < LOST_FROM)]
    every = np.concatenate([d.boxes, missed])
    value, whole = self.recall.likelihood(edges, vague, d.boxes[of].astype(np.float64), every)
    value[self.votes[away].argmax(1)[:, None] != d.class_ids[of]] = -np.inf
    if self.embed is not None and d.embed is not None:
      both = self.has_embed[away][:, None] & looks[of]
      cosine = self.embed[away] @ d.embed[of].T
      value += np.where(both, np.where(cosine > MIN_COSINE, LOOKS * (cosine - ALIKE), -np.inf), 0)
    return np.maximum(value, NEVER), whole

  def _decide(
    self,
    frame_id: int,
    away: np.ndarray,
    edges: np.ndarray,
    vague: np.ndarray,
    d: Detections,
    looks: np.ndarray,
    found: np.ndarray,
    cover: np.ndarray,
  ) -> np.ndarray:
    """Who came into sight of late: one of those that were away (rows), or somebody new: the likeliest pairs of all that
    is still open, together. found: (N,) the tracks' detections, -1 none, and cover: (N,) are changed -> (N,) bool,
    False for rows whose thing goes on in the row of the one that was away."""
    stay, young = np.ones(len(self.ids), bool), (self.ids < 0).nonzero()[0]
    if not len(young):
      self.said.clear()
      return stay
    value, whole = np.full((len(away), len(young)), NEVER), np.zeros(len(young), bool)
    seen = (found[young] >= 0).nonzero()[0]
    if len(away):
      if len(seen):
        value[:, seen], whole[seen] = self._likely(away, edges, vague, d, looks, found[young[seen]])
      keys = [[(x, y) for y in self.ids[young].tolist()] for x in self.ids[away].tolist()]
      old = np.array([[self.said.get(k, np.nan) for k in row] for row in keys])
      value[:, seen] = np.where(np.isnan(old), value, OLD_SHARE * old + (1 - OLD_SHARE) * value)[:, seen]
      unseen = (found[young] < 0).nonzero()[0]
      value[:, unseen] = np.where(np.isnan(old), NEVER, old)[:, unseen]
      self.said = {
        k: v for row, values in zip(keys, value.tolist(), strict=True) for k, v in zip(row, values, strict=True)
      }
    a, b = assign(value)
    due = (frame_id - self.born[young] >= UNDECIDED) | ~(value > 0).any(0)
    rest = value.copy()
    rest[a, b] = 0
    alone = rest[a].max(1, initial=0), rest[:, b].max(0, initial=0)
    again = self.hits[young[b]] > 1
    due[b] |= (whole[b] | again) & (value[a, b] - np.maximum(*alone) > SURE)
    for row, column in zip(away[a[due[b]]].tolist(), young[b[due[b]]].tolist(), strict=True):
      self.hits[column] += self.hits[row]
      for name in self.tracks:
        if name not in IDENTITY and (x := getattr(self, name)) is not None:
          x[row] = x[column]
      self.recall.replace(row, column)
      found[row], cover[row], stay[column] = found[column], cover[column], False
    new = young[due & stay[young]]
    self.ids[new] = self.next_id + np.arange(len(new))
    self.next_id += len(new)
    return stay

  def _uncover(self, seen: np.ndarray, predicted: np.ndarray, front: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """(K, 4) detected boxes with the edges that the box in front, or the view's end, hides put where the other edge and
    the known size say they are."""
    hides = cover > 0.02
    right = self.view[1] - 1
    low = hides & (front[:, 0] <= predicted[:, 0]) & (front[:, 2] < predicted[:, 2]) | (seen[:, 0] <= 0)
    high = hides & (front[:, 2] >= predicted[:, 2]) & (front[:, 0] > predicted[:, 0]) | (seen[:, 2] >= right)
    foot = hides & (front[:, 0] <= predicted[:, 0]) & (front[:, 2] >= predicted[:, 2]) & (
      front[:, 1] > predicted[:, 1]
    ) | (seen[:, 3] >= self.view[0] - 1)
    if not (low.any() or high.any() or foot.any()):
      return seen
    out = seen.copy()
    w, h = predicted[:, 2] - predicted[:, 0], predicted[:, 3] - predicted[:, 1]
    out[:, 0] = np.where(low & ~high, np.minimum(seen[:, 0], seen[:, 2] - w), seen[:, 0])
    out[:, 2] = np.where(high & ~low, np.maximum(seen[:, 2], seen[:, 0] + w), seen[:, 2])
    out[:, 3] = np.where(foot, np.maximum(seen[:, 3], seen[:, 1] + h), seen[:, 3])
    return out

  def _correct(self, i: np.ndarray, b: np.ndarray, cover: np.ndarray) -> None:
    """The filter's step. What is partly hidden is known less well."""
    p00, p01 = self.p00[i], self.p01[i]
    s = p00 + R * R * (1 + 10 * cover)
    k0, k1 = p00 / s, p01 / s
    off = b @ FROM_BOX - self.mean[i]
    self.mean[i] += k0[:, None] * off
    self.speed[i] += k1[:, None] * off
    self.p11[i] -= k1 * p01
    self.p01[i] = p01 * (1 - k0)
    self.p00[i] = p00 * (1 - k0)

  def _remember(self, i: np.ndarray, j: np.ndarray, d: Detections, looks: np.ndarray, cover: np.ndarray) -> None:
    """Score, class and looks."""
    self.scores[i] = d.scores[j]
    self.votes[i] *= 1 - VOTE_RATE
    self.votes[i, d.class_ids[j]] += VOTE_RATE * d.scores[j]
    if d.embed is None:
      return
    if self.embed is None:
      self.embed = np.zeros((len(self.ids), d.embed.shape[1]), np.float32)
    has = self.has_embed[i]
    ok = looks[j] & ((cover < COVERED) | ~has)  # half hidden, it looks like its occluder
    i, j = i[ok], j[ok]
    rate = np.where(has[ok], EMBED_RATE, 1)[:, None]
    e = (1 - rate) * self.embed[i] + rate * d.embed[j]
    self.embed[i] = e / np.maximum(np.sqrt((e * e).sum(1, keepdims=True)), 1e-6)
    self.has_embed[i] = True

  def _start(
    self, new: np.ndarray, d: Detections, frame_id: int, bits: np.ndarray | None, pixels: np.ndarray, looks: np.ndarray
  ) -> None:
    n, b = len(new), d.boxes[new].astype(np.float64)
    if self.recall.known.any():  # who it is is open
      self.guess += n
      ids = -self.guess + np.arange(n)
    else:
      ids = self.next_id + np.arange(n)
      self.next_id += n
    votes = np.zeros((n, len(self.classes)), np.float32)
    votes[np.arange(n), d.class_ids[new]] = d.scores[new]
    more = {
      "ids": ids,
      "born": np.full(n, frame_id),
      "hits": np.ones(n, np.int64),
      "lost": np.zeros(n, np.int64),
      "mean": b @ FROM_BOX,
      "speed": np.zeros((n, 4)),
      "p00": np.full(n, R * R),
      "p01": np.zeros(n),
      "p11": np.full(n, V0 * V0),
      "scores": d.scores[new],
      "votes": votes,
      "pixels": pixels[new],
      "has_embed": looks[new],
    }
    if self.bits is not None:
      more["bits"] = bits[new] if bits is not None else np.zeros((n, self.bits.shape[1]), self.bits.dtype)
    if self.embed is not None:
      more["embed"] = d.embed[new] if d.embed is not None else np.zeros((n, self.embed.shape[1]), np.float32)
    for name, value in more.items():
      setattr(self, name, np.concatenate([getattr(self, name), value]))
    self.recall.start(d.boxes[new])

  def _tracked(
    self, frame_id: int, d: Detections, found: np.ndarray, cover: np.ndarray, ground: Ground, depth: Depth | None
  ) -> Tracked:
    seen = found >= 0
    state = self.boxes
    boxes = state.astype(np.float32)
    boxes[seen] = d.boxes[found[seen]]
    clear = seen & (cover < COVERED)
    whole = np.where(clear[:, None], boxes, state)  # of the rest the lower edge is the occluder's
    height = whole[:, 3] - whole[:, 1]
    size = np.sqrt(np.maximum(self.mean[:, 2] * self.mean[:, 3], 1))
    edge = np.hypot(np.hypot(PIXEL_STD, EDGE_STD * height), np.where(clear, 0, np.sqrt(self.p00) * size))
    position, std, shown = locate(whole, edge, clear, ground, depth, self.view)
    np.maximum(boxes, -0.5, out=boxes)
    np.minimum(boxes, np.array([self.view[1] - 0.5, self.view[0] - 0.5] * 2, np.float32), out=boxes)
    visibility = np.where(seen, 1 - cover, 0).astype(np.float32)
    mask_of = found if d.masks is not None else np.full(len(found), -1)
    # scores is the tracker's own and changes in place: a copy goes out
    out = Tracked(
      self.classes,
      self.ids,
      self.votes.argmax(1),
      self.scores.copy(),
      boxes,
      frame_id - self.born,
      visibility < 0.5,
      visibility,
      d.masks,
      mask_of,
      position,
      std,
      shown,
    )
    told = ((self.hits > 1) | (self.scores >= PROBABLE)) & (self.lost <= MAX_LOST) & (self.ids > 0)
    if not told.all():
      for name in TRACK_FIELDS:
        setattr(out, name, getattr(out, name)[told])
    return out

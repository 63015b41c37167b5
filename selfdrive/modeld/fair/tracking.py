"""Identities: detections of each frame to tracks that live on through occlusion, and where on the road they are. Equal input gives equal output."""
from dataclasses import dataclass

import numpy as np

from openpilot.selfdrive.modeld.fair.heads.depth import Depth
from openpilot.selfdrive.modeld.fair.heads.ground import Ground
from openpilot.selfdrive.modeld.fair.heads.objects import MAX_OBJECTS, Detections, box_iou

MAX_LOST = 40          # frames without a detection that a track outlives: 2 s
MAX_TRACKS = 96        # over that the longest unseen go
PROBABLE = 0.5         # a new object of that score is told at once, a weaker one when it is seen a second time
SAME_IOU = 0.5         # a box of the detector and an object with more overlap are one thing
# a pair's value, 0..1, is a weighted mean of what the two have; below MIN_VALUE they stay apart
W_OVERLAP, W_EMBED, W_MOTION, MIN_VALUE = 0.45, 0.35, 0.2, 0.25
MIN_OVERLAP, MAX_SIGMA = 0.1, 3.0      # a pair needs so much overlap, or a centre within so many standard deviations of the prediction
MIN_COSINE = 0.3                       # once the track was out of sight its looks have to agree
# the filter's noises, in sizes (square root of the area) of the box: a detection, acceleration per frame^2, the speed of a new track per frame
R, Q, V0 = 0.04, 0.004, 0.1
MAX_STD = 1.5                          # sizes; a prediction vaguer than that would match anything
COVERED = 0.3                          # share of a box behind a nearer one, from which on its edges are the other's
EMBED_RATE, VOTE_RATE = 0.1, 0.1
PIXEL_STD, EDGE_STD = 2.0, 0.03        # of a box's lower edge: pixels, and share of its height
DEPTH_STD = 0.1                        # of a student's depth, where nothing says better


@dataclass
class Tracked:
  """All that is known of N tracks at one frame, oldest first."""
  classes: list[str]
  ids: np.ndarray          # (N,) int64
  class_ids: np.ndarray    # (N,) int64
  scores: np.ndarray       # (N,) float32; of a track out of sight the last
  boxes: np.ndarray        # (N, 4) float32 view pixels: detected, or where it should be
  ages: np.ndarray         # (N,) int64 frames since first seen
  occluded: np.ndarray     # (N,) bool: not seen in this frame, or less than half of it
  visibility: np.ndarray   # (N,) float32
  masks: np.ndarray | None  # (M, h, w) bool
  mask_of: np.ndarray      # (N,) index into masks, -1: none
  position: np.ndarray     # (N, 3) metres, nan unknown
  position_std: np.ndarray  # (N, 3)


def assign(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(N, M) -> rows and columns of the pairs that make the largest sum of positive values, each row and column at most once. Exact.

  A row whose best column no other row can have takes it: in any solution that column is free or the row's already, so nothing better is lost. What is left,
  where rows compete, is solved by the Hungarian method with shortest augmenting paths, O(n^3).
  """
  value = np.maximum(value, 0)
  rows, cols = np.arange(value.shape[0]), np.arange(value.shape[1])
  out_r, out_c = [], []
  while rows.size and cols.size:
    left = value[np.ix_(rows, cols)]
    best = left.argmax(1)
    alone = ((left > 0).sum(0)[best] == 1) & (left[np.arange(len(rows)), best] > 0)
    out_r.append(rows[alone])
    out_c.append(cols[best[alone]])
    live, open_ = ~alone & (left > 0).any(1), (left > 0).any(0)
    open_[best[alone]] = False
    if alone.any():
      rows, cols = rows[live], cols[open_]
      continue
    rows, cols = rows[live], cols[open_]
    if rows.size and cols.size:
      r, c = hungarian(value[np.ix_(rows, cols)])
      out_r.append(rows[r])
      out_c.append(cols[c])
    break
  if not out_r:
    return np.zeros(0, np.intp), np.zeros(0, np.intp)
  r, c = np.concatenate(out_r), np.concatenate(out_c)
  order = np.argsort(r)
  return r[order], c[order]


def hungarian(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """As assign(), on values >= 0, by the Hungarian method alone."""
  if value.shape[0] > value.shape[1]:
    c, r = hungarian(value.T)
    return r, c
  n, m = value.shape
  cost = -value.astype(np.float64)
  u, v = np.zeros(n + 1), np.zeros(m + 1)       # potentials; index 0 stands for 'none'
  owner, way = np.zeros(m + 1, np.intp), np.zeros(m + 1, np.intp)
  for row in range(1, n + 1):
    owner[0], j = row, 0
    least = np.full(m + 1, np.inf)
    free = np.ones(m + 1, bool)
    while True:
      free[j] = False
      i = owner[j]
      reduced = cost[i - 1] - u[i] - v[1:]
      better = free[1:] & (reduced < least[1:])
      least[1:][better], way[1:][better] = reduced[better], j
      nearest = np.where(free, least, np.inf)
      k = int(nearest.argmin())
      delta = nearest[k]
      taken = ~free
      u[owner[taken]] += delta
      v[taken] -= delta
      least[free] -= delta
      j = k
      if owner[j] == 0:
        break
    while j:
      owner[j] = owner[way[j]]
      j = int(way[j])
  c = np.flatnonzero(owner[1:])
  r = owner[1:][c] - 1
  ok = value[r, c] > 0
  return r[ok], c[ok]


def merge(found: list[Detections], classes: list[str]) -> Detections:
  """Detections of several heads as one, classes renumbered: where two of one class are the same thing, the earlier head's stays, with the better score."""
  ids = [np.array([classes.index(c) for c in d.classes], np.int64)[d.class_ids] for d in found]
  if len(found) == 1:
    d = found[0]
    return Detections(classes, d.boxes, d.scores, ids[0], d.masks, d.embed)
  first, scores, keep = found[0], [found[0].scores.copy()], [np.ones(len(found[0].boxes), bool)]
  for d, k in zip(found[1:], ids[1:], strict=True):
    twin = (box_iou(d.boxes, first.boxes) > SAME_IOU) & (k[:, None] == ids[0])
    scores[0] = np.maximum(scores[0], np.where(twin, d.scores[:, None], 0).max(0, initial=0))
    scores.append(d.scores)
    keep.append(~twin.any(1))
  kept = np.concatenate(keep)
  score = np.concatenate(scores)[kept]
  order = np.argsort(-score, kind="stable")[:MAX_OBJECTS]
  at = np.flatnonzero(kept)[order]
  masks = embed = None
  n = len(first.boxes)
  mine = at < n   # what the others found has neither mask nor embedding: empty, zero
  if first.masks is not None:
    masks = np.zeros((len(at), *first.masks.shape[1:]), bool)
    masks[mine] = first.masks[at[mine]]
  if first.embed is not None:
    embed = np.zeros((len(at), first.embed.shape[1]), np.float32)
    embed[mine] = first.embed[at[mine]]
  return Detections(classes, np.concatenate([d.boxes for d in found])[at], score[order], np.concatenate(ids)[at], masks, embed)


def pack(masks: np.ndarray) -> np.ndarray:
  """(M, h, w) bool -> (M, words) bits, to count overlaps in a few instructions a pair."""
  bits = np.packbits(masks.reshape(len(masks), -1), axis=1)
  return bits.view(np.uint64) if bits.shape[1] % 8 == 0 else bits


def locate(
  boxes: np.ndarray, edge_std: np.ndarray, clear: np.ndarray, ground: Ground, depth: Depth | None, view: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """(N, 4) boxes, standard deviation of their lower edges in pixels (N,), whether nothing hides them (N,) bool -> position of the point where each meets
  the road (N, 3), metres, and its standard deviation (N, 3).

  Two witnesses of the distance: the road plane at the lower edge, unless the view cuts that off, and the median of a metric depth map over the middle of
  the box. They are weighed by their variances; where they contradict each other the deviation says so. nan where there is neither.
  """
  height, width = view
  foot = np.stack([(boxes[:, 0] + boxes[:, 2]) / 2, boxes[:, 3]], axis=1)
  x = ground.road(foot)[:, 0]
  x[boxes[:, 3] > height - 1.5] = np.nan
  var = ground.forward_std(x, edge_std) ** 2
  weight = np.where(np.isnan(x), 0, 1 / np.where(np.isnan(var), 1, var))
  total, mean = weight, np.where(np.isnan(x), 0, x) * weight
  spread = np.zeros(len(boxes))
  if depth is not None and depth.metric:
    h, w = depth.z.shape
    at = np.array([0.3, 0.4, 0.5, 0.6, 0.7], np.float32)
    px = boxes[:, 0:1] + (boxes[:, 2:3] - boxes[:, 0:1]) * at
    py = boxes[:, 1:2] + (boxes[:, 3:4] - boxes[:, 1:2]) * at
    j, i = np.clip(((px + 0.5) * (w / width)).astype(int), 0, w - 1), np.clip(((py + 0.5) * (h / height)).astype(int), 0, h - 1)
    z = depth.z[i[:, :, None], j[:, None, :]].reshape(len(boxes), -1)
    known = np.isfinite(z).sum(1)
    z = np.sort(z, axis=1)[np.arange(len(boxes)), np.maximum(known - 1, 0) // 2].astype(np.float64)   # nan sorts last
    seen = clear & (known > 0) & (z > 0)   # behind an occluder the map shows that
    w_depth = np.where(seen, 1 / (DEPTH_STD * np.where(seen, z, 1)) ** 2, 0)
    both = seen & (weight > 0)
    spread[both] = np.maximum(np.abs(z - x)[both] / 2 - 1 / np.sqrt(total + w_depth)[both], 0)
    total, mean = total + w_depth, mean + w_depth * np.where(seen, z, 0)
  with np.errstate(divide="ignore", invalid="ignore"):
    x, std_x = np.where(total > 0, mean / total, np.nan), np.where(total > 0, np.hypot(1 / np.sqrt(total), spread), np.nan)
  side = (foot[:, 0] - ground.cx) / ground.f
  position = np.stack([x, x * side, np.where(np.isnan(x), np.nan, ground.height)], axis=1)
  std = np.stack([std_x, np.hypot(std_x * side, x * PIXEL_STD / ground.f), np.full(len(x), ground.height * 0.05) + x * 0.005], axis=1)
  return position.astype(np.float32), std.astype(np.float32)


class Tracker:
  """Keeps up to MAX_TRACKS objects. update() once a frame that has detections, found or not."""

  def __init__(self, classes: list[str], view: tuple[int, int]):
    self.classes, self.view = classes, view   # view: height, width, pixels
    self.next_id = 1
    self.last_frame: int | None = None
    self.reset()

  def reset(self) -> None:
    """Forgets all tracks; their ids never come back."""
    n = 0
    self.ids, self.born, self.hits, self.lost = (np.zeros(n, np.int64) for _ in range(4))
    self.mean, self.speed = np.zeros((n, 4)), np.zeros((n, 4))     # centre x, y, width, height, pixels; per frame
    self.p00, self.p01, self.p11 = np.zeros(n), np.zeros(n), np.zeros(n)   # covariance of any of the four, in squared sizes
    self.scores, self.votes = np.zeros(n, np.float32), np.zeros((n, len(self.classes)), np.float32)
    self.embed: np.ndarray | None = None
    self.bits: np.ndarray | None = None
    self.has_bits, self.has_embed = np.zeros(n, bool), np.zeros(n, bool)
    self.tracks = ["ids", "born", "hits", "lost", "mean", "speed", "p00", "p01", "p11", "scores", "votes", "embed", "bits", "has_bits", "has_embed"]

  def _select(self, at: np.ndarray) -> None:
    for name in self.tracks:
      if (a := getattr(self, name)) is not None:
        setattr(self, name, a[at])

  @property
  def boxes(self) -> np.ndarray:
    half = self.mean[:, 2:] / 2
    return np.concatenate([self.mean[:, :2] - half, self.mean[:, :2] + half], axis=1)

  def predict(self, dt: int) -> None:
    """Constant velocity in the image. The size of a track out of sight soon stops changing: its last change was the occluder's edge."""
    self.mean += self.speed * dt
    self.mean[:, 2:] = np.clip(self.mean[:, 2:], 4, 2 * max(self.view))
    self.speed[self.lost > 0, 2:] *= 0.8 ** dt
    self.p00 += 2 * dt * self.p01 + dt * dt * self.p11 + Q * Q * dt ** 4 / 4
    self.p01 += dt * self.p11 + Q * Q * dt ** 3 / 2
    self.p11 += Q * Q * dt * dt

  def _values(self, d: Detections, boxes: np.ndarray, bits: np.ndarray | None) -> np.ndarray:
    """(N, M) of assign(): over 0 where track and detection may be the same."""
    iou = box_iou(boxes, d.boxes)
    if bits is not None and self.bits is not None:
      # a mask is compared where it last was: in one frame it hardly moves, and in longer it says less than the predicted box
      i, j = np.nonzero((iou > 0) & (self.has_bits & (self.lost == 0))[:, None] & bits.any(1)[None])
      if i.size:
        both = np.bitwise_count(self.bits[i] & bits[j]).sum(1, dtype=np.int64)
        either = np.bitwise_count(self.bits[i] | bits[j]).sum(1, dtype=np.int64)
        iou[i, j] = both / np.maximum(either, 1)
    size = np.sqrt(self.mean[:, 2] * self.mean[:, 3])
    centre = (d.boxes[:, :2] + d.boxes[:, 2:]) / 2
    off = (self.mean[:, None, :2] - centre[None]) / size[:, None, None]
    std = np.minimum(np.sqrt(self.p00 + R * R), MAX_STD)[:, None]
    off2 = (off * off).sum(2) / (std * std)
    # how near the size is, as overlap says it for boxes on one centre: a lost car is not found again in one of half its width
    w, h = d.boxes[:, 2] - d.boxes[:, 0], d.boxes[:, 3] - d.boxes[:, 1]
    ratio = np.minimum(w[None], self.mean[:, 2:3]) * np.minimum(h[None], self.mean[:, 3:4]) / np.maximum(
      np.maximum(w[None], self.mean[:, 2:3]) * np.maximum(h[None], self.mean[:, 3:4]), 1)
    value = W_OVERLAP * iou + W_MOTION * np.exp(-off2 / 2) * np.sqrt(ratio)
    weight = np.full(iou.shape, W_OVERLAP + W_MOTION)
    may = (iou > MIN_OVERLAP) | (off2 < MAX_SIGMA ** 2)
    if self.embed is not None and d.embed is not None:
      known = self.has_embed[:, None] & d.embed.any(1)[None]
      cosine = self.embed @ d.embed.T
      value += np.where(known, W_EMBED * np.maximum(cosine, 0), 0)
      weight += np.where(known, W_EMBED, 0)
      may &= ~known | (cosine > MIN_COSINE) | ((self.lost == 0)[:, None] & (iou > 0.5))
    same = self.votes.argmax(1)[:, None] == d.class_ids[None]
    may &= same | (iou > 0.5)
    # out of sight, overlap with a vague prediction says little: the mean is of looks and motion then, by how vague it is
    vague = np.minimum(std / MAX_STD, 1) * (self.lost > 0)[:, None]
    value += W_OVERLAP * vague * (np.exp(-off2 / 2) * np.sqrt(ratio) - iou).clip(0)
    return np.where(may, value / weight - MIN_VALUE, 0)

  def update(self, frame_id: int, d: Detections, ground: Ground, depth: Depth | None = None) -> Tracked:
    """d: what the heads found in this frame, class_ids into this tracker's classes. After a jump of the frame's number beyond MAX_LOST, or back, all is new."""
    dt = 1 if self.last_frame is None else frame_id - self.last_frame
    if not 0 <= dt <= MAX_LOST + 1:
      self.reset()
      dt = 1
    self.last_frame = frame_id
    self.predict(dt)
    boxes = self.boxes
    bits = pack(d.masks) if d.masks is not None else None
    i, j = assign(self._values(d, boxes, bits)) if len(self.ids) and len(d.boxes) else (np.zeros(0, np.intp), np.zeros(0, np.intp))
    found = np.full(len(self.ids), -1)
    found[i] = j
    cover = self._cover(boxes, d.boxes, found)
    self._correct(i, j, d, cover[i])
    self.lost = np.where(found >= 0, 0, self.lost + dt)
    self.hits[i] += 1
    if bits is not None:
      if self.bits is None:
        self.bits = np.zeros((len(self.ids), bits.shape[1]), bits.dtype)
      self.bits[i], self.has_bits[i] = bits[j], bits[j].any(1)
    self._remember(i, j, d, cover[i])
    # leave: unseen too long, seen once and weakly, or gone out of the view
    inside = box_iou(boxes, np.array([[-0.5, -0.5, self.view[1] - 0.5, self.view[0] - 0.5]]))[:, 0] > 0
    stay = (self.lost == 0) | ((self.lost <= MAX_LOST) & ((self.hits > 1) | (self.scores >= PROBABLE)) & inside)
    new = np.setdiff1d(np.arange(len(d.boxes)), j)
    over = int(stay.sum()) + len(new) - MAX_TRACKS
    if over > 0:
      stay[np.argsort(-np.where(stay, self.lost, -1), kind="stable")[:over]] = False
    at = np.flatnonzero(stay)
    self._select(at)
    self._start(new, d, frame_id, bits)
    found, cover = np.concatenate([found[at], new]), np.concatenate([cover[at], np.zeros(len(new))])
    return self._tracked(frame_id, d, found, cover, ground, depth)

  def _cover(self, boxes: np.ndarray, seen: np.ndarray, found: np.ndarray) -> np.ndarray:
    """(N,) share of each predicted box that lies behind the box of one nearer detection, nearer being the one that reaches lower."""
    if not len(boxes) or not len(seen):
      return np.zeros(len(boxes))
    low, high = np.maximum(boxes[:, None, :2], seen[None, :, :2]), np.minimum(boxes[:, None, 2:], seen[None, :, 2:])
    side = np.maximum(high - low, 0)
    share = side[..., 0] * side[..., 1] / np.maximum((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), 1)[:, None]
    share[(seen[None, :, 3] <= boxes[:, None, 3]) | (found[:, None] == np.arange(len(seen))[None])] = 0
    return np.minimum(share.max(1), 1)

  def _correct(self, i: np.ndarray, j: np.ndarray, d: Detections, cover: np.ndarray) -> None:
    """The filter's step. Edges that an occluder or the view cuts off are not the object's: such a detection moves the track little."""
    b = d.boxes[j]
    z = np.concatenate([(b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]], axis=1)
    cut = (b[:, 0] <= 0) | (b[:, 2] >= self.view[1] - 1) | (b[:, 3] >= self.view[0] - 1)
    r = R * R * (1 + 60 * np.maximum(cover - 0.05, 0) + 3 * cut)
    s = self.p00[i] + r
    k0, k1 = self.p00[i] / s, self.p01[i] / s
    off = z - self.mean[i]
    self.mean[i] += k0[:, None] * off
    self.speed[i] += k1[:, None] * off
    self.p11[i] -= k1 * self.p01[i]
    self.p01[i] *= 1 - k0
    self.p00[i] *= 1 - k0

  def _remember(self, i: np.ndarray, j: np.ndarray, d: Detections, cover: np.ndarray) -> None:
    """Score, class and looks."""
    self.scores[i] = d.scores[j]
    self.votes[i] *= 1 - VOTE_RATE
    self.votes[i, d.class_ids[j]] += VOTE_RATE * d.scores[j]
    if d.embed is None:
      return
    if self.embed is None:
      self.embed = np.zeros((len(self.ids), d.embed.shape[1]), np.float32)
    ok = d.embed[j].any(1) & ((cover < COVERED) | ~self.has_embed[i])   # half hidden, it looks like its occluder
    i, j = i[ok], j[ok]
    rate = np.where(self.has_embed[i], EMBED_RATE, 1)[:, None]
    e = (1 - rate) * self.embed[i] + rate * d.embed[j]
    self.embed[i] = e / np.maximum(np.linalg.norm(e, axis=1, keepdims=True), 1e-6)
    self.has_embed[i] = True

  def _start(self, new: np.ndarray, d: Detections, frame_id: int, bits: np.ndarray | None) -> None:
    n, b = len(new), d.boxes[new].astype(np.float64)
    votes = np.zeros((n, len(self.classes)), np.float32)
    votes[np.arange(n), d.class_ids[new]] = d.scores[new]
    more = {
      "ids": np.arange(self.next_id, self.next_id + n), "born": np.full(n, frame_id), "hits": np.ones(n, np.int64), "lost": np.zeros(n, np.int64),
      "mean": np.concatenate([(b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]], axis=1), "speed": np.zeros((n, 4)),
      "p00": np.full(n, R * R), "p01": np.zeros(n), "p11": np.full(n, V0 * V0), "scores": d.scores[new], "votes": votes,
      "has_bits": bits[new].any(1) if bits is not None else np.zeros(n, bool), "has_embed": d.embed[new].any(1) if d.embed is not None else np.zeros(n, bool),
    }
    if self.bits is not None:
      more["bits"] = bits[new] if bits is not None else np.zeros((n, self.bits.shape[1]), self.bits.dtype)
    if self.embed is not None:
      more["embed"] = d.embed[new] if d.embed is not None else np.zeros((n, self.embed.shape[1]), np.float32)
    for name, value in more.items():
      setattr(self, name, np.concatenate([getattr(self, name), value]))
    self.next_id += n

  def _tracked(self, frame_id: int, d: Detections, found: np.ndarray, cover: np.ndarray, ground: Ground, depth: Depth | None) -> Tracked:
    seen = found >= 0
    state = self.boxes
    boxes = state.astype(np.float32)
    boxes[seen] = d.boxes[found[seen]]
    clear = seen & (cover < COVERED)
    whole = np.where(clear[:, None], boxes, state)   # of the rest the lower edge is the occluder's
    height = whole[:, 3] - whole[:, 1]
    size = np.sqrt(np.maximum(self.mean[:, 2] * self.mean[:, 3], 1))
    edge = np.hypot(np.hypot(PIXEL_STD, EDGE_STD * height), np.where(clear, 0, np.sqrt(self.p00) * size))
    position, std = locate(whole, edge, clear, ground, depth, self.view)
    low, high = np.array([-0.5, -0.5, -0.5, -0.5], np.float32), np.array([self.view[1], self.view[0]] * 2, np.float32) - 0.5
    visibility = np.where(seen, 1 - cover, 0).astype(np.float32)
    told = np.flatnonzero((self.hits > 1) | (self.scores >= PROBABLE))
    return Tracked(
      self.classes, self.ids[told], self.votes[told].argmax(1), self.scores[told], np.clip(boxes[told], low, high), frame_id - self.born[told],
      (visibility < 0.5)[told], visibility[told], d.masks, found[told] if d.masks is not None else np.full(len(told), -1), position[told], std[told])

"""Quality in numbers, by the definitions of the papers. An accumulator takes frames as they come; several of them, one
a segment, are pooled into one result.

`result()` gives {metric: value}; what could not be measured is not in it. BETTER says which way each metric goes."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np

from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W
from openpilot.tools.sim.truth import MAX_DEPTH

SQUARE = 256  # pixels, both sides of the picture in which points are compared
POINT_THRESHOLDS = (1.0, 2.0, 4.0, 8.0, 16.0)  # of its pixels
LOWER = ("abs_rel", "silog", "switch")  # metrics whose name begins so are errors: less is better


def lower_is_better(metric: str) -> bool:
  return metric.startswith(LOWER)


def standing(metric: str, low: float | None, high: float | None) -> str:
  """Of one metric less another's, by its 95% interval: 'better' or 'worse' where that lies on one side of 0, else
  'not decided'."""
  if low is None or high is None or low <= 0 <= high:
    return "not decided"
  return "better" if (high < 0) == lower_is_better(metric) else "worse"


class Sums:
  """Base of the accumulators that are nothing but sums."""

  sums: np.ndarray
  draws = 1000  # of the bootstrap

  @classmethod
  def pooled(cls, parts: Sequence[Self]) -> Self:
    out = parts[0].fresh()
    out.sums = np.sum([p.sums for p in parts], axis=0)
    return out

  def fresh(self) -> Self:
    return type(self)()

  def result(self) -> dict[str, float]:
    raise NotImplementedError

  def reported(self) -> dict[str, float]:
    """What is reported of all frames together, where that takes longer than result(), which the resampling asks."""
    return self.result()


def ratio(a: float, b: float) -> float:
  return float(a / b) if b else float("nan")


def known(values: dict[str, float]) -> dict[str, float]:
  return {k: float(v) for k, v in values.items() if np.isfinite(v)}


# *** depth ***


def align_median(depth: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """depth times median(truth) / median(depth): Eigen et al. 2014, Zhou et al. 2017."""
  return depth * (np.median(truth) / np.median(depth))


def align_least_squares(depth: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """Scale and shift of the inverse depth that fit the truth's in the least squares, back to meters, at most MAX_DEPTH:
  Ranftl et al. 2022 (MiDaS)."""
  a = np.stack([1 / depth, np.ones_like(depth)], axis=1)
  inverse = a @ np.linalg.lstsq(a, 1 / truth, rcond=None)[0]
  return 1 / np.maximum(inverse, 1 / MAX_DEPTH)


def depth_errors(depth: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
  """AbsRel, delta1, SiLog of the pixels of one frame, (N,) each, meters > 0. AbsRel: mean(|d - d*| / d*); delta1: share
  with max(d/d*, d*/d) < 1.25;
  SiLog: sqrt(mean(g^2) - mean(g)^2) of g = ln d - ln d* (Eigen et al. 2014 with lambda = 1; KITTI's is 100 times
  this)."""
  g = np.log(depth) - np.log(truth)
  delta1 = (np.maximum(depth / truth, truth / depth) < 1.25).mean()
  return (
    float(np.abs(depth / truth - 1).mean()),
    float(delta1),
    float(np.sqrt(max(0.0, (g * g).mean() - g.mean() ** 2))),
  )


class Depth(Sums):
  """Of each frame by depth_errors, then the mean over frames: as it is (metric), and aligned frame by frame, by the
  median and by least squares."""

  def __init__(self) -> None:
    self.sums = np.zeros((3, 4))  # metric, median, least squares; frames, AbsRel, delta1, SiLog

  def add(self, depth: np.ndarray, truth: np.ndarray, kind: str = "metric") -> float:
    """(H, W) each, meters, nan where unknown. kind of depth: 'metric'; 'scale', right up to one factor; 'affine',
    inverse depth right up to scale and shift.
    -> AbsRel of the first way that means something, nan where no pixel counts."""
    d, t = depth.ravel().astype(np.float64), truth.ravel().astype(np.float64)
    with np.errstate(invalid="ignore"):
      ok = np.isfinite(d) & np.isfinite(t) & (d > 0) & (t > 0) & (t < MAX_DEPTH)
    d, t = d[ok], t[ok]
    if not len(d):
      return float("nan")
    ways = (
      d if kind == "metric" else None,
      align_median(d, t) if kind in ("metric", "scale") else None,
      align_least_squares(d, t),
    )
    found = [None if w is None else depth_errors(w, t) for w in ways]
    for i, e in enumerate(found):
      if e is not None:
        self.sums[i] += [1, *e]
    return next(e for e in found if e is not None)[0]

  def result(self) -> dict[str, float]:
    out: dict[str, float] = {}
    for suffix, (n, *e) in zip(("", "_median", "_lsq"), self.sums, strict=True):
      # one factor does not change SiLog
      names = ("abs_rel", "delta1", "silog") if suffix != "_median" else ("abs_rel", "delta1")
      out |= {f"{name}{suffix}": ratio(v, n) for name, v in zip(names, e, strict=False)}
    return known(out)


# *** classes ***


class Classes(Sums):
  """Confusion of all frames together. IoU of a class: TP / (TP + FP + FN) (PASCAL VOC, Everingham et al. 2010); mIoU:
  mean over classes that the truth has."""

  def __init__(self, names: Sequence[str]):
    self.names = list(names)
    self.sums = np.zeros((len(names), len(names)))  # truth, prediction

  def fresh(self) -> Self:
    return type(self)(self.names)

  def add(self, classes: np.ndarray, truth: np.ndarray) -> float:
    """(H, W) uint8 each, index into names; 255 on either side counts nowhere. -> share of pixels that are wrong."""
    n = len(self.names)
    ok = (classes < n) & (truth < n)
    found = np.bincount(truth[ok].astype(np.int64) * n + classes[ok], minlength=n * n).reshape(n, n)
    self.sums += found
    return 1 - ratio(np.trace(found), found.sum())

  def result(self) -> dict[str, float]:
    c = self.sums
    union = c.sum(0) + c.sum(1) - np.diag(c)
    iou = {k: c[i, i] / union[i] for i, k in enumerate(self.names) if c[i].sum()}
    return known({"miou": float(np.mean(list(iou.values()))), **{f"iou_{k}": v for k, v in iou.items()}}) if iou else {}


# *** tracks of points ***


class Tracks(Sums):
  """TAP-Vid (Doersch et al. 2022), query 'first': frames behind a point's first one. delta_avg: mean over 1, 2, 4, 8,
  16 px of the share of visible points that are within; occlusion_accuracy: share of visibilities that are right;
  average_jaccard: mean over the same of TP / (TP + FN + FP), where a point said to be visible that is hidden or too far
  off is an FP, and a visible point that is not a TP an FN.

  Pixels are TAP-Vid's: of the picture squeezed to 256x256, so x of the 512x256 view is halved and y is not. TAP-Vid
  takes the mean over videos; here all points count alike. delta_after: delta_avg of points that have been hidden
  before."""

  def __init__(self) -> None:
    # rows, of each threshold: within; TP; FP. And: points evaluated, right about visibility, visible, visible after
    # hiding, those within (mean of thresholds)
    self.sums = np.zeros((4, len(POINT_THRESHOLDS)))

  def add(
    self,
    points: np.ndarray,
    visible: np.ndarray,
    truth: np.ndarray,
    truth_visible: np.ndarray,
    hidden_before: np.ndarray,
    view: tuple[int, int] = (VIEW_H, VIEW_W),
  ) -> float:
    """points, truth (N, 2) pixels of the picture, whose height and width `view` is; visible, truth_visible,
    hidden_before (N,) bool: points of one frame, or of one track.
    -> 1 - average Jaccard of these alone, nan where none is seen or said to be."""
    to_square = [SQUARE / view[1], SQUARE / view[0]]
    error = np.linalg.norm((points.astype(np.float64) - truth) * to_square, axis=1)
    within = error[:, None] < np.array(POINT_THRESHOLDS)
    v, p = truth_visible[:, None], visible[:, None]
    after = truth_visible & hidden_before
    counts = np.array(
      [len(error), (visible == truth_visible).sum(), truth_visible.sum(), after.sum(), within[after].mean(1).sum()]
    )
    tp, fp = (within & v & p).sum(0), (p & ~(within & v)).sum(0)
    self.sums += np.stack([(within & v).sum(0), tp, fp, counts])
    return float(1 - np.mean(tp / (counts[2] + fp))) if visible.any() or truth_visible.any() else float("nan")

  def result(self) -> dict[str, float]:
    within, tp, fp, (n, right, visible, after, within_after) = self.sums
    out = {
      "delta_avg": ratio(within.mean(), visible),
      "occlusion_accuracy": ratio(right, n),
      "average_jaccard": float(np.mean(tp / (visible + fp))) if visible else float("nan"),
      "delta_after": ratio(within_after, after),
    }
    return known(
      {**out, **{f"delta_{t:.0f}px": ratio(w, visible) for t, w in zip(POINT_THRESHOLDS, within, strict=True)}}
    )


# *** how sure ***


def bootstrap(parts: Sequence[Any], n: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
  """95% percentile interval of every metric (Efron 1979): routes, which are independent where frames are not, drawn
  with replacement. {} for fewer than 3."""
  return _resample(parts, lambda idx: type(parts[0]).pooled([parts[i] for i in idx]).result(), n, seed)


def paired_bootstrap(
  a: Sequence[Any], b: Sequence[Any], n: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
  """95% interval of a's metric less b's, both on the same drawn routes: a difference that all share shows, however much
  they differ."""
  assert len(a) == len(b)

  def difference(idx: np.ndarray) -> dict[str, float]:
    x, y = (type(p[0]).pooled([p[i] for i in idx]).result() for p in (a, b))
    return {k: x[k] - y[k] for k in x.keys() & y.keys()}

  return _resample(a, difference, n, seed)


def _resample(
  parts: Sequence[Any], value: Callable[[np.ndarray], dict[str, float]], n: int, seed: int
) -> dict[str, tuple[float, float]]:
  if len(parts) < 3:
    return {}
  r = np.random.default_rng(seed)
  found: dict[str, list[float]] = {}
  for _ in range(n):
    for k, v in value(r.integers(0, len(parts), len(parts))).items():
      found.setdefault(k, []).append(v)
  return {k: (float(np.percentile(v, 2.5)), float(np.percentile(v, 97.5))) for k, v in found.items() if len(v) > n / 2}

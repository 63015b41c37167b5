"""Objects found in frames: COCO's AP and AR by faster-coco-eval, recall at a score and by how much of an object is
seen, and the IoU of masks."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from openpilot.tools.fair.evaluation.metrics import known, ratio
from openpilot.tools.fair.labels import rle
from openpilot.tools.sim.truth import MAP_H, MAP_W

MAP = (MAP_H, MAP_W)  # of masks, where nothing else is said
IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MAX_DETECTIONS = 100


@dataclass
class Objects:
  """Objects of one frame. Boxes x0 y0 x1 y1 in pixels of the picture; masks as COCO run lengths of maps of `map_shape`,
  or none."""

  boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
  cls: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
  score: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
  track: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # -1: no identity
  rle: list[str] | None = None
  visible: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))  # share of truth that is seen
  ignore: np.ndarray = field(
    default_factory=lambda: np.zeros(0, bool)
  )  # of truth: to find it or to miss it counts nowhere
  boxed: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # of truth: it has no mask, though others may
  embed: np.ndarray | None = None  # (M, D)
  map_shape: tuple[int, int] = MAP

  def __len__(self) -> int:
    return len(self.boxes)

  def take(self, keep: np.ndarray) -> "Objects":
    k = np.flatnonzero(keep) if keep.dtype == bool else keep
    return Objects(
      self.boxes[k],
      self.cls[k],
      self.score[k],
      self.track[k],
      None if self.rle is None else [self.rle[i] for i in k],
      self.visible[k],
      self.ignore[k],
      self.boxed[k],
      None if self.embed is None else self.embed[k],
      self.map_shape,
    )


def make_objects(boxes: Any, cls: Any, score: Any = None, **more: Any) -> Objects:
  boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
  n = len(boxes)
  defaults = {
    "score": np.ones(n, np.float32),
    "track": np.full(n, -1),
    "visible": np.ones(n, np.float32),
    "ignore": np.zeros(n, bool),
    "boxed": np.zeros(n, bool),
  }
  return Objects(
    boxes,
    np.asarray(cls, np.int64).reshape(-1),
    **{**defaults, **({} if score is None else {"score": np.asarray(score, np.float32)}), **more},
  )


def beside(truth: Objects, unknown: np.ndarray | None, classes: int) -> Objects:
  """truth, and (N, 4) boxes of which nobody knows what they are, as something of every class that counts nowhere, as
  COCO's crowds."""
  if unknown is None or not len(unknown):
    return truth
  boxes, n = np.concatenate([truth.boxes, np.repeat(unknown, classes, axis=0)]), classes * len(unknown)
  masks = None
  if truth.rle is not None:
    masks = [*truth.rle, *(text for text in box_masks(unknown, truth.map_shape) for _ in range(classes))]
  return make_objects(
    boxes,
    np.concatenate([truth.cls, np.tile(np.arange(classes), len(unknown))]),
    np.concatenate([truth.score, np.ones(n, np.float32)]),
    track=np.concatenate([truth.track, np.full(n, -1)]),
    visible=np.concatenate([truth.visible, np.ones(n, np.float32)]),
    ignore=np.concatenate([truth.ignore, np.ones(n, bool)]),
    boxed=np.concatenate([truth.boxed, np.zeros(n, bool)]),
    rle=masks,
    map_shape=truth.map_shape,
  )


def box_masks(boxes: np.ndarray, shape: tuple[int, int]) -> list[str]:
  """(N, 4) pixels of the picture -> run lengths of maps of that shape (h, w), filled inside."""
  drawn = np.zeros((len(boxes), *shape), bool)
  for mask, box in zip(drawn, boxes, strict=True):
    x0, y0, x1, y1 = np.rint((box + 0.5) / 4).astype(int)
    mask[max(y0, 0) : y1, max(x0, 0) : x1] = True
  return rle.encode(drawn)


def by_masks(truth: Objects) -> Objects:
  """Masks as truth: what has a box alone counts nowhere, as a crowd whose mask is the box."""
  at = np.flatnonzero(truth.boxed)
  if truth.rle is None or not len(at):
    return truth
  masks = dict(zip(at.tolist(), box_masks(truth.boxes[at], truth.map_shape), strict=True))
  return replace(truth, ignore=truth.ignore | truth.boxed, rle=[masks.get(i, text) for i, text in enumerate(truth.rle)])


def overlaps(a: Objects, b: Objects, kind: str, crowd: np.ndarray | None = None) -> np.ndarray:
  """(len(a), len(b)) IoU of boxes ('bbox') or masks ('segm'); for b's that are a crowd, the share of a that lies in it
  (COCO)."""
  from pycocotools import mask as coco

  crowd = np.zeros(len(b), bool) if crowd is None else crowd
  if not len(a) or not len(b):
    return np.zeros((len(a), len(b)))
  x, y = ([xywh(o.boxes) if kind == "bbox" else rles(o)][0] for o in (a, b))
  return np.asarray(coco.iou(x, y, crowd.astype(np.uint8).tolist())).reshape(len(a), len(b))


def xywh(boxes: np.ndarray) -> np.ndarray:
  b = boxes.astype(np.float64)
  return np.concatenate([b[:, :2], b[:, 2:] - b[:, :2]], axis=1)


def rles(o: Objects) -> list[dict[str, Any]]:
  assert o.rle is not None
  return [{"size": list(o.map_shape), "counts": c.encode("ascii")} for c in o.rle]


@dataclass
class Matches:
  """Of one class in one segment: detections by falling score, what each is at each of IOUS, and how many there were to
  find."""

  score: list[np.ndarray] = field(default_factory=list)
  hit: list[np.ndarray] = field(default_factory=list)  # (10, n) bool
  drop: list[np.ndarray] = field(default_factory=list)  # (10, n) bool: on something that counts nowhere
  truths: int = 0

  def join(self) -> "Matches":
    """One array in place of one for each image: it is pooled many times over."""
    if len(self.score) > 1:
      self.score, self.hit, self.drop = (
        [np.concatenate(self.score)],
        [np.concatenate(self.hit, axis=1)],
        [np.concatenate(self.drop, axis=1)],
      )
    return self


def match_image(iou: np.ndarray, score: np.ndarray, ignore: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """COCO's greedy matching of one image and class: detections by falling score take the free truth they overlap most,
  one that counts before one that does not. iou (D, G), score (D,), ignore (G,) -> order (D',), hit, drop (10, D'); hit
  holds the truth's index, or -1."""
  order = np.argsort(-score, kind="mergesort")[:MAX_DETECTIONS]
  gts = np.argsort(ignore, kind="mergesort")
  hit, drop = np.full((len(IOUS), len(order)), -1), np.zeros((len(IOUS), len(order)), bool)
  for t, threshold in enumerate(IOUS):
    taken = np.zeros(len(gts), bool)
    for i, d in enumerate(order):
      best, m = min(threshold, 1 - 1e-10), -1
      for j, g in enumerate(gts):
        if taken[j] and not ignore[g]:
          continue
        if m > -1 and not ignore[gts[m]] and ignore[g]:
          break
        if iou[d, g] >= best:
          best, m = iou[d, g], j
      if m > -1:
        taken[m] = True
        if ignore[gts[m]]:
          drop[t, i] = True
        else:
          hit[t, i] = gts[m]
  return order, hit, drop


class Detections:
  """COCO's AP, AP50, AR (Lin et al. 2014): AP is the mean over IoU 0.5:0.05:0.95 and over classes that occur of the
  precision at 101 recalls; at most 100 detections a frame. recall, precision: at IoU 0.5, of detections of at least
  `score`; recall_clear, _partly, _mostly: of objects with a visible_fraction of at least 0.9, of at least 0.5, of less:
  the share seen of what would be seen with nothing before it. mask_iou ('segm'): mean over true objects of the IoU with
  the detection of at least `score` that Hungarian matching gives it, 0 without one.

  kind: 'bbox' or 'segm'. Truth with `ignore` is COCO's crowd: it needs not be found, and what lies in it is no error.
  """

  draws = 200  # of the bootstrap
  BINS = (("clear", 0.9, 9.0), ("partly", 0.5, 0.9), ("mostly", -1.0, 0.5))

  def __init__(self, names: Sequence[str], kind: str = "bbox", score: float = 0.5):
    self.names, self.kind, self.score = list(names), kind, score
    self.images: list[tuple[Objects, Objects]] = []  # detections, truth
    self.matches = [Matches() for _ in names]
    self.sums = np.zeros(12)  # found, truths of each bin; right, all detections of at least `score`; mask IoU, truths

  @classmethod
  def pooled(cls, parts: Sequence[Self]) -> Self:
    out = cls(parts[0].names, parts[0].kind, parts[0].score)
    out.sums = np.sum([p.sums for p in parts], axis=0)
    for p in parts:
      out.images += p.images
      for a, b in zip(out.matches, (m.join() for m in p.matches), strict=True):
        a.score, a.hit, a.drop, a.truths = a.score + b.score, a.hit + b.hit, a.drop + b.drop, a.truths + b.truths
    return out

  def add(self, found: Objects, truth: Objects) -> float:
    """-> 1 - F1 at `score`, nan where there is nothing to find and nothing was found."""
    self.images.append((found, truth))
    right = wrong = missed = 0
    for k, m in enumerate(self.matches):
      d, g = found.take(found.cls == k), truth.take(truth.cls == k)
      m.truths += int((~g.ignore).sum())
      iou = overlaps(d, g, self.kind, g.ignore)
      order, hit, drop = match_image(iou, d.score, g.ignore)
      m.score.append(d.score[order])
      m.hit.append(hit >= 0)
      m.drop.append(drop)
      sure = d.score[order] >= self.score
      was_found = np.isin(np.arange(len(g)), hit[0, sure])
      for i, (_, low, high) in enumerate(self.BINS):
        here = ~g.ignore & (g.visible >= low) & (g.visible < high)
        self.sums[2 * i : 2 * i + 2] += [(was_found & here).sum(), here.sum()]
      n_right, n_all = int((hit[0, sure] >= 0).sum()), int((sure & ~drop[0]).sum())
      self.sums[6:8] += [n_right, n_all]
      right, wrong, missed = right + n_right, wrong + n_all - n_right, missed + int((~g.ignore).sum()) - n_right
      if self.kind == "segm":
        keep = np.flatnonzero(~g.ignore)
        self.sums[8:10] += [best_iou(iou[d.score >= self.score][:, keep]), len(keep)]
    total = 2 * right + wrong + missed
    return 1 - 2 * right / total if total else float("nan")

  def _class_ap(self, m: Matches) -> tuple[np.ndarray, np.ndarray]:
    """-> precision at 101 recalls, averaged, and recall, (10,) each."""
    score = np.concatenate([np.zeros(0, np.float32), *m.score])
    order = np.argsort(-score, kind="mergesort")
    hit, drop = (np.concatenate([np.zeros((len(IOUS), 0), bool), *x], axis=1)[:, order] for x in (m.hit, m.drop))
    ap, recall = np.zeros(len(IOUS)), np.zeros(len(IOUS))
    for t in range(len(IOUS)):
      tp, fp = np.cumsum(hit[t]), np.cumsum(~hit[t] & ~drop[t])
      if not len(tp):
        continue
      r, p = tp / m.truths, tp / np.maximum(tp + fp, np.spacing(1))
      p = np.maximum.accumulate(p[::-1])[::-1]
      at = np.searchsorted(r, RECALLS, side="left")
      ap[t], recall[t] = np.where(at < len(p), p[np.minimum(at, len(p) - 1)], 0).mean(), r[-1]
    return ap, recall

  def result(self) -> dict[str, float]:
    found = [self._class_ap(m) for m in self.matches if m.truths]
    if not found:
      return {}
    ap, ar = (np.mean([f[i] for f in found], axis=0) for i in (0, 1))
    s = self.sums
    out = {
      "ap": ap.mean(),
      "ap50": ap[0],
      "ar": ar.mean(),
      "recall": ratio(s[0] + s[2] + s[4], s[1] + s[3] + s[5]),
      "precision": ratio(s[6], s[7]),
    }
    out |= {f"recall_{name}": ratio(s[2 * i], s[2 * i + 1]) for i, (name, _, _) in enumerate(self.BINS)}
    if self.kind == "segm":
      out["mask_iou"] = ratio(s[8], s[9])
    return known(out)

  def reported(self) -> dict[str, float]:
    values = self.result()
    return {**values, **self.coco()} if values else values

  def coco(self, library: str = "faster_coco_eval") -> dict[str, float]:
    """ap, ap50, ar of all frames by faster-coco-eval, or by pycocotools: what is reported; `result` gives the same and
    is there for the resampling."""
    truths: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for i, (d, g) in enumerate(self.images):
      for objects, out in ((g, truths), (d, found)):
        boxes = xywh(objects.boxes).tolist()
        for j in range(len(objects)):
          row = {
            "image_id": i + 1,
            "category_id": int(objects.cls[j]) + 1,
            "bbox": boxes[j],
            "area": boxes[j][2] * boxes[j][3],
            "id": len(out) + 1,
          }
          if self.kind == "segm":
            row["segmentation"] = {"size": list(objects.map_shape), "counts": objects.rle[j]}  # type: ignore[index]
          out.append(
            row | ({"iscrowd": int(objects.ignore[j])} if objects is g else {"score": float(objects.score[j])})
          )
    if not found or all(t["iscrowd"] for t in truths):
      return {} if all(t["iscrowd"] for t in truths) else {"ap": 0.0, "ap50": 0.0, "ar": 0.0}
    categories = [{"id": k + 1, "name": n} for k, n in enumerate(self.names)]
    images = [
      {"id": i + 1, "height": 4 * g.map_shape[0], "width": 4 * g.map_shape[1]} for i, (_, g) in enumerate(self.images)
    ]
    dataset = {"info": {}, "images": images, "annotations": truths, "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
      if library == "faster_coco_eval":
        from faster_coco_eval import COCO, COCOeval_faster as Eval
      else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval as Eval
      truth = COCO()
      truth.dataset = dataset
      truth.createIndex()
      e = Eval(truth, truth.loadRes(found), self.kind)
      e.params.maxDets = [1, 10, MAX_DETECTIONS]
      e.evaluate()
      e.accumulate()
      e.summarize()
    return {"ap": float(e.stats[0]), "ap50": float(e.stats[1]), "ar": float(e.stats[8])}


def best_iou(iou: np.ndarray) -> float:
  """The greatest sum of IoUs that a one-to-one matching has."""
  from scipy.optimize import linear_sum_assignment

  if not iou.size:
    return 0.0
  return float(iou[linear_sum_assignment(-iou)].sum())

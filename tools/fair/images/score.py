"""What was found in pictures beside what is there: COCO's AP by faster-coco-eval, IoU, confusion, errors."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from openpilot.tools.fair.evaluation.detections import RECALLS, best_iou

IOU = 0.5  # at which a detection is right, where one number is told
SIZES = ("small", "medium", "large")
STATS = ("ap", "ap50", "ap75", *(f"ap_{s}" for s in SIZES), "ar1", "ar10", "ar100", *(f"ar_{s}" for s in SIZES))
AT = {"0.50": 0, "0.75": 5}  # places among COCO's ten thresholds


def known(x: float) -> float | None:
  """COCO's -1, of what does not occur, is none."""
  return None if x < 0 or not np.isfinite(x) else float(x)


def coco_scores(
  truth: Mapping[str, Any], found: Sequence[Mapping[str, Any]], kind: str, library: str = "faster_coco_eval"
) -> dict[str, Any]:
  """COCO's numbers. truth: a COCO JSON, read; found: COCO's results; kind: 'bbox' or 'segm'.

  -> 'stats' by name (None: nothing of that size is there), 'classes': {name: {ap, ap50, ar, truths}}, 'curves': {class
  or 'all': {IoU: precision at 101 recalls}}."""
  categories = list(truth["categories"])
  counts = {
    c["id"]: sum(a["category_id"] == c["id"] and not a["iscrowd"] for a in truth["annotations"]) for c in categories
  }
  if not found:
    stats = {k: 0.0 if k in ("ap", "ap50", "ap75", "ar1", "ar10", "ar100") else None for k in STATS}
    nothing = {"ap": 0.0, "ap50": 0.0, "ar": 0.0, "best_f1": 0.0, "best_score": 0.0}
    classes = {c["name"]: {**nothing, "truths": n} for c in categories if (n := counts[c["id"]])}
    return {"stats": stats, "classes": classes, "curves": {}}
  with contextlib.redirect_stdout(io.StringIO()):
    if library == "faster_coco_eval":
      from faster_coco_eval import COCO, COCOeval_faster as Eval
    else:
      from pycocotools.coco import COCO
      from pycocotools.cocoeval import COCOeval as Eval
    gt = COCO()
    gt.dataset = {"info": {}, **{k: list(truth[k]) for k in ("images", "annotations", "categories")}}
    gt.createIndex()
    e = Eval(gt, gt.loadRes([dict(f) for f in found]), kind)
    e.params.imgIds = sorted(i["id"] for i in truth["images"])
    e.evaluate()
    e.accumulate()
    e.summarize()
  stats = {k: known(float(v)) for k, v in zip(STATS, e.stats[: len(STATS)], strict=True)}
  precision, scores = (np.asarray(e.eval[k]) for k in ("precision", "scores"))  # IoU, recall, class, size, detections
  recall = np.asarray(e.eval["recall"])  # IoU, class, size, detections
  classes, curves = {}, {}
  for k, c in enumerate(sorted(categories, key=lambda c: c["id"])):
    mine = precision[:, :, k, 0, -1]
    if counts[c["id"]]:
      f1, at = best_f1(precision[0, :, k, 0, -1], scores[0, :, k, 0, -1])
      classes[c["name"]] = {
        "ap": mean(mine),
        "ap50": mean(mine[:1]),
        "ar": mean(recall[:, k, 0, -1]),
        "truths": counts[c["id"]],
        "best_f1": f1,
        "best_score": at,
      }
      curves[c["name"]] = {at: [max(0.0, float(v)) for v in mine[i]] for at, i in AT.items()}
  if curves:
    curves["all"] = {at: np.mean([curves[c][at] for c in curves], axis=0).tolist() for at in AT}
  return {"stats": stats, "classes": classes, "curves": curves}


def best_f1(precision: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
  """(101,) at RECALLS -> the best F1, and the score from which on detections give it."""
  f1 = 2 * precision * RECALLS / np.maximum(precision + RECALLS, 1e-9)
  best = int(f1.argmax())
  return max(0.0, float(f1[best])), max(0.0, float(scores[best]))


def mean(x: np.ndarray) -> float:
  return float(x[x > -1].mean()) if (x > -1).any() else 0.0


def iou_table(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], kind: str) -> np.ndarray:
  """(len(a), len(b)) of annotations' boxes or masks."""
  if not a or not b:
    return np.zeros((len(a), len(b)))
  x, y = ([shape_of(r, kind) for r in rows] for rows in (a, b))
  return np.asarray(coco_mask.iou(x, y, [0] * len(y))).reshape(len(a), len(b))


def shape_of(row: Mapping[str, Any], kind: str) -> Any:
  if kind == "bbox":
    return row["bbox"]
  s = row["segmentation"]
  return {"size": s["size"], "counts": s["counts"].encode() if isinstance(s["counts"], str) else s["counts"]}


def by_image(rows: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
  out: dict[int, list[Mapping[str, Any]]] = {}
  for r in rows:
    out.setdefault(r["image_id"], []).append(r)
  return out


def iou_tables(
  truth: Mapping[str, Any], found: Sequence[Mapping[str, Any]], kind: str, score: float
) -> Iterator[np.ndarray]:
  """Of each picture and class: detections of at least `score` beside true objects, crowds left out."""
  mine, theirs = by_image([f for f in found if f["score"] >= score]), by_image(truth["annotations"])
  for image in truth["images"]:
    for c in truth["categories"]:
      g = [a for a in theirs.get(image["id"], []) if a["category_id"] == c["id"] and not a["iscrowd"] and has(a, kind)]
      yield iou_table([f for f in mine.get(image["id"], []) if f["category_id"] == c["id"]], g, kind)


def mean_iou(truth: Mapping[str, Any], found: Sequence[Mapping[str, Any]], kind: str, score: float) -> float | None:
  """The mean over true objects of the IoU with the detection of their class, of at least `score`, that a one-to-one
  matching of the greatest sum gives; 0 without one. None where there are no objects."""
  sums, n = 0.0, 0
  for table in iou_tables(truth, found, kind, score):
    sums += best_iou(table)
    n += table.shape[1]
  return sums / n if n else None


def matched_iou(truth: Mapping[str, Any], found: Sequence[Mapping[str, Any]], kind: str, score: float) -> float | None:
  """The mean IoU of true objects with their detections, of those pairs of at least IOU; None where there are none."""
  tables = iou_tables(truth, found, kind, score)
  values = [float(table[i, j]) for table in tables for i, j in pairs_of(table)]
  return float(np.mean(values)) if values else None


def has(row: Mapping[str, Any], kind: str) -> bool:
  return kind == "bbox" or bool(row.get("segmentation"))


def confusion(truth: Mapping[str, Any], found: Sequence[Mapping[str, Any]], score: float) -> np.ndarray:
  """(K + 1, K + 1) int64: rows what is there, columns what was found, in the order of the categories; the last row is
  found where nothing is, the last column missed. Pairs of any class of at least IOU, the best overlap first. What is
  found on a crowd does not count."""
  index = {c["id"]: k for k, c in enumerate(truth["categories"])}
  out = np.zeros((len(index) + 1, len(index) + 1), np.int64)
  mine, theirs = by_image([f for f in found if f["score"] >= score]), by_image(truth["annotations"])
  for image in truth["images"]:
    every, d = theirs.get(image["id"], []), mine.get(image["id"], [])
    g, crowd = [a for a in every if not a["iscrowd"]], [a for a in every if a["iscrowd"]]
    pairs = pairs_of(iou_table(d, g, "bbox"))
    taken = {i for i, _ in pairs}
    for i, j in pairs:
      out[index[g[j]["category_id"]], index[d[i]["category_id"]]] += 1
    for j in set(range(len(g))) - {j for _, j in pairs}:
      out[index[g[j]["category_id"]], -1] += 1
    on_crowd = inside(d, crowd)
    for i in set(range(len(d))) - taken:
      if not on_crowd[i]:
        out[-1, index[d[i]["category_id"]]] += 1
  return out


def pairs_of(iou: np.ndarray) -> list[tuple[int, int]]:
  """Rows and columns, each once, of at least IOU, the greatest first."""
  out: list[tuple[int, int]] = []
  rows, columns = set[int](), set[int]()
  for flat in np.argsort(-iou, axis=None, kind="stable").tolist():
    i, j = divmod(flat, iou.shape[1])
    if iou[i, j] < IOU:
      break
    if i not in rows and j not in columns:
      rows.add(i)
      columns.add(j)
      out.append((i, j))
  return out


def inside(d: Sequence[Mapping[str, Any]], crowd: Sequence[Mapping[str, Any]]) -> np.ndarray:
  """(len(d),) bool: at least half of the box lies in a crowd's."""
  if not d or not crowd:
    return np.zeros(len(d), bool)
  share = coco_mask.iou([r["bbox"] for r in d], [r["bbox"] for r in crowd], [1] * len(crowd))
  return np.asarray(share).reshape(len(d), len(crowd)).max(1) >= IOU


def errors(truth: Mapping[str, Any], found: Sequence[Mapping[str, Any]], score: float) -> dict[int, float]:
  """Picture -> 1 - F1 at `score` and IOU, of the right classes; pictures without truth and detection are left out."""
  out: dict[int, float] = {}
  mine, theirs = by_image(found), by_image(truth["annotations"])
  for image in truth["images"]:
    one = {**truth, "images": [image], "annotations": theirs.get(image["id"], [])}
    m = confusion(one, mine.get(image["id"], []), score)
    total = 2 * m[:-1, :-1].sum() + m[-1].sum() + m[:, -1].sum()
    if total:
      out[image["id"]] = 1 - 2 * float(np.trace(m[:-1, :-1])) / float(total)
  return out


def at_score(m: np.ndarray) -> dict[str, float | None]:
  """Of a confusion: precision, recall, F1 over all classes."""
  right, all_found, all_true = float(np.trace(m[:-1, :-1])), float(m[:, :-1].sum()), float(m[:-1].sum())
  p, r = (right / n if n else None for n in (all_found, all_true))
  f1 = 2 * right / (all_found + all_true) if all_found + all_true else None
  return {"precision": p, "recall": r, "f1": f1}

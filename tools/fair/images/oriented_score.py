"""Oriented boxes that were found beside those that are there, by DOTA's rules: in each class, the best score first, a
box is right where its rotated IoU with the object that it overlaps most is above the threshold and no better one took
that object; where that object is difficult, it counts nowhere (DOTA_devkit's dota_evaluation_task1). AP is VOC 2007's
over 11 recalls, as DOTA's own figures are; beside it the area under the curve, as VOC has it since 2010."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openpilot.tools.fair.evaluation.detections import RECALLS
from openpilot.tools.fair.images.score import AT, best_f1
from openpilot.tools.fair.rotated import rotated_iou

THRESHOLDS = tuple(np.round(np.arange(0.5, 0.96, 0.05), 2).tolist())  # COCO's ten


@dataclass
class Boxes:
  """Of one picture. boxes (N, 5), cls (N,) int64. Of what is there difficult (N,) bool, and unknown (N,) bool, of no
  class that is told apart: what is found there counts nowhere; of what was found scores (N,)."""

  boxes: np.ndarray
  cls: np.ndarray
  scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
  difficult: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
  unknown: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))


@dataclass
class Matched:
  """Of one class at all THRESHOLDS. scores (D,) falling; right, wrong (thresholds, D) bool, neither: it counts nowhere;
  positives: objects that count."""

  scores: np.ndarray
  right: np.ndarray
  wrong: np.ndarray
  positives: int


def match(truth: Sequence[Boxes], found: Sequence[Boxes], cls: int, tables: Sequence[np.ndarray]) -> Matched:
  """tables: rotated IoU of all found with all true boxes, of each picture."""
  positives = sum(int(((t.cls == cls) & ~t.difficult & ~t.unknown).sum()) for t in truth)
  scores, best, place = [], [], []
  for i, (t, f, table) in enumerate(zip(truth, found, tables, strict=True)):
    mine = np.flatnonzero(f.cls == cls)
    able = np.flatnonzero((t.cls == cls) | t.unknown)
    part = table[np.ix_(mine, able)]
    most = part.argmax(1) if len(able) else np.zeros(len(mine), int)
    scores.append(f.scores[mine])
    best.append(part[np.arange(len(mine)), most] if len(able) else np.zeros(len(mine)))
    at = able[most] if len(able) else np.full(len(mine), -1)
    free = (t.difficult | t.unknown)[at] if len(able) else np.zeros(len(mine), bool)
    place.append(np.stack([np.full(len(mine), i), at, free], 1))
  flat, iou, where = (np.concatenate(x) for x in (scores, best, place))
  order = np.argsort(-flat, kind="stable")
  flat, iou, where = flat[order], iou[order], where[order]
  right, wrong = (np.zeros((len(THRESHOLDS), len(flat)), bool) for _ in range(2))
  for k, least in enumerate(THRESHOLDS):
    over = iou > least
    free = where[:, 2] > 0
    candidates = np.flatnonzero(over & ~free)
    _, first = np.unique(where[candidates, :2], axis=0, return_index=True)  # the best of each object
    right[k, candidates[first]] = True
    wrong[k] = ~right[k] & ~(over & free)
  return Matched(flat, right, wrong, positives)


def curve(m: Matched, k: int) -> tuple[np.ndarray, np.ndarray]:
  """-> recall, precision at each detection that counts, by falling score."""
  counts = m.right[k] | m.wrong[k]
  tp, fp = np.cumsum(m.right[k][counts]), np.cumsum(m.wrong[k][counts])
  return tp / max(m.positives, 1), tp / np.maximum(tp + fp, 1)


def joined(parts: Sequence[Matched]) -> Matched:
  """Of one class in several groups of pictures."""
  scores = np.concatenate([m.scores for m in parts])
  order = np.argsort(-scores, kind="stable")
  right, wrong = (np.concatenate([getattr(m, k) for m in parts], 1)[:, order] for k in ("right", "wrong"))
  return Matched(scores[order], right, wrong, sum(m.positives for m in parts))


def average_precision(recall: np.ndarray, precision: np.ndarray, eleven: bool) -> float:
  """Of a curve. eleven: VOC 2007's mean of the best precision at recalls of at least 0, 0.1, ..., 1; else the area
  under the curve made monotone."""
  if eleven:
    return float(np.mean([precision[recall >= t - 1e-12].max(initial=0.0) for t in np.linspace(0, 1, 11)]))
  r, p = np.concatenate([[0.0], recall, [1.0]]), np.concatenate([[0.0], precision, [0.0]])
  p = np.maximum.accumulate(p[::-1])[::-1]
  return float(((r[1:] - r[:-1]) * p[1:]).sum())


def curves_of(m: Matched) -> list[tuple[np.ndarray, np.ndarray]]:
  """Its curve at each of THRESHOLDS."""
  return [curve(m, i) for i in range(len(THRESHOLDS))]


def averages(lines: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
  """Of the curves of one class: ap50 (11 recalls), ap50_area, ap75_area, ap (area, mean over IoU .50 to .95)."""
  areas = [average_precision(*line, eleven=False) for line in lines]
  return {
    "ap": float(np.mean(areas)),
    "ap50": average_precision(*lines[0], eleven=True),
    "ap50_area": areas[0],
    "ap75_area": areas[AT["0.75"]],
  }


def sampled(recall: np.ndarray, precision: np.ndarray) -> np.ndarray:
  """(101,) best precision at recalls of at least RECALLS."""
  best = np.maximum.accumulate(precision[::-1])[::-1]
  at = np.searchsorted(recall, RECALLS, side="left")
  return np.append(best, 0.0)[np.minimum(at, len(best))]


def oriented_scores(
  truth: Sequence[Boxes], found: Sequence[Boxes], names: Sequence[str], score: float
) -> dict[str, Any]:
  """-> 'stats': ap50 (11 recalls), ap50_area, ap75_area, ap (area, mean over IoU .50 to .95), None where nothing is;
  'classes' of those that occur; 'curves'; 'at_score': precision, recall, F1 over all classes of detections of at least
  `score`."""
  tables = [rotated_iou(f.boxes, t.boxes) for f, t in zip(found, truth, strict=True)]
  classes: dict[str, dict[str, Any]] = {}
  curves: dict[str, dict[str, list[float]]] = {}
  right = wrong = positives = 0
  for k, name in enumerate(names):
    m = match(truth, found, k, tables)
    sure = m.scores >= score
    right += int(m.right[0][sure].sum())
    wrong += int(m.wrong[0][sure].sum())
    positives += m.positives
    if not m.positives:
      continue
    lines = curves_of(m)
    precision = sampled(*lines[0])
    counted = m.scores[m.right[0] | m.wrong[0]]
    at = np.minimum(np.searchsorted(lines[0][0], RECALLS, side="left"), max(len(counted) - 1, 0))
    best, least = best_f1(precision, counted[at] if len(counted) else np.zeros(len(RECALLS)))
    classes[name] = {**averages(lines), "truths": m.positives, "best_f1": best, "best_score": least}
    curves[name] = {t: sampled(*lines[i]).tolist() for t, i in AT.items()}
  if curves:
    curves["all"] = {t: np.mean([curves[c][t] for c in classes], axis=0).tolist() for t in AT}
  stats = {
    key: float(np.mean([c[key] for c in classes.values()])) if classes else None
    for key in ("ap", "ap50", "ap50_area", "ap75_area")
  }
  f1 = 2 * right / (right + wrong + positives) if right + wrong + positives else None
  at_score = {
    "precision": right / (right + wrong) if right + wrong else None,
    "recall": right / positives if positives else None,
    "f1": f1,
  }
  return {"stats": stats, "classes": classes, "curves": curves, "at_score": at_score}


def picture_error(truth: Boxes, found: Boxes, classes: int, score: float) -> float | None:
  """1 - F1 of one picture, None where nothing is there or found."""
  sure = found.scores >= score
  few = Boxes(found.boxes[sure], found.cls[sure], found.scores[sure])
  table = [rotated_iou(few.boxes, truth.boxes)]
  made = [match([truth], [few], k, table) for k in range(classes)]
  right, wrong = (sum(int(getattr(m, key)[0].sum()) for m in made) for key in ("right", "wrong"))
  total = right + wrong + sum(m.positives for m in made)
  return 1 - 2 * right / total if total else None

"""The page of `images evaluate`: one HTML file with all in it, and nothing fetched."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from openpilot.tools.lib.files import atomic_path, write_json
from openpilot.tools.replay.report import load_template, png

SHOWN = 30  # classes of a confusion matrix, the most frequent
WORDS = {
  "ap": "mean over IoU 0.50 to 0.95",
  "ap50": "at IoU 0.50",
  "ap75": "at IoU 0.75",
  "ap50_area": "at IoU 0.50, the area under the curve",
  "ap75_area": "at IoU 0.75, the area under the curve",
  "ap_small": "objects below 32 x 32 pixels",
  "ap_medium": "to 96 x 96 pixels",
  "ap_large": "above",
  "ar1": "recall with 1 detection a picture",
  "ar10": "with 10",
  "ar100": "with 100",
}
KINDS = {"bbox": "boxes", "segm": "masks", "oriented": "oriented boxes"}
COCO = (
  "An empty cell: no object of that size. COCO's average precision, by faster-coco-eval; at most 100 detections a "
  "picture."
)
DOTA = (
  "Average precision by DOTA's rules: rotated IoU, at IoU 0.50 the mean over 11 recalls, what is difficult counts "
  "nowhere. The mean over IoU 0.50 to 0.95 is of areas under curves."
)
WIDTH, HEIGHT, LEFT, BELOW = 360, 240, 40, 30


def number(v: Any) -> str:
  return "" if v is None or isinstance(v, jinja2.Undefined) else f"{v:.3f}"


def curve(precision: Sequence[float]) -> str:
  """Precision at 101 recalls as the points of an SVG line."""
  n = len(precision) - 1
  return " ".join(f"{LEFT + WIDTH * i / n:.1f},{HEIGHT * (1 - p) + 8:.1f}" for i, p in enumerate(precision))


def matrix(r: dict[str, Any]) -> dict[str, Any] | None:
  """The confusion of the most frequent classes; of each row its share of what is there."""
  if "confusion" not in r:
    return None
  m = np.array(r["confusion"])
  names = [*r["classes"], "nothing"]
  often = np.argsort(-(m.sum(0) + m.sum(1))[:-1], kind="stable")
  keep = [*sorted(k for k in often[:SHOWN].tolist() if m[k].sum() + m[:, k].sum()), len(names) - 1]
  rows = []
  for i in keep:
    total = max(1, int(m[i].sum()))
    cells = [{"n": int(m[i, j]), "share": m[i, j] / total, "right": i == j} for j in keep]
    rows.append({"name": names[i], "cells": cells, "total": int(m[i].sum())})
  return {"names": [names[j] for j in keep], "rows": rows, "left_out": max(0, len(names) - len(keep))}


def page(results: dict[str, Any], worst: Sequence[np.ndarray]) -> str:
  """worst: pictures in the order of results['worst']."""
  template = load_template(Path(__file__).with_name("page.html.j2"))
  plots = []
  for kind, title in KINDS.items():
    curves = results.get(kind, {}).get("curves") or {}
    if "all" in curves:
      lines = [(at, curve(p)) for at, p in curves["all"].items()]
      plots.append({"title": title, "lines": lines})
  return template.render(
    r=results,
    kinds={k: v for k, v in KINDS.items() if k in results},
    words={k: v for k, v in WORDS.items() if any(k in (results.get(kind, {}).get("stats") or {}) for kind in KINDS)},
    note=DOTA if "oriented" in results else COCO,
    classes=next((results[k].get("classes") or {} for k in KINDS if k in results), {}),
    number=number,
    matrix=matrix(results),
    plots=plots,
    size=(LEFT + WIDTH + 10, HEIGHT + BELOW + 12),
    box=(LEFT, 8, WIDTH, HEIGHT),
    worst=[{**w, "image": png(p)} for w, p in zip(results.get("worst", []), worst, strict=True)],
  )


def write_page(results: dict[str, Any], worst: Sequence[np.ndarray], folder: Path) -> None:
  """evaluation.json and evaluation.html in `folder`."""
  write_json(folder / "evaluation.json", results)
  with atomic_path(folder / "evaluation.html") as tmp:
    tmp.write_text(page(results, worst))

"""What a detection transformer says of pictures, as COCO's results, and COCO's numbers of it by the names that trainers
log."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openpilot.tools.fair.detr.pictures import to_pixels
from openpilot.tools.fair.images.score import coco_scores

LOW = 0.001  # score below which nothing is told: average precision wants the unsure, too
MOST = 300  # detections of a picture
# the names of torchmetrics' MeanAveragePrecision -> those of score.py
NAMES = {
  "map": "ap",
  "map_50": "ap50",
  "map_75": "ap75",
  "map_small": "ap_small",
  "map_medium": "ap_medium",
  "map_large": "ap_large",
  "mar_1": "ar1",
  "mar_10": "ar10",
  "mar_100": "ar100",
  "mar_small": "ar_small",
  "mar_medium": "ar_medium",
  "mar_large": "ar_large",
}


def scored(logits: Tensor, boxes: Tensor, head: str, most: int = MOST) -> tuple[Tensor, Tensor, Tensor]:
  """(B, Q, C) logits and (B, Q, 4) boxes -> scores (B, K), classes (B, K), boxes (B, K, 4), the best first: as
  transformers' post-processing has it."""
  if head == "detr":
    scores, classes = logits.softmax(-1)[..., :-1].max(-1)
    scores, order = scores.sort(-1, descending=True)
    scores, order = scores[:, :most], order[:, :most]
    return scores, classes.gather(1, order), boxes.gather(1, order[..., None].expand(-1, -1, 4))
  count = logits.shape[-1]
  scores, flat = logits.sigmoid().flatten(1).topk(min(most, logits.shape[1] * count), dim=-1)
  return scores, flat % count, boxes.gather(1, (flat // count)[..., None].expand(-1, -1, 4))


def rows_of(
  logits: Tensor, boxes: Tensor, labels: Sequence[Mapping[str, Tensor]], head: str, low: float = LOW
) -> list[list[dict[str, Any]]]:
  """COCO's results of each picture, in its own pixels; without ids. labels: image_id and orig_size (h, w)."""
  scores, classes, placed = (t.cpu() for t in scored(logits.float(), boxes.float(), head))
  out = []
  for s, c, b, said in zip(scores.numpy(), classes.numpy(), placed.numpy(), labels, strict=True):
    h, w = (int(v) for v in said["orig_size"])
    keep = s >= low
    x = to_pixels(b[keep], w, h)
    low_, high = np.clip(x[:, :2], 0, [w, h]), np.clip(x[:, :2] + x[:, 2:], 0, [w, h])
    inner = np.concatenate([low_, high - low_], 1)
    whole = (inner[:, 2:] > 0).all(1)
    image = int(said["image_id"])
    rows = zip(inner[whole].tolist(), s[keep][whole].tolist(), c[keep][whole].tolist(), strict=True)
    out.append([{"image_id": image, "category_id": k, "bbox": b_, "score": v} for b_, v, k in rows])
  return out


def numbered(by_picture: Mapping[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
  """Results of all pictures, which get ids from 1: no copies, there may be millions."""
  rows = [r for i in sorted(by_picture) for r in by_picture[i]]
  for k, r in enumerate(rows, 1):
    r["id"] = k
  return rows


def metrics(
  truth: Mapping[str, Any], found: Sequence[Mapping[str, Any]], library: str = "faster_coco_eval"
) -> dict[str, float]:
  """COCO's numbers by torchmetrics' names: map, map_50, ..., mar_large, and map_CLASS and mar_100_CLASS, with _ for
  blanks; a class of such a name ("small", "50"), or of another class's, gets an underscore more. What does not occur is
  -1, as there."""
  scores = coco_scores(truth, found, "bbox", library)
  out = {k: -1.0 if scores["stats"][v] is None else float(scores["stats"][v]) for k, v in NAMES.items()}
  for name, c in scores["classes"].items():
    key = "_".join(str(name).split())
    while f"map_{key}" in out or f"mar_{key}" in out:
      key += "_"
    out[f"map_{key}"], out[f"mar_100_{key}"] = float(c["ap"]), float(c["ar"])
  return out


@torch.no_grad()
def used_queries(logits: Tensor, head: str, score: float = 0.3) -> float:
  """Of all queries, the share that says something of at least `score`."""
  best = (logits.softmax(-1)[..., :-1] if head == "detr" else logits.sigmoid()).amax(-1)
  return float((best >= score).float().mean())

"""The last page of a training: as `images evaluate` makes it, and how much is found where pictures are crowded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from openpilot.tools.fair.detr.data import Labeled
from openpilot.tools.fair.images.evaluate import METRICS, judge, lines_of
from openpilot.tools.fair.images.score import at_score, by_image, coco_scores, confusion, errors
from openpilot.tools.lib.pictures import read_rgb

BUCKETS = ((1, 9), (10, 29), (30, 59), (60, 99), (100, None))  # objects of a picture
KEPT = 0.02  # score below which what is found is left out of the tables that are not AP's


def crowding(truth: Mapping[str, Any], found: Sequence[Mapping[str, Any]], score: float) -> list[dict[str, Any]]:
  """COCO's numbers of pictures by how many objects are on them, and how many are found of at least `score`."""
  theirs, mine = by_image(truth["annotations"]), by_image(found)
  count = {i["id"]: sum(not a["iscrowd"] for a in theirs.get(i["id"], [])) for i in truth["images"]}
  out = []
  for low, high in BUCKETS:
    images = [i for i in truth["images"] if low <= count[i["id"]] and (high is None or count[i["id"]] <= high)]
    if not images:
      continue
    own = {**truth, "images": images, "annotations": [a for i in images for a in theirs.get(i["id"], [])]}
    said = [f for i in images for f in mine.get(i["id"], [])]
    stats = coco_scores(own, said, "bbox")["stats"]
    sure = sum(f["score"] >= score for f in said)
    out.append(
      {
        "objects": f"{low} to {high}" if high else f"{low} and more",
        "pictures": len(images),
        **{k: stats[k] for k in ("ap", "ap50", "ar100")},
        "found": sure / len(images),
        "there": sum(count[i["id"]] for i in images) / len(images),
      }
    )
  return out


def report(
  name: str, data: Labeled, said: str, found: list[dict[str, Any]], seconds: float, score: float, worst: int, out: Path
) -> dict[str, Any]:
  """Writes evaluation.html and evaluation.json. said: what the data is called. -> results."""
  from openpilot.tools.fair.images.draw import beside, draw
  from openpilot.tools.fair.images.page import write_page

  truth = data.truth()
  sure = [f for f in found if f["score"] >= KEPT]
  m = confusion(truth, sure, score)
  results: dict[str, Any] = {
    "model": name,
    "data": said,
    "pictures": len(data),
    "objects": int((~data.crowd).sum()),
    "crowds": int(data.crowd.sum()),
    "classes": list(data.names),
    "score": score,
    "seconds_per_picture": round(seconds / max(1, len(data)), 4),
    "bbox": judge(truth, found, "bbox", SimpleNamespace(metrics=METRICS, score=score)),  # type: ignore[arg-type]
    "at_score": at_score(m),
    "confusion": m.tolist(),
    "crowding": crowding(truth, found, score),
  }
  of_picture = errors(truth, sure, score)
  ranked = sorted((i for i in of_picture if of_picture[i] > 0), key=lambda i: -of_picture[i])[:worst]
  results["worst"] = [{"picture": data.files[i], "error": round(of_picture[i], 4)} for i in ranked]
  names = dict(enumerate(data.names))
  mine, theirs = by_image([f for f in sure if f["score"] >= score]), by_image(truth["annotations"])
  drawn: list[np.ndarray] = []
  for i in ranked:
    rgb = read_rgb(data.paths[i])
    drawn.append(beside(draw(rgb, mine.get(i, []), names), draw(rgb, theirs.get(i, []), names)))
  print("\n".join(lines_of(results)))
  write_page(results, drawn, out)
  return results

"""Judges a student of oriented boxes by labeled pictures: the part of `images evaluate` that follows DOTA's rules."""

import time
from typing import Any

import numpy as np
from tqdm import tqdm

from openpilot.tools.fair.images.oriented import orient
from openpilot.tools.fair.images.oriented_score import Boxes, oriented_scores, picture_error
from openpilot.tools.fair.images.predict import Predictor, coco_rows
from openpilot.tools.fair.images.store import open_labeled
from openpilot.tools.fair.images.told import known_names, last_lines, listed_others, nothing_known, text
from openpilot.tools.fair.labels.sources.pictures import Pictures
from openpilot.tools.fair.spec import UNKNOWN, plain
from openpilot.tools.lib.errors import warn
from openpilot.tools.lib.said import public_path


def parts_of(args: Any) -> list[Pictures]:
  """Of data with parts of their own those to judge by: test, or else val, or all. Raises UserError."""
  parts = open_labeled(args.data, args.images, "")
  for ends in (("-test",), ("-val", "-valid")):
    if some := [p for p in parts if p.segment.route.endswith(ends)]:
      if len(some) < len(parts):
        warn(f"{args.data}: judged by its part {', '.join(p.segment.route for p in some)} alone; name another's folder")
      return orient(some)
  return orient(parts)


def class_map(parts: list[Pictures], names: list[str], args: Any) -> dict[str, int]:
  """The data's name -> the student's class, -1: left out; names of what is unknown are not in it. Raises UserError."""
  known = known_names(names, args)
  used = {(p.carries.boxes or ())[k] for p in parts for r in range(len(p.entries)) for k in p.said(r).cls.tolist()}
  used = {n for n in used if plain(n) not in UNKNOWN}
  if other := sorted(n for n in used if plain(n) not in known):
    warn(f"left out are labels of classes that the student does not know: {listed_others(other, names, args)}")
  if not used - set(other):
    raise nothing_known(names, args)
  return {n: known.get(plain(n), -1) for n in used}


def truth_of(part: Pictures, row: int, classes: dict[str, int]) -> Boxes:
  """Counted from the picture's corner."""
  said, names = part.said(row), part.carries.boxes or ()
  assert said.oriented is not None and said.difficult is not None
  unknown = np.array([plain(names[k]) in UNKNOWN for k in said.cls.tolist()], bool)
  cls = np.array([classes.get(names[k], -1) for k in said.cls.tolist()], np.int64)
  keep = unknown | (cls >= 0)
  boxes = said.oriented[keep] + [0.5, 0.5, 0, 0, 0]
  return Boxes(boxes, cls[keep], difficult=said.difficult[keep], unknown=unknown[keep])


def as_rows(truth: Boxes) -> list[dict[str, Any]]:
  """To be drawn."""
  free = truth.difficult | truth.unknown
  return [
    {"obb": b, "category_id": k, "iscrowd": int(f)}
    for b, k, f in zip(truth.boxes.tolist(), truth.cls.tolist(), free.tolist(), strict=True)
    if k >= 0
  ]


def lines_of(r: dict[str, Any]) -> list[str]:
  s = r["oriented"]["stats"]
  counts = f"{r['pictures']} pictures, {r['objects']} objects of {len(r['classes'])} classes, {r['crowds']} difficult"
  by_area = f"by area mAP50 {text(s['ap50_area'])}, mAP75 {text(s['ap75_area'])}, mAP50-95 {text(s['ap'])}"
  out = [f"{r['model']}: {counts}", f"oriented     mAP50 {text(s['ap50'])} by DOTA's rules, 11 recalls; {by_area}"]
  return out + last_lines(r, r["oriented"]["classes"])


def evaluate_oriented(predictor: Predictor, args: Any) -> dict[str, Any]:
  """args: of evaluate. Writes the page and the JSON. -> results. Raises UserError."""
  parts = parts_of(args)
  classes = class_map(parts, predictor.names, args)
  places = [(p, r) for p in parts for r in range(len(p.entries))]
  truth, found, rows = [], [], []
  begun = time.perf_counter()
  for part, row in tqdm(places, desc="evaluate", unit="picture"):
    ((_, rgb),) = part.read([row])
    (one,) = predictor([rgb])
    assert one.oriented is not None
    found.append(Boxes(one.oriented, one.classes, one.scores))
    rows.append(coco_rows(one, row, range(len(predictor.names))))
    truth.append(truth_of(part, row, classes))
  seconds = time.perf_counter() - begun
  scores = oriented_scores(truth, found, predictor.names, args.score)
  at_score = scores.pop("at_score")
  if "curves" not in args.metrics:
    scores.pop("curves")
  results: dict[str, Any] = {
    "model": predictor.bundle.name,
    "bundle_sha256": predictor.hash,
    "data": public_path(str(args.data)),
    "pictures": len(places),
    "objects": sum(int((~t.difficult & ~t.unknown).sum()) for t in truth),
    "crowds": sum(int((t.difficult | t.unknown).sum()) for t in truth),
    "classes": predictor.names,
    "score": args.score,
    "seconds_per_picture": round(seconds / max(1, len(places)), 4),
    "oriented": scores,
    "at_score": at_score,
  }
  print("\n".join(lines_of(results)))
  drawn: list[np.ndarray] = []
  if "worst" in args.metrics:
    errors = {
      i: e
      for i, (t, f) in enumerate(zip(truth, found, strict=True))
      if (e := picture_error(t, f, len(predictor.names), args.score)) is not None and e > 0
    }
    worst = sorted(errors, key=lambda i: -errors[i])[: args.worst]
    results["worst"] = [{"picture": places[i][0].title(places[i][1]), "error": round(errors[i], 4)} for i in worst]
    drawn = [draw_beside(*places[i], rows[i], truth[i], predictor.names, args.score) for i in worst]
  from openpilot.tools.fair.images.page import write_page

  out = args.output or predictor.path.parent / "evaluation"
  write_page(results, drawn, out)
  print(f"wrote        {out / 'evaluation.html'}, evaluation.json")
  return results


def draw_beside(
  part: Pictures, row: int, found: list[dict[str, Any]], truth: Boxes, names: list[str], score: float
) -> np.ndarray:
  """What was found, and what is there."""
  from openpilot.tools.fair.images.draw import beside, draw

  ((_, rgb),) = part.read([row])
  named = dict(enumerate(names))
  return beside(draw(rgb, [f for f in found if f["score"] >= score], named), draw(rgb, as_rows(truth), named))

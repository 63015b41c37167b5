#!/usr/bin/env python3
"""Judges a student by labeled pictures: COCO's AP by size and class, of boxes and masks, IoU, which class is taken for
which, precision and recall, and the worst pictures, as one page and as JSON. Of oriented boxes: DOTA's mAP."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from openpilot.selfdrive.modeld.fair.bundle import BundleError
from openpilot.selfdrive.modeld.fair.runners import RUNNERS
from openpilot.tools.fair.images.check import Check, Checked
from openpilot.tools.fair.images.dataset import open_dataset
from openpilot.tools.fair.images.predict import LOW, Predictor, coco_rows
from openpilot.tools.fair.images.score import at_score, by_image, coco_scores, confusion, errors, matched_iou, mean_iou
from openpilot.tools.fair.images.shapes import as_runs
from openpilot.tools.fair.images.tiles import OVERLAP
from openpilot.tools.fair.images.told import known_names, last_lines, listed_others, nothing_known, text
from openpilot.tools.fair.spec import UNKNOWN, plain
from openpilot.tools.lib.errors import UserError, cli, printable, warn
from openpilot.tools.lib.files import LONG
from openpilot.tools.lib.options import option, parse
from openpilot.tools.lib.pictures import read_rgb
from openpilot.tools.lib.said import public_path

METRICS = ("mAP", "IoU", "confusion", "curves", "worst")


@dataclass(frozen=True)
class Options:
  model: Path = option(positional=True, help="a bundle's folder, or what `images train-student` wrote")
  data: Path = option(help="a COCO JSON, a YOLO folder or its data.yaml, a DOTA folder")
  images: Path | None = option(None, help="the pictures' folder, where it is not beside")
  output: Path | None = option(None, aliases=("--out",), help="a folder; default: evaluation/ beside the bundle")
  metrics: tuple[str, ...] = option(METRICS, nargs="+", choices=METRICS, help="what is told")
  score: float = option(0.3, help="from which on a detection counts, where one number is told")
  alias: tuple[str, ...] = option((), metavar="NAME=CLASS", help="a name in the data of one of the student's classes")
  ignore_classes: bool = option(False, help="leave out labels of classes that the student does not know")
  worst: int = option(8, help="pictures that are shown")
  tile: int = option(0, metavar="PIXELS", help="show large pictures in tiles of this side (oriented boxes)")
  overlap: int = option(OVERLAP, metavar="PIXELS", help="of tiles")
  runner: str = option("onnx", help=f"what runs the graph: {', '.join(RUNNERS)}")
  threads: int = option(1, help="of the runner")


def match_classes(truth: dict[str, Any], names: list[str], args: Options) -> dict[str, Any]:
  """The truth of the student's classes, whose categories are these, in the student's order; what is called unknown, or
  the like, is a crowd of each, as it was for the student that learned. Raises UserError where it names others."""
  known = known_names(names, args)
  to = {c["id"]: known.get(plain(c["name"])) for c in truth["categories"]}
  free = {c["id"] for c in truth["categories"] if to[c["id"]] is None and plain(c["name"]) in UNKNOWN}
  others = [a for a in truth["annotations"] if to[a["category_id"]] is None and a["category_id"] not in free]
  used = {a["category_id"] for a in others if not a["iscrowd"]}  # what is a crowd alone need not be known
  if used:
    said = listed_others([c["name"] for c in truth["categories"] if c["id"] in used], names, args)
    n = sum(not a["iscrowd"] for a in others)
    warn(f"left out are {n} labels of classes that the student does not know: {said}")
  rows = [{**a, "category_id": to[a["category_id"]]} for a in truth["annotations"] if to[a["category_id"]] is not None]
  if not any(not a["iscrowd"] for a in rows):
    raise nothing_known(names, args)
  number = max(a["id"] for a in truth["annotations"])
  for a in (a for a in truth["annotations"] if a["category_id"] in free):
    rows += [{**a, "category_id": k, "iscrowd": 1, "id": number + k + 1, "unknown": a["id"]} for k in range(len(names))]
    number += len(names)
  return {**truth, "annotations": rows, "categories": [{"id": k, "name": n} for k, n in enumerate(names)]}


def each_once(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """Annotations to be drawn: what is unknown once, as category -1."""
  once = {a["unknown"]: {**a, "category_id": -1} for a in rows if "unknown" in a}
  return [*(a for a in rows if "unknown" not in a), *once.values()]


def truth_of(found: Checked) -> dict[str, Any]:
  """COCO's lists, masks as run lengths."""
  size = {p.entry["id"]: (p.entry["width"], p.entry["height"]) for p in found.pictures}
  rows = []
  for a in found.annotations:
    row = {**a, "iscrowd": int(bool(a.get("iscrowd")))}
    if (mask := a.get("segmentation")) is not None:
      row["segmentation"] = as_runs(mask, *size[a["image_id"]])
    rows.append(row)
  return {"images": [p.entry for p in found.pictures], "annotations": rows, "categories": found.categories}


def judge(truth: dict[str, Any], found: list[dict[str, Any]], kind: str, args: Options) -> dict[str, Any]:
  out: dict[str, Any] = {}
  if "mAP" in args.metrics or "curves" in args.metrics:
    scores = coco_scores(truth, found, kind)
    if "curves" not in args.metrics:
      scores.pop("curves")
    out |= scores
  if "IoU" in args.metrics:
    out["mean_iou"] = mean_iou(truth, found, kind, args.score)
    out["matched_iou"] = matched_iou(truth, found, kind, args.score)
  return out


def with_masks(truth: dict[str, Any]) -> dict[str, Any]:
  """Masks as truth. What has a box alone is a crowd there: what is found on it is neither right nor wrong."""
  size = {i["id"]: (i["width"], i["height"]) for i in truth["images"]}
  return {
    **truth,
    "annotations": [a if a.get("segmentation") else boxed(a, *size[a["image_id"]]) for a in truth["annotations"]],
  }


def boxed(a: dict[str, Any], width: int, height: int) -> dict[str, Any]:
  """A crowd whose mask is the annotation's box."""
  x, y, w, h = a["bbox"]
  return {**a, "iscrowd": 1, "segmentation": as_runs([[x, y, x + w, y, x + w, y + h, x, y + h]], width, height)}


def evaluate(
  predictor: Predictor, data: Checked, args: Options
) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
  """-> results, the truth, and what was found as COCO's results."""
  truth = match_classes(truth_of(data), predictor.names, args)
  found: list[dict[str, Any]] = []
  begun = time.perf_counter()
  for p in tqdm(data.pictures, desc="evaluate", unit="picture"):
    (one,) = predictor([read_rgb(p.path)])
    found += coco_rows(one, p.entry["id"], range(len(predictor.names)), len(found) + 1)
  seconds = time.perf_counter() - begun
  results: dict[str, Any] = {
    "model": predictor.bundle.name,
    "bundle_sha256": predictor.hash,
    "data": public_path(str(args.data)),
    "pictures": len(data.pictures),
    "objects": sum(not a["iscrowd"] for a in truth["annotations"]),
    "crowds": sum(a["iscrowd"] for a in each_once(truth["annotations"])),
    "classes": predictor.names,
    "score": args.score,
    "seconds_per_picture": round(seconds / max(1, len(data.pictures)), 4),
    "bbox": judge(truth, found, "bbox", args),
  }
  masked = with_masks(truth)
  if predictor.has_masks and (n := sum(not a["iscrowd"] for a in masked["annotations"])):
    results["segm"] = {"objects": n, **judge(masked, found, "segm", args)}
  m = confusion(truth, found, args.score)
  results["at_score"] = at_score(m)
  if "confusion" in args.metrics:
    results["confusion"] = m.tolist()
  return results, truth, found


def lines_of(r: dict[str, Any]) -> list[str]:
  out = [f"{r['model']}: {r['pictures']} pictures, {r['objects']} objects of {len(r['classes'])} classes"]
  for kind, title in (("bbox", "boxes"), ("segm", "masks")):
    if kind not in r:
      continue
    if s := r[kind].get("stats"):
      sizes = ", ".join(f"{k} {text(s[f'ap_{k}'])}" for k in ("small", "medium", "large"))
      out.append(f"{title}        AP {text(s['ap'])}, AP50 {text(s['ap50'])}, AP75 {text(s['ap75'])}; {sizes}")
    if "mean_iou" in r[kind]:
      m, f = (text(r[kind][k]) for k in ("mean_iou", "matched_iou"))
      out.append(f"             mean IoU {m} over all true objects, {f} of those found")
    if (n := r[kind].get("objects", r["objects"])) < r["objects"]:
      out.append(
        f"             of {n} objects; {r['objects'] - n} have no mask, and what is found on them counts nowhere"
      )
  return out + last_lines(r, r["bbox"].get("classes", {}))


def run(args: Options) -> dict[str, Any]:
  if not 0 < args.score < 1:
    raise UserError(f"--score {args.score:g}: a score is between 0 and 1")
  if args.worst < 0 or args.threads < 1:
    raise UserError("--worst is at least 0, --threads at least 1")
  predictor = Predictor(args.model, LOW, args.threads, args.runner, args.tile, args.overlap)
  if predictor.head == "oriented":
    from openpilot.tools.fair.images.evaluate_oriented import evaluate_oriented

    return evaluate_oriented(predictor, args)
  data = open_dataset(args.data, args.images, judge=True)
  checked = Check(data, True).run()
  if said := data.problems.lines(True):
    lost = checked.listed - len(checked.pictures), len(data.annotations) - len(checked.annotations)
    more = f"; left out are {lost[0]} of {checked.listed} pictures, {lost[1]} of {len(data.annotations)} labels"
    warn(
      f"{printable(str(args.data), LONG)} has {len(said)} kinds of problems, which are mended here"
      f"{more if any(lost) else ''}; `tools/op.sh images validate` lists them"
    )
  results, truth, found = evaluate(predictor, checked, args)
  print("\n".join(lines_of(results)))
  if "worst" in args.metrics:
    of_picture = errors(truth, found, args.score)
    names = {i["id"]: i["file_name"] for i in truth["images"]}
    worst = sorted((i for i in of_picture if of_picture[i] > 0), key=lambda i: -of_picture[i])[: args.worst]
    results["worst"] = [{"picture": names[i], "error": round(of_picture[i], 4)} for i in worst]
    drawn = draw_worst(worst, checked, truth, found, args.score)
  else:
    drawn = []
  from openpilot.tools.fair.images.page import write_page

  out = args.output or predictor.path.parent / "evaluation"
  write_page(results, drawn, out)
  print(f"wrote        {out / 'evaluation.html'}, evaluation.json")
  return results


def draw_worst(
  worst: list[int], data: Checked, truth: dict[str, Any], found: list[dict[str, Any]], score: float
) -> list[np.ndarray]:
  """What was found, and what is there, side by side."""
  from openpilot.tools.fair.images.draw import beside, draw

  names = {c["id"]: c["name"] for c in truth["categories"]} | {-1: UNKNOWN[0]}
  path = {p.entry["id"]: p.path for p in data.pictures}
  mine, theirs = by_image([f for f in found if f["score"] >= score]), by_image(truth["annotations"])
  out = []
  for i in worst:
    rgb = read_rgb(path[i])
    out.append(beside(draw(rgb, mine.get(i, []), names), draw(rgb, each_once(theirs.get(i, [])), names)))
  return out


def main() -> None:
  run(parse(Options, __doc__, "images evaluate"))


if __name__ == "__main__":
  raise SystemExit(cli(main, (BundleError,))())

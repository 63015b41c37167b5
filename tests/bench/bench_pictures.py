#!/usr/bin/env python3
"""Students of labeled pictures, by folds: each picture of PennFudan is judged by a student that has not seen it. Labels
alone, beside labels and a teacher, beside these and pictures without labels; and the teacher itself. all and no-PART:
RTMDet and XFeat's features teach beside labels, with every part of the loss and with one left out. first and
street-first: RTMDet alone teaches on the pictures without labels, once; each fold's labels then go on from there.
--labeled 13: only so many of a fold's pictures keep their labels, and the others are the pictures without labels.
--zoomed: of the pictures without labels, squares around the persons that RTMDet finds, which are then as large in them
as the labeled ones are in theirs, and a few pictures without any.

python tests/bench/bench_pictures.py --data FOLDER --output DIR [--unlabeled PICTURES] [--variants labels teacher]

FOLDER holds pennfudan and the weights. What is in DIR already is not trained again; stopped, the same command goes
on."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
  import from_root  # noqa: F401

import numpy as np
from PIL import Image
from tqdm import tqdm

from openpilot.selfdrive.modeld.fair.heads.objects import intersection
from openpilot.tools.fair.images.check import Check
from openpilot.tools.fair.images.dataset import open_dataset
from openpilot.tools.fair.images.evaluate import truth_of
from openpilot.tools.fair.images.loss import PARTS
from openpilot.tools.fair.images.predict import Predictor, coco_rows
from openpilot.tools.fair.images.score import by_image, coco_scores, matched_iou
from openpilot.tools.fair.images.soft import FLOOR
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Clip
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.files import write_json
from openpilot.tools.lib.pictures import read_rgb

TEACHER = "rtmdet-nano-person"
TAUGHT = ("--teachers", TEACHER, "--untuned", "--alias", "person=pedestrian")
MODELS = Path(__file__).resolve().parents[2] / "models"
STREET = ("--size", "small", "--init", str(MODELS / "fair_unified_small"))  # which has seen people on streets
EVERY = (*STREET, "--teachers", f"{TEACHER},xfeat", "--untuned", "--alias", "person=pedestrian")
FIRST = "first"
# every part of the loss, and each left out
PARTED = {"all": EVERY, **{f"no-{part}": (*EVERY, f"--no-{part}") for part in PARTS}}
# what is learned from, of each fold
VARIANTS: dict[str, tuple[str, ...]] = {
  "labels": (),
  "teacher": TAUGHT,
  "unlabeled": TAUGHT,
  "street": STREET,
  "street-teacher": (*STREET, *TAUGHT),
  "street-unlabeled": (*STREET, *TAUGHT),
  FIRST: (),
  f"street-{FIRST}": ("--size", "small"),
  **PARTED,
}
DRAWS = 200  # of the bootstrap over pictures
SCORE = 0.3
SURE, LEAST = 0.5, 30  # score and height in pixels of a person that a picture is zoomed on
Rows = list[dict[str, Any]]


def write_pennfudan(folder: Path, to: Path) -> Path:
  """Its masks as COCO JSON."""
  images: Rows = []
  rows: Rows = []
  for path in sorted((folder / "PNGImages").glob("*.png")):
    ids = np.asarray(Image.open(folder / "PedMasks" / f"{path.stem}_mask.png"))
    h, w = ids.shape
    images.append({"id": len(images) + 1, "file_name": path.name, "width": w, "height": h})
    for k in np.unique(ids[ids > 0]):
      mask = {"size": [h, w], "counts": rle.encode((ids == k)[None])[0]}
      own = {"id": len(rows) + 1, "image_id": len(images), "category_id": 1, "iscrowd": 0}
      rows.append({**own, "segmentation": mask})
  write_json(to, {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "pedestrian"}]})
  return to


def write_folds(data: Path, folds: int, seed: int) -> list[list[int]]:
  """Beside `data` a train-K.json for each fold. -> its pictures that are judged."""
  coco = json.loads(data.read_text())
  order = np.random.default_rng(seed).permutation([i["id"] for i in coco["images"]])
  judged = [sorted(order[k::folds].tolist()) for k in range(folds)]
  for k, held in enumerate(judged):
    kept = {
      key: [r for r in coco[key] if r[at] not in held] for key, at in (("images", "id"), ("annotations", "image_id"))
    }
    write_json(data.with_name(f"train-{k}.json"), {**coco, **kept})
  return judged


def write_few(data: Path, images: Path, folds: int, count: int) -> None:
  """Of each train-K.json `count` pictures stay, evenly spread; copies of the others go to the folder rest-K."""
  for k in range(folds):
    path, rest = data.with_name(f"train-{k}.json"), data.with_name(f"rest-{k}")
    coco = json.loads(path.read_text())
    kept = {coco["images"][int(i)]["id"] for i in np.linspace(0, len(coco["images"]) - 1, count)}
    rest.mkdir(exist_ok=True)
    for i in coco["images"]:
      if i["id"] not in kept:
        shutil.copy(images / i["file_name"], rest)
    for key, at in (("images", "id"), ("annotations", "image_id")):
      coco[key] = [r for r in coco[key] if r[at] in kept]
    write_json(path, coco)


def teacher_boxes(rgb: np.ndarray, teacher: Any) -> np.ndarray:
  """(h, w, 3) uint8 -> (N, 5) x0 y0 x1 y1 score, pixels counted from the picture's corner."""
  teacher.prepare(*rgb.shape[:2])
  t = teacher.label(Clip(np.ascontiguousarray(rgb.transpose(2, 0, 1))[None]))[0]["boxes"]
  return np.stack([np.asarray(t[k], float) + (k != "score") / 2 for k in ("x0", "y0", "x1", "y1", "score")], 1)


def write_zoomed(pictures: Path, checked: Any, to: Path) -> Path:
  """Squares around the persons that RTMDet finds on a folder's pictures: each is as large in its square as one drawn
  from the labeled ones is in its picture. No two squares of a picture share half of the smaller. A tenth as many
  pictures without a person stay whole. -> `to`, a folder."""
  if to.is_dir():
    return to
  teacher, r = load_teacher(TEACHER, None, [], score=SURE), np.random.default_rng(0)
  sizes = {p.entry["id"]: max(p.entry["width"], p.entry["height"]) for p in checked.pictures}
  heights = [a["bbox"][3] / sizes[a["image_id"]] for a in checked.annotations]
  tmp = to.with_name(f".{to.name}")
  shutil.rmtree(tmp, ignore_errors=True)
  tmp.mkdir()
  empty = []
  for path in tqdm(sorted(pictures.iterdir()), desc="zoomed", unit="picture"):
    rgb = read_rgb(path)
    boxes = teacher_boxes(rgb, teacher)
    empty += [path] if not len(boxes) else []
    taken = np.zeros((0, 4))
    for x0, y0, x1, y1 in boxes[np.argsort(boxes[:, 1] - boxes[:, 3]), :4]:  # the tallest first
      side = max((y1 - y0) / r.choice(heights), x1 - x0)
      low = np.array([x1, y1]) - side  # of the square's corner, so that the person is in it
      corner = r.uniform(low, np.maximum(low, [x0, y0]))
      a, b = np.clip([corner, corner + side], 0, [rgb.shape[1], rgb.shape[0]]).round().astype(int)
      square = np.concatenate([a, b])[None].astype(float)
      shared = intersection(square, taken) / np.minimum((b - a).prod(), (taken[:, 2:] - taken[:, :2]).prod(1))
      if y1 - y0 < LEAST or (shared > 0.5).any():
        continue
      taken = np.concatenate([taken, square])
      Image.fromarray(rgb[a[1] : b[1], a[0] : b[0]]).save(tmp / f"{path.stem}-{len(taken)}.png")
  for i in r.permutation(len(empty))[: len(list(tmp.iterdir())) // 10]:
    shutil.copy(empty[i], tmp)
  tmp.rename(to)
  return to


def free(variant: str) -> bool:
  """Whether it learns from pictures without labels too."""
  return variant.endswith(("unlabeled", FIRST)) or variant in PARTED


def write_persons(folder: Path, pictures: Path, to: Path) -> Path:
  """COCO128's persons as pedestrians, a COCO JSON: what the student of pictures without labels is judged by."""
  found = open_dataset(folder, pictures)
  which = {c["id"] for c in found.categories if c["name"] == "person"}
  rows = [{**a, "category_id": 1} for a in found.annotations if a["category_id"] in which]
  images = [i for i in found.images if i["id"] in {a["image_id"] for a in rows}]
  write_json(to, {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "pedestrian"}]})
  return to


def train_first(args: argparse.Namespace, variant: str) -> Path:
  """RTMDet alone teaches, on the pictures without labels, which are varied in scale: its pedestrians are small. No
  picture of the folds is seen. -> the student's folder."""
  out, persons = args.output / variant, args.data / "coco128/instance_segmentation"
  pictures = args.data / "coco128/object_detection/images/train2017"
  data, recipe = args.output / "persons.json", args.output / "varying.yaml"
  if (out / "done").exists():
    return out
  start = STREET if variant.startswith("street") else ("--size", args.size)
  write_json(recipe, {"characteristics": {"distance": ["varying"]}, "intensity": "medium"})
  options = ["--data", write_persons(persons, pictures, data), "--images", pictures, "--unlabeled", args.unlabeled]
  options += ["--unlabeled-share", 1, "--student", f"objects-{args.size}", "--augment", recipe, "--no-export"]
  learn(out, args, args.first_steps, [*options, *start, *TAUGHT], f"{variant}, {args.first_steps} steps")
  (out / "done").touch()
  return out


def learn(out: Path, args: argparse.Namespace, steps: int, more: Sequence[Any], what: str) -> None:
  options = ["--output", out, "--picture-size", args.picture_size, "--steps", steps, "--batch-size", args.batch_size]
  options += ["--license", "research", "--backbone", "mobilenetv2_100_same"]
  options += ["--pretrained", args.data / "weights/timm_mobilenetv2_100_imagenet.pth", *more]
  options += ["--precision", args.precision] if args.precision else []
  options += ["--resume"] if (out / "last.pt").exists() else []
  print(what, flush=True)
  command = [sys.executable, "-P", "-m", "openpilot.tools.fair.images.train_student", *map(str, options)]
  if code := subprocess.run(command).returncode:
    raise UserError(f"{what}: ended with exit code {code}")


def train(fold: int, variant: str, args: argparse.Namespace) -> Path:
  """-> the student's folder."""
  out = args.output / f"{variant}-{fold}"
  if (out / out.name / "manifest.json").exists():
    return out
  options = ["--data", args.output / f"train-{fold}.json", "--images", args.data / "pennfudan/PNGImages"]
  options += ["--size", args.size, "--augment", args.augment, *VARIANTS[variant]]
  if variant.endswith(FIRST):
    options += ["--init", train_first(args, variant)]
  elif free(variant):
    pictures = args.unlabeled or args.output / f"rest-{fold}"
    options += ["--unlabeled", pictures, "--unlabeled-share", args.unlabeled_share]
  learn(out, args, args.steps, options, f"{variant}, fold {fold}")
  return out


def found_by(student: Path, data: Any, ids: Sequence[int]) -> Rows:
  predictor = Predictor(student, FLOOR)
  pictures = [p for p in data.pictures if p.entry["id"] in ids]
  rows: Rows = []
  for p in pictures:
    (one,) = predictor([read_rgb(p.path)])
    rows += coco_rows(one, p.entry["id"], [1], len(rows) + 1)
  return rows


def found_by_teacher(data: Any) -> Rows:
  teacher = load_teacher(TEACHER, None, [], score=FLOOR)
  rows: Rows = []
  for p in tqdm(data.pictures, desc=TEACHER, unit="picture"):
    for x0, y0, x1, y1, s in teacher_boxes(read_rgb(p.path), teacher).tolist():
      box = [x0, y0, x1 - x0, y1 - y0]
      own = {"id": len(rows) + 1, "image_id": p.entry["id"], "category_id": 1, "score": s, "area": box[2] * box[3]}
      rows.append({**own, "bbox": box})
  return rows


def figures(truth: Mapping[str, Any], rows: Rows) -> dict[str, float]:
  out: dict[str, float] = {}
  for kind, name in (("bbox", "box"), ("segm", "mask")):
    if kind == "segm" and not (rows and "segmentation" in rows[0]):
      continue
    stats = coco_scores(truth, rows, kind)["stats"]
    out |= {f"{name} AP50": stats["ap50"] or 0.0, f"{name} AP": stats["ap"] or 0.0}
    out[f"{name} IoU of found"] = matched_iou(truth, rows, kind, SCORE) or 0.0
  return out


def drawn(truth: Mapping[str, Any], rows: Rows, which: Sequence[int]) -> tuple[dict[str, Any], Rows]:
  """Pictures drawn with repetition, each draw a picture of its own."""
  theirs, mine = by_image(truth["annotations"]), by_image(rows)
  images = [{**truth["images"][i], "id": n} for n, i in enumerate(which, 1)]
  own = [truth["images"][i]["id"] for i in which]
  a = [{**x, "image_id": n} for n, i in enumerate(own, 1) for x in theirs.get(i, [])]
  b = [{**x, "image_id": n} for n, i in enumerate(own, 1) for x in mine.get(i, [])]
  number = lambda every: [{**x, "id": n} for n, x in enumerate(every, 1)]  # noqa: E731
  return {**truth, "images": images, "annotations": number(a)}, number(b)


def ranges(truth: Mapping[str, Any], found: Mapping[str, Rows]) -> dict[str, dict[str, np.ndarray]]:
  """(DRAWS,) of each figure of each variant, on the same draws."""
  r, n = np.random.default_rng(0), len(truth["images"])
  every: dict[str, list[dict[str, float]]] = {v: [] for v in found}
  for _ in tqdm(range(DRAWS), desc="intervals", unit="draw"):
    which = r.integers(0, n, n).tolist()
    for v, rows in found.items():
      every[v].append(figures(*drawn(truth, rows, which)))
  return {v: {k: np.array([d[k] for d in draws]) for k in draws[0]} for v, draws in every.items()}


def table(truth: Mapping[str, Any], found: Mapping[str, Rows]) -> list[str]:
  """Markdown: each figure with a 95% interval over pictures; and beside the first, paired."""
  points = {v: figures(truth, rows) for v, rows in found.items()}
  drawn_ = ranges(truth, found)
  first = next(iter(points))
  names = list(points[first])
  span = lambda x: "[{:.3f}, {:.3f}]".format(*np.percentile(x, [2.5, 97.5]))  # noqa: E731
  out = ["| | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
  for v, p in points.items():
    out.append(f"| {v} | " + " | ".join(f"{p[k]:.3f} {span(drawn_[v][k])}" if k in p else "-" for k in names) + " |")
    if v != first:
      d = [f"{p[k] - points[first][k]:+.3f} {span(drawn_[v][k] - drawn_[first][k])}" if k in p else "-" for k in names]
      out.append(f"| {v} - {first} | " + " | ".join(d) + " |")
  return out


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--data", type=Path, required=True)
  p.add_argument("--output", type=Path, required=True)
  p.add_argument("--unlabeled", type=Path)
  p.add_argument("--augment", default="plain", help="plain, auto, none, or a recipe's file")
  p.add_argument("--zoomed", action="store_true", help="show squares around persons in place of whole pictures")
  p.add_argument("--labeled", type=int, help="pictures of a fold that keep their labels; default: all")
  p.add_argument("--unlabeled-share", type=float, default=0.5, help="of the pictures that a student is shown")
  p.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=["labels", "teacher"])
  p.add_argument("--folds", type=int, default=5)
  p.add_argument("--only", type=int, nargs="+", help="these folds; default: all")
  p.add_argument("--steps", type=int, default=120)
  p.add_argument("--first-steps", type=int, default=400, help="of the student that starts on pictures without labels")
  p.add_argument("--batch-size", type=int, default=16)
  p.add_argument("--size", default="nano")
  p.add_argument("--picture-size", type=int, default=256)
  p.add_argument("--precision", choices=("no", "bf16"))
  p.add_argument("--seed", type=int, default=0, help="of the folds")
  args = p.parse_args()
  if args.unlabeled is None and (those := [v for v in args.variants if v.endswith(FIRST)]):
    raise UserError(f"the variant '{those[0]}' wants --unlabeled, a folder of pictures")
  if args.unlabeled is None and args.zoomed:
    raise UserError("--zoomed wants --unlabeled, a folder of pictures")
  if args.unlabeled is None and args.labeled is None and (those := [v for v in args.variants if free(v)]):
    raise UserError(f"the variant '{those[0]}' wants --unlabeled, a folder of pictures, or --labeled")
  os.environ.setdefault("FAIR_WEIGHTS", str(args.data / "weights"))
  os.environ["FAIR_PLUGINS"] = "feature_teachers"
  os.environ["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).parent), os.environ["PYTHONPATH"]))
  data = write_pennfudan(args.data / "pennfudan", args.output / "pennfudan.json")
  judged = write_folds(data, args.folds, args.seed)
  if args.labeled:
    write_few(data, args.data / "pennfudan/PNGImages", args.folds, args.labeled)
  folds = args.only if args.only is not None else range(args.folds)
  checked = Check(open_dataset(data, args.data / "pennfudan/PNGImages"), True).run()
  if args.zoomed:
    args.unlabeled = write_zoomed(args.unlabeled, checked, args.output / "zoomed")
  found: dict[str, Rows] = {v: [] for v in args.variants}
  for k in folds:
    for v in args.variants:
      found[v] += found_by(train(k, v, args), checked, judged[k])
  ids = {i for k in folds for i in judged[k]}
  found[TEACHER] = [r for r in found_by_teacher(checked) if r["image_id"] in ids]
  truth = truth_of(checked)
  truth["images"] = [i for i in truth["images"] if i["id"] in ids]
  truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in ids]
  print(f"{len(ids)} pictures, {len(truth['annotations'])} pedestrians, {len(folds)} folds, {args.steps} steps")
  print("\n".join(table(truth, found)))


if __name__ == "__main__":
  raise SystemExit(cli(main)())

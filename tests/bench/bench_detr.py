#!/usr/bin/env python3
"""What `images train-detr` learns, on frozen mobilenetv2_100 of ImageNet and PennFudan's 74 photographs; and how long a
large YOLO folder takes to be read.

python tests/bench/bench_detr.py overfit --data FOLDER --output DIR [--head detr deformable] [--pictures 8]
python tests/bench/bench_detr.py folds --data FOLDER --output DIR [--only 0] [--random]    --random: random backbone
python tests/bench/bench_detr.py index --output DIR [--pictures 55442] [--boxes 85]

FOLDER holds pennfudan and the weights."""

import argparse
import os
import resource
import time
from pathlib import Path
from typing import Any

if __package__:
  from tests.bench.bench_pictures import write_folds, write_pennfudan
else:  # run as a file
  import from_root  # noqa: F401
  from bench_pictures import write_folds, write_pennfudan

import numpy as np
import torch
from PIL import Image

from openpilot.tools.fair.detr.augment import FLIPS, NONE
from openpilot.tools.fair.detr.backbone import Backbone, load_backbone
from openpilot.tools.fair.detr.cache import Features, fill
from openpilot.tools.fair.detr.data import Labeled, read_index
from openpilot.tools.fair.detr.found import metrics, numbered, rows_of
from openpilot.tools.fair.detr.model import HEADS, levels_for, make_model
from openpilot.tools.fair.detr.pictures import Frame
from openpilot.tools.fair.detr.samples import ByShape, Collate, Samples
from openpilot.tools.lib.errors import UserError, cli

WEIGHTS = "weights/timm_mobilenetv2_100_imagenet.pth"  # mean and deviation are in the stem
SIZES = ("encoder_layers", "decoder_layers", "queries", "width")


def backbone_of(args: argparse.Namespace) -> Backbone:
  torch.manual_seed(args.seed)
  return load_backbone("mobilenetv2_100", "none" if args.random else str(args.data / WEIGHTS), level=-2)


def stored(data: Labeled, frame: Frame, model: Any, backbone: Backbone, folder: Path, flips: bool) -> Samples:
  store = Features(folder, flips=flips)
  fill(store, data, frame, model, backbone.weights, 8, "cpu")
  return Samples(data, frame, FLIPS if flips else NONE, store=store)


def judge(model: Any, head: str, samples: Samples, join: Collate) -> dict[str, float]:
  model.eval()
  rows = {}
  for start in range(0, len(samples), 8):
    batch = join([samples[i] for i in range(start, min(start + 8, len(samples)))])
    with torch.no_grad():
      out = model(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"])
    for said, one in zip(batch["labels"], rows_of(out.logits, out.pred_boxes, batch["labels"], head), strict=True):
      rows[int(said["image_id"])] = one
  model.train()
  return metrics(samples.data.truth(), numbered(rows))


def learn(args: argparse.Namespace, head: str, train: Labeled, val: Labeled, folder: Path, flips: bool) -> float:
  """-> AP50 of `val` at the end."""
  backbone = backbone_of(args)
  frame = Frame(args.short, args.long, mean=(0.0,) * 3, std=(1.0,) * 3)
  sizes = {k: getattr(args, k) for k in SIZES}
  more = {"dropout": args.dropout, **({"eos_coefficient": args.background} if head == "detr" else {})}
  model = make_model(head, backbone, train.names, levels=levels_for(backbone, args.short), **sizes, **more)
  learned = stored(train, frame, model, backbone, folder / "train", flips)
  judged = stored(val, frame, model, backbone, folder / "val", False)
  join, per = Collate(frame), min(args.batch_size, len(train))
  optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], args.lr, weight_decay=1e-4)
  schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.05)
  order = ByShape(learned, per, args.seed)
  rows: list[int] = []
  model.train()
  begun, ap50 = time.process_time(), 0.0
  for step in range(1, args.steps + 1):
    if len(rows) < per:
      order.set_epoch(order.epoch + 1)
      rows = list(order)
    batch = join([learned[i] for i in rows[:per]])
    rows = rows[per:]
    batch.pop("counts")
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % args.every == 0 or step == args.steps:
      said = judge(model, head, judged, join)
      ap50, spent = said["map_50"], time.process_time() - begun
      print(
        f"{head} step {step}: loss {loss.item():.3f}, AP50 {ap50:.3f}, AP {said['map']:.3f}; {spent:.0f} s", flush=True
      )
      if args.command == "overfit" and ap50 >= args.goal:
        break
  return ap50


def overfit(args: argparse.Namespace) -> None:
  data = read_index(args.json, args.data / "pennfudan/PNGImages").some(range(args.pictures))
  for head in args.head:
    ap50 = learn(args, head, data, data, args.output / f"overfit-{head}", False)
    print(f"{head}: {len(data)} pictures, AP50 {ap50:.3f} of the goal {args.goal}")


def folds(args: argparse.Namespace) -> None:
  judged, images = write_folds(args.json, args.folds, args.seed), args.data / "pennfudan/PNGImages"
  whole = read_index(args.json, images)
  found = []
  for k in args.only if args.only is not None else range(args.folds):
    held = [i - 1 for i in judged[k]]  # ids count from 1
    kept = [i for i in range(len(whole)) if i not in held]
    name = f"fold-{k}{'-random' if args.random else ''}"
    found.append(learn(args, args.head[0], whole.some(kept), whole.some(held), args.output / name, True))
    print(f"fold {k}, {'random' if args.random else 'ImageNet'} backbone: AP50 {found[-1]:.3f}")
  print(f"{len(found)} folds, {args.head[0]}: AP50 {np.mean(found):.3f}, from {min(found):.3f} to {max(found):.3f}")


def index(args: argparse.Namespace) -> None:
  """Made-up labels; all pictures are one file, by hard links."""
  random = np.random.default_rng(args.seed)
  for kind in ("images", "labels"):
    (args.output / kind / "train").mkdir(parents=True, exist_ok=True)
  (args.output / "data.yaml").write_text("names: [person, head]\ntrain: images/train\n")
  one = args.output / "one.jpg"
  Image.new("RGB", (1920, 1080), (90, 120, 60)).save(one)
  for i in range(args.pictures):
    picture = args.output / "images" / "train" / f"{i:06d}.jpg"
    if not picture.exists():
      os.link(one, picture)
      rows = np.concatenate(
        [random.uniform(0.05, 0.95, (args.boxes, 2)), random.uniform(0.005, 0.05, (args.boxes, 2))], 1
      )
      lines = "".join(f"{k % 2} {a:.6f} {b:.6f} {c:.6f} {d:.6f}\n" for k, (a, b, c, d) in enumerate(rows.tolist()))
      (args.output / "labels" / "train" / f"{i:06d}.txt").write_text(lines)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  begun, spent = time.perf_counter(), time.process_time()
  data = read_index(args.output, None)
  seconds, cpu = time.perf_counter() - begun, time.process_time() - spent
  memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  print(f"{len(data)} pictures, {len(data.boxes)} boxes: {seconds:.1f} s ({cpu:.1f} s of CPU)")
  print(f"memory at most {memory:.2f} GiB, {before:.2f} GiB of it torch and the rest before")


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("command", choices=("overfit", "folds", "index"))
  p.add_argument("--data", type=Path)
  p.add_argument("--output", type=Path, required=True)
  p.add_argument("--head", nargs="+", choices=HEADS, help="default: both; deformable for folds")
  p.add_argument("--random", action="store_true", help="a random backbone")
  p.add_argument("--pictures", type=int, help="default: 8; 55442 for index")
  p.add_argument("--boxes", type=int, default=85, help="of a picture")
  p.add_argument("--folds", type=int, default=5)
  p.add_argument("--only", type=int, nargs="+", help="these folds; default: all")
  p.add_argument("--short", type=int, default=256)
  p.add_argument("--long", type=int, default=384)
  p.add_argument("--encoder-layers", type=int, default=1)
  p.add_argument("--decoder-layers", type=int, default=3)
  p.add_argument("--queries", type=int, default=30)
  p.add_argument("--width", type=int, default=128)
  p.add_argument("--dropout", type=float, default=0.1)
  p.add_argument("--background", type=float, default=0.1, help="weight of queries that find nothing, of the detr head")
  p.add_argument("--steps", type=int, default=1000)
  p.add_argument("--batch-size", type=int, default=8)
  p.add_argument("--every", type=int, default=50, help="steps between evaluations")
  p.add_argument("--goal", type=float, default=0.95, help="AP50 at which overfitting ends")
  p.add_argument("--lr", type=float, default=4e-4)
  p.add_argument("--seed", type=int, default=0)
  args = p.parse_args()
  args.pictures = args.pictures or (55442 if args.command == "index" else 8)
  args.head = args.head or (list(HEADS) if args.command == "overfit" else ["deformable"])
  args.output.mkdir(parents=True, exist_ok=True)
  if args.command == "index":
    return index(args)
  if args.data is None:
    raise UserError("--data: the folder that holds pennfudan and the weights")
  args.json = write_pennfudan(args.data / "pennfudan", args.output / "pennfudan.json")
  return overfit(args) if args.command == "overfit" else folds(args)


if __name__ == "__main__":
  raise SystemExit(cli(main)())

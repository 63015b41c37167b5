#!/usr/bin/env python3
"""What keeping saves when teachers and students learn from labeled pictures, each beside the same without it.

SAM: an epoch of `images train-teacher` whose frozen image encoder's answers are kept, and one that computes them again,
in turns. Student: a picture of `images train-student` from the label store, and the same with Grounding DINO and SAM
asked every time. And how long the epoch of the 500 pictures that the design note speaks of would take each of them.
Networks of published configurations with random weights, made-up pictures.

python tests/bench/bench_images.py [--sam sam2.1-tiny] [--dino tiny] [--pictures 2] [--epochs 2] [--skip student]"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
  import from_root  # noqa: F401

import numpy as np
import torch
from PIL import Image

SIDE, OBJECTS = 640, 4
NOTE = 500  # pictures of the design note


def made_up(folder: Path, count: int) -> Path:
  """Pictures of smooth noise with squares on them, and their boxes and masks. -> COCO JSON."""
  (folder / "images").mkdir(parents=True)
  r = np.random.default_rng(0)
  coco: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "square"}]}
  for i in range(count):
    rgb = np.asarray(Image.fromarray(r.integers(90, 130, (20, 20, 3), np.uint8)).resize((SIDE, SIDE))).copy()
    coco["images"].append({"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE})
    for k in range(OBJECTS):
      x, y, s = 160 * k + 10, int(r.integers(0, 500)), int(r.integers(40, 120))
      rgb[y : y + s, x : x + s] = r.integers(0, 256, 3)
      a = {"id": len(coco["annotations"]) + 1, "image_id": i, "category_id": 1, "bbox": [x, y, s, s], "area": s * s}
      coco["annotations"].append(a | {"iscrowd": 0, "segmentation": [[x, y, x + s, y, x + s, y + s, x, y + s]]})
    Image.fromarray(rgb).save(folder / "images" / f"{i}.png")
  (folder / "annotations.json").write_text(json.dumps(coco))
  return folder / "annotations.json"


def seconds(run: Callable[[], Any]) -> float:
  begun = time.perf_counter()
  run()
  return time.perf_counter() - begun


def segmenter(name: str) -> Any:
  from openpilot.tools.fair.grounded_sam.originals import SAM_PICTURES
  from openpilot.tools.fair.grounded_sam.segmenter import Segmenter
  from openpilot.tools.fair.sam.checkpoint import PICTURES
  from openpilot.tools.learn.device import choose_device
  from tests.bench.bench_teachers import MODELS

  make, size, family = MODELS[name]
  torch.manual_seed(0)
  return Segmenter(make(size).eval(), SAM_PICTURES if family == "sam" else PICTURES, choose_device("cpu", "float32"))


def detector(name: str) -> Any:
  from openpilot.tools.fair.grounded_sam.detector import Detector
  from openpilot.tools.fair.grounded_sam.originals import DINO_PICTURES
  from openpilot.tools.fair.grounded_sam.prompts import Prompt, Prompts
  from openpilot.tools.learn.device import choose_device
  from tests.bench.bench_teachers import dino

  prompts = Prompts(("square",), ("square",), (), (Prompt((0,), "square.", (101, 2482, 1012, 102)),))
  torch.manual_seed(0)
  out = Detector(dino(name).eval(), None, DINO_PICTURES, choose_device("cpu", "float32"))
  out.prompts = prompts
  return out


def detecting(args: Any, data: Path, folder: Path) -> None:
  """A step of Grounding DINO's tuning."""
  from openpilot.tools.fair.grounded_sam.data import read_pictures
  from openpilot.tools.fair.grounded_sam.lora import LoRATrainer, lora_config
  from openpilot.tools.fair.grounded_sam.tune import DetectorLoop, Tuning, ready

  d = detector(args.dino)
  LoRATrainer(d.model, lora_config(d.model, d.family))
  (folder / "dino").mkdir()
  loop = DetectorLoop(folder / "dino", d, read_pictures(data, data.parent / "images"), None, Tuning(batch_size=1))
  ready(loop)
  loop.step_on([0])
  told(f"grounding-dino-{args.dino} learns from", min(seconds(lambda: loop.step_on([0])) for _ in range(args.epochs)))


def told(what: str, each: float) -> None:
  print(f"{what} a picture in {each:.2f} s: {NOTE} pictures in {NOTE * each / 3600:.2f} h an epoch")


def tuning(args: Any, data: Path, folder: Path) -> None:
  """An epoch with and without what is kept, in turns."""
  from openpilot.tools.fair.grounded_sam.data import read_pictures
  from openpilot.tools.fair.grounded_sam.lora import LoRATrainer, lora_config
  from openpilot.tools.fair.grounded_sam.tune import SegmenterLoop, Tuning, ready

  loops = {}
  for cache in (4.0, 0.0):
    s = segmenter(args.sam)
    LoRATrainer(s.model, lora_config(s.model, s.family))
    out = folder / f"cache-{cache:g}"
    out.mkdir()
    how = Tuning(batch_size=args.pictures, flip=False, cache=cache)
    loops[cache] = SegmenterLoop(out, s, read_pictures(data, data.parent / "images"), None, how)
    ready(loops[cache])
    loops[cache].step_on(list(range(args.pictures)))  # the first epoch, which fills it
  times: dict[float, list[float]] = {cache: [] for cache in loops}
  for _ in range(args.epochs):
    for cache, loop in loops.items():
      times[cache].append(seconds(lambda loop=loop: loop.step_on(list(range(args.pictures)))))
  kept, again = (float(np.median(times[c])) / args.pictures for c in (4.0, 0.0))
  told(f"{args.sam}, its encoder frozen, learns from", again)
  size = loops[4.0].kept_bytes / 2**20 / args.pictures
  print(
    f"{args.sam}, a picture with {OBJECTS} objects: {again:.2f} s, with its embeddings kept {kept:.2f} s: "
    f"{again / kept:.1f} times as fast; {size:.0f} MiB a picture"
  )


def asked(args: Any) -> float:
  """Seconds that both stages take for a picture."""
  d = detector(args.dino)
  rgb = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE), np.uint8)
  boxes = np.array([[160 * k + 10, 40, 160 * k + 110, 140] for k in range(OBJECTS)], np.float32)
  detect = seconds(lambda: d.detect([rgb]))
  s = segmenter(args.sam)
  mask = seconds(lambda: s.segment(rgb, boxes))
  print(f"grounding-dino-{args.dino} takes {detect:.2f} s for a picture, {args.sam} {mask:.2f} s")
  return detect + mask


def learning(args: Any, data: Path, folder: Path) -> None:
  from openpilot.tools.fair.images import store, train_student
  from openpilot.tools.fair.images.train_student import Options

  teacher = asked(args)
  steps = args.epochs + 1
  made = {"data": data, "output": folder / "student", "size": args.size, "picture_size": SIDE, "export": False}
  options = Options(**made, steps=steps, batch_size=args.pictures, workers=0, augment="plain")
  with contextlib.redirect_stdout(io.StringIO()):
    said = store.fill(options, train_student.check_options(options), [])
    config = train_student.config_of(options, said, train_student.select_student_model(said.info, args.size))
    config.eval_every = steps + 1
    spent = seconds(lambda: train_student.learn(options, said, config, (said.license,), {}))
  own = spent / steps / args.pictures
  told(f"objects-{args.size} learns from", own)
  print(
    f"objects-{args.size} at {SIDE} learns from a picture of the store in {own:.2f} s; with both teachers asked every "
    f"time it would be {own + teacher:.2f} s: kept answers are {(own + teacher) / own:.1f} times as fast"
  )


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--sam", default="sam2.1-tiny", help="a name of bench_teachers.py")
  p.add_argument("--dino", default="tiny", choices=("tiny", "base"))
  p.add_argument("--size", default="nano", help="of the student")
  p.add_argument("--pictures", type=int, default=2)
  p.add_argument("--epochs", type=int, default=2)
  p.add_argument("--skip", choices=("teacher", "student"))
  args = p.parse_args()
  torch.set_num_threads(1)
  with tempfile.TemporaryDirectory() as tmp:
    data = made_up(Path(tmp) / "data", args.pictures + 1)
    if args.skip != "teacher":
      detecting(args, data, Path(tmp))
      tuning(args, data, Path(tmp))
    if args.skip != "student":
      learning(args, data, Path(tmp))


if __name__ == "__main__":
  main()

#!/usr/bin/env python3
"""How much faster an epoch is with `images train-detr --cache-features`: steps on pictures that are there already and
on stored features of the same ones, in turns, and what floating-point operations alone would allow.

python tests/bench/bench_detr_cache.py [--model vits16] [--short 960 --long 1536] [--encoder-layers 6] [--steps 5]"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
  import from_root  # noqa: F401

import numpy as np
import torch
import transformers
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from openpilot.tools.fair.detr.augment import FLIPS
from openpilot.tools.fair.detr.backbone import load_backbone
from openpilot.tools.fair.detr.cache import Features, fill
from openpilot.tools.fair.detr.data import Labeled
from openpilot.tools.fair.detr.model import HEADS, levels_for, make_model
from openpilot.tools.fair.detr.pictures import Frame
from openpilot.tools.fair.detr.samples import Collate, Samples
from openpilot.tools.lib.errors import UserError, cli

# DINOv3's sizes; random weights: time does not ask for others
MODELS = {"tiny": (64, 2, 2), "vits16": (384, 12, 6), "vitb16": (768, 12, 12), "vitl16": (1024, 24, 16)}
BOXES = 85  # of a picture
COUNTED = {  # attention on a CPU, which torch's counter leaves out
  torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
  torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
    *shapes[:4]
  ),
}


def pictures(folder: Path, count: int, width: int, height: int) -> Labeled:
  random = np.random.default_rng(0)
  paths = [folder / f"{i}.jpg" for i in range(count)]
  for p in paths:
    Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)).resize((width, height)).save(p)
  low = random.uniform(0, 0.9, (count * BOXES, 2)) * [width, height]
  boxes = np.concatenate([low, np.full((count * BOXES, 2), 20.0)], 1).astype(np.float32)
  sizes, offsets = np.array([(width, height)] * count, np.int32), np.arange(count + 1) * BOXES
  classes = random.integers(0, 2, len(boxes))
  files = [p.name for p in paths]
  return Labeled(folder, ("person", "head"), paths, files, sizes, offsets, boxes, classes, np.zeros(len(boxes), bool))


def step(model: Any, optimizer: Any, samples: Samples, join: Collate) -> float:
  """Seconds, reading included, in this process."""
  begun = time.perf_counter()
  batch = join([samples[i] for i in range(len(samples))])
  batch.pop("counts")
  device = model.device
  labels = [{k: v.to(device) for k, v in x.items()} for x in batch.pop("labels")]
  loss = model(**{k: v.to(device) for k, v in batch.items()}, labels=labels).loss
  loss.backward()
  optimizer.step()
  optimizer.zero_grad()
  float(loss.detach())  # waits for the GPU
  return time.perf_counter() - begun


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default="vits16", choices=MODELS)
  parser.add_argument("--head", default="detr", choices=HEADS)
  parser.add_argument("--short", type=int, default=960)
  parser.add_argument("--long", type=int, default=1536)
  parser.add_argument("--encoder-layers", type=int, default=6)
  parser.add_argument("--batch-size", type=int, default=2)
  parser.add_argument("--steps", type=int, default=5)
  args = parser.parse_args()
  if args.steps < 1 or args.batch_size < 1:
    raise UserError("--steps and --batch-size are at least 1")
  device = "cuda" if torch.cuda.is_available() else "cpu"
  width, layers, heads = MODELS[args.model]
  sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
  with tempfile.TemporaryDirectory() as d:
    folder = Path(d)
    transformers.DINOv3ViTConfig(num_register_tokens=4, intermediate_size=4 * width, **sizes).save_pretrained(folder)
    backbone = load_backbone(str(folder / "config.json"))
    data = pictures(folder, args.batch_size, args.long, args.short)
    told = {"encoder_layers": args.encoder_layers, "levels": levels_for(backbone, args.short)}
    model = make_model(args.head, backbone, data.names, **told).to(device).train()
    frame = Frame(args.short, args.long, "orientation", backbone.multiple)
    store = Features(folder / "features")
    fill(store, data, frame, model, "", args.batch_size, device)
    join = Collate(frame)
    both = Samples(data, frame, FLIPS), Samples(data, frame, FLIPS, store=store)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    flops = []
    for samples in both:  # the first step also warms up
      with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        step(model, optimizer, samples, join)
      flops.append(counter.get_total_flops())
    ratios = []
    for k in range(args.steps):
      plain, cached = (step(model, optimizer, s, join) for s in both)
      ratios.append(plain / cached)
      print(f"step {k}: pictures {plain:.2f} s, features {cached:.2f} s, ratio {ratios[-1]:.2f}", flush=True)
    limit, ratio = flops[0] / flops[1], statistics.median(ratios)
    print(
      f"{args.model} {args.short}x{args.long}, {args.head}, encoder of {args.encoder_layers}: {ratio:.2f} times as fast"
    )
    print(f"by operations alone {limit:.2f}: {ratio / limit:.0%} of it")


if __name__ == "__main__":
  raise SystemExit(cli(main)())

#!/usr/bin/env python3
"""What tuning the driving model is worth under a shift that is known: the small reference network learns the driven
path under one condition (`dgx train --full`), then goes on under another by DoRA, LoRA and full tuning, and is judged
on drives of both that it has not seen, beside itself before tuning and the constant-curvature path, which is told the
true speed and turn rate.

python tests/bench/bench_dgx_shift.py --old DATA --new DATA --old-val DATA --new-val DATA --output out/shift
  [--seeds 3] [--steps 700] [--tune-steps 150] [--rehearse 1] [--precision bf16]

DATA are folders of `dgx data`. Every seed is a network of its own: pre-trained anew, tuned by every way on the same
clips in the same order. --rehearse: how many old clips are seen for each new one while it is tuned. LoRA has the same
layers and ranks, without magnitudes."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
  import from_root  # noqa: F401

import numpy as np
import torch
from torch import Tensor

from openpilot.tools.dgx.training.config import Config
from openpilot.tools.dgx.training.constants import FRAME_SKIP
from openpilot.tools.dgx.training.evaluate import SECONDS, interval
from openpilot.tools.dgx.training.export import export
from openpilot.tools.dgx.training.paths import constant_curvature, path_error
from openpilot.tools.dgx.training.run import BEST, LAST, Run
from openpilot.tools.dgx.training.shards import DrivingClips, make_loader, read_dataset
from openpilot.tools.dgx.training.train import write_reference
from openpilot.tools.learn.adapters.lowrank import Adapter
from openpilot.tools.learn.checkpoint import load_checkpoint
from openpilot.tools.lib.files import write_json

CURVATURE = "constant curvature"
WAYS = ("dora", "lora", "full")
WARM = 5  # steps of a clip that only fill the memory
LONG = 25  # steps of a clip that judges
BATCH, CLIP = 8, 5
Rows = dict[str, dict[str, list[np.ndarray]]]  # who -> condition -> of each seed errors_of()'s


@contextmanager
def without_magnitudes(lora: bool) -> Iterator[None]:
  """An adapter is W + s B A: what each row's norm is makes no difference, and m learns nothing."""
  own = Adapter.scale

  def ones(self: Adapter, weight: Tensor) -> Tensor:
    return torch.ones_like(self.m)

  if lora:
    Adapter.scale = ones  # type: ignore[method-assign]
  try:
    yield
  finally:
    Adapter.scale = own  # type: ignore[method-assign]


def clips(data: Path, length: int, hop: int) -> DrivingClips:
  return DrivingClips(read_dataset(data)[1], length, hop)


def joined(a: DrivingClips, b: DrivingClips, share: float) -> DrivingClips:
  """a, and `share` times as many clips of b, evenly taken."""
  out = DrivingClips([*a.shards, *b.shards], CLIP, 1 << 30)
  count = min(len(b.clips), round(share * len(a.clips)))
  some = b.clips[np.unique(np.linspace(0, len(b.clips) - 1, count).astype(int))] + [len(a.shards), 0]
  out.clips = np.concatenate([a.clips, some])
  return out


def errors_of(data: DrivingClips, plan_of: Callable[[dict[str, Any]], np.ndarray]) -> np.ndarray:
  """plan_of: of a clip, (1, LONG, 33, 15) -> (N, len(SECONDS)) m."""
  found = []
  for batch in make_loader(data, [[i] for i in range(len(data))]):
    plan, driven = plan_of(batch)[:, WARM:], batch["plan"].numpy()[:, WARM:]
    found.append(np.stack([path_error(plan, driven, s).ravel() for s in SECONDS], -1))
  return np.concatenate(found)


def rivals(judges: dict[str, DrivingClips], seeds: int) -> tuple[dict[str, np.ndarray], Rows]:
  """-> of each condition the drive that each frame is of, and constant curvature's errors, which no seed changes."""
  drives = {where: np.repeat(data.clips[:, 0], LONG - WARM) for where, data in judges.items()}
  curved = {where: errors_of(data, lambda b: constant_curvature(b["pose"].numpy())) for where, data in judges.items()}
  return drives, {CURVATURE: {where: [e] * seeds for where, e in curved.items()}}


@torch.no_grad()
def judge(name: str, run: Run, judges: dict[str, DrivingClips], rows: Rows) -> None:
  run.model.eval()

  def plan(batch: dict[str, Any]) -> np.ndarray:
    return torch.stack([o["plan"] for o in run.student.run(run.prepared(batch))], 1).float().numpy()

  for where, data in judges.items():
    rows.setdefault(name, {}).setdefault(where, []).append(errors_of(data, plan))
  run.model.train()


def learn(config: Config, base: Path, train: DrivingClips, out: Path) -> Run:
  out.mkdir(parents=True, exist_ok=True)
  run = Run(config, base, None, None, train, None, out)
  if (out / LAST).is_file():  # of a bench that was interrupted
    run.load(load_checkpoint(out / LAST, f"remove {out}"))
  run.fit()
  return run


def report(rows: Rows, drives: dict[str, np.ndarray], out: Path) -> None:
  results: dict[str, dict[str, list[dict[str, list[float]]]]] = {}
  for name, wheres in rows.items():
    for where, seeds in wheres.items():
      for before, found in zip(rows["before"][where], seeds, strict=False):  # as far as seeds are done
        at = {f"{s:g}": [*interval(found[:, n], drives[where])] for n, s in enumerate(SECONDS)}
        less = {f"less_{s:g}": [*interval(before[:, n] - found[:, n], drives[where])] for n, s in enumerate(SECONDS)}
        results.setdefault(name, {}).setdefault(where, []).append({**at, **less})
  write_json(out / "shift.json", results)
  print("meters from the driven path after 2 s: of each seed, mean and 95% by drive; and less than before")
  for name, found_of in results.items():
    for where, told in found_of.items():
      was = [s["2"][0] for s in results["before"][where]]
      said = "; ".join("{:.2f} [{:.2f}, {:.2f}]".format(*s["2"]) for s in told)
      change = ", ".join(f"{s['2'][0] / w - 1:+.0%}" for s, w in zip(told, was, strict=True))
      print(f"{name:<20} {where:<4} {said}   {change}")


def epochs(steps: int, train: DrivingClips) -> int:
  return max(1, round(steps / -(-len(train) // BATCH)))


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--old", type=Path, required=True)
  p.add_argument("--new", type=Path, required=True)
  p.add_argument("--old-val", type=Path, required=True)
  p.add_argument("--new-val", type=Path, required=True)
  p.add_argument("--output", type=Path, required=True)
  p.add_argument("--seeds", type=int, default=3)
  p.add_argument("--first-seed", type=int, default=0)
  p.add_argument("--steps", type=int, default=700)
  p.add_argument("--tune-steps", type=int, default=150)
  p.add_argument("--hop", type=int, default=12, help="frames from clip to clip")
  p.add_argument("--rank", type=int, default=16)
  p.add_argument("--rehearse", type=float, default=1.0)
  p.add_argument("--lr", type=float, default=1e-3, help="of the pre-training")
  p.add_argument("--adapter-lr", type=float, default=2e-3)
  p.add_argument("--full-lr", type=float, default=3e-4)
  p.add_argument("--augment", action="store_true", help="as train.py's")
  p.add_argument("--pose", type=float, help="weight of the pose's loss")
  p.add_argument("--precision", choices=("no", "bf16"), default="no")
  p.add_argument("--reference", choices=("plain", "speed", "turn"), default="plain")
  args = p.parse_args()
  torch.set_num_threads(1)
  old, new = clips(args.old, CLIP, args.hop), clips(args.new, CLIP, args.hop)
  both = joined(new, old, args.rehearse)
  long = LONG, FRAME_SKIP * (LONG - WARM)
  judges = {"old": clips(args.old_val, *long), "new": clips(args.new_val, *long)}
  print(f"{len(old)} clips of the old condition, {len(new)} of the new one, tuned on {len(both)} of both", flush=True)
  drives, rows = rivals(judges, args.seeds)
  for seed in range(args.first_seed, args.first_seed + args.seeds):
    out = args.output / str(seed)
    out.mkdir(parents=True, exist_ok=True)
    start = write_reference(out / "reference.onnx", args.reference, seed)
    same = {"batch_size": BATCH, "clip": CLIP, "seed": seed, "precision": args.precision, "augment": args.augment}
    same["weights"] = {} if args.pose is None else {"pose": args.pose}
    config = Config(**same, full=True, lr=args.lr, epochs=epochs(args.steps, old))
    run = learn(config, start, old, out / "before")
    base = out / "before.onnx"
    export(out / "before" / BEST, base, tinygrad=False)
    judge("before", run, judges, rows)
    for way in WAYS:
      tuned = Config(
        **same,
        full=way == "full",
        lr=args.full_lr if way == "full" else args.adapter_lr,
        epochs=epochs(args.tune_steps, both),
        dora_rank=args.rank,
        targets=["*"],
      )
      with without_magnitudes(way == "lora"):
        run = learn(tuned, base, both, out / way)
        judge(way, run, judges, rows)
      count = sum(p.numel() for p in run.learned.values())
      print(f"seed {seed}, {way}: {count:,} of {run.size:,} parameters", flush=True)
    report(rows, drives, args.output)


if __name__ == "__main__":
  main()

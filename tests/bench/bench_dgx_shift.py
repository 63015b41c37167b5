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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

import numpy as np
import torch
from torch import Tensor

from openpilot.tools.dgx.training.config import Config
from openpilot.tools.dgx.training.evaluate import interval
from openpilot.tools.dgx.training.export import export
from openpilot.tools.dgx.training.paths import constant_curvature, path_error
from openpilot.tools.dgx.training.reference import save_reference
from openpilot.tools.dgx.training.reference_turn import TurnDriving
from openpilot.tools.dgx.training.run import BEST, LAST, Run
from openpilot.tools.dgx.training.shards import DrivingClips, make_loader, read_dataset
from openpilot.tools.learn.adapters.lowrank import Adapter
from openpilot.tools.learn.checkpoint import load_checkpoint
from openpilot.tools.lib.files import write_json

SECONDS = (1.0, 2.0, 3.0)
CURVATURE = "constant curvature"
WAYS = ("dora", "lora", "full")
WARM = 5  # steps of a clip that only fill the memory
LONG = 25  # steps of a clip that judges
BATCH, CLIP = 8, 5


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


def clips(data: Path, hop: int, share: float = 1.0) -> DrivingClips:
  shards = read_dataset(data)[1]
  return DrivingClips(shards[: max(1, round(share * len(shards)))], CLIP, hop)


def joined(a: DrivingClips, b: DrivingClips, share: float) -> DrivingClips:
  """a, and `share` times as many clips of b, evenly taken."""
  out = DrivingClips([*a.shards, *b.shards], CLIP, 1 << 30)
  count = min(len(b.clips), round(share * len(a.clips)))
  some = b.clips[np.unique(np.linspace(0, len(b.clips) - 1, count).astype(int))] + [len(a.shards), 0]
  out.clips = np.concatenate([a.clips, some])
  return out


@torch.no_grad()
def errors_of(run: Run, data: DrivingClips) -> dict[str, np.ndarray]:
  """-> {"path", CURVATURE: (N, len(SECONDS)) m, "drive": (N,)}."""
  run.model.eval()
  found: dict[str, list[np.ndarray]] = {"path": [], CURVATURE: [], "drive": []}
  order = [[i] for i in range(len(data))]
  for (i,), batch in zip(order, make_loader(data, order), strict=True):
    outputs = list(run.student.run(run.prepared(batch)))
    driven = batch["plan"].numpy()[:, WARM:]
    plans = {
      "path": torch.stack([o["plan"] for o in outputs], 1).float().numpy()[:, WARM:],
      CURVATURE: constant_curvature(batch["pose"].numpy()[:, WARM:]),
    }
    for name, plan in plans.items():
      found[name].append(np.stack([path_error(plan, driven, s).ravel() for s in SECONDS], -1))
    found["drive"].append(np.full(driven.shape[1], int(data.clips[i, 0])))
  run.model.train()
  return {k: np.concatenate(v) for k, v in found.items()}


def learn(config: Config, base: Path, train: DrivingClips, out: Path) -> Run:
  out.mkdir(parents=True, exist_ok=True)
  run = Run(config, base, None, None, train, None, out)
  if (out / LAST).is_file():  # of a bench that was interrupted
    run.load(load_checkpoint(out / LAST, f"remove {out}"))
  run.fit()
  return run


def report(rows: dict[str, dict[str, list[np.ndarray]]], drives: dict[str, np.ndarray], out: Path) -> None:
  """rows: who -> condition -> of each seed errors_of()'s."""
  results: dict[str, dict[str, list[dict[str, list[float]]]]] = {}
  for name, wheres in rows.items():
    for where, seeds in wheres.items():
      for k, found in enumerate(seeds):
        before = rows["before"][where][k]
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
  old, new = clips(args.old, args.hop), clips(args.new, args.hop)
  both = joined(new, old, args.rehearse)
  judges = {
    k: DrivingClips(read_dataset(d)[1], LONG, 4 * (LONG - WARM))
    for k, d in (("old", args.old_val), ("new", args.new_val))
  }
  print(f"{len(old)} clips of the old condition, {len(new)} of the new one, tuned on {len(both)} of both", flush=True)
  rows: dict[str, dict[str, list[np.ndarray]]] = {}
  drives: dict[str, np.ndarray] = {}
  for seed in range(args.first_seed, args.first_seed + args.seeds):
    out = args.output / str(seed)
    out.mkdir(parents=True, exist_ok=True)
    turn = TurnDriving(seed) if args.reference == "turn" else None
    start = save_reference(out / "reference.onnx", turn, seed, args.reference == "speed")
    same = {"batch_size": BATCH, "clip": CLIP, "seed": seed, "precision": args.precision, "augment": args.augment}
    same["weights"] = {} if args.pose is None else {"pose": args.pose}
    config = Config(**same, full=True, lr=args.lr, epochs=epochs(args.steps, old))
    run = learn(config, start, old, out / "before")
    base = out / "before.onnx"
    export(out / "before" / BEST, base, tinygrad=False)

    def judged(name: str, run: Run, k: int = seed - args.first_seed) -> None:
      for where, data in judges.items():
        found = errors_of(run, data)
        drives[where] = found["drive"]
        for who, e in ((name, found["path"]), (CURVATURE, found[CURVATURE])):
          of = rows.setdefault(who, {}).setdefault(where, [])
          del of[k:]  # constant curvature is of every way the same
          of.append(e)

    judged("before", run)
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
        judged(way, run)
      count = sum(p.numel() for p in run.learned.values())
      print(f"seed {seed}, {way}: {count:,} of {run.size:,} parameters", flush=True)
    report(rows, drives, args.output)


if __name__ == "__main__":
  main()

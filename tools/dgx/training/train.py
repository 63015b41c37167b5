#!/usr/bin/env python3
"""Fine-tunes openpilot's driving model on your own routes with DoRA: towards the path that the car really drove, a
teacher's outputs, or both.

OUTPUT gets best_model.pt (the best by validation loss, for export.py), last.pt (to go on from with --resume), adapter/
(PEFT's format), train_log.jsonl. `--config OUTPUT --output OTHER` starts the same again, `--config OUTPUT --resume`
goes on.
On several GPUs: `torchrun --nproc-per-node N tools/dgx/training/train.py ...`."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file: the modules beside it must not be found under their bare names
  sys.path[: not sys.flags.safe_path] = [str(Path(__file__).resolve().parents[3])]

from openpilot.tools.dgx import hardware
from openpilot.tools.dgx.training.config import AdapterOptions, Config
from openpilot.tools.dgx.training.epoch import train_epoch as train_epoch
from openpilot.tools.dgx.training.reference import save_reference
from openpilot.tools.dgx.training.reference_turn import TurnDriving
from openpilot.tools.dgx.training.run import BEST, LAST, SECONDS, Run
from openpilot.tools.dgx.training.shards import DrivingClips, read_dataset, split
from openpilot.tools.dgx.training.teacher import DrivingTeacher
from openpilot.tools.learn.adapters.apply import clipped
from openpilot.tools.learn.checkpoint import load_checkpoint
from openpilot.tools.learn.device import mixed_precision
from openpilot.tools.learn.processes import TRACKERS, is_first, made_by_the_first, one_run, parse_trackers, said_once
from openpilot.tools.lib.errors import UserError, cli, warn
from openpilot.tools.lib.options import option, parse, save
from openpilot.tools.lib.said import command


D = Config()  # whose defaults the options have


@dataclass(frozen=True, kw_only=True)
class Options(AdapterOptions):
  data: Path = option(help="a folder of dataloader.py")
  val: Path | None = option(
    None, help="another such folder to validate on; else a share of the routes, or segments, is held out"
  )
  base: Path | None = option(None, metavar="MODEL.onnx", help="openpilot's driving model, or its policy with --vision")
  reference: str | None = option(
    None,
    bare="plain",
    choices=("plain", "speed", "turn"),
    help="a small network of openpilot's interface, the default without --base. speed: told the car's too; turn: that, "
    "and it sees turns",
  )
  vision: Path | None = option(None, help="the network that makes a policy's features; it stays as it is")
  teacher: tuple[Path, ...] = option(
    (), nargs="+", metavar="ONNX", help="a driving model, or vision and policy, whose outputs are learned"
  )
  output: Path = option(Path("."), aliases=("--out",), help="the run's folder")
  epochs: int = option(D.epochs, help="passes over the data")
  batch_size: int = option(D.batch_size, aliases=("--batch",), help="clips a step, over all GPUs")
  accumulate: int = option(D.accumulate, help="cut each batch into so many parts, to save memory")
  clip: int = option(D.clip, help="steps at 5 Hz over which the memory is carried")
  burn_in: int = option(D.burn_in, help="of them, steps at the start that only fill the memory")
  hop: int = option(D.hop, help="frames from one clip's start to the next; 0: they do not overlap")
  full: bool = option(False, help="train all parameters, without an adapter")
  augment: bool = option(False, help="mirror half of the clips, and vary light, contrast and noise of all")
  lr: float = option(D.lr, help="learning rate")
  weight_decay: float = option(D.weight_decay, help="AdamW's")
  path_weight: float = option(D.path_weight, help="of the path really driven; 0 leaves it out")
  teacher_weight: float = option(D.teacher_weight, help="of the teacher's outputs")
  weight: tuple[str, ...] = option((), metavar="LOSS=W", help="of one loss, as lead=0.2")
  val_share: float = option(D.val_share, help="of the routes, or segments, held out without --val")
  precision: str | None = option(
    None, choices=("no", "bf16", "fp16"), help="mixed precision; default: bf16 on GPUs that have it"
  )
  seed: int = option(0, help="of all that is random")
  workers: int = option(2, help="processes that read data")
  trackers: str = option("", help=f"comma-separated: {', '.join(TRACKERS)}; `pip install -e .[track]`")
  resume: bool = option(False, help="go on from OUTPUT/last.pt")


def table(run: Run, args: Options, how: str) -> str:
  c, learned = run.config, sum(p.numel() for p in run.learned.values())
  ranks = "all parameters" if c.full else f"DoRA rank {c.dora_rank} on {len(run.adapted)} layers"
  cut = "" if c.full else clipped(run.student.model, c.dora_rank)
  images = c.batch_size // c.accumulate * c.clip * 2 * 12 * 128 * 256
  fixed = f"parameters {run.size * 4 / 1e6:.0f} MB, optimizer and gradients {learned * 12 / 1e6:.1f} MB"
  teacher = f"{', '.join(map(str, args.teacher))} (weight {c.teacher_weight:g})" if run.teacher is not None else "none"
  kept = sum(int(s.columns["keep"].sum()) for s in run.train.shards)
  rows = [
    ("base", f"{run.base}, {run.size / 1e6:.2f}M parameters, {run.base_hash[:12]}"),
    ("trainable", f"{learned:,} ({learned / run.size * 100:.2f}% of the base): {ranks}"),
    *([("", cut)] if cut else []),
    ("memory", f"{fixed}, images of a part {images / 1e6:.0f} MB; activations come on top"),
    ("teacher", teacher),
    ("driven path", f"weight {c.path_weight:g}"),
    (
      "data",
      (
        f"{len(run.train)} clips of {c.clip} steps ({c.clip / 5:g} s) from {len(run.train.shards)} segments, {kept} "
        "frames"
      ),
    ),
    ("held out", f"{0 if run.val is None else len(run.val)} clips: {how}"),
    (
      "steps",
      f"{c.epochs} epochs of {run.steps_per_epoch}, {c.batch_size} clips each in {c.accumulate} parts, lr {c.lr:g}",
    ),
    (
      "device",
      (
        f"{run.accelerator.device}, precision {c.precision}, {run.accelerator.num_processes} processes; "
        f"{hardware.one_line()}"
      ),
    ),
  ]
  return "\n".join(f"{k:<12} {v}" for k, v in rows)


def parse_weights(items: Sequence[str]) -> dict[str, float]:
  try:
    return {k: float(v) for k, v in (i.split("=", 1) for i in items)}
  except ValueError:
    raise UserError(f"--weight {' '.join(items)}: write LOSS=NUMBER, as lead=0.2") from None


def config_of(args: Options) -> Config:
  precision = args.precision or mixed_precision()
  same = {
    f.name: getattr(args, f.name)
    for f in dataclasses.fields(Config)
    if hasattr(args, f.name) and f.name not in ("weights", "precision", "targets")
  }
  targets = None if args.targets is None else list(args.targets)
  config = Config(**same, targets=targets, precision=precision, weights=parse_weights(args.weight))
  low = [k for k in ("epochs", "batch_size", "accumulate", "clip") if getattr(config, k) < 1]
  if low or not 0 <= config.burn_in < config.clip or config.lr <= 0 or not 0 <= config.val_share < 1:
    raise UserError(
      f"{', '.join(low) or '--burn-in, --lr or --val-share'}: counts are at least 1, --burn-in below --clip, --lr "
      "above 0, --val-share below 1"
    )
  return config


def write_reference(path: Path, kind: str | None, seed: int) -> Path:
  return save_reference(path, TurnDriving(seed) if kind == "turn" else None, seed, kind == "speed")


def start(args: Options) -> tuple[Run, str]:
  """-> the run, and how its clips were parted. Raises UserError."""
  if args.base is not None and args.reference is not None:
    raise UserError("--base and --reference: give one of them")
  config, trackers = config_of(args), parse_trackers(args.trackers)
  if not config.path_weight and not (args.teacher and config.teacher_weight):
    raise UserError("there is nothing to learn from: give --teacher, or a --path-weight above 0")
  state = load_checkpoint(args.output / LAST, "leave --resume out to start") if args.resume else None
  if state is None and (args.output / LAST).exists():
    raise UserError(f"{args.output / LAST} is of a run there; add --resume to go on, or choose another --output")
  _, shards = read_dataset(args.data)
  hop = config.hop or None
  train, val, how = split(shards, config.clip, hop, 0.0 if args.val else config.val_share)
  if args.val:
    val, how = DrivingClips(read_dataset(args.val)[1], config.clip, hop), str(args.val)
    if both := sorted({s.name for s in shards} & {s.name for s in val.shards}):
      warn(f"--val has {len(both)} of the segments that are learned from ({', '.join(both[:3])}): it judges too well")
  if not len(train):
    raise UserError(
      f"{args.data} has no clip of {config.clip} steps that follow each other, each kept; lower --clip, or filter less "
      "in dataloader.py"
    )
  args.output.mkdir(parents=True, exist_ok=True)
  path = args.base
  if path is None:
    path = args.output / "reference.onnx"
    if not args.reference:
      warn(
        "no --base: the small reference network is trained, which knows nothing yet; give openpilot's driving model "
        "with --base"
      )
    made_by_the_first(lambda: path.exists() or write_reference(path, args.reference, config.seed))
  teacher = (
    DrivingTeacher(list(args.teacher), batch=-(-config.batch_size // config.accumulate)) if args.teacher else None
  )
  run = Run(config, path, args.vision, teacher, train, val, args.output, args.workers, trackers)
  if state is not None:
    run.load(state)
  elif is_first():
    save(args, args.output)
  return run, how


def learn(args: Options) -> None:
  with said_once():
    run, how = start(args)
  if is_first():
    print(table(run, args, how))
  metrics = run.fit()
  if is_first():
    if "path_1s" in metrics:
      for s in SECONDS:
        if f"path_{s:g}s" in metrics:
          print(
            f"held-out path after {s:g} s: {metrics[f'path_{s:g}s']:.2f} m off, constant curvature "
            f"{metrics[f'constant_curvature_{s:g}s']:.2f} m"
          )
    export = command(
      "tools/op.sh", "dgx", "export", "--checkpoint", args.output / BEST, "--output", "custom_driving_policy.onnx"
    )
    print(f"{args.output / BEST}: next, `{export}`")


def main() -> None:
  args = parse(Options, __doc__, "train")
  with one_run():
    learn(args)


if __name__ == "__main__":
  raise SystemExit(cli(main)())

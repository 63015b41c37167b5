#!/usr/bin/env python3
"""Fine-tunes openpilot's driving model on your own routes with DoRA: towards the path that the car really drove, a
teacher's outputs, or both.

OUTPUT gets best_model.pt (the best by validation loss, for export.py), last.pt (to go on from with --resume), adapter/
(PEFT's format), train_log.jsonl.
On several GPUs: `torchrun --nproc-per-node N tools/dgx/training/train.py ...`."""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the modules beside it must not be found under their bare names
  sys.path[: not sys.flags.safe_path] = [str(Path(__file__).resolve().parents[3])]

import numpy as np
import torch
from tqdm import tqdm

from openpilot.tools.dgx import hardware
from openpilot.tools.dgx.training.augment import augment
from openpilot.tools.dgx.training.config import Config, add_adapter_arguments, rate
from openpilot.tools.dgx.training.dora import apply_dora, check_rank, clipped, save_adapter
from openpilot.tools.dgx.training.epoch import train_epoch as train_epoch
from openpilot.tools.dgx.training.losses import TINY, check_weights
from openpilot.tools.dgx.training.model import hash_file, load_onnx
from openpilot.tools.dgx.training.paths import constant_curvature, path_error
from openpilot.tools.dgx.training.reference import save_reference
from openpilot.tools.dgx.training.reference_turn import TurnDriving
from openpilot.tools.dgx.training.shards import DrivingClips, Shard, epoch_batches, make_loader, read_dataset, split
from openpilot.tools.dgx.training.student import Student
from openpilot.tools.dgx.training.teacher import DrivingTeacher
from openpilot.tools.learn.checkpoint import load_checkpoint, to_device
from openpilot.tools.learn.processes import TRACKERS, anywhere, make_accelerator, parse_trackers
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.files import atomic_path
from openpilot.tools.lib.said import command

SECONDS = (1.0, 2.0, 3.0)  # at which path errors are given
BEST, LAST = "best_model.pt", "last.pt"


def digest(shards: list[Shard]) -> str:
  """Of which frames of which segments there are, and of their plans."""
  h = hashlib.sha256()
  for s in shards:
    h.update(
      s.name.encode() + s.columns["frame_id"].tobytes() + s.columns["keep"].tobytes() + s.columns["plan"].tobytes()
    )
  return h.hexdigest()[:16]


class Run:
  """One run in the folder `out`. Checkpoints are made after each epoch and on Ctrl-C."""

  def __init__(
    self,
    config: Config,
    base: Path,
    vision: Path | None,
    teacher: DrivingTeacher | None,
    train: DrivingClips,
    val: DrivingClips | None,
    out: Path,
    workers: int = 0,
    trackers: tuple[str, ...] = (),
  ):
    self.config, self.base, self.teacher, self.train, self.val, self.out, self.workers = (
      config,
      base,
      teacher,
      train,
      val,
      out,
      workers,
    )
    self.accelerator = make_accelerator(config.precision, trackers, out)
    torch.manual_seed(config.seed)
    self.base_hash = hash_file(base)
    model = load_onnx(base)
    self.size = sum(p.numel() for p in model.parameters())
    self.adapted: list[str] = []
    if not config.full:
      check_rank(model, config.dora_rank, config.targets)
      self.adapted = apply_dora(model, config.dora_rank, config.dora_alpha, config.targets, config.dora_dropout)
    self.learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    eyes = None if vision is None else load_onnx(vision)
    student = Student(
      model, eyes, check_weights(config.weights), config.path_weight, config.teacher_weight, config.burn_in
    )
    optimizer = torch.optim.AdamW(list(self.learned.values()), lr=config.lr, weight_decay=config.weight_decay)
    self.data = digest(train.shards + (val.shards if val is not None else []))
    self.model, self.optimizer = self.accelerator.prepare(student, optimizer)
    self.epoch = self.at = self.step = 0  # at: steps of this epoch that are done
    self.best = math.inf
    self.val_metrics: dict[str, float] = {}
    self.sums: dict[str, float] = {}  # of this epoch's losses

  @property
  def student(self) -> Student:
    return self.accelerator.unwrap_model(self.model)

  def batches(self, epoch: int) -> list[list[int]]:
    a = self.accelerator
    return epoch_batches(
      len(self.train), self.config.batch_size, self.config.seed, epoch, a.process_index, a.num_processes
    )

  @property
  def steps_per_epoch(self) -> int:
    return len(self.batches(0))

  # *** checkpoints ***

  def checkpoint(self) -> dict[str, Any]:
    """What export.py reads: the learned parameters by name, and all that it takes to put them onto the base again."""
    c = self.config
    settings = (
      None
      if c.full
      else {
        "rank": c.dora_rank,
        "alpha": c.dora_alpha,
        "targets": c.targets,
        "dropout": c.dora_dropout,
        "names": self.adapted,
      }
    )
    adapter = {n: p.detach().cpu().clone() for n, p in self.learned.items()}
    return {
      "base": str(self.base.resolve()),
      "base_hash": self.base_hash,
      "adapter": adapter,
      "dora": settings,
      "epoch": self.epoch,
      "step": self.step,
      "config": dataclasses.asdict(c),
      "val": self.val_metrics,
    }

  def save(self, name: str) -> None:
    if not self.accelerator.is_main_process:
      return
    state = self.checkpoint()
    if name == LAST:
      scaler = self.accelerator.scaler
      state.update(
        optimizer=self.optimizer.state_dict(),
        at=self.at,
        best=self.best,
        sums=self.sums,
        data=self.data,
        scaler=None if scaler is None else scaler.state_dict(),
      )
    with atomic_path(self.out / name) as tmp:
      torch.save(state, tmp)
    if name == BEST and not self.config.full:
      save_adapter(self.student.model, self.out / "adapter", self.base_hash)

  def load(self, state: dict[str, Any]) -> None:
    """Raises UserError where the checkpoint is of another run."""
    path = self.out / LAST
    if "optimizer" not in state:
      raise UserError(f"{path} is no checkpoint to go on from; leave --resume out to start")
    old, new = state["config"], dataclasses.asdict(self.config)
    differ = [k for k in new if old.get(k) != new[k]]
    if differ:
      raise UserError(
        f"{path} is of a run with other options: {', '.join(f'{k} {old.get(k)} then, {new[k]} now' for k in differ)}; "
        "give the same ones"
      )
    if state["base_hash"] != self.base_hash or state["data"] != self.data:
      what = "base" if state["base_hash"] != self.base_hash else "data"
      raise UserError(f"{path} is of a run with other {what}; give the same, or choose another --output")
    with torch.no_grad():
      for n, p in self.learned.items():
        p.copy_(state["adapter"][n])
    self.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"] is not None and self.accelerator.scaler is not None:
      self.accelerator.scaler.load_state_dict(state["scaler"])
    self.epoch, self.step, self.at, self.best, self.sums, self.val_metrics = (
      state[k] for k in ("epoch", "step", "at", "best", "sums", "val")
    )

  # *** the loop ***

  def prepared(self, batch: dict[str, Any], labels: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """On the device, and with the teacher's labels: these, or made now."""
    out = to_device({k: v for k, v in batch.items() if torch.is_tensor(v)}, self.accelerator.device)
    if self.teacher is not None and self.config.teacher_weight:
      out["labels"] = (
        to_device({k: v.float() for k, v in self.teacher.label(out).items()}, self.accelerator.device)
        if labels is None
        else labels
      )
    return out

  def told(self, piece: dict[str, Any]) -> tuple[dict[str, torch.Tensor] | None, dict[str, torch.Tensor]]:
    """Of a part of a batch: its teacher's labels, and by how much its targets teach. Kept for all parts at once, where
    the pictures are not."""
    b = self.prepared(piece)
    return b.get("labels"), self.student.amounts(b)

  @torch.no_grad()
  def evaluate(self) -> dict[str, float]:
    """Mean losses on held-out clips, and meters between the plan and the drive after 1, 2, 3 s beside those of the
    constant-curvature path. {} without any."""
    if self.val is None or not len(self.val):
      return {}
    self.model.eval()
    sums: dict[str, float] = {}
    errors: dict[str, list[np.ndarray]] = {}
    size = max(1, self.config.batch_size // self.config.accumulate)
    order = [list(range(a, min(a + size, len(self.val)))) for a in range(0, len(self.val), size)]
    for indices, batch in zip(order, make_loader(self.val, order, self.workers), strict=True):
      b = self.prepared(batch)
      with self.accelerator.autocast():
        outputs = list(self.student.run(b))
        losses = self.student.losses(outputs, b)
      for k, v in losses.items():
        sums[k] = sums.get(k, 0.0) + float(v) * len(indices)
      seen = slice(self.config.burn_in, None)
      driven, rival = batch["plan"].numpy()[:, seen], constant_curvature(batch["pose"].numpy()[:, seen])
      plans = {"constant_curvature": rival}
      if "plan" in outputs[0]:
        plans["path"] = torch.stack([o["plan"] for o in outputs], 1).float().cpu().numpy()[:, seen]
      for name, plan in plans.items():
        for s in SECONDS:
          errors.setdefault(f"{name}_{s:g}s", []).append(path_error(plan, driven, s).ravel())
    self.model.train()
    out = {k: v / len(self.val) for k, v in sums.items()}
    for k, parts in errors.items():
      e = np.concatenate(parts)
      if np.isfinite(e).any():
        out[k] = float(np.nanmean(e))
    return out

  def step_on(self, batch: dict[str, Any]) -> dict[str, float]:
    """One optimizer step over a batch, in parts. Raises UserError where a loss or gradient is not finite: then nothing
    has changed."""
    config, acc = self.config, self.accelerator
    torch.manual_seed(config.seed * 1_000_003 + self.step)
    if config.augment:
      batch = augment(batch, np.random.default_rng([config.seed, self.step]))
    parts = [p for p in np.array_split(np.arange(len(batch["frames"])), config.accumulate) if len(p)]
    pieces = [{k: v[part[0] : part[-1] + 1] for k, v in batch.items()} for part in parts]
    told = [self.told(p) for p in pieces] if len(parts) > 1 else []
    self.optimizer.zero_grad(set_to_none=True)
    values: dict[str, float] = {}
    for i, piece in enumerate(pieces):
      with contextlib.nullcontext() if i == len(parts) - 1 else acc.no_sync(self.model):
        b = self.prepared(piece, told[i][0] if told else None)
        if told:  # what a part teaches may be much or little: see Student.losses
          b["shares"] = {
            k: v / torch.stack([other[k] for _, other in told]).sum(0).clamp(min=TINY) for k, v in told[i][1].items()
          }
        with acc.autocast():
          losses = self.model(b)
        for k, v in losses.items():
          values[k] = values.get(k, 0.0) + float(v.detach())
        if not math.isfinite(values["total"]):
          bad = [k for k, v in losses.items() if not torch.isfinite(v)]
          raise self.not_finite(f"the loss ({', '.join(bad)})", batch)
        acc.backward(losses["total"])
    norm = acc.clip_grad_norm_(list(self.learned.values()), config.clip_norm)
    if (
      acc.scaler is None and norm is not None and not math.isfinite(float(norm))
    ):  # a scaler skips such a step and goes on
      raise self.not_finite("the gradient", batch)
    self.optimizer.step()
    return values

  def not_finite(self, what: str, batch: dict[str, Any]) -> UserError:
    kept = [str(self.out / name) for name in (LAST, BEST) if (self.out / name).exists()]
    hint = f"the last good checkpoint is {kept[0]}" if kept else "no checkpoint was written yet"
    names = ", ".join(sorted(set(batch.get("segment", []))))
    return UserError(
      f"{what} of step {self.step} is not finite{' on ' + names if names else ''}; {hint}: take a lower --lr, or look "
      "at these segments"
    )

  def fit(self) -> dict[str, float]:
    """Trains to the end. -> the last validation. Raises UserError where it diverges or memory runs out;
    KeyboardInterrupt after saving at a whole step."""
    config, main, per_epoch = self.config, self.accelerator.is_main_process, self.steps_per_epoch
    total = config.epochs * per_epoch
    self.accelerator.init_trackers(
      "dgx", config={k: v for k, v in dataclasses.asdict(config).items() if isinstance(v, (int, float, str, bool))}
    )
    interrupted: list[int] = []
    stops = (signal.SIGINT, signal.SIGTERM)  # the latter from torchrun, when it is stopped itself
    before = [signal.signal(s, lambda number, _: interrupted.append(number)) for s in stops]
    bar = tqdm(total=total, initial=self.step, desc="train", unit="step", disable=not main)
    self.model.train()
    try:
      while self.epoch < config.epochs:
        order = self.batches(self.epoch)[self.at :]
        waited, begun = 0.0, time.perf_counter()
        loader = iter(make_loader(self.train, order, self.workers, self.accelerator.device.type == "cuda"))
        for _ in order:
          t = time.perf_counter()
          batch = next(loader)
          waited += time.perf_counter() - t
          for group in self.optimizer.param_groups:
            group["lr"] = rate(config, self.step, total)
          values = self.step_on(batch)
          self.step, self.at = self.step + 1, self.at + 1
          for k, v in values.items():
            self.sums[k] = self.sums.get(k, 0.0) + v
          bar.update()
          bar.set_postfix(loss=f"{values['total']:.3f}", wait=f"{waited / (time.perf_counter() - begun) * 100:.0f}%")
          self.accelerator.log(values, step=self.step)
          if anywhere(
            self.accelerator, bool(interrupted)
          ):  # also where another process was told: it alone would leave the others waiting
            self.save(LAST)
            self.accelerator.wait_for_everyone()
            if main:
              tqdm.write(f"stopped at step {self.step}, saved; the same command with --resume goes on")
            raise KeyboardInterrupt
        self.end_epoch(per_epoch, waited, time.perf_counter() - begun)
    except RuntimeError as e:
      if not isinstance(e, torch.cuda.OutOfMemoryError) and "not enough memory" not in str(e):  # the latter is a CPU's
        raise
      now = f"{config.batch_size} clips of {config.clip} steps in {config.accumulate} parts"
      raise UserError(f"the memory does not hold {now}; raise --accumulate, or lower --batch-size or --clip") from None
    finally:
      for s, handler in zip(stops, before, strict=True):
        signal.signal(s, handler)
      bar.close()
      self.accelerator.end_training()
    return self.val_metrics

  def end_epoch(self, steps: int, waited: float, spent: float) -> None:
    means = {k: v / steps for k, v in self.sums.items()}
    self.val_metrics = self.evaluate() if self.accelerator.is_main_process else {}
    score = self.val_metrics.get("total", means["total"])
    self.epoch, self.at, self.sums = self.epoch + 1, 0, {}
    if score < self.best:
      self.best = score
      self.save(BEST)
    self.save(LAST)
    if self.accelerator.is_main_process:
      with open(self.out / "train_log.jsonl", "a") as f:
        f.write(
          json.dumps(
            {
              "epoch": self.epoch,
              "step": self.step,
              "train": means,
              "val": self.val_metrics,
              "waited": waited,
              "seconds": spent,
            }
          )
          + "\n"
        )
      shown = ", ".join(f"{k} {v:.3f}" for k, v in self.val_metrics.items())
      tqdm.write(
        f"epoch {self.epoch}: train "
        f"{means['total']:.4f}{'; held out: ' + shown if shown else ''}{'  <- best' if score == self.best else ''}"
      )
    self.accelerator.log({f"val/{k}": v for k, v in self.val_metrics.items()}, step=self.step)
    self.accelerator.wait_for_everyone()


def table(run: Run, args: argparse.Namespace, how: str) -> str:
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


def parse_weights(items: list[str]) -> dict[str, float]:
  try:
    return {k: float(v) for k, v in (i.split("=", 1) for i in items)}
  except ValueError:
    raise UserError(f"--weight {' '.join(items)}: write LOSS=NUMBER, as lead=0.2") from None


def config_of(args: argparse.Namespace) -> Config:
  precision = args.precision or ("bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no")
  same = {
    f.name: getattr(args, f.name)
    for f in dataclasses.fields(Config)
    if hasattr(args, f.name) and f.name not in ("weights", "precision")
  }
  config = Config(**same, precision=precision, weights=parse_weights(args.weight))
  low = [k for k in ("epochs", "batch_size", "accumulate", "clip") if getattr(config, k) < 1]
  if low or not 0 <= config.burn_in < config.clip or config.lr <= 0 or not 0 <= config.val_share < 1:
    raise UserError(
      f"{', '.join(low) or '--burn-in, --lr or --val-share'}: counts are at least 1, --burn-in below --clip, --lr "
      "above 0, --val-share below 1"
    )
  return config


def main() -> None:
  p = argparse.ArgumentParser(prog="train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  d = Config()
  p.add_argument("--data", type=Path, required=True, help="a folder of dataloader.py")
  p.add_argument(
    "--val", type=Path, help="another such folder to validate on; else a share of the routes, or segments, is held out"
  )
  base = p.add_mutually_exclusive_group()
  base.add_argument(
    "--base", type=Path, metavar="MODEL.onnx", help="openpilot's driving model, or its policy with --vision"
  )
  base.add_argument(
    "--reference",
    nargs="?",
    const="plain",
    choices=("plain", "speed", "turn"),
    help="a small network of openpilot's interface, the default without --base. speed: told the car's too; turn: that, "
    "and it sees turns",
  )
  p.add_argument("--vision", type=Path, help="the network that makes a policy's features; it stays as it is")
  p.add_argument(
    "--teacher",
    type=Path,
    nargs="+",
    metavar="ONNX",
    help="a driving model, or vision and policy, whose outputs are learned",
  )
  p.add_argument("--output", type=Path, default=Path("."))
  p.add_argument("--epochs", type=int, default=d.epochs)
  p.add_argument("--batch-size", type=int, default=d.batch_size, help="clips a step, over all GPUs")
  p.add_argument(
    "--accumulate", type=int, default=d.accumulate, help="cut each batch into so many parts, to save memory"
  )
  p.add_argument("--clip", type=int, default=d.clip, help="steps at 5 Hz over which the memory is carried")
  p.add_argument("--burn-in", type=int, default=d.burn_in, help="of them, steps at the start that only fill the memory")
  p.add_argument(
    "--hop", type=int, default=d.hop, help="frames from one clip's start to the next; 0: they do not overlap"
  )
  add_adapter_arguments(p, "dense layers, recurrent ones and heads by themselves")
  p.add_argument("--full", action="store_true", help="train all parameters, without an adapter")
  p.add_argument(
    "--augment", action="store_true", help="mirror half of the clips, and vary light, contrast and noise of all"
  )
  p.add_argument("--lr", type=float, default=d.lr)
  p.add_argument("--weight-decay", type=float, default=d.weight_decay)
  p.add_argument("--path-weight", type=float, default=d.path_weight, help="of the path really driven; 0 leaves it out")
  p.add_argument("--teacher-weight", type=float, default=d.teacher_weight)
  p.add_argument("--weight", action="append", default=[], metavar="LOSS=W", help="of one loss, as lead=0.2")
  p.add_argument("--val-share", type=float, default=d.val_share)
  p.add_argument("--precision", choices=("no", "bf16", "fp16"), help="mixed precision; bf16 on GPUs that have it")
  p.add_argument("--seed", type=int, default=0)
  p.add_argument("--workers", type=int, default=2, help="processes that read data")
  p.add_argument("--trackers", default="", help=f"comma-separated: {', '.join(TRACKERS)}; `pip install -e .[track]`")
  p.add_argument("--resume", action="store_true", help="go on from OUTPUT/last.pt")
  args = p.parse_args()
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
      print(
        "warning: no --base: the small reference network is trained, which knows nothing yet; give openpilot's driving "
        "model with --base",
        file=sys.stderr,
      )
    if not path.exists():
      save_reference(
        path, TurnDriving(config.seed) if args.reference == "turn" else None, config.seed, args.reference == "speed"
      )
  teacher = DrivingTeacher(args.teacher, batch=-(-config.batch_size // config.accumulate)) if args.teacher else None
  run = Run(config, path, args.vision, teacher, train, val, args.output, args.workers, trackers)
  if state is not None:
    run.load(state)
  if run.accelerator.is_main_process:
    print(table(run, args, how))
  metrics = run.fit()
  if run.accelerator.is_main_process:
    if "path_1s" in metrics:
      for s in SECONDS:
        if f"path_{s:g}s" in metrics:
          print(
            f"held-out path after {s:g} s: {metrics[f'path_{s:g}s']:.2f} m off, constant curvature "
            f"{metrics[f'constant_curvature_{s:g}s']:.2f} m"
          )
    export = command(
      "python",
      "tools/dgx/training/export.py",
      "--checkpoint",
      args.output / BEST,
      "--output",
      "custom_driving_policy.onnx",
    )
    print(f"{args.output / BEST}: next, `{export}`")


if __name__ == "__main__":
  raise SystemExit(cli(main)())

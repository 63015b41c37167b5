#!/usr/bin/env python3
"""Adapts a network with DoRA so that it sees what FAIR teachers see: dense features (DINOv2, DINOv3) and depth, from a
label store.

  python tools/dgx/dense/dora_distillation.py --labels LABELS --base driving_supercombo.onnx --output RUN [--data DATA]
       # openpilot's driving network
  python tools/dgx/dense/dora_distillation.py --labels LABELS --student DISTILLED_RUN --output RUN
       # a student of `op distill`

The loss is 0.9 cosine + 0.1 smooth-L1 of standardised features through a projector, depth's, and `keep`: how far all
other outputs move from the base's. With --data the driving network learns the driven path at the same time. RUN gets
best_model.pt for tools/dgx/training/export.py and adapter/ in PEFT's format, or of a student best.pt for `tools/op.sh
export`; projector and depth of a driving network serve while training only."""

import argparse
import copy
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

if not __package__:  # run as a file: the modules beside it must not be found under their bare names
  sys.path[: not sys.flags.safe_path] = [str(Path(__file__).resolve().parents[3])]

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from openpilot.tools.dgx.training.config import add_adapter_arguments
from openpilot.tools.dgx.training.dora import apply_dora, base_hash, check_rank, clipped, save_adapter, unload
from openpilot.tools.dgx.training.losses import check_weights
from openpilot.tools.dgx.training.model import hash_file, load_onnx
from openpilot.tools.dgx.training.shards import DrivingClips, epoch_batches, make_loader, read_dataset
from openpilot.tools.dgx.training.student import Student as DrivingStudent
from openpilot.tools.learn.checkpoint import load_checkpoint, to_device
from openpilot.tools.fair.distillation.batch import Batch, Batches, load
from openpilot.tools.fair.distillation.data import Clips, task_of
from openpilot.tools.fair.distillation.distill import digest, environment, split
from openpilot.tools.fair.distillation.distiller import Distiller
from openpilot.tools.fair.distillation.trained import trained_on, union
from openpilot.tools.fair.distillation.trainer import Config, rate
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.bundle.export import load_student
from openpilot.tools.fair.students.student import Student
from openpilot.tools.fair.teacher import check_license
from openpilot.tools.dgx.dense.driving_features import DrivingFeatures, frames_back, pair_up, trace
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.flags import add_flag
from openpilot.tools.lib.files import atomic_path
from openpilot.tools.lib.said import command

TAUGHT = ("features", "depth")
WEIGHTS = {"features": 1.0, "depth": 1.0, "keep": 1.0, "path": 1.0}
BEST, RESUME = "best_model.pt", "resume.pt"
VAL_BATCHES = 8


@dataclasses.dataclass
class Settings:
  """All that decides a run, beside network and labels."""

  steps: int = 2000
  batch_size: int = 8  # clips
  dora_rank: int = 16
  dora_alpha: float | None = None
  dora_dropout: float = 0.0
  targets: list[str] | None = None
  tap: str | None = None
  lr: float = 1e-3
  weights: dict[str, float] = dataclasses.field(default_factory=lambda: dict(WEIGHTS))
  augment: bool = True
  eval_every: int = 200
  clip: int = 8  # steps of the driven path, at 5 Hz
  seed: int = 0


def moved(new: dict[str, Tensor], base: dict[str, Tensor]) -> Tensor:
  """How far outputs are from the base's: the mean over them of mean |new - base| / mean |base|. scalar."""
  parts = [(new[k].float() - b.float()).abs().mean() / b.float().abs().mean().clamp(min=1e-3) for k, b in base.items()]
  return torch.stack(parts).mean()


class Pairs(Batches):
  """Batches of pairs of frames, for driving networks."""

  def __getitem__(self, what: tuple[int, list[int], bool]) -> Batch:
    return pair_up(super().__getitem__(what), self.clips.length)


class DoRADistillation(nn.Module):
  """forward(batch) -> {"features/...", "depth/...", "keep"}: the parts of the loss; total(parts) -> the loss. The
  network's own weights are frozen: its adapters learn, the projector, and of a driving network the depth that is read
  from its map.

  student: a driving network's features, or a fair student. feature_shape: (C, h, w) of the teacher's, where `tasks` has
  features."""

  def __init__(
    self,
    student: DrivingFeatures | Student,
    tasks: list[str],
    settings: Settings,
    feature_shape: tuple[int, ...] | None,
  ):
    super().__init__()
    self.settings = settings
    self.driving = isinstance(student, DrivingFeatures)
    self.network: nn.Module = student.model if isinstance(student, DrivingFeatures) else student
    self.base = copy.deepcopy(self.network).eval().requires_grad_(False)
    names = settings.targets
    if names is None:  # what the map or the heads are made of; with a path to learn, all
      if isinstance(student, DrivingFeatures):
        names = [x.name for x in student.layers] if settings.weights.get("path") else student.upto
      else:
        frame = torch.zeros(1, 6, 128, 256, dtype=torch.uint8)
        names = [
          x.name
          for x in trace(student, lambda: student(frame))
          if not x.name.startswith(("objects", "detector", "lanes"))
        ]
    check_rank(self.network, settings.dora_rank, names)
    self.adapted = apply_dora(self.network, settings.dora_rank, settings.dora_alpha, names, settings.dora_dropout)
    self.distiller = Distiller(cast(Student, student), tasks, settings.weights, feature_shape=feature_shape)

  def train(self, mode: bool = True) -> "DoRADistillation":
    super().train(mode)
    self.base.eval()
    for m in self.network.modules():
      if isinstance(m, nn.modules.batchnorm._BatchNorm):  # statistics stay the base's
        m.eval()
    return self

  @torch.no_grad()
  def before(self, frame: Tensor) -> dict[str, Tensor]:
    """What the base says, of all that no teacher speaks of."""
    student: Any = self.distiller.student
    said = student.outputs(frame, self.base) if self.driving else self.base(frame)
    return {k: v for k, v in said.items() if torch.is_tensor(v) and k not in TAUGHT}

  def forward(self, batch: Batch) -> dict[str, Tensor]:
    parts, out = self.distiller.losses(batch)
    base = self.before(batch["frame"])
    return {**parts, "keep": moved(out, base)} if base else parts

  def total(self, parts: dict[str, Tensor]) -> Tensor:
    loss = self.distiller.total({k: v for k, v in parts.items() if "/" in k and not k.startswith("driven/")})
    return loss + sum(self.settings.weights[k] * parts[k] for k in ("keep", "path") if k in parts)


class Run:
  """One run in the folder `out`. source: the base's ONNX file, or the fair student's run."""

  def __init__(
    self,
    settings: Settings,
    source: Path,
    train: Clips,
    val: Clips | None,
    out: Path,
    labels: str,
    data: Path | None = None,
    workers: int = 0,
  ):
    self.settings, self.source, self.clips, self.val, self.out, self.labels, self.workers = (
      settings,
      source,
      train,
      val,
      out,
      labels,
      workers,
    )
    self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(settings.seed)
    self.is_driving = source.is_file()
    student: DrivingFeatures | Student
    if self.is_driving:
      student = DrivingFeatures(load_onnx(source), settings.tap)
      self.hash, self.student_config, self.student_state = hash_file(source), None, dict[str, Any]()
    else:
      student, self.student_config, self.student_state = load_student(source)
      self.hash = base_hash(student)
    shape = next(
      (c.labels[0].shape[-3:] for s in train.segments for t, c in s.sources.items() if t == "features"), None
    )
    self.model = DoRADistillation(student, train.tasks, settings, shape)
    make = Pairs if self.is_driving else Batches
    self.batches, self.val_batches = (
      make(train, settings.seed, False),
      None if val is None else make(val, settings.seed, False),
    )
    if shape is not None:
      sample = np.linspace(0, len(train) - 1, min(64, len(train))).astype(int)
      self.model.distiller.fit_features(self.batches[(0, [int(i)], False)] for i in sample)
    self.model.to(self.device)
    self.learned = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
    self.optimizer = torch.optim.AdamW(list(self.learned.values()), lr=settings.lr, weight_decay=0.0)
    self.config = Config(
      str(source),
      train.tasks,
      steps=settings.steps,
      batch=settings.batch_size * train.length,
      clip=train.length,
      lr=settings.lr,
      warmup=min(200, settings.steps // 10),
      seed=settings.seed,
    )
    self.order = lru_cache(2)(lambda epoch: train.order([settings.seed, epoch]))
    self.path: DrivingStudent | None = None
    if data is not None:
      if not isinstance(student, DrivingFeatures) or "features_buffer" not in student.shapes:
        raise UserError(f"--data: only a whole driving network learns a path, and {source} is none; leave --data out")
      self.path = DrivingStudent(student.model, None, check_weights({}), 1.0, 0.0)
      self.driven = DrivingClips(read_dataset(data)[1], settings.clip)
      if not len(self.driven):
        raise UserError(
          f"{data} has no clip of {settings.clip} steps that follow each other, each kept; lower --clip, or filter "
          "less in dataloader.py"
        )
    self.step, self.best = 0, math.inf

  def chosen(self, step: int) -> list[int]:
    n, size = len(self.clips), self.settings.batch_size
    return [int(self.order(i // n)[i % n]) for i in range(step * size, (step + 1) * size)]

  def label_batches(self) -> Iterator[Batch]:
    """From this step on: a function of the seed and the step alone, so that a resumed run sees what the unbroken one
    sees."""
    what = [(s, self.chosen(s), self.settings.augment) for s in range(self.step, self.settings.steps)]
    return load(self.batches, what, self.workers)

  def driven_batches(self) -> Iterator[dict[str, Any]]:
    size = self.settings.batch_size
    per = len(epoch_batches(len(self.driven), size, 0, 0))
    order = [
      epoch_batches(len(self.driven), size, self.settings.seed, s // per)[s % per]
      for s in range(self.step, self.settings.steps)
    ]
    return iter(make_loader(self.driven, order, self.workers))

  def parts_of(self, batch: Batch, driven: dict[str, Any] | None = None) -> dict[str, Tensor]:
    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
      parts: dict[str, Tensor] = self.model(to_device(batch, self.device))
      if driven is not None:
        assert self.path is not None
        parts["path"] = self.path(to_device({k: v for k, v in driven.items() if torch.is_tensor(v)}, self.device))[
          "total"
        ]
    return parts

  @torch.no_grad()
  def evaluate(self) -> dict[str, float]:
    """Mean losses on held-out labels, not augmented. {} without any."""
    if self.val is None or self.val_batches is None:
      return {}
    self.model.eval()
    which = np.unique(
      np.linspace(0, len(self.val) - 1, min(VAL_BATCHES * self.settings.batch_size, len(self.val))).astype(int)
    )
    sums, seen = dict[str, float](), 0
    for a in range(0, len(which), self.settings.batch_size):
      some = [int(i) for i in which[a : a + self.settings.batch_size]]
      parts = self.parts_of(self.val_batches[(0, some, False)])
      for k, v in {**parts, "total": self.model.total(parts)}.items():
        sums[k] = sums.get(k, 0.0) + float(v) * len(some)
      seen += len(some)
    self.model.train()
    return {k: v / seen for k, v in sums.items()}

  def fit(self) -> dict[str, float]:
    """Trains to the end. -> the last evaluation. Raises UserError where the loss is not finite: then nothing has
    changed since the last checkpoint."""
    settings = self.settings
    self.model.train()
    metrics: dict[str, float] = {}
    batches, driven = self.label_batches(), None if self.path is None else self.driven_batches()
    with (
      open(self.out / "log.jsonl", "a") as log,
      tqdm(total=settings.steps, initial=self.step, desc="DoRA", unit="step") as bar,
    ):
      if self.step == 0:
        log.write(json.dumps({"step": 0, "val": (first := self.evaluate())}) + "\n")
        tqdm.write("before: " + ", ".join(f"{k} {v:.3f}" for k, v in first.items()))
      while self.step < settings.steps:
        torch.manual_seed(settings.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
          group["lr"] = rate(self.config, self.step)
        parts = self.parts_of(next(batches), None if driven is None else next(driven))
        loss = self.model.total(parts)
        if not torch.isfinite(loss):
          bad = ", ".join(k for k, v in parts.items() if not torch.isfinite(v))
          raise UserError(
            f"the loss of step {self.step} is not finite ({bad}); {self.out} keeps the last checkpoint: take a lower "
            "--lr, or look at the labels"
          )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.learned.values()), self.config.clip_norm)
        self.optimizer.step()
        self.step += 1
        bar.update()
        bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
        log.write(
          json.dumps({"step": self.step, **{k: float(v.detach()) for k, v in {**parts, "loss": loss}.items()}}) + "\n"
        )
        if self.step % settings.eval_every == 0 or self.step == settings.steps:
          metrics = self.evaluate()
          log.write(json.dumps({"step": self.step, "val": metrics}) + "\n")
          log.flush()
          tqdm.write(f"step {self.step}: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items()))
          score = metrics.get("total", float(loss.detach()))
          if score < self.best:
            self.best = score
            self.save_best(metrics)
          self.save_resume()
    return metrics

  # *** checkpoints ***

  def save_best(self, metrics: dict[str, float]) -> None:
    s, network = self.settings, self.model.network
    if self.is_driving:
      learned = {n: p.detach().cpu().clone() for n, p in network.named_parameters() if p.requires_grad}
      settings = {
        "rank": s.dora_rank,
        "alpha": s.dora_alpha,
        "targets": self.model.adapted,
        "dropout": s.dora_dropout,
        "names": self.model.adapted,
      }
      state = {
        "base": str(self.source.resolve()),
        "base_hash": self.hash,
        "adapter": learned,
        "dora": settings,
        "epoch": 0,
        "step": self.step,
        "config": dataclasses.asdict(s),
        "val": metrics,
        "provenance": self.clips.provenance(),
      }
      with atomic_path(self.out / BEST) as tmp:
        torch.save(state, tmp)
      save_adapter(network, self.out / "adapter", self.hash)
      return
    assert self.student_config is not None
    plain = copy.deepcopy(network)
    unload(plain)
    weights = {f"student.{k}": v.detach().cpu() for k, v in plain.state_dict().items()}
    known = {t["model"]: t for t in [*self.student_state["provenance"], *self.clips.provenance()]}
    config = {
      **self.student_state["config"],
      "tasks": list(dict.fromkeys([*self.student_config.tasks, *self.clips.tasks])),
    }
    steps = int(config["steps"])
    state = {
      "config": config,
      "labels": self.labels,
      "step": steps,
      "ema": weights,
      "model": weights,
      "provenance": list(known.values()),
      "val": metrics,
    }
    own = {"segments": [s.name for s in self.clips.segments], "unknown": []}
    state["trained"] = union(trained_on(self.student_state, self.source), own)
    for name in ("best.pt", "last.pt"):
      with atomic_path(self.out / name) as tmp:
        torch.save(state, tmp)

  def save_resume(self) -> None:
    state = {
      "settings": dataclasses.asdict(self.settings),
      "hash": self.hash,
      "labels": self.labels,
      "step": self.step,
      "best": self.best,
      "learned": {n: p.detach().cpu() for n, p in self.learned.items()},
      "optimizer": self.optimizer.state_dict(),
    }
    with atomic_path(self.out / RESUME) as tmp:
      torch.save(state, tmp)

  def load(self, state: dict[str, Any]) -> None:
    """Raises UserError where it is of another run."""
    differ = [k for k, v in dataclasses.asdict(self.settings).items() if state["settings"].get(k) != v]
    differ += [
      k for k, v in (("network", self.hash), ("labels", self.labels)) if state[k if k == "labels" else "hash"] != v
    ]
    if differ:
      raise UserError(
        f"{self.out / RESUME} is of a run with other {', '.join(differ)}; give the same, or choose another --output"
      )
    with torch.no_grad():
      for n, p in self.learned.items():
        p.copy_(state["learned"][n])
    self.optimizer.load_state_dict(state["optimizer"])
    self.step, self.best = state["step"], state["best"]


def tasks_of(root: Path, only: str) -> list[str]:
  """What of TAUGHT the store teaches, or of it what `only` names. Raises UserError where that is nothing."""
  there = {t for g in LabelStore(root).groups() if g.teacher != "frames" for x in g.labels for t in task_of(x)}
  wanted = only.replace(" ", "").split(",") if only else [t for t in TAUGHT if t in there]
  wrong = [t for t in wanted if t not in TAUGHT]
  if wrong or not wanted:
    why = (
      f"--tasks {wrong[0]}: there are {', '.join(TAUGHT)}"
      if wrong
      else f"{root} holds neither dense features nor depth"
    )
    raise UserError(
      f"{why}; label with `tools/op.sh label ROUTE --teachers dinov2-base,depth-anything-v2-metric-outdoor-small "
      f"{command('--out', root)}`"
    )
  return wanted


def table(run: Run) -> str:
  model, learned = run.model, sum(p.numel() for p in run.learned.values())
  size = sum(p.numel() for p in model.base.parameters())
  own = sum(p.numel() for p in model.network.parameters() if p.requires_grad)
  cut = clipped(model.network, run.settings.dora_rank)
  student: Any = model.distiller.student
  rows = [
    ("base", f"{run.source}, {size / 1e6:.2f}M parameters, {run.hash[:12]}"),
    (
      "adapter",
      (
        f"{own:,} parameters ({own / size * 100:.2f}% of the base): DoRA rank {run.settings.dora_rank} on "
        f"{len(model.adapted)} layers"
      ),
    ),
    *([("", cut)] if cut else []),
    ("besides", f"{learned - own:,} parameters that serve while training only"),
    (
      "map",
      f"{student.tap}, {student.features} channels"
      if model.driving
      else f"the student's own features, {student.size.features} channels",
    ),
    ("teachers", ", ".join(f"{t['model']} ({t['licence']})" for t in run.clips.provenance())),
    (
      "labels",
      (
        f"{', '.join(run.clips.tasks)} of {len(run.clips)} clips of {run.clips.length} frames, "
        f"{0 if run.val is None else len(run.val)} held out"
      ),
    ),
    (
      "driven path",
      f"{len(run.driven)} clips of {run.settings.clip} steps" if run.path is not None else "none: --data",
    ),
    ("steps", f"{run.settings.steps} of {run.settings.batch_size} clips, lr {run.settings.lr:g}, on {run.device}"),
  ]
  return "\n".join(f"{k:<12} {v}" for k, v in rows)


def parse_weights(items: list[str], path: bool) -> dict[str, float]:
  try:
    given = {k: float(v) for k, v in (i.split("=", 1) for i in items)}
  except ValueError:
    raise UserError(f"--weight {' '.join(items)}: write PART=NUMBER, as depth=2") from None
  if wrong := [k for k, v in given.items() if k not in WEIGHTS or not 0 <= v < math.inf]:
    raise UserError(f"--weight {wrong[0]}: the parts are {', '.join(WEIGHTS)}, and weigh 0 or more")
  return {**WEIGHTS, **given, **({} if path else {"path": 0.0})}


def main() -> None:
  p = argparse.ArgumentParser(
    prog="dora_distillation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  d = Settings()
  p.add_argument("--labels", type=Path, required=True, help="the label store: `tools/op.sh label`")
  p.add_argument(
    "--stale-labels",
    action="store_true",
    help="take labels by rules that were mended since, which are refused by themselves",
  )
  who = p.add_mutually_exclusive_group(required=True)
  who.add_argument("--base", type=Path, metavar="MODEL.onnx", help="openpilot's driving model, or its vision network")
  who.add_argument("--student", type=Path, metavar="RUN", help="a finished run of `tools/op.sh distill`")
  p.add_argument("--output", type=Path, required=True, metavar="RUN")
  p.add_argument("--data", type=Path, help="a folder of tools/dgx/training/dataloader.py: learn the driven path too")
  p.add_argument("--val", type=Path, help="another label store to evaluate on; else a tenth of the routes is held out")
  p.add_argument("--tasks", default="", help=f"comma-separated, of {', '.join(TAUGHT)}; all that the store teaches")
  p.add_argument(
    "--prefer", default="", help="teachers, comma-separated: who is asked first where several label the same"
  )
  add_flag(
    p,
    "--accept-license",
    "--accept-licence",
    action="append",
    default=[],
    metavar="LICENSE",
    help="of teachers whose license restricts what learns from them",
  )
  p.add_argument("--steps", type=int, default=d.steps)
  p.add_argument(
    "--batch-size",
    type=int,
    default=d.batch_size,
    help="clips a step; a driving network sees one pair of frames of each",
  )
  add_adapter_arguments(p, "by itself those that make the map, and with --data all")
  p.add_argument(
    "--tap",
    metavar="LAYER",
    help="the driving network's map that learns features: by itself the last of 8x16 cells or more",
  )
  p.add_argument("--lr", type=float, default=d.lr)
  p.add_argument(
    "--weight",
    action="append",
    default=[],
    metavar="PART=W",
    help=f"of the loss's parts {', '.join(WEIGHTS)}; 1 by itself",
  )
  p.add_argument("--clip", type=int, default=d.clip, help="steps at 5 Hz of a clip of --data")
  p.add_argument("--no-augment", action="store_true")
  p.add_argument("--eval-every", type=int, default=d.eval_every, help="steps; a checkpoint is written as often")
  p.add_argument("--seed", type=int, default=0)
  p.add_argument("--workers", type=int, default=1, help="processes that read and augment")
  p.add_argument("--resume", action="store_true", help="go on from RUN/resume.pt")
  args = p.parse_args()
  same = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings) if f.name not in ("weights", "augment")}
  settings = Settings(**same, weights=parse_weights(args.weight, args.data is not None), augment=not args.no_augment)
  if min(settings.steps, settings.batch_size, settings.clip, settings.eval_every) < 1 or settings.lr <= 0:
    raise UserError("--steps, --batch-size, --clip and --eval-every are at least 1, --lr above 0")
  tasks = tasks_of(args.labels, args.tasks)
  length = 1
  if args.base is not None:
    if not args.base.is_file():
      raise UserError(f"there is no {args.base}; give the driving model's ONNX file")
    every = {int(g.meta["every"]) for g in LabelStore(args.labels).groups() if g.teacher == "frames"} or {1}
    length = 1 + frames_back(max(every))
  prefer = [t for t in args.prefer.replace(" ", "").split(",") if t]
  train, val = split(args.labels, args.val, Config("", tasks, clip=length), prefer, None, args.stale_labels)
  for teacher in train.provenance():
    check_license(teacher["model"], teacher["licence"], args.accept_license)
  state = load_checkpoint(args.output / RESUME, "leave --resume out to start") if args.resume else None
  if state is None and (args.output / RESUME).exists():
    raise UserError(f"{args.output} holds a run; add --resume to go on, or choose another --output")
  args.output.mkdir(parents=True, exist_ok=True)
  labels = digest(args.labels)
  run = Run(settings, args.base or args.student, train, val, args.output, labels, args.data, args.workers)
  if state is not None:
    run.load(state)
  else:
    with atomic_path(args.output / "environment.json") as tmp:
      tmp.write_text(json.dumps(environment(args, run.config, train, labels), indent=1))
  print(table(run))
  run.fit()
  if args.base is not None:
    print(
      f"{args.output / BEST}: next, `python tools/dgx/training/export.py {command('--checkpoint', args.output / BEST)} "
      "--output custom_driving.onnx`"
    )
  else:
    print(f"{args.output}: next, `tools/op.sh export {command(args.output)} --out models/NAME`")


if __name__ == "__main__":
  raise SystemExit(cli(main)())

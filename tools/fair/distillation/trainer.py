"""The training loop: clips of a label store in, a student out.

Everything random is a function of the seed and the step, so that a resumed run is the unbroken one."""

import contextlib
import copy
import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from openpilot.tools.learn.checkpoint import to_device
from openpilot.tools.fair.distillation.batch import Batch, Batches, load
from openpilot.tools.fair.distillation.data import Clips, task_of
from openpilot.tools.fair.distillation.distiller import Distiller
from openpilot.tools.fair.distillation.samples import draw_samples
from openpilot.tools.fair.distillation.soft_labels import DistillationTrainer as DistillationTrainer
from openpilot.tools.fair.distillation.trained import Trained, union
from openpilot.tools.learn.processes import anywhere, gathered, make_accelerator, said_once
from openpilot.tools.fair.students.student import build
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import atomic_path

LOG_EVERY = 20  # steps
RESUMED = (
  "config",
  "labels",
  "step",
  "best",
  "model",
  "ema",
  "optimizer",
  "losses",
  "order",
  "epoch",
  "at",
  "provenance",
)  # what a run goes on from


@dataclass
class Stage:
  """A part of the run. tasks: those that count, all where empty; freeze: parameters whose names start so stay as they
  are; lr: a factor."""

  steps: int
  tasks: list[str] = field(default_factory=list)
  freeze: list[str] = field(default_factory=list)
  lr: float = 1.0


@dataclass
class Config:
  """All that decides a run, beside the labels."""

  student: str
  tasks: list[str]
  backbone: str | None = None
  pretrained: bool = False
  steps: int = 4000
  batch: int = 16  # frames
  clip: int = 1  # frames of a clip
  lr: float = 1.5e-3
  weight_decay: float = 0.02
  warmup: int = 200  # steps
  clip_norm: float = 5.0
  ema: float = 0.998
  seed: int = 0
  weights: dict[str, float] = field(default_factory=dict)  # of tasks; 1 where not named
  learned_weights: bool = False  # by uncertainty
  hard: float = 0.2  # share of an epoch that goes to the clips of the highest loss
  mirror: bool = True
  augment: bool = True
  overfit: int = 0  # clips that are all there is to learn; 0: all clips
  eval_every: int = 500
  eval_clips: int = 64
  precision: str = "no"  # accelerate's mixed precision: no, bf16, fp16
  stages: list[Stage] = field(default_factory=list)

  def stage(self, step: int) -> Stage:
    for s in self.stages:
      if step < s.steps:
        return s
      step -= s.steps
    return Stage(self.steps)

  @classmethod
  def from_dict(cls, d: dict[str, Any]) -> "Config":
    """Raises UserError where it is of another version of this code."""
    try:
      return cls(**{**d, "stages": [Stage(**s) for s in d.get("stages", [])]})
    except TypeError as e:
      raise UserError(f"a checkpoint's configuration is of another version of this code: {e}; train again") from None


def rate(config: Config, step: int) -> float:
  """Linear warm-up, then a cosine down to a fiftieth."""
  warm = min(1.0, (step + 1) / max(1, config.warmup))
  return config.lr * config.stage(step).lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / config.steps)))


def grown(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor | None:
  """old, a weight or a norm's statistics, in the shape of `new`, whose first two dimensions (outputs, inputs) may be
  larger: the earlier outputs see nothing of the new inputs and so come out as before, as in Net2Net (arXiv:1511.05641),
  the new outputs are those of `new`. None where it does not fit."""
  if old.shape == new.shape:
    return old
  if (
    old.dim() != new.dim()
    or old.dim() == 0
    or old.shape[2:] != new.shape[2:]
    or any(a > b for a, b in zip(old.shape, new.shape, strict=True))
  ):
    return None
  out = new.clone()
  out[: len(old)] = 0
  out[tuple(slice(n) for n in old.shape)] = old.to(new.dtype)
  return out


class Run:
  """One training run in the folder `out`. A checkpoint is made every eval_every steps, at the end, and on Ctrl-C."""

  def __init__(
    self,
    config: Config,
    train: Clips,
    val: Clips | None,
    out: Path,
    labels: str,
    workers: int = 1,
    trackers: tuple[str, ...] = (),
  ):
    """Raises UserError where the processes are more than a step's clips, or a stage freezes what is not there.
    trackers: of parse_trackers()."""
    self.config, self.train, self.val, self.out, self.labels, self.workers = config, train, val, out, labels, workers
    self.chosen = (
      np.linspace(0, len(train) - 1, min(config.overfit, len(train))).astype(int) if config.overfit else None
    )
    self.accelerator = make_accelerator(config.precision, trackers, out)
    world = self.accelerator.num_processes
    if self.clips_per_step() < world:
      said = f"--batch {config.batch} makes {self.clips_per_step()} clips of {config.clip} frames a step, which {world} processes cannot share"  # noqa: E501
      raise UserError(f"{said}; raise --batch to {world * config.clip} at least, or start fewer processes")
    torch.manual_seed(config.seed)
    stored = [c.labels[0] for s in train.segments for t, c in s.sources.items() if t == "features"]
    live = [x for x in (train.live.labels if train.live else ()) if "features" in task_of(x)]
    shape = next((x.shape[-3:] for x in [*stored, *live]), None)
    student = build(config.student, config.backbone, config.pretrained).to(
      memory_format=torch.channels_last
    )  # a quarter less time a step
    model = Distiller(student, config.tasks, config.weights, config.learned_weights, shape)
    if "features" in config.tasks:
      sample = np.linspace(0, len(train) - 1, min(64, len(train))).astype(int)
      model.fit_features(Batches(train, config.seed, False)[(0, [int(i)], False)] for i in sample)
    for stage in config.stages:
      if absent := [
        f
        for f in stage.freeze
        if not any(name.removeprefix("student.").startswith(f) for name, _ in model.named_parameters())
      ]:
        parts = sorted({name.removeprefix("student.").split(".")[0] for name, _ in model.named_parameters()})
        raise UserError(f"--stages: freeze '{absent[0]}' is no part of {config.student}; it has {', '.join(parts)}")
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
      [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}], lr=config.lr
    )
    self.ema = copy.deepcopy(model).eval().requires_grad_(False).to(self.accelerator.device)
    self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
    self.step, self.best, self.saved = 0, math.inf, -1  # saved: the step of last.pt
    self.inherited: list[dict[str, str]] = []  # teachers of the student that this one started from
    self.trained: Trained = {"segments": sorted(s.name for s in train.segments), "unknown": []}
    self.losses = np.zeros(
      len(train), np.float32
    )  # of each clip, when it was last seen; of its batch, which is all that is known
    self.order: list[int] = []  # of the epoch that runs
    self.epoch = -1
    self.at = 0  # place in the epoch

  @property
  def distiller(self) -> Distiller:
    return self.accelerator.unwrap_model(self.model)

  # *** what is seen next ***

  def clips_per_step(self) -> int:
    return max(1, self.config.batch // self.config.clip)

  def next_epoch(self) -> None:
    self.epoch += 1
    self.at = 0
    if self.chosen is not None:
      need = self.clips_per_step()
      self.order = [int(self.chosen[i % len(self.chosen)]) for i in range(need)] * max(1, 200 // need)
      return
    order = self.train.order([self.config.seed, self.epoch])
    hardest = np.argsort(-self.losses, kind="stable")[: int(self.config.hard * len(order))]
    if self.epoch and len(hardest):  # they take the places of as many others, spread over the epoch
      r = np.random.default_rng([self.config.seed, self.epoch, 1])
      order[r.choice(len(order), len(hardest), replace=False)] = hardest
    self.order = [int(i) for i in order]
    while len(self.order) < self.clips_per_step():
      self.order += self.order

  def batches(self) -> Iterator[Batch]:
    """The rest of this epoch. Each process takes its share of every step's clips."""
    n, rank, world = self.clips_per_step(), self.accelerator.process_index, self.accelerator.num_processes
    first = self.step
    starts = range(self.at, len(self.order) - n + 1, n)
    what = [
      (first + k, self.order[a : a + n][rank::world], self.config.augment and self.chosen is None)
      for k, a in enumerate(starts)
    ]
    data = Batches(self.train, self.config.seed, self.config.mirror)
    return load(data, what, 0 if self.train.live else self.workers)

  # *** checkpoints ***

  def state(self) -> dict[str, Any]:
    return {
      "config": dataclasses.asdict(self.config),
      "labels": self.labels,
      "step": self.step,
      "best": self.best,
      "model": self.distiller.state_dict(),
      "ema": self.ema.state_dict(),
      "optimizer": self.optimizer.state_dict(),
      "losses": torch.from_numpy(self.losses),
      "order": self.order,
      "epoch": self.epoch,
      "at": self.at,
      "provenance": self.provenance(),
      "trained": self.trained,
    }

  def provenance(self) -> list[dict[str, str]]:
    """All teachers, those of the student that this one started from too: a license that restricts use stays with
    whatever learned from it."""
    every = self.train.provenance() + self.inherited
    return [dict(x) for x in sorted({tuple(sorted(t.items())) for t in every})]

  def save(self, name: str) -> None:
    if self.accelerator.is_main_process:
      with atomic_path(self.out / name) as tmp:
        torch.save(self.state(), tmp)
    if name == "last.pt":
      self.saved = self.step

  def load(self, state: dict[str, Any]) -> None:
    self.distiller.load_state_dict(state["model"])
    self.ema.load_state_dict(state["ema"])
    self.optimizer.load_state_dict(state["optimizer"])
    self.step, self.best, self.order, self.epoch, self.at = (
      state["step"],
      state["best"],
      state["order"],
      state["epoch"],
      state["at"],
    )
    self.losses = state["losses"].numpy()
    self.inherited = state["provenance"]
    self.trained = union(self.trained, state["trained"])
    self.saved = self.step

  def warm_start(self, state: dict[str, Any]) -> list[str]:
    """Takes an earlier student's weights where names and shapes agree, or where this one is wider: see grown(). ->
    names of the student's that found none."""
    own = self.distiller.state_dict()
    there = {k: v for k, v in state["ema"].items() if k.startswith("student.") and k in own}
    fit = {k: x for k, v in there.items() if (x := grown(v, own[k])) is not None}
    for model in (self.distiller, self.ema):
      model.load_state_dict({**own, **fit})
    self.inherited = state["provenance"]
    self.trained = union(self.trained, state["trained"])
    return [k for k in own if k.startswith("student.") and k not in fit]

  # *** the loop ***

  def evaluate(self, limit: int | None = None) -> dict[str, float]:
    """Losses of the averaged student on held-out clips, not augmented. {} where there are none."""
    clips = self.val if self.chosen is None else self.train
    if clips is None:
      return {}
    which = (
      np.unique(np.linspace(0, len(clips) - 1, min(limit or self.config.eval_clips, len(clips))).astype(int))
      if self.chosen is None
      else self.chosen
    )
    data, sums, counts = Batches(clips, 0, False), dict[str, float](), dict[str, int]()
    n = self.clips_per_step()
    for a in range(0, len(which), n):
      batch = data[(0, [int(i) for i in which[a : a + n]], False)]
      with torch.no_grad(), self.accelerator.autocast():
        parts, out = self.ema.losses(to_device(batch, self.accelerator.device))
      for k, v in parts.items():
        sums[k], counts[k] = sums.get(k, 0.0) + float(v), counts.get(k, 0) + 1
      if a == 0:
        draw_samples(
          self.out / "samples" / f"{self.step:06d}.png", batch, {k: v for k, v in out.items() if torch.is_tensor(v)}
        )
    means = {k: v / counts[k] for k, v in sums.items()}
    tasks = {
      t: sum(v for k, v in means.items() if k.split("/")[0] == t)
      for t in self.config.tasks
      if any(k.split("/")[0] == t for k in means)
    }
    return {**means, "total": sum(self.config.weights.get(t, 1.0) * v for t, v in tasks.items())}

  def remember(self, losses: Sequence[float]) -> None:
    """losses: of each process's share of the step that just ended. The same in all processes, which each choose the
    next epoch's hardest clips."""
    step = self.order[self.at - self.clips_per_step() : self.at]
    for rank, loss in enumerate(losses):
      self.losses[step[rank :: len(losses)]] = loss

  def not_finite(self, parts: dict[str, torch.Tensor], batch: Batch, losses: Sequence[float]) -> NoReturn:
    """In every process, where the loss of any is not: `losses` are those of all."""
    mine = [k for k, v in parts.items() if not torch.isfinite(v)] or ["the sum"]
    found = [
      x
      for x in gather_object([(self.accelerator.process_index, mine, batch["names"])])
      if not math.isfinite(losses[x[0]])
    ]
    bad, names = sorted({k for _, b, _ in found for k in b}), [n for _, _, ns in found for n in ns]
    kept = self.out / "last.pt"
    hint = f"the last good checkpoint is {kept}" if kept.exists() else "no checkpoint was written yet"
    where = f"the loss of step {self.step} is not finite ({', '.join(bad)}) on {'; '.join(names)}"
    with said_once():
      raise UserError(f"{where}; {hint}: take a lower --lr, or look at these labels")

  def update_ema(self) -> None:
    decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
    with torch.no_grad():
      for a, b in zip(self.ema.state_dict().values(), self.distiller.state_dict().values(), strict=True):
        if a.is_floating_point():
          a.lerp_(b, 1 - decay)
        else:
          a.copy_(b)

  def fit(self) -> dict[str, float]:
    """Trains to the end. -> the last evaluation. Raises UserError where the loss stops being finite; KeyboardInterrupt
    after saving."""
    config, device = self.config, self.accelerator.device
    main = self.accelerator.is_main_process
    self.accelerator.init_trackers(
      "distill", config={k: v for k, v in dataclasses.asdict(config).items() if isinstance(v, (int, float, str, bool))}
    )
    metrics: dict[str, float] = {}
    frozen: Stage | None = None
    waited, spent, mark = 0.0, 0.0, time.perf_counter()
    interrupted: list[int] = []  # Ctrl-C waits for the end of the step, so that what is saved is whole
    before = signal.signal(signal.SIGINT, lambda number, _: interrupted.append(number))
    bar = tqdm(total=config.steps, initial=self.step, desc=config.student, unit="step", disable=not main)
    log = open(self.out / "log.jsonl", "a") if main else contextlib.nullcontext()
    with log as lines:
      try:
        while self.step < config.steps:
          if self.at + self.clips_per_step() > len(self.order):
            self.next_epoch()
          batches = self.batches()
          while self.step < config.steps:
            t = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
              self.at = len(self.order)
              break
            waited += time.perf_counter() - t
            stage = config.stage(self.step)
            if stage is not frozen:
              freeze(self.distiller, stage)
              frozen = stage
            torch.manual_seed(config.seed * 1_000_003 + self.step)
            for group in self.optimizer.param_groups:
              group["lr"] = rate(config, self.step)
            with self.accelerator.autocast():
              parts = self.model(to_device(batch, device), stage.tasks)
            loss = parts.pop("total")
            losses, labeled = zip(
              *gathered(self.accelerator, loss, bool(parts)), strict=True
            )  # of all processes, by rank
            if not any(labeled):  # no clip of this step has labels of this stage's tasks
              self.step, self.at = self.step + 1, self.at + self.clips_per_step()
              continue
            if not np.isfinite(losses).all():
              self.not_finite(parts, batch, losses)
            if not loss.requires_grad:
              with said_once():
                raise UserError(f"--stages: at step {self.step} all that its tasks learn is frozen; freeze less")
            self.optimizer.zero_grad(set_to_none=True)
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_norm)
            self.optimizer.step()
            self.step, self.at = self.step + 1, self.at + self.clips_per_step()
            self.update_ema()
            self.remember(losses)
            bar.update()
            if self.step % LOG_EVERY == 0:
              spent, mark = time.perf_counter() - mark, time.perf_counter()
              values = {k: float(v.detach()) for k, v in parts.items()}
              mean = float(np.mean(losses))
              bar.set_postfix(loss=f"{mean:.3f}", wait=f"{waited / spent * 100:.0f}%")
              if lines is not None:
                entry = {
                  "step": self.step,
                  "loss": mean,
                  "lr": rate(config, self.step),
                  "wait": waited / spent,
                  "seconds": spent,
                  **values,
                }
                lines.write(json.dumps(entry) + "\n")
                lines.flush()
              self.accelerator.log({"loss": mean, **values}, step=self.step)
              waited = 0.0
            if self.step % config.eval_every == 0 or self.step == config.steps:
              if lines is not None:
                metrics = self.evaluate(limit=None)
                lines.write(json.dumps({"step": self.step, "val": metrics}) + "\n")
                lines.flush()
                self.accelerator.log({f"val/{k}": v for k, v in metrics.items()}, step=self.step)
                tqdm.write(f"step {self.step}: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items()))
              if metrics.get("total", math.inf) <= self.best:
                self.best = metrics.get("total", math.inf)
                self.save("best.pt")
              self.save("last.pt")
              self.accelerator.wait_for_everyone()
            if anywhere(self.accelerator, bool(interrupted)):
              self.save("last.pt")
              if main:
                tqdm.write(f"stopped at step {self.step}, saved; the same command with --resume goes on")
              raise KeyboardInterrupt
      finally:
        signal.signal(signal.SIGINT, before)
        bar.close()
        self.accelerator.end_training()
    if (
      self.saved != self.step
    ):  # no step at all: the student that it started from, as it is; or none with labels at the end
      metrics = self.evaluate() if main else {}
      self.save("last.pt")
    if not (self.out / "best.pt").exists():
      self.save("best.pt")
    return metrics


def freeze(model: Distiller, stage: Stage) -> None:
  for name, p in model.named_parameters():
    p.requires_grad_(not any(name.removeprefix("student.").startswith(f) for f in stage.freeze))
  for name, m in model.named_modules():
    if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):  # statistics are parameters too
      m.train(not any(name.removeprefix("student.").startswith(f) for f in stage.freeze))

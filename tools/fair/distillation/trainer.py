"""The training loop: clips of a label store in, a student out. Several processes share each step's clips, and learn
what one would.

Everything random is a function of the seed and the step, so that a resumed run is the unbroken one."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openpilot.tools.fair.distillation import history
from openpilot.tools.fair.distillation.batch import Batch, Batches, labels_of, load, together
from openpilot.tools.fair.distillation.config import Config, Stage
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.distillation.distiller import Distiller
from openpilot.tools.fair.distillation.samples import draw_samples
from openpilot.tools.fair.distillation.self_taught import Teacher
from openpilot.tools.fair.distillation.sampling import drawn
from openpilot.tools.fair.distillation.soft_labels import DistillationTrainer as DistillationTrainer
from openpilot.tools.fair.distillation.trained import Trained, distinct, union
from openpilot.tools.fair.students.families import FAMILIES, LICENSE, check_processes
from openpilot.tools.fair.students.student import build
from openpilot.tools.fair.tasks import TASKS
from openpilot.tools.learn.checkpoint import to_device
from openpilot.tools.learn.loop import Loop
from openpilot.tools.learn.one_batch import norms_of_all
from openpilot.tools.learn.processes import gathered_objects, make_accelerator, said_once
from openpilot.tools.learn.schedule import learning_rate
from openpilot.tools.lib.errors import UserError, warn

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


OBSERVED = 32  # frames that ranges of 8 bits start from


class Run(Loop):
  """One run of a student in the folder `out`, on clips of a label store."""

  NAME = "distill"

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
    super().__init__(
      out,
      config.steps,
      seed=config.seed,
      clip_norm=config.clip_norm,
      eval_every=config.eval_every,
      accelerator=make_accelerator(config.precision, trackers, out),
    )
    self.config, self.train, self.val, self.labels, self.workers = config, train, val, labels, workers
    self.chosen = (
      np.linspace(0, len(train) - 1, min(config.overfit, len(train))).astype(int) if config.overfit else None
    )
    world = self.accelerator.num_processes
    if self.clips_per_step() < world:
      raise UserError(
        f"--batch-size {config.batch} makes {self.clips_per_step()} clips of {config.clip} frames a step, which "
        f"{world} processes cannot share; raise --batch-size to {world * config.clip} at least, or start fewer"
      )
    torch.manual_seed(config.seed)
    shape = next((s for t in config.tasks if TASKS[t].aids is not None and (s := train.label_shape(t))), None)
    student = build(config.spec, pretrained=config.pretrained).to(memory_format=torch.channels_last)
    model = Distiller(
      student,
      config.tasks,
      config.weights,
      config.learned_weights,
      shape and shape[-3:],
      parts=config.parts,
      label_weight=config.label_weight,
    )
    if model.standardiser is not None:
      sample = np.linspace(0, len(train) - 1, min(64, len(train))).astype(int)
      model.fit_features(Batches(train, config.seed, False)[(0, [int(i)], False)] for i in sample)
    if config.qat:
      from openpilot.tools.fair.optimize.qat import rounding_of

      model.rounding = rounding_of(student, config)
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
    self.prepare(model, optimizer, config.ema)
    self.as_one = world > 1 and not self.learns_by_itself(student)
    self.stage: Stage | None = None  # that of the step before
    self.inherited: list[dict[str, str]] = []  # teachers of the student that this one started from
    self.trained: Trained = {"segments": sorted(s.name for s in train.segments), "unknown": []}
    self.clip_losses = np.zeros(
      len(train), np.float32
    )  # of each clip, when it was last seen; of its batch, which is all that is known
    self.history: history.History = []  # of the student that this one started from
    self.shown = history.entry(train, config.sample)
    self.often = train.drawn_with(config.sample)  # of each clip
    self.order: list[int] = []  # of the epoch that runs
    self.epoch = -1
    self.at = 0  # place in the epoch

  @property
  def distiller(self) -> Distiller:
    return self.unwrapped

  def learns_by_itself(self, student: Any) -> bool:
    """Whether it is of another package, whose own loss knows of a process's share alone. Raises UserError where that
    loss asks the other processes, who do not judge when the first one does."""
    if not hasattr(student, "learn"):
      return False
    if (n := self.accelerator.num_processes) > 1:
      name = self.config.student
      check_processes(name, n)
      if self.accelerator.is_main_process:
        warn(f"{name} learns by its package's own loss, of each process's share: {n} do not learn quite what one would")
    return True

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
    order = drawn(self.train.order([self.config.seed, self.epoch]), self.often, [self.config.seed, self.epoch, 2])
    hardest = np.argsort(-self.clip_losses, kind="stable")
    hardest = hardest[self.often[hardest] > 0][: int(self.config.hard * len(order))]
    if self.epoch and len(hardest):  # they take the places of as many others, spread over the epoch
      r = np.random.default_rng([self.config.seed, self.epoch, 1])
      order[r.choice(len(order), len(hardest), replace=False)] = hardest
    self.order = [int(i) for i in order]
    while len(self.order) < self.clips_per_step():
      self.order += self.order

  def batches(self) -> Iterator[Batch]:
    """The rest of this epoch, or the next one. Each process takes its share of every step's clips."""
    if self.at + self.clips_per_step() > len(self.order):
      self.next_epoch()
    n, rank, world = self.clips_per_step(), self.accelerator.process_index, self.accelerator.num_processes
    first = self.step
    starts = range(self.at, len(self.order) - n + 1, n)
    places = list(range(n))[rank::world]
    what = [
      (first + k, self.order[a : a + n][rank::world], self.config.augment and self.chosen is None, places)
      for k, a in enumerate(starts)
    ]
    c = self.config
    data = Batches(self.train, c.seed, c.mirror, c.light, c.zoom, c.pixels, c.turn, c.night)
    return load(data, what, 0 if self.train.live else self.workers)

  # *** 8 bits ***

  def observe(self) -> None:
    """Ranges start where those of the averaged student are, over frames of what is learned from, not augmented; biases
    take back what rounded weights add to means."""
    from openpilot.tools.fair.optimize.qat import observed

    which = np.unique(np.linspace(0, len(self.train) - 1, min(OBSERVED, len(self.train))).astype(int))
    ranges, shifts = observed(
      self.ema.student, self.ema.rounding, self.config, [self.train.read(int(i)).frames[0] for i in which]
    )
    for model in (self.distiller, self.ema):
      rounding: Any = model.rounding
      rounding.observe(ranges)
      rounding.shift(model.student, shifts)

  def be_taught(self, teacher: Teacher) -> None:
    """By a float student, from now on."""
    teacher.student.to(self.accelerator.device).to(memory_format=torch.channels_last)
    for model in (self.distiller, self.ema):
      model.teacher, model.student.maps_too = teacher, True

  # *** checkpoints ***

  def best_state(self) -> dict[str, Any]:
    return {k: v for k, v in super().best_state().items() if k != "teacher"}

  def state(self) -> dict[str, Any]:
    teacher = self.distiller.teacher
    return {
      **super().state(),
      **({} if teacher is None else {"teacher": teacher.state()}),
      **({} if self.distiller.rounding is None else {"ranges": self.distiller.rounding.ranges}),
      "config": dataclasses.asdict(self.config),
      "labels": self.labels,
      "losses": torch.from_numpy(self.clip_losses),
      "order": self.order,
      "epoch": self.epoch,
      "at": self.at,
      "provenance": self.provenance(),
      "trained": self.trained,
      "history": [*self.history, {"steps": self.step, "frames": self.step * self.frames_per_step(), **self.shown}],
    }

  def frames_per_step(self) -> int:
    return self.clips_per_step() * self.config.clip

  def provenance(self) -> list[dict[str, str]]:
    """All teachers, those of the student that this one started from too: a license that restricts use stays with
    whatever learned from it. So does that of another project's network."""
    every = self.train.provenance() + self.inherited
    family = FAMILIES.get(self.config.student)
    if family is not None and family.license != LICENSE:
      model = f"{self.config.student} of {family.package}"
      every.append({"model": model, "checkpoint_hash": "", "licence": family.license})
    return distinct(every)

  def load(self, state: Mapping[str, Any]) -> None:
    own = None if self.distiller.rounding is None else self.distiller.rounding.ranges
    if state.get("ranges") != own:
      raise UserError(f"{self.out}: its ranges of 8 bits are of another version of this code; start anew with --init")
    super().load(state)
    if self.config.self_taught:
      self.be_taught(Teacher.of_state(state["teacher"], self.config.tasks, self.config.untaught))
    self.order, self.epoch, self.at = state["order"], state["epoch"], state["at"]
    self.clip_losses = state["losses"].numpy()
    self.inherited = state["provenance"]
    self.trained = union(self.trained, state["trained"])
    self.history = list(state.get("history", []))[:-1]  # the last is this run's own

  def warm_start(self, state: dict[str, Any]) -> list[str]:
    """Takes an earlier student's weights where names and shapes agree, or where this one is wider: see grown(); what is
    NaN there stays as it is here. -> names of the student's that found none."""
    own = self.distiller.state_dict()
    there = {k: v for k, v in state["ema"].items() if k.startswith("student.") and k in own}
    fit = {k: x.where(~x.isnan(), own[k]) for k, v in there.items() if (x := grown(v, own[k])) is not None}
    for model in (self.distiller, self.ema):
      model.load_state_dict({**own, **fit})
    self.inherited = state["provenance"]
    self.trained = union(self.trained, state["trained"])
    self.history = history.earlier(state)
    return [k for k in own if k.startswith("student.") and k not in fit]

  # *** a step ***

  def rate(self, step: int) -> float:
    config = self.config
    return learning_rate(config.lr * config.stage(step).lr, step, config.steps, config.warmup)

  def losses(self, batch: Batch) -> dict[str, Tensor]:
    stage = self.config.stage(self.step)
    if stage is not self.stage:
      freeze(self.distiller, stage)
      self.stage = stage
    if self.as_one:
      batch = together(gathered_objects(labels_of(batch)), self.accelerator.process_index, batch)
    with norms_of_all() if self.accelerator.num_processes > 1 else nullcontext():
      parts = self.model(to_device(batch, self.accelerator.device), stage.tasks)
    if self.taught(parts) and not parts["total"].requires_grad:
      with said_once():
        raise UserError(f"--stages: at step {self.step} all that its tasks learn is frozen; freeze less")
    return parts

  def taught(self, parts: Mapping[str, Tensor]) -> bool:
    """Whether any clip has labels of this stage's tasks."""
    return len(parts) > 1

  def names(self, batch: Batch) -> list[str]:
    return batch["names"]

  def moved(self) -> None:
    self.at += self.clips_per_step()

  def report(self) -> None:
    """The loss of each process's share of the step is remembered: the same in all processes, which each choose the next
    epoch's hardest clips."""
    step = self.order[self.at - self.clips_per_step() : self.at]
    for rank, loss in enumerate(self.shares):
      self.clip_losses[step[rank :: len(self.shares)]] = loss
    super().report()

  def too_much(self) -> str:
    return f"{self.config.batch} frames at once; lower --batch-size"

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
          self.out / "samples" / f"{self.step:06d}.png",
          batch,
          {k: v for k, v in out.items() if torch.is_tensor(v)},
          self.config.tasks,
          self.config.spec,
        )
    means = {k: v / counts[k] for k, v in sums.items()}
    tasks = {
      t: sum(v for k, v in means.items() if k.split("/")[0] == t)
      for t in self.config.tasks
      if any(k.split("/")[0] == t for k in means)
    }
    return {**means, "total": sum(self.config.weights.get(t, 1.0) * v for t, v in tasks.items())}


def freeze(model: Distiller, stage: Stage) -> None:
  for name, p in model.named_parameters():
    p.requires_grad_(not any(name.removeprefix("student.").startswith(f) for f in stage.freeze))
  for name, m in model.named_modules():
    if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):  # statistics are parameters too; in 8 bits they are folded
      m.train(model.rounding is None and not any(name.removeprefix("student.").startswith(f) for f in stage.freeze))

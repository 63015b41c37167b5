"""A training loop that knows no task: steps, learning rate, averaged weights, logs, checkpoints, Ctrl-C, and what is
said where it goes wrong. README.md shows how a trainer is written on it.

Everything random is a function of the seed and the step, so that a resumed run is the unbroken one."""

import argparse
import contextlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from openpilot.tools.learn.memory import does_not_fit, keep_freed
from openpilot.tools.learn.processes import (
  anywhere,
  averaged_gradients,
  gathered,
  gathered_objects,
  interrupts,
  is_lost,
  make_accelerator,
  said_once,
  say_lost,
)
from openpilot.tools.learn.schedule import averaged, follow, learning_rate
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import atomic_path

if TYPE_CHECKING:
  from accelerate import Accelerator


class Loop:
  """One run in the folder `out`. A checkpoint is made every eval_every steps, at the end, and on Ctrl-C or SIGTERM.

  A subclass calls prepare() once and has batches() and losses(); the other methods have defaults to be overridden."""

  BEST, LAST, LOG = "best.pt", "last.pt", "log.jsonl"
  NAME = "train"  # of the progress bar, and of trackers
  LEARNED_FROM = "labels"  # what to look at where a loss is not finite
  config: Any = argparse.Namespace()  # the options, as an object; trackers are told those that are plain values

  def __init__(
    self,
    out: Path,
    steps: int,
    *,
    lr: float = 1e-3,
    warmup: int = 0,
    seed: int = 0,
    clip_norm: float = 5.0,
    log_every: int = 20,
    eval_every: int = 500,
    accelerator: "Accelerator | None" = None,
  ):
    """log_every, eval_every: steps; with log_every 0 no step is logged. accelerator: of make_accelerator(), by default
    one without mixed precision and trackers."""
    self.out, self.steps, self.seed, self.clip_norm = out, steps, seed, clip_norm
    self.lr, self.warmup, self.log_every, self.eval_every = lr, warmup, log_every, eval_every
    self.accelerator = accelerator or make_accelerator("no", (), out)
    self.step, self.saved = 0, -1  # saved: the step of LAST
    self.best = math.inf
    self.metrics: dict[str, float] = {}  # of the last evaluation
    self.values: dict[str, float] = {}  # of the last step's losses
    self.buffers: list[Tensor] = []  # of several processes: the model's buffers, as long as a step is not done
    self.shares: list[float] = []  # of the last step: the loss of each process's part of it, by rank
    self.waited, self.begun = 0.0, time.perf_counter()

  def prepare(
    self, model: nn.Module, optimizer: torch.optim.Optimizer, ema: float | None = None, whole: bool = True
  ) -> None:
    """Puts both onto the device. ema: the decay of averaged weights, which are kept beside the model's where it is
    given. whole: whether losses() calls self.model, and the loss comes of what that returns alone; else gradients of
    several processes are averaged once all are there."""
    self.decay, self.whole = ema, whole
    self.ema: Any = None if ema is None else averaged(model).to(self.accelerator.device)
    self.model = self.accelerator.prepare_model(model, evaluation_mode=not whole)
    self.optimizer = self.accelerator.prepare(optimizer)
    if not whole and self.accelerator.num_processes > 1:  # DistributedDataParallel does so, too
      for p in self.learning():
        torch.distributed.broadcast(p.data, 0)

  def learning(self) -> list[Tensor]:
    return [p for p in self.model.parameters() if p.requires_grad]

  @property
  def unwrapped(self) -> Any:
    """The model as it was given to prepare()."""
    return self.accelerator.unwrap_model(self.model)

  # *** what a trainer says ***

  def batches(self) -> Iterable[Any]:
    """What comes next, from self.step on: the rest of an epoch, or of the run. Asked again at its end."""
    raise NotImplementedError

  def losses(self, batch: Any) -> dict[str, Tensor]:
    """The parts of a batch's loss, scalars; "total" is what is learned. Under autocast."""
    raise NotImplementedError

  def rate(self, step: int) -> float:
    return learning_rate(self.lr, step, self.steps, self.warmup)

  def pieces(self, batch: Any) -> Sequence[Any]:
    """What a batch is cut into, where it takes too much memory at once. The totals of their losses are added up."""
    return [batch]

  def taught(self, parts: Mapping[str, Tensor]) -> bool:
    """Whether there was anything to learn from in a batch. A step that taught no process counts and changes nothing."""
    return True

  def names(self, batch: Any) -> list[str]:
    """Of what is in a batch, for whoever looks for the one that went wrong."""
    return []

  def evaluate(self) -> dict[str, float]:
    """Held-out metrics, by the first process alone; "total" chooses the best checkpoint."""
    return {}

  def score(self) -> float:
    """Of the last evaluation; the lowest is the best. Of equals the later one, and so the last where nothing is held
    out."""
    return self.metrics.get("total", math.inf)

  def moved(self) -> None:
    """After every step, also after one that taught nothing."""

  def too_much(self) -> str:
    """What the memory did not hold, and what to do."""
    return "a batch; lower --batch-size"

  # *** checkpoints ***

  def weights(self) -> dict[str, Any]:
    ema = {} if self.ema is None else {"ema": self.ema.state_dict()}
    return {"model": self.unwrapped.state_dict(), **ema}

  def load_weights(self, state: Mapping[str, Any]) -> None:
    self.unwrapped.load_state_dict(state["model"])
    if self.ema is not None:
      self.ema.load_state_dict(state["ema"])

  def state(self) -> dict[str, Any]:
    """What load() goes on from: tensors and plain values."""
    scaler = self.accelerator.scaler
    scaled = {} if scaler is None else {"scaler": scaler.state_dict()}
    return {**self.weights(), "optimizer": self.optimizer.state_dict(), "step": self.step, "best": self.best, **scaled}

  def best_state(self) -> dict[str, Any]:
    """What BEST holds."""
    return self.state()

  def load(self, state: Mapping[str, Any]) -> None:
    self.load_weights(state)
    self.optimizer.load_state_dict(state["optimizer"])
    if state.get("scaler") is not None and self.accelerator.scaler is not None:
      self.accelerator.scaler.load_state_dict(state["scaler"])
    self.step = self.saved = state["step"]
    self.best = state["best"]

  def save(self, name: str) -> None:
    """Whole or not at all, by the first process."""
    if self.accelerator.is_main_process:
      with atomic_path(self.out / name) as tmp:
        torch.save(self.state() if name == self.LAST else self.best_state(), tmp)
    if name == self.LAST:
      self.saved = self.step

  # *** what is said ***

  def write(self, entry: Mapping[str, Any]) -> None:
    if self.accelerator.is_main_process:
      with open(self.out / self.LOG, "a") as f:
        f.write(json.dumps(entry) + "\n")

  def clock(self) -> tuple[float, float]:
    """Seconds waited for batches, and of all, since this was asked before."""
    waited, now = self.waited, time.perf_counter()
    spent, self.waited, self.begun = now - self.begun, 0.0, now
    return waited, spent

  def report(self) -> None:
    """After each step that taught something."""
    loss = sum(self.shares) / len(self.shares)
    wait = self.waited / max(1e-9, time.perf_counter() - self.begun)
    self.bar.set_postfix_str(f"loss={loss:.3f}, wait={wait:.0%}", refresh=False)
    if self.log_every and self.step % self.log_every == 0:
      waited, spent = self.clock()
      parts = {k: v for k, v in self.values.items() if k != "total"}
      when = {"lr": self.rate(self.step), "wait": waited / max(1e-9, spent), "seconds": spent}
      self.write({"step": self.step, "loss": loss, **when, **parts})
      self.accelerator.log({"loss": loss, **parts}, step=self.step)

  def report_metrics(self) -> None:
    """After an evaluation, by the first process."""
    self.write({"step": self.step, "val": self.metrics})
    if self.metrics:
      tqdm.write(f"step {self.step}: " + ", ".join(f"{k} {v:.3f}" for k, v in self.metrics.items()))

  def not_finite(self, what: str, values: Mapping[str, float], batch: Any, totals: Sequence[float]) -> NoReturn:
    """In every process, where the loss of any is not finite. totals: of each, by rank; all finite: all are named."""
    mine = [k for k, v in values.items() if not math.isfinite(v)]
    finite = [math.isfinite(x) for x in totals]
    found = gathered_objects((self.accelerator.process_index, mine, self.names(batch)))
    found = [x for x in found if all(finite) or not finite[x[0]]]
    parts = ", ".join(sorted({k for _, ks, _ in found for k in ks}))
    names = "; ".join(dict.fromkeys(n for _, _, ns in found for n in ns))
    kept = next((self.out / k for k in (self.LAST, self.BEST) if (self.out / k).exists()), None)
    hint = "no checkpoint was written yet" if kept is None else f"the last good checkpoint is {kept}"
    where = f"{what}{f' ({parts})' if parts else ''} of step {self.step} is not finite{' on ' + names if names else ''}"
    with said_once():
      raise UserError(f"{where}; {hint}: take a lower --lr, or look at these {self.LEARNED_FROM}")

  # *** the loop ***

  def update_ema(self) -> None:
    if self.ema is not None and self.decay is not None:
      follow(self.ema, self.unwrapped, self.decay, self.step)

  def step_on(self, batch: Any) -> dict[str, float] | None:
    """One optimizer step over a batch. -> the losses' parts, of several processes their mean; None where nothing was
    taught. Raises UserError where a loss or gradient is not finite: then no weight has changed."""
    acc = self.accelerator
    if acc.num_processes > 1:
      self.buffers = [b.clone() for b in self.unwrapped.buffers()]
    torch.manual_seed(self.seed * 1_000_003 + self.step)
    for group in self.optimizer.param_groups:
      group["lr"] = self.rate(self.step)
    self.optimizer.zero_grad(set_to_none=True)
    pieces = self.pieces(batch)
    sums: dict[str, float] = {}
    shares = [0.0] * acc.num_processes
    for i, piece in enumerate(pieces):
      with contextlib.nullcontext() if i == len(pieces) - 1 else acc.no_sync(self.model):
        with acc.autocast():
          parts = self.losses(piece)
        values = dict(zip(parts, torch.stack([v.detach().float() for v in parts.values()]).tolist(), strict=True))
        totals, taught = zip(*gathered(acc, values["total"], self.taught(parts)), strict=True)
        if not any(taught):
          continue
        if not all(map(math.isfinite, totals)):
          self.not_finite("the loss", values, batch, totals)
        sums |= {k: sums.get(k, 0.0) + v for k, v in values.items()}
        shares = [a + b for a, b in zip(shares, totals, strict=True)]
        acc.backward(parts["total"])
    if not sums:
      return None
    if acc.num_processes > 1 and not self.whole:
      averaged_gradients(self.learning())
    norm = acc.clip_grad_norm_(self.model.parameters(), self.clip_norm)
    # with a scaler, of fp16, it happens: such a step is skipped
    if acc.scaler is None and norm is not None and not math.isfinite(float(norm)):
      self.not_finite("the gradient", {}, batch, shares)
    if acc.num_processes > 1:
      every = gathered_objects(sums)
      sums = {
        k: sum(s.get(k, 0.0) for s in every) / acc.num_processes for k in dict.fromkeys(k for s in every for k in s)
      }
    self.buffers = []
    self.optimizer.step()
    self.shares = shares
    return sums

  def checkpoint(self) -> None:
    """Evaluates and saves."""
    if self.accelerator.is_main_process:
      self.metrics = self.evaluate()
      self.report_metrics()
      self.accelerator.log({f"val/{k}": v for k, v in self.metrics.items()}, step=self.step)
    if self.accelerator.num_processes > 1:  # all know them: any may have to save
      self.metrics = gathered_objects(self.metrics)[0]
    if (score := self.score()) <= self.best:
      self.best = score
      self.save(self.BEST)
    self.save(self.LAST)
    self.accelerator.wait_for_everyone()

  def fit(self) -> dict[str, float]:
    """Trains to the end. -> the last evaluation. Raises UserError where a loss stops being finite or the memory is too
    small; KeyboardInterrupt after saving at a whole step."""
    if self.accelerator.device.type == "cpu":
      keep_freed()
    main = self.accelerator.is_main_process
    simple = {k: v for k, v in vars(self.config).items() if isinstance(v, (int, float, str, bool))}
    self.accelerator.init_trackers(self.NAME, config=simple)
    bar = tqdm(total=self.steps, initial=self.step, desc=self.NAME, unit="step", disable=not main)
    with interrupts() as interrupted, bar as self.bar:
      try:
        self.clock()
        while self.step < self.steps:
          batches, first = iter(self.batches()), self.step
          while self.step < self.steps and (batch := self.next_of(batches)) is not None:
            self.take(batch)
            if anywhere(self.accelerator, bool(interrupted)):  # of any process: it alone would leave the others waiting
              self.save(self.LAST)
              self.accelerator.wait_for_everyone()
              if main:
                tqdm.write(f"stopped at step {self.step}, saved; the same command with --resume goes on")
              raise KeyboardInterrupt
          if self.step == first:
            raise UserError("there is no batch to learn from")
      except RuntimeError as e:
        if is_lost(e):
          self.give_up()
        if not does_not_fit(e):
          raise
        raise UserError(f"the memory does not hold {self.too_much()}") from None
      finally:
        self.end()
    if self.saved != self.step:  # no step at all: the model that it started from, as it is; or none taught at the end
      self.metrics = self.evaluate() if main else {}
      self.save(self.LAST)
    if not (self.out / self.BEST).exists():
      self.save(self.BEST)
    return self.metrics

  def end(self) -> None:
    """Of what Accelerate keeps: trackers, and the processes' group."""
    self.accelerator.end_training()

  def give_up(self) -> NoReturn:
    """Another process of the run is gone. Whoever is left saves: a step is done by all or by none, and what all have is
    the same. Raises UserError in the first of them."""
    for b, was in zip(self.unwrapped.buffers(), self.buffers, strict=False):
      b.copy_(was)
    with atomic_path(self.out / self.LAST) as tmp:
      torch.save(self.state(), tmp)
    say_lost(
      f"{self.out / self.LAST} is saved at step {self.step}: the same command with --resume goes on, with any number "
      "of processes"
    )

  def next_of(self, batches: Iterator[Any]) -> Any:
    begun = time.perf_counter()
    batch = next(batches, None)
    self.waited += time.perf_counter() - begun
    return batch

  def take(self, batch: Any) -> None:
    values = self.step_on(batch)
    self.step += 1
    self.moved()
    self.bar.update()
    if values is None:
      return
    self.values = values
    self.update_ema()
    self.report()
    if self.step % self.eval_every == 0 or self.step == self.steps:
      self.checkpoint()

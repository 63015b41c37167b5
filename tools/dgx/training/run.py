"""A training run of openpilot's driving network: what a step learns, how it is judged, what its checkpoints hold."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from openpilot.tools.dgx.training.augment import augment
from openpilot.tools.dgx.training.config import Config, rate
from openpilot.tools.dgx.training.losses import TINY, check_weights
from openpilot.tools.dgx.training.model import hash_file, load_onnx
from openpilot.tools.dgx.training.paths import constant_curvature, path_error
from openpilot.tools.dgx.training.shards import DrivingClips, Shard, epoch_batches, make_loader
from openpilot.tools.dgx.training.student import Student
from openpilot.tools.dgx.training.teacher import DrivingTeacher
from openpilot.tools.learn.adapters.apply import apply_dora, check_rank
from openpilot.tools.learn.adapters.files import save_adapter
from openpilot.tools.learn.checkpoint import same_run, to_device
from openpilot.tools.learn.loop import Loop
from openpilot.tools.learn.processes import check_share, make_accelerator
from openpilot.tools.lib.errors import UserError

if TYPE_CHECKING:
  from accelerate import Accelerator

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


def adapter_state(
  base: Path, base_hash: str, learned: Mapping[str, Tensor], dora: dict[str, Any] | None, config: Any, **more: Any
) -> dict[str, Any]:
  """A checkpoint as export.py reads it: the learned parameters by name, and all that it takes to put them onto the base
  again. dora: the settings of apply_dora() and the layers' names; None where all parameters learn. more: epoch, step,
  val."""
  return {
    "base": str(base.resolve()),
    "base_hash": base_hash,
    "adapter": {n: p.detach().cpu().clone() for n, p in learned.items()},
    "dora": dora,
    "config": dataclasses.asdict(config),
    **more,
  }


def shares_of(amounts: Sequence[Mapping[str, Tensor]], accelerator: "Accelerator") -> list[dict[str, Tensor]]:
  """amounts: Student.amounts() of this process's pieces of a step -> of each piece its share of what all pieces of all
  processes teach, times the number of processes, since the mean of their gradients is taken."""
  every = {k: torch.stack([a[k] for a in amounts]).sum(0) for k in amounts[0]}
  if accelerator.num_processes > 1:
    every = {k: accelerator.reduce(v, "sum") for k, v in every.items()}
  return [{k: accelerator.num_processes * v / every[k].clamp(min=TINY) for k, v in a.items()} for a in amounts]


class Run(Loop):
  """One run in the folder `out`. Checkpoints are made after each epoch and on Ctrl-C."""

  NAME, BEST, LAST, LOG = "dgx", BEST, LAST, "train_log.jsonl"
  LEARNED_FROM = "segments"

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
    accelerator = make_accelerator(config.precision, trackers, out)
    self.config, self.base, self.teacher = config, base, teacher
    self.train, self.val, self.workers = train, val, workers
    self.rank, self.world = accelerator.process_index, accelerator.num_processes
    check_share(config.batch_size, self.world)
    self.steps_per_epoch = len(self.order(0))
    super().__init__(
      out,
      config.epochs * self.steps_per_epoch,
      seed=config.seed,
      clip_norm=config.clip_norm,
      log_every=0,
      eval_every=self.steps_per_epoch,
      accelerator=accelerator,
    )
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
    self.prepare(student, optimizer)
    self.epoch = self.at = 0  # at: steps of this epoch that are done
    self.sums: dict[str, float] = {}  # of this epoch's losses
    self.means: dict[str, float] = {}  # of the last one's

  @property
  def student(self) -> Student:
    return self.unwrapped

  # *** what comes next ***

  def order(self, epoch: int) -> list[list[int]]:
    return epoch_batches(len(self.train), self.config.batch_size, self.config.seed, epoch, self.rank, self.world)

  def batches(self) -> Any:
    return make_loader(
      self.train, self.order(self.epoch)[self.at :], self.workers, self.accelerator.device.type == "cuda"
    )

  def rate(self, step: int) -> float:
    return rate(self.config, step, self.steps)

  # *** checkpoints ***

  def best_state(self) -> dict[str, Any]:
    c = self.config
    dora = {"rank": c.dora_rank, "alpha": c.dora_alpha, "targets": c.targets, "dropout": c.dora_dropout}
    return adapter_state(
      self.base,
      self.base_hash,
      self.learned,
      None if c.full else {**dora, "names": self.adapted},
      c,
      epoch=self.epoch,
      step=self.step,
      val=self.metrics,
    )

  def weights(self) -> dict[str, Any]:
    return self.best_state()

  def load_weights(self, state: Mapping[str, Any]) -> None:
    with torch.no_grad():
      for n, p in self.learned.items():
        p.copy_(state["adapter"][n])

  def state(self) -> dict[str, Any]:
    return {**super().state(), "at": self.at, "sums": self.sums, "data": self.data}

  def save(self, name: str) -> None:
    super().save(name)
    if name == BEST and self.accelerator.is_main_process and not self.config.full:
      save_adapter(self.student.model, self.out / "adapter", self.base_hash)

  def load(self, state: Mapping[str, Any]) -> None:
    """Raises UserError where the checkpoint is of another run."""
    path = self.out / LAST
    if "optimizer" not in state:
      raise UserError(f"{path} is no checkpoint to go on from; leave --resume out to start")
    now = {**dataclasses.asdict(self.config), "base": self.base_hash, "data": self.data}
    same_run(path, {**state["config"], "base": state["base_hash"], "data": state["data"]}, now)
    super().load(state)
    self.epoch, self.at, self.sums, self.metrics = (state[k] for k in ("epoch", "at", "sums", "val"))

  # *** a step ***

  def prepared(self, batch: dict[str, Any], labels: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """On the device, and with the teacher's labels: these, or made now."""
    out = to_device({k: v for k, v in batch.items() if torch.is_tensor(v)}, self.accelerator.device)
    if self.teacher is not None and self.config.teacher_weight:
      out["labels"] = (
        to_device({k: v.float() for k, v in self.teacher.label(out).items()}, self.accelerator.device)
        if labels is None
        else labels
      )
    return out

  def pieces(self, batch: dict[str, Any]) -> Sequence[Any]:
    """-> (piece, its teacher's labels, shares_of() it), the latter two None where the batch is whole. What a piece
    teaches may be much or little: see Student.losses. Labels are kept for all pieces at once, where the pictures are
    not."""
    if self.config.augment:
      random, own = np.random.default_rng([self.config.seed, self.step]), slice(self.rank, None, self.world)
      batch = augment(batch, random, own, self.config.batch_size)
    most = self.config.batch_size // self.world  # clips of the smallest share: all processes have as many pieces
    parts = np.array_split(np.arange(len(batch["frames"])), min(self.config.accumulate, most))
    pieces = [{k: v[part[0] : part[-1] + 1] for k, v in batch.items()} for part in parts]
    if len(pieces) == 1 and self.world == 1:
      return [(pieces[0], None, None)]
    labels, amounts = [], []
    for piece in pieces:
      b = self.prepared(piece)
      labels.append(b.get("labels"))
      amounts.append(self.student.amounts(b))
    return list(zip(pieces, labels, shares_of(amounts, self.accelerator), strict=True))

  def losses(self, batch: Any) -> dict[str, Tensor]:
    piece, labels, shares = batch
    b = self.prepared(piece, labels)
    return self.model(b if shares is None else {**b, "shares": shares})

  def names(self, batch: dict[str, Any]) -> list[str]:
    return sorted(set(batch.get("segment", [])))

  def moved(self) -> None:
    self.at += 1

  def report(self) -> None:
    for k, v in self.values.items():
      self.sums[k] = self.sums.get(k, 0.0) + v
    self.accelerator.log(self.values, step=self.step)
    super().report()

  def too_much(self) -> str:
    c = self.config
    now = f"{c.batch_size} clips of {c.clip} steps in {c.accumulate} parts"
    return f"{now}; raise --accumulate, or lower --batch-size or --clip"

  # *** an epoch ***

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

  def checkpoint(self) -> None:
    self.means = {k: v / self.steps_per_epoch for k, v in self.sums.items()}
    self.epoch, self.at, self.sums = self.epoch + 1, 0, {}
    super().checkpoint()

  def score(self) -> float:
    return self.metrics.get("total", self.means["total"])

  def report_metrics(self) -> None:
    waited, spent = self.clock()
    done = {"epoch": self.epoch, "step": self.step, "train": self.means, "val": self.metrics}
    self.write({**done, "waited": waited, "seconds": spent})
    shown = ", ".join(f"{k} {v:.3f}" for k, v in self.metrics.items())
    best = "  <- best" if self.score() <= self.best else ""
    tqdm.write(f"epoch {self.epoch}: train {self.means['total']:.4f}{'; held out: ' + shown if shown else ''}{best}")

  def fit(self) -> dict[str, float]:
    self.model.train()
    if self.at == self.steps_per_epoch:  # as earlier versions were stopped: after an epoch's last step, not evaluated
      self.checkpoint()
    return super().fit()

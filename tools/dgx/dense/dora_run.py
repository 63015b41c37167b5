"""A run that adapts a network to dense teachers: its batches, its evaluation, and what its checkpoints hold."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from openpilot.tools.dgx.dense.dora_model import DoRADistillation, Pairs, Settings
from openpilot.tools.dgx.dense.driving_features import DrivingFeatures
from openpilot.tools.dgx.training.losses import check_weights
from openpilot.tools.dgx.training.model import hash_file, load_onnx
from openpilot.tools.dgx.training.run import adapter_state, shares_of
from openpilot.tools.dgx.training.shards import DrivingClips, epoch_batches, make_loader, read_dataset
from openpilot.tools.dgx.training.student import Student as DrivingStudent
from openpilot.tools.fair.bundle.export import load_student
from openpilot.tools.fair.distillation.batch import Batch, Batches, labels_of, load, together
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.distillation.trained import trained_on, union
from openpilot.tools.fair.students.student import Student
from openpilot.tools.learn.adapters.apply import unload
from openpilot.tools.learn.adapters.files import base_hash, save_adapter
from openpilot.tools.learn.checkpoint import same_run, to_device
from openpilot.tools.learn.loop import Loop
from openpilot.tools.learn.one_batch import norms_of_all
from openpilot.tools.learn.processes import check_share, gathered_objects, make_accelerator
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import atomic_path

BEST, RESUME = "best_model.pt", "resume.pt"
VAL_BATCHES = 8


class Run(Loop):
  """One run in the folder `out`. source: the base's ONNX file, or the fair student's run."""

  NAME, LAST = "DoRA", RESUME

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
    super().__init__(
      out,
      settings.steps,
      lr=settings.lr,
      warmup=min(200, settings.steps // 10),
      seed=settings.seed,
      log_every=1,
      eval_every=settings.eval_every,
      accelerator=make_accelerator("bf16" if torch.cuda.is_available() else "no", (), out),
    )
    self.settings, self.source, self.clips, self.val, self.labels, self.workers = (
      settings,
      source,
      train,
      val,
      labels,
      workers,
    )
    self.device = self.accelerator.device
    self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
    check_share(settings.batch_size, self.world)
    torch.manual_seed(settings.seed)
    self.is_driving = source.is_file()
    self.BEST = BEST if self.is_driving else "best.pt"
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
    model = DoRADistillation(student, None, train.tasks, settings, shape)
    make = Pairs if self.is_driving else Batches
    self.label_batches = make(train, settings.seed, False)
    self.val_batches = None if val is None else make(val, settings.seed, False)
    if shape is not None:
      sample = np.linspace(0, len(train) - 1, min(64, len(train))).astype(int)
      model.distiller.fit_features(self.label_batches[(0, [int(i)], False)] for i in sample)
    model.to(self.device)
    self.learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # the path is learned beside the model's forward()
    self.prepare(model, torch.optim.AdamW(list(self.learned.values()), lr=settings.lr, weight_decay=0.0), whole=False)
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

  # *** a step ***

  def chosen(self, step: int) -> list[int]:
    """Clips of a step, of all processes."""
    n, size = len(self.clips), self.settings.batch_size
    return [int(self.order(i // n)[i % n]) for i in range(step * size, (step + 1) * size)]

  def batches(self) -> Iterator[tuple[Batch, dict[str, Any] | None]]:
    """Labels, and of --data the driven path, from this step on: a function of the seed and the step alone, so that a
    resumed run sees what the unbroken one sees. Of several processes each takes its share."""
    steps, size, seed = range(self.step, self.steps), self.settings.batch_size, self.settings.seed
    places = list(range(size))[self.rank :: self.world]
    mine = [(s, self.chosen(s)[self.rank :: self.world], self.settings.augment, places) for s in steps]
    labels = load(self.label_batches, mine, self.workers)
    if self.path is None:
      return ((batch, None) for batch in labels)
    per = len(epoch_batches(len(self.driven), size, 0, 0))
    order = [epoch_batches(len(self.driven), size, seed, s // per, self.rank, self.world)[s % per] for s in steps]
    return zip(labels, make_loader(self.driven, order, self.workers), strict=True)

  def losses(self, batch: tuple[Batch, dict[str, Any] | None]) -> dict[str, Tensor]:
    labels, driven = batch
    if self.world > 1:
      labels = together(gathered_objects(labels_of(labels)), self.rank, labels)
    with norms_of_all() if self.world > 1 else nullcontext():
      parts = self.parts(labels)
    if driven is not None and self.path is not None:
      seen = to_device({k: v for k, v in driven.items() if torch.is_tensor(v)}, self.device)
      if self.world > 1:
        seen["shares"] = shares_of([self.path.amounts(seen)], self.accelerator)[0]
      parts["path"] = self.path(seen)["total"]
    return {**parts, "total": self.unwrapped.total(parts)}

  def parts(self, labels: Batch) -> dict[str, Tensor]:
    return self.model(to_device(labels, self.device))

  def names(self, batch: tuple[Batch, dict[str, Any] | None]) -> list[str]:
    return [*batch[0]["names"], *sorted(set((batch[1] or {}).get("segment", [])))]

  def too_much(self) -> str:
    return f"{self.settings.batch_size} clips at once; lower --batch-size"

  @torch.no_grad()
  def evaluate(self) -> dict[str, float]:
    """Mean losses on held-out labels, not augmented. {} without any."""
    if self.val is None or self.val_batches is None:
      return {}
    self.model.eval()
    size = self.settings.batch_size
    which = np.unique(np.linspace(0, len(self.val) - 1, min(VAL_BATCHES * size, len(self.val))).astype(int))
    sums = dict[str, float]()
    for a in range(0, len(which), size):
      some = [int(i) for i in which[a : a + size]]
      with self.accelerator.autocast():
        parts = self.parts(self.val_batches[(0, some, False)])
        parts["total"] = self.unwrapped.total(parts)
      for k, v in parts.items():
        sums[k] = sums.get(k, 0.0) + float(v) * len(some)
    self.model.train()
    return {k: v / len(which) for k, v in sums.items()}

  def score(self) -> float:
    return self.metrics.get("total", self.values["total"])

  def fit(self) -> dict[str, float]:
    self.model.train()
    if self.step == 0 and self.accelerator.is_main_process:
      self.write({"step": 0, "val": (first := self.evaluate())})
      tqdm.write("before: " + ", ".join(f"{k} {v:.3f}" for k, v in first.items()))
    return super().fit()

  # *** checkpoints ***

  def weights(self) -> dict[str, Any]:
    return {"learned": {n: p.detach().cpu() for n, p in self.learned.items()}}

  def load_weights(self, state: Mapping[str, Any]) -> None:
    with torch.no_grad():
      for n, p in self.learned.items():
        p.copy_(state["learned"][n])

  def state(self) -> dict[str, Any]:
    settings = dataclasses.asdict(self.settings)
    return {**super().state(), "settings": settings, "hash": self.hash, "labels": self.labels}

  def load(self, state: Mapping[str, Any]) -> None:
    """Raises UserError where it is of another run."""
    now = {**dataclasses.asdict(self.settings), "network": self.hash, "labels": self.labels}
    same_run(self.out / RESUME, {**state["settings"], "network": state["hash"], "labels": state["labels"]}, now)
    super().load(state)

  def best_state(self) -> dict[str, Any]:
    s, network = self.settings, self.unwrapped.network
    if self.student_config is None:
      learned = {n: p for n, p in network.named_parameters() if p.requires_grad}
      names = self.unwrapped.adapted
      dora = {"rank": s.dora_rank, "alpha": s.dora_alpha, "dropout": s.dora_dropout, "targets": names, "names": names}
      more = {"epoch": 0, "step": self.step, "val": self.metrics, "provenance": self.clips.provenance()}
      return adapter_state(self.source, self.hash, learned, dora, s, **more)
    plain = copy.deepcopy(network)
    unload(plain)
    weights = {f"student.{k}": v.detach().cpu() for k, v in plain.state_dict().items()}
    known = {t["model"]: t for t in [*self.student_state["provenance"], *self.clips.provenance()]}
    tasks = list(dict.fromkeys([*self.student_config.tasks, *self.clips.tasks]))
    config = {**self.student_state["config"], "tasks": tasks}
    own = {"segments": [s.name for s in self.clips.segments], "unknown": []}
    return {
      "config": config,
      "labels": self.labels,
      "step": int(config["steps"]),
      "ema": weights,
      "model": weights,
      "provenance": list(known.values()),
      "val": self.metrics,
      "trained": union(trained_on(self.student_state, self.source), own),
    }

  def save(self, name: str) -> None:
    super().save(name)
    if name != self.BEST or not self.accelerator.is_main_process:
      return
    if self.is_driving:
      save_adapter(self.unwrapped.network, self.out / "adapter", self.hash)
      return
    with atomic_path(self.out / "last.pt") as tmp:  # export looks for both
      torch.save(self.best_state(), tmp)

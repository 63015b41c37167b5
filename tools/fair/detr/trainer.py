"""Hugging Face's Trainer for detection transformers: its batches, its evaluation, and mends of what it does to such
models."""

import functools
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from openpilot.tools.fair.detr.found import metrics, numbered, rows_of, used_queries
from openpilot.tools.fair.detr.model import is_frozen
from openpilot.tools.fair.detr.samples import COUNTS, ByShape, Collate, Samples
from openpilot.tools.learn.processes import leave_interrupts_to_the_trainer
from openpilot.tools.lib.errors import UserError

BEST = "eval_map"


class Frozen(TrainerCallback):
  """Raises where something has thawed the backbone, or put it into training mode: its features would drift."""

  def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
    if not is_frozen(more["model"]):
      raise RuntimeError("the backbone is not frozen in eval mode")


class Clock(TrainerCallback):
  """Seconds of each step, without its wait for pictures; what was waited in all."""

  def __init__(self) -> None:
    self.steps: list[float] = []
    self.waited = 0.0
    self.begun = 0.0
    self.told = (0, 0.0)

  def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
    self.begun = time.perf_counter()

  def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
    self.steps.append(time.perf_counter() - self.begun)

  def wait_share(self) -> float:
    """Of the time since it was asked last, evaluations left out."""
    n, waited = self.told
    self.told = (len(self.steps), self.waited)
    waited = self.waited - waited
    return waited / max(1e-9, waited + sum(self.steps[n:]))


class Lines(TrainerCallback):
  """What Trainer logs, in short lines: with many classes its own are pages."""

  def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
    logs = logs or {}
    if not state.is_world_process_zero:
      return
    if "loss" in logs:
      said = f"loss {logs['loss']:.3f}, learning rate {logs['learning_rate']:.1e}, {logs['data_wait']:.0%} of the time"
      print(f"epoch {logs['epoch']:<6.3g} {said} waits for pictures", flush=True)
    elif "eval_map" in logs:
      said = f"AP {logs['eval_map']:.3f}, AP50 {logs['eval_map_50']:.3f}, AP75 {logs['eval_map_75']:.3f}"
      more_said = f"loss {logs['eval_loss']:.3f}, {logs['eval_queries_used']:.1%} of the queries used"
      print(f"judged       {said}; {more_said}", flush=True)


class DetrTrainer(Trainer):
  """train_dataset, eval_dataset: Samples. counts: what the augmentations did so far. found: results of the last
  evaluation, by picture. clock: of its steps."""

  train_dataset: Samples
  eval_dataset: Samples
  model: Any
  processing_class: Any

  def __init__(self, *, model: Any, head: str, **more: Any):
    # else files have the hub's names, by which Trainer loads the best weights and resumes: what is renamed is skipped
    model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    super().__init__(model=model, data_collator=Collate(more["train_dataset"].frame), **more)
    # forward() takes any keyword, from which Trainer concludes that the loss is over all accumulated batches, and would
    # not divide by their number
    self.model_accepts_loss_kwargs = False
    self.head = head
    self.counts = dict.fromkeys(COUNTS, 0)
    self.found: dict[int, list[dict[str, Any]]] = {}
    self.queries_used = 0.0
    self.truth: dict[str, Any] | None = None
    self.clock = Clock()
    self.remove_callback(PrinterCallback)
    for callback in (Frozen(), self.clock, Lines()):
      self.add_callback(callback)

  def _get_train_sampler(self, train_dataset: Any = None) -> Any:
    return ByShape(train_dataset or self.train_dataset, self.args.train_batch_size, self.args.seed)

  def _get_eval_sampler(self, eval_dataset: Any) -> Any:
    return SequentialSampler(eval_dataset)

  def get_train_dataloader(self) -> DataLoader:
    return self._quiet(super().get_train_dataloader())

  def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
    return self._quiet(super().get_eval_dataloader(eval_dataset))

  @staticmethod
  def _quiet(loader: Any) -> Any:
    for x in (loader, getattr(loader, "base_dataloader", None)):
      if x is not None and getattr(x, "worker_init_fn", 0) is None:
        x.worker_init_fn = leave_interrupts_to_the_trainer
    return loader

  def compute_loss(
    self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
  ) -> Any:
    counts = inputs.pop("counts", None)
    if counts is not None and model.training:
      for k, n in zip(COUNTS, counts.tolist(), strict=True):
        self.counts[k] += n
    return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

  def get_batch_samples(self, *args: Any, **more: Any) -> Any:
    begun = time.perf_counter()
    out = super().get_batch_samples(*args, **more)
    self.clock.waited += time.perf_counter() - begun
    return out

  def log(self, logs: dict[str, float], *args: Any, **more: Any) -> None:
    if "loss" in logs:
      logs |= {f"augment_{k}": float(self.counts[k]) for k in ("redrawn", "still", "left_out")}
      logs["data_wait"] = self.clock.wait_share()
    super().log(logs, *args, **more)

  @torch.no_grad()
  def evaluate(
    self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
  ) -> dict[str, float]:
    """COCO's numbers of the evaluation's pictures, each judged once however many processes there are. Only results are
    kept of what the network says."""
    from accelerate.utils import gather_object

    data: Samples = eval_dataset if eval_dataset is not None else self.eval_dataset
    loader, begun = self.get_eval_dataloader(data), time.perf_counter()
    model = self._wrap_model(self.model, training=False)
    model.eval()
    rows: dict[int, list[dict[str, Any]]] = {}
    losses, used = list[float](), list[float]()
    for batch in loader:
      batch.pop("counts")
      labels = batch["labels"]
      batch = self._prepare_inputs(batch)
      with self.compute_loss_context_manager(), self.accelerator.autocast():
        out = model(**batch)
      losses.append(float(out.loss))
      used.append(used_queries(out.logits.float(), self.head))
      for said, one in zip(labels, rows_of(out.logits, out.pred_boxes, labels, self.head), strict=True):
        rows[int(said["image_id"])] = one
    if self.args.world_size > 1:
      for part in gather_object([rows]):
        rows |= part
    if self.truth is None or data is not self.eval_dataset:
      self.truth = data.data.truth()
    self.found, self.queries_used = rows, sum(used) / max(1, len(used))
    numbers = metrics(self.truth, numbered(rows)) if self.is_world_process_zero() else {}
    if self.args.world_size > 1:
      numbers = next(x for x in gather_object([numbers]) if x)
    numbers |= {"loss": sum(losses) / max(1, len(losses)), "queries_used": self.queries_used}
    numbers["pictures_per_second"] = len(rows) / max(1e-9, time.perf_counter() - begun)
    said = {f"{metric_key_prefix}_{k}": v for k, v in numbers.items()}
    self.log(said)
    self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, said)
    return said

  def last_checkpoint(self) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    folder = Path(str(self.args.output_dir))
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def precision_of(asked: str | None, device: str) -> dict[str, bool]:
  """bf16 where the GPU has it, else fp16, else float32, as TrainingArguments names them. asked: 'no', 'bf16', 'fp16'.
  Raises UserError: fp16 on a CPU is float32 in silence."""
  cuda = device == "cuda"
  if asked == "fp16" and not cuda:
    raise UserError(f"--precision fp16 wants a GPU; on {device} take bf16 or no")
  best = ("bf16" if torch.cuda.is_bf16_supported() else "fp16") if cuda else "no"
  chosen = asked or best
  return {"bf16": chosen == "bf16", "fp16": chosen == "fp16"}


def arguments(
  output: Path,
  *,
  device: str,
  batch: int,
  accumulate: int,
  epochs: float,
  lr: float,
  weight_decay: float,
  warmup: float,
  clip: float,
  workers: int,
  seed: int,
  precision: str | None,
  keep: int,
  report_to: list[str],
  name: str,
  space: str | None = None,
  push: str | None = None,
) -> TrainingArguments:
  """The plan's."""
  more: dict[str, Any] = dict(precision_of(precision, device))
  more |= {"trackio_space_id": space} if space else {}
  if push:
    more |= {"push_to_hub": True, "hub_model_id": push, "hub_strategy": "checkpoint", "hub_private_repo": True}
  return TrainingArguments(
    output_dir=str(output),
    per_device_train_batch_size=batch,
    per_device_eval_batch_size=batch,
    gradient_accumulation_steps=accumulate,
    num_train_epochs=epochs,
    learning_rate=lr,
    weight_decay=weight_decay,
    warmup_steps=warmup,
    max_grad_norm=clip,
    dataloader_num_workers=workers,
    remove_unused_columns=False,
    eval_strategy="epoch",
    save_strategy="epoch",
    load_best_model_at_end=True,
    metric_for_best_model=BEST,
    greater_is_better=True,
    save_total_limit=keep,
    eval_do_concat_batches=False,
    logging_steps=10,
    logging_first_step=True,
    seed=seed,
    data_seed=seed,
    use_cpu=device == "cpu",
    report_to=report_to or "none",
    project="detr",
    run_name=name,
    ddp_find_unused_parameters=False,
    disable_tqdm=True,
    **more,
  )

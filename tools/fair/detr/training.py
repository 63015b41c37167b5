"""`images train-detr` from its options to the detector's folder."""

import gc
import os
import shutil
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from openpilot.selfdrive.modeld.fair.machine import peak_memory_mb
from openpilot.tools.fair.detr.augment import FLIPS, NONE, Changes
from openpilot.tools.fair.detr.backbone import Backbone, load_backbone
from openpilot.tools.fair.detr.cache import Features, fill
from openpilot.tools.fair.detr.data import Labeled, read_training
from openpilot.tools.fair.detr.experiment import FILE, joint, read_detr, write_detr
from openpilot.tools.fair.detr.found import numbered
from openpilot.tools.fair.detr.model import check_queries, levels_for, make_model
from openpilot.tools.fair.detr.pictures import Frame
from openpilot.tools.fair.detr.report import report
from openpilot.tools.fair.detr.samples import Samples
from openpilot.tools.fair.detr.trainer import DetrTrainer, arguments, precision_of
from openpilot.tools.fair.students.backbone import RGB_MEAN, RGB_STD
from openpilot.tools.fair.teacher import check_license
from openpilot.tools.learn.memory import does_not_fit
from openpilot.tools.learn.processes import is_first, parse_trackers, said_once
from openpilot.tools.lib.errors import UserError, printable, warn
from openpilot.tools.lib.options import save
from openpilot.tools.lib.said import public_path

PILOT = 10  # pictures of each kind
PER_STEP = "pictures_a_step"  # by which Trainer counts how many epochs are done
SMALLER = (800, 1333)  # edges, where memory is too small for the plan's


@dataclass(frozen=True)
class Fit:
  """What memory decides."""

  short: int
  long: int
  batch: int
  accumulate: int

  def less(self) -> "Fit | None":
    """Smaller pictures, then half the batch and twice the accumulation, which learns the same; None: no less."""
    if self.short > SMALLER[0] or self.long > SMALLER[1]:
      return replace(self, short=min(self.short, SMALLER[0]), long=min(self.long, SMALLER[1]))
    if self.batch > 1:
      return replace(self, batch=self.batch // 2, accumulate=self.accumulate * 2)
    return None

  def __str__(self) -> str:
    return f"edges {self.short} and {self.long}, {self.batch} pictures x {self.accumulate}"


def say(*lines: str) -> None:
  if is_first():
    print("\n".join(lines), flush=True)


def device_of(asked: str | None) -> str:
  found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
  if asked not in (None, "cpu", found):
    raise UserError(f"--device {asked}: this machine has {found}")
  return asked or found


def workers_of(args: Any) -> int:
  """No more than there are cores: others only wait."""
  return min(args.workers, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def frame_of(args: Any, fit: Fit, backbone: Backbone) -> Frame:
  values = {
    "backbone": (backbone.mean, backbone.std),
    "imagenet": (RGB_MEAN, RGB_STD),
    "none": ((0.0,) * 3, (1.0,) * 3),
  }
  return Frame(fit.short, fit.long, args.pad, backbone.multiple, *values[args.normalize])


def build(args: Any, backbone: Backbone, names: tuple[str, ...], short: int) -> Any:
  torch.manual_seed(args.seed)
  sizes = {k: getattr(args, k) for k in ("encoder_layers", "decoder_layers", "queries", "width")}
  return make_model(args.head, backbone, names, levels=levels_for(backbone, short), **sizes)


def trainer_of(
  args: Any, fit: Fit, backbone: Backbone, train: Labeled, val: Labeled, output: Path, epochs: int
) -> DetrTrainer:
  frame, model = frame_of(args, fit, backbone), build(args, backbone, train.names, fit.short)
  device = device_of(args.device)
  told = arguments(
    output,
    device=device,
    batch=fit.batch,
    accumulate=fit.accumulate,
    epochs=epochs,
    lr=args.lr,
    weight_decay=args.weight_decay,
    warmup=args.warmup,
    clip=args.clip,
    workers=workers_of(args),
    seed=args.seed,
    precision=args.precision,
    keep=args.keep,
    report_to=list(parse_trackers(args.trackers)),
    name=args.output.resolve().name,
    space=args.space,
    push=args.push,
  )
  changes = NONE if not args.augment else FLIPS if args.cache_features else Changes()
  learned, judged = Samples(train, frame, changes, args.seed), Samples(val, frame)
  made = DetrTrainer(
    model=model,
    head=args.head,
    args=told,
    train_dataset=learned,
    eval_dataset=judged,
    processing_class=frame.processor(args.head),
  )
  if args.cache_features:
    cache(args, made, backbone, output)
  return made


def cache(args: Any, made: DetrTrainer, backbone: Backbone, output: Path) -> None:
  """The backbone's features of all pictures, computed by the first process alone, in place of the pictures."""
  begun, device = time.perf_counter(), made.args.device
  for name, samples in (("train", made.train_dataset), ("val", made.eval_dataset)):
    store = Features(args.output / "features" / output.name / name, args.cache_precision, samples.changes.flip > 0)
    with made.args.main_process_first():
      fill(store, samples.data, samples.frame, made.model.to(device), backbone.weights, args.batch_size, device)
    samples.store = store
  say(f"features     of all pictures in {time.perf_counter() - begun:.0f} s; of augmentation only flips are left")


def fitted(fit: Fit, attempt: Any) -> tuple[Any, Fit]:
  """attempt(fit), and where memory does not hold it, with less, which is said. Raises UserError where there is none."""
  while True:
    failed = ""
    try:
      return attempt(fit), fit
    except Exception as e:
      if not does_not_fit(e):
        raise
      failed = printable(e, 80)  # its traceback holds the tensors that do not fit
    gc.collect()
    if torch.cuda.is_available():
      torch.cuda.empty_cache()
    less = fit.less()
    if less is None or torch.distributed.is_initialized():
      raise UserError(
        f"memory does not hold {fit} ({failed}); take a smaller --short and --long, or a smaller backbone"
      )
    warn(f"out of memory with {fit}; it begins again with {less}")
    fit = less


def memory_gib() -> float:
  if torch.cuda.is_available():
    return torch.cuda.max_memory_allocated() / 2**30
  return peak_memory_mb() * 1e6 / 2**30


def loader_rate(samples: Samples, workers: int) -> float:
  """Pictures a second that are read, varied and resized, by all workers."""
  seconds = []
  for i in range(min(PILOT, len(samples))):
    begun = time.perf_counter()
    samples[i]
    seconds.append(time.perf_counter() - begun)
  return max(1, workers) / statistics.median(seconds)


def pilot(args: Any, fit: Fit, backbone: Backbone, train: Labeled, val: Labeled) -> tuple[dict[str, Any], Fit]:
  """A few pictures for an epoch: what all will take."""
  few, judged = train.some(range(min(PILOT, len(train)))), val.some(range(min(PILOT, len(val))))

  def attempt(fit: Fit) -> DetrTrainer:
    made = trainer_of(args, fit, backbone, few, judged, args.output / "pilot", 1)
    made.train()
    return made

  made, fit = fitted(fit, attempt)
  last = [x for x in made.state.log_history if "eval_pictures_per_second" in x][-1]
  processes, workers = max(1, made.args.world_size), workers_of(args)
  pictures = min(len(few), fit.batch * fit.accumulate * processes)
  learned = pictures / statistics.median(made.clock.steps)
  read = loader_rate(made.train_dataset, workers) * processes
  rate = min(learned, read) if workers else 1 / (1 / learned + 1 / read)
  judged_rate = last["eval_pictures_per_second"]
  hours = args.epochs * (len(train) / rate + len(val) / judged_rate) / 3600
  said = {
    "train_pictures_per_second": round(learned, 3),
    "read_pictures_per_second": round(read, 3),
    "eval_pictures_per_second": round(judged_rate, 3),
    "memory_gib": round(memory_gib(), 2),
    "queries_used": round(last["eval_queries_used"], 4),
    "redrawn": made.counts["redrawn"],
    "hours_for_all": round(hours, 2),
  }
  say(
    f"pilot        {learned:,.2f} pictures a second learned, {judged_rate:,.2f} judged, {said['memory_gib']:g} GiB",
    f"             {read:,.2f} a second are read by {workers} workers"
    + ("" if read > learned or not workers else ": the step waits for them; more --workers, or --cache-features"),
    f"             {said['queries_used']:.1%} of {args.queries} queries say something of at least 0.3",
    f"             all {len(train)} pictures for {args.epochs} epochs: about {hours:.2f} hours",
  )
  return said, fit


def key_of(args: Any, backbone: Backbone, names: tuple[str, ...]) -> dict[str, Any]:
  """What must be the same for a training to go on."""
  sizes = {
    k: getattr(args, k)
    for k in ("head", "queries", "encoder_layers", "decoder_layers", "width", "level", "short", "long")
  }
  step = args.batch_size * args.accumulate * int(os.environ.get("WORLD_SIZE", "1"))
  return {"classes": list(names), "backbone_weights": backbone.weights, **sizes, PER_STEP: step}


def check_same(output: Path, key: dict[str, Any]) -> dict[str, Any]:
  """detr.json of a training that goes on. Raises UserError."""
  before = read_detr(output)
  for k, now in key.items():
    if (was := before["run"].get(k)) != now and (k != PER_STEP or was is not None):  # earlier trainings do not say it
      said = f"{printable(was, 120)} then, {printable(now, 120)} now"
      said += "; they are --batch-size x --accumulate x processes" if k == PER_STEP else ""
      raise UserError(f"--resume: {output / FILE} is of another training: {k.replace('_', ' ')} {said}")
  return before


def begin(args: Any) -> tuple[Labeled, Labeled, Backbone, dict[str, Any]]:
  """Reads and checks everything, writes detr.json. -> pictures, pictures to judge by, backbone, detr.json."""
  precision_of(args.precision, device_of(args.device))
  parse_trackers(args.trackers)
  backbone = load_backbone(args.backbone, args.backbone_weights, args.level, args.download, args.license)
  check_license(backbone.name, backbone.license, args.accept_license)
  train, val = read_training(args.data, args.val, args.images, args.val_images, args.seed)
  key = key_of(args, backbone, train.names)
  license = joint(backbone.license, train.licenses)
  before = check_same(args.output, key) if args.resume else {}
  data = {"name": public_path(args.data), "pictures": len(train), "boxes": len(train.boxes), "licenses": train.licenses}
  said = {
    "classes": list(train.names),
    "license": license,
    "backbone": {"name": backbone.name, "license": backbone.license, "weights": backbone.weights},
    "data": data,
    "val": {"name": public_path(val.path), "pictures": len(val), "boxes": len(val.boxes)},
    "run": key,
    "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    **({"pilot": before["pilot"]} if "pilot" in before else {}),
  }
  if is_first():
    args.output.mkdir(parents=True, exist_ok=True)
    save(args, args.output)
    write_detr(args.output, said)
  counts = train.counts
  say(
    f"pictures     {len(train)} to learn from, {len(val)} to judge by; {len(train.boxes)} and {len(val.boxes)} boxes",
    f"classes      {printable(', '.join(train.names), 200)}",
    f"license      {license}",
  )
  if (n := workers_of(args)) < args.workers:
    say(f"workers      {n}, as many as there are cores, not {args.workers}")
  if text := check_queries(args.queries, int(counts.max()), float(sorted(counts)[len(counts) // 2])):
    warn(text)
  return train, val, backbone, said


def run(args: Any) -> dict[str, Any]:
  """-> detr.json."""
  transformers.utils.logging.set_verbosity_error()
  with said_once():
    train, val, backbone, said = begin(args)
  fit = Fit(args.short, args.long, args.batch_size, args.accumulate)
  if args.pilot and "pilot" not in said:
    said["pilot"], fit = pilot(args, fit, backbone, train, val)
    if is_first():
      write_detr(args.output, said)
  folder = args.output / "runs"

  def attempt(fit: Fit) -> DetrTrainer:
    made = trainer_of(args, fit, backbone, train, val, folder, args.epochs)
    learn = sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in made.model.parameters())
    say(f"{args.head:<12} on {backbone.name}: {learn:,} of {total:,} parameters learn; {fit}")
    last = made.last_checkpoint()
    if args.push and is_first():  # pushed with what lies here, for another machine to go on
      folder.mkdir(exist_ok=True)
      shutil.copy(args.output / FILE, folder)
    if last is not None:
      say(f"             goes on from {Path(last).name}")
    made.train(resume_from_checkpoint=last)
    return made

  made, fit = fitted(fit, attempt)
  return finish(args, made, fit, said)


def finish(args: Any, made: DetrTrainer, fit: Fit, said: dict[str, Any]) -> dict[str, Any]:
  """Judges the best weights, and writes the detector's folder."""
  begun = time.perf_counter()
  numbers = made.evaluate()
  seconds = time.perf_counter() - begun
  if not is_first():
    return said
  model = made.accelerator.unwrap_model(made.model)
  type(model).save_pretrained(model, args.output)  # by the hub's names
  made.processing_class.save_pretrained(args.output)
  val, waited = made.eval_dataset.data, made.clock.waited
  report(
    args.output.resolve().name,
    val,
    said["val"]["name"],
    numbered(made.found),
    seconds,
    args.score,
    args.worst,
    args.output,
  )
  said |= {
    "metrics": {k.removeprefix("eval_"): v for k, v in numbers.items()},
    "best": Path(made.state.best_model_checkpoint or "").name,
    "epochs": made.state.epoch,
    "steps": made.state.global_step,
    "data_wait": round(waited / max(1e-9, waited + sum(made.clock.steps)), 4),
    "edges": [fit.short, fit.long],
    "augmented": made.counts,
  }
  write_detr(args.output, said)
  say(f"wrote        {args.output}: model.safetensors, {FILE}, evaluation.html, evaluation.json")
  return said

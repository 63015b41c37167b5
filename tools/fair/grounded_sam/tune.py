"""Tuning a teacher: Grounding DINO on boxes, SAM on masks, on the loop of tools/learn. Only adapters learn, or with
`full` all weights."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpilot.tools.fair.evaluation.detections import Detections, make_objects
from openpilot.tools.fair.grounded_sam.data import Example, LabeledPictures, flipped, jittered, steps_of
from openpilot.tools.fair.grounded_sam.detector import Detector, own_boxes
from openpilot.tools.fair.grounded_sam.lora import trainable
from openpilot.tools.fair.grounded_sam.prompts import Prompt
from openpilot.tools.fair.grounded_sam.segmenter import Segmenter
from openpilot.tools.learn.checkpoint import load_checkpoint
from openpilot.tools.learn.loop import Loop
from openpilot.tools.learn.memory import does_not_fit
from openpilot.tools.learn.processes import gathered, gathered_objects
from openpilot.tools.lib.errors import UserError, warn

LOWEST = 0.05  # score of boxes that AP is counted over


@dataclass(frozen=True)
class Tuning:
  """How a teacher is tuned; of train_teacher's options."""

  epochs: int = 20
  batch_size: int = 4  # pictures at once
  accumulate: int = 1  # such batches a step
  lr: float = 1e-4
  warmup: int = 50
  flip: bool = True
  jitter: float = 0.1  # of SAM's boxes
  max_objects: int = 16  # of a picture that SAM is asked for in a step
  cache: float = 4.0  # GiB of what SAM's frozen image encoder says, kept from epoch to epoch
  seed: int = 0
  full: bool = False


def mask_loss(logits: Tensor, iou: Tensor, target: Tensor) -> dict[str, Tensor]:
  """(N, s, s) logits, (N,) expected IoU, (N, s, s) 0 or 1 -> SAM's loss (Kirillov et al. 2023): 20 focal + dice + the
  squared error of the expected IoU."""
  p, flat = logits.sigmoid(), (1, 2)
  ce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
  right = p * target + (1 - p) * (1 - target)
  focal = ((0.25 * target + 0.75 * (1 - target)) * (1 - right) ** 2 * ce).mean(flat)
  dice = 1 - (2 * (p * target).sum(flat) + 1) / (p.sum(flat) + target.sum(flat) + 1)
  with torch.no_grad():
    on = logits > 0
    both, either = (on & (target > 0)).sum(flat), (on | (target > 0)).sum(flat)
    true = both / either.clamp(min=1)
  error = (iou - true) ** 2
  return {"focal": focal.mean(), "dice": dice.mean(), "iou": error.mean(), "total": (20 * focal + dice + error).mean()}


class TeacherLoop(Loop):
  """One teacher's run. Where memory is too small for a batch, it is halved and accumulation doubled: the pictures of a
  step stay the same. Several processes share each batch, and learn what one would."""

  LEARNED_FROM = "pictures"
  NAME = "teacher"
  BETTER = ""  # of the metrics, 0 to 1

  def __init__(
    self, out: Path, model: nn.Module, data: LabeledPictures, val: LabeledPictures | None, t: Tuning, **more: Any
  ):
    self.data, self.val, self.t, self.config = data, val, t, t
    self.per_step = t.batch_size * t.accumulate
    per_epoch = -(-len(data) // self.per_step)
    super().__init__(
      out, t.epochs * per_epoch, lr=t.lr, warmup=t.warmup, seed=t.seed, clip_norm=0.1, eval_every=per_epoch, **more
    )
    self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
    self.at_once = t.batch_size
    self.before: dict[str, float] = {}
    learn = list(trainable(model).values())
    self.prepare(model, torch.optim.AdamW(learn, lr=t.lr, weight_decay=1e-4), whole=False)

  def batches(self) -> Iterable[list[int]]:
    for rows in steps_of(len(self.data), self.per_step, self.step, self.steps, self.seed):
      yield rows.tolist()

  def pieces(self, batch: Sequence[int]) -> list[Any]:
    return [(batch[i : i + self.at_once], len(batch)) for i in range(0, len(batch), self.at_once)]

  def share(self) -> int:
    """Pictures of a batch that a process has at most."""
    return -(-self.at_once // self.world)

  def mine(self, rows: Sequence[int]) -> Sequence[int]:
    """Of a piece's pictures those of this process."""
    return rows[self.rank :: self.world]

  def names(self, batch: Sequence[int]) -> list[str]:
    return [self.data.pictures[i].name for rows, _ in self.pieces(batch) for i in self.mine(rows)]

  def random(self, picture: int) -> np.random.Generator:
    return np.random.default_rng([self.seed, self.step, picture])

  def step_on(self, batch: Any) -> dict[str, float] | None:
    while True:
      try:
        return super().step_on(batch)
      except (RuntimeError, MemoryError) as e:
        if not does_not_fit(e) or self.at_once == 1 or self.world > 1:  # the others know nothing of it
          raise
        self.halve(str(e))

  def halve(self, why: str) -> None:
    if torch.cuda.is_available():
      torch.cuda.empty_cache()
    before, self.at_once = self.at_once, (self.at_once + 1) // 2
    n = -(-self.per_step // self.at_once)
    print(
      f"warning: {before} pictures at once do not fit into memory; going on with {self.at_once}, {n} times a step",
      file=sys.stderr,
    )

  def too_much(self) -> str:
    if self.world > 1:
      return f"{self.share()} pictures of each process; take a smaller --batch-size"
    return "a single picture; take a smaller --size, fewer --max-objects, or a smaller model"

  def score(self) -> float:
    return 1 - self.metrics[self.BETTER] if self.metrics else self.best

  # *** checkpoints: of what learns alone ***

  def weights(self) -> dict[str, Any]:
    return {"learned": {n: p.detach().clone() for n, p in trainable(self.unwrapped).items()}}

  def load_weights(self, state: Mapping[str, Any]) -> None:
    own = trainable(self.unwrapped)
    if own.keys() != state["learned"].keys():
      raise UserError(f"{self.out / self.LAST} is of other adapters; choose another --output")
    with torch.no_grad():
      for n, p in own.items():
        p.copy_(state["learned"][n])

  def state(self) -> dict[str, Any]:
    return {
      **super().state(),
      "at_once": self.at_once,
      "before": self.before,
      "run": self.run_key,
      "metrics": self.metrics,
    }

  def best_state(self) -> dict[str, Any]:
    return {**self.weights(), "step": self.step, "metrics": self.metrics, "run": self.run_key}

  run_key: Mapping[str, Any] = {}  # what makes this run this one: set by who starts it

  def load(self, state: Mapping[str, Any]) -> None:
    super().load(state)
    self.at_once, self.before, self.metrics = state["at_once"], state["before"], state["metrics"]

  def end(self) -> None:
    """The processes' group stays: another teacher may follow."""
    for tracker in self.accelerator.trackers:
      tracker.finish()

  def start(self) -> None:
    """Judges the teacher as it is."""
    if not self.before and self.val is not None:
      if self.accelerator.is_main_process:
        self.before = self.evaluate()
        self.write({"step": 0, "val": self.before})
      if self.world > 1:
        self.before = gathered_objects(self.before)[0]


class DetectorLoop(TeacherLoop):
  NAME = "grounding_dino"
  BETTER = "ap"

  def __init__(self, out: Path, detector: Detector, *rest: Any, **more: Any):
    self.detector = detector
    assert detector.prompts is not None
    self.asked = detector.prompts
    detector.model.config.auxiliary_loss = True  # each layer of the decoder is taught
    super().__init__(out, detector.model, *rest, **more)

  def prompt_for(self, e: Example, random: np.random.Generator) -> Prompt:
    """Of several prompts mostly one that names something in the picture, now and then another: what is not there is
    learned, too."""
    there = [p for p in self.asked.all if set(p.classes) & set(e.classes.tolist())]
    chosen = there if there and random.random() < 0.75 else list(self.asked.all)
    return chosen[int(random.integers(len(chosen)))]

  def inputs(self, rows: Sequence[int]) -> dict[str, Any]:
    examples, prompts, labels = [], [], []
    for i in rows:
      random = self.random(i)
      e = self.data.example(i)
      if self.t.flip and random.random() < 0.5:
        e = flipped(e)
      prompt = self.prompt_for(e, random)
      own = {c: k for k, c in enumerate(prompt.classes)}
      mine = np.array([k for k, c in enumerate(e.classes.tolist()) if c in own], np.int64)
      examples.append(e)
      prompts.append(prompt)
      labels.append(target_of(e, mine, own, self.accelerator.device))
    return {**self.detector.batch([e.rgb for e in examples], prompts, self.largest), "labels": labels}

  def largest(self, size: list[int]) -> list[int]:
    """Of all processes."""
    return [int(max(n)) for n in zip(*gathered(self.accelerator, *size), strict=True)]

  def losses(self, piece: tuple[Sequence[int], int]) -> dict[str, Tensor]:
    """Of a piece, whose loss is over its boxes, this process's part, times the number of processes, since the mean is
    taken. One that has none of its pictures looks at one all the same, since the others wait, and learns nothing."""
    rows, count = piece
    mine = self.mine(rows)
    inputs = self.inputs(mine or rows[:1])
    boxes = sum(len(x["boxes"]) for x in inputs["labels"])
    every = sum(n for (n,) in gathered(self.accelerator, boxes if mine else 0))
    with own_boxes():
      out = self.detector.model(**inputs)
    share = len(rows) / count * (max(1, boxes) / max(1, every)) * self.world if mine else 0.0
    last = {k: v * share for k, v in out.loss_dict.items() if k in ("loss_ce", "loss_bbox", "loss_giou")}
    return {**last, "total": out.loss * share}

  @torch.no_grad()
  def evaluate(self) -> dict[str, float]:
    """COCO's AP, AP50 and AR of the boxes."""
    data = self.val
    if data is None:
      return {}
    judge = Detections(self.asked.names)
    for i in range(len(data)):
      e = data.example(i)
      with self.accelerator.autocast():
        (found,) = self.detector.detect([e.rgb], score=LOWEST)
      judge.images.append((make_objects(found.boxes, found.classes, found.scores), make_objects(e.boxes, e.classes)))
    return judge.coco()


def target_of(e: Example, mine: np.ndarray, own: Mapping[int, int], device: torch.device) -> dict[str, Tensor]:
  """-> class_labels, numbers of the prompt's phrases, and boxes, center and size relative to the picture."""
  h, w = e.rgb.shape[1:]
  b = e.boxes[mine] / [w, h, w, h]
  centers = np.concatenate([(b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]], 1)
  classes = torch.tensor([own[int(c)] for c in e.classes[mine]], dtype=torch.long, device=device)
  return {"class_labels": classes, "boxes": torch.tensor(centers, dtype=torch.float32, device=device).reshape(-1, 4)}


class SegmenterLoop(TeacherLoop):
  NAME = "sam"
  BETTER = "mask_iou"

  def __init__(self, out: Path, segmenter: Segmenter, *rest: Any, **more: Any):
    self.segmenter = segmenter
    super().__init__(out, segmenter.model, *rest, **more)
    self.encoder_learns = any(n.startswith("vision_encoder") or "no_memory" in n for n in trainable(segmenter.model))
    self.kept: dict[tuple[int, bool], Any] = {}  # (picture, mirrored) -> its embeddings, on the CPU
    self.kept_bytes, self.full = 0, False

  def losses(self, piece: tuple[Sequence[int], int]) -> dict[str, Tensor]:
    """Each picture weighs the same, and in it each object. Without masks a picture teaches nothing. Of several
    processes, of whose losses the mean is taken, this one's part."""
    rows, count = piece
    sums: dict[str, Tensor] = {}
    for i in self.mine(rows):
      random = self.random(i)
      e = self.data.example(i, masks=True, most=self.t.max_objects, pick=random)
      mirrored = self.t.flip and random.random() < 0.5
      if mirrored:
        e = flipped(e)
      if not len(e.boxes):
        continue
      boxes = jittered(e.boxes, self.t.jitter, e.rgb.shape[1:], random)
      for k, v in self.one(e, boxes, (i, mirrored)).items():
        sums[k] = sums.get(k, torch.zeros((), device=v.device)) + v / count * self.world
    return sums or {"total": 0.0 * torch.stack([p.sum() for p in trainable(self.segmenter.model).values()]).sum()}

  def one(self, e: Example, boxes: np.ndarray, which: tuple[int, bool]) -> dict[str, Tensor]:
    """which: the picture's number, and whether it is mirrored."""
    assert e.masks is not None
    s = self.segmenter
    s.model.mask_decoder.training = True  # else SAM 2 gives another of its masks where the one for a box is not stable
    asked = s.boxes(boxes, *e.rgb.shape[1:])
    if self.encoder_learns:
      logits, iou = s.forward(asked, pixels=s.pixels(e.rgb))
    else:
      logits, iou = s.forward(asked, embeddings=self.embeddings(e, which))
    return mask_loss(logits, iou, s.from_picture(e.masks, logits.shape[-1]))

  def embeddings(self, e: Example, which: tuple[int, bool]) -> Any:
    """Of a frozen encoder: the same in every epoch. Kept as long as there is room."""
    if (found := self.kept.get(which)) is None:
      found = self.segmenter.embed(self.segmenter.pixels(e.rgb))
      size = sum(x.numel() * x.element_size() for x in maps_of(found))
      if self.kept_bytes + size <= self.t.cache * 2**30:
        self.kept[which] = moved(found, torch.device("cpu"))
        self.kept_bytes += size
      elif self.t.cache and not self.full:
        self.full = True
        warn(
          f"what SAM's image encoder says of {len(self.kept)} pictures, mirrored ones counted, fills --cache "
          f"{self.t.cache:g}; the others are computed in every epoch"
        )
    return moved(found, self.accelerator.device)

  def taught(self, parts: Mapping[str, Tensor]) -> bool:
    return "dice" in parts

  @torch.no_grad()
  def evaluate(self) -> dict[str, float]:
    """The mean IoU of masks, each asked for by its true box, over all objects; and over classes."""
    data = self.val
    if data is None:
      return {}
    self.segmenter.model.mask_decoder.training = False
    ious: list[float] = []
    classes: list[int] = []
    for i in range(len(data)):
      e = data.example(i, masks=True)
      assert e.masks is not None
      with self.accelerator.autocast():
        found = self.segmenter.segment(e.rgb, e.boxes.astype(np.float32))
      both, either = (found & e.masks).sum((1, 2)), (found | e.masks).sum((1, 2))
      ious += (both / np.maximum(either, 1)).tolist()
      classes += e.classes.tolist()
    if not ious:
      return {}
    by_class = [np.mean([v for v, c in zip(ious, classes, strict=True) if c == k]) for k in sorted(set(classes))]
    return {"mask_iou": float(np.mean(ious)), "mask_iou_classes": float(np.mean(by_class))}


def maps_of(embeddings: Any) -> list[Tensor]:
  """SAM's is one map, SAM 2's a list of them."""
  return [embeddings] if torch.is_tensor(embeddings) else list(embeddings)


def moved(embeddings: Any, device: torch.device) -> Any:
  out = [x.detach().to(device) for x in maps_of(embeddings)]
  return out[0] if torch.is_tensor(embeddings) else out


def saved_bytes(loop: TeacherLoop, piece: Any) -> int:
  """Of what one piece's forward keeps for its gradients, beside the weights: measured by running it once."""
  held: dict[int, int] = {}
  weights = {p.untyped_storage().data_ptr() for p in loop.unwrapped.parameters()}

  def pack(x: Tensor) -> Tensor:
    storage = x.untyped_storage()
    if storage.data_ptr() not in weights:
      held[storage.data_ptr()] = storage.nbytes()
    return x

  with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), loop.accelerator.autocast():
    parts = loop.losses(piece)
  total = sum(held.values())  # while `parts` still holds them
  del parts
  return total


def free_bytes(device: torch.device) -> int | None:
  """Of the device's memory; None where it is not known."""
  if device.type == "cuda":
    return torch.cuda.mem_get_info(device)[0]
  try:
    lines = dict(x.split(":", 1) for x in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
  except (OSError, KeyError, ValueError):
    return None


def estimate(loop: TeacherLoop) -> dict[str, float]:
  """Memory in GiB that a step takes, of several processes each one: weights, gradients and moments, what its share of a
  batch keeps; and what is free. Where that is less, batches are halved before the first one."""
  ready(loop)
  rows = list(range(min(2, len(loop.data))))
  own = max(saved_bytes(loop, ([i] * loop.world, 1)) for i in rows)
  weights = sum(p.numel() * p.element_size() for p in loop.unwrapped.parameters())
  learn = sum(p.numel() * p.element_size() for p in trainable(loop.unwrapped).values())
  room = free_bytes(loop.accelerator.device)
  every = gathered(loop.accelerator, own, math.inf if room is None else room)  # all halve alike
  one, least = max(n for n, _ in every), min(n for _, n in every)
  free = None if math.isinf(least) else least
  while 3 * learn + one * loop.share() * 1.3 > least and loop.at_once > 1:  # 1.3: passing things
    loop.halve("")
  gib = {"weights": weights, "gradients_and_moments": 3 * learn, "a_picture": one, "a_batch": one * loop.share()}
  return {k: v / 2**30 for k, v in {**gib, **({} if free is None else {"free": free})}.items()}


def ready(loop: TeacherLoop) -> None:
  """What is frozen drops nothing out; adapters do, where they have a dropout. A layer computes its activations again
  only where it believes that it learns."""
  model = loop.unwrapped
  model.train(loop.t.full)
  for n, m in model.named_modules():
    if "lora_dropout" in n or getattr(m, "gradient_checkpointing", False):
      m.training = True


def learn(loop: TeacherLoop) -> dict[str, float]:
  """Runs it, and leaves the best weights in the model. -> their metrics."""
  ready(loop)
  loop.start()
  ready(loop)
  loop.fit()
  loop.accelerator.wait_for_everyone()  # the first writes it
  best = load_checkpoint(loop.out / loop.BEST, keys=("learned", "metrics"), of="a teacher")
  loop.load_weights(best)
  loop.unwrapped.eval()
  return dict(best["metrics"])

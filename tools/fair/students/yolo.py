"""A student of ultralytics' YOLOv8 classes, which learns by their own loss. That package is under AGPL-3.0, and so is
what is made of it: it is imported here alone, where the user has installed it and asked for such a student by name."""

import contextlib
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openpilot.tools.fair.spec import StudentSpec
from openpilot.tools.fair.students.families import Width
from openpilot.tools.fair.students.family import FamilyStudent
from openpilot.tools.lib.errors import UserError, printable

QUERIES = 100  # places that come out, of all the best ones
OVERLAP = 0.7  # IoU beyond which the worse of two of one class is no object of its own; ultralytics' default
ROUNDS = 8  # of suppression; as many as boxes of one chain are suppressed as one after the other would be
NOT_THERE = -12.0  # the logit of what is suppressed
MOMENTUM = 0.1  # torch's own; ultralytics' .03 is for runs of many thousand steps
OLDEST = (8, 4)  # of the package: since then its heads give raw outputs by name
CLASSES = "cv3"  # in the names of its layers that have a channel for each class


def import_ultralytics() -> Any:
  """ultralytics.nn.tasks. It is kept from installing packages, from its hub and from words that are not asked for.
  Raises UserError."""
  for key, value in {"YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true", "YOLO_VERBOSE": "false"}.items():
    os.environ.setdefault(key, value)
  try:
    package = importlib.import_module("ultralytics")
    tasks = importlib.import_module("ultralytics.nn.tasks")
  except ImportError as e:
    raise UserError(
      f"this student is ultralytics', and that package does not import here: {printable(e, 160)}; `pip install "
      "ultralytics`, under AGPL-3.0"
    ) from None
  version = tuple(int(x) for x in package.__version__.split(".")[:2])
  if version < OLDEST:
    raise UserError(f"ultralytics {package.__version__} is too old: take {'.'.join(map(str, OLDEST))} or newer")
  return tasks


def read_weights(path: Path) -> dict[str, Tensor]:
  """A state dict. Raises UserError; no code in a file is run."""
  from safetensors import SafetensorError
  from safetensors.torch import load_file

  if path.suffix != ".safetensors":
    raise UserError(
      f"--pretrained {path}: ultralytics' own files hold code; write the weights alone, where you trust the file: "
      f"python -c \"from ultralytics import YOLO; from safetensors.torch import save_file; "
      f"save_file(YOLO('{path.name}').model.state_dict(), '{path.stem}.safetensors')\""
    )
  try:
    return load_file(path)
  except (SafetensorError, OSError) as e:
    raise UserError(f"--pretrained {path} does not load: {printable(e, 160)}") from None


class YoloStudent(FamilyStudent):
  """As FamilyStudent, of the QUERIES best places of all cells. Of those that overlap by more than OVERLAP the worse one
  is suppressed when it is used (Cluster-NMS, Zheng et al. 2020: the answer of one after the other, in parallel)."""

  def __init__(self, spec: StudentSpec, pretrained: bool | str = False):
    nn.Module.__init__(self)
    self.describe(spec)
    tasks = import_ultralytics()
    make, classes = getattr(tasks, self.family.kind), len(spec.classes.boxes)
    with contextlib.redirect_stdout(None):
      self.net = make(self.family.config["yaml"], ch=3, nc=classes, verbose=False)
    self.net.args = importlib.import_module("ultralytics.cfg").get_cfg(overrides={"overlap_mask": False})
    for m in self.net.modules():
      if isinstance(m, nn.BatchNorm2d):
        m.momentum = MOMENTUM
    self.head = self.net.model[-1]
    self.size = Width(int(self.head.cv2[0][0].conv.in_channels))
    self.criteria: dict[torch.device, Any] = {}
    if isinstance(pretrained, str):
      self.start_from(Path(pretrained))

  def start_from(self, path: Path) -> None:
    own, there = self.net.state_dict(), read_weights(path)
    anew = [k for k, v in own.items() if k not in there or there[k].shape != v.shape]
    wrong = [k for k in anew if f".{CLASSES}." not in k]
    if wrong:
      raise UserError(
        f"--pretrained {path} lacks {len(wrong)} of the weights of {self.name}, or has them of another shape "
        f"({wrong[0]}); it must be of {self.family.config['yaml']}"
      )
    self.net.load_state_dict({**own, **{k: v for k, v in there.items() if k in own and k not in anew}})
    print(f"{self.name}: starts from {path}; {len(anew)} of its tensors are of other classes, and start anew")

  def maps(self, x: Tensor) -> list[Tensor]:
    """What its head reads, finest first."""
    kept: list[Tensor | None] = []
    for layer in self.net.model[:-1]:
      if layer.f != -1:
        x = kept[layer.f] if isinstance(layer.f, int) else [x if j == -1 else kept[j] for j in layer.f]  # type: ignore
      x = layer(x)
      kept.append(x if layer.i in self.net.save else None)
    return [x if j == -1 else kept[j] for j in self.head.f]

  def forward(self, frame: Tensor, labels: Sequence[Mapping[str, Tensor]] | None = None) -> dict[str, Any]:
    maps = self.maps(self.pixels(frame))
    raw = self.head.forward_head(maps, **self.head.one2many)
    if self.family.masks:
      raw["proto"] = self.head.proto(maps[0])
    found = self.places(raw)
    if self.hint:
      found["features"] = maps[0]
    if labels is not None:
      found["own_loss"] = self.loss_of(raw, labels)
    return found

  def learn(self, batch: Mapping[str, Any]) -> dict[str, Any]:
    """As a family's where it learns. Held-out pictures are judged by the loss of the set of what it finds, as our own
    detector's: its own is in units of how good its places are, and least where it finds nothing yet."""
    return super().learn(batch) if self.training else self(batch["frame"])

  def places(self, raw: Mapping[str, Any]) -> dict[str, Any]:
    scores = raw["scores"].float().transpose(1, 2)  # (B, A, K)
    boxes = self.decode(raw["boxes"].float(), raw["feats"])
    best = scores.amax(2).topk(min(QUERIES, scores.shape[1]), 1).indices[..., None]
    scores, boxes = (x.gather(1, best.expand(-1, -1, x.shape[2])) for x in (scores, boxes))
    if not self.training:
      scores = torch.where(kept(scores, boxes)[..., None], scores, NOT_THERE)
    found: dict[str, Any] = {"detector_logits": scores, "detector_boxes": boxes}
    if self.family.masks:
      told = raw["mask_coefficient"].float().transpose(1, 2)
      told = told.gather(1, best.expand(-1, -1, told.shape[2]))
      proto = raw["proto"].float()
      found["detector_masks"] = (told @ proto.flatten(2)).reshape(*told.shape[:2], *proto.shape[2:])
    return found

  def decode(self, sides: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """(B, 4 R, A) scores of R distances to the left, top, right and bottom, in cells -> (B, A, 4) cx cy w h in 0..1:
    the mean distance (Generalized Focal Loss, Li et al. 2020)."""
    n, count = len(sides), self.head.reg_max
    like: dict[str, Any] = {"device": sides.device, "dtype": sides.dtype}
    far = torch.arange(count, **like)
    reach = (sides.view(n, 4, count, -1).softmax(2) * far.view(1, 1, -1, 1)).sum(2)
    centers, strides = [], []
    for m, stride in zip(maps, self.head.stride.tolist(), strict=True):
      y, x = torch.meshgrid(*(torch.arange(k, **like) + 0.5 for k in m.shape[2:]), indexing="ij")
      centers.append(torch.stack([x.flatten(), y.flatten()]) * stride)
      strides.append(torch.full((m.shape[2] * m.shape[3],), stride, **like))
    center, scale = torch.cat(centers, 1), torch.cat(strides)
    first, last = center - reach[:, :2] * scale, center + reach[:, 2:] * scale
    size = sides.new_tensor([self.spec.input.width, self.spec.input.height]).view(1, 2, 1)
    return torch.cat([(first + last) / 2 / size, (last - first) / size], 1).transpose(1, 2)

  def loss_of(self, raw: Mapping[str, Any], labels: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    device = raw["scores"].device
    if device not in self.criteria:
      self.criteria[device] = self.net.init_criterion()
    counts = [len(x["class_labels"]) for x in labels]
    batch = {
      "batch_idx": torch.repeat_interleave(torch.arange(len(labels)), torch.tensor(counts)).to(device),
      "cls": torch.cat([x["class_labels"] for x in labels]).float(),
      "bboxes": torch.cat([x["boxes"] for x in labels]).float(),
    }
    if self.family.masks:
      batch["masks"] = torch.cat([x["masks"] for x in labels]).float()
    exact = {k: [x.float() for x in v] if k == "feats" else v.float() for k, v in raw.items()}
    with torch.autocast(device.type, enabled=False):
      parts, _ = self.criteria[device](exact, batch)
    parts = parts / len(labels)  # there it is a batch's sum
    if not self.family.masks:
      return {"own": parts.sum()}
    return {"own": parts[0] + parts[2:].sum(), "masks": parts[1]}


def kept(scores: Tensor, boxes: Tensor) -> Tensor:
  """(B, Q, K) logits, best first, (B, Q, 4) cx cy w h -> (B, Q) bool: those that no better one of their class, which
  itself is kept, overlaps by more than OVERLAP."""
  first, last = boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2
  shared = (torch.minimum(last[:, :, None], last[:, None]) - torch.maximum(first[:, :, None], first[:, None])).clamp(0)
  area = (last - first).clamp(0).prod(2)
  common = shared.prod(3)
  iou = common / (area[:, :, None] + area[:, None] - common + 1e-9)
  kind = scores.argmax(2)
  q = torch.arange(scores.shape[1], device=scores.device)
  over = (iou > OVERLAP) & (kind[:, :, None] == kind[:, None]) & (q[:, None] < q[None])
  stay = torch.ones_like(kind, dtype=torch.float32)
  for _ in range(ROUNDS):
    stay = ((stay[:, :, None] * over.float()).sum(1) < 0.5).float()
  return stay > 0.5

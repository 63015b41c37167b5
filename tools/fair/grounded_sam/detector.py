"""Grounding DINO, and MM Grounding DINO: boxes of what phrases name, with a score for every class."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openpilot.tools.fair.detr.teacher import Pictures, read_folder
from openpilot.tools.fair.grounded_sam.originals import DINO_PICTURES, load_original
from openpilot.tools.fair.grounded_sam.prompts import (
  Prompt,
  Prompts,
  class_scores,
  load_tokenizer,
  make_prompts,
  token_batch,
)
from openpilot.tools.fair.hf import load_model, read_values
from openpilot.tools.fair.onnx.teacher import nms
from openpilot.tools.learn.device import Device
from openpilot.tools.lib.errors import UserError

# transformers' model_type -> its class; MM: openmmlab's
MODEL_TYPES = {
  "grounding-dino": "GroundingDinoForObjectDetection",
  "mm-grounding-dino": "MMGroundingDinoForObjectDetection",
}
STRIDE = 16  # of the feature map
SAME_OBJECT = 0.7  # IoU of boxes from different prompts that are one object


@dataclass
class Answer:
  """Of one picture. boxes: (N, 4) float32 x0 y0 x1 y1 in pixels from the picture's corner; scores (N,) float32; classes
  (N,) int64; class_scores (N, C) float32, probabilities of all classes, 0 of those that the box's prompt did not name;
  masks: (N, H, W) bool, None without a segmenter."""

  boxes: np.ndarray
  scores: np.ndarray
  classes: np.ndarray
  class_scores: np.ndarray
  masks: np.ndarray | None = None

  def take(self, keep: np.ndarray) -> "Answer":
    masks = None if self.masks is None else self.masks[keep]
    return Answer(self.boxes[keep], self.scores[keep], self.classes[keep], self.class_scores[keep], masks)


def mend_loss() -> None:
  """transformers' loss of Grounding DINO takes the tokens of another picture's classes where prompts differ within a
  batch: each picture's classes are looked up in its own prompt. Where they are the same, nothing changes."""
  from transformers.loss import loss_grounding_dino

  def one_hot(self: Any, outputs: Any, targets: Any, indices: Any) -> Tensor:
    out = torch.zeros_like(outputs["logits"], dtype=torch.long)
    for i, (t, (source, target)) in enumerate(zip(targets, indices, strict=True)):
      out[i, source] = outputs["label_maps"][i][t["class_labels"][target]].to(out)
    return out

  loss_grounding_dino.GroundingDinoImageLoss._get_target_classes_one_hot = one_hot  # type: ignore[method-assign]


@contextlib.contextmanager
def own_boxes() -> Iterator[None]:
  """Within it transformers' loss is over the number of this process's boxes. By itself it asks the other processes, who
  may judge meanwhile, and divides by their number twice."""
  from transformers.loss import loss_for_object_detection as module

  asks = module.is_accelerate_available
  module.is_accelerate_available = lambda: False
  try:
    yield
  finally:
    module.is_accelerate_available = asks


class Detector:
  """A Grounding DINO and what it is asked for. model: transformers' class, which adapters may have changed in place."""

  def __init__(self, model: Any, tokenizer: Any, pictures: dict[str, Any], device: Device):
    self.model, self.tokenizer, self.device = model, tokenizer, device
    self.family = "mm_grounding_dino" if type(model).__name__.startswith("MM") else "grounding_dino"
    self.pictures = Pictures(pictures)
    self.prompts: Prompts | None = None
    # PEFT asks for it, and the class does not say it
    model.model.get_input_embeddings = lambda: model.model.text_backbone.get_input_embeddings()
    mend_loss()

  @property
  def most_tokens(self) -> int:
    return int(self.model.config.max_text_len)

  def resize(self, edge: int) -> None:
    """Pictures are shown with this shorter side, the longer at most as much larger as by its own preprocessor."""
    size = self.pictures.config.get("size")
    own = size if isinstance(size, dict) else {}
    most = own.get("longest_edge", 1333) / own.get("shortest_edge", 800)
    self.pictures = Pictures(
      {**self.pictures.config, "size": {"shortest_edge": edge, "longest_edge": int(edge * most)}}
    )

  def batch(
    self, rgbs: Sequence[np.ndarray], prompts: Sequence[Prompt], largest: Callable[[list[int]], list[int]] = list
  ) -> dict[str, Tensor]:
    """Pictures (3, H, W) uint8 RGB of any sizes, each with its prompt -> the network's inputs, padded to the largest,
    and pixel_mask, 1 where a picture is. largest: [height, width] of these -> of a batch that they are a share of."""
    found = [self.pictures(x[None], self.device)[0] for x in rgbs]
    h, w = largest([max(x.shape[i] for x in found) for i in (1, 2)])
    pixels = found[0].new_zeros(len(found), 3, h, w)
    mask = torch.zeros(len(found), h, w, dtype=torch.long, device=pixels.device)
    for i, x in enumerate(found):
      pixels[i, :, : x.shape[1], : x.shape[2]] = x
      mask[i, : x.shape[1], : x.shape[2]] = 1
    return {"pixel_values": pixels, "pixel_mask": mask, **token_batch(prompts, pixels.device)}

  def raw(self, rgbs: Sequence[np.ndarray], prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Pictures of one size -> (B, Q, phrases) probabilities and (B, Q, 4) boxes, center and size relative to the
    picture, float32: the official forward's."""
    out = self.model(**self.batch(rgbs, [prompt] * len(rgbs)))
    return class_scores(out.logits, prompt.ids), out.pred_boxes.float()

  @torch.inference_mode()
  def detect(self, rgbs: Sequence[np.ndarray], prompts: Prompts | None = None, score: float = 0.3) -> list[Answer]:
    """Pictures (3, H, W) uint8 RGB -> boxes whose best class reaches `score` and every negative phrase. Pictures of one
    size go through together: one that is padded would be seen otherwise."""
    asked = prompts or self.prompts
    assert asked is not None
    found: list[Answer | None] = [None] * len(rgbs)
    sizes: dict[tuple[int, ...], list[int]] = {}
    for i, x in enumerate(rgbs):
      sizes.setdefault(x.shape, []).append(i)
    for shape, rows in sizes.items():
      parts = [self._one(asked, p, [rgbs[i] for i in rows], score) for p in asked.all]
      for k, i in enumerate(rows):
        found[i] = join([p[k] for p in parts], shape[-2:])
    return [x for x in found if x is not None]

  def _one(self, asked: Prompts, prompt: Prompt, rgbs: Sequence[np.ndarray], score: float) -> list[Answer]:
    scores, boxes = self.raw(rgbs, prompt)
    out = []
    for s, b, x in zip(scores.cpu().numpy(), boxes.cpu().numpy(), rgbs, strict=True):
      mine = s[:, : len(prompt.classes)]
      best = mine.max(-1)
      keep = (best > score) & (best >= s.max(-1))
      all_classes = np.zeros((int(keep.sum()), len(asked.names)), np.float32)
      all_classes[:, list(prompt.classes)] = mine[keep]
      center, size = b[keep, :2], b[keep, 2:]
      corners = np.concatenate([center - size / 2, center + size / 2], -1) * np.array([x.shape[2], x.shape[1]] * 2)
      classes = np.array(prompt.classes, np.int64)[mine[keep].argmax(-1)]
      out.append(Answer(corners.astype(np.float32), best[keep].astype(np.float32), classes, all_classes))
    return out

  @torch.inference_mode()
  def features(self, rgbs: Sequence[np.ndarray], prompts: Prompts | None = None) -> list[np.ndarray]:
    """The map of stride 16 behind its encoder, for the first prompt: (D, h, w) float32 of each picture."""
    asked = prompts or self.prompts
    assert asked is not None
    out = []
    for x in rgbs:
      batch = self.batch([x], [asked.all[0]])
      flat = self.model(**batch).encoder_last_hidden_state_vision[0].float()
      h, w = batch["pixel_values"].shape[-2:]
      begin = 0
      for stride in (STRIDE // 2, STRIDE):
        rows, columns = levels(h, stride), levels(w, stride)
        if stride == STRIDE:
          out.append(flat[begin : begin + rows * columns].T.reshape(-1, rows, columns).cpu().numpy())
        begin += rows * columns
    return out

  def __call__(self, image: np.ndarray, text_prompt: str, score: float = 0.3) -> np.ndarray:
    """(3, H, W) uint8 RGB, phrases separated by dots -> (N, 4) boxes."""
    names = [t.strip() for t in text_prompt.split(".") if t.strip()]
    return self.detect([image], make_prompts(self.tokenizer, names, most=self.most_tokens), score)[0].boxes


def levels(side: int, stride: int) -> int:
  """Of a side of the input, in Swin's map of that stride: patches of 4, then halved."""
  n, s = -(-side // 4), 4
  while s < stride:
    n, s = -(-n // 2), s * 2
  return n


def join(parts: Sequence[Answer], size: tuple[int, ...]) -> Answer:
  """Of several prompts: of boxes of different prompts that are one object the best stays. Boxes are cut at the
  picture's edge."""
  boxes = np.concatenate([p.boxes for p in parts])
  boxes = np.clip(boxes, 0, np.array([size[1], size[0]] * 2, np.float32))
  out = Answer(
    boxes,
    np.concatenate([p.scores for p in parts]),
    np.concatenate([p.classes for p in parts]),
    np.concatenate([p.class_scores for p in parts]),
  )
  whole = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
  out = out.take(np.flatnonzero(whole))
  if len(parts) > 1:
    out = out.take(nms(out.boxes, out.scores, np.zeros(len(out.boxes), np.int64), SAME_OBJECT))
  else:
    out = out.take(np.argsort(-out.scores, kind="stable"))
  return out


def load_detector(path: Path, device: Device, tokenizer: Path | None = None) -> Detector:
  """A Hugging Face folder, or a .pth of GroundingDINO, whose tokenizer is elsewhere: `tokenizer`, a folder. Raises
  UserError."""
  if path.is_file():
    if tokenizer is None:
      raise UserError(f"{path} has no tokenizer in it; name the folder of bert-base-uncased's with --tokenizer")
    model = load_original(path, ("grounding_dino",))[1].to(device.device, device.dtype)
    return Detector(model, load_tokenizer(tokenizer), DINO_PICTURES, device)
  config, pictures = read_folder(path, tuple(MODEL_TYPES), "Grounding DINO")
  if pictures.get("do_normalize", True):
    read_values(pictures, path / "preprocessor_config.json")
  words = load_tokenizer(tokenizer or path)
  return Detector(load_model(path, device, MODEL_TYPES[config["model_type"]]), words, pictures, device)

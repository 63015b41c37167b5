"""Detection transformers as teachers: DETR (on ResNet or DINOv3), Deformable DETR, RT-DETR v1 and v2, D-FINE, DEIMv2
(on DINOv3), from a local folder in transformers' format. One that `images train-detr` made keeps its own classes.

Pictures are resized and rounded as the official processors do it, so that what was published as accuracy holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from openpilot.tools.fair.detr.experiment import hash_of, is_detr
from openpilot.tools.learn.device import Device, choose_device
from openpilot.tools.fair.hf import MODES, check_size, load_model, read_config, read_json, read_values
from openpilot.tools.learn.memory import halve_on_oom
from openpilot.tools.fair.teacher import Clip, Entry, Label, Labels, State, check_least, hash_weights
from openpilot.tools.lib.errors import UserError, printable

# transformers' model_type -> how its logits become scores: 'softmax' (the last class is "nothing"), 'sigmoid' (as many
# of all queries and classes as there are queries, the best) or 'many' (the best MOST of them)
SCORES = {
  "detr": "softmax",
  "deformable_detr": "many",
  "rt_detr": "sigmoid",
  "rt_detr_v2": "sigmoid",
  "d_fine": "sigmoid",
  "deimv2": "sigmoid",
}
MOST = 300
PREPROCESSORS = (
  "preprocessor_config.json",
  "video_preprocessor_config.json",
  "processor_config.json",
)  # any of them describes the same pictures


def read_folder(path: Path, known: tuple[str, ...], what: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """-> config.json, and the description of its pictures. Raises UserError where a file is missing or the architecture
  is none of `known` model_types."""
  config = read_config(path, known, what)
  pictures = read_json(
    next((path / name for name in PREPROCESSORS if (path / name).exists()), path / PREPROCESSORS[0]), what
  )
  return config, pictures.get("image_processor", pictures.get("video_processor", pictures))


@dataclass
class Pictures:
  """Resizing and normalizing as preprocessor_config.json says. `fit`: (height, width) of the frames -> of the network's
  input."""

  config: dict[str, Any]

  def fit(self, height: int, width: int) -> tuple[int, int]:
    size = self.config.get("size")
    if not self.config.get("do_resize", True) or size is None:
      return height, width
    if isinstance(size, int):  # DETR's first files
      size = {"shortest_edge": size, "longest_edge": self.config.get("max_size", 1333)}
    if "height" in size:
      return int(size["height"]), int(size["width"])
    if "max_height" in size:
      ratio = min(size["max_height"] / height, size["max_width"] / width)
      return max(1, int(height * ratio)), max(1, int(width * ratio))
    if "shortest_edge" not in size:
      raise UserError(
        f"preprocessor_config.json: size {printable(size, 80)} is not known; height and width, or shortest_edge and "
        "longest_edge"
      )
    # the official rule, with its roundings
    short, long = min(height, width), max(height, width)
    edge, raw = int(size["shortest_edge"]), None
    if size.get("longest_edge") and long / short * edge > size["longest_edge"]:
      raw = size["longest_edge"] * short / long
      edge = round(raw)
    other = int((edge if raw is None else raw) * long / short) if short != edge else long
    edge = max(1, edge)  # of a thin picture; officially an error
    return (edge, other) if height <= width else (other, edge)

  def __call__(self, rgb: np.ndarray | torch.Tensor, device: Device) -> torch.Tensor:
    """(T, 3, H, W) uint8 RGB -> (T, 3, h, w) of the device's dtype. Resized with antialiasing and rounded to whole gray
    levels, as officially."""
    c = self.config
    x = torch.as_tensor(np.ascontiguousarray(rgb) if isinstance(rgb, np.ndarray) else rgb).to(
      device.device, torch.float32
    )
    size = self.fit(*x.shape[-2:])
    check_size(*size, "preprocessor_config.json")
    if size != tuple(x.shape[-2:]):
      x = (
        F.interpolate(x, size, mode=MODES.get(c.get("resample", 2), "bilinear"), antialias=True, align_corners=False)
        .round()
        .clamp(0, 255)
      )
    if c.get("do_rescale", True):
      x = x * c.get("rescale_factor", 1 / 255)
    if c.get("do_normalize", True):
      mean, std = (torch.tensor(c[k], device=x.device).view(3, 1, 1) for k in ("image_mean", "image_std"))
      x = (x - mean) / std
    x = x.to(device.dtype)
    return x.contiguous(memory_format=torch.channels_last) if device.device.type == "cuda" else x


def road_classes(names: dict[int, str], table: str | Path | None = None) -> tuple[tuple[str, ...], np.ndarray]:
  """names: the network's class index -> its name. -> road classes, and (C,) int16 of the network's class -> road class
  or -1.
  table: another road_classes.json."""
  path = Path(table) if table else Path(__file__).with_name("road_classes.json")
  read = read_json(path, "a table of road classes")
  index = {alias.lower(): i for i, c in enumerate(read["classes"]) for alias in read["names"].get(c, [c])}
  lut = np.full(max(names, default=0) + 1, -1, np.int16)
  for k, name in names.items():
    lut[k] = index.get(str(name).strip().lower(), -1)
  return tuple(read["classes"]), lut


def to_table(found: list[tuple[np.ndarray, np.ndarray, np.ndarray]], height: int, width: int) -> dict[str, np.ndarray]:
  """A frame each: boxes (N, 4) counted from the picture's corner, scores, classes -> the table of a 'boxes' label,
  clipped to the picture, integers at pixel centers."""
  frame = np.repeat(np.arange(len(found), dtype=np.int32), [len(b) for b, _, _ in found])
  boxes = np.concatenate([b for b, _, _ in found] or [np.zeros((0, 4), np.float32)]).astype(np.float32)
  boxes = np.clip(boxes, 0, np.array([width, height] * 2, np.float32)) - np.float32(0.5)
  good = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
  columns = {"frame": frame, **{k: boxes[:, i] for i, k in enumerate(("x0", "y0", "x1", "y1"))}}
  columns["score"] = np.concatenate([s for _, s, _ in found] or [np.zeros(0)]).astype(np.float32)
  columns["cls"] = np.concatenate([c for _, _, c in found] or [np.zeros(0)]).astype(np.int16)
  return {k: v[good] for k, v in columns.items()}


class DetrTeacher:
  """score: boxes below are dropped. batch: frames at once. table: another road_classes.json.

  float32 also on a GPU (with TF32): bf16's 8 bits would move a box's edge by up to 2 pixels in 512."""

  stateful = False
  sees = "picture"
  whole = False

  def __init__(
    self,
    name: str,
    entry: Entry,
    path: Path | None,
    device: str | None = None,
    precision: str | None = None,
    score: float = 0.3,
    batch: int = 8,
    table: str | Path | None = None,
  ):
    assert path is not None
    check_least(name, 1, batch=batch)
    check_least(name, 0, score=score)
    config, pictures = read_folder(path, tuple(SCORES), "a detection transformer")
    if pictures.get("pad_size"):
      raise UserError(
        f"{path}: its pictures are padded to {pictures['pad_size']}, which is not supported; remove pad_size from "
        "preprocessor_config.json"
      )
    self.name, self.license, self.model_id = name, entry.license, entry.weights or path.name
    self.checkpoint_hash = hash_weights(path)
    if is_detr(path):  # checkpoints of its training are beside it
      self.model_id, self.checkpoint_hash = path.name, hash_of(path)
    self.device = choose_device(device, precision or "float32")
    if pictures.get("do_normalize", True):
      read_values(pictures, path / PREPROCESSORS[0])  # raises on what is none
    self.pictures, self.scoring, self.threshold, self.batch = (
      Pictures(pictures),
      SCORES[config["model_type"]],
      score,
      batch,
    )
    self.model: Any = load_model(path, self.device, "AutoModelForObjectDetection")
    self.names: dict[int, str] = dict(self.model.config.id2label)
    if is_detr(path) and table is None:
      self.classes, self.lut = tuple(self.names.values()), np.arange(len(self.names), dtype=np.int16)
    else:
      self.classes, self.lut = road_classes(self.names, table)
    if (self.lut < 0).all():
      some = ", ".join(list(self.names.values())[:4])
      raise UserError(
        f"{path}: none of its classes ({some}...) is a road class; name them in config.json's id2label, or give "
        "another table"
      )
    self.labels = [Label("boxes", "boxes", unit="px", classes=self.classes)]
    self.size = [0, 0]

  def prepare(self, height: int, width: int) -> None:
    self.size = [height, width]
    self.pictures.fit(height, width)

  def settings(self) -> dict[str, Any]:
    roads = {name: self.classes[self.lut[k]] for k, name in self.names.items() if self.lut[k] >= 0}
    return {
      "pictures": self.pictures.config,
      "score": self.threshold,
      "precision": self.device.precision,
      "classes": roads,
      "size": self.size,
    }

  @torch.inference_mode()
  def forward(self, rgb: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, 3, H, W) uint8 RGB -> logits (T, Q, C) and boxes (T, Q, 4), center and size relative to the picture, float32:
    the official forward's."""
    out = self.model(pixel_values=self.pictures(rgb, self.device))
    return out.logits.float(), out.pred_boxes.float()

  @torch.inference_mode()
  def detect(self, rgb: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(T, 3, H, W) uint8 RGB -> of each frame boxes (N, 4) x0 y0 x1 y1 in pixels from the picture's corner, scores
    (N,), the network's classes (N,): what the official post_process_object_detection gives."""
    logits, relative = self.forward(rgb)
    center, size = relative[..., :2], relative[..., 2:]
    boxes = torch.cat([center - size / 2, center + size / 2], -1) * torch.tensor(
      [rgb.shape[-1], rgb.shape[-2]] * 2, device=logits.device
    )
    if self.scoring == "softmax":
      scores, classes = logits.softmax(-1)[..., :-1].max(-1)
    else:
      count = logits.shape[-1]
      most = logits.shape[1]
      if self.scoring == "many":  # a query may be of several classes: the official 100 are too few for a crowd
        most = min(MOST, most * count)
      scores, flat = logits.sigmoid().flatten(1).topk(most, dim=-1)
      classes, query = flat % count, flat // count
      boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
    good = scores > self.threshold
    return [
      (b[g].cpu().numpy(), s[g].cpu().numpy(), c[g].cpu().numpy())
      for b, s, c, g in zip(boxes, scores, classes, good, strict=True)
    ]

  def label(self, clip: Clip, state: State | None = None) -> tuple[Labels, State | None]:
    found = []
    for start in range(0, len(clip.rgb), self.batch):
      for boxes, scores, classes in halve_on_oom(self.detect, clip.rgb[start : start + self.batch]):
        roads = self.lut[classes]
        found.append((boxes[roads >= 0], scores[roads >= 0], roads[roads >= 0]))
    return {"boxes": to_table(found, *clip.rgb.shape[-2:])}, None

"""What the Trainer is fed with: pictures or their stored features, boxes relative to the picture, batches of one
shape."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from openpilot.tools.fair.detr.augment import NONE, Changes, change
from openpilot.tools.fair.detr.data import Labeled
from openpilot.tools.fair.detr.pictures import Frame, padded, to_relative, valid
from openpilot.tools.lib.pictures import read_rgb

COUNTS = ("redrawn", "still", "left_out", "boxes")  # of a batch's augmentation


class Samples(Dataset):
  """Item i: 'pixels' (3, h, w) float32, resized and not padded; 'size' (h, w); 'labels': transformers', whose image_id
  is the picture's place; 'counts': as COUNTS. changes: None at evaluation. store: in place of pixels 'features' (C, H,
  W) of the padded picture. Every epoch draws anew, by seed, epoch and place alone."""

  def __init__(self, data: Labeled, frame: Frame, changes: Changes | None = None, seed: int = 0, store: Any = None):
    self.data, self.frame, self.seed, self.store = data, frame, seed, store
    self.changes = NONE if changes is None else changes
    self.epoch = 0

  def __len__(self) -> int:
    return len(self.data)

  def set_epoch(self, epoch: int) -> None:
    self.epoch = epoch

  def fit(self, i: int) -> tuple[int, int]:
    w, h = self.data.sizes[i].tolist()
    return self.frame.fit(h, w)

  def labels(self, i: int, boxes: np.ndarray, classes: np.ndarray) -> dict[str, Tensor]:
    """boxes: (K, 4) x, y, width, height in the picture's own pixels."""
    w, h = self.data.sizes[i].tolist()
    high, wide = self.fit(i)
    relative = torch.from_numpy(to_relative(boxes, w, h))
    return {
      "boxes": relative,
      "class_labels": torch.from_numpy(np.asarray(classes, np.int64)),
      "area": relative[:, 2] * relative[:, 3] * (high * wide),
      "iscrowd": torch.zeros(len(relative), dtype=torch.int64),
      "image_id": torch.tensor([i]),
      "orig_size": torch.tensor([h, w]),
      "size": torch.tensor([high, wide]),
    }

  def __getitem__(self, i: int) -> dict[str, Any]:
    at, random = self.data.of(i), np.random.default_rng([self.seed, self.epoch, i])
    crowd = self.data.crowd[at]
    boxes, classes = self.data.boxes[at][~crowd], self.data.classes[at][~crowd]
    size = self.fit(i)
    if self.store is not None:
      flip = random.random() < self.changes.flip
      if flip:
        boxes = np.concatenate([self.data.sizes[i, 0] - boxes[:, :1] - boxes[:, 2:3], boxes[:, 1:]], 1)
      item = {"features": self.store.read(i, flip)}
      counts = (0, 0, 0, len(boxes))
    else:
      rgb = read_rgb(self.data.paths[i])
      made = change(rgb, boxes, self.changes, random, size[0] / rgb.shape[0])
      counts = (made.redrawn, int(made.still), len(boxes) - len(made.kept), len(boxes))
      boxes, classes = made.boxes, classes[made.kept]
      item = {"pixels": self.frame.resize(made.rgb)}
    return {**item, "size": size, "labels": self.labels(i, boxes, classes), "counts": torch.tensor(counts)}


class Collate:
  """-> pixel_values (B, 3, H, W), or features (B, C, h, w) in their place; pixel_mask (B, H, W) bool; labels;
  counts."""

  def __init__(self, frame: Frame):
    self.frame = frame

  def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sizes = [x["size"] for x in items]
    each = [self.frame.canvas(*s) for s in sizes]
    canvas = (max(h for h, _ in each), max(w for _, w in each))
    if "features" in items[0]:
      maps = [x["features"] for x in items]
      pixels = padded(maps, (max(m.shape[1] for m in maps), max(m.shape[2] for m in maps)))
    else:
      pixels = padded([x["pixels"] for x in items], canvas)
    return {
      "pixel_values": pixels,
      "pixel_mask": valid(sizes, canvas),
      "labels": [x["labels"] for x in items],
      "counts": torch.stack([x["counts"] for x in items]).sum(0),
    }


class ByShape(Sampler[int]):
  """All pictures once an epoch, those of one orientation beside each other in runs of `batch`, in an order of its own
  each epoch: what is left over of both makes the last ones."""

  def __init__(self, samples: Samples, batch: int, seed: int):
    self.samples, self.batch, self.seed, self.epoch = samples, batch, seed, 0
    sizes = samples.data.sizes
    self.wide = sizes[:, 1] <= sizes[:, 0]

  def __len__(self) -> int:
    return len(self.samples)

  def set_epoch(self, epoch: int) -> None:
    self.epoch = epoch
    self.samples.set_epoch(epoch)

  def __iter__(self) -> Iterator[int]:
    random = np.random.default_rng([self.seed, self.epoch])
    runs: list[list[int]] = []
    rest: list[int] = []
    for group in (np.flatnonzero(self.wide), np.flatnonzero(~self.wide)):
      order = random.permutation(group).tolist()
      whole = len(order) - len(order) % self.batch
      runs += [order[k : k + self.batch] for k in range(0, whole, self.batch)]
      rest += order[whole:]
    for k in random.permutation(len(runs)).tolist():
      yield from runs[k]
    yield from rest

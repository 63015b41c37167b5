"""Clips to batches: labels as they are stored become what losses are given, after one augmentation of each clip.

A batch, with T consecutive frames of each clip, B = clips x T, clip-major; maps have a quarter of the picture's height
and width, their pixel i centered on the picture's 4i + 1.5:
  frame          (B, *picture.shape) uint8
  clip           (B,) int64            which of the batch's clips a frame is of
  valid          (B, H / 4, W / 4) bool     inside the camera's image and the augmented picture
and what each task makes of its labels: see tools/fair/tasks.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch

from openpilot.tools.fair.distillation.augment import Augmentation, draw, none, turned, warp_frame, warp_grid
from openpilot.tools.fair.distillation.data import Clips, RawClip
from openpilot.tools.fair.distillation.night import by_night
from openpilot.tools.fair.tasks import TASKS
from openpilot.tools.learn.handover import Collate, begin, handed_over
from openpilot.tools.lib.errors import UserError

Batch = dict[str, Any]


def tensors(x: Any) -> Any:
  """NumPy's arrays in dicts and lists as torch's."""
  if isinstance(x, dict):
    return {k: tensors(v) for k, v in x.items()}
  if isinstance(x, list):
    return [tensors(v) for v in x]
  return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def convert(clip: RawClip, a: Augmentation, r: np.random.Generator) -> Batch:
  """One clip's part of a batch."""
  steps = len(clip.frames)
  valid = np.broadcast_to(clip.valid, (steps, *clip.valid.shape[-2:]))[:, 1::4, 1::4].astype(np.uint8)
  if a.is_geometric:
    whole = warp_grid(a, valid[0], False)
    valid = np.stack([whole if (v == valid[0]).all() else warp_grid(a, v, False) for v in valid])
  out: Batch = {
    "frame": torch.from_numpy(
      clip.frames if a.is_none else np.stack([warp_frame(a, f, t) for t, f in enumerate(clip.frames)])
    ),
    "valid": torch.from_numpy(valid.astype(bool)),
  }
  for task, said in clip.said.items():
    out.update(tensors(TASKS[task].targets(said, a, r)))
  return out


def empty(key: str, like: Any, steps: int, clips: int = 1) -> Any:
  """What stands for a label that clips of `steps` frames in all do not have. like: the same key of another clip."""
  task = next(t for t in TASKS.values() if key in t.fills)
  fill = task.fills[key]
  if fill is None:
    return [None] * steps
  return torch.full((clips if task.per_clip else steps, *like.shape[1:]), fill, dtype=like.dtype)


def collate(parts: list[Batch]) -> Batch:
  """Clips to a batch; what some of them lack is filled as unknown."""
  out: Batch = {}
  for key in dict.fromkeys(k for p in parts for k in p):
    like = next(p[key] for p in parts if key in p)
    got = [p[key] if key in p else empty(key, like, len(p["frame"])) for p in parts]
    out[key] = [x for g in got for x in g] if isinstance(like, list) else torch.cat(got)
  out["clip"] = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(p["frame"]) for p in parts]))
  return out


ABOUT = ("frame", "clip", "step", "clips", "names")  # keys that are no labels


def labels_of(batch: Batch) -> Batch:
  """For together(): what a process's share has but its frames."""
  return {**{k: v for k, v in batch.items() if k not in ABOUT}, "count": len(batch["clips"])}


def together(parts: Sequence[Batch], rank: int, batch: Batch) -> Batch:
  """parts: labels_of() of each process's share, by rank; batch: that of `rank`. -> it, with what it lacks and another
  has filled as unknown, and "whole": the labels of all shares, "frames" and "counts" of each."""
  frames, clips = [len(p["valid"]) for p in parts], [p["count"] for p in parts]
  whole: Batch = {}
  out = {k: v for k, v in batch.items() if k in ABOUT}
  for key in dict.fromkeys(k for p in parts for k in p if k != "count"):
    like = next(p[key] for p in parts if key in p)
    got = [p[key] if key in p else empty(key, like, f, c) for p, f, c in zip(parts, frames, clips, strict=True)]
    whole[key] = [x for g in got for x in g] if isinstance(like, list) else torch.cat(got)
    out[key] = got[rank]
  steps = torch.tensor([f // c for f, c in zip(frames, clips, strict=True) for _ in range(c)])
  whole["clip"] = torch.repeat_interleave(torch.arange(len(steps)), steps)
  return {**out, "whole": {**whole, "frames": frames, "counts": clips}}


What = tuple[int, list[int], bool] | tuple[int, list[int], bool, list[int]]


class Batches(torch.utils.data.Dataset):
  """For a DataLoader with batch_size=None, fed (step, clips, augmented) by the trainer's sampler: the same triple gives
  the same batch in any worker. A fourth says at which places of a larger batch these clips are, of which each is
  changed as it is there."""

  def __init__(
    self,
    clips: Clips,
    seed: int,
    mirror: bool,
    light: float = 1.0,
    zoom: tuple[float, float] | None = None,
    pixels: Sequence[tuple[str, float, float]] = (),
    turn: float = 0.0,
    night: float = 0.0,
  ):
    self.turn, self.night = turn, night
    self.clips, self.seed, self.mirror, self.light, self.zoom, self.pixels = clips, seed, mirror, light, zoom, pixels

  def change(self, r: np.random.Generator) -> Augmentation:
    a = draw(r, self.mirror, self.clips.picture, self.light, self.zoom, self.pixels)
    return turned(a, float(r.uniform(-self.turn, self.turn))) if self.turn else a

  def __getitem__(self, what: What) -> Batch:
    step, indices, augmented, *more = what
    places = more[0] if more else range(len(indices))
    cv2.setNumThreads(1)  # its threads would fight the student's
    parts, names = [], []
    for j, i in zip(places, indices, strict=True):
      r = np.random.default_rng([self.seed, step, j])
      clip = self.clips.read(int(i))
      a = self.change(r) if augmented else none(self.clips.picture)
      if augmented and self.night and r.uniform() < self.night:
        clip.frames = by_night(clip, r, self.clips.picture)
      parts.append(convert(clip, a, r))
      names.append(clip.name)
    return {**collate(parts), "step": step, "clips": list(map(int, indices)), "names": names}


class Carried(torch.utils.data.Dataset):
  """What is wrong comes out of a DataLoader's worker as a value: torch would put the worker's traceback into the
  message."""

  def __init__(self, data: Batches):
    self.data = data

  def __getitem__(self, what: What) -> Batch:
    try:
      return self.data[what]
    except UserError as e:
      return {"error": str(e)}


def load(data: Batches, what: Sequence[What], workers: int) -> Iterator[Batch]:
  """data[w] for each of `what`, in order, by `workers` processes. Raises UserError as data does."""
  loader = torch.utils.data.DataLoader(
    Carried(data),
    batch_size=None,
    sampler=what,
    num_workers=workers,
    prefetch_factor=3 if workers else None,
    collate_fn=Collate(torch.utils.data.default_convert),
    worker_init_fn=begin,
  )
  for batch in handed_over(loader):
    if "error" in batch:
      raise UserError(batch["error"])
    yield batch

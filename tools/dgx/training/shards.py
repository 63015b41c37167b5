"""Training data on disk, and read back as clips.

DATA/dataset.json                    all that decides the data: camera, view, rate, filters
DATA/<route>--<segment>/segment.json the segment's own: camera, calibration, sources, counts. Folders appear whole or
  not at all
                        columns.npz  one entry a frame of the video, also of those that were not kept
                        frames.u8    (rows, 6, 128, 256) packed model frames of the medmodel view, kept ones and those 4
                                     before them
                        big.u8       the same rows in the sbigmodel view
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from openpilot.tools.dgx.training.constants import FRAME_SHAPE, FRAME_SKIP
from openpilot.tools.learn.handover import Collate, begin, handed_over
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import read_arrays, read_json
from openpilot.tools.lib.said import command

# since logs of every age are read: lane changes, the side of traffic and GPS before openpilot 0.9.5, mountings in every
# calibration state
VERSION = 2
STREAMS = {"frames": "frames.u8", "big_frames": "big.u8"}
PER_STEP = (
  "speed",
  "acceleration",
  "steering",
  "blinkers",
  "gps",
  "pose",
  "plan",
  "frame_id",
)  # columns that clips carry as they are


class Shard:
  """One segment. Files are mapped on first use, so that a worker process opens its own."""

  def __init__(self, path: Path):
    self.path, self.name = path, path.name
    try:
      self.meta: dict[str, Any] = read_json(path / "segment.json")
      self.columns: dict[str, np.ndarray] = read_arrays(path / "columns.npz")
    except (OSError, ValueError, KeyError) as e:
      raise UserError(
        f"{path} is no segment of training data: {' '.join(str(e).split())[:120]}; delete it and run "
        "dataloader.py again"
      ) from None
    rows = int(self.meta["rows"])
    for name in STREAMS.values():
      if (path / name).stat().st_size != rows * int(np.prod(FRAME_SHAPE)):
        raise UserError(
          f"{path / name} has not the {rows} frames that segment.json says; delete {path} and run dataloader.py again"
        )
    self._maps: dict[str, np.ndarray] = {}

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_maps": {}}

  def stream(self, name: str) -> np.ndarray:
    """(rows, 6, 128, 256) uint8, mapped."""
    if name not in self._maps:
      rows = int(self.meta["rows"])
      self._maps[name] = (
        np.memmap(self.path / STREAMS[name], np.uint8, "r", shape=(rows, *FRAME_SHAPE))
        if rows
        else np.empty((0, *FRAME_SHAPE), np.uint8)
      )
    return self._maps[name]

  def starts(self, length: int, hop: int) -> np.ndarray:
    """Frames at which a clip of `length` steps, 4 frames apart and all of them kept, can begin; at least `hop` frames
    from one to the next."""
    keep, ids = self.columns["keep"], self.columns["frame_id"].astype(np.int64)
    n = len(keep) - FRAME_SKIP * (length - 1)
    if n <= 0:
      return np.zeros(0, np.int64)
    steps = np.arange(n)[:, None] + FRAME_SKIP * np.arange(length)
    whole = keep[steps].all(1) & (ids[steps] - ids[steps[:, :1]] == FRAME_SKIP * np.arange(length)).all(1)
    out: list[int] = []
    for i in np.flatnonzero(whole):
      if not out or i >= out[-1] + hop:
        out.append(int(i))
    return np.array(out, np.int64)


def in_order(path: Path) -> tuple[str, int, str]:
  """Of a segment's folder: by route and number, so that the 10th comes behind the 9th."""
  route, _, number = path.name.rpartition("--")
  return route, int(number) if number.isdecimal() else -1, path.name


def read_dataset(root: Path) -> tuple[dict[str, Any], list[Shard]]:
  """-> dataset.json and the segments that are whole. Raises UserError where there are none."""
  try:
    meta = read_json(root / "dataset.json")
  except (OSError, ValueError):
    raise UserError(
      f"{root} holds no training data; make it with `python tools/dgx/training/dataloader.py --routes DIR "
      f"{command('--output', root)}`"
    ) from None
  if meta.get("version") != VERSION:
    raise UserError(
      f"{root} is of version {meta.get('version')}, this program reads {VERSION}; make it again with dataloader.py"
    )
  there = [p for p in root.iterdir() if (p / "segment.json").is_file() and not p.name.startswith(".")]
  shards = [Shard(p) for p in sorted(there, key=in_order)]
  if not any(s.columns["keep"].any() for s in shards):
    raise UserError(f"{root} holds no kept frames; see statistics.json there for why they were left out")
  return meta, shards


class DrivingClips(Dataset):
  """Clips of `length` steps at 5 Hz, which is the rate of the model's own memory. An item, T = length:

  frames, big_frames (T, 12, 128, 256) uint8: the frame 4 earlier, then the step's own; desire (T, 8) float32: rising
  edges of the 4 frames that end with the step's; traffic_convention (2,), action_t (2,) s; speed (T,) m/s, acceleration
  (T,), steering (T,) degrees, blinkers (T, 2) left and right, gps (T, 3) latitude, longitude, altitude, pose (T, 6)
  velocity and turn rates, plan (T, 33, 15): float32, gps float64; NaN where not known; rpy (3,); frame_id (T,);
  segment, its name."""

  def __init__(self, shards: list[Shard], length: int = 8, hop: int | None = None):
    self.shards, self.length = shards, length
    hop = FRAME_SKIP * length if hop is None else hop
    found = [(k, int(i)) for k, s in enumerate(shards) for i in s.starts(length, hop)]
    self.clips = np.array(found, np.int64).reshape(-1, 2)

  def __len__(self) -> int:
    return len(self.clips)

  def __getitem__(self, item: int) -> dict[str, Any]:
    k, start = self.clips[item]
    shard, c = self.shards[k], self.shards[k].columns
    steps = start + FRAME_SKIP * np.arange(self.length)
    rows = c["row"][np.concatenate([[c["pair"][start]], steps])]
    out: dict[str, Any] = {}
    for name in STREAMS:
      one = np.asarray(shard.stream(name)[rows])  # a copy: one frame is in two pairs
      out[name] = torch.from_numpy(np.concatenate([one[:-1], one[1:]], 1))
    window = np.maximum(steps[:, None] - np.arange(FRAME_SKIP), 0)
    out["desire"] = torch.from_numpy(c["desire"][window].max(1).astype(np.float32))
    for name in PER_STEP:
      out[name] = torch.from_numpy(c[name][steps])
    for name in ("traffic_convention", "action_t", "rpy"):
      out[name] = torch.tensor(shard.meta[name], dtype=torch.float32)
    out["segment"] = shard.name
    return out


def split(
  shards: list[Shard], length: int, hop: int | None, share: float
) -> tuple[DrivingClips, DrivingClips | None, str]:
  """Train and held-out clips, and how they were parted: by routes, by segments of the only route, or by the end of the
  only segment. share: held out."""
  routes = sorted({s.name.rpartition("--")[0] for s in shards})
  r = np.random.default_rng(0)
  if share <= 0:
    return DrivingClips(shards, length, hop), None, "nothing is held out"
  held: set[str]
  if len(routes) > 1:
    chosen = {routes[i] for i in r.permutation(len(routes))[: max(1, round(share * len(routes)))]}
    held, how = (
      {s.name for s in shards if s.name.rpartition("--")[0] in chosen},
      f"{len(chosen)} of {len(routes)} routes held out",
    )
  elif len(shards) > 1:
    count = max(1, round(share * len(shards)))
    held, how = (
      {s.name for s in shards[-count:]},
      f"the last {count} of {len(shards)} segments of the only route held out",
    )
  else:
    whole, end = DrivingClips(shards, length, hop), DrivingClips(shards, length, hop)
    if len(whole) < 4:
      return whole, None, "one short segment only, nothing is held out"
    cut = int(whole.clips[-max(1, round(share * len(whole))), 1])
    # a plan looks ten seconds ahead: what it sees must not be held out
    gap = cut - FRAME_SKIP * length - 200
    end.clips, whole.clips = whole.clips[whole.clips[:, 1] >= cut], whole.clips[whole.clips[:, 1] < max(gap, 1)]
    return whole, end, "the end of the only segment held out, which is too alike to judge by"
  return (
    DrivingClips([s for s in shards if s.name not in held], length, hop),
    DrivingClips([s for s in shards if s.name in held], length, hop),
    how,
  )


def epoch_batches(count: int, batch: int, seed: int, epoch: int, rank: int = 0, world: int = 1) -> list[list[int]]:
  """Clips of every step of an epoch, of this process: a function of the seed and the epoch alone, so that a resumed run
  sees what the unbroken one sees."""
  order = np.random.default_rng([seed, epoch]).permutation(count).tolist()
  if len(order) < batch:
    order = (order * -(-batch // max(1, len(order))))[:batch] if order else []
  return [order[a : a + batch][rank::world] for a in range(0, len(order) - batch + 1, batch)]


def make_loader(
  data: DrivingClips, batches: list[list[int]], workers: int = 0, pin: bool = False
) -> Iterator[dict[str, Any]]:
  """The batches that are named, by torch's loader; items get a leading axis B. Raises UserError where a worker died."""
  return handed_over(
    DataLoader(
      data,
      batch_sampler=batches,
      num_workers=workers,
      pin_memory=pin,
      prefetch_factor=2 if workers else None,
      collate_fn=Collate(default_collate),
      worker_init_fn=begin,
    )
  )

"""Features of a frozen backbone, computed once: of each picture as it is, and mirrored. Geometry and light are not
varied then, but for the flip."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from openpilot.tools.fair.detr.data import Labeled
from openpilot.tools.fair.detr.model import features
from openpilot.tools.fair.detr.pictures import Frame, padded
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import read_json, write_json
from openpilot.tools.lib.pictures import read_rgb

FREE = 1.05  # times the features' size that must be free on the disk


class Features:
  """In `folder`: an array for landscape and one for portrait, (pictures, 2, C, h, w) of `dtype`, which are mapped, not
  read; index.json last, which says that they are whole, and of what. flips: False: (pictures, 1, ...). Made by
  fill()."""

  def __init__(self, folder: Path, dtype: str = "float16", flips: bool = True):
    self.folder, self.dtype, self.flips = folder, dtype, flips
    self.rows: list[tuple[int, int]] = []  # of each picture: its array, its place in it
    self.arrays: list[Any] = []

  def key(self, data: Labeled, frame: Frame, weights: str) -> str:
    """Of all that decides the features."""
    h = hashlib.sha256(f"{frame} {weights} {self.dtype} {self.flips}".encode())
    for p, size in zip(data.paths, data.sizes.tolist(), strict=True):
      about = p.stat()
      h.update(f"{p} {about.st_size} {about.st_mtime_ns} {size}\n".encode())
    return h.hexdigest()

  def open(self) -> None:
    self.arrays = [np.load(p, mmap_mode="r", allow_pickle=False) for p in sorted(self.folder.glob("features-*.npy"))]

  def read(self, i: int, flip: bool) -> Tensor:
    """(C, h, w) float32 of picture i, padding and all."""
    if not self.arrays:
      self.open()
    k, row = self.rows[i]
    return torch.from_numpy(np.array(self.arrays[k][row, int(flip)], np.float32))

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "arrays": []}  # each process maps the files itself


def canvases(data: Labeled, frame: Frame) -> list[tuple[int, int]]:
  return [frame.canvas(*frame.fit(h, w)) for w, h in data.sizes.tolist()]


@torch.no_grad()
def fill(store: Features, data: Labeled, frame: Frame, model: Any, weights: str, batch: int, device: Any) -> None:
  """Computes what is not there yet. model: on `device`, as it learns. weights: the backbone's hash. Raises UserError
  where the disk has no room."""
  import shutil

  if frame.pad != "orientation":
    raise UserError("--cache-features wants --pad orientation: features hang on the padding")
  each = canvases(data, frame)
  sizes = sorted(set(each))
  seen = dict.fromkeys(sizes, 0)
  for c in each:
    store.rows.append((sizes.index(c), seen[c]))
    seen[c] += 1
  key, index = store.key(data, frame, weights), store.folder / "index.json"
  if index.is_file() and read_json(index).get("key") == key:
    store.open()
    return
  index.unlink(missing_ok=True)
  store.folder.mkdir(parents=True, exist_ok=True)
  for old in store.folder.glob("features-*.npy"):
    old.unlink()
  shapes = [tuple(features(model, torch.zeros(1, 3, *c, device=device)).shape[1:]) for c in sizes]
  ways = 1 + store.flips
  bytes_ = (
    sum(ways * seen[c] * int(np.prod(s)) for c, s in zip(sizes, shapes, strict=True)) * np.dtype(store.dtype).itemsize
  )
  free = shutil.disk_usage(store.folder).free
  if bytes_ * FREE > free:
    raise UserError(
      f"--cache-features: {bytes_ / 2**30:.1f} GiB of features, and {free / 2**30:.1f} GiB are free at {store.folder}; "
      "free some, or leave it out"
    )
  arrays = [
    np.lib.format.open_memmap(store.folder / f"features-{k}.npy", "w+", np.dtype(store.dtype), (seen[c], ways, *s))
    for k, (c, s) in enumerate(zip(sizes, shapes, strict=True))
  ]
  for k, c in enumerate(sizes):
    mine = [i for i in range(len(data)) if each[i] == c]
    for start in tqdm(range(0, len(mine), batch), desc="features", unit="batch", leave=False):
      some = mine[start : start + batch]
      rgb = [read_rgb(data.paths[i]) for i in some]
      for flip in range(ways):
        x = padded([frame.resize(r[:, ::-1] if flip else r) for r in rgb], c).to(device)
        out = features(model, x).float().cpu().numpy()
        if not np.isfinite(out.astype(store.dtype)).all():
          raise UserError(f"--cache-features: features beyond {store.dtype}; take --cache-precision float32")
        for i, one in zip(some, out, strict=True):
          arrays[k][store.rows[i][1], flip] = one
  for a in arrays:
    a.flush()
  write_json(index, {"key": key, "pictures": len(data), "gib": round(bytes_ / 2**30, 3), "dtype": store.dtype})
  store.open()

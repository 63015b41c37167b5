"""Pictures that belong together: those that look alike, frames of one video, versions of one picture."""

import hashlib
import re
from collections import defaultdict
from pathlib import PurePosixPath

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from openpilot.tools.lib.errors import warn

SIDE = 16  # of the small picture that is compared
NEAR = 8  # bits of SIDE * SIDE in which two pictures may differ and be one
FLAT = 2.0  # gray levels of standard deviation below which a picture is of one color
ALL_PAIRS = 30_000  # pictures up to which each is compared with each
BLOCK = 512
RUNS = 20  # of a video that is too long for a part
STILL = 32  # bits: neighbors that differ in fewer are of one video
# successive frames of road videos differ in .13 to .6 of the bits in which any two do, numbered photographs in .96 up
SUCCESSIVE = 0.85


def bits_of(image: Image.Image) -> np.ndarray | None:
  """The average hash: of 16 x 16 means of the gray picture which are above their mean. (32,) uint8, None where the
  picture is of one color."""
  gray = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
  return np.packbits(gray > gray.mean()) if gray.std() >= FLAT else None


def alike(bits: list[np.ndarray | None]) -> list[tuple[int, int]]:
  """(i, j) of each picture j that looks like earlier ones, i the first of them: where two differ in at most NEAR bits,
  or a row of pictures lies between of which each two do. Of very many only those that differ in none."""
  known = np.array([i for i, b in enumerate(bits) if b is not None], np.int64)
  n = len(known)
  if not n:
    return []
  table = np.stack([b for b in bits if b is not None]).view(np.uint64)
  first: np.ndarray = np.unique(table, axis=0, return_index=True, return_inverse=True)[1:]  # type: ignore[assignment]
  root = first[0][first[1].ravel()]
  if n > ALL_PAIRS:
    warn(f"of {n} pictures, more than {ALL_PAIRS}, only those that look the same are compared, not alike ones")
  else:
    for start in range(0, n, BLOCK):
      block = table[start : start + BLOCK]
      apart = np.zeros((len(block), n - start), np.uint16)
      for word in range(table.shape[1]):
        apart += np.bitwise_count(block[:, word, None] ^ table[None, start:, word])
      i, j = np.nonzero(apart <= NEAR)
      i, j = np.concatenate([i + start, root]), np.concatenate([j + start, np.arange(n)])
      label = connected_components(coo_array((np.ones(len(i), bool), (i, j)), shape=(n, n)), directed=False)[1]
      root = np.unique(label, return_index=True)[1][label]
  return [(int(known[r]), int(known[k])) for k, r in enumerate(root.tolist()) if r != k]


def series_of(name: str) -> tuple[str, int | None]:
  """A file name -> what it is one of, and its running number: 'clip/a_0017.png' -> ('clip/a_', 17). Versions that an
  exporter made of one picture ('x_jpg.rf.0a1b.jpg') have its name."""
  path = PurePosixPath(name)
  stem = re.sub(r"\.rf\.[0-9A-Za-z]{8,}$", "", path.stem)
  stem = re.sub(r"_(jpe?g|png|bmp|webp|tiff?)$", "", stem, flags=re.IGNORECASE)
  found = re.fullmatch(r"(.*?)(\d{1,18})", stem)
  head = f"{path.parent}/"
  return (head + found[1], int(found[2])) if found else (head + stem, None)


def is_video(bits: list[np.ndarray | None]) -> bool:
  """Of a series in order: whether neighbors look more alike than others do."""
  known = [b for b in bits if b is not None]
  if len(known) < 3:
    return True
  table = np.stack(known).view(np.uint64)
  other = np.roll(table, len(table) // 2, axis=0)
  near = np.median(np.bitwise_count(table[1:] ^ table[:-1]).sum(1))
  return bool(near <= max(STILL, SUCCESSIVE * np.median(np.bitwise_count(table ^ other).sum(1))))


class Sets:
  def __init__(self, n: int):
    self.parent = list(range(n))

  def find(self, i: int) -> int:
    while self.parent[i] != i:
      self.parent[i] = i = self.parent[self.parent[i]]
    return i

  def join(self, i: int, j: int) -> None:
    a, b = self.find(i), self.find(j)
    self.parent[max(a, b)] = min(a, b)


def groups_of(
  names: list[str], bits: list[np.ndarray | None], alike: list[tuple[int, int]], largest: int, videos: bool = True
) -> tuple[list[list[int]], list[str]]:
  """Indices of pictures that stay together, and what is to be said about it.

  bits: bits_of() each. largest: pictures of the largest part. A series of more cannot stay whole: it is taken in runs
  of successive frames, or, where it does not look like a video, one by one. videos: whether series stay together."""
  sets, said = Sets(len(names)), []
  series: dict[str, list[tuple[int, int]]] = defaultdict(list)
  versions: dict[tuple[str, int | None], int] = {}
  for i, name in enumerate(names):
    stem, count = key = series_of(name)
    sets.join(versions.setdefault(key, i), i)
    if count is not None:
      series[stem].append((count, i))
  for stem, frames in sorted(series.items()) if videos else ():
    frames.sort()
    step = len(frames)
    if step > largest:
      video = is_video([bits[i] for _, i in frames])
      step = max(1, len(frames) // RUNS) if video else 1
      how = f"in runs of {step} in a row" if video else "one by one, since neighbors look no more alike than others"
      called = f"'{stem.removeprefix('./')}' and a number"
      said.append(f"{len(frames)} pictures are called {called}, too many for one part: they are taken {how}")
    for k, (_, i) in enumerate(frames):
      if k % step:
        sets.join(frames[k - 1][1], i)
  for i, j in alike:
    sets.join(i, j)
  found: dict[int, list[int]] = defaultdict(list)
  for i in range(len(names)):
    found[sets.find(i)].append(i)
  return list(found.values()), said


def shuffled(names: list[str], seed: int) -> list[int]:
  """Indices in an order that only names and seed decide: the same in every version of every library."""
  return sorted(range(len(names)), key=lambda i: hashlib.sha256(f"{seed}/{names[i]}".encode()).digest())

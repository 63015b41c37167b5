"""Mutated videos through FrameReader; hardly a picture comes out under another's number."""

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from openpilot.tools.lib.encode_index import join, synthetic_index
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.framereader import FrameReader, picture_size
from openpilot.tools.lib.videowriter import VideoWriter
from tests.fuzz.fuzz import Case

W, H, N, GOP = 96, 64, 40, 10
REFUSED = (UserError,)
OTHER = "pictures of another number"


def gray(i: int) -> int:
  return 16 + 5 * i


def write(path: Path) -> bytes:
  with VideoWriter(path, W, H, GOP, 18) as v:
    for i in range(N):
      v.write(np.full((H, W, 3), gray(i), np.uint8))
  return path.read_bytes()


def mutate(whole: bytes, r: random.Random) -> bytes:
  dat = bytearray(whole)
  for _ in range(r.choice((1, 1, 3))):
    at, size = r.randrange(len(dat)), r.choice((1, 4, 40, 188, 400, 1500))
    kind = r.randrange(5)
    if kind == 0:
      dat[at : at + size] = bytes(len(dat[at : at + size]))
    elif kind == 1:
      dat[at : at + size] = r.randbytes(len(dat[at : at + size]))
    elif kind == 2:
      del dat[at : at + size]
    elif kind == 3:
      dat[at:at] = r.randbytes(size)
    else:
      del dat[at // 2 + len(dat) // 2 :]
    if not dat:
      break
  return bytes(dat)


@contextlib.contextmanager
def prepare(tmp: Path, counts: Counter[str]) -> Iterator[Callable[[random.Random], Case]]:
  videos = {s: write(tmp / f"whole{s}") for s in (".hevc", ".ts", ".mp4")}

  def read(path: Path, r: random.Random) -> None:
    picture_size(path)
    reader = FrameReader(path, "nv12", threads=r.choice((None, 1)))
    ids = {e.position: e.segment_id for e in join(synthetic_index(N, 20.0), reader)}
    for i, frame in reader.read_from(r.choice((0, 0, reader.frame_count // 2))):
      if i not in ids:
        continue
      shown = (float(np.median(frame[:H])) - 16) / 219 * 255  # full range
      near = (shown - 16) / 5
      counts["pictures"] += 1
      counts[OTHER] += abs(near - ids[i]) > 0.7

  def cases(r: random.Random) -> Case:
    suffix = r.choice(sorted(videos))
    path = tmp / f"v{suffix}"
    path.write_bytes(mutate(videos[suffix], r))
    yield suffix, lambda: read(path, r)

  yield cases

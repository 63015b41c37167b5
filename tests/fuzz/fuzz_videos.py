#!/usr/bin/env python3
"""Mutated videos through FrameReader: no exception but UserError, no hang, and hardly a picture that comes out under
another's number.

python tests/fuzz/fuzz_videos.py [--seed N] [--runs N] [--seconds S]"""

import argparse
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

import numpy as np

from openpilot.tools.lib.encode_index import join, synthetic_index
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.framereader import FrameReader, picture_size
from openpilot.tools.lib.videowriter import VideoWriter

W, H, N, GOP = 96, 64, 40, 10
SLOW = 10.0  # s
OTHER = "of another number"


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


def fuzz(seed: int, runs: int, seconds: float, progress: bool = False) -> tuple[Counter[str], list[str]]:
  """-> how each run ended and how many pictures were right or another's, and a line for each run that ended wrongly."""
  counts: Counter[str] = Counter()
  wrong: list[str] = []
  end = time.monotonic() + seconds
  with tempfile.TemporaryDirectory() as tmp:
    videos = {s: write(Path(tmp) / f"whole{s}") for s in (".hevc", ".ts", ".mp4")}
    for n in range(runs):
      if time.monotonic() > end:
        break
      r = random.Random(seed * 1_000_003 + n)
      suffix = r.choice(sorted(videos))
      path = Path(tmp) / f"v{suffix}"
      path.write_bytes(mutate(videos[suffix], r))
      begun = time.monotonic()
      counts["videos"] += 1
      try:
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
        counts["read"] += 1
      except UserError:
        counts["refused"] += 1
      except Exception as e:
        wrong.append(f"--seed {seed}, video {n}{suffix}: {type(e).__name__}: {str(e)[:120]}")
      if time.monotonic() - begun > SLOW:
        wrong.append(f"--seed {seed}, video {n}{suffix}: took {time.monotonic() - begun:.0f} s")
      if progress and n % 100 == 99:
        print(f"{n + 1} videos: {dict(counts)}, {len(wrong)} wrong", flush=True)
  return counts, wrong


def main() -> int:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--seed", type=int, default=0)
  p.add_argument("--runs", type=int, default=10**9)
  p.add_argument("--seconds", type=float, default=60.0)
  args = p.parse_args()
  counts, wrong = fuzz(args.seed, args.runs, args.seconds, True)
  print(f"{counts['videos']} videos: {counts['read']} read, {counts['refused']} refused, {len(wrong)} wrong")
  print(f"{counts['pictures']} pictures, {counts[OTHER]} of them not the one that their number says")
  print("\n".join(wrong[:40]))
  return 1 if wrong else 0


if __name__ == "__main__":
  raise SystemExit(main())

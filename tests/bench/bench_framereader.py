#!/usr/bin/env python3
"""Decoding a 1200-frame HEVC segment: ours against a reader that starts one ffmpeg process per group of pictures, as
openpilot's does. In order, and at random over the groups. And any video in order beside PyAV's bare decoding of it.

python tests/bench/bench_framereader.py      (needs an ffmpeg: on the path, or `pip install imageio-ffmpeg`)
python tests/bench/bench_framereader.py --video qcamera.ts [--rounds 5]     PyAV's alone, in CPU time, in turns
"""

import argparse
import shutil
import subprocess
import time
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

import av
import numpy as np

from openpilot.tools.lib.framereader import FrameReader
from openpilot.tools.lib.videowriter import VideoWriter
from tests.bench.turns import in_turns, ratio

W, H, N, GOP = 1344, 760, 1200, 20
PATH = Path(__file__).resolve().parents[2] / "out" / "bench" / "fcamera.hevc"


def make_video():
  """A textured picture that pans, with noise: cheap to make and dear enough to decode."""
  PATH.parent.mkdir(parents=True, exist_ok=True)
  r = np.random.default_rng(0)
  coarse = r.integers(0, 256, (120, 220, 3)).astype(np.uint8)
  big = coarse.repeat(8, 0).repeat(16, 1)
  writer = VideoWriter(PATH.with_name("tmp.hevc"), W, H, GOP, 24)
  noise = [r.integers(0, 12, (H, W, 1), dtype=np.uint8) for _ in range(5)]
  for i in range(N):
    writer.write(big[i % 200 : i % 200 + H, i : i + W] // 2 + noise[i % 5] + 40)
  writer.close()
  PATH.with_name("tmp.hevc").rename(PATH)


class ProcessPerGop:
  """The named alternative: the group's bytes behind the parameter sets into one ffmpeg, NV12 out of its pipe."""

  def __init__(self, path, ffmpeg):
    index = FrameReader(path, "nv12")
    self.dat, self.sets, self.packets, self.keys, self.ffmpeg = index.dat, index.sets, index.packets, index.keys, ffmpeg

  def group(self, g):
    a = self.packets[self.keys[g]][0]
    b = self.packets[self.keys[g + 1]][0] if g + 1 < len(self.keys) else len(self.dat)
    cmd = [
      self.ffmpeg,
      "-v",
      "quiet",
      "-f",
      "hevc",
      "-i",
      "-",
      "-fps_mode",
      "passthrough",
      "-f",
      "rawvideo",
      "-pix_fmt",
      "nv12",
      "-",
    ]
    raw = subprocess.run(cmd, input=self.sets + self.dat[a:b], capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, H * 3 // 2, W)


def beside_bare(path, rounds):
  """CPU time of all threads, without a decoder's threads and with them."""
  for threads in (1, None):

    def bare(threads=threads):
      with av.open(str(path), format="hevc" if path.suffix == ".hevc" else None) as c:
        c.streams.video[0].thread_type = "NONE" if threads == 1 else "AUTO"
        return sum(1 for _ in c.decode(video=0))

    what = {
      "bare PyAV": bare,
      "planes": lambda threads=threads: sum(1 for _ in FrameReader(path, "nv12", threads).planes_from(0)),
      "NV12": lambda threads=threads: sum(1 for _ in FrameReader(path, "nv12", threads)),
    }
    times, counts = in_turns(what, rounds)
    for k, v in times.items():
      print(
        f"{'one thread' if threads else 'threads':<11} {k:<10} {counts[k]} frames, "
        f"{v.min() / counts[k] * 1e6:7.0f} us of CPU a frame, of bare {ratio(v, times['bare PyAV']):.3f} (goal 1.05)"
      )


def main():
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--video", type=Path)
  p.add_argument("--rounds", type=int, default=5)
  args = p.parse_args()
  if args.video is not None:
    beside_bare(args.video, args.rounds)
    return
  ffmpeg = shutil.which("ffmpeg")
  if ffmpeg is None:
    try:
      import imageio_ffmpeg

      ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    except ImportError:
      print("skipped: no ffmpeg on the path; `pip install imageio-ffmpeg` brings one")
      return
  if not PATH.exists():
    make_video()
  ours, theirs = FrameReader(PATH, "nv12"), ProcessPerGop(PATH, ffmpeg)
  assert (theirs.group(7)[3] == ours.get(7 * GOP + 3)).all() and ours.frame_count == N
  t = time.perf_counter()
  n = sum(len(theirs.group(g)) for g in range(len(theirs.keys)))
  a = time.perf_counter() - t
  t = time.perf_counter()
  m = sum(1 for _ in FrameReader(PATH, "nv12"))
  b = time.perf_counter() - t
  assert n == m == N
  print(f"{PATH.stat().st_size / 1e6:.1f} MB, {N} frames {W}x{H}, groups of {GOP}, to NV12")
  print(f"in order:          process per group {N / a:6.0f} fps   ours {N / b:6.0f} fps   ratio {a / b:.2f}")
  r = np.random.default_rng(1)
  order = [
    (int(g), int(r.integers(GOP))) for g in r.permutation(len(theirs.keys))
  ]  # some frame of each group: what a shuffling data loader asks for
  t = time.perf_counter()
  for g, i in order:
    theirs.group(g)[i]
  a = time.perf_counter() - t
  reader = FrameReader(PATH, "nv12")
  t = time.perf_counter()
  for g, i in order:
    reader.get(g * GOP + i)
  b = time.perf_counter() - t
  print(
    f"random, 1 a group: process per group {len(order) / a:6.1f} fps   ours {len(order) / b:6.1f} fps   ratio "
    f"{a / b:.2f}"
  )


if __name__ == "__main__":
  main()

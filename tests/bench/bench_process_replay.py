#!/usr/bin/env python3
"""process-replay of a route beside its bare network over the same frames, in CPU time, in the same run: each frame's
network is run once more by itself, from warm caches.

python tests/bench/bench_process_replay.py ROUTE_OR_DIR [--bundle DIR] [--seconds 5] [--profile]"""

import argparse
import cProfile
import pstats
import time
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

import numpy as np

from openpilot.selfdrive.modeld.fair.bundle import MODELS_DIR, find_bundle, load_bundle
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.tools.lib.errors import cli
from openpilot.tools.replay.process_replay import process_replay
from openpilot.tools.replay.source import open_route


class Twice:
  """A runner whose every call is timed, and made twice."""

  def __init__(self, runner):
    self.runner, self.within, self.bare = runner, [], []

  def __getattr__(self, name):
    return getattr(self.runner, name)

  def run(self, inputs):
    times = [time.process_time()]
    for _ in range(2):
      out = self.runner.run(inputs)
      times.append(time.process_time())
    self.within.append(times[1] - times[0])
    self.bare.append(times[2] - times[1])
    return out


def main():
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("route")
  p.add_argument("--bundle", type=Path)
  p.add_argument("--camera", default="qcamera")
  p.add_argument("--seconds", type=float, default=5.0)
  p.add_argument("--small", action="store_true", help="as process-replay's")
  p.add_argument("--profile", action="store_true", help="where the time outside of the network goes")
  args = p.parse_args()
  segments, camera = open_route(args.route, None, args.camera)
  bundle = load_bundle(args.bundle) if args.bundle else find_bundle(None, MODELS_DIR)
  model = FairModel(bundle, dense=not args.small)
  model.runners = {k: Twice(r) for k, r in model.runners.items()}
  profile = cProfile.Profile(time.process_time)
  messages = process_replay(segments, model, camera, seconds=args.seconds, progress=False)
  next(messages)  # the first frame opens the video, and runs the network to warm it up
  for r in model.runners.values():
    r.within, r.bare = [], []
  first = model.frames
  if args.profile:
    profile.enable()
  begun = time.process_time()
  for _ in messages:
    pass
  spent = time.process_time() - begun
  profile.disable()
  n = model.frames - first
  within, bare = (sum(np.sum(getattr(r, k)) for r in model.runners.values()) for k in ("within", "bare"))
  whole = spent - bare
  print(f"{bundle.name}, {n} frames, ms of CPU a frame")
  for k, v in (("process-replay", whole), ("its network", within), ("the bare network", bare)):
    print(f"{k:<18} {v / n * 1e3:7.2f}")
  print(f"process-replay over the bare network {whole / bare:.3f} (goal 1.15); over its own {whole / within:.3f}")
  if args.profile:
    pstats.Stats(profile).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
  raise SystemExit(cli(main)())

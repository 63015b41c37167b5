#!/usr/bin/env python3
"""What fairmodeld costs in the log: the messages that loggerd would write, zstd level 10, per service and minute.

python tests/bench/bench_log_size.py [ROUTE] [--bundle BUNDLE] [--seconds S] [--dense]"""

import argparse
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

import zstandard

from openpilot.cereal import messaging
from openpilot.cereal.services import SERVICE_LIST
from openpilot.selfdrive.modeld.fair.bundle import MODELS_DIR, load_bundle
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.tools.lib.route import Route
from openpilot.tools.model_replay import REAL, SHARED_DATA
from openpilot.tools.replay.process_replay import process_replay
from openpilot.tools.replay.source import choose_camera

LEVEL = 10  # loggerd's
BUDGET = 1000.0  # kB a minute, all services together
FRAME_BYTES = 850  # of all logged messages of a frame, not compressed, is the goal


def zstd(messages: Iterable[bytes]) -> int:
  return len(zstandard.ZstdCompressor(level=LEVEL).compress(b"".join(messages)))


def log_sizes(
  messages: Iterable[bytes],
) -> tuple[dict[str, tuple[int, float, float]], dict[str, tuple[int, float, float]]]:
  """Serialized messages -> of the rlog, and of what is published but not logged: service -> messages, mean bytes of
  one, kB a minute. 'all': together."""
  by: dict[str, list[bytes]] = defaultdict(list)
  order, times = [], []
  for dat in messages:
    event = messaging.log_from_bytes(dat)
    by[event.which()].append(dat)
    times.append(event.logMonoTime)
    if SERVICE_LIST[event.which()].should_log:
      order.append(dat)
  minutes = (max(times) - min(times) + 50e6) * 1e-9 / 60
  rows = {s: (len(m), sum(map(len, m)) / len(m), zstd(m) / 1e3 / minutes) for s, m in sorted(by.items())}
  logged = {s: row for s, row in rows.items() if SERVICE_LIST[s].should_log}
  logged["all"] = (len(order), sum(map(len, order)) / max(1, len(order)), zstd(order) / 1e3 / minutes)
  return logged, {s: row for s, row in rows.items() if s not in logged}


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument(
    "route", nargs="?", type=Path, default=SHARED_DATA / "realdata" / f"{REAL['route']}--{REAL['segment']}"
  )
  p.add_argument("--bundle", type=Path, default=MODELS_DIR / "fair_unified_small")
  p.add_argument("--seconds", type=float)
  p.add_argument("--dense", action="store_true", help="as with the param FairLogDense")
  args = p.parse_args()
  segments = Route(args.route).segments
  model = FairModel(load_bundle(args.bundle), dense=args.dense)
  logged, live = log_sizes(process_replay(segments, model, choose_camera(segments, "road"), 0.0, args.seconds))
  print(f"{model.frames} frames by {model.bundle.name}{', dense' if args.dense else ''}")
  for title, rows in (("in the rlog", logged), ("live only", live)):
    print(f"{title:<20}{'messages':>9}{'bytes each':>12}{'kB a minute':>13}")
    for service, (n, size, kb) in rows.items():
      print(f"  {service:<18}{n:>9}{size:>12.0f}{kb:>13.1f}")
  print(f"budget: {BUDGET:g} kB a minute")


if __name__ == "__main__":
  main()

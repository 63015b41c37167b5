#!/usr/bin/env python3
"""Selecting carState from a qlog: ours against iterating all events with pycapnp and asking each which() it is. Both
start from the file, then from its bytes.

python tests/bench/bench_logreader.py [QLOG]"""

import argparse
import time
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

import zstandard

from openpilot.cereal import log
from openpilot.tools.lib import logreader
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.logreader import LogFile, LogReader

DEFAULT = Path(__file__).resolve().parents[3] / "shared/data/realdata/0000002c--d68dde99ca--1/qlog.zst"


def best(f, n=15):
  times = []
  for _ in range(n):
    t = time.perf_counter()
    result = f()
    times.append(time.perf_counter() - t)
  return min(times), result


def main():
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("qlog", type=Path, nargs="?", default=DEFAULT, help="default: the shared data's")
  path = p.parse_args().qlog
  if not path.is_file():
    raise UserError(f"there is no log {path}; name a qlog.zst")
  dat = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())

  def naive(data):
    return [
      e.carState.vEgo
      for e in log.Event.read_multiple_bytes(data, traversal_limit_in_words=2**64 - 1)
      if e.which() == "carState"
    ]

  def ours():
    return [e.carState.vEgo for e in LogReader([path], services=["carState"], sort_by_time=False)]

  a, x = best(lambda: naive(zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())))
  b, y = best(ours)
  assert x == y and x
  print(f"{path.name}: {len(dat) / 1e6:.2f} MB, {len(LogFile(path).start)} events, {len(x)} carState; best of 15")
  print(f"from the file:   pycapnp + which() {a * 1e3:7.2f} ms   ours {b * 1e3:7.2f} ms   ratio {a / b:.1f}")
  real = logreader.decompress
  logreader.decompress = lambda _: (dat, "")
  try:
    a, x = best(lambda: naive(dat))
    b, y = best(ours)
  finally:
    logreader.decompress = real
  assert x == y
  print(f"from the bytes:  pycapnp + which() {a * 1e3:7.2f} ms   ours {b * 1e3:7.2f} ms   ratio {a / b:.1f}")


if __name__ == "__main__":
  raise SystemExit(cli(main)())

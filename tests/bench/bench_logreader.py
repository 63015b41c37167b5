#!/usr/bin/env python3
"""Selecting carState from a qlog, in CPU time, in turns: ours, beside unpacking the file alone and beside iterating all
events with pycapnp and asking each which() it is.

python tests/bench/bench_logreader.py [QLOG]

Ratios are the median of the rounds' own: what else the machine does weighs on all alike. "In one go" is zstd into a
buffer of the size that the frame states, the fastest way there is; "alone" what zstandard's decompressobj() takes."""

import argparse
import bz2
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

import zstandard

from openpilot.cereal import log
from openpilot.tools.lib import logreader
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.logreader import LogFile, LogReader
from tests.bench.turns import in_turns, ratio

DEFAULT = Path(__file__).resolve().parents[3] / "shared/data/realdata/0000002c--d68dde99ca--1/qlog.zst"


def unpack(path):
  if path.suffix == ".bz2":
    return bz2.decompress(path.read_bytes())
  return zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())


def main():
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("qlog", type=Path, nargs="?", default=DEFAULT, help="default: the shared data's")
  p.add_argument("--rounds", type=int, default=40)
  args = p.parse_args()
  path = args.qlog
  if not path.is_file():
    raise UserError(f"there is no log {path}; name a qlog.zst")
  dat = unpack(path)

  def naive(data):
    return [
      e.carState.vEgo
      for e in log.Event.read_multiple_bytes(data, traversal_limit_in_words=2**64 - 1)
      if e.which() == "carState"
    ]

  def reader():
    return LogReader([path], services=["carState"], sort_by_time=False)

  def from_bytes():
    real = logreader.decompress
    logreader.decompress = lambda _: (dat, "")
    try:
      return [e.carState.vEgo for e in reader()]
    finally:
      logreader.decompress = real

  what = {
    "unpacking alone": lambda: unpack(path),
    "ours": lambda: [e.carState.vEgo for e in reader()],
    "ours, from the bytes": from_bytes,
    "ours, carState's bytes": lambda: list(reader().raw()),
    "pycapnp + which()": lambda: naive(unpack(path)),
    "pycapnp + which(), from the bytes": lambda: naive(dat),
  }
  if path.suffix == ".zst":
    what["unpacking in one go"] = lambda: zstandard.ZstdDecompressor().decompress(path.read_bytes(), len(dat))
  times, found = in_turns(what, args.rounds)
  x = found["ours"]
  assert x == found["pycapnp + which()"] and x
  print(f"{path.name}: {len(dat) / 1e6:.2f} MB, {len(LogFile(path).start)} events, {len(x)} carState")
  print(f"{args.rounds} rounds in turns; CPU time, the least; over unpacking alone; over ours")
  for k, v in times.items():
    of = [ratio(v, times[other]) for other in ("unpacking alone", "ours")]
    print(f"{k:<34} {v.min() * 1e3:8.2f} ms {of[0]:8.2f} {of[1]:8.2f}")
  of = ratio(times["pycapnp + which(), from the bytes"], times["ours, from the bytes"])
  print(f"from the bytes ours is {of:.1f} times as fast as pycapnp + which()")
  print(f"goal: ours at most {1.05 if path.suffix == '.bz2' else 1.3} of unpacking alone")


if __name__ == "__main__":
  raise SystemExit(cli(main)())

#!/usr/bin/env python3
"""Lists where two logs differ: first the number and order of messages, then field by field. Exit code 0: they are
equal, 1: they differ."""

from dataclasses import dataclass
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from openpilot.tools.lib.options import option, parse
from openpilot.tools.lib.errors import cli
from openpilot.tools.lib.guard import DAMAGE, open_event
from openpilot.tools.lib.logreader import TAG_NAMES, LogReader


# fields about the machine and not about the road; zero in process-replay's logs
MACHINE_FIELDS = tuple(
  f"{service}.modelExecutionTime"
  for service in ("modelV2", "fairDepth", "fairObjects", "fairSegmentation", "fairLanes")
) + tuple(
  f"fairState.{field}"
  for field in ("warpTime", "decodeTime", "publishTime", "memoryMB", "graphs.executionTime", "graphs.executionTimeMax")
)


def is_ignored(path: str, fields: Sequence[str]) -> bool:
  """path: of one field, such as fairState.graphs[0].executionTime; fields: prefixes of paths, with or without the
  numbers in brackets."""
  plain = re.sub(r"\[\d+\]", "", path)
  return any(p == f or p.startswith((f + ".", f + "[")) for p in (path, plain) for f in fields)


def differences(a: Any, b: Any, at: str = "", tolerance: float = 0.0) -> Iterator[tuple[str, Any, Any]]:
  """(field path, value in a, value in b) of all that differs between two dicts, lists or values.

  Floats: |a - b| <= tolerance * (1 + |a|) is equal, and nan equals nan."""
  if isinstance(a, dict) and isinstance(b, dict):
    for k in sorted(a.keys() | b.keys()):
      yield from differences(a.get(k), b.get(k), f"{at}.{k}" if at else str(k), tolerance)
  elif isinstance(a, list) and isinstance(b, list):
    if len(a) != len(b):
      yield f"{at} (length)", len(a), len(b)
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
      yield from differences(x, y, f"{at}[{i}]", tolerance)
  elif isinstance(a, float) and isinstance(b, float):
    near = math.isfinite(a) and abs(a - b) <= tolerance * (1 + abs(a))  # everything is near infinity
    if not (a == b or (math.isnan(a) and math.isnan(b)) or near):
      yield at, a, b
  elif a != b:
    yield at, a, b


def compare_logs(
  a: Iterable[tuple[int, int, bytes]],
  b: Iterable[tuple[int, int, bytes]],
  ignore_fields: Sequence[str] = (),
  tolerance: float = 0.0,
  limit: int = 20,
) -> list[str]:
  """Two streams of (time, union tag, bytes) -> a line per difference, at most `limit`; [] where they are the same.

  ignore_fields: e.g. 'logMonoTime', 'fairState.graphs.runs', *MACHINE_FIELDS."""
  first, second = list(a), list(b)
  lines: list[str] = []
  counts = [Counter(TAG_NAMES[tag] for _, tag, _ in x) for x in (first, second)]
  for service in sorted(counts[0].keys() | counts[1].keys()):
    if counts[0][service] != counts[1][service]:
      lines.append(f"{service}: {counts[0][service]} messages and {counts[1][service]}")
  for i, ((_, tag_a, dat_a), (_, tag_b, dat_b)) in enumerate(zip(first, second, strict=False)):
    if dat_a == dat_b:
      continue
    if tag_a != tag_b:
      lines.append(f"message {i}: {TAG_NAMES[tag_a]} and {TAG_NAMES[tag_b]}; the order differs from here on")
      break
    try:
      one, other = (open_event(d).to_dict(verbose=True) for d in (dat_a, dat_b))
    except DAMAGE:
      lines.append(f"message {i} ({TAG_NAMES[tag_a]}): differs, and is damaged in one of them")
      if len(lines) >= limit:
        return [*lines, "..."]
      continue
    for path, x, y in differences(one, other, tolerance=tolerance):
      if not is_ignored(path, ignore_fields):
        lines.append(f"message {i} ({TAG_NAMES[tag_a]}): {path} is {str(x)[:60]} and {str(y)[:60]}")
        if len(lines) >= limit:
          return [*lines, "..."]
  return lines


@dataclass(frozen=True)
class Options:
  a: Path = option(positional=True, help="a log")
  b: Path = option(positional=True, help="the log to compare it with")
  ignore: str = option(
    "", metavar="FIELDS", help="comma-separated fields, as logMonoTime,fairState.rate; machine: all times and memory"
  )
  tolerance: float = option(0.0, help="of floats, absolute and relative")


def main() -> int:
  args = parse(Options, __doc__, "compare-logs")
  ignored = [f for f in args.ignore.split(",") if f]
  if "machine" in ignored:
    ignored += MACHINE_FIELDS
  lines = compare_logs(LogReader(args.a).raw(), LogReader(args.b).raw(), ignored, args.tolerance)
  print("\n".join(lines) if lines else "the logs are the same")
  return 1 if lines else 0


if __name__ == "__main__":
  raise SystemExit(cli(main)())

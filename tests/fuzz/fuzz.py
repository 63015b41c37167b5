#!/usr/bin/env python3
"""What is damaged or hostile through everything that reads it: no exception but the one that tells people in a line,
nothing hangs, nothing takes memory. The same seed gives the same cases.

python tests/fuzz/fuzz.py KIND [--seed N] [--runs N] [--seconds S]"""

import argparse
import contextlib
import importlib
import io
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

if not __package__:  # run as a file
  sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
  import from_root  # noqa: F401

# A kind is a module with `prepare`, a context manager of a folder and the counts, which gives what makes a case: from
# dice -> what it is called and what to call. REFUSED: the exceptions that tell people.
KINDS = ("logs", "videos", "manifests", "messages", "camera", "stores", "checkpoints")
Case = Iterator[tuple[str, Callable[[], object]]]
SLOW = 10.0  # s of one call
MEMORY = 1 << 30  # bytes above what the process takes before the first case
MAX_LINE = 2000  # letters that a person is told


class HangError(BaseException):
  """No Exception, or what catches those would go on hanging."""


def interrupt(*_: object) -> None:
  raise HangError


def peak() -> int:
  """Bytes that this process has taken at most."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def outcome(call: Callable[[], object], refused: tuple[type[Exception], ...]) -> tuple[str, str]:
  """-> 'read', 'refused' or 'wrong', and what is wrong."""
  begun, before = time.monotonic(), peak()
  signal.setitimer(signal.ITIMER_REAL, 3 * SLOW)
  try:
    with contextlib.redirect_stderr(io.StringIO()):
      call()
    ended, why = "read", ""
  except refused as e:
    told = str(e)
    ended, why = "refused", "" if "\n" not in told and len(told) <= MAX_LINE else f"no line: {told!r}"
  except (Exception, HangError) as e:
    ended, why = "wrong", f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
  if not why and time.monotonic() - begun > SLOW:
    why = f"took {time.monotonic() - begun:.0f} s"
  if not why and peak() - before > MEMORY:
    why = f"took {(peak() - before) >> 20} MiB"
  return "wrong" if why else ended, why[:200]


def fuzz(kind: ModuleType, seed: int, runs: int, seconds: float, said: str = "") -> tuple[Counter[str], list[str]]:
  """-> how many cases there were and how each call of theirs ended, and a line for each that ended wrongly. said: the
  kind's name, if its progress is to be told."""
  counts: Counter[str] = Counter()
  wrong: list[str] = []
  was = signal.signal(signal.SIGALRM, interrupt)
  try:
    with tempfile.TemporaryDirectory() as tmp, kind.prepare(Path(tmp), counts) as cases:
      end, idle, told = time.monotonic() + seconds, peak(), time.monotonic()
      for n in range(runs):
        if time.monotonic() > end:
          break
        counts["cases"] += 1
        for name, call in cases(random.Random(seed * 1_000_003 + n)):
          ended, why = outcome(call, kind.REFUSED)
          counts[ended] += 1
          if why:
            wrong.append(f"--seed {seed}, case {n}, {name}: {why}")
        if said and time.monotonic() > told + 10:
          told = time.monotonic()
          print(f"{said}: {dict(counts)}, {(peak() - idle) >> 20} MiB more than idle", flush=True)
      counts["MiB more than idle"] = (peak() - idle) >> 20
  finally:
    signal.signal(signal.SIGALRM, was)
  return counts, wrong


def main() -> int:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("kind", choices=KINDS, nargs="+")
  p.add_argument("--seed", type=int, default=0)
  p.add_argument("--runs", type=int, default=10**9, help="cases of each kind")
  p.add_argument("--seconds", type=float, default=60.0, help="for each kind")
  args = p.parse_args()
  bad = 0
  for kind in args.kind:
    counts, wrong = fuzz(importlib.import_module(f"tests.fuzz.{kind}"), args.seed, args.runs, args.seconds, kind)
    print(f"{kind}: {', '.join(f'{n} {what}' for what, n in counts.items())}; {len(wrong)} wrong")
    print("\n".join(wrong[:40]))
    bad += len(wrong)
  return 1 if bad else 0


if __name__ == "__main__":
  raise SystemExit(main())

#!/usr/bin/env python3
"""Records the live fair* messages to a log, and merges such a log into the route's own."""

from dataclasses import dataclass
import heapq
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from openpilot.cereal import messaging
from openpilot.cereal.services import SERVICE_LIST
from openpilot.tools.lib.options import option, parse
from openpilot.tools.lib.errors import UserError, above_zero, cli
from openpilot.tools.lib.guard import Guard, open_event
from openpilot.tools.lib.logreader import LATEST, TAG_NAMES, LogReader
from openpilot.tools.lib.logwriter import write_log
from openpilot.tools.replay.replay import with_time

FAIR = tuple(s for s in SERVICE_LIST if s.startswith("fair"))


class Recorder:
  """Collects raw messages in a thread, from its creation until stop()."""

  def __init__(self, services: Sequence[str] = FAIR):
    self.messages: list[bytes] = []
    self.done = threading.Event()
    self.poller = messaging.Poller()
    self.socks = [messaging.sub_sock(s, self.poller) for s in services]
    self.thread = threading.Thread(target=self._run, daemon=True)
    self.thread.start()

  def _run(self) -> None:
    while not self.done.is_set():
      for sock in self.poller.poll(100):
        self.messages += messaging.drain_sock_raw(sock)

  def until(self, over: Callable[[], bool]) -> Iterator[bytes]:
    """Messages as they come, until over(), which is asked several times a second. None is
    kept. Raises UserError where none came."""
    came, last = False, False
    while not last:
      if last := over():
        self.stop()
      while self.messages:
        came = True
        yield self.messages.pop(0)
    if not came:
      raise UserError("no fair message came, nothing is written; does fairmodeld run, under the same OPENPILOT_PREFIX?")

  def stop(self) -> list[bytes]:
    self.done.set()
    self.thread.join()
    for s in self.socks:
      s.close()
    return self.messages


def on_route_clock(live: Sequence[bytes]) -> Iterator[tuple[int, bytes]]:
  """Live messages -> (time, bytes) on the clock of the replayed route.

  A replay sends frames with the route's own times, while fairmodeld stamps its messages with the machine's clock. The
  smallest difference between a message's time and the end of its frame's exposure is taken as the offset of the two
  clocks: it contains the fastest latency. A message that took longer is later by that much."""
  stamped: list[tuple[int, int, bool, bytes]] = []
  guard = Guard("the live messages")
  for dat in live:
    with guard(None):
      event = open_event(dat)
      t, eof = event.logMonoTime, getattr(event, event.which()).timestampEof
      if max(t, eof) > LATEST:
        raise ValueError("no time")
      stamped.append((t, eof, event.which() != "fairState", dat))
  guard.say()
  offsets = [t - eof for t, eof, about_frame, _ in stamped if about_frame and eof]
  if not offsets:
    return
  fastest = min(offsets)
  for t, _, _, dat in sorted(stamped, key=lambda x: x[0]):
    yield max(0, t - fastest), with_time(dat, max(0, t - fastest))


def merge(source: Sequence[Path], live: Sequence[bytes], out: Path) -> int:
  """The logs' own messages (fair* of an earlier run left out) and the live ones, by time -> out. Returns how many were
  written."""
  own = ((t, dat) for t, tag, dat in LogReader(source).raw() if not is_fair(tag)) if source else iter(())
  return write_log(
    out, (dat for _, dat in heapq.merge(own, sorted(on_route_clock(live), key=lambda x: x[0]), key=lambda x: x[0]))
  )


def is_fair(tag: int) -> bool:
  return TAG_NAMES[tag] in FAIR


@dataclass(frozen=True)
class Options:
  output: Path = option(positional=True, help="the log to write: .zst, .bz2 or raw")
  seconds: float | None = option(None, parse=above_zero, help="stop after so many; by default on Ctrl-C")


def main() -> None:
  args = parse(Options, __doc__, "record")
  recorder, stop = Recorder(), threading.Event()
  for sig in (signal.SIGINT, signal.SIGTERM):
    signal.signal(sig, lambda *_: stop.set())
  print(f"recording {', '.join(FAIR)}; Ctrl-C ends")
  end = time.monotonic() + (args.seconds or math.inf)
  # written as they come: a path that cannot be written is told before the drive, not after it
  n = write_log(args.output, recorder.until(lambda: stop.wait(0.2) or time.monotonic() >= end))
  print(f"{args.output}: {n} messages")


if __name__ == "__main__":
  raise SystemExit(cli(main)())

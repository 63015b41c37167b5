"""The worker's end of the pipes to its supervisor. Without one (the worker run by itself, tests) all of it does
nothing."""

import contextlib
import json
import os
import time
from typing import Any

ENV = "FAIR_SUPERVISOR"
BEAT = 0.5  # s between two beats
MAX_ANSWER = 1 << 16


class SupervisorGone(Exception):
  """Nobody hears any more."""


class Link:
  """ended: how the process before this one ended, '' without one; ends: how many did. refused: sha256 of a manifest ->
  why its bundle must not run."""

  def __init__(self) -> None:
    said: dict[str, Any] = json.loads(os.environ.pop(ENV, "{}"))
    self.ended, self.ends, self.refused = said.get("ended", ""), said.get("ends", 0), said.get("refused", {})
    self.read, self.write = said.get("read", -1), said.get("write", -1)
    self.next_beat = 0.0
    self.rest = b""
    for fd in (self.read, self.write):
      if fd >= 0:
        os.set_inheritable(fd, False)
        os.set_blocking(fd, False)

  @property
  def there(self) -> bool:
    return self.write >= 0

  def say(self, line: str) -> None:
    """Raises SupervisorGone where nobody hears; a supervisor that is only slow loses the line."""
    if self.there:
      try:
        os.write(self.write, line.encode() + b"\n")
      except BlockingIOError:
        pass
      except OSError:
        raise SupervisorGone from None

  def beat(self) -> None:
    """Once a turn of the loop."""
    if self.there and (now := time.monotonic()) >= self.next_beat:
      self.next_beat = now + BEAT
      self.say("beat")

  def loading(self, manifest_hash: str) -> None:
    """What comes now may take longer than a frame, and it is this bundle's doing if it never ends."""
    self.say(f"load {manifest_hash}")

  def running(self, manifest_hash: str) -> None:
    self.say(f"run {manifest_hash}")

  def try_out(self, path: str, runner: str | None) -> None:
    """Asks for a trial run of the bundle in that folder; the answer comes by answer()."""
    with contextlib.suppress(OSError):
      while os.read(self.read, MAX_ANSWER):  # of a trial before
        pass
    self.rest = b""
    self.say("try " + json.dumps({"path": path, "runner": runner}))

  def answer(self) -> dict[str, Any] | None:
    """{"path", "hash", "error"} of the trial that was asked for: the manifest's sha256, or why it must not run. None
    while it is not over."""
    with contextlib.suppress(OSError):
      self.rest += os.read(self.read, MAX_ANSWER)
    line, end, self.rest = self.rest.partition(b"\n")
    if not end:
      self.rest = line
      return None
    return json.loads(line)

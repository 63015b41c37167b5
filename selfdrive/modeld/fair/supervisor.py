"""Keeps a worker alive, and the rest of openpilot safe from it: what openpilot's manager starts is this, and the
manager never starts again what has died.

No numpy, no message library, no runner: nothing here can fail by what a bundle, a camera or a message holds. The worker
is a process of its own (child.py) that says through a pipe that it lives (link.py). Silent for too long, or with too
much memory, it is killed; when it has ended it is started again, with back-off."""

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from openpilot.selfdrive.modeld.fair.child import (
  MAX_LINE,
  TRIAL_NICE,
  Child,
  ended,
  environment,
  memory_limit,
  pipe,
  read_all,
)
from openpilot.selfdrive.modeld.fair.link import ENV

TICK = 0.5  # s between two looks
# s of silence: while Python and its modules load; while a bundle loads and runs first; between two frames; and for the
# whole of a trial run
LIMITS = {"start": 60.0, "load": 60.0, "run": 10.0, "trial": 60.0}
BACKOFF, MAX_BACKOFF = 0.5, 10.0  # s until an ended worker is started again; doubles each time
STABLE = 10.0  # s of frames after which the next end counts as the first
GRACE = 2.0  # s from SIGINT or SIGTERM to SIGKILL: openpilot's manager waits 5 s, ours 3 s
HANGS = 2  # times that a bundle may hang: the first may have been the machine
NICE = 5


def say(text: str, who: str = "fairmodeld") -> None:
  with contextlib.suppress(OSError, ValueError):  # a log that is full or gone must not end this process
    print(f"{who}: {text}", file=sys.stderr, flush=True)


class Supervisor:
  """command: the worker's. trial: a bundle's folder and a runner, or None -> the command of its trial run. by_hand: a
  worker that cannot begin ends this too.

  memory: bytes, of memory_limit() where None. limits, grace: seconds, see LIMITS and GRACE."""

  def __init__(
    self,
    command: Sequence[str],
    trial: Callable[[str, str | None], Sequence[str]] | None = None,
    by_hand: bool = False,
    memory: int | None = None,
    limits: dict[str, float] = LIMITS,
    grace: float = GRACE,
  ):
    self.command, self.trial_command, self.by_hand, self.limits, self.grace = command, trial, by_hand, limits, grace
    self.memory = memory_limit() if memory is None else memory
    self.worker: Child | None = None
    self.tell = -1  # the pipe to the worker
    self.phase, self.bundle = "start", ""  # what the worker does, and the hash of the manifest it does it with
    self.up = False  # it once got as far as its loop
    self.silence = 0.0  # s
    self.stable_since: float | None = None
    self.why = ""  # it was killed from here
    self.start_at, self.backoff = 0.0, BACKOFF
    self.ends, self.last_end = 0, ""
    self.hangs: dict[str, int] = {}
    self.refused: dict[str, str] = {}
    self.tried: tuple[str, Child] | None = None
    self.signal, self.signals = 0, 0
    self.looked = time.monotonic()

  # *** the worker ***

  def start(self) -> None:
    theirs, self.tell = pipe(False)

    def make(write: int) -> dict[str, Any]:
      said = {"read": theirs, "write": write, "ended": self.last_end, "ends": self.ends, "refused": self.refused}
      return {"env": environment(**{ENV: json.dumps(said)}), "pass_fds": (theirs, write)}

    try:
      self.worker = Child(self.command, self.memory, NICE, make)
    except BaseException:
      os.close(self.tell)
      raise
    finally:
      os.close(theirs)
    self.phase, self.bundle, self.silence, self.why, self.stable_since = "start", "", 0.0, "", None

  def hear(self, worker: Child) -> None:
    """Takes what the worker says: that it lives, what it does, which bundle it wants tried."""
    for line in worker.lines():
      self.silence = 0.0
      word, _, rest = line.decode(errors="replace").partition(" ")
      if word in ("load", "run"):
        self.phase, self.bundle = word, rest
        self.stable_since = time.monotonic() if word == "run" else None
      elif word == "beat":
        self.up = True
        if self.phase == "start":
          self.phase = "run"
        if self.phase == "run" and self.stable_since is None:
          self.stable_since = time.monotonic()
      elif word == "try":
        with contextlib.suppress(ValueError, KeyError, TypeError):
          wanted = json.loads(rest)
          self.try_out(str(wanted["path"]), wanted["runner"])

  def check(self, worker: Child) -> None:
    """Ends a worker that is silent or holds too much."""
    if self.why:
      return
    allowed = self.limits[self.phase]
    if self.silence > allowed:
      what = {"start": "did not start", "load": "did not load its bundle", "run": "did not come back from a frame"}[
        self.phase
      ]
      self.why = f"{what} within {allowed:g} s and was ended"
      if self.bundle:
        self.hangs[self.bundle] = self.hangs.get(self.bundle, 0) + 1
        if self.hangs[self.bundle] >= HANGS:
          self.refused[self.bundle] = f"hung {HANGS} times: it {what} within {allowed:g} s"
    elif (held := worker.memory()) > 0.9 * self.memory:
      self.why = f"held {held / 1e6:.0f} MB of the {self.memory / 1e6:.0f} MB that it may and was ended"
    if self.why:
      worker.kill()
      if not worker.wait(1.0):  # inside a driver, where no signal reaches it: another one could not take its place
        say(f"its process {self.why}, and does not go")

  def over(self, worker: Child) -> int | None:
    """After the worker's end. An exit code where this process ends with it."""
    code = worker.proc.returncode
    what = self.why or ended(code)
    worker.close()
    os.close(self.tell)
    self.worker, self.tell = None, -1
    self.drop_trial()
    if self.by_hand and not self.up and (code >= 0 or self.why):
      if self.why:
        say(f"the process {self.why}", "error")
      return 2 if self.why else code
    now = time.monotonic()
    if self.stable_since is not None and now - self.stable_since > STABLE:
      self.backoff = BACKOFF
    self.ends += 1
    self.last_end = f"the process before this one {what}"
    say(f"its process {what}; starting again in {self.backoff:g} s")
    self.start_at, self.backoff = now + self.backoff, min(MAX_BACKOFF, self.backoff * 2)
    return None

  # *** a trial run ***

  def try_out(self, path: str, runner: str | None) -> None:
    """Begins a trial run of a bundle; one that runs already gives way."""
    self.drop_trial()
    if self.trial_command is None:
      self.answer(path, None, "no trial run is possible here")
      return
    try:
      self.tried = (
        path,
        Child(self.trial_command(path, runner), self.memory, TRIAL_NICE, lambda w: {"env": environment(), "stdout": w}),
      )
    except OSError as e:
      self.answer(path, None, f"its trial run did not start: {e.strerror}")

  def watch_trial(self) -> None:
    if self.tried is None:
      return
    path, child = self.tried
    child.fill()
    late = time.monotonic() - child.begun > self.limits["trial"]
    if late:
      child.kill()
    if not child.dead():
      return
    while child.fill():
      pass
    last = (child.rest.decode(errors="replace").strip().splitlines() or [""])[-1]
    code = child.proc.returncode
    if late:
      self.answer(path, None, f"its trial run did not end within {self.limits['trial']:g} s")
    elif code == 0 and last.startswith("ok "):
      self.answer(path, last.removeprefix("ok "), None)
    else:
      self.answer(
        path,
        None,
        last.removeprefix("error: ") if code == 2 and last.startswith("error: ") else f"its trial run {ended(code)}",
      )
    self.drop_trial()

  def answer(self, path: str, manifest_hash: str | None, error: str | None) -> None:
    with contextlib.suppress(OSError):
      os.write(
        self.tell, json.dumps({"path": path, "hash": manifest_hash, "error": error}).encode()[: MAX_LINE - 1] + b"\n"
      )

  def drop_trial(self) -> None:
    if self.tried is not None:
      child = self.tried[1]
      child.kill()
      child.wait(1.0)
      child.close()
      self.tried = None

  # *** the loop ***

  def turn(self, wake: int) -> int | None:
    """Waits for something to happen, at most a tick, and does what is due. An exit code where all is over."""
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    for child in (self.worker, self.tried and self.tried[1]):
      if child is not None and child.open:
        poll.register(child.fd, select.POLLIN)
    poll.poll(TICK * 1000 if self.worker is not None else max(10.0, min(TICK, self.start_at - time.monotonic()) * 1000))
    read_all(wake)
    if self.signal:
      return self.end()
    now = time.monotonic()
    # a machine that slept or was too busy to run this process had no time for the worker either
    self.silence += min(now - self.looked, 2 * TICK)
    self.looked = now
    if self.worker is None:
      if now >= self.start_at:
        self.start()
      return None
    self.hear(self.worker)
    self.watch_trial()
    if (
      not self.worker.open and not self.worker.wait(1.0) and not self.why
    ):  # the pipe closes while it ends, or it has lost its mind
      self.why = "closed its pipe and was ended"
      self.worker.kill()
    if not self.worker.dead():
      self.check(self.worker)
    if self.worker.dead():
      return self.over(self.worker)
    return None

  def end(self) -> int:
    """Passes the signal on and sees the worker out."""
    if self.tried is not None:
      self.tried[1].kill()
    if self.worker is not None:
      self.worker.send(self.signal)
      end = time.monotonic() + self.grace
      while not self.worker.dead() and time.monotonic() < end and self.signals == 1:
        time.sleep(0.01)
      self.worker.kill()
      self.worker.wait(0.5)
    self.drop_trial()
    return 0

  def run(self) -> int:
    """Until SIGINT or SIGTERM. Whatever fails here fails for this turn."""
    r, w = pipe(True)
    os.set_blocking(w, False)

    def note(sig: int, _: Any) -> None:
      self.signal, self.signals = sig, self.signals + 1

    was = {sig: signal.signal(sig, note) for sig in (signal.SIGINT, signal.SIGTERM)}
    wakeup = signal.set_wakeup_fd(w, warn_on_full_buffer=False)
    try:
      while True:
        try:
          if (code := self.turn(r)) is not None:
            return code
        except Exception as e:  # no process or descriptor to be had
          say(f"the supervisor: {type(e).__name__}: {e}")
          self.start_at, self.backoff = time.monotonic() + self.backoff, min(MAX_BACKOFF, self.backoff * 2)
          time.sleep(0.1)
    finally:
      if self.worker is not None:
        self.worker.kill()
      signal.set_wakeup_fd(wakeup)
      for sig, handler in was.items():
        signal.signal(sig, handler)
      os.close(r)
      os.close(w)

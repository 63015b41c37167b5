"""Processes that the manager starts and stops. Nothing here outlives the manager: children ask the kernel to be killed
when it dies."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from openpilot.common.params import Params

ShouldRun = Callable[[bool, Params, Any], bool]
BACKOFF, MAX_BACKOFF = 0.5, 10.0  # s before a crashed process is started again; doubles with each crash
STABLE = 10.0  # s of life after which a crash counts as the first
STOP_TIMEOUT = 3.0  # s between SIGINT and SIGKILL
PR_SET_PDEATHSIG = 1
ROOT = str(Path(__file__).resolve().parents[2])


def die_with_parent() -> None:
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class ManagerProcess:
  def __init__(
    self,
    name: str,
    cmdline: list[str],
    should_run: ShouldRun,
    enabled: bool = True,
    sigkill: bool = False,
    cwd: str | None = None,
  ):
    self.name, self.cmdline, self.should_run, self.enabled, self.sigkill, self.cwd = (
      name,
      cmdline,
      should_run,
      enabled,
      sigkill,
      cwd,
    )
    self.proc: subprocess.Popen | None = None
    self.started_at = self.start_after = 0.0
    self.backoff, self.crashes = BACKOFF, 0
    self.exitcode: int | None = None

  def environment(self) -> dict[str, str] | None:
    """None: the manager's own."""
    return None

  @property
  def alive(self) -> bool:
    return self.proc is not None and self.proc.poll() is None

  def start(self) -> None:
    """Starts it unless it runs, or waits after a crash."""
    if self.proc is not None and self.proc.poll() is not None:
      self._crashed()
    if self.proc is not None or time.monotonic() < self.start_after:
      return
    print(f"manager: starting {self.name}", flush=True)
    self.started_at = time.monotonic()
    self.proc = subprocess.Popen(self.cmdline, cwd=self.cwd, env=self.environment(), preexec_fn=die_with_parent)

  def _crashed(self) -> None:
    assert self.proc is not None
    now = time.monotonic()
    if now - self.started_at > STABLE:
      self.backoff = BACKOFF
    self.exitcode, self.proc = self.proc.returncode, None
    self.crashes += 1
    self.start_after = now + self.backoff
    print(
      f"manager: {self.name} ended with exit code {self.exitcode}; starting again in {self.backoff:.1f} s",
      file=sys.stderr,
      flush=True,
    )
    self.backoff = min(MAX_BACKOFF, self.backoff * 2)

  def stop(self, block: bool = True) -> None:
    """SIGINT (SIGKILL where it wants that), then SIGKILL after STOP_TIMEOUT. block=False only sends the first."""
    if self.proc is None:
      self.start_after, self.backoff = (
        0.0,
        BACKOFF,
      )  # a process that is off on purpose starts at once when it is wanted again
      return
    if self.proc.poll() is None:
      self.proc.send_signal(signal.SIGKILL if self.sigkill else signal.SIGINT)
      if not block:
        return
      try:
        self.proc.wait(STOP_TIMEOUT)
      except subprocess.TimeoutExpired:
        self.proc.kill()
        self.proc.wait()
    self.exitcode, self.proc = self.proc.returncode, None
    self.start_after, self.backoff = 0.0, BACKOFF
    print(f"manager: stopped {self.name}", flush=True)

  def signal(self, sig: int) -> None:
    if self.alive:
      assert self.proc is not None
      with contextlib.suppress(ProcessLookupError):
        self.proc.send_signal(sig)


class PythonProcess(ManagerProcess):
  """openpilot's: a module with a main()."""

  def __init__(self, name: str, module: str, should_run: ShouldRun, enabled: bool = True, sigkill: bool = False):
    # -P: the folder that one works in is no place for modules
    super().__init__(name, [sys.executable, "-P", "-m", module], should_run, enabled, sigkill)
    self.module = module

  def environment(self) -> dict[str, str]:
    path = dict.fromkeys(filter(None, (ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep))))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


class NativeProcess(ManagerProcess):
  """openpilot's: a program, started in cwd."""

  def __init__(
    self, name: str, cwd: str, cmdline: list[str], should_run: ShouldRun, enabled: bool = True, sigkill: bool = False
  ):
    super().__init__(name, cmdline, should_run, enabled, sigkill, cwd)


def ensure_running(procs: Iterable[ManagerProcess], started: bool, params: Params, CP: Any = None) -> None:
  """Brings every process to the state that its predicate asks for."""
  for p in procs:
    if p.enabled and p.should_run(started, params, CP):
      p.start()
    else:
      p.stop()
